"""The model's side: from token ids and positions to the logits that predict the extracted tokens, and the selection.

Only the hidden states that predict an extracted token reach the lm_head. A pre-hook on the model's own output embedding
selects them, so that whatever the model does to its logits afterwards is done to these.
"""

import copy
import functools
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from chat_logits.model.devices import input_device
from chat_logits.model.group import group_of, in_step
from chat_logits.model.head import head_inputs
from chat_logits.model.parts import HeadPart, join_logits
from chat_logits.model.selection import PendingDistributions, SelectionSettings, select
from chat_logits.model.selection_parts import select_in_parts

LENGTH_DEPENDENT = ("longrope", "dynamic")  # kinds of rotary embeddings with frequencies that depend on the length
# PyTorch's own kernels: cuDNN needs about 50 ms to plan for each new batch shape, and every batch has a new one.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
NOT_HERE = cast(PendingDistributions, None)  # the distributions in processes other than the first


@dataclass(frozen=True)
class Request:
    """One conversation: ``input_ids`` (T,), extracted ``positions`` (n,), ``uniforms`` (n,) in [0, 1)."""

    input_ids: np.ndarray
    positions: np.ndarray
    uniforms: np.ndarray

    def with_ids(self, input_ids: np.ndarray) -> "Request":
        """The same request for another conversation."""
        return Request(input_ids, self.positions, self.uniforms)

    @property
    def read_ids(self) -> np.ndarray:
        """The tokens that the model has to read: up to the one that predicts the last extracted token."""
        return self.input_ids[: self.positions[-1]]


def length_switch(config) -> int | None:
    """The length above which rotary frequencies depend on the longest conversation of a batch; None if they never do.

    Shorter and longer conversations must not share a batch or a cache, and each must be read whole.
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
    """Runs a model: rows of logits in pieces of bounded size, and the cache of a shared prefix.

    ``logit_rows`` limits the rows of logits at once. With ``reads_whole``, conversations are read to their ends, which
    matters if logits depend on a batch's length.

    If a group of processes computes the model, each process has a teacher, and their calls are in step. Only the first
    process' teacher returns distributions; from the others' logits it gets only what is needed for that.
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
        """How the other processes identify this teacher, and the state that its calls depend on."""
        return (
            self._number,
            Teacher,
            (self.logit_rows,),
            {"logit_rows": self.logit_rows, "reads_whole": self.reads_whole},
        )

    @in_step
    @torch.inference_mode()
    def hold_prefix(self, ids: np.ndarray) -> None:
        """Compute the key-value cache of a prefix that the next batches share; an empty prefix clears it."""
        self._prefix_ids, self._prefix_cache = ids, None
        if len(ids):
            inputs = torch.from_numpy(ids)[None].to(self.device)
            with self._head_inputs(lambda hidden: hidden[:, -1:]):
                outputs = self.model(input_ids=inputs, use_cache=True)
            self._prefix_cache = outputs["cache" if "cache" in outputs else "past_key_values"]

    def holds_plain_cache(self, kinds: tuple[type, ...]) -> bool:
        """Whether each layer of the prefix's cache is of one of these types."""
        return all(type(layer) in kinds for layer in self._prefix_cache.layers)

    @in_step
    def distributions(self, requests: list[Request], settings: SelectionSettings) -> PendingDistributions:
        """The model's distributions at every extracted position of the requests, one request after another.

        All requests begin with the prefix that is held, and none of its tokens predicts an extracted one.
        """
        device = self.device if _has_float64(self.device) else "cpu"  # totals need float64
        tokens = _upload(torch.from_numpy(np.concatenate([r.input_ids[r.positions] for r in requests])), device)
        uniforms = _upload(torch.from_numpy(np.concatenate([r.uniforms for r in requests])), device)
        pieces: list[Any] = []
        start, group = 0, self.computing_group
        for logits in self._pieces(requests):
            logits = logits.to(device)
            part = slice(start, start + len(logits))
            pieces.append(self._select(logits, tokens[part], uniforms[part], settings))
            del logits  # else it would stay in memory together with the next piece
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

        Every process of a group gets those of the whole vocabulary.
        """
        pieces = self._pieces(requests)
        return [join_logits(piece, self._head_part, self.computing_group) for piece in pieces]

    def _pieces(self, requests: list[Request]) -> Iterator[torch.Tensor]:
        """As ``row_logits``, for this process' part of the vocabulary.

        If there are more than ``logit_rows`` rows, their hidden states are kept, and go through the lm_head and what
        follows it in pieces, in place of a dummy token's; the decoder does not run again for them.
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
        """The model's logits for the hidden states that ``pick`` returns. Pads on the right, so that positions count up
        from the start."""
        shared = len(self._prefix_ids)
        read = [request.input_ids if self.reads_whole else request.read_ids for request in requests]
        lengths = [len(ids) - shared for ids in read]
        ids = torch.zeros(len(requests), max(lengths), dtype=torch.long)
        for row, sequence in zip(ids, read, strict=True):
            row[: len(sequence) - shared] = torch.from_numpy(sequence[shared:])
        # No attention mask is needed: causality already hides all later tokens, and so the padding.
        inputs = {"input_ids": _upload(ids, self.device), "use_cache": bool(shared)}
        if shared:
            inputs[self._cache_name] = copy.deepcopy(self._prefix_cache)
            inputs[self._cache_name].batch_repeat_interleave(len(requests))
        with self._head_inputs(pick), nothing_packed():
            return self.model(**inputs).logits

    @torch.inference_mode()
    def _dummy_forward(self, rows: torch.Tensor) -> torch.Tensor:
        with self._head_inputs(lambda _hidden: rows.unsqueeze(0)), nothing_packed():
            return self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device), use_cache=False).logits

    @contextmanager
    def _head_inputs(self, pick) -> Iterator[None]:
        """As ``head_inputs``, with the attention kernels that are chosen for CUDA."""
        with head_inputs(self.model, pick), sdpa_kernel(ATTENTION) if self.device.type == "cuda" else nullcontext():
            yield


class _Thread(threading.local):
    packs = True  # whether a row of a model's inputs may hold several texts one after another


_thread = _Thread()


@contextmanager
def nothing_packed() -> Iterator[None]:
    """Within, in this thread, transformers does not look for rows with several texts: the host would wait for a GPU."""
    _patch_packed_search()
    _thread.packs = False
    try:
        yield
    finally:
        _thread.packs = True


@functools.cache
def _patch_packed_search() -> None:
    from transformers import masking_utils

    find = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda ids: find(ids) if _thread.packs else None


def _has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64: Apple's and some of Intel's do not."""
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).has_fp64
    return device.type != "mps"


def _upload(tensor: torch.Tensor, device) -> torch.Tensor:
    """The tensor on the device; the copy to a GPU is asynchronous."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
