"""Ramps in the Triton kernels, interpreted, against the oracle: numbers of the head times integers of query and key."""

from __future__ import annotations

from pathlib import Path

import kernel_cases
import pytest
import torch
from kernel_cases import FLOAT_MIN, GATES, INF, bounds_of, make_spec, qkv, randn

from attnfuse.expr import Algebra, Const, K, Load, Q, causal
from attnfuse.kernels import triton
from attnfuse.kernels.device import Device
from attnfuse.kernels.inputs import Bounds, Inputs
from attnfuse.kernels.triton import codegen
from attnfuse.kernels.triton.call import Call
from attnfuse.spec import AddFill, Bias, Cast, Ramp, ReplaceFill, Scale, Shift, Softcap

A = Algebra()
HALF, BEFORE = Scale(0.25), ReplaceFill(causal(), -INF)
DISTANCE = A.sub(K, Q)
#: Numbers: of places alone, and others.
PLACES = {
    "distance": DISTANCE,
    "distance from an offset": A.add(A.sub(Q, K), Const(-7)),
    "near": A.mul(A.abs(DISTANCE), Const(-1)),
    "key": K,
    "clamped": A.maximum(A.minimum(DISTANCE, Const(20)), Const(-9)),
    "steps": A.sub(A.mul(K, Const(11)), A.mul(Q, Const(11))),
}
OTHERS = {
    "quotient": A.floordiv(DISTANCE, Const(3)),
    "remainder": A.mod(A.add(K, Q), Const(5)),
    "far": A.add(A.mul(DISTANCE, Const(2**20)), Const(3)),
}


def check(q, k, v, slopes, ramp, *, before=(HALF,), after=(), **fields):
    return kernel_cases.check(triton, q, k, v, slopes, steps=(*before, ramp, *after), **fields)


@pytest.mark.parametrize("name", [*(pytest.param(x, marks=pytest.mark.slow) for x in PLACES), *OTHERS])
def test_numbers(name):
    number = {**PLACES, **OTHERS}[name]
    scale = 2.0**-20 if name == "far" else 0.1
    check(*qkv(2, 2, 40, 70, 8), [randn(1, 2, 1, 1, scale=scale)], Ramp(0, number, 0.5))


@pytest.mark.parametrize("name", PLACES)
def test_scale_ramp_shift_and_sum_taken_together(name):
    q, k, v = qkv(1, 2, 40, 70, 16, dtype=torch.bfloat16)
    slopes = [randn(1, 2, 1, 1, dtype=torch.float32, scale=0.1)]
    ramp = Ramp(0, PLACES[name], -1.0)
    for after in ((), (BEFORE,)):
        traits = codegen.traits(make_spec(q, k, v, slopes, steps=(HALF, ramp, *after)))
        assert (traits.near, traits.merged, traits.factor, traits.slope) == (True, False, 0.25, 0.25)
        check(q, k, v, slopes, ramp, after=after)


def test_a_softcap_taken_along():
    q, k, v = qkv(1, 2, 40, 70, 16, dtype=torch.bfloat16)
    slopes, ramp = [randn(1, 2, 1, 1, dtype=torch.float32, scale=0.1)], Ramp(0, DISTANCE)
    traits = codegen.traits(make_spec(q, k, v, slopes, steps=(Softcap(3.0), ramp, BEFORE)))
    assert (traits.near, traits.factor, traits.slope) == (True, 3.0, 1.0)
    check(q, k, v, slopes, ramp, before=(Softcap(3.0),), after=(BEFORE,))


#: What keeps a scale or a sum where it is: the steps before and after a ramp.
APART = {
    "no scale": ((), ()),
    "two scales": ((HALF,), (Scale(2.0), BEFORE)),
    "a softcap before": ((HALF, Softcap(3.0)), (BEFORE,)),
    "a softcap after": ((HALF,), (Softcap(3.0),)),
    "a fill before": ((HALF, BEFORE), ()),
    "a finite fill": ((HALF,), (ReplaceFill(causal(), FLOAT_MIN),)),
    "a shift": ((HALF, Shift(2.0)), (BEFORE,)),
    "held": ((HALF,), (Cast("bfloat16"), BEFORE)),
    "a scale below 0": ((Scale(-0.25),), (BEFORE,)),
}


@pytest.mark.parametrize("name", APART)
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_beside_other_steps(name, dtype):
    before, after = APART[name]
    slopes = [randn(1, 2, 1, 1, dtype=torch.float32, scale=0.1)]
    check(*qkv(1, 2, 40, 70, 16, dtype=dtype), slopes, Ramp(0, DISTANCE), before=before, after=after)


