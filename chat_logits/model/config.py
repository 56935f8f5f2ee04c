"""The options for the model: which one, on which device, and in batches of what size."""

from dataclasses import dataclass
from pathlib import Path

from chat_logits.errors import UsageError
from chat_logits.model.quantization import CHOICES
from chat_logits.options import COMPUTED, READ, SPREAD, Config, option

DEVICE_MAPS = ("auto", "balanced", "sequential")  # accelerate's


def refuse_device_with_map(device: str | None, device_map: str | None) -> None:
    """Raise UsageError if both are given."""
    if device and device_map:
        raise UsageError(f"`device` {device}: `device_map` chooses the devices; leave one of the two out")


def _refuse_gguf_path(model_id: str) -> None:
    if model_id.endswith(".gguf"):
        name = Path(model_id).name
        raise UsageError(f"`model_id` {model_id}: give the folder, and the file's name: `gguf_file` {name}")


@dataclass(frozen=True, repr=False)
class ModelConfig(Config):
    """A chat model, and how its forward passes are computed."""

    model_id: str = option(
        help="the chat model: a Hub id or a folder",
        group=READ,
        metavar="ID",
        check_value=_refuse_gguf_path,
        example="Qwen/Qwen2.5-0.5B-Instruct",
    )
    model_revision: str | None = option(
        None, help="branch, tag or commit of a Hub model", unset="its main branch", group=READ, metavar="REV"
    )
    gguf_file: str | None = option(
        None, help="the GGUF file within the model's folder to load", unset="none", group=READ, metavar="NAME"
    )
    batch_tokens: int | None = option(
        None,
        help="padded tokens a forward pass; less needs less memory",
        unset="from the device's total memory (not its free memory); 768 at most on a CPU",
        group=COMPUTED,
        metavar="TOKENS",
        least=1,
    )
    logit_memory: int | None = option(
        None,
        help="memory for logits at once; more logit rows are computed in pieces",
        unset="1/8 of the device's total memory less the weights (not of its free memory), 8192 at most; on a CPU "
        "1/16, 256 at most",
        group=COMPUTED,
        metavar="MIB",
        least=1,
    )
    prefix_cache: bool = option(
        True, help="cache prefixes that conversations share, such as a system prompt", unset="cached", group=COMPUTED
    )
    dtype: str = option(
        "auto",
        help="the model's number format",
        unset="auto: float32 on a CPU, else the model's own",
        group=COMPUTED,
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    head_dtype: str | None = option(
        None,
        help="number format of the logits: float32 for sums and output of a 16-bit model's lm_head, or the model's own",
        unset="float32, if the lm_head is a plain matrix",
        group=COMPUTED,
        choices=("float32", "model"),
    )
    quantization: str | None = option(
        None,
        help="load a 16-bit model in fewer bits, by the package in the name (4 bits are nf4), or compute with a "
        "quantised checkpoint's weights in `dtype`, if no kernels for it run here",
        unset="as the checkpoint is",
        group=COMPUTED,
        choices=CHOICES,
    )
    device: str | None = option(
        None, help="cpu, cuda, cuda:1, mps, …", unset="the first accelerator, else cpu", group=COMPUTED, metavar="NAME"
    )
    device_map: str | None = option(
        None,
        help="spread a model that is too large for one device over all devices, including the CPU and the disk; "
        "needs accelerate",
        unset="one device",
        group=COMPUTED,
        choices=DEVICE_MAPS,
    )
    max_memory: dict | None = option(
        None,
        help='with a device map, memory for weights by device, such as \'{"0": "60GiB", "cpu": "200GiB"}\'',
        unset="accelerate's choice",
        group=COMPUTED,
        metavar="JSON",
    )
    attn_implementation: str | None = option(
        None, help="eager, sdpa, …", unset="transformers' choice", group=COMPUTED, metavar="NAME"
    )
    tensor_parallel: int = option(
        1,
        help="devices of one machine that compute a model together, each with a part of every layer; on a CPU, "
        "processes; needs accelerate",
        unset="1, one device",
        group=SPREAD,
        metavar="N",
        least=1,
    )
    trust_remote_code: bool = option(
        False, help="run Python code that comes with the model or tokenizer", unset="refuse", group=COMPUTED
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_device_with_map(self.device, self.device_map)
        if self.quantization and self.gguf_file:
            raise UsageError(f"`quantization` {self.quantization}: a GGUF file has its own; leave it out")
        if self.max_memory is not None and not self.device_map:
            raise UsageError("`max_memory`: it goes with `device_map`; batches have `batch_tokens` and `logit_memory`")
        if self.tensor_parallel > 1:
            self._refuse_beside_tensor_parallel()

    def _refuse_beside_tensor_parallel(self) -> None:
        asked = f"`tensor_parallel` {self.tensor_parallel}"
        if self.device_map:
            raise UsageError(f"{asked}: `device_map` spreads whole layers; leave one of the two out")
        if self.gguf_file:
            raise UsageError(f"{asked}: `gguf_file` {self.gguf_file} cannot be read in parts; give safetensors")
        if self.quantization:
            raise UsageError(
                f"{asked}: `quantization` {self.quantization} cannot be done in parts; leave one of the two out"
            )
        if self.device not in (None, "cpu"):
            raise UsageError(f"{asked}: `device` {self.device} is one; leave it out, or give cpu")
