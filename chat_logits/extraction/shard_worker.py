"""One worker of several: a model of its own, and shards as they are given to it, from any thread and in any order.

It writes each finished shard itself and answers with its numbers; nothing else goes back to the process that gave it.
"""

import functools
import os
import platform
import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tqdm import tqdm

from chat_logits.data import hashing
from chat_logits.data.templates import read_template
from chat_logits.errors import ToolkitError
from chat_logits.extraction.config import ExtractConfig
from chat_logits.extraction.folder import WORKERS
from chat_logits.extraction.run_description import OpenedRun, open_run
from chat_logits.extraction.shard_computer import ShardComputer
from chat_logits.hub import configure_client
from chat_logits.model import loading
from chat_logits.scratch import make_scratch, remove_scratch
from chat_logits.storage.manifest import Manifest, RunInputs, ShardEntry
from chat_logits.storage.repository import Repository
from chat_logits.storage.shard_writer import ShardWriter


@dataclass(frozen=True)
class Assignment:
    """What all workers of a run are told.

    ``config`` are the run's options with paths that hold on every machine, ``pinned`` what is recorded of the run
    before a model is loaded. Shards go to ``folder``, where ``WORKERS`` must have ``token`` in it, or, without a
    folder, to ``output_repo``, uploaded but not committed. ``hashes`` and ``footers`` are what is known of local files
    and of the source, so that not every worker reads them all.
    """

    config: ExtractConfig
    pinned: RunInputs
    folder: Path | None
    token: str
    hashes: dict = field(default_factory=dict, repr=False)
    footers: dict = field(default_factory=dict, repr=False)


def assign(opened: OpenedRun, folder: Path, token: str) -> Assignment:
    """What the workers of this run are told: paths made absolute, and what the options leave open pinned."""
    config = opened.config
    places = {name: getattr(config, name) for name in ("model_id", "dataset_id")}
    places = {name: str(Path(place).absolute()) if Path(place).exists() else place for name, place in places.items()}
    template = read_template(config.chat_template) if config.chat_template else None
    return Assignment(
        config=replace(config, chat_template=template, **places),
        pinned=replace(opened.described, **places),
        folder=None if config.uploads_without_folder else folder,
        token=token,
        hashes=hashing.known_hashes(),
        footers=opened.reader.source.footers(),
    )


@dataclass(frozen=True)
class Answer:
    """A finished shard; ``upload`` is what a commit has to name where it went to the Hub."""

    entry: ShardEntry
    upload: object = None


class ShardWorker:
    """``hub_token`` is the Hub's for this run, whatever the machine has."""

    def __init__(self, assignment: Assignment, hub_token: str | None = None):
        self._assignment = assignment
        if hub_token:
            os.environ["HF_TOKEN"] = hub_token
        self._is_closed = False
        self._lock = threading.Lock()
        self._numbers: queue.Queue[int | None] | None = None
        self._waiting: dict[int, Future] = {}
        self._uploads: dict[int, object] = {}

    def describe(self) -> tuple[Manifest, str]:
        """Load the model. Gives the manifest of the run as this worker would begin it, and where it runs, for people.

        Raises what forbids the work on this machine.
        """
        assignment = self._assignment
        hashing.remember_hashes(assignment.hashes)
        opened = open_run(assignment.config, assignment.pinned, assignment.footers)
        device = loading.choose_device(assignment.config.device)
        self._computer = ShardComputer(opened, device, self._write)
        self._described = self._computer.describe()
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        return self._described, f"{platform.node()}, {name}"

    def begin(self, manifest: Manifest) -> None:
        """Work for this run from now on. Raises ToolkitError where the worker would make other rows."""
        different = manifest.differences(self._described)
        if different:
            raise ToolkitError(f"{platform.node()} would make other rows than the run ({'; '.join(different)})")
        self._check_place()
        self._manifest, config = manifest, self._assignment.config
        self._folder = self._assignment.folder or make_scratch()
        self._writer = ShardWriter(self._folder, manifest, check_place=self._check_place)
        if config.uploads_without_folder:
            configure_client()
            self._repository = Repository(config.output_repo, config.output_revision, config.private)

    def compute(self, shard: int) -> Answer:
        """One shard, once it is finished; what is given meanwhile is read ahead.

        After a failure, that of one shard is raised for all that wait.
        """
        with self._lock:
            if self._numbers is None:
                self._numbers = queue.Queue()
                threading.Thread(target=self._loop, args=(self._numbers,), name="shards", daemon=True).start()
            found = self._waiting[shard] = Future()
            self._numbers.put(shard)
        return found.result()

    def close(self) -> None:
        """Take no more shards, and leave nothing behind on this machine's disk."""
        with self._lock:
            self._is_closed = True
            if self._numbers is not None:
                self._numbers.put(None)
        remove_scratch()

    def _loop(self, numbers: queue.Queue) -> None:
        failure: BaseException = ToolkitError("a shard has no source rows: the source has changed since it was opened")
        try:
            self._computer.compute(
                iter(numbers.get, None), self._manifest, self._finished, functools.partial(tqdm, disable=True)
            )
        except BaseException as error:
            failure = error
        with self._lock:
            numbers.put(None)  # for the thread that may still wait for a number
            self._numbers, waiting = None, self._waiting
            self._waiting = {}
        for found in waiting.values():
            found.set_exception(failure)

    def _finished(self, entry: ShardEntry) -> None:
        with self._lock:
            self._waiting.pop(entry.shard).set_result(Answer(entry, self._uploads.pop(entry.shard, None)))

    def _write(self, shard: int, rows: list[dict], skipped: list[dict]) -> ShardEntry:
        entry = self._writer.write(shard, rows, skipped)
        if self._assignment.folder is None:
            file = self._folder / entry.path
            try:
                self._uploads[shard] = self._repository.upload(entry.path, file)
            finally:
                file.unlink(missing_ok=True)
        return entry

    def _check_place(self) -> None:
        """Raise ToolkitError where the folder is not the one that the run is in, or not that run's any more."""
        if self._is_closed:
            raise ToolkitError("the worker was closed")
        if self._assignment.folder is None:
            return
        file = self._assignment.folder / WORKERS
        if not file.is_file() or file.read_text(encoding="utf-8") != self._assignment.token:
            raise ToolkitError(
                f"{platform.node()} does not see the run in --output_dir {file.parent}: give a folder that all "
                "machines share, or leave --output_dir out and give --output_repo."
            )
