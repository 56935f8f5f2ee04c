"""A stored row as numbers per token: probabilities, ranks, entropies. NumPy alone."""

from dataclasses import dataclass

import numpy as np

from logit_codec import decode_row


@dataclass(frozen=True)
class RowNumbers:
    """The numbers of a stored row's n extracted tokens, in nats; float64 (n,) unless said otherwise.

    ``log_probs`` are the target tokens'; ``ranks`` int64 their places in the nucleus from 1, or 0 where they are not
    among the ``kept`` (int64) entries; ``tail_mass`` the probability outside the nucleus. Without draws
    ``entropy_is_bound``: the ``entropies`` are lower bounds. ``top_ids`` int32 and ``top_probs`` (n, K) are the nucleus
    in rank order, absent entries last with probability 0.
    """

    log_probs: np.ndarray
    ranks: np.ndarray
    kept: np.ndarray
    tail_mass: np.ndarray
    entropies: np.ndarray
    top_ids: np.ndarray
    top_probs: np.ndarray
    entropy_is_bound: bool = False


def row_numbers(row: dict, token_ids: np.ndarray) -> RowNumbers:
    """The numbers of a stored row whose extracted tokens are ``token_ids``, int (n,).

    Entropy is FORMAT.md's estimate of an expectation, E[f] with f = −log p: the nucleus exactly, the tail by its draws,
    unbiased. Without draws it is the nucleus' part alone, a lower bound.
    """
    decoded = decode_row(row)
    present = np.isfinite(decoded.top_log_probs)
    top_probs = np.exp(decoded.top_log_probs)
    is_target = (decoded.top_ids == token_ids[:, None]) & present
    draws = decoded.sampled_log_probs.shape[1]
    return RowNumbers(
        log_probs=np.asarray(row["token_log_probs"], np.float64),
        ranks=np.where(is_target.any(axis=1), is_target.argmax(axis=1) + 1, 0),
        kept=present.sum(axis=1),
        tail_mass=decoded.tail_mass,
        entropies=_plogp(top_probs, decoded.top_log_probs)
        + decoded.tail_mass / max(1, draws) * _surprise(decoded.sampled_log_probs),
        top_ids=decoded.top_ids,
        top_probs=top_probs,
        entropy_is_bound=draws == 0,
    )


def perplexity_of(mean_nll: float) -> float:
    """e to the power of a mean negative log-likelihood in nats: infinite above 709."""
    with np.errstate(over="ignore"):
        return float(np.exp(mean_nll))


def _plogp(probs: np.ndarray, log_probs: np.ndarray) -> np.ndarray:
    return -(probs * np.where(probs > 0, log_probs, 0)).sum(axis=1)


def _surprise(log_probs: np.ndarray) -> np.ndarray:
    """Sum of −log p over the draws that are present."""
    return -np.where(np.isfinite(log_probs), log_probs, 0).sum(axis=1)
