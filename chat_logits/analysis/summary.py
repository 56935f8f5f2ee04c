"""A whole logit dataset in numbers, in one pass over its rows.

Memory depends on the size of the vocabulary, not on the number of rows.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from chat_logits.analysis.bars import bar
from chat_logits.analysis.row import TokenStatistics, perplexity_of, token_statistics
from chat_logits.analysis.runs import RunRecord, run_record
from chat_logits.analysis.tokens import Prediction, first_prediction, text_and_before
from chat_logits.data.alignment import Alignment
from chat_logits.data.row_alignment import RowAligner
from chat_logits.data.stored_messages import question_of
from chat_logits.data.tokenizer import token_text
from chat_logits.storage.dataset import Rows, StoredDataset
from chat_logits.words import count_text

BINS = 10  # of the calibration
NATS = np.arange(21) / 2  # lower ends of the histograms' bins
EXTREMES, LOSSES = 5, 20  # conversations and tokens that are listed
TOP = 5  # of top5_rate


@dataclass(frozen=True)
class Histogram:
    """How many values are in each bin, from ``edges[i]`` up to, but not including, ``edges[i + 1]``.

    If it ``is_open_ended``, the last bin has no upper edge.
    """

    edges: list[float]
    counts: list[int]
    is_open_ended: bool

    @property
    def bins(self) -> list[tuple[float, float | None, int]]:
        """Each bin's lower edge, upper edge (None if it is open) and count."""
        highs = [*self.edges[1:], None] if self.is_open_ended else self.edges[1:]
        return list(zip(self.edges[: len(self.counts)], highs, self.counts, strict=True))


