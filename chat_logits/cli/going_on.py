"""Shows on standard error that a stage is still running: seconds in a terminal, removed at its end; dots in a log."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from chat_logits.stages import every

TICK = 1.0  # seconds from one sign to the next
DOTS = 60  # in one line of a log


class GoingOn:
    """Signs of life for stages: the seconds of the innermost one. Other output is printed within ``aside``."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._begins: list[float] = []
        self._dots = 0  # in the line that is not ended yet
        self._bar: tqdm | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        is_outermost = not self._begins
        self._begins.append(time.monotonic())
        try:
            if is_outermost:
                with every(TICK, self._tick):
                    yield
            else:
                yield
        finally:
            with self._lock:
                self._begins.pop()
                self._end_line()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within, another line may be printed, below what is there."""
        with self._lock:
            self._end_line()
            yield

    def _tick(self) -> None:
        with self._lock:
            if not self._begins:
                return
            if sys.stderr.isatty():
                self._show_seconds(time.monotonic() - self._begins[-1])
            else:
                self._show_dot()

    def _show_seconds(self, seconds: float) -> None:
        if self._bar is None:
            self._bar = tqdm(bar_format="  {desc}", leave=False, file=sys.stderr)
        self._bar.set_description_str(f"{seconds:.0f} s")

    def _show_dot(self) -> None:
        print("." if self._dots else "  .", end="", file=sys.stderr, flush=True)
        self._dots += 1
        if self._dots == DOTS:
            self._end_line()

    def _end_line(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._dots:
            print(file=sys.stderr)
            self._dots = 0
