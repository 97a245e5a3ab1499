"""The reference as a kernel: its backward belongs to the forward that gave out and stats, whichever kernel and keys that had."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kernel_cases import GATES, WEIGHTS, bounds_of, check, evaluate, make_spec, qkv, randn
from numbered_cases import *  # noqa: F403
from sink_cases import *  # noqa: F403

from attnfuse import ops
from attnfuse.expr import dense
from attnfuse.kernels import cpu
from attnfuse.kernels.inputs import Bounds, Inputs
from attnfuse.kernels.reference import kernel as reference_kernel
from attnfuse.spec import AddFill, Bias, Cast, Clamp, ReplaceFill, Scale, Shift, Sink, Softcap, Tanh


@pytest.fixture
def kernel():
    return reference_kernel


def merged(parts):
    """(out, stats) of all keys from those of some."""
    top = torch.stack([stats[0] for _, stats in parts]).amax(0)
    shift = torch.where(top == -math.inf, 0.0, top)
    sums = [torch.where(stats[0] == -math.inf, 0.0, stats[1] * (stats[0] - shift).exp()) for _, stats in parts]
    total = torch.stack(sums).sum(0)
    share = torch.where(total == 0.0, 1.0, total)
    out = sum(out * (own / share).unsqueeze(-1) for (out, _), own in zip(parts, sums))
    return out, torch.stack([top, torch.where(total == 0.0, math.nan, total)])


_KEEP = dense(0)


@st.composite
def specs(draw):
    """Score steps on operands 0 (bool, [*batch, Q, K]), 1 (floating, the same) and 2 (floating, [*batch, Q, 1]); none needs to
    know the number of a key."""
    step = st.sampled_from(
        (
            Scale(0.5),
            Scale(-1.5),
            Scale(operand=1),
            Bias(1),
            Bias(1, -0.5, keep=_KEEP),
            Bias(2),
            Shift(0.7),
            Softcap(2.0),
            Tanh(),
            Clamp(-0.8, 1.1),
            ReplaceFill(_KEEP, -math.inf),
            ReplaceFill(_KEEP, -2.0),
            AddFill(_KEEP, -1e9),
            AddFill(_KEEP, -3.0),
            Cast("float16"),
            Cast("bfloat16"),
        )
    )
    steps = tuple(draw(st.lists(step, max_size=4)))
    weights = draw(st.sampled_from(((), (Scale(0.5), Scale(operand=1)), (ReplaceFill(_KEEP, 0.0),))))
    return {
        "steps": steps,
        "weight_steps": weights,
        "lse": draw(st.booleans()),
        "hidden": draw(st.sampled_from(("zero", "nan_to_zero"))),
        "sink": draw(st.sampled_from((None, None, Sink(0.3), Sink(operand=2)))),
    }


@given(specs(), st.integers(1, 29), st.sampled_from((1, 2)), st.integers(0, 2**20))
@settings(max_examples=60)
def test_gradients_of_some_keys_after_the_forward_of_all_add_up(fields, cut, heads, seed):
    torch.manual_seed(seed)
    q, k, v = qkv(2, heads, 7, 30, 4)
    operands = [torch.rand(2, 1, 7, 30) < 0.6, randn(1, heads, 7, 30), randn(1, heads, 7, 1)]
    spec = make_spec(q, k, v, operands, **fields)
    dlse = randn(2, heads, 7) if spec.lse else None
    # the sink is a score of the first keys' rows
    rest = make_spec(q, k, v, operands, **{**fields, "sink": None})
    parts = [(spec, slice(0, cut)), (rest, slice(cut, None))]
    given = [
        (s, q, k[..., at, :], v[..., at, :], [x if x.shape[-1] == 1 else x[..., at] for x in operands])
        for s, at in parts
    ]
    out, stats = merged([reference_kernel.forward(s, Inputs(*x)) for s, *x in given])
    dout = torch.randn_like(out)
    whole, whole_stats = reference_kernel.forward(spec, Inputs(q, k, v, operands))
    _, want = evaluate(spec, (q, k, v, *operands), None, torch.float64, dout, dlse=dlse)
    # a fill of -inf times a negative number is +inf
    assume(all(x is None or bool(x.isfinite().all()) for x in (whole, *want)))
    torch.testing.assert_close(out, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ops.log_sum_exp(stats), ops.log_sum_exp(whole_stats), rtol=1e-4, atol=1e-4)
    needs = [True] * 3 + [False, True, True]
    found = [reference_kernel.backward(s, Inputs(*x), dout, out, stats, needs, dlse=dlse) for s, *x in given]
    for i, (a, b, both) in enumerate(zip(*found, want)):
        if not needs[i]:
            assert a is None and b is None
            continue
        # of what belongs to a key each part has its own
        shape = [q, k, v, *operands][i].shape
        sum_of = a + b if a.shape == shape else torch.cat([a, b], dim=-2 if i < 3 else -1)
        both = torch.zeros_like(sum_of) if both is None else both
        assert float((sum_of - both).abs().max()) <= 1e-4 * (1.0 + float(both.abs().max())), i


@pytest.mark.skipif(cpu.available() is not None, reason=str(cpu.available()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_goes_on_where_another_kernels_forward_left_off(dtype):
    """With weights that are the other forward's own, not those that this one would have found."""
    q, k, v = qkv(2, 2, 40, 70, 8, dtype=dtype)
    bias = randn(1, 2, 40, 70, dtype=dtype)
    spec = make_spec(q, k, v, [bias], steps=(Scale(0.3), Bias(0), ReplaceFill(causal(20), -math.inf)), dropout=0.2)  # noqa: F405
    seed = torch.tensor([5])
    out, stats = cpu.forward(spec, Inputs(q, k, v, [bias], seed))
    dout = torch.randn(out.shape).to(dtype)
    want = cpu.backward(spec, Inputs(q, k, v, [bias], seed), dout, out, stats, [True] * 4)
    found = reference_kernel.backward(spec, Inputs(q, k, v, [bias], seed), dout, out, stats, [True] * 4)
    for a, b in zip(found, want):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=8 * torch.finfo(dtype).eps)
    # twice the sum and half the result: every weight is half of what it was
    halved = torch.stack([stats[0], 2 * stats[1]])
    half = reference_kernel.backward(spec, Inputs(q, k, v, [bias], seed), dout, out / 2, halved, [True] * 4)
    torch.testing.assert_close(half[2].float(), found[2].float() / 2, rtol=2e-2, atol=8 * torch.finfo(dtype).eps)


