"""Small tokenizers of several kinds, trained on real text, and tiny models that have one."""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TRIMMED = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + ': ' }}
{%- if message.role == 'assistant' %}
{%- generation %}
{{- message.content | trim + '<|im_end|>' }}
{%- endgeneration %}
{%- else %}
{{- message.content | trim + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}"""


def _byte_level(texts: list[str], vocab_size: int, trim_offsets: bool = False) -> Tokenizer:
    """Byte-level BPE, as GPT-2 has it: a rare character is several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _trimmed(texts: list[str], vocab_size: int) -> Tokenizer:
    """The same, whose offsets leave out a token's spaces."""
    return _byte_level(texts, vocab_size, trim_offsets=True)


def _composed(texts: list[str], vocab_size: int) -> Tokenizer:
    """The same behind NFC, as Qwen has it: what a token stands for may be other bytes than what it writes."""
    tokenizer = _byte_level(texts, vocab_size)
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _byte_fallback(texts: list[str], vocab_size: int) -> Tokenizer:
    """BPE over characters with ``▁`` for spaces, as Llama 2 has it: a character that it has not is its bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[*SPECIAL, *BYTES], limit_alphabet=64, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    form = json.loads(tokenizer.to_str())
    form["added_tokens"] = form["added_tokens"][: len(SPECIAL)]  # bytes are ordinary tokens
    return Tokenizer.from_str(json.dumps(form))


def _unigram(texts: list[str], vocab_size: int) -> Tokenizer:
    """Unigram with ``▁`` for spaces and NFKC, as T5 has it; what it has not is ``<unk>``."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _word_piece(texts: list[str], vocab_size: int) -> Tokenizer:
    """WordPiece in small letters without accents, as BERT has it: no token has a space, and offsets leave them out."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


KINDS = {
    "byte-level": _byte_level,
    "trimmed": _trimmed,
    "composed": _composed,
    "byte-fallback": _byte_fallback,
    "unigram": _unigram,
    "word-piece": _word_piece,
}


def trained(kind: str, texts: Iterable[str], vocab_size: int = 500) -> PreTrainedTokenizerFast:
    """A tokenizer of one of the ``KINDS`` for chats."""
    tokenizer = KINDS[kind](list(texts), vocab_size)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
        chat_template=TRIMMED,
    )


def save_tiny_model(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int = 1) -> Path:
    """A random two-layer Llama with this tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
