"""Two tokenizations of one text: the spans that both bound, and what the tokens in them add up to.

Between two neighbouring boundaries that both tokenizations have, each says the same bytes in tokens of its own, so that
the sums of their log-probabilities are of one and the same event. Everything counts bytes of the text's UTF-8.
"""

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

NO_TOKEN = "no token stands for it"
NOT_THERE = "the template leaves it out"


@dataclass(frozen=True)
class Piece:
    """Bytes ``start`` to ``end`` of a text and the tokens, by their positions, that stand for them together.

    ``nll`` is the sum of −log p, nats, of those of them that were extracted; ``reason`` says why the bytes cannot be
    compared, None where they can.
    """

    start: int
    end: int
    tokens: range
    nll: float
    reason: str | None = None


@dataclass(frozen=True)
class Tokenization:
    """A text's pieces in order, none over another; bytes ``start`` to ``end`` of the text are in its rendering."""

    pieces: Sequence[Piece]
    start: int
    end: int


@dataclass
class Share:
    """What one tokenization has in a span: the sum of −log p, nats, of its extracted tokens, and all tokens' positions.

    ``covered`` bytes are those of pieces that can be compared; ``reason`` is that of the first other piece.
    """

    nll: float = 0.0
    covered: int = 0
    tokens: list[int] = field(default_factory=list)
    reason: str | None = None


@dataclass(frozen=True)
class Span:
    """Bytes ``start`` to ``end`` of a text, and what each tokenization has there.

    With a ``reason`` they are not compared, as one of the tokenizations, or both, have not all of them extracted.
    """

    start: int
    end: int
    first: Share
    other: Share
    reason: str | None = None


def spans_of(first: Tokenization, other: Tokenization, length: int) -> list[Span]:
    """The ``length`` bytes of a text, cut wherever both tokenizations have a boundary, in order.

    Neighbouring spans that are left out for one reason are one span.
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
    """What the tokenization has between each two neighbouring cuts, none of which is within a piece."""
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
    """Why the span is left out, None where both tokenizations have all of it."""
    why = [
        None
        if share.covered == end - start
        else share.reason or (NO_TOKEN if side.start <= start and end <= side.end else NOT_THERE)
        for side, share in zip(sides, shares, strict=True)
    ]
    return told(*why)


def told(first: str | None, other: str | None) -> str | None:
    """The reasons of two sides as one, which says whose it is; None where neither has one."""
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
