"""A model's shape without its values: its parameters, bytes and work, and how transformers' plan divides it.

It is built on torch's meta device from ``config.json`` alone; no file with weights is opened.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.pytorch_utils import Conv1D

from chat_logits.errors import ToolkitError, UsageError
from chat_logits.hub_errors import explain_loading
from chat_logits.model.bits import bits_of, is_kept, quantization_of, wildcard_name
from chat_logits.model.loading import auto_class_of
from chat_logits.model.memory import layer_configs
from chat_logits.model.parts import divide
from chat_logits.model.quantization import AS_STORED, DEQUANTIZED, QUANTIZED, ends_of

INDEX = "model.safetensors.index.json"
# Names in configurations for the number of experts that a token goes to (besides shared ones), and for that of experts.
EXPERTS_A_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
IN_EXPERTS = re.compile(r"(?:^|\.)experts\.")  # a parameter's name
MIXTURE = re.compile("moe|expert", re.IGNORECASE)  # the class of a module
LISTED_EXPERT = re.compile(
    r"\bexperts\.(\d+)\."
)  # a parameter's name in a model with a separate module for each expert
# For each of transformers' styles, the dimension along which weights and biases are divided (None: whole everywhere).
DIVIDED = {
    **dict.fromkeys(("colwise", "colwise_rep", "colwise_gather_output", "packed_colwise"), (-2, -1)),
    **dict.fromkeys(("rowwise", "rowwise_rep", "rowwise_split_input", "packed_rowwise"), (-1, None)),
    "embedding_rowwise": (0, 0),
    "embedding_colwise": (1, None),
    "grouped_gemm": (0, 0),
}
LINEAR = {"bitsandbytes": (torch.nn.Linear, Conv1D), "torchao": (torch.nn.Linear,)}  # what is quantised on loading
WHOLE = {
    "replicated_with_grad_allreduce",
    "replicate",
    "sequence_parallel",
    "local_params",
    "mla_kv_a_proj",
    "all_reduce",
    "moe_tp_experts",
    "moe_identity_expert",
    "ep_dispatch_experts",
}


class Part(NamedTuple):
    """A parameter. ``active`` is how many of its numbers work on a token; ``in_layers`` says that it belongs to the
    text model, and is neither an embedding nor the lm_head."""

    name: str
    weights: torch.Tensor
    active: int
    in_layers: bool


class Split(NamedTuple):
    """How processes share a model: a style for each module, whether each has all of attention; or why they cannot."""

    styles: dict[str, str]
    is_attention_whole: bool = False
    obstacle: str | None = None


@dataclass(frozen=True)
class Shape:
    """A model on the meta device, in the number format that it would be loaded in.

    ``stored`` are the bytes of its checkpoint's tensors by its index, None without one. ``quantization`` says how its
    weights are quantised, None if they are not, and ``on_loading`` that this is done only on loading. ``on_cpu`` says
    that it would compute on the CPU.
    """

    model: Any
    stored: int | None = None
    quantization: Mapping | None = None
    on_loading: bool = False
    on_cpu: bool = False

    @property
    def name(self) -> str:
        return type(self.model).__name__

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def head(self) -> Any:
        return self.model.get_output_embeddings()

    @cached_property
    def parameters(self) -> int:
        """The number of all parameters; tied ones count once."""
        return sum(part.weights.numel() for part in self._parts)

    @cached_property
    def experts(self) -> dict[str, int]:
        """The number of experts, by the name of each parameter that holds several experts, or one of several; empty
        without experts."""
        found: dict[str, int] = {}
        for name, module in self.model.named_modules():
            own = dict(module.named_parameters(prefix=name, recurse=False))
            together = {len(weights) for weights in own.values() if weights.dim() == 3}
            if len(together) == 1 and (name.rsplit(".", 1)[-1] == "experts" or hasattr(module, "num_experts")):
                found |= {key: len(weights) for key, weights in own.items() if len(weights) in together}
        listed = [(name, one) for name, _ in self.model.named_parameters() if (one := LISTED_EXPERT.search(name))]
        counts: dict[str, int] = {}
        for name, one in listed:
            layer = name[: one.start()]
            counts[layer] = max(counts.get(layer, 0), int(one[1]) + 1)
        return found | {name: counts[name[: one.start()]] for name, one in listed}

    @property
    def is_mixture(self) -> bool:
        """Whether it has experts, in any form."""
        return bool(self.experts) or self.has_unknown_experts

    @cached_property
    def has_unknown_experts(self) -> bool:
        """Whether most of its experts' parameters are in a form that is not known here."""
        sizes = {part.name: part.weights.numel() for part in self._parts}
        others = [size for name, size in sizes.items() if IN_EXPERTS.search(name) and name not in self.experts]
        if sum(others) > sum(sizes[name] for name in self.experts):
            return True
        counts = [getattr(self._text, name, None) for name in EXPERTS]
        is_said = not self.experts and any(type(count) is int and count > 1 for count in counts)
        return is_said and any(MIXTURE.search(type(module).__name__) for module in self.model.get_decoder().modules())

    @property
    def experts_a_token(self) -> int | None:
        """The number of routed experts that a token goes to; None without experts, or if the config does not say."""
        named = [getattr(self._text, name, None) for name in EXPERTS_A_TOKEN]
        return next((count for count in named if type(count) is int), None) if self.experts else None

    @property
    def active(self) -> int | None:
        """The number of parameters that work on one token; None if a mixture does not say how many experts a token
        goes to, or has its experts in an unknown form."""
        return sum(part.active for part in self._parts) if self._says_active else None

    def active_in_layers(self, processes: int = 1) -> int | None:
        """As ``active``, only in the layers, for the process with the most of them."""
        split = self.split(processes)
        own = [part.active * self._share(part, split, processes) for part in self._parts if part.in_layers]
        return round(sum(own)) if self._says_active else None

    @property
    def attended(self) -> int:
        """Multiplications of a token's attention for each token that it sees: heads × (query + value) × layers."""
        configs = layer_configs(self._text)
        kinds = getattr(self._text, "layer_types", None) or ["full_attention"] * self._text.num_hidden_layers
        layers = zip(configs if len(configs) > 1 else configs * len(kinds), kinds, strict=True)
        return sum(_attended(one) for one, kind in layers if kind.endswith("attention") and "linear" not in kind)

    def weight_bytes(self, processes: int = 1) -> int:
        """Bytes of weights in the process with the most, if so many processes share the model."""
        split = self.split(processes)
        own = sum(self._bytes_of(part) * self._share(part, split, processes) for part in self._parts)
        if self.quantization is None or self.on_loading or self.stored is None:
            return math.ceil(own)
        return math.ceil(self.stored * own / sum(map(self._bytes_of, self._parts)))

    def split(self, processes: int) -> Split:
        """How so many processes share the model: by transformers' plan, as far as its sizes divide evenly.

        If the heads do not divide, each process has all of attention; whole experts are distributed if their number
        divides.
        """
        if processes == 1:
            return Split({})
        if unknown := sorted({*(self.model.tp_plan or {}).values()} - DIVIDED.keys() - WHOLE):
            return Split({}, obstacle=f"styles of transformers' plan are not known here: {', '.join(unknown)}")
        divided = divide(self.model, processes)
        return Split(divided.styles, bool(divided.attention), self._obstacle(divided.styles, processes))

    def _obstacle(self, styles: dict[str, str], processes: int) -> str | None:
        if self.quantization is not None or quantization_of(self.model.config) is not None:
            return "quantised weights are not shared"
        if not any("*" in name and style in DIVIDED for name, style in styles.items()):
            return f"transformers' plan has nothing in {self.name}'s layers that divides by {processes}"
        for part in self._parts:
            dimension, style = self._divided_along(part, styles), _style_of(part.name, styles)
            if dimension is not None and "packed" in style and part.weights.shape[dimension] % (2 * processes):
                return f"{part.weights.shape[dimension]} rows that lie in one matrix do not divide by {2 * processes}"
        return None

    @property
    def _says_active(self) -> bool:
        return not self.is_mixture or (self.experts_a_token is not None and not self.has_unknown_experts)

    @property
    def _text(self):
        return self.model.config.get_text_config()

    @cached_property
    def _parts(self) -> list[Part]:
        text = {id(weights) for weights in self.model.get_decoder().parameters()} - self._ends
        return [
            Part(name, weights, self._active_of(name, weights), id(weights) in text)
            for name, weights in self.model.named_parameters()
        ]

    @cached_property
    def _ends(self) -> set[int]:
        return ends_of(self.model)

    def _active_of(self, name: str, weights: torch.Tensor) -> int:
        """Numbers of a parameter that work on a token, on average over experts."""
        count = self.experts.get(name)
        if count is None or self.experts_a_token is None:
            return weights.numel()
        return weights.numel() * min(count, self.experts_a_token) // count

    @cached_property
    def in_fewer_bits(self) -> dict[str, int]:
        """The quantised parameters, and how many numbers each has.

        On loading these are the linear layers' matrices; experts that are stored in one tensor stay unquantised.
        """
        if self.quantization is None:
            return {}
        kinds = LINEAR[self.quantization["quant_method"]] if self.on_loading else ()
        linear = {id(one.weight) for one in self.model.modules() if isinstance(one, kinds)}
        matrices = [part for part in self._parts if part.weights.dim() > 1 and id(part.weights) not in self._ends]
        return {
            part.name: part.weights.numel()
            for part in matrices
            if (id(part.weights) in linear if self.on_loading else not is_kept(self.quantization, part.name))
        }

    def _bytes_of(self, part: Part) -> float:
        bits = bits_of(self.quantization) if self.quantization is not None else None
        if bits is None or part.name not in self.in_fewer_bits:
            return part.weights.nbytes
        return part.weights.numel() * bits / 8

    def _share(self, part: Part, split: Split, processes: int) -> float:
        """The share of a parameter in the process with the most of it."""
        dimension = self._divided_along(part, split.styles)
        if dimension is None:
            return 1
        length = part.weights.shape[dimension]
        return math.ceil(length / processes) / length

    def _divided_along(self, part: Part, styles: dict[str, str]) -> int | None:
        of_weights, of_biases = DIVIDED.get(_style_of(part.name, styles), (None, None))
        return of_weights if part.weights.dim() > 1 else of_biases


