"""The lock on the folder of a run or a training, on a file system that has none."""

import errno
import fcntl

import pytest

from chat_logits.errors import ToolkitError
from chat_logits.extraction.lock import FolderLock
from chat_logits.training.record import locked_folder


def trained_into(folder) -> None:
    with locked_folder(folder):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
@pytest.mark.parametrize("lock", [lambda folder: FolderLock(folder).acquire(), trained_into])
def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, lock, number):
    """As NFS without its lock daemon, and Lustre without its option. A file that is the lock by being there would
    outlive a killed process."""

    def refuse(*_):
        raise OSError(number, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ToolkitError, match=r"its file system does not lock files .*no locks here.*Mount it with locks"):
        lock(tmp_path)
    monkeypatch.undo()
    lock(tmp_path)
