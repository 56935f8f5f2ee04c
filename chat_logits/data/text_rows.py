"""Rows of text files, read line by line in any order; one that cannot be read is a ``BadRow`` in its place."""

import io
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

import pyarrow as pa

from chat_logits.data.parquet_rows import filesystem_of, name_in_dataset

MARK_EVERY = 1024  # rows between two places that are kept
SKIPPED_AT_ONCE = 2**20  # bytes
ZSTD = ".zst"  # fsspec knows it with other packages alone


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be read, and why."""

    reason: str


class Entry(NamedTuple):
    """A row of a file as it was found: where it begins, in bytes and in lines, and what was read."""

    place: int
    line: int
    raw: object


class Mark(NamedTuple):
    """Where a row begins: in which file, and there as an ``Entry`` does."""

    row: int
    file: int
    place: int
    line: int


class TextRows:
    """The rows of ``files`` (paths or fsspec URLs, compressed or not) one after the other.

    ``num_rows`` is None where ``is_streamed``: the files are then read only as far as rows are asked for. ``names`` are
    those of the files where they were downloaded from.
    """

    features = None

    def __init__(self, files: list[str], is_streamed: bool = False, names: list[str] | None = None):
        self._files, self._filesystem = files, filesystem_of(files[0])
        self._names = list(map(name_in_dataset, names or files))
        self._marks = [Mark(0, 0, 0, 1)]
        self.num_rows = None if is_streamed else sum(1 for _ in self._rows(0))

    def read(self, first: int, end: int) -> list[dict | BadRow]:
        """Rows ``first`` up to ``end``, fewer at the end of the files."""
        rows: list[dict | BadRow] = []
        if first < end:
            for number, file, entry in self._rows(first):
                if number >= end:
                    break
                if number >= first:
                    rows.append(entry.raw if isinstance(entry.raw, BadRow) else self._parse(file, entry.raw))
        return rows

    def place(self, row: int) -> str:
        """File and line of a row, in words."""
        for number, file, entry in self._rows(row):
            if number == row:
                return f"{self._names[file]}, {self._unit(file)} {entry.line}"
        return f"row {row}"

    def _rows(self, first: int) -> Iterator[tuple[int, int, Entry]]:
        """Rows with their numbers and files, from the last mark before ``first`` on; they are not parsed yet."""
        number, file, place, line = self._marks[bisect_right(self._marks, (first, len(self._files), 0, 0)) - 1]
        for current in range(file, len(self._files)):
            for entry in self._entries(current, *((place, line) if current == file else (0, 1))):
                if number % MARK_EVERY == 0 and number > self._marks[-1].row:
                    self._marks.append(Mark(number, current, entry.place, entry.line))
                yield number, current, entry
                number += 1

    def _unit(self, _file: int) -> str:
        """What an entry's ``line`` counts."""
        return "line"

    def _entries(self, file: int, place: int, line: int) -> Iterator[Entry]:
        """The rows of a file from ``place`` on."""
        raise NotImplementedError

    def _parse(self, _file: int, raw) -> dict | BadRow:
        raise NotImplementedError

    def _open(self, file: int, place: int = 0) -> BinaryIO:
        """A file, without its compression, from a place on."""
        if not self._names[file].endswith(ZSTD):
            from fsspec.utils import infer_compression

            compression = infer_compression(self._names[file])
            opened = self._filesystem.open(self._files[file], "rb", compression=compression)
            opened.seek(place)
            return opened
        compressed = pa.PythonFile(self._filesystem.open(self._files[file], "rb"), "r")
        opened = io.BufferedReader(pa.CompressedInputStream(compressed, "zstd"))
        while place > 0 and (skipped := opened.read(min(place, SKIPPED_AT_ONCE))):
            place -= len(skipped)
        return opened
