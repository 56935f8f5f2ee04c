"""The lm_head: which hidden states it gets, and its output in float32 if a model is 16-bit.

Hidden states and weights keep their 16-bit dtype; only the sums are float32.

Rounding logits to bfloat16 costs more than the whole storage format: 4.3e-4 nats of KL on SmolLM2-135M. What the model
does to its logits afterwards (soft caps, scaling) is then done in float32 as well.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial

import torch

from chat_logits.errors import ToolkitError
from chat_logits.model.group import local
from chat_logits.model.out_of_memory import is_out_of_memory

SLICE_ROWS = 4096  # rows of the weight that are converted at once if no 16-bit matrix product gives float32


@contextmanager
def head_inputs(model, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Within, ``change`` replaces the hidden states (B, T, H) that the model's lm_head gets, and so the rows that have
    logits: a selection, or other rows."""
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _module, args: (change(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def use_head_dtype(model, head_dtype: str | None) -> None:
    """Have the model compute its logits in "float32"; with any other ``head_dtype``, such as "model", in its own dtype.

    The default is float32 if the lm_head is a plain matrix. Raises ToolkitError if float32 is asked for and it is not.
    """
    head = model.get_output_embeddings()
    if head_dtype not in ("float32", None) or model.dtype == torch.float32:
        return
    is_plain = isinstance(head.weight, torch.nn.Parameter) and not hasattr(local(head.weight), "__tensor_flatten__")
    if type(head).forward is torch.nn.Linear.forward and is_plain and head.weight.is_floating_point():
        # A spread model's module has accelerate's forward, which brings the weights and then calls the old forward.
        name = "_old_forward" if hasattr(head, "_hf_hook") else "forward"
        setattr(head, name, partial(_float32_output, head))
    elif head_dtype == "float32":
        raise ToolkitError(
            f"the model's lm_head is a {type(head).__name__}, which cannot give its output in float32; "
            "give `head_dtype` model"
        )


@torch.no_grad()
def _float32_output(head: torch.nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    """The output of ``head`` (…, V) float32 for hidden states (…, H); only of this process' part if it is split."""
    rows, weight = hidden.reshape(-1, hidden.shape[-1]), local(head.weight)
    if has_float32_product(hidden.device, hidden.dtype):
        logits = torch.mm(rows, weight.t(), out_dtype=torch.float32)
    else:
        logits = _product_in_slices(rows.float(), weight)
    if head.bias is not None:
        logits += local(head.bias)
    return logits.view(*hidden.shape[:-1], -1)


@cache
def has_float32_product(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product of 16-bit matrices can give float32 there, tried on small ones: not on CPUs and ROCm."""
    small = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        torch.mm(small, small, out_dtype=torch.float32)
    except (RuntimeError, TypeError) as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        return False
    return True


def _product_in_slices(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    logits = rows.new_empty(len(rows), len(weight))
    for part, out in zip(weight.split(SLICE_ROWS), logits.split(SLICE_ROWS, dim=1), strict=True):
        torch.mm(rows, part.float().t(), out=out)
    return logits
