"""The CPU kernel against the oracle, by the error bars of the reliability notes."""

from __future__ import annotations

import math
import threading

import kernel_cases
import pytest
import torch
from kernel_cases import FLOAT_MIN, GATES, INF, STEPS, WEIGHTS, assert_close, evaluate, make_spec, qkv, randn
from numbered_cases import *  # noqa: F403
from sink_cases import *  # noqa: F403

from attnfuse import expr
from attnfuse.expr import Algebra, Const, causal, dense, documents, window
from attnfuse.kernels import cpu, dropout, layout, reference
from attnfuse.kernels.inputs import Inputs
from attnfuse.spec import (
    AddFill,
    Bias,
    Cast,
    ReplaceFill,
    Scale,
    Shift,
    Tanh,
    dtype_name,
)

pytestmark = pytest.mark.skipif(cpu.available() is not None, reason=str(cpu.available()))


HALF = Scale(0.25)
A = Algebra()


@pytest.fixture
def kernel():
    return cpu


def check(*args, **fields):
    return kernel_cases.check(cpu, *args, **fields)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(20)


@pytest.mark.parametrize("D", [1, 8, 31, 40, 59, 64, 96, 111, 128, 256])
def test_every_head_size_matches_the_oracle(D):
    check(*qkv(1, 2, 70, 97, D))
    check(*qkv(1, 2, 5, 97, D, E=D + 3))


@pytest.mark.parametrize(
    ("Q", "K"),
    [
        *[(1, 1), (2, 17), (17, 2), (31, 33), (32, 32), (33, 31), (63, 65), (64, 64), (97, 127), (128, 129)],
        *[(1, 704), (8, 1025), (9, 1025), (704, 1), (241, 240), (257, 704), (1025, 257)],
    ],
)
def test_every_length_matches_the_oracle(Q, K):
    check(*qkv(1, 2, Q, K, 24, E=40))
    check(*qkv(1, 1, Q, K, 24), steps=(ReplaceFill(causal(K - Q if Q <= K else 0), -INF),))


@pytest.mark.parametrize(("Q", "K", "D", "E"), [(0, 5, 8, 8), (5, 0, 8, 8), (5, 5, 0, 8), (5, 5, 8, 0), (0, 0, 0, 0)])
def test_an_empty_dim_gives_what_the_reference_gives(Q, K, D, E):
    q, k, v = qkv(2, 2, Q, K, D, E)
    spec = make_spec(q, k, v)
    out, stats = cpu.forward(spec, Inputs(q, k, v))
    want, want_stats = reference.attend(spec, Inputs(q, k, v), torch.float32)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(stats, want_stats)
    for x, grad in zip((q, k, v), cpu.backward(spec, Inputs(q, k, v), torch.ones_like(out), out, stats, [True] * 3)):
        assert grad is not None and grad.shape == x.shape and bool(grad.isfinite().all())


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize(("Q", "K"), [(1, 600), (2, 1100), (65, 65)])
def test_grouped_queries_share_keys(groups, Q, K):
    q = randn(2, 2, groups, Q, 32)
    check(q, randn(2, 2, 1, K, 32), randn(2, 2, 1, K, 32))


def test_any_input_may_be_broadcast_over_any_batch_dim():
    a, b, c, d = (1, 1), (1, 3), (2, 1), (2, 3)
    for shapes in [(b, c, d), (c, d, a), (a, d, d), (d, b, c)]:
        q, k, v = (randn(*s, *tail) for s, tail in zip(shapes, [(20, 16), (30, 16), (30, 8)]))
        check(q, k, v, [randn(2, 3, 20, 30)], steps=(Scale(0.25), Bias(0)))


@pytest.mark.parametrize("rank", [0, 1, 3, 6])
def test_any_number_of_batch_dims(rank):
    batch = (2, 1, 2, 1, 2, 1)[:rank]
    check(randn(*batch, 9, 8), randn(*batch, 11, 8), randn(*batch, 11, 8))


def _transposed(x):
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def _packed(x):
    wide = torch.full((*x.shape[:-1], 3 * x.shape[-1]), math.nan, dtype=x.dtype)
    view = wide[..., x.shape[-1] : 2 * x.shape[-1]]
    view.copy_(x)
    return view


def _heads_last(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _offset(x):
    buffer = torch.full((x.numel() + 2,), math.nan, dtype=x.dtype)
    view = buffer[1:-1].view(x.shape)
    view.copy_(x)
    return view


def _every_other(x):
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), math.nan, dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


LAYOUTS = [_transposed, _packed, _heads_last, _offset, _every_other]


