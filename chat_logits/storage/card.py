"""The card of a logit dataset, as Markdown for the Hub."""

from huggingface_hub import DatasetCardData

from chat_logits.hub import is_commit
from chat_logits.storage.manifest import Manifest, quantization_text
from chat_logits.storage.shard_list import ShardEntry, counted_remarks, mean_nll
from chat_logits.words import count_text

THIS_FOLDER = "path/to/this/folder"  # the name in a card's snippets if the dataset is not in a repository
SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B", "10B", "100B", "1T")
# Values that the Hub accepts for `license` (https://huggingface.co/docs/hub/repositories-licenses); anything else is
# `other`, with its name in `license_name`.
LICENSES = """
afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community h-research
intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit
mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openmdw-1.1 openrail openrail++ osl-3.0 other pddl postgresql
unknown unlicense wtfpl zlib
"""

CARD = """---
{metadata}
---

# Token log-probabilities of {model_id}

For every assistant token of `{dataset_id}` (split `{split}`): the {top_k} most probable tokens up to a total
probability of {top_p}, {num_sampled} tokens sampled without bias from the rest, the logsumexp of the logits and the
target token's own log-probability (nats). `extraction.json` has all that is needed to decode, align and repeat the run.
{origin}
{numbers}

## Use

The token table of one conversation, with chat-logits, the toolkit that made this (`pip install .` in a clone of it):

```python
from explore_logits import execute_analysis

execute_analysis({arguments}, sample_index=0)
```

Without it, read the numbers with `pip install datasets` and the toolkit's `logit_codec.py`, copied next to the script:

```python
from datasets import load_dataset
from logit_codec import dequantize_all_logits

row = load_dataset({arguments}, split="{split}")[0]
position = dequantize_all_logits(row, 0)  # token_ids, log_probs, weights, tail_mass, …
```

## Columns

One row is one conversation; n is `num_tokens`, its extracted tokens.

| column | content |
| --- | --- |
| `top_logits_quantized` | n·{top_k} bytes: log-probabilities of the nucleus as 8-bit codes, 0 for none |
| `top_indices_low`, `top_indices_high` | their token ids: 16 low bits each, and 2 high bits each, four ids a byte |
| `sampled_logits_quantized`, `sampled_indices_low`, `sampled_indices_high` | the same for n·{num_sampled} draws |
| `logsumexp` | n floats: logit = log-probability + logsumexp |
| `num_tokens` | n |
| `mean_nll`, `max_surprisal` | the mean and the largest of −`token_log_probs` |
| `mean_entropy` | the mean entropy of the n stored distributions, nats |
| `top1_rate` | share of the target tokens that are their position's most probable one |
| `token_log_probs` | n floats: the target tokens' log-probabilities, not quantised |
| `messages`, `source_index`, `alignment_checksum` | the conversation, its row in the source, a CRC of its tokens |
| `tools` | the tools that it offers, as JSON text, or null |

## Where it comes from

| | | revision | licence |
| --- | --- | --- | --- |
| model | `{model_id}` | `{model_revision}` | {model_license} |
| dataset | `{dataset_id}` | `{dataset_revision}` | {dataset_license} |

Computed in {dtype}{weights}, logits in {head_dtype}, with {attn_implementation} attention, seed {seed}.
"""

NUMBERS = "{rows:,} conversations, {tokens:,} tokens, {bytes_per_token:.1f} bytes per token on disk{mean_nll}."
MEAN_NLL = "; the target tokens' mean negative log-likelihood is {:.4f} nats"
ORIGIN = """
Made without the model from a dataset with up to {top_k} tokens, a total of {top_p} and {num_sampled} sampled ones (run
{fingerprint:.16}), by keeping fewer of them: FORMAT.md, "Thinned datasets".
"""
CHOICE = """
{rows:,} of the rows of another dataset (run {fingerprint:.16}), {why}: FORMAT.md, "Filtered datasets".
"""
NO_NUMBERS = "The extraction has just begun."
UNFINISHED = "\n\nThe extraction is not finished: source rows are still missing."


def run_state(fingerprint: str, entries: list[ShardEntry]) -> str:
    """One line that identifies the rows present. It is part of the card."""
    return f"run {fingerprint[:16]}, {len(entries)} shards, {sum(entry.num_bytes for entry in entries)} bytes"


