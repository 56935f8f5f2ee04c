"""Datasets of two tokenizers compared by their text: against sums over single bytes, by other means than offsets."""

import json
import math
from collections import Counter
from dataclasses import astuple

import numpy as np
import pytest
from conftest import CONVERSATIONS, MODEL
from held_rows import HeldDataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from other_tokenizers import KINDS, TRIMMED, save_tiny_model, trained
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

import extract_logits
from chat_logits.analysis.cross_sides import EDGE_REASON, UNKNOWN_REASON, Side
from chat_logits.analysis.cross_tokenizer import OUTSIDE, compare_bits, compare_spans
from chat_logits.analysis.spans import NOT_THERE
from chat_logits.data.places import CHANGED, OTHER_TURNS, REPEATED
from chat_logits.errors import ToolkitError, UsageError
from chat_logits.storage.dataset import open_dataset
from explore_logits import execute_comparison

PLAIN = TRIMMED.replace(" | trim", "").replace("role + ': '", "role + '\\n'")
MIXED = [
    "Hej! Åre, 世界您好, e\u0301 नमस्ते and 👩🏽‍🚀👨‍👩‍👧‍👦 🇸🇪.",
    "  two spaces\tand a tab\n\nnew  lines\r\n and ﬁne ＦＵＬＬ width ½ \u3000 ideographic\u00a0space  ",
    "\U0001f9d9\U0001f9d9\U0001f9d9",
    "مرحبا بالعالم \u200f 한국어 ไทย",
    "a",
]
ALPHABET = "ab eéñ e\u0301ß世界🙂🇸🇪👩🏽‍🚀\u200dﬁ½\n\t\u00a0 .,THE thing"


@pytest.fixture(scope="module")
def tokenizers(source_rows):
    """One of each kind, and SmolLM2's."""
    texts = [turn["value"] for row in source_rows[:200] for turn in row["conversations"]]
    return {kind: trained(kind, texts) for kind in KINDS} | {"smollm2": AutoTokenizer.from_pretrained(MODEL)}


def talk(*answers: str, system: str | None = None) -> list[dict]:
    turns = [[{"role": "user", "content": f"Q{i}?"}, {"role": "assistant", "content": a}] for i, a in enumerate(answers)]
    return [*([{"role": "system", "content": system}] if system else []), *(turn for pair in turns for turn in pair)]


def drawn(seed: int):
    random = np.random.default_rng(seed)
    return lambda count: -random.exponential(3, count)


# --- a second way to the same sums ---


def byte_owners(kind: str, tokenizer, text: str, ids: list[int]) -> list[frozenset]:
    """For each byte of a text the tokens that stand for it, by what the vocabulary says, or by its raw offsets."""
    pieces = tokenizer.convert_ids_to_tokens(ids)
    special = set(tokenizer.all_special_tokens)
    if kind in ("byte-level", "trimmed", "smollm2"):
        to_byte = {character: byte for byte, character in bytes_to_unicode().items()}
        sizes = [len(p.encode()) if p in special else len(bytes(to_byte[c] for c in p)) for p in pieces]
        owners = [frozenset([token]) for token, size in enumerate(sizes) for _ in range(size)]
        assert len(owners) == len(text.encode())
        return owners
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    characters: list[set] = [set() for _ in text]
    waiting: set = set()
    for token, (start, end) in enumerate(offsets):
        waiting.add(token)
        if end > start:
            for character in range(start, end):
                characters[character] |= waiting
            waiting = set()
    following: set = set()
    for character in range(len(text) - 1, -1, -1):  # what no token stands for is the next one's
        following = characters[character] or following
        characters[character] = following
    owners = []
    for character, tokens in zip(text, characters, strict=True):
        parts = [token for token in sorted(tokens) if pieces[token].startswith("<0x")]
        size = len(character.encode())
        if len(parts) == size and size > 1:  # a byte each, with whatever came before them
            others = [frozenset(tokens - set(parts[1:])), *(frozenset([part]) for part in parts[1:])]
            owners += others
        else:
            owners += [frozenset(tokens)] * size
    return owners


def merged(owners: list[frozenset]) -> list[frozenset]:
    """Where neighbouring bytes have tokens in common, all of them."""
    owners = list(owners)
    changed = True
    while changed:
        changed = False
        for i in range(len(owners) - 1):
            if owners[i] & owners[i + 1] and owners[i] != owners[i + 1]:
                owners[i] = owners[i + 1] = owners[i] | owners[i + 1]
                changed = True
    return owners


