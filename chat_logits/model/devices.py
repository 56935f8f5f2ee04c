"""The devices of this machine, and those that a model computes on.

The layers of a spread model that do not fit on the accelerators stay in memory or on disk. Each is brought to an
accelerator (without one, into memory) while it computes. Otherwise its parameters are on "meta", so ``model.device``
cannot be relied on.
"""

import torch

from chat_logits.errors import UsageError
from chat_logits.model.quantization import stored_bytes

HOST = ("cpu", "disk")  # places of a device map that compute nothing if there is an accelerator


def choose_device(name: str | None) -> torch.device:
    """The device of this name, by default the first accelerator; with its number, such as "cuda:0".

    Raises UsageError for a device that does not exist here or cannot compute.
    """
    chosen = name or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        tried = torch.zeros(1, device=torch.device(chosen))
        tried.item()  # "meta" has no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UsageError(f"`device` {chosen}: {reason}. Available: {', '.join(_devices())}.") from error
    return tried.device


def _devices() -> list[str]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if accelerator else 0
    return ["cpu", *(f"{accelerator.type}:{i}" for i in range(count))]


def read_max_memory(max_memory: dict | None) -> dict[int | str, int] | None:
    """Bytes for each place. A place is given as 0, "0", "mps", "cpu" or "disk", a size in bytes or as "60GiB".

    Raises UsageError for a place that does not exist here, or an invalid size.
    """
    if max_memory is None:
        return None
    from accelerate.utils.modeling import convert_file_size_to_int

    places, sizes = device_names(), {}
    for place, size in max_memory.items():
        key = int(place) if str(place).isdecimal() else place
        if key not in places:
            raise UsageError(f"`max_memory`: no place {str(place)!r}. Available: {', '.join(map(str, places))}.")
        try:
            sizes[key] = convert_file_size_to_int(size if isinstance(size, int) else str(size))
        except ValueError as error:
            raise UsageError(f"`max_memory`: {size!r} for {key}: expected bytes, or a text like '60GiB'") from error
    return sizes


def device_names() -> list[int | str]:
    """The names that accelerate uses for the devices here: numbers, except for Apple's."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return [*HOST]
    return ["mps", *HOST] if accelerator.type == "mps" else [*range(torch.accelerator.device_count()), *HOST]


def input_device(model) -> torch.device:
    """The device for a model's token ids and logits: the one that its output embedding computes on.

    A spread model accepts ids on any device and returns its logits there; with this one, the logits are not moved.
    """
    hook = getattr(model.get_output_embeddings(), "_hf_hook", None)  # accelerate's, if the model is spread
    return torch.device(hook.execution_device) if hook else model.device


def compute_devices(model) -> list[torch.device]:
    """All devices that a model computes on."""
    placed = set(getattr(model, "hf_device_map", {}).values()) - set(HOST)
    return [torch.device(place) for place in placed] or [input_device(model)]


def largest_fetch(model) -> int:
    """Bytes of the largest weights that are brought from memory or disk while a layer computes, 0 if there are none."""
    fetched = [
        sum(stored_bytes(weights) for weights in module.parameters(recurse=False) if weights.is_meta)
        for module in model.modules()
    ]
    return max(fetched)
