"""Two logit datasets over the same conversations with the same tokenizer: how far apart their models are, and where.

``compare_analyses`` is for one conversation, token by token; ``compare_datasets`` for all of them.
"""

import bisect
import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

import numpy as np
from tqdm import tqdm

from chat_logits.analysis.divergence import (
    KL_EDGES,
    ComparisonTotals,
    DivergentConversation,
    DivergentToken,
    RowComparison,
    Source,
    TokenComparison,
    compare_rows,
    comparison_sums,
    totals_of,
)
from chat_logits.analysis.runs import RunDifference, run_differences
from chat_logits.analysis.summary import Histogram, count_in_bins
from chat_logits.analysis.tokens import (
    first_prediction,
    label_tokens,
    text_and_before,
    with_predictions,
)
from chat_logits.data.alignment import Alignment, RowAligner, align_row
from chat_logits.data.conversations import question_of
from chat_logits.errors import ToolkitError, UsageError
from chat_logits.storage.dataset import Rows, StoredDataset
from chat_logits.storage.json_files import SHOWN, canonical
from chat_logits.words import count_text

LISTED_TOKENS, LISTED_CONVERSATIONS = 20, 5
# Keys of extraction.json that decide which tokens a conversation has and which of them are extracted
DECIDE_TOKENS = (
    *("keep_end_of_turn", "all_turns", "skipped_token_ids", "chat_template", "tools_template", "template_kwargs"),
    *("template_date", "system_prompt", "columns", "dataset_config", "split", "dataset_revision"),
)
Watch = Callable[[Iterable, int], Iterator]


# --- one conversation ---


@dataclass(frozen=True, repr=False)
class Comparison(Sequence):
    """A conversation's tokens, all of them, in order, as both models see them; a sequence of ``TokenComparison``.

    ``sample_index`` and ``other_sample_index`` are its rows, ``differences`` the runs'. ``top_n`` predictions
    a token and model are shown, and with ``only`` the n extracted tokens with the largest KL alone, the largest first.
    """

    tokens: list[TokenComparison]
    totals: ComparisonTotals
    messages: list[dict]
    first: Source
    other: Source
    sample_index: int
    other_sample_index: int
    source_index: int
    top_n: int = 5
    only: int | None = None
    differences: list[RunDifference] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index):
        return self.tokens[index]

    def __repr__(self) -> str:
        ids = (self.first.logit_dataset_id, self.other.logit_dataset_id)
        return f"<Comparison of row {self.sample_index} of {ids[0]} with {ids[1]}: {count_text(len(self), 'token')}>"

    def showing(self, only: int | None = None) -> "Comparison":
        """The same comparison with the ``only`` tokens furthest apart, or all of them."""
        return replace(self, only=only)

    @cached_property
    def shown(self) -> list[TokenComparison]:
        """The tokens that are shown."""
        if self.only is None:
            return self.tokens
        return sorted((token for token in self.tokens if token.is_extracted), key=lambda token: -(token.kl or 0.0))[
            : self.only
        ]

    def to_dicts(self) -> list[dict]:
        """A dict per shown token; numbers of tokens that were not extracted are None."""
        return [token.as_dict() for token in self.shown]

    @property
    def head(self) -> dict:
        """Which rows of which datasets it is of, how their runs differ, and the totals."""
        names = ("first", "other", "sample_index", "other_sample_index", "source_index", "differences", "totals")
        return {name: getattr(self, name) for name in names}

    def as_dict(self) -> dict:
        """Plain values: which rows of which datasets, how their runs differ, the totals, and the tokens shown."""
        return {**self.head, "tokens": self.to_dicts()}


