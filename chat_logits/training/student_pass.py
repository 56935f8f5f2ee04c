"""Run a student over the rows of a stored dataset, a few conversations at a time."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from chat_logits.analysis.bars import bar
from chat_logits.analysis.verification import spread
from chat_logits.data.alignment import Alignment
from chat_logits.data.row_alignment import RowAligner
from chat_logits.errors import UsageError
from chat_logits.storage.dataset import StoredDataset
from chat_logits.training.collator import PaddingCollator
from chat_logits.training.student import StudentLoss
from chat_logits.training.student_report import StudentReport, StudentTally
from chat_logits.training.targets import row_targets

BATCH_TOKENS, READ_TOGETHER = 4096, 16  # tokens of a forward pass, including padding; conversations


class _Row(NamedTuple):
    sample_index: int
    row: dict
    alignment: Alignment


def measure_student(
    dataset: StoredDataset,
    student: torch.nn.Module,
    tokenizer,
    count: int | None = None,
    chat_template: str | None = None,
    student_id: str | None = None,
) -> StudentReport:
    """A student's distance from the teacher over ``count`` rows, spread evenly over the dataset, or over all rows.

    ``student`` is a causal language model of transformers with the extraction's tokens; ``tokenizer`` is the
    extraction's; ``chat_template`` (a path or text) replaces the recorded one. Ends of turns that were not extracted
    have no stored distribution, and are left out. ``student_id`` is the student's name in the report, by default the
    place that it was loaded from. A progress bar is shown on stderr.

    Raises UsageError for rows without draws, since their KL is unknown, and for a student that ``StudentLoss`` refuses;
    ToolkitError if there are no rows, and if a row is damaged or its tokens cannot be rebuilt, naming the row.
    """
    dataset.refuse_empty()
    if not dataset.manifest.num_sampled:
        raise UsageError(
            f"{dataset.dataset_id}: no draws from the tail (`num_sampled` 0), so a student's tail "
            "cannot be compared with anything. Extract with num_sampled 16."
        )
    tally, loss = StudentTally(tokenizer), StudentLoss(student)
    aligner = RowAligner(tokenizer, dataset.manifest, chat_template)
    was_training = student.training
    student.eval()
    try:
        for one, values in _measured(_read(dataset, aligner, count), student, loss):
            tally.add(*one, values)
    finally:
        student.train(was_training)
    weight = student.get_output_embeddings().weight
    return StudentReport(
        dataset_id=dataset.dataset_id,
        teacher_id=dataset.manifest.model_id,
        student_id=student_id or student.name_or_path,
        dtype=str(student.dtype).removeprefix("torch."),
        device=str(weight.device),
        num_rows=dataset.num_rows,
        **tally.groups(),
    )


def _read(dataset: StoredDataset, aligner: RowAligner, count: int | None) -> Iterator[_Row]:
    """The rows, aligned, with a progress bar."""
    indices = spread(dataset.num_rows, dataset.num_rows if count is None else count)
    rows = dataset.rows() if len(indices) == dataset.num_rows else map(dataset.read_row, indices)
    for index, row in zip(bar(indices, dynamic_ncols=True, unit=" conversations"), rows, strict=True):
        yield _Row(index, row, aligner.align(row, index))


def _measured(rows: Iterable[_Row], student: torch.nn.Module, loss: StudentLoss) -> Iterator[tuple[_Row, np.ndarray]]:
    """Each row with ``BatchTarget.divergences`` of its positions, float64 (n, 4)."""
    for batch in _batches(rows):
        with torch.inference_mode():
            values = loss.divergences(student, PaddingCollator()([_example(one) for one in batch])).numpy()
        ends = np.cumsum([one.row["num_tokens"] for one in batch])
        yield from zip(batch, np.split(values, ends[:-1]), strict=True)


def _batches(rows: Iterable[_Row]) -> Iterator[list[_Row]]:
    """Batches of rows of similar length, as many as fit into a forward pass."""
    batch: list[_Row] = []
    for one in _nearly_sorted(rows):
        length = len(one.alignment.input_ids)
        if batch and (len(batch) + 1) * max(length, len(batch[-1].alignment.input_ids)) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(one)
    if batch:
        yield batch


def _nearly_sorted(rows: Iterable[_Row]) -> Iterator[_Row]:
    """The rows, sorted by length within each ``READ_TOGETHER`` of them."""
    waiting: list[_Row] = []
    for one in rows:
        waiting.append(one)
        if len(waiting) == READ_TOGETHER:
            yield from sorted(waiting, key=_length)
            waiting = []
    yield from sorted(waiting, key=_length)


def _length(one: _Row) -> int:
    return len(one.alignment.input_ids)


def _example(one: _Row) -> dict:
    """An example for a collator."""
    targets = row_targets(one.row, one.alignment, end_of_turn="skip")
    return {
        "input_ids": one.alignment.input_ids,
        "labels": one.alignment.input_ids,  # the loss does not use them
        "positions": targets.positions,
        "target_ids": targets.token_ids,
        "target_weights": targets.weights,
        "entropy": targets.entropy,
        "tail_entropy": targets.tail_entropy,
        "num_sampled": len(one.row["sampled_logits_quantized"]) // one.row["num_tokens"],
    }
