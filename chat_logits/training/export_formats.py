"""One conversation's targets as the columns that a trainer reads, with one format for each trainer.

The columns that these trainers expect log-probabilities in hold log-weights: a position's weights total 1, so
renormalising them changes nothing, and the draws represent the tail without bias.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from chat_logits.training.examples import IGNORED
from chat_logits.training.targets import Targets

# The log-weight of an absent entry: finite in 16 bits, and its exp is 0 in float32.
ABSENT = -1e4

INTS, BYTES = pa.list_(pa.int32()), pa.list_(pa.int8())
INT_ROWS, FLOAT_ROWS, BYTE_ROWS = pa.list_(INTS), pa.list_(pa.list_(pa.float32())), pa.list_(BYTES)
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


@dataclass(frozen=True)
class Example:
    """A conversation: ``input_ids`` (T,) int64, its ``targets``, and its stored ``messages``."""

    input_ids: np.ndarray
    targets: Targets
    messages: list[dict]


class Size(NamedTuple):
    """The shape of all conversations in a format with one shape: tokens, and entries a position."""

    tokens: int
    entries: int


@dataclass(frozen=True)
class Format:
    """The columns, and the function that makes a row of them from a conversation."""

    schema: pa.Schema
    encode: Callable[[Example, Size], dict[str, pa.Array]]
    has_one_shape: bool = False


def encoded(kind: Format, example: Example, size: Size) -> pa.RecordBatch:
    """A batch of one row."""
    columns = kind.encode(example, size)
    return pa.RecordBatch.from_arrays([columns[name] for name in kind.schema.names], schema=kind.schema)


# --- the formats ---


def _plain(example: Example, _size: Size) -> dict[str, pa.Array]:
    targets = example.targets
    lengths = np.full(len(targets.positions), targets.token_ids.shape[1])
    return {
        "input_ids": _list(example.input_ids, pa.int32()),
        "labels": _list(labels_of(example), pa.int32()),
        "positions": _list(targets.positions, pa.int32()),
        "ids": _lists(targets.token_ids.ravel(), lengths, pa.int32()),
        "weights": _lists(targets.weights.ravel(), lengths, pa.float32()),
    }


def _axolotl(example: Example, _size: Size) -> dict[str, pa.Array]:
    """Row t of the three target columns is compared with the hidden state of token t, so it predicts token t + 1."""
    entries = merged(example.targets)
    lengths = np.zeros(len(example.input_ids), np.int64)
    lengths[example.targets.positions - 1] = entries.counts
    return {
        "input_ids": _list(example.input_ids, pa.int32()),
        "labels": _list(labels_of(example), pa.int32()),
        "attention_mask": _list(np.ones(len(example.input_ids)), pa.int8()),
        "target_token_ids": _lists(entries.token_ids, lengths, pa.int32()),
        "target_logprobs": _lists(entries.log_weights, lengths, pa.float32()),
        "target_mask": _lists(np.ones(len(entries.token_ids)), lengths, pa.int8()),
    }


def _distillkit(example: Example, size: Size) -> dict[str, pa.Array]:
    """Row t predicts token t + 1, and counts if ``labels[t]`` is 0 or more; all conversations have one shape.

    A row without a target has all its weight on id 0, so that its total is 1 and multiplying by the mask's 0 gives no
    NaN.
    """
    entries, rows = merged(example.targets), example.targets.positions - 1
    token_ids = np.zeros((size.tokens, size.entries), np.int32)
    log_weights = np.full(token_ids.shape, ABSENT, np.float32)
    log_weights[:, 0] = 0
    log_weights[rows, 0] = ABSENT
    first = np.cumsum(entries.counts) - entries.counts
    places = np.repeat(rows, entries.counts), np.arange(len(entries.token_ids)) - np.repeat(first, entries.counts)
    token_ids[places], log_weights[places] = entries.token_ids, entries.log_weights
    input_ids, labels = np.zeros(size.tokens, np.int32), np.full(size.tokens, IGNORED, np.int32)
    input_ids[: len(example.input_ids)] = example.input_ids
    labels[rows] = example.input_ids[rows]
    lengths = np.full(size.tokens, size.entries)
    return {
        "input_ids": _list(input_ids, pa.int32()),
        "labels": _list(labels, pa.int32()),
        "token_ids": _lists(token_ids.ravel(), lengths, pa.int32()),
        "top_values": _lists(log_weights.ravel(), lengths, pa.float32()),
    }


def _trl(example: Example, _size: Size) -> dict[str, pa.Array]:
    labels = labels_of(example)
    messages = [{"role": message["role"], "content": message["content"]} for message in example.messages]
    return {
        "messages": pa.array([messages], MESSAGES),
        "input_ids": _list(example.input_ids, pa.int32()),
        "labels": _list(labels, pa.int32()),
        "completion_mask": _list(labels != IGNORED, pa.int8()),
    }


TARGET_COLUMNS = {"target_token_ids": INT_ROWS, "target_logprobs": FLOAT_ROWS, "target_mask": BYTE_ROWS}
FORMATS = {
    "plain": Format(
        pa.schema({"input_ids": INTS, "labels": INTS, "positions": INTS, "ids": INT_ROWS, "weights": FLOAT_ROWS}),
        _plain,
    ),
    "axolotl": Format(
        pa.schema({"input_ids": INTS, "labels": INTS, "attention_mask": BYTES, **TARGET_COLUMNS}), _axolotl
    ),
    "distillkit": Format(
        pa.schema({"input_ids": INTS, "labels": INTS, "token_ids": INT_ROWS, "top_values": FLOAT_ROWS}),
        _distillkit,
        has_one_shape=True,
    ),
    "trl": Format(pa.schema({"messages": MESSAGES, "input_ids": INTS, "labels": INTS, "completion_mask": BYTES}), _trl),
}


# --- shared by the formats ---


def labels_of(example: Example) -> np.ndarray:
    """The input ids of taught tokens, else ``IGNORED``; (T,)."""
    labels = np.full(len(example.input_ids), IGNORED)
    labels[example.targets.positions] = example.input_ids[example.targets.positions]
    return labels


class Merged(NamedTuple):
    """The present entries of n positions, one position after another: ``token_ids`` int32 and ``log_weights`` float32,
    nats, largest first within a position; ``counts`` (n,) is how many entries each position has."""

    token_ids: np.ndarray
    log_weights: np.ndarray
    counts: np.ndarray


def merged(targets: Targets) -> Merged:
    """Add up the weights of the same id at a position: trainers that renormalise a student over the given ids, or take
    logarithms of the stored weights, would treat a repeated id as two tokens."""
    rows, columns = np.nonzero(targets.weights)
    ids, weights = targets.token_ids[rows, columns], targets.weights[rows, columns].astype(np.float64)
    order = np.lexsort((ids, rows))
    rows, ids, weights = rows[order], ids[order], weights[order]
    is_first = np.r_[True, (np.diff(rows) != 0) | (np.diff(ids) != 0)][: len(rows)]
    starts = np.flatnonzero(is_first)
    rows, ids = rows[starts], ids[starts]
    weights = np.add.reduceat(weights, starts) if len(starts) else weights
    order = np.lexsort((-weights, rows))
    counts = np.bincount(rows, minlength=len(targets.positions))
    return Merged(ids[order], np.log(weights[order]).astype(np.float32), counts)


def _list(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    """One row with a list of numbers."""
    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), pa.array(values).cast(kind))


def _lists(values: np.ndarray, lengths: np.ndarray, kind: pa.DataType) -> pa.Array:
    """One row with a list of lists of numbers, which are concatenated in ``values``."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    inner = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values).cast(kind))
    return pa.ListArray.from_arrays(pa.array([0, len(lengths)], pa.int32()), inner)
