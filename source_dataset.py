"""The chat dataset to extract from: a Hub id, a folder, or one file, opened at a revision that can be recorded."""

from dataclasses import dataclass
from pathlib import Path

from content_hash import hash_files
from errors import ToolkitError, UsageError
from hub_access import explain_hub_error, resolve_commit

FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass(frozen=True)
class SourceDataset:
    """``rows`` is a ``datasets.Dataset``; ``revision`` a Hub commit, or a hash of the local files' contents."""

    rows: object
    revision: str


def open_source(
    dataset_id: str, config: str | None = None, revision: str | None = None, split: str = "train"
) -> SourceDataset:
    """Open one split. Raises UsageError for wrong names and ToolkitError where the Hub refuses."""
    if "[" in split:
        raise UsageError(f"--split {split}: give the split's name alone, and --max_samples for its first rows")
    path = Path(dataset_id)
    if path.exists():
        rows = _load(_local_arguments(path, config, split), dataset_id, split)
        return _not_empty(SourceDataset(rows, hash_files(path)), dataset_id, split)
    if path.suffix in FILE_FORMATS:
        raise UsageError(f"--dataset_id {dataset_id}: no such file")
    commit = resolve_commit(dataset_id, "dataset", revision)
    arguments = {"path": dataset_id, "name": config, "revision": commit}
    return _not_empty(SourceDataset(_load(arguments, dataset_id, split), commit), dataset_id, split)


def _local_arguments(path: Path, config: str | None, split: str) -> dict:
    if path.is_dir():
        return {"path": str(path), "name": config}
    if path.suffix not in FILE_FORMATS:
        raise UsageError(f"--dataset_id {path}: expected a file ending in {', '.join(FILE_FORMATS)}, or a folder")
    return {"path": FILE_FORMATS[path.suffix], "data_files": {split: str(path)}}


def _load(arguments: dict, dataset_id: str, split: str):
    import datasets

    what = f"--dataset_id {dataset_id}, --split {split}"
    try:
        return datasets.load_dataset(**arguments, split=split)
    except StopIteration as error:  # what an empty file of JSON lines ends in
        raise UsageError(f"{what}: no rows") from error
    except datasets.exceptions.DatasetNotFoundError as error:  # the repository was found, so its files are held back
        raise ToolkitError(
            f"dataset {dataset_id}: gated. Ask for access on its page, then set HF_TOKEN to a token that has it."
        ) from error
    except datasets.exceptions.DatasetGenerationError as error:
        raise UsageError(f"{what}: {error.__cause__ or error}") from error
    except (ValueError, OSError) as error:
        raise explain_hub_error(error, what, UsageError) from error


def _not_empty(source: SourceDataset, dataset_id: str, split: str) -> SourceDataset:
    if len(source.rows) == 0:
        raise UsageError(f"--dataset_id {dataset_id}, --split {split}: no rows")
    return source
