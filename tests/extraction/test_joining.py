"""A run in parts, each by a command of its own, against the same run by one command."""

import json
import shutil

import pytest
from lives import Life, stopping
from runs import ROWS, SHARDS, files_in, shards_in

import extract_logits
from chat_logits.storage.dataset import open_dataset


def run(flags: list[str]) -> int:
    return extract_logits.main(flags)


def test_parts_are_joined_to_the_same_files(flags, quick_run, tmp_path, capsys):
    """Three parts, one of which is killed and resumed; the joining run computes nothing."""
    out = tmp_path / "out"
    life = Life(flags("out", "--part", "2/3"), tmp_path / "killed.log", stopping(5))
    while not shards_in(out / ".parts/2-of-3"):
        assert life.is_alive(), life.said
    life.kill()
    life.wait()
    for part in ("1/3", "2/3", "3/3"):
        assert run(flags("out", "--part", part)) == 0
        said = capsys.readouterr().out
        assert f"Part           {part}; when all are finished, the same command without --part joins them\n" in said
    parts = [out / ".parts" / f"{number}-of-3" for number in (1, 2, 3)]
    numbers = [[entry.shard for entry in open_dataset(str(part)).shards] for part in parts]
    assert numbers == [list(range(first, SHARDS, 3)) for first in range(3)]
    assert not any(open_dataset(str(part)).is_finished for part in parts)
    assert run(flags("out")) == 0
    said = capsys.readouterr()
    assert f"Joined: {SHARDS} shards of 3 parts\n" in said.err and "Loading" not in said.err
    assert files_in(out) == files_in(quick_run)
    assert not (out / ".parts").exists()


def test_what_a_part_has_not_finished_is_computed_when_joined(flags, quick_run, tmp_path, capsys):
    assert run(flags("out", "--part", "1/2")) == 0
    gone = shards_in(tmp_path / "out/.parts/1-of-2")[3:7]
    for path in gone:
        path.unlink()
    capsys.readouterr()
    assert run(flags("out")) == 0
    assert f"Joined: {SHARDS // 2 - len(gone)} shards of 1 part\n" in capsys.readouterr().err
    assert files_in(tmp_path / "out") == files_in(quick_run)


def test_a_part_goes_on_with_the_run_that_the_others_began(flags, tmp_path, capsys):
    """Its date for the template, say; options that differ are refused."""
    assert run(flags("out", "--part", "1/30", "--template_kwargs", '{"mood": "calm"}')) == 0
    assert run(flags("out", "--part", "2/30")) == 0
    first, second = (
        json.loads((tmp_path / f"out/.parts/{number}-of-30/extraction.json").read_text()) for number in (1, 2)
    )
    assert first == second and first["template_kwargs"] == {"mood": "calm"}
    capsys.readouterr()
    assert run(flags("out", "--part", "3/30", "--seed", "5")) == 2
    assert "seed: 0 there, 5 here" in capsys.readouterr().err


def test_parts_of_different_runs_are_not_joined(flags, tmp_path, capsys):
    for number, seed in (("1/30", "0"), ("2/30", "1")):
        assert run(flags(f"of {seed}", "--part", number, "--seed", seed)) == 0
    shutil.copytree(tmp_path / "of 1/.parts/2-of-30", tmp_path / "of 0/.parts/2-of-30")
    capsys.readouterr()
    assert run(flags("of 0")) == 2
    assert "are parts of different runs (seed: 0 there, 1 here)" in capsys.readouterr().err
    assert len(shards_in(tmp_path / "of 0/.parts/1-of-30")) == 2


@pytest.mark.parametrize(
    ("part", "more", "words"),
    [
        ("0/3", [], "--part 0/3: expected I/N, part I of N, such as 1/8 to 8/8"),
        ("4/3", [], "--part 4/3: expected I/N, part I of N, such as 1/8 to 8/8"),
        ("1/3", ["--overwrite"], "--part 1/3: it does not go with --overwrite"),
        ("1/3", ["--num_workers", 2], "--part 1/3: it does not go with --num_workers"),
        ("61/61", [], "--part 61/61: it has no shard, as the run has 60 shards of 3 source rows"),
    ],
)
def test_parts_that_cannot_be_are_refused(flags, capsys, part, more, words):
    assert run(flags("out", "--part", part, *more)) == 2
    assert words in capsys.readouterr().err


def test_a_part_that_runs_is_not_joined_and_a_joined_one_not_begun_again(flags, tmp_path, capsys):
    life = Life(flags("out", "--part", "1/2"), tmp_path / "runs.log", stopping(2))
    while len(shards_in(tmp_path / "out/.parts/1-of-2")) < 2:
        assert life.is_alive(), life.said
    assert run(flags("out")) == 2
    assert "another process is extracting into this folder" in capsys.readouterr().err
    life.kill()
    life.wait()
    assert run(flags("out", "--overwrite")) == 2
    assert "has parts to join" in capsys.readouterr().err
    assert run(flags("out", "--max_samples", 9)) == 2
    assert "max_samples" in capsys.readouterr().err
    assert run(flags("out", "--part", "2/2")) == 2
    assert "is joined, or was begun without parts" in capsys.readouterr().err
    assert len(shards_in(tmp_path / "out")) == 2 and len(ROWS) == 3 * SHARDS
