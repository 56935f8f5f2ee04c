"""What defines a run: source, template and model, as ``extraction.json`` records them; and whether two are the same."""

import logging
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from chat_logits.data.hashing import hash_files
from chat_logits.data.reader import Reader, open_reader
from chat_logits.data.source_files import file_format
from chat_logits.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from chat_logits.errors import UsageError
from chat_logits.extraction.as_recorded import as_recorded, opened_as_recorded, read_as_recorded, recorded_columns
from chat_logits.extraction.config import MANY_ROWS, USUAL_ROWS, ExtractConfig
from chat_logits.extraction.joining import Part
from chat_logits.hub import find_license, is_commit, is_hub_id, resolve_commit
from chat_logits.model.adapters import find_base
from chat_logits.model.config import ModelConfig
from chat_logits.model.limits import InputLimits, input_limits, load_config
from chat_logits.model.quantization import find_quantization
from chat_logits.paths import is_there
from chat_logits.stages import stage
from chat_logits.storage.manifest import Manifest, RunInputs, quantization_text

SHARDS_A_WORKER = 4  # at least, so that no worker waits long for the others at the end
FEW = 1024 * 80  # average entries of a source row: a shard of 1,024 rows then takes 0.3 GB until it is written
VERSIONED = ("torch", "transformers", "tokenizers", "datasets", "huggingface_hub", "numpy", "pyarrow")

logger = logging.getLogger(__name__)

Located = TypeVar("Located", bound=ModelConfig)


@dataclass(frozen=True)
class OpenedRun:
    """What a run reads, its effective options, and what is recorded of both.

    ``model_commit`` is the model's Hub commit, ``base_commit`` that of an adapter's base, None for folders.
    """

    config: ExtractConfig
    reader: Reader
    model_commit: str | None
    base_commit: str | None
    described: RunInputs


def open_run(config: ExtractConfig, recorded: RunInputs | None = None, footers: dict | None = None) -> OpenedRun:
    """Open the source and choose the template; no model is loaded.

    Options that were not given are taken from ``recorded``, if there is a record. ``footers`` are the footers of the
    source's files if another process has already read them.
    """
    config = locate(config, recorded)
    commit = config.model_revision
    with stage("Reading the model's configuration"):
        weights_id, weights_commit, base_revision = _weights(config, recorded)
        limits = input_limits(load_config(weights_id, weights_commit, config.gguf_file, config.trust_remote_code))
        quantization = None
        if not config.gguf_file:
            quantization = find_quantization(
                weights_id,
                weights_commit,
                trust_remote_code=config.trust_remote_code,
                option=config.quantization,
                is_adapter=base_revision is not None,
            )
    if quantization:
        logger.info("Weights: %s", quantization_text(quantization))
    tokenizer = tokenizer_for(config, limits)
    config = opened_as_recorded(config, recorded, limits.positions, tokenizer) if recorded else config
    config, reader = _open_reader(config, recorded, tokenizer, limits, footers)
    logger.info("Assistant tokens: %s", reader.choice.mask_source)
    base_commit = weights_commit if base_revision else None
    with stage("Telling which run it is, by the model's files" if commit is None else "Telling which run it is"):
        described = _describe(config, reader, commit, base_revision, quantization)
    return OpenedRun(config, reader, commit, base_commit, described)


def tokenizer_for(config: ExtractConfig, limits: InputLimits) -> Any:
    """The model's tokenizer. Raises UsageError if ``top_k`` is more than the model's tokens."""
    if config.top_k > limits.vocab_size:
        raise UsageError(f"`top_k` {config.top_k}: the model has {limits.vocab_size} tokens, expected no more")
    with stage("Reading the tokenizer"):
        return load_tokenizer(config.model_id, config.model_revision, config.gguf_file, config.trust_remote_code)


def _open_reader(
    config: ExtractConfig, recorded: RunInputs | None, tokenizer: Any, limits: InputLimits, footers: dict | None
) -> tuple[ExtractConfig, Reader]:
    """The reader of the source, and the config with the recorded columns and template, as far as they are needed."""
    if recorded is None:
        return config, open_reader(config, tokenizer, limits, None, footers)
    named = replace(config, **recorded_columns(config, recorded))
    reader = open_reader(named, tokenizer, limits, recorded.template_date, footers)
    kept = read_as_recorded(config, recorded, reader.source.column_names, reader.choice.template.text)
    if kept.chat_template != config.chat_template:
        named = replace(named, chat_template=kept.chat_template)
        reader = open_reader(named, tokenizer, limits, recorded.template_date, footers)
    return kept, reader


def _weights(config: ExtractConfig, recorded: RunInputs | None) -> tuple[str, str | None, str | None]:
    """Where most of the weights are (the model, or an adapter's base), their commit, and the base's revision.

    The commit is None for a folder, the revision None for a model that is not an adapter.
    """
    base = find_base(config.model_id, config.model_revision, config.gguf_file)
    if base is None:
        return config.model_id, config.model_revision, None
    if Path(base.model_id).exists():
        return base.model_id, None, hash_files(base.model_id)
    known = recorded.base_revision if recorded else None
    commit = known if known and is_commit(known) else resolve_commit(base.model_id, "model", base.revision)
    return base.model_id, commit, commit


