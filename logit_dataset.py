"""The stored dataset: Parquet shards and the files around them, written whole or not at all, read a row at a time.

FORMAT.md, "Files", is the specification.
"""

import hashlib
import json
import os
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from errors import ToolkitError, UsageError
from hub_access import explain_hub_error, resolve_commit
from logit_codec import validate_row

FORMAT_VERSION = 1
ROWS_PER_GROUP = 16
METADATA_KEY = "logit_extraction"
EXTRACTION_FILE, SHARDS_FILE, CARD_FILE = "extraction.json", "shards.json", "README.md"
REPLACED = ".replaced"
UPLOADED_FILES = ["data/*/*.parquet", EXTRACTION_FILE, SHARDS_FILE, CARD_FILE]

_ENTRIES = [
    field
    for kind in ("top", "sampled")
    for field in (
        pa.field(f"{kind}_logits_quantized", pa.binary()),
        pa.field(f"{kind}_indices_low", pa.list_(pa.uint16())),
        pa.field(f"{kind}_indices_high", pa.binary()),
    )
]
_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string()), ("extra", pa.string())])
SCHEMA = pa.schema(
    [
        *_ENTRIES,
        pa.field("logsumexp", pa.list_(pa.float32())),
        pa.field("num_tokens", pa.int32()),
        pa.field("token_log_probs", pa.list_(pa.float32())),
        pa.field("messages", pa.list_(_MESSAGE)),
        pa.field("source_index", pa.int64()),
        pa.field("alignment_checksum", pa.uint32()),
    ]
)
_SPLIT_STREAMS = ("top_indices_low", "sampled_indices_low", "logsumexp", "token_log_probs")

# What reading needs, and what it must be.
EXTRACTION_TYPES = {
    "top_k": int,
    "num_sampled": int,
    "vocab_size": int,
    "model_id": str,
    "model_revision": str,
    "tokenizer_fingerprint": str,
    "chat_template": str,
    "template_kwargs": dict,
    "skipped_token_ids": list,
}

# What decides the rows. Ids and paths don't (revisions do), nor do versions and budgets.
FINGERPRINT_KEYS = (
    "format_version",
    "top_k",
    "top_p",
    "num_sampled",
    "seed",
    "vocab_size",
    "rows_per_shard",
    "model_revision",
    "gguf_file",
    "tokenizer_fingerprint",
    "dataset_config",
    "split",
    "dataset_revision",
    "max_samples",
    "max_length",
    "columns",
    "system_prompt",
    "chat_template",
    "template_kwargs",
    "template_date",
    "skipped_token_ids",
    "dtype",
    "attn_implementation",
)


def run_fingerprint(extraction: dict) -> str:
    """SHA-256 (hex) of the canonical JSON of the keys of ``extraction.json`` that decide the rows."""
    return hashlib.sha256(_canonical({key: extraction[key] for key in FINGERPRINT_KEYS})).hexdigest()


def _canonical(value: dict) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


# --- writing ---


def check_folder(folder: Path, overwrite: bool) -> None:
    """Raise UsageError where ``folder`` cannot be written or holds other files, or a run without ``overwrite``."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UsageError(f"--output_dir {folder}: {nearest} is no folder that can be written to")
    present = [path for path in folder.glob("*") if not path.name.startswith(".")]
    if present and not (folder / EXTRACTION_FILE).is_file():
        raise UsageError(f"--output_dir {folder}: the folder holds other files, such as {present[0].name}")
    if present and not overwrite:
        shards = len(list(folder.glob("data/*/*.parquet")))
        raise UsageError(
            f"--output_dir {folder}: holds another run already ({shards} shards). "
            "Choose another folder, or replace that run with --overwrite."
        )


def set_aside(folder: Path) -> None:
    """Make the folder, and move the run that is in it to ``.replaced`` within, where nobody reads it as data.

    A run that was set aside before, by an ``--overwrite`` that never finished, is kept instead of the unfinished one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = (folder / REPLACED).exists()
    for pattern in UPLOADED_FILES:
        for path in folder.glob(pattern):
            if kept:
                path.unlink()
            else:
                target = folder / REPLACED / path.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.rename(target)


