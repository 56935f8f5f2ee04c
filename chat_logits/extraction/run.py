"""The run: from its options to the finished dataset, started anew or resumed where another process stopped.

the record, if any -> source, template -> is it the same run? -> the missing shards through the model -> the Hub
"""

import functools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from chat_logits.errors import ToolkitError, UsageError
from chat_logits.extraction.bad_rows import BadRows, explain_reasons
from chat_logits.extraction.cluster import find_ray
from chat_logits.extraction.config import ExtractConfig
from chat_logits.extraction.folder import RunFolder, shards_in
from chat_logits.extraction.joining import Part, missing_in_part, place_of, refuse_another_run
from chat_logits.extraction.run_description import OpenedRun, differences, locate, open_run
from chat_logits.extraction.shard_plan import missing_shards
from chat_logits.extraction.source_checks import refuse_changed_source, refuse_within_source
from chat_logits.extraction.upload import HubSync
from chat_logits.hub import configure_client
from chat_logits.stages import every, refresh, stage
from chat_logits.storage.card import arguments_in_code
from chat_logits.storage.disk import DiskWatch
from chat_logits.storage.manifest import Manifest, another_run
from chat_logits.storage.repository import Repository
from chat_logits.storage.shard_list import ShardEntry, counted_remarks, mean_nll
from chat_logits.words import count_text

logger = logging.getLogger(__name__)

SIGN = 1.5  # seconds from one sign of life to the next


@dataclass(frozen=True)
class Extraction:
    """A finished run: what was stored and what was skipped, in ``folder`` and, if it was pushed, at ``url``.

    ``skipped`` counts conversations by reason, ``tokens`` are those extracted, ``num_bytes`` those of all shards and
    ``bytes_in_folder`` those of the shards in the folder, ``turns_left_out`` the turns of the written conversations
    that are marked not to be trained on, and ``remarks`` those conversations by what the model may not read as
    intended; ``mean_nll`` is the target tokens' mean negative log-likelihood in nats, None if the model gives one of
    them no probability at all. ``config`` repeats the run: it has the commits that were read from Hub repositories.
    Three values are only about this start: ``seconds`` in total, and the seconds ``computing`` the ``new_tokens``.
    """

    config: ExtractConfig
    folder: Path
    url: str | None
    conversations: int
    skipped: dict[str, int]
    turns_left_out: int
    remarks: dict[str, int]
    tokens: int
    num_bytes: int
    bytes_in_folder: int
    mean_nll: float | None
    seconds: float
    computing: float
    new_tokens: int


def extract(config: ExtractConfig) -> Extraction:
    """Extract a dataset into its folder, and push it where it is to go.

    The same call resumes what an earlier one left unfinished. Raises UsageError if the folder or the repository
    holds another run, and for models, datasets and devices that do not exist; ToolkitError if a run fails.
    """
    refuse_within_source(config)
    arguments = arguments_in_code(config.output_repo, config.output_revision)
    with RunFolder(place_of(config), config.overwrite, arguments) as folder:
        try:
            return _extract_into(folder, config)
        except KeyboardInterrupt:
            _log_stopped(config, folder)
            raise


def _log_stopped(config: ExtractConfig, folder: RunFolder) -> None:
    count = len(shards_in(folder.path))
    verb = "is" if count == 1 else "are"
    here = f"{count_text(count, 'finished shard')} {verb} in {folder.path}." if count else "No shard is finished yet."
    replaced = f" The run that it is to replace is kept in {folder.replaced_run}." if folder.replaced_run else ""
    logger.info("Stopped. %s%s", "What is pushed is kept." if config.uploads_without_folder else here, replaced)


def _extract_into(folder: RunFolder, config: ExtractConfig) -> Extraction:
    started = time.monotonic()
    if not config.num_sampled:
        logger.warning(
            "`num_sampled` 0: no tail tokens are sampled, so estimates are biased. Training then needs `allow_biased`, "
            "and a student cannot be measured on the dataset."
        )
    with stage("Looking for the model %s and the dataset %s", config.model_id, config.dataset_id):
        located = locate(config, _to_resume(config, folder))  # before anything heavy is imported
    workers_of = choose_workers(located)
    with _connected(config, folder) as sync:
        opened, recorded = open_or_resume(config, folder, sync, located)
        with workers_of(opened, folder) as workers:
            if sync:
                sync.make(overwrite=_replaces(config, folder, recorded, sync.repository.at))
            run = Run(opened, folder, workers, sync, DiskWatch(folder.path, _rows_here(opened)), started)
            run.begin_or_resume(recorded)
            run.compute_missing()
        refuse_changed_source(opened)
        run.refuse_nothing()  # before anything is replaced
        folder.check_finished(run.finished.keys() == folder.entries.keys() and not config.part)
        if sync:
            sync.finish(is_all=True)
        folder.finish()
        return run.summarize()


