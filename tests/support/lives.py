"""Runs of the extraction in processes that can be killed, started in a fraction of a second.

A fork server has torch and the toolkit loaded; each life is a fork of it, with files for its output.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from conftest import REPO

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["datasets", "extract_logits", "chat_logits.extraction.run", "transformers.models.llama", "lives"]
)


class Life:
    """One process that runs the command; ``prepare()`` is called in it before."""

    def __init__(self, argv: list, log: Path, prepare: Callable[[], None] | None = None):
        self.log = log
        self._process = SERVER.Process(target=_live, args=(list(map(str, argv)), log, prepare))
        self._process.start()
        self.pid = self._process.pid

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def wait(self, seconds: float = 300) -> int:
        """The exit status, negative for a signal that ended it."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self.kill()
            raise TimeoutError(f"still running after {seconds} s:\n{self.said}")
        return self._process.exitcode

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""


def _live(argv: list[str], log: Path, prepare: Callable[[], None] | None) -> None:
    import extract_logits
    from chat_logits.cli.command_line import leave

    os.chdir(REPO)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(file, number)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    if prepare:
        prepare()
    leave(extract_logits.main(argv))
