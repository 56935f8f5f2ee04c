"""Loading a model: on one device, or spread by accelerate over several, with memory and disk behind.

What does not fit on the accelerators stays in memory or on disk, and is brought to an accelerator (without one, into
memory) for as long as its layer works. Meanwhile its parameters are on "meta", so ``model.device`` says nothing.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from chat_logits.errors import ACCELERATE, ToolkitError, UsageError, first_names, refuse_without
from chat_logits.hub import show_downloads, shows_downloads
from chat_logits.model.adapters import NO_ADAPTER, Base, find_base, merge
from chat_logits.model.group import Group, in_step, refuse_too_many
from chat_logits.model.head import use_head_dtype
from chat_logits.model.limits import from_pretrained, load_config
from chat_logits.model.parts import choose_split, find_head_part, refuse_unsplit
from chat_logits.model.quantization import find_quantization, finish_quantized, quantized_loading, stored_bytes

logger = logging.getLogger(__name__)

HOST = ("cpu", "disk")  # places of a device map that compute nothing where there is an accelerator


def choose_device(name: str | None) -> torch.device:
    """``device``, by default the first accelerator there is. Raises UsageError for one that is not there."""
    if name is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" has no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UsageError(f"`device` {name}: {reason}. Available: {', '.join(_devices())}.") from error
    return device


def _devices() -> list[str]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if accelerator else 0
    return ["cpu", *(f"{accelerator.type}:{i}" for i in range(count))]


def load_model(
    model_id: str,
    revision: str | None = None,
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

    A ``device_map`` spreads it under ``max_memory``, see ``loading_options``, whatever ``device`` says; then
    ``offload_folder`` must be there as long as the model is used. ``head_dtype`` is ``use_head_dtype``'s.
    A model that brings code of its own is loaded only with ``trust_remote_code``: that code then runs here. Of a
    vision-language checkpoint the text model is used. An adapter is merged into its base, which is taken at
    ``base_revision``, by default the one that the adapter names. A quantised checkpoint is computed with as it is;
    ``quantization``, one of ``quantization.CHOICES``, loads another in fewer bits, or dequantises one.
    Raises ToolkitError where a checkpoint is not whole, and before weights are read where it does not run here.
    """
    refuse_autocast()
    base = find_base(model_id, revision, gguf_file)
    if base and device_map:
        raise UsageError(f"`device_map`: model {model_id} is an adapter; merge it, save the model, and give that")
    options = loading_options(dtype, device, device_map, max_memory, offload_folder)
    if base and base.model_id != model_id and find_base(base.model_id, base_revision or base.revision):
        raise ToolkitError(f"model {model_id}: an adapter on {base.model_id}, which is an adapter itself; merge that")
    weights_id, weights_revision = (base.model_id, base_revision or base.revision) if base else (model_id, revision)
    quantized = None
    if not gguf_file:
        quantized = find_quantization(weights_id, weights_revision, trust_remote_code, quantization, base is not None)
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
        model.to(device)  # of the host's memory, weights in the checkpoint's own dtype take only pages of its files
    if dtype == "auto":
        _tell_of_emulation(model_id, model, compute_devices(model))
    return model.eval()


@in_step
def load_part(
    group: Group,
    model_id: str,
    revision: str | None = None,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    head_dtype: str | None = None,
):
    """As ``load_model``, of a model that the processes of ``group`` compute together.

    Each reads its part of the weights from safetensors, and nothing else. Raises UsageError for what is not split:
    adapters, other kinds of checkpoints, and models for which transformers has no plan.
    """
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
        _tell_of_emulation(model_id, model, [group.device])
    model.computing_group, model.head_part, group.model = group, find_head_part(model, group), model
    return model.eval()


def _tell_of_emulation(model_id: str, model, devices: list[torch.device]) -> None:
    """Warn of a bfloat16 model on a card without that arithmetic; nobody has asked for the dtype."""
    names = [name for name in map(_emulating_card, devices) if name]
    if model.dtype == torch.bfloat16 and names:
        told = "model %s: in bfloat16, as its checkpoint is, for which %s has no arithmetic: it is emulated, and slow. "
        logger.warning(told + "float16 or float32 (`dtype`) may be the better", model_id, names[0])


def _emulating_card(device: torch.device) -> str | None:
    """The name of a card that computes in bfloat16 by way of float32, such as Nvidia's before Ampere."""
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        is_emulated = not torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.cuda.get_device_name() if is_emulated else None


@contextmanager
def _on_own_device(group: Group) -> Iterator[None]:
    """Within, transformers puts a part on its process' device.

    It takes the number from the environment, where another launcher's may be, and the kind from what torch was built
    for, which is CUDA on many a machine without a GPU.
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
    """Within, transformers reads slices of safetensors: pages of mapped files would count as this process' memory."""
    from transformers import modeling_utils

    mapped = modeling_utils.safe_open
    modeling_utils.safe_open = lambda *args, **options: mapped(*args, **{**options, "backend": "pread"})
    try:
        yield
    finally:
        modeling_utils.safe_open = mapped


def _load_whole(model_id: str, revision: str | None, gguf_file: str | None, options: dict):
    auto_class = _auto_class(model_id, revision, gguf_file, options["trust_remote_code"])
    with _without_its_bar():
        model, loaded = from_pretrained(auto_class, model_id, revision, gguf_file, **options)
    _refuse_incomplete(model_id, loaded)
    return model


