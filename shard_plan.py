"""Which shard goes to a worker next, what happens to one whose worker failed, and which are given up; plain Python."""

from collections import Counter, deque
from collections.abc import Collection, Iterator
from itertools import islice

ATTEMPTS = 3
AHEAD = 2  # shards that a worker holds: one in hand, and the next, which is read meanwhile


class ShardPlan:
    """Hands out ``shards`` to ``workers`` workers, each until it is finished or has failed ``ATTEMPTS`` times.

    A worker that fails takes all that it holds with it, so that one bad shard brings its neighbour a failure too.
    Hence a shard that has failed is given out alone. The last shards are for workers that have none, so that they
    don't queue behind others. ``given_up`` has the reason of each that has failed for good.

    >>> plan = ShardPlan(iter([0, 1, 2]), workers=1)
    >>> plan.next_for([]), plan.next_for([0])
    (0, 1)
    >>> plan.failed(0, "lost"); plan.failed(1, "lost")
    >>> plan.next_for([]), plan.next_for([0])
    (0, None)
    """

    def __init__(self, shards: Iterator[int], workers: int):
        self._shards = shards
        self._next = deque(islice(shards, workers + 1))  # as many as tell whether these are the last ones
        self._workers = workers
        self._again: deque[int] = deque()
        self._failures: Counter[int] = Counter()
        self.given_up: dict[int, str] = {}

    def next_for(self, held: Collection[int]) -> int | None:
        """A shard for a worker that holds these, None if it is to have no more now."""
        if len(held) >= AHEAD or any(shard in self._failures for shard in held):
            return None
        if self._again:
            return None if held else self._again.popleft()
        if not self._next or (held and len(self._next) < self._workers):
            return None
        self._next.extend(islice(self._shards, 1))
        return self._next.popleft()

    @property
    def is_empty(self) -> bool:
        """Whether all shards have been given out, those that failed as often as they may."""
        return not self._next and not self._again

    def failed(self, shard: int, reason: str) -> None:
        """A shard was not finished: its worker failed, or it made it fail."""
        self._failures[shard] += 1
        if self._failures[shard] < ATTEMPTS:
            self._again.append(shard)
        else:
            self.given_up[shard] = reason
