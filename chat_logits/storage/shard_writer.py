"""One run's shards into one folder, until its disk is full."""

from collections.abc import Callable
from pathlib import Path

from chat_logits.storage.disk import make_room_or_stop
from chat_logits.storage.manifest import Manifest, ShardEntry
from chat_logits.storage.shard import write_shard


class ShardWriter:
    """Writes shards of the run of a manifest; ``largest`` is the size of the largest so far, in bytes.

    ``check_place`` raises where the folder is not the run's any more: asked before anything is written, and again
    before a shard gets its name.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, largest: int = 0, check_place: Callable[[], None] = lambda: None
    ):
        self.folder, self.manifest, self._check_place = folder, manifest, check_place
        self._largest = largest

    def write(self, shard: int, rows: list[dict], skipped: list[dict]) -> ShardEntry:
        """Write one finished shard. Raises DiskFull where there is no room for one like those before."""
        first = shard * self.manifest.rows_per_shard
        described = {
            "fingerprint": self.manifest.fingerprint,
            "first_row": first,
            "end_row": first + len(rows) + len(skipped),
            "skipped": skipped,
        }
        with make_room_or_stop(self.folder, self._largest):
            entry = write_shard(self.folder, self.manifest.split, shard, rows, described, self._check_place)
        self._largest = max(self._largest, entry.num_bytes)
        return entry
