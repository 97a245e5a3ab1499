"""The kernels against the oracle, by the documented meaning of the operators: values, gradients, and what was called."""

from __future__ import annotations

import kernel_cases
import pytest
import torch
from kernel_cases import FLOAT_MIN, INF, bounds_of, make_spec, qkv, randn

from attnfuse import expr, ops
from attnfuse._compat import FakeTensorMode
from attnfuse.expr import Algebra, Const, causal, dense, window
from attnfuse.kernels import ascend
from attnfuse.kernels.ascend import scores
from attnfuse.kernels.ascend.call import Call
from attnfuse.kernels.ascend.reading import Reading, read
from attnfuse.kernels.inputs import Bounds, Inputs
from attnfuse.spec import AddFill, Bias, Cast, ReplaceFill, Scale, dtype_name

HALF = Scale(0.25)
A = Algebra()
CAUSAL = ReplaceFill(causal(), -INF)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def check(*args, **fields):
    return kernel_cases.check(ascend, *args, **fields)


def called(npu, which=0):
    name, given = npu.calls[which]
    return name, given.get("sparse_mode", 0), given.get("pre_tockens"), given.get("next_tockens")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("D", "E"), [(16, 16), (20, 20), (8, 16), (16, 7), (64, 64), (1, 1)])
def test_head_sizes(npu, dtype, D, E):
    check(*qkv(1, 2, 20, 33, D, E, dtype=dtype))
    assert [name for name, _ in npu.calls] == ["npu_fusion_attention_v3", "npu_fusion_attention_grad_v3"]


@pytest.mark.parametrize(
    ("queries", "keys", "mask", "want"),
    [
        (33, 33, causal(), (2, None, None)),
        (20, 33, causal(), (2, None, None)),
        (33, 20, causal(), (2, None, None)),
        (20, 33, causal(13), (3, None, None)),
        (20, 33, causal(5), (4, None, -8)),
        (33, 33, A.and_(causal(), window(7)), (4, 6, 0)),
        (20, 33, A.and_(causal(13), A.compare("gt", expr.K, A.add(expr.Q, Const(3)))), (4, 9, 0)),
        (33, 33, causal(40), (0, None, None)),
        (33, 33, window(40), (0, None, None)),
        # the first rows see nothing
        (33, 20, causal(-13), (1, None, None)),
        (20, 33, causal(-1), (1, None, None)),
        (33, 33, A.compare("eq", A.mod(expr.Q, Const(3)), A.mod(expr.K, Const(3))), (1, None, None)),
    ],
)
@pytest.mark.parametrize("hidden", ["nan", "zero"])
def test_a_mask_by_position_is_the_mode_that_says_it(npu, queries, keys, mask, want, hidden):
    check(*qkv(1, 2, queries, keys), steps=(HALF, ReplaceFill(mask, -INF)), hidden=hidden)
    _, mode, before, after = called(npu)
    assert mode == want[0]
    if mode == 4:
        assert (before if want[1] is not None else None, after) == (want[1], want[2])


