"""Forward KL from a teacher's stored distribution to a student, from a few weighted token ids a position.

With the teacher's p, the student's logits z and q = softmax(z), at temperature 1,

    KL(p‖q) = Σ p·log p − Σ p·z + logsumexp(z)·Σ p            (sums over the vocabulary; the last Σ p is 1)

is linear in p but for its first term, which the student does not change. So a sparse target w whose mean is p, as
``targets`` makes it of nucleus and draws, gives loss and gradient whose means are the exact ones:

    loss = −entropy − Σ w·z[ids] + logsumexp(z)·Σ w           ∂loss/∂z = q·Σ w − scatter(ids, w)

Sums are float32 whatever the inputs are; under autocast to bfloat16 what the head's products multiply is rounded to it.
"""

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from chat_logits.errors import UsageError
from chat_logits.training.head import (
    LogitTail,
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
    """Forward KL, nats, of n positions whose logits are at hand: a float32 scalar with a gradient for ``logits``.

    ``logits`` (n, V) of any float dtype, after all that the student does to them; ``ids`` (n, M) of any integer dtype
    and ``weights`` (n, M) are ``Targets``'; repeated ids add up, entries of weight 0 do nothing. Without the teacher's
    ``entropy`` (n,), nats, the value is the cross-entropy, and the gradient the same. ``reduction`` is over positions:
    their "mean" or "sum".

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
    tail: LogitTail | None = None,
    scores: "PositionScores | None" = None,
    reduction: str = "mean",
    temperature: float = 1.0,
    reverse: bool = False,
) -> torch.Tensor:
    """``sparse_kd_loss`` without the logits of all positions: ``chunk`` positions meet the head at once, by default as
    many as have 40 MiB of logits on a CPU, and 512 MiB elsewhere.

    ``hidden`` (n, H) are the head's own inputs; ``head`` is the student's lm_head (an ``nn.Linear``) or its weight
    (V, H). ``tail`` is what the student does to its logits afterwards (``logit_tail(student)``), None for nothing.
    ``scores`` are filled with what the chunks' logits say of each position. The gradients for ``hidden``, weight and
    bias are computed on the way forward: beyond them, a float32 copy of the weight's where it is 16-bit, and a bfloat16
    copy of the weight under autocast, memory is that of one chunk's logits, or of two's with a soft cap, and of half a
    chunk's where the gradient is rounded to bfloat16.

    Raises UsageError as ``sparse_kd_loss``, and for a head that is no plain matrix.
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
    with_gradients, tail = torch.is_grad_enabled(), tail or LogitTail()
    losses = _FusedCrossEntropy.apply(hidden, weight, bias, target, chunk, tail, scores, with_gradients)
    return _reduced(losses, entropy, len(hidden), reduction)


class SparseTarget(NamedTuple):
    """``ids`` int64 and ``weights`` float32, both (n, M)."""

    ids: torch.Tensor
    weights: torch.Tensor


class PositionScores(NamedTuple):
    """What a student says at n positions, whose last ``num_sampled`` (n,) int64 entries are draws.

    ``cross_entropy`` (n,) float32, nats, is Σ -w·log q, and ``tail`` (n,) what the draws are of it: forward KL and the
    tail's part of it once ``entropy`` and ``tail_entropy`` of ``Targets`` are taken off. ``agrees`` (n,) bool says
    whether no token is more probable than the teacher's most probable one: the nucleus' first, or the target token
    where that alone is taught.
    """

    num_sampled: torch.Tensor
    cross_entropy: torch.Tensor
    tail: torch.Tensor
    agrees: torch.Tensor

    @classmethod
    def empty(cls, num_sampled: torch.Tensor) -> "PositionScores":
        """Those to be filled."""
        values = torch.empty(len(num_sampled), device=num_sampled.device)
        return cls(num_sampled, values, values.clone(), torch.empty_like(num_sampled, dtype=torch.bool))

    def fill(self, rows: slice, logits: "ChunkLogits", weights: torch.Tensor, losses: torch.Tensor) -> None:
        """Set those of a chunk, from its cross-entropies (c,) and the ``weights`` (c, M)."""
        columns = torch.arange(weights.shape[1], 0, -1, device=weights.device)  # M for the first, 1 for the last
        drawn = weights * (columns <= self.num_sampled[rows, None])
        self.cross_entropy[rows] = losses
        self.tail[rows] = logits.log_total * drawn.sum(dim=1) - (drawn * logits.picked).sum(dim=1)
        has_nucleus = weights[:, 1:2].sum(dim=1) > 0
        first = logits.picked[:, 1:2].sum(dim=1).where(has_nucleus, logits.picked[:, 0])
        self.agrees[rows] = first >= logits.largest


class ChunkLogits(NamedTuple):
    """Of the logits (c, V) of a chunk: those of the target's ids ``picked`` (c, M), 0 where absent; the ``largest``
    (c,), and their logsumexp, ``log_total`` (c,)."""

    picked: torch.Tensor
    largest: torch.Tensor
    log_total: torch.Tensor


def _cross_entropies(logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """logsumexp(z)·Σ w − Σ w·z[ids] at each position, float32 (n,), of float32 logits."""
    picked = logits.gather(1, ids).where(weights != 0, 0)  # the logit of an absent entry's id may be infinite
    return logits.logsumexp(dim=1) * weights.sum(dim=1) - (weights * picked).sum(dim=1)


class _FusedCrossEntropy(torch.autograd.Function):
    """The sum of the positions' cross-entropies, a float32 scalar, with its gradients computed on the way forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target: SparseTarget,
        chunk: int,
        tail: LogitTail,
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
                slopes = tail.apply_(logits)
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
    """The cross-entropies (c,) of float32 logits (c, V), which become their gradients in place: q·Σ w − scatter(w)."""
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
    """Add what a chunk's gradient for the head's output, float32 (c, V), means for hidden states, weight and bias."""
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
    """The positions' sum less the teacher's entropies, or the mean of these."""
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
    """Raise UsageError for what does not fit ``rows`` (n, …)."""
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
    """Raise UsageError for losses of which a sparse target gives no unbiased estimate."""
    if temperature != 1:
        raise UsageError(
            f"temperature {temperature}: expected 1. p^(1/T) is not linear in the stored weights: at T = 2 the loss is "
            "117% too large"
        )
    if reverse:
        raise UsageError(
            "reverse: expected forward KL. KL(q‖p) needs log p of every token, which a sparse target has not; its "
            "estimates deviate by 2.5 times their value"
        )
