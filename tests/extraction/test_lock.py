"""The lock on a run's folder, on a file system that has none."""

import errno
import fcntl

import pytest

from chat_logits.errors import ToolkitError
from chat_logits.extraction.lock import FolderLock


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, number):
    """As NFS without its lock daemon."""

    def refuse(*_):
        raise OSError(number, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ToolkitError, match=r"its file system does not lock files .*no locks here.*Mount it with locks"):
        FolderLock(tmp_path).acquire()
    monkeypatch.undo()
    FolderLock(tmp_path).acquire()