MASKS = {
    "keys": (lambda: torch.rand(2, 1, 1, 33) > 0.3, dense(0)),
    "queries and keys": (lambda: torch.rand(2, 1, 33, 33) > 0.5, dense(0)),
    "heads": (lambda: torch.rand(1, 2, 33, 33) > 0.5, dense(0)),
    "all": (lambda: torch.rand(2, 2, 33, 33) > 0.5, dense(0)),
    "one": (lambda: torch.rand(1, 1, 33, 33) > 0.5, dense(0)),
    "causal too": (lambda: torch.rand(2, 1, 1, 33) > 0.5, A.and_(causal(), dense(0))),
    "numbers": (lambda: torch.randint(0, 2, (2, 1, 1, 33)), A.compare("ne", expr.Load(0, "int64"), Const(0))),
}
FILLS = {
    "-inf": lambda keep: ReplaceFill(keep, -INF),
    "added -inf": lambda keep: AddFill(keep, -INF),
    "min": lambda keep: ReplaceFill(keep, FLOAT_MIN),
    "-1e9": lambda keep: ReplaceFill(keep, -1e9),
    "added min": lambda keep: AddFill(keep, FLOAT_MIN),
    "added -1e30": lambda keep: AddFill(keep, -1e30),
    "added -1e4": lambda keep: AddFill(keep, -1e4),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("fill", FILLS)
def test_masks_by_value_and_rows_without_keys(npu, mask, fill):
    make, keep = MASKS[mask]
    operand = make()
    # some rows, and a whole element, without a key
    operand[..., 3:5, :] = 0
    operand[-1, -1] = 0
    # the gradient of a row of -inf that was added is NaN in the oracle, also where its weights are 0
    hidden = ["nan"] if fill == "added -inf" else ["nan", "zero"]
    for own in hidden:
        check(*qkv(2, 2, 33, 33), [operand], steps=(HALF, FILLS[fill](keep)), hidden=own)
    assert called(npu)[1] == (0 if fill == "added -1e4" else 1)


BIASES = {
    "scores": ((2, 2, 33, 33), None),
    "heads": ((1, 2, 33, 33), None),
    "one": ((1, 1, 33, 33), None),
    "batch": ((2, 1, 33, 33), None),
    "keys": ((1, 2, 1, 33), None),
    "keys of all": ((2, 2, 1, 33), None),
    "queries": ((1, 2, 33, 1), None),
    "numbers": ((1, 2, 1, 1), None),
    "table": ((1, 2, 1, 65), A.add(A.sub(expr.K, expr.Q), Const(32))),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("scale", [0.25, 0.3])
def test_biases_and_their_gradients_are_right_in_both_orders(npu, dtype, bias, scale):
    shape, col = BIASES[bias]
    operand = randn(*shape, dtype=dtype)
    dims = [("1", "B1", "1", "T")] if col is not None else ()
    check(*qkv(2, 2, 33, 33, dtype=dtype), [operand], dims=dims, steps=(Scale(scale), Bias(0, 1.0, None, col)))
    assert npu.calls[0][1].get("scale", 1.0) == 1.0 and npu.calls[0][1]["pse"] is not None


def test_a_bias_before_the_scale_one_with_a_factor_and_one_with_a_mask(npu):
    bias, keep = randn(1, 2, 33, 33), torch.rand(2, 1, 1, 33) > 0.3
    check(*qkv(2, 2, 33, 33), [bias], steps=(Bias(0), HALF))
    check(*qkv(2, 2, 33, 33), [bias], steps=(HALF, Bias(0, -2.0)))
    check(*qkv(2, 2, 33, 33), [bias, keep], steps=(HALF, Bias(0, keep=dense(1))))
    check(*qkv(2, 2, 33, 33), [bias, keep], steps=(HALF, Bias(0), AddFill(dense(1), FLOAT_MIN)))
    check(*qkv(2, 2, 33, 33), [bias, keep], steps=(HALF, Bias(0), ReplaceFill(dense(1), -INF)))
    keep[1] = False
    check(*qkv(2, 2, 33, 33), [bias, keep], steps=(HALF, Bias(0), AddFill(dense(1), FLOAT_MIN), Cast("float32")))
    check(*qkv(2, 2, 33, 33), [bias, keep], steps=(HALF, Bias(0), ReplaceFill(dense(1), -INF)), hidden="zero")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", ["nan", "zero"])
@pytest.mark.parametrize("shape", [(2, 2, 33, 33), (2, 1, 33, 33), (1, 2, 1, 33)])
def test_infinities_in_a_bias_hide_keys_and_whole_rows(npu, dtype, hidden, shape):
    bias = randn(*shape, dtype=dtype)
    bias[torch.rand(shape) > 0.5] = -INF
    bias[..., -1, :] = -INF
    bias[..., 0, 0] = -INF
    # the oracle's gradients of such rows are NaN, also where their weights are 0
    check(*qkv(2, 2, 33, 33, dtype=dtype), [bias], steps=(HALF, Bias(0)), hidden=hidden, backward=hidden == "nan")
    check(*qkv(2, 2, 33, 33, dtype=dtype), [bias], steps=(HALF, Bias(0), CAUSAL), hidden=hidden, backward=False)


def test_gradients_of_zero_beside_rows_whose_keys_a_bias_hides(npu):
    bias = randn(1, 2, 33, 33)
    bias[:, :, 3] = -INF
    q, k, v = qkv(2, 2, 33, 33)
    spec = make_spec(q, k, v, [bias], steps=(HALF, Bias(0)), hidden="zero")
    inputs = Inputs(q, k, v, [bias])
    out, stats = ascend.forward(spec, inputs)
    dout = randn(*out.shape)
    found = ascend.backward(spec, inputs, dout, out, stats, [True] * 4)
    # the same rows, without the others
    others = [i for i in range(33) if i != 3]
    less = Inputs(q[:, :, others], k, v, [bias[:, :, others]])
    out, stats = ascend.forward(spec, less)
    wanted = ascend.backward(spec, less, dout[:, :, others], out, stats, [True] * 4)
    assert not found[0][:, :, 3].any() and not found[3][:, :, 3].any()
    for got, right in zip((found[0][:, :, others], found[1], found[2], found[3][:, :, others]), wanted):
        torch.testing.assert_close(got, right)


def test_large_scores_of_rows_without_keys_do_not_overflow(npu):
    keep = torch.rand(2, 1, 33, 33) > 0.3
    keep[0, :, 3:5] = False
    q, k, v = qkv(2, 2, 33, 33, scale=100.0)
    check(q, k, v, [keep], steps=(Scale(2.0), ReplaceFill(dense(0), -INF)), hidden="zero")


def test_terms_that_swallow_scores_or_each_other_are_left_to_another_kernel(npu):
    q, k, v = qkv(2, 2, 33, 33, dtype=torch.bfloat16)
    low = randn(1, 1, 33, 33, dtype=torch.bfloat16)
    low[..., 3, :] -= 10000.0
    with pytest.raises(ValueError, match="scores are gone"):
        check(q, k, v, [low], steps=(HALF, Bias(0), Cast("bfloat16")))
    q, k, v = qkv(2, 2, 33, 33)
    high = randn(1, 1, 33, 33) + 1e8
    with pytest.raises(ValueError, match="order"):
        check(q, k, v, [high, -high], steps=(HALF, Bias(0), Bias(1)))
    assert not npu.calls


def test_products_that_overflow_in_the_graph_make_nan(npu):
    q, k, v = qkv(1, 2, 20, 33, dtype=torch.float16)
    q[0, 1, 3] *= 10000.0
    k[0, 1, 5] = q[0, 1, 3] / q[0, 1, 3].abs().max() * 10
    check(q, k, v, steps=(Cast("float16"), HALF), backward=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("hidden", ["nan", "zero"])
@pytest.mark.parametrize("add", [False, True])
def test_the_number_in_a_row_without_keys_is_no_product_that_overflows(npu, dtype, hidden, add):
    keep = torch.rand(2, 1, 33, 33) > 0.3
    keep[:, :, 3:5] = False
    fill = AddFill(dense(0), -1e37) if add else ReplaceFill(dense(0), torch.finfo(dtype).min)
    if add and dtype == torch.float16:
        pytest.skip("refused: -inf there")
    steps = (Cast(dtype_name(dtype)), HALF, fill)
    out, _ = check(*qkv(dtype=dtype), [keep], steps=steps, hidden=hidden)
    assert out.isfinite().all()


def products(least, most, dtype=torch.float16):
    """q, k and v of which one row has the product `most` with one key, and `least` with the others."""
    q, k, v = qkv(1, 2, 20, 33, dtype=dtype)
    q[0, 1, 3], k[0, 1] = 0.0, 0.0
    q[0, 1, 3, 0], k[0, 1, :, 0], k[0, 1, 5, 0] = 1000.0, least / 1000.0, most / 1000.0
    return q, k, v


HALVED = Cast("float16")


@pytest.mark.parametrize(
    ("steps", "least", "most", "nan"),
    [
        ((HALF, HALVED), 40000.0, 70000.0, False),
        ((HALF, HALVED), 40000.0, 300000.0, True),
        ((HALVED, HALF), 40000.0, 70000.0, True),
        ((HALVED, Scale(4.0), HALVED), 10000.0, 20000.0, True),
        ((HALVED, Scale(4.0)), 10000.0, 20000.0, False),
        ((HALVED, HALF), -70000.0, -80000.0, True),
        ((HALVED, HALF), -70000.0, -100.0, False),
        ((HALVED, HALF), 0.0, 65504.0, False),
    ],
)
@pytest.mark.parametrize("hidden", ["nan", "zero"])
def test_a_product_overflows_where_the_graph_holds_it(npu, steps, least, most, nan, hidden):
    q, k, v = products(least, most)
    spec = make_spec(q, k, v, steps=steps, hidden=hidden)
    out, _ = ascend.forward(spec, Inputs(q, k, v))
    wanted, _ = kernel_cases.evaluate(spec, (q, k, v), None, torch.float64, out)
    assert torch.equal(out.isnan(), wanted.isnan())
    assert bool(out[0, 1, 3].isnan().all()) == (nan and (hidden == "nan" or most > 0.0))
    torch.testing.assert_close(out.double(), wanted, rtol=2e-2, atol=2e-2, equal_nan=True)


def test_products_that_may_overflow_beside_a_term_are_left_to_another_kernel(npu):
    bias = randn(1, 2, 20, 33, dtype=torch.float16)
    with pytest.raises(ValueError, match="may be infinite"):
        check(*products(0.0, 70000.0), [bias], steps=(HALVED, HALF, Bias(0)))
    bias[0, 0, 3, 4] = 65000.0
    with pytest.raises(ValueError, match="may be infinite"):
        check(*products(0.0, 9000.0), [bias], steps=(HALVED, Bias(0), HALVED))
    assert not npu.calls


def test_a_number_that_a_later_cast_makes_infinite_is_refused():
    q, k, v = qkv(1, 1, 9, 9, dtype=torch.float16)
    for steps in ((ReplaceFill(causal(), -1e9), HALVED), (ReplaceFill(causal(), -40000.0), Scale(2.0), HALVED)):
        assert not isinstance(read(make_spec(q, k, v, steps=steps)), Reading)
    assert isinstance(read(make_spec(q, k, v, steps=(HALVED, ReplaceFill(causal(), -1e9)))), Reading)
    assert not isinstance(read(make_spec(q, k, v, steps=(ReplaceFill(causal(), FLOAT_MIN), Scale(2.0)))), Reading)


@pytest.mark.parametrize("groups", [2, 3])
def test_grouped_heads(npu, groups):
    q, k, v = randn(2, 2, groups, 20, 16), randn(2, 2, 1, 33, 16), randn(2, 2, 1, 33, 16)
    shared = ((), ("B2",), ("B2",))
    check(q, k, v, broadcast=shared, steps=(HALF, CAUSAL))
    keep = torch.rand(2, 1, 1, 1, 33) > 0.3
    keep[1] = False
    for fill in (ReplaceFill(dense(0), -INF), AddFill(dense(0), FLOAT_MIN)):
        check(q, k, v, [keep], broadcast=shared, steps=(HALF, fill))
    bias = randn(1, 2, groups, 20, 33)
    check(q, k, v, [bias], broadcast=shared, steps=(HALF, Bias(0)))
    assert npu.calls[0][1]["head_num"] == 2 * groups and npu.calls[0][1]["key"].shape[1] == 2


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 2), (2, 1, 2, 2)])
def test_batch_dims(npu, shape):
    q, k, v = (randn(*shape, 20, 8) for _ in range(3))
    check(q, k, v)
    if shape:
        mask = torch.rand(*(n if i == 0 else 1 for i, n in enumerate(shape)), 20, 20) > 0.3
        check(q, k, v, [mask], steps=(HALF, ReplaceFill(dense(0), -INF)))


