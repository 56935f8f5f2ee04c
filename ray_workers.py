"""Workers on Ray, each with a model on accelerators of its own. This process gives out shards and keeps the books.

No model is loaded here, and nothing comes back but each shard's numbers: the workers write the shards themselves.
"""

import secrets
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from disk_space import DiskFull
from errors import ToolkitError, UsageError
from hub_access import redact
from ray_cluster import connect, first_line, ray
from run_description import OpenedRun
from run_folder import WORKERS
from shard_plan import AHEAD, ATTEMPTS, ShardPlan
from shard_worker import Answer, ShardWorker, assign

STARTS = 3  # in a row that a worker may fail to begin
SHOWN = 10  # shards that are named in a message
QUIET = 30.0  # seconds without a word from any worker, until it is told what is waited for


@dataclass(eq=False)
class Seat:
    """The place of one worker, whatever actor has it now; ``shards`` are in its hands."""

    number: int
    actor: object = None
    described: dict | None = None
    is_ready: bool = False
    failures: int = 0
    shards: list[int] = field(default_factory=list)


class RayWorkers:
    """``--num_workers`` workers for an opened run, in the place of a ``ShardComputer``.

    Raises UsageError where this machine has not that many accelerators, ToolkitError where no worker can begin.
    """

    def __init__(self, opened: OpenedRun, folder: Path):
        if opened.reader.source.num_rows is None:
            raise UsageError(
                f"--num_workers: {opened.arguments.dataset_id} is streamed and nobody knows its length. Leave out "
                "--streaming, or convert it to Parquet."
            )
        self.arguments, self.folder = opened.arguments, folder.absolute()
        self._opened = opened
        self._seats: list[Seat] = []
        self._pending: dict[object, tuple[Seat, Callable]] = {}  # calls under way, and what to do with their answers
        self._extraction: dict | None = None
        self._plan = ShardPlan(iter(()), 1)
        self._token = secrets.token_hex(8)
        self._told: list[int] = []

    def __enter__(self) -> "RayWorkers":
        return self

    def __exit__(self, *_: object) -> None:
        for seat in self._seats:
            if seat.actor is not None:
                ray.kill(seat.actor)  # they may wait for their next shard, or be in the middle of one
        ray.shutdown()
        (self.folder / WORKERS).unlink(missing_ok=True)

    # --- what a ShardComputer does ---

    def describe(self) -> dict:
        """``extraction.json`` of a new run, by the first worker that has loaded its model."""
        self._start()
        while not (ready := [seat for seat in self._seats if seat.described]):
            self._step()
        return ready[0].described

    def compute(self, shards: Iterator[int], extraction: dict, finished: Callable, progress: Callable) -> None:
        """Have these shards computed; ``finished(entry, upload)`` is told of each.

        Raises ToolkitError at the end, after all others, where shards have failed for good.
        """
        self._plan = ShardPlan(shards, self.arguments.num_workers)
        if self._plan.is_empty:
            return
        (self.folder / WORKERS).write_text(self._token, encoding="utf-8")
        self._extraction = extraction
        self._start()
        for seat in self._seats:
            self._begin(seat)
        with progress() as bar:
            self._work(finished, bar)
        if self._plan.given_up:
            raise ToolkitError(self._told_given_up())

    def _work(self, finished: Callable, bar: tqdm) -> None:
        tokens, started = 0, time.monotonic()

        def keep(seat: Seat, answer: Answer) -> None:
            nonlocal tokens
            entry = answer.entry
            seat.shards.remove(entry.shard)
            finished(entry, answer.upload)
            tokens += entry.num_tokens
            at_work = sum(seat.is_ready for seat in self._seats)
            bar.set_postfix_str(
                f"{tokens / (time.monotonic() - started):,.0f} tokens/s, {at_work} workers", refresh=False
            )
            bar.update(entry.source_rows)

        while not self._plan.is_empty or any(seat.shards for seat in self._seats):
            self._hand_out(keep)
            self._step()

    # --- starting ---

    def _start(self) -> None:
        if self._seats:
            return
        options = connect(self.arguments)
        self._actors = ray.remote(ShardWorker).options(**options, max_concurrency=AHEAD + 1, max_restarts=0)
        self._assignment = assign(self._opened, self.folder, self._token)
        self._seats = [Seat(number) for number in range(1, self.arguments.num_workers + 1)]
        gpus = options["num_gpus"]
        each = f"each with {gpus} GPU{'s' * (gpus > 1)}" if gpus else "on CPUs"
        print(f"Starting {len(self._seats)} workers on Ray, {each} …", file=sys.stderr)
        for seat in self._seats:
            self._seat(seat)

    def _seat(self, seat: Seat) -> None:
        """Put a new worker in a place. Ray starts it where there is room, as soon as there is."""
        seat.actor, seat.described, seat.is_ready = self._actors.remote(self._assignment), None, False
        self._call(seat, seat.actor.describe, self._described)

    def _described(self, seat: Seat, answer: tuple[dict, str]) -> None:
        seat.described, place = answer
        _say(f"Worker {seat.number} of {len(self._seats)} has its model: {place}")
        self._begin(seat)

    def _begin(self, seat: Seat) -> None:
        if seat.described and self._extraction:
            self._call(seat, seat.actor.begin, self._begun, self._extraction)

    def _begun(self, seat: Seat, _answer: None) -> None:
        seat.is_ready, seat.failures = True, 0

    # --- working ---

    def _hand_out(self, keep: Callable) -> None:
        """Give every worker that is ready what it may hold."""
        for seat in self._seats:
            while seat.is_ready and (shard := self._plan.next_for(seat.shards)) is not None:
                seat.shards.append(shard)
                self._call(seat, seat.actor.compute, keep, shard)

    def _call(self, seat: Seat, method, then: Callable, *arguments) -> None:
        self._pending[method.remote(*arguments)] = (seat, then)

    def _step(self) -> None:
        """Wait for something to happen, and see to it."""
        done, _ = ray.wait(list(self._pending), num_returns=1, timeout=QUIET)
        if not done:
            self._tell_waiting()
        for call in done:
            seat, then = self._pending.pop(call)
            try:
                answer = ray.get(call)
            except ray.exceptions.RayError as error:
                self._lost(seat, getattr(error, "cause", None) or error)
            else:
                then(seat, answer)

    # --- failing ---

    def _lost(self, seat: Seat, error: Exception) -> None:
        """A call has failed, and with it all that the worker had in hand; unless it is sound, a new one takes over."""
        if isinstance(error, DiskFull):
            raise error
        self._pending = {call: about for call, about in self._pending.items() if about[0] is not seat}
        reason = _reason(error)
        for shard in seat.shards:
            self._plan.failed(shard, reason)
        if seat.shards:
            _say(f"Worker {seat.number}: {reason}\n{self._told_lost(seat.shards)}")
        seat.shards = []
        if not (seat.is_ready and isinstance(error, ToolkitError)):
            self._replace(seat, error, reason)

    def _replace(self, seat: Seat, error: Exception, reason: str) -> None:
        ray.kill(seat.actor)
        if not seat.is_ready:
            seat.failures += 1
            _say(f"Worker {seat.number} did not begin ({seat.failures} of {STARTS} times): {reason}")
        if seat.failures < STARTS:
            self._seat(seat)
            return
        self._seats.remove(seat)
        if not self._seats:
            raise error if isinstance(error, ToolkitError) else ToolkitError(f"no worker can begin: {reason}")

    def _tell_waiting(self) -> None:
        waiting = [seat.number for seat in self._seats if seat.described is None]
        if waiting and waiting != self._told:
            room = ", ".join(f"{int(ray.cluster_resources().get(kind, 0))} {kind}s" for kind in ("GPU", "CPU"))
            _say(f"{len(waiting)} workers are loading their model or wait for a place; the cluster has {room} in all")
        self._told = waiting

    def _told_lost(self, shards: list[int]) -> str:
        given_up = [shard for shard in shards if shard in self._plan.given_up]
        again = [shard for shard in shards if shard not in self._plan.given_up]
        told = {f"Given up after {ATTEMPTS} failures": given_up, "To be computed again": again}
        return "; ".join(f"{what}: {self._rows_of(these)}" for what, these in told.items() if these)

    def _told_given_up(self) -> str:
        given_up = self._plan.given_up
        more = f" and {len(given_up) - SHOWN} others" if len(given_up) > SHOWN else ""
        which = self._rows_of(sorted(given_up)[:SHOWN]) + more
        return (
            f"{len(given_up)} of the shards failed {ATTEMPTS} times and were left out; all others are done. The same "
            f"command tries these again.\n{which}; the last because: {list(given_up.values())[-1]}"
        )

    def _rows_of(self, shards: list[int]) -> str:
        size, end = self.arguments.rows_per_shard, self._opened.reader.num_rows
        return "source rows " + ", ".join(f"{n * size} to {min((n + 1) * size, end) - 1}" for n in shards)


def _reason(error: Exception) -> str:
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return "its machine ran out of memory, and Ray ended it"
    if isinstance(error, ray.exceptions.RayError):
        return "it died, or its machine did"
    return str(error) if isinstance(error, ToolkitError) else f"{type(error).__name__}: {first_line(error)}"


def _say(text: str) -> None:
    tqdm.write(redact(text), file=sys.stderr)
