"""The kernels for 7.0 and 7.5 in the emulator, against the oracle: a sample of `test_kernel_volta_cases.py`, and drawn attentions.

A text is compiled for each spec, head size and pass, which takes most of the time: tests vary lengths and broadcasts of one spec.
"""

from __future__ import annotations

import kernel_cases
import pytest
import torch
from drawn_attentions import Drawn, attentions
from emulated_volta import Emulated
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import FLOAT_MIN, INF, STEPS, check, make_spec, qkv, randn
from packed_cases import attention, packed

from attnfuse import ops
from attnfuse.expr import Algebra, Const, K, Q, causal, dense, window
from attnfuse.kernels import reference
from attnfuse.kernels.inputs import Bounds, Inputs
from attnfuse.spec import AddFill, Bias, Ramp, ReplaceFill, Scale, Sink, Softcap

A = Algebra()
HALF = Scale(0.25)
BEFORE = ReplaceFill(causal(), -INF)


@pytest.fixture(autouse=True)
def _halves(monkeypatch):
    monkeypatch.setattr(kernel_cases, "DTYPE", torch.float16)


def alternating(values):
    """Each value with a capability: the other one in the slow suite."""
    return [
        pytest.param(value, capability, id=f"{value}-{capability}", marks=[] if (at + of) % 2 else [pytest.mark.slow])
        for at, value in enumerate(values)
        for of, capability in enumerate((70, 75))
    ]


def capabilities(always):
    marked = (pytest.param(x, marks=[] if x == always else [pytest.mark.slow]) for x in (70, 75))
    return pytest.mark.parametrize("capability", list(marked))


@pytest.mark.parametrize(
    ("widths", "capability"), alternating([(1, 1), (20, 33), (64, 64), (96, 40), (128, 128), (256, 256)])
)
def test_head_sizes(widths, capability):
    kernel = Emulated(capability)
    check(kernel, *qkv(1, 1, 40, 70, *widths))
    check(kernel, *qkv(1, 2, 3, 300, *widths), backward=False)


@pytest.mark.parametrize("capability", [70, 75])
def test_lengths_and_broadcasts(capability):
    kernel = Emulated(capability)
    for queries, keys in ((1, 1), (1, 130), (130, 1), (32, 64), (33, 65), (97, 200)):
        check(kernel, *qkv(1, 2, queries, keys, 8))
    for a, b, c in (
        ((2, 3), (1, 3), (2, 1)),
        ((1, 3), (2, 3), (2, 3)),
        ((1, 1), (2, 3), (1, 1)),
        ((2, 3), (1, 1), (1, 1)),
    ):
        check(kernel, randn(*a, 33, 8), randn(*b, 70, 8), randn(*c, 70, 8))


@pytest.mark.parametrize(("name", "capability"), alternating(STEPS))
def test_steps(name, capability):
    for queries, keys in ((40, 90), (5, 33)):
        check(Emulated(capability), *qkv(1, 2, queries, keys, 8), steps=STEPS[name])


MASKS = {
    "causal": causal(),
    "causal from the end": causal(60),
    "causal, no key at first": causal(-40),
    "window": A.and_(causal(30), window(20)),
}


@pytest.mark.parametrize(("name", "capability"), alternating(MASKS))
def test_masks_of_indices(name, capability):
    for value in (-INF, -1e9):
        steps = (HALF, ReplaceFill(MASKS[name], value))
        for queries, keys in ((70, 130), (100, 40)):
            check(Emulated(capability), *qkv(1, 1, queries, keys, 8), steps=steps, hidden="zero")


@pytest.mark.parametrize(("hidden", "capability"), alternating(["nan", "zero", "nan_to_zero"]))
def test_rows_without_keys(hidden, capability):
    keep = torch.rand(2, 1, 1, 90) < 0.7
    keep[0, ..., :40] = False
    steps = (HALF, AddFill(A.and_(causal(), dense(0)), FLOAT_MIN))
    check(Emulated(capability), *qkv(2, 2, 70, 90, 8), [keep], steps=steps, hidden=hidden)


@pytest.mark.parametrize(("last", "capability"), alternating([(40, 70), (40, 1), (1, 70), (1, 1)]))
def test_gradients_of_operands(last, capability):
    # their sums over batch dims are of one text
    for batch in ((2, 2), (1, 2), (2, 1)):
        check(Emulated(capability), *qkv(2, 2, 40, 70, 8), [randn(*batch, *last)], steps=(HALF, Bias(0, 0.5)))


@capabilities(70)
def test_tables_and_scales_and_weights(capability):
    q, k, v = qkv(2, 2, 70, 70, 8)
    operands = [randn(1, 2, 1, 139), randn(2, 1, 1, 70, dtype=torch.float32), torch.rand(2, 1, 1, 70) < 0.7]
    dims = [("1", "B1", "1", "T"), ("B0", "1", "1", "K"), ("B0", "1", "1", "K")]
    check(
        Emulated(capability),
        q,
        k,
        v,
        operands,
        dims=dims,
        steps=(Scale(operand=1), Bias(0, 2.0, None, A.add(A.sub(K, Q), Const(69)))),
        weight_steps=(ReplaceFill(dense(2), 0.0), Scale(0.5)),
    )


