"""Which conversations share a batch, and which prefix is worth computing once: only by their lengths and tokens."""

import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np

SHORTEST_PREFIX = 8  # tokens; for a shorter prefix, copying the cache costs more than it saves
TOGETHER = 256  # positions that are compared at once while the conversations agree
NO_PREFIX = np.zeros(0, np.int64)
BATCH_COST = 1 / 16  # of the budget's tokens: what each additional batch costs besides its tokens


@dataclass(frozen=True)
class Budget:
    """What one forward pass may hold: padded ``tokens`` in the decoder, and ``logit_rows`` times the vocabulary."""

    tokens: int
    logit_rows: int

    def halved(self) -> "Budget":
        return Budget(max(1, self.tokens // 2), max(1, self.logit_rows // 2))

    def doubled(self, most: "Budget") -> "Budget":
        return Budget(min(most.tokens, 2 * self.tokens), min(most.logit_rows, 2 * self.logit_rows))


def plan_batches(lengths: list[int], rows: list[int], budget: Budget) -> list[list[int]]:
    """Batches of indices of conversations of similar length, longest first, each batch within both budgets.

    The conversations are sorted by length and cut where that gives the fewest padded tokens, with ``BATCH_COST`` of
    the budget added for each batch. ``rows`` are the logit rows of each conversation. A conversation that alone exceeds
    a budget is a batch of its own.

    >>> plan_batches([3, 9, 4, 10], [1, 1, 1, 1], Budget(tokens=20, logit_rows=8))
    [[3, 1], [2, 0]]
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    cuts = _cheapest_cuts(np.array([lengths[i] for i in order]), np.array([rows[i] for i in order]), budget)
    return [order[begin:end] for begin, end in itertools.pairwise(cuts)]


def _cheapest_cuts(lengths: np.ndarray, rows: np.ndarray, budget: Budget) -> list[int]:
    """Where batches begin and end, [0, …, n], for the lengths and rows (n,) of conversations, longest first."""
    until, first = np.cumsum([0, *rows]), 0
    least, begins = np.zeros(len(lengths) + 1), [0]  # for the first i: least cost, and where their last batch begins
    for end in range(1, len(lengths) + 1):
        while first < end - 1 and (
            lengths[first] * (end - first) > budget.tokens or until[end] - until[first] > budget.logit_rows
        ):
            first += 1
        begin = np.arange(first, end)
        costs = least[first:end] + lengths[first:end] * (end - begin) + budget.tokens * BATCH_COST
        least[end] = costs.min()
        begins.append(first + int(costs.argmin()))
    cuts = [len(lengths)]
    while cuts[-1]:
        cuts.append(begins[cuts[-1]])
    return cuts[::-1]


def shared_prefix(sequences: list[np.ndarray], limits: list[int]) -> np.ndarray:
    """The prefix that is most worth computing once, int64; empty if there is none.

    Candidates are found by following the most common token at each position; the one that saves the most tokens wins.

    ``limits`` says how many first tokens of a sequence may be in the prefix: not the one that predicts its first row.

    >>> shared_prefix([np.arange(20), np.arange(30), np.ones(9, int)], [19, 29, 8]).size
    19
    """
    most, alive, position = np.array(limits, np.int64), np.arange(len(sequences)), 0
    best, saved, leader = 0, 0, 0
    while len(alive := alive[most[alive] > position]) > 1:
        end = min(position + TOGETHER, int(most[alive].min()))
        tokens = np.stack([sequences[i][position:end] for i in alive])
        agrees = (tokens == tokens[0]).all(axis=0)
        if agrees[0]:
            position += len(agrees) if agrees.all() else int(agrees.argmin())
        else:
            alive = alive[tokens[:, 0] == Counter(tokens[:, 0].tolist()).most_common(1)[0][0]]
            position += 1
        if (len(alive) - 1) * position > saved:
            saved, best, leader = (len(alive) - 1) * position, position, int(alive[0])
    return sequences[leader][:best] if best >= SHORTEST_PREFIX else NO_PREFIX
