"""Workers on Ray, each with a model on accelerators of its own. This process gives out shards and keeps the books.

No model is loaded here, and nothing comes back but each shard's numbers: the workers write the shards themselves.
"""

import secrets
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from chat_logits.errors import ToolkitError, UsageError
from chat_logits.extraction.cluster import connect, ray
from chat_logits.extraction.folder import WORKERS
from chat_logits.extraction.ray_address import listens
from chat_logits.extraction.ray_seats import Seat, Seats, say
from chat_logits.extraction.run_description import OpenedRun
from chat_logits.extraction.shard_plan import ATTEMPTS, ShardPlan
from chat_logits.extraction.shard_worker import Answer, assign
from chat_logits.hub import HubRefused
from chat_logits.storage.disk import DiskFull
from chat_logits.storage.manifest import Manifest

GRACE = 600.0  # seconds that the first workers at work are not judged by, as the others may still load their models
PAUSE = 60.0  # seconds that a worker waits with which nothing succeeds, while the others go on
SLOW, LONG = 5, 3600.0  # a worker hangs that is as many times as slow as the slowest so far, and as many seconds silent
ASKING = 10.0  # seconds between two looks at the cluster's head
AWAY = 300.0  # seconds between two looks at the workers: this process was stopped, or stuck in writing
SHOWN = 10  # shards that are named in a message


