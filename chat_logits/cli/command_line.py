"""How both commands end: exit status, errors in a line or two, and signals that lose nothing."""

import argparse
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from chat_logits.errors import ToolkitError, UsageError
from chat_logits.hub import redact

STDOUT = "-"  # as the name of a file to write
SIGNALLED = 128  # and the signal's number: what shells give


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM; ``number`` says which."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


def called_as(script: str) -> str:
    """The command's name in its help: ``script``, or as it is called where the package is installed."""
    name = Path(sys.argv[0]).stem
    return name if name == Path(script).stem.replace("_", "-") else script


def run_command(
    command: Callable[[argparse.Namespace], None], arguments: argparse.Namespace, closed_pipe: int = 1
) -> int:
    """Call ``command(arguments)`` and return the exit status; a traceback is printed only with ``--debug``.

    ``closed_pipe`` is the status where nobody reads what is printed any more: 0 for a command that only prints.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a terminal without the characters shows their codes
    try:
        with stop_on_signals():
            command(arguments)
            sys.stdout.flush()
    except BrokenPipeError:  # the reader (head, less) has what it wanted
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return closed_pipe
    except KeyboardInterrupt as stopped:
        return SIGNALLED + getattr(stopped, "number", signal.SIGINT)
    except Exception as error:
        print(redact(_told(error, arguments.debug)), file=sys.stderr)
        return error.exit_status if isinstance(error, ToolkitError) else 1
    return 0


def _told(error: Exception, debug: bool) -> str:
    if debug:
        return "".join(traceback.format_exception(error)).rstrip()
    if isinstance(error, ToolkitError):
        return f"error: {error}"
    return f"error: {type(error).__name__}: {error}\nThis was not expected; --debug shows where it happened."


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Within, the first SIGINT or SIGTERM raises Stopped, for an end in order; the second leaves at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def stop(number: int, _frame) -> None:
        if received:
            os._exit(SIGNALLED + number)
        received.append(number)
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt as interrupt:  # of a library that waits in C, and does not say for which signal
        raise Stopped(received[0] if received else signal.SIGINT) from interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave(status: int) -> None:
    """Leave the process without waiting for threads, of which one may be at a read that never ends."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(BrokenPipeError):
            stream.flush()
    os._exit(status)


# --- files that a command is asked to write ---


def check_places(**files: str | None) -> None:
    """Raise UsageError where a file cannot be written, by the option that names it, before any work is done for it.

    ``STDOUT`` in the place of JSON is standard output.
    """
    named = {option: file for option, file in files.items() if file is not None}
    if len(set(named.values())) < len(named):
        raise UsageError(f"--{' and --'.join(named)}: both name {next(iter(named.values()))}, expected two files")
    for option, file in named.items():
        path = Path(file)
        if option == "json" and file == STDOUT:
            continue
        if not file or file == STDOUT or path.is_dir() or not path.parent.is_dir():
            found = f"the folder {path.parent} is missing" if not path.parent.is_dir() else "no name of a file"
            raise UsageError(f"--{option} {file}: {found}, expected a file to write")


def write_result(file: str, text: str) -> None:
    """Write a finished file and say so. Raises ToolkitError where the disk refuses."""
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ToolkitError(f"{file}: it cannot be written: {error.strerror}") from error
    print(f"Wrote {file}", file=sys.stderr)
