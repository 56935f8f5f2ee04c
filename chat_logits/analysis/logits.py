"""A whole logit dataset as one object: a sequence of conversations, each analysed when it is asked for."""

import operator
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from chat_logits.analysis.comparison import Comparison
from chat_logits.analysis.condition import Condition
from chat_logits.analysis.conversation import Analysis, analyze_row
from chat_logits.analysis.cross_records import CrossComparison, SpanComparison
from chat_logits.analysis.cross_tokenizer import compare_any
from chat_logits.analysis.dataset_comparison import DatasetComparison
from chat_logits.analysis.filtering import Filtering, found_rows, messages_of, save_rows, source_indices
from chat_logits.analysis.opening import WrongKind, open_beside, tokenizer_of
from chat_logits.analysis.summary import DatasetSummary, summarize
from chat_logits.analysis.tokens import Totals
from chat_logits.data.row_alignment import RowAligner
from chat_logits.data.stored_messages import from_stored
from chat_logits.errors import UsageError
from chat_logits.paths import expanded
from chat_logits.storage.dataset import StoredDataset
from chat_logits.storage.manifest import Manifest
from chat_logits.words import count_text

FRAMES = ("pandas", "polars", "duckdb", "arrow")


class NoSuchRow(UsageError, IndexError):
    """A conversation that is not there."""


