"""Processes that compute one model together, each with a part of it, on a device of its own.

The first process leads. When it calls a function marked ``in_step``, all processes make the same call with the same
arguments: token ids and other small values. Tensors are exchanged by torch.distributed, within those functions.
"""

import os
import pickle
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from chat_logits.errors import UsageError

Args = ParamSpec("Args")
Made = TypeVar("Made")
LONGEST = timedelta(hours=2)  # the longest that a process waits for another within a call
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
LOOPBACK = {"linux": "lo", "darwin": "lo0"}  # the network interface for processes on one machine
GROUP, MODEL = ("group",), ("model",)  # the object of a call; other objects have an ``owner`` attribute for it
HOLDS_GROUP = "computing_group"  # the attribute of a model that is computed in parts


class Others(Protocol):
    """How the first process reaches the others."""

    def tell(self, number: int, message: bytes) -> None:
        """Have them make this call. Raises ToolkitError if one of them has ended."""

    def agree_on_failure(self, number: int, error: Exception) -> None:
        """Return if that call has failed in all of them. Raises ToolkitError, with the reason, if the group is lost."""

    def has_returned(self) -> None:
        """Note that the last call is over in the first process."""


@dataclass
class Group:
    """One of ``size`` processes; only the first one, with ``rank`` 0, has ``others``."""

    rank: int
    size: int
    device: torch.device
    others: Others | None = None
    model: Any = None
    _calls: int = 0
    _failed: int = 0  # the last call that failed here; in the first process, the last that failed in all
    _mirrored: int = 0
    _gone: list[int] = field(default_factory=list)
    _mirrors: dict[int, Any] = field(default_factory=dict)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def process_group(self) -> Any:
        """The group as torch.distributed knows it."""
        return dist.group.WORLD

    def join(self, meeting: Path) -> None:
        """Meet the other processes at a file that does not exist yet."""
        if sys.platform in LOOPBACK:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK[sys.platform])
        if self.device.type != "cpu":
            torch.accelerator.set_device_index(self.rank)
        dist.init_process_group(
            BACKENDS[self.device.type],
            store=dist.FileStore(str(meeting), self.size),
            rank=self.rank,
            world_size=self.size,
            timeout=LONGEST,
        )

    @staticmethod
    def leave() -> None:
        """End this process' part, without waiting for processes that are gone."""
        if dist.is_initialized() and dist.get_backend() == BACKENDS["cpu"]:
            dist.destroy_process_group()
        elif dist.is_initialized():
            dist.distributed_c10d._abort_process_group()

    def mirror(self, owner: Any) -> int:
        """A number for an object with a counterpart in every process; the others drop theirs when it is gone here."""
        if not self.leads:
            return 0
        self._mirrored += 1
        weakref.finalize(owner, self._gone.append, self._mirrored)
        return self._mirrored

    @contextmanager
    def calling(self, function: Callable, owner: tuple, args: tuple, named: dict) -> Iterator[None]:
        """Within, the others make this call; from ``owner``, ``_subject`` finds the object to which it belongs."""
        assert self.others is not None
        self._calls += 1
        gone = [self._gone.pop() for _ in range(len(self._gone))]
        self.others.tell(self._calls, pickle.dumps((self._calls, self._failed, gone, function, owner, args, named)))
        try:
            yield
        except Exception as error:
            self.others.agree_on_failure(self._calls, error)
            self._failed = self._calls
            raise
        finally:
            self.others.has_returned()

    def follow(self, messages: Iterable[bytes], report: Callable[[int, Exception], None]) -> None:
        """Make the calls that the first process sends, and ``report(number, error)`` those that fail.

        After a call that failed here but not in all processes, no more calls are made: a collective still pending on
        the first process' device could be matched with the next call's data.
        """
        for message in messages:
            number, failed, gone, function, owner, args, named = pickle.loads(message)
            if failed < self._failed:
                continue
            try:
                for each in gone:
                    self._mirrors.pop(each, None)
                function(self._subject(owner), *args, **named)
            except Exception as error:
                self._failed = number
                report(number, error)

    def _subject(self, owner: tuple) -> Any:
        """The group, its model, or the counterpart of a numbered object, created if needed."""
        if owner in (GROUP, MODEL):
            return self if owner == GROUP else self.model
        number, make, given, state = owner
        if number not in self._mirrors:
            self._mirrors[number] = make(self.model, *given)
        vars(self._mirrors[number]).update(state)
        return self._mirrors[number]


def group_of(subject: Any) -> Group | None:
    """The group that computes a model; None for a model that this process computes alone."""
    return subject if isinstance(subject, Group) else getattr(subject, HOLDS_GROUP, None)


def in_step(function: Callable[Args, Made]) -> Callable[Args, Made]:
    """Decorate a function of a model or of a group, so that the first process' call of it is made in all processes.

    For a method, the object has an ``owner``, as ``Group.calling`` takes it. Such functions do not call one another.
    """

    @wraps(function)
    def call(*args: Args.args, **named: Args.kwargs) -> Made:
        group = group_of(args[0])
        if group is None or not group.leads:
            return function(*args, **named)
        owner = GROUP if group is args[0] else getattr(args[0], "owner", MODEL)
        with group.calling(call, owner, args[1:], named):
            return function(*args, **named)

    return call


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a parameter that this process holds: all of it if it is not split."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a parameter, joined from all processes' parts; every process has to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def refuse_too_many(size: int, device: torch.device) -> None:
    """Raise UsageError if the machine has fewer devices of this kind than the processes that are asked for."""
    there = torch.accelerator.current_accelerator(check_available=True)
    if device.type not in BACKENDS:
        raise UsageError(f"`tensor_parallel` {size}: not on {device.type}. Expected CUDA devices, or `device` cpu.")
    if device.type == "cpu":
        if there is not None:
            raise UsageError(
                f"`tensor_parallel` {size}: `device` cpu is for machines without {there.type}; here its devices "
                "would be taken. Hide them, with CUDA_VISIBLE_DEVICES= before the command."
            )
        return
    if size > (count := torch.accelerator.device_count()):
        raise UsageError(f"`tensor_parallel` {size}: expected no more than there are {device.type} devices, {count}")
