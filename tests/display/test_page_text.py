"""Whose turn each token is, and which characters stand at it, with real templates and tokens."""

import itertools

import pytest
from conftest import REPO

from chat_logits.analysis.tokens import EXTRACTED, SKIPPED, TokenAnalysis, label_tokens, whole_characters
from chat_logits.data.alignment import Aligner
from chat_logits.data.templates import ChatTemplate
from chat_logits.data.tokenizer import skipped_token_ids
from chat_logits.display.page_text import (
    characters_of_parts,
    fenced_spans,
    pieces_of,
    segments,
    token_characters,
    with_their_characters,
)
from chat_logits.display.text import quoted, visible


@pytest.fixture(scope="module")
def labelled(smollm2):
    """A conversation's tokens under one of the shipped templates."""
    tokenizer = smollm2[1]

    def label(messages: list[dict], template: str = "smollm2"):
        text = (REPO / "templates" / f"{template}.jinja").read_text(encoding="utf-8")
        chosen = ChatTemplate(text, tokenizer.special_tokens_map, {})
        return label_tokens(Aligner(tokenizer, chosen, skipped_token_ids(tokenizer)).align(messages), tokenizer)

    return label


def turns(tokens, messages) -> list[tuple[str, str]]:
    found = segments(tokens, messages)
    assert list(itertools.chain(*(part.tokens for part in found))) == tokens  # each once, in order
    texts = ["".join(token_characters([t for t in part.tokens if t.status != SKIPPED])) for part in found]
    return [(part.role, text.strip()) for part, text in zip(found, texts, strict=True) if part.role]


def chat(*contents: str, system: str | None = None) -> list[dict]:
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


@pytest.mark.parametrize("template", ["smollm2", "qwen2_5"])
@pytest.mark.parametrize(
    "messages",
    [
        chat("What is it?", "It is."),
        chat("Hugging Face", "Yes, Hugging Face."),
        chat("user", "system"),
        chat("a", "a"),
        chat("Yes", "Yes", "Yes", "No", "No", "Yes"),
        chat("end", "start", "im", "im_end", "|", "<"),
        chat("helpful", "a helpful answer", system="You are a helpful AI."),
        chat("The answer is 4", "The answer is 4"),
        chat("  spaces around  ", "\n\nlines around\n"),
        chat("emoji 👩‍🚀 here", "مرحبا 👩‍🚀"),
    ],
)
def test_every_message_is_found_where_it_stands(labelled, messages, template):
    expected = [(message["role"], message["content"].strip()) for message in messages]
    assert turns(labelled(messages, template), messages) == expected


def test_a_message_that_the_template_changes_stands_with_its_text(labelled):
    tokens = labelled(chat("one", "two"))
    assert turns(tokens, chat("something else", "two")) == [("assistant", "two")]


def test_answers_that_the_mask_does_not_show_leave_the_prompt_as_it_is(labelled):
    tokens = labelled(chat("one", "two", "three", "four"))
    assert turns(tokens, chat("one", "two", "three", "four", "five", "six")) == [
        ("assistant", "two"),
        ("assistant", "four"),
    ]


def test_characters_stand_at_the_last_of_their_tokens(labelled):
    text = "é 世界 👨‍👩‍👧‍👦 🇸🇪"
    tokens = labelled(chat("x", text))
    answer = [token for token in tokens if token.is_extracted]
    placed = token_characters(answer)
    assert "".join(placed) == text
    assert [piece for piece in placed if "👦" in piece or "🇸" in piece] == ["👨‍👩‍👧‍👦", "🇸🇪"]
    parts = characters_of_parts(answer, placed)
    family = next(i for i, piece in enumerate(placed) if "👦" in piece)
    assert placed[family - 1] == "" and parts[answer[family - 1].position] == "👨‍👩‍👧‍👦"


