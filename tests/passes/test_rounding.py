"""Rows that a large number hides whole in float16 and bfloat16 give what eager gives, and verify would see it if they did not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding_cases import *  # noqa: F403

import attnfuse
import attnfuse.report.registry
from attnfuse import rounding
from attnfuse.expr import dense
from attnfuse.kernels import cpu
from attnfuse.spec import AddFill, Bias, Cast, ReplaceFill, Scale, Shift

needs_compiler = pytest.mark.skipif(cpu.available() is not None, reason=str(cpu.available()))
EAGER = {"inner": "eager"}
B, H, L, D = 2, 2, 16, 8


@pytest.fixture
def kernel():
    if cpu.available() is not None:
        pytest.skip(str(cpu.available()))
    return cpu


def _dense(s, x, value):
    return s + x["mask"]


def _in_place(s, x, value):
    s += x["mask"]
    return s


def _subtracted(s, x, value):
    return s - (-x["mask"])


def _padding(s, x, value):
    return s + (1.0 - x["keep"].to(s.dtype)) * value


def _constant(s, x, value):
    return s + value


def _expression(s, x, value):
    return s + torch.zeros(L, L, dtype=s.dtype).masked_fill(
        torch.arange(L)[:, None] < x["first"][:, None, None, None], value
    )


def _gpt2(s, x, value):
    keep = x["keep"].to(s.dtype)
    return s * keep + value * (1 - keep)


def _expanded(s, x, value):
    return s + ((1.0 - x["keep"].to(s.dtype)) * value + x["mask"]).expand(B, H, L, L)


def _two(s, x, value):
    return s + x["mask"] + (1.0 - x["keep"].to(s.dtype)) * value


def _summed_first(s, x, value):
    return s + (x["bias"] + (1.0 - x["keep"].to(s.dtype)) * value)


def _bias_after(s, x, value):
    return _padding(s, x, value) + x["bias"]


def _narrowed_after(s, x, value):
    return (s.float() + x["mask"].float()).to(s.dtype)


def _scaled_after(s, x, value):
    return (s * 4.0 + x["mask"]) * 0.25


ADDED = (
    *(_dense, _in_place, _subtracted, _padding, _constant, _expression, _gpt2, _two, _summed_first, _bias_after),
    _scaled_after,
    _narrowed_after,
    _expanded,
)


def program(add, value, wide):
    def attend(q, k, v, x):
        s = add(q @ k.mT * 0.25, x, value)
        return (s.softmax(-1, dtype=torch.float32).to(v.dtype) if wide else s.softmax(-1)) @ v

    return attend


def product_and_sum(q, k, v, x):
    mask = x["mask"].expand(B, H, L, L).reshape(B * H, L, L)
    s = torch.baddbmm(mask, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=0.25)
    return s.softmax(-1).view(B, H, L, L) @ v


def inputs(dtype, value, whole, seed=0):
    """q, k, v, and masks that hide some rows whole, or none."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, H, L, D, generator=generator).to(dtype) for _ in range(3))
    hide = torch.rand(B, 1, L, L, generator=generator) < 0.5
    keep = torch.rand(B, 1, 1, L, generator=generator) < 0.5
    hide[..., 0], keep[..., 0] = False, True
    if whole:
        hide[:, :, ::3], keep[0] = True, False
    x = {
        "mask": torch.zeros(B, 1, L, L).masked_fill(hide, value).to(dtype),
        "keep": keep,
        "bias": torch.randn(1, H, L, L, generator=generator).to(dtype),
        "first": torch.tensor([0, L if whole else L // 2]),
    }
    return q, k, v, x


@st.composite
def cases(draw):
    dtype = draw(st.sampled_from((torch.float16, torch.bfloat16, torch.float32)))
    values = [torch.finfo(dtype).min, -6e4, -1e4, 2e4] + ([-1e9, -1e6] if dtype == torch.bfloat16 else [])
    # of these float32 leaves a score nothing, as float16 and bfloat16 of those
    values = [torch.finfo(dtype).min, -3e9] if dtype == torch.float32 else values
    return dtype, draw(st.sampled_from(values)), draw(st.sampled_from(ADDED)), draw(st.booleans()), draw(st.booleans())


@needs_compiler
@given(cases(), st.integers(0, 2**20))
@settings(max_examples=16)
def test_hidden_rows_give_what_eager_gives(case, seed):
    dtype, value, add, wide, whole = case
    attend, args = program(add, value, wide), inputs(dtype, value, whole, seed)
    want = attend(*args)
    torch.compiler.reset()
    found = torch.compile(attend, backend="attnfuse", options={**EAGER, "strict": True})(*args)
    assert torch.equal(found.isnan(), want.isnan())
    # eager rounds weights and products too
    near = 6 * max(torch.finfo(dtype).eps, 1e-6) * float(args[2].abs().max())
    assert float((found.double() - want.double()).nan_to_num().abs().max()) <= near


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_product_that_adds_the_mask_itself_is_rounded_too(dtype):
    args = inputs(dtype, -6e4, True)
    found = torch.compile(product_and_sum, backend="attnfuse", options={**EAGER, "strict": True})(*args)
    torch.testing.assert_close(found, product_and_sum(*args), rtol=0.0, atol=8 * torch.finfo(dtype).eps)


def test_scaled_dot_product_attention_adds_masks_in_float32_and_is_not_rounded():
    q, k, v, x = inputs(torch.float16, -6e4, True)

    def attend(q, k, v, mask):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)

    found = attnfuse.verify(attend, q, k, v, x["mask"], grad=False, options={**EAGER, "kernel": "reference"})
    assert found.holds, str(found)
    assert all(not isinstance(s, Cast) for s in found.report.sites[0].spec.steps)
    torch.testing.assert_close(attend(q, k, v, x["mask"]), attend(q, k, v, x["mask"] * 0.5), rtol=0.0, atol=0.5)


def _overflow_alone(s, dtype):
    """What kernels did before they rounded."""
    near = s.detach().to(dtype).to(s.dtype)
    return torch.where(near.isinf(), near, s)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("add", [_dense, _padding, _two, _summed_first, _in_place, _narrowed_after])
def test_verify_holds_and_fails_where_a_kernel_does_not_round(dtype, add, monkeypatch):
    attend, args = program(add, -1e4, True), inputs(dtype, -1e4, True)
    options = {**EAGER, "kernel": "reference"}
    assert attnfuse.verify(attend, *args, grad=False, options=options).holds
    monkeypatch.setattr(rounding, "held", _overflow_alone)
    found = attnfuse.verify(attend, *args, grad=False, options=options)
    assert not found.holds and found.checks[0].compiled_max > 0.1


def test_the_oracle_of_float32_has_no_more_of_a_score_than_float32():
    attend, args = program(_dense, -3e9, False), inputs(torch.float32, -3e9, True)
    (check,) = attnfuse.verify(attend, *args, grad=False, options={**EAGER, "kernel": "reference"}).checks
    assert check.holds and check.eager_max < 1e-5


def test_masks_added_in_float64_are_left_to_eager():
    def attend(q, k, v, mask):
        return ((q @ k.mT).double() + mask).softmax(-1).float() @ v

    q, k, v, x = inputs(torch.float32, -1e9, True)
    found = attnfuse.verify(attend, q, k, v, x["mask"].double(), grad=False, options=EAGER)
    (site,) = found.report.sites
    assert found.holds and site.status == "refused" and "float64" in site.reason


def test_only_casts_that_can_be_seen_are_kept():
    bf16, half, wide = Cast("bfloat16"), Cast("float16"), Cast("float32")
    mask = dense(0)
    for steps, want in (
        ((Scale(2.0), bf16, ReplaceFill(mask, -1e9), bf16), (Scale(2.0), ReplaceFill(mask, -1e9))),
        ((bf16, AddFill(mask, float("-inf")), bf16), (AddFill(mask, float("-inf")),)),
        ((bf16, AddFill(mask, -3.38e38), bf16), (AddFill(mask, -3.38e38),)),
        ((bf16, AddFill(mask, -1e4), bf16, Scale(2.0), bf16), (AddFill(mask, -1e4), bf16, Scale(2.0))),
        ((bf16, Shift(100.0), Shift(100.0), bf16, wide), (Shift(100.0), Shift(100.0), bf16)),
        ((Bias(0), bf16, wide, Bias(1), wide), (Bias(0), bf16, Bias(1))),
        ((Bias(0), wide, Bias(1), wide, bf16), (Bias(0), wide, Bias(1), wide, bf16)),
        ((Bias(0), half, Scale(2.0), bf16, Scale(2.0), bf16), (Bias(0), half, Scale(2.0), bf16, Scale(2.0))),
        ((half, wide, Bias(0), wide), (half, Bias(0))),
        ((Bias(0), wide, Bias(1), half), (Bias(0), wide, Bias(1), half)),
    ):
        assert rounding.visible(steps) == want
        assert rounding.visible(want) == want


def test_terms_that_were_summed_first_are_found():
    half, wide = Cast("float16"), Cast("float32")
    assert rounding.joined((Scale(1.0), Bias(0), Shift(1.0), half, Bias(1), half)) == {1: 3}
    assert rounding.joined((Bias(0), wide, Bias(1), half)) == {}
    assert rounding.joined((Bias(0), Bias(1), AddFill(dense(0), 1.0), half, Bias(0), Bias(1))) == {0: 3}


FM = torch.finfo(torch.float32).min
A = torch.arange
#: Terms [Q, K] or smaller of times and fills. All sums of fewer than 8 of the small ones are exact in float32.
TERMS = {
    "t[:, None]": lambda t, Q, K: t[:Q, None],
    "t": lambda t, Q, K: t[None, :K],
    "t - t": lambda t, Q, K: t[None, :K] - t[:Q, None],
    "small": lambda t, Q, K: (A(K) - A(Q)[:, None]) * 0.5,
    "causal -1e9": lambda t, Q, K: torch.where(A(K) > A(Q)[:, None], -1e9, 0.0),
    "causal * -1e9": lambda t, Q, K: (A(K) > A(Q)[:, None]) * -1e9,
    "prefix 1e9": lambda t, Q, K: ((A(K) > A(Q)[:, None]) & (A(K) < 3)) * 1e9,
    "window FM": lambda t, Q, K: torch.where((A(K) - A(Q)[:, None]).abs() > 2, FM, 0.0),
    "far -FM": lambda t, Q, K: torch.where(A(K) > A(Q)[:, None] + 1, -FM, 0.0),
    "padding FM": lambda t, Q, K: torch.where(t[:K] > t[K // 2], FM, 0.0),
    "padding -inf": lambda t, Q, K: torch.where(t[:K] > t[K - 2], -torch.inf, 0.0),
    "number": lambda t, Q, K: torch.full((), 3.0),
}


@st.composite
def sums(draw, depth=2):
    """A sum of terms as nested tuples, with factors."""
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        return draw(st.sampled_from(sorted(TERMS)))
    op = draw(st.sampled_from(("add", "add", "sub", "alpha")))
    return (op, draw(sums(depth - 1)), draw(sums(depth - 1)))


def value(tree, t, Q, K):
    if isinstance(tree, str):
        return TERMS[tree](t, Q, K)
    a, b = (value(x, t, Q, K) for x in tree[1:])
    return {"add": a + b, "sub": a - b, "alpha": torch.add(a, b, alpha=0.5)}[tree[0]]


@needs_compiler
@given(
    tree=sums(),
    way=st.sampled_from(("add", "sub", "rsub", "alpha", "sdpa", "twice")),
    kernel=st.sampled_from(("cpu", "reference")),
)
@settings(max_examples=40)
def test_sums_of_terms_are_added_to_scores_in_the_order_of_the_graph(tree, way, kernel):
    """Exactly: terms that cancel leave the scores their digits, and those that do not take them as they do in eager."""
    Q, K = 5, 7
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, n, 4, generator=generator).requires_grad_() for n in (Q, K, K))
    t = 1.7e6 + torch.arange(8.0) * 2.0

    def attention(q, k, v, t):
        term = value(tree, t, Q, K)
        if way == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=term.expand(Q, K))
        s = q @ k.mT
        if way == "twice":
            s = s + term
        s = {"sub": s - term, "rsub": torch.rsub(term, s), "alpha": torch.add(s, term, alpha=0.5)}.get(way, s + term)
        return s.softmax(-1) @ v

    torch.compiler.reset()
    compiled = torch.compile(
        attention, backend="attnfuse", options={"kernel": kernel, "inner": "eager", "strict": True}
    )
    with attnfuse.report.registry.collecting() as reports:
        found = compiled(q, k, v, t)
    expected = attention(q, k, v, t)
    assert [s.status for r in reports for s in r.sites] == ["fused"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    # eager's own kernel loses the digits of exp(s - lse) in backward where s is large
    if way != "sdpa" and bool(expected.isfinite().all()):
        given = torch.randn(expected.shape, generator=generator)
        for a, b in zip(*(torch.autograd.grad(x, (q, k, v), given) for x in (found, expected)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def _column(value, dtype):
    return torch.full((L, 1), value).to(dtype)


#: (a, b, dtype of q, k and v): side tensors whose sum wraps, is rounded, overflows or is an OR in their dtype.
SIDES = {
    "times": (1.7e6 + torch.arange(L)[:, None] * 0.5, -1.7e6 - torch.arange(L)[None] * 0.25, torch.float32),
    "fills": (_column(1e9, torch.float32), _column(-1e9, torch.float32).mT, torch.float32),
    "int64 times": (1_700_000_000 + A(L)[:, None], -1_700_000_000 - A(L)[None], torch.float32),
    "uint8 wraps": ((A(L)[:, None] * 16).to(torch.uint8), (A(L)[None] * 15).to(torch.uint8), torch.float32),
    "int32 wraps": (torch.full((L, 1), 2**31 - 3, dtype=torch.int32), A(L)[None].int(), torch.float32),
    "bool": ((A(L) % 2 == 0)[:, None], (A(L) % 3 == 0)[None], torch.float32),
    "float16": (_column(3000.0, torch.float16), (A(L)[None] * 0.3).half(), torch.float32),
    "float16 overflows": (_column(-65504.0, torch.float16), _column(-65504.0, torch.float16).mT, torch.float32),
    "bfloat16": (_column(300.0, torch.bfloat16), (A(L)[None] * 0.3).bfloat16(), torch.float32),
    "of the scores' bfloat16": (_column(300.0, torch.bfloat16), (A(L)[None] * 0.3).bfloat16(), torch.bfloat16),
    "of the scores' float16": (_column(3000.0, torch.float16), (A(L)[None] * 0.3).half(), torch.float16),
    "float32, scores in bfloat16": (_column(1e6, torch.float32), -_column(1e6, torch.float32).mT, torch.bfloat16),
}
SPELLED = {
    "sum": lambda q, k, v, a, b: (q @ k.mT + (a + b)).softmax(-1) @ v.to((q @ k.mT + (a + b)).dtype),
    "three": lambda q, k, v, a, b: (q @ k.mT + ((a + b) + a)).softmax(-1) @ v.to((q @ k.mT + (a + b)).dtype),
    "sdpa": lambda q, k, v, a, b: F.scaled_dot_product_attention(q, k, v, attn_mask=a + b),
}


def _is_a_mask(name):
    """Whether scaled_dot_product_attention takes the sum as a mask that it adds."""
    a, b, dtype = SIDES[name]
    return (a + b).dtype in (dtype, torch.float32)


@needs_compiler
@pytest.mark.parametrize(("name", "spelled"), [(n, s) for n in SIDES for s in SPELLED if s != "sdpa" or _is_a_mask(n)])
@pytest.mark.parametrize("module", ["cpu", "reference"])
def test_sums_of_side_tensors_are_those_of_their_dtype(module, name, spelled):
    a, b, dtype = SIDES[name]
    generator = torch.Generator().manual_seed(3)
    # products that are exact in every dtype
    q, k = (torch.randint(-2, 3, (B, H, L, D), generator=generator).to(dtype) for _ in range(2))
    v = torch.randn(B, H, L, D, generator=generator).to(dtype)
    torch.compiler.reset()
    compiled = torch.compile(SPELLED[spelled], backend="attnfuse", options={"kernel": module, **EAGER})
    found, expected = compiled(q, k, v, a, b), SPELLED[spelled](q, k, v, a, b)
    off = 1e-4 if dtype == torch.float32 else 0.06
    torch.testing.assert_close(found, expected, rtol=off, atol=off, equal_nan=True)
