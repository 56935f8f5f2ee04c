"""Calls that fail in some processes of a group, which have this module from PYTHONPATH."""

from pathlib import Path

import torch
import torch.distributed as dist

from chat_logits.model.group import Group, in_step


@in_step
def fail_in(group: Group, ranks: tuple[int, ...], text: str) -> str:
    if group.rank in ranks:
        raise RuntimeError(text)
    return "done"


@in_step
def note_in(group: Group, folder: Path) -> None:
    """Write a file named by the process."""
    (folder / str(group.rank)).touch()


@in_step
def fail_a_sum_apart(group: Group) -> None:
    """In all processes; the second one has begun a sum by then, for which it does not wait, as with a GPU."""
    if group.rank == 1:
        dist.all_reduce(torch.zeros(1), group=group.process_group, async_op=True)
    raise RuntimeError("out of memory")
