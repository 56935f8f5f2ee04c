"""Rows of JSON files without conversion: text that looks like a date stays text, and an explicit null stays null.

``datasets`` reads JSON through Arrow, which guesses one type for a whole column, gives objects each other's keys, and
stops at the first line that does not parse. Here each line is a row; one that cannot be read becomes a ``BadRow``.
"""

import io
import itertools
import json
import re
from collections.abc import Iterator
from typing import BinaryIO

from chat_logits.data.text_rows import BadRow, Entry, TextRows

BLANK = b"\xef\xbb\xbf \t\r\n"  # bytes that may precede a file's first character
WHOLE = re.compile(rb"[%s]*(\[|\{[ \t]*[\r\n])" % BLANK)  # the beginning of a file that is not read line by line


def _whole(name: str, content: bytes) -> list | None:
    """The file's one list, or a list of its only object; None if it begins with an object but is to be read by lines.

    Raises ValueError if the list does not parse or is not all of the file.
    """
    try:
        found = json.loads(content.decode("utf-8-sig"))
        return found if isinstance(found, list) else [found]
    except (ValueError, RecursionError) as error:
        if not content.lstrip(BLANK).startswith(b"["):
            return None
        raise ValueError(
            f"{name} begins with '[', so it is read as one JSON list of rows, but: {error}. Expected such a list, or "
            'one object a line: {"messages": […]}'
        ) from error


class JsonRows(TextRows):
    """The rows of JSON files: objects, one per line.

    A file that begins with ``[`` is one list of objects, and a file's only object may span several lines; both are
    held in memory. Empty lines are ignored.
    """

    expected = "; expected one object a line, as `jq -c .` writes them, or one list of objects"

    def __init__(self, files: list[str], is_streamed: bool = False, names: list[str] | None = None):
        self._lists: dict[int, list] = {}
        super().__init__(files, is_streamed, names)

    def _entries(self, file: int, place: int, line: int) -> Iterator[Entry]:
        if file not in self._lists:
            with self._open(file, place) as opened:
                head = b"" if place else opened.read(16)
                head += opened.read() if (is_whole := WHOLE.match(head)) else b""
                rows = _whole(self._names[file], head) if is_whole else None
                if rows is None:
                    yield from self._lines(head, opened, place, line)
                    return
                self._lists[file] = rows
        yield from (Entry(i, i + 1, self._lists[file][i]) for i in range(place, len(self._lists[file])))

    def _lines(self, head: bytes, opened: BinaryIO, place: int, line: int) -> Iterator[Entry]:
        """The lines of a file from a place on; ``head`` is what was already read from there."""
        for text in itertools.chain(io.BytesIO(head + opened.readline()), opened):
            if text.strip():
                yield Entry(place, line, text)
            place, line = place + len(text), line + 1

    def _unit(self, file: int) -> str:
        return "entry" if file in self._lists else "line"

    def _parse(self, _file: int, raw: bytes | object) -> dict | BadRow:
        try:
            row = json.loads(raw.decode("utf-8-sig")) if isinstance(raw, bytes) else raw
        except UnicodeDecodeError:
            return BadRow("a line that is not UTF-8 text")
        except (ValueError, RecursionError) as error:
            return BadRow(f"a line that is not JSON: {str(error).partition(':')[0]}")
        kind = type(row).__name__
        return row if isinstance(row, dict) else BadRow(f"a line of JSON that is not an object but {kind}")