@contextmanager
def _without_its_bar() -> Iterator[None]:
    """Within, transformers shows no bar over tensors, which says little; the Hub's client still shows its downloads."""
    from transformers.utils import logging as its

    were_shown = its.is_progress_bar_enabled() and shows_downloads()
    its.disable_progress_bar()
    if were_shown:
        show_downloads()
    try:
        yield
    finally:
        if were_shown:
            its.enable_progress_bar()


def _load_adapted(base: Base, model_id: str, revision: str | None, base_revision: str | None, options: dict):
    if base.model_id == model_id:
        options = {**options, **NO_ADAPTER}
    logger.info("Merging the adapter %s into %s …", model_id, base.model_id)
    return merge(_load_whole(base.model_id, base_revision or base.revision, None, options), model_id, revision)


def _auto_class(model_id: str, revision: str | None, gguf_file: str | None, trust_remote_code: bool):
    return auto_class_of(load_config(model_id, revision, gguf_file, trust_remote_code))


def auto_class_of(config):
    """The class that loads a causal LM; for vision-language models without one of text alone, the whole's."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    kind = type(config)
    is_text = kind in MODEL_FOR_CAUSAL_LM_MAPPING or kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForCausalLM if is_text else AutoModelForImageTextToText


def _refuse_incomplete(model_id: str, loaded: dict) -> None:
    """Raise ToolkitError for tensors that transformers has filled at random; tell of those that it has left out."""
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
    """What ``from_pretrained`` needs for the dtype ("auto" is float32 on a CPU), and to spread a model, if it is to be.

    ``device_map`` is "auto", "balanced" or "sequential", as accelerate has them; ``device`` is then not looked at.
    ``max_memory`` is what ``read_max_memory`` takes. Weights on disk stay in a checkpoint of safetensors; those that
    are converted (GGUF, pickles, experts) go to ``offload_folder``. Raises ToolkitError without accelerate.
    """
    if device_map is None:
        if max_memory is not None:
            raise UsageError("`max_memory` says how far to fill devices; give `device_map` auto as well")
        on_cpu, placement = torch.device(device).type == "cpu", {}
    else:
        refuse_without(*ACCELERATE, "`device_map`")
        limits = read_max_memory(max_memory)
        on_cpu = all(place in HOST for place in limits or _places())
        placement = {"device_map": device_map, "max_memory": limits, "offload_folder": offload_folder}
    return {"dtype": "float32" if dtype == "auto" and on_cpu else dtype, **placement}


def refuse_autocast() -> None:
    """Raise UsageError within ``torch.autocast``: a model would compute in another dtype than is recorded of it."""
    for device_type in {"cpu", getattr(torch.accelerator.current_accelerator(), "type", "cpu")}:
        if torch.is_autocast_enabled(device_type):
            raise UsageError(
                f"called within torch.autocast({device_type!r}), which changes what a model computes: call it outside, "
                "and say `dtype`"
            )


def refuse_parts_here(size: int, device: torch.device) -> None:
    """Raise UsageError or ToolkitError where so many processes cannot compute a model on this machine."""
    refuse_too_many(size, device)
    refuse_without(*ACCELERATE, "`tensor_parallel`")


def read_max_memory(max_memory: dict | None) -> dict[int | str, int] | None:
    """Bytes for each place: from places such as 0, "0", "mps", "cpu" or "disk" to bytes, or texts such as "60GiB".

    Raises UsageError for a place that is not here, or a size that is none.
    """
    if max_memory is None:
        return None
    from accelerate.utils.modeling import convert_file_size_to_int

    places, sizes = _places(), {}
    for place, size in max_memory.items():
        key = int(place) if str(place).isdecimal() else place
        if key not in places:
            raise UsageError(f"`max_memory`: no place {str(place)!r}. Available: {', '.join(map(str, places))}.")
        try:
            sizes[key] = convert_file_size_to_int(size if isinstance(size, int) else str(size))
        except ValueError as error:
            raise UsageError(f"`max_memory`: {size!r} for {key}: expected bytes, or a text like '60GiB'") from error
    return sizes


def _places() -> list[int | str]:
    """The names that accelerate has for the devices here: numbers, but for Apple's."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return [*HOST]
    return ["mps", *HOST] if accelerator.type == "mps" else [*range(torch.accelerator.device_count()), *HOST]


def input_device(model) -> torch.device:
    """Where a model gets its token ids and gives its logits: where its output embedding works.

    A spread model takes ids anywhere, and brings its logits to where the ids were: thus they need not be moved.
    """
    hook = getattr(model.get_output_embeddings(), "_hf_hook", None)  # accelerate's, if the model is spread
    return torch.device(hook.execution_device) if hook else model.device


@in_step
@torch.inference_mode()
def logits_dtype(model) -> str:
    """The dtype that the model's logits have in the end, such as "float32"."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=input_device(model))
    return str(model(input_ids=ids, use_cache=False).logits.dtype).removeprefix("torch.")


def compute_devices(model) -> list[torch.device]:
    """All devices that a model computes on."""
    placed = set(getattr(model, "hf_device_map", {}).values()) - set(HOST)
    return [torch.device(place) for place in placed] or [input_device(model)]


def largest_fetch(model) -> int:
    """Bytes of the largest weights that are brought from memory or disk for the time a layer works, 0 if none are."""
    fetched = [
        sum(stored_bytes(weights) for weights in module.parameters(recurse=False) if weights.is_meta)
        for module in model.modules()
    ]
    return max(fetched)
