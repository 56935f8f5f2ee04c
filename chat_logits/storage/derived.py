"""A dataset that is made from another, shard by shard: a whole new folder, or none."""

import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from chat_logits.errors import ToolkitError, UsageError
from chat_logits.storage.card import render_card
from chat_logits.storage.dataset import StoredDataset
from chat_logits.storage.disk import DiskFull, room_or_stop, write_text
from chat_logits.storage.manifest import (
    CARD_FILE,
    EXTRACTION_FILE,
    SHARDS_FILE,
    Manifest,
    ShardEntry,
    shards_text,
)
from chat_logits.storage.shard import write_shard


def refuse_taken(folder: Path, option: str) -> None:
    """Raise UsageError, naming the option that it is the value of, unless the folder is empty or not there."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"`{option}` {folder}: a file, expected a new or an empty folder")
    present = next(folder.iterdir(), None) if folder.is_dir() else None
    if present:
        raise UsageError(f"`{option}` {folder}: holds files, such as {present.name}; expected a new or an empty folder")


def write_derived(
    dataset: StoredDataset, manifest: Manifest, folder: Path, change: Callable[[dict], dict]
) -> list[ShardEntry]:
    """Write what ``change`` makes of each row of a dataset, with the shards, skipped rows and turns that it has.

    ``manifest`` is the new dataset's. The folder, new or empty, gets its name once all of it is written. One shard at a
    time is in memory. Raises ToolkitError where it cannot be written, and what reading raises.
    """
    entries = []
    with _whole_folder(folder) as building:
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


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """Within, a hidden folder beside it, which then gets its name; where that fails, it is removed."""
    building = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        building.mkdir(parents=True)
        yield building
        if folder.is_dir():
            folder.rmdir()
        building.rename(folder)
    except DiskFull as error:
        raise ToolkitError(f"{folder}: no room for it. Free some, or name a folder on another disk.") from error
    except OSError as error:
        raise ToolkitError(f"{folder}: it cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