@pytest.mark.parametrize("lay", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("Q", [3, 40])
def test_strides_and_nan_beyond_a_slice_change_no_bit(lay, dtype, Q):
    plain = [*qkv(2, 2, Q, 260, 24, dtype=dtype), randn(2, 1, Q, 260, dtype=dtype)]
    fields = {"steps": (Scale(0.2), Bias(0), ReplaceFill(causal(230), -INF))}
    spec = make_spec(*plain[:3], plain[3:], **fields)
    dout = randn(2, 2, Q, 24, dtype=dtype)
    results = []
    for tensors in (plain, [lay(x) for x in plain]):
        # one path for both: the direct one wants contiguous rows
        q, k, v, bias = tensors if lay is not _every_other else [x.clone() if Q == 3 else x for x in tensors]
        out, stats = cpu.forward(spec, Inputs(q, k, v, [bias]))
        results.append([out, stats, *cpu.backward(spec, Inputs(q, k, v, [bias]), lay(dout), out, stats, [True] * 4)])
    exact = not (Q == 3 and lay in (_transposed, _every_other))
    for a, b in zip(*results, strict=True):
        if exact:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_expanded_inputs_and_output_gradients_work():
    q, k, v = randn(1, 1, 40, 16).expand(2, 3, -1, -1), randn(2, 1, 1, 16).expand(-1, 3, 50, -1), randn(2, 3, 50, 16)
    check(q, k, v)
    q, k, v = qkv()
    spec = make_spec(q, k, v)
    out, stats = cpu.forward(spec, Inputs(q, k, v))
    one = torch.ones(())
    a = cpu.backward(spec, Inputs(q, k, v), one.expand(out.shape), out, stats, [True] * 3)
    b = cpu.backward(spec, Inputs(q, k, v), torch.ones_like(out), out, stats, [True] * 3)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 0, 1, 3), (0, 1, 3, 2)])
def test_out_order_is_the_memory_order(order):
    q, k, v = qkv(2, 3, 20, 20, 8)
    out, _ = check(q, k, v, out_order=order)
    assert out.permute(order).is_contiguous()


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-4, 300.0])
def test_any_scale(scale):
    check(*qkv(1, 2, 40, 70, 16), steps=(Scale(scale),), backward=abs(scale) <= 1)


def test_logits_of_plus_and_minus_120():
    q, k, v = qkv(1, 2, 50, 260, 8)
    top = (q @ k.transpose(-1, -2)).abs().max()
    check(q, k, v, steps=(Scale(120.0 / float(top)),))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("Q", [4, 70])
def test_low_precision_is_no_worse_than_eager(dtype, Q):
    q, k, v = qkv(2, 2, Q, 97, 64, dtype=dtype)
    check(q, k, v)
    check(q, k, v, [randn(1, 2, Q, 97, dtype=dtype)], steps=(Scale(0.125), Cast(dtype_name(dtype)), Bias(0)))


def test_v_and_out_may_differ_from_q_in_dtype():
    q, k, v = qkv(1, 2, 30, 50, 16, dtype=torch.bfloat16)
    spec = make_spec(q, k, v.float(), out_dtype="float16")
    out, _ = cpu.forward(spec, Inputs(q, k, v.float()))
    want = reference.attend(spec, Inputs(q, k, v), torch.float64)[0]
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.double(), want, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.int8, torch.int16])
@pytest.mark.parametrize("shape", [(2, 2, 40, 70), (2, 1, 1, 70), (1, 1, 40, 1)])
@pytest.mark.parametrize("inverted", [False, True])
def test_masks_of_every_dtype_and_broadcast(dtype, shape, inverted):
    keep = (torch.rand(shape) > 0.4).to(dtype)
    keep[..., 0, 0] = 1
    mask = dense(0, dtype_name(dtype), inverted)
    check(*qkv(2, 2, 40, 70, 8), [keep], steps=(Scale(0.3), ReplaceFill(mask, -1e9)), backward=False)
    check(*qkv(2, 2, 4, 70, 8), [keep[..., :4, :]], steps=(AddFill(mask, -1e4),), backward=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "shape", [(2, 3, 40, 260), (1, 3, 40, 260), (1, 1, 40, 260), (2, 1, 1, 260), (2, 3, 40, 1), (1, 1, 1, 1)]
)
def test_operand_gradients_are_summed_over_broadcast_dims(dtype, shape):
    q, k, v = qkv(2, 3, 40, 260, 8)
    check(q, k, v, [randn(*shape, dtype=dtype)], steps=(Scale(0.3), Bias(0, 0.5)))
    check(q, k, v, [randn(*shape, dtype=dtype)], steps=(Shift(0.1), Scale(operand=0)))


