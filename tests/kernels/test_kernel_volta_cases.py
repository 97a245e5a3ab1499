"""The cases that the Triton kernels run, by the kernels for 7.0 and 7.5 in the emulator. `test_kernel_volta.py` is a sample."""

from __future__ import annotations

import kernel_cases
import pytest
import torch
from decode_cases import *  # noqa: F403
from emulated_volta import Emulated
from packed_cases import *  # noqa: F403
from ramp_cases import *  # noqa: F403
from rounding_cases import *  # noqa: F403
from sink_cases import *  # noqa: F403
from tile_cases import *  # noqa: F403

pytestmark = pytest.mark.slow

# it calls kernels by their name, which the emulator's have not
del test_ops_pass_opcheck  # noqa: F821


@pytest.fixture(params=[70, 75])
def kernel(request, monkeypatch):
    monkeypatch.setattr(kernel_cases, "DTYPE", torch.float16)
    monkeypatch.setattr(kernel_cases, "LOW", torch.float16)
    return Emulated(request.param)


@pytest.fixture
def decoded(kernel):
    return lambda: [name for name, _ in kernel.counts[-2:]] == ["attention_part", "attention_combined"]