def test_heads_that_all_share_keys_are_the_operators_heads(npu):
    q, k, v = randn(2, 3, 20, 16), randn(2, 1, 20, 16), randn(2, 1, 20, 16)
    check(q, k, v, broadcast=((), ("B1",), ("B1",)), steps=(HALF, CAUSAL))
    assert npu.calls[0][1]["head_num"] == 3 and npu.calls[0][1]["key"].shape[:2] == (2, 1)


def test_a_lone_batch_dim_whose_keys_are_shared_is_one_of_heads(npu):
    q, k, v = randn(6, 20, 8), randn(1, 33, 8), randn(1, 33, 8)
    shared = ((), ("B0",), ("B0",))
    check(q, k, v, broadcast=shared, steps=(HALF,))
    assert npu.calls[0][1]["query"].shape == (1, 6, 20, 8)
    for heads in (1, 6):
        keep = torch.rand(heads, 20, 33) > 0.4
        keep[-1, 3] = False
        check(q, k, v, [keep], broadcast=shared, steps=(HALF, ReplaceFill(dense(0), -INF)))
        check(q, k, v, [keep], broadcast=shared, steps=(HALF, AddFill(dense(0), FLOAT_MIN)))
        check(q, k, v, [randn(heads, 20, 33)], broadcast=shared, steps=(HALF, Bias(0)))


