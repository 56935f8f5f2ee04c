"""The model's side: token ids and positions to the logits that predict the extracted tokens, and what is selected.

Only the rows of the hidden state that predict an extracted token meet the lm_head, by a pre-hook on the model's own
output embedding, so that whatever the model does to its logits afterwards is done to these.
"""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from chat_logits.model.group import group_of, in_step
from chat_logits.model.head import head_inputs
from chat_logits.model.loading import input_device
from chat_logits.model.parts import HeadPart, join_logits
from chat_logits.model.selection import PendingDistributions, SelectionSettings, select
from chat_logits.model.selection_parts import select_in_parts

LENGTH_DEPENDENT = ("longrope", "dynamic")  # rotary embeddings whose frequencies depend on the batch's longest
# PyTorch's own kernels: cuDNN's make a plan, in about 50 ms, for every shape of a batch, and each batch has its own.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
NOT_HERE = cast(PendingDistributions, None)  # distributions in processes that follow
WITHOUT_FLOAT64 = ("mps",)  # where totals cannot be kept; their logits are selected from on the CPU


@dataclass(frozen=True)
class Request:
    """One conversation: ``input_ids`` (T,), extracted ``positions`` (n,), ``uniforms`` (n,) in [0, 1)."""

    input_ids: np.ndarray
    positions: np.ndarray
    uniforms: np.ndarray

    def with_ids(self, input_ids: np.ndarray) -> "Request":
        """The same positions of another conversation."""
        return Request(input_ids, self.positions, self.uniforms)

    @property
    def read_ids(self) -> np.ndarray:
        """The tokens the model has to read: up to the one that predicts the last extracted one, and no further."""
        return self.input_ids[: self.positions[-1]]


def length_switch(config) -> int | None:
    """The length from which rotary frequencies follow the longest conversation of a batch, or None where they never do.

    Conversations on both sides of it must not share a batch or a cache, nor may one be read in part.
    """
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    kinds = [parameters] if "rope_type" in parameters else [kind for kind in parameters.values() if kind]
    limits = [
        kind.get("original_max_position_embeddings")
        or getattr(text, "original_max_position_embeddings", None)
        or text.max_position_embeddings
        for kind in kinds
        if kind.get("rope_type") in LENGTH_DEPENDENT
    ]
    return min(limits, default=None)