@settings(max_examples=20, deadline=None)
@given(
    large=st.sampled_from((0.0, 1.0, 1e4, 1e39, -1e39, 1e300, -1e300, torch.finfo(torch.float64).min)),
    scale=st.sampled_from((0.3, 30.0, 1e5)),
    sink=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_float64_keeps_its_digits_and_its_range_in_backward(large, scale, sink, seed):
    """The statistics too: in float32 a maximum loses digits, or is infinite."""
    torch.manual_seed(seed)
    q, k, v = (x.double() for x in qkv(1, 2, 5, 6, 4))
    # whole rows, and some keys of the others
    some = (torch.rand(1, 1, 5, 6) < 0.2) | (torch.arange(5) == 3)[:, None]
    bias = torch.zeros(1, 1, 5, 6, dtype=torch.float64).masked_fill(some, large)
    fields = {"sink": Sink(value=1.0)} if sink else {}
    spec = make_spec(q, k, v, [bias], steps=(Scale(scale), Bias(0)), **fields)
    out, stats = reference_kernel.forward(spec, Inputs(q, k, v, [bias]))
    assert stats.dtype == torch.float64
    dout = torch.randn_like(out)
    found = reference_kernel.backward(spec, Inputs(q, k, v, [bias]), dout, out, stats, [True] * 4)
    leaves = [x.detach().requires_grad_() for x in (q, k, v, bias)]
    scores = leaves[0] * scale @ leaves[1].mT + leaves[3]
    if sink:
        scores = torch.cat([scores, torch.ones_like(scores[..., :1])], -1)
    wanted = torch.autograd.grad(scores.softmax(-1)[..., :6] @ leaves[2], leaves, dout)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max() + 1.0))


@pytest.mark.parametrize("name", WEIGHTS)
def test_weight_steps(kernel, name):
    check(
        kernel, *qkv(2, 2, 40, 70, 8), [torch.rand(2, 1, 40, 70) < 0.7, randn(1, 2, 40, 70)], weight_steps=WEIGHTS[name]
    )


@pytest.mark.parametrize("gate", GATES)
def test_a_bias_with_a_mask(kernel, gate):
    check(kernel, *qkv(1, 2, 40, 70, 8), [randn(1, 2, 40, 70)], steps=(Bias(0, 1.0, keep=GATES[gate]),))


def test_packed_sequences_are_differentiated_one_by_one(kernel):
    q, k, v = randn(1, 2, 40, 8), randn(1, 2, 50, 8), randn(1, 2, 50, 8)
    bounds = Bounds(bounds_of(10, 0, 30), bounds_of(20, 5, 25))
    spec = make_spec(q, k, v, layout="packed", dropout=0.3)
    seed = torch.tensor([9])
    out, stats = kernel.forward(spec, Inputs(q, k, v, seed=seed, bounds=bounds))
    dout = torch.randn_like(out)
    found = kernel.backward(spec, Inputs(q, k, v, seed=seed, bounds=bounds), dout, out, stats, [True] * 3)
    _, want = evaluate(spec, (q, k, v), seed, torch.float64, dout, bounds)
    for a, b in zip(found, want):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
