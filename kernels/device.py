"""What is known of a device before a kernel is chosen for it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """type: as in torch.device. capability: 10 * major + minor of an NVIDIA GPU's compute capability, else 0. processors: how
    many blocks of threads run side by side at least, 0 where nobody knows."""

    type: str
    capability: int = 0
    name: str = ""
    processors: int = 0

    @staticmethod
    def of(device: torch.device | Device) -> Device:
        if isinstance(device, Device):
            return device
        if device.type == "cuda" and torch.cuda.is_available():
            return _nvidia(device) if torch.version.hip is None else Device("cuda", name=_name(device))
        if device.type == "xpu" and torch.xpu.is_available():
            return Device("xpu", name=_name(device))
        if device.type == "npu":
            return Device("npu", name=_name(device))
        return Device(device.type)

    def __str__(self) -> str:
        return f"{self.type} {self.capability / 10:.1f}" if self.capability else self.type


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
def _name(device: torch.device) -> str:
    return str(torch.get_device_module(device).get_device_name(device))
