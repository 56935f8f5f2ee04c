"""Datasets of two tokenizers compared by their text: against sums over single bytes, by other means than offsets."""

import itertools
import json
import math
import re
from collections import Counter
from dataclasses import astuple
from functools import cache, partial

import numpy as np
import pytest
import regex
from conftest import MODEL
from held_rows import HeldDataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from other_tokenizers import KINDS, TRIMMED, trained
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from chat_logits.analysis.cross_pairs import OUTSIDE
from chat_logits.analysis.cross_sides import EDGE_REASON, UNKNOWN_REASON, Side
from chat_logits.analysis.cross_tokenizer import compare_bits, compare_spans
from chat_logits.analysis.spans import NOT_THERE
from chat_logits.data.alignment import SPECIAL_REASON
from chat_logits.data.places import CHANGED, OTHER_TURNS, REPEATED
from chat_logits.data.row_alignment import AlignmentError
from chat_logits.display.results import shown
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
    turns = [
        [{"role": "user", "content": f"Q{i}?"}, {"role": "assistant", "content": a}] for i, a in enumerate(answers)
    ]
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


def composed(owners: list[frozenset], text: str, pieces: list[str], kind: str) -> list[frozenset]:
    """Where tokens meet within a letter with its accents and do not write their bytes, all of them."""
    if kind in ("byte-level", "trimmed", "smollm2"):
        return owners  # these write all bytes
    data = text.encode()
    said: dict[frozenset, bytes] = {}
    for owner, byte in zip(owners, data, strict=True):
        said[owner] = said.get(owner, b"") + bytes([byte])

    def writes(owner: frozenset) -> bool:
        (token,) = owner if len(owner) == 1 else (None,)
        piece = "" if token is None else pieces[token].replace("▁", " ")
        return said[owner] == (bytes([int(piece[3:5], 16)]) if re.fullmatch("<0x..>", piece) else piece.encode())

    exact = {owner: writes(owner) for owner in said}
    at, whole = 0, list(owners)
    for cluster in regex.findall(r"\X", text):
        for _ in range(len(cluster) - 1):
            at += len(text[len(data[:at].decode())].encode())
            if owners[at - 1] != owners[at] and not (exact[owners[at - 1]] and exact[owners[at]]):
                union = whole[at - 1] | whole[at]
                whole = [union if owner & union else owner for owner in whole]
        at += len(text[len(data[:at].decode())].encode())
    return merged(whole)


def brute_force(held: HeldDataset, kind: str, index: int, content: str, occurrence: int = -1) -> tuple[set, list]:
    """Boundaries within an answer, and for each of its bytes the tokens, or None where they cannot be compared."""
    rendered, alignment, _ = held.placed(index)
    row, text = held.held[index], rendered.text
    owners = merged(byte_owners(kind, held.tokenizer, text, alignment.input_ids.tolist()))
    owners = composed(owners, text, held.tokenizer.convert_ids_to_tokens(alignment.input_ids.tolist()), kind)
    log_probs = dict(zip(alignment.positions.tolist(), row["token_log_probs"].tolist(), strict=True))
    unknown = {
        i for i, piece in enumerate(held.tokenizer.convert_ids_to_tokens(alignment.input_ids)) if piece == "<unk>"
    }
    turn_start, turn_end = rendered.spans[occurrence]
    start = len(text[: text.index(content, turn_start, turn_end)].encode())
    inside = owners[start : start + len(content.encode())]
    outside = set().union(*owners[:start], *owners[start + len(inside) :])
    bounds = {
        b for b in range(len(inside) + 1) if start + b in (0, len(owners)) or owners[start + b - 1] != owners[start + b]
    }
    values = [
        None if tokens & outside or not tokens <= log_probs.keys() or tokens & unknown else (tokens, log_probs)
        for tokens in inside
    ]
    return bounds, values


def expected_spans(sides: list[tuple[set, list]]) -> list[tuple[int, int, float, float]]:
    common = sorted(sides[0][0] & sides[1][0])
    found = []
    for start, end in itertools.pairwise(common):
        values = [side[1][start:end] for side in sides]
        if all(value is not None for side in values for value in side):
            sums = [
                -sum(log_probs[token] for token in set().union(*(tokens for tokens, _ in side)))
                for side in values
                for log_probs in [side[0][1]]
            ]
            found.append((start, end, *sums))
    return found


