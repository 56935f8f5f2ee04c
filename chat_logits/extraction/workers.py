"""Workers on Ray, each with a model on its own accelerators. This process gives out shards and keeps track of them.

No model is loaded here, and only each shard's numbers come back: the workers write the shards themselves. Ray restarts
a lost worker wherever there is room; the shards that it held go to others. If several processes compute a worker's
model, the worker starts the others itself, on its machine; if one of them is lost, the whole worker is.
"""

import logging
import random
import secrets
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import huggingface_hub
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, OutOfMemoryError, RayError

from chat_logits.errors import ToolkitError, UsageError
from chat_logits.extraction.cluster import connect, listens
from chat_logits.extraction.folder import RunFolder
from chat_logits.extraction.processes import GroupLost
from chat_logits.extraction.run_description import OpenedRun
from chat_logits.extraction.shard_plan import AHEAD, ATTEMPTS, ShardPlan, pause_after
from chat_logits.extraction.worker import ShardWorker, assign
from chat_logits.hub_errors import HubRefused, redact
from chat_logits.stages import stage
from chat_logits.storage.disk import DiskFull
from chat_logits.storage.manifest import Manifest
from chat_logits.words import count_text, first_line

logger = logging.getLogger(__name__)

STARTS = 5  # failed starts in a row until a worker is dismissed
LOOK, ASKING = 1.0, 10.0  # seconds that a step takes at most, and between two checks of the cluster's head
SLOW, LONG = 5, 3600.0  # a worker hangs if it has been silent SLOW times as long as the slowest shard took, and LONG s
CLOSING = 3.0  # seconds that workers have to clean up
SHOWN = 10  # shards that are named in a message


@dataclass(eq=False)
class Worker:
    """An actor with a number, in whatever process Ray runs it now, and the ``shards`` that it holds.

    ``life`` is a generator with all steps of the worker, resumed when one of its ``calls`` is answered, and every
    second. It waits for a process, loads its model, and works; ``place`` says where.
    """

    number: int
    actor: Any
    life: Iterator[list] = field(default_factory=lambda: iter(()))
    calls: list = field(default_factory=list)
    resumed: float = 0.0
    state: str = "waits"
    place: str = ""
    shards: list[int] = field(default_factory=list)


