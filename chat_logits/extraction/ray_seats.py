"""The places of workers on Ray: each gets a new worker when its own is lost. Calls to them, and their answers."""

import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import huggingface_hub
from tqdm import tqdm

from chat_logits.errors import ToolkitError
from chat_logits.extraction.cluster import Share, first_line, ray
from chat_logits.extraction.shard_plan import AHEAD
from chat_logits.extraction.shard_worker import Assignment, ShardWorker
from chat_logits.hub import redact
from chat_logits.storage.manifest import Manifest

STARTS = 4  # in a row that a worker may fail to begin
RESTART = 5.0  # seconds before it is started again, then 50, then 500: a thousand may have asked the Hub at once
CLOSING = 3.0  # seconds that workers have to clear up
LOOK = 10.0  # seconds at most that a step takes
QUIET = 30.0  # seconds without a word from any worker, until it is told what is waited for


@dataclass(eq=False)
class Seat:
    """The place of one worker, whatever actor has it now; ``shards`` are in its hands, the first since ``since``.

    Until ``not_before`` it gets neither shards nor, if it has none, an actor.
    """

    number: int
    actor: object = None
    described: Manifest | None = None
    place: str = ""
    is_ready: bool = False
    failures: int = 0
    not_before: float = 0.0
    shards: list[int] = field(default_factory=list)
    since: float = 0.0


@dataclass(frozen=True)
class Call:
    """What a seat's worker is doing, of which ``then(seat, answer)`` is to be told; ``shard`` if it computes one."""

    seat: Seat
    then: Callable
    shard: int | None = None


