"""What a run is: source, template and model, as ``extraction.json`` records them; and whether two are the same."""

import argparse
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from chat_logits.data.hashing import hash_files
from chat_logits.data.reader import Reader, open_reader
from chat_logits.data.tokenizer import tokenizer_fingerprint
from chat_logits.errors import UsageError
from chat_logits.hub import find_license, is_commit, resolve_commit
from chat_logits.model.limits import input_limits, load_config
from chat_logits.storage.dataset import FORMAT_VERSION
from chat_logits.storage.fingerprint import differences

VERSIONED = ("torch", "transformers", "tokenizers", "datasets", "huggingface_hub", "numpy", "pyarrow")


@dataclass(frozen=True)
class OpenedRun:
    """What a run reads, with its options as they are carried out, and all of ``extraction.json`` but the model's part.

    ``model_commit`` is the model's Hub commit, None for a folder.
    """

    arguments: argparse.Namespace
    reader: Reader
    model_commit: str | None
    described: dict


def open_run(arguments: argparse.Namespace, recorded: dict | None = None, footers: dict | None = None) -> OpenedRun:
    """Open the source and choose the template; no model is loaded.

    What the options leave open is as it was ``recorded``, where there is a record: revisions, dtype, the date.
    ``footers`` of the source are what another process knows of it.
    """
    if recorded:
        arguments = _as_recorded(arguments, recorded)
    is_local = Path(arguments.model_id).exists()
    if is_local and arguments.model_revision:
        raise UsageError(f"--model_revision: {arguments.model_id} is a local folder, which has no revisions")
    commit = None if is_local else resolve_commit(arguments.model_id, "model", arguments.model_revision)
    config = load_config(arguments.model_id, commit, arguments.gguf_file, arguments.trust_remote_code)
    limits = input_limits(config)
    if arguments.top_k > limits.vocab_size:
        raise UsageError(f"--top_k {arguments.top_k}: the model has {limits.vocab_size} tokens, expected no more")
    reader = open_reader(arguments, commit, limits, recorded and recorded["template_date"], footers)
    print(f"Assistant tokens: {reader.choice.mask_source}", file=sys.stderr)
    return OpenedRun(arguments, reader, commit, _describe(arguments, reader, commit))


def _as_recorded(arguments: argparse.Namespace, recorded: dict) -> argparse.Namespace:
    filled = dict(vars(arguments))
    for kind in ("model", "dataset"):
        source, revision = filled[f"{kind}_id"], recorded[f"{kind}_revision"]
        if recorded[f"{kind}_id"] == source and is_commit(revision) and not Path(source).exists():
            filled[f"{kind}_revision"] = filled[f"{kind}_revision"] or revision
    if filled["dtype"] == "auto":
        filled["dtype"] = recorded["dtype"]
    filled["attn_implementation"] = filled["attn_implementation"] or recorded["attn_implementation"]
    return argparse.Namespace(**filled)


def _describe(arguments: argparse.Namespace, reader: Reader, commit: str | None) -> dict:
    options = vars(arguments)
    return {
        "format_version": FORMAT_VERSION,
        **{name: options[name] for name in ("top_k", "top_p", "num_sampled", "seed", "rows_per_shard")},
        "model_id": arguments.model_id,
        "model_revision": commit or hash_files(arguments.model_id),
        "gguf_file": arguments.gguf_file,
        "tokenizer_fingerprint": tokenizer_fingerprint(reader.aligner.tokenizer),
        **{name: options[name] for name in ("dataset_id", "dataset_config", "split")},
        "dataset_revision": reader.source.revision,
        "max_samples": arguments.max_samples,
        "max_length": reader.max_length,
        "columns": reader.columns,
        "system_prompt": reader.system_prompt,
        "chat_template": reader.choice.template.text,
        "template_kwargs": reader.choice.template.kwargs,
        "template_date": reader.choice.template.date,
        "mask_source": reader.choice.mask_source,
        "skipped_token_ids": sorted(reader.aligner.skipped_ids),
        "versions": {name: metadata.version(name) for name in VERSIONED},
    }


def describe_with_model(opened: OpenedRun, model) -> dict:
    """``extraction.json`` but for the budgets: what is needed to decode, align and repeat the run."""
    arguments = opened.arguments
    return {
        **opened.described,
        "licenses": {
            "model": find_license(arguments.model_id, "model", opened.model_commit),
            "dataset": find_license(arguments.dataset_id, "dataset", opened.reader.source.revision),
        },
        "vocab_size": model.get_output_embeddings().weight.shape[0],
        "dtype": str(model.dtype).removeprefix("torch."),
        "attn_implementation": model.config._attn_implementation,
    }


def what_differs(opened: OpenedRun, recorded: dict) -> list[str]:
    """What tells a recorded run from the one that was opened, one text a key; empty where they are the same."""
    asked = {name: vars(opened.arguments)[name] for name in ("dtype", "attn_implementation")}
    return differences(recorded, {**opened.described, **asked})
