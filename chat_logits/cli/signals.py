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
    """Within, the first stopping signal raises Stopped, for an orderly end; the second ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def stop(number: int, _frame) -> None:
        if received:
            leave_at_once(number)
        received.append(number)
        ignore_if_repeated(number)
        at_the_next_leave()
        raise Stopped(number)

    with _leaving_from_a_thread() as at_the_next_leave:
        before = {number: signal.signal(number, stop) for number in stopping_signals()}
        try:
            yield
        except KeyboardInterrupt as interrupt:  # from a library that waits in C and does not say which signal came
            raise Stopped(received[0] if received else signal.SIGINT) from interrupt
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def _leaving_from_a_thread() -> Iterator[Callable[[], None]]:
    """A function; after it is called, a thread ends the process at the next signal that has a handler.

    Handlers of Python run in the main thread alone, and not while that waits in C code, for a device or a disk that
    does not answer. Into the file of ``signal.set_wakeup_fd`` Python writes a signal's number at once, as a byte.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)  # which set_wakeup_fd asks for
    before: list[int] = []

    def leave_when_written() -> None:
        with os.fdopen(reading, "rb", buffering=0) as signals:
            if number := signals.read(1):
                leave_at_once(number[0])

    threading.Thread(target=leave_when_written, daemon=True).start()
    try:
        yield lambda: before.append(signal.set_wakeup_fd(writing, warn_on_full_buffer=False))
    finally:
        if before:
            signal.set_wakeup_fd(before[0])
        os.close(writing)  # at which the thread ends
