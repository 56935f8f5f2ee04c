"""How far a student is from the teacher, by stored distributions alone."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from chat_logits.training.loss import PositionScores
from chat_logits.training.student import StudentLoss, split_batch


@dataclass(frozen=True)
class HeldOut:
    """Over ``positions`` of ``conversations``: mean forward KL, nats, unbiased over the draws, and its standard error,
    from the conversations' sums, since positions of one are alike (nan for a single one); ``kl_tail`` is the part of
    the mean that the draws from the tail add, Σ w·(log p − log q) over them; ``agreement`` is the share of positions
    where the student's most probable token is the teacher's."""

    conversations: int
    positions: int
    kl: float
    error: float
    kl_tail: float
    agreement: float


@torch.no_grad()
def held_out(student: torch.nn.Module, batches: Iterable[Mapping[str, Any]]) -> HeldOut:
    """The student's distance over batches of this package's collators, whose tensors go to its device."""
    loss, was_training = StudentLoss(student), student.training
    student.eval()
    sums = torch.cat([_sums(loss, student, batch) for batch in batches])
    student.train(was_training)
    counts, divergences, tails, agreeing = sums.T
    n, positions, kl = len(sums), counts.sum(), divergences.sum() / counts.sum()
    # The ratio estimator's: Cochran, "Sampling Techniques", 6.3
    spread = (divergences - kl * counts).square().sum() * n / (n - 1 or torch.nan)
    error, tail, agreement = (total / positions for total in (spread.sqrt(), tails.sum(), agreeing.sum()))
    return HeldOut(n, int(positions), kl.item(), error.item(), tail.item(), agreement.item())


def _sums(loss: StudentLoss, student: torch.nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """Of each conversation of a batch, float64: the sums of ``BatchTarget.divergences``."""
    device = student.get_output_embeddings().weight.device
    batch = {name: part.to(device) for name, part in batch.items() if torch.is_tensor(part)}
    arguments, target = split_batch(batch)
    scores = PositionScores.empty(target.num_sampled)
    loss(student, arguments, target, scores)
    values = target.divergences(scores).cpu().double()
    _, numbers = _conversations(batch)[target.rows].cpu().unique(return_inverse=True)
    return values.new_zeros(int(numbers.max()) + 1, 4).index_add_(0, numbers, values)


def _conversations(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Which conversation of a batch each of its places belongs to, int64 (B·T,): a row's, or, of packed ones, that
    whose positions begin there or before."""
    ids = batch["input_ids"]
    if "position_ids" in batch:
        return (batch["position_ids"] == 0).flatten().cumsum(0)
    return torch.arange(len(ids), device=ids.device).repeat_interleave(ids.shape[1])
