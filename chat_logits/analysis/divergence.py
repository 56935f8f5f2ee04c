"""Two models over the same tokens: their KL divergence per token, and the records of a comparison."""

from dataclasses import asdict, dataclass

import numpy as np

from chat_logits.analysis.row import TokenStatistics, perplexity_of, token_statistics
from chat_logits.analysis.tokens import Prediction, TokenAnalysis
from logit_codec import ABSENT, CODE_PROBS, MAX_TOKEN_ID, nearest_codes

KL_EDGES = np.array([0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10])  # nats; the last bin has no end


@dataclass(frozen=True)
class RowComparison:
    """Two stored rows of one conversation, numbers per token.

    ``first`` and ``other`` are each row's numbers for the same n target tokens; ``kl`` float64 (n,) is
    ``kl_lower_bound``, in nats; ``agrees`` bool (n,) says whether both have the same id first.
    """

    first: TokenStatistics
    other: TokenStatistics
    kl: np.ndarray
    agrees: np.ndarray

    @property
    def log_prob_changes(self) -> np.ndarray:
        """Δ log p of the target tokens, the other's minus the first's: float64 (n,), nats, 0 if both are −∞."""
        before, after = self.first.log_probs, self.other.log_probs
        with np.errstate(invalid="ignore"):
            return np.where(before == after, 0.0, after - before)


def compare_rows(row: dict, other_row: dict, token_ids: np.ndarray | None = None) -> RowComparison:
    """Compare two rows whose ``alignment_checksum`` and ``num_tokens`` are the same.

    ``token_ids`` int (n,) are the extracted tokens. Only the ranks depend on them; without them, all ranks are 0.
    """
    if token_ids is None:
        token_ids = np.full(row["num_tokens"], ABSENT)
    first, other = token_statistics(row, token_ids), token_statistics(other_row, token_ids)
    agrees = (first.top_ids[:, 0] == other.top_ids[:, 0]) & (first.kept > 0) & (other.kept > 0)
    return RowComparison(first, other, kl_lower_bound(first, other), agrees)


# --- KL divergence of truncated distributions ---


def kl_lower_bound(first: TokenStatistics, other: TokenStatistics) -> np.ndarray:
    """A lower bound of KL(first ‖ other), given two stored distributions: float64 (n,), nats, ≥ 0.

    For each model the nucleus and the total mass outside of it are known, but not how that mass is distributed. So the
    vocabulary is partitioned into cells: each id that both nuclei have, the set A of ids that only the first's has, and
    the rest R. Merging outcomes never raises a KL divergence (the log sum inequality; Cover & Thomas, Elements of
    Information Theory, 2.7), hence

        KL ≥ Σ_common p log(p/q) + p_A log(p_A/q_A) + p_R log(p_R/(m − q_A)),    m = 1 − Σ_common q

    with p_R the first's tail mass. Only q_A is unknown. The right side is convex in q_A, with its minimum at
    q_A = m p_A/(p_A + p_R), or at the largest possible q_A if that is less: A lies outside the other's nucleus, so q_A
    is at most the mass there, and at most the last kept probability for each id in A.

    With exact probabilities the bound is exact. The codes' rounding moves it by about as much as it moves the terms;
    the mass that rounding can hide is added to the largest q_A, and is the least value of m, so that the bound is
    always finite. Totals above 1 are scaled to 1.
    """
    p, q = first.top_probs / _excess(first), _probabilities_there(first, other) / _excess(other)
    common, alone = q > 0, (q == 0) & (p > 0)
    last, hidden = _rounding(other)
    p_a, p_r = np.where(alone, p, 0).sum(axis=1), np.maximum(0, 1 - p.sum(axis=1))
    m = np.maximum(1 - q.sum(axis=1), hidden)
    most = np.minimum(other.tail_mass + hidden, alone.sum(axis=1) * last)
    per_mass = m / np.maximum(p_a + p_r, np.finfo(float).tiny)
    q_a = np.minimum(p_a * per_mass, most)
    q_r = np.maximum(m - q_a, p_r * per_mass)  # the second where the difference would lose a tiny mass
    total = _plogpq(p * common, q).sum(axis=1) + _plogpq(p_a, q_a) + _plogpq(p_r, q_r)
    return np.maximum(0, total)


def _excess(numbers: TokenStatistics) -> np.ndarray:
    """What to divide a nucleus by, (n, 1): its total if rounding has raised that above 1, else 1."""
    return np.maximum(1, numbers.top_probs.sum(axis=1, keepdims=True))


