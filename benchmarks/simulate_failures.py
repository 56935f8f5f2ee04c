"""What failures cost a run of many workers, event by event: prints the table of docs/scale.md.

A worker holds one shard in hand and, while enough are left for all, one queued. A node fails with all its workers: the
work in hand is lost, both shards of each go, alone, to the next workers that are free, and the node is back, model
loaded, ``restart`` later.
"""

import heapq
import math
from collections import Counter, deque
from itertools import count

import numpy as np

ATTEMPTS = 3  # a shard that fails so often is given up
NODES = {"steady": 50_676 / 8, "spot": 10.0}  # mean hours between the failures of a node of eight
HOURS, SPREAD, SEEDS = 8, 0.25, 16  # of a run without failures; of the logarithm of a shard's seconds; runs averaged


def expected_waste(shard: float, mtbf: float, restart: float) -> float:
    """Share of the time lost or away, for shards of ``shard`` seconds: one takes (mtbf + restart) * (exp(shard / mtbf)
    - 1) with its failures, in the mean."""
    return 1 - shard / ((mtbf + restart) * math.expm1(shard / mtbf))


class Simulation:
    """Shards of ``durations`` (M,) seconds on ``workers`` in nodes that work ``mtbf`` seconds in the mean. After it, in
    seconds: ``wall``, workers' time ``lost`` and ``away``, ``idle_from`` when one first had nothing to do."""

    def __init__(self, durations, workers: int, mtbf=math.inf, restart=180.0, node_size=8, seed=0):
        self.durations, self.mtbf, self.restart = np.asarray(durations, float).tolist(), mtbf, restart
        self.random, self.sequence = np.random.default_rng(seed), count()
        self.events: list = []
        self.held: list[list[int]] = [[] for _ in range(workers)]
        self.began, self.idle, self.retries = [0.0] * workers, set[int](), deque[int]()
        self.failed, self.begun = Counter[int](), Counter[int]()  # times, by shard
        self.wall = self.lost = self.away = 0.0
        self.fresh = self.finished = self.given_up = 0
        self.idle_from = math.inf
        self._run([range(first, min(first + node_size, workers)) for first in range(0, workers, node_size)])

    def _run(self, nodes: list[range]) -> None:
        for node in nodes if math.isfinite(self.mtbf) else ():
            self._after(self.random.exponential(self.mtbf), self._fail, node)
        for worker in range(len(self.held)):  # each has one before any has two
            self._take(worker)
        self._go_on(range(len(self.held)))
        while self.finished + self.given_up < len(self.durations):
            self.wall, _, what, whom = heapq.heappop(self.events)
            what(whom)

    def _after(self, seconds: float, what, whom) -> None:
        heapq.heappush(self.events, (self.wall + seconds, next(self.sequence), what, whom))

    def _take(self, worker: int) -> bool:
        """Give the worker one more shard if it may hold it: a failed one alone, and before all others."""
        held, left = self.held[worker], len(self.durations) - self.fresh
        if self.retries and not held:
            held.append(self.retries.popleft())
        elif self.retries or not left or len(held) == 2 or (held and (self.failed[held[0]] or left < len(self.held))):
            return False
        else:
            held.append(self.fresh)
            self.fresh += 1
        return True

    def _go_on(self, workers) -> None:
        for worker in workers:
            while self._take(worker):
                pass
            if self.held[worker]:
                shard, self.began[worker] = self.held[worker][0], self.wall
                self.begun[shard] += 1
                self._after(self.durations[shard], self._finish, (worker, self.wall))
            else:
                self.idle.add(worker)
                self.idle_from = min(self.idle_from, self.wall)

    def _finish(self, whom: tuple[int, float]) -> None:
        worker, began = whom
        if self.held[worker] and self.began[worker] == began:  # else it failed meanwhile
            self.held[worker].pop(0)
            self.finished += 1
            self._go_on([worker])

    def _fail(self, node: range) -> None:
        for worker in node:
            self.lost += (self.wall - self.began[worker]) * bool(self.held[worker])
            self.failed.update(self.held[worker])
            self.retries += [shard for shard in self.held[worker] if self.failed[shard] < ATTEMPTS]
            self.given_up += sum(self.failed[shard] == ATTEMPTS for shard in self.held[worker])
            self.held[worker] = []
        self.idle -= set(node)
        self._after(self.restart, self._return, node)
        woken = sorted(self.idle)[: len(self.retries)]
        self.idle -= set(woken)
        self._go_on(woken)

    def _return(self, node: range) -> None:
        self.away += self.restart * len(node)
        self._go_on(node)
        self._after(self.random.exponential(self.mtbf), self._fail, node)


def figures(workers: int, mtbf: float, shard: float, seed: int) -> list[float]:
    """Percent of workers' time lost, and away; of the clock over the ideal; of shards begun again; tail s; given up."""
    shards = int(workers * HOURS * 3600 / shard)
    durations = shard * np.random.default_rng(seed).lognormal(-(SPREAD**2) / 2, SPREAD, shards)
    found = Simulation(durations, workers, mtbf, seed=seed)
    time, again = workers * found.wall, sum(times > 1 for times in found.begun.values())
    shares = found.lost / time, found.away / time, time / durations.sum() - 1, again / shards
    return [*(100 * share for share in shares), found.wall - found.idle_from, found.given_up]


def main() -> None:
    heads = ["nodes", "workers", "s a shard", "formula %", "lost %", "away %", "over ideal %", "twice %", "tail s"]
    print("| " + " | ".join([*heads, "given up"]) + " |\n" + "| --- " * 10 + "|")
    for kind, hours in NODES.items():
        for workers in (8, 100, 1000):
            for shard in (10, 60, 600):
                found = np.mean([figures(workers, hours * 3600, shard, seed) for seed in range(SEEDS)], axis=0)
                told = [100 * expected_waste(shard, hours * 3600, 180), *found]
                cells = [f"{value:.{digits}f}" for value, digits in zip(told, (3, 3, 3, 2, 3, 0, 1), strict=True)]
                print(f"| {kind} | {workers:,} | {shard} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
