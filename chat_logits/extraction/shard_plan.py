"""Which shards are missing, who computes which next, what happens to those of failed workers, which are given up."""

from collections import Counter, deque
from collections.abc import Collection, Iterator
from heapq import nsmallest
from itertools import islice

ATTEMPTS = 3  # for each shard
AHEAD = 2  # shards that a worker holds: the one it computes, and the next, which is read meanwhile
TRIED = 3  # a worker with up to this many failures in a row is preferred to one that has failed with the shard
NOTHING_GOES = 1000  # failures in a row of all workers together, or four for each: then no single shard is the cause
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 3600.0  # seconds; each failure in a row makes the pause four times as long


def missing_shards(finished: dict[int, int], rows_per_shard: int, num_rows: int | None) -> Iterator[int]:
    """Numbers of the shards still to compute, in order. ``finished`` maps finished shards to their source rows' count.

    ``num_rows`` is the length of the source, None if only reading it shows that: then a shard that is not full is last.

    >>> list(missing_shards({0: 4, 2: 4}, rows_per_shard=4, num_rows=17))
    [1, 3, 4]
    """
    shard = 0
    while num_rows is None or shard * rows_per_shard < num_rows:
        if shard not in finished:
            yield shard
        elif finished[shard] < rows_per_shard:
            return
        shard += 1


def pause_after(failures: int) -> float:
    """Seconds that a worker waits after so many failures in a row.

    >>> [pause_after(failures) for failures in (0, 1, 2, 3, 9)]
    [0.0, 5.0, 20.0, 80.0, 3600.0]
    """
    return min(LONGEST_PAUSE, FIRST_PAUSE * 4.0 ** min(failures - 1, 9)) if failures > 0 else 0.0


class ShardPlan:
    """Hands out ``shards`` to ``workers`` workers, each until it is finished or has failed ``ATTEMPTS`` times.

    A worker that fails loses all shards that it holds, so one bad shard counts as a failure of its neighbour too.
    Therefore a shard that has failed is given out alone, and if possible to a worker that has not failed with it or
    since its last success. A worker waits longer after each failure in a row, unless the others fail as well; so a
    machine on which everything fails takes few shards. The last shards are kept for idle workers, so that they do not
    queue after others. ``given_up`` has the reason for each shard that has failed for good.

    Workers are numbers: ``at_work`` are those that take shards now, ``loading`` those that soon will. The plan has no
    clock: ``now`` is in seconds.

    >>> plan = ShardPlan(iter([0, 1, 2]), workers=1)
    >>> plan.at_work = {1}
    >>> plan.next_for(1, held=[], now=0), plan.next_for(1, held=[0], now=0)
    (0, 1)
    >>> plan.failed(1, [0, 1], "lost", now=0)
    >>> plan.next_for(1, held=[], now=0), plan.next_for(1, held=[0], now=0)
    (0, None)
    """

    def __init__(self, shards: Iterator[int], workers: int):
        self._shards, self._workers = shards, workers
        self._fresh = deque(islice(shards, workers + 1))  # enough to see whether these are the last ones
        self.at_work: set[int] = set()
        self.loading: set[int] = set()
        self._again: list[int] = []
        self._failed_with: dict[int, list[int]] = {}  # workers, by shard
        self._in_a_row: Counter[int] = Counter()  # failures, by worker
        self._failed_at: dict[int, float] = {}  # by worker
        self._failures = 0  # in a row, of all workers
        self.given_up: dict[int, str] = {}

    @property
    def is_empty(self) -> bool:
        """Whether all shards have been given out, and none is waiting for another attempt."""
        return not self._fresh and not self._again

    @property
    def goes_nowhere(self) -> bool:
        """Whether so many shards have failed since the last success that all others would fail too."""
        return self._failures >= max(NOTHING_GOES, 4 * self._workers)

    def next_for(self, worker: int, held: Collection[int], now: float) -> int | None:
        """A shard for a worker that holds these, None if it gets no more now."""
        if len(held) >= AHEAD or any(shard in self._failed_with for shard in held) or self._waits(worker, now):
            return None
        again = self._best_failed(worker, now) if self._again else None
        if again is not None and not held:
            self._again.remove(again)
        if again is not None or not self._fresh:
            return None if held else again
        if held and (len(self._fresh) < self._workers or self._in_a_row[worker] > self._least):
            return None
        self._fresh.extend(islice(self._shards, 1))
        return self._fresh.popleft()

    def finished(self, worker: int) -> None:
        """The worker has finished a shard."""
        self._in_a_row[worker] = self._failures = 0

    def failed(self, worker: int, shards: Collection[int], reason: str, now: float) -> None:
        """The worker has failed with these shards: by itself, or because of one of them."""
        self._in_a_row[worker] += 1
        self._failed_at[worker] = now
        self._failures += 1
        for shard in shards:
            tried = self._failed_with.setdefault(shard, [])
            tried.append(worker)
            if len(tried) < ATTEMPTS:
                self._again.append(shard)
            else:
                self.given_up[shard] = reason

    @property
    def _least(self) -> int:
        """Failures in a row of the best worker: failures that all workers have are not counted against any."""
        return min((self._in_a_row[worker] for worker in self.at_work | self.loading), default=0)

    def _waits(self, worker: int, now: float) -> bool:
        failures = self._in_a_row[worker]
        return failures > 0 and now < self._failed_at[worker] + pause_after(failures - self._least)

    def _best_failed(self, worker: int, now: float) -> int | None:
        """A failed shard for which no other worker is better than this one.

        As long as there are fresh shards, the others are all workers that are there or soon will be; later, only those
        that need not wait.
        """
        others = self.at_work | self.loading
        if not self._fresh:
            others = {other for other in self.at_work if not self._waits(other, now)}
        best = nsmallest(ATTEMPTS, others, key=self._in_a_row.__getitem__)  # at least one has not failed with it
        if best and self._in_a_row[worker] > self._in_a_row[best[0]] + TRIED * (ATTEMPTS - 1):
            return None
        for shard in self._again:
            tried = self._failed_with[shard]
            compared = (worker, *best, *others.intersection(tried))
            scores = {other: self._in_a_row[other] + TRIED * tried.count(other) for other in compared}
            if scores[worker] == min(scores.values()):
                return shard
        return None
