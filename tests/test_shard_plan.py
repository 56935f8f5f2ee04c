"""Shards to workers that fail at any moment: each is finished or given up, none is lost or given out twice at once."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from shard_plan import AHEAD, ATTEMPTS, ShardPlan

BAD = "it makes its worker fail"


@given(
    shards=st.integers(0, 40),
    workers=st.integers(1, 5),
    bad=st.sets(st.integers(0, 39), max_size=4),
    dice=st.randoms(use_true_random=False),
)
def test_whatever_fails_every_shard_is_finished_or_is_bad_itself(shards, workers, bad, dice):
    """Workers go wrong by themselves, at most once for each shard, and always at a bad shard."""
    plan, held, finished = ShardPlan(iter(range(shards)), workers), [[] for _ in range(workers)], Counter()
    accidents = set()
    while not plan.is_empty or any(held):
        for hand in held:
            while (shard := plan.next_for(hand)) is not None:
                hand.append(shard)
            assert len(hand) <= AHEAD
        in_hand = [shard for hand in held for shard in hand]
        assert len(in_hand) == len(set(in_hand)) and in_hand, "there is always something under way"
        hand = dice.choice([hand for hand in held if hand])
        accident = not accidents & set(hand) and dice.random() < 0.2
        if hand[0] in bad or accident:
            accidents |= set(hand)
            for shard in hand:
                plan.failed(shard, BAD)
            hand.clear()
        else:
            finished[hand.pop(0)] += 1
    assert set(finished.values()) <= {1}
    assert finished.keys() | plan.given_up.keys() == set(range(shards))
    assert plan.given_up.keys() == {shard for shard in bad if shard < shards}
    assert set(plan.given_up.values()) <= {BAD}


def test_the_last_shards_wait_for_workers_that_have_none():
    plan = ShardPlan(iter(range(5)), workers=3)
    assert [plan.next_for([]) for _ in range(3)] == [0, 1, 2]
    assert plan.next_for([0]) is None and plan.next_for([1]) is None  # two are left, for the first who are done
    assert [plan.next_for([]), plan.next_for([])] == [3, 4]
    assert plan.is_empty


def test_a_shard_that_failed_is_alone_with_its_worker_until_it_is_given_up():
    plan = ShardPlan(iter(range(9)), workers=1)
    assert [plan.next_for([]), plan.next_for([0])] == [0, 1]
    for shard in (0, 1):
        plan.failed(shard, "lost")
    for attempt in range(2, ATTEMPTS + 1):
        assert plan.next_for([5]) is None
        assert plan.next_for([]) == (0 if attempt == 2 else 1)
        held = 0 if attempt == 2 else 1
        assert plan.next_for([held]) is None
        plan.failed(held, "lost")
