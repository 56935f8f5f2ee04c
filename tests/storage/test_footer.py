"""The footer's sizes are those that pyarrow reads from whole files."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chat_logits.storage.footer import read_footer, row_group_sizes
from chat_logits.storage.shard import SCHEMA

LONG = 10**6


def metadata_of(path):
    with pq.ParquetFile(path) as file:
        return file.metadata


def test_the_sizes_of_a_shard_are_pyarrows(quick_run):
    (path, *_) = quick_run.glob("data/*/*.parquet")
    metadata = metadata_of(path)
    (found,), expected = row_group_sizes(read_footer(path)), metadata.row_group(0)
    assert found.num_rows == expected.num_rows and {column.name for column in found.columns} == set(SCHEMA.names)
    for i, column in enumerate(found.columns):
        chunk = expected.column(i)
        assert (column.num_values, column.stored) == (chunk.num_values, chunk.total_compressed_size)
        assert column.name == chunk.path_in_schema.partition(".")[0]
        assert column.unpacked >= chunk.total_uncompressed_size


@pytest.mark.parametrize("num_groups", [0, 1, 20])
def test_each_row_group_is_there(tmp_path, num_groups):
    table = pa.table({"a": list(range(num_groups * 3)), "b": [f"{i}" for i in range(num_groups * 3)]})
    with pq.ParquetWriter(tmp_path / "x", table.schema) as writer:
        if num_groups:
            writer.write_table(table, row_group_size=3)
    assert [group.num_rows for group in row_group_sizes(read_footer(tmp_path / "x"))] == [3] * num_groups


@pytest.mark.parametrize(
    ("column", "options"),
    [
        (pa.array(["a" * LONG]), {}),
        (pa.array(["a" * LONG] * 9), {"use_dictionary": True}),
        (pa.array(["a" * LONG] * 9), {"use_dictionary": False, "column_encoding": {"a": "DELTA_BYTE_ARRAY"}}),
        (pa.array([7] * LONG, pa.int64()), {"use_dictionary": True}),
        (pa.array([None] * LONG, pa.float32()), {}),
        (pa.array([[None] * LONG], pa.list_(pa.float32())), {}),
    ],
    ids=["text", "dictionary", "prefixes", "repeated numbers", "nulls", "nulls in a list"],
)
def test_what_a_column_takes_in_memory_is_never_more_than_is_said(tmp_path, column, options):
    pq.write_table(pa.table({"a": column}), tmp_path / "x", compression="zstd", **options)
    (group,) = row_group_sizes(read_footer(tmp_path / "x"))
    assert (tmp_path / "x").stat().st_size < 20_000
    assert pq.read_table(tmp_path / "x").nbytes <= group.unpacked < 200 * LONG


def test_a_footer_with_any_one_byte_changed_is_read_or_refused(tmp_path):
    """By every value of every byte; fields are then missing, too long, or of another kind."""
    pq.write_table(pa.table({"a": [1], "b": ["x"]}), tmp_path / "x", write_statistics=False, store_schema=False)
    footer = read_footer(tmp_path / "x")
    refusals = set()
    for place, byte in enumerate(footer[4:-8], 4):
        for other in {*range(256)} - {byte}:
            try:
                row_group_sizes(footer[:place] + bytes([other]) + footer[place + 1 :])
            except (ValueError, LookupError) as error:
                refusals.add(str(error))
    assert "the footer has a field of another kind than its number says" in refusals
