"""Loading a model: on one device, spread over several by accelerate, or one part of it for a group of processes."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from chat_logits.errors import ACCELERATE, ToolkitError, UsageError, first_names, refuse_without
from chat_logits.hub import show_downloads, shows_downloads
from chat_logits.model.adapters import NO_ADAPTER, Base, find_base, merge
from chat_logits.model.devices import HOST, compute_devices, device_names, input_device, read_max_memory
from chat_logits.model.group import Group, in_step, refuse_too_many
from chat_logits.model.head import use_head_dtype
from chat_logits.model.limits import from_pretrained, load_config
from chat_logits.model.out_of_memory import OUT_OF_MEMORY, is_out_of_memory
from chat_logits.model.parts import choose_split, find_head_part, refuse_unsplit
from chat_logits.model.precision import tell_of_emulation, use_whole_float32
from chat_logits.model.quantization import find_quantization, finish_quantized, quantized_loading

logger = logging.getLogger(__name__)


def load_model(
    model_id: str,
    revision: str | None = None,
    *,
    gguf_file: str | None = None,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    device_map: str | None = None,
    max_memory: dict | None = None,
    offload_folder: Path | None = None,
    base_revision: str | None = None,
    head_dtype: str | None = None,
    quantization: str | None = None,
):
    """A causal LM in evaluation mode. ``dtype`` "auto" is float32 on a CPU and the model's own elsewhere.

    A ``device_map`` spreads it within ``max_memory``, see ``loading_options``; ``device`` is then ignored, and
    ``offload_folder`` must exist as long as the model is used. For ``head_dtype``, see ``use_head_dtype``.
    A model that comes with its own code is loaded only with ``trust_remote_code``: that code then runs here. From a
    vision-language checkpoint, the text model is used. An adapter is merged into its base, which is loaded at
    ``base_revision``, by default the one that the adapter names. A quantised checkpoint is used as it is;
    ``quantization``, one of ``quantization.CHOICES``, loads a 16-bit one in fewer bits, or dequantises a quantised one.
    Raises ToolkitError if a checkpoint is incomplete, and, before weights are read, if it does not run here.
    """
    use_whole_float32()
    base = find_base(model_id, revision, gguf_file)
    if base and device_map:
        raise UsageError(f"`device_map`: model {model_id} is an adapter; merge it, save the model, and give that")
    options = loading_options(dtype, device, device_map, max_memory, offload_folder)
    if base and base.model_id != model_id and find_base(base.model_id, base_revision or base.revision):
        raise ToolkitError(f"model {model_id}: an adapter on {base.model_id}, which is an adapter itself; merge that")
    weights_id, weights_revision = (base.model_id, base_revision or base.revision) if base else (model_id, revision)
    quantized = None
    if not gguf_file:
        quantized = find_quantization(
            weights_id,
            weights_revision,
            trust_remote_code=trust_remote_code,
            option=quantization,
            is_adapter=base is not None,
        )
    options |= quantized_loading(model_id, quantized, device, device_map)
    options["trust_remote_code"] = trust_remote_code
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # refused below, by their names
    if base is None:
        model = _load_whole(model_id, revision, gguf_file, options)
    else:
        model = _load_adapted(base, model_id, revision, base_revision, options)
    if model.get_output_embeddings() is None:
        raise ToolkitError(f"model {model_id}: it has no output embedding, so it predicts no tokens")
    finish_quantized(model_id, model, quantized)
    use_head_dtype(model, head_dtype)
    if "device_map" not in options:
        with _told_of_memory(model_id, device):
            model.to(device)  # until here, weights in the checkpoint's own dtype are pages of its mapped files
    if dtype == "auto":
        tell_of_emulation(model_id, model, compute_devices(model))
    return model.eval()


@contextmanager
def _told_of_memory(model_id: str, device: torch.device | str) -> Iterator[None]:
    """Within, weights go to a device. Raises ToolkitError if they do not fit there."""
    try:
        yield
    except OUT_OF_MEMORY as error:
        if not is_out_of_memory(error):
            raise
        raise ToolkitError(
            f"model {model_id}: no room for its weights on {device}. Use a smaller `dtype`, `quantization`, another "
            "`device`, or several (`tensor_parallel`, `device_map`)."
        ) from error


@in_step
def load_part(
    group: Group,
    model_id: str,
    revision: str | None = None,
    *,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    head_dtype: str | None = None,
):
    """As ``load_model``, for a model that the processes of ``group`` compute together.

    Each reads only its part of the weights from safetensors. Raises UsageError for what cannot be split: adapters,
    other kinds of checkpoints, and models for which transformers has no plan.
    """
    use_whole_float32()
    if find_base(model_id, revision):
        raise UsageError(f"`tensor_parallel`: model {model_id} is an adapter; merge it, save the model, and give that")
    config = load_config(model_id, revision, None, trust_remote_code)
    refuse_unsplit(config, group.size)
    options = {**loading_options(dtype, group.device), "trust_remote_code": trust_remote_code}
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    auto_class = _auto_class(model_id, revision, None, trust_remote_code)
    with torch.device("meta"):
        empty = auto_class.from_config(config, trust_remote_code=trust_remote_code)
    distributed, told = choose_split(empty, group.size)
    if told and group.leads:
        logger.info("%s", told)
    options |= {"distributed_config": distributed, "use_safetensors": True}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with _read_without_mapping(), _on_own_device(group):
        model = _load_whole(model_id, revision, None, options)
    use_head_dtype(model, head_dtype)
    if dtype == "auto" and group.leads:
        tell_of_emulation(model_id, model, [group.device])
    model.computing_group, model.head_part, group.model = group, find_head_part(model, group), model
    return model.eval()


@contextmanager
def _on_own_device(group: Group) -> Iterator[None]:
    """Within, transformers puts a part on its process' device.

    transformers takes the device's number from the environment, where another launcher may have set it, and its kind
    from what torch was built for, which is CUDA on many machines without a GPU.
    """
    before, kind = os.environ.get("LOCAL_RANK"), torch._C._get_accelerator
    os.environ["LOCAL_RANK"] = str(group.rank)
    torch._C._get_accelerator = lambda *_: torch.device(group.device.type)
    try:
        yield
    finally:
        torch._C._get_accelerator = kind
        os.environ.pop("LOCAL_RANK")
        if before is not None:
            os.environ["LOCAL_RANK"] = before


@contextmanager
def _read_without_mapping() -> Iterator[None]:
    """Within, transformers reads slices of safetensors without mapping the files: mapped pages would count as this
    process' memory."""
    from transformers import modeling_utils

    mapped = modeling_utils.safe_open
    modeling_utils.safe_open = lambda *args, **options: mapped(*args, **{**options, "backend": "pread"})
    try:
        yield
    finally:
        modeling_utils.safe_open = mapped


