"""Source rows to aligned conversations beside the model: in the thread that reads them, or in processes of their own.

Rendering and alignment are Python's work: in threads they would take turns, and the model's launches with them.
"""

import contextlib
import logging
import os
import pickle
import queue
import signal
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, cast

from chat_logits.data.reader import Aligned, Reader
from chat_logits.data.source import SourceDataset
from chat_logits.errors import ToolkitError

logger = logging.getLogger(__name__)

NO_SOURCE = cast(SourceDataset, None)  # rows come from the process that reads them
ROOT = Path(__file__).resolve().parents[2]  # where the package is, installed or not


class Aligning(Protocol):
    """Where rows are aligned, ``ahead`` shards at once beside the one that the model computes."""

    ahead: int

    def submit(self, first: int, rows: list) -> Future:
        """``Reader.align_rows`` of these source rows, beginning at ``first``."""

    def close(self) -> None:
        """End, whatever is under way."""


def start_aligning(reader: Reader, processes: int) -> Aligning:
    """Align in so many processes; in the calling thread where it is one, or the reader cannot go to others."""
    try:
        return AlignProcesses(reader, processes) if processes > 1 else AlignHere(reader)
    except (pickle.PicklingError, AttributeError, TypeError) as error:  # of a tokenizer with code of its own, say
        logger.info("Rows are aligned in this process, as their reader cannot go to others: %s", error)
        return AlignHere(reader)


class AlignHere:
    """In the thread that submits the rows."""

    ahead = 1

    def __init__(self, reader: Reader):
        self._reader = reader

    def submit(self, first: int, rows: list) -> Future:
        done: Future = Future()
        done.set_result(self._reader.align_rows(first, rows))
        return done

    def close(self) -> None:
        pass


class AlignProcesses:
    """In processes that know the reader but for its source, each asked by a thread here."""

    def __init__(self, reader: Reader, processes: int):
        self.ahead = processes + 1
        known = pickle.dumps(replace(reader, source=NO_SOURCE, first_ready=[], first_skipped=[]))
        self._asking = ThreadPoolExecutor(processes, "align")
        self._all = [_Process(known) for _ in range(processes)]
        self._logged: set[tuple[int, str]] = set()
        self._free: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        for process in self._all:
            self._free.put(process)

    def submit(self, first: int, rows: list) -> Future:
        return self._asking.submit(self._ask, first, rows)

    def close(self) -> None:
        for process in self._all:
            process.kill()
        self._asking.shutdown(cancel_futures=True)

    def _ask(self, first: int, rows: list) -> tuple[list[Aligned], list[dict]]:
        process = self._free.get()
        try:
            answer, logged = process.ask(first, rows)
        finally:
            self._free.put(process)
        for level, message in set(logged) - self._logged:
            self._logged.add((level, message))
            logger.log(level, message)
        if isinstance(answer, BaseException):
            raise answer
        return answer


class _Process:
    """It ends when its input does, so that none is left behind by a process that is killed."""

    def __init__(self, reader: bytes):
        self._reader: bytes | None = reader  # until it is sent, with the first rows
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {"PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "chat_logits.data.aligning"],  # -P: not what lies in this folder
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **environment},
        )

    def ask(self, first: int, rows: list) -> tuple[Any, list[tuple[int, str]]]:
        """The answer, an exception where there is none, and the levels and messages of what was logged."""
        questions, answers = self._process.stdin, self._process.stdout
        assert questions and answers
        try:
            if self._reader:
                questions.write(self._reader)
                self._reader = None
            pickle.dump((first, rows), questions)
            questions.flush()
            return pickle.load(answers)
        except (EOFError, OSError) as error:
            raise ToolkitError(f"a process that aligns conversations ended: {self._process.wait()}") from error

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def main() -> None:
    """The process: a reader, then rows upon rows, each answered before the next is read."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the other process's to act on
    questions, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # whatever prints must not come between the answers
    log = Log()
    logging.basicConfig(level=logging.INFO, handlers=[log])
    with contextlib.suppress(EOFError):  # the other process has ended
        reader: Reader = pickle.load(questions)
        while True:
            first, rows = pickle.load(questions)
            pickle.dump((_answer(reader, first, rows), log.take()), answers)
            answers.flush()


class Log(logging.Handler):
    """What the process logs goes with its answers."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._kept.append((record.levelno, record.getMessage()))

    def take(self) -> list[tuple[int, str]]:
        kept, self._kept = self._kept, []
        return kept


def _answer(reader: Reader, first: int, rows: list) -> tuple[list[Aligned], list[dict]] | Exception:
    try:
        return reader.align_rows(first, rows)
    except Exception as error:
        return error


if __name__ == "__main__":
    main()
