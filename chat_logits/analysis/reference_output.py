"""A conversation's reference forward pass, and the parts of it that a stored row is compared with."""

from collections.abc import Iterator

import numpy as np

from logit_codec import MAX_TOKEN_ID, DecodedRow

SHIFTS = (-1, 0, 1)  # the model's output one position earlier, in place, one position later
IN_PLACE = SHIFTS.index(0)
PIECE_BYTES = 2**28  # of float32 logits at once, on the model's device and on the host


def dtype_name(model) -> str:
    """The model's dtype as ``extraction.json`` records it."""
    return str(model.dtype).removeprefix("torch.")


class Output:
    """A conversation's reference forward pass, with one piece of its outputs in memory.

    ``logits`` float32 (m, V) on the host are those of the outputs ``at`` (m,), at first the last piece. ``logsumexp``
    float64 (T,) is over all outputs, and so is ``tolerance``, the difference allowed for a logit, in nats.
    """

    def __init__(self, model, input_ids: np.ndarray, asked: "Asked | None" = None):
        from chat_logits.model.probe import NOTHING, TOLERANCE
        from chat_logits.model.reference import Outputs

        row_bytes = 4 * model.get_output_embeddings().weight.shape[0]
        self._most = max(1, PIECE_BYTES // row_bytes)
        self._outputs = Outputs(model, input_ids, self._most)
        self.logsumexp, largest = np.empty(len(input_ids)), np.empty(len(input_ids))
        for part in self._pieces(np.arange(len(input_ids))):
            self.logsumexp[part], largest[part] = _sums_and_largest(self.logits, NOTHING)
            if asked:
                asked.look_at(self)
        self.tolerance = TOLERANCE[model.dtype] * max(1.0, largest.max().item())

    def _pieces(self, at: np.ndarray) -> Iterator[slice]:
        """Load the outputs ``at`` (n,) piece by piece; yields the slice of ``at`` in each piece."""
        for start in range(0, len(at), self._most):
            part = slice(start, start + self._most)
            self.at, self.logits = at[part], self._outputs.rows(at[part]).numpy()
            yield part

    def storable(self, row: int) -> np.ndarray:
        """Log-probabilities of all storable ids at the ``row``-th output in memory, float64."""
        return self.logits[row, :MAX_TOKEN_ID].astype(np.float64) - self.logsumexp[self.at[row]]

    def each_storable(self, at: np.ndarray) -> Iterator[np.ndarray]:
        """The same for each of the outputs ``at`` (n,)."""
        for _ in self._pieces(at):
            yield from map(self.storable, range(len(self.at)))


def _sums_and_largest(logits: np.ndarray, nothing: float) -> tuple[np.ndarray, np.ndarray]:
    """Each row's logsumexp of logits (m, V), and its largest absolute value except masked logits; float64 (m,)."""
    import torch

    sums, largest = [], []
    for part in torch.from_numpy(logits).split(64):  # rows in float64 at once
        is_mask = part < part.amax(dim=-1, keepdim=True) - nothing
        sums.append(part.double().logsumexp(-1))
        largest.append(part.abs().masked_fill(is_mask, 0).amax(dim=-1).double())
    return torch.cat(sums).numpy(), torch.cat(largest).numpy()


class Asked:
    """What a row needs of its conversation's outputs, collected piece by piece; log-probabilities are float64.

    At each of SHIFTS from the outputs ``before`` (n,), out of ``length`` in all: those of the ``tokens`` (3, n) and of
    the stored nucleus, ``top`` (3, n, K). In place: those of the stored draws, ``sampled`` (n, S), and the largest
    ones, ``best`` (n, K), with ids ``ranked``.
    """

    def __init__(self, stored: DecodedRow, tokens: np.ndarray, before: np.ndarray, length: int):
        self.at = np.clip(before + np.array(SHIFTS)[:, None], 0, length - 1)
        self._ids = np.column_stack([tokens, stored.top_ids, stored.sampled_ids])
        self._log_probs: np.ndarray = np.empty((len(SHIFTS), *self._ids.shape))
        self.tokens = self._log_probs[:, :, 0]
        _, self.top, sampled = np.split(self._log_probs, [1, 1 + stored.top_ids.shape[1]], axis=2)  # all are views
        self.sampled = sampled[IN_PLACE]
        self.best: np.ndarray = np.empty(stored.top_ids.shape)
        self.ranked: np.ndarray = np.empty(stored.top_ids.shape, int)

    def look_at(self, output: Output) -> None:
        """Look up what is needed of the outputs in memory, which are consecutive."""
        rows = self.at - output.at[0]
        is_here = (rows >= 0) & (rows < len(output.at))
        for shift, here in enumerate(map(np.flatnonzero, is_here)):
            logits = output.logits[rows[shift, here, None], self._ids[here]].astype(np.float64)
            self._log_probs[shift, here] = logits - output.logsumexp[self.at[shift, here], None]
        for i in np.flatnonzero(is_here[IN_PLACE]):
            log_probs = output.storable(rows[IN_PLACE, i])
            self.ranked[i] = ranked_ids(log_probs, self.ranked.shape[1])
            self.best[i] = log_probs[self.ranked[i]]


def ranked_ids(log_probs: np.ndarray, top_k: int) -> np.ndarray:
    """The ids of the ``top_k`` largest, in order."""
    ids = np.argpartition(-log_probs, top_k - 1)[:top_k]
    return ids[np.argsort(-log_probs[ids])]