def compare_analyses(
    first: StoredDataset,
    other: StoredDataset,
    tokenizer,
    sample_index: int = 0,
    chat_template: str | None = None,
    top_n: int = 5,
    only: int | None = None,
) -> Comparison:
    """Row ``sample_index`` of ``first`` (negative ones from the end) beside the other's row of the same source row.

    ``tokenizer`` is the recorded one; ``chat_template`` is as for ``align_row``, ``top_n`` and ``only`` as in
    ``Comparison``. Raises UsageError for datasets of two tokenizers, ToolkitError where the other has not got the
    conversation, or has it with other tokens.
    """
    row, other_index, other_row = _same_conversation(first, other, sample_index)
    alignment = align_row(row, tokenizer, first.manifest, chat_template)
    compared = compare_rows(row, other_row, alignment.input_ids[alignment.positions])
    return Comparison(
        tokens=_compared_tokens(alignment, compared, tokenizer, top_n),
        totals=totals_of(comparison_sums(compared)),
        messages=row["messages"],
        first=source_of(first),
        other=source_of(other),
        sample_index=sample_index % first.num_rows,
        other_sample_index=other_index,
        source_index=row["source_index"],
        differences=run_differences(first.manifest, other.manifest),
        top_n=top_n,
        only=only,
    )


def _same_conversation(first: StoredDataset, other: StoredDataset, sample_index: int) -> tuple[dict, int, dict]:
    """The row, and the other's index and row of the same source row with the same tokens."""
    refuse_other_tokenizer(first, other)
    row = first.read_row(sample_index)
    other_index, other_row = row_of(other, row["source_index"], sample_index % first.num_rows)
    if not has_same_tokens(row, other_row):
        raise ToolkitError(
            f"{other.dataset_id}: source row {row['source_index']} has other tokens there than in {first.dataset_id}; "
            f"{_why_other_tokens(first, other)}"
        )
    return row, other_index, other_row


def refuse_other_tokenizer(first: StoredDataset, other: StoredDataset) -> None:
    """Raise UsageError where two datasets' ids are not of one tokenizer."""
    expected, fingerprint = (dataset.manifest.tokenizer_fingerprint for dataset in (first, other))
    if fingerprint != expected:
        raise UsageError(
            f"{other.dataset_id}: made with another tokenizer ({fingerprint[:12]}) than {first.dataset_id} "
            f"({expected[:12]}). Compare datasets whose models share a tokenizer."
        )


def row_of(dataset: StoredDataset, source_index: int, likely: int) -> tuple[int, dict]:
    """The stored row of a source row and its number, which is ``likely`` unless the datasets lack different rows.

    Rows are in the order of their source rows.
    """
    row = dataset.read_row(likely) if likely < dataset.num_rows else None
    if row is not None and row["source_index"] == source_index:
        return likely, row
    rows = range(dataset.num_rows)
    index = bisect.bisect_left(rows, source_index, key=lambda i: dataset.read_row(i)["source_index"])
    row = dataset.read_row(index) if index < dataset.num_rows else None
    if row is None or row["source_index"] != source_index:
        raise ToolkitError(
            f"{dataset.dataset_id}: source row {source_index} is not in it (skipped, or not reached); "
            "choose another conversation with `sample_index`"
        )
    return index, row


def has_same_tokens(row: dict, other_row: dict) -> bool:
    """Whether two rows are about the same input ids and the same extracted tokens, by their checksums."""
    return all(row[name] == other_row[name] for name in ("alignment_checksum", "num_tokens"))


def _why_other_tokens(first: StoredDataset, other: StoredDataset) -> str:
    """How the runs differ in what decides the tokens, and what to do about it."""
    differences = run_differences(first.manifest, other.manifest)
    deciding = [each for each in differences if each.key.partition(".")[0] in DECIDE_TOKENS]
    if not deciding:
        return "expected the same conversations, extracted with the same template"
    deciding.sort(key=lambda each: DECIDE_TOKENS.index(each.key.partition(".")[0]))
    return (
        f"their runs differ in {', '.join(map(_difference_text, deciding))}. "
        "Extract one of them again with the options of the other."
    )


def _difference_text(difference: RunDifference) -> str:
    """The key, and both values where they are short; an extraction.json without the key has null."""
    values = [canonical(value).decode() for value in (difference.first, difference.other)]
    return f"{difference.key} ({' and '.join(values)})" if max(map(len, values)) <= SHOWN else difference.key


def source_of(dataset: StoredDataset) -> Source:
    """The dataset and the model that it is of."""
    return Source(dataset.dataset_id, dataset.manifest.model_id)


