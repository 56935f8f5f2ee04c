"""Which run a shard belongs to: a hash over all that decides the rows, and what tells two runs apart."""

import hashlib
import json

from chat_logits.errors import UsageError

# What decides the rows. Ids and paths don't (revisions do), nor do versions and budgets.
FINGERPRINT_KEYS = (
    "format_version",
    "top_k",
    "top_p",
    "num_sampled",
    "seed",
    "vocab_size",
    "rows_per_shard",
    "model_revision",
    "gguf_file",
    "tokenizer_fingerprint",
    "dataset_config",
    "split",
    "dataset_revision",
    "max_samples",
    "max_length",
    "columns",
    "system_prompt",
    "chat_template",
    "template_kwargs",
    "template_date",
    "skipped_token_ids",
    "dtype",
    "attn_implementation",
)
SHOWN = 40  # characters of a value in a message


def run_fingerprint(extraction: dict) -> str:
    """SHA-256 (hex) of the canonical JSON of the keys of ``extraction.json`` that decide the rows.

    Raises KeyError where one of them is missing.
    """
    return hashlib.sha256(canonical({key: extraction[key] for key in FINGERPRINT_KEYS})).hexdigest()


def canonical(value) -> bytes:
    """Canonical JSON as FORMAT.md has it: sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode(errors="surrogatepass")


def differences(there: dict, here: dict) -> list[str]:
    """What tells the run ``there`` from the one wanted ``here``, one text a key; keys that ``here`` lacks don't count.

    >>> differences({"top_k": 64, "seed": 0, "dtype": "float32"}, {"top_k": 32, "seed": 0})
    ['top_k: 64 there, 32 here']
    """
    return [
        f"{key}: {_told(there.get(key), here[key])}"
        for key in FINGERPRINT_KEYS
        if key in here and canonical(there.get(key)) != canonical(here[key])
    ]


def another_run(where: str, told: str, kind: str) -> UsageError:
    """The refusal of a place, of a ``kind`` such as "repository", that holds another run; ``told`` says which."""
    return UsageError(
        f"{where}: holds another run ({told}). Choose another {kind}, or replace that run with --overwrite."
    )


def _told(there, here) -> str:
    texts = [value if isinstance(value, str) else canonical(value).decode() for value in (there, here)]
    at = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    if max(map(len, texts)) <= SHOWN:
        return f"{texts[0]} there, {texts[1]} here"
    shown = [repr(text[max(0, at - 10) : at + SHOWN - 10]) for text in texts]
    return f"from character {at}, {shown[0]} there, {shown[1]} here"
