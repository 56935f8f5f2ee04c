"""Messages between the processes of a torch.distributed group and its first one: columns of any dtype, as bytes.

Each message is one collective that both gloo and NCCL have. A group of None means all processes, as in
torch.distributed.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


class Messages:
    """Messages to and from the group's first process. ``like`` are tensors of the expected shapes and dtypes."""

    def __init__(self, group: Any):
        self._group = group
        self.size, self.is_first = dist.get_world_size(group), dist.get_rank(group) == 0

    def gather(self, *columns: torch.Tensor) -> list[torch.Tensor]:
        """In the first process, each column of all processes, stacked: (N, …). In the others, an empty list."""
        message = _joined(columns)
        messages = [torch.empty_like(message) for _ in range(self.size)] if self.is_first else None
        dist.gather(message, messages, group=self._group, group_dst=0)
        if messages is None:
            return []
        return [torch.stack(column) for column in zip(*(_split(each, columns) for each in messages), strict=True)]

    def broadcast(self, columns: Sequence[torch.Tensor] | None, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The first process' columns, in all processes."""
        message = _joined(columns or like)
        dist.broadcast(message, group=self._group, group_src=0)
        return _split(message, like)

    def scatter(self, columns: Sequence[torch.Tensor] | None, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Give each process its own slice of the first process' columns (N, …)."""
        message = torch.empty_like(_joined(like))
        messages = [_joined(own) for own in zip(*columns, strict=True)] if columns else None
        dist.scatter(message, messages, group=self._group, group_src=0)
        return _split(message, like)

    def gather_some(
        self, entries: torch.Tensor, chosen: torch.Tensor, places: torch.Tensor | None, absent: int
    ) -> torch.Tensor | None:
        """Gather from each process only the int64 entries that are ``chosen`` (bool, same shape).

        The first process gets (N, …): the entries in order at its ``places`` (bool), and ``absent`` elsewhere. This
        synchronizes with the host, which has to know how many there are.
        """
        own = entries[chosen]
        sizes = [0] * self.size if places is None else places.flatten(1).sum(dim=1).tolist()
        found = own.new_empty(sum(sizes))
        dist.all_to_all_single(found, own, sizes, [len(own)] + [0] * (self.size - 1), group=self._group)
        if places is None:
            return None
        return torch.full_like(places, absent, dtype=torch.int64).masked_scatter_(places, found)


def _joined(columns: Sequence[torch.Tensor]) -> torch.Tensor:
    # Cloned, as a tensor of one element may have any stride, and only a stride of 1 can be viewed as bytes.
    flat = [column.reshape(-1).clone(memory_format=torch.contiguous_format) for column in columns]
    return torch.cat([column.view(torch.uint8) for column in flat])


def _split(message: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    pieces = message.split([column.numel() * column.element_size() for column in like])
    # Each piece is copied, because the numbers of a dtype have to begin at multiples of its width.
    return [piece.clone().view(column.dtype).view(column.shape) for piece, column in zip(pieces, like, strict=True)]
