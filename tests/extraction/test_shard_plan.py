"""Shards to workers that fail at any moment: each is finished or given up, none is lost or given out twice at once."""

import heapq
from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_logits.extraction.shard_plan import AHEAD, ATTEMPTS, LONGEST_PAUSE, NOTHING_GOES, ShardPlan

BAD = "it makes its worker fail"


class Crew:
    """Workers that hold shards of a plan, and a clock; what becomes of them is for the test to say."""

    def __init__(self, shards: int, workers: int):
        self.plan = ShardPlan(iter(range(shards)), workers)
        self.held: dict[int, list[int]] = {number: [] for number in range(1, workers + 1)}
        self.finished: Counter[int] = Counter()
        self.failures: Counter[int] = Counter()
        self.now = 0.0

    @property
    def is_done(self) -> bool:
        return self.plan.is_empty and not any(self.held.values())

    @property
    def busy(self) -> list[int]:
        return [worker for worker, hand in self.held.items() if hand]

    def hand_out(self) -> None:
        self.plan.at_work = set(self.held)
        for worker, hand in self.held.items():
            while (shard := self.plan.next_for(worker, hand, self.now)) is not None:
                hand.append(shard)
            assert len(hand) <= AHEAD
        in_hand = [shard for hand in self.held.values() for shard in hand]
        assert len(in_hand) == len(set(in_hand))

    def fail(self, worker: int, shards: list[int]) -> None:
        shards = list(shards)
        self.held[worker] = [shard for shard in self.held[worker] if shard not in shards]
        self.failures[worker] += 1
        self.plan.failed(worker, shards, BAD, self.now)

    def finish(self, worker: int) -> None:
        self.finished[self.held[worker].pop(0)] += 1
        self.plan.finished(worker)

    def run(self, goes_well, seconds) -> None:
        """Until all is done: ``goes_well(worker, shard)``, after ``seconds(worker, shard)``; a look every second."""
        events: list[tuple[float, int]] = []  # when a worker is done with the first that it holds
        while not self.is_done:
            self.hand_out()
            for worker in set(self.busy) - {worker for _, worker in events}:
                heapq.heappush(events, (self.now + seconds(worker, self.held[worker][0]), worker))
            if not events or events[0][0] > self.now + 1:
                self.now += 1
                continue
            self.now, worker = heapq.heappop(events)
            shard = self.held[worker][0]
            self.finish(worker) if goes_well(worker, shard) else self.fail(worker, [shard])


@settings(deadline=None)
@given(
    shards=st.integers(0, 40),
    workers=st.integers(1, 5),
    bad=st.sets(st.integers(0, 39), max_size=4),
    dice=st.integers(0, 2**32).map(Random),
)
def test_whatever_fails_every_shard_is_finished_or_is_bad_itself(shards, workers, bad, dice):
    """Workers go wrong by themselves, at most once for each shard, and always at a bad shard."""
    crew, accidents = Crew(shards, workers), set()
    while not crew.is_done:
        crew.hand_out()
        if not crew.busy:
            crew.now += LONGEST_PAUSE
            crew.hand_out()
            assert crew.busy, "there is always something under way, or will be after a pause"
        crew.now += dice.choice([0.1, 10.0, 1000.0])
        worker = dice.choice(crew.busy)
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


@pytest.mark.parametrize("fails_after", [0.1, 30.0])
@pytest.mark.parametrize(("workers", "bad"), [(8, 1), (8, 2), (2, 1)])
def test_a_worker_that_fails_whatever_it_gets_takes_few_shards_and_brings_none_down(workers, bad, fails_after):
    """It answers in a moment, so that it is always free, or after half the time that the others take."""
    crew = Crew(2000, workers)
    crew.run(lambda worker, _: worker > bad, lambda worker, _: 60.0 if worker > bad else fails_after)
    assert len(crew.finished) == 2000 and not crew.plan.given_up
    assert crew.now <= (2000 / (workers - bad) + 2) * 60, "the others have not waited"
    # One at once; the rests are four times as long each time, up to an hour.
    assert all(crew.failures[worker] <= 7 + crew.now / LONGEST_PAUSE for worker in range(1, bad + 1))


