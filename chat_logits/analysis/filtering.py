"""Some rows of a dataset, listed or saved: as a filtered logit dataset, as messages, or as source indices.

FORMAT.md, "Filtered datasets", specifies the first.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from chat_logits.analysis.condition import Condition
from chat_logits.data.stored_messages import from_stored, question_of
from chat_logits.errors import ToolkitError, UsageError
from chat_logits.storage.dataset import Rows, StoredDataset
from chat_logits.storage.disk import refuse_filled, write_lines
from chat_logits.storage.numbers import number_table, read_columns
from chat_logits.words import count_text

MESSAGES, INDICES = ".jsonl", ".txt"  # endings of files that rows are saved to
OTHER_FILES = (".json", ".csv", ".tsv", ".parquet", ".arrow")  # endings of formats that are not written


@dataclass(frozen=True)
class FoundRow:
    """A stored row's numbers, as in FORMAT.md, and the beginning of its first user message."""

    row: int
    source_index: int
    num_tokens: int
    mean_nll: float
    perplexity: float
    mean_entropy: float
    top1_rate: float
    max_surprisal: float
    question: str


@dataclass(frozen=True, repr=False)
class Filtering:
    """The rows of a dataset for which a ``condition`` is true (None: chosen otherwise), and where they were ``saved``
    (None: nowhere)."""

    dataset_id: str
    condition: str | None
    num_conversations: int
    entropy_is_bound: bool
    rows: list[FoundRow]
    saved: str | None = None

    def as_dict(self) -> dict:
        """All of it as plain values."""
        content = asdict(self)
        return {"logit_dataset_id": content.pop("dataset_id"), **content}

    def __repr__(self) -> str:
        found = f"{len(self.rows):,} of {count_text(self.num_conversations, 'conversation')}"
        by = f" with {' '.join(self.condition.split()):.80}" if self.condition else ""
        return f"<Filtering of {self.dataset_id}: {found}{by}>"


def filter_rows(dataset: StoredDataset, condition: str, save: str | None = None) -> Filtering:
    """The rows for which a condition is true (``Condition``), saved by ``save_rows`` if ``save`` is given.

    Raises UsageError for an invalid condition and for a place that cannot be saved to, before anything is read.
    """
    wanted = Condition(condition)
    if save is not None:
        check_place(save)
    rows = wanted.rows_of(dataset)
    if save is not None:
        save_rows(dataset, rows, save, condition)
    return Filtering(
        dataset_id=dataset.dataset_id,
        condition=condition,
        num_conversations=dataset.num_rows,
        entropy_is_bound=not dataset.manifest.num_sampled,
        rows=found_rows(dataset, rows),
        saved=None if save is None else str(save),
    )


def found_rows(dataset: StoredDataset, rows: Rows) -> list[FoundRow]:
    """The numbers and questions of these stored rows, in ascending order."""
    numbers = number_table(dataset, rows).to_pylist()
    messages = read_columns(dataset, ["messages"], rows)["messages"].to_pylist()
    return [FoundRow(**row, question=question_of(one)) for row, one in zip(numbers, messages, strict=True)]


# --- saving ---


def check_rows(dataset: StoredDataset, rows: Rows) -> np.ndarray:
    """The numbers of stored rows as int64, ascending, each once. Raises UsageError for other values, ToolkitError for
    none."""
    try:
        numbers = np.unique(np.asarray(rows if isinstance(rows, np.ndarray) else list(rows)))
    except (TypeError, ValueError) as error:
        raise UsageError(f"rows {rows!r:.60}: expected numbers of stored rows") from error
    if not numbers.size:
        raise ToolkitError(f"{dataset.dataset_id}: no row is chosen, so there is nothing to save")
    if numbers.dtype.kind not in "iu" or numbers[0] < 0 or numbers[-1] >= dataset.num_rows:
        wrong = numbers[0] if numbers.dtype.kind not in "iu" or numbers[0] < 0 else numbers[-1]
        raise UsageError(f"row {wrong}: {dataset.dataset_id} has rows 0 to {dataset.num_rows - 1}")
    return numbers.astype(np.int64)


def check_place(save: str) -> None:
    """Raise UsageError for a place that rows cannot be saved to."""
    path = Path(save)
    if path.suffix in OTHER_FILES or not str(save):
        raise UsageError(f"`save` {save}: expected a folder, or a file that ends in {MESSAGES} or {INDICES}")
    if path.suffix not in (MESSAGES, INDICES):
        refuse_filled(path, "save")
    elif path.is_dir() or not path.parent.is_dir():
        fault = "a folder" if path.is_dir() else f"the folder {path.parent} is missing"
        raise UsageError(f"`save` {save}: {fault}, expected a file to write")


def save_rows(dataset: StoredDataset, rows: Rows, save: str, condition: str | None = None) -> None:
    """Write some stored rows, by their numbers, to ``save``: FILE.jsonl gets their messages, FILE.txt their source
    indices, and any other name is the folder of a filtered dataset, which records the ``condition``.

    Raises UsageError as ``check_place`` and ``check_rows`` do, ToolkitError if it cannot be written.
    """
    check_place(save)
    numbers = check_rows(dataset, rows)
    if Path(save).suffix not in (MESSAGES, INDICES):
        write_dataset(dataset, numbers, save, condition)
        return
    lines = messages_of(dataset, numbers) if Path(save).suffix == MESSAGES else source_indices(dataset, numbers)
    try:
        write_lines(Path(save), (f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines))
    except OSError as error:
        raise ToolkitError(f"{save}: it cannot be written: {error.strerror}") from error


def write_dataset(dataset: StoredDataset, rows: Rows, folder: str, condition: str | None = None) -> None:
    """Write a filtered dataset of these rows to a new or an empty folder. ``condition`` is what they were chosen by;
    without one, their numbers are recorded. Raises as ``save_rows`` does."""
    from chat_logits.storage.derived import write_filtered  # with the card, imports huggingface_hub

    numbers = check_rows(dataset, rows)
    refuse_filled(Path(folder), "save")
    write_filtered(dataset, numbers.tolist(), dataset.manifest.filtered(condition, numbers), Path(folder))


def messages_of(dataset: StoredDataset, rows: Rows) -> Iterator[dict]:
    """``source_index``, ``messages`` and, if any, ``tools`` (a list) of these rows, as they were read from the source:
    they can be extracted again."""
    for _, row in dataset.chosen_rows(rows):
        tools = {} if row["tools"] is None else {"tools": json.loads(row["tools"])}
        yield {"source_index": row["source_index"], "messages": from_stored(row["messages"]), **tools}


def source_indices(dataset: StoredDataset, rows: Rows) -> list[int]:
    """The source rows of these stored rows."""
    numbers, places = np.unique(np.asarray(rows, np.int64), return_inverse=True)
    found = read_columns(dataset, ["source_index"], numbers)["source_index"].to_pylist()
    return [found[place] for place in places]
