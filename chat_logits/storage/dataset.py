"""A stored logit dataset, a folder or a Hub repository at one commit, read a row at a time.

FORMAT.md, "Files", is the specification. From the Hub, ``extraction.json`` and ``shards.json`` are fetched, and for
each shard the footer and the row group with the row, or all row groups in turn if all rows are read.
"""

import bisect
import difflib
import functools
import itertools
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from chat_logits.errors import ToolkitError, UsageError
from chat_logits.hub import resolve_commit
from chat_logits.hub_errors import Failure, explain_hub_error
from chat_logits.storage.manifest import EXTRACTION_FILE, Manifest
from chat_logits.storage.shard_list import SHARDS_FILE, ShardEntry, read_shard_list
from chat_logits.storage.shard_reading import (
    ShardNotes,
    read_row_groups,
    read_shard_rows,
    refuse_special,
    shard_notes,
    shard_sizes,
)
from chat_logits.words import count_text
from logit_codec import ROW_NUMBERS, RowError, validate_row

logger = logging.getLogger(__name__)

Rows = Sequence[int] | np.ndarray  # numbers of stored rows
MOST_ROWS = 2**24  # of a shard: a writer has a whole shard in memory, tens of gigabytes at this size
READ_AHEAD = 8 * 2**20  # bytes of a shard on the Hub per request, if all of it is read


class DamagedRow(ToolkitError):
    """A stored row that does not follow FORMAT.md; the message names column and row."""


