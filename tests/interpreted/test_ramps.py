"""Ramps in the Triton kernels, interpreted."""

from __future__ import annotations

from pathlib import Path

import pytest
from kernel_cases import INF, make_spec, qkv, randn
from ramp_cases import *  # noqa: F403
from ramp_cases import ramped

from attnfuse.expr import Algebra, Const, K, Q, causal
from attnfuse.kernels import triton
from attnfuse.kernels.device import Device
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.triton import codegen
from attnfuse.kernels.triton.call import Call
from attnfuse.spec import Bias, Ramp, ReplaceFill, Scale


@pytest.fixture
def kernel():
    return triton


A = Algebra()
HALF, BEFORE = Scale(0.25), ReplaceFill(causal(), -INF)
DISTANCE = A.sub(K, Q)
OTHERS = {
    "quotient": A.floordiv(DISTANCE, Const(3)),
    "remainder": A.mod(A.add(K, Q), Const(5)),
    "far": A.add(A.mul(DISTANCE, Const(2**20)), Const(3)),
}


@pytest.mark.parametrize("far", [False, True])
def test_integers_that_an_addition_does_not_convert(far, monkeypatch):
    """Numbers beyond 2^22 are converted by the device; with indices beyond NEARBY all are."""
    q, k, v = qkv(1, 2, 40, 70, 8)
    slopes = [randn(1, 2, 1, 1, scale=0.1)]
    spec = make_spec(q, k, v, slopes, steps=(HALF, Ramp(0, DISTANCE)))
    assert ("lifted(x" in codegen.source(spec, far=far)) != far
    if far:
        monkeypatch.setattr(codegen, "NEARBY", 70)
    ramped(triton, q, k, v, slopes, Ramp(0, DISTANCE))
    big = make_spec(q, k, v, slopes, steps=(HALF, Ramp(0, OTHERS["far"])))
    assert "lifted(x" not in codegen.source(big)


def test_indices_are_cut_to_a_table_where_they_may_lie_outside():
    q, k, v = qkv(2, 2, 40, 70, 8)
    col = A.add(DISTANCE, Const(39))
    for columns, cut in ((109, False), (108, True)):
        table = randn(1, 2, 1, columns)
        spec = make_spec(q, k, v, [table], dims=[("1", "B1", "1", "T")], steps=(HALF, Bias(0, 1.0, None, col)))
        call = Call(spec, Inputs(q, k, v, [table]), Device("cpu"), lambda *launched: None)
        text = Path(call.functions.__file__).read_text()
        assert ("clamped(x" in text) == cut
        if not cut:
            ramped(triton, q, k, v, [table], Bias(0, 1.0, None, col), dims=[("1", "B1", "1", "T")], after=(BEFORE,))
