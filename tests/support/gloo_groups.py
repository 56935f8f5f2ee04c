"""Processes that select from their parts of the logits, started once, in groups on gloo; what they send is counted.

They are forks of the server of ``lives``, so none of them has to import torch.
"""

import datetime
import itertools
import math
import os
import pickle
from pathlib import Path

import torch
import torch.distributed as dist
from lives import SERVER

from chat_logits.errors import ToolkitError
from chat_logits.model.selection import PendingDistributions, SelectionSettings
from chat_logits.model.selection_parts import select_in_parts

PROCESSES = 4
GROUPS = {2: [0, 1], 3: [0, 1, 2], 4: [0, 1, 2, 3], "without the first": [1, 3]}  # by name, the processes' ranks
UNCOUNTED = ("all_gather", "all_gather_into_tensor", "all_reduce", "reduce", "reduce_scatter", "send", "recv")
UNCOUNTED += ("isend", "irecv", "all_to_all", "all_gather_object", "broadcast_object_list", "batch_isend_irecv")


class GlooGroups:
    """Groups of processes that answer; leaving the context ends them."""

    def __init__(self, folder: Path):
        self._folder = folder

    def __enter__(self) -> "GlooGroups":
        self._pipes, self._processes = [], []
        for rank in range(PROCESSES):
            ours, theirs = SERVER.Pipe()
            process = SERVER.Process(target=_answer, args=(rank, self._folder / "store", theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(60)

    def select(self, group, logits, widths, tokens, uniforms, settings: SelectionSettings, vocabulary=None):
        """Logits (R, V) cut at ``widths``: the first process' distributions, and the bytes that each has sent.

        Where processes refuse, in the distributions' place what each has said.
        """
        parts, firsts = logits.split(widths, dim=1), [0, *itertools.accumulate(widths)]
        told = (sum(widths) if vocabulary is None else vocabulary, tokens, uniforms, settings)
        return self.ask(group, [(part, first, *told) for part, first in zip(parts, firsts, strict=False)])

    def ask(self, group, calls: list[tuple]):
        """As ``select``, with each process' own arguments of ``select_in_parts``, up to the group."""
        for rank, call in zip(GROUPS[group], calls, strict=True):
            self._pipes[rank].send(pickle.dumps((group, call)))  # tensors as bytes; a pipe would have them shared
        answers = [self._pipes[rank].recv() for rank in GROUPS[group]]
        results, sent = [result for result, _ in answers], [number for _, number in answers]
        if any(isinstance(result, str) for result in results):
            return results, sent
        assert results[1:] == [None] * (len(results) - 1)
        return results[0], sent


def even_widths(vocabulary: int, parts: int) -> list[int]:
    """As matrices are split: all of one width but the last, and, where that does not do, those before it."""
    width = math.ceil(vocabulary / parts)
    return [min(width, max(0, vocabulary - width * part)) for part in range(parts)]


def _answer(rank: int, store: Path, pipe) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES, timeout=limit)
    groups = {name: dist.new_group(ranks, use_local_synchronization=False) for name, ranks in GROUPS.items()}
    sent = _count_what_is_sent()
    for asked in iter(pipe.recv, None):
        name, call = pickle.loads(asked)
        sent.clear()
        try:
            found = select_in_parts(*call, groups[name])
            found = PendingDistributions([found]).wait() if found is not None else None
        except ToolkitError as error:
            found = str(error)
        pipe.send((found, sum(sent)))
    os._exit(0)


def _count_what_is_sent() -> list[int]:
    """The list to which every collective adds the bytes that this process sends to others."""
    sent: list[int] = []

    def counted(name: str, count):
        plain = getattr(dist, name)

        def call(*arguments, group, **options):
            others = dist.get_world_size(group) - 1
            sent.append(count(dist.get_rank(group) == 0, others, *arguments))
            return plain(*arguments, group=group, **options)

        setattr(dist, name, call)

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("what this collective sends is not counted")

    counted("gather", lambda is_first, _others, message, _messages: 0 if is_first else message.nbytes)
    counted("broadcast", lambda is_first, others, message: message.nbytes * others * is_first)
    counted(
        "scatter", lambda is_first, _others, _message, messages: sum(m.nbytes for m in messages[1:]) if is_first else 0
    )
    counted("all_to_all_single", _count_all_to_all)
    for name in UNCOUNTED:
        setattr(dist, name, refused)
    return sent


def _count_all_to_all(is_first: bool, _others: int, _found, own: torch.Tensor, _sizes, own_sizes: list[int]) -> int:
    return sum(own_sizes[1:] if is_first else own_sizes) * own.element_size()
