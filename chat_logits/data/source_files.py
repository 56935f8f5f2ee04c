"""Files and folders as datasets: their formats, the arguments for ``load_dataset``, and the files that it ignores."""

import glob
import logging
import os
from pathlib import Path

from chat_logits.errors import UsageError, first_names

FILE_FORMATS = {
    **{kind + packed: "json" for kind in (".json", ".jsonl") for packed in ("", ".gz", ".zst")},
    **{".csv" + packed: "csv" for packed in ("", ".gz", ".zst")},
    ".parquet": "parquet",
}
SAVED_SPLITS, SAVED_TABLE = "dataset_dict.json", "state.json"  # files that ``save_to_disk`` writes
CARD, DATASETS_OWN = "README.md", "dataset_infos.json"

logger = logging.getLogger(__name__)


def saved_table(folder: Path, split: str):
    """One split of what ``save_to_disk`` has written. Raises UsageError, which lists the splits, if it is missing."""
    import datasets

    saved = datasets.load_from_disk(str(folder))
    tables = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    if split not in tables:
        raise UsageError(
            f"`split` {split}: the saved dataset {folder} has none of that name, but: {', '.join(map(str, tables))}"
        )
    return tables[split]


def file_format(path: Path) -> str | None:
    """The name that ``datasets`` has for the format of a file with this name, None for one that is not supported."""
    endings = [ending for ending in FILE_FORMATS if path.name.endswith(ending)]
    return FILE_FORMATS[max(endings, key=len)] if endings else None


def local_arguments(path: Path, config: str | None, content: str) -> dict:
    """``load_dataset``'s arguments, with a separate cache for this content: otherwise ``datasets`` might use its cache
    of an earlier state of the folder, or of another folder with the same name. A file is the split train."""
    import datasets

    cache = {"cache_dir": str(Path(datasets.config.HF_DATASETS_CACHE) / f"content-{content[:16]}")}
    if path.is_dir():
        if _is_saved(path):
            return {"saved": path}
        if within := [folder.name for folder in sorted(path.iterdir()) if _is_saved(folder)]:
            raise UsageError(
                f"`dataset_id` {path}: it holds datasets of save_to_disk, which are not read together: "
                f"{first_names(within)}. Give one of these folders."
            )
        if glob.has_magic(folder := os.path.normpath(path.absolute())) or "::" in folder:
            raise UsageError(
                f"`dataset_id` {path}: a folder with one of * ? [ :: in its path, by which `datasets` would look for "
                "others; give one of its files, or rename it"
            )
        return {"path": folder, "name": config, **cache}
    kind = file_format(path)
    if kind is None:
        raise UsageError(f"`dataset_id` {path}: expected a file ending in {', '.join(FILE_FORMATS)}, or a folder")
    return {"path": kind, "data_files": {"train": glob.escape(os.path.normpath(path.absolute()))}, **cache}


def refuse_another_file(path: str, builder) -> None:
    """Raise UsageError if ``datasets`` has found anything other than the file with this escaped path."""
    found = [str(file) for files in builder.config.data_files.values() for file in files]
    if [glob.escape(file) for file in found] != [path]:
        raise UsageError(f"`datasets` takes the name of this file for {first_names(found)}; rename it")


def tell_of_files_left_out(folder: Path, builder) -> None:
    """Log the data files that ``datasets`` puts into no split: those of the less frequent formats, and, if some files
    are named like splits, all others. If the card lists the files, nothing is logged, as its owner has chosen them."""
    card = folder / CARD
    if card.is_file() and "configs:" in card.read_text(encoding="utf-8", errors="replace"):
        return
    read = {Path(file).resolve() for files in builder.config.data_files.values() for file in files}
    visible = (path for path in sorted(folder.rglob("*")) if not any(map(_is_hidden, path.relative_to(folder).parts)))
    data = (path for path in visible if path.is_file() and file_format(path) and path.name != DATASETS_OWN)
    if left_out := [str(path.relative_to(folder)) for path in data if path.resolve() not in read]:
        splits = ", ".join(map(str, builder.config.data_files))
        told = "Not read of %s, as `datasets` puts them into none of its splits (%s): %s. Name one, or move them."
        logger.warning(told, folder, splits, first_names(left_out))


def _is_hidden(name: str) -> bool:
    """Whether ``datasets`` ignores a file or folder with this name."""
    return name.startswith((".", "_"))


def _is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote this folder."""
    return any((folder / name).is_file() for name in (SAVED_SPLITS, SAVED_TABLE))
