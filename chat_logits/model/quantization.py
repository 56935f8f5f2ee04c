"""Models in fewer bits: checkpoints that are quantised, and 16-bit ones that are quantised as they are loaded.

transformers' quantizers do the work. If a device cannot compute with a checkpoint's weights, some of them dequantise
the weights and only log it; here that is refused unless `quantization` dequantize asks for it. Nothing before
``quantized_loading``, which is called before any weight is read, needs torch.
"""

import copy
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from chat_logits.errors import ToolkitError, UsageError
from chat_logits.model.bits import quantization_of, wildcard_name
from chat_logits.model.limits import load_config

AS_STORED, QUANTIZED, DEQUANTIZED = "as stored", "quantized on loading", "dequantized on loading"
DEQUANTIZE = "dequantize"
INT8_BY_ROW = {
    "_type": "Int8WeightOnlyConfig",
    "_version": 2,
    "_data": {
        "group_size": None,
        "granularity": {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}},
        "set_inductor_config": False,
    },
}
# The config of each choice. The threshold 0 is not bitsandbytes' default: with a higher one, the columns that stay in
# 16 bits depend on all tokens of a batch, so that logits change with later tokens and with the other conversations.
METHODS: dict[str, dict] = {
    "bitsandbytes-8bit": {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 0.0},
    "bitsandbytes-4bit": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "torchao-int8": {"quant_method": "torchao", "quant_type": {"default": INT8_BY_ROW}},
}
CHOICES = (*METHODS, DEQUANTIZE)
DEQUANTIZING = ("fp8", "mxfp8", "mxfp4", "metal", "compressed-tensors")  # methods that can dequantise on loading
# Methods with kernels only for GPUs. transformers checks that the machine has a GPU, not that the model is on it.
ON_GPU = ("eetq", "fbgemm_fp8", "fp8", "fp_quant", "higgs", "metal", "mxfp8", "nvfp4", "spqr", "vptq")
NEEDS = {
    **dict.fromkeys(("fp8", "mxfp8"), "a GPU of compute capability 8.9 or above, and the package kernels"),
    "fbgemm_fp8": "a GPU of compute capability 9.0 or above, and the package fbgemm-gpu",
    "mxfp4": "the packages triton (3.5 or above) and kernels, and of GPUs a compute capability of 7.5 or above",
    "metal": "Apple's GPU, and the package kernels",
    "nvfp4": "a GPU of compute capability 10.0 or above, and the package kernels",
    "compressed-tensors": "a GPU of compute capability 8.9 or above for use_optimized_inference",
}
WITH_KERNELS = ("fp8", "mxfp8")  # transformers looks for their kernels only in the first forward pass
SHOWN = 300  # characters of what a library says
logger = logging.getLogger(__name__)

# transformers imports torchao with every model if it is installed, and torchao logs about other devices' kernels.
for talkative in ("torchao", "torch.utils._pytree"):
    logging.getLogger(talkative).setLevel(logging.ERROR)


def find_quantization(
    model_id: str,
    revision: str | None = None,
    *,
    trust_remote_code: bool = False,
    option: str | None = None,
    is_adapter: bool = False,
) -> dict | None:
    """How a model's weights are quantised, as ``extraction.json`` records it (FORMAT.md); None if they are not.

    ``model_id`` is where the weights are. ``option`` is one of ``CHOICES``. Raises UsageError if it cannot be applied
    to them, ToolkitError for a checkpoint that cannot be used.
    """
    own = quantization_of(load_config(model_id, revision, trust_remote_code=trust_remote_code))
    name = f"model {model_id}"
    if is_adapter and (own or option):
        kind = _method(name, own) if own else option
        raise UsageError(f"{name}: an adapter is not merged into quantised weights ({kind}); merge it, and save that")
    if own is None and option == DEQUANTIZE:
        raise UsageError(f"`quantization` {option}: {model_id} is not quantised (config.json); leave it out")
    if own is None:
        return {"weights": QUANTIZED, "config": METHODS[option]} if option else None
    method = _method(name, own)
    if option in METHODS:
        raise UsageError(f"`quantization` {option}: {model_id} is quantised already ({method}); leave it out")
    if option and method not in DEQUANTIZING:
        raise UsageError(f"`quantization` {option}: {model_id} is in {method}; only {', '.join(DEQUANTIZING)} can be")
    _refuse_outlier_columns(name, own)
    return {"weights": DEQUANTIZED if option else AS_STORED, "config": own}


