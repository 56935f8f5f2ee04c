"""Two tokenizations of one text: spans between boundaries that both have, and the sums over the tokens in them.

Between two neighbouring boundaries that both tokenizations have, each covers the same bytes with its own tokens, so the
sums of their log-probabilities are of the same event. All positions count bytes of the text's UTF-8.
"""

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

NO_TOKEN = "no token stands for it"
NOT_THERE = "the template leaves it out"


@dataclass(frozen=True)
class Piece:
    """Bytes ``start`` to ``end`` of a text and the positions of the tokens that together stand for them.

    ``nll`` is the sum of −log p, nats, over the extracted ones; ``reason`` says why the bytes cannot be compared, None
    if they can.
    """

    start: int
    end: int
    tokens: range
    nll: float
    reason: str | None = None


@dataclass(frozen=True)
class Tokenization:
    """A text's pieces in order, without overlaps; bytes ``start`` to ``end`` of the text are in its rendering."""

    pieces: Sequence[Piece]
    start: int
    end: int


@dataclass
class Share:
    """One tokenization's share of a span: the sum of −log p, nats, over extracted tokens, and all tokens' positions.

    ``covered`` is the number of bytes in pieces that can be compared; ``reason`` is that of the first other piece.
    """

    nll: float = 0.0
    covered: int = 0
    tokens: list[int] = field(default_factory=list)
    reason: str | None = None


@dataclass(frozen=True)
class Span:
    """Bytes ``start`` to ``end`` of a text, and each tokenization's share.

    With a ``reason`` they are not compared: in one of the tokenizations, or both, some of them were not extracted.
    """

    start: int
    end: int
    first: Share
    other: Share
    reason: str | None = None


def spans_of(first: Tokenization, other: Tokenization, length: int) -> list[Span]:
    """The ``length`` bytes of a text, cut wherever both tokenizations have a boundary, in order.

    Neighbouring spans that are left out for the same reason are merged.
    """
    cuts = sorted({0, length} | (_boundaries(first) & _boundaries(other)))
    spans: list[Span] = []
    shares = zip(_shares(first, cuts), _shares(other, cuts), strict=True)
    for (start, end), (share, other_share) in zip(itertools.pairwise(cuts), shares, strict=True):
        span = Span(start, end, share, other_share, _reason(start, end, (first, other), (share, other_share)))
        if spans and span.reason is not None and spans[-1].reason == span.reason:
            before = spans.pop()
            share, other_share = _joined(before.first, span.first), _joined(before.other, span.other)
            span = Span(before.start, end, share, other_share, span.reason)
        spans.append(span)
    return spans


def _boundaries(tokenization: Tokenization) -> set[int]:
    return {edge for piece in tokenization.pieces for edge in (piece.start, piece.end)}


def _shares(tokenization: Tokenization, cuts: list[int]) -> list[Share]:
    """The tokenization's share between each two neighbouring cuts; no cut is within a piece."""
    shares = [Share() for _ in cuts[1:]]
    for piece in tokenization.pieces:
        share = shares[bisect.bisect_right(cuts, piece.start) - 1]
        share.nll += piece.nll
        share.tokens += piece.tokens
        if piece.reason is None:
            share.covered += piece.end - piece.start
        else:
            share.reason = share.reason or piece.reason
    return shares


def _reason(start: int, end: int, sides: tuple[Tokenization, Tokenization], shares: Sequence[Share]) -> str | None:
    """Why the span is left out, None if both tokenizations have all of it."""
    why = [
        None
        if share.covered == end - start
        else share.reason or (NO_TOKEN if side.start <= start and end <= side.end else NOT_THERE)
        for side, share in zip(sides, shares, strict=True)
    ]
    return told(*why)


def told(first: str | None, other: str | None) -> str | None:
    """The reasons of both sides as one text that names the side; None if neither has one."""
    if first == other:
        return first and f"both: {first}"
    return "; ".join(f"{name}: {why}" for name, why in (("first", first), ("other", other)) if why)


def _joined(share: Share, following: Share) -> Share:
    return Share(
        nll=share.nll + following.nll,
        covered=share.covered + following.covered,
        tokens=share.tokens + following.tokens,
        reason=share.reason or following.reason,
    )
