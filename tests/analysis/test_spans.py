"""Spans that two tokenizations bound: random segmentations against sums over single bytes."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat_logits.analysis.spans import NO_TOKEN, NOT_THERE, Piece, Tokenization, spans_of, told


@st.composite
def tokenizations(draw, length: int) -> Tokenization:
    """A text of so many bytes in pieces, some with a reason, some bytes in none."""
    cuts = sorted({0, length, *draw(st.lists(st.integers(0, length), max_size=length))})
    pieces, token = [], 0
    for start, end in itertools.pairwise(cuts):
        if draw(st.integers(0, 9)) == 0:
            continue  # no token stands for it
        reason = draw(st.sampled_from([None] * 8 + ["think tag"]))
        tokens = range(token, token + draw(st.integers(1, 3)))
        pieces.append(Piece(start, end, tokens, draw(st.floats(0, 50)), reason))
        token = tokens.stop
    return Tokenization(pieces, 0, length)


def by_bytes(first: Tokenization, other: Tokenization, length: int) -> list[tuple[int, int, float, float]]:
    """Start, end and both sums of the compared spans: each byte has its piece, a boundary is where that changes."""
    owners = []
    for side in (first, other):
        owner: list = [None] * length
        for piece in side.pieces:
            for byte in range(piece.start, piece.end):
                owner[byte] = piece
        owners.append(owner)
    edges = [{edge for piece in side.pieces for edge in (piece.start, piece.end)} for side in (first, other)]
    found = []
    common = sorted(edges[0] & edges[1])
    for start, end in itertools.pairwise(common):
        inside = [{id(owner[byte]): owner[byte] for byte in range(start, end)} for owner in owners]
        pieces = [list(each.values()) for each in inside]
        if all(piece is not None and piece.reason is None for side in pieces for piece in side):
            found.append((start, end, *(math.fsum(piece.nll for piece in side) for side in pieces)))
    return found


@given(st.data(), st.integers(0, 24))
def test_any_two_segmentations_add_up_as_their_bytes_do(data, length):
    first, other = (data.draw(tokenizations(length)) for _ in range(2))
    spans = spans_of(first, other, length)
    edges = [0, *(span.end for span in spans)]
    assert [span.start for span in spans] == edges[:-1] and edges[-1] == length
    compared = [span for span in spans if span.reason is None]
    expected = by_bytes(first, other, length)
    assert [(span.start, span.end) for span in compared] == [each[:2] for each in expected]
    for span, (*_, nll, other_nll) in zip(compared, expected, strict=True):
        assert span.first.nll == pytest.approx(nll, abs=1e-9) and span.other.nll == pytest.approx(other_nll, abs=1e-9)
    # Every token of either side is in one span, and none is left out without a word.
    for side, name in ((first, "first"), (other, "other")):
        tokens = [token for span in spans for token in getattr(span, name).tokens]
        assert tokens == [token for piece in side.pieces for token in piece.tokens]
    for before, after in itertools.pairwise(spans):
        assert before.reason is None or before.reason != after.reason


def pieces(*cuts: int, **reasons: str) -> list[Piece]:
    """Pieces between the cuts, with 1, 2, 4, … nats; ``reasons`` by number, ``_0`` for the first."""
    return [
        Piece(start, end, range(i, i + 1), float(2**i), reasons.get(f"_{i}"))
        for i, (start, end) in enumerate(itertools.pairwise(cuts))
    ]


def told_of(spans) -> list[tuple]:
    return [(span.start, span.end, span.reason) for span in spans]


def test_worked_examples():
    # |ab|cd|e| and |a|bcd|e|: common at 0, 4, 5.
    spans = spans_of(Tokenization(pieces(0, 2, 4, 5), 0, 5), Tokenization(pieces(0, 1, 4, 5), 0, 5), 5)
    assert told_of(spans) == [(0, 4, None), (4, 5, None)]
    assert [(span.first.nll, span.other.nll) for span in spans] == [(3.0, 3.0), (4.0, 4.0)]
    # Nothing in common but the ends.
    spans = spans_of(Tokenization(pieces(0, 1, 3, 4), 0, 4), Tokenization(pieces(0, 2, 4), 0, 4), 4)
    assert told_of(spans) == [(0, 4, None)] and (spans[0].first.nll, spans[0].other.nll) == (7.0, 3.0)
    # Not even these: the other's last token goes on behind the text.
    other = Tokenization([*pieces(0, 2), Piece(2, 4, range(1, 2), 9.0, "beyond")], 0, 4)
    spans = spans_of(Tokenization(pieces(0, 1, 3, 4), 0, 4), other, 4)
    assert told_of(spans) == [(0, 4, "other: beyond")]


def test_what_is_left_out_says_whose_it_is_and_why():
    whole = Tokenization(pieces(0, 2, 4, 6), 0, 6)
    skipped = Tokenization(pieces(0, 2, 4, 6, _1="think tag"), 0, 6)
    assert told_of(spans_of(whole, skipped, 6)) == [(0, 2, None), (2, 4, "other: think tag"), (4, 6, None)]
    assert told_of(spans_of(skipped, skipped, 6))[1] == (2, 4, "both: think tag")
    dropped = Tokenization(pieces(0, 2, 4), 0, 6)
    assert told_of(spans_of(whole, dropped, 6))[-1] == (4, 6, f"other: {NO_TOKEN}")
    trimmed = Tokenization(pieces(2, 4, 6), 2, 6)
    assert told_of(spans_of(trimmed, whole, 6))[0] == (0, 2, f"first: {NOT_THERE}")
    assert told_of(spans_of(trimmed, dropped, 6))[0] == (0, 2, f"first: {NOT_THERE}")
    assert told("a", "b") == "first: a; other: b" and told(None, None) is None


def test_probabilities_of_zero_are_infinite_in_their_span_alone():
    zero = [*pieces(0, 2), Piece(2, 4, range(1, 2), math.inf)]
    spans = spans_of(Tokenization(zero, 0, 4), Tokenization(pieces(0, 2, 4), 0, 4), 4)
    assert [(span.first.nll, span.other.nll) for span in spans] == [(1.0, 1.0), (math.inf, 2.0)]
    assert spans_of(Tokenization([], 0, 0), Tokenization([], 0, 0), 0) == []
