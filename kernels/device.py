"""What is known of a device before a kernel is chosen for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """type: as in torch.device. capability: 10 * major + minor of an NVIDIA GPU's compute capability, else 0."""

    type: str
    capability: int = 0
    name: str = ""

    @staticmethod
    def of(device: torch.device | Device) -> Device:
        if isinstance(device, Device):
            return device
        if device.type == "cuda" and torch.version.hip is None and torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability(device)
            return Device("cuda", 10 * major + minor, torch.cuda.get_device_name(device))
        return Device(device.type)

    def __str__(self) -> str:
        return f"{self.type} {self.capability / 10:.1f}" if self.capability else self.type
