"""Rows by number from what ``datasets`` has opened: a table on this machine, or a stream."""

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate, islice

from chat_logits.data.parquet_rows import name_in_dataset


class TableRows:
    """Rows of a memory-mapped ``datasets.Dataset``; ``files`` are those it was made from, if they are Parquet."""

    def __init__(self, table, files: Sequence[str] = ()):
        self._table, self._files = table, files
        self.num_rows, self.features = len(table), table.features

    def keep(self, columns: list[str]) -> None:
        """Decode only these columns from now on."""
        self._table = self._table.select_columns(columns)
        self.features = self._table.features

    def place(self, row: int) -> str:
        """A row's file and its number in it, as text; only its overall number if the files are not here. From 1."""
        file = bisect_right(self._firsts, row) - 1
        if file in range(len(self._firsts) - 1):
            return f"{name_in_dataset(self._files[file])}, row {row - self._firsts[file] + 1}"
        return f"row {row + 1}"

    @cached_property
    def _firsts(self) -> list[int]:
        """The first row of each file, and the end of the last file; empty unless all files are on this machine."""
        import pyarrow.parquet as pq

        is_here = all(map(os.path.isfile, self._files))
        return list(accumulate((pq.read_metadata(file).num_rows for file in self._files), initial=0)) if is_here else []

    def read(self, first: int, end: int) -> list[dict]:
        end = min(end, self.num_rows)
        return list(self._table.select(range(first, end))) if first < end else []


class StreamRows:
    """Rows of a ``datasets.IterableDataset``: earlier rows are read too, and going back starts over."""

    def __init__(self, stream, num_rows: int | None):
        self._stream, self.num_rows, self.features = stream, num_rows, stream.features
        self._open: Iterator[dict] | None = None
        self._next_row = 0

    def keep(self, columns: list[str]) -> None:
        """Decode only these columns from now on."""
        self._stream = self._stream.select_columns(columns)
        self.features, self._open = self._stream.features, None

    def place(self, row: int) -> str:
        """A row's number, from 1, as text."""
        return f"row {row + 1}"

    def read(self, first: int, end: int) -> list[dict]:
        if first >= end:
            return []
        if self._open is None or first < self._next_row:
            self._open, self._next_row = iter(self._stream.skip(first)), first
        stream, self._open = self._open, None  # a failed stream is not used again: it would seem to have ended
        rows = list(islice(stream, first - self._next_row, end - self._next_row))
        self._open, self._next_row = stream, first + len(rows)
        return rows
