"""The check at start-up: what ``Teacher`` gives on a short batch against the model's reference forward pass."""

import numpy as np
import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from chat_logits.errors import ToolkitError
from chat_logits.model.loading import input_device
from chat_logits.model.teacher import Request, Teacher

PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)  # caches that a shared prefix may be kept in
# What a probe's logits may differ by, relative to the largest: half a dozen roundings of the dtype.
PROBE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def probe_model(model) -> bool:
    """Compare what ``Teacher`` gives on a short padded batch with the model's reference forward pass.

    Raises ToolkitError where the rows differ. Returns whether a shared prefix's cache may be used: whether the
    model has a plain key-value cache, and rows computed after it agree as well.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = np.random.default_rng(0).integers(0, vocabulary, 32)
    parts = [np.concatenate([ids[:8], ids[8:16]]), np.concatenate([ids[:8], ids[16:]])]
    requests = [Request(part, np.arange(9, len(part)), np.zeros(len(part) - 9)) for part in parts]
    expected = _reference_rows(model, requests)
    limit = PROBE_TOLERANCE.get(model.dtype, 6e-2) * max(1.0, expected.abs().max().item())
    teacher = Teacher(model, logit_rows=7)
    difference = _difference(teacher, requests, expected)
    if not difference <= limit:
        raise ToolkitError(
            f"model check: logits of selected rows differ from the reference forward pass by {difference:.3g}, "
            f"expected at most {limit:.3g}. Nothing was extracted; try `attn_implementation` eager or `dtype` float32."
        )
    return _cache_agrees(teacher, ids[:8], requests, expected, limit)


@torch.inference_mode()
def _reference_rows(model, requests: list[Request]) -> torch.Tensor:
    inputs = [torch.from_numpy(r.input_ids)[None].to(input_device(model)) for r in requests]
    plain = [model(ids).logits[0, r.positions - 1] for ids, r in zip(inputs, requests, strict=True)]
    return torch.cat(plain).float()


def _difference(teacher: Teacher, requests: list[Request], expected: torch.Tensor) -> float:
    logits = torch.cat(list(teacher.row_logits(requests)))
    return (logits - expected).abs().max().item() if logits.shape == expected.shape else float("inf")


def _cache_agrees(teacher: Teacher, prefix: np.ndarray, requests, expected: torch.Tensor, limit: float) -> bool:
    try:
        teacher.hold_prefix(prefix)
        if not all(type(layer) in PLAIN_LAYERS for layer in teacher._prefix_cache.layers):
            return False
        return _difference(teacher, requests, expected) <= limit
    except Exception:  # whatever a model without such a cache does when it is given one
        return False
