"""Reference forward passes, with which everything else is compared: one conversation alone, all its logits at once.

If those would be too many, ``Outputs`` gives them piece by piece.
In a group of processes, the logits are joined directly after the lm_head, so that what a model does to them afterwards
applies to the whole vocabulary. ``rows_of_whole_layers`` computes without a plan, for a model that no process holds in
full: each process joins a layer's weights when it needs them.
"""

import copy
import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import nn

from chat_logits.model.devices import input_device
from chat_logits.model.group import group_of, in_step, whole
from chat_logits.model.head import head_inputs
from chat_logits.model.parts import join_logits


class Outputs:
    """A conversation's logits at all of its tokens, with no more than ``most`` rows (V,) in memory at once.

    A conversation ``input_ids`` (T,) of at most that many tokens goes through the model as it is. For a longer one, the
    inputs of the lm_head (T, H) are kept on the last layer's device; their rows then go through the lm_head and what
    follows it, in place of the hidden state of a dummy token. Not for models that a group of processes computes.
    """

    @torch.inference_mode()
    def __init__(self, model, input_ids: np.ndarray, most: int):
        self._model, self._device = model, input_device(model)
        ids = torch.from_numpy(input_ids)[None].to(self._device)
        self._hidden: torch.Tensor | None = None
        if len(input_ids) <= most:
            self._logits = model(ids, use_cache=False).logits[0].float().cpu()
            return
        with head_inputs(model, self._keep):
            model(ids, use_cache=False)

    def _keep(self, hidden: torch.Tensor) -> torch.Tensor:
        self._hidden = hidden[0]
        return hidden[:, :1]

    @torch.inference_mode()
    def rows(self, at: np.ndarray) -> torch.Tensor:
        """Logits (n, V) float32 on the host, for the outputs ``at`` (n,), at most ``most`` of them."""
        if self._hidden is None:
            return self._logits[torch.from_numpy(at)]
        hidden = self._hidden[torch.from_numpy(at).to(self._hidden.device)]
        with head_inputs(self._model, lambda _dummy: hidden[None]):
            dummy = torch.zeros(1, 1, dtype=torch.long, device=self._device)
            return self._model(dummy, use_cache=False).logits[0].float().cpu()


@in_step
@torch.inference_mode()
def plain_rows(model, input_ids: np.ndarray, sequence: int, positions: np.ndarray) -> torch.Tensor:
    """Logits (n, V) float32 that predict the ``positions`` (n,) of one ``sequence`` in a batch ``input_ids`` (B, T)."""
    with _joined_head(model):
        return _rows(model, input_ids, sequence, positions)


@in_step
@torch.inference_mode()
def nudged_rows(model, input_ids: np.ndarray, sequence: int, positions: np.ndarray, seed: int) -> torch.Tensor:
    """As ``plain_rows``, but with each entry of the embeddings one rounding larger or smaller, by a random sign.

    Embedding outputs that are not a single tensor are left as they are.
    """
    random, step = torch.Generator().manual_seed(seed), torch.finfo(model.dtype).eps

    def nudge(_module, _args, embedded):
        if not isinstance(embedded, torch.Tensor):
            return None
        signs = torch.randint(0, 2, embedded.shape, generator=random) * 2 - 1
        return embedded * (1 + step * signs).to(embedded)

    handle = model.get_input_embeddings().register_forward_hook(nudge)
    try:
        with _joined_head(model):
            return _rows(model, input_ids, sequence, positions)
    finally:
        handle.remove()


@in_step
@torch.inference_mode()
def rows_of_whole_layers(model, input_ids: np.ndarray, sequence: int, positions: np.ndarray) -> torch.Tensor:
    """As ``plain_rows``, with layers that are not split; embedding and lm_head are the model's own."""
    with _joined_head(model), _whole_layers(model) as other:
        return _rows(other, input_ids, sequence, positions)


def _rows(model, input_ids: np.ndarray, sequence: int, positions: np.ndarray) -> torch.Tensor:
    inputs = torch.from_numpy(input_ids).to(input_device(model))
    return model(inputs, use_cache=False).logits[sequence, positions - 1].float()


@contextmanager
def _joined_head(model) -> Iterator[None]:
    """Within, the lm_head gives all of its logits in every process."""
    part, group = getattr(model, "head_part", None), group_of(model)
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _module, _args, logits: join_logits(logits, part, group))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _whole_layers(model) -> Iterator[Any]:
    """The same model without a plan; each layer has its weights only while it computes."""
    with torch.device("meta"):
        other = type(model)(copy.deepcopy(model.config)).eval()
    other.set_input_embeddings(model.get_input_embeddings())
    other.set_output_embeddings(model.get_output_embeddings())
    own = dict(model.named_modules())
    for name, module in other.named_modules():
        module._buffers.update(own[name]._buffers)
    names = {module: name for name, module in other.named_modules()}
    kept = {*other.get_input_embeddings().modules(), *other.get_output_embeddings().modules()}
    for unit, filled in _units(other, kept):
        unit.register_forward_pre_hook(lambda _module, _args, filled=filled: _fill(filled, own, names))
        unit.register_forward_hook(lambda _module, _args, _output, filled=filled: _empty(filled))
    yield other


def _units(model: nn.Module, kept: set[nn.Module]) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Modules, each with those that need weights while it computes: all of a layer, or one module outside layers."""
    inside = set(kept)
    for module in model.modules():
        if module in inside:
            continue
        if isinstance(module, nn.ModuleList):
            for layer in module:
                inside.update(layer.modules())
                yield layer, list(layer.modules())
        elif module._parameters:
            yield module, [module]


def _fill(modules: list[nn.Module], own: dict[str, nn.Module], names: dict[nn.Module, str]) -> None:
    for module in modules:
        for name, weights in own[names[module]]._parameters.items():
            module._parameters[name] = None if weights is None else nn.Parameter(whole(weights), requires_grad=False)


def _empty(modules: list[nn.Module]) -> None:
    for module in modules:
        for name, weights in module._parameters.items():
            module._parameters[name] = None if weights is None else nn.Parameter(weights.to("meta"), False)
    with suppress(OSError, AttributeError):  # else glibc keeps the freed memory of the layers, in pieces
        ctypes.CDLL(None).malloc_trim(0)
