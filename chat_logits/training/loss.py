"""Forward KL from a teacher's stored distribution to a student, from a few weighted token ids a position.

For the teacher's p, the student's logits z and q = softmax(z), at temperature 1,

    KL(p‖q) = Σ p·log p − Σ p·z + logsumexp(z)·Σ p            (sums over the vocabulary; the last Σ p is 1)

is linear in p except for the first term, which does not depend on the student. So a sparse target w with mean p, as
``targets`` makes it from nucleus and draws, gives a loss and a gradient that are exact on average:

    loss = −entropy − Σ w·z[ids] + logsumexp(z)·Σ w           ∂loss/∂z = q·Σ w − scatter(ids, w)

Sums are always float32; under autocast to bfloat16 the factors of the head's products are rounded to bfloat16.
"""

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from chat_logits.errors import UsageError
from chat_logits.training.head import (
    LogitTransform,
    add_weight_gradient,
    chunk_rows,
    factors,
    gradient_factor,
    hidden_gradient,
    raw_logits,
    weight_and_bias,
)

REDUCTIONS = ("mean", "sum")


def sparse_kd_loss(
    logits: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    entropy: torch.Tensor | None = None,
    *,
    reduction: str = "mean",
    temperature: float = 1.0,
    reverse: bool = False,
) -> torch.Tensor:
    """Forward KL, nats, over n positions, given their logits: a float32 scalar with a gradient for ``logits``.

    ``logits`` (n, V) of any float dtype are the student's final ones; ``ids`` (n, M) of any integer dtype and
    ``weights`` (n, M) are as in ``Targets``; weights of repeated ids add up, entries of weight 0 are ignored. Without
    the teacher's ``entropy`` (n,), nats, the value is the cross-entropy; the gradient is the same. ``reduction`` over
    positions is "mean" or "sum".

    Raises UsageError for an id outside 0 to V - 1, for shapes that do not fit, for a ``temperature`` other than 1, and
    for ``reverse``: neither loss is linear in the target.
    """
    _refuse_other_losses(temperature, reverse)
    _check(logits, SparseTarget(ids, weights), entropy, logits.shape[-1], reduction)
    losses = _cross_entropies(logits.float(), ids.long(), weights.float()).sum()
    return _reduced(losses, entropy, len(logits), reduction)


def fused_sparse_kd_loss(
    hidden: torch.Tensor,
    head: torch.nn.Module | torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    chunk: int | None = None,
    entropy: torch.Tensor | None = None,
    *,
    transform: LogitTransform | None = None,
    scores: "PositionScores | None" = None,
    reduction: str = "mean",
    temperature: float = 1.0,
    reverse: bool = False,
) -> torch.Tensor:
    """``sparse_kd_loss`` without the logits of all positions in memory: the head is applied to ``chunk`` positions at a
    time, by default as many as have 40 MiB of logits on a CPU, and 512 MiB elsewhere.

    ``hidden`` (n, H) are the head's inputs; ``head`` is the student's lm_head (an ``nn.Linear``) or its weight (V, H).
    ``transform`` is what the student does to the head's output (``logit_transform(student)``), by default nothing.
    ``scores``, if given, are filled in for each position. The gradients for ``hidden``, weight and bias are computed in
    the forward pass. Memory is needed for these (the weight's in float32, even if the weight is 16-bit), for a bfloat16
    copy of the weight under autocast, for one chunk's logits, or two with a soft cap, and for half a chunk's if the
    gradient is rounded to bfloat16.

    Raises UsageError as ``sparse_kd_loss`` does, and for a head that is not a plain matrix.
    """
    weight, bias = weight_and_bias(head)
    _refuse_other_losses(temperature, reverse)
    _check(hidden, SparseTarget(ids, weights), entropy, len(weight), reduction)
    chunk = chunk_rows(hidden.device, len(weight)) if chunk is None else chunk
    if hidden.shape[-1] != weight.shape[1] or chunk < 1:
        raise UsageError(
            f"hidden states {tuple(hidden.shape)}, a head {tuple(weight.shape)} and chunk {chunk}: expected (n, H), "
            "(V, H) and 1 or more"
        )
    target = SparseTarget(ids.long(), weights.float())
    with_gradients, transform = torch.is_grad_enabled(), transform or LogitTransform()
    losses = _FusedCrossEntropy.apply(hidden, weight, bias, target, chunk, transform, scores, with_gradients)
    return _reduced(losses, entropy, len(hidden), reduction)


