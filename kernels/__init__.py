"""The kernels, and how one is chosen for a spec."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

from attnfuse.kernels.capability import Capability
from attnfuse.spec import Attention

FLOATS = frozenset({"float32", "bfloat16", "float16"})
NUMBERS = FLOATS | {"float64", "bool", "uint8", "int32", "int64"}
STEPS = frozenset({"scale", "bias", "shift", "softcap", "tanh", "clamp", "replace", "add", "cast"})
WEIGHT_STEPS = frozenset({"scale", "replace"})


def _cpu_available() -> str | None:
    from attnfuse.kernels import cpu

    return cpu.available()


@dataclass(frozen=True)
class Kernel:
    """A folder under kernels/: its name, what it can do, and the module with forward and backward, imported on use."""

    name: str
    capability: Capability
    module: str
    # never chosen unless it is asked for by name
    on_request: bool = False

    def load(self) -> ModuleType:
        return importlib.import_module(self.module)


CPU = Kernel(
    "cpu",
    Capability(frozenset({"cpu"}), FLOATS, NUMBERS, STEPS, WEIGHT_STEPS, available=_cpu_available),
    "attnfuse.kernels.cpu",
)
REFERENCE = Kernel(
    "reference",
    Capability(
        frozenset({"cpu", "cuda", "npu", "xpu", "mps"}),
        FLOATS | {"float64"},
        NUMBERS | {"int16", "int8"},
        STEPS,
        WEIGHT_STEPS,
    ),
    "attnfuse.kernels.reference.kernel",
    on_request=True,
)

#: All kernels, the preferred ones first.
KERNELS: tuple[Kernel, ...] = (CPU, REFERENCE)


def prepare() -> None:
    """Begin to build what kernels need built, in the background, while the graph is still being read."""
    from attnfuse.kernels import cpu

    cpu.warm_up()


class Unsupported(ValueError):
    """No kernel, or not the one that was asked for, can run a spec; the message has the reasons, per kernel."""


@dataclass(frozen=True)
class Choice:
    """The kernel to use, or the reasons for none."""

    kernel: Kernel | None
    reasons: tuple[str, ...] = ()


def kernel_named(name: str) -> Kernel:
    """The kernel called `name`. Raises ValueError, with the names there are, if none is."""
    for kernel in KERNELS:
        if kernel.name == name:
            return kernel
    raise ValueError(f"there is no kernel {name!r}; the kernels are {', '.join(k.name for k in KERNELS)}")


def choose(spec: Attention, device: torch.device, forced: str | None = None) -> Choice:
    """The kernel for `spec` on `device`: the first that can run it, or `forced` by name if that can."""
    candidates: Sequence[Kernel] = [kernel_named(forced)] if forced else [k for k in KERNELS if not k.on_request]
    reasons = []
    for kernel in candidates:
        found = kernel.capability.reasons(spec, device)
        if not found:
            return Choice(kernel)
        reasons.append(f"kernel {kernel.name} cannot: {'; '.join(found)}")
    return Choice(None, tuple(reasons))
