"""What is known of a device before a kernel is chosen for it."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import torch

#: What code is compiled for: an NVIDIA GPU's compute capability (10 * major + minor), the name of an AMD GPU's architecture such as
#: 'gfx942', or 0 for any other device.
Target = int | str


@dataclass(frozen=True)
class Device:
    """type: as in torch.device. capability: 10 * major + minor of an NVIDIA GPU's compute capability, else 0. processors: how
    many blocks of threads run side by side at least, 0 where nobody knows. arch: of an AMD GPU, without its features."""

    type: str
    capability: int = 0
    name: str = ""
    processors: int = 0
    arch: str = ""

    @staticmethod
    def of(device: torch.device | Device) -> Device:
        if isinstance(device, Device):
            return device
        if device.type == "cuda" and torch.cuda.is_available():
            return _nvidia(device) if torch.version.hip is None else _amd(device)
        if device.type == "xpu" and torch.xpu.is_available():
            return Device("xpu", name=_name(device))
        if device.type == "npu":
            return Device("npu", name=_name(device))
        return Device(device.type)

    @staticmethod
    def declared(target: Target) -> Device:
        """A GPU that is not here, of which no more than this is known."""
        return Device("cuda", arch=target) if isinstance(target, str) else Device("cuda", target)

    @property
    def target(self) -> Target:
        return self.arch or self.capability

    def __str__(self) -> str:
        if self.arch:
            return f"{self.type} {self.arch}"
        return f"{self.type} {self.capability / 10:.1f}" if self.capability else self.type


def lanes(target: Target) -> int:
    """Threads of a warp: 64 of AMD's GCN and CDNA (gfx9 and before), 32 of all others."""
    found = re.fullmatch(r"gfx(\d+)[0-9a-f]{2}", target) if isinstance(target, str) else None
    return 64 if found and int(found[1]) < 10 else 32


def tf32_allowed() -> bool:
    """Whether PyTorch allows a GPU to round the factors of float32 products to TF32.

    The newer of two settings is read, which follows the older one; the older one raises where the newer was set.
    """
    return str(torch.backends.cuda.matmul.fp32_precision) == "tf32"


@functools.lru_cache(maxsize=64)
def _nvidia(device: torch.device) -> Device:
    found = torch.cuda.get_device_properties(device)
    return Device("cuda", 10 * found.major + found.minor, found.name, found.multi_processor_count)


@functools.lru_cache(maxsize=64)
def _amd(device: torch.device) -> Device:
    found = torch.cuda.get_device_properties(device)
    # 'gfx942:sramecc+:xnack-'
    arch = str(getattr(found, "gcnArchName", "")).partition(":")[0]
    return Device("cuda", name=found.name, processors=found.multi_processor_count, arch=arch)


@functools.lru_cache(maxsize=64)
def _name(device: torch.device) -> str:
    return str(torch.get_device_module(device).get_device_name(device))
