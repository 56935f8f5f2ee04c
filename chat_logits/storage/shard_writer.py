"""One run's shards into one folder, until its disk is full."""

from collections.abc import Callable
from pathlib import Path

from chat_logits.storage.disk import make_room_or_stop
from chat_logits.storage.fingerprint import run_fingerprint
from chat_logits.storage.shard import ShardEntry, write_shard


class ShardWriter:
    """Writes shards of the run of an ``extraction.json``; ``largest`` is the size of the largest so far, in bytes.

    ``check_place`` raises where the folder is not the run's any more: asked before anything is written, and again
    before a shard gets its name.
    """

    def __init__(
        self, folder: Path, extraction: dict, largest: int = 0, check_place: Callable[[], None] = lambda: None
    ):
        self.folder, self.extraction, self._check_place = folder, extraction, check_place
        self.fingerprint = run_fingerprint(extraction)
        self._largest = largest

    def write(self, shard: int, rows: list[dict], skipped: list[dict]) -> ShardEntry:
        """Write one finished shard. Raises DiskFull where there is no room for one like those before."""
        first = shard * self.extraction["rows_per_shard"]
        described = {
            "fingerprint": self.fingerprint,
            "first_row": first,
            "end_row": first + len(rows) + len(skipped),
            "skipped": skipped,
        }
        with make_room_or_stop(self.folder, self._largest):
            split = self.extraction["split"]
            entry = write_shard(self.folder, split, shard, rows, described, self._check_place)
        self._largest = max(self._largest, entry.num_bytes)
        return entry
