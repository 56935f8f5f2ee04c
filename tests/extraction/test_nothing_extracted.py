"""A run that extracts nothing takes nobody's place: what it was to replace stays, in the folder and on the Hub."""

import re
import shutil

import pytest
from conftest import POISON
from lives import Server
from loopback_hub import LoopbackHub
from runs import files_in, flags_for, shards_in

import extract_logits
from chat_logits.errors import ToolkitError
from chat_logits.storage.dataset import open_dataset

# Rows of which each is bad, one aside that has no answer: fewer than ``max_bad_rows`` allows of a thousand.
FEW = ("--system_prompt", POISON, "--max_samples", "8")
COMMAND = """
import sys
import extract_logits
from chat_logits.cli.command_line import leave
leave(extract_logits.main(sys.argv[1:]))
"""


def test_the_run_in_the_folder_is_kept(quick_run, poisoned, calm_source, tmp_path, capsys):
    out = shutil.copytree(quick_run, tmp_path / "out")
    flags = [*flags_for(poisoned, calm_source, out), *FEW]
    for more in (["--overwrite"], ["--overwrite"], []):  # the second and the third compute nothing
        assert extract_logits.main([*flags, *more]) == 1
        told = capsys.readouterr().err
        assert "error: nothing was extracted from 8 source rows: 7 × logits that are not finite" in told
        assert told.endswith(f"\nThe run that it was to replace is kept in {out}/.replaced.\n")
        assert files_in(out / ".replaced") == files_in(quick_run)
    with pytest.raises(ToolkitError, match="it has no rows yet; its extraction is not finished"):
        open_dataset(str(out)).read_row(0)


def test_a_new_run_of_nothing_is_not_called_finished(poisoned, calm_source, tmp_path, capsys):
    out = tmp_path / "out"
    assert extract_logits.main([*flags_for(poisoned, calm_source, out), *FEW]) == 1
    assert "is kept in" not in capsys.readouterr().err
    assert len(shards_in(out)) == 3 and not open_dataset(str(out)).is_finished


@pytest.mark.parametrize("fails", [False, True], ids=["to its end", "with too many bad rows"])
def test_the_run_on_the_hub_is_kept(quick_model, poisoned, calm_source, tmp_path, fails):
    """Its five shards; commits are due after each of the three empty ones of the new run."""
    (tmp_path / "server").mkdir()
    with LoopbackHub() as hub, Server(hub.environment(tmp_path / "home"), tmp_path / "server") as server:
        push = ("--output_repo", "user/kept", "--push_every", "0")
        old = flags_for(quick_model, calm_source, tmp_path / "old")
        assert server.run(COMMAND, *old, *push, "--max_samples", "15").returncode == 0
        before, commits = hub.files("dataset", "user/kept"), len(hub.commits("dataset", "user/kept"))
        assert sum(name.endswith(".parquet") for name in before) == 5
        limit = ("--max_bad_rows", "6") if fails else ()
        new = flags_for(poisoned, calm_source, tmp_path / "new")
        done = server.run(COMMAND, *new, *push, *FEW, "--overwrite", *limit)
        assert done.returncode == 1
        said = "7 of 8 source rows are bad, more than" if fails else "nothing was extracted from 8 source rows"
        assert said in done.stderr
        assert hub.files("dataset", "user/kept") == before
        assert len(hub.commits("dataset", "user/kept")) == commits
        good = flags_for(quick_model, calm_source, tmp_path / "good")
        assert server.run(COMMAND, *good, *push, "--max_samples", "6", "--overwrite").returncode == 0
        assert sum(name.endswith(".parquet") for name in hub.files("dataset", "user/kept")) == 2


def test_an_overwrite_waits_for_its_first_row_alone(quick_model, calm_source, chat_file, tmp_path):
    """Three source rows without answers make an empty first shard, which goes up with the one behind it."""
    rows = [{"question": "Well?", "answer": "" if number < 3 else f"It is {number}."} for number in range(6)]
    (tmp_path / "server").mkdir()
    with LoopbackHub() as hub, Server(hub.environment(tmp_path / "home"), tmp_path / "server") as server:
        push = ("--output_repo", "user/renewed", "--push_every", "0")
        old = flags_for(quick_model, calm_source, tmp_path / "old")
        assert server.run(COMMAND, *old, *push, "--max_samples", "15").returncode == 0
        before = len(hub.commits("dataset", "user/renewed"))
        new = flags_for(quick_model, chat_file(rows), tmp_path / "new")
        done = server.run(COMMAND, *new, *push, "--overwrite")
        assert done.returncode == 0, done.stderr
        first = hub.commits("dataset", "user/renewed")[before]
        assert re.search("train-00000.parquet", str(first.paths)) and re.search("train-00001.parquet", str(first.paths))
        pushed = hub.files("dataset", "user/renewed")
        assert {name: pushed[name] for name in pushed if name.startswith("data/")} == {
            path.relative_to(tmp_path / "new").as_posix(): path.read_bytes() for path in shards_in(tmp_path / "new")
        }
