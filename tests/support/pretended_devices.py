"""Devices that are not there: tensors that say where they are, compute on the CPU, and refuse to meet others.

It is what torch does with two accelerators, as far as placement goes: operands of one operation must be on one device,
but for copies, and single numbers on the CPU.
"""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

FIRST, SECOND = torch.device("lazy", 0), torch.device("lazy", 1)  # a kind that torch knows, and never has kernels for
COPIES = ("aten::_to_copy", "aten::copy_")


class Placed(torch.Tensor):
    """A CPU tensor, ``value``, that says it is on ``device``."""

    @staticmethod
    def __new__(cls, value, device):
        options = {"strides": value.stride(), "dtype": value.dtype, "device": device}
        placed = torch.Tensor._make_wrapper_subclass(cls, value.shape, **options)
        placed.value = value
        return placed

    __torch_dispatch__ = classmethod(lambda _cls, *_: NotImplemented)  # but within pretended_devices()


@contextmanager
def pretended_devices():
    """Within, FIRST and SECOND can be computed on."""
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=…) is made on the CPU, then copied
    try:
        with torch.inference_mode(), _Pretending():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(False)


class _Pretending(TorchDispatchMode):
    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:  # what is made of simpler operations comes back as these
            found = func.decompose(*args, **kwargs)
        return run(func, args, kwargs) if found is NotImplemented else found


def run(func, args, kwargs):
    """The operation on the CPU; its results are where its operands are, or where they are asked for."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    places = {tensor.device for tensor in tensors if tensor.dim() or tensor.device.type != "cpu"}
    if len(places) > 1 and func._schema.name not in COPIES:
        raise RuntimeError(f"{func}: operands on {', '.join(sorted(map(str, places)))}")
    wrapped = {id(tensor.value): tensor for tensor in tensors if isinstance(tensor, Placed)}
    place = kwargs.get("device") or (tensors[0].device if func._schema.name in COPIES else next(iter(places), None))
    plain = tree_map_only(Placed, lambda tensor: tensor.value, (args, kwargs))
    found = func(*plain[0], **(plain[1] | ({"device": "cpu"} if kwargs.get("device") else {})))
    if place is None or torch.device(place).type != "lazy":
        return found
    return tree_map_only(
        torch.Tensor, lambda tensor: wrapped[id(tensor)] if id(tensor) in wrapped else Placed(tensor, place), found
    )


def place(model, places: dict[str, torch.device]) -> None:
    """Put the parts of a model where ``places`` (from their names) says, by accelerate."""
    from accelerate import dispatch_model

    for part, device in places.items():
        for module in model.get_submodule(part).modules():
            for key, weights in module.named_parameters(recurse=False):
                module._parameters[key] = torch.nn.Parameter(Placed(weights.data, device), requires_grad=False)
            for key, buffer in module.named_buffers(recurse=False):
                module._buffers[key] = Placed(buffer, device)
    dispatch_model(model, places, main_device=FIRST)