def test_an_operand_used_twice_gets_both_gradients():
    for dtype in (torch.float32, torch.bfloat16):
        bias = randn(2, 2, 33, 33, dtype=dtype)
        check(*qkv(), [bias], steps=(Scale(operand=0), Bias(0), Tanh()))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("value", [None, -1e4, FLOAT_MIN])
@pytest.mark.parametrize(("rows", "Qn", "Kn"), [(1, 4, 50), (130, 130, 300), (1, 130, 300)])
def test_a_bias_with_a_mask_is_added_where_it_keeps(gate, value, rows, Qn, Kn):
    # bfloat16 makes the kernel convert, one column of keys repeats
    keep = GATES[gate]
    for bias in (randn(1, 2, rows, Kn), randn(2, 1, rows, 1, dtype=torch.bfloat16)):
        steps = (Bias(0, 0.5, keep=keep),) if value is None else (Bias(0, 0.5, keep=keep), AddFill(keep, value))
        check(*qkv(2, 2, Qn, Kn, 8), [bias], steps=steps)


@pytest.mark.parametrize("fill", [-1e9, FLOAT_MIN])
def test_what_hides_where_a_bias_is_left_out_is_not_hidden(fill):
    # padding hidden by the bias, all else by the fill: a row may end up with keys that are all hidden, unequally
    bias = torch.zeros(2, 1, 1, 300)
    bias[0, ..., :150] = FLOAT_MIN
    bias[1, ..., 20:] = FLOAT_MIN
    keep = causal(0)
    steps = (Bias(0, keep=keep), AddFill(keep, fill))
    check(*qkv(2, 2, 130, 300, 8), [bias], steps=steps)
    check(*qkv(2, 2, 130, 300, 8), [bias], steps=steps[:1])


def test_a_number_that_is_left_out_reaches_nothing():
    bias = torch.full((1, 1, 1, 60), torch.nan)
    bias[..., :20] = 1.0
    keep = Algebra().compare("le", expr.K, Const(19))
    check(*qkv(1, 2, 40, 60, 8), [bias], steps=(Bias(0, keep=keep),))


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(("Q", "K"), [(4, 50), (110, 300)])
def test_every_step_forward_and_backward(name, Q, K):
    check(*qkv(1, 2, Q, K, 8), steps=STEPS[name])


def test_a_half_overflow_is_an_infinity():
    q, k, v = torch.full((1, 1, 1, 1), 300.0), torch.tensor([[[[300.0], [-300.0], [1.0]]]]), randn(1, 1, 3, 4)
    out, _ = cpu.forward(make_spec(q, k, v, steps=(Cast("float16"),)), Inputs(q, k, v))
    assert bool(out.isnan().all())
    inputs = Inputs(-q, k[..., :1, :], v[..., :1, :])
    out, _ = cpu.forward(make_spec(*inputs.tensors, steps=(Cast("float16"),), hidden="zero"), inputs)
    assert not out.any()


@pytest.mark.parametrize("offset", [-300, -5, -1, 0, 1, 7, 128, 240, 500])
@pytest.mark.parametrize("fill", [ReplaceFill, AddFill])
@pytest.mark.parametrize("value", [-INF, FLOAT_MIN, -1e9])
def test_causal_offsets(offset, fill, value):
    q, k, v = qkv(1, 2, 130, 270, 8)
    hidden = "nan" if value > -INF else "zero"
    # an infinite added fill gives NaN gradients in autograd's softmax, ours are zero
    check(
        q,
        k,
        v,
        steps=(Scale(0.3), fill(causal(offset), value)),
        hidden=hidden,
        backward=not (fill is AddFill and value == -INF and offset < 0),
    )


@pytest.mark.parametrize("name", kernel_cases.WRAPPING)
@pytest.mark.parametrize(("Q", "K"), [(70, 150), (1, 90)])
def test_integers_wrap_as_those_of_tensors_do(name, Q, K):
    operands = kernel_cases.wrapping_operands(Q, K)
    steps = (Scale(0.25), ReplaceFill(kernel_cases.WRAPPING[name], -INF))
    check(*qkv(5, 1, Q, K, 8), operands, steps=steps, hidden="zero")


@pytest.mark.parametrize("value", [-INF, FLOAT_MIN])
def test_a_window_is_two_causal_masks(value):
    q, k, v = qkv(1, 2, 300, 330, 8)
    for offset in (0, 30):
        steps = (ReplaceFill(causal(offset), value), ReplaceFill(Algebra().not_(causal(offset - 20)), value))
        check(q, k, v, steps=(Scale(0.3), *steps))


