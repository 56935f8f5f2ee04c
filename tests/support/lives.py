"""Runs of the extraction in processes that can be killed, started in a fraction of a second.

A server has torch and the toolkit loaded, which takes seconds; each process is a fork of it, with files for its output.
"""

import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
# By name: the toolkit and transformers import what is heavy where it is first needed.
PRELOADED = ["torch", "datasets", "transformers.models.llama.modeling_llama", "extract_logits"]
PRELOADED += [f"chat_logits.{name}" for name in ("extraction.run", "extraction.upload", "model.batching")]
PRELOADED += ["chat_logits.cli.extract_report"]
# A process that does this first is in mid-run, on any machine, until it is ended.
LATE = """
import itertools, time
from chat_logits.extraction import shard_computer
def write_shard(*shard, write=shard_computer.write_shard, numbers=itertools.count()):
    if next(numbers) >= {shards}:
        time.sleep({seconds})
    return write(*shard)
shard_computer.write_shard = write_shard
"""
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([*PRELOADED, "lives"])


def late(shards: int, seconds: float) -> str:
    """Python code for a process that writes this many shards at once, and each after them so many seconds late."""
    return LATE.format(shards=shards, seconds=seconds)


def stopping(shards: int) -> Callable[[], None]:
    """What a ``Life`` that is to be killed calls before: it writes this many shards, and then no more."""
    return functools.partial(exec, late(shards, 600), {})


class Life:
    """One process that runs the command; ``prepare()`` is called in it before."""

    def __init__(self, argv: list, log: Path, prepare: Callable[[], None] | None = None):
        self.log = log
        self._process = SERVER.Process(target=_live, args=(list(map(str, argv)), log, prepare))
        self._process.start()
        self.pid = self._process.pid

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def wait(self, seconds: float = 600) -> int:
        """The exit status, negative for a signal that ended it."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self.kill()
            raise TimeoutError(f"still running after {seconds} s:\n{self.said}")
        return self._process.exitcode

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""


def _live(argv: list[str], log: Path, prepare: Callable[[], None] | None) -> None:
    import extract_logits
    from chat_logits.cli.command_line import leave

    os.chdir(REPO)
    _speak_into(log, log)
    if prepare:
        prepare()
    leave(extract_logits.main(argv))


def _speak_into(out: Path, err: Path) -> None:
    """Output and errors go to files, Ctrl-C is as in a process of its own: servers ignore it."""
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), number)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Server:
    """Starts processes in an environment of their own, such as one whose Hub is on loopback, within a context.

    What libraries read when they are imported is the server's environment; that of a process is for the rest.
    """

    def __init__(self, env: dict[str, str], folder: Path):
        self.env, self._folder, self._numbers = env, folder, count()

    def __enter__(self) -> "Server":
        command, pipes = [sys.executable, __file__], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, cwd=REPO, env=self.env, **pipes)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # it has nothing to finish, and libraries may hang at an interpreter's end
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            pipe.close()

    def start(self, code: str, *arguments, cwd: Path = REPO, env: dict[str, str | None] | None = None) -> "Forked":
        """Run Python code with arguments, as ``python -c``; an ``env`` of None takes a variable away."""
        place = self._folder / str(next(self._numbers))
        place.mkdir()
        request = {
            "code": code,
            "argv": list(map(str, arguments)),
            "cwd": str(cwd),
            "env": env or {},
            "place": str(place),
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Forked(int(self._process.stdout.readline()), place)

    def run(self, code: str, *arguments, **options) -> "Forked":
        """Start it and wait for its end."""
        process = self.start(code, *arguments, **options)
        process.communicate()
        return process


class Forked:
    """A process of a server, with what tests use of ``subprocess.Popen`` and of ``CompletedProcess``."""

    def __init__(self, pid: int, place: Path):
        self.pid, self._place = pid, place

    @property
    def returncode(self) -> int | None:
        return self.poll()

    @property
    def stdout(self) -> str:
        return self._written("out")

    @property
    def stderr(self) -> str:
        return self._written("err")

    def _written(self, name: str) -> str:
        file = self._place / name
        return file.read_text(encoding="utf-8") if file.exists() else ""  # in its first moments there is none

    def poll(self) -> int | None:
        status = self._place / "status"
        return int(status.read_text()) if status.exists() else None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        """Its output and errors, once it has ended."""
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                self.send_signal(signal.SIGKILL)
                raise TimeoutError(f"still running after {timeout} s:\n{self.stdout}{self.stderr}")
            time.sleep(0.01)
        return self.stdout, self.stderr


def serve() -> None:
    """Fork for each request on standard input, and answer with the fork's process id."""
    for name in PRELOADED:
        __import__(name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    places: dict[int, Path] = {}

    def note_ended(*_: object) -> None:
        for pid in list(places):
            with suppress(ChildProcessError):  # another process has ended meanwhile, and this was called within itself
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    place = places.pop(pid)
                    (place / "part").write_text(str(os.waitstatus_to_exitcode(status)))
                    (place / "part").rename(place / "status")

    signal.signal(signal.SIGCHLD, note_ended)
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        pid = os.fork()
        if not pid:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
            _become(request)
            return  # and end as any process does
        places[pid] = Path(request["place"])
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        print(pid, flush=True)


def _become(request: dict) -> None:
    place = Path(request["place"])
    _speak_into(place / "out", place / "err")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    os.chdir(request["cwd"])
    for name, value in request["env"].items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    sys.argv = ["-c", *request["argv"]]
    exec(compile(request["code"], "-c", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    sys.path.insert(0, str(REPO))
    serve()
