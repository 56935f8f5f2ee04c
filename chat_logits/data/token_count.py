"""Estimate how many tokens a dataset has, from a sample of rows that are read as in a run."""

import math
import random
from dataclasses import dataclass

import numpy as np

from chat_logits.data.parquet_rows import ParquetRows
from chat_logits.data.reader import Aligned, Reader
from chat_logits.data.table_rows import StreamRows

SAMPLED = 1000  # rows, at most
STREAMED_RUN = 64  # consecutive rows drawn together from streamed Parquet, where each draw fetches a row group


@dataclass(frozen=True)
class Estimate:
    """A mean over source rows, and its standard error, which is None if the rows were not drawn at random."""

    mean: float
    error: float | None

    def times(self, rows: int) -> "Estimate":
        """The estimated sum over this many rows."""
        return Estimate(self.mean * rows, None if self.error is None else self.error * rows)


@dataclass(frozen=True)
class TokenCount:
    """Means per source row, with 0 for skipped rows: ``tokens`` read, ``extracted`` tokens, and ``pairs`` of tokens of
    which one attends to the other (or itself).

    A run would read ``rows`` (None: not known); ``sampled`` rows were read here, and ``skipped`` of these would be
    skipped. ``longest`` is the largest number of tokens in a sampled conversation.
    """

    rows: int | None
    sampled: int
    skipped: int
    tokens: Estimate
    extracted: Estimate
    pairs: Estimate
    longest: int


def count_tokens(reader: Reader, most: int = SAMPLED, seed: int = 0) -> TokenCount:
    """Render and tokenize ``most`` rows, drawn at random, or all if there are fewer; in runs for streamed Parquet.

    For a stream that is read in order, the first rows are taken, and the standard errors are None.
    """
    in_order = reader.num_rows is None or isinstance(reader.source.rows, StreamRows)
    runs = [(0, most)] if in_order else _drawn_runs(reader, most, random.Random(seed))
    counts = np.zeros((len(runs), 4))  # source rows, tokens, extracted tokens, pairs
    skipped = longest = 0
    for counted, (first, end) in zip(counts, runs, strict=True):
        ready, left_out = reader.align(first, end)
        counted[:] = len(ready) + len(left_out), *_totals(ready)
        skipped += len(left_out)
        longest = max([longest, *(len(one.input_ids) for one in ready)])
    sampled, is_all = int(counts[:, 0].sum()), reader.num_rows is not None and counts[:, 0].sum() >= reader.num_rows
    share = 1 if is_all else None if in_order else sampled / (reader.num_rows or sampled)
    tokens, extracted, pairs = (_estimate(counts[:, 0], counts[:, i], share) for i in (1, 2, 3))
    return TokenCount(reader.num_rows, sampled, skipped, tokens, extracted, pairs, longest)


def _drawn_runs(reader: Reader, most: int, drawn: random.Random) -> list[tuple[int, int]]:
    """First row and end of each run of rows, in order."""
    rows, length = reader.num_rows or 0, STREAMED_RUN if isinstance(reader.source.rows, ParquetRows) else 1
    if rows <= most:
        return [(0, rows)]
    starts = range(0, rows, length)
    return [(first, min(first + length, rows)) for first in sorted(drawn.sample(starts, max(2, most // length)))]


def _totals(ready: list[Aligned]) -> tuple[int, int, int]:
    lengths = [len(one.input_ids) for one in ready]
    extracted = sum(len(one.positions) for one in ready)
    return sum(lengths), extracted, sum(length * (length + 1) // 2 for length in lengths)


def _estimate(rows: np.ndarray, totals: np.ndarray, share: float | None) -> Estimate:
    """The mean per row from the totals of runs drawn without replacement; ``share`` is the share of all rows drawn."""
    mean = totals.sum() / rows.sum()
    if share is None or share >= 1:
        return Estimate(float(mean), None if share is None else 0.0)
    count, residuals = len(rows), totals - mean * rows
    variance = (1 - share) * count / (count - 1) * np.square(residuals).sum()
    return Estimate(float(mean), math.sqrt(variance) / rows.sum())