@pytest.fixture(scope="module")
def side_of(tokenizers):
    """A side for each tokenizer and template, made once, as that takes longer than a conversation."""
    return cache(
        lambda kind, template: Side(HeldDataset(kind, tokenizers[kind], template, [], drawn(0)), tokenizers[kind])
    )


def check_pair(side_of, kinds: tuple[str, str], answers: list[str], templates=(PLAIN, TRIMMED)) -> int:
    """Compare one conversation in both ways; the number of spans compared."""
    sides = [side_of(kind, template) for kind, template in zip(kinds, templates, strict=True)]
    held = [side.dataset for side in sides]
    for seed, each in enumerate(held):
        each.hold([talk(*answers)], drawn(seed))
    found = compare_spans(*sides)
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
    *(("smollm2", kind) for kind in KINDS if kind != "composed"),
    *(("byte-level", "byte-fallback"), ("word-piece", "unigram"), ("trimmed", "byte-level")),
]


@pytest.mark.parametrize("kinds", PAIRS, ids=" and ".join)
def test_sums_are_those_over_single_bytes(side_of, source_rows, kinds):
    answers = [row["conversations"][1]["value"] for row in source_rows[:3]]
    spans = check_pair(side_of, kinds, [*answers, *MIXED])
    print(f"{spans} spans")
    assert spans > 50


@pytest.mark.parametrize("kinds", PAIRS, ids=" and ".join)
@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_texts_too(side_of, kinds, data):
    texts = st.text(st.sampled_from(ALPHABET), min_size=1, max_size=20).filter(str.strip)
    answers = data.draw(st.lists(texts, min_size=1, max_size=2))
    check_pair(side_of, kinds, answers, templates=(PLAIN, PLAIN))


def test_a_character_over_several_tokens_is_cut_where_both_cut_it(tokenizers):
    wizard = "\U0001f9d9"  # SmolLM2 has its first two bytes as one token; byte fallback has each as one
    ids = tokenizers["smollm2"](wizard)["input_ids"]
    sizes = [len(piece) for piece in tokenizers["smollm2"].convert_ids_to_tokens(ids)]
    assert len(sizes) > 1 and sum(sizes) == 4
    held = [
        HeldDataset(kind, tokenizers[kind], PLAIN, [talk(f"a{wizard}b")], drawn(1))
        for kind in ("smollm2", "byte-fallback")
    ]
    found = compare_spans(*(Side(each, each.tokenizer) for each in held))
    cuts = [0, 1, *(1 + sum(sizes[:i]) for i in range(1, len(sizes) + 1)), 6]
    assert [span.start for span in found] == cuts[:-1]
    assert [len(span.other_tokens) for span in found] == [1, *sizes, 1]
    assert [span.text.encode(errors="surrogateescape") for span in found] == [
        f"a{wizard}b".encode()[start:end] for start, end in itertools.pairwise(cuts)
    ]


def test_what_a_tokenizer_composes_is_cut_nowhere_within(tokenizers):
    said = "Cafe\u0301 \U0001f9d9 \u1100\u1161."  # e with an accent, a wizard, and a Korean syllable in two letters
    found = compared(tokenizers, (talk(said), PLAIN, {}), (talk(said), PLAIN, {}), kinds=("byte-level", "composed"))
    text = said.encode()
    inside = [
        *range(text.index(b"e\xcc") + 1, text.index(b"e\xcc") + 3),
        *range(text.index("\u1100".encode()) + 1, text.index(b".")),
    ]
    starts = {span.start for span in found}
    assert not starts & set(inside) and {text.index(b"e\xcc"), text.index(b"\x9f\xa7")} <= starts
    assert not found.left_out and found.other_rewrites == 1


# --- what is left out ---


def compared(tokenizers, *sides, kinds=("smollm2", "byte-level")):
    """One conversation of two datasets; each side is a conversation with a template and what is recorded of it."""
    held = [
        HeldDataset(kind, tokenizers[kind], template, [conversation], drawn(seed), **recorded)
        for seed, (kind, (conversation, template, recorded)) in enumerate(zip(kinds, sides, strict=True))
    ]
    found = compare_spans(*(Side(each, each.tokenizer) for each in held))
    check_identities(found, held)
    return found


