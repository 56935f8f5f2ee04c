"""Export a logit dataset as Parquet files that other trainers read; ``export_formats`` has their columns."""

import os
import pickle
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from chat_logits.data.alignment import Alignment
from chat_logits.data.row_alignment import RowAligner
from chat_logits.errors import ToolkitError, UsageError
from chat_logits.storage.dataset import StoredDataset
from chat_logits.storage.disk import folder_written_whole, refuse_filled
from chat_logits.training.export_files import write_files
from chat_logits.training.export_formats import FORMATS, Example, Size, encoded
from chat_logits.training.targets import Targets, row_targets


@dataclass
class Exported:
    """What an export wrote, and what it left out.

    ``num_rows`` conversations with ``num_positions`` targets are in the ``files`` of ``folder``. ``left_out`` counts
    conversations by reason. ``positions_left_out`` counts targets without any id in the student's vocabulary; ``lost``
    is the total weight of ids outside of it over all positions that are written, ``most_lost`` the largest at one.
    """

    folder: Path
    format: str
    files: list[Path] = field(default_factory=list)
    num_rows: int = 0
    num_positions: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    positions_left_out: int = 0
    lost: float = 0.0
    most_lost: float = 0.0


def export_targets(
    dataset: StoredDataset,
    tokenizer,
    output_dir: str | os.PathLike,
    format: str = "plain",
    *,
    chat_template: str | None = None,
    student_vocab_size: int | None = None,
    sequence_length: int | None = None,
    hard_weight: float = 0.0,
    end_of_turn: str = "hard",
    allow_biased: bool = False,
    temperature: float = 1.0,
) -> Exported:
    """Write the targets of all rows to ``output_dir``, in the columns of ``format``, a key of ``FORMATS``.

    ``tokenizer`` is the one that ``dataset`` was extracted with; ``chat_template`` replaces the recorded one.
    ``hard_weight``, ``end_of_turn`` and ``allow_biased`` are as in ``row_targets``. If the student has only
    ``student_vocab_size`` ids, other ids are dropped, and conversations that contain one are left out.
    ``sequence_length``, tokens, is for a format in which all conversations have one length: longer ones are left out;
    None for the length of the longest one.

    Raises UsageError for options that do not go together and for a folder that is not empty, ToolkitError if nothing is
    left to write, a row does not fit its tokens, or the disk cannot be written. The folder is written completely or not
    at all.
    """
    kind = FORMATS.get(format)
    if kind is None:
        raise UsageError(f"`format` {format}: expected one of {', '.join(FORMATS)}")
    _refuse_unfit(dataset, kind.has_one_shape, format, sequence_length, allow_biased, temperature)
    folder = Path(output_dir)
    refuse_filled(folder, "output_dir")
    exported = Exported(folder, format)
    options = {"hard_weight": hard_weight, "end_of_turn": end_of_turn, "allow_biased": allow_biased}
    limits = _Limits(student_vocab_size, sequence_length, needs_plain_messages=format == "trl")
    source = _Examples(dataset, RowAligner(tokenizer, dataset.manifest, chat_template), options, limits, exported)
    size = Size(sequence_length or 0, dataset.manifest.top_k + dataset.manifest.num_sampled + (hard_weight > 0))
    with folder_written_whole(folder) as hidden:
        with tempfile.TemporaryFile(dir=hidden) as kept:
            if kind.has_one_shape and sequence_length is None:
                size = size._replace(tokens=source.longest(kept))
            write_files(hidden, kind.schema, (encoded(kind, example, size) for example in source))
        if not exported.num_rows:
            raise ToolkitError(f"{dataset.dataset_id}: all conversations are left out: {_counted(exported.left_out)}")
        exported.files = sorted(folder / path.name for path in hidden.iterdir())
    return exported


def _refuse_unfit(
    dataset: StoredDataset,
    has_one_shape: bool,
    format: str,
    sequence_length: int | None,
    allow_biased: bool,
    temperature: float,
) -> None:
    """Raise UsageError for options that this dataset or this format does not allow, ToolkitError without rows."""
    dataset.refuse_empty()
    if temperature != 1:
        raise UsageError(
            f"`temperature` {temperature:g}: expected 1. p^(1/T) is not linear in the weights, so no draws give an "
            "unbiased target at another: at T = 2 the loss is 117% too large"
        )
    if sequence_length is not None and not has_one_shape:
        raise UsageError(f"`sequence_length` is for a format of one length, and `format` {format} has none")
    if not dataset.manifest.num_sampled and not allow_biased:
        raise UsageError(
            f"{dataset.dataset_id}: no draws from the tail (`num_sampled` 0), so a student would be taught that the "
            "tail is impossible. Extract with num_sampled 16, or give `allow_biased`."
        )


