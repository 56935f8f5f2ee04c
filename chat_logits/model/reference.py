"""Reference forward passes, against which everything else is held: a conversation alone, all of its logits at once.

Where those would be too many, ``Outputs`` gives them a piece after another.
In a group of processes the logits are put together behind the lm_head itself, so that what a model does to them
afterwards is done to all of the vocabulary. ``rows_of_whole_layers`` computes without a plan, for a model of which no
process has all: each process puts a layer's weights together just when it needs them.
"""

import copy
import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import nn

from chat_logits.model.group import group_of, in_step, whole
from chat_logits.model.head import head_inputs
from chat_logits.model.loading import input_device
from chat_logits.model.parts import join_logits


class Outputs:
    """A conversation's logits at all of its tokens, of which no more than ``most`` rows (V,) are there at once.

    A conversation ``input_ids`` (T,) of no more tokens goes through the model as it is. Of a longer one the hidden
    states that meet the lm_head are kept, (T, H) where the last layer has left them; their rows then go through the
    model's own head and tail in the place of a dummy token's. For models that no group of processes computes.
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
        """Logits (n, V) float32 on the host, of the outputs ``at`` (n,), at most ``most`` of them."""
        if self._hidden is None:
            return self._logits[torch.from_numpy(at)]
        hidden = self._hidden[torch.from_numpy(at).to(self._hidden.device)]
        with head_inputs(self._model, lambda _dummy: hidden[None]):
            dummy = torch.zeros(1, 1, dtype=torch.long, device=self._device)
            return self._model(dummy, use_cache=False).logits[0].float().cpu()


@in_step
@torch.inference_mode()
def plain_rows(model, input_ids: np.ndarray, sequence: int, positions: np.ndarray) -> torch.Tensor:
    """Logits (n, V) float32 that predict the ``positions`` (n,) of a ``sequence`` of the batch ``input_ids`` (B, T)."""
    with _joined_head(model):
        return _rows(model, input_ids, sequence, positions)


@in_step
@torch.inference_mode()
def nudged_rows(model, input_ids: np.ndarray, sequence: int, positions: np.ndarray, seed: int) -> torch.Tensor:
    """As ``plain_rows``, but with each entry of the embeddings one rounding larger or smaller, by a random sign.

    Embeddings that are more than a tensor are left as they are.
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
    """As ``plain_rows``, by layers that are not split; embedding and lm_head are the model's own."""
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
    """The same model without a plan; each of its layers has its weights while it computes, and nothing after."""
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
    """Modules, and which have their weights while those compute: a layer's all, or one that is in no list of layers."""
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
    with suppress(OSError, AttributeError):  # of glibc, which else keeps what is freed of layers, in pieces
        ctypes.CDLL(None).malloc_trim(0)
