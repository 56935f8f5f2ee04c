"""One worker of several: it has its own model, and computes shards given to it from any thread and in any order.

It writes each finished shard itself and returns only the shard's numbers to the process that gave it.
"""

import functools
import os
import platform
import queue
import secrets
import threading
import time
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import ray
import torch
from tqdm import tqdm

from chat_logits.data import hashing
from chat_logits.data.templates import portable_template
from chat_logits.errors import ToolkitError
from chat_logits.extraction.config import ExtractConfig
from chat_logits.extraction.folder import WORKERS
from chat_logits.extraction.run_description import OpenedRun, open_run
from chat_logits.extraction.shard_computer import ShardComputer
from chat_logits.hub import configure_client
from chat_logits.model.devices import choose_device
from chat_logits.scratch import scratch_folder
from chat_logits.storage.manifest import Manifest, RunInputs
from chat_logits.storage.repository import Repository
from chat_logits.storage.shard_list import ShardEntry
from chat_logits.words import count_text


@dataclass(frozen=True)
class Assignment:
    """What is the same for all workers of a run.

    ``config`` has paths that are valid on every machine, ``pinned`` is what is recorded of the run before a model is
    loaded. Shards go to ``folder``, where the file ``WORKERS`` must contain ``token``; without a folder they are
    uploaded to the Hub but not committed. ``hashes`` are of local files and ``footers`` of the source's, so that not
    every worker has to read all files.
    """

    config: ExtractConfig
    pinned: RunInputs
    folder: Path | None
    token: str
    hashes: dict = field(default_factory=dict, repr=False)
    footers: dict = field(default_factory=dict, repr=False)


def assign(opened: OpenedRun, folder: Path, token: str) -> Assignment:
    """The assignment of an opened run's workers: paths made absolute, and options that were not given pinned."""
    config = opened.config
    paths = {name: getattr(config, name) for name in ("model_id", "dataset_id")}
    paths = {name: str(Path(path).absolute()) if Path(path).exists() else path for name, path in paths.items()}
    return Assignment(
        config=replace(config, chat_template=portable_template(config.chat_template), **paths),
        pinned=replace(opened.described, **paths),
        folder=None if config.uploads_without_folder else folder,
        token=token,
        hashes=hashing.known_hashes(),
        footers=opened.reader.source.footers(),
    )


once = ray.method(max_task_retries=0)  # the driver handles failures


