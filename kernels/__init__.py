"""The kernels, and how one is chosen for a spec."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

from attnfuse.kernels.capability import Capability
from attnfuse.kernels.device import Device
from attnfuse.spec import Attention, ReplaceFill

FLOATS = frozenset({"float32", "bfloat16", "float16"})
NUMBERS = FLOATS | {"float64", "bool", "uint8", "int32", "int64"}
STEPS = frozenset({"scale", "bias", "shift", "softcap", "tanh", "clamp", "replace", "add", "cast"})
WEIGHT_STEPS = frozenset({"scale", "replace"})
LAYOUTS = frozenset({"dense", "packed", "packed_queries", "packed_keys"})


def _cpu_available() -> str | None:
    from attnfuse.kernels import cpu

    return cpu.available()


def _triton_available() -> str | None:
    from attnfuse.kernels import triton

    return triton.available()


def _weights_filled(spec: Attention) -> list[str]:
    filled = any(isinstance(s, ReplaceFill) and s.value != 0.0 for s in spec.weight_steps)
    return ["weights filled with a number other than 0"] if filled else []


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
TRITON = Kernel(
    "triton",
    Capability(
        # Triton's interpreter, for tests, takes tensors of the CPU
        frozenset({"cuda", "xpu"} | ({"cpu"} if os.environ.get("TRITON_INTERPRET") == "1" else set())),
        FLOATS,
        NUMBERS | {"int16", "int8"},
        STEPS,
        WEIGHT_STEPS,
        layouts=LAYOUTS,
        head_dims=256,
        # below, Triton has no tensor cores and Inductor's own kernels are faster
        least=80,
        also=_weights_filled,
        available=_triton_available,
    ),
    "attnfuse.kernels.triton",
)
REFERENCE = Kernel(
    "reference",
    Capability(
        frozenset({"cpu", "cuda", "npu", "xpu", "mps"}),
        FLOATS | {"float64"},
        NUMBERS | {"int16", "int8"},
        STEPS,
        WEIGHT_STEPS,
        layouts=LAYOUTS,
    ),
    "attnfuse.kernels.reference.kernel",
    on_request=True,
)

#: All kernels, the preferred ones first.
KERNELS: tuple[Kernel, ...] = (CPU, TRITON, REFERENCE)


def _no_bfloat16_casts(spec: Attention) -> list[str]:
    return [] if spec.out_dtype == spec.v_dtype == spec.qk_dtype else ["inputs and result of several dtypes"]


def _ascend_limits(spec: Attention) -> list[str]:
    found = ["an unshifted softmax"] if spec.softmax != "plain" else []
    heads = spec.groups
    return found + ([] if heads is not None and heads <= 256 else ["more than 256 query heads to a key head"])


#: What the kernels to come will take, so that every spec is held against it from the beginning; they are not chosen yet.
PLANNED: dict[str, Capability] = {
    # m8n8k4 tensor cores multiply float16 alone
    "volta": Capability(
        frozenset({"cuda"}),
        frozenset({"float16"}),
        NUMBERS,
        STEPS,
        WEIGHT_STEPS,
        head_dims=128,
        least=70,
        most=75,
        also=lambda spec: [*_weights_filled(spec), *_no_bfloat16_casts(spec)],
    ),
    # torch-npu's fused attention: scale, added bias, hidden keys, in this order
    "ascend": Capability(
        frozenset({"npu"}),
        FLOATS,
        FLOATS | {"bool", "int32", "int64"},
        frozenset({"scale", "bias", "replace", "add", "cast"}),
        frozenset(),
        head_dims=512,
        chips=frozenset({"Ascend910B", "Ascend910C"}),
        also=lambda spec: [*_ascend_limits(spec), *_no_bfloat16_casts(spec)],
    ),
}


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


def choose(spec: Attention, device: torch.device | Device, forced: str | None = None) -> Choice:
    """The kernel for `spec` on `device`: the first that can run it, or `forced` by name if that can."""
    device = Device.of(device)
    candidates: Sequence[Kernel] = [kernel_named(forced)] if forced else [k for k in KERNELS if not k.on_request]
    reasons = []
    for kernel in candidates:
        found = kernel.capability.reasons(spec, device)
        if not found:
            return Choice(kernel)
        reasons.append(f"kernel {kernel.name} cannot: {'; '.join(found)}")
    return Choice(None, tuple(reasons))
