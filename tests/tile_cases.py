"""Attentions of every kind against the oracle, around tiles of 32 queries and 64 keys. For the kernel module that the fixture
gives."""

from __future__ import annotations

import kernel_cases
import pytest
import torch
from kernel_cases import FLOAT_MIN, GATES, INF, STEPS, WEIGHTS, assert_close, check, in_bfloat16, make_spec, qkv, randn
from packed_cases import LENGTHS, attention

from attnfuse.expr import Algebra, Const, K, Q, causal, dense, documents, window
from attnfuse.kernels import layout
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.program.traits import traits
from attnfuse.spec import AddFill, Bias, Cast, ReplaceFill, Scale, Softcap

HALF = Scale(0.25)
A = Algebra()


@pytest.mark.parametrize(("D", "E"), [(1, 1), (8, 8), (20, 33), (64, 64), (96, 40), (128, 128), (256, 256)])
def test_head_sizes(kernel, D, E):
    check(kernel, *qkv(1, 1, 40, 70, D, E))


@pytest.mark.parametrize(("Qn", "Kn"), [(1, 1), (1, 130), (130, 1), (32, 64), (33, 65), (97, 200)])
def test_lengths(kernel, Qn, Kn):
    check(kernel, *qkv(1, 2, Qn, Kn, 8))


@pytest.mark.parametrize(("Qn", "Kn", "D", "E"), [(0, 5, 8, 8), (5, 0, 8, 8), (5, 5, 8, 0)])
def test_an_empty_dim_gives_what_the_reference_gives(kernel, Qn, Kn, D, E):
    check(kernel, *qkv(1, 2, Qn, Kn, D, E))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("steps", [(HALF,), (HALF, Softcap(2.0), AddFill(causal(0), -1e4))], ids=["plain", "softcap"])
def test_low_precision(kernel, dtype, steps):
    check(kernel, *qkv(1, 2, 70, 90, 32, dtype=dtype), steps=steps)


#: Steps after which the kernels take the scale, the shift and the sum together. The last ones leave whole rows without scores.
NEAR = {
    "no step": (),
    "scale": (HALF,),
    "a scale below 0": (Scale(-0.25), ReplaceFill(causal(), -INF)),
    "causal": (HALF, ReplaceFill(causal(), -INF)),
    "causal, added": (HALF, AddFill(causal(40), -INF)),
    "softcap": (HALF, Softcap(3.0), ReplaceFill(causal(), -INF)),
    "two scales": (HALF, ReplaceFill(causal(), -INF), Scale(0.5)),
    "large scores": (Scale(1000.0), ReplaceFill(causal(), -INF)),
    "rows without scores": (HALF, ReplaceFill(causal(-40), -INF)),
}


@pytest.mark.parametrize("name", NEAR)
@pytest.mark.parametrize("hidden", ["nan", "zero", "nan_to_zero"])
@pytest.mark.parametrize("queries", [7, 70])
def test_scale_shift_and_sum_taken_together(kernel, name, hidden, queries):
    steps = NEAR[name]
    q, k, v = qkv(1, 2, queries, 90, 16, dtype=kernel_cases.LOW)
    spec = make_spec(q, k, v, steps=steps, hidden=hidden)
    found = traits(in_bfloat16(spec))
    assert found.near and found.merged == (hidden != "nan_to_zero")
    # delta is taken from the rounded result, which large scores show (docs/kernels.md)
    check(kernel, q, k, v, steps=steps, hidden=hidden, backward=name != "large scores")


@pytest.mark.parametrize(
    "steps",
    [
        (HALF, AddFill(causal(), -1e9)),
        (HALF, Bias(0)),
        (HALF, ReplaceFill(causal(-40), -1e30)),
        (Scale(1e9),),
        (HALF, Scale(1e30)),
    ],
)
def test_what_may_take_whole_rows_far_from_0_is_subtracted_first(kernel, steps):
    q, k, v = qkv(1, 2, 70, 90, 16, dtype=kernel_cases.LOW)
    operands = [torch.full((1, 1, 70, 90), -1e30)] if Bias(0) in steps else []
    assert not traits(in_bfloat16(make_spec(q, k, v, operands, steps=steps))).near
    # a weight of 1 alone leaves nothing but rounding for the gradient of its score
    check(kernel, q, k, v, operands, steps=steps, backward=not isinstance(steps[-1], Scale))


