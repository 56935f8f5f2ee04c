"""Shards through the model: source rows are read and aligned, computed, encoded and written, each beside the others.

A plain run has one ``ShardComputer``, and every worker of a run on several accelerators one of its own.
"""

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import logit_codec
from chat_logits.data.reader import Aligned, Reader
from chat_logits.extraction.bad_rows import NO_ROOM, NOT_FINITE
from chat_logits.extraction.run_description import OpenedRun, describe_with_model
from chat_logits.model import loading, probe
from chat_logits.model.batching import Batches, Sharing
from chat_logits.model.memory import choose_budget, fits_alone
from chat_logits.model.selection import PendingDistributions
from chat_logits.scratch import scratch_folder
from chat_logits.storage.manifest import Manifest, ShardEntry
from chat_logits.storage.shard import write_shard

BACKLOG = 2  # batches whose results wait to be encoded and written

logger = logging.getLogger(__name__)


class SourceShard(NamedTuple):
    """The source rows of a shard: conversations ready for the model, and those skipped as ``{"row", "reason"}``."""

    number: int
    ready: list[Aligned]
    skipped: list[dict]


@dataclass
class ShardComputer:
    """The model of an opened run on one device, whose shards go to ``folder``; ``check_place`` is ``write_shard``'s.

    The folder is there at the latest when shards are computed.
    """

    opened: OpenedRun
    device: torch.device
    folder: Path | None
    check_place: Callable[[], None] = field(default=lambda: None)
    model: object = None
    sharing: Sharing | None = None
    _stack: ExitStack = field(default_factory=ExitStack, init=False, repr=False)

    def describe(self) -> Manifest:
        """The manifest of a new run. Loads the model."""
        self.load_model()
        return describe_with_model(self.opened, self.model, **self._budget())

    def compute(
        self,
        shards: Iterator[int],
        manifest: Manifest,
        finished: Callable[[ShardEntry], None],
        progress: Callable[[], tqdm],
    ) -> None:
        """Compute these shards of the run that ``manifest`` describes; the model is loaded if there are any.

        Each is written, and its entry given to ``finished``; ``progress()`` begins the bar, over conversations.
        """

        folder = self.folder
        assert folder is not None

        def finish(shard: SourceShard, rows: list[dict]) -> None:
            bad = [self.opened.reader.bad_row(row["source_index"], row["bad"]) for row in rows if "bad" in row]
            skipped = sorted([*shard.skipped, *bad], key=lambda entry: entry["row"])
            rows = sorted((row for row in rows if "bad" not in row), key=lambda row: row["source_index"])
            stored = {row["source_index"] for row in rows}
            left_out = sum(one.alignment.turns_left_out for one in shard.ready if one.source_index in stored)
            finished(write_shard(folder, manifest, shard.number, rows, skipped, self.check_place, left_out))

        with ReadWriteThreads() as threads:
            read = threads.read_ahead(self.opened.reader, shards, manifest.rows_per_shard)
            first = next(read, None)
            if first is None:
                return
            self.load_model()
            assert self.sharing is not None
            settings = replace(manifest, **self._budget(manifest))
            with progress() as bar:
                run_shards(self.model, settings, self.sharing, itertools.chain([first], read), threads, finish, bar)

    def close(self) -> None:
        """Leave nothing behind of a spread model, which is of no use afterwards."""
        self._stack.close()

    def load_model(self) -> None:
        """Load and check the model, if that is not done yet."""
        if self.model is not None:
            return
        config = self.opened.config
        where = "over all devices" if config.device_map else f"on {self.device}"
        logger.info("Loading %s %s …", config.model_id, where)
        self.model = loading.load_model(
            config.model_id,
            self.opened.model_commit,
            config.gguf_file,
            config.dtype,
            self.device,
            config.attn_implementation,
            config.trust_remote_code,
            config.device_map,
            config.max_memory,
            self._stack.enter_context(scratch_folder()) if config.device_map else None,
            self.opened.base_commit,
        )
        self.sharing = probe.probe_model(self.model)
        for line in self.sharing.restrictions(config.prefix_cache):
            logger.info("%s", line)

    def _budget(self, recorded: Manifest | None = None) -> dict:
        """How batches are formed: as the options say, else as recorded, so that a resumed run has the same batches."""
        config = self.opened.config
        budget = choose_budget(self.model, config.batch_tokens, config.logit_memory)
        chosen = {"batch_tokens": budget.tokens, "batch_logit_rows": budget.logit_rows}
        options = {"batch_tokens": config.batch_tokens, "batch_logit_rows": config.logit_memory}
        kept = {name: getattr(recorded, name, None) for name, option in options.items() if option is None}
        agrees = self.sharing is not None and self.sharing.prefix
        cached = config.prefix_cache and agrees and getattr(recorded, "prefix_cache", None) is not False
        return {name: kept.get(name) or chosen[name] for name in chosen} | {"prefix_cache": cached}