class Seats:
    """``workers`` seats, numbered from 1, with actors that each take a ``share`` of the cluster.

    ``lost(seat, shards, reason)`` is told of shards that were not finished, ``failed(error, seat)`` of every failure
    before anything is done about it.
    """

    def __init__(self, share: Share, assignment: Assignment, workers: int, lost: Callable, failed: Callable):
        self._actors = ray.remote(ShardWorker).options(**share.options, max_concurrency=AHEAD + 1, max_restarts=0)
        self._assignment = ray.put(assignment)  # once for a machine
        self._seats = [Seat(number) for number in range(1, workers + 1)]
        self._calls: dict[object, Call] = {}  # under way
        self._lost, self._failed = lost, failed
        self._manifest: Manifest | None = None
        self._told: list[int] = []
        self._heard = time.monotonic()

    def __iter__(self) -> Iterator[Seat]:
        """Over the seats of now, whatever happens to them meanwhile."""
        return iter(list(self._seats))

    @property
    def at_work(self) -> set[int]:
        """The numbers of those that take shards."""
        return {seat.number for seat in self._seats if seat.is_ready}

    def begin(self, manifest: Manifest) -> None:
        """Let all begin the run of ``manifest`` as soon as they have their model."""
        self._manifest = manifest
        for seat in self._seats:
            self._begin(seat)

    def compute(self, seat: Seat, shard: int, then: Callable) -> None:
        """Give a worker a shard, and ``then(seat, answer)`` its answer."""
        seat.since = seat.since if seat.shards else time.monotonic()
        seat.shards.append(shard)
        self._call(seat.actor.compute, Call(seat, then, shard), shard)

    def step(self) -> None:
        """Wait for something to happen, and see to it."""
        self._fill()
        due = [seat.not_before - time.monotonic() for seat in self._seats]
        patience = min([LOOK, *(seconds for seconds in due if seconds > 0)])
        if not self._calls:
            time.sleep(patience)
            return
        done, _ = ray.wait(list(self._calls), num_returns=1, timeout=patience)
        self._heard = time.monotonic() if done else self._heard
        if time.monotonic() > self._heard + QUIET:
            self._tell_waiting()
        for reference in done:
            self._answered(reference)

    def replace(self, seat: Seat, error: Exception, reason: str) -> None:
        """Put a new worker in the place of one that is lost. Raises the last error where none can begin any more."""
        was_ready = seat.is_ready
        self._vacate(seat, reason)
        if was_ready:
            return
        seat.failures += 1
        say(f"Worker {seat.number} did not begin ({seat.failures} of {STARTS} times): {reason}")
        seat.not_before = time.monotonic() + RESTART * 10 ** (seat.failures - 1) * random.uniform(0.5, 1)
        if seat.failures == STARTS:
            self._seats.remove(seat)
        if not self._seats:
            raise error if isinstance(error, ToolkitError) else ToolkitError(f"no worker can begin: {reason}")

    def dismiss(self, seat: Seat, reason: str) -> None:
        """Go on without a worker."""
        say(f"Worker {seat.number} ({seat.place}): {reason}")
        self._seats.remove(seat)
        self._vacate(seat, reason)

    def close(self) -> None:
        """End all workers. Those that have begun clear up what they have on their machines' disks."""
        actors = [seat.actor for seat in self._seats if seat.actor]
        try:
            closing = [seat.actor.close.remote() for seat in self._seats if seat.actor and seat.described]
            if closing:
                ray.wait(closing, num_returns=len(closing), timeout=CLOSING)
        finally:
            for actor in actors:
                ray.kill(actor)  # they may wait for their next shard, or be in the middle of one

    def _fill(self) -> None:
        """Put new workers in the places that are due one. Ray starts them where there is room, as soon as there is."""
        for seat in self._seats:
            if seat.actor is None and time.monotonic() >= seat.not_before:
                # The Hub's token apart: what is put into Ray's store may end on disks.
                seat.actor = self._actors.remote(self._assignment, huggingface_hub.get_token())
                self._call(seat.actor.describe, Call(seat, self._described))

    def _described(self, seat: Seat, answer: tuple[Manifest, str]) -> None:
        seat.described, seat.place = answer
        say(f"Worker {seat.number} has its model: {seat.place}")
        self._begin(seat)

    def _begin(self, seat: Seat) -> None:
        if seat.described and self._manifest:
            self._call(seat.actor.begin, Call(seat, self._begun), self._manifest)

    def _begun(self, seat: Seat, _answer: None) -> None:
        seat.is_ready, seat.failures = True, 0

    def _call(self, method, call: Call, *arguments) -> None:
        self._calls[method.remote(*arguments)] = call

    def _answered(self, reference) -> None:
        """Tell of an answer. With a failure all is lost that the worker had in hand, unless it is sound itself."""
        call = self._calls.pop(reference)
        try:
            answer = ray.get(reference)
        except ray.exceptions.RayError as found:
            error = getattr(found, "cause", None) or found
            self._failed(error, call.seat)
            if call.shard is not None and isinstance(error, ToolkitError):
                call.seat.shards.remove(call.shard)
                self._lost(call.seat, [call.shard], _reason(error))
            else:
                self.replace(call.seat, error, _reason(error))
        else:
            call.then(call.seat, answer)

    def _vacate(self, seat: Seat, reason: str) -> None:
        self._calls = {reference: call for reference, call in self._calls.items() if call.seat is not seat}
        if seat.actor:
            ray.kill(seat.actor)
        lost, seat.shards = seat.shards, []
        seat.actor, seat.described, seat.is_ready = None, None, False
        if lost:
            self._lost(seat, lost, reason)

    def _tell_waiting(self) -> None:
        waiting = [seat.number for seat in self._seats if seat.described is None]
        if waiting and waiting != self._told:
            room = ", ".join(f"{int(ray.cluster_resources().get(kind, 0))} {kind}s" for kind in ("GPU", "CPU"))
            say(f"Loading their model or waiting for a place: {len(waiting)} workers; the cluster has {room} in all")
        self._told = waiting


def _reason(error: Exception) -> str:
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return "its machine ran out of memory, and Ray ended it"
    if isinstance(error, ray.exceptions.RayError):
        return "it died, or its machine did"
    return str(error) if isinstance(error, ToolkitError) else f"{type(error).__name__}: {first_line(error)}"


def say(text: str) -> None:
    """Tell beside a progress bar."""
    tqdm.write(redact(text), file=sys.stderr)
