"""A student's distance from the targets of its batches; those of held-out batches are the teacher's distributions."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from chat_logits.training.distance import Distance, DistanceSums
from chat_logits.training.student import StudentLoss, split_batch


@torch.no_grad()
def held_out(student: torch.nn.Module, batches: Iterable[Mapping[str, Any]]) -> Distance:
    """The student's distance over batches of this package's collators, which are moved to its device."""
    loss, was_training = StudentLoss(student), student.training
    student.eval()
    sums = DistanceSums()
    try:
        for batch in batches:
            for of_conversation in _sums(loss, student, batch).numpy():
                sums.add(of_conversation)
    finally:
        student.train(was_training)
    return sums.distance()


def _sums(loss: StudentLoss, student: torch.nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """The sums of ``BatchTarget.divergences`` for each conversation of a batch, float64."""
    values = loss.divergences(student, batch)
    _, target = split_batch(batch)
    _, numbers = _conversations(batch)[target.rows].unique(return_inverse=True)
    return values.new_zeros(int(numbers.max()) + 1, 4).index_add_(0, numbers, values)


def _conversations(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The conversation that each place of a batch belongs to, int64 (B·T,): its row or, if packed, the last one that
    begins there or before."""
    ids = batch["input_ids"]
    if "position_ids" in batch:
        return (batch["position_ids"] == 0).flatten().cumsum(0)
    return torch.arange(len(ids), device=ids.device).repeat_interleave(ids.shape[1])
