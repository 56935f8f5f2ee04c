"""The lower bound of a KL divergence between truncated distributions: brute force, worked numbers, random ones."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_decoder import code_probability, nearest_code

import logit_codec
from chat_logits.analysis.divergence import compare_rows, kl_lower_bound
from chat_logits.analysis.row import TokenStatistics


def stored(*positions: dict[int, float]) -> TokenStatistics:
    """Nuclei, each an id's probability by id in rank order."""
    width, n = max(map(len, positions)), len(positions)
    ids, probs = np.zeros((n, width), np.int32), np.zeros((n, width))
    for i, nucleus in enumerate(positions):
        ids[i, : len(nucleus)], probs[i, : len(nucleus)] = list(nucleus), list(nucleus.values())
    nothing, kept = np.zeros(n), np.array([len(nucleus) for nucleus in positions])
    return TokenStatistics(nothing, kept * 0, kept, np.maximum(0, 1 - probs.sum(axis=1)), nothing, ids, probs)


def term(p: float, q: float) -> float:
    return p * math.log(p / q) if p else 0.0


def hidden_by_rounding(q: list[float]) -> float:
    """How far the total of carried codes may be from that of the probabilities: each can halve no more than a step."""
    carry = 0.0
    for code in map(nearest_code, q):
        half = (code_probability(min(code, 254) + 1) - code_probability(min(code, 254))) / 2
        carry = max(half, carry - half)
    return carry


def least_divergence(p: dict[int, float], q: dict[int, float]) -> float:
    """The bound by trying out what the ids that are the first's alone may have in the other."""
    common, alone = p.keys() & q.keys(), p.keys() - q.keys()
    known = sum(term(p[i], q[i]) for i in common)
    p_alone, p_rest = sum(p[i] for i in alone), max(0.0, 1 - sum(p.values()))
    hidden, last = hidden_by_rounding(q.values()), code_probability(min(255, nearest_code(min(q.values())) + 2))
    m = max(1 - sum(q[i] for i in common), hidden)
    most = min(max(0.0, 1 - sum(q.values())) + hidden, len(alone) * last, m)

    def divergence(x: float) -> float:
        is_possible = (x > 0 or p_alone == 0) and (m - x > 0 or p_rest == 0)
        return known + term(p_alone, x) + term(p_rest, m - x) if is_possible else math.inf

    low, high = 0.0, most
    for _ in range(6):  # a grid, and finer ones around the least of it
        tried = [low + (high - low) * k / 100 for k in range(101)]
        best = min(range(101), key=lambda k: divergence(tried[k]))
        low, high = tried[max(0, best - 1)], tried[min(100, best + 1)]
    return max(0.0, divergence(tried[best]))


HAND_MADE = [
    ({1: 0.5, 2: 0.3}, {1: 0.4, 2: 0.4}),  # the same ids
    ({1: 0.5, 2: 0.3}, {2: 0.6, 3: 0.3}),  # an id of each alone; what it can have is bounded by the tail
    ({1: 0.9}, {2: 0.3, 3: 0.3, 4: 0.2}),  # nothing in common, bounded by the tail
    ({5: 0.2, 6: 0.2, 7: 0.2}, {1: 0.3, 2: 0.05, 3: 0.04}),  # bounded by the last kept probability
    ({5: 0.02, 1: 0.6}, {1: 0.5, 2: 0.1}),  # not bounded: the least is inside
    ({1: 0.6, 2: 0.4}, {1: 0.5, 2: 0.5}),  # full nuclei
    ({1: 1.0}, {2: 1.0}),  # certain of two different tokens
    ({1: 0.7, 2: 0.2}, {1: 1.0}),
    ({1: 1.0}, {1: 0.7, 2: 0.2}),
    ({1: 1 - 2**-53}, {2: 0.5}),  # a tail of rounding alone
]


def test_hand_made_distributions_are_the_brute_force():
    found = kl_lower_bound(stored(*(p for p, _ in HAND_MADE)), stored(*(q for _, q in HAND_MADE)))
    expected = [least_divergence(p, q) for p, q in HAND_MADE]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


