"""One shard, a Parquet file: its columns, its rows' checksums, and how it is written, completely or not at all.

FORMAT.md, "Files", is the specification; ``shard_reading`` reads shards.
"""

import itertools
import math
import operator
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from chat_logits.errors import ToolkitError
from chat_logits.storage.disk import make_folders, room_or_stop, written_whole
from chat_logits.storage.json_files import canonical
from chat_logits.storage.manifest import Manifest
from chat_logits.storage.shard_list import ShardEntry, shard_path
from logit_codec import ROW_NUMBERS

ROWS_PER_GROUP = 16
MOST_ENTRIES = 2**31 - 1  # of a column in a file, as Arrow's offsets are int32
LEVEL = 6  # of Zstandard: 1.7 times as fast as 9 with 0.2% more bytes; 3 is twice as fast again with 2.2% more
METADATA_KEY = "logit_extraction"

_ENTRIES = [
    column
    for kind in ("top", "sampled")
    for column in (
        pa.field(f"{kind}_logits_quantized", pa.binary()),
        pa.field(f"{kind}_indices_low", pa.list_(pa.uint16())),
        pa.field(f"{kind}_indices_high", pa.binary()),
    )
]
_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string()), ("extra", pa.string())])
SCHEMA = pa.schema(
    [
        *_ENTRIES,
        pa.field("logsumexp", pa.list_(pa.float32())),
        pa.field("num_tokens", pa.int32()),
        *(pa.field(name, pa.float32()) for name in ROW_NUMBERS),
        pa.field("token_log_probs", pa.list_(pa.float32())),
        pa.field("messages", pa.list_(_MESSAGE)),
        pa.field("source_index", pa.int64()),
        pa.field("alignment_checksum", pa.uint32()),
        pa.field("tools", pa.string()),
    ]
)
_SPLIT_STREAMS = ("top_indices_low", "sampled_indices_low", "logsumexp", "token_log_probs")


class DamagedShard(ToolkitError):
    """A shard that is not as it was written (truncated or changed), or belongs to another run."""


class ShardAround(NamedTuple):
    """A shard without its rows. Each entry of ``skipped`` has "row" and "reason", and for a bad record also "place";
    ``turns_left_out`` marked turns were not extracted. ``remarks`` have "row" and "remark": what the model may not read
    as intended in a source row that is stored. ``path`` is relative to the run's folder."""

    path: str
    fingerprint: str
    first_row: int
    skipped: list[dict]
    turns_left_out: int
    remarks: list[dict]


class ShardRows(Protocol):
    """Stored rows, in order, that are to be written to a shard's file."""

    @property
    def num_bytes(self) -> int:
        """An upper bound of the file's size in bytes."""

    def write(self, file: Path, shard: ShardAround) -> ShardEntry:
        """Write the shard's file, in an existing folder."""


class ArrowRows:
    """Rows held in this process as a table with ``SCHEMA``."""

    def __init__(self, table: pa.Table):
        self._table = table

    @property
    def num_bytes(self) -> int:
        return self._table.nbytes  # uncompressed

    def write(self, file: Path, shard: ShardAround) -> ShardEntry:
        described = _description(shard, self._table)
        _write_table(file, self._table, described)
        return entry_of(shard.path, self._table, described, file.stat().st_size)


def write_shard(
    folder: Path,
    manifest: Manifest,
    shard: int,
    rows: list[dict] | ShardRows,
    skipped: list[dict],
    check_still_ours: Callable[[], None] = lambda: None,
    turns_left_out: int = 0,
    remarks: Iterable[dict] = (),
) -> ShardEntry:
    """Write one finished shard of a run: its stored rows, in order, and which source rows were ``skipped``, and why.

    ``skipped``, ``turns_left_out`` and ``remarks`` are as in ``ShardAround``.
    ``check_still_ours`` raises if the folder is not the run's any more; it is called before anything is written, and
    again before the shard gets its name. Raises DiskFull if there is no space.
    """
    around = ShardAround(
        shard_path(manifest.split, shard),
        manifest.fingerprint,
        shard * manifest.rows_per_shard,
        skipped,
        turns_left_out,
        list(remarks),
    )
    given = ArrowRows(table_from(rows)) if isinstance(rows, list) else rows
    with (
        room_or_stop(folder, given.num_bytes),
        written_whole(folder / around.path, is_shared=True, check_still_ours=check_still_ours) as temporary,
    ):
        make_folders(folder, Path(around.path).parent)
        return given.write(temporary, around)


