"""How both commands end: exit status, and errors in a line or two."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable

from errors import ToolkitError

INTERRUPTED = 130  # what shells give for SIGINT


def run_command(command: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> int:
    """Call ``command(arguments)`` and return the exit status; a traceback is printed only with ``--debug``."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a terminal without the characters shows their codes
    try:
        command(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader (head, less) has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        elif isinstance(error, ToolkitError):
            print(f"error: {error}", file=sys.stderr)
        else:
            found = f"{type(error).__name__}: {error}"
            print(f"error: {found}\nThis was not expected; --debug shows where it happened.", file=sys.stderr)
        return error.exit_status if isinstance(error, ToolkitError) else 1
    return 0
