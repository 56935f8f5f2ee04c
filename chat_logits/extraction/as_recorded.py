"""The options of a resumed run: those not given are taken from the record of the run, and logged.

Options that were given are compared with the record elsewhere; a different value is refused by name.
"""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from chat_logits.data.columns import choose_columns
from chat_logits.data.tokenizer import skipped_token_ids
from chat_logits.errors import UsageError
from chat_logits.extraction.config import MANY_ROWS, USUAL_ROWS, ExtractConfig
from chat_logits.hub import is_commit
from chat_logits.model.quantization import option_of
from chat_logits.storage.manifest import Manifest, RunInputs

logger = logging.getLogger(__name__)

# Options that are recorded as they are.
SAME = (
    "top_k",
    "top_p",
    "num_sampled",
    "seed",
    "max_samples",
    "system_prompt",
    "template_kwargs",
    "all_turns",
    "keep_end_of_turn",
)
# Options that only apply to the recorded dataset or model.
OF_DATASET, OF_MODEL = ["dataset_config", "split"], ["gguf_file", "quantization"]
COLUMNS = ("messages", "prompt", "response", "tools")
BY_OPTION = "chat_template"  # in the recorded mask source if the template was given by option
SHOWN = 60  # characters of a value in the log


def as_recorded(config: ExtractConfig, recorded: RunInputs) -> ExtractConfig:
    """The config with options that were not given taken from the record, as far as possible before anything is opened:
    numbers and names, a given template, Hub revisions, dtype, attention, the number of processes of a model."""
    names = [*SAME, *OF_DATASET * (recorded.dataset_id == config.dataset_id)]
    names += OF_MODEL * (recorded.model_id == config.model_id)
    taken = {name: _recorded_value(recorded, name) for name in names if name not in config.given}
    if config.chat_template is None and BY_OPTION in (recorded.mask_source or "") and recorded.tools_template is None:
        taken["chat_template"] = recorded.chat_template
    if isinstance(recorded, Manifest):
        taken |= _of_the_run(config, recorded)
    config = _taking(config, taken)
    return replace(config, **_revisions(config, recorded), **_chosen_with_the_model(config, recorded))


def _of_the_run(config: ExtractConfig, recorded: Manifest) -> dict[str, Any]:
    """Options that are only recorded once a model is loaded. If `rows_per_shard` was a default, nothing is logged."""
    taken: dict[str, Any] = {}
    if recorded.tensor_parallel and not _forbids_parts(config):
        taken["tensor_parallel"] = recorded.tensor_parallel
    if config.rows_per_shard is None and recorded.rows_per_shard not in (USUAL_ROWS, MANY_ROWS):
        taken["rows_per_shard"] = recorded.rows_per_shard
    return taken


def _forbids_parts(config: ExtractConfig) -> bool:
    """Whether the config says how the model is computed, in a way that excludes the recorded ``tensor_parallel``."""
    is_elsewhere = config.device_map or config.gguf_file or config.quantization or config.device not in (None, "cpu")
    return "tensor_parallel" in config.given or bool(is_elsewhere)


def _recorded_value(recorded: RunInputs, name: str) -> Any:
    value = getattr(recorded, name)
    if name == "quantization":
        return option_of(value)
    return bool(value) if name == "keep_end_of_turn" else value


def _revisions(config: ExtractConfig, recorded: RunInputs) -> dict[str, Any]:
    filled = {}
    for kind in ("model", "dataset"):
        source, revision = getattr(config, f"{kind}_id"), getattr(recorded, f"{kind}_revision")
        if getattr(recorded, f"{kind}_id") == source and is_commit(revision) and not Path(source).exists():
            filled[f"{kind}_revision"] = getattr(config, f"{kind}_revision") or revision
    return filled


def _chosen_with_the_model(config: ExtractConfig, recorded: RunInputs) -> dict[str, Any]:
    """Values that model and device determine if no option does."""
    if not isinstance(recorded, Manifest):
        return {}
    head = "float32" if recorded.head_dtype == "float32" else "model"
    return {
        "dtype": recorded.dtype if config.dtype == "auto" else config.dtype,
        "head_dtype": config.head_dtype or head,
        "rows_per_shard": config.rows_per_shard or recorded.rows_per_shard,
        "attn_implementation": config.attn_implementation or recorded.attn_implementation,
    }


def opened_as_recorded(
    config: ExtractConfig, recorded: RunInputs, positions: int | None, tokenizer: Any
) -> ExtractConfig:
    """The config with the options that depend on model and tokenizer, taken from the record if they were not given: the
    length, the tokens not to extract, a template if the tokenizer has none.

    ``positions`` is the most tokens that the model reads.
    """
    taken: dict[str, Any] = {}
    if config.max_length is None and recorded.max_length != positions:
        taken["max_length"] = recorded.max_length
    usual, ids = skipped_token_ids(tokenizer), set(recorded.skipped_token_ids)
    if not (config.skip_tokens or config.keep_tokens) and ids != usual:
        taken["skip_tokens"] = tuple(tokenizer.convert_ids_to_tokens(sorted(ids - usual)))
        taken["keep_tokens"] = tuple(tokenizer.convert_ids_to_tokens(sorted(usual - ids)))
    if config.chat_template is None and not getattr(tokenizer, "chat_template", None):
        taken["chat_template"] = recorded.chat_template
    return _taking(config, taken)


def recorded_columns(config: ExtractConfig, recorded: RunInputs) -> dict[str, Any]:
    """The options that name the recorded columns, if the config names no column; empty for another dataset."""
    is_open = all(getattr(config, f"{kind}_column") is None for kind in COLUMNS)
    if recorded.dataset_id != config.dataset_id or not is_open:
        return {}
    named = {f"{kind}_column": recorded.columns[kind] for kind in COLUMNS if kind in recorded.columns}
    return {"tools_column": "", **named}


def read_as_recorded(config: ExtractConfig, recorded: RunInputs, names: list[str], template: str) -> ExtractConfig:
    """The config with the options that depend on the source, taken from the record if they were not given: columns, if
    others would be chosen from all ``names``, and the template, if the chosen one is not the recorded one."""
    taken: dict[str, Any] = recorded_columns(config, recorded)
    try:
        if choose_columns(names) == recorded.columns:
            taken = {}
    except UsageError:  # the columns cannot be chosen by their names
        pass
    is_own = recorded.model_id == config.model_id and recorded.tools_template is None
    if config.chat_template is None and is_own and template != recorded.chat_template:
        taken["chat_template"] = recorded.chat_template
    return _taking(config, taken)


def _taking(config: ExtractConfig, taken: dict[str, Any]) -> ExtractConfig:
    """The config with these values. Values that differ from the config's are logged."""
    changed = {name: value for name, value in taken.items() if value != getattr(config, name)}
    if changed:
        texts = (f"`{name}` {_short(value)}" for name, value in changed.items())
        logger.info("Options not given, taken from the resumed run: %s", ", ".join(texts))
    return replace(config, **taken)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    line = " ".join(text.split())
    return f"{line[:SHOWN]}…" if len(line) > SHOWN else line
