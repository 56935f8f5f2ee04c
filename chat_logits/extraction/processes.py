"""The other processes of a group that computes one model: started by the first one, watched, and ended with it.

They get their calls on standard input and report failures on standard output, as pickles. A process ends as soon as its
input does, whatever it is doing. So none is left running, however the first process ends.
"""

import contextlib
import logging
import os
import pickle
import queue
import signal
import subprocess
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, NamedTuple

from chat_logits.errors import ToolkitError
from chat_logits.pipes import start_python, take_pipes
from chat_logits.scratch import scratch_folder
from chat_logits.stages import stage
from chat_logits.words import first_line

STARTED = 0  # the number of a pseudo-call that each process reports once it has started
GRACE = 20.0  # seconds to wait for the other processes to report the same failure
LAST = 20.0  # seconds until a call that can no longer end makes the process exit

logger = logging.getLogger(__name__)


class Member(NamedTuple):
    """What a process has to know about its group; ``device`` is a kind of device, such as "cuda"."""

    rank: int
    size: int
    device: str
    meeting: Path
    threads: int


class GroupLost(ToolkitError):
    """One of the processes has ended, or failed where the others did not: the group cannot make calls any more."""


class CallFailure(NamedTuple):
    """What failed in a call; ``collectives`` is how many the process has begun, over all calls."""

    text: str
    is_out_of_memory: bool
    collectives: int