@dataclass(frozen=True, repr=False)
class StoredDataset:
    """A logit dataset opened at one revision: its ``extraction.json`` and its list of shards.

    ``is_finished`` is whether these are all shards of the extraction.
    """

    dataset_id: str
    revision: str | None
    manifest: Manifest
    shards: list[ShardEntry]
    is_finished: bool = field(default=True, kw_only=True)

    def __repr__(self) -> str:
        rows, shards = count_text(self.num_rows, "row"), count_text(len(self.shards), "shard")
        return f"<StoredDataset {self.dataset_id}: {rows} in {shards}>"

    @property
    def num_rows(self) -> int:
        return self._firsts[-1]

    @functools.cached_property
    def _firsts(self) -> list[int]:
        """The number of each shard's first row, and, at the end, the number of rows."""
        return list(itertools.accumulate((shard.num_rows for shard in self.shards), initial=0))

    @functools.cached_property
    def _first_by_path(self) -> dict[str, int]:
        return dict(zip((shard.path for shard in self.shards), self._firsts, strict=False))

    def read_row(self, sample_index: int) -> dict:
        """Stored row ``sample_index`` (negative ones from the end), checked against FORMAT.md."""
        row_number = self.row_number(sample_index)
        number = bisect.bisect_right(self._firsts, row_number) - 1
        shard, offset = self.shards[number], row_number - self._firsts[number]
        with self.opened(shard.path) as source:
            (row,) = read_shard_rows(source, *self._named(shard), offset)
        self._validate(row, row_number)
        return row

    def row_number(self, sample_index: int) -> int:
        """The number from 0 of stored row ``sample_index``, negative ones from the end. Raises UsageError."""
        self.refuse_empty()
        rows = self.num_rows
        if not -rows <= sample_index < rows:
            raise UsageError(
                f"sample_index {sample_index}: {self.dataset_id} has {count_text(rows, 'row')}, 0 to {rows - 1}"
            )
        return sample_index % rows

    def rows(self) -> Iterator[dict]:
        """All stored rows, in order, each checked as ``read_row`` does; one row group at a time is in memory."""
        self.refuse_empty()
        return itertools.chain.from_iterable(map(self.shard_rows, range(len(self.shards))))

    def count(self, rows: Rows | None = None) -> int:
        """The number of rows that ``numbered_rows`` gives."""
        return self.num_rows if rows is None else len(rows)

    def numbered_rows(self, rows: Rows | None = None) -> Iterator[tuple[int, dict]]:
        """All stored rows, or those with the ascending numbers ``rows``, each with its number."""
        return enumerate(self.rows()) if rows is None else self.chosen_rows(rows)

    def shard_rows(self, number: int) -> Iterator[dict]:
        """The stored rows of ``shards[number]``, as ``rows`` gives them."""
        shard, first = self.shards[number], self._firsts[number]
        with self.opened(shard.path) as source:
            rows = read_shard_rows(source, *self._named(shard))
            for row_number, row in enumerate(rows, first):
                self._validate(row, row_number)
                yield row

    def shard_notes(self, number: int) -> ShardNotes:
        """What ``shards[number]`` records about source rows and turns not stored in it, as ``write_shard`` takes it."""
        path = self.shards[number].path
        with self.opened(path) as source:
            return shard_notes(source, path, self.manifest.fingerprint)

    def row_groups(self, shards: Sequence[ShardEntry]) -> Iterator[tuple[int, list[dict]]]:
        """The rows of some of the shards in order, checked as ``read_row`` does, in groups, each with the number of its
        first row; lists of numbers are arrays. A shard on the Hub is read with a few large requests.
        """
        for shard in shards:
            first = self._first_by_path[shard.path]
            with self.opened(shard.path, cache_type="readahead", block_size=READ_AHEAD) as source:
                for rows in read_row_groups(source, *self._named(shard)):
                    self._validate_all(rows, first)
                    yield first, rows
                    first += len(rows)

    def chosen_rows(self, rows: Rows) -> Iterator[tuple[int, dict]]:
        """The stored rows with these ascending numbers, each with its number, in the form of ``row_groups``.

        Row groups without any of them are not read.
        """
        chosen = np.asarray(rows, np.int64)
        for shard, first in zip(self.shards, self._firsts, strict=False):
            start, end = np.searchsorted(chosen, [first, first + shard.num_rows])
            if start == end:
                continue
            offsets, numbers = set((chosen[start:end] - first).tolist()), iter(chosen[start:end].tolist())
            whole: dict[str, Any] = {"cache_type": "readahead", "block_size": READ_AHEAD}
            whole = whole if len(offsets) == shard.num_rows else {}
            with self.opened(shard.path, **whole) as source:
                for row in itertools.chain.from_iterable(read_row_groups(source, *self._named(shard), offsets)):
                    number = next(numbers)
                    self._validate(row, number)
                    yield number, row

    def _named(self, shard: ShardEntry) -> tuple[str, str, int, int]:
        """What ``read_row_groups`` compares a shard's file with."""
        return shard.path, self.manifest.fingerprint, self.manifest.rows_per_shard, shard.num_rows

    def sizes(self) -> dict[str, int]:
        """Compressed bytes of the shards by column, and of everything outside the columns (``shard_reading.FOOTER``).

        Only the shards' footers are read.
        """
        fingerprint, total = self.manifest.fingerprint, Counter[str]()
        for shard in self.shards:
            with self.opened(shard.path) as source:
                total.update(shard_sizes(source, shard.path, fingerprint))
        return dict(total)

    def refuse_empty(self) -> None:
        """Raise ToolkitError if there are no rows."""
        if not self.num_rows:
            why = "nothing was extracted from its source" if self.is_finished else "its extraction is not finished"
            raise ToolkitError(f"{self.dataset_id}: it has no rows{'' if self.is_finished else ' yet'}; {why}")

    def _validate(self, row: dict, row_number: int) -> None:
        manifest = self.manifest
        try:
            validate_row(row, manifest.top_k, manifest.num_sampled, manifest.vocab_size, row_number=row_number)
        except RowError as error:
            raise DamagedRow(str(error)) from error

    def _validate_all(self, rows: list[dict], first: int) -> None:
        """``_validate`` rows whose lists of numbers are arrays, in one check: one by one takes ten times as long."""
        try:
            self._validate(_joined(rows, self.manifest), first)
        except (DamagedRow, ValueError, TypeError):
            for number, row in enumerate(rows, first):
                self._validate(row, number)

    @contextmanager
    def opened(self, path: str, cache_type: str = "none", **options):
        """The shard as a local path, or as an open file on the Hub. Of the latter only what is read is fetched, unless
        these options of fsspec's cache say otherwise."""
        if self.revision is None:
            yield _local_file(self.dataset_id, path)
            return
        import huggingface_hub

        cached = huggingface_hub.try_to_load_from_cache(
            self.dataset_id, path, revision=self.revision, repo_type="dataset"
        )
        if isinstance(cached, str):
            yield cached
            return
        remote = f"datasets/{self.dataset_id}@{self.revision}/{path}"
        options = {"cache_type": cache_type, **options}
        with _explained(self.dataset_id, path), huggingface_hub.HfFileSystem().open(remote, **options) as file:
            yield file


def _joined(rows: list[dict], manifest: Manifest) -> dict:
    """Concatenate rows into one that is valid if they all are. Raises ValueError if that is not possible."""
    counts = [row["num_tokens"] for row in rows]
    if not all(counts):
        raise ValueError("a row without tokens")
    joined: dict = {"num_tokens": sum(counts)}
    for name, width in _widths(manifest.top_k, manifest.num_sampled).items():
        values = [row[name] for row in rows]
        if any(len(value) != width * count for value, count in zip(values, counts, strict=True)):
            raise ValueError("a row with another number of entries, or whose high bits end within a byte")
        joined[name] = b"".join(values) if isinstance(values[0], bytes) else np.concatenate(values)
    return {**joined, **{name: np.array([row[name] for row in rows], np.float64) for name in ROW_NUMBERS}}


def _widths(top_k: int, num_sampled: int) -> dict[str, float]:
    """Numbers or bytes of each column per position."""
    kinds = {"top": top_k, "sampled": num_sampled}
    codes_and_low = {
        f"{kind}_{name}": width for kind, width in kinds.items() for name in ("logits_quantized", "indices_low")
    }
    high = {f"{kind}_indices_high": width / 4 for kind, width in kinds.items()}
    return {**codes_and_low, **high, "token_log_probs": 1, "logsumexp": 1}


