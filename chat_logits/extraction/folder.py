"""The folder of a run: its lock, the finished shards in it, and the files that describe them.

The finished shards are the state of a run. Everything else in the folder can be rebuilt from them and from
``extraction.json``.
"""

import logging
import shutil
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from chat_logits.errors import ToolkitError, UsageError, first_names
from chat_logits.extraction.lock import FolderLock, FolderLost
from chat_logits.storage.card import arguments_in_code, render_card
from chat_logits.storage.disk import OF_FILE_SYSTEM, refuse_unwritable, room_or_stop, write_text
from chat_logits.storage.manifest import CARD_FILE, EXTRACTION_FILE, Manifest
from chat_logits.storage.record import RECORD, ShardRecord
from chat_logits.storage.shard import DamagedShard
from chat_logits.storage.shard_list import (
    SHARDS_FILE,
    ShardEntry,
    read_shard_list,
    shard_number,
    shard_path,
    shards_text,
)
from chat_logits.storage.shard_reading import check_shard

logger = logging.getLogger(__name__)

REPLACED, DAMAGED = ".replaced", ".damaged-"
PUSHED = ".old"  # suffix of a damaged shard once its recomputed replacement is on the Hub
WORKERS = ".workers"  # holds a token; workers that have the same token may write here
REPLACED_REPO, DONE = ".output_repo", " done"  # in .replaced: repositories to replace too, and those already replaced
CHECKING = 4  # shards checked at once: most of the work is decompression, outside the interpreter's lock
DESCRIBING = 19  # after writing the files around the shards, wait this many times as long as that took
PARTS = (EXTRACTION_FILE, "data", RECORD, SHARDS_FILE, CARD_FILE)


