"""Background work of the server, such as reading a whole dataset, and its progress."""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from chat_logits.errors import ToolkitError

logger = logging.getLogger(__name__)
IDLE, RUNNING, DONE, FAILED = "idle", "running", "done", "failed"


class Job:
    """Work in its own thread, started once: ``work(watch)`` returns its ``result``, and iterates over its steps with
    ``watch(steps, total)``. ``reason`` says why it failed."""

    def __init__(self, work: Callable[[Callable], Any]):
        self._work, self._lock, self.finished = work, threading.Lock(), threading.Event()
        self.state, self.done, self.total = IDLE, 0, 0
        self.result: Any = None
        self.reason = ""

    def start(self) -> None:
        """Start it, unless it is running or done; a failed job starts again."""
        with self._lock:
            if self.state in (RUNNING, DONE):
                return
            self.state, self.done = RUNNING, 0
            self.finished.clear()
            threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self.result = self._work(self._watched)
            self.state = DONE
        except ToolkitError as error:
            self.state, self.reason = FAILED, str(error)
        except Exception as error:  # otherwise it would be waited for forever
            logger.debug("a job failed", exc_info=True)
            self.state, self.reason = FAILED, f"{type(error).__name__}: {error}"
        finally:
            self.finished.set()

    def _watched(self, steps: Iterable, total: int) -> Iterator:
        self.total = total
        for self.done, step in enumerate(steps):
            yield step
        self.done = total