def left_out(found) -> dict[str, tuple]:
    return {each.reason: astuple(each)[1:] for each in found.left_out}


def test_an_end_of_turn_that_one_keeps_is_left_out_and_counted(tokenizers):
    side = (talk("Yes.", "No."), PLAIN, {})
    kept = (*side[:2], {"keep_end_of_turn": True})
    assert left_out(compared(tokenizers, side, side)) == {}
    assert left_out(compared(tokenizers, side, kept)) == {OUTSIDE: (0, 0, 0, 2)}
    assert left_out(compared(tokenizers, kept, kept)) == {OUTSIDE: (0, 0, 2, 2)}
    bits = [compared(tokenizers, side, other).totals.num_tokens for other in (side, kept)]
    assert bits[0] == bits[1]


def test_a_token_beyond_the_answer_is_left_out_with_what_it_says(tokenizers):
    # "assistant: The answer" has the template's space in the token of "The"
    found = compared(
        tokenizers, (talk("The answer is the answer"), PLAIN, {}), (talk("The answer is the answer"), TRIMMED, {})
    )
    (reason, (answers, size, tokens, other_tokens)), *rest = left_out(found).items()
    assert reason == f"other: {EDGE_REASON}" and not rest and answers == 0
    assert found[0].text == "The"[:size] and found[0].bits is None
    assert (tokens, other_tokens) == (len(found[0].tokens), len(found[0].other_tokens))


def test_a_trimmed_answer_is_compared_where_both_have_it(tokenizers):
    said = talk("\n  What\u00e9ver, it is. \n")
    found = compared(tokenizers, (said, PLAIN, {}), (said, TRIMMED, {}))
    assert [span.reason for span in found][-1] == f"other: {NOT_THERE}"
    assert b"".join(span.text.encode() for span in found) == said[-1]["content"].encode()
    assert "".join(span.text for span in found if span.reason is None).strip() in said[-1]["content"]


THOUGHTS = PLAIN.replace("message.content", "message.content.split('</think>')[-1].lstrip('\\n')")
SHOUTED = PLAIN.replace("message.content", "message.content | upper")
TWICE = PLAIN.replace("message.content + ", "message.content + ' ' + message.content + ")


def test_thoughts_that_a_template_leaves_out(tokenizers):
    said = talk("<think>\nWhy not?\n</think>\n\nBecause it is so.")
    found = compared(tokenizers, (said, PLAIN, {}), (said, THOUGHTS, {}))
    assert "".join(span.text for span in found if span.reason is None) == "Because it is so."
    # SmolLM2 has tags of several tokens, which are skipped; what is between them was extracted there alone.
    told = f"first: think tag; other: {NOT_THERE}"
    assert [(span.text, span.reason) for span in found if span.reason] == [("<think>\nWhy not?\n</think>\n\n", told)]
    assert left_out(found)[told][:2] == (0, 27) and left_out(found)[told][2] > 3


@pytest.mark.parametrize(("template", "why"), [(SHOUTED, CHANGED), (TWICE, REPEATED)])
def test_an_answer_that_is_not_found_is_left_out_whole(tokenizers, template, why):
    said = talk("Yes, indeed.")
    found = compared(tokenizers, (said, PLAIN, {}), (said, template, {}))
    (reason, (answers, size, tokens, other_tokens)), *rest = left_out(found).items()
    assert (reason, answers, size) == (f"other: {why}", 1, 12) and tokens and other_tokens and not rest
    assert not found.totals.num_bytes and math.isnan(found.totals.bits_per_byte)
    lower = compared(
        tokenizers, (talk("YES 42"), PLAIN, {}), (talk("YES 42"), template.replace(" | upper", " | upper"), {})
    )
    assert bool(lower.totals.num_bytes) == (template is SHOUTED)  # nothing to change there


def test_a_template_with_other_turns_than_messages(tokenizers):
    last = PLAIN.replace("message.role == 'assistant'", "message.role == 'assistant' and loop.last")
    said = talk("Yes.", "No.")
    found = compared(tokenizers, (said, PLAIN, {}), (said, last, {}))
    assert {reason: each[:2] for reason, each in left_out(found).items()}[f"other: {OTHER_TURNS}"] == (2, 7)


