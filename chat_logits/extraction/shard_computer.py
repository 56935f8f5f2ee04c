"""Computes shards: reading and aligning source rows, the model, encoding and writing all run at the same time.

A plain run has one ``ShardComputer``; in a run on several accelerators, every worker has its own.
"""

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from chat_logits.data.aligning import Aligning, start_aligning
from chat_logits.data.reader import Aligned, Reader
from chat_logits.errors import ToolkitError
from chat_logits.extraction.bad_rows import NO_ROOM, NOT_FINITE
from chat_logits.extraction.encoding import Encoded, Encoding, start_encoding
from chat_logits.extraction.processes import started_group
from chat_logits.extraction.run_description import OpenedRun, describe_with_model
from chat_logits.machine import usable_cores
from chat_logits.model import loading, probe
from chat_logits.model.batching import Batches, Sharing
from chat_logits.model.memory import choose_budget, fits_alone
from chat_logits.model.selection import PendingDistributions
from chat_logits.scratch import scratch_folder
from chat_logits.stages import stage
from chat_logits.storage.manifest import Manifest
from chat_logits.storage.shard import ShardRows, refuse_overfull, write_shard
from chat_logits.storage.shard_list import ShardEntry

BACKLOG = 2  # batches waiting to be encoded and written, for each writing thread
MOST_WORKERS = 4  # by default: with 4, a 0.5B model on one card does not wait
CORES_A_WORKER = 4  # the cores also launch the model's kernels, serve the Hub, and may run other jobs

logger = logging.getLogger(__name__)


class SourceShard(NamedTuple):
    """The source rows of a shard: conversations ready for the model, and those skipped as ``{"row", "reason"}``."""

    number: int
    ready: list[Aligned]
    skipped: list[dict]