@pytest.mark.parametrize("name", STEPS)
def test_every_step_forward_and_backward(kernel, name):
    check(kernel, *qkv(1, 2, 40, 90, 8), steps=STEPS[name])


@pytest.mark.parametrize("offset", [-100, -5, 0, 7, 64, 300])
@pytest.mark.parametrize("fill", [ReplaceFill, AddFill])
@pytest.mark.parametrize("value", [-INF, FLOAT_MIN, -1e9, -10.0])
def test_causal_offsets(kernel, offset, fill, value):
    hidden = "nan" if value > -INF else "zero"
    # an infinite added fill gives NaN gradients in autograd's softmax, ours are zero
    differs = fill is AddFill and value == -INF and offset < 0
    check(
        kernel, *qkv(1, 1, 70, 130, 8), steps=(HALF, fill(causal(offset), value)), hidden=hidden, backward=not differs
    )


@pytest.mark.parametrize("edge", [31, 32, 33, 34])
@pytest.mark.parametrize("mask", [causal, window])
def test_the_first_and_last_rows_of_tiles_are_seen_whole(kernel, mask, edge):
    # tiles of 32 queries and 64 keys: one more or less begins or ends where a tile does
    check(kernel, *qkv(1, 1, 100, 130, 8), steps=(HALF, ReplaceFill(mask(edge), -INF)), hidden="zero")


@pytest.mark.parametrize("hidden", ["nan", "zero", "nan_to_zero"])
@pytest.mark.parametrize("value", [-INF, FLOAT_MIN, -1e9])
@pytest.mark.parametrize("also", [False, True])
def test_rows_without_keys(kernel, hidden, value, also):
    keep = torch.rand(2, 1, 1, 90) < 0.7
    keep[0, ..., :40] = False
    mask = A.and_(causal(0), dense(0)) if also else dense(0)
    for fill in (ReplaceFill, AddFill):
        differs = fill is AddFill and value == -INF and hidden != "nan"
        check(
            kernel, *qkv(2, 2, 70, 90, 8), [keep], steps=(HALF, fill(mask, value)), hidden=hidden, backward=not differs
        )


@pytest.mark.parametrize("hidden", ["zero", "nan_to_zero"])
def test_rows_made_zero_have_zero_gradients_under_an_added_fill(kernel, hidden):
    q, k, v = qkv(1, 2, 20, 30, 8)
    keep = torch.ones(1, 1, 20, 30, dtype=torch.bool)
    keep[..., 5:9, :] = False
    spec = make_spec(q, k, v, [keep], steps=(AddFill(dense(0), -INF),), hidden=hidden)
    out, stats = kernel.forward(spec, Inputs(q, k, v, [keep]))
    dout = torch.randn_like(out)
    got = kernel.backward(spec, Inputs(q, k, v, [keep]), dout, out, stats, [True] * 3 + [False])
    other = make_spec(q, k, v, [keep], steps=(ReplaceFill(dense(0), -INF),), hidden=hidden)
    want, eager = (
        kernel_cases.evaluate(other, (q, k, v, keep), None, dtype, dout)[1][:3] for dtype in (torch.float64, q.dtype)
    )
    for i, (a, b, c) in enumerate(zip(got[:3], want, eager, strict=True)):
        assert_close(a, b, c, f"gradient {i}")
    assert not out[..., 5:9, :].any() and not got[0][..., 5:9, :].any()