def test_many_bad_shards_in_a_row_are_no_workers_fault():
    """A file that cannot be read, of 100 shards: eight workers fail all the time, and none waits for long."""
    crew = Crew(400, 8)
    crew.run(lambda _, shard: not 150 <= shard < 250, lambda _, shard: 0.1 if 150 <= shard < 250 else 60.0)
    assert crew.plan.given_up.keys() == set(range(150, 250))
    assert len(crew.finished) == 300
    assert crew.now <= (300 / 8 + 2) * 60


def test_a_lone_worker_waits_for_nobody():
    crew = Crew(40, 1)
    crew.run(lambda _, shard: shard % 2, lambda *_: 1.0)
    assert crew.plan.given_up.keys() == set(range(0, 40, 2)) and len(crew.finished) == 20
    assert crew.now == 20 + 20 * ATTEMPTS


def test_a_failed_shard_goes_to_another_worker_or_back_where_there_is_none():
    plan = ShardPlan(iter(range(9)), workers=3)
    plan.at_work = {1, 2}
    assert plan.next_for(1, [], 0) == 0
    plan.failed(1, [0], "lost", 0)
    assert plan.next_for(2, [], 1) == 0, "to the one that has not failed with it"
    assert plan.next_for(1, [], 10) == 1
    plan.failed(2, [0], "lost", 11)
    assert plan.next_for(2, [], 11) == 0, "nobody is left that has not tried it"
    plan.failed(2, [0], "lost a third time", 12)
    assert plan.given_up == {0: "lost a third time"}


def test_after_failures_a_worker_gets_fresh_shards_alone_one_at_a_time_after_longer_and_longer_pauses():
    plan = ShardPlan(iter(range(99)), workers=2)
    plan.at_work = {1, 2}
    now = 0.0
    for shard, pause in enumerate((5, 20, 80, 320, 1280, LONGEST_PAUSE, LONGEST_PAUSE)):
        assert plan.next_for(1, [], now) == shard
        plan.failed(1, [shard], "lost", now)
        assert plan.next_for(1, [], now + pause - 0.1) is None
        now += pause
    assert plan.next_for(1, [], now) == 7 and plan.next_for(1, [7], now) is None
    assert [plan.next_for(2, [], now), plan.next_for(2, [0], now)] == [0, None], "what failed is for the other, alone"
    plan.finished(1)
    assert [plan.next_for(1, [], now), plan.next_for(1, [8], now)] == [8, 9], "one success, and it is as good as any"


def test_the_first_at_work_brings_no_shard_down_before_others_come():
    """It fails whatever it gets, and they are still loading their models: what failed waits for them."""
    plan = ShardPlan(iter(range(9)), workers=3)
    plan.at_work, plan.loading = {1}, {2, 3}
    for shard in range(3):
        assert plan.next_for(1, [], shard * LONGEST_PAUSE) == shard
        plan.failed(1, [shard], "lost", shard * LONGEST_PAUSE)
    assert plan.next_for(1, [], 2 * LONGEST_PAUSE + 1) is None, "it waits, as they may be better ones"
    plan.at_work, plan.loading = {1, 2}, {3}
    now = 3 * LONGEST_PAUSE
    assert plan.next_for(2, [], now) == 0
    plan.finished(2)
    assert plan.next_for(1, [], now) == 3, "a fresh one: what failed is for the other"
    assert [plan.next_for(2, [], now), plan.next_for(2, [], now)] == [1, 2]


def test_what_failed_does_not_wait_for_workers_that_never_come():
    plan = ShardPlan(iter(range(4)), workers=2)
    plan.at_work, plan.loading = {1}, {2}
    given, now = [], 0.0
    while not plan.is_empty:
        given.append(plan.next_for(1, [], now))
        plan.failed(1, given[-1:], "lost", now)
        now += LONGEST_PAUSE
    assert given == [0, 1, 2, 3, *[0, 1, 2, 3] * (ATTEMPTS - 1)] and plan.given_up.keys() == set(range(4))