def test_worked_numbers():
    # Cells {1}, {2}, R; nothing is open: 0.5 ln(0.5/0.4) + 0.3 ln(0.3/0.4) + 0.2 ln(0.2/0.2).
    assert kl_lower_bound(stored({1: 0.5, 2: 0.3}), stored({1: 0.4, 2: 0.4}))[0] == pytest.approx(0.025267, abs=1e-6)
    # m = 0.5, and 5 may have 0.5 · 0.02/0.4 = 0.025 < 0.1 there: 0.6 ln(0.6/0.5) + 0.4 ln(0.4/0.5).
    assert kl_lower_bound(stored({1: 0.6, 5: 0.02}), stored({1: 0.5, 2: 0.1}))[0] == pytest.approx(0.020136, abs=1e-6)
    # Rounded up to a total of 1.01: (0.60 ln(0.60/0.606) + 0.41 ln(0.41/0.404))/1.01.
    assert kl_lower_bound(stored({1: 0.6, 2: 0.41}), stored({1: 0.6, 2: 0.4}))[0] == pytest.approx(7.34e-5, abs=1e-6)


def test_a_confident_token_outside_the_others_nucleus_is_far():
    nucleus = {i: 0.0225 - i / 10_000 for i in range(2, 46)}
    (found,) = kl_lower_bound(stored({1: 0.97}), stored(nucleus))
    # The other gives it no more than the 0.018 of its last kept token, but for the codes' rounding.
    assert 0.97 * math.log(0.97 / nucleus[45]) - 0.25 < found < 0.97 * math.log(0.97 / nucleus[45])
    (certain,) = kl_lower_bound(stored({1: 1.0}), stored({2: 1.0}))
    assert certain == pytest.approx(-math.log(hidden_by_rounding([1.0])), abs=1e-6) and certain > 9


weights = st.lists(st.floats(-12, 3), min_size=8, max_size=8)


def normal(logits: list[float]) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum()


def truncated(p: np.ndarray, size: int, top_p: float) -> dict[int, float]:
    kept, total = {}, 0.0
    for i in sorted(range(len(p)), key=lambda i: -p[i])[:size]:
        if total < top_p:
            kept[i] = float(p[i])
        total += p[i]
    return kept


@settings(max_examples=300, deadline=None)
@given(weights, weights, st.integers(1, 8), st.integers(1, 8), st.sampled_from([0.5, 0.9, 0.98, 1.0]))
def test_unrounded_nuclei_never_give_more_than_the_true_divergence(logits, other_logits, size, other_size, top_p):
    p, q = normal(logits), normal(other_logits)
    nuclei = (truncated(p, size, top_p), truncated(q, other_size, top_p))
    (bound,) = kl_lower_bound(*map(stored, nuclei))
    assert 0 <= bound <= (p * np.log(p / q)).sum() + 1e-9
    assert bound == pytest.approx(least_divergence(*nuclei), rel=1e-3, abs=1e-6)


def encoded(nucleus: dict[int, float]) -> dict:
    """A stored row of one position, without draws."""
    none = np.zeros((1, 0))
    distributions = logit_codec.Distributions(
        np.array([list(nucleus)]), np.array([list(nucleus.values())]), none.astype(int), none, np.zeros(1), np.zeros(1)
    )
    (row,) = logit_codec.encode_rows(distributions, [1], np.zeros(1))
    return row


@settings(max_examples=300, deadline=None)
@given(weights, weights, st.integers(1, 8), st.integers(1, 8), st.sampled_from([0.9, 1.0]))
def test_stored_rows_give_more_by_the_codes_rounding_at_most(logits, other_logits, size, other_size, top_p):
    p, q = normal(logits), normal(other_logits)
    (bound,) = compare_rows(encoded(truncated(p, size, top_p)), encoded(truncated(q, other_size, top_p))).kl
    # A log-probability of -17, the least here, is stored to 1, near -1 to 0.03.
    assert 0 <= bound <= (p * np.log(p / q)).sum() * 1.06 + 0.03


def test_fifty_thousand_positions_are_their_parts():
    """As one row, whose ids must not mix between positions, and with other widths on both sides."""
    rng = np.random.default_rng(0)
    sides = []
    for width in (64, 40):
        ids = rng.permuted(np.tile(np.arange(200), (50_000, 1)), axis=1)[:, :width].astype(np.int32)
        probs = -np.sort(-rng.dirichlet(np.full(width, 0.3), 50_000), axis=1) * 0.97 + 1e-9
        nothing = np.zeros(50_000)
        sides.append(
            TokenStatistics(nothing, nothing, np.full(50_000, width), 1 - probs.sum(axis=1), nothing, ids, probs)
        )
    whole = kl_lower_bound(*sides)
    for i in range(0, 50_000, 5_000):
        alone = [dict(zip(side.top_ids[i].tolist(), side.top_probs[i].tolist(), strict=True)) for side in sides]
        assert whole[i] == pytest.approx(least_divergence(*alone), rel=1e-3)
