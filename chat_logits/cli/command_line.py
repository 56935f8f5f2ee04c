"""How the commands begin and end: what they print on the way, exit status, errors in a line or two, signals."""

import errno
import logging
import os
import re
import shutil
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from chat_logits.cli import SIGNALLED, leave_at_once
from chat_logits.cli.going_on import GoingOn
from chat_logits.cli.parser import CommandParser, CommonOptions, as_typed, read_options, refuse_missing
from chat_logits.cli.streams import named_failures, open_closed_streams, print_no_more, show_all_characters
from chat_logits.errors import ToolkitError, UsageError
from chat_logits.hub_errors import redact
from chat_logits.machine import ignore_if_repeated, stopping_signals
from chat_logits.options import Config
from chat_logits.paths import refuse_unfit
from chat_logits.stages import Stages
from chat_logits.storage.disk import nearest_existing, written_whole

STDOUT = "-"  # as the name of a file to write
# Where no other file can take a file's place: it is mounted alone, its folder is not to be written, its name is long.
IN_PLACE = (errno.EBUSY, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
ITS_FUTURE = re.compile("deprecated|will be removed|in (a|the) future|future (version|release)")
Options = TypeVar("Options", bound=CommonOptions)


class Stopped(KeyboardInterrupt):
    """By a signal, whose ``number`` this is."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


def called_as(script: str) -> str:
    """The command's name in its help: ``script``, or as it is called where the package is installed."""
    name = Path(sys.argv[0]).stem
    return name if name == Path(script).stem.replace("_", "-") else script


def run_command(
    command: Callable[[Options, dict], None],
    kinds: tuple[type[Config], ...],
    parser: CommandParser,
    argv: list[str],
    closed_pipe: int = 1,
) -> int:
    """Parse ``argv``, call ``command(options, given)`` and return the exit status.

    ``options`` are the last of ``kinds``, ``given`` all that are on the command line. A traceback is printed only with
    ``--debug``. ``closed_pipe`` is the status where nobody reads what is printed any more: 0 for a command that only
    prints.
    """
    open_closed_streams()
    show_all_characters()
    debug = False
    with named_failures():
        try:
            options, given = _read(kinds[-1], parser, argv)
            debug = options.debug
            _check_environment()
            with stop_on_signals(), _printed_log(options.log_level, kinds):
                command(options, given)
                sys.stdout.flush()
        except BrokenPipeError:  # the reader (head, less) has what it wanted
            print_no_more()
            return closed_pipe
        except KeyboardInterrupt as stopped:
            return SIGNALLED + getattr(stopped, "number", signal.SIGINT)
        except Exception as error:
            print(_made_fit(_explained(error, debug), kinds), file=sys.stderr)
            return error.exit_status if isinstance(error, ToolkitError) else 1
    return 0


def _read(kind: type[Config], parser: CommandParser, argv: list[str]) -> tuple[Any, dict]:
    """The options as their dataclass, and what is on the command line. Raises UsageError for what cannot be."""
    given = parser.given(argv)
    values = read_options(kind, given)
    refuse_missing(kind, values)
    return kind(**values), given


def _check_environment() -> None:
    """Raise UsageError where the Hub's client has no place on this machine."""
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        place = os.environ.get(name)
        if place and not nearest_existing(Path(place).expanduser()).is_dir():
            raise UsageError(f"{name} {place}: no folder, and none can be made there. Set it to one, or unset it.")


def _explained(error: Exception, debug: bool) -> str:
    if debug:
        return "".join(traceback.format_exception(error)).rstrip()
    if isinstance(error, ToolkitError):
        return f"error: {error}"
    return f"error: {type(error).__name__}: {error}\nThis was not expected; --debug shows where it happened."


def _made_fit(text: str, kinds: tuple[type[Config], ...]) -> str:
    """A message as it is printed: options as they are typed, no secrets, and nothing that would act in a terminal."""
    return _shown(redact(as_typed(text, kinds)))


def _shown(text: str) -> str:
    from chat_logits.display.text import visible_lines  # with NumPy, which help does not wait for

    return visible_lines(text)


class _FitRecord(logging.LogRecord):
    """What any library logs, which may be a dataset's, a model's or the Hub's words.

    What transformers tells of its own future is for who writes programs with it: no handler's level is so low.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        if self.name.startswith("transformers.") and ITS_FUTURE.search(self.getMessage()):
            self.levelno = -1

    def getMessage(self) -> str:
        return _shown(super().getMessage())


class _BesideBars(logging.Handler):
    """Prints what the package tells on standard error, as it is, without disturbing progress bars."""

    def __init__(self, kinds: tuple[type[Config], ...], going_on: GoingOn):
        super().__init__()
        self._kinds, self._going_on = kinds, going_on

    def emit(self, record: logging.LogRecord) -> None:
        with self._going_on.aside():
            tqdm.write(_made_fit(self.format(record), self._kinds), file=sys.stderr)


@contextmanager
def _printed_log(level: str, kinds: tuple[type[Config], ...]) -> Iterator[None]:
    """Within, what the package logs from this level on is printed; nothing that any library says acts there."""
    going_on = GoingOn()
    package, handler = logging.getLogger("chat_logits"), _BesideBars(kinds, going_on)
    before, format_warning = (package.level, package.propagate), warnings.formatwarning
    make_record = logging.getLogRecordFactory()
    logging.setLogRecordFactory(_FitRecord)
    warnings.formatwarning = lambda *args, **options: _shown(format_warning(*args, **options))
    package.addHandler(handler)
    package.setLevel(level.upper())
    package.propagate = False
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it tells of kernels that it lacks
    if package.isEnabledFor(logging.INFO):
        Stages.going_on = going_on
    try:
        with warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning):
                warnings.filterwarnings("ignore", category=category, module="transformers")
            yield
    finally:
        Stages.going_on = nullcontext
        package.removeHandler(handler)
        package.level, package.propagate = before
        logging.setLogRecordFactory(make_record)
        warnings.formatwarning = format_warning


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Within, the first signal to stop raises Stopped, for an end in order; the second leaves at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def stop(number: int, _frame) -> None:
        if received:
            leave_at_once(number)
        received.append(number)
        ignore_if_repeated(number)
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in stopping_signals()}
    try:
        yield
    except KeyboardInterrupt as interrupt:  # of a library that waits in C, and does not say for which signal
        raise Stopped(received[0] if received else signal.SIGINT) from interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_torch_out() -> None:
    """For a process that only tokenizes: transformers and datasets import torch wherever it is installed, which takes
    seconds and 250 MB. From here on, and for the whole process, both go without."""
    if "torch" in sys.modules:
        return
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # of models that would need torch
    os.environ["USE_TORCH"] = "0"  # to datasets
    modules: dict[str, Any] = sys.modules
    modules["torch"] = None  # Python's own way to say that a module is not there
    from transformers.utils.import_utils import is_torch_available

    is_torch_available()  # which remembers what it finds
    del sys.modules["torch"]


def leave(status: int) -> None:
    """Leave the process without waiting for threads, of which one may be at a read that never ends."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, AttributeError):  # nobody reads, a full disk, closed
            stream.flush()
    os._exit(status)


# --- files that a command is asked to write ---


def check_places(**files: str | None) -> None:
    """Raise UsageError where a file cannot be written, by the option that names it, before any work is done for it.

    ``STDOUT`` in the place of JSON is standard output.
    """
    named = {option: file for option, file in files.items() if file is not None}
    written = {option: file for option, file in named.items() if (option, file) != ("json", STDOUT)}
    for option, file in written.items():
        refuse_unfit(Path(file), option)
    if len({os.path.realpath(file) for file in written.values()}) < len(written):
        raise UsageError(f"`{'` and `'.join(named)}`: both name {next(iter(named.values()))}, expected two files")
    for option, file in written.items():
        path = Path(file)
        if not file or file == STDOUT or path.is_dir() or not path.parent.is_dir():
            fault = f"the folder {path.parent} is missing" if not path.parent.is_dir() else "no name of a file"
            raise UsageError(f"`{option}` {file}: {fault}, expected a file to write")


def write_result(file: str, text: str) -> None:
    """Write a finished file and say so; one that is there stays whole. Raises ToolkitError where the disk refuses."""
    try:
        _write(Path(file), text)
    except OSError as error:
        raise ToolkitError(f"{file}: it cannot be written: {error.strerror}") from error
    except RuntimeError as error:  # links in a circle
        raise ToolkitError(f"{file}: it cannot be written: {error}") from error
    print(f"Wrote {file}", file=sys.stderr)


def _write(path: Path, text: str) -> None:
    if path.exists() and not path.is_file():  # a pipe or a terminal
        path.write_text(text, encoding="utf-8")
        return
    target = path.resolve()  # a link stays one
    try:
        with written_whole(target) as temporary:
            temporary.write_text(text, encoding="utf-8")
            if target.exists():
                shutil.copymode(target, temporary)
    except OSError as error:
        if error.errno not in IN_PLACE:
            raise
        target.write_text(text, encoding="utf-8")
