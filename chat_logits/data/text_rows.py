"""Rows of text files, read line by line in any order; a row that cannot be read is a ``BadRow`` in its place.

Read in order, each file is opened and read once: compressed files can only be read from the start.
"""

import io
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow as pa

from chat_logits.data.parquet_rows import filesystem_of, name_in_dataset

MARK_EVERY = 1024  # rows between two stored positions
SKIPPED_AT_ONCE = 2**20  # bytes
ZSTD = ".zst"  # fsspec reads it only with additional packages
KEPT_RANGES = 256  # of lines of up to ``MARK_EVERY`` rows each, 16 bytes a row: 4 MiB


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be read, and why."""

    reason: str


class Entry(NamedTuple):
    """A row of a file, not yet parsed: where it begins (``place`` in bytes, ``line`` from 1), and what was read."""

    place: int
    line: int
    raw: object


class Mark(NamedTuple):
    """Where a row begins: its file, and ``place`` and ``line`` as in ``Entry``."""

    row: int
    file: int
    place: int
    line: int


class Found(NamedTuple):
    """A row with its number, its file, and the file's state before it was opened."""

    row: int
    file: int
    entry: Entry
    state: tuple | None


class Reading:
    """A sequential reading of rows: the next row is ``next_row``, the last one was in ``file``."""

    state: tuple | None

    def __init__(self, rows: Generator[Found, None, None], next_row: int):
        self._rows, self.next_row = rows, next_row
        self.file, self.state = -1, ()  # none yet

    def up_to(self, end: int) -> Iterator[Found]:
        """The rows up to ``end``, fewer at the end of the files."""
        for found in islice(self._rows, end - self.next_row):
            self.next_row, self.file, self.state = found.row + 1, found.file, found.state
            yield found

    def close(self) -> None:
        self._rows.close()


class RecentLines:
    """Files and lines of the most recently read rows."""

    def __init__(self) -> None:
        self._ranges: deque[tuple[int, array]] = deque(maxlen=KEPT_RANGES)  # first row; file and line of each in turn

    def note(self, row: int, file: int, line: int) -> None:
        if not self._ranges or len(self._ranges[-1][1]) >= 2 * MARK_EVERY or row != self._following():
            self._ranges.append((row, array("q")))
        self._ranges[-1][1].extend((file, line))

    def _following(self) -> int:
        first, lines = self._ranges[-1]
        return first + len(lines) // 2

    def find(self, row: int) -> tuple[int, int] | None:
        for first, lines in reversed(self._ranges):
            if 0 <= (at := 2 * (row - first)) < len(lines):
                return lines[at], lines[at + 1]
        return None


class TextRows:
    """The rows of ``files`` (paths or fsspec URLs, compressed or not) one after the other.

    With ``is_streamed``, ``num_rows`` is None: the files are then read only as far as rows are requested. ``names`` are
    the names that the files have where they were downloaded from.
    """

    features = None
    expected = ""  # end of the message if all rows of a file are bad: what was expected

    def __init__(self, files: list[str], is_streamed: bool = False, names: list[str] | None = None):
        self._files, self._filesystem = files, filesystem_of(files[0])
        self._names = list(map(name_in_dataset, names or files))
        self._marks = [Mark(0, 0, 0, 1)]
        self._reading: Reading | None = None
        self._recent = RecentLines()
        self.num_rows = None if is_streamed else sum(1 for _ in self._rows(self._marks[0]))

    def read(self, first: int, end: int) -> list[dict | BadRow]:
        """Rows ``first`` up to ``end``, fewer at the end of the files."""
        rows: list[dict | BadRow] = []
        if first < end:
            reading, self._reading = self._reading_at(first), None  # a failed one is not used again
            for row, file, entry, _ in reading.up_to(end):
                if row >= first:
                    self._recent.note(row, file, entry.line)
                    rows.append(entry.raw if isinstance(entry.raw, BadRow) else self._parse(file, entry.raw))
            self._reading = reading
            if reading.next_row == self.num_rows:
                reading.close()
        return rows

    def place(self, row: int) -> str:
        """File and line of a row, as text; only its overall number if they are not known. Numbers from 1."""
        found = self._recent.find(row) or self._search(row)
        return f"{self._names[found[0]]}, {self._unit(found[0])} {found[1]}" if found else f"row {row + 1}"

    def _search(self, row: int) -> tuple[int, int] | None:
        """File and line of a row."""
        rows = self._rows(self._mark(row))
        return next(((found.file, found.entry.line) for found in rows if found.row == row), None)

    def _reading_at(self, first: int) -> Reading:
        """The current reading if it reaches ``first`` sooner than a new one would, else a new one."""
        reading, mark = self._reading, self._mark(first)
        if reading is not None:
            if reading.next_row <= first and self._goes_on(reading, mark):
                return reading
            reading.close()
        return Reading(self._rows(mark), mark.row)

    def _goes_on(self, reading: Reading, mark: Mark) -> bool:
        """Whether a reading can continue: it is at or past the mark, or on the way to it in the same compressed file,
        and its file has not changed."""
        is_on_the_way = reading.file == mark.file and self._compression(mark.file) is not None
        return (reading.next_row >= mark.row or is_on_the_way) and reading.state == self._state(reading.file)

    def _state(self, file: int) -> tuple | None:
        """Values that change if a file on this machine changes; None for a remote file, which is read at one commit."""
        try:
            status = Path(self._files[file]).stat()
        except OSError:
            return None
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

    def _mark(self, row: int) -> Mark:
        """The last mark at or before a row."""
        return self._marks[bisect_right(self._marks, (row, len(self._files), 0, 0)) - 1]

    def _rows(self, mark: Mark) -> Generator[Found, None, None]:
        """The rows from a mark on, not parsed."""
        row = mark.row
        for file in range(mark.file, len(self._files)):
            state = self._state(file)
            for entry in self._entries(file, *((mark.place, mark.line) if file == mark.file else (0, 1))):
                if row % MARK_EVERY == 0 and row > self._marks[-1].row:
                    self._marks.append(Mark(row, file, entry.place, entry.line))
                yield Found(row, file, entry, state)
                row += 1

    def _unit(self, _file: int) -> str:
        """The unit that an entry's ``line`` counts."""
        return "line"

    def _entries(self, file: int, place: int, line: int) -> Iterator[Entry]:
        """The rows of a file from ``place`` on."""
        raise NotImplementedError

    def _parse(self, _file: int, raw) -> dict | BadRow:
        raise NotImplementedError

    def _open(self, file: int, place: int = 0) -> BinaryIO:
        """A file, decompressed, from a place on."""
        compression = self._compression(file)
        if compression != ZSTD:
            opened = self._filesystem.open(self._files[file], "rb", compression=compression)
            opened.seek(place)
            return opened
        compressed = pa.PythonFile(self._filesystem.open(self._files[file], "rb"), "r")
        opened = io.BufferedReader(pa.CompressedInputStream(compressed, "zstd"))
        while place > 0 and (skipped := opened.read(min(place, SKIPPED_AT_ONCE))):
            place -= len(skipped)
        return opened

    def _compression(self, file: int) -> str | None:
        from fsspec.utils import infer_compression

        return ZSTD if self._names[file].endswith(ZSTD) else infer_compression(self._names[file])
