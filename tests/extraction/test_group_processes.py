"""Calls that fail in processes that compute one model together: in all of them, or in one alone."""

import subprocess
import sys
import time
from pathlib import Path

import group_failures
import pytest
from group_failures import fail_a_sum_apart, fail_in, note_in

from chat_logits.extraction import processes
from chat_logits.extraction.processes import GroupLost, started_group


@pytest.fixture
def group(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(group_failures.__file__).parent))  # to the other process
    with started_group(2, "cpu") as started:
        yield started


@pytest.fixture
def hurry(monkeypatch):
    """Have little patience from now on with what fails in one process alone."""
    return lambda: monkeypatch.setattr(processes, "GRACE", 3.0)


def test_after_what_fails_in_all_processes_they_go_on_and_what_fails_in_one_alone_ends_them(group, hurry):
    """As batches do that are too large for every device, and then for one of them."""
    with pytest.raises(RuntimeError, match=r"^both$"):
        fail_in(group, (0, 1), "both")
    assert fail_in(group, (), "") == "done"
    hurry()
    assert fail_in(group, (1,), "CUDA out of memory. Tried to allocate 2 GiB") == "done"
    until = time.monotonic() + 60
    said = r"^process 2 of 2 is out of memory, the others are not; give less `batch_tokens` or `logit_memory`\n"
    with pytest.raises(GroupLost, match=said):
        while time.monotonic() < until:
            fail_in(group, (), "")
            time.sleep(0.1)


def test_a_process_that_has_failed_alone_makes_no_more_calls(group, hurry, tmp_path):
    """Over NCCL the first one need not have noticed: its device would take the next call's tensors for the last's."""
    note_in(group, tmp_path)
    until = time.monotonic() + 60
    while not (tmp_path / "1").exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    (tmp_path / "1").unlink()
    hurry()
    assert fail_in(group, (1,), "out of memory") == "done"
    with pytest.raises(GroupLost, match="process 2 of 2 is out of memory"):
        while time.monotonic() < until:
            note_in(group, tmp_path)
            time.sleep(0.1)
    assert [file.name for file in tmp_path.iterdir()] == ["0"]


def test_processes_that_failed_in_different_places_do_not_go_on(group):
    said = "^the processes have failed in different places; in the first one: RuntimeError: out of memory"
    with pytest.raises(GroupLost, match=said):
        fail_a_sum_apart(group)
    with pytest.raises(GroupLost, match=said):
        fail_in(group, (), "")


@pytest.mark.parametrize(
    ("number", "name"),
    [(15, "SIGTERM."), (40, "signal 40."), (9, "SIGKILL, as the system does where memory is short.")],
)
def test_whatever_signal_has_ended_a_process_is_told(number, name, tmp_path):
    """Python has no name for most of the real-time signals."""
    status = subprocess.run([sys.executable, "-c", f"import os; os.kill(os.getpid(), {number})"]).returncode
    assert status == -number
    assert processes._how(status, tmp_path / "said") == f"was ended by {name}"
