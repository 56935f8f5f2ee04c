"""Shards to workers that fail at any moment: each is finished or given up, none is lost or given out twice at once."""

import heapq
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat_logits.extraction.shard_plan import AHEAD, ATTEMPTS, HOPELESS, NOTHING_GOES, SUSPECT, ShardPlan

BAD = "it makes its worker fail"


class Crew:
    """Workers that hold shards of a plan; what becomes of them is for the test to say."""

    def __init__(self, shards: int, workers: int):
        self.plan = ShardPlan(iter(range(shards)), workers)
        self.held: dict[int, list[int]] = {number: [] for number in range(1, workers + 1)}
        self.finished: Counter[int] = Counter()

    @property
    def is_done(self) -> bool:
        return self.plan.is_empty and not any(self.held.values())

    def hand_out(self, to=None) -> None:
        self.plan.at_work = set(self.held)
        for worker in to if to is not None else self.held:
            hand = self.held[worker]
            while (shard := self.plan.next_for(worker, hand)) is not None:
                hand.append(shard)
            assert len(hand) <= AHEAD
        in_hand = [shard for hand in self.held.values() for shard in hand]
        assert len(in_hand) == len(set(in_hand))

    def fail(self, worker: int, shards: list[int]) -> None:
        shards = list(shards)
        self.held[worker] = [shard for shard in self.held[worker] if shard not in shards]
        self.plan.failed(worker, shards, BAD)

    def finish(self, worker: int) -> None:
        self.finished[self.held[worker].pop(0)] += 1
        self.plan.finished(worker)


@given(
    shards=st.integers(0, 40),
    workers=st.integers(1, 5),
    bad=st.sets(st.integers(0, 39), max_size=4),
    dice=st.randoms(use_true_random=False),
)
def test_whatever_fails_every_shard_is_finished_or_is_bad_itself(shards, workers, bad, dice):
    """Workers go wrong by themselves, at most once for each shard, and always at a bad shard."""
    crew, accidents = Crew(shards, workers), set()
    while not crew.is_done:
        crew.hand_out()
        busy = [worker for worker, hand in crew.held.items() if hand]
        assert busy, "there is always something under way"
        worker = dice.choice(busy)
        hand = crew.held[worker]
        accident = not accidents & set(hand) and dice.random() < 0.2
        if hand[0] in bad or accident:
            accidents |= set(hand)
            crew.fail(worker, hand)
        else:
            crew.finish(worker)
    assert set(crew.finished.values()) <= {1}
    assert crew.finished.keys() | crew.plan.given_up.keys() == set(range(shards))
    assert crew.plan.given_up.keys() == {shard for shard in bad if shard < shards}
    assert set(crew.plan.given_up.values()) <= {BAD}


@pytest.mark.parametrize(("workers", "bad"), [(8, 1), (8, 2), (2, 1)])
def test_a_worker_that_fails_whatever_it_gets_brings_no_shard_down(workers, bad):
    """It answers in a moment, so that it is always free: the others take a minute, and it waits one while suspect."""
    crew, now, events = Crew(2000, workers), 0.0, []
    asleep: dict[int, float] = {}

    def go_on() -> None:
        crew.hand_out([worker for worker in crew.held if asleep.get(worker, 0) <= now])
        waiting = {worker for _, worker in events}
        for worker, hand in crew.held.items():
            if hand and worker not in waiting:
                heapq.heappush(events, (now + (0.1 if worker <= bad else 60.0), worker))

    failures = Counter()
    go_on()
    while events:
        now, worker = heapq.heappop(events)
        if worker not in crew.held:
            continue
        if worker > bad:
            crew.finish(worker)
        else:
            failures[worker] += 1
            crew.fail(worker, crew.held[worker][:1])
            if crew.plan.is_suspect(worker):
                asleep[worker] = now + 60.0
            if crew.held[worker]:
                heapq.heappush(events, (now + 0.1, worker))
        for worker in [worker for worker in crew.held if crew.plan.is_hopeless(worker)]:
            assert not crew.held.pop(worker)
        go_on()
    assert len(crew.finished) == 2000 and not crew.plan.given_up
    assert set(crew.held) == set(range(bad + 1, workers + 1)), "the bad ones have been dismissed"
    assert all(HOPELESS <= failures[worker] <= 12 for worker in range(1, bad + 1))


