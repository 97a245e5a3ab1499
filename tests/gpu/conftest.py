"""Triton's kernels on a real device: the cases of tests/interpreted and tests/device_cases.py, which run there too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")


@pytest.fixture
def device() -> torch.device:
    # tests marked gpu are skipped without one; taken out of the skip, they can be run in Triton's interpreter
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def options() -> dict[str, Any]:
    """Of torch.compile: what runs every attention on the Triton kernels, or fails."""
    return {"kernel": "triton", "strict": True}
