"""Stored rows to a student's targets: for each position a few token ids and their weights.

The weights are those of FORMAT.md, "Reading a position": a nucleus entry's weight is its probability, and the draws
share equally the probability outside the nucleus. For any function f of a token id, Σ w·f(id) is then an unbiased
estimate, over the draws, of its mean under the teacher's distribution, except for the rounding of the codes. So a loss
that is linear in the target, such as forward KL, has an unbiased gradient; with a renormalised nucleus it does not.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from chat_logits.data.alignment import Alignment
from chat_logits.errors import ToolkitError, UsageError
from logit_codec import CODE_LOG_PROBS, CODE_PROBS, row_entries

END_OF_TURN = ("hard", "skip")
# By code: log p, and p·log p, in nats, 0 for the absent entry
_LOG_PROBS = np.where(CODE_PROBS > 0, CODE_LOG_PROBS, 0)
_P_LOG_P = CODE_PROBS * _LOG_PROBS


@dataclass(frozen=True)
class Targets:
    """What is taught at n positions of a conversation, in order.

    ``positions`` (n,) int64 are those of the target tokens, each predicted by the logits one position earlier.
    ``token_ids`` (n, M) int32 and ``weights`` (n, M) float32, with M = 1 + K + S columns: the target token, the
    nucleus, the draws. A position's weights total 1; ids may repeat, and their weights add up; absent entries have id 0
    and weight 0. ``entropy`` (n,) float32, nats: the constant that makes a cross-entropy a divergence; ``tail_entropy``
    (n,) float32 is the draws' part of it, Σ -w·log p over the draws alone.

    With hard_weight h, Σ -w·log q(id) is (1 - h) times the cross-entropy of the student's q to the teacher's p, plus h
    times the target token's negative log-likelihood; minus ``entropy``, (1 - h)·H(p), the first part is
    (1 - h)·KL(p‖q). The tail's part of that is what the draws add to it: Σ w·(log p - log q) over the draws, computed
    from ``tail_entropy`` and the student's log q at the same ids. On average over the draws it is
    (1 - h)·Σ p·(log p - log q) over the ids outside the nucleus; a part may be negative, the sum of both is not.
    """

    positions: np.ndarray
    token_ids: np.ndarray
    weights: np.ndarray
    entropy: np.ndarray
    tail_entropy: np.ndarray


class WeightedIds(NamedTuple):
    """``token_ids``, ``weights``, ``entropy`` and ``tail_entropy`` of ``Targets``."""

    token_ids: np.ndarray
    weights: np.ndarray
    entropy: np.ndarray
    tail_entropy: np.ndarray


def row_targets(
    row: dict,
    alignment: Alignment,
    *,
    hard_weight: float = 0.0,
    end_of_turn: str = "hard",
    allow_biased: bool = False,
) -> Targets:
    """The targets of a stored row with its alignment.

    Only the row's ``num_tokens`` and its six columns of ids and codes are read, in whatever form a reader returns them;
    arrays over Arrow's buffers are the fastest.

    ``hard_weight`` (0 to 1) is the target token's own share. Tokens that end a turn and were not extracted are taught
    as certain ("hard": all weight on that token), or not at all ("skip"). Rows without draws are refused, unless
    ``allow_biased``: the weights are then the renormalised nucleus.

    Raises UsageError for an argument out of range and for a row without draws, ToolkitError if the alignment is of
    another row.
    """
    if end_of_turn not in END_OF_TURN:
        raise UsageError(f"end_of_turn {end_of_turn!r}: expected one of {', '.join(END_OF_TURN)}")
    positions = alignment.positions
    if len(positions) != row["num_tokens"]:
        raise ToolkitError(f"{len(positions)} aligned positions for a row of {row['num_tokens']} extracted tokens")
    top_ids, top_codes = row_entries(row, "top")
    sampled_ids, sampled_codes = row_entries(row, "sampled")
    taught = weighted_ids(
        top_codes, top_ids, sampled_codes, sampled_ids, alignment.input_ids[positions], hard_weight, allow_biased
    )
    ends = [i for i in alignment.turn_ends if alignment.reasons[i] is not None] if end_of_turn == "hard" else []
    return with_ends(Targets(positions, *taught), np.array(ends, np.int64), alignment.input_ids[ends])


def weighted_ids(
    top_codes: np.ndarray,
    top_ids: np.ndarray,
    sampled_codes: np.ndarray,
    sampled_ids: np.ndarray,
    target_ids: np.ndarray,
    hard_weight: float = 0.0,
    allow_biased: bool = False,
) -> WeightedIds:
    """Ids and weights from codes uint8 and ids int32, (n, K) of the nucleus and (n, S) of the draws.

    Weights are divided by their total, which differs from 1 if the codes of a nucleus add up to a little more, if there
    was nothing left to draw, and if no draws are stored. Raises as ``row_targets`` does.
    """
    if not 0 <= hard_weight <= 1:
        raise UsageError(f"hard_weight {hard_weight}: expected 0 to 1")
    (n, top_k), num_sampled = top_codes.shape, sampled_codes.shape[1]
    if not num_sampled and not allow_biased:
        raise _no_draws()
    nucleus = CODE_PROBS[top_codes]
    stored = nucleus.sum(axis=1)
    share = np.maximum(0.0, 1.0 - stored) / max(1, num_sampled)
    drawn = sampled_codes != 0
    num_drawn = drawn.sum(axis=1)
    total = stored + share * num_drawn
    if not (total > 0).all():
        raise ToolkitError("a position without any entry, expected at least one of the nucleus")
    scale = (1 - hard_weight) / total
    token_ids = np.empty((n, 1 + top_k + num_sampled), np.int32)
    weights = np.empty(token_ids.shape, np.float32)
    token_ids[:, 0], weights[:, 0] = (target_ids, hard_weight) if hard_weight else (0, 0)
    token_ids[:, 1 : 1 + top_k], token_ids[:, 1 + top_k :] = top_ids, sampled_ids
    weights[:, 1 : 1 + top_k] = nucleus * scale[:, None]
    weights[:, 1 + top_k :] = drawn * (share * scale)[:, None]
    log_total = np.log(total)
    tail = scale * share * (num_drawn * log_total - _LOG_PROBS[sampled_codes].sum(axis=1))
    nucleus_part = scale * (stored * log_total - _P_LOG_P[top_codes].sum(axis=1))
    return WeightedIds(token_ids, weights, (nucleus_part + tail).astype(np.float32), tail.astype(np.float32))


def with_ends(targets: Targets, ends: np.ndarray, end_ids: np.ndarray) -> Targets:
    """The targets with additional tokens that are taught as certain, in order of position: ids ``end_ids`` (e,) at
    ascending positions ``ends`` (e,)."""
    if not len(ends):
        return targets
    one_hot_ids = np.zeros((len(ends), targets.token_ids.shape[1]), np.int32)
    one_hot = np.zeros(one_hot_ids.shape, np.float32)
    one_hot_ids[:, 0], one_hot[:, 0] = end_ids, 1
    places = np.searchsorted(targets.positions, ends)
    return Targets(
        positions=np.insert(targets.positions, places, ends),
        token_ids=np.insert(targets.token_ids, places, one_hot_ids, axis=0),
        weights=np.insert(targets.weights, places, one_hot, axis=0),
        entropy=np.insert(targets.entropy, places, 0),
        tail_entropy=np.insert(targets.tail_entropy, places, 0),
    )


def _no_draws() -> UsageError:
    return UsageError(
        "the dataset has no draws from the tail (`num_sampled` 0), so a student would be taught that the tail is "
        "impossible: at K = 64 its held-out KL ended 0.145 nats above the whole distribution's, against 0.002 with "
        "16 draws. Extract with `num_sampled` 16, or give `allow_biased`."
    )
