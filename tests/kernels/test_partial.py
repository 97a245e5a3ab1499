"""Gradients of parts of the keys, by the statistics of whole rows, add up to those of all keys."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import make_spec, qkv
from partial_cases import parts_and_whole

from attnfuse import reasons
from attnfuse.expr import Algebra, Const, K, causal
from attnfuse.kernels import KERNELS, REFERENCE, choose, kernel_named, successor
from attnfuse.spec import Scale


@pytest.mark.parametrize("name", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
# the first half alone is all that the rows see: there a kernel could take its own sum for that of all keys
@pytest.mark.parametrize("keep", [None, causal(), Algebra().compare("lt", K, Const(9))])
def test_gradients_of_parts_add_up(name, dtype, keep):
    for found, wanted in zip(*parts_and_whole(kernel_named(name).load(), dtype, keep), strict=True):
        assert found.dtype == torch.float32
        assert (found - wanted).abs().max() < 1e-5 * max(1.0, wanted.abs().max())


def test_kernels_with_the_promise_have_it_and_others_are_refused_for_lack_of_it():
    q, k, v = qkv(Q=8, K=8, D=8)
    spec = make_spec(q, k, v, steps=(Scale(0.5),))
    assert {kernel.name for kernel in KERNELS if kernel.capability.partial} == {"cpu", "triton", "reference"}
    for kernel in KERNELS:
        lacks = reasons.KERNEL_NOT_PARTIAL() in kernel.capability.reasons(spec, torch.device("cpu"), partial=True)
        assert lacks != kernel.capability.partial
    assert choose(spec, torch.device("cpu"), partial=True).kernel.name == "cpu"
    refused = choose(spec, torch.device("cpu"), "flash_cpu", partial=True)
    assert refused.kernel is None and "statistics of whole rows" in str(refused.reason)
    assert successor("cpu", spec, torch.device("cpu"), partial=True) is REFERENCE
