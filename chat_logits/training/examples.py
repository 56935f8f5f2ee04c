"""Stored rows to training examples, many at a time: aligned once, decoded whenever they are read.

An aligned row has its token ids and positions in addition to its codes and ids as they are stored. To make an example
of it then takes only arithmetic on whole batches: no tokenizer, no template, and no Python loop over tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from chat_logits.data.alignment import Alignment
from chat_logits.data.row_alignment import AlignmentError, RowAligner
from chat_logits.errors import UsageError
from chat_logits.storage.dataset import StoredDataset
from chat_logits.storage.shard_list import ShardEntry
from chat_logits.training.targets import END_OF_TURN, Targets, weighted_ids, with_ends
from logit_codec import unpack_indices

IGNORED = -100  # the label of a token that is not taught
# Columns of an aligned row: integers, and little-endian arrays as bytes.
INTEGERS = ("row", "source_index", "length", "num_tokens")
TOKENS = ("input_ids", "positions", "turn_ends")  # int32
KINDS = ("top", "sampled")
STORED = tuple(f"{kind}_{name}" for kind in KINDS for name in ("logits_quantized", "indices_low", "indices_high"))


@dataclass(frozen=True)
class AlignedRows:
    """Reads shards of a dataset and aligns their rows."""

    dataset: StoredDataset
    aligner: RowAligner

    def __call__(self, shards: Sequence[ShardEntry]) -> Iterator[dict]:
        """The rows of ``shards`` in order, each as a dict of ``INTEGERS``, ``TOKENS`` and ``STORED``.

        "row" is the row's number in the dataset, "length" the number T of all its tokens; "turn_ends" are the positions
        of the ends of turns that were not extracted. Raises DamagedShard, DamagedRow and AlignmentError, which name the
        row.
        """
        for batch in self.batches(shards):
            yield from batch

    def batches(self, shards: Sequence[ShardEntry]) -> Iterator[list[dict]]:
        """The same rows, one row group at a time."""
        for first, rows in self.dataset.row_groups(shards):
            alignments = self._align(rows, range(first, first + len(rows)))
            yield [
                _aligned_row(number, row, alignment)
                for number, (row, alignment) in enumerate(zip(rows, alignments, strict=True), first)
            ]

    def _align(self, rows: list[dict], numbers: Sequence[int]) -> list[Alignment]:
        try:
            return self.aligner.align_all(rows, numbers)
        except AlignmentError as error:
            raise AlignmentError(f"{self.dataset.dataset_id}: {error}") from error


def _aligned_row(number: int, row: dict, alignment: Alignment) -> dict:
    ends = [i for i in alignment.turn_ends if alignment.reasons[i] is not None]
    tokens = (alignment.input_ids, alignment.positions, ends)
    integers = (number, row["source_index"], len(alignment.input_ids), row["num_tokens"])
    return {
        **dict(zip(INTEGERS, integers, strict=True)),
        **{name: np.asarray(array, "<i4").tobytes() for name, array in zip(TOKENS, tokens, strict=True)},
        **{name: bytes(row[name]) for name in STORED},
    }


@dataclass(frozen=True)
class ExampleMaker:
    """Makes examples of aligned rows. The fields are as in ``row_targets``.

    Raises UsageError for a field out of range.
    """

    hard_weight: float = 0.0
    end_of_turn: str = "hard"
    allow_biased: bool = False

    def __post_init__(self):
        if self.end_of_turn not in END_OF_TURN:
            raise UsageError(f"end_of_turn {self.end_of_turn!r}: expected one of {', '.join(END_OF_TURN)}")

    def refuse(self, top_k: int, num_sampled: int) -> None:
        """Raise UsageError if rows with this many entries a position cannot be taught with these settings."""
        top, sampled = (np.zeros((0, width), np.uint8) for width in (top_k, num_sampled))
        weighted_ids(top, top, sampled, sampled, np.zeros(0, np.int32), self.hard_weight, self.allow_biased)

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        """Examples of aligned rows, both as columns. An example of T tokens, n of them taught, has

        - ``input_ids`` (T,) int64, and ``labels`` (T,) int64, equal to them where a token is taught and -100 elsewhere;
        - ``positions`` (n,) int64 of the taught tokens, each predicted one position earlier;
        - ``target_ids`` (n, M) int32, ``target_weights`` (n, M) float32, ``entropy`` and ``tail_entropy`` (n,) float32,
          nats: the ``token_ids``, ``weights`` and entropies of ``Targets``;
        - ``num_sampled``, how many of the M columns are draws (the last ones);
        - ``source_index``, the source row.

        The arrays are views of one array that all rows of a call share.
        """
        lengths, counts = (np.array(rows[name], np.int64) for name in ("length", "num_tokens"))
        ends_of_rows = np.cumsum(lengths)
        starts = ends_of_rows - lengths
        input_ids = _joined(rows["input_ids"], "<i4").astype(np.int64)
        targets = self._targets(rows, input_ids, starts, counts)
        labels = np.full(len(input_ids), IGNORED, np.int64)
        labels[targets.positions] = input_ids[targets.positions]
        edges = np.searchsorted(targets.positions, ends_of_rows)
        taught = [slice(*pair) for pair in zip([0, *edges[:-1].tolist()], edges.tolist(), strict=True)]
        tokens = [slice(*pair) for pair in zip(starts.tolist(), ends_of_rows.tolist(), strict=True)]
        return {
            "input_ids": [input_ids[part] for part in tokens],
            "labels": [labels[part] for part in tokens],
            "positions": [targets.positions[part] - start for part, start in zip(taught, starts, strict=True)],
            "target_ids": [targets.token_ids[part] for part in taught],
            "target_weights": [targets.weights[part] for part in taught],
            "entropy": [targets.entropy[part] for part in taught],
            "tail_entropy": [targets.tail_entropy[part] for part in taught],
            "num_sampled": [
                len(codes) // max(1, n)
                for codes, n in zip(rows["sampled_logits_quantized"], rows["num_tokens"], strict=True)
            ],
            "source_index": rows["source_index"],
        }

    def _targets(self, rows: dict[str, list], input_ids: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> Targets:
        """The targets of all rows; ``positions`` are in the concatenated ``input_ids``."""
        positions = _joined(rows["positions"], "<i4") + np.repeat(starts, counts)
        top, sampled = (_entries(rows, kind, len(positions)) for kind in KINDS)
        taught = weighted_ids(*top, *sampled, input_ids[positions], self.hard_weight, self.allow_biased)
        targets = Targets(positions, *taught)
        if self.end_of_turn == "skip":
            return targets
        ends_in_rows = [len(data) // 4 for data in rows["turn_ends"]]
        ends = _joined(rows["turn_ends"], "<i4") + np.repeat(starts, ends_in_rows)
        return with_ends(targets, ends, input_ids[ends])


def _joined(values: list[bytes], dtype: str | type) -> np.ndarray:
    return np.frombuffer(b"".join(values), dtype)


def _entries(rows: dict[str, list], kind: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 and ids int32, both (n, K) or (n, S), of rows with n positions in all."""
    codes = _joined(rows[f"{kind}_logits_quantized"], np.uint8).reshape(n, -1)
    low, high = rows[f"{kind}_indices_low"], rows[f"{kind}_indices_high"]
    if all(len(data) % 8 == 0 for data in low):  # whole bytes of high bits, four entries each
        ids = unpack_indices(b"".join(low), b"".join(high))
    else:
        ids = np.concatenate([unpack_indices(*pair) for pair in zip(low, high, strict=True)])
    return codes, ids.reshape(codes.shape)
