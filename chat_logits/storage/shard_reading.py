"""Read a shard: all of it with its checksums, or a row or a row group at a time, with limits on the memory it may take.

FORMAT.md, "Files", is the specification.
"""

import itertools
import json
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from chat_logits.errors import ToolkitError
from chat_logits.storage.footer import RowGroupSizes, read_footer, row_group_sizes
from chat_logits.storage.json_files import canonical
from chat_logits.storage.shard import METADATA_KEY, SCHEMA, DamagedShard, entry_of, is_of_numbers, row_checksums
from chat_logits.storage.shard_list import ShardEntry

MIB = 2**20
# Limits for a reader: uncompressed bytes of a row group, as a fixed amount plus so many per byte in the file (real ones
# have up to 5), and bytes of one row's messages and tools.
GROUP_LEAST, GROUP_RATIO, MESSAGES = 128 * MIB, 100, 64 * MIB
FOOTER = "footer"  # key in a shard's sizes, next to the columns, for everything outside them


def check_shard(folder: Path, path: str, fingerprint: str, rows_per_shard: int) -> ShardEntry:
    """Read a whole shard, check its checksums, and return its entry. Raises DamagedShard with the reason."""
    file = folder / path
    with opened_shard(file, path, fingerprint) as (parquet, described, groups):
        for number, group in enumerate(groups):
            refuse_bomb(group, number, path)
        table = parquet.read()
        first, rows = ShardEntry(path, 0).shard * rows_per_shard, table["source_index"].to_pylist()
        covered = sorted([*rows, *(entry["row"] for entry in described["skipped"])])
        if covered != list(range(first, first + len(covered))) or len(covered) > rows_per_shard or rows != sorted(rows):
            raise DamagedShard(f"{path}: source rows {covered[:1]} to {covered[-1:]}, expected those from {first} on")
        if row_checksums(table) != described.get("row_crc32"):
            raise DamagedShard(f"{path}: its rows are not those that were written (checksums differ)")
        return entry_of(path, table, described, file.stat().st_size)


def read_shard_rows(
    source, path: str, fingerprint: str, rows_per_shard: int, num_rows: int, only: int | None = None
) -> Iterator[dict]:
    """The rows of a shard with ``num_rows`` rows in order, or just row ``only``, one row group at a time.

    With ``rows_per_shard``, the shard's number determines which source rows it may have. ``source`` is a path or an
    open file, ``path`` its name in messages. Raises DamagedShard.
    """
    with opened_shard(source, path, fingerprint) as (file, described, sizes):
        covered = source_range(described, path, rows_per_shard)
        for group, rows in enumerate(row_ranges(file, described, num_rows, path)):
            wanted = rows if only is None else [only] if only in rows else []
            if not wanted:
                continue
            refuse_bomb(sizes[group], group, path)
            table = file.read_row_group(group)
            check_order(table["source_index"], covered, path)
            for offset in wanted:
                row = table.slice(offset - rows.start, 1)
                _check_rows(row, offset, described, path)
                yield row.to_pylist()[0]


def read_row_groups(
    source, path: str, fingerprint: str, rows_per_shard: int, num_rows: int, only: Collection[int] | None = None
) -> Iterator[list[dict]]:
    """The rows of a shard in order, one row group at a time, with lists of numbers as arrays over Arrow's buffers.

    For many rows, or those in ``only``: ten times as fast as ``read_shard_rows``, which has the same other arguments.
    A row group without any of the rows is not read. Raises DamagedShard.
    """
    with opened_shard(source, path, fingerprint) as (file, described, sizes):
        covered = source_range(described, path, rows_per_shard)
        for group, rows in enumerate(row_ranges(file, described, num_rows, path)):
            wanted = [row - rows.start for row in rows if only is None or row in only]
            if not wanted:
                continue
            refuse_bomb(sizes[group], group, path)
            table = file.read_row_group(group)
            check_order(table["source_index"], covered, path)
            _check_rows(table, rows.start, described, path)
            table = table if len(wanted) == len(rows) else table.take(wanted)
            columns = [_row_values(table[name].combine_chunks()) for name in SCHEMA.names]
            yield [dict(zip(SCHEMA.names, values, strict=True)) for values in zip(*columns, strict=True)]


def _row_values(column: pa.Array) -> list:
    """A column's values by row; lists of numbers as arrays."""
    if not is_of_numbers(column.type):
        return column.to_pylist()
    values, offsets = np.from_dlpack(column.values), np.from_dlpack(column.offsets)
    return [values[a:b] for a, b in itertools.pairwise(offsets.tolist())]


