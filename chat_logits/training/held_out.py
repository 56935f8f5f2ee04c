"""A student's distance from the targets of its batches; those of held-out batches are the teacher's distributions."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from chat_logits.training.distance import Distance, DistanceSums
from chat_logits.training.student import StudentLoss, conversation_sums


@torch.no_grad()
def held_out(student: torch.nn.Module, batches: Iterable[Mapping[str, Any]]) -> Distance:
    """The student's distance over batches of this package's collators, which are moved to its device."""
    loss, was_training = StudentLoss(student), student.training
    student.eval()
    sums = DistanceSums()
    try:
        for batch in batches:
            for of_conversation in conversation_sums(batch, loss.divergences(student, batch)).numpy():
                sums.add(of_conversation)
    finally:
        student.train(was_training)
    return sums.distance()