def _load_whole(model_id: str, revision: str | None, gguf_file: str | None, options: dict):
    auto_class = _auto_class(model_id, revision, gguf_file, options["trust_remote_code"])
    with _without_weights_bar():
        model, loaded = from_pretrained(auto_class, model_id, revision, gguf_file, **options)
    _refuse_incomplete(model_id, loaded)
    return model


@contextmanager
def _without_weights_bar() -> Iterator[None]:
    """Within, transformers shows no progress bar over tensors; the Hub's client still shows its downloads."""
    from transformers.utils import logging as transformers_logging

    were_shown = transformers_logging.is_progress_bar_enabled() and shows_downloads()
    transformers_logging.disable_progress_bar()
    if were_shown:
        show_downloads()
    try:
        yield
    finally:
        if were_shown:
            transformers_logging.enable_progress_bar()


def _load_adapted(base: Base, model_id: str, revision: str | None, base_revision: str | None, options: dict):
    if base.model_id == model_id:
        options = {**options, **NO_ADAPTER}
    logger.info("Merging the adapter %s into %s …", model_id, base.model_id)
    return merge(_load_whole(base.model_id, base_revision or base.revision, None, options), model_id, revision)


def _auto_class(model_id: str, revision: str | None, gguf_file: str | None, trust_remote_code: bool):
    return auto_class_of(load_config(model_id, revision, gguf_file, trust_remote_code))


def auto_class_of(config):
    """The class that loads a causal LM; for vision-language models without a text-only class, the whole model's."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    kind = type(config)
    is_text = kind in MODEL_FOR_CAUSAL_LM_MAPPING or kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForCausalLM if is_text else AutoModelForImageTextToText


def _refuse_incomplete(model_id: str, loaded: dict) -> None:
    """Raise ToolkitError for tensors that transformers has filled at random; warn of those that it has not used."""
    missing = sorted(loaded["missing_keys"])
    wrong = [f"{name} {list(there)} for {list(here)}" for name, there, here in sorted(loaded["mismatched_keys"])]
    if missing or wrong:
        lacks = f"{len(missing)} tensors are missing ({first_names(missing)})" if missing else ""
        has = f"{len(wrong)} have another shape ({first_names(wrong)})" if wrong else ""
        raise ToolkitError(
            f"model {model_id}: its checkpoint is not whole: {' and '.join(filter(None, (lacks, has)))}, which "
            "transformers fills with random numbers. Copy it again, or take another."
        )
    if unused := sorted(loaded["unexpected_keys"]):
        logger.warning(
            "model %s: %d tensors of its checkpoint are not used (%s)", model_id, len(unused), first_names(unused)
        )


def loading_options(
    dtype: str,
    device: torch.device | str,
    device_map: str | None = None,
    max_memory: dict | None = None,
    offload_folder: Path | None = None,
) -> dict:
    """The options of ``from_pretrained`` for the dtype ("auto" is float32 on a CPU), and for spreading the model.

    ``device_map`` is accelerate's "auto", "balanced" or "sequential"; ``device`` is then ignored. ``max_memory`` is
    what ``read_max_memory`` takes. Offloaded weights of a safetensors checkpoint are read from it; weights that are
    converted (GGUF, pickles, experts) go to ``offload_folder``. Raises ToolkitError without accelerate.
    """
    if device_map is None:
        if max_memory is not None:
            raise UsageError("`max_memory` says how far to fill devices; give `device_map` auto as well")
        on_cpu, placement = torch.device(device).type == "cpu", {}
    else:
        refuse_without(*ACCELERATE, "`device_map`")
        limits = read_max_memory(max_memory)
        on_cpu = all(place in HOST for place in limits or device_names())
        placement = {"device_map": device_map, "max_memory": limits, "offload_folder": offload_folder}
    return {"dtype": "float32" if dtype == "auto" and on_cpu else dtype, **placement}


def refuse_parts_here(size: int, device: torch.device) -> None:
    """Raise UsageError or ToolkitError if this many processes cannot compute a model on this machine."""
    refuse_too_many(size, device)
    refuse_without(*ACCELERATE, "`tensor_parallel`")


@in_step
@torch.inference_mode()
def logits_dtype(model) -> str:
    """The final dtype of the model's logits, such as "float32"."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=input_device(model))
    return str(model(input_ids=ids, use_cache=False).logits.dtype).removeprefix("torch.")