def test_the_answer_is_not_mistaken_for_a_part_of_the_template(tokenizers):
    for answer in ("im", "<", "end", "|im_end|"):
        found = compared(tokenizers, (talk(answer), PLAIN, {}), (talk(answer), PLAIN, {}))
        assert "".join(span.text for span in found if span.reason is None) == answer


def test_empty_answers_and_turns_that_are_marked(tokenizers):
    empty = compared(tokenizers, (talk("", "Yes."), PLAIN, {}), (talk("", "Yes."), PLAIN, {}))
    assert [span.message for span in empty if span.reason is None] == [3] * len(empty)
    marked = talk("No.", "Yes.")
    marked[1]["train"] = False
    found = compared(tokenizers, (marked, PLAIN, {}), (marked, PLAIN, {"all_turns": True}))
    assert found[0].reason == "first: marked not to be trained on" and found[0].text == "No."


def test_what_a_vocabulary_has_not_says_nothing_of_the_text(tokenizers):
    said = (talk("A 世界 B"), PLAIN, {})
    ends = {"skipped_token_ids": tokenizers["unigram"].convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])}
    for recorded, why in (({}, SPECIAL_REASON), (ends, UNKNOWN_REASON)):
        found = compared(tokenizers, said, (*said[:2], recorded), kinds=("smollm2", "unigram"))
        (unknown,) = (span for span in found if span.reason)
        assert unknown.text == "世界" and unknown.reason == f"other: {why}"
    small = (talk("a Good answer"), PLAIN, {})
    assert compared(tokenizers, small, small, kinds=("smollm2", "word-piece")).other_rewrites == 1
    assert compared(tokenizers, small, small).other_rewrites == 0


def test_infinite_surprisal_stays_in_its_span(tokenizers):
    held = [
        HeldDataset(kind, tokenizers[kind], PLAIN, [talk("one two three")], draw)
        for kind, draw in (
            ("smollm2", lambda n: np.full(n, -1.0)),
            ("byte-level", lambda n: np.array([-np.inf, *[-1.0] * (n - 1)])),
        )
    ]
    sides = [Side(each, each.tokenizer) for each in held]
    found = compare_spans(*sides)
    assert [math.isinf(span.other_bits) for span in found] == [True] + [False] * (len(found) - 1)
    assert found[0].difference == math.inf and found.totals.difference == math.inf
    assert compare_spans(*sides, only=1).shown == [found[0]]
    both = compare_bits(sides[1], Side(held[1], held[1].tokenizer))
    assert both.totals.difference == 0 and math.isnan(both.error)
    assert json.loads(shown(found).to_json())["totals"]["other_bits"] is None


# --- whole datasets ---


def make_pair(tokenizers, conversations, others, **recorded):
    first = HeldDataset("a", tokenizers["smollm2"], PLAIN, conversations, drawn(5))
    other = HeldDataset("b", tokenizers["byte-level"], TRIMMED, others, drawn(6), **recorded)
    return first, other


def test_a_row_whose_tokens_are_others_is_named_with_its_dataset(tokenizers):
    talks = [talk(f"The answer to {i} is {i * 7}.") for i in range(4)]
    first, other = make_pair(tokenizers, talks, [None, *talks[1:]])
    other.held[2]["alignment_checksum"] ^= 1  # source row 3
    sides = [Side(each, each.tokenizer) for each in (first, other)]
    for compare in (partial(compare_bits, *sides), partial(compare_spans, *sides, 3)):
        with pytest.raises(AlignmentError, match=r"^b: row 2: column alignment_checksum: "):
            compare()


