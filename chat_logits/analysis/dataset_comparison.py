"""Two logit datasets with the same tokenizer over all the conversations that they share: how far apart their models
are, and where.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import numpy as np

from chat_logits.analysis.divergence import (
    KL_EDGES,
    ComparisonTotals,
    DivergentConversation,
    DivergentToken,
    RowComparison,
    Source,
    compare_rows,
    comparison_sums,
    totals_of,
)
from chat_logits.analysis.pairing import (
    Watch,
    has_same_tokens,
    keep,
    largest_first,
    paired_rows,
    refuse_other_tokenizer,
    show_progress,
    source_of,
    why_other_tokens,
)
from chat_logits.analysis.runs import RunDifference, run_differences
from chat_logits.analysis.summary import Histogram, count_in_bins
from chat_logits.analysis.tokens import first_prediction, text_and_before
from chat_logits.data.alignment import Alignment
from chat_logits.data.row_alignment import RowAligner
from chat_logits.data.stored_messages import question_of
from chat_logits.errors import ToolkitError
from chat_logits.storage.dataset import Rows, StoredDataset
from chat_logits.words import count_text

LISTED_TOKENS, LISTED_CONVERSATIONS = 20, 5


@dataclass(frozen=True, repr=False)
class DatasetComparison:
    """Two datasets over all the conversations that they share.

    ``num_conversations`` are shared and compared; ``only_in_first`` and ``only_in_other`` count those that only one
    dataset has, and ``num_different`` shared ones with different tokens, which are left out. ``tokens`` and
    ``conversations`` are those with the largest KL and mean KL, the largest first; ``differences`` is what differs
    between the runs. If only some of the first's rows were chosen, ``chosen_from`` is how many it has.
    """

    first: Source
    other: Source
    totals: ComparisonTotals
    num_conversations: int
    only_in_first: int
    only_in_other: int
    num_different: int
    histogram: Histogram
    tokens: list[DivergentToken]
    conversations: list[DivergentConversation]
    differences: list[RunDifference] = field(default_factory=list)
    chosen_from: int | None = None

    def as_dict(self) -> dict:
        """All of it as plain values."""
        return asdict(self)

    def __repr__(self) -> str:
        counts = f"{count_text(self.num_conversations, 'conversation')}, {count_text(self.totals.num_tokens, 'token')}"
        ids = f"{self.first.logit_dataset_id} with {self.other.logit_dataset_id}"
        return f"<DatasetComparison of {ids}: {counts}, mean KL ≥ {self.totals.mean_kl:.4f} nats>"


def compare_datasets(
    first: StoredDataset,
    other: StoredDataset,
    tokenizer,
    chat_template: str | None = None,
    watch: Watch = show_progress,
    rows: Rows | None = None,
    other_rows: Rows | None = None,
) -> DatasetComparison:
    """Compare every conversation of both datasets, in one pass and bounded memory.

    ``tokenizer`` and ``chat_template`` are as in ``compare_analyses``; only conversations with listed tokens are
    rebuilt. ``watch(rows, total)`` iterates over the first's rows. ``rows`` and ``other_rows`` are the ascending
    numbers of the rows to compare, None for all. Raises UsageError for datasets with different tokenizers, ToolkitError
    if no conversation is shared.
    """
    refuse_other_tokenizer(first, other)
    tally = _ComparisonTally(RowAligner(tokenizer, first.manifest, chat_template).align, tokenizer)
    num_different = 0
    counts = [first.count(rows), other.count(other_rows)]
    watched = watch(first.numbered_rows(rows), counts[0])
    for sample_index, row, _, other_row in paired_rows(watched, other.numbered_rows(other_rows)):
        if has_same_tokens(row, other_row):
            tally.add(sample_index, row, compare_rows(row, other_row))
        else:
            num_different += 1
    if not tally.num_conversations:
        in_both = f"{count_text(num_different, 'source row')} in both" + ", with other tokens" * (num_different > 0)
        expected = "expected datasets extracted from the same source"
        raise ToolkitError(
            f"{first.dataset_id} and {other.dataset_id} share no conversation ({in_both}); "
            f"{why_other_tokens(first, other) if num_different else expected}"
        )
    return tally.comparison(first, other, num_different, counts, rows is not None)


class _ComparisonTally:
    """Sums and counts of the rows added so far, and the tokens and conversations furthest apart."""

    def __init__(self, align: Callable[[dict, int], Alignment], tokenizer):
        self.align, self.tokenizer = align, tokenizer
        self.num_conversations = 0
        self.sums = np.zeros(6)
        self.counts = np.zeros(len(KL_EDGES), np.int64)
        # Heaps of (KL, −order, record): the least of those kept comes first.
        self.tokens: list[tuple[float, int, DivergentToken]] = []
        self.conversations: list[tuple[float, int, DivergentConversation]] = []

    def add(self, sample_index: int, row: dict, compared: RowComparison) -> None:
        """Add a conversation."""
        self.num_conversations += 1
        self._keep_tokens(sample_index, row, compared)
        sums = comparison_sums(compared)
        self.sums += sums
        self.counts += count_in_bins(compared.kl, KL_EDGES)
        record = _divergent_conversation(sample_index, row, totals_of(sums))
        keep(self.conversations, (record.mean_kl, -sample_index, record), LISTED_CONVERSATIONS)

    def _keep_tokens(self, sample_index: int, row: dict, compared: RowComparison) -> None:
        largest = np.argsort(-compared.kl, kind="stable")[:LISTED_TOKENS]
        if len(self.tokens) == LISTED_TOKENS:
            largest = largest[compared.kl[largest] > self.tokens[0][0]]
        if len(largest):  # rebuilding the tokens takes longer than all the rest
            alignment = self.align(row, sample_index)
        for i in largest.tolist():
            record = _divergent_token(sample_index, row, compared, i, alignment, self.tokenizer)
            keep(self.tokens, (record.kl, -int(self.sums[0]) - i, record), LISTED_TOKENS)

    def comparison(
        self, first: StoredDataset, other: StoredDataset, num_different: int, counts: list[int], is_part: bool
    ) -> DatasetComparison:
        """The comparison of the two datasets, with ``counts`` rows each, once every row has been added."""
        in_both = self.num_conversations + num_different
        return DatasetComparison(
            first=source_of(first),
            other=source_of(other),
            totals=totals_of(self.sums),
            num_conversations=self.num_conversations,
            only_in_first=counts[0] - in_both,
            only_in_other=counts[1] - in_both,
            num_different=num_different,
            differences=run_differences(first.manifest, other.manifest),
            histogram=Histogram(KL_EDGES.tolist(), self.counts.tolist(), is_open_ended=True),
            tokens=largest_first(self.tokens),
            conversations=largest_first(self.conversations),
            chosen_from=first.num_rows if is_part else None,
        )


def _divergent_token(
    sample_index: int, row: dict, compared: RowComparison, i: int, alignment: Alignment, tokenizer
) -> DivergentToken:
    """The row's extracted token number ``i``."""
    position = int(alignment.positions[i])
    text, before = text_and_before(alignment.input_ids, position, tokenizer)
    return DivergentToken(
        sample_index=sample_index,
        source_index=row["source_index"],
        position=position,
        index=i,
        text=text,
        before=before,
        kl=float(compared.kl[i]),
        log_prob=float(compared.first.log_probs[i]),
        other_log_prob=float(compared.other.log_probs[i]),
        prediction=first_prediction(compared.first, i, tokenizer),
        other_prediction=first_prediction(compared.other, i, tokenizer),
    )


def _divergent_conversation(sample_index: int, row: dict, totals: ComparisonTotals) -> DivergentConversation:
    return DivergentConversation(
        sample_index=sample_index,
        source_index=row["source_index"],
        num_tokens=totals.num_tokens,
        mean_kl=totals.mean_kl,
        perplexity=totals.perplexity,
        other_perplexity=totals.other_perplexity,
        question=question_of(row["messages"]),
    )
