"""A run knows its folder: gone, renamed, unmounted, or another run's in its place, at ten moments of a run each."""

import functools
import re
import shutil
from pathlib import Path

import pytest
from lives import Life
from runs import files_in, flags_for, shards_in

import extract_logits

SHORT = ("--max_samples", "18")  # six shards
AWAY = "away"  # where a folder goes that is not removed
# Before a file of the run gets its name or after it, which file, and how many of that name have been before.
MOMENTS = [
    ("before", r"extraction\.json", 0),
    ("after", r"extraction\.json", 0),
    ("before", r"train-00000\.parquet", 0),
    ("after", r"train-00000\.parquet", 0),
    ("before", r"shards\.json", 2),
    ("after", r"README\.md", 3),
    ("before", r"\.checked\.json", 3),
    ("before", r"train-00004\.parquet", 0),
    ("after", r"train-00005\.parquet", 0),
    ("after", r"\.checked\.json", 6),  # the last file that a run writes
]


def removed(out: Path) -> None:
    shutil.rmtree(out)


def renamed(out: Path) -> None:
    out.rename(out.with_name(AWAY))


def unmounted(out: Path) -> None:
    """What is left is the empty folder that it was mounted on."""
    renamed(out)
    out.mkdir()


def another_in_its_place(out: Path) -> None:
    renamed(out)
    out.with_name("another").rename(out)


def strike(fault, out: Path, when: str, name: str, skip: int) -> None:
    """In the process of the run: have this happen to its folder at that moment."""
    from chat_logits.extraction import folder as run_folder
    from chat_logits.storage import disk

    original, seen = disk.flush_and_rename, []

    def write(temporary: Path, path: Path, *rest) -> None:
        seen.extend([path] if re.fullmatch(name, path.name) else [])
        strikes = len(seen) > skip
        if strikes:
            seen[:] = []
            disk.flush_and_rename = original
        if strikes and when == "before":
            fault(out)
        original(temporary, path, *rest)
        if strikes and when == "after":
            fault(out)

    disk.flush_and_rename = write
    run_folder.DESCRIBING = 0  # the lists are written after each shard, however long that takes here


@pytest.fixture(scope="module")
def another_run(quick_model, calm_source, tmp_path_factory) -> Path:
    """A finished run of the same source, in all files of the same names."""
    out = tmp_path_factory.mktemp("another") / "out"
    assert extract_logits.main([*flags_for(quick_model, calm_source, out), *SHORT, "--seed", "1"]) == 0
    return out


@pytest.fixture(scope="module")
def short_run(quick_model, calm_source, tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("short") / "out"
    assert extract_logits.main([*flags_for(quick_model, calm_source, out), *SHORT]) == 0
    return files_in(out)


def everything_in(folder: Path) -> dict[str, tuple[bytes, int]]:
    """All files and folders, hidden ones too, with their times of change."""
    paths = [folder, *folder.rglob("*")]
    return {str(path): (path.read_bytes() if path.is_file() else b"", path.stat().st_mtime_ns) for path in paths}


@pytest.mark.parametrize("fault", [removed, renamed, unmounted, another_in_its_place])
def test_a_run_that_loses_its_folder_ends_and_goes_on_in_the_right_place(
    flags, short_run, another_run, tmp_path, fault
):
    out, away, finished = tmp_path / "out", tmp_path / AWAY, []
    for number, moment in enumerate(MOMENTS):
        if fault is another_in_its_place:
            shutil.copytree(another_run, tmp_path / "another")
            there = everything_in(tmp_path / "another")
        life = Life(flags("out", *SHORT), tmp_path / f"{number}.log", functools.partial(strike, fault, out, *moment))
        assert life.wait() == 1, (moment, life.said)
        assert f"error: --output_dir {out}: the folder that this run writes to was removed" in life.said, moment
        assert "Traceback" not in life.said and "Conversations  " not in life.said
        if fault is another_in_its_place:
            out.rename(tmp_path / "another")
            assert everything_in(tmp_path / "another") == there, moment
            shutil.rmtree(tmp_path / "another")
        elif fault is unmounted:
            out.rmdir()  # it is empty
        assert not out.exists(), moment
        if fault is not removed:
            finished.append(len(shards_in(away)))
            away.rename(out)
        assert extract_logits.main(flags("out", *SHORT)) == 0
        assert files_in(out) == short_run, moment
        assert not list(out.rglob("*.tmp"))
        shutil.rmtree(out)
    assert fault is removed or len(set(finished)) > 4, finished


def test_a_run_ends_well_only_where_each_listed_shard_was_seen(flags, tmp_path):
    """Somebody clears shards away while the rest is computed."""
    out = tmp_path / "out"
    fault = functools.partial(strike, clear_away, out, "before", r"train-00005\.parquet", 0)
    life = Life(flags("out", *SHORT), tmp_path / "first.log", fault)
    assert life.wait() == 1, life.said
    assert "not there any more, or have another size: data/00000/train-00002.parquet" in life.said
    assert "Conversations  " not in life.said
    assert Life(flags("out", *SHORT), tmp_path / "second.log").wait() == 0
    assert len(shards_in(out)) == 6


def clear_away(out: Path) -> None:
    (out / "data/00000/train-00002.parquet").unlink()