@capabilities(75)
def test_sinks_and_log_sum_exps(capability):
    sinks = [randn(1, 2, 1, 1)]
    for queries in (40, 3):
        check(
            Emulated(capability),
            *qkv(2, 2, queries, 70, 8),
            sinks,
            steps=(HALF, AddFill(causal(), FLOAT_MIN)),
            sink=Sink(operand=0),
            lse=True,
        )


@capabilities(70)
def test_dropout_draws_what_the_reference_draws(capability):
    q, k, v = qkv(2, 2, 40, 90, 8)
    v = torch.eye(90)[:, :64].half().expand(2, 2, 90, 64).contiguous()
    seed = torch.tensor([0x123456789ABCDEF])
    check(Emulated(capability), q, k, v, seed=seed, dropout=0.3)
    spec = make_spec(q, k, v, dropout=0.3)
    out, _ = Emulated(capability).forward(spec, Inputs(q, k, v, seed=seed))
    # a weight for each of the first 64 keys
    want, _ = reference.attend(spec, Inputs(q, k, v, seed=seed), torch.float32)
    assert torch.equal(out != 0, want != 0)


@capabilities(75)
def test_packed(capability):
    kernel = Emulated(capability)
    q, k, v, bounds = attention(E=24)
    check(kernel, q, k, v, bounds=bounds, layout="packed", steps=(HALF, BEFORE), out_order=(0, 2, 1, 3))
    q, k, v, bounds = attention((3, 40, 0, 17, 9), (50, 0, 8, 17, 70), E=24)
    check(kernel, q, k, v, bounds=bounds, layout="packed", steps=(HALF, BEFORE))
    q, k, v, bounds = attention((5, 1), (1, 5), E=24, gap=2)
    clean = [x.nan_to_num() for x in (q, k, v)]
    check(kernel, *clean, bounds=bounds, layout="packed", steps=(HALF, BEFORE))


@capabilities(70)
def test_one_side_packed(capability):
    kernel = Emulated(capability)
    rows, bounds = packed((5, 0, 1, 33, 70), 2)
    values, _ = packed((5, 0, 1, 33, 70), 2)
    for queries in (1, 40):
        q = randn(5, 2, queries, 16)
        check(kernel, q, rows, values, bounds=Bounds(None, bounds), layout="packed_keys")
    keys = randn(5, 2, 37, 16)
    check(kernel, rows, keys, keys.flip(-2), bounds=Bounds(bounds, None), layout="packed_queries")


@pytest.mark.parametrize("capability", [70, 75])
def test_few_queries_of_heads_that_share_keys(capability):
    kernel = Emulated(capability)
    q, k, v = randn(2, 2, 4, 1, 16), randn(2, 2, 1, 600, 16), randn(2, 2, 1, 600, 16)
    steps = (HALF, Softcap(20.0), Bias(0), ReplaceFill(dense(1), -1e9))
    bias, keep = randn(2, 2, 4, 1, 600), torch.rand(2, 1, 1, 1, 600) < 0.5
    # all keys of one element are hidden, of the other those of some parts
    keep[0, ..., 100:], keep[1] = False, False
    check(kernel, q, k, v, [bias, keep], steps=steps, backward=False)
    assert [name for name, _ in kernel.counts] == ["attention_part", "attention_combined"]


