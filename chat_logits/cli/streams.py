"""Prepares standard output and standard error, which may be closed, full, or unable to show some characters."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from chat_logits.errors import ToolkitError


def open_closed_streams() -> None:
    """Send closed standard output and error to the null device; else the next opened file would take their number."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115


def show_all_characters() -> None:
    """Print characters that a terminal cannot show as escape codes. A notebook's streams accept all characters."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def print_no_more() -> None:
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Stream:
    """Standard output or error; if writing fails other than by a closed pipe, ``failed(error)`` is called."""

    def __init__(self, stream: Any, failed: Callable[[OSError], None]):
        self._stream, self._failed = stream, failed

    def write(self, text: str) -> int:
        self._tried(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._tried(self._stream.flush)

    def _tried(self, step: Callable[[], object]) -> None:
        try:
            step()
        except BrokenPipeError:
            raise
        except OSError as error:  # a full disk, a terminal that is gone
            self._failed(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def named_failures() -> Iterator[None]:
    """Within, a failed write to standard output raises ToolkitError; a failed write to standard error is ignored, so
    that it does not end a run."""

    def refuse(error: OSError) -> None:
        raise ToolkitError(f"standard output cannot be written: {error.strerror}") from error

    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Stream(sys.stdout, refuse), _Stream(sys.stderr, lambda _error: None)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