def locate(config: ExtractConfig, recorded: RunInputs | None) -> ExtractConfig:
    """The config with the commits of Hub repositories, as recorded or as they are now; nothing heavy is imported.

    Raises UsageError for a model or a dataset that does not exist, ToolkitError if the Hub refuses.
    """
    return with_commits(as_recorded(config, recorded) if recorded else config, ("model", "dataset"))


def with_commits(config: Located, kinds: tuple[str, ...]) -> Located:
    """As ``locate``, only for these ``kinds`` ("model", "dataset"), with the commits as they are now."""
    commits: dict[str, Any] = {}
    for kind in kinds:
        name, revision = getattr(config, f"{kind}_id"), getattr(config, f"{kind}_revision")
        is_file = kind == "dataset" and file_format(Path(name)) is not None
        if is_there(Path(name)):
            if revision:
                raise UsageError(f"`{kind}_revision` {revision}: {name} is local, which has no revisions")
        elif is_file or not is_hub_id(name):
            raise UsageError(f"`{kind}_id` {name}: no such file or folder{'' if is_file else ', and no Hub id either'}")
        else:
            commits[f"{kind}_revision"] = resolve_commit(name, kind, revision)
    return replace(config, **commits)


def _describe(
    config: ExtractConfig, reader: Reader, commit: str | None, base_revision: str | None, quantization: dict | None
) -> RunInputs:
    return RunInputs(
        top_k=config.top_k,
        top_p=config.top_p,
        num_sampled=config.num_sampled,
        seed=config.seed,
        model_id=config.model_id,
        model_revision=commit or hash_files(config.model_id),
        base_revision=base_revision,
        gguf_file=config.gguf_file,
        quantization=quantization,
        tokenizer_fingerprint=tokenizer_fingerprint(reader.aligner.tokenizer),
        dataset_id=config.dataset_id,
        dataset_config=config.dataset_config,
        split=config.split,
        dataset_revision=reader.source.revision,
        max_samples=config.max_samples,
        max_length=reader.max_length,
        columns=reader.columns,
        system_prompt=reader.system_prompt,
        chat_template=reader.choice.template.text,
        tools_template=reader.choice.template.tools_text,
        template_kwargs=reader.choice.template.kwargs,
        template_date=reader.choice.template.date,
        mask_source=reader.choice.mask_source,
        skipped_token_ids=sorted(reader.aligner.skipped_ids),
        all_turns=reader.aligner.all_turns,
        keep_end_of_turn=reader.aligner.keep_end_of_turn or None,
        versions={name: metadata.version(name) for name in VERSIONED},
    )


def describe_with_model(opened: OpenedRun, model, **budget: Any) -> Manifest:
    """The manifest of a new run with this model; ``budget`` says how its batches are formed."""
    from chat_logits.model.devices import input_device  # torch is there once a model is
    from chat_logits.model.loading import logits_dtype

    config = opened.config
    return Manifest(
        **vars(opened.described),
        rows_per_shard=config.rows_per_shard
        or default_rows_per_shard(
            input_device(model).type,
            opened.reader.tokens_a_row * (config.top_k + config.num_sampled),
            opened.reader.num_rows,
            Part.read(config.part).of if config.part else config.num_workers,
        ),
        licenses={
            "model": find_license(config.model_id, "model", opened.model_commit),
            "dataset": find_license(config.dataset_id, "dataset", opened.reader.source.revision),
        },
        vocab_size=model.get_output_embeddings().weight.shape[0],
        dtype=str(model.dtype).removeprefix("torch."),
        head_dtype=logits_dtype(model),
        attn_implementation=model.config._attn_implementation,
        tensor_parallel=config.tensor_parallel if config.tensor_parallel > 1 else None,
        **budget,
    )


def default_rows_per_shard(device_type: str, entries_a_row: float, num_rows: int | None, workers: int) -> int:
    """Source rows in a shard: more with an accelerator, as batches are formed within a shard and more rows need less
    padding.

    ``entries_a_row`` is the average number of extracted tokens times the entries of each; ``num_rows`` is that of the
    source, None if unknown.

    >>> [default_rows_per_shard("cuda", 239.0 * 80, 3000, workers) for workers in (1, 8)]
    [1024, 256]
    """
    are_enough = workers == 1 or num_rows is None or num_rows >= SHARDS_A_WORKER * workers * MANY_ROWS
    return MANY_ROWS if device_type != "cpu" and entries_a_row <= FEW and are_enough else USUAL_ROWS


def differences(opened: OpenedRun, recorded: Manifest) -> list[str]:
    """How a recorded run differs from the one that was opened, a text for each key; empty if they are the same."""
    asked = {name: getattr(opened.config, name) for name in ("rows_per_shard", "dtype", "attn_implementation")}
    head_dtype = recorded.dtype if opened.config.head_dtype == "model" else opened.config.head_dtype
    return recorded.differences(opened.described, **asked, head_dtype=head_dtype)