@dataclass
class ShardComputer:
    """Computes shards of an opened run with a model on one device, and writes them to ``folder``.

    The folder must exist when shards are computed; ``check_still_ours`` is passed to ``write_shard``.
    ``devices_of_machine`` is the number of the machine's accelerators if this process does not see all of them.
    """

    opened: OpenedRun
    device: torch.device
    folder: Path | None
    check_still_ours: Callable[[], None] = field(default=lambda: None)
    devices_of_machine: int | None = None
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

        Each is written, and its entry passed to ``finished``; ``progress()`` starts the bar, over conversations.
        """

        folder, one_at_a_time = self.folder, threading.Lock()
        assert folder is not None

        def finish(shard: SourceShard, bad: dict[int, str], rows: ShardRows) -> None:
            skipped = [*shard.skipped, *(self.opened.reader.bad_row(*row) for row in sorted(bad.items()))]
            skipped.sort(key=lambda entry: entry["row"])
            stored = [one for one in shard.ready if one.source_index not in bad]
            left_out = sum(one.alignment.turns_left_out for one in stored)
            remarks = [{"row": one.source_index, "remark": remark} for one in stored for remark in one.remarks]
            entry = write_shard(folder, manifest, shard.number, rows, skipped, self.check_still_ours, left_out, remarks)
            with one_at_a_time:
                finished(entry)

        reader, workers = self.opened.reader, self._cpu_workers()
        with (
            closing(start_aligning(reader, workers)) as aligning,
            closing(start_encoding(workers)) as encoding,
            ReadWriteThreads(workers) as threads,
        ):
            read = threads.read_ahead(reader, aligning, shards, manifest.rows_per_shard)
            first = next(read, None)
            if first is None:
                return
            self.load_model()
            assert self.sharing is not None
            settings = replace(manifest, **self._budget(manifest))
            _tell_budget(settings)
            with progress() as bar:
                source = itertools.chain([first], read)
                run_shards(self.model, settings, self.sharing, source, threads, encoding, finish, bar)

    def close(self) -> None:
        """End the other processes of a model, and delete offloaded weights; the model cannot be used afterwards."""
        self._stack.close()

    def load_model(self) -> None:
        """Load and check the model, unless that is already done."""
        if self.model is not None:
            return
        self.model = self._load_parts() if self.opened.config.tensor_parallel > 1 else self._load_whole()
        with stage("Checking the model: padded batches and shared prefixes against its reference forward pass"):
            self.sharing = probe.probe_model(self.model)
        for line in self.sharing.restrictions(self.opened.config.prefix_cache):
            logger.info("%s", line)

    def _load_whole(self) -> Any:
        config = self.opened.config
        where = "over all devices" if config.device_map else f"on {self.device}"
        with stage("Loading %s %s", config.model_id, where):
            return loading.load_model(
                config.model_id,
                self.opened.model_commit,
                gguf_file=config.gguf_file,
                dtype=config.dtype,
                device=self.device,
                attn_implementation=config.attn_implementation,
                trust_remote_code=config.trust_remote_code,
                device_map=config.device_map,
                max_memory=config.max_memory,
                offload_folder=self._stack.enter_context(scratch_folder()) if config.device_map else None,
                base_revision=self.opened.base_commit,
                head_dtype=config.head_dtype,
                quantization=config.quantization,
            )

    def _load_parts(self) -> Any:
        config = self.opened.config
        loading.refuse_parts_here(config.tensor_parallel, self.device)
        group = self._stack.enter_context(started_group(config.tensor_parallel, self.device.type))
        with stage("Loading %s in %d parts", config.model_id, group.size):
            return loading.load_part(
                group,
                config.model_id,
                self.opened.model_commit,
                dtype=config.dtype,
                attn_implementation=config.attn_implementation,
                trust_remote_code=config.trust_remote_code,
                head_dtype=config.head_dtype,
            )

    def _cpu_workers(self) -> int:
        """How many processes align, and how many write. One each is enough for a model on a CPU, which needs the
        cores."""
        config = self.opened.config
        if config.num_cpu_workers is not None:
            return config.num_cpu_workers
        if self.device.type == "cpu" or config.trust_remote_code:  # other processes may not know a custom tokenizer
            return 1
        seen = torch.accelerator.device_count()
        its_own = seen if config.device_map else config.tensor_parallel
        return default_workers(usable_cores(), its_own, self.devices_of_machine or seen)

    def _budget(self, recorded: Manifest | None = None) -> dict:
        """How batches are formed: by the options, else as recorded, so that a resumed run has the same batches."""
        config = self.opened.config
        budget = choose_budget(self.model, config.batch_tokens, config.logit_memory)
        chosen = {"batch_tokens": budget.tokens, "batch_logit_rows": budget.logit_rows}
        options = {"batch_tokens": config.batch_tokens, "batch_logit_rows": config.logit_memory}
        kept = {name: getattr(recorded, name, None) for name, option in options.items() if option is None}
        agrees = self.sharing is not None and self.sharing.prefix
        cached = config.prefix_cache and agrees and getattr(recorded, "prefix_cache", None) is not False
        return {name: kept.get(name) or chosen[name] for name in chosen} | {"prefix_cache": cached}


def default_workers(cores: int, devices: int, of: int) -> int:
    """Processes that align, and as many that encode, for a model on ``devices`` accelerators ``of`` the machine's."""
    return min(MOST_WORKERS, max(1, cores * devices // of // CORES_A_WORKER))


def _tell_budget(settings: Manifest) -> None:
    prefixes = "cached" if settings.prefix_cache else "not cached"
    figures = settings.batch_tokens, settings.batch_logit_rows, prefixes
    logger.info("Forward passes of up to %s padded tokens, logits of up to %s rows; shared prefixes are %s", *figures)


def run_shards(
    model,
    settings: Manifest,
    sharing: Sharing,
    shards: Iterable[SourceShard],
    threads: "ReadWriteThreads",
    encoding: Encoding,
    finish: Callable[[SourceShard, dict[int, str], ShardRows], None],
    bar: tqdm,
) -> None:
    """Compute these shards, and have each finished in a writing thread by ``finish(shard, bad, rows)``.

    ``settings`` say what is stored of a distribution, and how large batches are; ``sharing`` says what they may hold.
    ``bad`` maps source rows that cannot be computed to the reason.
    """
    batches, started, fits = Batches(model, settings, sharing), time.monotonic(), fits_alone(model)
    for shard in shards:
        _refuse_overfull(settings, shard, threads)
        fitting: dict[bool, list[Aligned]] = {True: [], False: []}
        for aligned in shard.ready:
            fitting[fits(len(aligned.input_ids), len(aligned.positions))].append(aligned)
        too_large, encoded = fitting[False], []
        bar.update(len(shard.skipped) + len(too_large))
        for members, pending in batches.compute(fitting[True]):
            if pending is None:
                too_large += members
            else:
                encoded.append(threads.write(partial(encode, encoding, members, pending)))
            bar.set_postfix_str(f"{batches.input_tokens / (time.monotonic() - started):,.0f} tokens/s")
            bar.update(len(members))
        threads.write(partial(_finish, finish, encoding, shard, too_large, encoded), encoded)
    threads.wait_for_writing()


def _refuse_overfull(settings: Manifest, shard: SourceShard, threads: "ReadWriteThreads") -> None:
    """Raise ToolkitError if no file can hold the shard: before it is computed, after earlier shards are written."""
    try:
        refuse_overfull(settings, shard.number, sum(len(aligned.positions) for aligned in shard.ready))
    except ToolkitError:
        threads.wait_for_writing()
        raise


def encode(encoding: Encoding, members: list[Aligned], pending: PendingDistributions) -> Encoded:
    """The stored rows of a batch, once its results have arrived."""
    return encoding.encode(members, pending.wait())


def _finish(finish: Callable, encoding: Encoding, shard: SourceShard, too_large: list, batches: list[Future]) -> None:
    encoded = [batch.result() for batch in batches]
    bad = dict.fromkeys((aligned.source_index for aligned in too_large), NO_ROOM)
    bad |= dict.fromkeys((row for batch in encoded for row in batch.bad), NOT_FINITE)
    finish(shard, bad, encoding.rows(encoded))


class ReadWriteThreads:
    """Threads in addition to the model's: one reads ahead, and ``writers`` encode and write, or have processes do it,
    with at most ``BACKLOG`` batches waiting for each.

    Exceptions in a thread are raised in the caller at its next step. After a failure nothing more is written, so that
    no shard is finished with rows missing; after a failure to read, what was read before is still written.
    """

    def __init__(self, writers: int = 1):
        self._writers = writers

    def __enter__(self) -> "ReadWriteThreads":
        self._reading = ThreadPoolExecutor(1, "read")
        self._writing = ThreadPoolExecutor(self._writers, "write")
        self._backlog: deque[Future] = deque()
        self._stopped = False
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        self._reading.shutdown(wait=False, cancel_futures=True)
        self._writing.shutdown()

    def read_ahead(
        self, reader: Reader, aligning: Aligning, shards: Iterable[int], rows_per_shard: int
    ) -> Iterator[SourceShard]:
        """These shards of the reader's rows, while the next ones are being read; ends where the rows end.

        ``shards`` may block the reading thread until its next number is known.
        """
        next_shard = partial(_read_next, reader, aligning, iter(shards), rows_per_shard)
        upcoming = deque(self._reading.submit(next_shard) for _ in range(aligning.ahead))
        while read := self._wait_for_reading(upcoming.popleft()):
            number, aligned = read
            first, end = number * rows_per_shard, (number + 1) * rows_per_shard
            ready, skipped = reader.complete(first, end, *self._wait_for_reading(aligned))
            if not (ready or skipped):
                return
            upcoming.append(self._reading.submit(next_shard))
            yield SourceShard(number, ready, skipped)

    def _wait_for_reading(self, reading: Future) -> Any:
        """What was read. While waiting, exceptions of writing are raised here."""
        while not reading.done():
            self._collect()
            wait([reading, *self._backlog], return_when=FIRST_COMPLETED)
        try:
            return reading.result()
        except Exception:
            self.wait_for_writing()
            raise

    def write(self, task: Callable[[], object], after: Iterable[Future] = ()) -> Future:
        """Run a task after the earlier tasks ``after`` are done; other tasks may run meanwhile."""
        writing = self._writing.submit(self._unless_stopped, task, after)
        self._backlog.append(writing)
        self._collect()
        while len(self._backlog) > BACKLOG * self._writers:
            self._backlog.popleft().result()
        return writing

    def _collect(self) -> None:
        """Raise exceptions of finished writes. Only unfinished ones stay in the backlog, to be waited for."""
        for writing in [writing for writing in self._backlog if writing.done()]:
            self._backlog.remove(writing)
            writing.result()

    def wait_for_writing(self) -> None:
        """Wait for all tasks."""
        while self._backlog:
            self._backlog.popleft().result()

    def _unless_stopped(self, task: Callable[[], object], after: Iterable[Future]) -> object:
        try:
            for earlier in after:
                earlier.result()
            return None if self._stopped else task()  # an earlier task may have done nothing for that reason
        except BaseException:
            self._stopped = True
            raise


def _read_next(
    reader: Reader, aligning: Aligning, numbers: Iterator[int], rows_per_shard: int
) -> tuple[int, Future] | None:
    """The next shard's number, and a future of its aligned conversations; None after the last shard."""
    number = next(numbers, None)
    if number is None:
        return None
    return number, aligning.submit(*reader.read(number * rows_per_shard, (number + 1) * rows_per_shard))
