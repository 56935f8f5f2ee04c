"""Processes beside this one that carry out calls for it: threads of one interpreter would take turns with the caller's.

A helper ends as soon as its input does, whatever it is doing: none is left behind by a process that is killed. Large
arrays go through memory that both processes see, where the system has such (Linux); all else goes through pipes.
"""

import logging
import mmap
import os
import pickle
import queue
import threading
import traceback
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any, NamedTuple

import numpy as np

from chat_logits.errors import ToolkitError
from chat_logits.pipes import start_python, take_pipes

logger = logging.getLogger(__name__)

PROTOCOL = 5  # of pickles: the first whose arrays may lie elsewhere
ALIGNED = 64  # bytes: where each of the arrays begins
LARGE = 2**16  # bytes of an array from which on it goes through shared memory: what a pipe holds


class Helpers:
    """``count`` processes that all know ``carry_out``, each carrying out a call at a time, from any thread.

    ``carry_out`` and what it is called with and answers are pickled. ``what`` says for people what it does, such as
    "aligns conversations".
    """

    def __init__(self, count: int, what: str, carry_out: Callable):
        known = pickle.dumps(carry_out, PROTOCOL)  # raises what forbids it before a process is started
        self.processes = [_Process(what, known) for _ in range(count)]
        self._free: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._logged: set[tuple[int, str]] = set()
        for process in self.processes:
            self._free.put(process)

    def ask(self, *arguments: Any) -> Any:
        """What ``carry_out`` gives for the arguments, in the next process that is free. Raises what it raises there,
        and ToolkitError where the process has ended."""
        process = self._free.get()
        try:
            answer, logged = process.ask(arguments)
        finally:
            self._free.put(process)
        for level, message in set(logged) - self._logged:
            self._logged.add((level, message))
            logger.log(level, message)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def close(self) -> None:
        """End them, whatever is under way."""
        for process in self.processes:
            process.kill()


class Pickled(NamedTuple):
    """A value, and where those of its arrays lie that are apart, in shared memory."""

    value: bytes
    spans: list[tuple[int, int]]


class SharedMemory:
    """A file without a name through which one process gives another the large arrays of a value, one value at a time.

    Where the system has no such files, ``descriptor`` is None, and values have all their arrays with them.
    """

    def __init__(self, descriptor: int | None):
        self.descriptor = descriptor
        self._bytes = np.empty(0, np.uint8)

    @classmethod
    def new(cls) -> "SharedMemory":
        """One of this process, which keeps it as long as a thread may be using it."""
        try:
            descriptor = os.memfd_create("chat_logits")
        except (AttributeError, OSError):  # not on this system, or not in this container
            return cls(None)
        shared = cls(descriptor)
        weakref.finalize(shared, os.close, descriptor)
        return shared

    def put(self, value: Any) -> Pickled:
        """What gives the value in the other process, once; arrays of the value before are overwritten."""
        apart: list[np.ndarray] = []

        def stays(buffer: pickle.PickleBuffer) -> bool:
            array = np.frombuffer(buffer.raw(), np.uint8)
            is_apart = self.descriptor is not None and len(array) >= LARGE
            if is_apart:
                apart.append(array)
            return not is_apart

        pickled = pickle.dumps(value, PROTOCOL, buffer_callback=stays)
        begins = np.cumsum([0, *(-(-len(array) // ALIGNED) * ALIGNED for array in apart)]).tolist()
        spans = [(begin, begin + len(array)) for begin, array in zip(begins, apart, strict=False)]
        if begins[-1] > len(self._bytes):
            os.ftruncate(self.descriptor, begins[-1])  # type: ignore[arg-type]
        for array, there in zip(apart, self._at(spans), strict=True):
            there[:] = array
        return Pickled(pickled, spans)

    def take(self, given: Pickled) -> Any:
        """The value. Its large arrays are valid until the next one is put."""
        return pickle.loads(given.value, buffers=self._at(given.spans))

    def take_copy(self, given: Pickled) -> Any:
        """The value, for good."""
        return pickle.loads(given.value, buffers=[array.copy() for array in self._at(given.spans)])

    def _at(self, spans: list[tuple[int, int]]) -> list[np.ndarray]:
        size = max((end for _, end in spans), default=0)
        if size > len(self._bytes):
            self._bytes = np.frombuffer(mmap.mmap(self.descriptor, size), np.uint8)  # type: ignore[arg-type]
        return [self._bytes[begin:end] for begin, end in spans]


class _Process:
    def __init__(self, what: str, known: bytes):
        self._what = what
        self._known: bytes | None = known  # until it is sent, with the first call
        self._there, self._back = SharedMemory.new(), SharedMemory.new()
        descriptors = [shared.descriptor for shared in (self._there, self._back) if shared.descriptor is not None]
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        self.process = start_python(__name__, "main", *descriptors, env=environment, pass_fds=descriptors)

    def ask(self, arguments: tuple) -> tuple[Any, list[tuple[int, str]]]:
        """The answer, an exception where there is none, and the levels and messages of what was logged."""
        questions, answers = self.process.stdin, self.process.stdout
        assert questions and answers
        question = self._there.put(arguments)
        try:
            if self._known:
                questions.write(self._known)
                self._known = None
            pickle.dump(question, questions, PROTOCOL)
            questions.flush()
            return self._back.take_copy(pickle.load(answers))
        except BaseException as error:
            self.process.kill()  # if it has not ended: a part of a question or of an answer may be in a pipe
            status = self.process.wait()
            if isinstance(error, (EOFError, OSError, pickle.UnpicklingError)):
                raise ToolkitError(f"a process that {self._what} ended: {status}") from error
            raise

    def kill(self) -> None:
        self.process.kill()
        with suppress(OSError), self.process:  # waits, and closes its pipes; what was not yet sent has nowhere to go
            pass


# --- in the process ---


def main(*descriptors: str) -> None:
    """The process: what is to be carried out, then calls upon calls, each answered before the next.

    The descriptors are those of shared memory, if there is such.
    """
    questions, answers = take_pipes()
    log = Log()
    logging.basicConfig(level=logging.INFO, handlers=[log])
    given, back = map(SharedMemory, map(int, descriptors) if descriptors else (None, None))
    received: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(questions, received), daemon=True).start()
    carry_out = received.get()
    while True:
        pickle.dump(_answer(carry_out, given, back, received.get(), log), answers, PROTOCOL)
        answers.flush()


def _receive(questions: IO[bytes], received: queue.SimpleQueue) -> None:
    """Take what comes, and end the process with it."""
    status = 1
    try:
        while True:
            received.put(pickle.load(questions))
    except (EOFError, OSError, pickle.UnpicklingError):
        status = 0  # the other process has ended
    finally:
        if status:
            traceback.print_exc()
        os._exit(status)


def _answer(carry_out: Callable, given: SharedMemory, back: SharedMemory, question: Pickled, log: "Log") -> Pickled:
    try:
        return back.put((carry_out(*given.take(question)), log.take()))
    except Exception as error:
        return back.put((_sendable(error), log.take()))


def _sendable(error: Exception) -> Exception:
    error.add_note("".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return ToolkitError(f"{type(error).__name__}: {error}")
    return error


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