def arguments_in_code(repo_id: str | None = None, branch: str | None = None) -> str:
    """The arguments that name the dataset in the snippets: a repository, or the folder that the card is in.

    >>> arguments_in_code("user/logits", "main"), arguments_in_code("user/logits", "k64"), arguments_in_code()
    ('"user/logits"', '"user/logits", revision="k64"', '"path/to/this/folder"')
    """
    revision = f', revision="{branch}"' if branch not in (None, "main") else ""
    return f'"{repo_id or THIS_FOLDER}"{revision}'


def render_card(
    manifest: Manifest, entries: list[ShardEntry], arguments: str = arguments_in_code(), is_finished: bool = True
) -> str:
    """The card's text; ``entries`` are the shards present. A run that has just begun has no numbers yet.

    ``arguments`` are those from ``arguments_in_code``; ``is_finished`` says whether the run is finished.
    """
    stated = manifest.licenses or {}
    licenses = {f"{kind}_license": stated.get(kind) or "not stated" for kind in ("model", "dataset")}
    metadata = card_metadata(manifest, entries).to_yaml()
    origin = ORIGIN.format(**manifest.thinned_from[-1]) if manifest.thinned_from else ""
    origin += _choice(manifest, entries)
    weights = f" (weights {quantization_text(manifest.quantization)})" if manifest.quantization else ""
    numbers = _numbers(entries) + ("" if is_finished else UNFINISHED)
    texts = {"weights": weights, "metadata": metadata, "numbers": numbers, "arguments": arguments, "origin": origin}
    return CARD.format(**manifest.as_json(), **licenses, **texts)


def card_metadata(manifest: Manifest, entries: list[ShardEntry]) -> DatasetCardData:
    """Metadata that the Hub filters by and links to. Local folders are named only in the card's text.

    The licence is the source dataset's: the rows hold its texts, and only numbers from the model. ``description``
    changes with the rows, because ``datasets`` uses its cache of a local folder if name and ``configs`` are the same,
    even if the files have changed.
    """
    config = {
        "config_name": "default",
        "description": run_state(manifest.fingerprint, entries),
        "data_files": [{"split": manifest.split, "path": f"data/*/{manifest.split}-*.parquet"}],
    }
    return DatasetCardData(
        **_license(manifest),
        task_categories=["text-generation"],
        size_categories=[size_category(sum(entry.num_rows for entry in entries))],
        base_model=manifest.model_id if is_commit(manifest.model_revision) else None,
        datasets=[manifest.dataset_id] if is_commit(manifest.dataset_revision) else None,
        configs=[config],
        tags=["token-log-probabilities", "distillation"],
    )


def _license(manifest: Manifest) -> dict[str, str]:
    stated = (manifest.licenses or {}).get("dataset")
    if not stated:
        return {}
    name = stated if isinstance(stated, str) else ", ".join(map(str, stated))
    return {"license": name.lower()} if name.lower() in LICENSES.split() else {"license": "other", "license_name": name}


def size_category(rows: int) -> str:
    """The Hub's category of a dataset's size.

    >>> [size_category(rows) for rows in (999, 1000, 10**6)]
    ['n<1K', '1K<n<10K', '1M<n<10M']
    """
    step = max(0, len(str(rows)) - 3)  # digits beyond three
    if step == 0:
        return f"n<{SIZES[0]}"
    return f"{SIZES[step - 1]}<n<{SIZES[step]}" if step < len(SIZES) else f"n>{SIZES[-1]}"


def _choice(manifest: Manifest, entries: list[ShardEntry]) -> str:
    """For a filtered dataset, a sentence on which rows it has; else ""."""
    if not manifest.filtered_from:
        return ""
    last = manifest.filtered_from[-1]
    condition = (last["condition"] or "").replace("`", "'")
    why = f"those with `{' '.join(condition.split())}`" if condition else "chosen one by one"
    rows = sum(entry.num_rows for entry in entries)
    return CHOICE.format(rows=rows, fingerprint=last["fingerprint"], why=why)


def _numbers(entries: list[ShardEntry]) -> str:
    tokens = sum(entry.num_tokens for entry in entries)
    if not tokens:
        return NO_NUMBERS
    mean = mean_nll(entries)
    numbers = NUMBERS.format(
        rows=sum(entry.num_rows for entry in entries),
        tokens=tokens,
        bytes_per_token=sum(entry.num_bytes for entry in entries) / tokens,
        mean_nll="" if mean is None else MEAN_NLL.format(mean),
    )
    remarks = counted_remarks(entries).items()
    return numbers + "".join(f"\n\n{count_text(count, 'conversation')} with {remark}." for remark, count in remarks)