def test_keys_that_packed_sequences_share_are_refused(npu):
    (q, k, v), fields = packed((5, 7, 3), layout="packed_queries", heads=())
    check(q, k, v, **fields)
    shared = make_spec(q, k[:1], v[:1], broadcast=((), ("B0",), ("B0",)), layout="packed_queries")
    assert not isinstance(read(shared), Reading)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_terms_are_float32_whatever_the_default_is(npu, dtype):
    q, k, v = qkv(dtype=torch.float32)
    spec = make_spec(q, k, v, steps=(HALF, AddFill(causal(), -80000.0), AddFill(window(9), -70000.0)))
    inputs = Inputs(q, k, v)
    wanted = Call.of(spec, inputs).added
    torch.set_default_dtype(dtype)
    try:
        found = Call.of(spec, inputs).added
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, wanted) and found.isfinite().all()


def test_terms_that_float16_does_not_hold_are_left_to_another_kernel(npu):
    q, k, v = qkv(dtype=torch.float16)
    large, low = randn(1, 1, 33, 33, dtype=torch.float16), randn(1, 1, 33, 33, dtype=torch.float16)
    large[..., 3, 4] = 60000.0
    low[..., 3, :] = -50000.0
    low[..., 3, 4] = -40000.0
    for bias in (large, low):
        with pytest.raises(ValueError, match="beyond what float16 holds"):
            Call.of(make_spec(q, k, v, [bias], steps=(HALF, Bias(0, 2.0))), Inputs(q, k, v, [bias]))
    low[..., 3, 5] = 0.0
    check(q, k, v, [low], steps=(HALF, Bias(0)))


