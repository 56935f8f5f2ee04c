"""Two logit datasets over the same conversations with different tokenizers, compared by the text of their tokens.

Target-token log-probabilities are added up over spans between boundaries that both tokenizations have (``spans``), in
bits per byte of UTF-8. ``compare_spans`` is for one conversation, ``compare_bits`` for all of them; ``compare_any``
makes whichever comparison two datasets allow.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np

from chat_logits.analysis.comparison import Comparison, compare_analyses
from chat_logits.analysis.cross_pairs import (
    NATS,
    Answer,
    Pair,
    count_rewrites,
    has_other_system,
    has_same_messages,
    joined_by_reason,
    pair_of,
)
from chat_logits.analysis.cross_records import (
    BitTotals,
    ConversationBits,
    CrossComparison,
    LeftOut,
    SpanComparison,
    SpanToken,
    Surprised,
    SurprisingSpan,
    TextSpan,
    bit_totals,
    difference_of,
)
from chat_logits.analysis.cross_sides import Side, SideRow
from chat_logits.analysis.dataset_comparison import DatasetComparison, compare_datasets
from chat_logits.analysis.pairing import Watch, keep, largest_first, paired_rows, row_of, show_progress, source_of
from chat_logits.analysis.runs import run_differences
from chat_logits.analysis.spans import Span
from chat_logits.data.alignment import AT_ONCE
from chat_logits.data.stored_messages import question_of
from chat_logits.data.tokenizer import token_text
from chat_logits.errors import ToolkitError, UsageError
from chat_logits.storage.dataset import Rows, StoredDataset
from chat_logits.words import count_text

LISTED_SPANS, BEFORE = 10, 48  # spans listed for each model, and characters shown before one


def compare_any(
    first: StoredDataset,
    other: StoredDataset,
    tokenizer,
    other_tokenizer=None,
    sample_index: int | None = None,
    chat_template: str | None = None,
    top_n: int | None = None,
    only: int | None = None,
    watch: Watch = show_progress,
    rows: Rows | None = None,
    other_rows: Rows | None = None,
) -> Comparison | DatasetComparison | SpanComparison | CrossComparison:
    """Compare token by token if ``other_tokenizer`` is None (both datasets have the same), else by their text.

    With a ``sample_index``, only that row of the first. ``chat_template`` is the first's, as for ``align_row``;
    ``top_n`` and ``only`` are as in ``Comparison``; ``watch``, ``rows`` and ``other_rows`` as for ``compare_datasets``.
    Raises UsageError for a ``top_n`` with two tokenizers.
    """
    if other_tokenizer is None and sample_index is None:
        return compare_datasets(first, other, tokenizer, chat_template, watch, rows, other_rows)
    if other_tokenizer is None:
        return compare_analyses(first, other, tokenizer, sample_index or 0, chat_template, top_n or 5, only)
    if top_n is not None:
        raise UsageError("`top_n` is for datasets of one tokenizer: tokens of two have no predictions in common")
    sides = Side(first, tokenizer, chat_template), Side(other, other_tokenizer)
    return (
        compare_bits(*sides, watch, rows, other_rows)
        if sample_index is None
        else compare_spans(*sides, sample_index, only)
    )


# --- one conversation ---


def compare_spans(first: Side, other: Side, sample_index: int = 0, only: int | None = None) -> SpanComparison:
    """Compare row ``sample_index`` of the first (negative: from the end) with the other's row of the same source row.

    Raises ToolkitError if the other does not have the conversation, or has it with other messages.
    """
    row = first.dataset.read_row(sample_index)
    sample_index %= first.dataset.num_rows
    other_index, other_row = row_of(other.dataset, row["source_index"], sample_index)
    if not has_same_messages(row, other_row):
        raise ToolkitError(
            f"{other.dataset.dataset_id}: source row {row['source_index']} has other messages there than in "
            f"{first.dataset.dataset_id}; expected the same conversation"
        )
    pair = pair_of(*first.place([row], [sample_index]), *other.place([other_row], [other_index]))
    return SpanComparison(
        spans=_text_spans(pair, first.tokenizer, other.tokenizer),
        totals=pair.totals,
        left_out=joined_by_reason(pair.left_out),
        messages=row["messages"],
        first=source_of(first.dataset),
        other=source_of(other.dataset),
        sample_index=sample_index,
        other_sample_index=other_index,
        source_index=row["source_index"],
        has_other_system=has_other_system(row, other_row),
        rewrites=count_rewrites(first, pair.first, pair.answers, "first"),
        other_rewrites=count_rewrites(other, pair.other, pair.answers, "other"),
        only=only,
        differences=run_differences(first.dataset.manifest, other.dataset.manifest),
    )


def _text_spans(pair: Pair, tokenizer, other_tokenizer) -> list[TextSpan]:
    spans = [(answer, span) for answer in pair.answers for span in answer.spans]
    return [
        TextSpan(
            index=index,
            message=answer.message,
            start=span.start,
            end=span.end,
            text=_text(answer.content[span.start : span.end]),
            tokens=_span_tokens(pair.first, span.first.tokens, tokenizer),
            other_tokens=_span_tokens(pair.other, span.other.tokens, other_tokenizer),
            bits=None if span.reason else span.first.nll / NATS,
            other_bits=None if span.reason else span.other.nll / NATS,
            reason=span.reason,
        )
        for index, (answer, span) in enumerate(spans)
    ]


def _span_tokens(row: SideRow, tokens: Sequence[int], tokenizer) -> list[SpanToken]:
    ids = row.placed.alignment.input_ids
    return [
        SpanToken(
            position=token,
            token_id=int(ids[token]),
            text=token_text(tokenizer, int(ids[token])),
            log_prob=float(row.log_probs[token]) if row.is_extracted(token) else None,
        )
        for token in tokens
    ]


def _text(content: bytes) -> str:
    return content.decode(errors="surrogateescape")


# --- two datasets ---


def compare_bits(
    first: Side,
    other: Side,
    watch: Watch = show_progress,
    rows: Rows | None = None,
    other_rows: Rows | None = None,
) -> CrossComparison:
    """Compare every conversation of both datasets, in one pass; memory grows by one record per conversation.

    ``watch``, ``rows`` and ``other_rows`` are as for ``compare_datasets``.
    Raises ToolkitError if there is no conversation, or no span, to compare.
    """
    tally = _BitTally(first, other)
    counts = [first.dataset.count(rows), other.dataset.count(other_rows)]
    watched = watch(first.dataset.numbered_rows(rows), counts[0])
    pairs = paired_rows(watched, other.dataset.numbered_rows(other_rows))
    while some := list(itertools.islice(pairs, AT_ONCE)):
        tally.add_all(some)
    if not tally.conversations:
        ids = f"{first.dataset.dataset_id} and {other.dataset.dataset_id}"
        why = "".join(f"; {each.reason}" for each in tally.left_out if each.num_answers)
        raise ToolkitError(
            f"{ids} share no conversation that can be compared ({count_text(tally.num_paired, 'source row')} in both, "
            f"{tally.num_different:,} with other messages{why}); expected datasets extracted from the same source"
        )
    return tally.comparison(counts, rows is not None)


class _BitTally:
    """Sums and counts of the rows added so far, and the spans furthest apart."""

    def __init__(self, first: Side, other: Side):
        self.first, self.other = first, other
        self.num_paired = self.num_different = self.num_without_spans = self.num_other_system = 0
        self.rewrites = [0, 0]
        self.totals: list[BitTotals] = []
        self.conversations: list[ConversationBits] = []
        self.left_out: list[LeftOut] = []
        # By which model was more surprised, the first or the other: counts, and a heap of (bits, −order, record).
        self.surprised = [Surprised(0, 0, 0, 0.0)] * 2
        self.spans: tuple[list, list] = ([], [])

    def add_all(self, pairs: list[tuple[int, dict, int, dict]]) -> None:
        """Add conversations; they are rendered and tokenized together."""
        self.num_paired += len(pairs)
        alike = [pair for pair in pairs if has_same_messages(pair[1], pair[3])]
        self.num_different += len(pairs) - len(alike)
        if not alike:
            return
        numbers, rows, other_numbers, other_rows = zip(*alike, strict=True)
        placed = self.first.place(rows, numbers), self.other.place(other_rows, other_numbers)
        for sample_index, other_index, *pair in zip(numbers, other_numbers, *placed, strict=True):
            self.add(sample_index, other_index, pair_of(*pair))

    def add(self, sample_index: int, other_index: int, pair: Pair) -> None:
        """Add a conversation."""
        self.left_out = joined_by_reason([*self.left_out, *pair.left_out])
        totals = pair.totals
        if not totals.num_spans:
            self.num_without_spans += 1
            return
        self.num_other_system += has_other_system(pair.first.row, pair.other.row)
        self.rewrites[0] += count_rewrites(self.first, pair.first, pair.answers, "first")
        self.rewrites[1] += count_rewrites(self.other, pair.other, pair.answers, "other")
        self.totals.append(totals)
        self.conversations.append(_conversation_bits(sample_index, other_index, pair.first.row, totals))
        for who in (0, 1):
            self._add_surprised(who, sample_index, other_index, pair, totals)

    def _add_surprised(self, who: int, sample_index: int, other_index: int, pair: Pair, totals: BitTotals) -> None:
        """Add the spans in which the first (``who`` 0) or the other (1) was more surprised."""
        sign = (-1, 1)[who]
        found = [
            (sign * difference_of(span.first.nll, span.other.nll) / NATS, answer, span)
            for answer, span in pair.compared
        ]
        found = [each for each in found if each[0] > 0]
        before = self.surprised[who]
        self.surprised[who] = Surprised(
            num_conversations=before.num_conversations + (sign * totals.difference > 0),
            num_spans=before.num_spans + len(found),
            num_bytes=before.num_bytes + sum(span.end - span.start for _, _, span in found),
            bits=before.bits + sum(bits for bits, *_ in found),
        )
        heap = self.spans[who]
        for bits, answer, span in sorted(found, key=lambda each: -each[0])[:LISTED_SPANS]:
            if len(heap) < LISTED_SPANS or bits > heap[0][0]:
                record = self._surprising_span(sample_index, other_index, pair, answer, span)
                keep(heap, (bits, (-sample_index, -answer.number, -span.start), record), LISTED_SPANS)

    def _surprising_span(
        self, sample_index: int, other_index: int, pair: Pair, answer: Answer, span: Span
    ) -> SurprisingSpan:
        bits, other_bits = span.first.nll / NATS, span.other.nll / NATS
        tokens, other_tokens = (
            [token.text for token in _span_tokens(row, share.tokens, side.tokenizer)]
            for row, share, side in (
                (pair.first, span.first, self.first),
                (pair.other, span.other, self.other),
            )
        )
        return SurprisingSpan(
            sample_index=sample_index,
            other_sample_index=other_index,
            source_index=pair.first.row["source_index"],
            message=answer.message,
            start=span.start,
            num_bytes=span.end - span.start,
            text=_text(answer.content[span.start : span.end]),
            before=_text(answer.content[: span.start])[-BEFORE:],
            tokens=tokens,
            other_tokens=other_tokens,
            bits=bits,
            other_bits=other_bits,
            difference=difference_of(bits, other_bits),
        )

    def comparison(self, counts: list[int], is_part: bool) -> CrossComparison:
        """The comparison of the two datasets, with ``counts`` rows each, once every row has been added."""
        totals = _added(self.totals)
        return CrossComparison(
            first=source_of(self.first.dataset),
            other=source_of(self.other.dataset),
            totals=totals,
            error=standard_error(self.totals),
            num_conversations=len(self.conversations),
            only_in_first=counts[0] - self.num_paired,
            only_in_other=counts[1] - self.num_paired,
            num_different=self.num_different,
            num_without_spans=self.num_without_spans,
            num_other_system=self.num_other_system,
            rewrites=self.rewrites[0],
            other_rewrites=self.rewrites[1],
            left_out=self.left_out,
            first_surprised=self.surprised[0],
            other_surprised=self.surprised[1],
            first_spans=largest_first(self.spans[0]),
            other_spans=largest_first(self.spans[1]),
            conversations=self.conversations,
            differences=run_differences(self.first.dataset.manifest, self.other.dataset.manifest),
            chosen_from=self.first.dataset.num_rows if is_part else None,
        )


def _conversation_bits(sample_index: int, other_index: int, row: dict, totals: BitTotals) -> ConversationBits:
    return ConversationBits(
        sample_index=sample_index,
        other_sample_index=other_index,
        source_index=row["source_index"],
        num_spans=totals.num_spans,
        num_bytes=totals.num_bytes,
        bits_per_byte=totals.bits_per_byte,
        other_bits_per_byte=totals.other_bits_per_byte,
        difference=totals.difference,
        question=question_of(row["messages"]),
    )


def _added(totals: list[BitTotals]) -> BitTotals:
    names = ("num_spans", "num_bytes", "num_tokens", "other_num_tokens", "bits", "other_bits")
    return bit_totals(*(sum(getattr(each, name) for each in totals) for name in names))


def standard_error(totals: list[BitTotals]) -> float:
    """The standard error of the overall difference in bits per byte, nan for a single conversation.

    It is computed from the conversations' sums, as spans within a conversation are correlated, by the variance of a
    ratio estimator: Cochran, "Sampling Techniques", 6.3.
    """
    n, size = len(totals), sum(each.num_bytes for each in totals)
    if n < 2:
        return math.nan
    with np.errstate(invalid="ignore"):
        differences = np.array([difference_of(each.bits, each.other_bits) for each in totals])
        ratio = differences.sum() / size
        apart = differences - ratio * np.array([each.num_bytes for each in totals])
        return float(np.sqrt((apart**2).sum() * n / (n - 1)) / size)