def _attended(config) -> int:
    """Heads × (query + value) for a layer with this configuration."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    query, value = (getattr(config, name, None) or size for name in ("qk_head_dim", "v_head_dim"))
    return heads * (query + value)


def _style_of(name: str, styles: dict[str, str]) -> str:
    """The style of a parameter: its own, or that of its module."""
    parameter = wildcard_name(name)
    return styles.get(parameter) or styles.get(parameter.rsplit(".", 1)[0], "replicate")


def shape_of(
    config,
    dtype: str = "auto",
    model_id: str = "",
    revision: str | None = None,
    trust_remote_code: bool = False,
    on_cpu: bool = False,
    quantization: dict | None = None,
) -> Shape:
    """The shape of the model with this configuration; the checkpoint's index is looked up at ``model_id``.

    ``dtype`` "auto" is the configuration's, or float32 if ``on_cpu``, as a run loads it. ``quantization`` is a result
    of ``find_quantization``, None for the configuration's own. Raises ToolkitError for a model that cannot be built,
    UsageError if a number format or the bits of a quantised weight are not given.
    """
    kind = _dtype_of(config, dtype, on_cpu)
    stored = _stored_bytes(model_id, revision) if model_id else None
    recorded = quantization or {"weights": AS_STORED, "config": quantization_of(config)}
    found = None if recorded["weights"] == DEQUANTIZED else recorded["config"]
    if found and bits_of(found) is None and stored is None:
        method = found.get("quant_method")
        raise UsageError(
            f"model {model_id}: its quantization_config ({method}) names no bits of a weight that are known here, and "
            f"it has no {INDEX}. Expected one of the two; what its weights take is not guessed."
        )
    try:
        with torch.device("meta"):
            model = auto_class_of(config).from_config(config, dtype=kind, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise explain_loading(error, f"model {model_id}: built without values") from error
    if model.get_output_embeddings() is None:
        raise ToolkitError(f"model {model_id}: it has no output embedding, so it predicts no tokens")
    if type(getattr(layer_configs(config.get_text_config())[0], "num_attention_heads", None)) is not int:
        raise ToolkitError(f"model {model_id}: its config.json has no num_attention_heads, which the plan counts by")
    return Shape(model, stored, found, recorded["weights"] == QUANTIZED, on_cpu)


def _dtype_of(config, dtype: str, on_cpu: bool) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)
    if on_cpu:
        return torch.float32
    named = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if named is None:
        raise UsageError("`dtype` auto: the model's config.json names none, and no weights are read; give `dtype`")
    return getattr(torch, named) if isinstance(named, str) else named


def _stored_bytes(model_id: str, revision: str | None) -> int | None:
    """``total_size`` in a sharded checkpoint's index, None if there is no such file."""
    from transformers.utils import cached_file

    try:
        file = cached_file(model_id, INDEX, revision=revision, _raise_exceptions_for_missing_entries=False)
        size = json.loads(Path(file).read_text(encoding="utf-8"))["metadata"]["total_size"] if file else None
    except (KeyError, TypeError):
        return None  # an index without a total
    except Exception as error:
        raise explain_loading(error, f"model {model_id}: its {INDEX}") from error
    return int(size) if isinstance(size, int | float) else None
