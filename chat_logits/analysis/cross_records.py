"""The records of a comparison across tokenizers. All bits are −log₂ p of the first and of the other model.

A ``difference`` is the other's bits minus the first's: above 0, the other model was more surprised.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

from chat_logits.analysis.divergence import Source
from chat_logits.analysis.runs import RunDifference
from chat_logits.words import count_text


def difference_of(bits: float, other_bits: float) -> float:
    """The other's minus the first's, 0 if both are infinite."""
    return 0.0 if bits == other_bits else other_bits - bits


@dataclass(frozen=True)
class BitTotals:
    """Over all spans that are compared: their bytes of UTF-8, each dataset's tokens and bits, and the bits per byte.

    Ratios are of totals, nan without a byte.
    """

    num_spans: int
    num_bytes: int
    num_tokens: int
    other_num_tokens: int
    bits: float
    other_bits: float
    bits_per_byte: float
    other_bits_per_byte: float
    difference: float


def bit_totals(
    num_spans: int, num_bytes: int, num_tokens: int, other_num_tokens: int, bits: float, other_bits: float
) -> BitTotals:
    """The totals with their ratios."""
    ratios = (
        [math.nan] * 3
        if not num_bytes
        else [n / num_bytes for n in (bits, other_bits, difference_of(bits, other_bits))]
    )
    return BitTotals(num_spans, num_bytes, num_tokens, other_num_tokens, bits, other_bits, *ratios)


@dataclass(frozen=True)
class LeftOut:
    """What is not compared for one reason: bytes of the answers, and each dataset's extracted tokens.

    ``num_answers`` counts answers that are left out whole. Tokens outside of the answers' texts, such as ends of turns,
    have no bytes here.
    """

    reason: str
    num_answers: int
    num_bytes: int
    num_tokens: int
    other_num_tokens: int


@dataclass(frozen=True)
class Surprised:
    """Where one model was more surprised than the other: conversations, spans, their bytes, and by how many bits."""

    num_conversations: int
    num_spans: int
    num_bytes: int
    bits: float


# --- one conversation ---


@dataclass(frozen=True)
class SpanToken:
    """A token of a span; ``log_prob`` in nats, None if it was not extracted; ``text`` is as in ``TokenAnalysis``."""

    position: int
    token_id: int
    text: str
    log_prob: float | None


@dataclass(frozen=True)
class TextSpan:
    """Bytes ``start`` to ``end`` of message number ``message`` of the conversation, and both datasets' tokens there.

    ``index`` counts the conversation's spans. A span with a ``reason`` is left out and has no bits. In ``text``, bytes
    of partial characters are surrogate escapes (PEP 383).
    """

    index: int
    message: int
    start: int
    end: int
    text: str
    tokens: list[SpanToken]
    other_tokens: list[SpanToken]
    bits: float | None = None
    other_bits: float | None = None
    reason: str | None = None

    @property
    def num_bytes(self) -> int:
        return self.end - self.start

    @property
    def difference(self) -> float | None:
        """In bits, None for a span that is left out."""
        if self.bits is None or self.other_bits is None:
            return None
        return difference_of(self.bits, self.other_bits)

    def as_dict(self) -> dict:
        """All of it as plain values, with what is derived."""
        return {**asdict(self), "num_bytes": self.num_bytes, "difference": self.difference}


@dataclass(frozen=True, repr=False)
class SpanComparison(Sequence):
    """A conversation's answers as two models with different tokenizers see them; a sequence of ``TextSpan``.

    The spans cover all bytes of the answers, in order. ``has_other_system`` if the system messages differ;
    ``rewrites`` and ``other_rewrites`` count answers that each dataset's tokens decode to other characters;
    ``differences`` are those between the runs.
    """

    spans: list[TextSpan]
    totals: BitTotals
    left_out: list[LeftOut]
    messages: list[dict]
    first: Source
    other: Source
    sample_index: int
    other_sample_index: int
    source_index: int
    has_other_system: bool
    rewrites: int
    other_rewrites: int
    only: int | None = None
    differences: list[RunDifference] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index):
        return self.spans[index]

    def __repr__(self) -> str:
        ids = (self.first.logit_dataset_id, self.other.logit_dataset_id)
        return f"<SpanComparison of row {self.sample_index} of {ids[0]} with {ids[1]}: {count_text(len(self), 'span')}>"

    def showing(self, only: int | None = None) -> "SpanComparison":
        """The same comparison with the ``only`` spans furthest apart, or all of them."""
        return replace(self, only=only)

    @cached_property
    def shown(self) -> list[TextSpan]:
        """The spans that are shown."""
        if self.only is None:
            return self.spans
        compared = (span for span in self.spans if span.difference is not None)
        return sorted(compared, key=lambda span: -abs(span.difference or 0.0))[: self.only]

    def to_dicts(self) -> list[dict]:
        """A dict per shown span; spans that are left out have None as numbers."""
        return [span.as_dict() for span in self.shown]

    @property
    def head(self) -> dict:
        """The datasets and rows, how their runs differ, the totals, and what is left out."""
        names = (
            "first",
            "other",
            "sample_index",
            "other_sample_index",
            "source_index",
            "differences",
            "has_other_system",
            "rewrites",
            "other_rewrites",
            "totals",
            "left_out",
        )
        return {name: getattr(self, name) for name in names}

    def as_dict(self) -> dict:
        """Plain values: the head, and the spans that are shown."""
        return {**self.head, "spans": self.to_dicts()}


# --- two datasets ---


@dataclass(frozen=True)
class SurprisingSpan:
    """A span with a large difference, in bits: the text before it, and each dataset's tokens there.

    ``sample_index`` and ``other_sample_index`` are the datasets' rows, ``message`` counts the conversation's messages.
    """

    sample_index: int
    other_sample_index: int
    source_index: int
    message: int
    start: int
    num_bytes: int
    text: str
    before: str
    tokens: list[str]
    other_tokens: list[str]
    bits: float
    other_bits: float
    difference: float


@dataclass(frozen=True)
class ConversationBits:
    """A conversation in bits per byte; ``question`` is the beginning of its first user turn."""

    sample_index: int
    other_sample_index: int
    source_index: int
    num_spans: int
    num_bytes: int
    bits_per_byte: float
    other_bits_per_byte: float
    difference: float
    question: str


@dataclass(frozen=True, repr=False)
class CrossComparison:
    """Two datasets with different tokenizers over all the conversations that they share.

    ``num_conversations`` are shared and compared, and ``conversations`` has a record of each, in order. ``error`` is
    the standard error of the totals' difference, from the conversations' sums, nan for a single conversation.
    ``only_in_first`` and ``only_in_other`` count source rows that only one dataset has, ``num_different`` shared ones
    with different messages, ``num_without_spans`` those with nothing to compare. ``num_other_system`` of the compared
    ones have different system messages; ``rewrites`` and ``other_rewrites`` count answers that each dataset's tokens
    decode to other characters. ``first_spans`` and ``other_spans`` are the spans where that model was more surprised,
    the largest first; ``differences`` is what differs between the runs. If only some of the first's rows were chosen,
    ``chosen_from`` is how many it has.
    """

    first: Source
    other: Source
    totals: BitTotals
    error: float
    num_conversations: int
    only_in_first: int
    only_in_other: int
    num_different: int
    num_without_spans: int
    num_other_system: int
    rewrites: int
    other_rewrites: int
    left_out: list[LeftOut]
    first_surprised: Surprised
    other_surprised: Surprised
    first_spans: list[SurprisingSpan]
    other_spans: list[SurprisingSpan]
    conversations: list[ConversationBits]
    differences: list[RunDifference] = field(default_factory=list)
    chosen_from: int | None = None

    def as_dict(self) -> dict:
        """All of it as plain values."""
        return asdict(self)

    def __repr__(self) -> str:
        counts = f"{count_text(self.num_conversations, 'conversation')}, {count_text(self.totals.num_bytes, 'byte')}"
        bits = f"{self.totals.bits_per_byte:.4f} and {self.totals.other_bits_per_byte:.4f} bits per byte"
        return (
            f"<CrossComparison of {self.first.logit_dataset_id} with {self.other.logit_dataset_id}: {counts}, {bits}>"
        )
