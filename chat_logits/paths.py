"""Paths given as options: one that the system cannot look up is wrong use; the error names the option."""

import difflib
import os
from pathlib import Path

from chat_logits.errors import UsageError

LONGEST = 80  # characters of a path in a message


def refuse_unfit(path: Path, option: str) -> None:
    """Raise UsageError, naming the option, if the system cannot say whether a path exists: its name is too long or
    invalid, or a folder on the way may not be entered."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise _unfit(str(path), option, error.strerror or "not to be found") from error
    except ValueError as error:  # a NUL, half a surrogate
        raise _unfit(str(path), option, "not a valid file name") from error


def refuse_unfit_folder(folder: Path, option: str) -> None:
    """As ``refuse_unfit``, for a folder to write in: its path must be valid UTF-8, as files written there contain it
    and Parquet requires it."""
    refuse_unfit(folder, option)
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise _unfit(str(folder), option, "its name is not UTF-8") from error


def is_there(path: Path) -> bool:
    """Whether the file or folder exists; also False if the system cannot say, such as for a text that is too long for
    a name (``Path.exists`` raises OSError then)."""
    try:
        return path.exists()
    except OSError:
        return False


def near_here(name: str) -> str:
    """A note for a Hub id that may be a mistyped path: the file or folder with nearly this name, or that there is none;
    "" if its folder does not exist either."""
    path = Path(name)
    try:
        near = difflib.get_close_matches(path.name, [found.name for found in path.parent.iterdir()], 1)
    except OSError:
        return ""
    if near:
        return f" (no such file or folder here, but {path.with_name(near[0])})"
    return " (no such file or folder here)" if len(path.parts) > 1 else ""


def expanded(place: str | os.PathLike, option: str) -> str:
    """A path with a leading ``~`` replaced by the home folder. Raises as ``refuse_unfit``, and for a value that is not
    a path."""
    if not isinstance(place, str | os.PathLike) or not str(place).strip():
        raise _unfit(repr(place), option, "no name")
    try:
        path = Path(place).expanduser()
    except RuntimeError as error:
        raise _unfit(str(place), option, "no such user") from error
    refuse_unfit(path, option)
    return str(path)


def _unfit(place: str, option: str, fault: str) -> UsageError:
    shown = place.encode("utf-8", "backslashreplace").decode()
    return UsageError(f"`{option}` {shown:.{LONGEST}}: {fault}; expected the name of a file or a folder")
