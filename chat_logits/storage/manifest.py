"""``extraction.json``, the description of a run.

FORMAT.md, "Files", is the specification.
"""

import datetime
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from chat_logits.errors import ToolkitError, UsageError, first_names
from chat_logits.storage.json_files import SHOWN, canonical, json_text, read_json
from logit_codec import MAX_TOKEN_ID

FORMAT_VERSION = 2
EXTRACTION_FILE, CARD_FILE = "extraction.json", "README.md"
# Keys that may be missing, but determine the rows if they have a value.
IF_PRESENT = ("base_revision", "quantization", "keep_end_of_turn", "thinned_from", "filtered_from")
# For each dataset that a thinned one comes from
ORIGIN_KEYS = {"fingerprint": str, "top_k": int, "top_p": float, "num_sampled": int}
# For each dataset that a filtered one has its rows from: the condition that the rows meet, or their numbers there
CHOICE_KEYS = {"fingerprint": str, "condition": str | None, "rows": list | None}
# The id that each revision belongs to
ID_OF = {"model_revision": "model_id", "dataset_revision": "dataset_id"}
CONTENT_HASH, REVISION_SHOWN = 64, 10  # characters of a SHA-256 in hex (a commit has 40), and of either in a message
# How the weights were quantised, and the configuration for that
QUANTIZATION_KEYS = {"weights": str, "config": dict}
LEAST = {"tensor_parallel": 2, "top_k": 1, "num_sampled": 0, "vocab_size": 1, "rows_per_shard": 1}
DATES, DATE = {"template_date"}, re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


