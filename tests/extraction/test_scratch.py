"""Temporary folders: gone with their process, and after a process that was killed with the next one here."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPO

# An open context that nobody ends.
MAKE = """
import contextlib, time
from chat_logits.scratch import scratch_folder
stack = contextlib.ExitStack()
folder = stack.enter_context(scratch_folder())
print(folder, flush=True)
"""


@pytest.fixture
def python(tmp_path):
    """Starts a process whose temporary folders are below ``tmp_path``; gives it and the one it has made."""

    def start(then: str) -> tuple[subprocess.Popen, Path]:
        environment = {**os.environ, "TMPDIR": str(tmp_path)}
        process = subprocess.Popen(
            [sys.executable, "-c", MAKE + then], cwd=REPO, env=environment, stdout=subprocess.PIPE, text=True
        )
        return process, Path(process.stdout.readline().strip())

    return start


def test_a_folder_is_removed_with_its_content_at_the_end(python):
    process, folder = python("(folder / 'weights').write_bytes(b'0' * 9); input()")
    assert process.wait(300) == 1  # nobody to answer
    assert not list(folder.parent.iterdir())


def test_what_a_killed_process_left_is_removed_by_the_next_and_what_is_in_use_is_not(python):
    killed, left = python("time.sleep(9999)")
    alive, used = python("time.sleep(9999)")
    young, fresh = python("time.sleep(9999)")
    try:
        (left / "weights").write_bytes(b"0" * 9)
        for process in (killed, young):
            process.send_signal(signal.SIGKILL)
            process.wait()
        old = time.time() - 3600
        for folder in (left, used):
            os.utime(folder, (old, old))
        other, own = python("")
        assert other.wait(300) == 0
        assert not left.exists() and not own.exists()
        assert used.is_dir() and fresh.is_dir()
    finally:
        alive.kill()