MASKS = {
    "window": A.and_(causal(), window(20)),
    "far window": A.and_(causal(-30), window(60)),
    "chunks": A.and_(causal(), A.compare("eq", A.floordiv(Q, Const(16)), A.floordiv(K, Const(16)))),
    "every third": A.compare("eq", A.mod(A.add(K, Const(-200)), Const(3)), Const(1)),
    "prefix": A.or_(causal(), A.compare("lt", K, Const(30))),
    "near": A.compare("le", A.abs(A.sub(K, Q)), Const(9)),
    "all": Const(1, "bool"),
    "none": Const(0, "bool"),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_indices(kernel, name):
    for value in (-INF, FLOAT_MIN):
        check(kernel, *qkv(1, 1, 100, 130, 8), steps=(HALF, ReplaceFill(MASKS[name], value)))


def test_documents_and_lengths(kernel):
    ids = torch.cat([torch.full((n,), i) for i, n in enumerate((30, 45, 25))])
    q, k, v = qkv(1, 2, 100, 100, 8)
    ids = ids.view(1, 1, 100, 1)
    steps = (HALF, ReplaceFill(A.and_(causal(), documents(0, 1)), -INF))
    check(kernel, q, k, v, [ids, ids.mT.contiguous()], steps=steps)
    lengths = torch.tensor([3, 60]).view(2, 1, 1, 1)
    kept = A.compare("lt", K, A.add(kernel_cases.expr.Load(0, "int64"), Const(0)))
    check(kernel, *qkv(2, 2, 70, 100, 8), [lengths], steps=(HALF, ReplaceFill(kept, FLOAT_MIN)))


@pytest.mark.parametrize("name", kernel_cases.WRAPPING)
def test_integers_wrap_as_those_of_tensors_do(kernel, name):
    operands = kernel_cases.wrapping_operands(40, 70)
    steps = (HALF, ReplaceFill(kernel_cases.WRAPPING[name], -INF))
    check(kernel, *qkv(5, 1, 40, 70, 8), operands, steps=steps, hidden="zero")


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(2, 2, 40, 70), (2, 1, 1, 70), (1, 1, 40, 1)])
def test_masks_of_every_dtype_and_broadcast(kernel, dtype, shape):
    keep = (torch.rand(shape) < 0.7).to(dtype)
    kept = dense(0, str(dtype).removeprefix("torch."))
    check(kernel, *qkv(2, 2, 40, 70, 8), [keep], steps=(HALF, ReplaceFill(kept, -1e9)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(2, 2, 40, 70), (1, 2, 40, 70), (1, 2, 40, 1), (2, 1, 1, 70), (1, 2, 1, 1)])
def test_operand_gradients_are_summed_over_broadcast_dims(kernel, dtype, shape):
    bias = randn(*shape, dtype=dtype)
    check(kernel, *qkv(2, 2, 40, 70, 8), [bias], steps=(HALF, Bias(0, 0.5)))
    check(kernel, *qkv(2, 2, 40, 70, 8), [bias], steps=(HALF, Scale(operand=0)))


def test_an_operand_used_twice_gets_both_gradients(kernel):
    check(kernel, *qkv(2, 2, 33, 33, 8), [randn(2, 2, 33, 33)], steps=(Scale(operand=0), Bias(0), Softcap(3.0)))


@pytest.mark.parametrize("gate", GATES)
def test_a_bias_with_a_mask(kernel, gate):
    keep = GATES[gate]
    for bias in (randn(1, 2, 70, 90), randn(2, 1, 1, 90)):
        check(kernel, *qkv(2, 2, 70, 90, 8), [bias], steps=(Bias(0, 0.5, keep=keep), AddFill(keep, FLOAT_MIN)))


@pytest.mark.parametrize("wide", [False, True])
def test_tables_by_distance_and_by_row(kernel, wide):
    q, k, v = qkv(2, 2, 70, 70, 8)
    table = randn(1, 2, 70 if wide else 1, 139)
    dims = (("1", "B1", "Q", "T"),) if wide else (("1", "B1", "1", "T"),)
    col = A.add(A.sub(K, Q), Const(69))
    check(kernel, q, k, v, [table], dims=dims, steps=(HALF, Bias(0, 2.0, None, col)))


@pytest.mark.parametrize("groups", [1, 3])
def test_grouped_queries_share_keys(kernel, groups):
    q, k, v = randn(2, 2, groups, 40, 8), randn(2, 2, 1, 70, 8), randn(2, 2, 1, 70, 8)
    check(kernel, q, k, v, steps=(HALF, ReplaceFill(causal(0), -INF)))


