"""Checks of a run's local source: the run does not write into it, and it has not changed when the run ends."""

from pathlib import Path

from chat_logits.data.hashing import hash_files
from chat_logits.errors import ToolkitError, UsageError
from chat_logits.extraction.config import ExtractConfig
from chat_logits.extraction.run_description import OpenedRun
from chat_logits.paths import is_there


def refuse_within_source(config: ExtractConfig) -> None:
    """Raise UsageError if the run would write among its own source files, or set them aside."""
    source, folder = Path(config.dataset_id), config.folder.resolve()
    if not is_there(source):
        return
    source = source.resolve()
    if folder == source or source in folder.parents or (config.overwrite and folder in source.parents):
        raise UsageError(
            f"`output_dir` {config.folder}: it and `dataset_id` {config.dataset_id} lie one within the other, so the "
            "run would change its own source. Choose a folder apart from it."
        )


def refuse_changed_source(opened: OpenedRun) -> None:
    """Raise ToolkitError if local source files have changed since the run began."""
    source = Path(opened.config.dataset_id)
    if is_there(source) and hash_files(source) != opened.reader.source.revision:
        raise ToolkitError(
            f"`dataset_id` {source}: its files have changed since the run began, so rows may be missing or twice in "
            "it. Extract again, with `overwrite` or into another folder."
        )
