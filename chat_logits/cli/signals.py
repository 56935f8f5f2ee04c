"""How signals end a command: the first in an orderly way, the second at once."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from chat_logits.cli import leave_at_once
from chat_logits.machine import ignore_if_repeated, stopping_signals


class Stopped(KeyboardInterrupt):
    """Stopped by the signal with this ``number``."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Within, the first stopping signal raises Stopped, for an orderly end; the second ends the process at once.

    If the main thread waits in C code already when the first comes, the third does.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    process, numbers = os.getpid(), stopping_signals()

    def stop(number: int, _frame) -> None:
        if received:
            leave_at_once(number)
        received.append(number)
        ignore_if_repeated(number)
        if os.getpid() == process:  # a fork has no such thread
            leave_at_the_next()
        raise Stopped(number)

    with _leaving_thread(numbers, 3) as leave_at_the_third, _leaving_thread(numbers, 1) as leave_at_the_next:
        leave_at_the_third()
        before = {number: signal.signal(number, stop) for number in numbers}
        try:
            yield
        except KeyboardInterrupt as interrupt:  # from a library that waits in C and does not say which signal came
            raise Stopped(received[0] if received else signal.SIGINT) from interrupt
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _leaving_thread(numbers: list[signal.Signals], count: int) -> Iterator[Callable[[], None]]:
    """A function; after it is called, a thread ends the process when so many signals of these numbers have come.

    Handlers of Python run in the main thread alone, and not while that waits in C code, for a device or a disk that
    does not answer. Into the file of ``signal.set_wakeup_fd`` Python writes a signal's number at once, as a byte.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)  # which set_wakeup_fd asks for
    before: list[int] = []

    def leave_when_written() -> None:
        left = count
        with os.fdopen(reading, "rb", buffering=0) as signals:
            while byte := signals.read(1):
                left -= byte[0] in numbers
                if not left:
                    leave_at_once(byte[0])

    def listen() -> None:
        before.append(signal.set_wakeup_fd(writing, warn_on_full_buffer=False))
        _written_to.add(writing)

    threading.Thread(target=leave_when_written, daemon=True).start()
    try:
        yield listen
    finally:
        if before:
            signal.set_wakeup_fd(before[0])
        _written_to.discard(writing)
        os.close(writing)  # at which the thread ends


_written_to: set[int] = set()  # files that these threads read: in a fork they are the parent's


def _let_the_parent_be() -> None:
    file = signal.set_wakeup_fd(-1)
    if file not in _written_to:
        signal.set_wakeup_fd(file)


os.register_at_fork(after_in_child=_let_the_parent_be)