class ShardNotes(NamedTuple):
    """What a shard records about its source rows, as in ``ShardAround``."""

    skipped: list[dict]
    turns_left_out: int
    remarks: list[dict]


def shard_notes(source, path: str, fingerprint: str) -> ShardNotes:
    """The notes of a shard. ``source`` is a path or an open file, of which only the footer is read. Raises
    DamagedShard."""
    with opened_shard(source, path, fingerprint) as (_, described, _):
        return ShardNotes(described["skipped"], described.get("turns_left_out", 0), described.get("remarks", []))


def shard_sizes(source, path: str, fingerprint: str) -> dict[str, int]:
    """Compressed bytes of a shard by column (nested fields count for their column), and of ``FOOTER``.

    ``source`` is a path or an open file, of which only the footer is read. Raises DamagedShard.
    """
    with opened_shard(source, path, fingerprint) as (_, _, groups):
        sizes = dict.fromkeys(SCHEMA.names, 0)
        for column in (column for group in groups for column in group.columns):
            sizes[column.name] += column.stored
        size = Path(source).stat().st_size if isinstance(source, (str, Path)) else source.size
        return {**sizes, FOOTER: size - sum(sizes.values())}


@contextmanager
def opened_shard(source, path: str, fingerprint: str, footer: bytes | None = None, pre_buffer: bool = True):
    """The shard as an open Parquet file, its own metadata from the footer, and the sizes of its row groups; schema and
    metadata are checked.

    ``footer`` is the result of ``read_footer`` if it was read before; without ``pre_buffer``, no bytes between the
    columns are read.
    """
    if isinstance(source, (str, Path)):
        refuse_special(Path(source), path)
    with named_damage(path):
        footer = footer or read_footer(source)
        options = {"metadata": pq.read_metadata(pa.BufferReader(footer)), "page_checksum_verification": True}
        with pq.ParquetFile(source, pre_buffer=pre_buffer, **options) as file:
            check_schema(file.schema_arrow, path)
            yield file, _described(file, path, fingerprint), row_group_sizes(footer)


def refuse_special(file: Path, name: str) -> None:
    """Raise DamagedShard if the path exists but is not a regular file: reading a pipe or a device may never end."""
    if file.exists() and not file.is_file():
        raise DamagedShard(f"{name}: a folder, a pipe or a device, expected a file")


def refuse_bomb(group: RowGroupSizes, number: int, path: str) -> None:
    """Raise DamagedShard, before it is read, for a row group that would take far more memory than bytes in the file."""
    most = GROUP_LEAST + GROUP_RATIO * group.stored
    if group.num_rows > min(column.num_values for column in group.columns):
        raise DamagedShard(f"{path}: row group {number} has {group.num_rows:,} rows, and a column with fewer values")
    if group.unpacked > most:
        raise DamagedShard(
            f"{path}: row group {number} has {group.stored:,} bytes in the file and takes up to {group.unpacked:,} in "
            f"memory, expected {most:,} at most"
        )


def row_ranges(file: pq.ParquetFile, described: dict, num_rows: int, path: str) -> list[range]:
    """The rows of each row group; other writers may use other sizes. Raises DamagedShard for a wrong count."""
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    if min(sizes, default=0) < 0 or not sum(sizes) == described["num_rows"] == num_rows:
        raise DamagedShard(f"{path}: {sum(sizes)} rows, expected {num_rows} (shards.json)")
    return [range(*ends) for ends in itertools.pairwise(itertools.accumulate(sizes, initial=0))]


def source_range(described: dict, path: str, rows_per_shard: int) -> range:
    """The source rows that a shard may have, by its number. Raises DamagedShard if its metadata says otherwise, as it
    was copied or renamed then."""
    first = ShardEntry(path, 0).shard * rows_per_shard
    if described.get("first_row", first) != first:
        raise DamagedShard(f"{path}: it has source rows from {described['first_row']} on, expected those from {first}")
    return range(first, first + rows_per_shard)


