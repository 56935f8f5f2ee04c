"""A stored logit dataset, a folder or a Hub repository at one commit, read a row at a time.

FORMAT.md, "Files", is the specification. From the Hub come ``extraction.json``, ``shards.json``, and of a shard the
footer and the one row group that has the row, or one after another where all rows are read.
"""

import json
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from chat_logits.errors import ToolkitError, UsageError
from chat_logits.hub import explain_hub_error, resolve_commit
from chat_logits.storage.fingerprint import FINGERPRINT_KEYS, canonical, run_fingerprint
from chat_logits.storage.shard import ShardEntry, read_shard_rows, shard_number, shard_sizes
from logit_codec import validate_row

FORMAT_VERSION = 1
EXTRACTION_FILE, SHARDS_FILE, CARD_FILE = "extraction.json", "shards.json", "README.md"

# What reading needs, and what it must be.
EXTRACTION_TYPES = {
    "top_k": int,
    "num_sampled": int,
    "vocab_size": int,
    "rows_per_shard": int,
    "model_id": str,
    "model_revision": str,
    "tokenizer_fingerprint": str,
    "dataset_id": str,
    "split": str,
    "chat_template": str,
    "template_kwargs": dict,
    "skipped_token_ids": list,
}


@dataclass(frozen=True)
class StoredDataset:
    """A logit dataset opened at one revision: its ``extraction.json`` and what is in each shard."""

    dataset_id: str
    revision: str | None
    extraction: dict
    shards: list[ShardEntry]

    @property
    def num_rows(self) -> int:
        return sum(shard.num_rows for shard in self.shards)

    def read_row(self, sample_index: int) -> dict:
        """Stored row ``sample_index`` (negative ones from the end), checked against FORMAT.md."""
        self.refuse_empty()
        rows = self.num_rows
        if not -rows <= sample_index < rows:
            raise UsageError(
                f"sample_index {sample_index}: {self.dataset_id} has {rows} row{'s' * (rows > 1)}, 0 to {rows - 1}"
            )
        row_number = offset = sample_index % rows
        for shard in self.shards:
            if offset < shard.num_rows:
                break
            offset -= shard.num_rows
        with self._open(shard.path) as source:
            (row,) = read_shard_rows(source, shard.path, run_fingerprint(self.extraction), shard.num_rows, offset)
        self._validate(row, row_number)
        return row

    def rows(self) -> Iterator[dict]:
        """All stored rows, in order, each checked as ``read_row`` does; one row group at a time is in memory."""
        self.refuse_empty()
        return self._rows()

    def _rows(self) -> Iterator[dict]:
        fingerprint, row_number = run_fingerprint(self.extraction), 0
        for shard in self.shards:
            with self._open(shard.path) as source:
                for row in read_shard_rows(source, shard.path, fingerprint, shard.num_rows):
                    self._validate(row, row_number)
                    yield row
                    row_number += 1

    def sizes(self) -> dict[str, int]:
        """Bytes of the shards by column, compressed, and of what is in no column (``shard_files.FOOTER``).

        From the shards' footers; nothing else of them is read.
        """
        fingerprint, total = run_fingerprint(self.extraction), Counter()
        for shard in self.shards:
            with self._open(shard.path) as source:
                total.update(shard_sizes(source, shard.path, fingerprint))
        return dict(total)

    def refuse_empty(self) -> None:
        """Raise ToolkitError where there is no row yet."""
        if not self.num_rows:
            raise ToolkitError(f"{self.dataset_id}: no rows yet; its extraction is not finished")

    def _validate(self, row: dict, row_number: int) -> None:
        sizes = {key: self.extraction[key] for key in ("top_k", "num_sampled", "vocab_size")}
        validate_row(row, **sizes, row_number=row_number)

    @contextmanager
    def _open(self, path: str):
        """The shard as a file that is there, or one on the Hub of which only what is asked for is fetched."""
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
        with _explained(self.dataset_id, path), huggingface_hub.HfFileSystem().open(remote, cache_type="none") as file:
            yield file