def _compared_tokens(alignment: Alignment, compared: RowComparison, tokenizer, top_n: int) -> list[TokenComparison]:
    labels = label_tokens(alignment, tokenizer)
    models = [with_predictions(labels, numbers, tokenizer, top_n) for numbers in (compared.first, compared.other)]
    tokens = [TokenComparison(*pair) for pair in zip(*models, strict=True)]
    columns = (compared.kl.tolist(), compared.agrees.tolist(), compared.log_prob_changes.tolist())
    for position, *numbers in zip(alignment.positions, *columns, strict=True):
        tokens[position] = TokenComparison(tokens[position].first, tokens[position].other, *numbers)
    return tokens


# --- two datasets ---


@dataclass(frozen=True, repr=False)
class DatasetComparison:
    """Two datasets over all the conversations that they share.

    ``num_conversations`` are shared and compared; ``only_in_first`` and ``only_in_other`` count the others, and
    ``num_different`` those of both whose tokens are not the same, which are left out. ``tokens`` and ``conversations``
    are those with the largest KL and mean KL, the largest first; ``differences`` is what differs between the runs.
    Where some of the first's rows were chosen for it, ``chosen_from`` is how many it has.
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


def show_progress(rows: Iterable, total: int) -> Iterator:
    """Go through the rows; a terminal is told how far, from a second on."""
    with tqdm(rows, "Comparing", total, unit=" conversations", leave=False, delay=1) as bar:
        yield from bar


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

    ``tokenizer`` and ``chat_template`` are as in ``compare_analyses``; only the conversations with tokens that are
    listed are rebuilt. ``watch(rows, total)`` goes through the first's rows. ``rows`` and ``other_rows`` are the
    numbers, ascending, of those to compare, None for all. Raises UsageError for datasets of two tokenizers,
    ToolkitError where no conversation is shared.
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
            f"{_why_other_tokens(first, other) if num_different else expected}"
        )
    return tally.comparison(first, other, num_different, counts, rows is not None)


Numbered = Iterable[tuple[int, dict]]


def paired_rows(rows: Numbered, other_rows: Numbered) -> Iterator[tuple[int, dict, int, dict]]:
    """The rows of the same source rows, each with its number; both are in the order of their source rows."""
    others: Iterator[tuple[int, dict | None]] = iter(other_rows)
    end: tuple[int, dict | None] = (0, None)
    other_index, other_row = next(others, end)
    for sample_index, row in rows:
        while other_row is not None and other_row["source_index"] < row["source_index"]:
            other_index, other_row = next(others, end)
        if other_row is None:
            return
        if other_row["source_index"] == row["source_index"]:
            yield sample_index, row, other_index, other_row


class _ComparisonTally:
    """Sums and counts of the rows added so far, and the tokens and conversations furthest apart."""

    def __init__(self, align: Callable[[dict], Alignment], tokenizer):
        self.align, self.tokenizer = align, tokenizer
        self.num_conversations = 0
        self.sums = np.zeros(6)
        self.counts = np.zeros(len(KL_EDGES), np.int64)
        # Heaps of (KL, −place in order, record): the least of those kept comes first.
        self.tokens: list[tuple[float, int, DivergentToken]] = []
        self.conversations: list[tuple[float, int, DivergentConversation]] = []

    def add(self, sample_index: int, row: dict, compared: RowComparison) -> None:
        """Count a conversation in."""
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
            alignment = self.align(row)
        for i in largest.tolist():
            record = _divergent_token(sample_index, row, compared, i, alignment, self.tokenizer)
            keep(self.tokens, (record.kl, -int(self.sums[0]) - i, record), LISTED_TOKENS)

    def comparison(
        self, first: StoredDataset, other: StoredDataset, num_different: int, counts: list[int], is_part: bool
    ) -> DatasetComparison:
        """The comparison of the two datasets, of which ``counts`` rows each, once every row has been added."""
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


def keep(heap: list, entry: tuple, size: int) -> None:
    """Add an entry to the ``size`` largest ones."""
    (heapq.heappush if len(heap) < size else heapq.heappushpop)(heap, entry)


def largest_first(heap: list) -> list:
    return [record for *_, record in sorted(heap, reverse=True)]


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
