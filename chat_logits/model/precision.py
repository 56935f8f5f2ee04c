"""The precision of a model's matrix products, whatever the settings of the process or its environment."""

import logging
import os

import torch

from chat_logits.errors import UsageError

WHOLE = ("none", "ieee")  # torch's names for float32 products in full float32
BELOW_TORCH = "NVIDIA_TF32_OVERRIDE"  # read by CUDA's libraries; it overrides torch's settings

logger = logging.getLogger(__name__)


def use_whole_float32() -> None:
    """Compute float32 products in full float32 in this process from now on; log a warning if they were not.

    TF32 has 10 fraction bits instead of float32's 23: it would round every product of a float32 model, and the
    rotary-position angles of any model. Some containers turn it on, and torch does for convolutions by default. Raises
    UsageError within ``torch.autocast``, and if the environment turns TF32 on below torch.
    """
    _refuse_autocast()
    if os.environ.get(BELOW_TORCH) == "1":
        raise UsageError(f"{BELOW_TORCH}=1 in the environment rounds float32 products to 10 bits: unset it")
    found = torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
    if not set(found) <= set(WHOLE):
        logger.warning("float32 products were set to fewer bits (%s): in this process they are float32 now", found[0])
    torch.set_float32_matmul_precision("highest")
    cudnn = torch.backends.cudnn  # by both of torch's settings, as neither changes the other
    cudnn.allow_tf32, cudnn.rnn.fp32_precision, cudnn.conv.fp32_precision = False, "ieee", "ieee"


def _refuse_autocast() -> None:
    """Raise UsageError within ``torch.autocast``: a model would compute in another dtype than the recorded one."""
    for device_type in {"cpu", getattr(torch.accelerator.current_accelerator(), "type", "cpu")}:
        if torch.is_autocast_enabled(device_type):
            raise UsageError(
                f"called within torch.autocast({device_type!r}), which changes what a model computes: call it outside, "
                "and say `dtype`"
            )


def tell_of_emulation(model_id: str, model, devices: list[torch.device]) -> None:
    """Warn about a bfloat16 model on a card without bfloat16 arithmetic, if the dtype was not chosen by the user."""
    names = [name for name in map(_emulating_card, devices) if name]
    if model.dtype == torch.bfloat16 and names:
        told = "model %s: in bfloat16, as its checkpoint is, for which %s has no arithmetic: it is emulated, and slow. "
        logger.warning(told + "float16 or float32 (`dtype`) may be the better", model_id, names[0])


def _emulating_card(device: torch.device) -> str | None:
    """The name of a card that emulates bfloat16 with float32, such as Nvidia's before Ampere; else None."""
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        is_emulated = not torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.cuda.get_device_name() if is_emulated else None
