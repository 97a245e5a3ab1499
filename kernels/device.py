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
        if device.type == "cuda" and torch.version.hip is None and torch.cuda.is_available():
            return _nvidia(device)
        return Device(device.type)

    def __str__(self) -> str:
        return f"{self.type} {self.capability / 10:.1f}" if self.capability else self.type


@functools.lru_cache(maxsize=64)
def _nvidia(device: torch.device) -> Device:
    found = torch.cuda.get_device_properties(device)
    return Device("cuda", 10 * found.major + found.minor, found.name, found.multi_processor_count)
