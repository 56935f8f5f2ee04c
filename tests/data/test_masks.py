"""Masks token by token, for tokenizers that count characters in really different ways.

The tokenizers are made here, so that every token can be foreseen: byte-level BPE with and without trimmed offsets, a
SentencePiece-like BPE with byte fallback, and a WordPiece that drops white space.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from chat_logits.data.alignment import (
    AFTER_END_REASON,
    EMPTY_THINK_REASON,
    PROMPT,
    SPECIAL_REASON,
    THINK_TAG_REASON,
    Aligner,
)
from chat_logits.data.templates import ChatTemplate
from chat_logits.data.tokenizer import skipped_token_ids, token_text

SPECIAL = ["<s>", "[UNK]", "<user>", "<bot>", "<end>"]
THINK = ["<think>", "</think>"]
TEMPLATE = """{% for m in messages %}{% if m.role == 'assistant' %}<bot>
{% generation %}{{ m.content }}<end>{% endgeneration %}{{ newline }}{% else %}<user>{{ m.content }}<end>
{% endif %}{% endfor %}"""
SIGNS = {
    "+": None,
    ".": PROMPT,
    "s": SPECIAL_REASON,
    "t": THINK_TAG_REASON,
    "e": EMPTY_THINK_REASON,
    "a": AFTER_END_REASON,
}


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(THINK)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="[UNK]", eos_token="<end>")


def byte_level(trim_offsets: bool) -> PreTrainedTokenizerFast:
    """One token a byte, but for a space that joins the letter H, and a newline that joins a space."""
    merges = [("Ġ", "H"), ("Ċ", "Ġ")]
    symbols = [*sorted(bytes_to_unicode().values()), *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    return wrap(tokenizer)


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """One token a letter, ▁ for spaces and joined to H, bytes for whatever is no letter."""
    letters = [chr(i) for i in range(33, 127)] + ["▁", "▁H"]
    symbols = [f"<0x{i:02X}>" for i in range(256)] + letters
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "H")], byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return wrap(tokenizer)


def word_piece() -> PreTrainedTokenizerFast:
    """Words of Hi, Yes, Hm and their pieces; white space is dropped and anything else is unknown."""
    words = ["[UNK]", "Hi", "H", "##i", "Yes", "Y", "##es", "Hm", "Q", "!"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return wrap(tokenizer)


TOKENIZERS = {
    "byte_level_trimmed": byte_level(trim_offsets=True),
    "byte_level": byte_level(trim_offsets=False),
    "sentencepiece_like": sentencepiece_like(),
    "word_piece": word_piece(),
}
BYTE_LEVEL = ("byte_level_trimmed", "byte_level")
SMILE = ["\udcf0", "\udc9f", "\udc99", "\udc82"]  # the four bytes of 🙂


def aligner(name: str, template: str = TEMPLATE) -> Aligner:
    tokenizer = TOKENIZERS[name]
    chat_template = ChatTemplate(template, tokenizer.special_tokens_map, {"newline": "\n"})
    return Aligner(tokenizer, chat_template, skipped_token_ids(tokenizer))


def tokens(name: str, messages: list[tuple[str, str]], template: str = TEMPLATE) -> tuple[list[str], str]:
    """The tokens' texts, and one sign a token."""
    alignment = aligner(name, template).align([{"role": role, "content": content} for role, content in messages])
    signs = {reason: sign for sign, reason in SIGNS.items()}
    texts = [token_text(TOKENIZERS[name], int(i)) for i in alignment.input_ids]
    return texts, "".join(signs[reason] for reason in alignment.reasons)


def answer(name: str, content: str, template: str = TEMPLATE) -> tuple[list[str], str]:
    """What follows the last header's ``<bot>``."""
    texts, signs = tokens(name, [("user", "Q"), ("assistant", content)], template)
    start = len(texts) - texts[::-1].index("<bot>")
    return texts[start:], signs[start:]