class _Limits(NamedTuple):
    """The limits on a conversation; None for no limit."""

    vocab_size: int | None
    tokens: int | None
    needs_plain_messages: bool

    def reason_against(self, row: dict, alignment: Alignment) -> str | None:
        """Why a conversation is left out, or None."""
        if self.vocab_size is not None and alignment.input_ids.max() >= self.vocab_size:
            return f"with token ids beyond the student's {self.vocab_size:,}"
        if self.tokens is not None and len(alignment.input_ids) > self.tokens:
            return f"of more than {self.tokens:,} tokens"
        unlike = any(message["content"] is None or message["extra"] is not None for message in row["messages"])
        if self.needs_plain_messages and (unlike or row["tools"] is not None):
            return "with tools, or with messages of more than a role and a content"
        return None


class _Examples:
    """The examples of a dataset to write; counts are added to ``exported`` along the way."""

    def __init__(self, dataset: StoredDataset, aligner: RowAligner, options: dict, limits: _Limits, exported: Exported):
        self._dataset, self._aligner, self._options = dataset, aligner, options
        self._limits, self._exported = limits, exported
        self._kept: BinaryIO | None = None  # pickled alignments, a row group's at a time

    def longest(self, kept: BinaryIO) -> int:
        """The number of tokens of the longest conversation that is written; 1 if there is none. The alignments are kept
        in the file ``kept``, about 18 bytes a token, for when the conversations are written."""
        longest = 1
        for first, rows in self._groups("Measuring"):
            alignments = self._align(first, rows)
            pickle.dump(alignments, kept)
            for row, alignment in zip(rows, alignments, strict=True):
                if self._limits.reason_against(row, alignment) is None:
                    longest = max(longest, len(alignment.input_ids))
        kept.seek(0)
        self._kept = kept
        return longest

    def __iter__(self) -> Iterator[Example]:
        exported = self._exported
        for row, alignment in self._aligned():
            reason = self._limits.reason_against(row, alignment)
            if reason is None:
                targets = self._within_vocabulary(row_targets(row, alignment, **self._options))
                reason = None if len(targets.positions) else "without a target in the student's vocabulary"
            if reason is not None:
                exported.left_out[reason] += 1
                continue
            exported.num_rows += 1
            exported.num_positions += len(targets.positions)
            yield Example(alignment.input_ids, targets, row["messages"])

    def _aligned(self) -> Iterator[tuple[dict, Alignment]]:
        for first, rows in self._groups("Exporting"):
            alignments = pickle.load(self._kept) if self._kept else self._align(first, rows)
            yield from zip(rows, alignments, strict=True)

    def _align(self, first: int, rows: list[dict]) -> list[Alignment]:
        return self._aligner.align_all(rows, range(first, first + len(rows)))

    def _groups(self, task: str) -> Iterator[tuple[int, list[dict]]]:
        """The row groups, with a progress bar, each with the number of its first row."""
        options = {"unit": " conversations", "dynamic_ncols": True, "leave": False}
        with tqdm(desc=task, total=self._dataset.num_rows, **options) as progress:
            for first, rows in self._dataset.row_groups(self._dataset.shards):
                yield first, rows
                progress.update(len(rows))

    def _within_vocabulary(self, targets: Targets) -> Targets:
        """The targets without the ids that the student does not have; the remaining weights are not scaled up."""
        size, exported = self._limits.vocab_size, self._exported
        if size is None or not (is_outside := targets.token_ids >= size).any():
            return targets
        lost = (targets.weights * is_outside).sum(axis=1, dtype=np.float64)
        token_ids, weights = np.where(is_outside, 0, targets.token_ids), np.where(is_outside, 0, targets.weights)
        is_left = weights.any(axis=1)
        exported.positions_left_out += int((~is_left).sum())
        exported.lost += float(lost[is_left].sum())
        exported.most_lost = max(exported.most_lost, *lost[is_left].tolist(), 0.0)
        constants = (targets.entropy[is_left], targets.tail_entropy[is_left])
        return Targets(targets.positions[is_left], token_ids[is_left], weights[is_left], *constants)


def _counted(left_out: Counter[str]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
