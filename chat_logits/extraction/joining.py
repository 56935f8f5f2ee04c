"""Parts of a run, computed each on its own where no Ray connects the machines, and how they become the run.

Part I of N computes the shards I - 1, I - 1 + N, … in a folder within the run's own; the same command without ``part``
moves them to their places, and computes what is missing.
"""

import filecmp
import itertools
import logging
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple, Self

from chat_logits.errors import UsageError
from chat_logits.extraction.config import ExtractConfig
from chat_logits.extraction.folder import refuse_unfit_place, shards_in
from chat_logits.extraction.lock import FolderLock
from chat_logits.storage.disk import room_or_stop, write_text
from chat_logits.storage.manifest import EXTRACTION_FILE, Manifest
from chat_logits.storage.shard_list import shard_number
from chat_logits.words import count_text

PARTS_FOLDER = ".parts"  # in a run's folder: one folder for each part

logger = logging.getLogger(__name__)


class Part(NamedTuple):
    """One of the ``of`` parts of a run; ``number`` counts from 1.

    >>> part = Part.read("2/3")
    >>> part, list(part.of_these(range(7))), part.num_rows(num_rows=600, rows_per_shard=256)
    (Part(number=2, of=3), [1, 4], 256)
    """

    number: int
    of: int

    @classmethod
    def read(cls, text: str) -> Self:
        """From the option's value, I/N."""
        return cls(*map(int, text.split("/")))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def of_these(self, shards: Iterable[int]) -> Iterator[int]:
        """The part's shards among those of the run."""
        return (shard for shard in shards if shard % self.of == self.number - 1)

    def num_rows(self, num_rows: int, rows_per_shard: int) -> int:
        """How many of the run's source rows are in the part's shards. Raises UsageError if it has none."""
        starts = range((self.number - 1) * rows_per_shard, num_rows, self.of * rows_per_shard)
        if not starts:
            raise UsageError(
                f"`part` {self}: it has no shard, as the run has {count_text(-(-num_rows // rows_per_shard), 'shard')} "
                f"of {rows_per_shard:,} source rows; expected no more parts than shards, or a smaller `rows_per_shard`"
            )
        return sum(min(rows_per_shard, num_rows - start) for start in starts)


def place_of(config: ExtractConfig) -> Path:
    """The folder to write to: that of one part, or the run's, after the parts that are in it have been joined.

    Raises UsageError if it holds other files, and as ``_begin_part`` and ``_join_parts``.
    """
    folder = config.folder
    refuse_unfit_place(folder)
    if not config.part:
        _join_parts(folder, config.overwrite)
        return folder
    if config.output_repo:
        logger.info("A part is not pushed: the same command without `part` joins all parts, and pushes the run.")
    return _begin_part(folder, Part.read(config.part))


def missing_in_part(config: ExtractConfig, shards: Iterable[int]) -> Iterator[int]:
    """Of the run's shards that a part does not have itself, those that it is to compute: no earlier join has them."""
    assert config.part
    joined = {shard_number(path.relative_to(config.folder).as_posix()) for path in shards_in(config.folder)}
    return (shard for shard in Part.read(config.part).of_these(shards) if shard not in joined)


def refuse_another_run(place: Path) -> None:
    """Raise UsageError if another part has begun a different run since this one looked; its record is removed then."""
    try:
        _agreed(*_parts_of(place.parent.parent))
    except UsageError as error:
        (place / EXTRACTION_FILE).unlink()
        raise UsageError(
            f"{error}\nBoth were begun at one time. The same command follows the other one's run."
        ) from error


def _begin_part(folder: Path, part: Part) -> Path:
    """The folder of a part of the run in ``folder``. A new one is to continue the same run as what is there.

    Raises UsageError if the run is there in another number of parts.
    """
    place = folder / PARTS_FOLDER / f"{part.number}-of-{part.of}"
    others = _parts_of(folder)
    if other := next((other for other in others if not other.name.endswith(f"-of-{part.of}")), None):
        raise UsageError(
            f"`part` {part}: {other} is there, a part of another number of parts. Give that number, or join them first."
        )
    recorded = (other / EXTRACTION_FILE for other in (folder, *others))
    first = next((path for path in recorded if path.is_file()), None)
    if first and not (place / EXTRACTION_FILE).exists():
        place.mkdir(parents=True, exist_ok=True)
        with room_or_stop(place):
            write_text(place / EXTRACTION_FILE, first.read_text(encoding="utf-8"))
    return place


def _join_parts(folder: Path, overwrite: bool) -> None:
    """Move the finished shards of all parts to the run's folder; they are checked when the run is resumed.

    Raises UsageError if a part is still being computed, if parts are of different runs, or with ``overwrite``.
    """
    if not _parts_of(folder):
        return
    if overwrite:
        raise UsageError(
            f"`overwrite`: {folder / PARTS_FOLDER} has parts to join; remove them, or leave it out to join them."
        )
    with ExitStack() as stack:
        _lock(folder, stack)
        parts = _parts_of(folder)
        with ExitStack() as of_parts:
            for place in parts:
                _lock(place, of_parts)
            if record := _agreed(folder, *parts):
                with room_or_stop(folder):
                    write_text(folder / EXTRACTION_FILE, record)
            moved = sum(_move_shards(place, folder) for place in parts)
        for place in parts:  # their locks are closed: on NFS an open file keeps its folder
            if not shards_in(place):
                shutil.rmtree(place)
        with suppress(OSError):  # something is left in it
            (folder / PARTS_FOLDER).rmdir()
    logger.info("Joined: %s of %s", count_text(moved, "shard"), count_text(len(parts), "part"))


def _lock(folder: Path, stack: ExitStack) -> None:
    lock = FolderLock(folder)
    lock.acquire()
    stack.callback(lock.release)


def _parts_of(folder: Path) -> list[Path]:
    found = sorted((folder / PARTS_FOLDER).glob("*-of-*"))
    return [path for path in found if path.is_dir() and re.fullmatch(r"\d+-of-\d+", path.name)]


def _agreed(*places: Path) -> str:
    """The text of extraction.json in these folders, "" if they have neither that nor shards. Raises UsageError if their
    runs differ, or if all have lost it."""
    recorded = {place: place / EXTRACTION_FILE for place in places if (place / EXTRACTION_FILE).is_file()}
    manifests = [Manifest.read(path, str(place)) for place, path in recorded.items()]
    for (place, manifest), (other, another) in itertools.pairwise(zip(recorded, manifests, strict=True)):
        if manifest.fingerprint != another.fingerprint:
            reasons = "; ".join(manifest.differences(another))
            raise UsageError(f"{place} and {other} are of different runs ({reasons}). Remove one, or compute it anew.")
    if not manifests and any(map(shards_in, places)):
        raise UsageError(f"{places[-1]}: the shards of parts, but no {EXTRACTION_FILE} in any part. Put it back there.")
    return manifests[0].text if manifests else ""


def _move_shards(place: Path, folder: Path) -> int:
    """Move a part's shards; returns how many. One that the run has already is removed, or left alone if different."""
    moved = 0
    for path in shards_in(place):
        to = folder / path.relative_to(place)
        to.parent.mkdir(parents=True, exist_ok=True)
        if not to.exists():
            path.rename(to)
            moved += 1
        elif filecmp.cmp(path, to, shallow=False):
            path.unlink()
        else:
            logger.warning("%s is not moved: %s is there already, and different", path, to)
    return moved
