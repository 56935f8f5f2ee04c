"""A shard whose columns no file can hold is refused before it is computed, and those before it are kept."""

import numpy as np
import pyarrow as pa
import pytest
from runs import files_in, shards_in

import extract_logits
from chat_logits.extraction import shard_computer
from chat_logits.storage import shard
from chat_logits.storage.dataset import open_dataset

TOP_K = 64


def test_the_limit_is_that_of_the_columns_offsets():
    for column in shard.SCHEMA:
        assert not pa.types.is_large_list(column.type) and not pa.types.is_large_binary(column.type)
    assert np.iinfo(np.int32).max == shard.MOST_ENTRIES
    with pytest.raises(
        pa.ArrowInvalid, match="offset"
    ):  # what a longer column ends in: it has come round to less than 0
        offsets = np.array([0, shard.MOST_ENTRIES + 1]).astype(np.int32)
        pa.ListArray.from_arrays(offsets, pa.array([], pa.uint16())).validate(full=True)


def test_a_shard_of_too_many_entries_is_refused_by_its_option_and_those_before_are_kept(
    flags, quick_run, tmp_path, monkeypatch, capsys
):
    sizes = [entry.num_tokens for entry in open_dataset(str(quick_run)).shards]
    largest = sizes.index(max(sizes))
    assert 0 < largest < len(sizes) - 1 and max(sizes[:largest]) < max(sizes)
    computed, compute = [], shard_computer.Batches.compute

    def noted(self, ready):
        computed.append(ready)
        return compute(self, ready)

    monkeypatch.setattr(shard_computer.Batches, "compute", noted)
    monkeypatch.setattr(shard, "MOST_ENTRIES", max(sizes) * TOP_K - 1)
    assert extract_logits.main(flags("out")) == 1
    said = capsys.readouterr().err
    assert (
        f"error: --rows_per_shard 3: shard {largest} has {max(sizes):,} tokens to extract, so {max(sizes) * TOP_K:,} "
        f"entries in a column, expected {max(sizes) * TOP_K - 1:,} at most. Begin another run with 2 or fewer." in said
    )
    assert "Traceback" not in said and len(computed) == largest
    assert [path.read_bytes() for path in shards_in(tmp_path / "out")] == [
        path.read_bytes() for path in shards_in(quick_run)[:largest]
    ]
    monkeypatch.setattr(shard, "MOST_ENTRIES", max(sizes) * TOP_K)
    assert extract_logits.main(flags("out")) == 0
    assert files_in(tmp_path / "out") == files_in(quick_run)