class SparseTarget(NamedTuple):
    """``ids`` int64 and ``weights`` float32, both (n, M)."""

    ids: torch.Tensor
    weights: torch.Tensor


class PositionScores(NamedTuple):
    """A student's scores at n positions; the last ``num_sampled`` (n,) int64 entries of each are draws.

    ``cross_entropy`` (n,) float32, nats, is Σ -w·log q, and ``tail`` (n,) the draws' part of it: minus ``entropy`` and
    ``tail_entropy`` of ``Targets`` they are forward KL and the tail's part of it. ``agrees`` (n,) bool says whether no
    token is more probable than the teacher's most probable one: the nucleus' first, or the target token if only that is
    taught.
    """

    num_sampled: torch.Tensor
    cross_entropy: torch.Tensor
    tail: torch.Tensor
    agrees: torch.Tensor

    @classmethod
    def empty(cls, num_sampled: torch.Tensor) -> "PositionScores":
        """Scores to fill in."""
        values = torch.empty(len(num_sampled), device=num_sampled.device)
        return cls(num_sampled, values, values.clone(), torch.empty_like(num_sampled, dtype=torch.bool))

    def fill(self, rows: slice, logits: "ChunkLogits", weights: torch.Tensor, losses: torch.Tensor) -> None:
        """Set the scores of a chunk, from its ``weights`` (c, M) and cross-entropies ``losses`` (c,)."""
        columns = torch.arange(weights.shape[1], 0, -1, device=weights.device)  # M for the first, 1 for the last
        drawn = weights * (columns <= self.num_sampled[rows, None])
        self.cross_entropy[rows] = losses
        self.tail[rows] = logits.log_total * drawn.sum(dim=1) - (drawn * logits.picked).sum(dim=1)
        has_nucleus = weights[:, 1:2].sum(dim=1) > 0
        first = logits.picked[:, 1:2].sum(dim=1).where(has_nucleus, logits.picked[:, 0])
        self.agrees[rows] = first >= logits.largest


class ChunkLogits(NamedTuple):
    """From a chunk's logits (c, V): those of the target's ids, ``picked`` (c, M), 0 where absent; the ``largest`` (c,);
    and their logsumexp, ``log_total`` (c,)."""

    picked: torch.Tensor
    largest: torch.Tensor
    log_total: torch.Tensor


