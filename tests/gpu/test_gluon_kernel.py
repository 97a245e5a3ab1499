"""tests/gluon_cases.py on a device of compute capability 9.0 or 10.0, with the backward of the Triton kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import kernel_cases
import pytest
import torch
from gluon_cases import *  # noqa: F403
from gluon_cases import CAUSAL, right
from kernel_cases import qkv

from attnfuse.kernels import gluon, triton
from attnfuse.kernels.gluon import launch

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def on_device(device: torch.device) -> Iterator[None]:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) not in ((9, 0), (10, 0)):
            pytest.skip("the kernels are for compute capabilities 9.0 and 10.0")
        if gluon.missing(10 * major + minor):
            pytest.skip(gluon.missing(10 * major + minor))
    with device:
        yield


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Any:
    """With results that nobody has written before, and nothing that runs in its place."""

    def refused(*_: object) -> None:
        raise AssertionError("the Triton kernel ran")

    monkeypatch.setattr(triton, "forward", refused)
    return gluon


def test_gradients(kernel: Any) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        kernel_cases.check(kernel, *qkv(2, 2, 300, 300, 64, dtype=dtype), steps=CAUSAL)


@pytest.mark.parametrize("D", launch.TILES)
def test_long_rows_give_the_same_every_time(kernel: Any, D: int) -> None:
    inputs = qkv(2, 8, 2048, 2048, D, dtype=torch.bfloat16)
    first = right(kernel, *inputs, steps=CAUSAL)
    for _ in range(20):
        out, _ = kernel_cases.check(kernel, *inputs, backward=False, steps=CAUSAL)
        assert torch.equal(out, first)
