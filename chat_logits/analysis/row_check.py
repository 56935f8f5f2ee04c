"""One stored conversation against a reference forward pass: differences, column by column, and their cause."""

from dataclasses import dataclass

import numpy as np

from chat_logits.analysis.reference_output import IN_PLACE, SHIFTS, Asked, Output, dtype_name, ranked_ids
from chat_logits.analysis.row import token_statistics
from chat_logits.data.alignment import Alignment
from chat_logits.storage.manifest import Manifest
from logit_codec import (
    ABSENT,
    CODE_PROBS,
    NUMBERS_TOLERANCE,
    DecodedRow,
    decode_row,
    draw_uniforms,
    nearest_codes,
    nucleus_cut,
)

# Largest mean KL of a row, nats. The codes cause 3e-4, and rounded logits half the variance of their errors: for
# SmolLM2 2e-5 in float16 and 2e-3 in bfloat16. Another position's distribution causes whole nats.
KL_LIMITS = {"float32": 0.01, "float16": 0.02, "bfloat16": 0.05}
POSITION_FACTOR = 10  # a single position's KL may be larger by this factor
NO_TAIL = 1e-30  # probability below which float32 may find nothing to draw
LEAST_REST = 1e-9  # probability of the rest if the codes leave nothing


@dataclass(frozen=True)
class Fault:
    """A column that differs from the model at the positions ``wrong``, bool (n,); ``detail`` describes the first one.

    For a number of the whole row, no position is marked as wrong.
    """

    column: str
    wrong: np.ndarray
    detail: str


@dataclass(frozen=True)
class RowCheck:
    """A row's errors in nats, float64 (3, n) for each of SHIFTS, and its faults in order of diagnosis.

    ``in_order``, bool (n,), says where the nucleus' ids are the model's; ``tolerance`` is the difference allowed for a
    logit.
    """

    row: int
    tolerance: float
    kl_limit: float
    errors: dict[str, np.ndarray]
    in_order: np.ndarray
    faults: list[Fault]

    @property
    def shift(self) -> int | None:
        """The index in SHIFTS that most of the stored distributions fit, if they do not fit in place."""
        medians = np.median(self.errors["kl"], axis=1)
        best = int(medians.argmin())
        return best if medians[best] <= self.kl_limit < medians[IN_PLACE] else None

    @property
    def is_all_wrong(self) -> bool:
        """Whether most positions are wrong, both in distributions and in single numbers, and none is merely shifted."""
        kinds = {fault.column in self.errors for fault in self.faults}
        return self.shift is None and len(kinds) == 2 and np.any([f.wrong for f in self.faults], axis=0).mean() > 0.5

    @property
    def cause(self) -> str:
        """A line about what is wrong with a row that has faults."""
        if self.shift is not None:
            return self._shift_cause(self.shift)
        columns = list(dict.fromkeys(fault.column for fault in self.faults))
        also = f"; also wrong: {', '.join(columns[1:])}" if columns[1:] else ""
        return f"row {self.row}, column {columns[0]}, {self.faults[0].detail}{also}"

    def _shift_cause(self, shift: int) -> str:
        columns = [f.column if f.column in self.errors else f"{f.column.split('_')[0]}_*" for f in self.faults]
        medians = np.median(self.errors["kl"], axis=1)
        return (
            f"row {self.row}, columns {', '.join(dict.fromkeys(columns))}: shifted by one, the stored distributions "
            f"are those of the position {'before' if SHIFTS[shift] < 0 else 'after'} "
            f"(median KL {medians[shift]:.2g} nats there, {medians[IN_PLACE]:.2g} in place)"
        )


def check_row(index: int, row: dict, alignment: Alignment, model, manifest: Manifest) -> RowCheck:
    """Compare stored row ``index``, aligned, with a reference forward pass over its conversation alone."""
    stored, tokens = decode_row(row), alignment.input_ids[alignment.positions]
    asked = Asked(stored, tokens, alignment.positions - 1, len(alignment.input_ids))
    output = Output(model, alignment.input_ids, asked)
    numbers = {"logsumexp": output.logsumexp[asked.at], "token_log_probs": asked.tokens}
    errors = {"kl": np.stack([_divergences(true, stored.top_log_probs) for true in asked.top])}
    errors |= {name: _distance(np.array(row[name]), true) for name, true in numbers.items()}
    faults, tolerance = [], output.tolerance
    for name, each in numbers.items():
        true, wrong = each[IN_PLACE], ~(errors[name][IN_PLACE] <= tolerance)
        faults += _fault(name, wrong, "nats", np.array(row[name]), true - tolerance, true + tolerance)
    nucleus = _Nucleus(row, stored, asked, tolerance, manifest)
    limit = KL_LIMITS[dtype_name(model)]
    faults += nucleus.faults(errors["kl"][IN_PLACE], limit)
    faults += _draw_faults(row, stored, output, asked, manifest, nucleus.right_ids)
    faults = faults or _number_faults(row, tokens)  # wrong columns would make these wrong, too
    return RowCheck(index, tolerance, limit, errors, nucleus.in_order, faults)