class RunFolder:
    """A run's folder. ``entries`` are the finished shards by number, ``recorded`` the manifest that was in it,
    ``recomputed`` the shards that were found damaged, now or earlier, and not pushed since. ``manifest`` is the run's,
    once it has begun, and ``is_finished`` says whether all of its shards are here.

    ``arguments`` are those with which the card's snippets open the dataset (``arguments_in_code``).
    Raises UsageError if the folder cannot be written, holds other files, or is locked by another process.
    """

    def __init__(self, path: Path, overwrite: bool = False, arguments: str = arguments_in_code()):
        self.path, self._arguments = path, arguments
        self.entries: dict[int, ShardEntry] = {}
        self.manifest: Manifest
        self.recomputed: set[int] = set()
        self.is_finished = False
        self._is_described, self._due = True, 0.0
        self._lock = FolderLock(path)
        refuse_unfit_place(path)
        if path.is_dir():
            self._acquire()
        try:
            self.recorded = self._read_manifest()
        except ToolkitError as error:
            if not overwrite:
                self.close()
                raise ToolkitError(f"{error}\nChoose another folder, or replace the run with `overwrite`.") from error
            self.recorded = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Bring the files that describe the shards up to date, and release the folder."""
        if not self._is_described:
            with suppress(OSError, FolderLost):  # already reported; the next process writes them anew
                self.describe_shards()
        self._lock.release()

    def check_still_ours(self) -> None:
        """Raise FolderLost if the path no longer leads to the run's folder; called before every write."""
        self._lock.check()

    def admit_workers(self, token: str) -> None:
        """Let workers that have this token write here."""
        self._write(WORKERS, token)

    def dismiss_workers(self) -> None:
        """Let no worker write here any more."""
        with suppress(FolderLost):
            self.check_still_ours()
            (self.path / WORKERS).unlink(missing_ok=True)

    @property
    def is_replacing(self) -> bool:
        """Whether the run in the folder was begun by an ``overwrite`` that is not finished."""
        return (self.path / REPLACED).exists()

    @property
    def replaced_run(self) -> Path | None:
        """Where the run that is being replaced is kept, if there was one."""
        return self.path / REPLACED if (self.path / REPLACED / EXTRACTION_FILE).exists() else None

    def may_replace(self, repo: str) -> bool:
        """Whether the ``overwrite`` that began the run in the folder also has to replace the run in this repository,
        and has not done so yet."""
        return repo in self._replaced_repos()

    def has_replaced(self, repo: str) -> bool:
        """Whether that ``overwrite`` has already replaced the run in this repository."""
        return repo + DONE in self._replaced_repos()

    def note_replaced(self, repo: str) -> None:
        """Remember that the run in this repository has been replaced."""
        others = [line for line in self._replaced_repos() if line != repo]
        self._mark_replaced([*others, repo + DONE])

    def _replaced_repos(self) -> list[str]:
        marker = self.path / REPLACED / REPLACED_REPO
        return marker.read_text(encoding="utf-8").splitlines() if marker.is_file() else []

    def _mark_replaced(self, lines: list[str]) -> None:
        self.check_still_ours()
        (self.path / REPLACED).mkdir(exist_ok=True)
        self._write(f"{REPLACED}/{REPLACED_REPO}", "\n".join(lines))

    def _write(self, name: str, text: str) -> None:
        write_text(self.path / name, text, self.check_still_ours)

    def begin(self, manifest: Manifest, overwrite: bool = False, repo: str = "") -> None:
        """Start a new run; with ``overwrite``, what is in the folder is moved to its hidden folder ``.replaced``.

        If an earlier ``overwrite`` never finished, the run that it set aside is kept, and its own unfinished run is
        deleted. ``repo`` is the repository in which the run is replaced as well.
        """
        self._enter()
        self._set_manifest(manifest)
        self.entries, self.is_finished = {}, False
        with room_or_stop(self.path):
            if overwrite:
                self._mark_replaced([repo])
            if self.is_replacing:
                self._set_aside()
            self._write(EXTRACTION_FILE, manifest.text)
            self.describe_shards()

    def resume(self, manifest: Manifest, check_all: bool = False) -> None:
        """Continue the run: find its finished shards, and set damaged ones aside under a name with a dot.

        Only shards that have changed since they were written are read, or all with ``check_all``.
        """
        self._enter()
        self._set_manifest(manifest)
        if not check_all:
            self._record.load()
        with room_or_stop(self.path):
            if not (self.path / EXTRACTION_FILE).exists():
                self._write(EXTRACTION_FILE, manifest.text)
            for leftover in self.path.glob("data/*/.*.tmp"):
                self.check_still_ours()
                leftover.unlink(missing_ok=True)
            self.entries = {entry.shard: entry for entry in self._check_shards() if entry}
            self.is_finished = self._is_listed_whole()
            for entry in self.entries.values():
                self._record.note(entry)
            self.recomputed = set(self._set_aside_shards())
            self.describe_shards()

    def _set_aside_shards(self) -> dict[int, Path]:
        """The paths of damaged shards that were set aside, by shard number."""
        found = {path: path.with_name(path.name.removeprefix(DAMAGED)) for path in self.path.glob("data/*/.*.parquet")}
        numbers = {path: self._number_of(shard) for path, shard in found.items() if shard.name != path.name}
        return {number: path for path, number in numbers.items() if number is not None}

    def forget_recomputed(self, shards: Collection[int]) -> None:
        """Note that these shards have been pushed. The damaged files stay, under names that later starts ignore."""
        aside = self._set_aside_shards() if self.recomputed & set(shards) else {}
        for number in aside.keys() & set(shards):
            self.check_still_ours()
            with suppress(OSError):  # then it keeps its name: the shard has been pushed in any case
                aside[number].rename(aside[number].with_name(aside[number].name + PUSHED))
        self.recomputed -= set(shards)

    def _is_listed_whole(self) -> bool:
        """Whether the run was finished before, and all of its shards are still there."""
        try:
            listed, is_finished = read_shard_list(self.path / SHARDS_FILE, str(self.path))
        except (OSError, ToolkitError):
            return False
        return is_finished and {entry.shard for entry in listed} == self.entries.keys()

    def _set_manifest(self, manifest: Manifest) -> None:
        self.manifest, self._record = manifest, ShardRecord(self.path, manifest.fingerprint)

    def add(self, entry: ShardEntry) -> bool:
        """Add a shard that has been written here. Returns whether the files that describe the shards include it.

        Long files are not updated each time: updating them takes at most a twentieth of the time.
        """
        self.entries[entry.shard], self.is_finished = entry, False
        self._record.note(entry)
        started = time.monotonic()
        self._is_described = started >= self._due
        if self._is_described:
            with room_or_stop(self.path):
                self.describe_shards()
            self._due = time.monotonic() + DESCRIBING * (time.monotonic() - started)
        return self._is_described

    def describe_shards(self) -> None:
        """Write ``shards.json``, the card, and the record of checked shards."""
        around = self.files_around(list(self.entries.values()), self.is_finished)
        texts = {**around, RECORD: self._record.text()}
        for name, text in texts.items():
            self._write(name, text)
        self._is_described = True

    def files_around(self, entries: list[ShardEntry], is_finished: bool) -> dict[str, str]:
        """The text of ``shards.json`` and of the card for these shards; ``is_finished`` if they are all of the run."""
        entries = sorted(entries, key=lambda entry: entry.shard)
        return {
            SHARDS_FILE: shards_text(entries, is_finished),
            CARD_FILE: render_card(self.manifest, entries, self._arguments, is_finished),
        }

    def check_finished(self, is_all: bool) -> None:
        """Check that each shard is there, and update the files around; ``is_all`` if they are all shards of the run.

        Raises FolderLost, and ToolkitError for a shard that is missing or has another size.
        """
        missing = [entry.path for entry in self.entries.values() if self._size(entry.path) != entry.num_bytes]
        if not missing and not (self._is_described and self.is_finished == is_all):
            self.is_finished = is_all
            with room_or_stop(self.path):
                self.describe_shards()
        self.check_still_ours()
        if missing:
            raise ToolkitError(
                f"`output_dir` {self.path}: finished shards are not there any more, or have another size: "
                f"{first_names(missing)}. The same command computes them again."
            )

    def _size(self, path: str) -> int | None:
        try:
            return (self.path / path).stat().st_size
        except OSError:
            return None

    def finish(self) -> None:
        """Remove the run that was replaced, now that the new one is complete. Raises as ``check_finished``."""
        self.check_finished(self.is_finished)
        shutil.rmtree(self.path / REPLACED, ignore_errors=True)

    def _enter(self) -> None:
        """Create and lock a folder that did not exist at first. Raises UsageError if another process was quicker."""
        if self._lock.is_held:
            self.check_still_ours()
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self._acquire()
        if (self.path / EXTRACTION_FILE).exists():
            raise UsageError(f"`output_dir` {self.path}: another process has begun a run here. Give the command again.")

    def _acquire(self) -> None:
        self._lock.acquire()
        (self.path / WORKERS).unlink(missing_ok=True)  # workers of a killed process may live on for a while

    def _read_manifest(self) -> Manifest | None:
        path = self.path / EXTRACTION_FILE
        return Manifest.read(path, f"`output_dir` {self.path}") if path.is_file() else None

    def _set_aside(self) -> None:
        """Move one part after another; if a run is stopped here, the next one moves the rest."""
        replaced = self.path / REPLACED
        kept = (replaced / CARD_FILE).exists()  # it is moved last: so the run there is complete
        for part in PARTS:
            here, there = self.path / part, replaced / part
            self.check_still_ours()
            if not kept and here.exists() and not there.exists():
                here.rename(there)
            elif here.is_dir():
                shutil.rmtree(here)
            else:
                here.unlink(missing_ok=True)

    def _check_shards(self) -> list[ShardEntry | None]:
        paths = self._shard_files()
        with ThreadPoolExecutor(CHECKING) as pool:
            checked = pool.map(self._checked, paths)
            return list(tqdm(checked, "Checking shards", len(paths), unit=" shards", leave=False, delay=1))

    def _shard_files(self) -> list[Path]:
        """The files with a shard's name, in order. A warning lists others in their folders; they are left alone."""
        there = sorted(self.path.glob("data/*/[!.]*.parquet"))
        shards = [path for path in there if self._number_of(path) is not None]
        if others := [path.relative_to(self.path).as_posix() for path in there if self._number_of(path) is None]:
            logger.warning(
                "%s: by their names these are not shards of this run, so they are left alone: %s. Move them away: "
                "`datasets` may load them with the rows.",
                self.path,
                first_names(others),
            )
        return shards

    def _number_of(self, path: Path) -> int | None:
        """The number of the run's shard at this path, None if it is not a path of one of its shards."""
        relative = path.relative_to(self.path).as_posix()
        number = shard_number(relative)
        return number if number is not None and relative == shard_path(self.manifest.split, number) else None

    def _checked(self, path: Path) -> ShardEntry | None:
        relative = path.relative_to(self.path).as_posix()
        try:
            known = self._record.unchanged(relative)
            return known or check_shard(self.path, relative, self.manifest.fingerprint, self.manifest.rows_per_shard)
        except DamagedShard as error:
            aside = path.with_name(DAMAGED + path.name)
            self.check_still_ours()
            path.rename(aside)
            logger.warning("%s\nSet aside as %s; its source rows are computed again.", error, aside)
            return None


def shards_in(folder: Path) -> list[Path]:
    """The files in a run's folder that have the name of a shard, in order; not checked."""
    found = sorted(folder.glob("data/*/[!.]*.parquet"))
    return [path for path in found if shard_number(path.relative_to(folder).as_posix()) is not None]


def is_being_replaced(folder: Path) -> bool:
    """Whether the run in a folder was begun by an ``overwrite`` that is not finished."""
    return (folder / REPLACED).exists() and (folder / EXTRACTION_FILE).exists()


def refuse_unfit_place(folder: Path) -> None:
    """Raise UsageError if a folder cannot be written, or holds other files than a run's."""
    refuse_unwritable(folder, "output_dir")
    present = [path for path in folder.glob("*") if not path.name.startswith(".") and path.name != OF_FILE_SYSTEM]
    is_run = (folder / EXTRACTION_FILE).is_file() or (folder / REPLACED).is_dir()
    if present and not is_run:
        raise UsageError(f"`output_dir` {folder}: the folder holds other files, such as {present[0].name}")
