"""Packed layouts: sequences that lie one after the other, without padding. For the kernel module that the fixture gives."""

from __future__ import annotations

import kernel_cases
import pytest
import torch
from kernel_cases import FLOAT_MIN, INF, bounds_of, check, make_spec, randn

from attnfuse import expr
from attnfuse.expr import Algebra, Const, Load, causal, dense
from attnfuse.kernels import reference
from attnfuse.kernels.inputs import Bounds, Inputs
from attnfuse.spec import AddFill, Bias, ReplaceFill, Scale

#: Empty, single, around a tile of the interpreter's 32 queries by 64 keys, and longer; the last is the longest.
LENGTHS = (5, 0, 1, 33, 64, 70)
LONGEST = max(LENGTHS)


def packed(lengths, *rest, width=16, gap=0, dtype=None):
    """Random rows [1, *rest, sum of lengths, width], laid out token by token, with NaN where no sequence is."""
    bounds = bounds_of(*lengths, gap=gap)
    x = torch.full((int(bounds[1, -1]) + gap, *rest, width), torch.nan, dtype=dtype or kernel_cases.DTYPE)
    for start, end in bounds.T.tolist():
        x[start:end] = randn(end - start, *rest, width, dtype=dtype)
    return x.movedim(0, -2)[None], bounds


def attention(lengths=LENGTHS, keys=None, heads=2, D=16, E=16, gap=0, dtype=None):
    q, q_bounds = packed(lengths, heads, width=D, gap=gap, dtype=dtype)
    k, k_bounds = packed(keys or lengths, heads, width=D, gap=gap, dtype=dtype)
    v, _ = packed(keys or lengths, heads, width=E, gap=gap, dtype=dtype)
    return q, k, v, Bounds(q_bounds, k_bounds)


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "steps", [(Scale(0.25),), (Scale(0.25), ReplaceFill(causal(0), -INF))], ids=["plain", "causal"]
)
def test_each_sequence_attends_within_itself(kernel, steps, dtype):
    q, k, v, bounds = attention(dtype=dtype, E=24)
    check(kernel, q, k, v, bounds=bounds, layout="packed", steps=steps, out_order=(0, 2, 1, 3))


def test_rows_of_no_sequence_are_zero_and_reach_nothing(kernel):
    q, k, v, bounds = attention(gap=3)
    spec = make_spec(q, k, v, layout="packed")
    out, stats = kernel.forward(spec, Inputs(q, k, v, bounds=bounds))
    inside = torch.zeros(q.shape[-2], dtype=torch.bool)
    for start, end in bounds.q.T.tolist():
        inside[start:end] = True
    assert bool((out[..., ~inside, :] == 0).all()) and bool(out[..., inside, :].isfinite().all())
    dout = torch.randn_like(out)
    dout[..., ~inside, :] = torch.nan
    grads = kernel.backward(spec, Inputs(q, k, v, bounds=bounds), dout, out, stats, [True] * 3)
    for grad in grads:
        assert bool((grad[..., ~inside, :] == 0).all()) and bool(grad[..., inside, :].isfinite().all())
    clean = [torch.where(inside[:, None], x, 0.0) for x in (q, k, v)]
    want = reference.attend(spec, Inputs(*clean, bounds=bounds), torch.float64)[0]
    # a result below 2 in magnitude is rounded by an epsilon at most
    assert float((out - want).abs().max()) < max(1e-5, 2 * torch.finfo(out.dtype).eps)


def test_other_lengths_of_keys_and_none_of_them(kernel):
    q, k, v, bounds = attention((3, 40, 0, 17, 9), (50, 0, 8, 17, 70))
    out, _ = check(kernel, q, k, v, bounds=bounds, layout="packed")
    start, end = bounds.q[:, 1].tolist()
    assert bool((out[..., start:end, :] == 0).all()), "a query without keys gives 0"


def test_grouped_heads(kernel):
    q, q_bounds = packed(LENGTHS, 2, 3)
    k, k_bounds = packed(LENGTHS, 2, 1)
    v, _ = packed(LENGTHS, 2, 1)
    check(
        kernel,
        q,
        k,
        v,
        bounds=Bounds(q_bounds, k_bounds),
        layout="packed",
        steps=(Scale(0.3), AddFill(causal(0), FLOAT_MIN)),
    )


def test_a_padded_bias_and_a_table(kernel):
    q, k, v, bounds = attention()
    bias = randn(len(LENGTHS), 1, LONGEST, LONGEST)
    table = randn(1, 2, 1, 2 * LONGEST - 1)
    distance = Algebra().add(Algebra().sub(expr.K, expr.Q), Const(LONGEST - 1))
    check(
        kernel,
        q,
        k,
        v,
        [bias, table],
        bounds=bounds,
        layout="packed",
        dims=[("B0", "1", "Q", "K"), ("1", "B1", "1", "T")],
        steps=(Scale(0.25), Bias(0), Bias(1, col=distance)),
    )


def test_masks_that_are_loaded_are_local_to_a_sequence(kernel):
    q, k, v, bounds = attention()
    keep = torch.rand(len(LENGTHS), 1, 1, LONGEST) > 0.3
    keep[..., 0] = True
    check(kernel, q, k, v, [keep], bounds=bounds, layout="packed", steps=(ReplaceFill(dense(0), -INF),))