@dataclass(frozen=True, kw_only=True)
class RunInputs:
    """A run's inputs and settings, as far as they are known before the model is loaded.

    The fields are keys of ``extraction.json``, in the order of the file; FORMAT.md explains each.
    """

    format_version: int = FORMAT_VERSION
    top_k: int
    top_p: float
    num_sampled: int
    seed: int
    model_id: str
    model_revision: str
    base_revision: str | None = None
    gguf_file: str | None
    quantization: dict | None = None
    tokenizer_fingerprint: str
    dataset_id: str
    dataset_config: str | None
    split: str
    dataset_revision: str
    max_samples: int | None
    max_length: int | None
    columns: dict
    system_prompt: str | None
    chat_template: str
    tools_template: str | None
    template_kwargs: dict
    template_date: str | None
    mask_source: str | None = None
    skipped_token_ids: list
    all_turns: bool
    keep_end_of_turn: bool | None = None
    thinned_from: list | None = None
    filtered_from: list | None = None
    versions: dict | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest(RunInputs):
    """All of ``extraction.json``: what is needed to decode, align and repeat a run.

    Keys that do not affect the rows may be missing in another writer's file and are None then; ``others`` has keys that
    are not part of the format. ``from_json`` checks types and ranges.
    """

    rows_per_shard: int
    licenses: dict | None = None
    vocab_size: int
    dtype: str
    head_dtype: str
    attn_implementation: str | None
    batch_tokens: int | None = None
    batch_logit_rows: int | None = None
    prefix_cache: bool | None = None
    tensor_parallel: int | None = None
    others: dict = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, path: Path, name: str) -> "Manifest":
        """The manifest in the file ``path`` of a dataset that messages call ``name``. Raises ToolkitError."""
        return cls.from_json(read_json(path, f"{name}: {EXTRACTION_FILE}"), name)

    @classmethod
    def from_json(cls, content: Mapping, name: str) -> "Manifest":
        """The manifest with this content.

        Raises ToolkitError if it has another version, lacks a key, or has an invalid value for a key.
        """
        version = content.get("format_version")
        if version != FORMAT_VERSION or isinstance(version, bool):
            again = "; another version of the toolkit wrote it: extract again" if isinstance(version, int) else ""
            raise ToolkitError(f"{name}: format_version {version!r:.{SHOWN}}, expected {FORMAT_VERSION}{again}")
        if missing := [key for key in KEYS if key not in OPTIONAL and key not in content]:
            raise ToolkitError(f"{name}: {EXTRACTION_FILE} has no {first_names(missing)}")
        known = {key: content[key] for key in KEYS if key in content}
        for key, value in known.items():
            if not _fits(key, value):
                raise ToolkitError(f"{name}: {EXTRACTION_FILE} has {key} {value!r:.{SHOWN}}, expected {_expected(key)}")
        return cls(**known, others={key: value for key, value in content.items() if key not in KEYS})

    def as_json(self) -> dict:
        """The content of ``extraction.json``, its keys in order."""
        known = {key: getattr(self, key) for key in KEYS}
        return {key: value for key, value in known.items() if value is not None or key not in OPTIONAL} | self.others

    @property
    def text(self) -> str:
        """``extraction.json`` as it is written."""
        return json_text(self.as_json())

    @cached_property
    def fingerprint(self) -> str:
        """The run's fingerprint: SHA-256 (hex) of the canonical JSON of the keys that determine the rows."""
        deciding = {key: getattr(self, key) for key in (*FINGERPRINT_KEYS, *IF_PRESENT)}
        present = {key: value for key, value in deciding.items() if value is not None or key not in IF_PRESENT}
        return hashlib.sha256(canonical(present)).hexdigest()

    @property
    def extracted(self) -> dict:
        """``top_k``, ``top_p`` and ``num_sampled`` of the extraction, which a thinned dataset may have changed."""
        first = (self.thinned_from or [vars(self)])[0]
        return {key: first[key] for key in ("top_k", "top_p", "num_sampled")}

    def thinned(self, top_k: int, top_p: float, num_sampled: int) -> "Manifest":
        """The manifest of a dataset that is thinned from this one (FORMAT.md, "Thinned datasets")."""
        values = {"fingerprint": self.fingerprint, **{key: getattr(self, key) for key in list(ORIGIN_KEYS)[1:]}}
        thinned_from = [*(self.thinned_from or []), values]
        return replace(self, top_k=top_k, top_p=top_p, num_sampled=num_sampled, thinned_from=thinned_from)

    def filtered(self, condition: str | None, rows: Iterable[int]) -> "Manifest":
        """The manifest of a dataset with some of this one's rows (FORMAT.md, "Filtered datasets"): those that meet the
        ``condition`` or, if it is None, the given ``rows``."""
        listed = None if condition is not None else [int(row) for row in rows]
        choice = {"fingerprint": self.fingerprint, "condition": condition, "rows": listed}
        return replace(self, filtered_from=[*(self.filtered_from or []), choice])

    def differences(self, wanted: RunInputs, **more: object) -> list[str]:
        """How this run differs from the ``wanted`` one: a text for each differing key that determines the rows.

        ``wanted`` may be a whole manifest; ``more`` are keys that it lacks.
        """
        keys = [key for key in (*FINGERPRINT_KEYS, *IF_PRESENT) if hasattr(wanted, key)]
        here = {key: getattr(wanted, key) for key in keys} | more
        return [
            f"{key}: {self._difference(key, value, wanted)}"
            for key, value in here.items()
            if canonical(getattr(self, key)) != canonical(value)
        ]

    def _difference(self, key: str, value: object, wanted: RunInputs) -> str:
        there = getattr(self, key)
        if key not in ID_OF:
            return describe_difference(there, value)
        return describe_revisions(getattr(self, ID_OF[key]), getattr(wanted, ID_OF[key]), there, str(value))


KEYS = {item.name: item.type for item in fields(Manifest) if item.name != "others"}
OPTIONAL = {item.name for item in fields(Manifest) if item.default is None}
# Keys that determine the rows. Ids and paths do not (revisions do), nor do versions and budgets, which are optional.
FINGERPRINT_KEYS = tuple(key for key in KEYS if key not in OPTIONAL | {"model_id", "dataset_id"})


def _fits(key: str, value: object) -> bool:
    kind: Any = KEYS[key]
    if isinstance(value, bool):
        return kind in (bool, bool | None)
    if kind is float:
        return isinstance(value, int | float)
    if key in CHAINS:
        return value is None or (isinstance(value, list) and bool(value) and all(map(CHAINS[key], value)))
    if key == "quantization" and value is not None:
        return _is_quantization(value)
    if kind is list:
        return isinstance(value, list) and all(isinstance(item, int) for item in value)
    if key in DATES and isinstance(value, str):
        return bool(DATE.fullmatch(value)) and _is_day(value)
    return isinstance(value, kind) and (key not in LEAST or value is None or value >= LEAST[key])