def count_in_bins(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Counts per bin, int64; ``edges`` are the lower ends, the last bin is open, smaller values go to the first."""
    return np.bincount(np.maximum(np.searchsorted(edges, values, side="right") - 1, 0), minlength=len(edges))


@dataclass(frozen=True)
class ReliabilityBin:
    """The positions whose most probable token has a probability from ``low`` to ``high``; ``confidence`` is its mean.

    ``accuracy`` is how often it is the target token; both are None if ``count`` is 0.
    """

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class ConversationSummary:
    """A conversation, its row and its source row; ``question`` is the beginning of its first user message, "" without
    one."""

    sample_index: int
    source_index: int
    num_tokens: int
    perplexity: float
    question: str


@dataclass(frozen=True)
class TokenLoss:
    """A target token of row ``sample_index``, at ``position`` in the conversation and ``index`` among the row's
    extracted tokens, and the text ``before`` it.

    ``log_prob`` is its own, in nats; ``prediction`` the nucleus' first entry, None if the nucleus is empty. In texts,
    bytes of partial characters are surrogate escapes (PEP 383).
    """

    sample_index: int
    position: int
    index: int
    text: str
    before: str
    log_prob: float
    prediction: Prediction | None


@dataclass(frozen=True)
class VocabularyLoss:
    """A token of the vocabulary as a target: its total loss in nats, its ``share`` of all loss, and its mean loss.

    Its largest loss is in row ``sample_index``, at ``index`` among the row's extracted tokens.
    """

    token_id: int
    text: str
    count: int
    total_loss: float
    share: float
    mean_loss: float
    sample_index: int
    index: int


@dataclass(frozen=True)
class ColumnSize:
    """Compressed bytes of a column, or of the shards' footers, in all and per extracted token."""

    column: str
    num_bytes: int
    bytes_per_token: float


@dataclass(frozen=True, repr=False)
class DatasetSummary:
    """What a logit dataset holds and how well the model knew it.

    Means are over the extracted tokens, in nats; rates and ``stored`` (the probability within the nucleus) are shares
    of 1. A target token outside a nucleus of fewer than five entries is not counted in ``top5_rate``, although it may
    be among the five most probable ones: if there are any, ``top5_is_bound``, and the rate is a lower bound. Without
    draws from the tails, ``entropy_is_bound``, and each entropy is a lower bound. Calibration compares the most
    probable token's probability with the text; ``calibration_error`` is the expected calibration error (Guo et al.
    2017, equation 3). ``kept`` counts nucleus entries per position, 0 to K. Conversations are ranked by perplexity (if
    there are few, they are in both lists), tokens by their loss, and vocabulary tokens by their total loss.
    ``turns_left_out`` counts the assistant's turns that are marked not to be trained on, and were not extracted.
    ``run`` records where the rows come from. If only some rows were chosen, ``chosen_from`` is how many the dataset
    has; their bytes are not known, as columns of many rows are compressed together.
    """

    dataset_id: str
    model_id: str
    run: RunRecord
    num_conversations: int
    turns_left_out: int
    num_tokens: int
    mean_nll: float
    perplexity: float
    top1_rate: float
    top5_rate: float
    top5_is_bound: bool
    in_nucleus_rate: float
    mean_entropy: float
    entropy_is_bound: bool
    stored: float
    calibration: list[ReliabilityBin]
    calibration_error: float
    entropies: Histogram
    surprisals: Histogram
    kept: Histogram
    most_confident: list[ConversationSummary]
    least_confident: list[ConversationSummary]
    largest_losses: list[TokenLoss]
    vocabulary_losses: list[VocabularyLoss]
    num_bytes: int | None
    bytes_per_token: float | None
    columns: list[ColumnSize]
    chosen_from: int | None = None

    def as_dict(self) -> dict:
        """All of it as plain values."""
        content = asdict(self)
        return {"logit_dataset_id": content.pop("dataset_id"), **content}

    def __repr__(self) -> str:
        counts = f"{count_text(self.num_conversations, 'conversation')}, {count_text(self.num_tokens, 'token')}"
        return f"<DatasetSummary of {self.dataset_id}: {counts}, perplexity {self.perplexity:,.2f}>"


def _show_progress(rows: Iterable, total: int) -> Iterator:
    return iter(bar(rows, total=total, dynamic_ncols=True, unit=" conversations"))


def summarize(
    dataset: StoredDataset,
    tokenizer,
    chat_template: str | None = None,
    watch: Callable[[Iterable, int], Iterator] = _show_progress,
    rows: Rows | None = None,
) -> DatasetSummary:
    """The summary of a dataset, or of ``rows`` by ascending numbers; ``RowAligner`` rebuilds the tokens.

    ``chat_template`` (a path or text) replaces the recorded one; ``watch(rows, total)`` iterates over the rows, and may
    show progress. Raises ToolkitError if the dataset has no rows, and the errors of reading and aligning, which name
    the row.
    """
    aligner, tally = RowAligner(tokenizer, dataset.manifest, chat_template), _Tally(tokenizer)
    total = dataset.count(rows)
    for sample_index, row in watch(dataset.numbered_rows(rows), total):
        tally.add(sample_index, row, aligner.align(row, sample_index))
    return tally.summary(dataset, total, rows is not None)


class _Tally:
    """Sums, counts and extremes of the rows added so far."""

    def __init__(self, tokenizer):
        self.tokenizer, self.text = tokenizer, partial(token_text, tokenizer)
        self.sums: Counter = Counter()  # by the name of the mean that each becomes
        self.reliability = np.zeros((3, BINS))  # positions, probabilities, target tokens
        self.entropies, self.surprisals = np.zeros((2, len(NATS)), np.int64)
        self.kept: Any = 0  # becomes (K + 1,) int64
        self.turns_left_out = 0
        self.top5_is_bound = self.entropy_is_bound = False
        vocab_size = max(tokenizer.get_vocab().values()) + 1
        self.token_counts, self.token_losses = np.zeros(vocab_size, np.int64), np.zeros(vocab_size)
        self.largest, self.places = np.full(vocab_size, -1.0), np.zeros((vocab_size, 2), np.int64)
        self.most_confident: list[ConversationSummary] = []
        self.least_confident: list[ConversationSummary] = []
        self.largest_losses: list[TokenLoss] = []

    def add(self, sample_index: int, row: dict, alignment: Alignment) -> None:
        token_ids = alignment.input_ids[alignment.positions]
        numbers = token_statistics(row, token_ids)
        losses = -numbers.log_probs
        self.turns_left_out += alignment.turns_left_out
        self.sums.update(
            mean_nll=losses.sum(),
            top1_rate=(numbers.ranks == 1).sum(),
            top5_rate=((numbers.ranks >= 1) & (numbers.ranks <= TOP)).sum(),
            in_nucleus_rate=(numbers.ranks >= 1).sum(),
            mean_entropy=numbers.entropies.sum(),
            stored=(1 - numbers.tail_mass).sum(),
        )
        self.top5_is_bound |= bool(((numbers.ranks == 0) & (numbers.kept < TOP)).any())
        self.entropy_is_bound |= numbers.entropy_is_bound
        self._add_distributions(numbers)
        np.add.at(self.token_counts, token_ids, 1)
        np.add.at(self.token_losses, token_ids, losses)
        self._add_places(sample_index, token_ids, losses)
        self._add_conversation(sample_index, row, losses)
        self._add_losses(sample_index, alignment, numbers)

    def _add_distributions(self, numbers: TokenStatistics) -> None:
        confidence = numbers.top_probs[:, 0]
        bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
        for i, weights in enumerate((None, confidence, numbers.ranks == 1)):
            self.reliability[i] += np.bincount(bins, weights, BINS)
        self.entropies += count_in_bins(numbers.entropies, NATS)
        self.surprisals += count_in_bins(-numbers.log_probs, NATS)
        self.kept = self.kept + np.bincount(numbers.kept, minlength=numbers.top_probs.shape[1] + 1)

    def _add_places(self, sample_index: int, token_ids: np.ndarray, losses: np.ndarray) -> None:
        """Update where each vocabulary token has its largest loss: the row, and the index in it; the first of ties."""
        falling = np.argsort(-losses, kind="stable")
        ids, first = np.unique(token_ids[falling], return_index=True)
        worst = falling[first]
        is_larger = losses[worst] > self.largest[ids]
        ids, worst = ids[is_larger], worst[is_larger]
        self.largest[ids] = losses[worst]
        self.places[ids] = np.stack([np.full(len(worst), sample_index), worst], axis=1)

    def _add_conversation(self, sample_index: int, row: dict, losses: np.ndarray) -> None:
        perplexity, question = perplexity_of(losses.mean()), question_of(row["messages"])
        summary = ConversationSummary(sample_index, row["source_index"], len(losses), perplexity, question)
        self.most_confident = heapq.nsmallest(EXTREMES, [*self.most_confident, summary], lambda one: one.perplexity)
        self.least_confident = heapq.nlargest(EXTREMES, [*self.least_confident, summary], lambda one: one.perplexity)

    def _add_losses(self, sample_index: int, alignment: Alignment, numbers: TokenStatistics) -> None:
        positions, log_probs = alignment.positions, numbers.log_probs
        least = self.largest_losses[-1].log_prob if len(self.largest_losses) == LOSSES else np.inf
        candidates = []
        for i in np.argsort(log_probs, kind="stable")[:LOSSES]:
            if log_probs[i] < least:
                place, first = int(positions[i]), first_prediction(numbers, i, self.tokenizer)
                text, before = text_and_before(alignment.input_ids, place, self.tokenizer)
                candidates.append(TokenLoss(sample_index, place, int(i), text, before, float(log_probs[i]), first))
        self.largest_losses = heapq.nsmallest(LOSSES, [*self.largest_losses, *candidates], lambda one: one.log_prob)

    def summary(self, dataset: StoredDataset, count: int, is_part: bool) -> DatasetSummary:
        """The summary of the ``count`` rows that were added, at least one."""
        tokens, sizes = int(self.token_counts.sum()), {} if is_part else dataset.sizes()
        means = {name: float(total) / tokens for name, total in self.sums.items()}
        _, confidence, right = self.reliability
        return DatasetSummary(
            dataset_id=dataset.dataset_id,
            model_id=dataset.manifest.model_id,
            run=run_record(dataset),
            num_conversations=count,
            turns_left_out=self.turns_left_out,
            num_tokens=tokens,
            perplexity=perplexity_of(means["mean_nll"]),
            **means,
            top5_is_bound=self.top5_is_bound,
            entropy_is_bound=self.entropy_is_bound,
            calibration=[_reliability_bin(i, *column) for i, column in enumerate(self.reliability.T.tolist())],
            calibration_error=float(abs(right - confidence).sum()) / tokens,
            entropies=Histogram(NATS.tolist(), self.entropies.tolist(), is_open_ended=True),
            surprisals=Histogram(NATS.tolist(), self.surprisals.tolist(), is_open_ended=True),
            kept=Histogram(list(range(len(self.kept) + 1)), self.kept.tolist(), is_open_ended=False),
            most_confident=self.most_confident,
            least_confident=self.least_confident,
            largest_losses=self.largest_losses,
            vocabulary_losses=self._vocabulary_losses(),
            num_bytes=None if is_part else sum(sizes.values()),
            bytes_per_token=None if is_part else sum(sizes.values()) / tokens,
            columns=[ColumnSize(name, size, size / tokens) for name, size in sizes.items()],
            chosen_from=dataset.num_rows if is_part else None,
        )

    def _vocabulary_losses(self) -> list[VocabularyLoss]:
        total = float(self.token_losses.sum())
        entries = []
        for token_id in np.argsort(-self.token_losses, kind="stable")[:LOSSES].tolist():
            count, loss = int(self.token_counts[token_id]), float(self.token_losses[token_id])
            if count:
                share, place = loss / total if total else 0.0, self.places[token_id].tolist()
                entries.append(VocabularyLoss(token_id, self.text(token_id), count, loss, share, loss / count, *place))
        return entries


def _reliability_bin(i: int, count: float, confidence: float, right: float) -> ReliabilityBin:
    means = (confidence / count, right / count) if count else (None, None)
    return ReliabilityBin(i / BINS, (i + 1) / BINS, int(count), *means)
