"""The disk: files that are either complete or absent, and free space: what a run needs, and its end if it is full."""

import errno
import glob
import logging
import math
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock
import numpy as np

from chat_logits.errors import ToolkitError, UsageError
from chat_logits.hub_errors import NO_LOCKS
from chat_logits.paths import refuse_unfit_folder
from chat_logits.storage.shard_list import ShardEntry

logger = logging.getLogger(__name__)

MIB = 2**20
FULL = (errno.ENOSPC, errno.EDQUOT)
TOO_LARGE = "a file reached the limit on file sizes (ulimit -f). Raise it"  # in place of a full disk, for EFBIG
BUILDING = re.compile(r"\..*\.[0-9a-f]{8}\.(tmp|lock)", re.DOTALL)  # names of folders being written, and of their locks
OF_FILE_SYSTEM = "lost+found"  # in a freshly made ext4's top folder
NAMED = 50  # characters of the final folder's name in these, as a file name has at most 255 bytes
SPARE = 4 * MIB  # in addition to the next shard: for the other files, and for what other processes write meanwhile
# Bytes of whole files, including conversations, per position, by entries per position: measured with SmolLM2 on real
# answers, ``top_p`` 0.98. In between, the ratio to the columns' bytes is interpolated in the logarithm of the entries.
MEASURED = {24: 67, 80: 168, 320: 516}


# --- files ---


@contextmanager
def written_whole(
    path: Path, is_shared: bool = False, check_still_ours: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """Gives a hidden temporary file to write, which is renamed to ``path`` at the end, or removed if writing fails.

    With ``is_shared``, its name is unique, as other processes may write a file of the same name in the folder.
    ``check_still_ours`` raises if the folder was replaced by another; it is called before each change in it.
    """
    check_still_ours()
    own = f".{secrets.token_hex(4)}" if is_shared else ""
    temporary = path.with_name(f".{path.name}{own}.tmp")
    try:
        yield temporary
        flush_and_rename(temporary, path, check_still_ours)
    except BaseException as error:
        lost = _what_is_wrong(check_still_ours)
        # If the folder was replaced, this file name may belong to another run, so it is not deleted.
        if is_shared or not lost:
            temporary.unlink(missing_ok=True)
        if lost and isinstance(error, OSError):
            raise lost from error
        raise


def _what_is_wrong(check_still_ours: Callable[[], None]) -> ToolkitError | None:
    try:
        check_still_ours()
    except ToolkitError as error:
        return error
    return None


def flush_and_rename(temporary: Path, path: Path, check_still_ours: Callable[[], None] = lambda: None) -> None:
    """Rename a finished file so that after a crash of the machine it is either complete or absent."""
    with temporary.open("r+b") as file:
        os.fsync(file.fileno())
    check_still_ours()
    temporary.replace(path)


def refuse_filled(folder: Path, option: str, otherwise: str = "") -> None:
    """Raise UsageError, naming the option that the folder was given by, unless it is empty or missing and files can be
    created in it.

    ``otherwise`` is added to the message if the folder holds files: what else can be done.
    """
    refuse_unfit_folder(folder, option)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"`{option}` {folder}: a file, expected a new or an empty folder")
    if present := next(_others(folder), None) if folder.is_dir() else None:
        raise UsageError(
            f"`{option}` {folder}: holds files, such as {present.name}; expected a new or an empty folder{otherwise}"
        )
    refuse_unwritable(folder, option)


def refuse_unwritable(folder: Path, option: str) -> None:
    """Raise UsageError, naming the option, unless a file can be created in the folder or, if it is missing, in its
    nearest existing parent. A file is created to test this, as /proc and read-only disks refuse it whatever the
    permissions are."""
    refuse_unfit_folder(folder, option)
    nearest = nearest_existing(folder)
    try:
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        fault = f"{nearest} is not a folder that can be written to ({error.strerror})"
        raise UsageError(f"`{option}` {folder}: {fault}") from error


