"""The card of a logit dataset, as Markdown for the Hub."""

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
probability of {top_p}, {num_sampled} tokens sampled from the rest, the logsumexp of the logits and the real token's
own log-probability (nats). `extraction.json` has all that is needed to decode, align and repeat the run.
{numbers}
## Use

```python
from datasets import load_dataset
from explore_logits import dequantize_all_logits, execute_analysis

execute_analysis(logit_dataset_id="THIS DATASET", sample_index=0)   # the token table of one conversation

row = load_dataset("THIS DATASET", split="{split}")[0]
position = dequantize_all_logits(row, 0)                            # token_ids, log_probs, weights, tail_mass, …
```
"""

NUMBERS = """
{written:,} conversations, {tokens:,} tokens, {bytes_a_token:.1f} bytes a token on disk; the real tokens' mean negative
log-likelihood is {mean_nll:.4f} nats.
"""


def render_card(extraction: dict, fingerprint: str, tally: dict) -> str:
    """The card's text. ``tally`` counts what is there; a run that has just begun has no numbers yet.

    ``state`` changes with the rows: ``datasets`` takes a local folder for one it has in its cache if name and
    ``configs`` are the same, whatever is in the files.
    """
    tokens, numbers = tally["tokens"], ""
    if tokens:
        numbers = NUMBERS.format(**tally, bytes_a_token=tally["disk_bytes"] / tokens, mean_nll=tally["nll"] / tokens)
    state = f"run {fingerprint[:16]}, {len(tally['shards'])} shards, {tally['disk_bytes']} bytes"
    return CARD.format(**extraction, numbers=numbers, state=state)