def _divergences(true: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """KL(true || stored) in nats, (n,), over the entries of log-probabilities (n, K), and one bucket for the rest."""
    p, q = np.exp(true) * np.isfinite(stored), np.exp(stored)
    p = np.column_stack([p, np.maximum(1 - p.sum(axis=1), 0)])
    q = np.column_stack([q, np.maximum(1 - q.sum(axis=1), LEAST_REST)])
    q /= q.sum(axis=1, keepdims=True)
    return (p * np.log(np.where(p > 0, p, 1) / np.where(p > 0, q, 1))).sum(axis=1)


def _distance(stored: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """The distance of log-probabilities, 0 if both are -inf."""
    with np.errstate(invalid="ignore"):
        return np.where(stored == expected, 0.0, np.abs(stored - expected))


def _fault(column: str, wrong: np.ndarray, noun: str, stored, low, high=None) -> list[Fault]:
    """A list of one fault or none; all arrays are (n,) or (n, m), and ``low`` to ``high`` was expected."""
    if not wrong.any():
        return []
    first, positions = tuple(np.argwhere(wrong)[0].tolist()), np.any(wrong.reshape(len(wrong), -1), axis=1)
    place = f"position {first[0]}" + (f", entry {first[1]}" if len(first) > 1 else "")
    expected = " to ".join(dict.fromkeys(f"{bound[first]:.6g}" for bound in (low, high) if bound is not None))
    detail = (
        f"{place}: found {noun} {stored[first]:.6g}, expected {expected} ({positions.sum()} of {len(wrong)} positions)"
    )
    return [Fault(column, positions, detail)]


def _number_faults(row: dict, tokens: np.ndarray) -> list[Fault]:
    """Compare the row's own numbers with those computed from its columns; ``tokens`` (n,) are the extracted ones."""
    faults = []
    for name, expected in token_statistics(row, tokens).of_row.items():
        found = row[name]
        if not (found == expected or abs(found - expected) <= NUMBERS_TOLERANCE * max(1.0, abs(expected))):
            detail = f"found {found:.8g}, expected {expected:.8g} from the row's other columns"
            faults.append(Fault(name, np.zeros(len(tokens), bool), detail))
    return faults


def _codes(row: dict, kind: str) -> np.ndarray:
    return np.frombuffer(row[f"{kind}_logits_quantized"], np.uint8).reshape(row["num_tokens"], -1).astype(int)


def _code_range(log_probs: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest correct code: of probabilities within tolerance, and one more for the carry."""
    low, high = (nearest_codes(np.exp(log_probs + error)) for error in (-tolerance, tolerance))
    return np.maximum(low - 1, 1), np.minimum(high + 1, 255)


class _Nucleus:
    """A row's stored nucleus compared with the model's: ids rank by rank, how many are kept, codes.

    At each rank the two ids only need to be equally probable: ties have no order.
    """

    def __init__(self, row: dict, stored: DecodedRow, asked: Asked, tolerance: float, manifest: Manifest):
        self.codes, self.ids, self.ranked = _codes(row, "top"), stored.top_ids, asked.ranked
        best, true = asked.best, asked.top[IN_PLACE]
        self.is_other = (self.codes > 0) & ~(_distance(true, best) <= tolerance)
        self.in_order = np.asarray(~self.is_other.any(axis=1))
        self.lowest, self.highest = _code_range(true, tolerance)
        self.sizes = (self.codes > 0).sum(axis=1)
        errors = (tolerance, 0, -tolerance)
        self.fewest, self.size, self.most = (_size(best + error, manifest.top_p) for error in errors)
        is_first = np.arange(self.codes.shape[1]) < self.sizes[:, None]
        is_cut = (self.fewest <= self.sizes) & (self.sizes <= self.most)
        if manifest.thinned_from:
            is_cut |= _is_cut_by_codes(self.codes, self.sizes, manifest.top_p)
        self.is_cut = is_cut & (is_first == (self.codes > 0)).all(axis=1)

    @property
    def right_ids(self) -> list[np.ndarray]:
        """The ids kept at each position; the model's if the stored ones are wrong."""
        right = self.in_order & self.is_cut
        return [
            self.ids[i, : self.sizes[i]] if right[i] else self.ranked[i, : self.size[i]] for i in range(len(self.ids))
        ]

    def faults(self, kl: np.ndarray, limit: float) -> list[Fault]:
        """The nucleus' faults. Codes are only checked where the ids are right; ``kl`` is in place, (n,)."""
        outside = (self.codes > 0) & ((self.codes < self.lowest) | (self.codes > self.highest))
        outside &= self.in_order[:, None]
        most = np.full(len(kl), limit if kl.mean() > limit else POSITION_FACTOR * limit)
        column = "top_logits_quantized"
        return [
            *_fault("top_indices_low/high", self.is_other, "id", self.ids, self.ranked),
            *_fault(column, outside, "code", self.codes, self.lowest, self.highest),
            *_fault(column, self.in_order & ~self.is_cut, "a nucleus of", self.sizes, self.fewest, self.most),
            *_fault(column, self.in_order & (kl > most), "KL", kl, np.zeros(len(kl)), most),
        ]


def _is_cut_by_codes(codes: np.ndarray, sizes: np.ndarray, top_p: float) -> np.ndarray:
    """Whether a thinned nucleus ends where its own codes reach ``top_p``, or at K; bool (n,)."""
    totals = np.cumsum(CODE_PROBS[codes], axis=1)
    before, after = (
        np.where(at >= 0, np.take_along_axis(totals, np.maximum(at, 0)[:, None], axis=1)[:, 0], 0)
        for at in (sizes - 2, sizes - 1)
    )
    return (before < top_p) & ((after >= top_p) | (sizes == codes.shape[1]))


def _size(log_probs: np.ndarray, top_p: float) -> np.ndarray:
    """How many of the most probable storable entries (n, K) the nucleus has, (n,)."""
    return (nucleus_cut(np.exp(log_probs), top_p) & np.isfinite(log_probs)).sum(axis=1)


def _draw_faults(
    row: dict, stored: DecodedRow, output: Output, asked: Asked, manifest: Manifest, kept: list[np.ndarray]
) -> list[Fault]:
    """Compare the draws with those that the row's uniforms give from the ids that are not ``kept``; check their
    codes."""
    codes, ids, before = _codes(row, "sampled"), stored.sampled_ids, asked.at[IN_PLACE]
    drawn = np.where(codes > 0, ids, ABSENT)
    uniforms = draw_uniforms(manifest.seed, row["source_index"], len(before))
    expected, wrong = np.zeros(ids.shape, int), np.zeros(ids.shape, bool)
    for i, log_probs in enumerate(output.each_storable(before)):
        if manifest.thinned_from:
            expected[i], wrong[i] = _thinned_draws(
                log_probs, manifest, kept[i], uniforms[i], drawn[i], output.tolerance
            )
        else:
            expected[i], fits = _draws(log_probs, kept[i], uniforms[i], drawn[i], len(drawn[i]), output.tolerance)
            wrong[i] = ~fits.diagonal()
    low, high = _code_range(asked.sampled, output.tolerance)
    outside = (codes > 0) & ~wrong.any(axis=1, keepdims=True) & ((codes < low) | (codes > high))
    return [
        *_fault("sampled_indices_low/high", wrong, "id", drawn, expected),
        *_fault("sampled_logits_quantized", outside, "code", codes, low, high),
    ]


def _draws(
    log_probs: np.ndarray, kept: np.ndarray, uniform: float, stored: np.ndarray, count: int, tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """The ``count`` draws at one position, and whether each threshold may give each of the ids ``stored`` (m,) within
    tolerance: bool (m, count)."""
    tail = np.exp(log_probs)
    tail[kept] = 0
    running = np.cumsum(tail)
    thresholds = (uniform + np.arange(count)) / max(1, count) * running[-1]
    drawn = np.minimum(np.searchsorted(running, thresholds, side="right"), len(tail) - 1)
    slack = np.exp(2 * tolerance)  # allowed ratio of two totals
    starts, ends, there = (values[stored][:, None] for values in (running - tail, running, tail))
    fits = (starts <= thresholds * slack) & (ends >= thresholds / slack) & (there > 0) & (stored != ABSENT)[:, None]
    return drawn, fits | (running[-1] <= NO_TAIL)


def _thinned_draws(
    log_probs: np.ndarray, manifest: Manifest, kept: np.ndarray, uniform: float, stored: np.ndarray, tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """For each of the ids ``stored`` (S,) at one position of a thinned dataset: the nearest of the extraction's draws,
    and whether it is wrong, that is, neither one of those draws nor an id dropped from the nucleus. Which of them
    thinning picks is not checked.
    """
    extracted = manifest.extracted
    if not len(stored):
        return stored, np.zeros(0, bool)
    ranked = ranked_ids(log_probs, min(extracted["top_k"], len(log_probs)))
    fewest, size, most = (
        int(_size((log_probs[ranked] + error)[None], extracted["top_p"])[0]) for error in (tolerance, 0, -tolerance)
    )
    is_right = np.isin(stored, ranked[:most]) & ~np.isin(stored, kept)
    count = extracted["num_sampled"]
    for cut in range(fewest, most + 1):
        is_right |= _draws(log_probs, ranked[:cut], uniform, stored, count, tolerance)[1].any(axis=1)
    drawn, _ = _draws(log_probs, ranked[:size], uniform, stored, count, tolerance)
    return drawn[np.abs(drawn - stored[:, None]).argmin(axis=1)], ~is_right
