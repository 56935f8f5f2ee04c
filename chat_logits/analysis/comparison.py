"""Two logit datasets over the same conversations with the same tokenizer: how far apart their models are, and where."""

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from tqdm import tqdm

from chat_logits.analysis.conversation_comparison import has_same_tokens, refuse_other_tokenizer, source_of
from chat_logits.analysis.divergence import (
    KL_EDGES,
    ApartConversation,
    ApartToken,
    ComparisonTotals,
    RowComparison,
    Source,
    compare_rows,
    comparison_sums,
    totals_of,
)
from chat_logits.analysis.histograms import Histogram, count_in_bins
from chat_logits.analysis.tokens import first_prediction, text_and_before
from chat_logits.data.alignment import Alignment, RowAligner
from chat_logits.data.conversations import question_of
from chat_logits.display.comparison_page import datasets_page
from chat_logits.display.comparison_report import print_datasets
from chat_logits.display.plain_json import json_text
from chat_logits.display.shown_result import ShownResult
from chat_logits.display.token_report import count_text, default_console
from chat_logits.errors import ToolkitError
from chat_logits.storage.dataset import StoredDataset

APART_TOKENS, APART_CONVERSATIONS = 20, 5


@dataclass(frozen=True, repr=False)
class DatasetComparison(ShownResult):
    """Two datasets over all the conversations that they share.

    ``num_conversations`` are shared and compared; ``only_in_first`` and ``only_in_other`` count the others, and
    ``num_different`` those of both whose tokens are not the same, which are left out. ``tokens`` and ``conversations``
    are those where the models part most, by KL and by mean KL, the largest first.
    """

    first: Source
    other: Source
    totals: ComparisonTotals
    num_conversations: int
    only_in_first: int
    only_in_other: int
    num_different: int
    histogram: Histogram
    tokens: list[ApartToken]
    conversations: list[ApartConversation]

    def print(self, console: Console | None = None) -> None:
        """Print the counts, the tables and the totals. A terminal gets lines that fit it, a pipe whole ones."""
        print_datasets(self, console or default_console())

    def to_json(self) -> str:
        """All of it as one JSON object."""
        return json_text(self)

    def to_html(self) -> str:
        """The page: one file that needs nothing else."""
        return datasets_page(self)

    def __repr__(self) -> str:
        counts = f"{count_text(self.num_conversations, 'conversation')}, {count_text(self.totals.num_tokens, 'token')}"
        ids = f"{self.first.logit_dataset_id} with {self.other.logit_dataset_id}"
        return f"<DatasetComparison of {ids}: {counts}, mean KL ≥ {self.totals.mean_kl:.4f} nats>"


def compare_datasets(
    first: StoredDataset, other: StoredDataset, tokenizer, chat_template: str | None = None
) -> DatasetComparison:
    """Compare every conversation of both datasets, in one pass and bounded memory.

    ``tokenizer`` and ``chat_template`` are as in ``compare_analyses``; only the conversations with tokens that are told
    of are rebuilt. Raises UsageError for datasets of two tokenizers, ToolkitError where no conversation is shared.
    """
    refuse_other_tokenizer(first, other)
    findings = _Findings(RowAligner(tokenizer, first.extraction, chat_template).align, tokenizer)
    num_different = 0
    with tqdm(first.rows(), "Comparing", first.num_rows, unit=" conversations", leave=False, delay=1) as rows:
        for sample_index, row, other_row in _paired(rows, other.rows()):
            if has_same_tokens(row, other_row):
                findings.add(sample_index, row, compare_rows(row, other_row))
            else:
                num_different += 1
    if not findings.num_conversations:
        raise ToolkitError(
            f"{first.dataset_id} and {other.dataset_id} share no conversation "
            f"({count_text(num_different, 'source row')} in both, with other tokens); expected datasets extracted "
            "from the same source with the same template"
        )
    return findings.told(first, other, num_different)