@contextlib.contextmanager
def started_group(size: int, device: str) -> Iterator:
    """A ``Group`` of ``size`` processes, with this one as the first, until the context ends.

    Each has one device of the kind ``device``. Raises GroupLost if a process ends before it is ready.
    """
    import torch

    from chat_logits.model.group import Group

    before = torch.get_num_threads()
    threads = max(1, before // size) if device == "cpu" else before
    with ExitStack() as stack:
        folder = stack.enter_context(scratch_folder())
        stack.callback(torch.set_num_threads, before)
        torch.set_num_threads(threads)
        members = [Member(rank, size, device, folder / "meeting", threads) for rank in range(size)]
        with stage("Starting %d processes", size):
            others = Processes(members[1:], folder)
            stack.callback(others.leave_behind, Group.leave)
            stack.callback(others.close)
            others.wait_until_started()
            group = Group(0, size, _device(members[0]), others)
            group.join(members[0].meeting)
            others.has_returned()
        yield group


def _device(member: Member):
    import torch

    return torch.device("cpu") if member.device == "cpu" else torch.device(member.device, member.rank)


class Processes:
    """The other processes of a group, as seen from the first one."""

    def __init__(self, members: list[Member], folder: Path):
        self._changed = threading.Condition()
        self._fault = ""  # why the group is lost
        self._failed: dict[int, dict[int, CallFailure]] = defaultdict(dict)  # by call, then by rank
        self._calling: int | None = STARTED
        self._settled: set[int] = set()  # calls that have failed in all processes
        self._is_started, self._is_closed, self._device = set[int](), False, members[0].device
        self._all: dict[int, subprocess.Popen] = {}
        self._errors = {member.rank: folder / f"process-{member.rank + 1}" for member in members}
        for member in members:
            process = self._all[member.rank] = _start(member, self._errors[member.rank])
            threading.Thread(target=self._watch, args=(member.rank, process), daemon=True).start()

    def wait_until_started(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._fault or len(self._is_started) == len(self._all))
            self._refuse_lost()

    def tell(self, number: int, message: bytes) -> None:
        with self._changed:
            self._refuse_lost()
            self._calling = number
        for process in self._all.values():
            with contextlib.suppress(OSError):  # it has ended; its watcher notices that as well
                assert process.stdin
                pickle.dump(message, process.stdin)
                process.stdin.flush()

    def agree_on_failure(self, number: int, error: Exception) -> None:
        if isinstance(error, ToolkitError):  # every process raises it without needing the others
            self._settled.add(number)
            return
        with self._changed:
            everywhere = lambda: len(self._failed[number]) == len(self._all)  # noqa: E731
            self._changed.wait_for(lambda: self._fault or everywhere(), GRACE)
            own = _failure(error)
            if not self._fault and everywhere():
                if {failure.collectives for failure in self._failed[number].values()} == {own.collectives}:
                    self._settled.add(number)
                    return
                self._fault = f"the processes have failed in different places; in the first one: {own.text}"
            self._fault = self._fault or self._said(0, own)
        self._end_all()
        _later(LAST, self._leave)
        raise GroupLost(self._fault) from error

    def has_returned(self) -> None:
        with self._changed:
            self._calling = None

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
        self._end_all()
        for process in self._all.values():
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe
                with contextlib.suppress(OSError):
                    pipe.close()

    def leave_behind(self, leave: Callable[[], None]) -> None:
        """Leave a group that is closed. If the group is lost and leaving it hangs, the process exits."""
        if not self._fault:
            leave()
            return
        timer = _later(LAST, self._exit)
        with contextlib.suppress(RuntimeError):
            leave()
        timer.cancel()

    def _refuse_lost(self) -> None:
        if self._fault:
            raise GroupLost(self._fault)

    def _end_all(self) -> None:
        for process in self._all.values():
            process.kill()

    def _watch(self, rank: int, process: subprocess.Popen) -> None:
        """Record what a process reports, and its end."""
        assert process.stdout
        with contextlib.suppress(EOFError, OSError, pickle.UnpicklingError, ValueError):
            while True:
                number, failure = pickle.load(process.stdout)
                with self._changed:
                    if failure is None:
                        self._is_started.add(rank)
                    else:
                        self._failed[number][rank] = CallFailure(*failure)
                        _later(GRACE, self._lose_unless_settled, number, rank)
                    self._changed.notify_all()
        status = process.wait()
        self._lose(f"process {rank + 1} of {self._size} {_how(status, self._errors[rank])}")

    @property
    def _size(self) -> int:
        return len(self._all) + 1

    def _lose_unless_settled(self, number: int, rank: int) -> None:
        if number not in self._settled:
            self._lose(self._said(rank, self._failed[number][rank]))

    def _lose(self, fault: str) -> None:
        """Give the group up. A call in progress fails, as the others are gone; if it does not, the process exits."""
        with self._changed:
            if self._is_closed or self._fault:
                return
            self._fault = f"{fault}\nWhat is finished is kept; the same command resumes."
            self._changed.notify_all()
        self._end_all()
        _later(LAST, self._leave)

    def _leave(self) -> None:
        """Exit if a device still waits for data that never comes: nothing else ends that wait."""
        if not self._is_closed and (self._calling is not None or self._device != "cpu"):
            self._exit()

    def _exit(self) -> None:
        logger.error("%s", self._fault)
        os._exit(1)

    def _said(self, rank: int, failure: CallFailure) -> str:
        who = f"process {rank + 1} of {self._size}"
        if failure.is_out_of_memory:
            return f"{who} is out of memory, the others are not; give less `batch_tokens` or `logit_memory`"
        return f"{who} has failed: {failure.text}"


def _later(seconds: float, do, *args) -> threading.Timer:
    timer = threading.Timer(seconds, do, args)
    timer.daemon = True
    timer.start()
    return timer


def _start(member: Member, errors: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": str(member.threads)}
    with errors.open("wb") as written:
        process = start_python(__name__, "main", stderr=written, env=environment)
    with contextlib.suppress(OSError):
        assert process.stdin
        pickle.dump(tuple(member), process.stdin)
        process.stdin.flush()
    return process


def _how(status: int, errors: Path) -> str:
    """How a process ended, with the last line that it printed."""
    if status < 0:
        by_system = ", as the system does where memory is short" if -status == signal.SIGKILL else ""
        return f"was ended by {_signal_name(-status)}{by_system}."
    said = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines() if errors.exists() else []
    return f"ended with status {status}: {said[-1] if said else 'without a message'}"


def _signal_name(number: int) -> str:
    """The signal's name, or its number if Python has no name for it: most real-time signals, 34 to 64 on Linux.

    >>> _signal_name(9), _signal_name(40)
    ('SIGKILL', 'signal 40')
    """
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _failure(error: Exception) -> CallFailure:
    from torch.distributed import group

    from chat_logits.model.out_of_memory import is_out_of_memory

    short = isinstance(error, RuntimeError) and is_out_of_memory(error)
    collectives = group.WORLD._get_sequence_number_for_group()
    return CallFailure(f"{type(error).__name__}: {first_line(error)}", short, collectives)


# --- in the process ---


def main() -> None:
    """Run the process: read what it is, then make one call after another."""
    told, answers = take_pipes()
    logging.getLogger("chat_logits").setLevel(logging.ERROR)  # the first process logs the same
    member = Member(*pickle.load(told))
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(told, messages), daemon=True).start()

    def answer(number: int, failure: CallFailure | None) -> None:
        pickle.dump((number, failure and tuple(failure)), answers)  # a plain tuple: the module has another name here
        answers.flush()

    import torch

    from chat_logits.model import probe  # noqa: F401  # imports transformers before the others wait for this process
    from chat_logits.model.group import Group

    torch.set_num_threads(member.threads)
    answer(STARTED, None)
    group = Group(member.rank, member.size, _device(member))
    group.join(member.meeting)
    group.follow(iter(messages.get, None), lambda number, error: answer(number, _failure(error)))


def _receive(told: IO[bytes], messages: queue.SimpleQueue) -> None:
    """Receive messages, and end the process when they end: it may be waiting for another process that is gone."""
    with contextlib.suppress(EOFError, OSError, pickle.UnpicklingError):
        while True:
            messages.put(pickle.load(told))
    os._exit(0)
