"""The results of a training so far, the record in the student's folder, and how to resume from it."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import filelock

from chat_logits.errors import ToolkitError, UsageError
from chat_logits.hub import is_commit
from chat_logits.storage.dataset import StoredDataset
from chat_logits.storage.disk import lock_or_refuse, write_text
from chat_logits.training.config import CHECKPOINTS, LOCK, RECORD, TrainConfig, checkpoint_states
from chat_logits.training.distance import Distance
from chat_logits.words import count_text

# Options that decide which conversations come in which order, with which targets, and which weights are trained.
SAME = (
    "held_out",
    "max_length",
    "hard_weight",
    "end_of_turn",
    "allow_biased",
    "batch_tokens",
    "lora_rank",
    "freeze_embeddings",
    "seed",
)
SHORT = 10  # characters of a hash in a message


@dataclass(frozen=True)
class TaughtRows:
    """The rows that a training learns from: ``num_rows`` of the extraction with this ``fingerprint``, at the Hub commit
    ``revision`` (None for a folder), each position with ``num_sampled`` draws of the model ``teacher``."""

    teacher: str
    fingerprint: str
    num_rows: int
    revision: str | None
    num_sampled: int

    @classmethod
    def of(cls, stored: StoredDataset) -> "TaughtRows":
        run = stored.manifest
        return cls(run.model_id, run.fingerprint, stored.num_rows, stored.revision, run.num_sampled)

    @property
    def measured_to(self) -> str:
        """What the held-out KL is measured to, in words."""
        return "the teacher" if self.num_sampled else "the teacher's nucleus, renormalised"


@dataclass(frozen=True)
class Student:
    """The model that a training began with; ``revision`` is the Hub commit, or for a folder ``hash_student``'s hash."""

    model_id: str
    revision: str

    def __str__(self) -> str:
        return f"{self.model_id} at {self.revision[:SHORT]}"


@dataclass
class TrainingResult:
    """A training's measurements so far.

    ``points`` are steps, the first one 0, each with the student's distance from the teacher after it, on held-out
    conversations and at extracted tokens alone. ``losses`` are steps, each with the mean loss, nats, since the one
    before; it is of the training target, which may include ends of turns and a share of the text.

    ``processes`` train together, and each reads ``accumulate`` batches a step.
    ``tokens_per_second`` counts all tokens of the steps since this start, including prompts, in all processes; ``rank``
    is this process' own; ``is_finished`` says that the student is saved.
    """

    config: TrainConfig
    rows: TaughtRows
    student: Student
    rank: int = 0
    processes: int = 1
    points: list[tuple[int, Distance]] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)
    tokens_per_second: float | None = None
    is_finished: bool = False

    def settings(self) -> dict:
        """The options that were chosen, except ``resume``."""
        return {name: value for name, value in self.config.chosen().items() if name != "resume"}

    @property
    def batches_a_step(self) -> int:
        """By all processes. Whatever their number, these are the next ones in the same order: accelerate gives the
        batches to the processes in turn."""
        return self.processes * self.config.accumulate

    def as_json(self) -> dict:
        return {
            "config": self.settings(),
            "rows": asdict(self.rows),
            "student": asdict(self.student),
            "batches_a_step": self.batches_a_step,
            "tokens_per_second": self.tokens_per_second,
            "is_finished": self.is_finished,
            "held_out": [{"step": step, **_point_as_json(point)} for step, point in self.points],
            "trained_on": [{"step": step, "loss": loss} for step, loss in self.losses],
        }

    def write(self) -> None:
        """Write the record to the student's folder, which is made if it is missing."""
        folder = Path(self.config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / RECORD, json.dumps(self.as_json(), indent=2) + "\n")


def _point_as_json(point: Distance) -> dict:
    """Plain values; a nan error (of a single conversation) becomes None, as JSON has no nan."""
    return {**asdict(point), "error": None if math.isnan(point.error) else point.error}


def _point_of(entry: dict) -> Distance:
    return Distance(**{**entry, "error": math.nan if entry["error"] is None else entry["error"]})


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Make the folder and lock it against other trainings. Raises as ``lock_or_refuse``.

    A folder that is still empty at the end is removed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"`output_dir` {folder}: it cannot be made: {error.strerror}") from error
    lock = filelock.FileLock(folder / LOCK, fallback_to_soft=False)
    lock_or_refuse(lock, folder, "training")
    try:
        yield
    finally:
        with suppress(OSError):  # not every system can remove an open file
            (folder / LOCK).unlink()
        lock.release(force=True)
        with suppress(OSError):
            folder.rmdir()


