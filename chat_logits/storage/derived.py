"""A dataset that is made from another, shard by shard: a whole new folder, or none."""

from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from chat_logits.storage.card import render_card
from chat_logits.storage.dataset import StoredDataset
from chat_logits.storage.disk import folder_written_whole, room_or_stop, write_text
from chat_logits.storage.manifest import CARD_FILE, EXTRACTION_FILE, Manifest
from chat_logits.storage.shard import write_shard
from chat_logits.storage.shard_list import SHARDS_FILE, ShardEntry, shards_text


def write_derived(
    dataset: StoredDataset, manifest: Manifest, folder: Path, change: Callable[[dict], dict]
) -> list[ShardEntry]:
    """Write what ``change`` makes of each row of a dataset, with the shards, skipped rows and turns that it has.

    ``manifest`` is the new dataset's. The folder, new or empty, gets its name once all of it is written. One shard at a
    time is in memory. Raises ToolkitError where it cannot be written, and what reading raises.
    """
    entries = []
    with folder_written_whole(folder) as building:
        write_text(building / EXTRACTION_FILE, manifest.text)
        with tqdm(total=dataset.num_rows, unit=" conversations", leave=False, delay=1) as bar:
            for number, shard in enumerate(dataset.shards):
                rows = []
                for row in dataset.shard_rows(number):
                    rows.append(change(row))
                    bar.update()
                skipped, left_out = dataset.shard_notes(number)
                entries.append(write_shard(building, manifest, shard.shard, rows, skipped, turns_left_out=left_out))
        with room_or_stop(building):
            write_text(building / SHARDS_FILE, shards_text(entries))
            write_text(building / CARD_FILE, render_card(manifest, entries))
    return entries
