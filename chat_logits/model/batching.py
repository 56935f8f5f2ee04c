"""Which conversations share a forward pass, and which beginning they share: pure arithmetic on token ids."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

SHORTEST_PREFIX = 8  # tokens; below, copying the cache costs more than it saves


@dataclass(frozen=True)
class Budget:
    """What one forward pass may hold: padded ``tokens`` in the decoder, and ``logit_rows`` times the vocabulary."""

    tokens: int
    logit_rows: int

    def halved(self) -> "Budget":
        return Budget(max(1, self.tokens // 2), max(1, self.logit_rows // 2))


def plan_batches(lengths: list[int], rows: list[int], budget: Budget) -> list[list[int]]:
    """Indices of conversations of like length, longest first, each batch within both budgets.

    ``rows`` are the logit rows of each conversation. One that alone exceeds a budget is a batch of its own.

    >>> plan_batches([3, 9, 4, 10], [1, 1, 1, 1], Budget(tokens=20, logit_rows=8))
    [[3, 1], [2, 0]]
    """
    batches: list[list[int]] = []
    rows_left = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= budget.tokens
        if fits and rows[index] <= rows_left:
            batches[-1].append(index)
        else:
            batches.append([index])
            rows_left = budget.logit_rows
        rows_left -= rows[index]
    return batches


def shared_prefix(sequences: list[np.ndarray], limits: list[int]) -> np.ndarray:
    """A beginning that is worth computing once, int64; empty where none is.

    Of those on the way along each position's most common token, the one that saves the most tokens.

    ``limits`` says how many of a sequence's first tokens may be taken: not the one that predicts its first row.

    >>> shared_prefix([np.arange(20), np.arange(30), np.ones(9, int)], [19, 29, 8]).size
    19
    """
    alive, best, saved = range(len(sequences)), 0, 0
    leader = None
    for position in range(max(limits, default=0)):
        alive = [i for i in alive if limits[i] > position]
        if len(alive) < 2:
            break
        common = Counter(int(sequences[i][position]) for i in alive).most_common(1)[0][0]
        alive = [i for i in alive if sequences[i][position] == common]
        if (len(alive) - 1) * (position + 1) > saved:
            saved, best, leader = (len(alive) - 1) * (position + 1), position + 1, alive[0]
    if best < SHORTEST_PREFIX:
        return np.zeros(0, np.int64)
    return sequences[leader][:best]
