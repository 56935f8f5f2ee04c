"""The sizes in a Parquet file's footer, read from the footer's bytes.

pyarrow crashes the whole process when it reads a column of some damaged footers, so the footer's bytes are parsed here:
Thrift's compact protocol, of which only a few fields are needed.
"""

import io
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Fields of parquet.thrift: of FileMetaData, RowGroup, ColumnChunk and ColumnMetaData.
ROW_GROUPS, COLUMNS, NUM_ROWS, META_DATA = 4, 1, 3, 3
TYPE, ENCODINGS, PATH, NUM_VALUES, UNCOMPRESSED, COMPRESSED, PAGES, DICTIONARY = 1, 2, 3, 5, 6, 7, 9, 11
MAGIC, TAIL = b"PAR1", 2**16  # both ends of a file; bytes that are read first, as in pyarrow
DEEPEST = 16  # levels of nested structs
WIDTHS = {1: 4, 2: 8, 4: 4}  # INT32, INT64, FLOAT: bytes per value
PLAIN = {0, 3, 4}  # PLAIN, RLE, BIT_PACKED: encodings that write out each text
LEVELS = 4  # bytes of a value's definition and repetition levels


@dataclass(frozen=True)
class ColumnSizes:
    """A column of a row group, according to the footer: its values, its place in the file, its bytes there, and its
    bytes in memory at most. ``path`` is the column's name, then the nested fields that lead to its values."""

    path: tuple[str, ...]
    num_values: int
    start: int
    stored: int
    unpacked: int

    @property
    def name(self) -> str:
        return self.path[0]

    @property
    def end(self) -> int:
        return self.start + self.stored


@dataclass(frozen=True)
class RowGroupSizes:
    """A row group, according to the footer."""

    num_rows: int
    columns: list[ColumnSizes]

    @property
    def stored(self) -> int:
        return sum(column.stored for column in self.columns)

    @property
    def unpacked(self) -> int:
        return sum(column.unpacked for column in self.columns)


def read_footer(source, tail_bytes: int = TAIL) -> bytes:
    """The footer of a path or an open file, in the form of a Parquet file without data. Raises ValueError without one.

    ``tail_bytes`` are read first; if the footer is longer, it is then read in full.
    """
    if isinstance(source, (str, Path)):
        with Path(source).open("rb") as file:
            return read_footer(file)
    size = source.seek(0, io.SEEK_END)
    tail = _last(source, size, tail_bytes)
    footer = int.from_bytes(tail[-8:-4], "little") + 8
    if tail[-4:] != MAGIC or footer > size:
        raise ValueError("no Parquet footer at its end")
    return MAGIC + (tail if footer <= len(tail) else _last(source, size, footer))[-footer:]


def _last(source, size: int, count: int) -> bytes:
    source.seek(max(0, size - count))
    return source.read(min(size, count))


def row_group_sizes(footer: bytes) -> list[RowGroupSizes]:
    """The row groups in ``read_footer``'s bytes. Raises ValueError or LookupError if they are not a footer."""
    fields = _Compact(footer[4:-8]).struct()
    try:
        return [
            RowGroupSizes(group[NUM_ROWS], [_column(chunk[META_DATA]) for chunk in group[COLUMNS]])
            for group in fields[ROW_GROUPS]
        ]
    except (AttributeError, TypeError) as error:
        raise ValueError("the footer has a field of another kind than its number says") from error


def _column(fields: dict[int, Any]) -> ColumnSizes:
    num_values, stored, uncompressed = (fields[key] for key in (NUM_VALUES, COMPRESSED, UNCOMPRESSED))
    if min(num_values, stored, uncompressed) < 0:
        raise ValueError("a size below 0 in the footer")
    if width := WIDTHS.get(fields[TYPE]):
        unpacked = max(uncompressed, num_values * (width + LEVELS))
    else:
        # An entry of a dictionary, or a prefix, may be repeated for each value.
        repeats = 1 if PLAIN.issuperset(fields[ENCODINGS]) else max(1, num_values)
        unpacked = uncompressed * repeats + num_values * (8 + LEVELS)
    path = tuple(part.decode(errors="replace") for part in fields[PATH])
    start = min(fields[PAGES], fields.get(DICTIONARY) or fields[PAGES])
    return ColumnSizes(path, num_values, start, stored, unpacked)


class _Compact:
    """Thrift's compact protocol: structs as dicts by field number."""

    def __init__(self, data: bytes):
        self._data, self._place = data, 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        if depth > DEEPEST:
            raise ValueError("the footer is nested too deep")
        fields: dict[int, Any] = {}
        number = 0
        while header := self._byte():
            number = number + (header >> 4) if header >> 4 else self._integer()
            kind = header & 15
            fields[number] = kind == 1 if kind in (1, 2) else self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2, 3):  # a boolean in a list, a byte
            return self._byte()
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 7:
            return self._bytes(8)
        if kind == 8:
            return self._bytes(self._varint())
        if kind in (9, 10):
            header = self._byte()
            count = header >> 4 if header >> 4 < 15 else self._varint()
            return [self._value(header & 15, depth + 1) for _ in range(count)]
        if kind == 12:
            return self.struct(depth + 1)
        raise ValueError(f"the footer has a field of kind {kind}")

    def _byte(self) -> int:
        self._place += 1
        return self._data[self._place - 1]

    def _bytes(self, count: int) -> bytes:
        self._place += count
        if self._place > len(self._data):
            raise ValueError("the footer ends too early")
        return self._data[self._place - count : self._place]

    def _varint(self) -> int:
        value = 0
        for shift in itertools.count(0, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise AssertionError

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
