"""Triton's kernels in its interpreter, on the CPU: TRITON_INTERPRET must be set before Triton is imported."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.exit("these tests run with TRITON_INTERPRET=1 (make test does)", returncode=2)

import bfloat16
import maxima
import patches
import reductions
import scalars

from attnfuse.kernels.triton import lists

bfloat16.mend()
maxima.mend()
scalars.mend()
patches.mend()
reductions.mend()


def pytest_configure(config: pytest.Config) -> None:
    # NumPy, which computes here, tells what a device does silently
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton")
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:numpy")


@pytest.fixture(autouse=True)
def _short_lists(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists of tiles however few these are, as the cases here are small."""
    monkeypatch.setattr(lists, "_FEW", getattr(request, "param", 0))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu")


@pytest.fixture
def options() -> dict[str, Any]:
    """Of torch.compile: what runs every attention on the Triton kernels, or fails."""
    return {"inner": "aot_eager", "kernel": "triton", "strict": True}


#: Cases for devices that cost the interpreter minutes and say little more here than others of this folder.
_LONG = "test_models_are_fused_and_hold_the_bar[dtype1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name == "test_device.py" and item.name.startswith(_LONG):
            item.add_marker(pytest.mark.slow)