@pytest.mark.parametrize(
    ("characters", "pieces"),
    [
        ("a b\u00a0c", [("plain", "a b\u00a0c")]),
        ("\n\n  x", [("line", "\n"), ("line", "\n"), ("plain", "  x")]),
        ("\ta\r", [("plain", "\ta"), ("code", "\\x0d")]),
        ("\x1b[0m", [("code", "\\x1b"), ("plain", "[0m")]),
        ("\u202ex\u200b", [("code", "\\u202e"), ("plain", "x"), ("code", "\\u200b")]),
        ("\udcf0", [("code", "\\xf0")]),
        ("", [("part", "")]),
    ],
)
def test_pieces_show_what_may_not_act_as_codes(characters, pieces):
    assert pieces_of(characters) == pieces


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("می\u200cخواهم", '"می\u200cخواهم"'),  # Persian: the joiner keeps two letters apart
        ("क्\u200dष", '"क्\u200dष"'),
        ("\u200ca", r'"\u200ca"'),  # not between letters: it would not be seen
        ("a\u200c", r'"a\u200c"'),
        ("1\u200d2", r'"1\u200d2"'),
        ("👩\u200d🔧", '"👩\u200d🔧"'),
        ("👩🏽\u200d🚀", '"👩🏽\u200d🚀"'),  # with a skin tone
        ("🏳\ufe0f\u200d🌈", '"🏳\ufe0f\u200d🌈"'),  # with a variant
        ("👩\u200c🔧", r'"👩\u200c🔧"'),  # which joins no emoji
        ("👩\u200d", r'"👩\u200d"'),
        ("می\u200c\u202eخواهم", r'"می\u200c\u202eخواهم"'),  # beside a control that turns the direction
        ("a\u200bb", r'"a\u200bb"'),
    ],
)
def test_joiners_between_letters_are_no_escapes(text, shown):
    assert quoted(text) == shown
    assert visible(text) == shown[1:-1]


def test_text_before_a_token_begins_and_ends_with_whole_characters():
    pieces = [character.encode(errors="surrogateescape") for character in "سلام"]
    halves = [half.decode(errors="surrogateescape") for piece in pieces for half in (piece[:1], piece[1:])]
    assert whole_characters(halves[1:]) == "لام"  # the first one's first byte is before
    assert whole_characters(halves[:-1]) == "سلا" and whole_characters(halves) == "سلام"
    assert whole_characters(halves[1:2]) == "" and whole_characters(["a", "b"]) == "ab"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("a\n```python\nx\n```\nb", ["```python\nx\n```"]),
        ("```\na\n~~~\nb\n```", ["```\na\n~~~\nb\n```"]),  # another fence within
        ("````\n```\n````\n", ["````\n```\n````"]),  # a shorter one
        ("1. a\n   ```\n   x\n   ```\n2. b", ["   ```\n   x\n   ```"]),
        ("```a```\nb", []),  # a line's own
        ("a\n```\nx", ["```\nx"]),  # not closed: to the end
        ("```\nx\n```y\nz", ["```\nx\n```y\nz"]),  # closes nothing
        ("~~~\na\n~~~\n```\nb\n```", ["~~~\na\n~~~", "```\nb\n```"]),
        ("no code", []),
    ],
)
def test_blocks_of_code_are_as_commonmark_has_them(text, code):
    assert [text[start:end] for start, end in fenced_spans(text)] == code


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        ([b" \xd9", b"\x85a", b"b"], [(" م", True), ("مa", True), ("b", False)]),
        ([b"\xf0\x9f", b"\x99", b"\x82", b"x"], [("🙂", True), ("🙂", True), ("🙂", True), ("x", False)]),
        ([b"\xff", b"a"], [("\udcff", False), ("a", False)]),  # a byte of no character
        ([b"a", b"\xd9"], [("a", False), ("\udcd9", False)]),
    ],
)
def test_a_token_is_shown_with_the_characters_that_it_is_a_part_of(pieces, shown):
    texts = [piece.decode(errors="surrogateescape") for piece in pieces]
    tokens = [TokenAnalysis(i, i, text, EXTRACTED) for i, text in enumerate(texts)]
    assert with_their_characters(tokens, token_characters(tokens)) == shown
