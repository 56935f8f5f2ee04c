"""Conversations of any text, with tokens of their own if need be, extracted with a tiny model."""

import json
from pathlib import Path

from conftest import TEMPLATE, make_tiny_model

import extract_logits
from explore_logits import execute_analysis

HOSTILE = [
    "</script><script>document.ran = 1</script>",
    "<img src=x onerror=document.ran=2>",
    '"><svg onload=document.ran=3>',
    "\x1b[31mred\x1b]0;title\x07",
    "\u202egnorw\u202c",
    "\u2066\u2069\u200f\u200b",
    "{{ 7 * 7 }}{% raw %}",
    "<!--",
]


def extracted(folder: Path, answer: str, tokens: list[str] = (), question: str = "Well?", name: str = "out") -> Path:
    """Extract one conversation; ``tokens`` are single tokens of the model's vocabulary."""
    model = make_tiny_model(folder / "model", vocab_size=49_664, max_position_embeddings=16_384)
    if tokens:
        add_tokens(model, tokens)
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    source = folder / "chat.jsonl"
    source.write_text(json.dumps({"messages": messages}) + "\n", encoding="utf-8")
    flags = ["--model_id", model, "--dataset_id", source, "--output_dir", folder / name]
    assert extract_logits.main([*map(str, flags), "--chat_template", str(TEMPLATE)]) == 0
    return folder / name


def add_tokens(model: Path, tokens: list[str]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.add_tokens(list(tokens)) == len(tokens)
    tokenizer.save_pretrained(model)


def analysed(folder: Path, answer: str):
    """The analysis of such a conversation."""
    return execute_analysis(str(extracted(folder, answer)), quiet=True)