def test_any_input_may_be_broadcast_over_any_batch_dim(kernel):
    shapes = [((2, 3), (1, 3), (2, 1)), ((1, 3), (2, 3), (2, 3)), ((1, 1), (2, 3), (1, 1)), ((2, 3), (1, 1), (1, 1))]
    for a, b, c in shapes:
        check(kernel, randn(*a, 33, 8), randn(*b, 70, 8), randn(*c, 70, 8))


@pytest.mark.parametrize("rank", [0, 1, 3, 6])
def test_any_number_of_batch_dims(kernel, rank):
    batch = (2,) * min(rank, 3) + (1,) * max(0, rank - 3)
    check(kernel, randn(*batch, 33, 8), randn(*batch, 40, 8), randn(*batch, 40, 8))


def test_strides_and_nan_beyond_a_slice_change_no_bit(kernel):
    def poisoned(x):
        wide = torch.full((*x.shape[:-2], x.shape[-2] + 9, x.shape[-1] + 5), torch.nan, dtype=x.dtype)
        wide[..., 4 : 4 + x.shape[-2], 2 : 2 + x.shape[-1]] = x
        return wide[..., 4 : 4 + x.shape[-2], 2 : 2 + x.shape[-1]]

    lays = [poisoned, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: x.mT.contiguous().mT]
    q, k, v = qkv(1, 2, 40, 70, 12)
    bias = randn(1, 2, 40, 70)
    spec = make_spec(q, k, v, [bias], steps=(HALF, Bias(0)))
    dout = randn(1, 2, 40, 12)
    out, stats = kernel.forward(spec, Inputs(q, k, v, [bias]))
    grads = kernel.backward(spec, Inputs(q, k, v, [bias]), dout, out, stats, [True] * 4)
    for lay in lays:
        moved = [lay(x) for x in (q, k, v, bias)]
        again, stats = kernel.forward(spec, Inputs(*moved[:3], moved[3:]))
        assert torch.equal(out, again)
        found = kernel.backward(spec, Inputs(*moved[:3], moved[3:]), lay(dout), again, stats, [True] * 4)
        assert all(torch.equal(a, b) for a, b in zip(grads, found, strict=True))


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 0, 1, 3)])
def test_out_order_is_the_memory_order(kernel, order):
    check(kernel, *qkv(2, 2, 33, 40, 8), out_order=order)


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout_draws_the_reference_mask(kernel, p):
    seed = torch.tensor([0x123456789ABCDEF])
    check(kernel, *qkv(2, 2, 40, 90, 8), seed=seed, dropout=p)


def test_dropout_without_a_seed_is_refused(kernel):
    q, k, v = qkv(1, 1, 8, 8, 8)
    with pytest.raises(ValueError, match="seed"):
        kernel.forward(make_spec(q, k, v, dropout=0.5), Inputs(q, k, v))


@pytest.mark.parametrize("name", [n for n in WEIGHTS if n != "filled"])
def test_weight_steps_forward_and_backward(kernel, name):
    keep, factor = torch.rand(2, 1, 1, 70) < 0.7, randn(1, 2, 1, 1)
    check(kernel, *qkv(2, 2, 40, 70, 8), [keep, factor], weight_steps=WEIGHTS[name])


def test_weights_zeroed_in_rows_without_keys(kernel):
    keep = torch.rand(2, 1, 1, 90) < 0.7
    keep[0] = False
    after = (ReplaceFill(dense(0), 0.0),)
    check(kernel, *qkv(2, 2, 70, 90, 8), [keep], steps=(ReplaceFill(dense(0), -INF),), weight_steps=after)
    mixed = A.and_(dense(0), causal())
    check(
        kernel,
        *qkv(2, 2, 70, 90, 8),
        [keep],
        steps=(ReplaceFill(mixed, -INF),),
        weight_steps=(ReplaceFill(causal(), 0.0),),
    )


def test_unshifted_softmax(kernel):
    check(kernel, *qkv(1, 2, 40, 70, 8), softmax="unshifted")
    # exp(200) is no float32
    q = torch.full((1, 1, 4, 1), 20.0, dtype=kernel_cases.DTYPE)
    k = torch.tensor([10.0, 1.0], dtype=kernel_cases.DTYPE).view(1, 1, 2, 1)
    spec = make_spec(q, k, k, softmax="unshifted", steps=())
    assert bool(kernel.forward(spec, Inputs(q, k, k))[0].isnan().all())


