"""Processes of Python that answer this one through pipes."""

import json
import os
import subprocess
import sys
from typing import IO, Any

# -P: no module of the folder that this process happens to be in. With -m, answers would be of __main__'s types.
PYTHON = (sys.executable, "-P", "-c")
BEGIN = """
import json, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.path[:] = json.loads(sys.argv.pop(1))
from {module} import {function}
{function}(*sys.argv[1:])
"""


def start_python(module: str, function: str, *arguments: object, **options: Any) -> subprocess.Popen:
    """A process that calls a function of a module, found where this process finds it, with arguments as text.

    Its standard input and output are pipes; ``options`` are more of ``subprocess.Popen``. Ctrl-C is this process's to
    act on.
    """
    path = [folder for folder in sys.path if isinstance(folder, str)]  # Python passes over others, too
    code = BEGIN.format(module=module, function=function)
    command = [*PYTHON, code, json.dumps(path), *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)


def take_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """In such a process: standard input, and standard output for answers alone; all else goes to standard error.

    Answers are buffered, with PYTHONUNBUFFERED too: a bare pipe takes a part of what is written, and the rest is lost,
    where the process is stopped meanwhile (Ctrl-Z).
    """
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return sys.stdin.buffer, answers
