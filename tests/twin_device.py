"""A second device that is none: tensors that say that they are on it and hold a CPU tensor, for tests of what crosses devices.

Ops on them run on the CPU. As on a real device, an op that is given tensors of both devices raises, but for copies from one to
the other and for numbers (tensors without dims).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

#: A type of device that every build of PyTorch knows and none has.
DEVICE = torch.device("lazy")
_COPIES = {"aten::copy_", "aten::_to_copy"}


class Twin(torch.Tensor):
    """A tensor of the second device, which holds `x`."""

    x: torch.Tensor

    @staticmethod
    def __new__(cls, x: torch.Tensor) -> Twin:
        made = torch.Tensor._make_wrapper_subclass(
            cls, x.shape, strides=x.stride(), storage_offset=x.storage_offset(), dtype=x.dtype, device=DEVICE
        )
        made.x = x
        return made

    @staticmethod
    def of(x: Any) -> Any:
        """A tensor on the second device for one on the CPU; other values as they are."""
        return Twin(x) if isinstance(x, torch.Tensor) else x

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Twin({self.x})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an op that has to do with the second device on the CPU; its tensors are of the device that they would be of."""
    name = func._schema.name
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    twins = [x for x in tensors if isinstance(x, Twin)]
    if twins and name not in _COPIES and any(not isinstance(x, Twin) and x.dim() for x in tensors):
        raise RuntimeError(f"{name}: tensors on {DEVICE} and on cpu")
    wanted = kwargs.get("device")
    here = bool(twins) if wanted is None else torch.device(wanted).type == DEVICE.type
    if name == "aten::copy_":
        here = isinstance(args[0], Twin)
    if wanted is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    found = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    if name.endswith("_") and isinstance(args[0], torch.Tensor):
        return args[0]
    return tree_map(Twin.of, found) if here else found


def _held(x: Any) -> Any:
    return x.x if isinstance(x, Twin) else x


@contextlib.contextmanager
def twin_device() -> Iterator[None]:
    """In here tensors can be made on the second device."""
    with _Data(), _Ops():
        yield


class _Data(TorchFunctionMode):
    """torch.tensor, which asks no dispatch mode for its device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func is torch.tensor and device is not None and torch.device(device).type == DEVICE.type:
            return Twin(func(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)


class _Ops(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = tree_flatten((args, kwargs))[0]
        device = kwargs.get("device")
        if any(isinstance(x, Twin) for x in tensors) or (
            device is not None and torch.device(device).type == DEVICE.type
        ):
            with self:
                return run(func, args, kwargs)
        return func(*args, **kwargs)


def placed(model: nn.Module) -> nn.Module:
    """The model with its parameters and buffers on the second device."""
    for module in model.modules():
        for name, x in list(module._parameters.items()):
            if x is not None:
                module._parameters[name] = nn.Parameter(Twin(x.detach()), requires_grad=False)
        for name, x in list(module._buffers.items()):
            if x is not None:
                module._buffers[name] = Twin(x)
    return model
