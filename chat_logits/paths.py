"""Paths that options name: what the system refuses to look at is wrong use, told with the option."""

import os
from pathlib import Path

from chat_logits.errors import UsageError

LONGEST = 80  # characters of a path in a message


def refuse_unfit(path: Path, option: str) -> None:
    """Raise UsageError, naming the option, where the system cannot say whether anything is at a path: its name is too
    long or no name at all, or a folder on the way may not be entered."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise _unfit(str(path), option, error.strerror or "not to be found") from error
    except ValueError as error:  # a NUL, half a surrogate
        raise _unfit(str(path), option, "no name that a file can have") from error


def is_there(path: Path) -> bool:
    """Whether there is such a file or folder; False too where the system cannot say, as of a text that is longer than
    a name may be (``Path.exists`` raises OSError for that)."""
    try:
        return path.exists()
    except OSError:
        return False


def expanded(place: str | os.PathLike, option: str) -> str:
    """A path with the user's own folder in the place of a first ``~``. Raises as ``refuse_unfit``, and for what is no
    path."""
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
