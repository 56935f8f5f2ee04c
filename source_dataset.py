"""The chat dataset to extract from: a Hub id, a folder, or one file, opened at a revision that can be recorded."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from content_hash import hash_files
from errors import ToolkitError, UsageError
from hub_access import explain_hub_error, resolve_commit

SPLIT_NAME = re.compile(r"\w+(\.\w+)*")
FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass
class SourceDataset:
    """One split of a dataset.

    ``rows`` is a ``datasets`` Dataset or, streamed, an IterableDataset; ``revision`` a Hub commit, or a hash of the
    local files' contents; ``num_rows`` is None for a stream whose length is recorded nowhere.
    """

    rows: object
    revision: str
    num_rows: int | None
    column_names: list[str]
    _stream: Iterator[dict] | None = None
    _next_row: int = 0

    def read(self, first: int, end: int) -> list[dict]:
        """Rows ``first`` up to ``end``, fewer at the end of the split. A stream is best read in order."""
        if self.num_rows is not None:
            end = min(end, self.num_rows)
        if first >= end:
            return []
        if hasattr(self.rows, "select"):
            return list(self.rows.select(range(first, end)))
        if self._stream is None or first != self._next_row:
            self._stream = iter(self.rows.skip(first))
        found = list(islice(self._stream, end - first))
        self._next_row = first + len(found)
        return found


def open_source(
    dataset_id: str,
    config: str | None = None,
    revision: str | None = None,
    split: str = "train",
    streaming: bool = False,
) -> SourceDataset:
    """Open one split. Raises UsageError for wrong names and ToolkitError where the Hub refuses."""
    if not SPLIT_NAME.fullmatch(split):
        raise UsageError(f"--split {split}: expected a split's name alone; --max_samples N reads its first N rows")
    what = f"--dataset_id {dataset_id}, --split {split}"
    path = Path(dataset_id)
    if path.exists():
        if revision or (config and path.is_file()):
            raise UsageError(f"--dataset_id {dataset_id}: local, so it has no --dataset_revision or --dataset_config")
        commit = hash_files(path)
        arguments = _local_arguments(path, config, split, commit)
    elif path.suffix in FILE_FORMATS:
        raise UsageError(f"--dataset_id {dataset_id}: no such file")
    else:
        commit = resolve_commit(dataset_id, "dataset", revision)
        arguments = {"path": dataset_id, "name": config, "revision": commit}
    with explained(dataset_id, what):
        rows = _load(arguments, split, streaming)
        first = next(iter(rows))  # no first row: StopIteration, as for an empty file
    num_rows = _recorded_length(rows, split) if streaming else len(rows)
    return SourceDataset(rows, commit, num_rows, list(first))


def _recorded_length(stream, split: str) -> int | None:
    splits = stream.info.splits
    return splits[split].num_examples or None if splits and split in splits else None


def _local_arguments(path: Path, config: str | None, split: str, content: str) -> dict:
    """``load_dataset``'s arguments, with a cache of this content's own: it may take a folder that has changed since,
    or another of the same name, for the one it has cached."""
    import datasets

    cache = {"cache_dir": str(Path(datasets.config.HF_DATASETS_CACHE) / f"content-{content[:16]}")}
    if path.is_dir():
        return {"path": str(path), "name": config, **cache}
    if path.suffix not in FILE_FORMATS:
        raise UsageError(f"--dataset_id {path}: expected a file ending in {', '.join(FILE_FORMATS)}, or a folder")
    return {"path": FILE_FORMATS[path.suffix], "data_files": {split: str(path)}, **cache}


def _load(arguments: dict, split: str, streaming: bool):
    import datasets

    return datasets.load_dataset(**arguments, split=split, streaming=streaming)


@contextmanager
def explained(dataset_id: str, what: str) -> Iterator[None]:
    """What ``datasets`` raises, as errors that say what to do."""
    import datasets

    try:
        yield
    except StopIteration as error:
        raise UsageError(f"{what}: no rows") from error
    except datasets.exceptions.DatasetNotFoundError as error:  # the repository was found, so its files are held back
        raise ToolkitError(
            f"dataset {dataset_id}: gated. Ask for access on its page, then set HF_TOKEN to a token that has it."
        ) from error
    except datasets.exceptions.DatasetGenerationError as error:
        raise UsageError(f"{what}: {_shortened(error.__cause__ or error)}") from error
    except (ValueError, OSError) as error:
        if "corresponds to no data" in str(error):
            raise UsageError(f"{what}: no rows") from error
        raise explain_hub_error(error, what, UsageError) from error


def _shortened(error: BaseException) -> str:
    """The first line: some go on with whole schemas."""
    return str(error).strip().partition("\n")[0][:300]
