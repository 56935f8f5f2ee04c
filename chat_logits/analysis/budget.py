"""How many entries does a student need? The size and the error of smaller settings, on a dataset's own rows.

The target of a student is a vector w over the vocabulary (FORMAT.md, "Reading a position"), and the gradient of the
forward KL with respect to the logits is softmax(logits) − w. The draws add a random error to it, which is the same for
every student: its mean square is the sum of the variances of w's components. Systematic sampling draws an id whose
weights total x times the spacing of the thresholds ⌊x⌋ or ⌈x⌉ times, the latter with probability x − ⌊x⌋ (Madow 1949,
On the theory of systematic sampling, II). So with S draws of the tail mass T the variance is exactly

    E‖w' − w‖² = (T/S)² Σ_ids f·(1 − f),    f the fractional part of x = S·p/T

For a thinned target, p is the id's weight in the stored target, which is known. For the stored target itself, p is the
model's probability, known only for the ids that were drawn; since an id is drawn x times on average, the sum of
f·(1 − f)/x over the draws is an unbiased estimate of the sum over all ids. The two variances add up, since the second
stage is unbiased whatever the first one drew.
"""

from dataclasses import asdict, dataclass, replace

import numpy as np

from chat_logits.analysis.bars import bar
from chat_logits.analysis.thinning import (
    Entries,
    Setting,
    kept_entries,
    stored_setting,
    tail_list,
    thin_row,
)
from chat_logits.analysis.verification import spread
from chat_logits.scratch import scratch_folder
from chat_logits.storage.dataset import StoredDataset
from chat_logits.storage.manifest import Manifest
from chat_logits.storage.shard import write_shard
from chat_logits.words import count_text
from logit_codec import CODE_PROBS, MAX_TOKEN_ID

LADDER: tuple[tuple[float, ...], ...] = ((64, 32, 16, 8, 4), (16, 8, 4), (0.95, 0.9))  # K, S, P
BUDGET_ROWS = 64


@dataclass(frozen=True)
class BudgetLine:
    """A setting, measured on a sample of rows.

    ``bytes_per_token`` is measured on a shard that was really written; ``stored`` is the mean share of the probability
    in the nucleus. The target's errors are relative to the norm of the model's distribution: ``deviation`` is the
    random error that thinning adds, ``whole_deviation`` all random error, including that of the stored draws, and
    ``bias`` the error that does not average out. The first two are None without draws: then the renormalised nucleus is
    the whole target, and ``nucleus_kl`` is its mean KL(renormalised nucleus ‖ model) in nats, −ln of the nucleus'
    share. With ``bias_is_bound`` the bias is a lower bound, as the dataset itself has no draws. ``is_best`` if no other
    setting with draws takes fewer bytes without a larger deviation.
    """

    top_k: int
    num_sampled: int
    top_p: float
    bytes_per_token: float
    stored: float
    nucleus_kl: float
    deviation: float | None
    whole_deviation: float | None
    bias: float
    bias_is_bound: bool = False
    is_best: bool = False


@dataclass(frozen=True, repr=False)
class Budget:
    """A ladder of settings for a dataset, the stored one first, on ``num_conversations`` spread over it."""

    dataset_id: str
    num_conversations: int
    num_tokens: int
    lines: list[BudgetLine]

    def as_dict(self) -> dict:
        """All of it as plain values."""
        content = asdict(self)
        return {"logit_dataset_id": content.pop("dataset_id"), **content}

    def __repr__(self) -> str:
        counts = f"{count_text(self.num_conversations, 'conversation')}, {count_text(self.num_tokens, 'token')}"
        return f"<Budget of {self.dataset_id}: {counts}, {count_text(len(self.lines), 'setting')}>"


def measure_budget(dataset: StoredDataset, count: int = BUDGET_ROWS) -> Budget:
    """The size and error of a ladder of settings, on ``count`` rows spread evenly over the dataset; shows progress.

    Raises ToolkitError if there are no rows.
    """
    dataset.refuse_empty()
    indices = spread(dataset.num_rows, count)
    rows = [dataset.read_row(index) for index in bar(indices, "Reading", unit=" rows", leave=False, delay=1)]
    norm, own = (sum(values) for values in zip(*(_norm_and_own(Entries.of(row)) for row in rows), strict=True))
    settings = bar(ladder(stored_setting(dataset.manifest)), "Thinning", unit=" settings", leave=False, delay=1)
    lines = [_line(rows, setting, dataset.manifest, norm, own) for setting in settings]
    tokens = sum(row["num_tokens"] for row in rows)
    return Budget(dataset.dataset_id, len(rows), tokens, _with_best(lines))


def ladder(stored: Setting) -> list[Setting]:
    """The settings to measure, the stored one first.

    >>> ladder(Setting(6, 4, 0.9))
    [Setting(top_k=6, num_sampled=4, top_p=0.9), Setting(top_k=4, num_sampled=4, top_p=0.9), \
Setting(top_k=6, num_sampled=0, top_p=0.9), Setting(top_k=4, num_sampled=0, top_p=0.9)]
    """
    ks, ss, ps = (
        [most, *(value for value in values if value < most)] for values, most in zip(LADDER, stored, strict=True)
    )
    with_draws = [Setting(int(k), int(s), p) for k in ks for s in ss for p in ps] if stored.num_sampled else []
    return with_draws + [Setting(int(k), 0, p) for k in ks for p in (ps[:1] if with_draws else ps)]


