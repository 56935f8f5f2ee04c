"""Encodes distributions as rows of a shard and writes its file: in the calling thread, or in separate processes.

Encoding consists of many short NumPy steps. In threads, each would take the interpreter's lock from the thread that
launches the model's kernels, which would then take nearly twice as long (``benchmarks/bench_host.py``).
"""

import operator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

import logit_codec
from chat_logits.data.reader import Aligned
from chat_logits.helpers import Helpers
from chat_logits.storage.shard import ArrowRows, ShardAround, ShardRows, table_bytes, table_from, table_of
from chat_logits.storage.shard_list import ShardEntry
from logit_codec import Distributions


class Encoded(NamedTuple):
    """A batch's stored rows, as ``Encoding.rows`` takes them, and the ``bad`` source rows: those with logits that are
    not finite."""

    rows: Any
    bad: list[int]


class Encoding(Protocol):
    """Encodes batches and writes shards; may be called from any thread."""

    def encode(self, members: list[Aligned], distributions: Distributions) -> Encoded:
        """The stored rows of a batch."""

    def rows(self, encoded: list[Encoded]) -> ShardRows:
        """The rows of a shard's batches, to be written."""

    def close(self) -> None:
        """End, even in the middle of a task."""


def start_encoding(processes: int) -> Encoding:
    """Encode in so many processes; in the calling thread if ``processes`` is 1."""
    return EncodeProcesses(processes) if processes > 1 else EncodeHere()


class EncodeHere:
    """Encodes in the calling thread."""

    def encode(self, members: list[Aligned], distributions: Distributions) -> Encoded:
        return encode_batch(members, distributions)

    def rows(self, encoded: list[Encoded]) -> ShardRows:
        return ArrowRows(table_from(_in_order([batch.rows for batch in encoded])))

    def close(self) -> None:
        pass


class EncodeProcesses:
    """Encodes in other processes, each of which may get any batch and any shard; here, rows are bytes, uint8 arrays."""

    def __init__(self, processes: int):
        self.helpers = Helpers(processes, "encodes and writes", operator.call)

    def encode(self, members: list[Aligned], distributions: Distributions) -> Encoded:
        return self.helpers.ask(_encode_there, members, distributions)

    def rows(self, encoded: list[Encoded]) -> ShardRows:
        return _RowsElsewhere(self.helpers, [batch.rows for batch in encoded])

    def close(self) -> None:
        self.helpers.close()


class _RowsElsewhere(NamedTuple):
    helpers: Helpers
    batches: list[np.ndarray]

    @property
    def num_bytes(self) -> int:
        return sum(map(len, self.batches))

    def write(self, file: Path, shard: ShardAround) -> ShardEntry:
        return self.helpers.ask(_write_there, self.batches, file.absolute(), shard)


def _encode_there(members: list[Aligned], distributions: Distributions) -> Encoded:
    rows, bad = encode_batch(members, distributions)
    return Encoded(table_bytes(rows), bad)


def _write_there(batches: list[np.ndarray], file: Path, shard: ShardAround) -> ShardEntry:
    return ArrowRows(table_of(batches)).write(file, shard)


def _in_order(batches: list[list[dict]]) -> list[dict]:
    return sorted((row for batch in batches for row in batch), key=lambda row: row["source_index"])


def encode_batch(members: list[Aligned], distributions: Distributions) -> Encoded:
    """The stored rows of a batch, one for each conversation with finite logits."""
    lengths = [len(aligned.positions) for aligned in members]
    target_ids = np.concatenate([aligned.input_ids[aligned.positions] for aligned in members])
    rows, bad = [], []
    encoded = logit_codec.encode_rows(distributions, lengths, target_ids)
    for aligned, columns in zip(members, encoded, strict=True):
        if np.isfinite(columns["logsumexp"]).all():
            rows.append({**columns, **_of_conversation(aligned)})
        else:
            bad.append(aligned.source_index)
    return Encoded(rows, bad)


def _of_conversation(aligned: Aligned) -> dict:
    return {
        "messages": aligned.messages,
        "source_index": aligned.source_index,
        "alignment_checksum": aligned.alignment.checksum,
        "tools": aligned.tools,
    }
