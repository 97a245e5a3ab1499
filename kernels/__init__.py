"""The kernels, and how one is chosen for a spec."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attnfuse import reasons
from attnfuse.kernels import ascend, cpu, gluon, library, triton, volta
from attnfuse.kernels.capability import Capability
from attnfuse.kernels.device import Device
from attnfuse.kernels.inputs import DENSE, Bounds
from attnfuse.kernels.library import banded, flash4, varlen
from attnfuse.kernels.reference.kernel import CAPABILITY as REFERENCE_CAPABILITY
from attnfuse.reasons import Reason
from attnfuse.spec import Attention


@dataclass(frozen=True)
class Kernel:
    """A folder under kernels/: its name, what it can do, and the module with forward and backward, imported on use.

    module may name an object in it: 'package.module:NAME'.
    """

    name: str
    capability: Capability
    module: str
    # never chosen unless it is asked for by name
    on_request: bool = False

    def load(self) -> Any:
        module, _, name = self.module.partition(":")
        found = importlib.import_module(module)
        return getattr(found, name) if name else found


CPU = Kernel("cpu", cpu.CAPABILITY, "attnfuse.kernels.cpu")
TRITON = Kernel("triton", triton.CAPABILITY, "attnfuse.kernels.triton")
VOLTA = Kernel("volta", volta.CAPABILITY, "attnfuse.kernels.volta")
# not chosen before a device has shown what it does; under the option tune it is compared
GLUON = Kernel("gluon", gluon.CAPABILITY, "attnfuse.kernels.gluon", on_request=True)
ASCEND = Kernel("ascend", ascend.CAPABILITY, "attnfuse.kernels.ascend")
ASCEND_INFERENCE = Kernel("ascend_inference", ascend.Inference.capability, "attnfuse.kernels.ascend:Inference")
REFERENCE = Kernel("reference", REFERENCE_CAPABILITY, "attnfuse.kernels.reference.kernel", on_request=True)
# ATen's are never chosen but by name and by PLAIN_FIRST, since what is faster depends on the device
FLASH, CUDNN, EFFICIENT, FLASH_CPU = (
    Kernel(x.name, x.capability, f"attnfuse.kernels.library:{x.name.upper()}", on_request=True)
    for x in (library.FLASH, library.CUDNN, library.EFFICIENT, library.FLASH_CPU)
)

# these never but by name, and where `tune` has measured them
FLASH4, VARLEN = (
    Kernel(x.name, x.capability, f"attnfuse.kernels.library.{x.name}:{x.name.upper()}", on_request=True)
    for x in (flash4.FLASH4, varlen.VARLEN)
)

#: All kernels, the preferred ones first.
KERNELS: tuple[Kernel, ...] = (
    CPU,
    TRITON,
    VOLTA,
    ASCEND,
    ASCEND_INFERENCE,
    GLUON,
    FLASH,
    CUDNN,
    EFFICIENT,
    FLASH_CPU,
    FLASH4,
    VARLEN,
    REFERENCE,
)

#: What is tried before Triton by compute capability, for the plain specs that ATen's kernels take. cuDNN's is the faster one
#: on some devices, and comes second until it has been measured and checked here: with `tune` it is compared as well.
PLAIN_FIRST: dict[int, tuple[Kernel, ...]] = {
    80: (FLASH, EFFICIENT),
    86: (FLASH, EFFICIENT),
    89: (FLASH, EFFICIENT),
    90: (FLASH, CUDNN, EFFICIENT),
    100: (FLASH, CUDNN, EFFICIENT),
    120: (FLASH, EFFICIENT),
}

#: What `tune` compares with those, by compute capability.
COMPARED: dict[int, tuple[Kernel, ...]] = {
    70: (EFFICIENT,),
    75: (EFFICIENT,),
    80: (VARLEN,),
    86: (VARLEN,),
    89: (VARLEN,),
    90: (GLUON, FLASH4, VARLEN),
    100: (GLUON, FLASH4, VARLEN),
    103: (FLASH4, VARLEN),
    120: (VARLEN,),
}


def prepare() -> None:
    """Begin to build what kernels need built, in the background, while the graph is still being read."""
    cpu.warm_up()


class Unsupported(ValueError):
    """No kernel, or not the one that was asked for, can run a spec; the message has the reasons, per kernel."""


@dataclass(frozen=True)
class Choice:
    """The kernel to use, or why there is none: what speaks against each that was asked."""

    kernel: Kernel | None
    reasons: tuple[Reason, ...] = ()

    @property
    def reason(self) -> Reason:
        """All reasons as one."""
        return self.reasons[0] if len(self.reasons) == 1 else reasons.NO_KERNEL(kernels=self.reasons)


def kernel_named(name: str) -> Kernel:
    """The kernel called `name`. Raises ValueError, with the names there are, if none is."""
    for kernel in KERNELS:
        if kernel.name == name:
            return kernel
    raise ValueError(f"there is no kernel {name!r}; the kernels are {', '.join(k.name for k in KERNELS)}")


def candidates(spec: Attention, device: torch.device | Device) -> list[Kernel]:
    """The kernels that can run `spec` on `device`, the one that is taken for the fastest first."""
    device = Device.of(device)
    return [k for k in _ordered(device) if not k.capability.reasons(spec, device)]


def compared(spec: Attention, device: torch.device | Device, bounds: Bounds = DENSE) -> list[Kernel]:
    """The kernels that `tune` measures: those of COMPARED and then the candidates. bounds: as in Inputs, whose values are not
    read; kernels that need the same on both sides are left out where they are not known to be that."""
    device = Device.of(device)
    uneven = spec.layout != "dense" and not banded.same(bounds) and banded.by_position(spec)
    others = () if uneven else COMPARED.get(device.capability, ())
    return [*(k for k in others if not k.capability.reasons(spec, device)), *candidates(spec, device)]


def not_compared(spec: Attention, device: torch.device | Device) -> list[Reason]:
    """Why `tune` does not measure kernels of COMPARED for a spec."""
    device = Device.of(device)
    against = ((k.name, k.capability.reasons(spec, device)) for k in COMPARED.get(device.capability, ()))
    return [reasons.KERNEL_NOT_COMPARED(kernel=name, limits=found) for name, found in against if found]


def _ordered(device: Device) -> list[Kernel]:
    return [*PLAIN_FIRST.get(device.capability, ()), *(k for k in KERNELS if not k.on_request)]


def choose(
    spec: Attention,
    device: torch.device | Device,
    forced: str | None = None,
    trains: bool = False,
    partial: bool = False,
) -> Choice:
    """The kernel for `spec` on `device`: the first that can run it, or `forced` by name if that can.

    trains: gradients are needed; partial: of parts of the keys, as `Capability.partial` says.
    """
    device = Device.of(device)
    tried: Sequence[Kernel] = [kernel_named(forced)] if forced else _ordered(device)
    against = []
    for kernel in tried:
        found = kernel.capability.reasons(spec, device, trains, partial)
        if not found:
            return Choice(kernel)
        if forced or not kernel.on_request:
            against.append(reasons.KERNEL_CANNOT(kernel=kernel.name, limits=found))
    return Choice(None, tuple(against))


def successor(name: str, spec: Attention, device: torch.device, partial: bool = False) -> Kernel:
    """What runs in place of a kernel that failed: the next one that can, at last the reference. partial: as in `choose`."""
    able = [k for k in candidates(spec, device) if k.capability.partial or not partial]
    after = [k for k in able if k.name != name]
    names = [k.name for k in able]
    rest = after[names.index(name) :] if name in names else after
    return rest[0] if rest else REFERENCE
