"""The kernels for Ascend NPUs, without one: torch_npu's own schemas and fakes, and operators as documents say (operators.py).

A process of its own: torch_npu changes torch where it is imported, and needs stand-ins for CANN's libraries.
"""

# ruff: noqa: E402

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("ATTNFUSE_ASCEND", Path(__file__).parents[2] / ".ascend"))
if not (FOLDER / "site" / "torch_npu").is_dir():
    pytest.exit(f"these tests need torch_npu in {FOLDER}: make setup-ascend", returncode=2)
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
sys.path.append(str(FOLDER / "site"))

import stand_ins

stand_ins.load(FOLDER / "stand_ins")

import operators
import torch
import torch_npu  # noqa: F401

from attnfuse import kernels
from attnfuse.kernels.ascend import chips
from attnfuse.kernels.capability import Capability

_LIBRARY = operators.install()


@pytest.fixture(params=operators.ORDERS)
def npu(request: pytest.FixtureRequest) -> Iterator[operators.Device]:
    """Operators on tensors of the CPU, under each order that the documents give."""
    with operators.device(request.param) as device:
        yield device


@pytest.fixture
def once() -> Iterator[operators.Device]:
    """The same where nothing is added, so that one order is enough."""
    with operators.device() as device:
        yield device


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels for NPUs are the ones that a CPU gets."""
    monkeypatch.setattr(Capability, "_of_device", lambda self, device: [])
    monkeypatch.setattr(chips, "family", lambda device: "910B")
    monkeypatch.setattr(kernels, "_ordered", lambda device: [kernels.ASCEND])


@pytest.fixture
def device() -> torch.device:
    return torch.device("npu", 0)
