"""A student's lm_head and what the student does to its output, as the loss computes them a few positions at a time.

Products are float32: on a GPU of two 16-bit matrices as they are, elsewhere of slices of the weight that are converted.
"""

from dataclasses import dataclass

import torch

from chat_logits.errors import ToolkitError, UsageError

SLICE_ROWS = 8192  # of the weight, V, in one product
# Fields of configs that scale or cap logits; which of it, and by which side of a fraction, is measured.
TAIL_FIELDS = (
    *("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "softcap"),
    *("logit_scale", "logits_scaling", "lm_head_multiplier"),
)
LARGEST = 50.0  # of the logits that a tail is measured at: beyond the usual caps of 15 to 30


@dataclass(frozen=True)
class LogitTail:
    """What a model does to its lm_head's output r: scale·r, or cap·tanh(scale·r / cap) where there is a ``cap``."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, raw: torch.Tensor) -> torch.Tensor:
        """The logits, of any shape."""
        scaled = raw * self.scale
        return scaled if self.cap is None else self.cap * torch.tanh(scaled / self.cap)

    def apply_(self, raw: torch.Tensor) -> torch.Tensor | None:
        """Make logits of ``raw`` in place. Returns their slopes, ∂logits/∂raw: a scalar without a cap, None for 1."""
        if self.cap is None:
            return None if self.scale == 1 else raw.mul_(self.scale).new_tensor(self.scale)
        raw.mul_(self.scale / self.cap).tanh_()
        slopes = raw.square().neg_().add_(1).mul_(self.scale)
        raw.mul_(self.cap)
        return slopes


@torch.no_grad()
def logit_tail(model) -> LogitTail:
    """What a model of transformers does to its lm_head's output, measured on one hidden state.

    Raises ToolkitError where it is neither a scale nor a soft cap by a number in its config, and where the lm_head
    gives 0 for everything.
    """
    raw, logits = _measured(model)
    text = model.config.get_text_config()
    numbers = [getattr(text, name, None) for name in TAIL_FIELDS]
    candidates = [LogitTail()]
    for number in (each for each in numbers if isinstance(each, int | float) and each):
        candidates += [LogitTail(number), LogitTail(1 / number), LogitTail(cap=number)]
    close = 1e-4 if model.dtype == torch.float32 else 1e-2  # of the largest logit; a 16-bit model rounds its own
    for tail in candidates:
        if (tail(raw) - logits).abs().max() <= close * logits.abs().max():
            return tail
    raise ToolkitError(
        f"{type(model).__name__} does something to its lm_head's output that is no scale and no soft cap of its "
        "config; take sparse_kd_loss of its logits"
    )


def _measured(model) -> tuple[torch.Tensor, torch.Tensor]:
    """The lm_head's output for a random hidden state, up to ``LARGEST``, and the model's logits, both float32 (V,)."""
    head, outputs = model.get_output_embeddings(), []

    def replace(module, args):
        noise = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(0)).to(args[0])
        largest = module.forward(noise).abs().max()
        if not largest > 0:
            raise ToolkitError(
                f"the lm_head of {type(model).__name__} gives 0 for everything, so it cannot be measured"
            )
        return (noise * (LARGEST / largest), *args[1:])

    handles = [
        head.register_forward_pre_hook(replace),
        head.register_forward_hook(lambda _module, _args, output: outputs.append(output.detach().float().clone())),
    ]
    try:
        ids = torch.zeros(1, 1, dtype=torch.long, device=head.weight.device)
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return outputs[-1][0, -1], logits[0, -1].float().to(outputs[-1].device)


def weight_and_bias(head: torch.nn.Module | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight (V, H) of an lm_head and its bias (V,), if it has one. Raises UsageError for one that is no matrix."""
    if isinstance(head, torch.Tensor) and head.dim() == 2:
        return head, None
    is_plain = isinstance(head, torch.nn.Linear) and type(head).forward is torch.nn.Linear.forward
    if is_plain and head.weight.is_floating_point():
        return head.weight, head.bias
    raise UsageError(
        f"the head is a {type(head).__name__}: expected an nn.Linear or its weight (V, H); of another student, take "
        "sparse_kd_loss of the logits"
    )


# --- products, float32 ---


def raw_logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """hidden·weightᵀ + bias, float32 (c, V), of hidden states (c, H)."""
    raw = torch.empty(len(hidden), len(weight), dtype=torch.float32, device=hidden.device)
    for part, out in _slices(weight, raw):
        _product(hidden, part.t(), out)
    return raw if bias is None else raw.add_(bias)


def hidden_gradient(gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """gradient·weight, float32 (c, H), of a gradient for the head's output, float32 (c, V)."""
    total = gradient.new_zeros(len(gradient), weight.shape[1])
    for part, columns in _slices(weight, gradient):
        _add_product(total, columns, part)
    return total


def add_weight_gradient(total: torch.Tensor, gradient: torch.Tensor, hidden: torch.Tensor) -> None:
    """Add gradientᵀ·hidden to ``total``, float32 (V, H)."""
    for part, columns in _slices(total, gradient):
        _add_product(part, columns.t(), hidden)


def _slices(rows: torch.Tensor, columns: torch.Tensor):
    """Pairs of V-slices: of the rows of one tensor, and of the columns of another."""
    return zip(rows.split(SLICE_ROWS), columns.split(SLICE_ROWS, dim=1), strict=True)


def _product(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    if _multiplies_16_bit(left, right):
        out.copy_(torch.mm(left, right, out_dtype=torch.float32))
    else:
        torch.mm(left.float(), right.float(), out=out)


def _add_product(total: torch.Tensor, gradient: torch.Tensor, other: torch.Tensor) -> None:
    """On a GPU a 16-bit matrix meets the gradient rounded as itself, as it would in the model's own backward pass."""
    if other.is_cuda and other.dtype != torch.float32:
        total += torch.mm(gradient.to(other.dtype), other, out_dtype=torch.float32)
    else:
        total.addmm_(gradient, other.float())


def _multiplies_16_bit(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.is_cuda and left.dtype == right.dtype and left.dtype != torch.float32