@pytest.mark.parametrize("hidden", ["nan", "zero", "nan_to_zero"])
@pytest.mark.parametrize("value", [-INF, FLOAT_MIN, -1e9])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("Q", [6, 100])
def test_fully_hidden_row_matches_the_reference(hidden, value, causal, Q):
    q, k, v = qkv(2, 2, Q, 300, 8)
    keep = torch.rand(2, 1, Q, 300) > 0.3
    keep[0, :, :4] = False
    keep[1, :, 3, :250] = False
    steps = (Scale(0.3), ReplaceFill(dense(0), value), *([ReplaceFill(expr.causal(), value)] if causal else []))
    out, grads = check(q, k, v, [keep], steps=steps, hidden=hidden)
    if value == -INF:
        assert bool(out[0, :, :4].isnan().all()) == (hidden == "nan")
        assert hidden == "nan" or not out[0, :, :4].any()
        assert not grads[0][0, :, :4].any()


@pytest.mark.parametrize("value", [FLOAT_MIN, -1e9])
def test_an_added_fill_passes_gradient_on_hidden_rows(value):
    q, k, v = qkv(2, 2, 60, 300, 8)
    keep = torch.arange(300) >= torch.tensor([0, 299]).reshape(2, 1, 1, 1)
    check(q, k, v, [keep], steps=(AddFill(dense(0), value), ReplaceFill(causal(0), FLOAT_MIN)))
    _, grads = check(q, k, v, [torch.zeros(1, 1, 1, 300, dtype=torch.bool)], steps=(AddFill(dense(0), value),))
    # adding a huge number rounds the scores away, so that the weights are uniform: 1 / K
    assert grads[2].isfinite().all() and grads[2].any()


@pytest.mark.parametrize("hidden", ["zero", "nan_to_zero"])
def test_rows_made_zero_have_zero_gradients_under_an_added_fill(hidden):
    q, k, v = qkv(1, 2, 20, 30, 8)
    keep = torch.ones(1, 1, 20, 30, dtype=torch.bool)
    keep[..., 5:9, :] = False
    spec = make_spec(q, k, v, [keep], steps=(AddFill(dense(0), -INF),), hidden=hidden)
    out, stats = cpu.forward(spec, Inputs(q, k, v, [keep]))
    dout = torch.randn_like(out)
    got = cpu.backward(spec, Inputs(q, k, v, [keep]), dout, out, stats, [True] * 3 + [False])
    other = make_spec(q, k, v, [keep], steps=(ReplaceFill(dense(0), -INF),), hidden=hidden)
    want = evaluate(other, (q, k, v, keep), None, torch.float64, dout)[1]
    for a, b in zip(got[:3], want[:3], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    assert not out[..., 5:9, :].any() and not got[0][..., 5:9, :].any()


@pytest.mark.parametrize("where", ["q", "k", "bias"])
@pytest.mark.parametrize("hidden", ["nan", "zero"])
def test_nan_reaches_what_it_reaches_in_the_reference(where, hidden):
    for Q in (3, 40):
        q, k, v = qkv(1, 2, Q, 260, 8)
        bias = randn(1, 2, Q, 260)
        {"q": q, "k": k, "bias": bias}[where][0, 1, 2, 3] = math.nan
        check(q, k, v, [bias], steps=(Bias(0),), hidden=hidden)


def test_nan_in_hidden_values_is_skipped_or_not_as_the_policy_says():
    q, k, v = qkv(1, 1, 40, 300, 8)
    v[..., 290:, :] = math.nan
    for policy, nan in (("skip", False), ("eager", True)):
        spec = make_spec(q, k, v, steps=(ReplaceFill(causal(0), -INF),), nan_policy=policy)
        out, _ = cpu.forward(spec, Inputs(q, k, v))
        assert bool(out.isnan().all()) == nan and bool(out.isnan().any()) == nan


@pytest.mark.parametrize("Q", [4, 100])
def test_unshifted_softmax_is_nan_where_its_sum_is_out_of_range(Q):
    q, k, v = qkv(1, 1, Q, 250, 4)
    check(q, k, v, softmax="unshifted")
    bias = torch.zeros(1, 1, Q, 1)
    bias[..., 0, :], bias[..., 1, :], bias[..., 2, :] = 200.0, -200.0, 50.0
    spec = make_spec(q, k, v, [bias], steps=(Bias(0),), softmax="unshifted")
    out, stats = cpu.forward(spec, Inputs(q, k, v, [bias]))
    assert out.isnan().all(-1).squeeze().tolist()[:4] == [True, True, False, False]
    grads = cpu.backward(spec, Inputs(q, k, v, [bias]), torch.ones_like(out), out, stats, [True] * 4)
    assert grads[0].isnan().all(-1).squeeze().tolist()[:4] == [True, True, False, False]


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("Q", [5, 100])
def test_weight_steps_forward_and_backward(name, Q):
    q, k, v = qkv(2, 2, Q, 260, 8)
    operands = [torch.rand(2, 1, Q, 260) > 0.3, randn(1, 2, Q, 260)]
    check(q, k, v, operands, weight_steps=WEIGHTS[name])
    check(q, k, v, operands, weight_steps=WEIGHTS[name], steps=(ReplaceFill(causal(100), -INF),))


def test_weights_zeroed_after_a_softmax_of_nothing_are_zero():
    q, k, v = qkv(1, 2, 40, 260, 8)
    keep = torch.rand(1, 1, 40, 260) > 0.5
    keep[..., 7, :] = False
    for value in (-INF, FLOAT_MIN):
        steps, zeroed = (ReplaceFill(dense(0), value),), (ReplaceFill(dense(0), 0.0),)
        out, _ = check(q, k, v, [keep], steps=steps, weight_steps=zeroed)
        assert not out[..., 7, :].any()


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("Q", [3, 130])
def test_dropout_draws_the_reference_mask(p, Q):
    seed = torch.tensor([-(2**61) + 12345])
    q, k, v = qkv(2, 2, Q, 259, 8)
    check(q, k, v, seed=seed, dropout=p)
    # uniform weights and an identity for v: out is the mask itself
    q, v = torch.zeros(2, 2, Q, 8), torch.eye(259).expand(2, 2, 259, 259)
    out, _ = cpu.forward(make_spec(q, k, v, dropout=p), Inputs(q, k, v, seed=seed))
    kept = dropout.keep(seed, torch.arange(4 * Q).reshape(2, 2, Q), torch.arange(259), p)
    assert torch.equal(out > 0, kept & (p < 1.0))


def test_dropout_without_a_seed_is_refused():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="seed"):
        cpu.forward(make_spec(q, k, v, dropout=0.5), Inputs(q, k, v))


