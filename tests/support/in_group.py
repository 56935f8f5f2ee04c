"""What tests have each process of a group do: tell its memory, at its peak, which Linux alone counts; and fail."""

from pathlib import Path

import torch
import torch.distributed as dist

from chat_logits.model.group import Group, group_of, in_step, local


@in_step
def begin(group: Group) -> list[int]:
    """Bytes that each process has; its peak is counted from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return _of_all(group, "VmRSS")


@in_step
def peaks(group: Group) -> list[int]:
    """Bytes that each process has had at most since ``begin``."""
    return _of_all(group, "VmHWM")


def _of_all(group: Group, name: str) -> list[int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    own = next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
    found: list[int] = [0] * group.size
    dist.all_gather_object(found, own, group=group.process_group)
    return found


@in_step
def leave_out_a_sum(model) -> None:
    """From here on, of a layer's last product each process has its own part alone, as under a wrong plan."""
    last = model.model.layers[-1].mlp.down_proj
    last.forward = lambda hidden: torch.nn.functional.linear(hidden, local(last.weight))


@in_step
def fail_everywhere(_model) -> None:
    raise RuntimeError("not here either")


@in_step
def run_out_of_memory_in_another(model) -> None:
    """In the second process; the others wait for it in a sum."""
    group = group_of(model)
    assert group
    if group.rank == 1:
        raise RuntimeError("out of memory: tried to allocate 80 GiB")
    dist.all_reduce(torch.zeros(1), group=group.process_group)