def _rows_here(opened: OpenedRun) -> int | None:
    """About how many source rows this command reads, None if that is not known."""
    rows, part = opened.reader.num_rows, opened.config.part
    return rows if rows is None or part is None else -(-rows // Part.read(part).of)


def choose_workers(config: ExtractConfig) -> Callable[[OpenedRun, RunFolder], AbstractContextManager]:
    """What will compute the shards: this process on its device, or workers on Ray. Raises UsageError if neither can."""
    if config.uses_ray:
        with stage("Looking for Ray"):
            find_ray(config.ray_address)
            from chat_logits.extraction.workers import RayWorkers

        return lambda opened, folder: RayWorkers(opened, folder)
    with stage("Importing torch and transformers"):
        from chat_logits.extraction.shard_computer import ShardComputer
        from chat_logits.model.devices import choose_device
        from chat_logits.model.loading import refuse_parts_here

        device = choose_device(config.device)
        if config.tensor_parallel > 1:
            refuse_parts_here(config.tensor_parallel, device)
    return lambda opened, folder: closing(ShardComputer(opened, device, folder.path, folder.check_still_ours))


@contextmanager
def _connected(config: ExtractConfig, folder: RunFolder) -> Iterator[HubSync | None]:
    """Within, the object that pushes the run, with the Hub's client configured for it; None if nothing is pushed."""
    if config.output_repo is None or config.part:
        yield None
        return
    put_back = configure_client()
    repository = Repository(config.output_repo, config.output_revision, config.private)
    sync = HubSync(repository, folder, config.push_every, config.uploads_without_folder)
    try:
        with stage("Looking at the Hub dataset %s", repository.name):
            sync.connect()
        yield sync
    finally:
        if sync.close():
            put_back()


def _replaces(config: ExtractConfig, folder: RunFolder, recorded: Manifest | None, repo: str) -> bool:
    """Whether the run in the repository is to be replaced, and this run has not already done so."""
    is_done = recorded and folder.has_replaced(repo)
    return folder.may_replace(repo) or (config.overwrite and not is_done)


def open_or_resume(
    config: ExtractConfig, folder: RunFolder, sync: HubSync | None, located: ExtractConfig
) -> tuple[OpenedRun, Manifest | None]:
    """What is read, and the record of the run to resume: the folder's, else the repository's; None for a new run.

    ``located`` is the config with the commits for the folder's record, or for a new run. Raises UsageError if the
    recorded run is a different one, unless it is to be replaced.
    """
    here = recorded = _to_resume(config, folder)
    where = f"`output_dir` {folder.path}"
    if not recorded and sync and sync.remote.state and not folder.is_replacing:
        recorded, where = sync.remote.state.manifest, sync.repository.name
    if config.overwrite and not folder.is_replacing:
        recorded = None
    opened = open_run(located if recorded is here else config, recorded)
    different = differences(opened, recorded) if recorded else []
    if different and not config.overwrite:
        raise another_run(where, different, "place")
    return (open_run(config), None) if different else (opened, recorded)


def _to_resume(config: ExtractConfig, folder: RunFolder) -> Manifest | None:
    """The record of the run in the folder, or None if that run is to be replaced and the new one has not begun."""
    return folder.recorded if folder.is_replacing or not config.overwrite else None


class Workers(Protocol):
    """What computes shards: this process with a model, or workers on Ray."""

    def describe(self) -> Manifest:
        """The manifest of a new run."""

    def compute(self, shards: Iterator[int], manifest: Manifest, finished: Callable, progress: Callable) -> None:
        """Compute these shards; ``finished(entry, ...)`` is called for each."""


@dataclass
class Run:
    """A run in progress; ``finished`` are its finished shards, in the folder or only in the repository.

    ``started`` is the time of this start on the monotonic clock, ``computing`` the seconds that it has computed, and
    ``new_tokens`` the tokens that it has extracted.
    """

    opened: OpenedRun
    folder: RunFolder
    workers: Workers
    sync: HubSync | None
    watch: DiskWatch
    started: float
    computing: float = field(default=0.0, init=False)
    new_tokens: int = field(default=0, init=False)

    @property
    def finished(self) -> dict[int, ShardEntry]:
        return {**(self.sync.remote.adopted() if self.sync else {}), **self.folder.entries}

    def begin_or_resume(self, recorded: Manifest | None) -> None:
        """Resume the recorded run, or start a new one in the folder."""
        config = self.opened.config
        if recorded:
            with stage("Looking at the finished shards in %s", self.folder.path):
                self.folder.resume(recorded, config.check_shards)
        else:
            if not config.uploads_without_folder:
                self.watch.check_start(config.top_k + config.num_sampled, self.opened.reader.tokens_a_row)
            self.folder.begin(self.workers.describe(), config.overwrite, self.sync.repository.at if self.sync else "")
            if config.part:
                refuse_another_run(self.folder.path)

    def compute_missing(self) -> None:
        """Compute the shards that are missing; loads the model only if there are any."""
        finished = self.finished
        self._log_state(finished)
        self._bad_rows = BadRows(self.opened.config.max_bad_rows, finished.values())
        self._bad_rows.check()
        if self.sync:
            self.sync.start()
        try:
            self._compute({shard: entry.source_rows for shard, entry in finished.items()})
        except BaseException as error:
            if self.sync and (isinstance(error, Exception) or self.sync.remote.missing_uploads()):
                self._push_finished()
            raise

    def _compute(self, covered: dict[int, int]) -> None:
        config, num_rows, manifest = self.opened.config, self.opened.reader.num_rows, self.folder.manifest
        missing = missing_shards(covered, manifest.rows_per_shard, num_rows)
        if config.part:
            missing = missing_in_part(config, missing)
            if num_rows is not None:
                num_rows = Part.read(config.part).num_rows(num_rows, manifest.rows_per_shard)
        progress = functools.partial(
            self._progress,
            total=num_rows,
            initial=sum(covered.values()),
            unit=" conversations",
            dynamic_ncols=True,
            smoothing=0,
        )
        self.workers.compute(missing, manifest, self._keep, progress)

    @contextmanager
    def _progress(self, **options: Any) -> Iterator[tqdm]:
        """A progress bar, also refreshed while a batch takes long; when it ends, the computing time is set."""
        with tqdm(**options) as bar, every(SIGN, functools.partial(refresh, bar)):
            began = time.monotonic()
            yield bar
            self.computing = time.monotonic() - began

    def _push_finished(self) -> None:
        """Push what is finished before a failure ends the run, as this machine may be lost.

        Also after Ctrl-C, if uploaded shards are not in a folder: without a commit they would be lost.
        """
        assert self.sync is not None
        try:
            self.sync.finish()
            if self.opened.config.uploads_without_folder and not self.sync.remote.is_held_back:
                logger.info("%d finished shards are in %s.", len(self.finished), self.sync.repository.repo_id)
        except ToolkitError as error:
            logger.error(str(error))

    def _keep(self, entry: ShardEntry, upload=None) -> None:
        """Note a finished shard, which is in the folder, or was uploaded from elsewhere and waits for its commit."""
        self.new_tokens += entry.num_tokens
        try:
            is_described = upload is None and self.folder.add(entry)
        finally:  # the shard is complete, even if the disk has no room for the list of shards
            if self.sync:
                self.sync.add(entry, upload)
        self._bad_rows.add(entry)
        if is_described:
            self.watch.check_rest(self.folder.entries.values(), self.finished.values())

    def _log_state(self, finished: dict[int, ShardEntry]) -> None:
        if not finished:
            return
        apart = len(finished) - len(self.folder.entries)
        where = f", {apart} of them only in {self.sync.repository.repo_id}" if apart and self.sync else ""
        rows = sum(entry.source_rows for entry in finished.values())
        done = f"{count_text(rows, 'source row')} {'is' if rows == 1 else 'are'} done"
        logger.info("Resuming: %s, in %s%s", done, count_text(len(finished), "shard"), where)
        self.watch.check_rest(self.folder.entries.values(), finished.values())

    def refuse_nothing(self) -> None:
        """Raise ToolkitError, with the reasons, if all source rows were skipped."""
        entries = self.finished.values()
        if any(entry.num_rows for entry in entries):
            return
        part, folder = self.opened.config.part, self.opened.config.folder
        if part and entries:  # other parts may have what this one lacks
            return
        if part:
            raise UsageError(f"`part` {part}: it has no shards, or all of them were joined in {folder}")
        skipped = sum((Counter(entry.skipped) for entry in entries), Counter())
        old = self.folder.replaced_run
        raise ToolkitError(
            f"nothing was extracted from {skipped.total():,} source rows: {explain_reasons(skipped)}"
            + (f"\nThe run that it was to replace is kept in {old}." if old else "")
        )

    def summarize(self) -> Extraction:
        """The run in numbers."""
        entries = self.finished.values()
        skipped = sum((Counter(entry.skipped) for entry in entries), Counter())
        return Extraction(
            config=self.opened.config,
            folder=self.folder.path,
            url=self.sync.repository.url if self.sync else None,
            conversations=sum(entry.num_rows for entry in entries),
            skipped=dict(skipped.most_common()),
            turns_left_out=sum(entry.turns_left_out for entry in entries),
            remarks=counted_remarks(entries),
            tokens=sum(entry.num_tokens for entry in entries),
            num_bytes=sum(entry.num_bytes for entry in entries),
            bytes_in_folder=sum(entry.num_bytes for entry in self.folder.entries.values()),
            mean_nll=mean_nll(entries),
            seconds=time.monotonic() - self.started,
            computing=self.computing,
            new_tokens=self.new_tokens,
        )