def _paired(rows: Iterable[dict], other_rows: Iterator[dict]) -> Iterator[tuple[int, dict, dict]]:
    """The rows of the same source rows, with the first's number; both are in the order of their source rows."""
    other_row = next(other_rows, None)
    for sample_index, row in enumerate(rows):
        while other_row is not None and other_row["source_index"] < row["source_index"]:
            other_row = next(other_rows, None)
        if other_row is None:
            return
        if other_row["source_index"] == row["source_index"]:
            yield sample_index, row, other_row


class _Findings:
    """What is known so far; of tokens and conversations the ones furthest apart alone."""

    def __init__(self, align: Callable[[dict], Alignment], tokenizer):
        self.align, self.tokenizer = align, tokenizer
        self.num_conversations = 0
        self.sums = np.zeros(6)
        self.counts = np.zeros(len(KL_EDGES), np.int64)
        # Heaps of (KL, −place in order, what is told): the least of those kept comes first.
        self.tokens: list[tuple[float, int, ApartToken]] = []
        self.conversations: list[tuple[float, int, ApartConversation]] = []

    def add(self, sample_index: int, row: dict, compared: RowComparison) -> None:
        """Count a conversation in."""
        self.num_conversations += 1
        self._keep_tokens(sample_index, row, compared)
        sums = comparison_sums(compared)
        self.sums += sums
        self.counts += count_in_bins(compared.kl, KL_EDGES)
        told = _apart_conversation(sample_index, row, totals_of(sums))
        _keep(self.conversations, (told.mean_kl, -sample_index, told), APART_CONVERSATIONS)

    def _keep_tokens(self, sample_index: int, row: dict, compared: RowComparison) -> None:
        largest = np.argsort(-compared.kl, kind="stable")[:APART_TOKENS]
        if len(self.tokens) == APART_TOKENS:
            largest = largest[compared.kl[largest] > self.tokens[0][0]]
        if len(largest):  # rebuilding the tokens takes longer than all the rest
            alignment = self.align(row)
        for i in largest.tolist():
            told = _apart_token(sample_index, row, compared, i, alignment, self.tokenizer)
            _keep(self.tokens, (told.kl, -int(self.sums[0]) - i, told), APART_TOKENS)

    def told(self, first: StoredDataset, other: StoredDataset, num_different: int) -> DatasetComparison:
        """All that was found in the two datasets, once every row has been added."""
        in_both = self.num_conversations + num_different
        return DatasetComparison(
            first=source_of(first),
            other=source_of(other),
            totals=totals_of(self.sums),
            num_conversations=self.num_conversations,
            only_in_first=first.num_rows - in_both,
            only_in_other=other.num_rows - in_both,
            num_different=num_different,
            histogram=Histogram(KL_EDGES.tolist(), self.counts.tolist(), is_open_ended=True),
            tokens=_largest_first(self.tokens),
            conversations=_largest_first(self.conversations),
        )


def _keep(heap: list, entry: tuple, size: int) -> None:
    """Add an entry to the ``size`` largest ones."""
    (heapq.heappush if len(heap) < size else heapq.heappushpop)(heap, entry)


def _largest_first(heap: list) -> list:
    return [told for *_, told in sorted(heap, reverse=True)]


def _apart_token(
    sample_index: int, row: dict, compared: RowComparison, i: int, alignment: Alignment, tokenizer
) -> ApartToken:
    """The row's extracted token number ``i``."""
    position = int(alignment.positions[i])
    text, before = text_and_before(alignment.input_ids, position, tokenizer)
    return ApartToken(
        sample_index=sample_index,
        source_index=row["source_index"],
        position=position,
        text=text,
        before=before,
        kl=float(compared.kl[i]),
        log_prob=float(compared.first.log_probs[i]),
        other_log_prob=float(compared.other.log_probs[i]),
        prediction=first_prediction(compared.first, i, tokenizer),
        other_prediction=first_prediction(compared.other, i, tokenizer),
    )


def _apart_conversation(sample_index: int, row: dict, totals: ComparisonTotals) -> ApartConversation:
    return ApartConversation(
        sample_index=sample_index,
        source_index=row["source_index"],
        num_tokens=totals.num_tokens,
        mean_kl=totals.mean_kl,
        perplexity=totals.perplexity,
        other_perplexity=totals.other_perplexity,
        question=question_of(row["messages"]),
    )