def _others(folder: Path) -> Iterator[Path]:
    """What is in a folder, except folders that processes are writing or have left behind, their locks, and what a file
    system has."""
    return (path for path in folder.iterdir() if not (BUILDING.fullmatch(path.name) or path.name == OF_FILE_SYSTEM))


@contextmanager
def folder_written_whole(folder: Path) -> Iterator[Path]:
    """Gives a hidden folder to write in, which is renamed to ``folder`` at the end, or removed if writing fails.
    Folders that killed processes have left behind are removed first.

    If ``folder`` exists and is empty, it is kept, as it may be a mount point, a link, or the user's current folder: the
    hidden folder is made in it, and its contents are moved up at the end. Raises ToolkitError if the disk refuses or is
    full.
    """
    try:
        is_there = folder.is_dir()
        with _locked_building(folder, is_there) as building:
            yield building
            if is_there:
                _move_up(building)
                return
            if folder.is_dir():
                folder.rmdir()  # fails if files were put into it meanwhile
            building.rename(folder)
    except FileTooLarge:
        raise
    except DiskFull as error:
        raise ToolkitError(f"{folder}: no space for it. Free some, or name a folder on another disk.") from error
    except OSError as error:
        raise ToolkitError(f"{folder}: it cannot be written: {error.strerror}") from error


def _move_up(building: Path) -> None:
    """Move the contents of a folder into its parent. In order of names, ``shards.json`` comes last, and without it the
    folder is not a dataset."""
    if next(_others(building.parent), None):  # files were put into it meanwhile
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
    for path in sorted(building.iterdir()):
        path.rename(building.parent / path.name)


@contextmanager
def _locked_building(place: Path, within: bool) -> Iterator[Path]:
    """A new hidden folder next to or ``within`` the place, removed at the end. A lock next to it is held as long as it
    exists."""
    home, name = (place, "new") if within else (place.parent, place.name[:NAMED])
    home.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(home, name)
    building = home / f".{name}.{secrets.token_hex(4)}.tmp"
    lock = _lock_of(building)
    with filelock.FileLock(lock, thread_local=False):  # any thread may end the context
        try:
            building.mkdir()
            yield building
        finally:
            shutil.rmtree(building, ignore_errors=True)
            lock.unlink(missing_ok=True)


def _remove_leftovers(home: Path, name: str) -> None:
    """Remove hidden folders in ``home`` for this name that dead processes have left: no process holds their locks."""
    for folder in home.glob(f".{glob.escape(name)}.{'[0-9a-f]' * 8}.tmp"):
        lock = _lock_of(folder)
        with suppress(OSError, filelock.Timeout):  # in use, or another user's
            if lock.exists():
                with filelock.FileLock(lock, timeout=0):
                    if folder.exists():  # else its process has just finished
                        shutil.rmtree(folder)
                        logger.info("Removed %s, which a killed process left behind.", folder)
                    lock.unlink(missing_ok=True)


def _lock_of(building: Path) -> Path:
    return building.with_suffix(".lock")


def make_folders(root: Path, inner: Path) -> None:
    """Make the folders ``inner`` within ``root``, which must exist: if it was removed, it is not made again."""
    for folder in [*reversed(inner.parents[:-1]), inner]:
        (root / folder).mkdir(exist_ok=True)


