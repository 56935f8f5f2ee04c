"""How far a student is from what its batches teach; of held-out ones, that is the teacher's stored distributions."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from chat_logits.training.distance import Distance, DistanceSums
from chat_logits.training.student import StudentLoss, split_batch


@torch.no_grad()
def held_out(student: torch.nn.Module, batches: Iterable[Mapping[str, Any]]) -> Distance:
    """The student's distance over batches of this package's collators, whose tensors go to its device."""
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
    """Of each conversation of a batch, float64: the sums of ``BatchTarget.divergences``."""
    values = loss.divergences(student, batch)
    _, target = split_batch(batch)
    _, numbers = _conversations(batch)[target.rows].unique(return_inverse=True)
    return values.new_zeros(int(numbers.max()) + 1, 4).index_add_(0, numbers, values)


def _conversations(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Which conversation of a batch each of its places belongs to, int64 (B·T,): a row's, or, of packed ones, that
    whose positions begin there or before."""
    ids = batch["input_ids"]
    if "position_ids" in batch:
        return (batch["position_ids"] == 0).flatten().cumsum(0)
    return torch.arange(len(ids), device=ids.device).repeat_interleave(ids.shape[1])
