"""The pipes of a process that answers another one."""

import os
import sys
from typing import IO


def take_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """Standard input, and standard output for answers alone: whatever else is printed goes to standard error.

    Answers are buffered, with PYTHONUNBUFFERED too: a bare pipe takes a part of what is written, and the rest is lost,
    where the process is stopped meanwhile (Ctrl-Z).
    """
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return sys.stdin.buffer, answers
