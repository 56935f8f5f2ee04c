"""Notes and tags on conversations, in a small SQLite file in the dataset's folder, or among the user's own data.

A mark belongs to a source row and a run's fingerprint, so that it is also valid for a copy of the dataset.
"""

import json
import operator
import os
import sqlite3
import sys
import threading
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from chat_logits.errors import ToolkitError, UsageError
from chat_logits.storage.dataset import StoredDataset

FILE = "marks.sqlite"
LONGEST, TAG_LONGEST, TAGS_MOST = 4000, 60, 20  # characters of a note and a tag; tags of a conversation
TABLE = (
    "CREATE TABLE marks (fingerprint TEXT, source_index INTEGER, note TEXT, tags TEXT, "
    "PRIMARY KEY (fingerprint, source_index))"
)


@dataclass(frozen=True)
class Mark:
    """A note on a conversation, "" without one, and its sorted tags."""

    note: str
    tags: list[str]

    @classmethod
    def read(cls, note: object, tags: object) -> "Mark":
        """A mark from a page's values. Raises UsageError for invalid ones."""
        if not isinstance(note, str) or not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
            raise UsageError("expected a text as the note, and a list of texts as tags")
        names = sorted({" ".join(tag.split()) for tag in tags} - {""})
        if not all(map(is_whole, [note, *names])):
            raise UsageError("a note or a tag has half a character (a lone surrogate); expected text")
        if len(note) > LONGEST or len(names) > TAGS_MOST or any(len(name) > TAG_LONGEST for name in names):
            raise UsageError(
                f"a note has {LONGEST:,} characters at most, a tag {TAG_LONGEST}, and a conversation {TAGS_MOST} tags"
            )
        return cls(note.strip(), names)


def is_whole(text: str) -> bool:
    """Whether a text can be encoded in UTF-8: it has no lone surrogate."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def marks_file(dataset: StoredDataset) -> Path:
    """The file of a dataset's marks: in its folder or, if it is on the Hub or cannot be written, among the user's own
    data, where all such datasets share a file."""
    folder = Path(dataset.dataset_id)
    if dataset.revision is None and os.access(folder, os.W_OK):
        return folder / FILE
    return _user_data() / "chat-logits" / FILE


def _user_data() -> Path:
    try:
        return _in_home()
    except RuntimeError:  # the user's home is unknown: an error is raised once a mark is written
        return Path(os.devnull)


def _in_home() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")


class Marks:
    """The marks of one run in ``file``, which is made with the first mark. Any thread may use it.

    Raises ToolkitError if the file is not a marks file, or cannot be read or written.
    """

    def __init__(self, file: Path, fingerprint: str):
        self.file, self._fingerprint, self._lock = file, fingerprint, threading.Lock()

    def all(self) -> dict[int, Mark]:
        """The marks by source row."""
        if not self.file.exists() and not self.file.is_symlink():
            return {}
        with self._opened() as connection:
            sql = "SELECT source_index, note, tags FROM marks WHERE fingerprint = ?"
            rows = connection.execute(sql, [self._fingerprint]).fetchall()
        try:
            return {operator.index(number): Mark.read(note, json.loads(tags)) for number, note, tags in rows}
        except (ValueError, TypeError, RecursionError, UsageError) as error:
            raise ToolkitError(f"{self.file}: its marks are not what was written ({error}); move it away") from error

    def put(self, source_index: int, mark: Mark) -> None:
        """Replace a source row's mark; an empty one removes it."""
        with self._opened() as connection:
            key = [self._fingerprint, source_index]
            connection.execute("DELETE FROM marks WHERE fingerprint = ? AND source_index = ?", key)
            if mark.note or mark.tags:
                connection.execute(
                    "INSERT INTO marks VALUES (?, ?, ?, ?)",
                    [*key, mark.note, json.dumps(mark.tags, ensure_ascii=False)],
                )

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Make the table, or check that the file has nothing else. The dataset may come from others, and a view, a
        trigger or a computed column might run forever."""
        connection.execute("PRAGMA trusted_schema = OFF")
        found = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL LIMIT 2").fetchall()
        if not found:
            connection.execute(TABLE.replace("TABLE", "TABLE IF NOT EXISTS", 1))  # another server may be making it
        elif [" ".join(sql.split()) for (sql,) in found] != [TABLE]:
            raise ToolkitError(f"{self.file}: more or other than a table of marks is in it; move it away")

    @contextmanager
    def _opened(self):
        if self.file.is_symlink() or (self.file.exists() and not self.file.is_file()):
            raise ToolkitError(f"{self.file}: not a regular file, expected a file of marks; move it away")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self._lock, closing(sqlite3.connect(self.file, timeout=10)) as connection, connection:
                self._prepare(connection)
                yield connection
        except (sqlite3.Error, OSError) as error:
            raise ToolkitError(f"{self.file}: marks cannot be read or written there: {error}") from error
