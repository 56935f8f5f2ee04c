"""Temporary folders of this process. One that was killed leaves its own, and the next process here removes them."""

import atexit
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import filelock

PREFIX, LOCK = "extract-logits-", ".lock"
YOUNG = 60.0  # seconds within which a folder may not be locked yet

_mine: dict[Path, filelock.FileLock] = {}


def make_scratch() -> Path:
    """A temporary folder that is there until ``remove_scratch``, or the process's end."""
    _remove_leftovers()
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    _mine[folder] = filelock.FileLock(folder / LOCK)
    _mine[folder].acquire()
    return folder


def remove_scratch() -> None:
    """Remove this process's temporary folders with all that is in them. Done at the process's end as well."""
    while _mine:
        folder, lock = _mine.popitem()
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def _remove_leftovers() -> None:
    """Those of dead processes: nobody holds their locks."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError, filelock.Timeout):  # in use, or somebody else's
            if (folder / LOCK).exists() and folder not in _mine and time.time() - folder.stat().st_mtime > YOUNG:
                with filelock.FileLock(folder / LOCK, timeout=0):
                    shutil.rmtree(folder)


atexit.register(remove_scratch)
