"""Log lines for the stages of a command as they begin, so that it is never silent about what it is doing.

    with stage("Loading %s on %s", model_id, device):
        ...

Each stage is one log line. ``Stages.going_on`` is a context entered for as long as a stage lasts; the code that prints
the log can use it to show that the stage is still running.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

logger = logging.getLogger(__name__)


class Stages:
    """How it is shown that a stage is still running; by default it is not shown."""

    going_on: Callable[[], AbstractContextManager] = nullcontext


@contextmanager
def stage(text: str, *values: object) -> Iterator[None]:
    """Log ``text`` (with its %-``values``) as the stage that runs within this context."""
    logger.info(f"{text} …", *values)
    with Stages.going_on() if logger.isEnabledFor(logging.INFO) else nullcontext():
        yield


@contextmanager
def every(seconds: float, do: Callable[[], object]) -> Iterator[None]:
    """Within, a thread calls ``do()`` every so many seconds, until that raises OSError (it cannot write)."""
    ended = threading.Event()

    def repeat() -> None:
        with suppress(OSError):
            while not ended.wait(seconds):
                do()

    thread = threading.Thread(target=repeat, name="every", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def refresh(bar: Any) -> None:
    """Draw a bar of tqdm again. Its own method keeps the lock of all bars if it cannot write, and they wait for it."""
    with bar.get_lock():
        bar.refresh(nolock=True)