@pytest.mark.parametrize("shape", [(2, 4, 200), (1, 1, 1200)])
def test_repeats_are_bitwise_equal(shape):
    B, H, L = shape
    q, k, v = qkv(B, H, L, L, 32)
    bias = randn(1, H, L, L)
    spec = make_spec(q, k, v, [bias], steps=(Scale(0.2), Bias(0)), dropout=0.2)
    seed, dout = torch.tensor([7]), torch.randn(B, H, L, 32)

    def run():
        out, stats = cpu.forward(spec, Inputs(q, k, v, [bias], seed))
        return [out, stats, *cpu.backward(spec, Inputs(q, k, v, [bias], seed), dout, out, stats, [True] * 4)]

    first = run()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_any_number_of_threads_agrees_with_the_oracle(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(*qkv(1, 1, 700, 700, 16), [randn(1, 1, 700, 1)], steps=(Scale(0.25), Scale(operand=0)))
        k, v = randn(1, 3, 1, 500, 16), randn(1, 3, 1, 500, 16)
        check(randn(1, 3, 2, 300, 16), k, v, steps=(ReplaceFill(causal(9), -INF),))
        check(randn(1, 3, 1, 16), randn(1, 3, 3000, 16), randn(1, 3, 3000, 16))
    finally:
        torch.set_num_threads(before)


def test_eight_python_threads_at_once():
    cases = []
    for i in range(8):
        q, k, v = qkv(1, 2, 50 + 30 * i, 200, 16)
        spec = make_spec(q, k, v, steps=(Scale(0.25), ReplaceFill(causal(i), -INF)))
        cases.append((spec, q, k, v, *cpu.forward(spec, Inputs(q, k, v))))
    wrong = []

    def work(case):
        spec, q, k, v, out, stats = case
        want = cpu.backward(spec, Inputs(q, k, v), out, out, stats, [True] * 3)
        for _ in range(10):
            again, _ = cpu.forward(spec, Inputs(q, k, v))
            grads = cpu.backward(spec, Inputs(q, k, v), out, out, stats, [True] * 3)
            if not torch.equal(again, out) or not all(torch.equal(a, b) for a, b in zip(want, grads, strict=True)):
                wrong.append(case)

    threads = [threading.Thread(target=work, args=(c,)) for c in cases]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_only_needed_gradients_are_made():
    q, k, v = qkv()
    spec = make_spec(q, k, v)
    out, stats = cpu.forward(spec, Inputs(q, k, v))
    every = cpu.backward(spec, Inputs(q, k, v), out, out, stats, [True] * 3)
    for i in range(3):
        needs = [j == i for j in range(3)]
        got = cpu.backward(spec, Inputs(q, k, v), out, out, stats, needs)
        assert [g is not None for g in got] == needs and torch.equal(got[i], every[i])


def test_offsets_beyond_32_bits():
    # pages in between are never touched, so they take no memory
    base = torch.empty(1 + (1 << 31) + 64, dtype=torch.float16)
    q = base.as_strided((1, 2, 2, 4), (0, 1 << 31, 4, 1))
    q.copy_(torch.randn(1, 2, 2, 4))
    k, v = randn(1, 2, 5, 4, dtype=torch.float16), randn(1, 2, 5, 4, dtype=torch.float16)
    spec = make_spec(q, k, v)
    assert torch.equal(cpu.forward(spec, Inputs(q, k, v))[0], cpu.forward(spec, Inputs(q.clone(), k, v))[0])


def test_tensors_that_do_not_fit_the_spec_are_refused():
    q, k, v = qkv()
    spec = make_spec(q, k, v)
    three = k[:, :1].repeat(1, 3, 1, 1)
    for bad in [(q.half(), k, v), (q[..., :3], k, v), (q, k[:, :, :5], v), (q[0], k[0], v[0]), (q, three, v)]:
        with pytest.raises(ValueError):
            cpu.forward(spec, Inputs(*bad))
    with pytest.raises(ValueError, match="shapes"):
        bias = randn(1, 1, 33, 7)
        cpu.forward(make_spec(q, k, v, [bias], steps=(Bias(0),)), Inputs(q, k, v, [bias]))


def test_allocate_works_on_fake_tensors_of_symbolic_size():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes)
    q, k, v = (mode.from_tensor(x) for x in qkv(2, 2, 33, 40, 16))
    bias = mode.from_tensor(randn(1, 1, 33, 40))
    spec = make_spec(q, k, v, [bias], out_order=(0, 2, 1, 3))
    guards = len(shapes.guards)
    out, stats = layout.allocate(spec, Inputs(q, k, v, [bias]))
    assert len(shapes.guards) == guards
    assert tuple(out.shape) == (2, 2, 33, 16) and tuple(stats.shape) == (2, 2, 2, 33)
    assert [int(s) for s in out.stride()] == [33 * 2 * 16, 16, 2 * 16, 1]


