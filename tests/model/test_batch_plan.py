"""Batches keep their budgets, and the shared prefix is the one that saves most, against brute force."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat_logits.model.batch_plan import SHORTEST_PREFIX, Budget, plan_batches, shared_prefix

conversations = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 30)), max_size=40)


@given(conversations, st.integers(1, 200), st.integers(1, 100))
def test_batches_hold_everything_once_within_both_budgets(sizes, tokens, logit_rows):
    lengths, rows = [length for length, _ in sizes], [n for _, n in sizes]
    batches = plan_batches(lengths, rows, Budget(tokens, logit_rows))
    assert sorted(i for batch in batches for i in batch) == list(range(len(sizes)))
    for batch in batches:
        if len(batch) > 1:
            assert max(lengths[i] for i in batch) * len(batch) <= tokens
            assert sum(rows[i] for i in batch) <= logit_rows
    order = [lengths[i] for batch in batches for i in batch]
    assert order == sorted(order, reverse=True)


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 30)), min_size=1, max_size=9))
def test_batches_are_the_cheapest_of_all(sizes):
    """By trying every way to cut the conversations in order of length."""
    lengths, rows = [length for length, _ in sizes], [n for _, n in sizes]
    budget = Budget(150, 60)

    def cost(batches):
        if any(
            len(batch) > 1
            and (lengths[batch[0]] * len(batch) > budget.tokens or sum(rows[i] for i in batch) > budget.logit_rows)
            for batch in batches
        ):
            return float("inf")
        return sum(lengths[batch[0]] * len(batch) + budget.tokens / 16 for batch in batches)

    order = sorted(range(len(sizes)), key=lambda i: -lengths[i])
    ways = [
        [order[a:b] for a, b in itertools.pairwise([0, *inner, len(order)])]
        for count in range(len(order))
        for inner in itertools.combinations(range(1, len(order)), count)
    ]
    assert cost(plan_batches(lengths, rows, budget)) == pytest.approx(min(map(cost, ways)))


sequences = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=25), max_size=8)


@given(sequences)
def test_the_shared_prefix_saves_as_much_as_any_on_its_path(found):
    """Following the most common next token: no prefix along that path saves more."""
    arrays = [np.array(sequence, np.int64) for sequence in found]
    limits = [len(array) - 1 for array in arrays]
    prefix = shared_prefix(arrays, limits)
    assert len(prefix) == 0 or len(prefix) >= SHORTEST_PREFIX
    if len(prefix):
        assert saving(arrays, limits, prefix) >= max(
            saving(arrays, limits, prefix[:length]) for length in range(1, len(prefix) + 1)
        )
        assert saving(arrays, limits, prefix) > 0


def saving(arrays, limits, prefix) -> int:
    sharing = [
        array
        for array, limit in zip(arrays, limits, strict=True)
        if limit >= len(prefix) and array[: len(prefix)].tolist() == prefix.tolist()
    ]
    return (len(sharing) - 1) * len(prefix)


@pytest.mark.parametrize("seed", range(20))
def test_a_long_shared_prefix_is_the_best_of_those_tried_token_by_token(seed):
    """Conversations of up to 900 tokens that leave a common way one after another."""
    rng = np.random.default_rng(seed)
    way = rng.integers(0, 3, 900)
    arrays, limits = [], []
    for _ in range(12):
        leaves, length = (int(number) for number in rng.integers(1, 900, 2))
        arrays.append(np.concatenate([way[:leaves], rng.integers(0, 3, 900 - leaves)])[: max(length, 300)])
        limits.append(len(arrays[-1]) - 1)
    path: list[int] = []
    while True:
        along = [i for i in range(12) if limits[i] > len(path) and arrays[i][: len(path)].tolist() == path]
        if len(along) < 2:
            break
        path.append(Counter(int(arrays[i][len(path)]) for i in along).most_common(1)[0][0])
    tried = [saving(arrays, limits, np.array(path[:length])) for length in range(1, len(path) + 1)]
    prefix = shared_prefix(arrays, limits)
    assert prefix.tolist() == path[: tried.index(max(tried)) + 1] and len(prefix) >= 100


def test_one_odd_conversation_does_not_spoil_a_shared_prefix():
    system = np.arange(100, 140)
    arrays = [np.concatenate([system, np.full(10, i)]) for i in range(9)] + [np.arange(50)]
    assert shared_prefix(arrays, [45] * 10).tolist() == system.tolist()


def test_a_limit_keeps_the_predicting_token_out():
    arrays = [np.arange(30), np.arange(30)]
    assert len(shared_prefix(arrays, [20, 15])) == 15