class Logits(Sequence):
    """A logit dataset, or some of its conversations; ``rows`` are their numbers among the stored rows (None: all).

    ``logits[0]`` is a ``Conversation``; a slice or a list of indices gives ``Logits`` with those. Nothing is read
    before it is needed, and the tokenizer is only opened for tokens; the other arguments are those of ``open_logits``.
    Methods raise ToolkitError, which says what to do.
    """

    def __init__(
        self,
        dataset: StoredDataset,
        chat_template: str | None = None,
        tokenizer_id: str | None = None,
        trust_remote_code: bool = False,
        rows: np.ndarray | None = None,
        condition: str | None = None,
    ):
        self.dataset = dataset
        self.condition = condition  # the rows are all those for which it is true
        self._rows = rows
        self._options = (chat_template, tokenizer_id, trust_remote_code)

    @property
    def manifest(self) -> Manifest:
        """What extraction.json records."""
        return self.dataset.manifest

    @property
    def stored_rows(self) -> np.ndarray:
        """The conversations' numbers among the stored rows, int64 (m,)."""
        return np.arange(self.dataset.num_rows) if self._rows is None else self._rows

    def __len__(self) -> int:
        return self.dataset.num_rows if self._rows is None else len(self._rows)

    def __repr__(self) -> str:
        counted = count_text(self.dataset.num_rows, "conversation")
        chosen = "" if self._rows is None else f"{len(self):,} of "
        by = f" with {' '.join(self.condition.split()):.80}" if self.condition else ""
        return f"<Logits {self.dataset.dataset_id}: {chosen}{counted}{by}>"

    def __iter__(self) -> Iterator["Conversation"]:
        return (Conversation(self, int(row)) for row in self.stored_rows)

    def __getitem__(self, index):
        """A conversation by its index, negative from the end, or those of a slice or a list of indices."""
        if isinstance(index, slice):
            return self._with(self.stored_rows[index])
        if isinstance(index, list | tuple | np.ndarray):
            return self._with(self.stored_rows[[self._place(one) for one in index]])
        return Conversation(self, int(self.stored_rows[self._place(index)]))

    def _place(self, index) -> int:
        place = _whole(index)
        if place is None:
            raise WrongKind(f"{index!r:.40} of {self!r}: expected a whole number, a slice, or a list of whole numbers")
        if not -len(self) <= place < len(self):
            raise NoSuchRow(f"{place} of {self!r}: expected {f'0 to {len(self) - 1}' if len(self) else 'nothing'}")
        return place

    def _with(self, rows: np.ndarray, condition: str | None = None) -> "Logits":
        chosen = type(self)(self.dataset, *self._options, rows=rows, condition=condition)
        for name in ("tokenizer", "aligner"):
            if name in vars(self):
                vars(chosen)[name] = vars(self)[name]
        return chosen

    # --- numbers ---

    def rows(self, kind: str = "pandas") -> Any:
        """Each conversation's numbers as a data frame of ``kind``, one of ``FRAMES``: ``row``, ``source_index``,
        ``num_tokens``, ``mean_nll``, ``perplexity``, ``mean_entropy``, ``top1_rate``, ``max_surprisal``, in nats.

        Only the columns of numbers are read. "duckdb" gives a relation, "arrow" a pyarrow Table.
        """
        if kind not in FRAMES:
            raise WrongKind(f"rows({kind!r:.40}): expected one of {', '.join(FRAMES)}")
        table = self._numbers if self._rows is None else self._numbers.take(self.stored_rows)
        try:
            return _framed(table, kind)
        except ImportError as error:
            raise UsageError(f"rows({kind!r}) needs {kind}, which is not installed: pip install {kind}") from error

    @cached_property
    def _numbers(self):
        from chat_logits.storage.numbers import number_table

        return number_table(self.dataset)

    def where(self, condition: str) -> "Logits":
        """The conversations for which a condition is true: a DuckDB expression over the columns of ``Condition``, such
        as ``mean_nll > 4`` or ``question ILIKE '%roof%' AND num_tokens < 200``."""
        found = Condition(condition).rows_of(self.dataset)
        if self._rows is None:
            return self._with(found, condition)
        both = f"({self.condition}\n) AND ({condition}\n)" if self.condition else None
        return self._with(self._rows[np.isin(self._rows, found)], both)

    def listed(self) -> Any:
        """A ``Filtering``: the conversations with their numbers and the beginnings of their first user messages."""
        entropy_is_bound = not self.manifest.num_sampled
        rows = found_rows(self.dataset, np.unique(self.stored_rows))
        return self._shown(
            Filtering(self.dataset.dataset_id, self.condition, self.dataset.num_rows, entropy_is_bound, rows)
        )

    def summary(self) -> DatasetSummary:
        """The conversations in numbers, each counted once."""
        rows = self._part("summary")
        return self._shown(summarize(self.dataset, self.tokenizer, self._options[0], rows=rows))

    def compare(
        self, other: "Logits | str | Path", revision: str | None = None, tokenizer_id: str | None = None
    ) -> DatasetComparison | CrossComparison:
        """Compare the conversations with another dataset's: a ``Logits``, a folder, or a Hub id at ``revision``.

        Conversations are matched by source row; only rows that this and the other ``Logits`` have chosen are compared.
        Datasets with different tokenizers are compared by their text; ``tokenizer_id`` may say where the other's is.
        """
        rows = self._part("comparison")
        dataset, tokenizer = self._opened_beside(other, revision, tokenizer_id)
        other_rows = other._part("comparison") if isinstance(other, Logits) else None
        if rows is not None and other_rows is None:
            from chat_logits.storage.numbers import read_columns

            wanted = read_columns(self.dataset, ["source_index"], rows)["source_index"]
            there = read_columns(dataset, ["source_index"])["source_index"]
            other_rows = np.flatnonzero(np.isin(there.to_pylist(), wanted.to_pylist()))
        sides = (self.dataset, dataset, self.tokenizer, tokenizer)
        return self._shown(compare_any(*sides, None, self._options[0], rows=rows, other_rows=other_rows))

    def _row_beside(self, row: int, other: object, revision: str | None, tokenizer_id: str | None, *shown) -> Any:
        """``shown`` are ``top_n`` and ``only`` of ``compare_any``."""
        dataset, tokenizer = self._opened_beside(other, revision, tokenizer_id)
        sides = (self.dataset, dataset, self.tokenizer, tokenizer)
        return self._shown(compare_any(*sides, row, self._options[0], *shown))

    def _opened_beside(
        self, other: object, revision: str | None, tokenizer_id: str | None
    ) -> tuple[StoredDataset, Any]:
        """The other dataset, and its tokenizer if it is a different one."""
        other = other.logits if isinstance(other, Conversation) else other
        if isinstance(other, Logits):
            same = other.manifest.tokenizer_fingerprint == self.manifest.tokenizer_fingerprint
            return other.dataset, None if same else other.tokenizer
        if isinstance(other, str | Path):
            return open_beside(self.dataset, str(other), revision, tokenizer_id, self._options[2])
        raise WrongKind(f"a {type(other).__name__}: expected a logit dataset, opened, or its folder or Hub id")

    def _part(self, noun: str) -> np.ndarray | None:
        """The rows, ascending, each once; None for all. Raises UsageError if there are none."""
        if self._rows is None:
            return None
        if not len(self._rows):
            raise UsageError(f"{self!r}: there is nothing to make a {noun} of; expected one conversation or more")
        return np.unique(self._rows)

    # --- saving ---

    def save(self, place: str | Path) -> None:
        """Save the conversations: their messages to FILE.jsonl, their source indices to FILE.txt, or to a new folder a
        filtered logit dataset with the stored rows as they are. ``~`` is the user's home folder."""
        if not isinstance(place, str | Path):
            raise WrongKind(f"save({place!r:.40}): expected FILE.jsonl, FILE.txt or a folder")
        save_rows(self.dataset, self.stored_rows, expanded(place, "save"), self.condition)

    def messages(self) -> Iterator[dict]:
        """``source_index`` and ``messages`` of each, in the order of the stored rows."""
        return messages_of(self.dataset, np.unique(self.stored_rows))

    @property
    def source_indices(self) -> list[int]:
        """The conversations' row numbers in the source."""
        return source_indices(self.dataset, self.stored_rows)

    # --- tokens ---

    @cached_property
    def tokenizer(self):
        """The tokenizer that the dataset was extracted with."""
        return tokenizer_of(self.dataset, *self._options[1:])

    @cached_property
    def aligner(self) -> RowAligner:
        """Rebuilds the tokens of stored rows."""
        return RowAligner(self.tokenizer, self.manifest, self._options[0])

    def _shown(self, result: Any) -> Any:
        """The result to return; ``ShownLogits`` makes it show itself."""
        return result


