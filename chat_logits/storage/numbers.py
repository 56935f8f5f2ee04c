"""Some columns of a stored logit dataset, all rows of them: what sorting and filtering need, without reading the rest.

A row's checksum is over all of its columns and is not held against some of them; page CRCs are.
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
    """``row``, int64 and from 0, and these columns of FORMAT.md, in this order, of every stored row, or of ``rows``,
    which ascend.

    Of each shard, the footer and these columns are read; none of shards without any of ``rows``.
    Raises ToolkitError as ``StoredDataset.read_row`` does, where there are no rows, and for a number that no row has.
    """
    dataset.refuse_empty()
    wanted = np.arange(dataset.num_rows) if rows is None else np.asarray(rows, np.int64)
    parts = [pa.schema([SCHEMA.field(name) for name in names]).empty_table()]
    reader, first = ColumnReader(dataset), 0
    for number, shard in enumerate(dataset.shards):
        start, end = np.searchsorted(wanted, [first, first + shard.num_rows])
        if start < end:
            part = reader.shard(number, names).select(names)
            parts.append(part if end - start == len(part) else part.take(pa.array(wanted[start:end] - first)))
        first += shard.num_rows
    table = pa.concat_tables(parts)
    for name in set(names) & {*NUMBER_COLUMNS}:
        _check(table[name], name, wanted)
    return table.add_column(0, "row", pa.array(wanted))


def number_table(dataset: StoredDataset, rows: Rows | None = None) -> pa.Table:
    """Numbers of each row, or of ``rows``, which ascend: ``row``, ``source_index``, ``num_tokens``, ``mean_nll``,
    ``perplexity`` (float64, e to the power of that), ``mean_entropy``, ``top1_rate`` and ``max_surprisal``; nats and
    shares, as FORMAT.md has them."""
    return with_perplexity(read_columns(dataset, NUMBER_COLUMNS, rows))


def with_perplexity(table: pa.Table) -> pa.Table:
    """A table that has ``mean_nll``, and ``perplexity`` behind it."""
    at = table.schema.get_field_index("mean_nll") + 1
    with np.errstate(over="ignore"):  # infinite above 709 nats
        perplexities = np.exp(_values(table["mean_nll"]).astype(np.float64))
    return table.add_column(at, "perplexity", pa.array(perplexities))


def _values(column: pa.ChunkedArray) -> np.ndarray:
    """The numbers of a column without nulls; to_numpy imports pandas."""
    return np.from_dlpack(column.combine_chunks())


def _check(column: pa.ChunkedArray, name: str, rows: np.ndarray) -> None:
    """Raise DamagedRow, with its number of ``rows``, for a value that the column cannot have."""
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
