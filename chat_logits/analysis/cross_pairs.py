"""Two rows of one conversation with different tokenizers: their answers in spans, and what is left out."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from chat_logits.analysis.cross_records import BitTotals, LeftOut, bit_totals
from chat_logits.analysis.cross_sides import Side, SideRow
from chat_logits.analysis.spans import Share, Span, Tokenization, spans_of, told
from chat_logits.data.stored_messages import from_stored

OUTSIDE = "outside of the answers' texts"
NATS = math.log(2)  # in a bit


class Answer(NamedTuple):
    """An answer that both datasets have: its number among the answers and the messages, and its spans."""

    number: int
    message: int
    content: bytes
    spans: list[Span]


class Pair(NamedTuple):
    """Two rows of one conversation, its answers in spans, and what is left out of them."""

    first: SideRow
    other: SideRow
    answers: list[Answer]
    left_out: list[LeftOut]

    @property
    def compared(self) -> list[tuple[Answer, Span]]:
        """The spans that are compared, each with its answer."""
        return [(answer, span) for answer in self.answers for span in answer.spans if span.reason is None]

    @property
    def totals(self) -> BitTotals:
        """Over the spans that are compared."""
        spans = [span for _, span in self.compared]
        return bit_totals(
            len(spans),
            sum(span.end - span.start for span in spans),
            *(sum(len(getattr(span, side).tokens) for span in spans) for side in ("first", "other")),
            *(sum(getattr(span, side).nll for span in spans) / NATS for side in ("first", "other")),
        )


def pair_of(first: SideRow, other: SideRow) -> Pair:
    """Both rows' answers, cut at the boundaries that both tokenizations have."""
    messages = first.row["messages"]
    places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    answers = []
    for number, message in enumerate(places):
        content = (messages[message]["content"] or "").encode()
        answers.append(Answer(number, message, content, _spans(first, other, number, len(content))))
    return Pair(first, other, answers, _left_out(first, other, answers))


def _spans(first: SideRow, other: SideRow, number: int, length: int) -> list[Span]:
    """The spans of an answer of ``length`` bytes; a single one that is left out if a row does not have the answer."""
    if not length:
        return []
    found, other_found = first.answer(number), other.answer(number)
    if isinstance(found, Tokenization) and isinstance(other_found, Tokenization):
        return spans_of(found, other_found, length)
    why = (each if isinstance(each, str) else None for each in (found, other_found))
    share, other_share = (Share(tokens=side.tokens_of_turn(number)) for side in (first, other))
    return [Span(0, length, share, other_share, told(*why))]


def _left_out(first: SideRow, other: SideRow, answers: list[Answer]) -> list[LeftOut]:
    """What is left out, by reason; each extracted token that is not compared is counted once."""
    counts: dict[str, list[int]] = {}
    rest = [set(side.placed.alignment.positions.tolist()) for side in (first, other)]
    for answer in answers:
        for span in answer.spans:
            tokens = [len(own & set(share.tokens)) for own, share in zip(rest, (span.first, span.other), strict=True)]
            rest = [own - set(share.tokens) for own, share in zip(rest, (span.first, span.other), strict=True)]
            if span.reason is not None:
                size = span.end - span.start
                _count(counts, span.reason, [int(size == len(answer.content)), size, *tokens])
    if any(rest):
        _count(counts, OUTSIDE, [0, 0, *map(len, rest)])
    return [LeftOut(reason, *numbers) for reason, numbers in counts.items()]


def _count(counts: dict[str, list[int]], reason: str, numbers: list[int]) -> None:
    counts[reason] = [sum(pair) for pair in zip(counts.get(reason, [0] * len(numbers)), numbers, strict=True)]


def joined_by_reason(parts: Iterable[LeftOut]) -> list[LeftOut]:
    """One ``LeftOut`` per reason, the one with the most bytes first."""
    counts: dict[str, list[int]] = {}
    for part in parts:
        _count(counts, part.reason, [part.num_answers, part.num_bytes, part.num_tokens, part.other_num_tokens])
    return sorted((LeftOut(reason, *numbers) for reason, numbers in counts.items()), key=lambda each: -each.num_bytes)


def count_rewrites(side: Side, row: SideRow, answers: list[Answer], name: str) -> int:
    """The number of answers whose compared spans the side's tokens decode to other characters."""
    found = 0
    for answer in answers:
        spans = [span for span in answer.spans if span.reason is None]
        tokens = [token for span in spans for token in getattr(span, name).tokens]
        text = b"".join(answer.content[span.start : span.end] for span in spans).decode(errors="replace")
        found += bool(tokens) and side.rewrites(row, tokens, text)
    return found


def has_same_messages(row: dict, other_row: dict) -> bool:
    """Whether two rows have the same messages, including tool calls; system messages are ignored."""
    said, other_said = (
        [message for message in from_stored(each["messages"]) if message["role"] != "system"]
        for each in (row, other_row)
    )
    return said == other_said


def has_other_system(row: dict, other_row: dict) -> bool:
    """Whether two rows' system messages differ."""
    said, other_said = (
        [message["content"] for message in each["messages"] if message["role"] == "system"] for each in (row, other_row)
    )
    return said != other_said
