"""Parts of a run, computed each on its own where no Ray connects the machines, and how they become the run.

Part I of N computes the shards I - 1, I - 1 + N, … in a folder within the run's own; the same command without ``part``
moves them to their places, and computes what is missing.
"""

import itertools
import logging
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Self

from chat_logits.errors import UsageError
from chat_logits.extraction.config import ExtractConfig
from chat_logits.extraction.folder import refuse_unfit_place
from chat_logits.extraction.lock import FolderLock
from chat_logits.storage.disk import write_text
from chat_logits.storage.manifest import EXTRACTION_FILE, Manifest
from chat_logits.storage.shard_list import shard_number
from chat_logits.words import count_text

PARTS = ".parts"  # in a run's folder: one folder for each part

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


def _begin_part(folder: Path, part: Part) -> Path:
    """The folder of a part of the run in ``folder``. A new one is to continue the same run as the parts that are there.

    Raises UsageError if the parts have been joined.
    """
    if (folder / EXTRACTION_FILE).exists():
        raise UsageError(
            f"`part` {part}: the run in {folder} is joined, or was begun without parts; the same command without "
            "`part` computes what is missing."
        )
    place = folder / PARTS / f"{part.number}-of-{part.of}"
    recorded = [other / EXTRACTION_FILE for other in _parts_of(folder)]
    first = next((path for path in recorded if path.is_file()), None)
    if first and not (place / EXTRACTION_FILE).exists():
        place.mkdir(parents=True, exist_ok=True)
        write_text(place / EXTRACTION_FILE, first.read_text(encoding="utf-8"))
    return place


def _join_parts(folder: Path, overwrite: bool) -> None:
    """Move the finished shards of all parts to the run's folder; they are checked when the run is resumed.

    Raises UsageError if a part is still being computed, if parts are of different runs, or with ``overwrite``.
    """
    parts = _parts_of(folder)
    if not parts:
        return
    if overwrite:
        raise UsageError(f"`overwrite`: {folder / PARTS} has parts to join; remove them, or leave it out to join them.")
    with ExitStack() as stack:
        for place in (folder, *parts):
            lock = FolderLock(place)
            lock.acquire()
            stack.callback(lock.release)
        _take_record(folder, parts)
        moved = sum(_move_shards(place, folder) for place in parts)
        shutil.rmtree(folder / PARTS)
    logger.info("Joined: %s of %s", count_text(moved, "shard"), count_text(len(parts), "part"))


def _parts_of(folder: Path) -> list[Path]:
    return sorted((folder / PARTS).glob("*-of-*"))


def _take_record(folder: Path, parts: list[Path]) -> None:
    """Write the parts' extraction.json into the run's folder. Raises UsageError if there are different ones."""
    places = [place for place in (folder, *parts) if (place / EXTRACTION_FILE).is_file()]
    manifests = [Manifest.read(place / EXTRACTION_FILE, str(place)) for place in places]
    for (place, manifest), (other, another) in itertools.pairwise(zip(places, manifests, strict=True)):
        if manifest.fingerprint != another.fingerprint:
            reasons = "; ".join(manifest.differences(another))
            raise UsageError(
                f"{place} and {other} are parts of different runs ({reasons}). Remove one, or compute it anew."
            )
    if manifests and places[0] != folder:
        write_text(folder / EXTRACTION_FILE, manifests[0].text)


def _move_shards(place: Path, folder: Path) -> int:
    """Move a part's shards, unless the run has them; how many."""
    moved = 0
    for path in sorted(place.glob("data/*/[!.]*.parquet")):
        to = folder / path.relative_to(place)
        if shard_number(path.relative_to(place).as_posix()) is not None and not to.exists():
            to.parent.mkdir(parents=True, exist_ok=True)
            path.rename(to)
            moved += 1
    return moved
