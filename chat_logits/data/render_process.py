"""Rendering in a separate process, for untrusted templates: a template is a program.

Jinja's sandbox keeps it away from files and from Python; this module limits its time and memory. One process renders
conversation after conversation, and is replaced if it was ended. The processes exchange lines of JSON, so even if a
template takes over the other process, this one only reads text.
"""

import atexit
import json
import os
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache

from chat_logits.pipes import start_python, take_pipes

MIB = 2**20
SECONDS, MEMORY = 5.0, 1024 * MIB  # CPU seconds per conversation; bytes of address space
LENGTH_LEAST, LENGTH_RATIO = MIB, 16  # allowed characters of a text: a minimum, plus this many per character of input
SHOWN = 300  # characters of a template's error message


class OverLimit(Exception):
    """A rendering that takes more time or memory, or makes a longer text, than a template may."""


class RefusedRendering(Exception):
    """The message of what the template raised."""


class RenderProcess:
    """Renders in a process that is started on first use; any thread may use it."""

    def __init__(self):
        self._process: subprocess.Popen | None = None
        self._settings: list | None = None  # what the process already has: template, variables, date
        self._lock = threading.Lock()

    def render(
        self, text: str, conversation: list[dict], variables: dict, date: str | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """As ``rendering.render``. Raises OverLimit, and RefusedRendering for anything that the template raises."""
        with self._lock:
            answer = self._ask([text, variables, date], [conversation])
        if "rendered" in answer:
            return _with_spans(*answer["rendered"][0])
        raise (OverLimit if answer["is_over"] else RefusedRendering)(answer["error"])

    def render_together(
        self, text: str, conversations: list[list[dict]], variables: dict, date: str | None = None
    ) -> list[tuple[str, list[tuple[int, int]]]] | None:
        """``render`` of all in one exchange with the process, as an exchange costs as much as a rendering.

        None if one of them fails, or if together they exceed a limit; ``render`` of each then shows which one.
        """
        with self._lock:
            answer = self._ask([text, variables, date], conversations)
        return [_with_spans(*one) for one in answer["rendered"]] if "rendered" in answer else None

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with suppress(OSError):  # data that could not be sent
                process.communicate()

    def _begin(self) -> subprocess.Popen:
        if self._process is None:
            self._process, self._settings = start_python(__name__, "serve", stderr=subprocess.DEVNULL), None
        return self._process

    def _ask(self, settings: list, conversations: list[list[dict]]) -> dict:
        process = self._begin()
        assert process.stdin and process.stdout
        asked = [conversations, None if settings == self._settings else settings]
        try:
            process.stdin.write(_line(asked))
            process.stdin.flush()
            answered = process.stdout.readline()
        except OSError:
            answered = b""
        except BaseException:
            self.close()  # otherwise its answer would be read as that of the next question
            raise
        if not answered.endswith(b"\n"):
            self.close()
            return {"error": f"it took more than {SECONDS:.0f} s of computing, or too much memory", "is_over": True}
        answer = json.loads(answered)
        self._settings = settings if "rendered" in answer else None  # after an error, it may not have them
        return answer


@cache
def _process_of(_pid: int) -> RenderProcess:
    process = RenderProcess()
    atexit.register(process.close)
    return process


def render_process() -> RenderProcess:
    """The rendering process of this process; a forked process gets its own."""
    return _process_of(os.getpid())


def _with_spans(text: str, spans: list[list[int]]) -> tuple[str, list[tuple[int, int]]]:
    return text, [(start, end) for start, end in spans]


# --- in the process ---


def serve() -> None:
    """Answer each line on standard input with one on standard output, until the input ends."""
    lines, answers = take_pipes()
    limit_time, settings = _set_limits(), [None]
    for line in iter(lines.readline, b""):
        limit_time(SECONDS)
        answer = _answer(line, settings, lambda: limit_time(SECONDS))
        limit_time(0)
        answers.write(answer)
        answers.flush()


def _answer(line: bytes, settings: list, begin_time: Callable[[], object]) -> bytes:
    """The answer to a line. ``settings`` has the current settings and is updated if the line has new ones.
    ``begin_time`` restarts the time limit; it is called for each conversation."""
    from chat_logits.data.rendering import render

    try:
        conversations, given = json.loads(line)
        settings[0] = given or settings[0]
        template, variables, date = settings[0]
        rendered = []
        for conversation in conversations:
            begin_time()
            text, spans = render(template, conversation, variables, date)
            if len(text) > LENGTH_LEAST and len(text) > (most := _longest(conversation, settings[0])):
                error = f"it made a text of {len(text):,} characters, expected {most:,} at most"
                return _line({"error": error, "is_over": True})
            rendered.append((text, spans))
        return _line({"rendered": rendered})
    except MemoryError:
        return _line({"error": f"it took more than {MEMORY // MIB:,} MiB of memory", "is_over": True})
    except Exception as error:  # a template is a program: it may raise anything
        return _line({"error": str(error)[:SHOWN] or type(error).__name__, "is_over": False})


def _longest(conversation: list[dict], settings: list) -> int:
    """Characters that the text of this conversation may have with these settings."""
    return LENGTH_LEAST + LENGTH_RATIO * len(_line([conversation, settings]))


def _line(value) -> bytes:
    """A line of JSON; a value that JSON cannot hold becomes its type's name, as ``rendering`` shows it to templates."""
    return json.dumps(value, default=lambda other: f"<{type(other).__name__}>").encode() + b"\n"


def _set_limits():
    """Limit the memory of this process; returns a function that sets the CPU time after which the system ends it.

    On a system without such limits, nothing is limited.
    """
    import signal

    try:
        import resource
    except ImportError:  # Windows
        return lambda _seconds: None
    for kind, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CORE, 0)):
        with suppress(ValueError, OSError):  # macOS
            hard = resource.getrlimit(kind)[1]
            resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    return lambda seconds: signal.setitimer(signal.ITIMER_PROF, seconds)
