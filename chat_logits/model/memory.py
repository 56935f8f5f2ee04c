"""How much one forward pass may hold: what is free, what is taken by default, and what a run needs at most.

    peak over the model's own <=
        3 * logit_rows * vocabulary * 4                      logits, and what the model's own tail makes of them
        + rows * (hidden * width + 1,600 * 16)               kept hidden states, and a batch's draws
        + tokens * (8 * hidden + 4 * intermediate) * width   one layer at work
        + tokens * longest * 5                               scores of attention, where its kernel keeps them
        + cached * 2 * layers * key_values * width           the cache of a shared beginning
        + 2 * fetched                                        weights brought from memory or disk, and a conversion

in bytes, with ``width`` the dtype's and ``tokens`` the padded tokens of a batch (the longest conversation's, if that
is more). ``cached`` is 0 without a shared beginning, else at most 8 * tokens: a batch's keys and values with the shared
ones, and a copy on the way. ``fetched`` is the largest layer that is not where it works (0 without ``--device_map``).
For a model on several devices, each may need all of it: the decoder's part falls to whichever layer works.
"""

import os

import torch

from chat_logits.model.batching import Budget
from chat_logits.model.loading import compute_devices, input_device, largest_fetch

MIB = 2**20
CPU_TOKENS = 768  # more are no faster: the activations of a batch leave the cache
GPU_TOKENS = 16_384
LOGIT_SHARE, TOKEN_SHARE = 1 / 16, 1 / 4  # of what is free
LOGIT_BYTES = {"cpu": 256 * MIB, "other": 1024 * MIB}  # at most, by default


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def choose_budget(model, batch_tokens: int | None, logit_memory: int | None) -> Budget:
    """The budget that the options give (``logit_memory`` in MiB), or the default for what is free where least is."""
    on_cpu = input_device(model).type == "cpu"
    free = max(0, min(map(free_memory, compute_devices(model))) - 2 * largest_fetch(model))
    if batch_tokens is None:
        affordable = int(free * TOKEN_SHARE / _bytes_a_token(model))
        batch_tokens = max(64, min(CPU_TOKENS if on_cpu else GPU_TOKENS, affordable))
    most = LOGIT_BYTES["cpu" if on_cpu else "other"]
    logit_bytes = logit_memory * MIB if logit_memory else min(most, int(free * LOGIT_SHARE))
    return Budget(batch_tokens, max(1, logit_bytes // (_vocabulary(model) * 4)))


def peak_memory(model, budget: Budget, longest: int, rows: int, prefix_cache: bool) -> int:
    """The formula above, bytes: ``longest`` tokens in a conversation, ``rows`` extracted tokens in a batch."""
    width = model.dtype.itemsize
    hidden = model.config.get_text_config().hidden_size
    tokens = max(budget.tokens, longest)
    logits = 3 * min(budget.logit_rows, rows) * _vocabulary(model) * 4
    cached = 8 * tokens * _cache_bytes(model) if prefix_cache else 0
    kept = rows * (hidden * width + 1600 * 16) + 2 * largest_fetch(model)
    return logits + kept + tokens * (_layer_bytes(model) + longest * 5) + cached


def _vocabulary(model) -> int:
    return model.get_output_embeddings().weight.shape[0]


def _layer_bytes(model) -> int:
    config = model.config.get_text_config()
    intermediate = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return (8 * config.hidden_size + 4 * intermediate) * model.dtype.itemsize


def _cache_bytes(model) -> int:
    """Keys and values of one token in all layers."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_values = (getattr(config, "num_key_value_heads", None) or heads) * size
    return 2 * config.num_hidden_layers * key_values * model.dtype.itemsize


def _bytes_a_token(model) -> int:
    return _layer_bytes(model) + 8 * _cache_bytes(model)