class ShardWorker:
    """A process that loads the model, and from ``begin`` on computes shards."""

    def __init__(self):
        self._process = secrets.token_hex(8)
        self._is_closed, self._stack = False, ExitStack()
        self._lock = threading.Lock()
        self._numbers: queue.Queue[int | None] | None = None
        self._waiting: dict[int, Future] = {}

    def process(self, ended: str = "") -> str:
        """An id that distinguishes this process from the others that Ray has had, or will have, for the worker.

        The process that ``ended``, or is about to, does not answer; Ray then asks the next one.
        """
        while self._process == ended:
            time.sleep(0.1)
        return self._process

    @once
    def load(self, assignment: Assignment, hub_token: str | None = None) -> tuple[Manifest, str]:
        """Load the model. Returns the manifest that this worker would start the run with, and in words where it runs.

        ``hub_token`` is the Hub's token for this run; it replaces the machine's. Raises any error that makes the work
        impossible on this machine.
        """
        if hub_token:
            os.environ["HF_TOKEN"] = hub_token
        self._assignment = assignment
        hashing.remember_hashes(assignment.hashes)
        opened = open_run(assignment.config, assignment.pinned, assignment.footers)
        device, processes = choose_device(assignment.config.device), assignment.config.tensor_parallel
        with ExitStack() as stack:  # closed by a failure
            computer = ShardComputer(opened, device, assignment.folder, self._check_still_ours, gpus_of_machine())
            self._computer = stack.enter_context(closing(computer))
            self._described = self._computer.describe()
            self._stack = stack.pop_all()
        return self._described, f"{platform.node()}, {_device_text(device, processes)}"

    @once
    def begin(self, manifest: Manifest) -> None:
        """Work for this run from now on. Raises ToolkitError if the worker would make other rows."""
        different = manifest.differences(replace(self._described, rows_per_shard=manifest.rows_per_shard))
        if different:
            raise ToolkitError(f"{platform.node()} would make other rows than the run ({'; '.join(different)})")
        self._check_still_ours()
        self._manifest, config = manifest, self._assignment.config
        self._folder = self._assignment.folder or self._stack.enter_context(scratch_folder())
        self._computer.folder = self._folder
        if config.uploads_without_folder and config.output_repo:
            configure_client()
            self._repository = Repository(config.output_repo, config.output_revision, config.private)

    @once
    def compute(self, shard: int) -> tuple[ShardEntry, object]:
        """Compute one shard; returns its entry, and what a commit has to name if it was uploaded to the Hub, else None.

        Shards given meanwhile are read ahead. The failure of one shard is raised for all shards that wait.
        """
        with self._lock:
            if self._numbers is None:
                self._numbers = queue.Queue()
                threading.Thread(target=self._loop, args=(self._numbers,), name="shards", daemon=True).start()
            answer = self._waiting[shard] = Future()
            self._numbers.put(shard)
        return answer.result()

    @once
    def close(self) -> None:
        """Take no more shards, and leave nothing on this machine's disk."""
        with self._lock:
            self._is_closed = True
            if self._numbers is not None:
                self._numbers.put(None)
        self._stack.close()

    def _loop(self, numbers: queue.Queue) -> None:
        failure: BaseException = ToolkitError("a shard has no source rows: the source has changed since it was opened")
        try:
            no_bar = functools.partial(tqdm, disable=True)
            self._computer.compute(iter(numbers.get, None), self._manifest, self._finished, no_bar)
        except BaseException as error:
            failure = error
        with self._lock:
            numbers.put(None)  # the reading thread may still wait for a number
            self._numbers, waiting = None, self._waiting
            self._waiting = {}
        for answer in waiting.values():
            answer.set_exception(failure)

    def _finished(self, entry: ShardEntry) -> None:
        upload = self._upload(entry.path) if self._assignment.folder is None else None
        with self._lock:
            self._waiting.pop(entry.shard).set_result((entry, upload))

    def _upload(self, path: str) -> object:
        """Send a shard from this machine's disk to the Hub; returns what a commit has to name."""
        file = self._folder / path
        try:
            return self._repository.upload(path, file)
        finally:
            file.unlink(missing_ok=True)

    def _check_still_ours(self) -> None:
        """Raise ToolkitError if the folder is not the run's folder, or no longer belongs to that run."""
        if self._is_closed:
            raise ToolkitError("the worker was closed")
        if self._assignment.folder is None:
            return
        file = self._assignment.folder / WORKERS
        if not file.is_file() or file.read_text(encoding="utf-8") != self._assignment.token:
            raise ToolkitError(
                f"{platform.node()} does not see the run in `output_dir` {file.parent}: give a folder that all "
                "machines share, or leave `output_dir` out and give `output_repo`."
            )


def _device_text(device: torch.device, processes: int) -> str:
    """What a worker computes on, with a note if Ray, which asks the driver, and torch disagree about its GPUs."""
    given = len(ray.get_gpu_ids())
    if device.type == "cpu":
        none_found = f"Ray gave it {count_text(given, 'GPU')}, torch finds none: an old driver, or a build for CPUs"
        return f"cpu ({none_found})" if given else "cpu"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    shared = "" if given or device.type == "mps" else " (of which Ray does not know: its other workers use it too)"
    return f"{f'{processes} × ' if processes > 1 else ''}{name}{shared}"


def gpus_of_machine() -> int | None:
    """The number of this machine's GPUs by the cluster's record, as Ray hides other workers' GPUs; None without any."""
    here = ray.get_runtime_context().get_node_id()
    (resources,) = (node["Resources"] for node in ray.nodes() if node["NodeID"] == here)
    return int(resources.get("GPU", 0)) or None
