"""How a model is split over the processes of a group: by transformers' own plan, as far as its sizes divide evenly.

A plan has a style for each module, by its name with * for the layer number. Modules that it leaves out are whole in
every process.
"""

import re
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import transformers
from torch.distributed.tensor import DTensor

from chat_logits.errors import ToolkitError, UsageError
from chat_logits.model.bits import quantization_of, wildcard_name
from chat_logits.model.group import Group, local

LEAST_TRANSFORMERS = (5, 24)  # the version with which results were compared
ATTENTION = re.compile(r"(^|\.)\w*(attn|attention)\w*(\.|$)")
HEADS = re.compile(r"num\w*_heads")  # configuration keys for the number of attention heads of some kind
GATHERED = ("colwise_gather_output", "colwise_rep")  # styles of an lm_head that gathers all logits
SPLITS = re.compile("colwise|rowwise|grouped_gemm")  # styles that leave a process a part of a parameter
WAY_OUT = "`device_map` auto spreads its layers instead"


class HeadPart(NamedTuple):
    """The part of the logits that a process has: its first token id, and the number of ids in the whole vocabulary."""

    first_id: int
    vocabulary: int


class Division(NamedTuple):
    """transformers' plan for a model, as far as its sizes divide evenly.

    ``styles`` has a style for each module. The modules named in ``attention`` are whole in each process, because these
    ``heads`` do not divide. ``by_expert`` says whether whole experts are distributed.
    """

    styles: dict[str, str]
    attention: list[str]
    heads: dict[str, int]
    by_expert: bool


def divide(model, size: int) -> Division:
    """How ``size`` processes share a model; it does not need weights."""
    styles, heads = dict(model.tp_plan or {}), _undivided_heads(model.config, size)
    attention = [name for name in styles if ATTENTION.search(name)] if heads else []
    by_expert = _experts_divide(model, size)
    experts = _expert_plan(model) if by_expert else {}
    return Division({**styles, **dict.fromkeys(attention, "replicate"), **experts}, attention, heads, by_expert)


def choose_split(model, size: int) -> tuple[Any, str | None]:
    """transformers' DistributedConfig for ``size`` processes, and a message to log or None.

    ``model`` needs no weights. Logits are not gathered in the lm_head. Raises UsageError, naming the model's type, if
    layers cannot be split.
    """
    from transformers.distributed import DistributedConfig

    kind, (plan, attention, heads, by_expert) = model.config.model_type, divide(model, size)
    changed, told = dict.fromkeys(attention, "replicate"), None
    if attention:
        counts = " and ".join(f"{number} {name}" for name, number in sorted(heads.items()))
        told = f"Attention is whole in each of the {size} processes: {counts} do not divide by {size}"
    split = {name: style for name, style in plan.items() if SPLITS.search(style)}
    if not any("layers" in name or ".h." in name for name in split):
        why = f"what it could split does not divide by {size}" if changed else "transformers has no plan for its layers"
        raise UsageError(f"`tensor_parallel` {size}: model type {kind}: {why}; {WAY_OUT}")
    _refuse_packed(model, split, size)
    head = _name_of(model, model.get_output_embeddings())
    if plan.get(head) in GATHERED:
        changed[head] = "colwise"
    return DistributedConfig(tp_size=size, ep_size=size if by_expert else 1, tp_plan=changed or None), told


def refuse_unsplit(config, size: int) -> None:
    """Raise UsageError for what is never split: quantised weights, or any model with an older transformers."""
    version = transformers.__version__
    if tuple(map(int, version.split(".")[:2])) < LEAST_TRANSFORMERS:
        least = ".".join(map(str, LEAST_TRANSFORMERS))
        raise UsageError(f"`tensor_parallel` {size}: it needs transformers {least} or newer, {version} is installed")
    if quantization_of(config) is not None:
        raise UsageError(f"`tensor_parallel` {size}: the checkpoint's weights are quantised; {WAY_OUT}")


def find_head_part(model, group: Group) -> HeadPart | None:
    """Which logits the model gives in this process; None if it gives all of them.

    Raises ToolkitError if the lm_head is not split in the way torch.chunk splits.
    """
    weight = model.get_output_embeddings().weight
    if not isinstance(weight, DTensor):
        return None
    longest = -(-weight.shape[0] // group.size)
    first = min(group.rank * longest, weight.shape[0])
    if len(local(weight)) != min(longest, weight.shape[0] - first):
        raise ToolkitError(
            f"model type {model.config.model_type}: its lm_head is split in an order of its own; {WAY_OUT}"
        )
    return HeadPart(first, weight.shape[0])


def join_logits(logits: torch.Tensor, part: HeadPart | None, group: Group | None) -> torch.Tensor:
    """All logits (…, V), in every process, from the parts (…, V_part) that they have."""
    if part is None or group is None:
        return logits
    longest = -(-part.vocabulary // group.size)
    padded = torch.nn.functional.pad(logits, (0, longest - logits.shape[-1])).contiguous()
    parts = [torch.empty_like(padded) for _ in range(group.size)]
    dist.all_gather(parts, padded, group=group.process_group)
    return torch.cat(parts, dim=-1)[..., : part.vocabulary]


def _name_of(model, module) -> str:
    return next((name for name, each in model.named_modules() if each is module), "")


def _undivided_heads(config, size: int) -> dict[str, int]:
    """The kinds of heads for which the number does not divide by ``size``, with that number."""
    named = config.get_text_config().to_dict()
    counts = {key: value for key, value in named.items() if HEADS.fullmatch(key) and type(value) is int}
    return {key: value for key, value in counts.items() if value % size}


def _expert_plan(model) -> dict[str, str]:
    return getattr(model, "ep_plan", None) or {}  # older transformers have none


def _experts_divide(model, size: int) -> bool:
    """Whether there is an expert plan, and each process gets the same number of experts of a layer."""
    dispatched = {name for name, style in _expert_plan(model).items() if style == "ep_dispatch_experts"}
    counts = [getattr(module, "num_experts", 1) for _, module in _matching(model, dispatched)]
    return bool(counts) and not any(count % size for count in counts)


def _refuse_packed(model, split: dict[str, str], size: int) -> None:
    """Raise UsageError if a matrix that packs two halves would be cut unevenly."""
    packed = {name: -1 if "rowwise" in style else -2 for name, style in split.items() if "packed" in style}
    parameters = {wildcard_name(name): each for name, each in model.named_parameters()}
    for name, dim in packed.items():
        for each in (parameters.get(name), parameters.get(f"{name}.weight")):
            if each is not None and each.shape[dim] % (2 * size):
                kind = model.config.model_type
                raise UsageError(
                    f"`tensor_parallel` {size}: model type {kind}: {name} {list(each.shape)} does not divide by "
                    f"{size}; {WAY_OUT}"
                )


def _matching(model, names: set[str]) -> list[tuple[str, Any]]:
    """The modules with one of these names, in which * stands for numbers."""
    return [each for each in model.named_modules() if wildcard_name(each[0]) in names]