def check_order(source_rows: pa.ChunkedArray, covered: range, path: str) -> None:
    """Raise DamagedShard if the column source_index of a row group has nulls, is not ascending, or has rows that the
    shard may not have."""
    if source_rows.null_count:
        raise DamagedShard(f"{path}: column source_index has a null, expected the number of a source row")
    numbers = np.from_dlpack(source_rows.combine_chunks())  # to_numpy would import pandas
    is_within = len(numbers) == 0 or (covered.start <= numbers[0] and numbers[-1] < covered.stop)
    if not is_within or not (np.diff(numbers) > 0).all():
        raise DamagedShard(
            f"{path}: column source_index has {numbers[0]} to {numbers[-1]}, expected ascending numbers of "
            f"{covered.start} to {covered.stop - 1}"
        )


def _check_rows(rows: pa.Table, first: int, described: dict, path: str) -> None:
    """Raise DamagedShard if one of these consecutive rows, from row ``first`` of the shard on, is not as written."""
    if rows["messages"].nbytes + rows["tools"].nbytes > MESSAGES:
        for i in range(len(rows)):
            _refuse_long(rows.slice(i, 1), first + i, path)
    expected = described.get("row_crc32")
    if expected is None:
        return
    found, expected = row_checksums(rows), expected[first : first + len(rows)]
    if found != expected:
        differing = [i for i, pair in enumerate(itertools.zip_longest(found, expected)) if pair[0] != pair[1]]
        raise DamagedShard(f"{path}: row {first + differing[0]} is not what was written (its checksum differs)")


def _refuse_long(row: pa.Table, offset: int, path: str) -> None:
    size = row["messages"].nbytes + row["tools"].nbytes
    if size > MESSAGES:
        raise DamagedShard(
            f"{path}: row {offset} has {size:,} bytes of messages and tools, expected {MESSAGES:,} at most"
        )


@contextmanager
def named_damage(path: str):
    """Within, errors from reading a damaged file become a DamagedShard that names it."""
    try:
        yield
    except (pa.ArrowException, ValueError, LookupError, TypeError) as error:
        raise DamagedShard(f"{path}: damaged Parquet file: {str(error)[:200]}") from error
    except OSError as error:
        from huggingface_hub.errors import HfHubHTTPError

        if isinstance(error, HfHubHTTPError):
            raise  # an error of the Hub, not of the file
        if error.errno:  # an error of the disk: the file may be fine
            raise ToolkitError(f"{path}: it cannot be read now: {error}") from error
        raise DamagedShard(f"{path}: damaged Parquet file: {str(error)[:200]}") from error


def _described(file: pq.ParquetFile, path: str, fingerprint: str) -> dict:
    """The shard's own metadata from the footer, checked."""
    text = (file.metadata.metadata or {}).get(METADATA_KEY.encode())
    if text is None:
        raise DamagedShard(f"{path}: no metadata {METADATA_KEY!r}, so it is not a shard of a logit dataset")
    described = json.loads(text)
    if not _is_described(described):
        raise DamagedShard(f"{path}: metadata {METADATA_KEY!r} is not what the format asks for")
    crc = described.pop("crc32", None)
    if crc != zlib.crc32(canonical(described)):
        raise DamagedShard(f"{path}: damaged metadata (checksum {crc}, expected {zlib.crc32(canonical(described))})")
    if described["fingerprint"] != fingerprint:
        raise DamagedShard(
            f"{path}: of another run (fingerprint {described['fingerprint'][:12]}, expected {fingerprint[:12]})"
        )
    return described


def _is_described(metadata) -> bool:
    kinds = {"fingerprint": str, "num_rows": int, "skipped": list}
    return (
        isinstance(metadata, dict)
        and all(isinstance(metadata.get(key), kind) for key, kind in kinds.items())
        and isinstance(metadata.get("row_crc32", []), list)
        and isinstance(metadata.get("turns_left_out", 0), int)
        and _is_list_of_rows(metadata["skipped"], "reason")
        and _is_list_of_rows(metadata.get("remarks", []), "remark")
    )


def _is_list_of_rows(entries, text: str) -> bool:
    """Whether these are objects with a source row's number, and with a string under the key ``text``."""
    return isinstance(entries, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("row"), int) and isinstance(entry.get(text), str)
        for entry in entries
    )


def check_schema(schema: pa.Schema, name: str) -> None:
    """Raise DamagedShard if columns or types are not those of the format."""
    if schema.names != SCHEMA.names:
        raise DamagedShard(f"{name}: columns {', '.join(schema.names)}; expected {', '.join(SCHEMA.names)}")
    for column, expected in zip(schema, SCHEMA, strict=True):
        if column.type != expected.type:
            raise DamagedShard(f"{name}: column {column.name} is {column.type}, expected {expected.type}")
