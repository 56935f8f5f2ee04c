"""How much one forward pass may hold: what a device has, what is taken by default, and what a run needs at most.

    peak over the model's own <=
        copies * logit_rows * vocabulary * 4                 logits, what the model's own tail makes of them, selection
        + rows * (hidden * (width + 4) + 1,600 * 16)         kept hidden states, in float32 too; a batch's draws
        + tokens * (8 * hidden + 4 * intermediate) * width   one layer at work
        + tokens * longest * 5                               scores of attention, where its kernel keeps them
        + cached * 2 * layers * key_values * width           the cache of a shared prefix
        + 2 * fetched                                        weights brought from memory or disk, and a conversion

in bytes, with ``width`` the dtype's and ``tokens`` the padded tokens of a batch (the longest conversation's, if that
is more). ``copies`` is 2 on CUDA, where Triton's kernel selects from the logits as they are (where it does not run,
there is one more, not counted here), else 3. ``cached`` is 0 without a shared prefix, else at most 8 * tokens: a
batch's keys and values with the shared ones, and a copy on the way.
``fetched`` is the largest layer that is not where it works (0 without ``device_map``).
For a model on several devices, each may need all of it: the decoder's part falls to whichever layer works.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from chat_logits.machine import usable_memory
from chat_logits.model.batching import Budget
from chat_logits.model.group import group_of, local
from chat_logits.model.loading import compute_devices, input_device, largest_fetch
from chat_logits.model.quantization import stored_bytes

MIB = 2**20
CPU_TOKENS = 768  # more are no faster: the activations of a batch leave the cache
GPU_TOKENS = 16_384
TOKEN_SHARE = 1 / 4  # of what a device has beside the model's weights
# Of that for logits, and at most. On a GPU the rows of a whole batch, as each piece of them costs a pass of launches.
LOGIT_SHARE = {"cpu": 1 / 16, "other": 1 / 8}
LOGIT_BYTES = {"cpu": 256 * MIB, "other": 8192 * MIB}


def total_memory(device: torch.device) -> int:
    """Bytes that the device has, whoever uses them now: a CPU the machine's, or its control group's limit."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return usable_memory()


def choose_budget(model, batch_tokens: int | None, logit_memory: int | None) -> Budget:
    """The budget that the options give (``logit_memory`` in MiB), or the default.

    The default follows what the devices have in all, less the model, where that is least: what is free at the moment
    would let two runs of one command differ.
    """
    room = max(0, min(_room(model, device) for device in compute_devices(model)))
    return budget_for(model, room, input_device(model).type, batch_tokens, logit_memory)


def budget_for(model, room: int, device_type: str, batch_tokens: int | None, logit_memory: int | None) -> Budget:
    """As ``choose_budget``, for ``room`` bytes beside the weights of a device of this type, such as "cuda".

    Of the model only the shape is looked at: it may be on "meta", without values.
    """
    kind = "cpu" if device_type == "cpu" else "other"
    if batch_tokens is None:
        affordable = int(room * TOKEN_SHARE / _bytes_a_token(model))
        batch_tokens = max(64, min(CPU_TOKENS if kind == "cpu" else GPU_TOKENS, affordable))
    logit_bytes = logit_memory * MIB if logit_memory else min(LOGIT_BYTES[kind], int(room * LOGIT_SHARE[kind]))
    return Budget(batch_tokens, max(1, logit_bytes // (_vocabulary(model) * 4)))


def _room(model, device: torch.device) -> int:
    """Bytes of the device beside the weights that lie there and those that are brought there."""
    weights = sum(stored_bytes(local(weights)) for weights in model.parameters() if weights.device == device)
    group = group_of(model)
    sharing = group.size if group and device.type == "cpu" else 1  # processes that have this memory together
    return total_memory(device) // sharing - weights - 2 * largest_fetch(model)


def peak_memory(model, budget: Budget, longest: int, rows: int, prefix_cache: bool) -> int:
    """The formula above, bytes: ``longest`` tokens in a conversation, ``rows`` extracted tokens in a batch."""
    parts = peak_parts(model, input_device(model).type, budget, longest, rows, prefix_cache)
    return sum(parts) + 2 * largest_fetch(model)


class PeakParts(NamedTuple):
    """The terms of the formula above in bytes, but for the weights that are brought from elsewhere."""

    logits: int
    kept_hidden_states: int
    layer_at_work: int
    prefix_cache: int


def peak_parts(model, device_type: str, budget: Budget, longest: int, rows: int, prefix_cache: bool) -> PeakParts:
    """What one forward pass holds beside the weights, as ``peak_memory``, on a device of this type, such as "cuda".

    Of the model only the shape is looked at: it may be on "meta", without values.
    """
    width = model.dtype.itemsize
    hidden = model.config.get_text_config().hidden_size
    tokens = max(budget.tokens, longest)
    copies = 2 if device_type == "cuda" else 3
    return PeakParts(
        logits=copies * min(budget.logit_rows, rows) * _vocabulary(model) * 4,
        kept_hidden_states=rows * (hidden * (width + 4) + 1600 * 16),
        layer_at_work=tokens * (_layer_bytes(model) + longest * 5),
        prefix_cache=8 * tokens * _cache_bytes(model) if prefix_cache else 0,
    )


def fits_alone(model) -> Callable[[int, int], bool]:
    """A test whether a conversation of so many tokens, with so many extracted ones, may be tried in a batch of its own.

    On a CPU alone the formula says so, before the system ends the process; other devices refuse what is too much.
    """
    device = input_device(model)
    if device.type != "cpu":
        return lambda _length, _rows: True
    room = _room(model, device) - 2 * largest_fetch(model)

    def fits(length: int, rows: int) -> bool:
        return sum(peak_parts(model, device.type, Budget(length, 1), length, rows, prefix_cache=False)) <= room

    return fits


def _vocabulary(model) -> int:
    return model.get_output_embeddings().weight.shape[0]


def layer_configs(config) -> list:
    """The config of each layer of a text model where they differ, else the one that is all layers'."""
    if getattr(config, "is_heterogeneous", False):
        return [config.per_layer_config[layer] for layer in range(config.num_hidden_layers)]
    return [config]


def _layer_bytes(model) -> int:
    """What the largest layer holds of one token at work."""

    def numbers(config) -> int:
        intermediate = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        widest = max(intermediate) if isinstance(intermediate, (list, tuple)) else intermediate  # by layer
        return 8 * config.hidden_size + 4 * widest

    return max(map(numbers, layer_configs(model.config.get_text_config()))) * model.dtype.itemsize


def _cache_bytes(model) -> int:
    """Keys and values of one token in all layers."""

    def numbers(config) -> int:
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        return 2 * (getattr(config, "num_key_value_heads", None) or heads) * size

    layers = layer_configs(model.config.get_text_config())
    count = model.config.get_text_config().num_hidden_layers
    return sum(map(numbers, layers)) * (count // len(layers)) * model.dtype.itemsize


def _bytes_a_token(model) -> int:
    return _layer_bytes(model) + 8 * _cache_bytes(model)
