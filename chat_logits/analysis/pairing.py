"""Pair two datasets' rows by source row, and other functions that their comparisons share."""

import bisect
import heapq
from collections.abc import Callable, Iterable, Iterator

from chat_logits.analysis.bars import bar
from chat_logits.analysis.divergence import Source
from chat_logits.analysis.runs import RunDifference, run_differences
from chat_logits.errors import ToolkitError, UsageError
from chat_logits.storage.dataset import StoredDataset
from chat_logits.storage.json_files import SHOWN, canonical

# Keys of extraction.json that decide which tokens a conversation has and which of them are extracted
DECIDE_TOKENS = (
    "keep_end_of_turn",
    "all_turns",
    "skipped_token_ids",
    "chat_template",
    "tools_template",
    "template_kwargs",
    "template_date",
    "system_prompt",
    "columns",
    "dataset_config",
    "split",
    "dataset_revision",
)
Watch = Callable[[Iterable, int], Iterator]
Numbered = Iterable[tuple[int, dict]]


def refuse_other_tokenizer(first: StoredDataset, other: StoredDataset) -> None:
    """Raise UsageError if two datasets' ids are not of the same tokenizer."""
    expected, fingerprint = (dataset.manifest.tokenizer_fingerprint for dataset in (first, other))
    if fingerprint != expected:
        raise UsageError(
            f"{other.dataset_id}: made with another tokenizer ({fingerprint[:12]}) than {first.dataset_id} "
            f"({expected[:12]}). Compare datasets whose models share a tokenizer."
        )


def row_of(dataset: StoredDataset, source_index: int, likely: int) -> tuple[int, dict]:
    """The number and the stored row of a source row.

    The number is ``likely`` unless different rows are missing in the two datasets; rows are in the order of their
    source rows.
    """
    row = dataset.read_row(likely) if likely < dataset.num_rows else None
    if row is not None and row["source_index"] == source_index:
        return likely, row
    rows = range(dataset.num_rows)
    index = bisect.bisect_left(rows, source_index, key=lambda i: dataset.read_row(i)["source_index"])
    row = dataset.read_row(index) if index < dataset.num_rows else None
    if row is None or row["source_index"] != source_index:
        raise ToolkitError(
            f"{dataset.dataset_id}: source row {source_index} is not in it (skipped, or not reached); "
            "choose another conversation with `sample_index`"
        )
    return index, row


def has_same_tokens(row: dict, other_row: dict) -> bool:
    """Whether two rows are about the same input ids and the same extracted tokens, by their checksums."""
    return all(row[name] == other_row[name] for name in ("alignment_checksum", "num_tokens"))


def why_other_tokens(first: StoredDataset, other: StoredDataset) -> str:
    """How the runs differ in what decides the tokens, and what to do about it."""
    differences = run_differences(first.manifest, other.manifest)
    deciding = [each for each in differences if each.key.partition(".")[0] in DECIDE_TOKENS]
    if not deciding:
        return "expected the same conversations, extracted with the same template"
    deciding.sort(key=lambda each: DECIDE_TOKENS.index(each.key.partition(".")[0]))
    return (
        f"their runs differ in {', '.join(map(_difference_text, deciding))}. "
        "Extract one of them again with the options of the other."
    )


def _difference_text(difference: RunDifference) -> str:
    """The key, and both values if they are short; null for an extraction.json without the key."""
    values = [canonical(value).decode() for value in (difference.first, difference.other)]
    return f"{difference.key} ({' and '.join(values)})" if max(map(len, values)) <= SHOWN else difference.key


def source_of(dataset: StoredDataset) -> Source:
    """The dataset and its model."""
    return Source(dataset.dataset_id, dataset.manifest.model_id)


def show_progress(rows: Iterable, total: int) -> Iterator:
    """Iterate over the rows, with a progress bar from one second on."""
    with bar(rows, "Comparing", total, unit=" conversations", leave=False, delay=1) as watched:
        yield from watched


def paired_rows(rows: Numbered, other_rows: Numbered) -> Iterator[tuple[int, dict, int, dict]]:
    """Pairs of rows of the same source row, each with its number; both inputs are in the order of source rows."""
    others: Iterator[tuple[int, dict | None]] = iter(other_rows)
    end: tuple[int, dict | None] = (0, None)
    other_index, other_row = next(others, end)
    for sample_index, row in rows:
        while other_row is not None and other_row["source_index"] < row["source_index"]:
            other_index, other_row = next(others, end)
        if other_row is None:
            return
        if other_row["source_index"] == row["source_index"]:
            yield sample_index, row, other_index, other_row


def keep(heap: list, entry: tuple, size: int) -> None:
    """Add an entry to the ``size`` largest ones."""
    (heapq.heappush if len(heap) < size else heapq.heappushpop)(heap, entry)


def largest_first(heap: list) -> list:
    return [record for *_, record in sorted(heap, reverse=True)]
