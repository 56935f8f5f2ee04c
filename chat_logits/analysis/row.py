"""A stored row as numbers per token: probabilities, ranks, entropies. Needs only NumPy."""

from dataclasses import dataclass

import numpy as np

from logit_codec import CODE_PROBS, numbers_of_rows, position_entropies, row_entries


@dataclass(frozen=True)
class TokenStatistics:
    """The numbers of a stored row's n extracted tokens, in nats; float64 (n,) unless said otherwise.

    ``log_probs`` are the target tokens'; ``ranks`` int64 their places in the nucleus from 1, or 0 if they are not among
    the ``kept`` (int64) entries; ``tail_mass`` is the probability outside the nucleus. Without draws
    ``entropy_is_bound``: the ``entropies`` are lower bounds. ``top_ids`` int32 and ``top_probs`` (n, K) are the nucleus
    in rank order, with absent entries last at probability 0.
    """

    log_probs: np.ndarray
    ranks: np.ndarray
    kept: np.ndarray
    tail_mass: np.ndarray
    entropies: np.ndarray
    top_ids: np.ndarray
    top_probs: np.ndarray
    entropy_is_bound: bool = False

    @property
    def of_row(self) -> dict[str, float]:
        """The row's ``mean_nll``, ``mean_entropy``, ``top1_rate`` and ``max_surprisal``, as in its columns."""
        numbers = numbers_of_rows(self.entropies, self.ranks == 1, self.log_probs, [len(self.log_probs)])
        return {name: value for name, (value,) in numbers.items()}


def token_statistics(row: dict, token_ids: np.ndarray) -> TokenStatistics:
    """The numbers of a stored row with extracted tokens ``token_ids``, int (n,).

    Entropy is FORMAT.md's estimate of an expectation, E[f] with f = −log p: exact for the nucleus, unbiased from the
    draws for the tail. Without draws it is the nucleus' part alone, a lower bound.
    """
    (top_ids, top_codes), (_, sampled_codes) = row_entries(row, "top"), row_entries(row, "sampled")
    present, top_probs = top_codes > 0, CODE_PROBS[top_codes]
    is_target = (top_ids == token_ids[:, None]) & present
    return TokenStatistics(
        log_probs=np.asarray(row["token_log_probs"], np.float64),
        ranks=np.where(is_target.any(axis=1), is_target.argmax(axis=1) + 1, 0),
        kept=present.sum(axis=1),
        tail_mass=np.maximum(0.0, 1.0 - top_probs.sum(axis=1)),
        entropies=position_entropies(top_codes, sampled_codes),
        top_ids=top_ids,
        top_probs=top_probs,
        entropy_is_bound=sampled_codes.shape[1] == 0,
    )


def perplexity_of(mean_nll: float) -> float:
    """e to the power of a mean negative log-likelihood in nats: infinite above 709."""
    with np.errstate(over="ignore"):
        return float(np.exp(mean_nll))
