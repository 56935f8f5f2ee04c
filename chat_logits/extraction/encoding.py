"""Distributions to the rows of a shard, and these to its file: in the calling thread, or in processes of their own.

Encoding is many short steps of NumPy. In threads each would take the interpreter's lock from the thread that launches
the model's kernels, which then takes nearly twice as long (``benchmarks/bench_host.py``).
"""

import operator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

import logit_codec
from chat_logits.data.reader import Aligned
from chat_logits.helpers import Helpers
from chat_logits.storage.shard import Rows, ShardAround, TableRows, table_bytes, table_from, table_of
from chat_logits.storage.shard_list import ShardEntry
from logit_codec import Distributions


class Encoded(NamedTuple):
    """A batch's stored rows, as ``Encoding.rows`` takes them, and the ``bad`` source rows: of logits not finite."""

    rows: Any
    bad: list[int]


class Encoding(Protocol):
    """Where batches are encoded, and shards written, from any thread."""

    def encode(self, members: list[Aligned], distributions: Distributions) -> Encoded:
        """The stored rows of a batch."""

    def rows(self, encoded: list[Encoded]) -> Rows:
        """Those of a shard's batches, to be written."""

    def close(self) -> None:
        """End, whatever is under way."""


def start_encoding(processes: int) -> Encoding:
    """Encode in so many processes; in the calling thread where it is one."""
    return EncodeProcesses(processes) if processes > 1 else EncodeHere()


class EncodeHere:
    """In the thread that asks for it."""

    def encode(self, members: list[Aligned], distributions: Distributions) -> Encoded:
        return encode_batch(members, distributions)

    def rows(self, encoded: list[Encoded]) -> Rows:
        return TableRows(table_from(_in_order([batch.rows for batch in encoded])))

    def close(self) -> None:
        pass


class EncodeProcesses:
    """In processes, each of which may get any batch and any shard; in this one rows are bytes, uint8 arrays."""

    def __init__(self, processes: int):
        self.helpers = Helpers(processes, "encodes and writes", operator.call)

    def encode(self, members: list[Aligned], distributions: Distributions) -> Encoded:
        return self.helpers.ask(_encode_there, members, distributions)

    def rows(self, encoded: list[Encoded]) -> Rows:
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
    return TableRows(table_of(batches)).write(file, shard)


def _in_order(batches: list[list[dict]]) -> list[dict]:
    return sorted((row for batch in batches for row in batch), key=lambda row: row["source_index"])


def encode_batch(members: list[Aligned], distributions: Distributions) -> Encoded:
    """The stored rows of a batch, one a conversation whose logits were finite."""
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