def drop_replaced(folder: Path) -> None:
    """Remove what ``set_aside`` kept, once the new run is whole."""
    shutil.rmtree(folder / REPLACED, ignore_errors=True)


def shard_path(split: str, shard: int) -> str:
    """A shard's path within the dataset, such as ``data/00000/train-00042.parquet``."""
    return f"data/{shard // 1000:05d}/{split}-{shard:05d}.parquet"


def write_shard(folder: Path, split: str, shard: int, rows: list[dict], metadata: dict) -> Path:
    """Write one shard to a hidden temporary name, flush it to the disk, rename it. Returns its path."""
    path = folder / shard_path(split, shard)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {**metadata, "num_rows": len(rows)}
    metadata["crc32"] = zlib.crc32(_canonical(metadata))
    temporary = path.with_name(f".{path.name}.tmp")
    writer = pq.ParquetWriter(
        temporary,
        SCHEMA,
        compression="zstd",
        compression_level=9,
        use_dictionary=False,
        column_encoding={f"{column}.list.element": "BYTE_STREAM_SPLIT" for column in _SPLIT_STREAMS},
        write_statistics=False,
        store_schema=False,
        write_page_checksum=True,
    )
    with writer:
        writer.add_key_value_metadata({METADATA_KEY: _canonical(metadata).decode()})
        if rows:  # an empty row group would be one that `datasets` cannot read
            writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), row_group_size=ROWS_PER_GROUP)
    _flush_and_rename(temporary, path)
    return path


def write_json(folder: Path, name: str, content: dict) -> None:
    """Write ``name`` in ``folder`` so that a reader sees the old content or the new, never half."""
    write_text(folder, name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(folder: Path, name: str, content: str) -> None:
    """As ``write_json``, for any text."""
    temporary = folder / f".{name}.tmp"
    temporary.write_text(content, encoding="utf-8")
    _flush_and_rename(temporary, folder / name)


def _flush_and_rename(temporary: Path, path: Path) -> None:
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.rename(path)


def make_repository(repo_id: str, private: bool) -> None:
    """Make the Hub dataset repository if it is missing. Raises ToolkitError where the Hub refuses or is not there."""
    import huggingface_hub

    try:
        huggingface_hub.HfApi().create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    except Exception as error:
        raise explain_hub_error(error, f"--output_repo {repo_id}") from error


def push_folder(folder: Path, repo_id: str, private: bool) -> str:
    """Upload the dataset's files to its Hub dataset repository, made if missing. Returns the commit's page."""
    import huggingface_hub

    try:
        make_repository(repo_id, private)
        commit = huggingface_hub.HfApi().upload_folder(
            repo_id=repo_id,
            repo_type="dataset",
            folder_path=folder,
            allow_patterns=UPLOADED_FILES,
            delete_patterns=["data/**"],  # of an earlier run: its rows must not be read with these
            commit_message="Add token log-probabilities",
        )
    except Exception as error:
        again = f'hf upload {repo_id} {folder} . --repo-type dataset --exclude ".*"'
        explained = explain_hub_error(error, f"--output_repo {repo_id}")
        raise ToolkitError(f"{explained}\nAll rows are in {folder}; nothing is lost. To push later: {again}") from error
    return commit.commit_url


# --- reading ---


@dataclass(frozen=True)
class StoredDataset:
    """A logit dataset opened at one revision: its ``extraction.json`` and the rows in each shard."""

    dataset_id: str
    revision: str | None
    extraction: dict
    shard_rows: list[dict]

    @property
    def num_rows(self) -> int:
        return sum(shard["num_rows"] for shard in self.shard_rows)

    def read_row(self, sample_index: int) -> dict:
        """Stored row ``sample_index`` (negative ones from the end), checked against FORMAT.md."""
        rows = self.num_rows
        if not rows:
            raise ToolkitError(f"{self.dataset_id}: no rows yet; its extraction is not finished")
        if not -rows <= sample_index < rows:
            raise UsageError(f"sample_index {sample_index}: {self.dataset_id} has {rows} rows, 0 to {rows - 1}")
        row_number = offset = sample_index % rows
        for shard in self.shard_rows:
            if offset < shard["num_rows"]:
                break
            offset -= shard["num_rows"]
        row = _read_parquet_row(_locate(self.dataset_id, shard["path"], self.revision), shard["num_rows"], offset)
        sizes = {key: self.extraction[key] for key in ("top_k", "num_sampled", "vocab_size")}
        validate_row(row, **sizes, row_number=row_number)
        return row


def open_dataset(dataset_id: str, revision: str | None = None) -> StoredDataset:
    """Open a local folder or a Hub dataset, the latter pinned to the commit that ``revision`` names now."""
    if not Path(dataset_id).is_dir():
        revision = resolve_commit(dataset_id, "dataset", revision)
    extraction = _read_json(dataset_id, EXTRACTION_FILE, revision)
    version = extraction.get("format_version")
    if version != FORMAT_VERSION:
        raise ToolkitError(f"{dataset_id}: format_version {version!r}, expected {FORMAT_VERSION}")
    for key, kind in EXTRACTION_TYPES.items():
        if not isinstance(extraction.get(key), kind) or isinstance(extraction.get(key), bool):
            found = repr(extraction.get(key))[:40]
            raise ToolkitError(f"{dataset_id}: {EXTRACTION_FILE} has {key} {found}, expected {kind}")
    shards = _read_json(dataset_id, SHARDS_FILE, revision).get("shards")
    if not isinstance(shards, list) or not all(map(_is_shard_entry, shards)):
        raise ToolkitError(f"{dataset_id}: {SHARDS_FILE} lists no shards with path and num_rows")
    return StoredDataset(dataset_id, revision, extraction, shards)


def _is_shard_entry(entry) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("path"), str)
        and isinstance(entry.get("num_rows"), int)
        and entry["num_rows"] >= 0
        and ".." not in entry["path"]
    )


