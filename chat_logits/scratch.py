"""Temporary folders. A killed process leaves its folders behind; the next process on the machine removes them."""

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock

PREFIX, LOCK = "extract-logits-", ".lock"
YOUNG = 60.0  # seconds: a newer folder may not be locked yet


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder, removed with its contents when the context or the process ends."""
    _remove_leftovers()
    with (
        tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as name,
        filelock.FileLock(Path(name) / LOCK, thread_local=False),  # any thread may end the context
    ):
        yield Path(name)


def _remove_leftovers() -> None:
    """Remove folders of dead processes: no process holds their locks."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError, filelock.Timeout):  # in use, or another user's
            if (folder / LOCK).exists() and time.time() - folder.stat().st_mtime > YOUNG:
                with filelock.FileLock(folder / LOCK, timeout=0):
                    shutil.rmtree(folder)
