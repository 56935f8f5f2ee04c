"""What selection has to find, by the plain reference in ``logit_codec``."""

import numpy as np
import torch

import logit_codec


def exact_log_probs(logits) -> np.ndarray:
    """Float64 log-probabilities (n, V) of logits of any dtype."""
    exact = torch.as_tensor(logits).double()
    return (exact - exact.logsumexp(dim=1, keepdim=True)).numpy()


def assert_is_reference(found: logit_codec.Distributions, logits, uniforms, top_k, top_p, num_sampled, ties=False):
    """Rank by rank the reference's ids, or with ``ties`` ids of its probabilities; its draws; its numbers."""
    exact, elsewhere = exact_log_probs(logits), 0
    for i, log_probs in enumerate(exact):
        kept, ids = logit_codec.select_nucleus(log_probs, top_k, top_p), found.top_ids[i][found.top_ids[i] >= 0]
        if ties:
            np.testing.assert_array_equal(log_probs[ids], log_probs[kept])
            assert len(set(ids)) == len(ids)
        else:
            assert ids.tolist() == kept.tolist()
        np.testing.assert_allclose(found.top_probs[i][: len(ids)], np.exp(log_probs[ids]), rtol=2e-6)
        assert (found.top_probs[i][len(ids) :] == 0).all()
        drawn = logit_codec.draw_tail(np.exp(log_probs), ids, uniforms[i], num_sampled)
        elsewhere += (found.sampled_ids[i] != drawn).sum()
        present = found.sampled_ids[i] >= 0
        right = np.exp(log_probs[found.sampled_ids[i][present]])
        np.testing.assert_allclose(found.sampled_probs[i][present], right, rtol=1e-5)
    assert elsewhere <= 1  # a threshold within float32's last bits of a running total


def draws_elsewhere(found: logit_codec.Distributions, log_probs: np.ndarray, uniforms, num_sampled) -> list[float]:
    """For each draw that is not the reference's, how far its threshold is from the ids drawn, as a share of Z.

    Within rounding of a border between two ids' running totals both are right; ``log_probs`` are (n, V).
    """
    distances = []
    for i, probs in enumerate(np.exp(log_probs)):
        kept = found.top_ids[i][found.top_ids[i] >= 0]
        right = logit_codec.draw_tail(probs, kept, uniforms[i], num_sampled)
        if (found.sampled_ids[i] == right).all():
            continue
        tail = probs[: logit_codec.MAX_TOKEN_ID].copy()
        tail[kept] = 0
        running = np.cumsum(tail)
        for j in np.flatnonzero(found.sampled_ids[i] != right):
            drawn, threshold = found.sampled_ids[i][j], (uniforms[i] + j) / num_sampled * running[-1]
            assert drawn >= 0 and tail[drawn] > 0
            outside = max(running[drawn] - tail[drawn] - threshold, threshold - running[drawn], 0)
            distances.append(outside / running[-1])
    return distances