def test_a_worker_that_has_failed_often_gets_no_failed_shard_while_a_better_one_is_busy():
    """Though that one has failed with it already: it was preempted."""
    plan = ShardPlan(iter(range(99)), workers=2)
    plan.at_work = {1, 2}
    for shard in range(5):
        assert plan.next_for(1, [], shard * LONGEST_PAUSE) == shard
        plan.failed(1, [shard], "lost", shard * LONGEST_PAUSE)
    now = 6 * LONGEST_PAUSE
    taken = plan.next_for(2, [], now)
    plan.failed(2, [taken], "preempted", now)
    assert plan.next_for(2, [], now + 10) == 1 and plan.next_for(1, [], now + 10) == 5


@settings(deadline=None)
@given(
    shards=st.integers(0, 60), workers=st.integers(1, 5), bad=st.integers(0, 4), dice=st.integers(0, 2**32).map(Random)
)
def test_workers_that_come_and_go(shards, workers, bad, dice):
    """The first ``bad`` workers fail whatever they get; the others die at times and load again.

    There is always something under way, or will be after a pause; and with nobody bad nothing is given up.
    """
    crew, loading, accidents = Crew(shards, workers), set(range(1, workers + 1)), Counter()
    crew.held = {}
    for _ in range(100 * (shards + 10)):
        crew.plan.loading = loading
        crew.hand_out()
        if crew.is_done:
            break
        if not crew.busy and not loading:
            crew.now += LONGEST_PAUSE
            crew.hand_out()
            assert crew.busy, "nothing is under way, and shards are left"
        worker = dice.choice([*crew.busy, *loading])
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
        crew.now += dice.choice([0.1, 10.0, 1000.0])
    assert crew.is_done
    assert crew.finished.keys() | crew.plan.given_up.keys() == set(range(shards)) and set(crew.finished.values()) <= {1}
    if bad >= workers:
        assert not crew.finished
    if bad == 0:
        assert not crew.plan.given_up


def test_when_nothing_goes_any_more_it_is_no_shards_fault():
    crew, ends_at = Crew(100_000, 5), []
    crew.hand_out()
    crew.finish(1)
    for count in range(1, NOTHING_GOES + 1):
        crew.now += LONGEST_PAUSE
        crew.hand_out()
        worker = crew.busy[0]
        crew.fail(worker, crew.held[worker][:1])
        ends_at += [count] * crew.plan.goes_nowhere
    assert ends_at == [NOTHING_GOES]


def test_the_last_shards_wait_for_workers_that_have_none():
    plan = ShardPlan(iter(range(5)), workers=3)
    plan.at_work = {1, 2, 3}
    assert [plan.next_for(worker, [], 0) for worker in (1, 2, 3)] == [0, 1, 2]
    assert plan.next_for(1, [0], 0) is None and plan.next_for(2, [1], 0) is None  # for the first idle
    assert [plan.next_for(1, [], 0), plan.next_for(2, [], 0)] == [3, 4]
    assert plan.is_empty


def test_a_shard_that_failed_is_alone_with_its_worker_until_it_is_given_up():
    plan = ShardPlan(iter(range(9)), workers=1)
    plan.at_work = {1}
    assert [plan.next_for(1, [], 0), plan.next_for(1, [0], 0)] == [0, 1]
    for shard in (0, 1):
        plan.failed(1, [shard], "lost", 0)
    for attempt in range(2, ATTEMPTS + 1):
        assert plan.next_for(1, [5], 0) is None
        assert plan.next_for(1, [], 0) == (0 if attempt == 2 else 1)
        held = 0 if attempt == 2 else 1
        assert plan.next_for(1, [held], 0) is None
        plan.failed(1, [held], "lost", 0)
