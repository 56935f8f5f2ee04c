"""Read whole columns of a stored logit dataset: what sorting and filtering need, without reading the rest.

A row's checksum covers all of its columns, so it cannot be checked here; Parquet's page CRCs are checked.
"""

import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from chat_logits.storage.columns import ColumnReader
from chat_logits.storage.dataset import DamagedRow, Rows, StoredDataset
from chat_logits.storage.shard import SCHEMA
from logit_codec import RANGES, ROW_NUMBERS

NUMBER_COLUMNS = ("source_index", "num_tokens", *ROW_NUMBERS)


def read_columns(dataset: StoredDataset, names: Sequence[str], rows: Rows | None = None) -> pa.Table:
    """A table of ``row`` (int64, from 0) and these columns of FORMAT.md, in this order, for every stored row or for the
    ascending ``rows``.

    Only the footer and these columns of each shard are read; shards without any of ``rows`` are not read.
    Raises ToolkitError as ``StoredDataset.read_row`` does, if there are no rows, and for a value that a column cannot
    have.
    """
    dataset.refuse_empty()
    wanted = None if rows is None else np.asarray(rows, np.int64)
    parts = [pa.schema([SCHEMA.field(name) for name in names]).empty_table()]
    reader, first = ColumnReader(dataset), 0
    for number, shard in enumerate(dataset.shards):
        ends = [first, first + shard.num_rows]
        start, end = ends if wanted is None else np.searchsorted(wanted, ends)
        if start < end:
            part = reader.shard(number, names).select(names)
            if wanted is not None and end - start < len(part):
                part = part.take(pa.array(wanted[start:end] - first))
            parts.append(part)
        first += shard.num_rows
    table = pa.concat_tables(parts)
    wanted = np.arange(first) if wanted is None else wanted  # only now, as the footers have confirmed the count
    for name in set(names) & {*NUMBER_COLUMNS}:
        _check(table[name], name, wanted)
    return table.add_column(0, "row", pa.array(wanted))


def number_table(dataset: StoredDataset, rows: Rows | None = None) -> pa.Table:
    """Numbers of each row, or of the ascending ``rows``: ``row``, ``source_index``, ``num_tokens``, ``mean_nll``,
    ``perplexity`` (float64, exp of ``mean_nll``), ``mean_entropy``, ``top1_rate`` and ``max_surprisal``; nats and
    shares, as in FORMAT.md."""
    return with_perplexity(read_columns(dataset, NUMBER_COLUMNS, rows))


def with_perplexity(table: pa.Table) -> pa.Table:
    """The table, which has ``mean_nll``, with ``perplexity`` added after that."""
    at = table.schema.get_field_index("mean_nll") + 1
    with np.errstate(over="ignore"):  # infinite above 709 nats
        perplexities = np.exp(_values(table["mean_nll"]).astype(np.float64))
    return table.add_column(at, "perplexity", pa.array(perplexities))


def _values(column: pa.ChunkedArray) -> np.ndarray:
    """The numbers of a column without nulls; to_numpy imports pandas."""
    return np.from_dlpack(column.combine_chunks())


def _check(column: pa.ChunkedArray, name: str, rows: np.ndarray) -> None:
    """Raise DamagedRow, with the row's number from ``rows``, for a value that the column cannot have."""
    if column.null_count:
        row = rows[column.is_null().to_pylist().index(True)]
        raise DamagedRow(f"column {name} of row {row}: found null, expected a number")
    values = _values(column)
    least, most = RANGES.get(name, (int(name == "num_tokens"), math.inf))
    wrong = ~((least <= values) & (values <= most))
    if wrong.any():
        place = int(wrong.argmax())
        expected = f"{least:g} to {most:g}"
        raise DamagedRow(f"column {name} of row {rows[place]}: found {values[place]}, expected {expected}")
