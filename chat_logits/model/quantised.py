"""What ``config.json`` says of a checkpoint's weights in fewer bits: how many a weight has, and which are as they were.

Nothing here needs torch.
"""

import re
from collections.abc import Mapping

KEPT = ("modules_to_not_convert", "ignore", "ignored_layers", "llm_int8_skip_modules")  # in more bits


def quantisation(config) -> Mapping | None:
    """The quantization_config of a model's configuration, None for a checkpoint that is not quantised."""
    found = getattr(config, "quantization_config", None)
    return found.to_dict() if hasattr(found, "to_dict") else found


def is_kept(config, name: str) -> bool:
    """Whether the parameter of this name keeps its bits, as the quantisation's configuration says."""
    entries = [one for key in KEPT for one in (quantisation(config) or {}).get(key) or ()]
    return any(_names(one, name) for one in entries)


def _names(entry: str, name: str) -> bool:
    """Whether an entry names a parameter: a part of its name, or "re:" and a pattern."""
    return bool(re.match(entry[3:], name)) if entry.startswith("re:") else entry.replace(".*", "") in name


def quantised_bits(config) -> float | None:
    """Bits of a quantised weight, its share of scales and zero points included, by ``config.json``; None where that
    has no quantisation, or does not say."""
    found = quantisation(config) or {}
    method = found.get("quant_method")
    if method == "compressed-tensors":
        weights = [group.get("weights") or {} for group in (found.get("config_groups") or {}).values()]
        each = [_with_scales(one.get("num_bits"), one.get("group_size")) for one in weights]
        return max((bits for bits in each if bits is not None), default=None) if None not in each else None
    if method == "mxfp4":
        return 4 + 8 / 32  # a scale of 8 bits to 32 weights
    if method in ("fp8", "fbgemm_fp8"):
        return 8.0
    if method == "bitsandbytes":
        return 8.0 if found.get("load_in_8bit") else 4 + 32 / 64 if found.get("load_in_4bit") else None
    if method in ("awq", "gptq"):
        return _with_scales(found.get("bits"), found.get("group_size"))
    return None


def _with_scales(bits, group_size) -> float | None:
    """With a scale of 16 bits and a zero point for each group of weights."""
    if type(bits) is not int:
        return None
    return bits + (16 + bits) / group_size if type(group_size) is int and group_size > 0 else float(bits)
