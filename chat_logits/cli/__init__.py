"""The start of the commands: until signals can end them in an orderly way, Ctrl-C ends them with one line."""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

COMMANDS = ("extract_logits", "explore_logits", "export_targets", "train_student")
SIGNALLED = 128  # plus the signal's number: the exit status, as in shells


def leave_at_once(number: int, _frame: object = None) -> None:
    """End the process at once, whatever it is doing."""
    with suppress(OSError):  # a terminal that is closed
        os.write(2, b"Stopped.\n")
    os._exit(SIGNALLED + number)


if Path(sys.argv[0]).stem.replace("-", "_") in COMMANDS:  # not where Python code or a notebook imports this
    signal.signal(signal.SIGINT, leave_at_once)
