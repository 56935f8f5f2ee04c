"""A run's record, and how two runs' records differ."""

import datetime
from dataclasses import dataclass
from pathlib import Path

from chat_logits.storage.dataset import StoredDataset
from chat_logits.storage.manifest import EXTRACTION_FILE, Manifest, quantization_text

# Keys of extraction.json that readers want first; all others follow in the file's order.
FIRST_KEYS = (
    "model_id",
    "model_revision",
    "base_revision",
    "gguf_file",
    "quantization",
    "dtype",
    "head_dtype",
    "attn_implementation",
    "tokenizer_fingerprint",
    "chat_template",
    "tools_template",
    "template_kwargs",
    "template_date",
    "system_prompt",
    "top_k",
    "top_p",
    "num_sampled",
    "thinned_from",
    "seed",
)


@dataclass(frozen=True)
class RunDifference:
    """A key of ``extraction.json`` with different values in two runs; None if a record does not have it.

    Entries of an object, such as a package's version, are named by their path: ``versions.torch``.
    """

    key: str
    first: object
    other: object


def run_differences(first: Manifest, other: Manifest) -> list[RunDifference]:
    """The keys in which two records differ, those about the model first."""
    values, other_values = (dict(_flat(manifest.as_json())) for manifest in (first, other))
    keys = list(dict.fromkeys([*values, *other_values]))
    keys.sort(key=lambda key: _order(key.partition(".")[0]))
    pairs = ((key, values.get(key), other_values.get(key)) for key in keys)
    return [RunDifference(*pair) for pair in pairs if not _are_same(*pair[1:])]


def _order(key: str) -> int:
    return FIRST_KEYS.index(key) if key in FIRST_KEYS else len(FIRST_KEYS)


def _are_same(first: object, other: object) -> bool:
    return first == other and isinstance(first, bool) == isinstance(other, bool)  # True == 1, but not here


def _flat(content: dict, path: str = "") -> list[tuple[str, object]]:
    """Keys with their values; entries of objects are named by path."""
    pairs: list[tuple[str, object]] = []
    for key, value in content.items():
        pairs += _flat(value, f"{path}{key}.") if isinstance(value, dict) else [(f"{path}{key}", value)]
    return pairs


@dataclass(frozen=True)
class RunRecord:
    """Where a dataset's rows come from, and how they were made; texts and numbers are as in ``extraction.json``.

    ``revision`` is the dataset's own commit on the Hub, None for a folder; for a folder, ``written`` is when its
    ``extraction.json`` was written (ISO 8601, UTC).
    """

    revision: str | None
    written: str | None
    model_id: str
    model_revision: str
    source_id: str
    source_config: str | None
    source_split: str
    source_revision: str
    top_k: int
    top_p: float
    num_sampled: int
    seed: int
    dtype: str
    head_dtype: str
    attn_implementation: str | None
    quantization: str | None
    all_turns: bool
    max_samples: int | None


def run_record(dataset: StoredDataset) -> RunRecord:
    """The record of a dataset's run."""
    manifest = dataset.manifest
    same = ("model_id", "model_revision", "top_k", "top_p", "num_sampled", "seed", "dtype", "head_dtype")
    return RunRecord(
        revision=dataset.revision,
        written=_written(dataset) if dataset.revision is None else None,
        source_id=manifest.dataset_id,
        source_config=manifest.dataset_config,
        source_split=manifest.split,
        source_revision=manifest.dataset_revision,
        attn_implementation=manifest.attn_implementation,
        quantization=quantization_text(manifest.quantization) if manifest.quantization else None,
        all_turns=manifest.all_turns,
        max_samples=manifest.max_samples,
        **{name: getattr(manifest, name) for name in same},
    )


def _written(dataset: StoredDataset) -> str:
    changed = (Path(dataset.dataset_id) / EXTRACTION_FILE).stat().st_mtime
    return datetime.datetime.fromtimestamp(changed, datetime.UTC).isoformat(timespec="seconds")