def option_of(recorded: dict | None) -> str | None:
    """The option with which the recorded run was started. Raises ToolkitError if no option fits the record."""
    if recorded is None or recorded["weights"] == AS_STORED:
        return None
    if recorded["weights"] == DEQUANTIZED:
        return DEQUANTIZE
    for option, config in METHODS.items():
        if config == recorded["config"]:
            return option
    raise ToolkitError(f"extraction.json has a quantization on loading that is none of {', '.join(METHODS)}")


def _method(name: str, config: dict) -> str:
    """The method's name. Raises ToolkitError for one that transformers does not know and would ignore."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as KNOWN

    if config.get("load_in_8bit") or config.get("load_in_4bit"):
        return "bitsandbytes"
    method = config.get("quant_method")
    if method not in KNOWN and method != "bitsandbytes":
        raise ToolkitError(
            f"{name}: its config.json has a quantization_config of the method {str(method)[:40]!r}, which this "
            "transformers does not know. Take another checkpoint of it, or a transformers that does."
        )
    return str(method)


def _refuse_outlier_columns(name: str, config: dict) -> None:
    threshold = config.get("llm_int8_threshold", 6.0)
    if config.get("load_in_8bit") and threshold > 0:
        raise ToolkitError(
            f"{name}: in 8 bits of bitsandbytes with llm_int8_threshold {threshold:g}, so its logits change with later "
            "tokens. Expected 0: set it in its config.json, or load the 16-bit model with `quantization` "
            "bitsandbytes-8bit."
        )


def quantized_loading(model_id: str, quantization: dict | None, device: Any, device_map: str | None = None) -> dict:
    """The options of ``from_pretrained`` for a quantisation; empty without one.

    Raises ToolkitError if it does not run here: a package is missing, the method does not support the device, or
    transformers would dequantise without being asked.
    """
    if quantization is None:
        return {}
    name, stored, wanted = f"model {model_id}", quantization["weights"] != QUANTIZED, dict(quantization["config"])
    method, asked = _method(name, wanted), quantization["weights"] == DEQUANTIZED
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of missing kernels and of each conversion
    _refuse_missing_packages(name, method, stored)
    if method in ON_GPU and not asked and _is_on_cpu(device, device_map):
        raise _not_here(name, method, "here is a CPU")
    where = device_map or {"": str(device)}
    config, is_changed = _validated(name, method, {**wanted, "dequantize": True} if asked else wanted, stored, where)
    if is_changed and not asked:
        raise _not_here(name, method, "not all of it is here")
    if not asked and method in WITH_KERNELS and importlib.util.find_spec("kernels") is None:
        raise _not_here(name, method, "kernels is not installed")
    if asked:  # transformers warns as if the configuration were a different one
        warnings.filterwarnings("ignore", "You passed `quantization_config`")
    return {"device_map": where, **({} if quantization["weights"] == AS_STORED else {"quantization_config": config})}


def _refuse_missing_packages(name: str, method: str, stored: bool) -> None:
    of_method = [] if stored else [method]  # for stored ones, transformers checks them
    for package in ("accelerate", *of_method):
        if importlib.util.find_spec(package) is None:
            raise ToolkitError(
                f"{name}: weights in {method} need the package {package}, which is not installed.\n"
                "Install it (the extra `quantization` has it), or load the model as it is."
            )


def _is_on_cpu(device: Any, device_map: str | None) -> bool:
    import torch

    if device_map:
        return torch.accelerator.current_accelerator(check_available=True) is None
    return torch.device(device).type == "cpu"


def _not_here(name: str, method: str, here: str) -> ToolkitError:
    way_out = "Take a checkpoint in 16 bits"
    if method in DEQUANTIZING:
        way_out += f", or compute with its weights in `dtype` by `quantization` {DEQUANTIZE}"
    needs = NEEDS.get(method, "a GPU")
    return ToolkitError(f"{name}: its weights are in {method}, which needs {needs}; {here}.\n{way_out}.")


def _validated(name: str, method: str, wanted: dict, stored: bool, device_map: Any) -> tuple[Any, bool]:
    """transformers' config object if it can run here, and whether transformers would run it in another way.

    Reads no weights.
    """
    from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

    try:
        with _without_warnings():
            config = AutoQuantizationConfig.from_dict(copy.deepcopy(wanted))
            is_optimized = getattr(config, "use_optimized_inference", False)
            quantizer = AutoHfQuantizer.from_config(config, pre_quantized=stored)
            quantizer.validate_environment(device_map=device_map, weights_only=True)
    except Exception as error:
        said = f"it needs the package {error.name}" if isinstance(error, ModuleNotFoundError) else str(error)
        line = " ".join(said.split())[:SHOWN].rstrip(".") or type(error).__name__
        raise ToolkitError(f"{name}: its weights are in {method}: {line}. Or take a checkpoint in 16 bits.") from error
    is_changed = getattr(config, "dequantize", False) or (is_optimized and not quantizer.use_fp8_kernel)
    return config, is_changed


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Within, transformers does not warn of what it would do instead of what was asked for."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def finish_quantized(model_id: str, model: Any, quantization: dict | None) -> None:
    """Have a loaded model compute in its own dtype. Raises ToolkitError if rows of its lm_head cannot be counted."""
    head = model.get_output_embeddings()
    shape = tuple(getattr(getattr(head, "weight", None), "shape", ()))
    if hasattr(head, "out_features") and shape != (head.out_features, head.in_features):
        raise ToolkitError(
            f"model {model_id}: its lm_head is a {type(head).__name__} of packed weights, which gives no vocabulary. "
            "Expected a plain matrix: take a checkpoint that leaves the lm_head out, or one in 16 bits."
        )
    if quantization is None:
        return
    for module in model.modules():  # bitsandbytes' 4-bit modules have these attributes
        if hasattr(module, "support_avx512bf16_for_cpu"):  # this kernel rounds inputs and scales to bfloat16
            module.support_avx512bf16_for_cpu = False
        if hasattr(module, "compute_dtype") and quantization["weights"] == QUANTIZED:
            module.compute_dtype = model.dtype  # the default is float32
    if quantization["weights"] == QUANTIZED:
        _tell_what_stays(model_id, model, option_of(quantization))


def _tell_what_stays(model_id: str, model: Any, option: str | None) -> None:
    """Warn if most of the layers' weights are not quantised, for example a mixture's experts.

    Weights that device_map keeps in memory or on disk are not counted. Raises ToolkitError if nothing is quantised.
    """
    numbers = _numbers_in_layers(model)
    stays = {
        name: numbers[name]
        for name, weights in model.named_parameters()
        if name in numbers and stored_bytes(weights) >= numbers[name] * model.dtype.itemsize
    }
    if numbers and len(stays) == len(numbers):
        raise nothing_quantized(model_id, option)
    if sum(stays.values()) > 0.5 * sum(numbers.values()):
        largest, kind = wildcard_name(max(stays, key=stays.__getitem__)), str(model.dtype).removeprefix("torch.")
        share = 100 * sum(stays.values()) / sum(numbers.values())
        told = "model %s: `quantization` %s changes linear layers only; %.1f%% of the layers' weights stay in %s, as %s"
        logger.warning(told, model_id, option, share, kind, largest)


def _numbers_in_layers(model: Any) -> dict[str, int]:
    """How many numbers each parameter has unquantised, except embeddings and the lm_head."""
    ends = ends_of(model)
    linear = {
        id(module.weight): module.in_features * module.out_features
        for module in model.modules()
        if hasattr(module, "in_features") and hasattr(module, "out_features")
    }
    layers = [(name, one) for name, one in model.named_parameters() if id(one) not in ends and not one.is_meta]
    return {name: linear.get(id(one), one.numel()) for name, one in layers}


def ends_of(model: Any) -> set[int]:
    """The ``id`` of the lm_head's matrix and of each embedding matrix (a token uses one row of those)."""
    import torch

    embeddings = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    return {id(one.weight) for one in (model.get_input_embeddings(), model.get_output_embeddings(), *embeddings)}


def nothing_quantized(model_id: str, option: str | None) -> ToolkitError:
    """The error for a model in which ``option`` would quantise nothing."""
    return ToolkitError(f"model {model_id}: `quantization` {option} finds no layer of it to quantise; leave it out")


def stored_bytes(weights: Any) -> int:
    """Bytes that a tensor takes. A torchao tensor reports its unquantised size, so its parts are counted instead."""
    if hasattr(weights, "__tensor_flatten__"):
        return sum(stored_bytes(getattr(weights, part)) for part in weights.__tensor_flatten__()[0])
    return weights.nbytes
