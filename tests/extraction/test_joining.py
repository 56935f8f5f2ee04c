"""A run in parts, each by a command of its own, against the same run by one command."""

import json
import shutil
import time

import pytest
from lives import Life, stopping
from runs import SHARDS, files_in, shards_in

import extract_logits
from chat_logits.errors import UsageError
from chat_logits.extraction.joining import _join_parts, refuse_another_run
from chat_logits.storage.dataset import open_dataset


def wait_for(condition, life: Life) -> None:
    while not condition():
        assert life.is_alive(), life.said
        time.sleep(0.01)


def run(flags: list[str]) -> int:
    return extract_logits.main(flags)


def test_parts_are_joined_to_the_same_files(flags, quick_run, tmp_path, capsys):
    """Three parts, one of which is killed and resumed; the joining run computes nothing."""
    out = tmp_path / "out"
    life = Life(flags("out", "--part", "2/3"), tmp_path / "killed.log", stopping(5))
    wait_for(lambda: shards_in(out / ".parts/2-of-3"), life)
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
    assert "are of different runs (seed: 0 there, 1 here)" in capsys.readouterr().err
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


def test_a_part_that_runs_is_not_joined(flags, tmp_path, capsys):
    life = Life(flags("out", "--part", "1/2"), tmp_path / "runs.log", stopping(2))
    wait_for(lambda: len(shards_in(tmp_path / "out/.parts/1-of-2")) == 2, life)
    assert run(flags("out")) == 2
    assert "another process is extracting into this folder" in capsys.readouterr().err
    life.kill()
    life.wait()
    assert run(flags("out", "--overwrite")) == 2
    assert "has parts to join" in capsys.readouterr().err
    assert run(flags("out", "--part", "1/3")) == 2
    assert "1-of-2 is there, a part of another number of parts" in capsys.readouterr().err
    assert len(shards_in(tmp_path / "out/.parts/1-of-2")) == 2


def test_a_part_can_be_given_again_after_joining(flags, quick_run, tmp_path, capsys):
    """The joining command was given too early, with a wrong option: what it left to do is done by the parts."""
    out = tmp_path / "out"
    life = Life(flags("out", "--part", "1/2"), tmp_path / "runs.log", stopping(5))
    wait_for(lambda: len(shards_in(out / ".parts/1-of-2")) == 5, life)
    life.kill()
    life.wait()
    assert run(flags("out", "--max_samples", 9)) == 2
    assert "max_samples: null there, 9 here" in capsys.readouterr().err
    assert len(shards_in(out)) == 5 and not (out / ".parts").exists()
    for part in ("1/2", "2/2"):
        assert run(flags("out", "--part", part)) == 0
    assert [len(shards_in(out / ".parts" / name)) for name in ("1-of-2", "2-of-2")] == [SHARDS // 2 - 5, SHARDS // 2]
    capsys.readouterr()
    assert run(flags("out")) == 0
    assert "Loading" not in capsys.readouterr().err
    assert files_in(out) == files_in(quick_run)
    assert run(flags("out", "--part", "2/2")) == 2
    assert f"--part 2/2: it has no shards, or all of them were joined in {out}" in capsys.readouterr().err


def test_a_shard_that_the_run_has_is_not_replaced(flags, tmp_path, caplog):
    """The same file is removed from the part; a different one stays there and is named."""
    out, part = tmp_path / "out", tmp_path / "out/.parts/1-of-30"
    assert run(flags("out", "--part", "1/30")) == 0
    first, second = shards_in(part)
    for path, change in ((first, b""), (second, b"!")):
        to = out / path.relative_to(part)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(path.read_bytes() + change)
    (out / "extraction.json").write_bytes((part / "extraction.json").read_bytes())
    _join_parts(out, overwrite=False)
    assert shards_in(part) == [second] and f"{second} is not moved" in caplog.text
    assert len(shards_in(out)) == 2


def test_parts_begun_at_one_time_agree_or_give_up(flags, tmp_path):
    """As both look for the other's record before either has written its own."""
    assert run(flags("out", "--part", "1/30")) == 0
    place = tmp_path / "out/.parts/2-of-30"
    shutil.copytree(tmp_path / "out/.parts/1-of-30", place)
    refuse_another_run(place)
    record = json.loads((place / "extraction.json").read_text())
    (place / "extraction.json").write_text(json.dumps(record | {"template_date": "2026-11-29"}))
    with pytest.raises(UsageError, match=r"(?s)are of different runs \(template_date.*The same command follows"):
        refuse_another_run(place)
    assert not (place / "extraction.json").exists()
