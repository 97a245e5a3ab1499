"""tests/gluon_cases.py on a device of compute capability 9.0, both passes, or 10.0, where backward is that of Triton's kernels."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import kernel_cases
import pytest
import torch
from gluon_cases import *  # noqa: F403
from gluon_cases import CAUSAL, right
from kernel_cases import qkv

from attnfuse.kernels import gluon, triton
from attnfuse.kernels.device import Device
from attnfuse.kernels.gluon import launch
from attnfuse.kernels.inputs import Inputs

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def on_device(device: torch.device) -> Iterator[None]:
    if device.type == "cuda":
        # of which an AMD GPU has none
        capability = Device.of(device).capability
        if capability not in (90, 100):
            pytest.skip("the kernels are for compute capabilities 9.0 and 10.0")
        if gluon.missing(capability):
            pytest.skip(gluon.missing(capability))
    with device:
        yield


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Any:
    """With results that nobody has written before, and nothing that runs in its place."""

    def refused(*_: object) -> None:
        raise AssertionError("a Triton kernel ran")

    monkeypatch.setattr(triton, "forward", refused)
    monkeypatch.setattr(triton, "backward", refused)
    return gluon


@pytest.mark.parametrize("D", launch.TILES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients(kernel: Any, dtype: torch.dtype, D: int) -> None:
    """Of many tiles at the same time, also those that other kernels add to."""
    kernel_cases.check(kernel, *qkv(2, 4, 1500, 1500, D, dtype=dtype), steps=CAUSAL)


def test_gradients_by_the_statistics_of_each_other(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    inputs = qkv(2, 2, 300, 300, 64, dtype=torch.bfloat16)
    kernel_cases.check(SimpleNamespace(forward=gluon.forward, backward=triton.backward), *inputs, steps=CAUSAL)
    kernel_cases.check(SimpleNamespace(forward=triton.forward, backward=gluon.backward), *inputs, steps=CAUSAL)


@pytest.mark.parametrize("D", launch.TILES)
def test_gradients_of_keys_are_the_same_every_time(kernel: Any, D: int) -> None:
    """Only those of queries are added up in no order."""
    q, k, v = qkv(2, 8, 2048, 2048, D, dtype=torch.bfloat16)
    spec, inputs = kernel_cases.make_spec(q, k, v, steps=CAUSAL), Inputs(q, k, v)
    out, stats = kernel.forward(spec, inputs)
    dout = torch.randn(out.shape).to(out.dtype)
    first, *others = (kernel.backward(spec, inputs, dout, out, stats, [True] * 3) for _ in range(20))
    for dq, dk, dv in others:
        assert torch.equal(dk, first[1]) and torch.equal(dv, first[2])
        torch.testing.assert_close(dq, first[0], rtol=2**-6, atol=1e-3)


@pytest.mark.parametrize("D", launch.TILES)
def test_long_rows_give_the_same_every_time(kernel: Any, D: int) -> None:
    inputs = qkv(2, 8, 2048, 2048, D, dtype=torch.bfloat16)
    first = right(kernel, *inputs, steps=CAUSAL)
    for _ in range(20):
        out, _ = kernel_cases.check(kernel, *inputs, backward=False, steps=CAUSAL)
        assert torch.equal(out, first)