@capabilities(75)
def test_strides_and_nan_beyond_a_slice_change_no_bit(capability):
    def poisoned(x):
        wide = torch.full((*x.shape[:-2], x.shape[-2] + 9, x.shape[-1] + 5), torch.nan, dtype=x.dtype)
        wide[..., 4 : 4 + x.shape[-2], 2 : 2 + x.shape[-1]] = x
        return wide[..., 4 : 4 + x.shape[-2], 2 : 2 + x.shape[-1]]

    kernel = Emulated(capability)
    q, k, v = qkv(1, 2, 40, 70, 16)
    spec = make_spec(q, k, v, steps=(HALF, BEFORE))
    dout = randn(1, 2, 40, 16)
    found = []
    for lay in (
        lambda x: x,
        poisoned,
        lambda x: x.mT.contiguous().mT,
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    ):
        inputs = Inputs(*map(lay, (q, k, v)))
        out, stats = kernel.forward(spec, inputs)
        found.append([out, stats, *kernel.backward(spec, inputs, lay(dout), out, stats, [True] * 3)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@capabilities(75)
def test_deterministic_gradients_have_the_same_bits_in_any_order_of_threads(capability):
    torch.use_deterministic_algorithms(True)
    try:
        for shape in ((1, 3, 40, 70), (2, 1, 40, 1), (1, 1, 1, 70), (1, 1, 1, 1)):
            q, k, v = randn(2, 3, 40, 8), randn(2, 1, 70, 8), randn(2, 1, 70, 8)
            operands, found = [randn(*shape)], []
            for seed in (1, 2, 3):
                torch.manual_seed(0)
                found.append(check(Emulated(capability, seed), q, k, v, operands, steps=(HALF, Bias(0)))[1])
            for other in found[1:]:
                assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
        at = A.add(A.sub(K, Q), Const(39))
        steps, dims = (HALF, Bias(0, 1.0, None, at)), [("1", "B1", "1", "T")]
        with pytest.raises(RuntimeError, match="deterministic"):
            check(Emulated(capability), q, k, v, [randn(1, 3, 1, 109)], dims=dims, steps=steps)
    finally:
        torch.use_deterministic_algorithms(False)


def rounded_close(got, oracle, eager, what, factor=2.0, least=1e-5):
    """As kernel_cases.assert_close, for few numbers too, of which eager may have the right ones by chance: the greatest error may
    reach `least`, and that of the last places of the greatest number."""
    assert torch.equal(got.isnan(), oracle.isnan()), f"{what}: NaN at other places"
    assert torch.equal(got.isinf(), oracle.isinf()), f"{what}: infinities at other places"
    ok = oracle.isfinite()
    if not ok.any():
        return
    ours, theirs = (got.double() - oracle)[ok].abs(), (eager.double() - oracle)[ok].abs()
    last = 4 * torch.finfo(torch.float16).eps * oracle[ok].abs().max()
    assert ours.max() <= factor * theirs.max() + last + least, f"{what}: max {ours.max():.2e}, eager {theirs.max():.2e}"


def run(kernel: Emulated, drawn: Drawn, needs: list[bool]):
    """out, stats and gradients for random ones of the results."""
    spec, inputs = drawn.spec, drawn.inputs
    torch.manual_seed(5)
    out, stats = kernel.forward(spec, inputs)
    dout = torch.randn(out.shape).to(out.dtype)
    dlse = torch.randn(out.shape[:-1]) if spec.lse else None
    return out, stats, dout, dlse, kernel.backward(spec, inputs, dout, out, stats, needs, dlse)


def hold(drawn: Drawn, capability: int, seed: int, chosen: list[bool]) -> None:
    spec, inputs = drawn.spec, drawn.inputs
    needs = [x.is_floating_point() for x in inputs.tensors]
    out, stats, dout, dlse, grads = run(Emulated(capability, seed=seed), drawn, needs)
    given = (inputs.tensors, inputs.seed)
    oracle, oracle_grads = kernel_cases.evaluate(spec, *given, torch.float64, dout, inputs.bounds, dlse)
    eager, eager_grads, _ = kernel_cases.evaluate_eager((oracle, oracle_grads), spec, *given, dout, inputs.bounds, dlse)
    E = inputs.v.shape[-1]
    rounded_close(out, oracle[..., :E], eager[..., :E], "out")
    if spec.lse:
        rounded_close(ops.log_sum_exp(stats), oracle[..., -1], eager[..., -1], "log-sum-exp")
    if drawn.trains:
        # delta is made of the rounded result, where eager may have differences of equal numbers; its error is that of the gradient
        # of each score, which gradients of operands are sums of, those of ramps times numbers of queries and keys
        products = (oracle[..., :E] * dout).nan_to_num(posinf=0.0, neginf=0.0).abs().sum(-1)
        lost = float(products.max()) * torch.finfo(torch.float16).eps / 2 if products.numel() else 0.0
        count = inputs.q.shape[-2] + inputs.k.shape[-2]
        ramps = {step.operand for step in spec.steps if isinstance(step, Ramp)}
        counts = [count if i in ramps else count**0.5 for i in range(len(inputs.operands))]
        for i, (grad, want, other) in enumerate(zip(grads, oracle_grads, eager_grads, strict=True)):
            if want is None:
                assert grad is None or not grad.any(), f"gradient {i} should be zero"
                continue
            assert grad.shape == inputs.tensors[i].shape and grad.dtype == inputs.tensors[i].dtype
            least = 1e-5 + lost * (1.0 if i < 3 else counts[i - 3])
            rounded_close(grad, want, want if other is None else other, f"gradient {i}", 3.0, least)
    # another order of threads, and only some of the gradients
    some = [a and b for a, b in zip(needs, chosen)]
    other_out, other_stats, *_, again = run(Emulated(capability, seed=seed + 1), drawn, some)
    assert same(out, other_out) and same(stats, other_stats)
    assert [g is not None for g in again] == some
    for i, (a, b) in enumerate(zip(grads[:3], again[:3])):
        assert b is None or same(a, b), f"gradient {i} depends on the order of threads"


def same(a, b):
    return torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0)) and torch.equal(a.isnan(), b.isnan())


@settings(max_examples=8)
@given(
    attentions((8, 64, 33), (70, 33, 3)), st.sampled_from((70, 75)), st.lists(st.booleans(), min_size=12, max_size=12)
)
def test_drawn_attentions(drawn, capability, chosen):
    hold(drawn, capability, 1, chosen)


@pytest.mark.slow
@settings(max_examples=200)
@given(attentions(), st.sampled_from((70, 75)), st.integers(1, 100), st.lists(st.booleans(), min_size=12, max_size=12))
def test_many_drawn_attentions(drawn, capability, seed, chosen):
    hold(drawn, capability, seed, chosen)
