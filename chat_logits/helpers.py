"""Helper processes that carry out calls for this one: threads of one interpreter would take turns with the caller's.

A helper exits as soon as its input is closed, whatever it is doing, so a killed process leaves no helpers running.
Large arrays go through shared memory where the system supports it (Linux); everything else goes through pipes.
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

PROTOCOL = 5  # pickle protocol: the first one with out-of-band buffers
ALIGNED = 64  # bytes: alignment of each array
LARGE = 2**16  # bytes: arrays of at least this size go through shared memory; it is what a pipe holds


class Helpers:
    """``count`` processes that all have ``carry_out`` and run one call at a time; any thread may call them.

    ``carry_out``, its arguments and its results are pickled. ``what`` describes its work in messages, such as
    "aligns conversations".
    """

    def __init__(self, count: int, what: str, carry_out: Callable):
        known = pickle.dumps(carry_out, PROTOCOL)  # if this is impossible, it raises before a process is started
        self.processes = [_Process(what, known) for _ in range(count)]
        self._free: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._logged: set[tuple[int, str]] = set()
        for process in self.processes:
            self._free.put(process)

    def ask(self, *arguments: Any) -> Any:
        """The result of ``carry_out`` for the arguments, computed in the next free process. Raises what it raises
        there, and ToolkitError if the process has ended."""
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
        """Kill the processes, even during a call."""
        for process in self.processes:
            process.kill()


class Pickled(NamedTuple):
    """A pickled value, and where its large arrays lie in shared memory (begin and end)."""

    value: bytes
    spans: list[tuple[int, int]]


class SharedMemory:
    """An anonymous file by which one process passes the large arrays of a value to another, one value at a time.

    If the system does not have such files, ``descriptor`` is None and the arrays stay in the pickled value.
    """

    def __init__(self, descriptor: int | None):
        self.descriptor = descriptor
        self._bytes = np.empty(0, np.uint8)

    @classmethod
    def new(cls) -> "SharedMemory":
        """New shared memory; this process keeps it open as long as a thread may be using it."""
        try:
            descriptor = os.memfd_create("chat_logits")
        except (AttributeError, OSError):  # not on this system, or not in this container
            return cls(None)
        shared = cls(descriptor)
        weakref.finalize(shared, os.close, descriptor)
        return shared

    def put(self, value: Any) -> Pickled:
        """What the other process needs to take the value, once; it overwrites the previous value's arrays."""
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
        """The value. Its large arrays are valid until the next value is put."""
        return pickle.loads(given.value, buffers=self._at(given.spans))

    def take_copy(self, given: Pickled) -> Any:
        """The value with copies of its arrays, which stay valid."""
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
        """The answer or, if the call failed, the exception; and the levels and messages of what was logged."""
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
            self.process.kill()  # if it still runs: part of a question or of an answer may be in a pipe
            status = self.process.wait()
            if isinstance(error, (EOFError, OSError, pickle.UnpicklingError)):
                raise ToolkitError(f"a process that {self._what} ended: {status}") from error
            raise

    def kill(self) -> None:
        self.process.kill()
        with suppress(OSError), self.process:  # waits and closes the pipes; flushing unsent data fails
            pass


# --- in the process ---


def main(*descriptors: str) -> None:
    """The helper process: it receives the function, then calls, and answers each one before the next.

    ``descriptors`` are those of the shared memory, if there is any.
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
    """Queue what arrives; when the input ends, end the process."""
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
    """Keeps what the process logs, to be sent with its next answer."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._kept.append((record.levelno, record.getMessage()))

    def take(self) -> list[tuple[int, str]]:
        kept, self._kept = self._kept, []
        return kept
