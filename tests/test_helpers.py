"""Processes that carry out calls: what they raise and log, and how they end."""

import gc
import logging
import operator
import os
import random
import signal
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest

from chat_logits.errors import ToolkitError
from chat_logits.helpers import Helpers, SharedMemory


@pytest.fixture(params=["shared memory", "pipes alone"])
def helpers(request, monkeypatch):
    """Two, with arrays in memory that both processes see, and as where the system has none."""
    if request.param == "pipes alone":
        monkeypatch.delattr(os, "memfd_create")
    started = Helpers(2, "counts", operator.call)
    yield started
    started.close()
    assert all(one.process.poll() is not None for one in started.processes)
    assert all(pipe.closed for one in started.processes for pipe in (one.process.stdin, one.process.stdout))


def used(helpers):
    """Both processes, each after a call."""
    for _ in helpers.processes:
        helpers.ask(operator.add, 1, 2)
    return helpers.processes


def test_large_arrays_come_back_as_they_went(helpers):
    """Growing and shrinking, several at once, whole, in steps, transposed, empty; each answer is there for good."""
    rng, answers = np.random.default_rng(0), []
    for rows in (1, 5000, 300, 9000, 0, 40, 9001):
        numbers = rng.random((rows, 64))
        for given in (numbers, numbers[::-1, ::2], numbers.astype(np.float32).T):
            answers.append((given, helpers.ask(np.negative, given)))
        answers.append((numbers, -helpers.ask(np.concatenate, [numbers[: rows // 3], numbers[rows // 3 :]])))
    for given, found in answers:
        np.testing.assert_array_equal(found, -given)
        assert found.dtype == given.dtype and found.flags.writeable


def test_arrays_that_lie_apart_are_aligned_for_their_numbers():
    """Whatever the sizes of those before them; one of 65,537 bytes is followed by another's first."""
    there = SharedMemory.new()
    arrays = [np.arange(65_537, dtype=np.uint8), np.arange(9_000.0), np.arange(40_001, dtype=np.int32), np.ones(9_000)]
    taken = SharedMemory(there.descriptor).take(there.put(arrays))
    for one, other in zip(taken, arrays, strict=True):
        assert one.flags.aligned and one.ctypes.data % 64 == 0 and not np.shares_memory(one, other)
        np.testing.assert_array_equal(one, other)


def test_no_memory_is_left_open():
    gc.collect()  # what earlier tests have left is closed before the count, not between the two
    before = len([*Path("/proc/self/fd").iterdir()])
    for _ in range(3):
        started = Helpers(2, "counts", operator.call)
        started.ask(np.negative, np.ones(100_000))
        started.close()
        for one in started.processes:
            one.process.stdin.close(), one.process.stdout.close()
        del started, one
    gc.collect()
    assert len([*Path("/proc/self/fd").iterdir()]) == before


def test_what_is_raised_arrives_and_the_process_lives_on(helpers):
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        helpers.ask(operator.truediv, 1, 0)
    with pytest.raises(OSError) as raised:
        helpers.ask(os.mkdir, "/proc/none")
    assert raised.value.errno is not None and raised.value.filename == "/proc/none"
    assert helpers.ask(operator.add, 1, 2) == 3


def test_an_error_that_cannot_travel_arrives_as_its_words(helpers):
    with pytest.raises(ToolkitError, match=r"^HostileError: 3 and 4$"):
        helpers.ask(exec, "class HostileError(Exception):\n    pass\nraise HostileError('3 and 4')")


def test_what_cannot_be_asked_or_answered_is_told_and_the_process_lives_on(helpers):
    with pytest.raises(AttributeError, match="pickle"):
        helpers.ask(operator.add, 1, lambda: None)
    with pytest.raises(TypeError, match="cannot pickle"):
        helpers.ask(eval, "(n for n in ())")
    assert [helpers.ask(operator.add, 1, 2) for _ in range(4)] == [3] * 4


def test_what_the_other_process_cannot_load_is_told(monkeypatch):
    nowhere = types.ModuleType("nowhere")
    exec("def count(number):\n    return number", nowhere.__dict__)
    monkeypatch.setitem(sys.modules, "nowhere", nowhere)
    started = Helpers(1, "counts", nowhere.count)
    with pytest.raises(ToolkitError, match="a process that counts ended: 1"):
        started.ask(1)
    started.close()


def test_what_is_logged_is_logged_once(helpers, caplog):
    for _ in range(4):  # by both
        helpers.ask(logging.getLogger("elsewhere").warning, "a template from %s", "another time")
    assert [record.getMessage() for record in caplog.records] == ["a template from another time"]


def test_the_death_of_a_process_is_told(helpers):
    for one in used(helpers):
        os.kill(one.process.pid, signal.SIGKILL)
    with pytest.raises(ToolkitError, match="a process that counts ended: -9"):
        helpers.ask(operator.add, 1, 2)


def test_they_end_with_their_input_whatever_they_do(helpers, tmp_path):
    """As it ends when the process that asks is killed, here in the middle of a call."""
    places = [tmp_path / "one", tmp_path / "two"]
    asking = [threading.Thread(target=ask_in_vain, args=(helpers, place)) for place in places]
    for thread in asking:
        thread.start()
    while not all(place.exists() for place in places):
        time.sleep(0.01)
    for one in helpers.processes:
        one.process.stdin.close()
    assert [one.process.wait(60) for one in helpers.processes] == [0, 0]
    for thread in asking:
        thread.join()


def ask_in_vain(helpers, place):
    with pytest.raises(ToolkitError, match="a process that counts ended: 0"):
        helpers.ask(exec, f"import pathlib, time\npathlib.Path({str(place)!r}).touch()\ntime.sleep(600)")


def test_ctrl_c_is_not_theirs(helpers):
    for one in used(helpers):
        os.kill(one.process.pid, signal.SIGINT)
    assert [helpers.ask(operator.add, 1, 2) for _ in range(4)] == [3] * 4


def test_what_prints_below_python_does_not_come_between_answers(helpers):
    assert [helpers.ask(os.write, 1, b"N.\n0\n") for _ in range(3)] == [5] * 3
    assert [helpers.ask(operator.add, number, 1) for number in range(6)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_stopped_and_gone_on_with_nothing_is_lost(monkeypatch, unbuffered):
    """As by Ctrl-Z and fg, in the middle of answers larger than a pipe holds."""
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    started, asked = Helpers(1, "counts", operator.call), random.Random(0).randbytes(3_000_000)
    (one,), ended = started.processes, threading.Event()

    def stop_again_and_again():
        while not ended.wait(0.002):
            os.kill(one.process.pid, signal.SIGSTOP)
            ended.wait(0.001)
            os.kill(one.process.pid, signal.SIGCONT)

    stopping = threading.Thread(target=stop_again_and_again)
    stopping.start()
    try:
        for _ in range(60):
            assert started.ask(bytes, asked) == asked
    finally:
        ended.set()
        stopping.join()
        started.close()


def test_where_shared_memory_is_not_allowed_pipes_do(monkeypatch):
    def refused(_name):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", refused)
    started = Helpers(1, "counts", operator.call)
    numbers = np.random.default_rng(0).random((3000, 64))
    np.testing.assert_array_equal(started.ask(np.negative, numbers), -numbers)
    started.close()


def test_a_traceback_from_there_is_kept_for_whoever_looks(helpers):
    with pytest.raises(ZeroDivisionError) as raised:
        helpers.ask(exec, "def deep():\n    return 1 / 0\ndeep()")
    assert "in deep" in "".join(raised.value.__notes__) and str(raised.value) == "division by zero"


def test_modules_of_the_folder_it_is_called_in_are_left_alone(tmp_path, monkeypatch):
    """A file of the user's with a library's name, in the folder that a command is given in."""
    for name in ("json", "signal", "operator", "chat_logits"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not this one')")
    monkeypatch.chdir(tmp_path)
    started = Helpers(1, "counts", operator.call)
    assert started.ask(operator.add, 1, 2) == 3
    started.close()
