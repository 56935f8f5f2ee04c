"""A student's distance from its targets over some positions, computed from each conversation's sums."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Distance:
    """Over ``positions`` of ``conversations``: mean forward KL, nats, unbiased over the draws, and its standard error,
    from the conversations' sums, since positions within a conversation are correlated (nan for a single conversation);
    ``kl_tail`` is the part of the mean that the draws from the tail add, Σ w·(log p − log q) over them; ``agreement``
    is the share of positions where the student's most probable token is the target's.

    KL is measured to the targets of the batches. At extracted tokens these are the teacher's distribution or, for rows
    without draws, its renormalised nucleus. Since the draws only estimate it, a KL near 0 may come out below 0."""

    conversations: int
    positions: int
    kl: float
    error: float
    kl_tail: float
    agreement: float


class DistanceSums:
    """Sums over conversations; one without positions is not counted."""

    def __init__(self) -> None:
        self.conversations = 0
        self.totals = np.zeros(4)  # positions, KL, its tail's part, agreeing
        self.squares = np.zeros(3)  # KL², KL·positions, positions² of each conversation's sums

    def add(self, sums: np.ndarray) -> None:
        """Add a conversation: the sums (4,) float64 of ``BatchTarget.divergences`` over its positions."""
        positions, kl = sums[:2]
        self.conversations += int(positions > 0)
        self.totals += sums
        self.squares += (kl * kl, kl * positions, positions * positions)

    def distance(self) -> Distance:
        """The distance over all conversations added so far, of which there must be at least one."""
        positions, total, tail, agreeing = self.totals.tolist()
        kl, n = total / positions, self.conversations
        # The variance of a ratio estimator: Cochran, "Sampling Techniques", 6.3
        spread = max(0.0, float(self.squares @ (1, -2 * kl, kl * kl)))
        error = (spread * n / (n - 1)) ** 0.5 / positions if n > 1 else float("nan")
        return Distance(n, int(positions), kl, error, tail / positions, agreeing / positions)