LETTERS = [*BYTE_LEVEL, "sentencepiece_like"]
CASES = [
    # an answer that ends in an emoji of several tokens
    (LETTERS, "Hi🙂", ["\n", "H", "i", *SMILE, "<end>", "\n"], ".++++++s."),
    (["word_piece"], "Hi🙂", ["Hi", "[UNK]", "<end>"], "+ss"),
    # that begins with a space
    (LETTERS, " Hi", ["\n", " H", "i", "<end>", "\n"], ".++s."),
    (["word_piece"], " Hi", ["Hi", "<end>"], "+s"),
    # with two: byte-level joins the header's newline to the first, and that token is extracted
    (BYTE_LEVEL, "  Hi", ["\n ", " H", "i", "<end>", "\n"], "+++s."),
    (["sentencepiece_like"], "  Hi", ["\n", " ", " H", "i", "<end>", "\n"], ".+++s."),
    # with a newline
    (LETTERS, "\nHi", ["\n", "\n", "H", "i", "<end>", "\n"], ".+++s."),
    (["word_piece"], "\nHi", ["Hi", "<end>"], "+s"),
    # an empty answer
    (LETTERS, "", ["\n", "<end>", "\n"], ".s."),
    (["word_piece"], "", ["<end>"], "s"),
    # the family's own special tokens, written in the answer
    (LETTERS, "H<end><user>i", ["\n", "H", "<end>", "<user>", "i", "<end>", "\n"], ".+ss+s."),
    (["word_piece"], "H<end>Hi", ["H", "<end>", "Hi", "<end>"], "+s+s"),
    # thoughts, and what stands right after them
    (
        LETTERS,
        "<think>\nHm</think>\nHi",
        ["\n", "<think>", "\n", "H", "m", "</think>", "\n", "H", "i", "<end>", "\n"],
        ".t+++t+++s.",
    ),
    (["word_piece"], "<think>Hm</think> Yes!", ["<think>", "Hm", "</think>", "Yes", "!", "<end>"], "t+t++s"),
    # an empty think block
    (
        LETTERS,
        "<think>\n\n</think>\n\nHi",
        ["\n", "<think>", "\n", "\n", "</think>", "\n", "\n", "H", "i", "<end>", "\n"],
        ".eeeeee++s.",
    ),
    (["word_piece"], "<think>\n</think>\n\nHi", ["<think>", "</think>", "Hi", "<end>"], "ee+s"),
    # trailing white space is the answer's own
    (BYTE_LEVEL, "Hi \n", ["\n", "H", "i", " ", "\n", "<end>", "\n"], ".++++s."),
    (["sentencepiece_like"], "Hi \n", ["\n", "H", "i", " ", "\n", "<end>", "\n"], ".++++s."),
]


@pytest.mark.parametrize(
    ("name", "content", "texts", "signs"),
    [(name, *case) for names, *case in CASES for name in names],
    ids=lambda value: repr(value) if isinstance(value, str) else "",
)
def test_masks_token_by_token(name, content, texts, signs):
    assert answer(name, content) == (texts, signs)


@pytest.mark.parametrize("name", LETTERS)
def test_three_turns_and_a_system_message(name):
    messages = [("system", "S"), *[("user", "Q"), ("assistant", "Hi")] * 3]
    texts, signs = tokens(name, messages)
    turn = ["<user>", "Q", "<end>", "\n", "<bot>", "\n", "H", "i", "<end>", "\n"]
    assert texts == ["<user>", "S", "<end>", "\n", *turn * 3]
    assert signs == "...." + "......++s." * 3


def test_three_turns_and_a_system_message_in_word_pieces():
    texts, signs = tokens("word_piece", [("system", "Yes"), *[("user", "Q"), ("assistant", "Hi")] * 3])
    assert texts == ["<user>", "Yes", "<end>", *["<user>", "Q", "<end>", "<bot>", "Hi", "<end>"] * 3]
    assert signs == "..." + "....+s" * 3


