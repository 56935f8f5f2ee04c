"""What is known of a folder's finished shards, so that a run that goes on need not read all of them again.

A shard is taken as recorded where the file has still the size and the time of change that it was written with.
"""

import json
import zlib
from pathlib import Path

from chat_logits.errors import ToolkitError
from chat_logits.storage.manifest import ShardEntry, canonical, read_json

RECORD = ".checked.json"


class ShardRecord:
    """The shards of the run ``fingerprint`` in ``folder`` that were written or checked, with their times of change."""

    def __init__(self, folder: Path, fingerprint: str):
        self.folder, self.fingerprint = folder, fingerprint
        self._known: dict[str, tuple[int, ShardEntry]] = {}

    def load(self) -> None:
        """Take up what an earlier process has left; nothing where that is damaged or about another run."""
        path = self.folder / RECORD
        try:
            content = read_json(path, RECORD) if path.exists() else {}
        except ToolkitError:
            return
        crc = content.pop("crc32", None)
        if content.get("fingerprint") == self.fingerprint and crc == zlib.crc32(canonical(content)):
            entries = [(changed, ShardEntry(**entry)) for changed, entry in content["shards"]]
            self._known = {entry.path: (changed, entry) for changed, entry in entries}

    def note(self, entry: ShardEntry) -> None:
        """Remember a shard that is whole now."""
        found = self._state(entry.path)
        if found and found[1] == entry.num_bytes:
            self._known[entry.path] = (found[0], entry)

    def unchanged(self, path: str) -> ShardEntry | None:
        """The entry of a shard that is as it was when it was noted, else None."""
        changed, entry = self._known.get(path, (None, None))
        return entry if entry and self._state(path) == (changed, entry.num_bytes) else None

    def text(self) -> str:
        """The record's file."""
        shards = [[changed, entry.as_json()] for changed, entry in self._known.values()]
        content = {"fingerprint": self.fingerprint, "shards": shards}
        return json.dumps({**content, "crc32": zlib.crc32(canonical(content))}, ensure_ascii=False)

    def _state(self, path: str) -> tuple[int, int] | None:
        """Time of change (ns) and size of a file, None where it is not seen (yet)."""
        try:
            found = (self.folder / path).stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size
