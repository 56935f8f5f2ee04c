"""The lock on a run's folder: no second process writes there, and the run notices if the folder is replaced."""

import os
from pathlib import Path

import filelock

from chat_logits.errors import ToolkitError
from chat_logits.storage.disk import lock_or_refuse

LOCK = ".lock"


class FolderLost(ToolkitError):
    """The folder of the run is gone, or another one is in its place."""


class FolderLock:
    """The lock on the folder ``path``; the device and inode of the lock's file identify the folder.

    The file is open while the lock is held, so that no other file can get its inode.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = filelock.FileLock(path / LOCK, fallback_to_soft=False)
        self._locked: tuple[int, int] | None = None

    @property
    def is_held(self) -> bool:
        return self._lock.is_locked

    def acquire(self) -> None:
        """Lock the folder, which must exist. Raises as ``lock_or_refuse``."""
        lock_or_refuse(self._lock, self.path, "extracting")
        self._locked = self._seen()

    def release(self) -> None:
        self._lock.release(force=True)

    def check(self) -> None:
        """Raise FolderLost if the path no longer leads to the folder that was locked; called before every write."""
        seen = self._seen()
        if seen is None or seen != self._locked:
            found = "another folder is in its place" if os.path.lexists(self.path) else "it is not there"
            raise FolderLost(
                f"`output_dir` {self.path}: the folder that this run writes to was removed, renamed or unmounted "
                f"({found}). Nothing more was written. Put it back, and the same command continues."
            )

    def _seen(self) -> tuple[int, int] | None:
        """Device and inode of the lock's file, None if it does not exist."""
        try:
            state = os.lstat(self.path / LOCK)
        except OSError:
            return None
        return state.st_dev, state.st_ino