def _read_json(dataset_id: str, name: str, revision: str | None) -> dict:
    path = _locate(dataset_id, name, revision)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ToolkitError(f"{dataset_id}: {name} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ToolkitError(f"{dataset_id}: {name} holds no JSON object")
    return content


def _locate(dataset_id: str, name: str, revision: str | None) -> Path:
    """The file on this machine, fetched from the Hub if need be."""
    what = "so it is no logit dataset" if name == EXTRACTION_FILE else "so it is not whole"
    missing = ToolkitError(f"{dataset_id}: no {name} in it, {what}")
    if Path(dataset_id).is_dir():
        path = Path(dataset_id) / name
        if not path.is_file():
            raise missing
        return path
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(dataset_id, name, repo_type="dataset", revision=revision))
    except huggingface_hub.errors.EntryNotFoundError as error:
        raise missing from error
    except Exception as error:
        raise explain_hub_error(error, f"dataset {dataset_id}") from error


def _read_parquet_row(path: Path, num_rows: int, offset: int) -> dict:
    """Row ``offset`` of a shard, of which only its row group is read; other writers' groups have other sizes."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            _check_schema(file.schema_arrow, path.name)
            if file.metadata.num_rows != num_rows:
                raise ToolkitError(f"{path.name}: {file.metadata.num_rows} rows, expected {num_rows} ({SHARDS_FILE})")
            for group in range(file.metadata.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if offset < size:
                    return file.read_row_group(group).slice(offset, 1).to_pylist()[0]
                offset -= size
            raise ToolkitError(f"{path.name}: damaged Parquet file: its row groups end early")
    except (pa.ArrowException, OSError) as error:
        raise ToolkitError(f"{path.name}: damaged Parquet file: {error}") from error


def _check_schema(found: pa.Schema, name: str) -> None:
    if found.names != SCHEMA.names:
        raise ToolkitError(f"{name}: columns {', '.join(found.names)}; expected {', '.join(SCHEMA.names)}")
    for column, expected in zip(found, SCHEMA, strict=True):
        if column.type != expected.type:
            raise ToolkitError(f"{name}: column {column.name} is {column.type}, expected {expected.type}")