g = Algebra()
_DOCS_Q, _DOCS_K = expr.Load(0, "int64"), expr.Load(1, "int64")
_KEEP, _LENGTH, _WHOLE = expr.Load(2, "bool"), expr.Load(3, "int32"), expr.Load(4, "uint8")


def _distance() -> expr.Expr:
    return g.sub(expr.K, expr.Q)


#: operands 0, 1: document ids of queries and of keys; 2: key padding; 3: a length per batch element; 4: a [Q, K] mask
MASKS = {
    "documents": documents(0, 1),
    "causal documents": g.and_(causal(), documents(0, 1)),
    "causal window": g.and_(causal(), window(100)),
    "band": g.compare("le", g.abs(_distance()), expr.Const(40)),
    "chunks": g.compare("eq", g.floordiv(expr.K, expr.Const(128)), g.floordiv(expr.Q, expr.Const(128))),
    "causal chunks": g.and_(
        causal(), g.compare("eq", g.floordiv(expr.K, expr.Const(70)), g.floordiv(expr.Q, expr.Const(70)))
    ),
    "prefix": g.or_(causal(), g.compare("lt", expr.K, expr.Const(250))),
    "padding": _KEEP,
    "causal padding": g.and_(causal(), _KEEP),
    "lengths": g.compare("lt", expr.K, _LENGTH),
    "from length": g.compare("ge", expr.K, g.sub(_LENGTH, expr.Const(100))),
    "decode": g.compare("le", expr.K, g.add(expr.Q, _LENGTH)),
    "query padding": g.and_(causal(), g.compare("ne", _DOCS_Q, expr.Const(0))),
    "strided": g.compare("eq", g.mod(_distance(), expr.Const(3)), expr.Const(0)),
    "either": g.or_(g.and_(causal(), documents(0, 1)), g.compare("le", expr.K, expr.Const(3))),
    "cases": g.where(_KEEP, documents(0, 1), g.compare("le", g.add(expr.K, expr.Const(20)), expr.Q)),
    "nearest": g.compare("le", g.minimum(g.abs(_distance()), g.mod(expr.K, expr.Const(64))), expr.Const(5)),
    "given": g.truth(_WHOLE),
    "given and causal": g.and_(causal(5), g.truth(_WHOLE)),
    "not documents": g.not_(documents(0, 1)),
    "never": g.compare("lt", expr.K, expr.Const(0)),
}