def write_text(path: Path, content: str, check_still_ours: Callable[[], None] = lambda: None) -> None:
    """Write a file so that readers see the old content or the new, never a part."""
    with written_whole(path, check_still_ours=check_still_ours) as temporary:
        temporary.write_text(content, encoding="utf-8")


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """As ``write_text``, from texts that are generated one after another, never all in memory."""
    with written_whole(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(lines)


def lock_or_refuse(lock: filelock.BaseFileLock, folder: Path, doing: str) -> None:
    """Acquire the lock on an ``output_dir`` without waiting for it.

    ``lock`` is one that does not fall back to a lock by mere existence of its file, which a killed process would leave
    held. Raises UsageError if another process holds it, which is ``doing`` the same, such as "training"; ToolkitError
    if the file system has no locks.
    """
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout as error:
        raise UsageError(
            f"`output_dir` {folder}: another process is {doing} into this folder. Wait for it, stop it, or choose "
            "another folder."
        ) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise ToolkitError(
            f"`output_dir` {folder}: its file system does not lock files ({error}), so two runs could write here at "
            "once. Mount it with locks (flock), or choose another folder."
        ) from error


# --- free space ---


def bytes_a_token(entries: int) -> float:
    """Approximate bytes of an extracted token in a run's files, for ``entries`` (top_k + num_sampled) per position.

    >>> [round(bytes_a_token(entries)) for entries in (24, 80, 320)]
    [67, 168, 516]
    """
    shares = [size / _uncompressed(measured) for measured, size in MEASURED.items()]
    share = float(np.interp(math.log(entries), [*map(math.log, MEASURED)], shares))
    return share * _uncompressed(entries)


def _uncompressed(entries: int) -> float:
    return 3.25 * entries + 8  # FORMAT.md: code and id of each entry; logsumexp and the target's log-probability


class DiskFull(ToolkitError):
    """No space for the next shard."""


class FileTooLarge(DiskFull):
    """A file has reached the limit on the size of files."""


class DiskWatch:
    """Compares the space that a run will need with the free space, before it begins and while it runs.

    ``num_rows`` source rows are read, None if not known.
    """

    def __init__(self, folder: Path, num_rows: int | None):
        self.folder, self.num_rows, self._has_warned = folder, num_rows, False

    def check_start(self, entries: int, tokens_a_row: float) -> None:
        """Warn, or raise DiskFull, by an estimate from ``entries`` per position and extracted ``tokens_a_row``."""
        if self.num_rows is not None:
            self._compare(int(self.num_rows * tokens_a_row * bytes_a_token(entries)) + SPARE)

    def check_rest(self, written: Collection[ShardEntry], finished: Collection[ShardEntry]) -> None:
        """Warn as ``check_start``, from the size of the shards ``written`` so far, about rows not yet ``finished``."""
        rows = sum(entry.source_rows for entry in written)
        if rows and self.num_rows is not None:
            left = self.num_rows - sum(entry.source_rows for entry in finished)
            self._compare(sum(entry.num_bytes for entry in written) * left // rows, refuse=False)

    def _compare(self, needed: int, refuse: bool = True) -> None:
        free = free_bytes(self.folder)
        if free >= needed or self._has_warned:
            return
        self._has_warned = True
        need = f"the rest of the run needs about {size_text(needed)}, and {size_text(free)} are free in {self.folder}"
        if refuse and free < needed / 2:
            raise DiskFull(f"{need}. Free some, choose another `output_dir`, or extract less with `max_samples`.")
        logger.warning("Note: %s. It stops when there is no space for a shard; the same command resumes it.", need)


@contextmanager
def room_or_stop(folder: Path, shard_bytes: int = 0) -> Iterator[None]:
    """A context for writing files. Raises DiskFull if there is no space for them, or for a shard of ``shard_bytes``."""
    free = free_bytes(folder)
    if free < shard_bytes + SPARE:
        shard = f", and {size_text(shard_bytes)} for the next shard at most" if shard_bytes else ""
        raise _full(folder, f"{size_text(free)} left; {size_text(SPARE)} are reserved for other files{shard}")
    try:
        yield
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise FileTooLarge(f"{TOO_LARGE}, and give the same command again.") from error
        if error.errno in FULL:
            raise _full(folder, str(error.strerror)) from error
        raise


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk where the folder is, or will be."""
    return shutil.disk_usage(nearest_existing(folder)).free


def nearest_existing(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _full(folder: Path, why: str) -> DiskFull:
    return DiskFull(
        f"the disk of {folder} is full ({why}). The finished shards are kept; free some space, and run the same "
        "command to resume."
    )


def size_text(count: int) -> str:
    """A number of bytes as text, such as ``1.5 GB``.

    >>> size_text(1_500_000_000)
    '1.5 GB'
    """
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 1000:.1f} kB"