class RayWorkers:
    """``num_workers`` workers for an opened run, used instead of a ``ShardComputer``, within a context.

    Raises UsageError if this machine does not have that many accelerators, ToolkitError if no worker can begin.
    """

    def __init__(self, opened: OpenedRun, folder: RunFolder):
        self.config, self.folder, self._opened = opened.config, folder, opened
        if opened.reader.source.num_rows is None:
            raise UsageError(
                f"`num_workers`: {self.config.dataset_id} is streamed and its length is not known. Leave out "
                "`streaming`, or convert it to Parquet."
            )
        self._workers: list[Worker] = []
        self._plan = ShardPlan(iter(()), 1)
        self._described: list[Manifest] = []  # by each worker that has loaded its model
        self._manifest: Manifest | None = None
        self._slowest, self._tokens = 0.0, 0  # seconds that a shard has taken; tokens of all
        self._refused = self._misused = 0  # uploads refused by the Hub in a row; workers that refused the options
        self._is_cluster_gone, self._asked = False, time.monotonic()
        self._token = secrets.token_hex(8)

    def __enter__(self) -> "RayWorkers":
        self._share = connect(self.config)
        return self

    def __exit__(self, *_: object) -> None:
        """End all workers. Those that have begun first delete what they have on their machines' disks."""
        self.folder.dismiss_workers()
        if self._is_cluster_gone:
            return  # Ray would wait for the cluster
        try:
            closing = [worker.actor.close.remote() for worker in self._workers if worker.place]
            if closing:
                ray.wait(closing, num_returns=len(closing), timeout=CLOSING)
        finally:
            for worker in self._workers:
                ray.kill(worker.actor)  # it may wait for its next shard, or be in the middle of one
            ray.shutdown()

    def describe(self) -> Manifest:
        """The manifest of a new run, from the first worker that has loaded its model."""
        with stage("Waiting for the first worker to load its model"):
            self._run(until=lambda: self._described)
        # As they were given: the workers' paths are only valid on this cluster.
        here = self._opened.described
        return replace(self._described[0], model_id=here.model_id, dataset_id=here.dataset_id)

    def compute(self, shards: Iterator[int], manifest: Manifest, finished: Callable, progress: Callable) -> None:
        """Have these shards computed, and call ``finished(entry, upload)`` for each.

        If shards have failed for good, raises ToolkitError at the end, after all others are done.
        """
        self._plan = ShardPlan(shards, self.config.num_workers)
        if self._plan.is_empty:
            return
        self.folder.admit_workers(self._token)
        self._manifest, self._finished = manifest, finished
        with stage("Waiting for a worker that has begun"):
            self._run(until=lambda: any(worker.state == "works" for worker in self._workers))
        with progress() as self._bar:  # so that its speed does not include the time for loading
            self._run(until=lambda: self._plan.is_empty and not any(worker.shards for worker in self._workers))
        if self._plan.given_up:
            raise ToolkitError(self._explain_given_up())

    # --- workers ---

    def _start(self) -> None:
        logger.info("Starting %s …", self._share.described)
        # Ray sends an object in its store once to each machine.
        self._assignment = ray.put(assign(self._opened, self.folder.path.absolute(), self._token))
        actors = ray.remote(ShardWorker).options(max_concurrency=AHEAD + 1, **self._share.options)
        self._workers = [Worker(number, actors.remote()) for number in range(1, self.config.num_workers + 1)]
        for worker in self._workers:
            worker.life = self._live(worker)

    def _run(self, until: Callable[[], object]) -> None:
        if not self._workers:
            self._start()
        while not until():
            now = time.monotonic()
            self._plan.at_work = {worker.number for worker in self._workers if worker.state == "works"}
            self._plan.loading = {worker.number for worker in self._workers if worker.state == "loads"}
            calls = {call: worker for worker in self._workers for call in worker.calls}
            answered = ray.wait(list(calls), timeout=LOOK)[0] if calls else []
            due = {calls[call] for call in answered}
            for worker in [w for w in self._workers if w in due or now >= w.resumed + LOOK]:
                worker.resumed, worker.calls = now, next(worker.life, [])
            if not calls:
                time.sleep(LOOK)
            self._refuse_dead_cluster()

    def _live(self, worker: Worker) -> Generator[list, None, None]:
        """Start a worker, and restart it when it is lost. Yields the calls that it waits for."""
        process, failed_starts = "", 0
        while True:
            worker.state, worker.place, worker.shards = "waits", "", []
            try:
                process = yield from answer_to(worker.actor.process.remote(ended=process))
                yield from self._begin(worker)
                failed_starts = 0
                yield from self._work(worker)
            except RayError as error:
                cause = getattr(error, "cause", None) or error
                self._raise_if_fatal(cause)
                ray.kill(worker.actor, no_restart=False)
            if worker.state == "works":
                if worker.shards:
                    self._lost(worker, worker.shards, cause)
                continue
            worker.state, failed_starts = "waits", failed_starts + 1
            logger.warning(
                f"Worker {worker.number} did not begin ({failed_starts} of {STARTS} times): {explain(cause)}"
            )
            if failed_starts == STARTS or isinstance(cause, ActorDiedError):
                return self._dismiss(worker, cause)
            until = time.monotonic() + pause_after(failed_starts) * random.uniform(0.5, 1)
            while time.monotonic() < until:
                yield []

    def _begin(self, worker: Worker) -> Generator[list, None, None]:
        """Have the model loaded, and the run begun as soon as its manifest is known."""
        worker.state = "loads"
        # The Hub's token is passed separately: Ray's object store may spill to disk.
        loading = worker.actor.load.remote(self._assignment, huggingface_hub.get_token())
        described, worker.place = yield from answer_to(loading)
        self._described.append(described)
        logger.info(f"Worker {worker.number} has its model: {worker.place}")
        while self._manifest is None:
            yield []
        yield from answer_to(worker.actor.begin.remote(self._manifest))
        worker.state = "works"

    def _work(self, worker: Worker) -> Generator[list, None, None]:
        """Give a worker the shards that it may hold, and take its answers, until it is lost."""
        calls: dict[object, int] = {}
        while True:
            now = time.monotonic()
            if not calls:
                since = now
            while (shard := self._plan.next_for(worker.number, worker.shards, now)) is not None:
                worker.shards.append(shard)
                calls[worker.actor.compute.remote(shard)] = shard
            yield list(calls)
            limit, silent = max(LONG, SLOW * self._slowest), time.monotonic() - since
            is_late = bool(self._slowest) and silent > limit
            answered = ray.wait(list(calls), timeout=LOOK if is_late else 0)[0] if calls else []
            for call in answered:
                self._take(worker, call, calls[call], silent)
                worker.shards.remove(calls.pop(call))
                since = time.monotonic()
            if calls and is_late and not answered:
                reason = f"no answer for {limit:,.0f} s; the slowest so far took {self._slowest:,.0f}"
                raise GetTimeoutError(reason)

    def _take(self, worker: Worker, call: object, shard: int, seconds: float) -> None:
        """Take the answer about a shard. After a ToolkitError only that shard has failed; other errors are raised, and
        the worker counts as lost.

        GroupLost is raised too, as the worker then has no model any more.
        """
        try:
            entry, upload = ray.get(call)
        except RayError as error:
            cause = getattr(error, "cause", None)
            if not isinstance(cause, ToolkitError) or isinstance(cause, GroupLost):
                raise
            self._raise_if_fatal(cause)
            self._lost(worker, [shard], cause)
            return
        self._plan.finished(worker.number)
        self._refused, self._slowest, self._tokens = 0, max(self._slowest, seconds), self._tokens + entry.num_tokens
        self._finished(entry, upload)
        speed = f"{self._tokens / self._bar.format_dict['elapsed']:,.0f} tokens/s"
        self._bar.set_postfix_str(f"{speed}, {count_text(len(self._plan.at_work), 'worker')}", refresh=False)
        self._bar.update(entry.source_rows)

    def _dismiss(self, worker: Worker, error: Exception) -> None:
        """Remove a worker that cannot begin. Raises the error if no worker is left."""
        self._workers.remove(worker)
        ray.kill(worker.actor)
        if not self._workers:
            raise error if isinstance(error, ToolkitError) else ToolkitError(f"no worker can begin: {explain(error)}")

    # --- failures ---

    def _lost(self, worker: Worker, shards: list[int], error: Exception) -> None:
        """Note that these shards have failed; each is tried again, by another worker if there is a better one."""
        reason = explain(error)
        self._plan.failed(worker.number, shards, reason, time.monotonic())
        given_up = [shard for shard in shards if shard in self._plan.given_up]
        again = [shard for shard in shards if shard not in self._plan.given_up]
        kinds = {f"Given up after {ATTEMPTS} failures": given_up, "To be computed again": again}
        rows = "; ".join(f"{kind}: {self._rows_of(these)}" for kind, these in kinds.items() if these)
        logger.warning(f"Worker {worker.number} ({worker.place}): {reason}\n{rows}")
        if self._plan.goes_nowhere:
            raise ToolkitError(f"all workers have failed repeatedly. The last failure: {reason}")

    def _raise_if_fatal(self, error: Exception) -> None:
        """Raise errors that are not one worker's own: a full shared disk, refusals by the Hub, a dead cluster.

        Options count as wrong if two workers say so before any worker has its model.
        """
        self._asked = 0.0 if isinstance(error, RayError) else self._asked
        self._refuse_dead_cluster()
        self._refused += isinstance(error, HubRefused)
        self._misused += isinstance(error, UsageError)
        if isinstance(error, DiskFull) and not self.config.uploads_without_folder:
            raise error
        if isinstance(error, UsageError) and self._misused > 1 and not self._described:
            raise error
        if self._refused > 1:
            raise ToolkitError(
                f"{error}\nFinished shards cannot be stored anywhere. Fix access to the Hub and run the same command "
                "to resume."
            )

    def _refuse_dead_cluster(self) -> None:
        """Raise ToolkitError if the cluster's head is gone: a minute later Ray would end this process without one."""
        if self.config.ray_address and time.monotonic() > self._asked + ASKING:
            self._is_cluster_gone, self._asked = not listens(self._share.head), time.monotonic()
        if self._is_cluster_gone:
            raise ToolkitError(
                f"`ray_address` {self.config.ray_address}: the cluster's head does not answer any more. What is "
                "finished is kept; the same command continues, with the address of another cluster if need be."
            )

    def _explain_given_up(self) -> str:
        given_up = self._plan.given_up
        more = f" and {len(given_up) - SHOWN} others" if len(given_up) > SHOWN else ""
        return (
            f"{len(given_up)} of the shards failed {ATTEMPTS} times and were left out; all others are done. The same "
            f"command tries these again.\n{self._rows_of(sorted(given_up)[:SHOWN])}{more}; the last because: "
            f"{list(given_up.values())[-1]}"
        )

    def _rows_of(self, shards: list[int]) -> str:
        assert self._manifest is not None
        size, end = self._manifest.rows_per_shard, self._opened.reader.num_rows or 0
        return "source rows " + ", ".join(f"{n * size} to {min((n + 1) * size, end) - 1}" for n in shards)


def answer_to(call) -> Generator[list, None, Any]:
    """Wait for a call, and return its answer."""
    while not ray.wait([call], timeout=0)[0]:
        yield [call]
    return ray.get(call)


def explain(error: Exception) -> str:
    """Why a worker failed: one line, or the message of a toolkit error."""
    if isinstance(error, OutOfMemoryError):
        return "its machine ran out of memory, and Ray ended it"
    if isinstance(error, ActorUnavailableError):
        return "it died, or its machine did"
    if isinstance(error, ActorDiedError):  # for good, for example if its class cannot be loaded there
        return str(error).strip().splitlines()[-1]
    if isinstance(error, GroupLost):
        return redact(first_line(error))  # its other lines say what to do if no worker is restarted
    is_clear = isinstance(error, ToolkitError | GetTimeoutError)
    return redact(str(error) if is_clear else f"{type(error).__name__}: {first_line(error)}")
