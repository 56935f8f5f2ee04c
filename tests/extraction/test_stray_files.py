"""Files among a run's shards that are none of them: somebody's copies, whole or cut, and another split's."""

import shutil

import pytest
from runs import SHARDS, files_in, shards_in

import extract_logits
from chat_logits.storage.dataset import open_dataset

STRAYS = ("train-00001 (1).parquet", "train-00001-of-00005.parquet", "train-000001.parquet", "test-00001.parquet")


@pytest.mark.parametrize("is_cut", [False, True], ids=["whole", "cut"])
def test_a_run_goes_on_beside_files_that_are_no_shards(flags, quick_run, tmp_path, capsys, is_cut):
    out = shutil.copytree(quick_run, tmp_path / "out")
    folder = out / "data/00000"
    content = (folder / "train-00001.parquet").read_bytes()
    content = content[:-100] if is_cut else content
    for name in STRAYS:
        (folder / name).write_bytes(content)
    (out / "data/00001").mkdir()
    (out / "data/00001/train-00001.parquet").write_bytes(content)
    (folder / ".damaged-train-00001 (1).parquet").write_bytes(b"as an earlier version has named it")
    (folder / "train-00040.parquet").unlink()
    for _ in range(2):
        assert extract_logits.main(flags("out")) == 0
        told = capsys.readouterr().err
        (line,) = [line for line in told.splitlines() if "these are not shards of this run" in line]
        named = [f"data/00000/{name}" for name in sorted(STRAYS)[:3]]
        assert f"{out}: " in line and f"left alone: {', '.join(named)} and 2 others. Move" in line
        assert "Set aside" not in told
    found = files_in(out)
    assert all(found.pop(f"data/00000/{name}") == content for name in STRAYS)
    assert found.pop("data/00001/train-00001.parquet") == content
    assert found == files_in(quick_run)
    assert len(open_dataset(str(out)).shards) == SHARDS


def test_a_damaged_shard_beside_its_copy_is_computed_again(flags, quick_run, tmp_path):
    out = shutil.copytree(quick_run, tmp_path / "out")
    shard = shards_in(out)[1]
    shutil.copy(shard, shard.with_name("train-00001 (1).parquet"))
    shard.write_bytes(shard.read_bytes()[:-100])
    assert extract_logits.main(flags("out")) == 0
    assert shard.read_bytes() == shards_in(quick_run)[1].read_bytes()