def test_rows_whose_keys_are_hidden_once_or_twice_are_left_to_another_kernel(npu):
    q, k, v = qkv()
    mask = torch.zeros(2, 1, 33, 33)
    mask[:, :, 3, ::2] = FLOAT_MIN
    mask[:, :, 3, 1::2] = -INF
    with pytest.raises(ValueError, match="beyond what float32 holds"):
        check(q, k, v, [mask], steps=(HALF, Bias(0)))
    mask[:, :, 3, 5] = 1.0
    check(q, k, v, [mask], steps=(HALF, Bias(0)))


def test_scores_are_gone_where_a_mask_hides_all_keys_but_those_with_a_low_term(npu):
    q, k, v = qkv(dtype=torch.float16)
    low, keep = torch.zeros(1, 1, 33, 33, dtype=torch.bool), torch.ones(1, 1, 33, 33, dtype=torch.bool)
    low[..., 3, :5] = True
    keep[..., 3, 5:] = False
    least = torch.finfo(torch.float16).min
    steps = (HALF, AddFill(dense(0, inverted=True), least), Cast("float16"), ReplaceFill(dense(1), -INF))
    with pytest.raises(ValueError, match="scores are gone"):
        check(q, k, v, [low, keep], steps=steps)
    keep[..., 3, 9] = True
    check(q, k, v, [low, keep], steps=steps)


def test_a_score_that_is_infinite_at_a_cast_has_no_gradient(npu):
    keep = torch.rand(2, 1, 33, 33) > 0.4
    keep[:, :, 3] = False
    q, k, v = qkv(dtype=torch.float16)
    check(q, k, v, [keep], steps=(HALF, AddFill(dense(0), -INF), HALVED))
    check(q, k, v, [keep], steps=(HALF, HALVED, AddFill(dense(0), -INF)))
    bias = randn(1, 2, 33, 33, dtype=torch.float16)
    for later in (Bias(1), AddFill(causal(), -INF)):
        spec = make_spec(q, k, v, [keep, bias], steps=(HALF, AddFill(dense(0), -INF), HALVED, later))
        assert not isinstance(read(spec), Reading)


def test_what_rows_without_keys_give_to_keys_does_not_overflow(npu):
    q, k, v = qkv(1, 1, 64, 64, dtype=torch.float16)
    q, v = q.abs() + 2.0, v.abs() + 4.0
    v[..., 1::2, :] += 4.0
    keep = torch.zeros(1, 1, 1, 64, dtype=torch.bool)
    spec = make_spec(q, k, v, [keep], steps=(HALF, AddFill(dense(0), -1e37)))
    inputs = Inputs(q, k, v, [keep])
    out, stats = ascend.forward(spec, inputs)
    dout = torch.full_like(out, 8.0)
    found = ascend.backward(spec, inputs, dout, out, stats, [True, True, True, False])[1]
    _, wanted = kernel_cases.evaluate(spec, inputs.tensors, None, torch.float64, dout)
    torch.testing.assert_close(found.double(), wanted[1], rtol=2e-2, atol=2.0)


