"""The card of a logit dataset, as Markdown for the Hub."""

from chat_logits.storage.manifest import Manifest, ShardEntry

CARD = """---
configs:
- config_name: default
  description: {state}
  data_files:
  - split: {split}
    path: data/*/{split}-*.parquet
tags:
- token-log-probabilities
- distillation
---

# Token log-probabilities of {model_id}

For every assistant token of `{dataset_id}` (split `{split}`): the {top_k} most probable tokens up to a total
probability of {top_p}, {num_sampled} tokens sampled without bias from the rest, the logsumexp of the logits and the
real token's own log-probability (nats). `extraction.json` has all that is needed to decode, align and repeat the run.

{numbers}

## Use

```python
from datasets import load_dataset
from explore_logits import dequantize_all_logits, execute_analysis

execute_analysis(logit_dataset_id="THIS DATASET", sample_index=0)   # the token table of one conversation

row = load_dataset("THIS DATASET", split="{split}")[0]
position = dequantize_all_logits(row, 0)                            # token_ids, log_probs, weights, tail_mass, …
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
| `token_log_probs` | n floats: the real tokens' log-probabilities, not quantised |
| `messages`, `source_index`, `alignment_checksum` | the conversation, its row in the source, a CRC of its tokens |

## Where it comes from

| | | revision | licence |
| --- | --- | --- | --- |
| model | `{model_id}` | `{model_revision}` | {model_license} |
| dataset | `{dataset_id}` | `{dataset_revision}` | {dataset_license} |

Computed in {dtype} with {attn_implementation} attention, seed {seed}.
"""

NUMBERS = """{rows:,} conversations, {tokens:,} tokens, {bytes_a_token:.1f} bytes a token on disk; the real tokens' \
mean negative log-likelihood is {mean_nll:.4f} nats."""
NO_NUMBERS = "The extraction has just begun."


def run_state(fingerprint: str, entries: list[ShardEntry]) -> str:
    """In a line, which rows there are. It is part of the card."""
    return f"run {fingerprint[:16]}, {len(entries)} shards, {sum(entry.num_bytes for entry in entries)} bytes"


def render_card(manifest: Manifest, entries: list[ShardEntry]) -> str:
    """The card's text where ``entries`` are the shards there are; a run that has just begun has no numbers yet.

    ``state`` changes with the rows: ``datasets`` takes a local folder for one it has in its cache if name and
    ``configs`` are the same, whatever is in the files.
    """
    tokens, size = sum(entry.num_tokens for entry in entries), sum(entry.num_bytes for entry in entries)
    numbers = NO_NUMBERS
    if tokens:
        numbers = NUMBERS.format(
            rows=sum(entry.num_rows for entry in entries),
            tokens=tokens,
            bytes_a_token=size / tokens,
            mean_nll=sum(entry.nll for entry in entries) / tokens,
        )
    state = run_state(manifest.fingerprint, entries)
    stated = manifest.licenses or {}
    licenses = {f"{kind}_license": stated.get(kind) or "not stated" for kind in ("model", "dataset")}
    return CARD.format(**manifest.as_json(), **licenses, numbers=numbers, state=state)
