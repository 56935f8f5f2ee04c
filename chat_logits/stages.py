"""What is under way, told as it begins, so that nobody has to guess what a command that says nothing is doing.

    with stage("Loading %s on %s", model_id, device):
        ...

Each stage is a line of the log. Whoever prints that may also show that it goes on: ``Stages.going_on`` is entered for
as long as a stage lasts.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

logger = logging.getLogger(__name__)


class Stages:
    """How it is shown that a stage goes on; by default it is not."""

    going_on: Callable[[], AbstractContextManager] = nullcontext


@contextmanager
def stage(text: str, *values: object) -> Iterator[None]:
    """Within, what ``text`` (with its %-``values``) says is under way."""
    logger.info(f"{text} …", *values)
    with Stages.going_on() if logger.isEnabledFor(logging.INFO) else nullcontext():
        yield


@contextmanager
def every(seconds: float, do: Callable[[], object]) -> Iterator[None]:
    """Within, ``do()`` is called by a thread so often, until it finds that it cannot write."""
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