def test_many_bad_shards_in_a_row_are_no_workers_fault():
    """A file that cannot be read, of 100 shards: eight workers fail all the time, and none is suspected for long."""
    crew = Crew(400, 8)
    while not crew.is_done:
        crew.hand_out()
        for worker, hand in crew.held.items():
            if hand and 150 <= hand[0] < 250:
                crew.fail(worker, hand[:1])
            elif hand:
                crew.finish(worker)
            assert not crew.plan.is_hopeless(worker)
        assert not crew.plan.goes_nowhere
    assert crew.plan.given_up.keys() == set(range(150, 250))
    assert len(crew.finished) == 300


def test_a_failed_shard_goes_to_another_worker_or_back_where_there_is_none():
    plan = ShardPlan(iter(range(9)), workers=3)
    plan.at_work = {1, 2}
    assert plan.next_for(1, []) == 0
    plan.failed(1, [0], "lost")
    assert plan.next_for(1, []) == 1, "not the one that failed with it"
    assert plan.next_for(2, []) == 0
    plan.failed(2, [0], "lost")
    assert plan.next_for(2, []) == 0, "nobody is left that has not tried it"
    plan.failed(2, [0], "lost a third time")
    assert plan.given_up == {0: "lost a third time"}


def test_a_suspect_gets_fresh_shards_alone_one_at_a_time_until_one_succeeds():
    plan = ShardPlan(iter(range(99)), workers=2)
    plan.at_work = {1, 2}
    for _ in range(SUSPECT):
        plan.failed(1, [plan.next_for(1, [])], "lost")
    assert plan.is_suspect(1) and not plan.is_suspect(2)
    assert plan.next_for(1, []) == SUSPECT and plan.next_for(1, [SUSPECT]) is None
    assert plan.next_for(2, []) == 0
    plan.finished(1)
    assert not plan.is_suspect(1)


def test_the_first_at_work_brings_no_shard_down_before_others_come():
    """It fails whatever it gets, and they are still loading their models: what failed waits for them."""
    plan = ShardPlan(iter(range(9)), workers=3)
    plan.at_work, plan.to_come = {1}, 2
    for shard in range(SUSPECT):
        assert plan.next_for(1, []) == shard
        plan.failed(1, [shard], "lost")
    assert plan.is_suspect(1) and not plan.is_hopeless(1)
    plan.at_work, plan.to_come = {1, 2}, 1
    assert plan.next_for(2, []) == 0
    plan.finished(2)
    assert plan.next_for(1, []) == SUSPECT, "a fresh one: what failed is for the other"
    assert [plan.next_for(2, []), plan.next_for(2, [])] == [1, 2]


def test_what_failed_does_not_wait_for_workers_that_never_come():
    plan = ShardPlan(iter(range(4)), workers=2)
    plan.at_work, plan.to_come = {1}, 1
    given = []
    while not plan.is_empty:
        given.append(plan.next_for(1, []))
        plan.failed(1, given[-1:], "lost")
    assert given == [0, 1, 2, 3, *[0, 1, 2, 3] * (ATTEMPTS - 1)] and plan.given_up.keys() == set(range(4))


def test_a_suspect_gets_no_failed_shard_while_a_better_worker_is_busy():
    """Though that one has failed with it already: it was preempted."""
    plan = ShardPlan(iter(range(99)), workers=2)
    plan.at_work = {1, 2}
    for _ in range(SUSPECT):
        plan.failed(1, [plan.next_for(1, [])], "lost")
    taken = plan.next_for(2, [])
    plan.failed(2, [taken], "preempted")
    assert plan.next_for(2, []) == 1 and plan.next_for(1, []) == SUSPECT