def _cross_entropies(logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """logsumexp(z)·Σ w − Σ w·z[ids] at each position, float32 (n,), for float32 logits."""
    picked = logits.gather(1, ids).where(weights != 0, 0)  # the logit of an absent entry's id may be infinite
    return logits.logsumexp(dim=1) * weights.sum(dim=1) - (weights * picked).sum(dim=1)


class _FusedCrossEntropy(torch.autograd.Function):
    """The sum of the positions' cross-entropies, a float32 scalar; gradients are computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target: SparseTarget,
        chunk: int,
        transform: LogitTransform,
        scores: PositionScores | None,
        with_gradients: bool,
    ) -> torch.Tensor:
        inputs = (hidden, weight, bias)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        ctx.gradients = [
            torch.zeros_like(tensor, dtype=torch.float32) if with_gradients and is_needed else None
            for tensor, is_needed in zip(inputs, ctx.needs_input_grad, strict=False)
        ]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden, weight = factors(hidden, weight)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), chunk):
                rows = slice(start, start + chunk)
                logits = raw_logits(hidden[rows], weight, bias)
                slopes = transform.apply_(logits)
                weights = target.weights[rows]
                losses, chunk_logits = _to_gradient(logits, target.ids[rows], weights)
                if scores is not None:
                    scores.fill(rows, chunk_logits, weights, losses)
                total += losses.sum()
                if slopes is not None:
                    logits.mul_(slopes)
                _add_gradients(ctx.gradients, logits, rows, hidden, weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("fused_sparse_kd_loss: a second backward pass; its gradients went into the first")
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [
            None if each is None else each.mul_(gradient).to(dtype)
            for each, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None, None)


def _to_gradient(logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, ChunkLogits]:
    """The cross-entropies (c,) of float32 logits (c, V), which are replaced by their gradients: q·Σ w − scatter(w)."""
    picked = logits.gather(1, ids).where(weights != 0, 0)
    mass = weights.sum(dim=1, keepdim=True)
    largest = logits.amax(dim=1, keepdim=True)
    total = logits.sub_(largest).exp_().sum(dim=1, keepdim=True)
    logits.mul_(mass / total).scatter_add_(1, ids, -weights)
    log_total = (largest + total.log())[:, 0]
    losses = log_total * mass[:, 0] - (weights * picked).sum(dim=1)
    return losses, ChunkLogits(picked, largest[:, 0], log_total)


def _add_gradients(
    gradients: list[torch.Tensor | None],
    gradient: torch.Tensor,
    rows: slice,
    hidden: torch.Tensor,
    weight: torch.Tensor,
) -> None:
    """Backpropagate a chunk's gradient, float32 (c, V), to hidden states, weight and bias, and add it there."""
    of_hidden, of_weight, of_bias = gradients
    if of_bias is not None:
        of_bias += gradient.sum(dim=0)
    if of_hidden is of_weight is None:
        return
    gradient = gradient_factor(gradient, hidden, weight)
    if of_hidden is not None:
        of_hidden[rows] = hidden_gradient(gradient, weight)
    if of_weight is not None:
        add_weight_gradient(of_weight, gradient, hidden[rows])


def _reduced(total: torch.Tensor, entropy: torch.Tensor | None, n: int, reduction: str) -> torch.Tensor:
    """The positions' sum minus the teacher's entropies, or the mean."""
    if entropy is not None:
        total = total - entropy.float().sum()
    return total / max(1, n) if reduction == "mean" else total


# --- what is refused ---


def _check(
    rows: torch.Tensor,
    target: SparseTarget,
    entropy: torch.Tensor | None,
    vocab_size: int,
    reduction: str,
) -> None:
    """Raise UsageError for arguments that do not fit ``rows`` (n, …)."""
    ids, weights = target
    shapes = [tuple(rows.shape[:-1]), tuple(ids.shape), tuple(weights.shape)]
    fits = rows.dim() == ids.dim() == 2 and ids.shape == weights.shape and len(ids) == len(rows)
    if not fits or (entropy is not None and entropy.shape != ids.shape[:1]):
        raise UsageError(f"shapes of positions, ids and weights {shapes}: expected (n,), (n, M), (n, M), entropy (n,)")
    least, most = (int(end) for end in ids.aminmax()) if ids.numel() else (0, 0)
    if least < 0 or most >= vocab_size:
        raise UsageError(f"token ids {least} to {most}: expected 0 or more, and less than the {vocab_size} logits")
    if reduction not in REDUCTIONS:
        raise UsageError(f"reduction {reduction!r}: expected one of {', '.join(REDUCTIONS)}")


def _refuse_other_losses(temperature: float, reverse: bool) -> None:
    """Raise UsageError for losses that a sparse target cannot estimate without bias."""
    if temperature != 1:
        raise UsageError(
            f"temperature {temperature}: expected 1. p^(1/T) is not linear in the stored weights: at T = 2 the loss is "
            "117% too large"
        )
    if reverse:
        raise UsageError(
            "reverse: expected forward KL. KL(q‖p) needs log p of every token, which a sparse target does not "
            "have; its estimates deviate by 2.5 times their value"
        )
