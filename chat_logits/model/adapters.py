"""Adapters: a folder or repository with an ``adapter_config.json`` changes a base model; peft merges it in."""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

from chat_logits.errors import ToolkitError, UsageError, first_names
from chat_logits.hub_errors import explain_loading

NO_ADAPTER = {"adapter_kwargs": {"subfolder": ".none"}}  # so that transformers does not load the adapter unmerged


@dataclass(frozen=True)
class Base:
    """The model that an adapter changes: a folder, or a Hub id at ``revision`` (None: its main branch)."""

    model_id: str
    revision: str | None


def find_base(model_id: str, revision: str | None = None, gguf_file: str | None = None) -> Base | None:
    """The base model of an adapter, None for a model that is not an adapter.

    As in transformers, a local folder that holds a model's own ``config.json`` next to the adapter is its base. Raises
    UsageError for an adapter that cannot be merged as it is given, ToolkitError if it names no base or peft is
    missing.
    """
    config = _adapter_config(model_id, revision)
    if config is None:
        return None
    base = config.get("base_model_name_or_path")
    if gguf_file:
        raise UsageError(f"model {model_id}: an adapter (adapter_config.json), which goes into no GGUF file; merge it.")
    if importlib.util.find_spec("peft") is None:
        raise ToolkitError(
            f"model {model_id}: an adapter (adapter_config.json) on {base}, which peft merges, and peft is not "
            "installed: pip install 'peft>=0.21', or save a merged model and give that."
        )
    if (Path(model_id) / "config.json").is_file():
        return Base(model_id, None)
    if not isinstance(base, str) or base == model_id:
        raise ToolkitError(f"model {model_id}: its adapter_config.json names no base model (base_model_name_or_path)")
    return Base(base, config.get("revision"))


def _adapter_config(model_id: str, revision: str | None) -> dict | None:
    """The contents of the model's ``adapter_config.json``, None without one. Raises ToolkitError if the file is
    damaged or the model does not exist."""
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        file = find_adapter_config_file(model_id, revision=revision)
    except Exception as error:
        raise explain_loading(error, f"model {model_id}") from error
    if file is None:
        return None
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ToolkitError(f"model {model_id}: its adapter_config.json cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ToolkitError(f"model {model_id}: its adapter_config.json is not a JSON object")
    return config


def merge(model, model_id: str, revision: str | None):
    """The base ``model`` with the adapter of ``model_id`` merged into its weights.

    Raises ToolkitError for adapters that are incomplete, do not fit the model, or cannot be merged into its weights.
    """
    import peft

    name = f"model {model_id}: its adapter"
    try:
        there = set(peft.utils.load_peft_weights(model_id, device="cpu", revision=revision))
        adapted = peft.PeftModel.from_pretrained(model, model_id, revision=revision, torch_device="cpu")
        wanted = set(peft.get_peft_model_state_dict(adapted))
    except Exception as error:
        raise explain_loading(error, name) from error
    if wanted != there:
        lacks = f"{len(wanted - there)} tensors are missing ({first_names(sorted(wanted - there))})"
        others = f"{len(there - wanted)} are of another model ({first_names(sorted(there - wanted))})"
        raise ToolkitError(f"{name} does not fit its base: {lacks if wanted - there else others}")
    if not hasattr(adapted, "merge_and_unload"):
        kind = str(adapted.peft_config["default"].peft_type).removeprefix("PeftType.")
        raise ToolkitError(f"{name} is of the kind {kind}, which cannot be merged into the weights")
    merged = adapted.merge_and_unload(safe_merge=True)
    merged.name_or_path = model_id
    return merged
