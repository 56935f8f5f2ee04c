"""Of a dataset on the Hub, the front page fetches the columns that it shows."""

import json
import os
import subprocess
import sys

import pytest
from conftest import REPO
from loopback_hub import LoopbackHub

from chat_logits.browse.index import NUMBERS
from chat_logits.storage.columns import ColumnReader
from chat_logits.storage.dataset import open_dataset
from chat_logits.storage.footer import read_footer, row_group_sizes
from chat_logits.storage.shard import DamagedShard

# What a process asks for whose Hub is the loopback one: the numbers of all rows, and of which rows what the list shows.
READ = """
import json, sys
from chat_logits.storage.columns import ColumnReader
from chat_logits.storage.dataset import open_dataset
from chat_logits.browse.index import NUMBERS
reader = ColumnReader(open_dataset("user/many"))
tables = [reader.shard(number, NUMBERS) for number in range(len(reader.firsts) - 1)]
print(json.dumps([row for table in tables for row in table.to_pylist()]))
"""


@pytest.fixture
def reader(quick_run):
    return ColumnReader(open_dataset(str(quick_run)))


def test_columns_are_those_of_whole_rows(reader, quick_run):
    rows = list(open_dataset(str(quick_run)).rows())
    names = ("source_index", "mean_nll", "messages")
    assert reader.rows(range(len(rows)), names) == [{name: row[name] for name in names} for row in rows]
    assert reader.rows([100, 3], names) == [{name: rows[i][name] for name in names} for i in (100, 3)]
    assert reader.shard(2, ["num_tokens"], [1]).to_pylist() == [
        {"num_tokens": rows[reader.firsts[2] + 1]["num_tokens"]}
    ]


def test_a_damaged_shard_is_told_of_its_own_rows(quick_run, tmp_path):
    import shutil

    shutil.copytree(quick_run, tmp_path / "out")
    shard = sorted((tmp_path / "out").glob("data/*/*.parquet"))[1]
    shard.write_bytes(shard.read_bytes()[:-9] + bytes(9))
    reader = ColumnReader(open_dataset(str(tmp_path / "out")))
    first, *others = reader.rows([0, reader.firsts[1], reader.firsts[2]], ("num_tokens",))
    assert isinstance(others[0], DamagedShard) and shard.name in str(others[0])
    assert first["num_tokens"] and others[1]["num_tokens"]


def test_only_these_columns_are_fetched(quick_run, tmp_path):
    files = {str(path.relative_to(quick_run)): path.read_bytes() for path in quick_run.rglob("*") if path.is_file()}
    shards = [quick_run / name for name in files if name.endswith(".parquet")]
    groups = [group for shard in shards for group in row_group_sizes(read_footer(shard))]
    columns = sum(column.stored for group in groups for column in group.columns if column.name in NUMBERS)
    footers = [len(read_footer(shard)) for shard in shards]
    with LoopbackHub() as hub:
        hub.add_repo("dataset", "user/many", files=files)
        environment = {**hub.environment(tmp_path), "PYTHONPATH": str(REPO), "PATH": os.environ["PATH"]}
        done = subprocess.run(
            [sys.executable, "-c", READ], capture_output=True, text=True, env=environment, timeout=300
        )
        assert done.returncode == 0, done.stderr
        fetched = sum(request.sent for request in hub.requests if ".parquet" in request.path)
    print(
        f"{fetched:,} bytes fetched of {sum(map(len, files.values())):,}; columns {columns:,}, footers {sum(footers):,}"
    )
    expected = [{name: row[name] for name in NUMBERS} for row in open_dataset(str(quick_run)).rows()]
    assert json.loads(done.stdout) == expected
    whole = sum(shard.stat().st_size for shard in shards)
    # The first shard's footer is asked for before its size is known, the others' with a kilobyte more than the last.
    assert fetched <= columns + sum(footers) + 1024 * len(shards) + 2**14 < whole
