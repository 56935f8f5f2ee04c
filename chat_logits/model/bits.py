"""Reads a quantisation config: how many bits a quantised weight takes, and which weights are not quantised.

The config is a mapping, the quantization_config of ``config.json``. Nothing here needs torch.
"""

import re
from collections.abc import Mapping
from typing import Any

KEPT = ("modules_to_not_convert", "ignore", "ignored_layers", "llm_int8_skip_modules")  # modules left unquantised
TORCHAO = re.compile(r"(?:int|float|uint)(\d)", re.IGNORECASE)  # the first number format in a type's name


def quantization_of(config) -> dict | None:
    """The quantization_config of a model's configuration, None for a checkpoint that is not quantised."""
    found: Any = getattr(config, "quantization_config", None)
    found = found or getattr(config.get_text_config(decoder=True), "quantization_config", None) or None
    return found.to_dict() if hasattr(found, "to_dict") else found


def wildcard_name(name: str) -> str:
    """A module's or parameter's name with * for the number of each layer and expert."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def is_kept(quantization: Mapping, name: str) -> bool:
    """Whether the configuration leaves the parameter of this name unquantised."""
    return any(_names(entry, name) for key in KEPT for entry in quantization.get(key) or ())


def _names(entry: str, name: str) -> bool:
    """Whether an entry names a parameter: a part of its name, or "re:" and a pattern."""
    return bool(re.match(entry[3:], name)) if entry.startswith("re:") else entry.replace(".*", "") in name


def bits_of(quantization: Mapping) -> float | None:
    """Bits of a quantised weight, including its share of scales and zero points if the group size is given; None if
    the configuration does not say, or its method is not known here."""
    method = quantization.get("quant_method")
    if method == "bitsandbytes":
        return 8.0 if quantization.get("load_in_8bit") else 4 + 32 / 64 if quantization.get("load_in_4bit") else None
    if method in ("awq", "gptq"):
        return _with_scales(quantization.get("bits"), quantization.get("group_size"))
    if method == "compressed-tensors":
        groups = [group.get("weights") or {} for group in (quantization.get("config_groups") or {}).values()]
        each = [_with_scales(one.get("num_bits"), one.get("group_size")) for one in groups]
        return None if None in each else max((bits for bits in each if bits is not None), default=None)
    if method == "torchao":
        kind = quantization.get("quant_type")
        kind = kind.get("default") if isinstance(kind, Mapping) else kind
        found = TORCHAO.search(str(kind.get("_type")) if isinstance(kind, Mapping) else str(kind))
        return float(found[1]) if found else None
    return {"fp8": 8.0, "fbgemm_fp8": 8.0, "mxfp8": 8 + 8 / 32, "mxfp4": 4 + 8 / 32}.get(str(method))


def _with_scales(bits, group_size) -> float | None:
    """Bits of a weight, with a 16-bit scale and a zero point for each group of weights."""
    if type(bits) is not int:
        return None
    return bits + (16 + bits) / group_size if type(group_size) is int and group_size > 0 else float(bits)