def test_which_conversations_are_matched_and_which_are_not(tokenizers):
    talks = [talk(f"The answer to {i} is {i * 7}, as {'very ' * i}everybody knows.") for i in range(9)]
    others = [list(each) for each in talks]
    calls = [[{"function": {"name": name}}] for name in ("add", "divide")]
    talks[8], others[8] = ([*talks[8][:-1], {**talks[8][-1], "tool_calls": call}] for call in calls)
    talks[1] = others[5] = None
    others[6] = talk("Something else.")
    others[2] = [{"role": "system", "content": "Be brief."}, *others[2]]
    first, other = make_pair(tokenizers, talks, others)
    found = compare_bits(Side(first, first.tokenizer), Side(other, other.tokenizer))
    assert (found.num_conversations, found.only_in_first, found.only_in_other, found.num_different) == (5, 1, 1, 2)
    assert found.num_other_system == 1
    places = [(each.sample_index, each.other_sample_index, each.source_index) for each in found.conversations]
    assert places == [(0, 0, 0), (1, 2, 2), (2, 3, 3), (3, 4, 4), (6, 6, 7)]
    one = compare_spans(Side(first, first.tokenizer), Side(other, other.tokenizer), 1)
    assert one.has_other_system and (one.sample_index, one.other_sample_index, one.source_index) == (1, 2, 2)
    with pytest.raises(ToolkitError, match="source row 5 is not in it"):
        compare_spans(Side(first, first.tokenizer), Side(other, other.tokenizer), 4)
    with pytest.raises(ToolkitError, match="source row 6 has other messages"):
        compare_spans(Side(first, first.tokenizer), Side(other, other.tokenizer), 5)


def test_datasets_with_nothing_in_common(tokenizers):
    first, other = make_pair(tokenizers, [talk("Yes.")], [talk("No.")])
    with pytest.raises(ToolkitError, match=r"1 source row in both, 1 with other messages"):
        compare_bits(Side(first, first.tokenizer), Side(other, other.tokenizer))


@pytest.fixture(scope="module")
def held_pair(tokenizers, source_rows):
    talks = [
        [
            {"role": turn["from"].replace("human", "user").replace("gpt", "assistant"), "content": turn["value"]}
            for turn in row["conversations"]
        ]
        for row in source_rows[:70]  # more than are tokenized together
    ]
    return make_pair(tokenizers, talks, talks)


@pytest.fixture(scope="module")
def whole(held_pair):
    return compare_bits(*(Side(each, each.tokenizer) for each in held_pair))


@pytest.fixture(scope="module")
def each_alone(held_pair):
    sides = [Side(each, each.tokenizer) for each in held_pair]
    return [compare_spans(*sides, i) for i in range(held_pair[0].num_rows)]


def test_totals_are_those_of_all_conversations(whole, each_alone):
    spans = [span for found in each_alone for span in found if span.reason is None]
    size, bits, other_bits = (
        sum(span.num_bytes for span in spans),
        math.fsum(s.bits for s in spans),
        math.fsum(s.other_bits for s in spans),
    )
    totals = whole.totals
    assert (totals.num_spans, totals.num_bytes) == (len(spans), size)
    assert (totals.num_tokens, totals.other_num_tokens) == tuple(
        sum(len(getattr(span, side)) for span in spans) for side in ("tokens", "other_tokens")
    )
    assert (totals.bits, totals.other_bits) == pytest.approx((bits, other_bits), abs=1e-7)
    assert totals.bits_per_byte == pytest.approx(bits / size) and totals.other_bits_per_byte == pytest.approx(
        other_bits / size
    )
    assert totals.difference == pytest.approx((other_bits - bits) / size)
    counted = Counter()
    for found in each_alone:
        for each in found.left_out:
            counted[each.reason] += np.array(astuple(each)[1:])
    assert {each.reason: list(astuple(each)[1:]) for each in whole.left_out} == {
        k: v.tolist() for k, v in counted.items()
    }
    for found, record in zip(each_alone, whole.conversations, strict=True):
        assert astuple(record)[:5] == (*[record.sample_index] * 3, found.totals.num_spans, found.totals.num_bytes)
        assert astuple(record)[5:8] == astuple(found.totals)[6:]
        assert record.question == found.messages[0]["content"][:80]


def test_the_standard_error_is_near_that_of_resampled_conversations(whole):
    sizes, differences = np.array(
        [(each.num_bytes, each.difference * each.num_bytes) for each in whole.conversations]
    ).T
    random = np.random.default_rng(0)
    chosen = random.integers(0, len(sizes), (4000, len(sizes)))
    resampled = (differences[chosen].sum(axis=1) / sizes[chosen].sum(axis=1)).std()
    print(f"{whole.totals.difference:+.4f} ± {whole.error:.4f}, resampled {resampled:.4f}")
    assert whole.error == pytest.approx(resampled, rel=0.08)