def run_shards(
    model,
    settings: Manifest,
    sharing: Sharing,
    shards: Iterable[SourceShard],
    threads: "ReadWriteThreads",
    finish: Callable[[SourceShard, list[dict]], None],
    bar: tqdm,
) -> None:
    """Compute these shards, and have each finished in the writing thread by ``finish(shard, rows)``.

    ``settings`` say what is kept of a distribution, and how large batches are; ``sharing``, what these may hold. Rows
    are in the order of the batches; one that cannot be computed is ``{"source_index", "bad": reason}``.
    """
    batches, started = Batches(model, settings, sharing), time.monotonic()
    for shard in shards:
        rows: list[dict] = []
        bar.update(len(shard.skipped))
        fitting: dict[bool, list[Aligned]] = {True: [], False: []}
        for aligned in shard.ready:
            fitting[fits_alone(model, len(aligned.input_ids), len(aligned.positions))].append(aligned)
        threads.write(append_bad, rows, fitting[False], NO_ROOM)
        bar.update(len(fitting[False]))
        for members, pending in batches.compute(fitting[True]):
            if pending is None:
                threads.write(append_bad, rows, members, NO_ROOM)
            else:
                threads.write(append_rows, rows, members, pending)
            bar.set_postfix_str(f"{batches.input_tokens / (time.monotonic() - started):,.0f} tokens/s")
            bar.update(len(members))
        threads.write(finish, shard, rows)
    threads.wait_for_writing()


def append_rows(rows: list[dict], members: list[Aligned], pending: PendingDistributions) -> None:
    """Encode a batch, and append its stored rows to those of its shard; bad ones where logits were not finite."""
    encoded = logit_codec.encode_rows(pending.wait(), [len(aligned.positions) for aligned in members])
    for aligned, columns in zip(members, encoded, strict=True):
        if not np.isfinite(columns["logsumexp"]).all():
            append_bad(rows, [aligned], NOT_FINITE)
            continue
        rows.append(
            {
                **columns,
                "messages": aligned.messages,
                "source_index": aligned.source_index,
                "alignment_checksum": aligned.alignment.checksum,
                "tools": aligned.tools,
            }
        )


def append_bad(rows: list[dict], members: list[Aligned], reason: str) -> None:
    """Append to a shard's rows that these cannot be computed."""
    rows += [{"source_index": aligned.source_index, "bad": reason} for aligned in members]


class ReadWriteThreads:
    """Two threads beside the model's: one reads a shard ahead, one writes, at most ``BACKLOG`` batches behind.

    What either raises is raised in the caller at its next step. After a failure nothing more is written, so that no
    shard is finished with rows missing; after a failure to read, what was read before is.
    """

    def __enter__(self) -> "ReadWriteThreads":
        self._reading = ThreadPoolExecutor(1, "read")
        self._writing = ThreadPoolExecutor(1, "write")
        self._backlog: deque[Future] = deque()
        self._stopped = False
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        self._reading.shutdown(wait=False, cancel_futures=True)
        self._writing.shutdown()

    def read_ahead(self, reader: Reader, shards: Iterable[int], rows_per_shard: int) -> Iterator[SourceShard]:
        """These shards of the reader's rows, the next one under way; ends where the rows do.

        ``shards`` may make the reading thread wait for its next number.
        """
        numbers = iter(shards)
        upcoming = self._reading.submit(_read_next, reader, numbers, rows_per_shard)
        while shard := self._wait_for_reading(upcoming):
            upcoming = self._reading.submit(_read_next, reader, numbers, rows_per_shard)
            yield shard

    def _wait_for_reading(self, reading: Future) -> SourceShard | None:
        """The shard that was read. Until it is, whatever a write raises is raised here."""
        while not reading.done():
            wait([reading, *self._backlog], return_when=FIRST_COMPLETED)
            self._collect()
        try:
            return reading.result()
        except Exception:
            self.wait_for_writing()
            raise

    def write(self, task: Callable, *arguments: object) -> None:
        """Do ``task(*arguments)`` after all that was given before."""
        self._backlog.append(self._writing.submit(self._unless_stopped, task, arguments))
        while len(self._backlog) > BACKLOG:
            self._backlog.popleft().result()
        self._collect()

    def _collect(self) -> None:
        while self._backlog and self._backlog[0].done():
            self._backlog.popleft().result()

    def wait_for_writing(self) -> None:
        """Wait for all that was given."""
        while self._backlog:
            self._backlog.popleft().result()

    def _unless_stopped(self, task: Callable, arguments: tuple) -> None:
        if self._stopped:
            return
        try:
            task(*arguments)
        except BaseException:
            self._stopped = True
            raise


def _read_next(reader: Reader, numbers: Iterator[int], rows_per_shard: int) -> SourceShard | None:
    """The next shard, None after the last one."""
    number = next(numbers, None)
    if number is None:
        return None
    ready, skipped = reader.align(number * rows_per_shard, (number + 1) * rows_per_shard)
    return SourceShard(number, ready, skipped) if ready or skipped else None