def refuse_overfull(manifest: Manifest, shard: int, tokens: int) -> None:
    """Raise ToolkitError if this many extracted ``tokens`` would make a shard's columns too long for a file."""
    entries = tokens * max(manifest.top_k, manifest.num_sampled)
    if entries > MOST_ENTRIES:
        rows = manifest.rows_per_shard
        fewer = max(1, rows * MOST_ENTRIES // entries)
        raise ToolkitError(
            f"`rows_per_shard` {rows}: shard {shard} has {tokens:,} tokens to extract, so {entries:,} entries in a "
            f"column, expected {MOST_ENTRIES:,} at most. Begin another run with {fewer} or fewer."
        )


def table_from(rows: list[dict]) -> pa.Table:
    """The rows as a table. NumPy joins the numbers: ``from_pylist`` takes them one by one, thirty times as slowly."""
    columns = [_column([row[column.name] for row in rows], column.type) for column in SCHEMA]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def table_bytes(rows: list[dict]) -> np.ndarray:
    """The rows as a table serialised for another process, uint8."""
    stream = pa.BufferOutputStream()
    with pa.ipc.new_stream(stream, SCHEMA) as writer:
        writer.write_table(table_from(rows))
    return np.frombuffer(stream.getvalue(), np.uint8)


def table_of(batches: list[np.ndarray]) -> pa.Table:
    """One table from several ``table_bytes``, in the order of their source rows.

    Slices are joined, which copies each row once; ``Table.take`` grows its lists as it goes and takes up to 25 times as
    long for a shard of 1,024 rows.
    """
    tables = [pa.ipc.open_stream(pa.py_buffer(batch)).read_all() for batch in batches]
    rows = [(row.as_py(), table.slice(i, 1)) for table in tables for i, row in enumerate(table["source_index"])]
    rows.sort(key=operator.itemgetter(0))
    return pa.concat_tables([SCHEMA.empty_table(), *(row for _, row in rows)]).combine_chunks()


def _column(values: list, kind: pa.DataType) -> pa.Array:
    if not is_of_numbers(kind):
        return pa.array(values, kind)
    offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
    numbers = np.concatenate([*values, np.empty(0, kind.value_type.to_pandas_dtype())])
    return pa.ListArray.from_arrays(offsets, pa.array(numbers, kind.value_type), type=kind)


def is_of_numbers(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) and not pa.types.is_struct(kind.value_type)


def _description(shard: ShardAround, table: pa.Table) -> dict:
    """The shard's own metadata, which goes into its footer."""
    described = {
        "fingerprint": shard.fingerprint,
        "first_row": shard.first_row,
        "end_row": shard.first_row + len(table) + len(shard.skipped),
        "skipped": shard.skipped,
        "num_rows": len(table),
        "turns_left_out": shard.turns_left_out,
        "remarks": shard.remarks,
        "row_crc32": row_checksums(table),
    }
    return {**described, "crc32": zlib.crc32(canonical(described))}


def _write_table(path: Path, table: pa.Table, metadata: dict) -> None:
    writer = pq.ParquetWriter(
        path,
        SCHEMA,
        compression="zstd",
        compression_level=LEVEL,
        use_dictionary=False,
        column_encoding={f"{column}.list.element": "BYTE_STREAM_SPLIT" for column in _SPLIT_STREAMS},
        write_statistics=False,
        store_schema=False,
        write_page_checksum=True,
    )
    with writer:
        writer.add_key_value_metadata({METADATA_KEY: canonical(metadata).decode()})
        if len(table):  # `datasets` cannot read an empty row group
            writer.write_table(table, row_group_size=ROWS_PER_GROUP)


def row_checksums(table: pa.Table) -> list[int]:
    """One CRC-32 per row, over its columns as FORMAT.md lays them out; damage anywhere in the row changes it."""
    checksums = [0] * len(table)
    for column in table.schema:
        parts = _row_bytes(table[column.name].combine_chunks(), column.type)
        checksums = [zlib.crc32(part, crc) for part, crc in zip(parts, checksums, strict=True)]
    return checksums


def _row_bytes(column: pa.Array, kind: pa.DataType) -> list:
    if pa.types.is_binary(kind):
        return column.to_pylist()
    if pa.types.is_string(kind):
        return [canonical(value) for value in column.to_pylist()]
    if pa.types.is_integer(kind):
        return [value.to_bytes(8, "little", signed=True) for value in column.to_pylist()]
    if pa.types.is_floating(kind):
        return list(np.array(column.to_pylist(), np.float32)[:, None].view(np.uint8))
    if pa.types.is_struct(kind.value_type):
        rows = column.to_pylist()
        return [
            canonical([[message[name] for name in ("role", "content", "extra")] for message in row]) for row in rows
        ]
    values, offsets = np.from_dlpack(column.values), np.from_dlpack(column.offsets)  # to_numpy imports pandas
    return [np.ascontiguousarray(values[a:b]).view(np.uint8) for a, b in itertools.pairwise(offsets)]


def entry_of(path: str, table: pa.Table, described: dict, size: int) -> ShardEntry:
    """The entry of a shard; ``described`` is its own metadata."""
    skipped = described["skipped"]
    nll = -float(table["token_log_probs"].combine_chunks().values.to_numpy().sum(dtype=float))
    return ShardEntry(
        path=path,
        num_rows=len(table),
        num_tokens=sum(table["num_tokens"].to_pylist()),
        nll=nll if math.isfinite(nll) else None,
        num_bytes=size,
        skipped=dict(Counter(entry["reason"] for entry in skipped)),
        bad=dict(Counter(entry["reason"] for entry in skipped if "place" in entry)),
        turns_left_out=described.get("turns_left_out", 0),
        remarks=dict(Counter(entry["remark"] for entry in described.get("remarks", ()))),
    )