class Conversation(Sequence):
    """Stored row number ``row`` of a dataset: a sequence of its tokens, with all attributes of an ``Analysis``.

    The row is read and analysed when it is first needed. Two are equal if they are the same row of the same dataset.
    """

    def __init__(self, logits: Logits, row: int):
        self.logits, self.row = logits, row

    @cached_property
    def stored(self) -> dict:
        """The stored row's columns."""
        return self.logits.dataset.read_row(self.row)

    @cached_property
    def analysis(self) -> Analysis:
        """Its ``Analysis`` with five predictions a token."""
        return self.analyze()

    def analyze(self, top_n: int = 5, **shown) -> Analysis:
        """Its ``Analysis`` with ``top_n`` predictions a token; ``shown`` are its ``show_prompt`` and ``only``."""
        logits = self.logits
        found = analyze_row(logits.dataset, self.stored, self.row, logits.aligner, logits.tokenizer, top_n, **shown)
        return logits._shown(found)

    @property
    def source_index(self) -> int:
        """Its row number in the source."""
        return self.stored["source_index"]

    @property
    def messages(self) -> list[dict]:
        """The messages as they were read from the source."""
        return from_stored(self.stored["messages"])

    @property
    def tokens(self) -> Analysis:
        """All tokens of the conversation; a slice of them is an ``Analysis``, too."""
        return self.analysis

    @property
    def totals(self) -> Totals:
        """The answer in five numbers."""
        return self.analysis.totals

    def compare(
        self,
        other: "Logits | Conversation | str | Path",
        revision: str | None = None,
        tokenizer_id: str | None = None,
        top_n: int | None = None,
        only: int | None = None,
    ) -> Comparison | SpanComparison:
        """Compare it with another dataset's row of the same source row; ``other`` is as for ``Logits.compare``,
        ``top_n`` and ``only`` as in ``compare_any``."""
        return self.logits._row_beside(self.row, other, revision, tokenizer_id, top_n, only)

    def __len__(self) -> int:
        return len(self.analysis)

    def __getitem__(self, index):
        if not isinstance(index, slice) and _whole(index) is None:
            raise WrongKind(f"{index!r:.40} of {self!r}: expected a whole number or a slice")
        return self.analysis[index]

    def __repr__(self) -> str:
        return f"<Conversation: row {self.row} of {self.logits.dataset.dataset_id}>"

    def __eq__(self, other: object) -> bool:
        return self._key == other._key if isinstance(other, Conversation) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[str, str | None, int]:
        return self.logits.dataset.dataset_id, self.logits.dataset.revision, self.row

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name}")
        if hasattr(type(self), name):  # a property raised AttributeError; call it again to get that error
            return object.__getattribute__(self, name)
        return getattr(self.analysis, name)


def _whole(index) -> int | None:
    """A whole number of any type as an int, None for anything else."""
    try:
        return None if isinstance(index, bool) else operator.index(index)
    except TypeError:
        return None


def _framed(table, kind: str):
    if kind == "pandas":
        import pandas  # noqa: F401

        return table.to_pandas()
    if kind == "polars":
        import polars

        return polars.from_arrow(table)
    if kind == "duckdb":
        import duckdb

        return duckdb.from_arrow(table)
    return table
