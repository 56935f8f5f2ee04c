"""Memory of one forward pass: what a device has, the default budget, and the most that a run needs.

    peak in addition to the model's weights <=
        copies * logit_rows * vocabulary * 4                 logits, after the model's post-processing, and selection
        + rows * (hidden * (width + 4) + 1,600 * 16)         kept hidden states, also in float32; a batch's draws
        + tokens * (8 * hidden + 4 * intermediate) * width   one layer at work
        + tokens * longest * 5                               attention scores, if the kernel keeps them
        + cached * 2 * layers * key_values * width           the cache of a shared prefix
        + 2 * fetched                                        weights brought from memory or disk, and a conversion

in bytes. ``width`` is the dtype's, ``tokens`` the padded tokens of a batch (or those of the longest conversation, if
more). ``copies`` is 2 on CUDA, where Triton's kernel reads the logits in place (if it does not run, there is one more
copy, not counted here), else 3. ``cached`` is 0 without a shared prefix, else at most 8 * tokens: a batch's keys and
values including the shared ones, and a temporary copy.
``fetched`` is the largest layer that is not stored where it computes (0 without ``device_map``).
For a model on several devices, each may need all of it: any device may hold the layer that is computing.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from chat_logits.machine import usable_memory
from chat_logits.model.batch_plan import Budget
from chat_logits.model.devices import compute_devices, input_device, largest_fetch
from chat_logits.model.group import Group, group_of, local
from chat_logits.model.quantization import stored_bytes

MIB = 2**20
CPU_TOKENS = 768  # more are not faster: the activations of a batch no longer fit in the CPU's cache
GPU_TOKENS = 16_384
TOKEN_SHARE = 1 / 4  # of a device's memory without the model's weights
OVERHEAD = 2048 * MIB  # of a GPU's memory, what CUDA and its libraries may use themselves
# Memory for logits: a share of a device's memory without the weights, and the most. On a GPU that holds the rows of a
# whole batch, as each further piece costs another series of kernel launches.
LOGIT_SHARE = {"cpu": 1 / 16, "other": 1 / 8}
LOGIT_BYTES = {"cpu": 256 * MIB, "other": 8192 * MIB}


def total_memory(device: torch.device) -> int:
    """Total bytes of the device, used or free; for a CPU, the machine's memory or the limit of its control group."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return usable_memory()


def choose_budget(model, batch_tokens: int | None, logit_memory: int | None) -> Budget:
    """The budget that the options give (``logit_memory`` in MiB), or the default.

    The default is derived from the total memory of the devices less the model's weights, for the device with the
    least. With the free memory instead, two runs of the same command could differ.
    """
    room = max(0, min(_room(model, device) for device in compute_devices(model)))
    return budget_for(model, room, input_device(model).type, batch_tokens, logit_memory)


def budget_for(model, room: int, device_type: str, batch_tokens: int | None, logit_memory: int | None) -> Budget:
    """As ``choose_budget``, for ``room`` bytes besides the weights on a device of this type, such as "cuda".

    Only the model's shape is used: it may be on "meta", without values.
    """
    kind = "cpu" if device_type == "cpu" else "other"
    if batch_tokens is None:
        affordable = int(room * TOKEN_SHARE / _bytes_a_token(model))
        batch_tokens = max(64, min(CPU_TOKENS if kind == "cpu" else GPU_TOKENS, affordable))
    logit_bytes = logit_memory * MIB if logit_memory else min(LOGIT_BYTES[kind], int(room * LOGIT_SHARE[kind]))
    return Budget(batch_tokens, max(1, logit_bytes // (_vocabulary(model) * 4)))


def _room(model, device: torch.device) -> int:
    """Bytes of the device without the weights that are stored there and those that are brought there."""
    weights = sum(stored_bytes(local(weights)) for weights in model.parameters() if weights.device == device)
    return _share_of_memory(group_of(model), device) - weights - 2 * largest_fetch(model)


def _share_of_memory(group: Group | None, device: torch.device) -> int:
    """Bytes that a process has of its device: a share of the host's, or those of the group's smallest accelerator."""
    if group is None:
        return total_memory(device)
    if device.type == "cpu":
        return total_memory(device) // group.size
    return min(total_memory(torch.device(device.type, i)) for i in range(group.size))


def peak_memory(model, budget: Budget, longest: int, rows: int, prefix_cache: bool) -> int:
    """The formula above, in bytes: ``longest`` tokens in a conversation, ``rows`` extracted tokens in a batch."""
    parts = peak_parts(model, input_device(model).type, budget, longest, rows, prefix_cache)
    return sum(parts) + 2 * largest_fetch(model)


class PeakParts(NamedTuple):
    """The terms of the formula above in bytes, except the weights that are brought from memory or disk."""

    logits: int
    kept_hidden_states: int
    layer_at_work: int
    prefix_cache: int


def peak_parts(model, device_type: str, budget: Budget, longest: int, rows: int, prefix_cache: bool) -> PeakParts:
    """What one forward pass needs besides the weights, as ``peak_memory``, on a device of this type, such as "cuda".

    Only the model's shape is used: it may be on "meta", without values.
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
    """A function that says whether a conversation of so many tokens, and so many extracted ones, may be tried alone.

    Only on a CPU is the formula used, as the system would end the process; other devices raise an error instead.
    """
    device = input_device(model)
    if device.type != "cpu":
        return lambda _length, _rows: True
    room = _room(model, device) - 2 * largest_fetch(model)
    return lambda length, rows: _needed_alone(model, device, length, rows) <= room


def is_taken_by_others(model, length: int, rows: int) -> bool:
    """Whether a conversation of so many tokens, with so many extracted ones, fits the device, but not its free memory.

    That is so while another process uses the device's memory. False for devices that do not report their free memory.
    """
    device = input_device(model)
    if device.type != "cuda":
        return False
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + reserved
    return free < _needed_alone(model, device, length, rows) <= _room(model, device) - OVERHEAD


def _needed_alone(model, device: torch.device, length: int, rows: int) -> int:
    return sum(peak_parts(model, device.type, Budget(length, 1), length, rows, prefix_cache=False))


def _vocabulary(model) -> int:
    return model.get_output_embeddings().weight.shape[0]


def layer_configs(config) -> list:
    """The config of each layer of a text model if they differ, else the one config of all layers."""
    if getattr(config, "is_heterogeneous", False):
        return [config.per_layer_config[layer] for layer in range(config.num_hidden_layers)]
    return [config]


def _layer_bytes(model) -> int:
    """Bytes that the largest layer needs for one token while it computes."""

    def numbers(config) -> int:
        intermediate = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        widest = max(intermediate) if isinstance(intermediate, (list, tuple)) else intermediate  # by layer
        return 8 * config.hidden_size + 4 * widest

    return max(map(numbers, layer_configs(model.config.get_text_config()))) * model.dtype.itemsize


def _cache_bytes(model) -> int:
    """Bytes of the keys and values of one token in all layers."""

    def numbers(config) -> int:
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        return 2 * (getattr(config, "num_key_value_heads", None) or heads) * size

    layers = layer_configs(model.config.get_text_config())
    count = model.config.get_text_config().num_hidden_layers
    return sum(map(numbers, layers)) * (count // len(layers)) * model.dtype.itemsize


def _bytes_a_token(model) -> int:
    return _layer_bytes(model) + 8 * _cache_bytes(model)
