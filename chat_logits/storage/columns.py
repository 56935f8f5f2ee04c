"""Read only some columns of a stored dataset, for all rows or a few.

For a shard on the Hub, only the footer and the bytes of these columns are fetched.
"""

import io
import itertools
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa

from chat_logits.errors import ToolkitError
from chat_logits.storage.dataset import StoredDataset
from chat_logits.storage.footer import RowGroupSizes, read_footer, row_group_sizes
from chat_logits.storage.shard_reading import named_damage, opened_shard, refuse_bomb, row_ranges, source_range

AT_ONCE = 8  # requests for the pieces of a shard
FIRST_TAIL, MORE = 2**14, 1024  # bytes requested first for a footer: for the first one; beyond the last one's size
FOOTERS = 128  # footers cached; the least recently used one is dropped first


class ColumnReader:
    """Reads columns of a dataset's shards; any thread may use it. The footers of recently used shards are cached."""

    def __init__(self, dataset: StoredDataset):
        self._dataset = dataset
        self._footers: OrderedDict[int, tuple[bytes, list[RowGroupSizes]]] = OrderedDict()
        self._tail = FIRST_TAIL
        self._lock = threading.Lock()  # protects both; no file is read while it is held
        self.firsts = list(itertools.accumulate((shard.num_rows for shard in dataset.shards), initial=0))

    def shard(self, number: int, names: Sequence[str], only: Sequence[int] | None = None) -> pa.Table:
        """Columns of ``shards[number]``, for all its rows or for those in ``only`` (numbers within it, in this order).

        ``names`` are columns, or paths within them such as "messages.list.element.role". The rows' own checksums cover
        all columns and so are not compared; those of Parquet's pages are. Raises DamagedShard, and what reading from
        the Hub raises.
        """
        shard, fingerprint = self._dataset.shards[number], self._dataset.manifest.fingerprint
        with self._dataset.opened(shard.path) as source, named_damage(shard.path):
            footer, sizes = self._footer(number, source)
            remote = None if _is_path(source) else _Pieces(source)
            arguments = (remote if remote is not None else source, shard.path, fingerprint, footer)
            with opened_shard(*arguments, pre_buffer=remote is None) as (file, described, _):
                source_range(described, shard.path, self._dataset.manifest.rows_per_shard)
                ranges = row_ranges(file, described, shard.num_rows, shard.path)
                groups = [group for group, rows in enumerate(ranges) if only is None or any(i in rows for i in only)]
                for group in groups:
                    refuse_bomb(sizes[group], group, shard.path)
                if remote is not None:
                    remote.fetch([bounds for group in groups for bounds in _byte_ranges(sizes[group], names)])
                # An Arrow thread that releases a Python file object after Python has shut down would crash the process.
                table = file.read_row_groups(groups, columns=list(names), use_threads=remote is None)
            table.validate(full=True)  # also checks that texts are UTF-8
        if only is None:
            return table
        kept = list(itertools.chain.from_iterable(ranges[group] for group in groups))
        return table.take([kept.index(row) for row in only])

    def rows(self, rows: Sequence[int], names: Sequence[str]) -> list[dict | ToolkitError]:
        """Columns of some stored rows: a dict for each, or the error that reading it raised."""
        found: dict[int, dict | ToolkitError] = {}
        for number, (first, end) in enumerate(itertools.pairwise(self.firsts)):
            offsets = [row - first for row in rows if first <= row < end]
            if offsets:
                read = self._apart(number, offsets, names)
                found.update(zip((first + offset for offset in offsets), read, strict=True))
        return [found[row] for row in rows]

    def _apart(self, number: int, offsets: list[int], names: Sequence[str]) -> list:
        """Rows of a shard, read together, or one by one if one is damaged, so that the others can still be read."""
        try:
            return self.shard(number, names, offsets).to_pylist()
        except ToolkitError as error:
            if len(offsets) == 1:
                return [error]
        return [entry for offset in offsets for entry in self._apart(number, [offset], names)]

    def _footer(self, number: int, source) -> tuple[bytes, list[RowGroupSizes]]:
        with self._lock:
            if number in self._footers:
                self._footers.move_to_end(number)
                return self._footers[number]
            tail = self._tail
        footer = read_footer(source, tail)
        found = footer, row_group_sizes(footer)
        with self._lock:
            self._tail, self._footers[number] = len(footer) + MORE, found
            while len(self._footers) > FOOTERS:
                self._footers.popitem(last=False)
        return found


def _is_path(source) -> bool:
    return isinstance(source, (str, Path))


def _byte_ranges(group: RowGroupSizes, names: Sequence[str]) -> list[tuple[int, int]]:
    """The byte ranges of the columns, with adjacent ones merged."""
    wanted = [column for column in group.columns if column.name in names or ".".join(column.path) in names]
    ranges: list[tuple[int, int]] = []
    for column in sorted(wanted, key=lambda column: column.start):
        if ranges and ranges[-1][1] == column.start:
            ranges[-1] = ranges[-1][0], column.end
        else:
            ranges.append((column.start, column.end))
    return ranges


class _Pieces(io.RawIOBase):
    """A file on the Hub of which some pieces are fetched, in parallel, before they are read."""

    def __init__(self, file):
        self._file, self.size, self._place = file, file.size, 0
        self._pieces: dict[int, bytes] = {}  # by their first byte

    def fetch(self, ranges: list[tuple[int, int]]) -> None:
        """Fetch these pieces, several at once."""
        with ThreadPoolExecutor(AT_ONCE) as pool:
            data = pool.map(lambda bounds: self._file._fetch_range(*bounds), ranges)
            self._pieces = {start: piece for (start, _), piece in zip(ranges, data, strict=True)}

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.size}[whence]
        return self._place

    def readinto(self, buffer) -> int:
        start, end = self._place, min(self.size, self._place + len(buffer))
        data = self._stored(start, end) or self._file._fetch_range(start, end) if end > start else b""
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)

    def _stored(self, start: int, end: int) -> bytes | None:
        for first, piece in self._pieces.items():
            if first <= start and end <= first + len(piece):
                return piece[start - first : end - first]
        return None