def test_finite_fills_see_the_keys_of_their_sequence_only(kernel):
    q, k, v, bounds = attention()
    keep = torch.rand(len(LENGTHS), 1, 1, LONGEST) > 0.9
    keep[3] = False
    both = Algebra().and_(causal(0), Load(0, "bool"))
    check(kernel, q, k, v, [keep], bounds=bounds, layout="packed", steps=(AddFill(both, FLOAT_MIN),))


def test_dropout_is_drawn_by_the_row_of_the_result(kernel):
    q, k, v, bounds = attention()
    seed = torch.tensor([1234567890123])
    check(kernel, q, k, v, bounds=bounds, layout="packed", seed=seed, dropout=0.3)


@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("shared", [False, True])
def test_dense_queries_against_packed_keys(kernel, queries, shared):
    k, bounds = packed(LENGTHS, 2)
    v, _ = packed(LENGTHS, 2)
    q = randn(1 if shared else len(LENGTHS), 2, queries, 16)
    check(kernel, q, k, v, bounds=Bounds(None, bounds), layout="packed_keys")


@pytest.mark.parametrize("shared", [False, True])
def test_packed_queries_against_dense_keys(kernel, shared):
    q, bounds = packed(LENGTHS, 2)
    k, v = (randn(1 if shared else len(LENGTHS), 2, 37, 16) for _ in range(2))
    check(kernel, q, k, v, bounds=Bounds(bounds, None), layout="packed_queries")


def test_sequences_are_independent_bit_for_bit(kernel):
    q, k, v, bounds = attention()
    spec = make_spec(q, k, v, layout="packed", steps=(Scale(0.25), ReplaceFill(causal(0), -INF)))
    start, end = bounds.q[:, 3].tolist()
    others = torch.ones(q.shape[-2], dtype=torch.bool)
    others[start:end] = False
    found = []
    for change in (0.0, 1.0):
        moved = [x.clone() for x in (q, k, v)]
        for x in moved:
            x[..., start:end, :] += change
        out, stats = kernel.forward(spec, Inputs(*moved, bounds=bounds))
        grads = kernel.backward(spec, Inputs(*moved, bounds=bounds), torch.ones_like(out), out, stats, [True] * 3)
        found.append([out, *grads])
    for a, b in zip(*found):
        assert torch.equal(a[..., others, :], b[..., others, :])
        assert not torch.equal(a, b)


@pytest.mark.parametrize(
    "wrong", [[[-7, 3, 9], [3, 9, 400]], [[5, 2, 60], [1, 2, 50]], [[0, 2**40, 70], [-(2**40), 2**50, 2**31]]]
)
def test_bounds_that_are_no_bounds_read_nothing_outside(kernel, wrong):
    k, _ = packed((70,), 2)
    v, _ = packed((70,), 2)
    q = randn(3, 2, 5, 16)
    bounds = Bounds(None, torch.tensor(wrong))
    check(kernel, q, k, v, bounds=bounds, layout="packed_keys", backward=False)


def test_numbers_of_sequences_must_agree(kernel):
    q, k, v, bounds = attention()
    spec = make_spec(q, k, v, layout="packed")
    with pytest.raises(ValueError, match="6 sequences of queries and 5 of keys"):
        kernel.forward(spec, Inputs(q, k, v, bounds=Bounds(bounds.q, bounds.k[:, :5])))
    dense = randn(4, 2, 5, 16)
    spec = make_spec(dense, k, v, layout="packed_keys")
    with pytest.raises(ValueError):
        kernel.forward(spec, Inputs(dense, k, v, bounds=Bounds(None, bounds.k)))
    with pytest.raises(ValueError, match="for 6 sequences"):
        reference.attend(spec, Inputs(dense, k, v, bounds=Bounds(None, bounds.k)), torch.float64)


def test_layout_and_bounds_must_agree(kernel):
    q, k, v, bounds = attention()
    with pytest.raises(ValueError, match="layout packed without bounds of k"):
        kernel.forward(make_spec(q, k, v, layout="packed"), Inputs(q, k, v, bounds=Bounds(bounds.q, None)))
    with pytest.raises(ValueError, match="layout dense with bounds of q"):
        kernel.forward(make_spec(q, k, v), Inputs(q, k, v, bounds=bounds))
    with pytest.raises(ValueError, match=r"int32 or int64 \[2, sequences\]"):
        kernel.forward(make_spec(q, k, v, layout="packed"), Inputs(q, k, v, bounds=Bounds(bounds.q[0], bounds.k)))


def test_no_sequences(kernel):
    q, k, v = (randn(1, 2, 4, 16) for _ in range(3))
    none = torch.zeros(2, 0, dtype=torch.int64)
    spec = make_spec(q, k, v, layout="packed")
    out, stats = kernel.forward(spec, Inputs(q, k, v, bounds=Bounds(none, none)))
    assert bool((out == 0).all())
    grads = kernel.backward(spec, Inputs(q, k, v, bounds=Bounds(none, none)), out, out, stats, [True] * 3)
    assert all(bool((g == 0).all()) for g in grads)


@pytest.mark.parametrize("grad", [False, True])
def test_ops_pass_opcheck(kernel, grad):
    q, k, v, bounds = attention((5, 0, 12))
    q, k, v = (x.detach().requires_grad_(grad) for x in (q, k, v))
    spec = make_spec(q, k, v, layout="packed", out_order=(0, 2, 1, 3))
    arguments = (q, k, v, [], None, *bounds, spec.text, kernel.__name__.split(".")[-1], True)
    torch.library.opcheck(torch.ops.attnfuse.attention.default, arguments, atol=1e-5, rtol=1e-5)
