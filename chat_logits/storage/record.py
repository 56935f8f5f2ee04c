"""A record of finished shards that were complete when last seen, so that resuming a run need not read them."""

import json
import zlib
from pathlib import Path

from chat_logits.errors import ToolkitError
from chat_logits.storage.json_files import canonical, read_json
from chat_logits.storage.shard_list import ShardEntry

RECORD = ".checked.json"


class ShardRecord:
    """The finished shards of the run ``fingerprint`` in ``folder``, so that resuming it need not read them again.

    A shard's record is used if its file still has the size and modification time that it was recorded with.
    """

    def __init__(self, folder: Path, fingerprint: str):
        self.folder, self.fingerprint = folder, fingerprint
        self._known: dict[str, tuple[int, ShardEntry]] = {}

    def load(self) -> None:
        """Load the record of an earlier process; a damaged one, or one of another run, is ignored."""
        path = self.folder / RECORD
        try:
            content = read_json(path, RECORD) if path.is_file() else {}
        except ToolkitError:
            return
        crc = content.pop("crc32", None)
        if content.get("fingerprint") == self.fingerprint and crc == zlib.crc32(canonical(content)):
            entries = [(changed, ShardEntry(**entry)) for changed, entry in content["shards"]]
            self._known = {entry.path: (changed, entry) for changed, entry in entries}

    def note(self, entry: ShardEntry) -> None:
        """Record a shard that is complete now."""
        changed, size = self._state(entry.path)
        if changed and size == entry.num_bytes:
            self._known[entry.path] = (changed, entry)

    def unchanged(self, path: str) -> ShardEntry | None:
        """The entry of a shard whose file has not changed since it was recorded, else None."""
        changed, entry = self._known.get(path, (None, None))
        return entry if entry and self._state(path) == (changed, entry.num_bytes) else None

    def text(self) -> str:
        """The content of the record's file."""
        shards = [[changed, entry.as_json()] for changed, entry in self._known.values()]
        content = {"fingerprint": self.fingerprint, "shards": shards}
        return json.dumps({**content, "crc32": zlib.crc32(canonical(content))}, ensure_ascii=False)

    def _state(self, path: str) -> tuple[int, int]:
        """Modification time (ns) and size of a file, zeros if it is not visible (yet)."""
        try:
            state = (self.folder / path).stat()
        except OSError:
            return 0, 0
        return state.st_mtime_ns, state.st_size
