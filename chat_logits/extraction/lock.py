"""The lock on a run's folder: no second process writes there, and the run knows its folder from all others."""

import errno
import os
from pathlib import Path

import filelock

from chat_logits.errors import ToolkitError, UsageError

LOCK = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # of file systems without them


class FolderLost(ToolkitError):
    """The folder of the run is gone, or another one is in its place."""


class FolderLock:
    """The lock on the folder ``path``, and by its file's device and inode the folder itself.

    The file is open while the lock is held, so that its inode is nobody else's.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = filelock.FileLock(path / LOCK)
        self._locked: tuple[int, int] | None = None

    @property
    def is_held(self) -> bool:
        return self._lock.is_locked

    def acquire(self) -> None:
        """Lock the folder, which is there. Raises UsageError where another process has it."""
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
        """Raise FolderLost where the path does not lead to the folder that was locked: asked before every write."""
        seen = self._seen()
        if seen is None or seen != self._locked:
            found = "another folder is in its place" if os.path.lexists(self.path) else "it is not there"
            raise FolderLost(
                f"`output_dir` {self.path}: the folder that this run writes to was removed, renamed or unmounted "
                f"({found}). Nothing more was written. Put it back, and the same command goes on."
            )

    def _seen(self) -> tuple[int, int] | None:
        """Device and inode of the lock's file, None where there is none."""
        try:
            state = os.lstat(self.path / LOCK)
        except OSError:
            return None
        return state.st_dev, state.st_ino
