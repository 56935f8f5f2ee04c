"""Python processes that communicate with this one through pipes."""

import json
import os
import subprocess
import sys
from typing import IO, Any

# -P: do not import modules from the current folder. With -m, pickled answers would have types of __main__.
PYTHON = (sys.executable, "-P", "-c")
BEGIN = """
import json, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.path[:] = json.loads(sys.argv.pop(1))
from {module} import {function}
{function}(*sys.argv[1:])
"""


def start_python(module: str, function: str, *arguments: object, **options: Any) -> subprocess.Popen:
    """Start a process that calls a module's function with the arguments as texts, with this process's ``sys.path``.

    Its standard input and output are pipes; ``options`` are further ones of ``subprocess.Popen``. It ignores Ctrl-C,
    which this process handles.
    """
    path = [folder for folder in sys.path if isinstance(folder, str)]  # Python ignores other entries, too
    code = BEGIN.format(module=module, function=function)
    command = [*PYTHON, code, json.dumps(path), *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)


def take_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """In the started process: standard input, and standard output for answers only; other output goes to standard
    error.

    Answers are buffered even with PYTHONUNBUFFERED: if the process is stopped during a write (Ctrl-Z), a raw pipe
    takes only part of it, and the rest is lost.
    """
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return sys.stdin.buffer, answers
