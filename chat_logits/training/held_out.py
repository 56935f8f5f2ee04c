"""How far a student is from the teacher, by stored distributions alone."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from chat_logits.training.loss import PositionScores
from chat_logits.training.student import BatchTarget, StudentLoss, split_batch


@dataclass(frozen=True)
class HeldOut:
    """Over ``positions``: mean forward KL, nats, unbiased over the draws, and its standard error, from the batches'
    sums, since positions of a conversation are alike (nan for a single batch); ``agreement`` is the share of positions
    where the student's most probable token is the teacher's."""

    positions: int
    kl: float
    error: float
    agreement: float


@torch.no_grad()
def held_out(student: torch.nn.Module, batches: Iterable[Mapping[str, Any]]) -> HeldOut:
    """The student's distance over batches of this package's collators, whose tensors go to its device."""
    loss, was_training = StudentLoss(student), student.training
    student.eval()
    sums = [_sums(loss, student, batch) for batch in batches]
    student.train(was_training)
    counts, divergences, agreeing = torch.tensor(sums, dtype=torch.float64).reshape(-1, 3).T
    positions, kl = counts.sum(), divergences.sum() / counts.sum()
    # The ratio estimator's: Cochran, "Sampling Techniques", 6.3
    spread = (divergences - kl * counts).square().sum() * len(counts) / (len(counts) - 1 or torch.nan)
    return HeldOut(int(positions), kl.item(), (spread.sqrt() / positions).item(), (agreeing.sum() / positions).item())


def _sums(loss: StudentLoss, student: torch.nn.Module, batch: Mapping[str, Any]) -> tuple[int, float, int]:
    """Of a batch: positions, forward KL, and where the most probable tokens agree."""
    device = student.get_output_embeddings().weight.device
    arguments, target = split_batch({name: value.to(device) for name, value in batch.items()})
    scores = PositionScores.empty(len(target.rows), device)
    divergence = loss(student, arguments, target, scores)
    return len(target.rows), divergence.item(), int((scores.best_ids == best_ids(target)).sum())


def best_ids(target: BatchTarget) -> torch.Tensor:
    """The teacher's most probable tokens, int64 (N,): the nucleus' first, or the target where that alone is taught."""
    has_nucleus = target.weights[:, 1] > 0
    return target.ids[:, 1].where(has_nucleus, target.ids[:, 0]).long()
