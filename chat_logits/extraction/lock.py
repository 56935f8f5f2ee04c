"""The lock on a run's folder: no second process writes there, and the run notices if the folder is replaced."""

import errno
import os
from pathlib import Path

import filelock

from chat_logits.errors import ToolkitError, UsageError

LOCK = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # errors of file systems without locks


class FolderLost(ToolkitError):
    """The folder of the run is gone, or another one is in its place."""


class FolderLock:
    """The lock on the folder ``path``; the device and inode of the lock's file identify the folder.

    The file is open while the lock is held, so that no other file can get its inode.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = filelock.FileLock(path / LOCK)
        self._locked: tuple[int, int] | None = None

    @property
    def is_held(self) -> bool:
        return self._lock.is_locked

    def acquire(self) -> None:
        """Lock the folder, which must exist. Raises UsageError if another process holds the lock."""
        try:
            self._lock.acquire(blocking=False)
        except filelock.Timeout as error:
            raise UsageError(
                f"`output_dir` {self.path}: another process is extracting into this folder. Wait for it, stop it, or "
                "choose another folder."
            ) from error
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                raise
            raise ToolkitError(
                f"`output_dir` {self.path}: its file system does not lock files ({error}), so two runs could write "
                "here at once. Mount it with locks (flock), or choose another folder."
            ) from error
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