def _rounding(numbers: TokenStatistics) -> tuple[np.ndarray, np.ndarray]:
    """The largest possible value of the last kept probability before rounding, and how far a total can be off: float64
    (n,).

    A code that takes a carry is off by at most one and a half steps. With half a step h_k at entry k, the carry after
    it is at most max(h_k, the carry before − h_k); unrolled, that is the largest h_k − (h of the entries after it).
    """
    codes = nearest_codes(numbers.top_probs)
    last = np.take_along_axis(codes, numbers.kept[:, None] - 1, axis=1)[:, 0]
    lower = np.minimum(codes, 254)
    halves = np.where(numbers.top_probs > 0, (CODE_PROBS[lower + 1] - CODE_PROBS[lower]) / 2, 0)
    after = np.cumsum(halves[:, ::-1], axis=1)[:, ::-1] - halves
    return CODE_PROBS[np.minimum(last + 2, 255)], (halves - after).max(axis=1)


def _probabilities_there(first: TokenStatistics, other: TokenStatistics) -> np.ndarray:
    """The other's probabilities of the first's ids, (n, K) as these; 0 for ids that its nucleus does not have."""
    offsets = np.arange(len(first.top_ids), dtype=np.int64)[:, None] * MAX_TOKEN_ID
    present = other.top_probs > 0
    keys, probabilities = (offsets + other.top_ids)[present], other.top_probs[present]
    order = np.argsort(keys)
    keys, probabilities = np.append(-1, keys[order]), np.append(0.0, probabilities[order])
    wanted = offsets + first.top_ids
    nearest = np.searchsorted(keys, wanted, side="right") - 1
    return np.where((keys[nearest] == wanted) & (first.top_probs > 0), probabilities[nearest], 0.0)


def _plogpq(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """p log(p/q), 0 if p is 0."""
    counts = p > 0
    return p * np.log(np.where(counts, p, 1) / np.where(counts, q, 1))


# --- totals ---


@dataclass(frozen=True)
class ComparisonTotals:
    """A conversation, or a dataset, in six numbers.

    ``mean_kl`` (of the lower bounds) and ``mean_change`` (of |Δ log p| of the target tokens) are in nats; ``agreement``
    is the share of tokens at which both models have the same most probable token.
    """

    num_tokens: int
    mean_kl: float
    agreement: float
    perplexity: float
    other_perplexity: float
    mean_change: float


def comparison_sums(compared: RowComparison) -> np.ndarray:
    """A row's sums for ``totals_of``, to be added up over rows: float64 (6,), in the order of ``ComparisonTotals``."""
    parts = (compared.kl, compared.agrees, -compared.first.log_probs, -compared.other.log_probs)
    return np.array([len(compared.kl), *(part.sum() for part in parts), np.abs(compared.log_prob_changes).sum()])


def totals_of(sums: np.ndarray) -> ComparisonTotals:
    """Sums over at least one token as means; sums of surprisal as perplexities."""
    mean_kl, agreement, nll, other_nll, change = (sums[1:] / sums[0]).tolist()
    perplexities = perplexity_of(nll), perplexity_of(other_nll)
    return ComparisonTotals(int(sums[0]), mean_kl, agreement, *perplexities, mean_change=change)


# --- records ---


@dataclass(frozen=True)
class Source:
    """One of the two datasets of a comparison, and its model."""

    logit_dataset_id: str
    model_id: str


@dataclass(frozen=True)
class TokenComparison:
    """A token of a conversation as both models see it.

    ``kl`` and ``log_prob_change`` (the other's minus the first's) are in nats; they and ``agrees`` are None unless the
    token was extracted.
    """

    first: TokenAnalysis
    other: TokenAnalysis
    kl: float | None = None
    agrees: bool | None = None
    log_prob_change: float | None = None

    @property
    def is_extracted(self) -> bool:
        return self.first.is_extracted

    def as_dict(self) -> dict:
        """Plain values: the token, its KL divergence, and each model's numbers under ``first`` and ``other``."""
        token = {name: getattr(self.first, name) for name in ("position", "token_id", "text", "status", "reason")}
        models = {
            name: _model_numbers(getattr(self, name)) if self.is_extracted else None for name in ("first", "other")
        }
        return {**token, "kl": self.kl, "agrees": self.agrees, "log_prob_change": self.log_prob_change, **models}


def _model_numbers(token: TokenAnalysis) -> dict:
    values = asdict(token)
    return {
        name: values[name]
        for name in ("log_prob", "rank", "kept", "tail_mass", "entropy", "entropy_is_bound", "predictions")
    }


@dataclass(frozen=True)
class DivergentToken:
    """A token with a large KL divergence: the text before it, and each model's most probable token there.

    ``sample_index`` is the first dataset's row, ``position`` counts the conversation's tokens and ``index`` the row's
    extracted ones; all logs are in nats. A prediction is None if that dataset has stored none.
    """

    sample_index: int
    source_index: int
    position: int
    index: int
    text: str
    before: str
    kl: float
    log_prob: float
    other_log_prob: float
    prediction: Prediction | None
    other_prediction: Prediction | None


@dataclass(frozen=True)
class DivergentConversation:
    """A conversation with a large mean KL divergence; ``question`` is the beginning of its first user turn."""

    sample_index: int
    source_index: int
    num_tokens: int
    mean_kl: float
    perplexity: float
    other_perplexity: float
    question: str