def brute_force(held: HeldDataset, kind: str, index: int, content: str, occurrence: int = -1) -> tuple[set, list]:
    """Boundaries within an answer, and for each of its bytes the tokens, or None where they cannot be compared."""
    rendered, alignment, _ = held.placed(index)
    row, text = held.held[index], rendered.text
    owners = merged(byte_owners(kind, held.tokenizer, text, alignment.input_ids.tolist()))
    log_probs = dict(zip(alignment.positions.tolist(), row["token_log_probs"].tolist(), strict=True))
    unknown = {i for i, piece in enumerate(held.tokenizer.convert_ids_to_tokens(alignment.input_ids)) if piece == "<unk>"}
    turn_start, turn_end = rendered.spans[occurrence]
    start = len(text[: text.index(content, turn_start, turn_end)].encode())
    inside = owners[start : start + len(content.encode())]
    outside = set().union(*owners[:start], *owners[start + len(inside) :])
    bounds = {b for b in range(len(inside) + 1) if start + b in (0, len(owners)) or owners[start + b - 1] != owners[start + b]}
    values = [
        None if tokens & outside or not tokens <= log_probs.keys() or tokens & unknown else (tokens, log_probs)
        for tokens in inside
    ]
    return bounds, values


def expected_spans(sides: list[tuple[set, list]]) -> list[tuple[int, int, float, float]]:
    common = sorted(sides[0][0] & sides[1][0])
    found = []
    for start, end in zip(common, common[1:], strict=False):
        values = [side[1][start:end] for side in sides]
        if all(value is not None for side in values for value in side):
            sums = [
                -sum(log_probs[token] for token in set().union(*(tokens for tokens, _ in side)))
                for side in values
                for log_probs in [side[0][1]]
            ]
            found.append((start, end, *sums))
    return found


def check_pair(tokenizers, kinds: tuple[str, str], answers: list[str], templates=(PLAIN, TRIMMED)) -> int:
    """Compare one conversation in both ways; the number of spans compared."""
    held = [
        HeldDataset(kind, tokenizers[kind], template, [talk(*answers)], drawn(seed))
        for seed, (kind, template) in enumerate(zip(kinds, templates, strict=True))
    ]
    found = compare_spans(*(Side(each, each.tokenizer) for each in held))
    compared = [span for span in found if span.reason is None]
    expected = []
    for number, answer in enumerate(answers):
        trimmed = answer.strip()
        if not trimmed:
            continue
        sides = []
        for each, kind, template in zip(held, kinds, templates, strict=True):
            content = answer if template is PLAIN else trimmed
            before = len(answer[: answer.index(content)].encode())
            bounds, values = brute_force(each, kind, 0, content, number)
            after = len(answer.encode()) - before - len(values)
            sides.append(({bound + before for bound in bounds}, [None] * before + values + [None] * after))
        expected += [(2 * number + 1, *span) for span in expected_spans(sides)]
    assert [(span.message, span.start, span.end) for span in compared] == [each[:3] for each in expected]
    for span, (*_, nll, other_nll) in zip(compared, expected, strict=True):
        assert span.bits * math.log(2) == pytest.approx(nll, abs=1e-9)
        assert span.other_bits * math.log(2) == pytest.approx(other_nll, abs=1e-9)
        assert span.text.encode(errors="surrogateescape") == answers[span.message // 2].encode()[span.start : span.end]
    check_identities(found, held)
    return len(compared)


def check_identities(found, held) -> None:
    """Bits per byte are those of the compared tokens; each extracted token is compared, or counted with a reason."""
    totals = found.totals
    for side, bits, rate, count in (
        ("tokens", totals.bits, totals.bits_per_byte, totals.num_tokens),
        ("other_tokens", totals.other_bits, totals.other_bits_per_byte, totals.other_num_tokens),
    ):
        log_probs = [token.log_prob for span in found if span.reason is None for token in getattr(span, side)]
        assert len(log_probs) == count
        assert bits == pytest.approx(-math.fsum(log_probs) / math.log(2), abs=1e-9)
        if totals.num_bytes:
            assert rate == pytest.approx(-math.fsum(log_probs) / math.log(2) / totals.num_bytes, abs=1e-12)
    rows = [each.held[0] for each in held]
    assert totals.num_tokens + sum(each.num_tokens for each in found.left_out) == rows[0]["num_tokens"]
    assert totals.other_num_tokens + sum(each.other_num_tokens for each in found.left_out) == rows[1]["num_tokens"]
    size = sum(len(m["content"].encode()) for m in rows[0]["messages"] if m["role"] == "assistant")
    assert totals.num_bytes + sum(each.num_bytes for each in found.left_out) == size == sum(s.num_bytes for s in found)


PAIRS = [
    *(("smollm2", kind) for kind in KINDS),
    *(("byte-level", "byte-fallback"), ("word-piece", "unigram"), ("trimmed", "byte-level")),
]


@pytest.mark.parametrize("kinds", PAIRS, ids=" and ".join)
def test_sums_are_those_over_single_bytes(tokenizers, source_rows, kinds):
    answers = [row["conversations"][1]["value"] for row in source_rows[:3]]
    spans = check_pair(tokenizers, kinds, [*answers, *MIXED])
    print(f"{spans} spans")
    assert spans > 50


@pytest.mark.parametrize("kinds", PAIRS, ids=" and ".join)
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_texts_too(tokenizers, kinds, data):
    texts = st.text(st.sampled_from(ALPHABET), min_size=1, max_size=20).filter(str.strip)
    answers = data.draw(st.lists(texts, min_size=1, max_size=2))
    check_pair(tokenizers, kinds, answers, templates=(PLAIN, PLAIN))
