"""Some columns of a stored logit dataset, all rows of them: what sorting and filtering need, without reading the rest.

A row's checksum is over all of its columns and is not held against some of them; page CRCs are.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from chat_logits.storage.dataset import DamagedRow, StoredDataset
from chat_logits.storage.shard import SCHEMA
from logit_codec import ROW_NUMBERS, RowError, check_row_numbers

NUMBER_COLUMNS = ("source_index", "num_tokens", *ROW_NUMBERS)


def read_columns(dataset: StoredDataset, names: Sequence[str]) -> pa.Table:
    """``row``, int64 and from 0, and these columns of FORMAT.md, in this order, of every stored row.

    Of each shard, the footer and these columns are read, some rows at a time. Raises ToolkitError as
    ``StoredDataset.read_row`` does, where there are no rows, and for a number that no row has.
    """
    dataset.refuse_empty()
    schema = pa.schema([SCHEMA.field(name) for name in names])
    parts = [dataset.shard_columns(number, names) for number in range(len(dataset.shards))]
    table = pa.concat_tables([schema.empty_table(), *parts])
    for name in set(names) & {*NUMBER_COLUMNS}:
        _check(table[name], name)
    return table.add_column(0, "row", pa.array(np.arange(len(table))))


def number_table(dataset: StoredDataset) -> pa.Table:
    """Each row's numbers: ``row``, ``source_index``, ``num_tokens``, ``mean_nll``, ``perplexity`` (float64, e to the
    power of that), ``mean_entropy``, ``top1_rate`` and ``max_surprisal``; nats and shares, as FORMAT.md has them."""
    return with_perplexity(read_columns(dataset, NUMBER_COLUMNS))


def with_perplexity(table: pa.Table) -> pa.Table:
    """A table that has ``mean_nll``, and ``perplexity`` behind it."""
    at = table.schema.get_field_index("mean_nll") + 1
    with np.errstate(over="ignore"):  # infinite above 709 nats
        perplexities = np.exp(_values(table["mean_nll"]).astype(np.float64))
    return table.add_column(at, "perplexity", pa.array(perplexities))


def _values(column: pa.ChunkedArray) -> np.ndarray:
    """The numbers of a column without nulls; to_numpy imports pandas."""
    return np.from_dlpack(column.combine_chunks())


def _check(column: pa.ChunkedArray, name: str) -> None:
    """Raise DamagedRow, with the row, for a value that the column cannot have."""
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise DamagedRow(f"column {name} of row {row}: found null, expected a number")
    values = _values(column)
    if name in ROW_NUMBERS:
        try:
            check_row_numbers(name, values)
        except RowError as error:
            raise DamagedRow(str(error)) from error
        return
    least = int(name == "num_tokens")
    if (values < least).any():
        row = int((values < least).argmax())
        raise DamagedRow(f"column {name} of row {row}: found {values[row]}, expected {least} or more")
