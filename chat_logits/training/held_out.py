"""How far a student is from the teacher, by stored distributions alone."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from chat_logits.training.loss import PositionScores
from chat_logits.training.student import BatchTarget, StudentLoss, split_batch


@dataclass(frozen=True)
class HeldOut:
    """Over ``positions`` of ``conversations``: mean forward KL, nats, unbiased over the draws, and its standard error,
    from the conversations' sums, since positions of one are alike (nan for a single one); ``agreement`` is the share of
    positions where the student's most probable token is the teacher's."""

    conversations: int
    positions: int
    kl: float
    error: float
    agreement: float


@torch.no_grad()
def held_out(student: torch.nn.Module, batches: Iterable[Mapping[str, Any]]) -> HeldOut:
    """The student's distance over batches of this package's collators, whose tensors go to its device."""
    loss, was_training = StudentLoss(student), student.training
    student.eval()
    sums = torch.cat([_sums(loss, student, batch) for batch in batches])
    student.train(was_training)
    counts, divergences, agreeing = sums.T
    n, positions, kl = len(sums), counts.sum(), divergences.sum() / counts.sum()
    # The ratio estimator's: Cochran, "Sampling Techniques", 6.3
    spread = (divergences - kl * counts).square().sum() * n / (n - 1 or torch.nan)
    return HeldOut(
        n, int(positions), kl.item(), (spread.sqrt() / positions).item(), (agreeing.sum() / positions).item()
    )


def _sums(loss: StudentLoss, student: torch.nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """Of each conversation of a batch: positions, forward KL, and where the most probable tokens agree; float64."""
    device = student.get_output_embeddings().weight.device
    batch = {name: part.to(device) for name, part in batch.items() if torch.is_tensor(part)}
    arguments, target = split_batch(batch)
    scores = PositionScores.empty(len(target.rows), device)
    loss(student, arguments, target, scores)
    divergences = scores.cross_entropy - target.entropy
    values = torch.stack([torch.ones_like(divergences), divergences, scores.best_ids == best_ids(target)], 1).double()
    _, numbers = _conversations(batch)[target.rows].unique(return_inverse=True)
    return values.new_zeros(int(numbers.max()) + 1, 3).index_add_(0, numbers, values).cpu()


def _conversations(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Which conversation of a batch each of its places belongs to, int64 (B·T,): a row's, or, of packed ones, that
    whose positions begin there or before."""
    ids = batch["input_ids"]
    if "position_ids" in batch:
        return (batch["position_ids"] == 0).flatten().cumsum(0)
    return torch.arange(len(ids), device=ids.device).repeat_interleave(ids.shape[1])


def best_ids(target: BatchTarget) -> torch.Tensor:
    """The teacher's most probable tokens, int64 (N,): the nucleus' first, or the target where that alone is taught."""
    has_nucleus = target.weights[:, 1] > 0
    return target.ids[:, 1].where(has_nucleus, target.ids[:, 0]).long()