def test_who_was_more_surprised_where(whole, each_alone):
    spans = [
        (span.difference, -row, -span.message, -span.start, span)
        for row, found in enumerate(each_alone)
        for span in found
        if span.reason is None
    ]
    for sign, counted, listed in (
        (-1, whole.first_surprised, whole.first_spans),
        (1, whole.other_surprised, whole.other_spans),
    ):
        theirs = [each for each in spans if sign * each[0] > 0]
        assert (counted.num_spans, counted.num_bytes) == (len(theirs), sum(each[-1].num_bytes for each in theirs))
        assert counted.bits == pytest.approx(math.fsum(abs(each[0]) for each in theirs))
        assert counted.num_conversations == sum(sign * each.difference > 0 for each in whole.conversations)
        largest = sorted(theirs, key=lambda each: (abs(each[0]), *each[1:4]), reverse=True)[:10]
        assert len(listed) == 10
        for record, (difference, row, message, start, span) in zip(listed, largest, strict=True):
            assert (record.sample_index, record.message, record.start) == (-row, -message, -start)
            assert (record.difference, record.bits, record.other_bits) == (difference, span.bits, span.other_bits)
            assert record.tokens == [token.text for token in span.tokens] and record.text == span.text
            content = each_alone[-row].messages[-message]["content"].encode()[:-start]
            assert record.before == content.decode()[-48:] if start else record.before == ""


# --- real extractions, and the command's function ---


def test_smollm2_beside_a_model_with_another_tokenizer(real_extraction, other_tokenizer_extraction):
    found = execute_comparison(str(real_extraction), str(other_tokenizer_extraction), quiet=True)
    assert (found.num_conversations, found.only_in_first, found.only_in_other) == (32, 0, 8)
    first, other = open_dataset(str(real_extraction)), open_dataset(str(other_tokenizer_extraction))
    tokens = [sum(row["num_tokens"] for row in list(dataset.rows())[:32]) for dataset in (first, other)]
    assert found.totals.num_tokens + sum(each.num_tokens for each in found.left_out) == tokens[0]
    assert found.totals.other_num_tokens + sum(each.other_num_tokens for each in found.left_out) == tokens[1]
    size = sum(len(row["messages"][-1]["content"].encode()) for row in first.rows())
    assert found.totals.num_bytes + sum(each.num_bytes for each in found.left_out) == size
    assert found.totals.num_bytes > 0.98 * size
    assert found.totals.difference > 2 and found.other_surprised.num_conversations == 32  # a random model's
    one = execute_comparison(str(real_extraction), str(other_tokenizer_extraction), 3, only=5, quiet=True)
    assert [abs(span.difference) for span in one.shown] == sorted(
        (abs(s.difference) for s in one if s.bits is not None), reverse=True
    )[:5]
    nll = -sum(first.read_row(3)["token_log_probs"][t] for t in range(first.read_row(3)["num_tokens"]))
    if not one.left_out:
        assert one.totals.bits == pytest.approx(nll / math.log(2))


def test_which_comparison_it_is_and_what_is_refused(real_extraction, other_tokenizer_extraction, tmp_path):
    with pytest.raises(UsageError, match="`top_n` is for datasets of one tokenizer"):
        execute_comparison(str(real_extraction), str(other_tokenizer_extraction), 0, top_n=3, quiet=True)
    with pytest.raises(UsageError, match=r"`compare_tokenizer_id` .* which `tokenizer_id` is for"):
        execute_comparison(str(real_extraction), str(real_extraction), compare_tokenizer_id=str(MODEL), quiet=True)
    with pytest.raises(ToolkitError, match="Name another with `compare_tokenizer_id`"):
        execute_comparison(
            str(real_extraction), str(other_tokenizer_extraction), compare_tokenizer_id=str(MODEL), quiet=True
        )
    moved = tmp_path / "tokenizer"
    AutoTokenizer.from_pretrained(other_tokenizer_extraction.parent / "model").save_pretrained(moved)
    found = execute_comparison(
        str(real_extraction), str(other_tokenizer_extraction), 0, compare_tokenizer_id=str(moved), quiet=True
    )
    assert type(found).__name__ == "ShownSpanComparison"
