"""Which shard goes to a worker next, what happens to one whose worker failed, and which are given up; plain Python."""

from collections import Counter, deque
from collections.abc import Collection, Iterator
from itertools import islice

ATTEMPTS = 3
AHEAD = 2  # shards that a worker holds: one in hand, and the next, which is read meanwhile
SUSPECT = 3  # failures in a row after which a worker, and not its shards, is likely to be the cause
HOPELESS = 6  # after which it gets no more, if meanwhile the others have each finished FAIR shards in the mean
FAIR = 4  # two that they may have had in hand when its failures began, and two more
NOTHING_GOES = 1000  # failures in a row of all workers together, or four of each: no shard's fault any more


class ShardPlan:
    """Hands out ``shards`` to ``workers`` workers, each until it is finished or has failed ``ATTEMPTS`` times.

    A worker that fails takes all that it holds with it, so that one bad shard brings its neighbour a failure too.
    Hence a shard that has failed is given out alone, and to another worker if there is one, since its worker may be
    the cause. A worker is told from a shard by what the others do meanwhile. The last shards are for workers that have
    none, so that they don't queue behind others. ``given_up`` has the reason of each that has failed for good.

    Workers are numbers: ``at_work`` are those that take shards at present, ``to_come`` says how many others may yet.

    >>> plan = ShardPlan(iter([0, 1, 2]), workers=1)
    >>> plan.at_work = {1}
    >>> plan.next_for(1, held=[]), plan.next_for(1, held=[0])
    (0, 1)
    >>> plan.failed(1, [0, 1], "lost")
    >>> plan.next_for(1, held=[]), plan.next_for(1, held=[0])
    (0, None)
    """

    def __init__(self, shards: Iterator[int], workers: int):
        self._shards = shards
        self._next = deque(islice(shards, workers + 1))  # as many as tell whether these are the last ones
        self._workers = workers
        self.at_work: Collection[int] = ()
        self.to_come = 0
        self._again: list[int] = []
        self._failed_with: dict[int, list[int]] = {}  # workers, by shard
        self._in_a_row: Counter[int] = Counter()  # failures, by worker
        self._finished_before: dict[int, int] = {}  # shards that all had finished when a worker's failures began
        self._proven: set[int] = set()  # workers that have finished a shard
        self._finished = 0
        self._failures = 0  # of all in a row
        self.given_up: dict[int, str] = {}

    def next_for(self, worker: int, held: Collection[int]) -> int | None:
        """A shard for a worker that holds these, None if it is to have no more now."""
        if len(held) >= AHEAD or any(shard in self._failed_with for shard in held):
            return None
        again = next((shard for shard in self._again if self._may_try(worker, shard)), None)
        if again is not None:
            if not held:
                self._again.remove(again)
            return None if held else again
        few = len(self._next) < self._workers or self.is_suspect(worker)
        if not self._next or (held and few):
            return None
        self._next.extend(islice(self._shards, 1))
        return self._next.popleft()

    @property
    def is_empty(self) -> bool:
        """Whether all shards have been given out, those that failed as often as they may."""
        return not self._next and not self._again

    @property
    def goes_nowhere(self) -> bool:
        """Whether so many have failed since the last that was finished that all others would, too."""
        return self._failures >= max(NOTHING_GOES, 4 * self._workers)

    def finished(self, worker: int) -> None:
        """The worker has finished a shard."""
        self._finished, self._in_a_row[worker], self._failures = self._finished + 1, 0, 0
        self._proven.add(worker)

    def failed(self, worker: int, shards: Collection[int], reason: str) -> None:
        """Shards were not finished: their worker failed, or one of them made it fail."""
        if not self._in_a_row[worker]:
            self._finished_before[worker] = self._finished
        self._in_a_row[worker] += 1
        self._failures += 1
        for shard in shards:
            tried = self._failed_with.setdefault(shard, [])
            tried.append(worker)
            if len(tried) < ATTEMPTS:
                self._again.append(shard)
            else:
                self.given_up[shard] = reason

    def is_suspect(self, worker: int) -> bool:
        """Whether the worker is likely to be the cause of its failures, to get one shard at a time, with pauses.

        It is not while shards fail with all; where it is the first at work, the others are waited for.
        """
        if self._in_a_row[worker] < SUSPECT:
            return False
        return self._any_better(self.at_work) or (self.to_come > 0 and worker not in self._proven)

    def is_hopeless(self, worker: int) -> bool:
        """Whether a worker is to get no more: only failures, while the others go on as ever."""
        others = set(self.at_work) - {worker}
        meanwhile = self._finished - self._finished_before.get(worker, 0)
        return self._in_a_row[worker] >= HOPELESS and meanwhile >= FAIR * len(others) and self._any_better(others)

    def _may_try(self, worker: int, shard: int) -> bool:
        """Whether a shard that has failed may go to this worker: not if there is a better one, or soon will be."""
        if self.is_suspect(worker) and self._any_better(self.at_work):
            return False
        tried = self._failed_with[shard]
        if worker not in tried and not self.is_suspect(worker):
            return True
        return not self._any_better(set(self.at_work).difference(tried)) and not (self.to_come and self._next)

    def _any_better(self, workers: Collection[int]) -> bool:
        return any(self._in_a_row[other] < SUSPECT for other in workers)