def test_two_ramps_and_a_bias():
    operands = [randn(1, 2, 1, 1, scale=0.1), randn(2, 1, 1, 1, scale=0.1), randn(1, 2, 40, 70)]
    after = (Ramp(1, A.abs(DISTANCE), -2.0), Bias(2), BEFORE)
    check(*qkv(2, 2, 40, 70, 8), operands, Ramp(0, K), after=after)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 1, 1), (2, 1, 1, 1), (2, 2, 1, 1)])
@pytest.mark.parametrize("ordered", [pytest.param(False, marks=pytest.mark.slow), True])
def test_gradients_of_factors(shape, ordered):
    torch.use_deterministic_algorithms(ordered)
    try:
        check(*qkv(2, 2, 40, 70, 8), [randn(*shape)], Ramp(0, A.abs(DISTANCE), -0.05))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("gate", GATES)
def test_where_a_mask_keeps(gate):
    keep = GATES[gate]
    slopes = [randn(1, 2, 1, 1, scale=0.1)]
    check(*qkv(2, 2, 40, 70, 8), slopes, Ramp(0, DISTANCE, 0.5, keep), after=(AddFill(keep, -50.0),))


@pytest.mark.parametrize(
    ("number_dtype", "dtype"),
    [("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16")],
)
def test_rounding_is_that_of_the_graph(number_dtype, dtype):
    q, k, v = qkv(1, 2, 20, 400, 8)
    slope = torch.rand(1, 2, 1, 1) * 0.1 + 0.05
    number = A.sub(A.mul(K, Const(3)), Q)
    steps = (HALF, Ramp(0, number, 1.0, None, number_dtype, dtype))
    out, _ = kernel_cases.check(triton, q, k, v, [slope], steps=steps)
    # the same table, as a graph makes it
    places = (3 * torch.arange(400)[None] - torch.arange(20)[:, None]).to(getattr(torch, number_dtype)).float()
    bias = (slope * places).to(getattr(torch, dtype)).float()
    spec = make_spec(q, k, v, [bias], steps=(HALF, Bias(0)))
    want, _ = triton.forward(spec, Inputs(q, k, v, [bias]))
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)
    exact, _ = triton.forward(make_spec(q, k, v, [slope], steps=(HALF, Ramp(0, number))), Inputs(q, k, v, [slope]))
    assert not torch.allclose(out, exact, rtol=1e-3, atol=1e-3)


def test_position_ids():
    ids = torch.randint(0, 20, (2, 1, 1, 70))
    rows = ids.mT.contiguous()
    number = A.sub(Load(1, "int64"), Load(2, "int64"))
    slopes = randn(1, 2, 1, 1, dtype=torch.float32, scale=0.02)
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = qkv(2, 2, 70, 70, 8, dtype=dtype)
        operands = [slopes, ids, rows]
        assert not codegen.traits(make_spec(q, k, v, operands, steps=(HALF, Ramp(0, number)))).near
        check(q, k, v, operands, Ramp(0, number), after=(BEFORE,))


@pytest.mark.parametrize("far", [False, True])
def test_integers_that_an_addition_does_not_convert(far, monkeypatch):
    """Numbers beyond 2^22 are converted by the device; with indices beyond NEARBY all are."""
    q, k, v = qkv(1, 2, 40, 70, 8)
    slopes = [randn(1, 2, 1, 1, scale=0.1)]
    spec = make_spec(q, k, v, slopes, steps=(HALF, Ramp(0, DISTANCE)))
    assert ("lifted(x" in codegen.source(spec, far=far)) != far
    if far:
        monkeypatch.setattr(codegen, "NEARBY", 70)
    check(q, k, v, slopes, Ramp(0, DISTANCE))
    big = make_spec(q, k, v, slopes, steps=(HALF, Ramp(0, OTHERS["far"])))
    assert "lifted(x" not in codegen.source(big)


@pytest.mark.parametrize("name", ["key", "near"])
def test_heads_that_share_keys_have_ramps_of_their_own(name):
    q, k, v = randn(2, 2, 4, 1, 16), randn(2, 2, 1, 300, 16), randn(2, 2, 1, 300, 16)
    slopes = randn(1, 2, 4, 1, 1, scale=0.1)
    number = {"key": K, "near": A.mul(A.abs(A.sub(A.add(Q, Const(299)), K)), Const(-1))}[name]
    check(q, k, v, [slopes], Ramp(0, number), backward=False)


def test_packed_sequences_count_from_their_own_beginning():
    lengths = (30, 0, 5, 70)
    q, k, v = (randn(1, 2, sum(lengths), 8) for _ in range(3))
    ends = bounds_of(*lengths)
    slopes = [randn(1, 2, 1, 1, scale=0.1)]
    check(q, k, v, slopes, Ramp(0, DISTANCE), after=(BEFORE,), layout="packed", bounds=Bounds(ends, ends))


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
            check(q, k, v, [table], Bias(0, 1.0, None, col), dims=[("1", "B1", "1", "T")], after=(BEFORE,))