def open_dataset(dataset_id: str, revision: str | None = None) -> StoredDataset:
    """Open a local folder or a Hub dataset, the latter pinned to the commit that ``revision`` names now."""
    is_local = Path(dataset_id).is_dir()
    if is_local and revision is not None:
        raise UsageError(f"`revision` {revision}: {dataset_id} is a local folder, which has no revisions")
    revision = None if is_local else _commit_of(dataset_id, revision)
    manifest = Manifest.read(_fetch(dataset_id, EXTRACTION_FILE, revision), dataset_id)
    shards, is_finished = read_shard_list(_fetch(dataset_id, SHARDS_FILE, revision), dataset_id)
    _refuse_overfull(shards, min(manifest.rows_per_shard, MOST_ROWS), dataset_id)
    dataset = StoredDataset(dataset_id, revision, manifest, shards, is_finished=is_finished)
    if not is_finished:
        is_derived = bool(manifest.thinned_from or manifest.filtered_from)
        _tell_unfinished(dataset_id, count_text(dataset.num_rows, "conversation"), is_derived)
    return dataset


def _refuse_overfull(shards: list[ShardEntry], most: int, dataset_id: str) -> None:
    """Raise ToolkitError for a shard with more rows than allowed, before memory is allocated for them."""
    if overfull := next((shard for shard in shards if shard.num_rows > most), None):
        found = f"{overfull.num_rows:,} rows in {overfull.path}"
        raise ToolkitError(f"{dataset_id}: {SHARDS_FILE} lists {found}, expected {most:,} at most")


@functools.cache  # once in a process
def _tell_unfinished(dataset_id: str, rows: str, is_derived: bool) -> None:
    found = "its extraction is not finished (%s so far); run the same extract command to resume it"
    if is_derived:
        found = "it was made before the extraction was finished (%s); finish that one, then make this one anew"
    logger.warning(f"%s: {found}", dataset_id, rows)


def _commit_of(dataset_id: str, revision: str | None) -> str:
    """The commit of a Hub dataset. Raises UsageError, which names the nearest folder, if a folder seems to be meant."""
    path = Path(dataset_id)
    with suppress(RuntimeError):  # ~name of an unknown user
        path = path.expanduser()
    if path.is_file():
        raise UsageError(f"{dataset_id}: a file, expected the folder that extraction.json is in, such as {path.parent}")
    nearest = _nearest_folder(path)
    if _is_path(dataset_id):
        raise UsageError(f"{dataset_id}: no such folder" + (f"; the nearest one is {nearest}" if nearest else ""))
    try:
        return resolve_commit(dataset_id, "dataset", revision)
    except ToolkitError as error:
        if nearest is None or not (nearest / EXTRACTION_FILE).is_file():
            raise
        raise type(error)(f"{error}\nThere is no such folder either; the nearest one is {nearest}") from error


def _is_path(name: str) -> bool:
    """Whether this can only be a path."""
    return name.startswith((".", "/", "~", "\\")) or name.endswith("/") or name.count("/") > 1


def _nearest_folder(path: Path) -> Path | None:
    """The folder with the most similar path, part by part, None if nothing is similar."""
    found = Path(path.anchor)
    for part in path.parts[bool(path.anchor) :]:
        if not (found / part).is_dir():
            names = [entry.name for entry in found.iterdir() if entry.is_dir()] if os.access(found, os.R_OK) else []
            part = next(iter(difflib.get_close_matches(part, names, 1)), "")
            if not part:
                return None
        found /= part
    return found


def _fetch(dataset_id: str, name: str, revision: str | None) -> Path:
    """The local path of a small file, which is fetched from the Hub if needed."""
    if revision is None:
        return _local_file(dataset_id, name)
    import huggingface_hub

    with _explained(dataset_id, name):
        return Path(huggingface_hub.hf_hub_download(dataset_id, name, repo_type="dataset", revision=revision))


def _local_file(dataset_id: str, name: str) -> Path:
    path = Path(dataset_id) / name
    refuse_special(path, f"{dataset_id}: {name}")
    if not path.is_file():
        raise _missing(dataset_id, name)
    return path


def _missing(dataset_id: str, name: str) -> ToolkitError:
    meaning = "so it is not a logit dataset" if name == EXTRACTION_FILE else "so it is incomplete"
    return ToolkitError(f"{dataset_id}: no {name} in it, {meaning}")


@contextmanager
def _explained(dataset_id: str, name: str):
    """Raise errors of the Hub's clients with an explanation."""
    import huggingface_hub

    try:
        yield
    except ToolkitError:
        raise
    except Exception as error:
        is_missing = isinstance(error, huggingface_hub.errors.EntryNotFoundError | FileNotFoundError)
        failure = Failure(error)
        if is_missing and failure.status in (None, 404) and not (failure.is_unreachable or failure.is_broken):
            raise _missing(dataset_id, name) from error
        raise explain_hub_error(error, f"dataset {dataset_id}") from error