@pytest.mark.parametrize("where", ["q", "k", "v", "bias"])
@pytest.mark.parametrize("hidden", ["nan", "zero", "nan_to_zero"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("queries", [3, 40])
def test_nan_reaches_what_it_reaches_in_the_reference(kernel, where, hidden, masked, queries):
    q, k, v = qkv(1, 2, queries, 70, 8)
    bias = randn(1, 2, queries, 70)
    # of q this makes all scores of a row NaN, of which a maximum says no more than of a row without scores
    {"q": q, "k": k, "v": v, "bias": bias}[where][0, 1, 2, 2] = torch.nan
    steps = (HALF, Bias(0), *([ReplaceFill(causal(), -INF)] if masked else []))
    # a row that counts as 0 has no gradient here; autograd makes it 0 times NaN
    check(kernel, q, k, v, [bias], steps=steps, hidden=hidden, backward=hidden != "nan_to_zero")


def test_a_half_overflow_is_an_infinity(kernel):
    q, k = torch.full((1, 1, 1, 1), 300.0), torch.tensor([[[[300.0], [-300.0], [1.0]]]])
    q, k, v = q.to(kernel_cases.DTYPE), k.to(kernel_cases.DTYPE), randn(1, 1, 3, 4)
    out, _ = kernel.forward(make_spec(q, k, v, steps=(Cast("float16"),)), Inputs(q, k, v))
    assert bool(out.isnan().all())


def test_only_needed_gradients_are_made(kernel):
    q, k, v = qkv(1, 2, 33, 33, 8)
    bias = randn(1, 2, 33, 33)
    spec = make_spec(q, k, v, [bias], steps=(Bias(0),))
    out, stats = kernel.forward(spec, Inputs(q, k, v, [bias]))
    every = kernel.backward(spec, Inputs(q, k, v, [bias]), out, out, stats, [True] * 4)
    for i in range(4):
        needs = [j == i for j in range(4)]
        found = kernel.backward(spec, Inputs(q, k, v, [bias]), out, out, stats, needs)
        assert [g is not None for g in found] == needs
        assert torch.equal(found[i], every[i])


def test_deterministic_gradients_of_operands_are_right_and_tables_are_refused(kernel):
    torch.use_deterministic_algorithms(True)
    try:
        for shape in ((1, 2, 40, 70), (1, 2, 40, 1), (2, 1, 1, 70), (1, 2, 1, 1)):
            check(kernel, *qkv(2, 2, 40, 70, 8), [randn(*shape)], steps=(HALF, Bias(0)))
        col = A.add(A.sub(K, Q), Const(69))
        with pytest.raises(RuntimeError, match="deterministic"):
            check(
                kernel,
                *qkv(1, 2, 70, 70, 8),
                [randn(1, 2, 1, 139)],
                dims=[("1", "B1", "1", "T")],
                steps=(Bias(0, 1.0, None, col),),
            )
    finally:
        torch.use_deterministic_algorithms(False)


def test_results_lie_as_the_fake_ones_do(kernel):
    q, k, v = qkv(1, 2, 8, 8, 8)
    spec = make_spec(q, k, v, out_order=(0, 2, 1, 3))
    out, stats = kernel.forward(spec, Inputs(q, k, v))
    fake, fake_stats = layout.allocate(spec, Inputs(q, k, v))
    assert (out.stride(), stats.stride()) == (fake.stride(), fake_stats.stride())


def test_operands_that_are_too_short_are_not_read_past_their_end(kernel):
    q, k, v, bounds = attention()
    bias = randn(len(LENGTHS), 1, 3, 3)
    spec = make_spec(q, k, v, [bias], layout="packed", steps=(Bias(0),))
    room = torch.full((bias.numel() + 400,), torch.nan, dtype=bias.dtype)
    room[200:-200] = bias.flatten()
    alone = kernel.forward(spec, Inputs(q, k, v, [room[200:-200].view(bias.shape)], bounds=bounds))[0]
    assert not bool(alone.isnan().any())