def _line(rows: list[dict], setting: Setting, manifest: Manifest, norm: float, own: float) -> BudgetLine:
    sums = sum((_setting_sums(Entries.of(row), setting, manifest.top_p) for row in rows), np.zeros(4))
    tokens = sum(row["num_tokens"] for row in rows)
    stored, nucleus_kl = (sums[:2] / tokens).tolist()
    variance, bias = sums[2:].tolist()
    has_draws, is_bound = setting.num_sampled > 0, not manifest.num_sampled
    return BudgetLine(
        **setting._asdict(),
        bytes_per_token=_written_bytes([thin_row(row, setting, manifest) for row in rows], setting, manifest) / tokens,
        stored=stored,
        nucleus_kl=nucleus_kl,
        deviation=float(np.sqrt(variance / norm)) if has_draws else None,
        whole_deviation=float(np.sqrt((variance + own) / norm)) if has_draws else None,
        # The tail is unknown in numerator and denominator, so a ratio above 1 can only be bounded by 1.
        bias=0.0 if has_draws else float(np.sqrt(min(1, bias / norm) if is_bound else bias / norm)),
        bias_is_bound=is_bound,
    )


def _written_bytes(rows: list[dict], setting: Setting, manifest: Manifest) -> int:
    with scratch_folder() as folder:
        manifest = manifest.thinned(setting.top_k, setting.top_p, setting.num_sampled)
        return write_shard(folder, manifest, 0, rows, []).num_bytes


def _with_best(lines: list[BudgetLine]) -> list[BudgetLine]:
    drawn = [(line.bytes_per_token, line.whole_deviation) for line in lines if line.whole_deviation is not None]

    def is_best(line: BudgetLine) -> bool:
        deviation, size = line.whole_deviation, line.bytes_per_token
        return deviation is not None and not any(
            other <= size and less <= deviation and (other, less) != (size, deviation) for other, less in drawn
        )

    return [replace(line, is_best=is_best(line)) for line in lines]


# --- a row's sums of squares ---


def _norm_and_own(entries: Entries) -> tuple[float, float]:
    """‖w‖² of the model's distribution and the variance of the stored draws, summed over positions; both are unbiased
    estimates."""
    share, probabilities = _draws(entries)
    norm = (CODE_PROBS[entries.top_codes] ** 2).sum() + (share * probabilities).sum()
    x = np.divide(probabilities, share, out=np.zeros_like(probabilities), where=(share > 0) & (probabilities > 0))
    chance = np.divide(_fraction_variance(x), x, out=np.zeros_like(x), where=x > 0)
    return float(norm), float((share**2 * chance).sum())


def _draws(entries: Entries) -> tuple[np.ndarray, np.ndarray]:
    """The weight of each draw (n, 1), and the probabilities of the draws (n, S)."""
    share = entries.tail_mass / max(1, entries.sampled_codes.shape[1])
    return share[:, None], CODE_PROBS[entries.sampled_codes]


def _setting_sums(entries: Entries, setting: Setting, top_p: float) -> np.ndarray:
    """Sums over positions: the nucleus' share, its −ln, the variance that a setting adds, the bias² without draws."""
    kept = kept_entries(entries, setting, top_p)
    probabilities = CODE_PROBS[entries.top_codes]
    mass = np.clip((probabilities * kept).sum(axis=1), np.finfo(float).tiny, 1)
    share, drawn = _draws(entries)
    squares = (probabilities**2 * kept).sum(axis=1)
    outside = (probabilities**2 * ~kept).sum() + (share * drawn).sum()
    bias = (squares * (1 / mass - 1) ** 2).sum() + outside
    return np.array([mass.sum(), -np.log(mass).sum(), _added_variance(entries, kept, setting), bias])


def _added_variance(entries: Entries, kept: np.ndarray, setting: Setting) -> float:
    """E‖w' − w‖² over the uniforms of thinning, summed over positions; w is the stored target, w' the thinned one."""
    if not setting.num_sampled:
        return 0.0
    tail = tail_list(entries, kept)
    rows = np.repeat(np.arange(len(tail.ids)), tail.ids.shape[1])
    keys, inverse = np.unique(rows * MAX_TOKEN_ID + tail.ids.reshape(-1), return_inverse=True)
    weights, at = np.bincount(inverse, tail.weights.reshape(-1)), keys // MAX_TOKEN_ID
    totals = tail.weights.sum(axis=1)
    x = setting.num_sampled * weights / np.where(totals > 0, totals, 1)[at]
    share = np.maximum(0, 1 - (CODE_PROBS[entries.top_codes] * kept).sum(axis=1)) / setting.num_sampled
    return float((share[at] ** 2 * _fraction_variance(x)).sum())


def _fraction_variance(x: np.ndarray) -> np.ndarray:
    """The variance of a count that is ⌊x⌋ or ⌈x⌉, and x on average."""
    fraction = x - np.floor(x)
    return fraction * (1 - fraction)
