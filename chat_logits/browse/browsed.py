"""A dataset that is browsed: its index while it is filled, its marks, and single rows."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from chat_logits.analysis.conversation import Analysis, analyze_row
from chat_logits.analysis.summary import DatasetSummary, summarize
from chat_logits.analysis.tokens import text_and_before
from chat_logits.browse.index import NUMBERS, Clock, Index
from chat_logits.browse.jobs import Job
from chat_logits.browse.marks import Mark, Marks, marks_file
from chat_logits.data.alignment import Alignment
from chat_logits.data.row_alignment import RowAligner
from chat_logits.data.stored_messages import question_of
from chat_logits.errors import ToolkitError, UsageError
from chat_logits.storage.columns import ColumnReader
from chat_logits.storage.dataset import StoredDataset

READERS = 4  # shards at once
SPARK = 48  # bars of a sparkline
OF_LINES = ("messages", "tools", "token_log_probs", "alignment_checksum", "num_tokens")
DAMAGE = (ToolkitError, TypeError, ValueError, KeyError, AttributeError)  # e.g. raised for a column that is null
AT_ONCE_BYTES = 256 * 2**20  # of local shards: up to this size, the summary starts automatically


@dataclass(frozen=True)
class Line:
    """What the list shows of a row in addition to its numbers: ``bars`` are surprisals in nats, each the largest of
    some neighbouring tokens; ``token`` is the text of the most surprising token, ``before`` the text before it, ``at``
    its index among the row's extracted tokens. If the row cannot be read, ``fault`` says why."""

    row: int
    question: str = ""
    bars: list[float] = field(default_factory=list)
    token: str = ""
    before: str = ""
    at: int | None = None
    surprisal: float | None = None  # of that token, infinite if the model gives it probability 0
    fault: str | None = None


class Browsed:
    """A dataset and the ``tokenizer`` that it was extracted with, with an index in ``folder``."""

    def __init__(self, dataset: StoredDataset, tokenizer, folder: Path, chat_template: str | None = None):
        dataset.refuse_empty()
        self.dataset, self.tokenizer, self.chat_template = dataset, tokenizer, chat_template
        self.reader, self.index = ColumnReader(dataset), Index(folder)
        self.marks = Marks(marks_file(dataset), dataset.manifest.fingerprint)
        self.index.set_marks([(row, mark.note, mark.tags) for row, mark in self.marks.all().items()])
        self._aligner, self._aligning = RowAligner(tokenizer, dataset.manifest, chat_template), threading.Lock()
        self.texts, self.summary = Job(self._read_texts), Job(self._summarize)
        self.unread: list[str] = []  # why shards' texts are not searched

    @property
    def is_local(self) -> bool:
        return self.dataset.revision is None

    @property
    def num_bytes(self) -> int:
        """The size of all shards according to shards.json; 0 if it does not say."""
        return sum(shard.num_bytes for shard in self.dataset.shards)

    def read_numbers(self, watch: Callable) -> None:
        """Fill the index with the numbers of all rows, or with the reason for those of damaged shards."""
        for number, table in self._shards(NUMBERS, watch):
            first, count = self.reader.firsts[number], self.dataset.shards[number].num_rows
            if isinstance(table, ToolkitError):
                self.index.add_faults(first, count, str(table))
            elif count:
                self.index.add_numbers(first, table)

    def begin(self) -> None:
        """Start the background jobs: reading a local dataset's texts, and the summary of a small one."""
        if self.is_local:
            self.texts.start()
            if self.num_bytes <= AT_ONCE_BYTES:
                self.summary.start()

    def _read_texts(self, watch: Callable) -> None:
        for number, table in self._shards(("messages", "tools"), watch):
            if isinstance(table, ToolkitError):
                self.unread.append(str(table))
            elif len(table):
                self.index.add_texts(self.reader.firsts[number], table)
        self.index.has_texts = True

    def _shards(self, names: Sequence[str], watch: Callable):
        """The columns of all shards, or the error of reading one, in the shards' order."""

        def read(number: int):
            try:
                return number, self.reader.shard(number, names)
            except ToolkitError as error:
                return number, error

        count = len(self.dataset.shards)
        with ThreadPoolExecutor(READERS) as pool:
            ahead = 2 * READERS  # shards that may be read ahead of the index
            waiting = [pool.submit(read, number) for number in range(min(ahead, count))]
            for number in watch(range(count), count):
                result = waiting.pop(0).result()
                if number + ahead < count:
                    waiting.append(pool.submit(read, number + ahead))
                yield result

    def _summarize(self, watch: Callable) -> DatasetSummary:
        if self.is_local:
            self.texts.finished.wait()  # searching the list is more useful, and there may be few cores
        return summarize(self.dataset, self.tokenizer, self.chat_template, watch)

    # --- single rows ---

    def lines(self, rows: Sequence[int]) -> list[Line]:
        """The lines of these rows; for those that cannot be read, with the reason."""
        found = self.reader.rows(rows, OF_LINES)
        readable = [(number, row) for number, row in zip(rows, found, strict=True) if isinstance(row, dict)]
        alignments = self._aligned([row for _, row in readable], [number for number, _ in readable])
        return [
            self._line(number, row, next(alignments)) if isinstance(row, dict) else Line(number, fault=str(row))
            for number, row in zip(rows, found, strict=True)
        ]

    def analysis(self, row: int) -> Analysis:
        """A row's tokens, with five predictions each."""
        with self._aligning:
            return analyze_row(self.dataset, self.dataset.read_row(row), row, self._aligner, self.tokenizer)

    def _aligned(self, rows: list[dict], numbers: list[int]):
        """Each row's alignment, or its error."""
        with self._aligning:
            try:
                return iter(self._aligner.align_all(rows, numbers))
            except DAMAGE:
                return iter([self._aligned_alone(row, number) for row, number in zip(rows, numbers, strict=True)])

    def _aligned_alone(self, row: dict, number: int) -> Alignment | ToolkitError:
        try:
            return self._aligner.align(row, number)
        except ToolkitError as error:
            return error
        except DAMAGE as error:
            return ToolkitError(f"row {number}: its conversation is not what the format asks for ({error})")

    def _line(self, number: int, row: dict, alignment: Alignment | ToolkitError) -> Line:
        surprisals = -np.array(row["token_log_probs"], np.float64, ndmin=1)
        try:
            question = question_of(row["messages"], 200)
        except DAMAGE:
            question = ""
        if isinstance(alignment, ToolkitError):
            return Line(number, question, fault=str(alignment))
        if len(surprisals) != row["num_tokens"] or not (surprisals > -np.inf).all():  # refuses NaN, too
            return Line(number, question, fault="column token_log_probs is not what the format asks for")
        if not len(surprisals):
            return Line(number, question, fault="no tokens")
        worst = int(surprisals.argmax())
        text, before = text_and_before(alignment.input_ids, int(alignment.positions[worst]), self.tokenizer)
        parts = np.array_split(surprisals, min(SPARK, len(surprisals)))
        bars = [round(float(part.max()), 2) for part in parts]
        return Line(number, question, bars, text, before, worst, float(surprisals[worst]))

    # --- marks ---

    def mark(self, source_index: int, mark: Mark) -> None:
        """Put a mark on a source row. Raises UsageError if the dataset does not have that row."""
        if not self.index.has_source(source_index, Clock()):
            raise UsageError(f"source row {source_index}: it is not in the dataset, expected one that is")
        self.marks.put(source_index, mark)
        self.index.set_marks([(source_index, mark.note, mark.tags)])

    def mark_of(self, source_index: int) -> Mark:
        return self.marks.all().get(source_index, Mark("", []))
