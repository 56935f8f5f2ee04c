"""How the commands begin and end: log output, exit status, errors in a line or two."""

import errno
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from chat_logits.cli import SIGNALLED
from chat_logits.cli.going_on import GoingOn
from chat_logits.cli.parser import CommandParser, CommonOptions, as_typed, read_options, refuse_missing
from chat_logits.cli.signals import stop_on_signals
from chat_logits.cli.streams import named_failures, open_closed_streams, print_no_more, show_all_characters
from chat_logits.errors import ToolkitError, UsageError
from chat_logits.hub_errors import redact
from chat_logits.options import Config
from chat_logits.paths import is_there, refuse_unfit
from chat_logits.stages import Stages
from chat_logits.storage.disk import nearest_existing, written_whole

STDOUT = "-"  # standard output, as the name of a file to write
# Errors when a file cannot be replaced by a temporary one: it is a mount point, its folder is read-only, its name is
# too long.
IN_PLACE = (errno.EBUSY, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
ITS_FUTURE = re.compile("deprecated|will be removed|in (a|the) future|future (version|release)")
Options = TypeVar("Options", bound=CommonOptions)


def called_as(script: str) -> str:
    """The command's name in its help: ``script``, or the installed command's name if it was called by that."""
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

    ``options`` are of the last of ``kinds``, ``given`` are all options on the command line. A traceback is printed only
    with ``--debug``. ``closed_pipe`` is the exit status if the reader of the output has closed it: 0 for a command that
    only prints.
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
    """The options as their dataclass, and those on the command line. Raises UsageError for invalid ones."""
    given = parser.given(argv)
    values = read_options(kind, given)
    refuse_missing(kind, values)
    return kind(**values), given


def _check_environment() -> None:
    """Raise UsageError if a cache folder, the address or the certificates of the Hub's client cannot be what they are
    set to, or if there is no place for temporary files."""
    for name in ("HF_HOME", "HF_HUB_CACHE"):
        place = os.environ.get(name)
        if place and not nearest_existing(Path(place).expanduser()).is_dir():
            raise UsageError(f"{name} {place}: not a folder, and none can be made there. Set it to one, or unset it.")
    endpoint, certificates = os.environ.get("HF_ENDPOINT"), os.environ.get("SSL_CERT_FILE")
    if endpoint is not None and not re.match("https?://.", endpoint, re.IGNORECASE):
        raise UsageError(f"HF_ENDPOINT {endpoint}: expected an address with https:// or http://. Set one, or unset it.")
    if certificates and not is_there(Path(certificates)):
        raise UsageError(f"SSL_CERT_FILE {certificates}: no such file. Set it to one, or unset it.")
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise UsageError("no folder for temporary files can be written to. Set TMPDIR to one that can.") from error


def _explained(error: Exception, debug: bool) -> str:
    if debug:
        return "".join(traceback.format_exception(error)).rstrip()
    if isinstance(error, ToolkitError):
        return f"error: {error}"
    return f"error: {type(error).__name__}: {error}\nThis was not expected; --debug shows where it happened."


def _made_fit(text: str, kinds: tuple[type[Config], ...]) -> str:
    """A message as it is printed: options as they are typed, without secrets and terminal control codes."""
    return _shown(redact(as_typed(text, kinds)))


def _shown(text: str) -> str:
    from chat_logits.display.text import visible_lines  # imports NumPy, which --help does not need

    return visible_lines(text)


class _FitRecord(logging.LogRecord):
    """A log record of any library; its text may come from a dataset, a model or the Hub, so control codes are shown.

    Deprecation notices of transformers are for developers; their level is set below every handler's.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        if self.name.startswith("transformers.") and ITS_FUTURE.search(self.getMessage()):
            self.levelno = -1

    def getMessage(self) -> str:
        return _shown(super().getMessage())


class _BesideBars(logging.Handler):
    """Prints the package's log messages on standard error without disturbing progress bars."""

    def __init__(self, kinds: tuple[type[Config], ...], going_on: GoingOn):
        super().__init__()
        self._kinds, self._going_on = kinds, going_on

    def emit(self, record: logging.LogRecord) -> None:
        with self._going_on.aside():
            tqdm.write(_made_fit(self.format(record), self._kinds), file=sys.stderr)


@contextmanager
def _printed_log(level: str, kinds: tuple[type[Config], ...]) -> Iterator[None]:
    """Within, the package's log from this level on is printed; control codes in any library's messages are made
    visible."""
    going_on = GoingOn()
    package, handler = logging.getLogger("chat_logits"), _BesideBars(kinds, going_on)
    before, format_warning = (package.level, package.propagate), warnings.formatwarning
    make_record = logging.getLogRecordFactory()
    logging.setLogRecordFactory(_FitRecord)
    warnings.formatwarning = lambda *args, **options: _shown(format_warning(*args, **options))
    package.addHandler(handler)
    package.setLevel(level.upper())
    package.propagate = False
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it warns of missing kernels
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


def leave_torch_out() -> None:
    """Keep transformers and datasets from importing torch, for the rest of the process.

    For processes that only tokenize: the import takes seconds and 250 MB.
    """
    if "torch" in sys.modules:
        return
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # about models that would need torch
    os.environ["USE_TORCH"] = "0"  # read by datasets
    modules: dict[str, Any] = sys.modules
    modules["torch"] = None  # Python's own way to mark a module as not available
    from transformers.utils.import_utils import is_torch_available

    is_torch_available()  # it caches its result
    del sys.modules["torch"]


def leave(status: int) -> None:
    """Exit without waiting for threads, as one may be blocked in a read that never ends."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, AttributeError):  # without a reader, on a full disk, or closed
            stream.flush()
    os._exit(status)


# --- files that a command is asked to write ---


def check_output_files(**files: str | None) -> None:
    """Raise UsageError, with the option's name, if a file cannot be written, before any work is done for it.

    For the option ``json``, ``STDOUT`` stands for standard output.
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
            fault = f"the folder {path.parent} is missing" if not path.parent.is_dir() else "not the name of a file"
            raise UsageError(f"`{option}` {file}: {fault}, expected a file to write")


def write_result(file: str, text: str) -> None:
    """Write a file and print its name; an existing file is replaced as a whole. Raises ToolkitError if that fails."""
    try:
        _write(Path(file), text)
    except OSError as error:
        raise ToolkitError(f"{file}: it cannot be written: {error.strerror}") from error
    except RuntimeError as error:  # a loop of links
        raise ToolkitError(f"{file}: it cannot be written: {error}") from error
    print(f"Wrote {file}", file=sys.stderr)


def _write(path: Path, text: str) -> None:
    if path.exists() and not path.is_file():  # a pipe or a terminal
        path.write_text(text, encoding="utf-8")
        return
    target = path.resolve()  # so that a link stays a link
    try:
        with written_whole(target) as temporary:
            temporary.write_text(text, encoding="utf-8")
            if target.exists():
                shutil.copymode(target, temporary)
    except OSError as error:
        if error.errno not in IN_PLACE:
            raise
        target.write_text(text, encoding="utf-8")
