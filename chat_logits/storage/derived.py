"""Make a dataset from another one, shard by shard: the new folder is complete, or it is not made."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from chat_logits.data.marks import is_left_out
from chat_logits.data.stored_messages import from_stored
from chat_logits.storage.card import render_card
from chat_logits.storage.columns import ColumnReader
from chat_logits.storage.dataset import Rows, StoredDataset
from chat_logits.storage.disk import folder_written_whole, room_or_stop, write_text
from chat_logits.storage.manifest import CARD_FILE, EXTRACTION_FILE, Manifest
from chat_logits.storage.shard import write_shard
from chat_logits.storage.shard_list import SHARDS_FILE, ShardEntry, shards_text

NOT_CHOSEN = "not chosen"  # skip reason of a source row that the origin of a filtered dataset has


def write_derived(
    dataset: StoredDataset, manifest: Manifest, folder: Path, change: Callable[[dict], dict]
) -> list[ShardEntry]:
    """Write a dataset with each row changed by ``change``; shards, skipped rows and turns left out stay the same.

    ``manifest`` is the new dataset's. ``folder`` is new or empty, and nothing is in it until all is written. One shard
    at a time is in memory. Raises ToolkitError if the folder cannot be written, and what reading raises.
    """
    entries: list[ShardEntry] = []
    with _new_dataset(manifest, folder, dataset.num_rows, entries, dataset.is_finished) as (building, bar):
        for number, shard in enumerate(dataset.shards):
            rows = []
            for row in dataset.shard_rows(number):
                rows.append(change(row))
                bar.update()
            skipped, left_out, remarks = dataset.shard_notes(number)
            entries.append(
                write_shard(building, manifest, shard.shard, rows, skipped, turns_left_out=left_out, remarks=remarks)
            )
    return entries


def write_filtered(dataset: StoredDataset, rows: Rows, manifest: Manifest, folder: Path) -> list[ShardEntry]:
    """Write some of a dataset's rows, by their ascending numbers, as they are (FORMAT.md, "Filtered datasets").

    ``manifest`` is the new dataset's. Shards keep their numbers; the rows that are not chosen are added to a shard's
    skipped source rows, and shards without rows are left out. Otherwise as ``write_derived``.
    """
    entries: list[ShardEntry] = []
    with _new_dataset(manifest, folder, len(rows), entries, dataset.is_finished) as (building, bar):
        chosen = dataset.chosen_rows(rows)
        for number, wanted in _by_shard(dataset, rows):
            kept = []
            for _, row in itertools.islice(chosen, wanted):
                kept.append(row)
                bar.update()
            indices, notes = {row["source_index"] for row in kept}, dataset.shard_notes(number)
            entries.append(
                write_shard(
                    building,
                    manifest,
                    dataset.shards[number].shard,
                    kept,
                    _skipped(dataset, number, indices, notes.skipped),
                    turns_left_out=sum(_turns_left_out(row, manifest) for row in kept),
                    remarks=[entry for entry in notes.remarks if entry["row"] in indices],
                )
            )
    return entries


def _by_shard(dataset: StoredDataset, rows: Rows) -> Iterator[tuple[int, int]]:
    """Indices of the shards that have any of these rows, and how many each has."""
    ends = np.cumsum([shard.num_rows for shard in dataset.shards])
    numbers, counts = np.unique(np.searchsorted(ends, np.asarray(rows), side="right"), return_counts=True)
    return zip(numbers.tolist(), counts.tolist(), strict=True)


def _skipped(dataset: StoredDataset, number: int, kept: set[int], skipped: list[dict]) -> list[dict]:
    """The source rows of a shard that are not ``kept``, each with the reason; ``skipped`` are those of the origin."""
    stored = ColumnReader(dataset).shard(number, ["source_index"])["source_index"].to_pylist()
    left_out = [{"row": row, "reason": NOT_CHOSEN} for row in stored if row not in kept]
    return sorted([*skipped, *left_out], key=lambda entry: entry["row"])


def _turns_left_out(row: dict, manifest: Manifest) -> int:
    """How many of the assistant's turns in a stored row are marked not to be trained on; 0 with ``all_turns``."""
    if manifest.all_turns:
        return 0
    return sum(is_left_out(message) for message in from_stored(row["messages"]) if message["role"] == "assistant")


@contextmanager
def _new_dataset(
    manifest: Manifest, folder: Path, num_rows: int, entries: list[ShardEntry], is_finished: bool
) -> Iterator[tuple[Path, tqdm]]:
    """Gives a hidden folder for the shards and a bar over ``num_rows``; list and card are written at the end."""
    with folder_written_whole(folder) as building:
        write_text(building / EXTRACTION_FILE, manifest.text)
        with tqdm(total=num_rows, unit=" conversations", leave=False, delay=1) as bar:
            yield building, bar
        with room_or_stop(building):
            write_text(building / SHARDS_FILE, shards_text(entries, is_finished))
            write_text(building / CARD_FILE, render_card(manifest, entries, is_finished=is_finished))