def open_dataset(dataset_id: str, revision: str | None = None) -> StoredDataset:
    """Open a local folder or a Hub dataset, the latter pinned to the commit that ``revision`` names now."""
    is_local = Path(dataset_id).is_dir()
    if is_local and revision is not None:
        raise UsageError(f"--revision {revision}: {dataset_id} is a local folder, which has no revisions")
    revision = None if is_local else resolve_commit(dataset_id, "dataset", revision)
    extraction = read_json(_fetch(dataset_id, EXTRACTION_FILE, revision), f"{dataset_id}: {EXTRACTION_FILE}")
    check_extraction(extraction, dataset_id)
    listing = read_json(_fetch(dataset_id, SHARDS_FILE, revision), f"{dataset_id}: {SHARDS_FILE}")
    return StoredDataset(dataset_id, revision, extraction, shard_entries(listing, f"{dataset_id}: {SHARDS_FILE}"))


def check_extraction(extraction: dict, dataset_id: str) -> None:
    """Raise ToolkitError where ``extraction.json`` is of another version, or lacks what reading or resuming needs."""
    version = extraction.get("format_version")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise ToolkitError(f"{dataset_id}: format_version {version!r}, expected {FORMAT_VERSION}")
    for key, kind in EXTRACTION_TYPES.items():
        if not isinstance(extraction.get(key), kind) or isinstance(extraction.get(key), bool):
            found = repr(extraction.get(key))[:40]
            raise ToolkitError(f"{dataset_id}: {EXTRACTION_FILE} has {key} {found}, expected {kind}")
    missing = [key for key in FINGERPRINT_KEYS if key not in extraction]
    if missing:
        raise ToolkitError(f"{dataset_id}: {EXTRACTION_FILE} has no {', '.join(missing)}")


def shard_listing(entries: list[ShardEntry]) -> dict:
    """The content of ``shards.json`` for these shards, which come in order."""
    shards = [entry.as_json() for entry in entries]
    return {"shards": shards, "crc32": zlib.crc32(canonical(shards))}


def shard_entries(listing: dict, what: str) -> list[ShardEntry]:
    """The entries of a ``shards.json``, in order. Raises ToolkitError where it is not what was written."""
    shards = listing.get("shards")
    if not isinstance(shards, list) or not all(map(_is_entry, shards)):
        raise ToolkitError(f"{what} lists no shards with path and num_rows")
    found = zlib.crc32(canonical(shards))
    if listing.get("crc32", found) != found:
        raise ToolkitError(f"{what} is damaged (checksum {str(listing['crc32'])[:40]}, expected {found})")
    return [ShardEntry(**shard) for shard in shards]


def _is_entry(shard) -> bool:
    kinds = {"path": str, "num_rows": int, "num_tokens": int, "nll": (int, float), "num_bytes": int, "skipped": dict}
    return (
        isinstance(shard, dict)
        and {"path", "num_rows"} <= shard.keys() <= kinds.keys()
        and all(isinstance(value, kinds[key]) and not isinstance(value, bool) for key, value in shard.items())
        and shard_number(shard["path"]) is not None
        and shard["num_rows"] >= 0
        and all(isinstance(count, int) for count in shard.get("skipped", {}).values())
    )


def read_json(path: Path, what: str) -> dict:
    """The JSON object in a file. Raises ToolkitError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ToolkitError(f"{what} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ToolkitError(f"{what} holds no JSON object")
    return content


def _fetch(dataset_id: str, name: str, revision: str | None) -> Path:
    """A small file on this machine, fetched from the Hub if need be."""
    if revision is None:
        return _local_file(dataset_id, name)
    import huggingface_hub

    with _explained(dataset_id, name):
        return Path(huggingface_hub.hf_hub_download(dataset_id, name, repo_type="dataset", revision=revision))


def _local_file(dataset_id: str, name: str) -> Path:
    path = Path(dataset_id) / name
    if not path.is_file():
        raise _missing(dataset_id, name)
    return path


def _missing(dataset_id: str, name: str) -> ToolkitError:
    what = "so it is no logit dataset" if name == EXTRACTION_FILE else "so it is not whole"
    return ToolkitError(f"{dataset_id}: no {name} in it, {what}")


@contextmanager
def _explained(dataset_id: str, name: str):
    """What the Hub's clients raise, in words."""
    import huggingface_hub

    try:
        yield
    except ToolkitError:
        raise
    except (huggingface_hub.errors.EntryNotFoundError, FileNotFoundError) as error:
        raise _missing(dataset_id, name) from error
    except Exception as error:
        raise explain_hub_error(error, f"dataset {dataset_id}") from error
