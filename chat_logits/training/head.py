"""A student's lm_head and the transform of its output, as the loss computes them a few positions at a time.

Products are float32: of bfloat16 factors under autocast or if the student is bfloat16, else of float32 factors. If the
device supports it, 16-bit factors are multiplied as they are; otherwise slices of them are converted to float32 first.
"""

from dataclasses import dataclass

import torch

from chat_logits.errors import ToolkitError, UsageError
from chat_logits.model.head import has_float32_product

# Of a chunk's float32 logits. On an accelerator 883 positions of 151,936 logits: the products then take as long as
# reading the weight and adding to its gradient. On a CPU 69 such positions, or 327 of 32,000 logits: four times as many
# are 10% faster.
LOGIT_BYTES, LOGIT_BYTES_ON_CPU = 512 * 2**20, 40 * 2**20
SLICE_ROWS = 8192  # rows of the weight (V) in one product
# Config fields that scale or cap logits; which it is, and whether a scale multiplies or divides, is measured.
TRANSFORM_FIELDS = (
    "final_logit_softcapping",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "softcap",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
)
LARGEST = 50.0  # the largest logit when a transform is measured: beyond the usual caps of 15 to 30
# Relative to the largest logit, for a float32 head output, and for one that is rounded to 16 bits, and rounded again.
CLOSE, CLOSE_16_BIT = 1e-4, 1e-2


@dataclass(frozen=True)
class LogitTransform:
    """How a model transforms its lm_head's output r: scale·r, or cap·tanh(scale·r / cap) if there is a ``cap``."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, raw: torch.Tensor) -> torch.Tensor:
        """The logits, of any shape."""
        scaled = raw * self.scale
        return scaled if self.cap is None else self.cap * torch.tanh(scaled / self.cap)

    def apply_(self, raw: torch.Tensor) -> torch.Tensor | None:
        """Turn ``raw`` into logits in place. Returns their slopes, ∂logits/∂raw: a scalar without a cap, None for 1."""
        if self.cap is None:
            return None if self.scale == 1 else raw.mul_(self.scale).new_tensor(self.scale)
        raw.mul_(self.scale / self.cap).tanh_()
        slopes = raw.square().neg_().add_(1).mul_(self.scale)
        raw.mul_(self.cap)
        return slopes


@torch.no_grad()
def logit_transform(model) -> LogitTransform:
    """How a transformers model transforms its lm_head's output, measured on one hidden state.

    Raises ToolkitError if it is neither a scale nor a soft cap by a number in its config, and if the lm_head gives 0
    for everything.
    """
    output, logits = _measured(model)
    raw = output.float()
    text = model.config.get_text_config()
    numbers = [getattr(text, name, None) for name in TRANSFORM_FIELDS]
    candidates = [LogitTransform()]
    for number in (each for each in numbers if isinstance(each, int | float) and each):
        candidates += [LogitTransform(number), LogitTransform(1 / number), LogitTransform(cap=number)]
    errors = [(transform(raw) - logits).abs().max().item() for transform in candidates]
    close = CLOSE if output.dtype == torch.float32 else CLOSE_16_BIT  # autocast rounds a float32 model's, too
    if logits.isfinite().all() and min(errors) <= close * logits.abs().max():  # no scale gives -inf
        return candidates[errors.index(min(errors))]
    raise ToolkitError(
        f"{type(model).__name__} changes its lm_head's output by something other than a scale or soft cap from its "
        "config; use sparse_kd_loss on its logits"
    )


def _measured(model) -> tuple[torch.Tensor, torch.Tensor]:
    """The lm_head's output (V,) for a random hidden state, scaled up to ``LARGEST``, in its own dtype, and the model's
    logits, float32 (V,)."""
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
        head.register_forward_hook(lambda _module, _args, output: outputs.append(output.detach().clone())),
    ]
    try:
        ids = torch.zeros(1, 1, dtype=torch.long, device=head.weight.device)
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return outputs[-1][0, -1], logits[0, -1].float().to(outputs[-1].device)


def weight_and_bias(head: torch.nn.Module | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight (V, H) of an lm_head and its bias (V,), if any. Raises UsageError for a head that is not a matrix."""
    if isinstance(head, torch.Tensor) and head.dim() == 2:
        return head, None
    is_plain = isinstance(head, torch.nn.Linear) and type(head).forward is torch.nn.Linear.forward
    if is_plain and head.weight.is_floating_point():
        return head.weight, head.bias
    raise UsageError(
        f"the head is a {type(head).__name__}: expected an nn.Linear or its weight (V, H); for another "
        "student, use sparse_kd_loss on the logits"
    )


# --- products, float32 ---


def chunk_rows(device: torch.device, vocab_size: int) -> int:
    """How many positions the head is applied to at once on a device."""
    most = LOGIT_BYTES_ON_CPU if device.type == "cpu" else LOGIT_BYTES
    return max(1, most // (4 * vocab_size))


def factors(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (n, H) and weight (V, H) as they are multiplied: rounded to bfloat16 under autocast to bfloat16.

    Under autocast to float16 they are not rounded: the gradient would have to be rounded, too, before the loss is
    scaled, and a tail of 0.4% over 150,000 tokens, 3e-8 each, would become 0.
    """
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16:
        return hidden.to(torch.bfloat16), weight.to(torch.bfloat16)
    return hidden, weight


def gradient_factor(gradient: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A gradient for the head's output, float32 (c, V), as it is multiplied by ``factors``: bfloat16 if both of them
    are, as in the model's own backward pass."""
    return gradient.to(torch.bfloat16) if hidden.dtype == weight.dtype == torch.bfloat16 else gradient


def raw_logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """hidden·weightᵀ + bias, float32 (c, V), of hidden states (c, H)."""
    if _multiplies_16_bit(hidden, weight):
        raw = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    else:
        raw = torch.empty(len(hidden), len(weight), dtype=torch.float32, device=hidden.device)
        hidden = hidden.float()
        for part, out in _slices(weight, raw):
            torch.mm(hidden, part.t().float(), out=out)
    return raw if bias is None else raw.add_(bias)


def hidden_gradient(gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """gradient·weight, float32 (c, H), of a ``gradient_factor`` (c, V)."""
    if _multiplies_16_bit(gradient, weight):
        return torch.mm(gradient, weight, out_dtype=torch.float32)
    total = torch.zeros(len(gradient), weight.shape[1], dtype=torch.float32, device=gradient.device)
    for part, columns in _slices(weight, gradient):
        total.addmm_(columns.float(), part.float())
    return total


def add_weight_gradient(total: torch.Tensor, gradient: torch.Tensor, hidden: torch.Tensor) -> None:
    """Add gradientᵀ·hidden to ``total``, float32 (V, H), of a ``gradient_factor`` (c, V)."""
    for part, columns in _slices(total, gradient):
        if _multiplies_16_bit(gradient, hidden):
            part += torch.mm(columns.t(), hidden, out_dtype=torch.float32)
        else:
            part.addmm_(columns.t().float(), hidden.float())


def _slices(rows: torch.Tensor, columns: torch.Tensor):
    """Pairs of slices along V: rows of one tensor, and columns of the other."""
    return zip(rows.split(SLICE_ROWS), columns.split(SLICE_ROWS, dim=1), strict=True)


def _multiplies_16_bit(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether the two are multiplied as they are, with float32 sums and results."""
    is_16_bit = left.dtype == right.dtype and left.dtype.itemsize == 2
    return is_16_bit and has_float32_product(left.device, left.dtype)
