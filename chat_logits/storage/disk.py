"""The disk: files that are there whole or not at all, and room for them: what a run needs, and its end without any."""

import errno
import glob
import logging
import math
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import filelock
import numpy as np

from chat_logits.errors import ToolkitError, UsageError
from chat_logits.storage.shard_list import ShardEntry

logger = logging.getLogger(__name__)

MIB = 2**20
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SPARE = 4 * MIB  # beside the next shard: the files around, and what others write meanwhile
# Bytes a position of whole files, conversations among them, by entries a position: measured with SmolLM2 on real
# answers, ``top_p`` 0.98. Between them, their share of the columns' bytes follows the entries' logarithm.
MEASURED = {24: 67, 80: 168, 320: 516}


# --- files ---


@contextmanager
def written_whole(
    path: Path, is_shared: bool = False, check_place: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """Within, a hidden temporary file to write, which then gets the name ``path``; where writing fails, it is removed.

    Its name is its own where the folder ``is_shared`` with processes that may write a file of the same name.
    ``check_place`` raises where the folder is not the one that is meant: asked before each change of what is in it.
    """
    check_place()
    own = f".{secrets.token_hex(4)}" if is_shared else ""
    temporary = path.with_name(f".{path.name}{own}.tmp")
    try:
        yield temporary
        flush_and_rename(temporary, path, check_place)
    except BaseException as error:
        lost = _what_is_wrong(check_place)
        # After the folder was replaced, this file name may belong to another run: it is not deleted.
        if is_shared or not lost:
            temporary.unlink(missing_ok=True)
        if lost and isinstance(error, OSError):
            raise lost from error
        raise


def _what_is_wrong(check_place: Callable[[], None]) -> ToolkitError | None:
    try:
        check_place()
    except ToolkitError as error:
        return error
    return None


def flush_and_rename(temporary: Path, path: Path, check_place: Callable[[], None] = lambda: None) -> None:
    """Give a finished file its name, so that after a crash of the machine it is whole or not there."""
    with temporary.open("r+b") as file:
        os.fsync(file.fileno())
    check_place()
    temporary.replace(path)


def refuse_filled(folder: Path, option: str, otherwise: str = "") -> None:
    """Raise UsageError, naming the option that it is the value of, unless the folder is empty or not there.

    ``otherwise`` is what else may be done where it holds files.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"`{option}` {folder}: a file, expected a new or an empty folder")
    if present := next(folder.iterdir(), None) if folder.is_dir() else None:
        raise UsageError(
            f"`{option}` {folder}: holds files, such as {present.name}; expected a new or an empty folder{otherwise}"
        )


@contextmanager
def folder_written_whole(folder: Path) -> Iterator[Path]:
    """Within, a hidden folder to write in, which then gets the name ``folder``, of none or an empty one; where that
    fails, it is removed, and so are first those that killed processes have left. Raises ToolkitError where the disk
    refuses, or has no room."""
    try:
        with _locked_building(folder.absolute()) as building:
            yield building
            if folder.is_dir():
                folder.rmdir()  # refused where it was filled meanwhile
            building.rename(folder)
    except DiskFull as error:
        raise ToolkitError(f"{folder}: no room for it. Free some, or name a folder on another disk.") from error
    except OSError as error:
        raise ToolkitError(f"{folder}: it cannot be written: {error.strerror}") from error


@contextmanager
def _locked_building(place: Path) -> Iterator[Path]:
    """A new hidden folder beside ``place``, removed at the end. The lock beside it is held as long as it is there."""
    place.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(place)
    building = place.with_name(f".{place.name}.{secrets.token_hex(4)}.tmp")
    lock = _lock_of(building)
    with filelock.FileLock(lock, thread_local=False):  # whichever thread ends the context
        try:
            building.mkdir()
            yield building
        finally:
            shutil.rmtree(building, ignore_errors=True)
            lock.unlink(missing_ok=True)


def _remove_leftovers(place: Path) -> None:
    """Folders that were to become ``place``, of dead processes: nobody holds their locks."""
    for folder in place.parent.glob(f".{glob.escape(place.name)}.{'[0-9a-f]' * 8}.tmp"):
        lock = _lock_of(folder)
        with suppress(OSError, filelock.Timeout):  # in use, or somebody else's
            if lock.exists():
                with filelock.FileLock(lock, timeout=0):
                    if folder.exists():  # or its process has just finished
                        shutil.rmtree(folder)
                        logger.info("Removed %s, which a process that was killed has left.", folder)
                    lock.unlink(missing_ok=True)


def _lock_of(building: Path) -> Path:
    return building.with_suffix(".lock")


def make_folders(root: Path, inner: Path) -> None:
    """Make the folders ``inner`` within ``root``, which is there: where it is gone, it is not made again."""
    for folder in [*reversed(inner.parents[:-1]), inner]:
        (root / folder).mkdir(exist_ok=True)


def write_text(path: Path, content: str, check_place: Callable[[], None] = lambda: None) -> None:
    """Write a file so that a reader sees the old content or the new, never half."""
    with written_whole(path, check_place=check_place) as temporary:
        temporary.write_text(content, encoding="utf-8")


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """As ``write_text``, from texts that are made one after another and never all in memory."""
    with written_whole(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(lines)


# --- room ---


def bytes_a_token(entries: int) -> float:
    """What an extracted token takes in the files of a run of so many entries a position, top_k + num_sampled, about.

    >>> [round(bytes_a_token(entries)) for entries in (24, 80, 320)]
    [67, 168, 516]
    """
    shares = [size / _uncompressed(measured) for measured, size in MEASURED.items()]
    share = float(np.interp(math.log(entries), [*map(math.log, MEASURED)], shares))
    return share * _uncompressed(entries)


def _uncompressed(entries: int) -> float:
    return 3.25 * entries + 8  # FORMAT.md: code and id of an entry; logsumexp and the target's log-probability


class DiskFull(ToolkitError):
    """No room for the next shard."""


class DiskWatch:
    """Holds what a run will need against what is free, before it begins and while it goes.

    ``num_rows`` source rows are read, None if nobody knows.
    """

    def __init__(self, folder: Path, num_rows: int | None):
        self.folder, self.num_rows, self._has_warned = folder, num_rows, False

    def check_start(self, entries: int, tokens_a_row: float) -> None:
        """Warn, or raise DiskFull, by estimate: ``entries`` a position, ``tokens_a_row`` extracted tokens."""
        if self.num_rows is not None:
            self._compare(int(self.num_rows * tokens_a_row * bytes_a_token(entries)) + SPARE)

    def check_rest(self, written: Collection[ShardEntry], finished: Collection[ShardEntry]) -> None:
        """As ``check_start``, by the size of the shards ``written`` so far, for what is not ``finished``."""
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
        logger.warning("Note: %s. It stops when there is no room for a shard; the same command resumes it.", need)


@contextmanager
def room_or_stop(folder: Path, shard_bytes: int = 0) -> Iterator[None]:
    """Within, files are written. Raises DiskFull without room for these, or for a shard of ``shard_bytes``."""
    free = free_bytes(folder)
    if free < shard_bytes + SPARE:
        shard = f", and {size_text(shard_bytes)} for the next shard at most" if shard_bytes else ""
        raise _full(folder, f"{size_text(free)} left; {size_text(SPARE)} are kept for the files around{shard}")
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise _full(folder, str(error.strerror)) from error
        raise


def free_bytes(folder: Path) -> int:
    """What is free where the folder is, or will be."""
    return shutil.disk_usage(nearest_existing(folder)).free


def nearest_existing(folder: Path) -> Path:
    """The folder, or the nearest of those around it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _full(folder: Path, why: str) -> DiskFull:
    return DiskFull(
        f"the disk of {folder} is full ({why}). The finished shards are kept; make room, and the same command goes on."
    )


def size_text(count: int) -> str:
    """Bytes for people, such as ``1.5 GB``.

    >>> size_text(1_500_000_000)
    '1.5 GB'
    """
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 1000:.1f} kB"