def test_masks_made_of_fake_tensors_are_not_kept(npu):
    q, k, v = qkv(1, 1, 9, 9)
    spec = make_spec(q, k, v, steps=(HALF, CAUSAL))
    scores._masks.clear()
    mode = FakeTensorMode()
    with mode:
        Call.of(spec, Inputs(*(mode.from_tensor(x) for x in (q, k, v))))
    check(q, k, v, steps=(HALF, CAUSAL))


def test_more_than_an_operator_takes_is_left_to_another(npu):
    long = [torch.empty(1, dtype=torch.bfloat16).expand(1, 1, n, 16) for n in (1, 262145, 262145)]
    spec = make_spec(*long)
    assert Call.of(spec, Inputs(*long)).plan.operator == "npu_fusion_attention_v3"
    many = [torch.empty(1, dtype=torch.float16).expand(129, 1, n, 16) for n in (2, 4, 4)]
    with pytest.raises(ValueError, match="128"):
        Call.of(make_spec(*many), Inputs(*many), inference=True)
    rows = [torch.empty(1).expand(1, 1, n, 16) for n in (1, 2**20 + 1, 2**20 + 1)]
    with pytest.raises(ValueError, match="1048576"):
        Call.of(make_spec(*rows), Inputs(*rows))


def test_rows_that_lie_by_head_are_not_copied(npu):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(2, 3, 20, 20))
    check(q, k, v, steps=(HALF, CAUSAL))
    _, given = npu.calls[0]
    assert given["input_layout"] == "BSND" and given["query"].data_ptr() == q.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("mask", ["none", "keys", "first", "heads"])
def test_one_query_is_decoded(npu, dtype, groups, mask):
    q, k, v = (
        randn(2, 2, groups, 1, 24, dtype=dtype),
        randn(2, 2, 1, 40, 24, dtype=dtype),
        randn(2, 2, 1, 40, 24, dtype=dtype),
    )
    shared = ((), ("B2",), ("B2",)) if groups > 1 else ((), (), ())
    operands, steps = [], (HALF,)
    if mask in ("keys", "heads"):
        operands = [torch.rand(2, 2 if mask == "heads" else 1, 1, 1, 40) > 0.5]
        operands[0][1] = False
        steps = (HALF, ReplaceFill(dense(0), -INF))
    elif mask == "first":
        steps = (HALF, CAUSAL)
    check(q, k, v, operands, broadcast=shared, steps=steps, hidden="zero")
    want = "npu_fusion_attention_v3" if mask == "heads" and groups > 1 else "npu_fused_infer_attention_score"
    assert npu.calls[0][0] == want and npu.calls[1][0] == "npu_fusion_attention_grad_v3"
    if operands:
        check(q, k, v, operands, broadcast=shared, steps=(HALF, ReplaceFill(dense(0), torch.finfo(dtype).min)))


def packed(lengths, gap=0, keys=None, layout="packed", heads=(2,), dtype=None, D=8):
    """q, k, v and bounds."""
    of_queries = bounds_of(*lengths, gap=gap)
    of_keys = of_queries if keys is None else bounds_of(*keys)
    rows, columns = int(of_queries[1, -1]) + gap, int(of_keys[1, -1]) + (gap if keys is None else 0)
    count = len(lengths)
    q = randn(1, *heads, rows, D, dtype=dtype) if layout != "packed_keys" else randn(count, *heads, 9, D, dtype=dtype)
    shape = (1, *heads, columns, D) if layout != "packed_queries" else (count, *heads, 9, D)
    k, v = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype)
    bounds = Bounds(None if layout == "packed_keys" else of_queries, None if layout == "packed_queries" else of_keys)
    return (q, k, v), {"bounds": bounds, "layout": layout}