def test_nobody_is_hopeless_without_better_ones_at_work():
    plan = ShardPlan(iter(range(99)), workers=2)
    for at_work in ({1}, set(), {1, 2}):
        plan.at_work = at_work
        for _ in range(HOPELESS):
            for worker in at_work:
                plan.failed(worker, [plan.next_for(worker, [])], "lost")
                assert not plan.is_hopeless(1) and not plan.is_hopeless(2)


@given(
    shards=st.integers(0, 60), workers=st.integers(1, 5), bad=st.integers(0, 4), dice=st.randoms(use_true_random=False)
)
def test_workers_that_come_and_go(shards, workers, bad, dice):
    """The first ``bad`` workers fail whatever they get; the others die at times and load again; any may be dismissed.

    With a good worker nothing is given up before that has failed, too; and there is always something under way or
    somebody on the way.
    """
    crew, loading, accidents = Crew(shards, workers), set(range(1, workers + 1)), Counter()
    crew.held = {}
    for _ in range(100 * (shards + 10)):
        crew.plan.to_come = len(loading)
        crew.hand_out()
        if crew.is_done:
            break
        busy = [worker for worker, hand in crew.held.items() if hand]
        assert busy or loading, "nothing is under way, and shards are left"
        worker = dice.choice([*busy, *loading])
        if worker in loading:
            loading.remove(worker)
            crew.held[worker] = []
        elif worker <= bad:
            crew.fail(worker, crew.held[worker][:1] if dice.random() < 0.7 else crew.held[worker])
        elif dice.random() < 0.1 and all(accidents[shard] < 1 for shard in crew.held[worker]):
            accidents.update(crew.held[worker])
            crew.fail(worker, crew.held[worker])
            del crew.held[worker]
            loading.add(worker)
        else:
            crew.finish(worker)
        for worker in [worker for worker in crew.held if crew.plan.is_hopeless(worker)]:
            if crew.held[worker]:
                crew.fail(worker, crew.held[worker])
            del crew.held[worker]
    assert crew.is_done
    assert crew.finished.keys() | crew.plan.given_up.keys() == set(range(shards)) and set(crew.finished.values()) <= {1}
    if bad >= workers:
        assert not crew.finished


def test_when_nothing_goes_any_more_it_is_no_shards_fault():
    crew, ends_at = Crew(100_000, 5), []
    crew.hand_out()
    crew.finish(1)
    for count in range(1, NOTHING_GOES + 1):
        crew.hand_out()
        worker = next(worker for worker, hand in crew.held.items() if hand)
        crew.fail(worker, crew.held[worker][:1])
        ends_at += [count] * crew.plan.goes_nowhere
    assert ends_at == [NOTHING_GOES]


def test_the_last_shards_wait_for_workers_that_have_none():
    plan = ShardPlan(iter(range(5)), workers=3)
    plan.at_work = {1, 2, 3}
    assert [plan.next_for(worker, []) for worker in (1, 2, 3)] == [0, 1, 2]
    assert plan.next_for(1, [0]) is None and plan.next_for(2, [1]) is None  # for the first idle
    assert [plan.next_for(1, []), plan.next_for(2, [])] == [3, 4]
    assert plan.is_empty


def test_a_shard_that_failed_is_alone_with_its_worker_until_it_is_given_up():
    plan = ShardPlan(iter(range(9)), workers=1)
    plan.at_work = {1}
    assert [plan.next_for(1, []), plan.next_for(1, [0])] == [0, 1]
    for shard in (0, 1):
        plan.failed(1, [shard], "lost")
    for attempt in range(2, ATTEMPTS + 1):
        assert plan.next_for(1, [5]) is None
        assert plan.next_for(1, []) == (0 if attempt == 2 else 1)
        held = 0 if attempt == 2 else 1
        assert plan.next_for(1, [held]) is None
        plan.failed(1, [held], "lost")
