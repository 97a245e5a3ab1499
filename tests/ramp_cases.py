"""Ramps against the oracle: numbers of the head times integers of query and key. For the kernel module that the fixture gives."""

from __future__ import annotations

import kernel_cases
import pytest
import torch
from kernel_cases import FLOAT_MIN, GATES, INF, bounds_of, in_bfloat16, make_spec, qkv, randn

from attnfuse.expr import Algebra, Const, K, Load, Q, causal
from attnfuse.kernels.inputs import Bounds, Inputs
from attnfuse.kernels.program.traits import traits as traits_of
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


def ramped(kernel, q, k, v, slopes, ramp, *, before=(HALF,), after=(), **fields):
    return kernel_cases.check(kernel, q, k, v, slopes, steps=(*before, ramp, *after), **fields)


@pytest.mark.parametrize("name", [*(pytest.param(x, marks=pytest.mark.slow) for x in PLACES), *OTHERS])
def test_numbers(kernel, name):
    number = {**PLACES, **OTHERS}[name]
    scale = 2.0**-20 if name == "far" else 0.1
    q, k, v = qkv(2, 2, 40, 70, 8)
    slopes = [randn(1, 2, 1, 1, dtype=torch.float32, scale=scale)]
    # float16 has no such numbers, and nothing in it says what rounding costs their gradients
    backward = name != "far" or torch.float16 != kernel_cases.DTYPE
    ramped(kernel, q, k, v, slopes, Ramp(0, number, 0.5), backward=backward)


@pytest.mark.parametrize("name", PLACES)
def test_scale_ramp_shift_and_sum_taken_together(kernel, name):
    q, k, v = qkv(1, 2, 40, 70, 16, dtype=kernel_cases.LOW)
    slopes = [randn(1, 2, 1, 1, dtype=torch.float32, scale=0.1)]
    ramp = Ramp(0, PLACES[name], -1.0)
    for after in ((), (BEFORE,)):
        traits = traits_of(in_bfloat16(make_spec(q, k, v, slopes, steps=(HALF, ramp, *after))))
        assert (traits.near, traits.merged, traits.factor, traits.slope) == (True, False, 0.25, 0.25)
        ramped(kernel, q, k, v, slopes, ramp, after=after)


def test_a_softcap_taken_along(kernel):
    q, k, v = qkv(1, 2, 40, 70, 16, dtype=kernel_cases.LOW)
    slopes, ramp = [randn(1, 2, 1, 1, dtype=torch.float32, scale=0.1)], Ramp(0, DISTANCE)
    traits = traits_of(in_bfloat16(make_spec(q, k, v, slopes, steps=(Softcap(3.0), ramp, BEFORE))))
    assert (traits.near, traits.factor, traits.slope) == (True, 3.0, 1.0)
    ramped(kernel, q, k, v, slopes, ramp, before=(Softcap(3.0),), after=(BEFORE,))


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
@pytest.mark.parametrize("low", [pytest.param(False, marks=pytest.mark.slow), True])
def test_beside_other_steps(kernel, name, low):
    before, after = APART[name]
    slopes = [randn(1, 2, 1, 1, dtype=torch.float32, scale=0.1)]
    q, k, v = qkv(1, 2, 40, 70, 16, dtype=kernel_cases.LOW if low else None)
    ramped(kernel, q, k, v, slopes, Ramp(0, DISTANCE), before=before, after=after)


def test_two_ramps_and_a_bias(kernel):
    operands = [randn(1, 2, 1, 1, scale=0.1), randn(2, 1, 1, 1, scale=0.1), randn(1, 2, 40, 70)]
    after = (Ramp(1, A.abs(DISTANCE), -2.0), Bias(2), BEFORE)
    ramped(kernel, *qkv(2, 2, 40, 70, 8), operands, Ramp(0, K), after=after)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 1, 1), (2, 1, 1, 1), (2, 2, 1, 1)])
@pytest.mark.parametrize("ordered", [pytest.param(False, marks=pytest.mark.slow), True])
def test_gradients_of_factors(kernel, shape, ordered):
    torch.use_deterministic_algorithms(ordered)
    try:
        ramped(kernel, *qkv(2, 2, 40, 70, 8), [randn(*shape)], Ramp(0, A.abs(DISTANCE), -0.05))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("gate", GATES)
def test_where_a_mask_keeps(kernel, gate):
    keep = GATES[gate]
    slopes = [randn(1, 2, 1, 1, scale=0.1)]
    ramped(kernel, *qkv(2, 2, 40, 70, 8), slopes, Ramp(0, DISTANCE, 0.5, keep), after=(AddFill(keep, -50.0),))


@pytest.mark.parametrize(
    ("number_dtype", "dtype"),
    [("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16")],
)
def test_rounding_is_that_of_the_graph(kernel, number_dtype, dtype):
    q, k, v = qkv(1, 2, 20, 400, 8)
    slope = torch.rand(1, 2, 1, 1) * 0.1 + 0.05
    number = A.sub(A.mul(K, Const(3)), Q)
    steps = (HALF, Ramp(0, number, 1.0, None, number_dtype, dtype))
    out, _ = kernel_cases.check(kernel, q, k, v, [slope], steps=steps)
    # the same table, as a graph makes it
    places = (3 * torch.arange(400)[None] - torch.arange(20)[:, None]).to(getattr(torch, number_dtype)).float()
    bias = (slope * places).to(getattr(torch, dtype)).float()
    spec = make_spec(q, k, v, [bias], steps=(HALF, Bias(0)))
    want, _ = kernel.forward(spec, Inputs(q, k, v, [bias]))
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)
    exact, _ = kernel.forward(make_spec(q, k, v, [slope], steps=(HALF, Ramp(0, number))), Inputs(q, k, v, [slope]))
    assert not torch.allclose(out, exact, rtol=1e-3, atol=1e-3)


def test_position_ids(kernel):
    ids = torch.randint(0, 20, (2, 1, 1, 70))
    rows = ids.mT.contiguous()
    number = A.sub(Load(1, "int64"), Load(2, "int64"))
    slopes = randn(1, 2, 1, 1, dtype=torch.float32, scale=0.02)
    for dtype in (kernel_cases.DTYPE, kernel_cases.LOW):
        q, k, v = qkv(2, 2, 70, 70, 8, dtype=dtype)
        operands = [slopes, ids, rows]
        assert not traits_of(in_bfloat16(make_spec(q, k, v, operands, steps=(HALF, Ramp(0, number))))).near
        ramped(kernel, q, k, v, operands, Ramp(0, number), after=(BEFORE,))


@pytest.mark.parametrize("name", ["key", "near"])
def test_heads_that_share_keys_have_ramps_of_their_own(kernel, name):
    q, k, v = randn(2, 2, 4, 1, 16), randn(2, 2, 1, 300, 16), randn(2, 2, 1, 300, 16)
    slopes = randn(1, 2, 4, 1, 1, scale=0.1)
    number = {"key": K, "near": A.mul(A.abs(A.sub(A.add(Q, Const(299)), K)), Const(-1))}[name]
    ramped(kernel, q, k, v, [slopes], Ramp(0, number), backward=False)


def test_packed_sequences_count_from_their_own_beginning(kernel):
    lengths = (30, 0, 5, 70)
    q, k, v = (randn(1, 2, sum(lengths), 8) for _ in range(3))
    ends = bounds_of(*lengths)
    slopes = [randn(1, 2, 1, 1, scale=0.1)]
    ramped(kernel, q, k, v, slopes, Ramp(0, DISTANCE), after=(BEFORE,), layout="packed", bounds=Bounds(ends, ends))