class RayWorkers:
    """``--num_workers`` workers for an opened run, in the place of a ``ShardComputer``, within a context.

    Raises UsageError where this machine has not that many accelerators, ToolkitError where no worker can begin.
    """

    def __init__(self, opened: OpenedRun, folder: Path):
        if opened.reader.source.num_rows is None:
            raise UsageError(
                f"--num_workers: {opened.config.dataset_id} is streamed and nobody knows its length. Leave out "
                "--streaming, or convert it to Parquet."
            )
        self.config, self.folder = opened.config, folder.absolute()
        self._opened = opened
        self._seats: Seats | None = None
        self._plan = ShardPlan(iter(()), 1)
        self._slowest = 0.0  # seconds that a shard has taken
        self._wrong = 0  # options, say workers that could not begin
        self._refused = 0  # uploads in a row
        self._is_cluster_gone, self._asked = False, time.monotonic()
        self._began = self._looked = time.monotonic()
        self._token = secrets.token_hex(8)

    def __enter__(self) -> "RayWorkers":
        self._share = connect(self.config)
        return self

    def __exit__(self, *_: object) -> None:
        (self.folder / WORKERS).unlink(missing_ok=True)
        if self._is_cluster_gone:
            return  # Ray would wait for it
        try:
            if self._seats:
                self._seats.close()
        finally:
            ray.shutdown()

    # --- what a ShardComputer does ---

    def describe(self) -> Manifest:
        """The manifest of a new run, by the first worker that has loaded its model."""
        seats = self._start()
        while not (described := next((seat.described for seat in seats if seat.described), None)):
            self._step(seats)
        # As they were given: what workers are told holds on this cluster alone.
        here = self._opened.described
        return replace(described, model_id=here.model_id, dataset_id=here.dataset_id)

    def compute(self, shards: Iterator[int], manifest: Manifest, finished: Callable, progress: Callable) -> None:
        """Have these shards computed; ``finished(entry, upload)`` is told of each.

        Raises ToolkitError at the end, after all others, where shards have failed for good.
        """
        self._plan = ShardPlan(shards, self.config.num_workers)
        if self._plan.is_empty:
            return
        (self.folder / WORKERS).write_text(self._token, encoding="utf-8")
        seats = self._start()
        seats.begin(manifest)
        while not seats.at_work:  # so that the bar tells of working hours alone
            self._step(seats)
        with progress() as bar:
            self._work(seats, finished, bar)
        if self._plan.given_up:
            raise ToolkitError(self._told_given_up())

    def _start(self) -> Seats:
        if self._seats is None:
            workers, gpus, room = self.config.num_workers, self._share.gpus, self._share.room
            each = f"on {gpus} GPU{'s' * (gpus > 1)}" if gpus else "on CPUs"
            now = f" (there is room for {room} now, the others begin when there is more)" if workers > room else ""
            print(f"Starting {workers} worker{'s' * (workers > 1)} on Ray, each {each}{now} …", file=sys.stderr)
            assignment = assign(self._opened, self.folder, self._token)
            self._seats = Seats(self._share, assignment, workers, self._lost, self._unless_it_ends_the_run)
        return self._seats

    def _work(self, seats: Seats, finished: Callable, bar: tqdm) -> None:
        tokens, started = 0, time.monotonic()

        def keep(seat: Seat, answer: Answer) -> None:
            nonlocal tokens
            entry = answer.entry
            self._note_finished(seat, entry.shard)
            finished(entry, answer.upload)
            tokens += entry.num_tokens
            speed = tokens / (time.monotonic() - started)
            bar.set_postfix_str(f"{speed:,.0f} tokens/s, {len(seats.at_work)} workers", refresh=False)
            bar.update(entry.source_rows)

        while not self._plan.is_empty or any(seat.shards for seat in seats):
            self._hand_out(seats, keep)
            self._step(seats)
            self._part_with_bad_ones(seats)

    def _step(self, seats: Seats) -> None:
        seats.step()
        self._refuse_dead_cluster()

    def _hand_out(self, seats: Seats, keep: Callable) -> None:
        """Give every worker that is ready what it may hold."""
        now = time.monotonic()
        self._plan.at_work = seats.at_work
        self._plan.to_come = len(list(seats)) - len(self._plan.at_work) if now < self._began + GRACE else 0
        for seat in (seat for seat in seats if seat.is_ready and now >= seat.not_before):
            while (shard := self._plan.next_for(seat.number, seat.shards)) is not None:
                seats.compute(seat, shard, keep)

    def _note_finished(self, seat: Seat, shard: int) -> None:
        seat.shards.remove(shard)
        self._plan.finished(seat.number)
        self._refused = 0
        self._slowest = max(self._slowest, time.monotonic() - seat.since)
        seat.since = time.monotonic()

    # --- failing ---

    def _unless_it_ends_the_run(self, error: Exception, seat: Seat) -> None:
        """Raise what is no worker's own trouble: a full disk that all share, an option that is wrong for all.

        Before anything has succeeded it is taken for wrong when two starts have failed of it.
        """
        if isinstance(error, ray.exceptions.RayError):
            self._asked = 0.0
            self._refuse_dead_cluster()
        if isinstance(error, DiskFull) and not self.config.uploads_without_folder:
            raise error
        self._wrong += isinstance(error, UsageError) and not seat.is_ready
        if self._wrong > 1 and isinstance(error, UsageError) and not self._seats.at_work and not self._slowest:
            raise error
        self._refused += isinstance(error, HubRefused)
        if self._refused > 1:
            raise ToolkitError(f"{error}\nNo shard has a place any more. Put that right, and the same command goes on.")

    def _refuse_dead_cluster(self) -> None:
        """Raise ToolkitError where the cluster's head is gone: a minute later Ray would just end this process."""
        if self.config.ray_address and time.monotonic() > self._asked + ASKING:
            self._is_cluster_gone, self._asked = not listens(self._share.head), time.monotonic()
        if self._is_cluster_gone:
            raise ToolkitError(
                f"--ray_address {self.config.ray_address}: the cluster's head does not answer any more. What is "
                "finished is kept; the same command goes on, with the address of another cluster if need be."
            )

    def _lost(self, seat: Seat, shards: list[int], reason: str) -> None:
        """These shards have failed, each to be tried elsewhere; a worker with which nothing succeeds is held back."""
        self._plan.failed(seat.number, shards, reason)
        say(f"Worker {seat.number} ({seat.place}): {reason}\n{self._told_lost(shards)}")
        seat.since = time.monotonic()
        if self._plan.goes_nowhere:
            raise ToolkitError(f"nothing succeeds any more, with any worker. The last failure: {reason}")
        if self._plan.is_suspect(seat.number):
            seat.not_before = time.monotonic() + PAUSE

    def _part_with_bad_ones(self, seats: Seats) -> None:
        """Do without workers that fail whatever they get, and replace those that have been silent for too long."""
        limit, now = max(LONG, SLOW * self._slowest), time.monotonic()
        silent = f"no answer for {limit:,.0f} s; the slowest so far took {self._slowest:,.0f}"
        was_away, self._looked = now - self._looked > AWAY, now
        for seat in seats:
            if self._plan.is_hopeless(seat.number):
                seats.dismiss(seat, "it is given no more, as it fails all shards and the others do not")
            elif was_away:
                seat.since = now  # whose answers may wait here
            elif seat.shards and now - seat.since > limit and self._slowest:
                seats.replace(seat, TimeoutError(), silent)
            elif seat.shards and now - seat.since > limit:
                say(f"Worker {seat.number} ({seat.place}): no answer for {limit:,.0f} s")
                seat.since = now

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
        size, end = self.config.rows_per_shard, self._opened.reader.num_rows
        return "source rows " + ", ".join(f"{n * size} to {min((n + 1) * size, end) - 1}" for n in shards)
