"""Work that is done beside the answers of the server, such as reading a whole dataset, and how far it is."""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from chat_logits.errors import ToolkitError

logger = logging.getLogger(__name__)
IDLE, RUNNING, DONE, FAILED = "idle", "running", "done", "failed"


class Job:
    """Work in a thread of its own, begun once: ``work(watch)`` gives its ``result``, and ``watch(steps, total)`` goes
    through its steps. ``reason`` says in words why it has failed."""

    def __init__(self, work: Callable[[Callable], Any]):
        self._work, self._lock, self.finished = work, threading.Lock(), threading.Event()
        self.state, self.done, self.total = IDLE, 0, 0
        self.result: Any = None
        self.reason = ""

    def start(self) -> None:
        """Begin, unless that has been done; what has failed begins again."""
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
        except Exception as error:  # a thread that ends without a word would be waited for
            logger.debug("a job failed", exc_info=True)
            self.state, self.reason = FAILED, f"{type(error).__name__}: {error}"
        finally:
            self.finished.set()

    def _watched(self, steps: Iterable, total: int) -> Iterator:
        self.total = total
        for self.done, step in enumerate(steps):
            yield step
        self.done = total