@pytest.mark.parametrize("layout", ["packed", "packed_queries", "packed_keys"])
@pytest.mark.parametrize("gap", [0, 2])
@pytest.mark.parametrize("lengths", [(5, 7, 3), (5, 0, 3), (1,), (0, 4), (4, 0)])
def test_packed_rows(npu, layout, gap, lengths):
    given, fields = packed(lengths, gap, layout=layout)
    check(*given, **fields)
    assert all(given["input_layout"] == "TND" for _, given in npu.calls)


@pytest.mark.parametrize(
    ("mask", "mode"), [(causal(), 2), (A.and_(causal(), window(3)), 4), (window(100), 0), (causal(2), 4)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_masks(npu, mask, mode, dtype):
    given, fields = packed((5, 7, 3), gap=1, dtype=dtype)
    check(*given, steps=(HALF, ReplaceFill(mask, -INF)), **fields)
    assert called(npu)[1] == mode


def test_packed_rows_of_other_lengths(npu):
    given, fields = packed((5, 7, 3), keys=(2, 9, 4))
    check(*given, **fields)
    check(*given, steps=(HALF, CAUSAL), **fields)
    # rows from the last key on would be hidden, and windows differ by sequence
    with pytest.raises(ValueError, match="by distance"):
        check(*given, steps=(HALF, ReplaceFill(causal(-3), -INF)), **fields)
    with pytest.raises(ValueError, match="by distance"):
        check(*given, steps=(HALF, ReplaceFill(causal(1), -INF)), **fields)
    given, fields = packed((5, 7, 3), keys=(2, 0, 4))
    check(*given, **fields)
    given, fields = packed((0, 0), keys=(2, 3))
    check(*given, **fields)


def test_packed_groups(npu):
    q, k, v = randn(1, 2, 3, 15, 8), randn(1, 2, 1, 15, 8), randn(1, 2, 1, 15, 8)
    bounds = bounds_of(5, 7, 3)
    shared = ((), ("B2",), ("B2",))
    check(q, k, v, broadcast=shared, bounds=Bounds(bounds, bounds), layout="packed", steps=(HALF, CAUSAL))


def test_bounds_that_were_written_to_are_copied_to_the_host_again(npu):
    (q, k, v), fields = packed((5, 7, 3))
    check(q, k, v, **fields)
    fields["bounds"].q.copy_(bounds_of(4, 4, 7))
    check(q, k, v, **fields)
    assert npu.calls[-1][1]["actual_seq_qlen"].tolist() == [4, 8, 15]
    # as code that Inductor generated writes to a buffer that it uses again
    fields["bounds"].q.data.copy_(bounds_of(2, 3, 10))
    check(q, k, v, **fields)
    assert npu.calls[-1][1]["actual_seq_qlen"].tolist() == [2, 5, 15]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ["dense", "packed", "masked", "added"])
def test_dropout_drops_the_same_in_backward_and_when_it_is_recomputed(npu, dtype, rows):
    fields, operands, steps = {}, [], (HALF, CAUSAL)
    if rows == "packed":
        (q, k, v), fields = packed((5, 7, 3), dtype=dtype)
    else:
        q, k, v = qkv(2, 2, 20, 20, 8, dtype=dtype)
    if rows in ("masked", "added"):
        operands = [torch.rand(2, 1, 1, 20) > 0.3]
        operands[0][1] = False
        fill = ReplaceFill(dense(0), -1e9) if rows == "masked" else AddFill(dense(0), FLOAT_MIN)
        if rows == "added" and dtype == torch.float16:
            pytest.skip("refused: float16 has no such number")
        steps = (HALF, fill)
    bounds = fields.pop("bounds", Bounds())
    spec = make_spec(q, k, v, operands, steps=steps, dropout=0.5, **fields)
    inputs = Inputs(q, k, v, operands, torch.tensor([12345]), bounds)
    out, stats = ascend.forward(spec, inputs)
    again, _ = ascend.forward(spec, inputs)
    assert torch.equal(out, again)
    other, _ = ascend.forward(spec, inputs._replace(seed=torch.tensor([12346])))
    assert not torch.equal(out, other)
    # out is linear in v: by the same weights dv is what their transpose gives
    dout = randn(*out.shape, dtype=dtype)
    dv = ascend.backward(spec, inputs, dout, out, stats, [True] * 3 + [False] * len(operands))[2]
    product = (dv.double() * v.double()).sum()
    assert torch.allclose(product, (dout.double() * out.double()).sum(), rtol=2e-2, atol=0.5)


@pytest.mark.parametrize("when", ["backward", "memory", "second forward", "first forward", "value"])
def test_gradients_with_dropout_are_of_the_kernel_that_dropped(once, on_cpu, monkeypatch, when):
    ops.forget()
    q, k, v = (x.requires_grad_() for x in qkv(1, 2, 9, 9, 64))
    spec = make_spec(q, k, v, dropout=0.5)

    def run():
        return torch.ops.attnfuse.attention(q, k, v, [], torch.tensor([7]), None, None, spec.argument, "ascend", False)[
            0
        ]

    def fails(*given):
        raise {"memory": torch.OutOfMemoryError, "value": ValueError}.get(when, RuntimeError)("no luck")

    if when in ("backward", "second forward"):
        out = run()
    broken = ["forward", "backward"] if when == "value" else ["backward"] if when == "backward" else ["forward"]
    for name in broken:
        monkeypatch.setattr(ascend, name, fails)
    if when in ("memory", "second forward"):
        with pytest.raises(RuntimeError, match="no luck"):
            run()
    elif when == "backward":
        with pytest.raises(RuntimeError, match="no luck"):
            out.sum().backward()
    else:
        # all of the reference
        with pytest.warns(match="no luck"):
            out = run()
        dout = torch.randn_like(out)
        out.backward(dout)
        torch.testing.assert_close((v.grad * v).sum(), (dout * out).sum())
    if when == "second forward":
        dout = torch.randn_like(out)
        out.backward(dout)
        torch.testing.assert_close((v.grad * v).sum(), (dout * out).sum())
    ops.forget()


def test_empty_dims_give_what_the_reference_gives(npu):
    for queries, keys in ((0, 5), (5, 0)):
        check(*qkv(1, 2, queries, keys, 8))
    assert not npu.calls


def test_a_plan_says_what_is_called():
    q, k, v = qkv(1, 2, 33, 33)
    spec = make_spec(q, k, v, steps=(HALF, ReplaceFill(A.and_(causal(), window(7)), -INF)))
    said = str(Call.of(spec, Inputs(q, k, v)).plan)
    assert said == "npu_fusion_attention_v3 BNSD, 2 heads, scale 0.25, band: mask triangle, mode 4 6 back, 0 ahead"


@pytest.mark.parametrize(
    ("queries", "keys", "count", "mode"),
    [(20, 20, 7, 6), (20, 33, 13, 6), (20, 33, 20, 6), (33, 20, 4, 6), (20, 20, 20, 6), (20, 33, 5, 1), (20, 20, 0, 2)],
)
def test_a_prefix_that_all_queries_see(npu, queries, keys, count, mode):
    seen = A.or_(causal(keys - queries), A.compare("lt", expr.K, Const(count)))
    check(*qkv(2, 2, queries, keys), steps=(HALF, ReplaceFill(seen, -INF)))
    assert called(npu)[1] == mode and npu.calls[0][1].get("prefix") == ([count] * 2 if mode == 6 else None)


def test_a_prefix_of_a_large_batch_is_a_mask(npu):
    seen = A.or_(causal(), A.compare("lt", expr.K, Const(7)))
    check(*qkv(33, 1, 9, 9, 4), steps=(HALF, ReplaceFill(seen, -INF)))
    assert called(npu)[1] == 1


@pytest.mark.parametrize("case", ["packed", "masked", "biased"])
def test_the_default_device_says_nothing_of_what_is_made(npu, case):
    fields, operands, steps = {}, [], (HALF, CAUSAL)
    if case == "packed":
        (q, k, v), fields = packed((5, 7, 3), gap=2)
    else:
        q, k, v = qkv(2, 2, 9, 9)
        operands = [torch.rand(2, 1, 1, 9) > 0.3 if case == "masked" else randn(1, 2, 9, 9)]
        steps = (HALF, ReplaceFill(dense(0), -INF) if case == "masked" else Bias(0), AddFill(causal(), -1e4))
    bounds = fields.pop("bounds", Bounds())
    spec = make_spec(q, k, v, operands, steps=steps, hidden="zero", **fields)
    inputs = Inputs(q, k, v, operands, bounds=bounds)
    wanted = ascend.forward(spec, inputs)
    with torch.device("meta"):
        found = ascend.forward(spec, inputs)
        ascend.backward(spec, inputs, torch.ones_like(found[0]), *found, [True] * 3 + [False] * len(operands))
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