def _mask_operands(Q: int, K: int) -> list[torch.Tensor]:
    queries = torch.randint(0, 4, (2, 1, Q, 1)).sort(dim=2).values
    keys = torch.randint(0, 4, (2, 1, 1, K)).sort(dim=3).values
    # one batch element in order, as packed batches are; the other without any
    keys[1] = keys[1][..., torch.randperm(K)]
    keep = torch.ones(2, 1, 1, K, dtype=torch.bool)
    keep[0, ..., K // 2 :] = False
    keep[1, ..., : K // 3] = False
    keep[1, ..., K - 5] = False
    lengths = torch.tensor([K // 3, K - 3], dtype=torch.int32).view(2, 1, 1, 1)
    whole = torch.ones(Q, K, dtype=torch.uint8).tril(7)
    whole[:, ::9] = 0
    return [queries, keys, keep, lengths, whole[None, None]]


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("value", [-INF, FLOAT_MIN, -1e9, -3.0])
@pytest.mark.parametrize("fill", [ReplaceFill, AddFill])
def test_masks_as_expressions_match_the_reference(name, value, fill):
    Q, K = (300, 330) if value == -INF else (107, 700)
    q, k, v = qkv(2, 2, Q, K, 8)
    hidden = "zero" if value == -INF else "nan"
    # an infinite added fill gives NaN gradients in autograd's softmax where a row is empty, ours are zero
    backward = not (fill is AddFill and value == -INF)
    steps = (Scale(0.3), fill(MASKS[name], value))
    check(q, k, v, _mask_operands(Q, K), steps=steps, hidden=hidden, backward=backward)


@pytest.mark.parametrize("name", MASKS)
def test_masks_as_expressions_with_few_queries(name):
    q, k, v = qkv(2, 4, 3, 700, 16)
    k, v = k[:, :2].repeat_interleave(1, 1), v[:, :2]
    q = q.view(2, 2, 2, 3, 16)
    operands = [o.unsqueeze(1) for o in _mask_operands(3, 700)]
    for value in (-INF, FLOAT_MIN):
        steps = (Scale(0.3), ReplaceFill(MASKS[name], value))
        check(q, k[:, :, None], v[:, :, None], operands, steps=steps, hidden="zero", backward=False)


@pytest.mark.parametrize("value", [-INF, FLOAT_MIN])
def test_heads_that_share_keys_and_not_their_mask_with_few_queries(value):
    # tiles of keys that one head sees and another one does not
    keep = torch.ones(1, 1, 4, 1, 700, dtype=torch.bool)
    keep[:, :, 1, :, 300:], keep[:, :, 2, :, :400] = False, False
    q, k, v = randn(1, 1, 4, 2, 16), randn(1, 1, 1, 700, 16), randn(1, 1, 1, 700, 16)
    steps = (Scale(0.3), ReplaceFill(dense(0), value))
    check(q, k, v, [keep], steps=steps, hidden="zero", backward=False)


@pytest.mark.parametrize("name", ["documents", "padding", "prefix", "given and causal"])
def test_masks_as_expressions_on_weights(name):
    q, k, v = qkv(2, 2, 107, 330, 8)
    check(q, k, v, _mask_operands(107, 330), weight_steps=(ReplaceFill(MASKS[name], 0.0),))
    check(q, k, v, _mask_operands(107, 330), weight_steps=(ReplaceFill(MASKS[name], 0.25),))


def test_masks_join_with_biases_and_each_other():
    Q, K = 107, 700
    q, k, v = qkv(2, 2, Q, K, 8)
    operands = [
        *_mask_operands(Q, K),
        randn(1, 2, Q, K),
        randn(2, 1, 1, K).masked_fill(torch.rand(2, 1, 1, K) < 0.5, FLOAT_MIN),
    ]
    steps = (Scale(0.3), Bias(5), ReplaceFill(MASKS["documents"], -INF), Bias(6), AddFill(causal(400), FLOAT_MIN))
    check(q, k, v, operands, steps=steps, hidden="zero")


TABLES = {
    # relative positions: one column per distance
    "distances": ((1, 2, 1, 407), None, g.add(_distance(), expr.Const(106))),
    "reversed": ((2, 2, 1, 407), None, g.add(g.sub(expr.Q, expr.K), expr.Const(300))),
    # clamped distances, with a row per query (content to position) or per key (position to content)
    "by query": ((2, 2, 107, 64), None, g.minimum(g.maximum(g.add(_distance(), expr.Const(32)), expr.Const(0)), expr.Const(63))),
    "by key": ((2, 2, 301, 64), expr.K, g.minimum(g.maximum(g.add(_distance(), expr.Const(32)), expr.Const(0)), expr.Const(63))),
    "one column": ((2, 1, 107, 9), None, g.mod(expr.Q, expr.Const(9))),
    "a row of its own": ((1, 2, 5, 301), g.floordiv(expr.Q, expr.Const(30)), expr.K),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables_and_their_gradients_match_the_reference(name, dtype):
    shape, row, col = TABLES[name]
    q, k, v = qkv(2, 2, 107, 301, 8)
    operands = _mask_operands(107, 301)
    table = randn(*shape, dtype=dtype)
    check(q, k, v, [table], steps=(Scale(0.3), Bias(0, 0.5, row, col)))
    check(
        q,
        k,
        v,
        [*operands, table],
        steps=(Scale(0.3), Bias(5, 1.0, row, col), ReplaceFill(MASKS["causal padding"], -1e9)),
    )


def test_an_index_past_its_table_reads_its_end():
    q, k, v = qkv(1, 1, 40, 50, 8)
    table = randn(1, 1, 1, 30)
    for col, inside in (
        (g.add(_distance(), expr.Const(500)), None),
        (g.add(g.mul(expr.K, expr.Const(3)), expr.Const(-20)), (torch.arange(50) * 3 - 20).clamp(0, 29)),
    ):
        out, _ = cpu.forward(make_spec(q, k, v, [table], steps=(Bias(0, 1.0, None, col),)), Inputs(q, k, v, [table]))
        assert out.isfinite().all()
        if inside is not None:
            picked = table[..., inside]
            want, _ = cpu.forward(make_spec(q, k, v, [picked], steps=(Bias(0),)), Inputs(q, k, v, [picked]))
            assert torch.equal(out, want)


@pytest.mark.parametrize("value", [-INF, FLOAT_MIN])
def test_rows_without_a_gradient_are_passed_over_and_leave_none(value):
    Q, K = 200, 300
    q, k, v = qkv(2, 2, Q, K, 8)
    operands = _mask_operands(Q, K)
    # an infinite added fill gives NaN gradients in autograd's softmax where a row is empty, ours are zero
    fill = ReplaceFill if value == -INF else AddFill
    steps = (Scale(0.3), fill(MASKS["causal padding"], value))
    spec = make_spec(q, k, v, operands, steps=steps, hidden="zero" if value == -INF else "nan")
    out, stats = cpu.forward(spec, Inputs(q, k, v, operands))
    dout = randn(2, 2, Q, 8)
    # the second element is padded on the left, so that its first rows see no key; a whole tile, and rows here and there
    dout[1, :, : K // 3] = 0.0
    dout[0, :, 100:] = 0.0
    dout[0, :, ::7] = 0.0
    needs = [True] * 3 + [False] * 5
    grads = cpu.backward(spec, Inputs(q, k, v, operands), dout, out, stats, needs)
    tensors = (q, k, v, *operands)
    _, oracle = evaluate(spec, tensors, None, torch.float64, dout)
    _, eager = evaluate(spec, tensors, None, torch.float32, dout)
    for i in range(3):
        assert_close(grads[i], oracle[i], eager[i], f"gradient {i}")


def test_a_nan_value_reaches_gradients_whatever_the_cotangent_is():
    q, k, v = qkv(1, 1, 30, 40, 8)
    v[0, 0, 3, 2] = math.nan
    spec = make_spec(q, k, v, steps=(Scale(0.3), ReplaceFill(causal(20), -INF)))
    out, stats = cpu.forward(spec, Inputs(q, k, v))
    dout = torch.zeros(1, 1, 30, 8)
    grads = cpu.backward(spec, Inputs(q, k, v), dout, out, stats, [True] * 3)
    _, oracle = evaluate(spec, (q, k, v), None, torch.float64, dout)
    for grad, want in zip(grads, oracle, strict=True):
        assert torch.equal(grad.isnan(), want.isnan())


@pytest.mark.parametrize("fill", [ReplaceFill, AddFill])
@pytest.mark.parametrize("size", [1.0, 1e15])
def test_rows_of_nothing_but_padding_weigh_all_keys_as_eager_does(fill, size):
    # with scores of 1e30 an added finfo.min no longer makes all of them equal
    q, k, v = qkv(2, 2, 200, 300, 8, scale=size)
    k = k * size
    keep = torch.ones(2, 1, 1, 300, dtype=torch.bool)
    keep[1, ..., :120] = False
    mask = g.and_(causal(), expr.Load(0, "bool"))
    check(q, k, v, [keep], steps=(Scale(0.3), fill(mask, FLOAT_MIN)), backward=size == 1.0)
