"""Columns of a dataset read by many threads at once, whose footers are no thread's own, and of one that has fewer rows
than it says."""

import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from runs import SHARDS

from chat_logits.storage import columns
from chat_logits.storage.columns import ColumnReader
from chat_logits.storage.dataset import open_dataset
from chat_logits.storage.numbers import number_table
from chat_logits.storage.shard import DamagedShard


@pytest.fixture
def hasty():
    """Threads that take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("hasty")
def test_threads_that_ask_for_more_shards_than_are_kept_get_their_rows(quick_run, monkeypatch):
    monkeypatch.setattr(columns, "FOOTERS", 4)
    stored = open_dataset(str(quick_run))
    expected = [[row["source_index"] for row in stored.shard_rows(number)] for number in range(SHARDS)]
    reader = ColumnReader(stored)

    def read(number: int) -> list[int]:
        return reader.shard(number % SHARDS, ["source_index"])["source_index"].to_pylist()

    asked = [number * 7 for number in range(1200)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, asked)) == [expected[number % SHARDS] for number in asked]
    assert len(reader._footers) == 4


def test_the_footers_kept_are_those_asked_for_last(quick_run, monkeypatch):
    monkeypatch.setattr(columns, "FOOTERS", 3)
    read, fetched = columns.read_footer, []
    monkeypatch.setattr(columns, "read_footer", lambda source, tail: fetched.append(source) or read(source, tail))
    reader = ColumnReader(open_dataset(str(quick_run)))
    for number in (0, 1, 2, 0, 3, 0, 1):  # the third makes room for 3, and so has 1 gone, which was asked for before 0
        reader.shard(number, ["num_tokens"])
    assert [int(path.stem[-1]) for path in fetched] == [0, 1, 2, 3, 1]


def test_rows_that_are_listed_alone_take_no_memory(quick_run):
    """Their numbers alone would be 128 MiB."""
    stored = open_dataset(str(quick_run))
    lying = replace(stored, shards=[replace(shard, num_rows=2**22) for shard in stored.shards[:4]])
    assert lying.num_rows * 8 == 2**27
    tracemalloc.start()
    try:
        with pytest.raises(DamagedShard, match=r"train-00000\.parquet: \d rows, expected 4194304"):
            number_table(lying)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