class Teacher:
    """A model as it is run: its rows in pieces of bounded size, and a shared prefix's cache.

    ``logit_rows`` bounds the rows of logits at once. With ``reads_whole`` conversations are read to their ends, which
    matters where logits depend on a batch's length.

    Of a model that a group of processes computes, each process has its teacher, whose calls are in step. That of the
    first alone gives distributions; of the others' logits it gets no more than is kept.
    """

    def __init__(self, model, logit_rows: int):
        self.model, self.logit_rows, self.device = model, logit_rows, input_device(model)
        self.computing_group = group_of(model)
        self._head_part: HeadPart | None = getattr(model, "head_part", None)
        self._number = self.computing_group.mirror(self) if self.computing_group else None
        self._prefix_ids = np.zeros(0, np.int64)
        self._prefix_cache: Any = None  # transformers', if there is one
        self.length_switch = length_switch(model.config)
        self.reads_whole = self.length_switch is not None
        takes_cache = "cache" in inspect.signature(model.forward).parameters  # transformers is renaming it
        self._cache_name = "cache" if takes_cache else "past_key_values"

    @property
    def owner(self) -> tuple:
        """By what the other processes know this teacher, and what its calls depend on."""
        return (
            self._number,
            Teacher,
            (self.logit_rows,),
            {"logit_rows": self.logit_rows, "reads_whole": self.reads_whole},
        )

    @in_step
    @torch.inference_mode()
    def hold_prefix(self, ids: np.ndarray) -> None:
        """Compute the key-value cache of a prefix that the next batches share; an empty one clears it."""
        self._prefix_ids, self._prefix_cache = ids, None
        if len(ids):
            inputs = torch.from_numpy(ids)[None].to(self.device)
            with self._head_inputs(lambda hidden: hidden[:, -1:]):
                outputs = self.model(input_ids=inputs, use_cache=True)
            self._prefix_cache = outputs["cache" if "cache" in outputs else "past_key_values"]

    def holds_plain_cache(self, kinds: tuple[type, ...]) -> bool:
        """Whether every layer of the prefix's cache is of one of these kinds."""
        return all(type(layer) in kinds for layer in self._prefix_cache.layers)

    @in_step
    def distributions(self, requests: list[Request], settings: SelectionSettings) -> PendingDistributions:
        """What the model says at every extracted position of the requests, one after another.

        All requests begin with the prefix that is held, and none of its tokens predicts an extracted one.
        """
        device = "cpu" if self.device.type in WITHOUT_FLOAT64 else self.device
        tokens = _upload(torch.from_numpy(np.concatenate([r.input_ids[r.positions] for r in requests])), device)
        uniforms = _upload(torch.from_numpy(np.concatenate([r.uniforms for r in requests])), device)
        pieces: list[Any] = []
        start, group = 0, self.computing_group
        for logits in self._pieces(requests):
            logits = logits.to(device)
            part = slice(start, start + len(logits))
            pieces.append(self._select(logits, tokens[part], uniforms[part], settings))
            del logits  # or it would live on beside the next piece's
            start = part.stop
        return PendingDistributions(pieces) if group is None or group.leads else NOT_HERE

    def _select(
        self, logits: torch.Tensor, tokens: torch.Tensor, uniforms: torch.Tensor, settings: SelectionSettings
    ) -> dict[str, torch.Tensor] | None:
        group, part = self.computing_group, self._head_part
        if group and part:
            return select_in_parts(logits, *part, tokens, uniforms, settings, group.process_group)
        return select(logits, tokens, uniforms, settings) if group is None or group.leads else None

    @in_step
    def row_logits(self, requests: list[Request]) -> list[torch.Tensor]:
        """Logits that predict the requests' extracted tokens, in order, at most ``logit_rows`` (n, V) at once.

        In every process of a group, all of the vocabulary's.
        """
        pieces = self._pieces(requests)
        return [join_logits(piece, self._head_part, self.computing_group) for piece in pieces]

    def _pieces(self, requests: list[Request]) -> Iterator[torch.Tensor]:
        """As ``row_logits``, but of what a process has of the vocabulary.

        More rows than that go through the model's own head and tail in pieces, without the decoder again: their
        hidden states are kept, and put in the place of a dummy token's.
        """
        sample = torch.from_numpy(np.repeat(np.arange(len(requests)), [len(r.positions) for r in requests]))
        before = torch.from_numpy(np.concatenate([r.positions for r in requests])) - 1 - len(self._prefix_ids)
        sample, before = _upload(sample, self.device), _upload(before, self.device)

        def pick(hidden):  # the last layer may be on another device than the head
            return hidden[sample.to(hidden.device), before.to(hidden.device)]

        if len(sample) <= self.logit_rows:
            yield self._forward(requests, lambda hidden: pick(hidden).unsqueeze(0))[0]
            return
        kept = []

        def keep(hidden):
            kept.append(pick(hidden))
            return hidden[:1, :1]

        self._forward(requests, keep)
        for rows in kept[0].split(self.logit_rows):
            yield self._dummy_forward(rows)[0]

    @torch.inference_mode()
    def _forward(self, requests: list[Request], pick) -> torch.Tensor:
        """The model's logits for the hidden states that ``pick`` leaves. Pads on the right, so positions count up."""
        shared = len(self._prefix_ids)
        read = [request.input_ids if self.reads_whole else request.read_ids for request in requests]
        lengths = [len(ids) - shared for ids in read]
        ids = torch.zeros(len(requests), max(lengths), dtype=torch.long)
        for row, sequence in zip(ids, read, strict=True):
            row[: len(sequence) - shared] = torch.from_numpy(sequence[shared:])
        # No attention mask: what stands behind a token, padding too, is hidden from it by causality already.
        inputs = {"input_ids": _upload(ids, self.device), "use_cache": bool(shared)}
        if shared:
            inputs[self._cache_name] = copy.deepcopy(self._prefix_cache)
            inputs[self._cache_name].batch_repeat_interleave(len(requests))
        with self._head_inputs(pick):
            return self.model(**inputs).logits

    @torch.inference_mode()
    def _dummy_forward(self, rows: torch.Tensor) -> torch.Tensor:
        with self._head_inputs(lambda _hidden: rows.unsqueeze(0)):
            return self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device), use_cache=False).logits

    @contextmanager
    def _head_inputs(self, pick) -> Iterator[None]:
        """As ``head_inputs``, with the kernels of attention that are chosen for CUDA."""
        with head_inputs(self.model, pick), sdpa_kernel(ATTENTION) if self.device.type == "cuda" else nullcontext():
            yield


def _upload(tensor: torch.Tensor, device) -> torch.Tensor:
    """The tensor on the device; on its way to a GPU nothing waits for it."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