@pytest.mark.parametrize("name", LETTERS)
def test_white_space_behind_the_end_of_the_turn_is_skipped(name):
    inside = TEMPLATE.replace("{% endgeneration %}{{ newline }}", "{{ newline }}{% endgeneration %}")
    assert answer(name, "Hi", inside) == (["\n", "H", "i", "<end>", "\n"], ".++sa")


@pytest.mark.parametrize("name", LETTERS)
def test_a_think_block_that_the_prompt_opens(name):
    """The generation prompt gives ``<think>`` and a newline; with nothing thought, the rest of the block is skipped."""
    opened = TEMPLATE.replace("<bot>\n", "<bot><think>\n")
    texts, signs = answer(name, "\n</think>\n\nHi", opened)
    assert texts == ["<think>", "\n", "\n", "</think>", "\n", "\n", "H", "i", "<end>", "\n"]
    assert signs == "..eeee++s."
    assert answer(name, "Hm</think>Hi", opened)[1] == "..++t++s."


PIECES = st.sampled_from(
    [
        "H",
        "Hi",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "é",
        "🙂",
        "👩‍👩‍👧",
        "東京",
        "<end>",
        "<bot>",
        "<think>",
        "</think>",
        "!",
    ]
)
# SentencePiece writes a space as ▁, so a ▁ in the text is read as one.
LETTER = st.characters(exclude_characters="▁", exclude_categories=["Cs"])
CONTENTS = st.lists(PIECES | st.text(LETTER, max_size=3), max_size=8).map("".join)


@pytest.mark.parametrize("name", LETTERS)
@given(st.lists(st.tuples(CONTENTS, CONTENTS), min_size=1, max_size=3))
@settings(max_examples=60)
def test_marked_tokens_are_the_rendered_answers(name, rounds):
    """Decoded and joined they are the text of the span; only a token across its edge brings characters from outside."""
    messages = [turn for question, reply in rounds for turn in (("user", question), ("assistant", reply))]
    conversation = [{"role": role, "content": content} for role, content in messages]
    here = aligner(name)
    text, spans = here.template.render(conversation)
    alignment = here.align(conversation)
    assert len(spans) == len(rounds)
    for start, end in spans:
        inside, before, after = covered(name, alignment, text, start, end)
        assert before + text[start:end] + after == inside
    marked = sum(reason != PROMPT for reason in alignment.reasons)
    assert marked == sum(covered_count(name, alignment, text, start, end) for start, end in spans)


def token_spans(name: str, alignment, text: str) -> list[tuple[int, int]]:
    """Bytes that each token stands for, from what the tokens say themselves and not from offsets."""
    sizes = [len(token_text(TOKENIZERS[name], int(i)).encode(errors="surrogateescape")) for i in alignment.input_ids]
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    assert ends[-1] == len(text.encode())
    return list(zip([0, *ends], ends, strict=False))


def covered(name: str, alignment, text: str, start: int, end: int) -> tuple[str, str, str]:
    """The text of the marked tokens that touch a span, and what of it lies before and behind the span."""
    first, last = len(text[:start].encode()), len(text[:end].encode())
    touching = [
        (a, b, reason) for (a, b), reason in zip(token_spans(name, alignment, text), alignment.reasons, strict=True)
    ]
    touching = [(a, b, reason) for a, b, reason in touching if a < last and b > first]
    assert all(reason != PROMPT for _, _, reason in touching)
    raw = text.encode()
    low, high = touching[0][0], touching[-1][1]
    return raw[low:high].decode(), raw[low:first].decode(), raw[last:high].decode()


def covered_count(name: str, alignment, text: str, start: int, end: int) -> int:
    first, last = len(text[:start].encode()), len(text[:end].encode())
    return sum(a < last and b > first for a, b in token_spans(name, alignment, text))
