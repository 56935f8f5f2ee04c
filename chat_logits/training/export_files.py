"""The Parquet files of an export."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from chat_logits.storage.disk import written_whole

GROUP_BYTES = 16 * 2**20  # rows in memory are written as a row group at this size
FILE_BYTES = 512 * 2**20  # of rows before compression; then the next file begins


def write_files(folder: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Write ``train-00000.parquet`` and so on, with one row group in memory at a time."""
    groups = _groups(batches)
    group, number = next(groups, None), 0
    while group is not None:
        path = folder / f"train-{number:05d}.parquet"
        with written_whole(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            written = 0
            while group is not None and written < FILE_BYTES:
                writer.write_table(group)
                written += group.nbytes
                group = next(groups, None)
        number += 1


def _groups(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    held: list[pa.RecordBatch] = []
    num_bytes = 0
    for batch in batches:
        held.append(batch)
        num_bytes += batch.nbytes
        if num_bytes >= GROUP_BYTES:
            yield pa.Table.from_batches(held)
            held, num_bytes = [], 0
    if held:
        yield pa.Table.from_batches(held)