def _is_quantization(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == QUANTIZATION_KEYS.keys()
        and all(isinstance(value[key], kind) for key, kind in QUANTIZATION_KEYS.items())
    )


def _is_origin(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == ORIGIN_KEYS.keys()
        and all(_is_number(value[key], kind) for key, kind in ORIGIN_KEYS.items() if kind is not str)
        and isinstance(value["fingerprint"], str)
        and LEAST["top_k"] <= value["top_k"] <= MAX_TOKEN_ID
        and LEAST["num_sampled"] <= value["num_sampled"] <= MAX_TOKEN_ID
        and 0 < value["top_p"] <= 1
    )


def _is_choice(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == CHOICE_KEYS.keys()
        and all(isinstance(value[key], kind) for key, kind in CHOICE_KEYS.items())
        and (value["condition"] is None) != (value["rows"] is None)
        and all(isinstance(row, int) and not isinstance(row, bool) and row >= 0 for row in value["rows"] or [])
    )


CHAINS = {"thinned_from": _is_origin, "filtered_from": _is_choice}


def _is_number(value: object, kind: type) -> bool:
    return isinstance(value, int | kind) and not isinstance(value, bool)


def _is_day(value: str) -> bool:
    try:
        datetime.date.fromisoformat(value)
    except ValueError:
        return False
    return True


def _expected(key: str) -> str:
    kind = KEYS[key]
    if key in DATES:
        return "a day such as 2024-02-29, or null"
    if key in CHAINS:
        return f"a list of objects with {', '.join(ORIGIN_KEYS if key == 'thinned_from' else CHOICE_KEYS)}"
    if key == "quantization":
        return f"an object with {' and '.join(QUANTIZATION_KEYS)}, or null"
    name = "list of int" if kind is list else getattr(kind, "__name__", str(kind))
    return f"{name} of at least {LEAST[key]}" if key in LEAST else name


def quantization_text(quantization: dict) -> str:
    """A run's ``quantization`` in words.

    >>> quantization_text({"weights": "as stored", "config": {"quant_method": "gptq", "bits": 4}})
    'gptq, 4 bit, as stored'
    """
    config = quantization["config"]
    bits = next((n for n in (4, 8) if config.get(f"load_in_{n}bit")), config.get("bits"))
    parts = [str(config.get("quant_method")), f"{bits} bit" if bits else "", quantization["weights"]]
    return ", ".join(filter(None, parts))


def another_run(name: str, differences: Iterable[str], kind: str) -> UsageError:
    """The error for a folder or repository (``kind``) of this name that holds another run."""
    reasons = "; ".join(differences)
    return UsageError(
        f"{name}: holds another run ({reasons}). Choose another {kind}, or replace that run with `overwrite`."
    )


def describe_revisions(there: str, here: str, revision_there: str, revision_here: str) -> str:
    """Two revisions of models or sources, with their ids.

    >>> describe_revisions("user/a", "user/b", "0123456789abcdef", "89abcdef01234567")
    'user/a at 0123456789 there, user/b at 89abcdef01 here'
    """
    short_there, short_here = (revision[:REVISION_SHOWN] for revision in (revision_there, revision_here))
    if there != here:
        return f"{there} at {short_there} there, {here} at {short_here} here"
    if len(revision_there) == len(revision_here) == CONTENT_HASH:
        return f"the files of {here} have changed, {short_there} there, {short_here} here"
    return f"{here} at {short_there} there, at {short_here} here"


def describe_difference(there: object, here: object) -> str:
    """Two values of a key in one line, long ones from the first character that differs.

    >>> describe_difference(64, 32)
    '64 there, 32 here'
    """
    texts = [value if isinstance(value, str) else canonical(value).decode() for value in (there, here)]
    at = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    if max(map(len, texts)) <= SHOWN:
        return f"{texts[0]} there, {texts[1]} here"
    shown = [repr(text[max(0, at - 10) : at + SHOWN - 10]) for text in texts]
    return f"from character {at}, {shown[0]} there, {shown[1]} here"