# --- resuming ---


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint of transformers, after ``step`` steps."""

    path: Path
    step: int


def last_checkpoint(folder: Path) -> Checkpoint:
    """The last complete checkpoint in a student's folder. Raises ToolkitError if there is none."""
    whole = [state.parent for state in checkpoint_states(folder)]
    found = [Checkpoint(path, int(path.name.rpartition("-")[2])) for path in whole]
    if not found:
        raise ToolkitError(f"`resume`: no checkpoint in {folder / CHECKPOINTS}; leave it out to start again")
    return max(found, key=lambda one: one.step)


def go_on(result: TrainingResult, checkpoint: Checkpoint) -> None:
    """Add what was measured up to the checkpoint. Raises UsageError if options, rows or student are not those that the
    training began with."""
    before = _read_record(Path(result.config.output_dir) / RECORD)
    now = result.config.chosen()
    for name in SAME:
        if now.get(name) != before.options.get(name):
            raise UsageError(f"`{name}`: {_chosen(now, name)}, and the training has {_chosen(before.options, name)}; "
                             "resume with the same, or start again in another folder")  # fmt: skip
    _refuse_other_steps(result, before.batches_a_step)
    _refuse_other_rows(result, before)
    _refuse_another_student(result.student, before.student)
    result.points = [point for point in before.points if point[0] <= checkpoint.step]


class _Record(NamedTuple):
    """A record that ``TrainingResult.write`` wrote; ``options`` are those that were chosen."""

    options: dict
    dataset_id: str
    rows: TaughtRows
    student: Student
    batches_a_step: int
    points: list[tuple[int, Distance]]


def _read_record(file: Path) -> _Record:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        points = [(entry.pop("step"), _point_of(entry)) for entry in record["held_out"]]
        options = record["config"]
        rows, student = TaughtRows(**record["rows"]), Student(**record["student"])
        return _Record(options, options["logit_dataset_id"], rows, student, record["batches_a_step"], points)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ToolkitError(f"{file}: no record of a training that `resume` can continue: {error}") from error


def _refuse_other_steps(result: TrainingResult, before: int) -> None:
    """Raise UsageError unless a step has as many batches as ``before``: a checkpoint has only the number of steps."""
    if result.batches_a_step == before:
        return
    each, left = divmod(before, result.processes)
    again = f"a number of processes that divides {before}" if left else f"`accumulate` {each}"
    raise UsageError(
        f"`accumulate` {result.config.accumulate}: times the number of processes, {result.processes}, it makes steps "
        f"of {result.batches_a_step:,}, and the training has steps of {before:,} batches; resume with {again}, or "
        "start again in another folder"
    )


def _refuse_other_rows(result: TrainingResult, record: _Record) -> None:
    """Raise UsageError unless the rows are those of the record, wherever they are stored now."""
    before, now, place = record.rows, result.rows, result.config.logit_dataset_id
    found, again = [], "Resume with those"
    if before.fingerprint != now.fingerprint:
        one, other = (f"extraction {rows.fingerprint[:SHORT]} of {rows.teacher}" for rows in (before, now))
        found.append(f"{one} before, {other} now")
    if before.num_rows != now.num_rows:
        found.append(f"{count_text(before.num_rows, 'row')} before, {now.num_rows:,} now")
    if record.dataset_id == place and before.revision and now.revision and before.revision != now.revision:
        found.append(f"revision {before.revision[:SHORT]} before, {now.revision[:SHORT]} now")
        again = f"Resume with `revision` {before.revision}"
    if found:
        raise UsageError(
            f"`logit_dataset_id` {place}: not the rows that this training began with: {'; '.join(found)}. {again}, or "
            "start again in another folder."
        )


def _refuse_another_student(now: Student, before: Student) -> None:
    """Raise UsageError unless it is the same model, wherever it is now: checkpoints do not have an adapter's base."""
    if now.revision != before.revision:
        same_place = now.model_id == before.model_id and is_commit(before.revision)
        again = f"`student_revision` {before.revision}" if same_place else "that one"
        raise UsageError(
            f"`student_id` {now.model_id}: not the student that this training began with: {before} before, {now} now. "
            f"Resume with {again}, or start again in another folder."
        )


def _chosen(options: dict, name: str) -> str:
    return str(options[name]) if name in options else "the default"
