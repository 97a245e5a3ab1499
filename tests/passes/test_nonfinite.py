"""Under nan_policy='eager' NaN and infinities stand where they stand in eager, and only there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, assume, example, given, settings
from hypothesis import strategies as st

import attnfuse
from attnfuse import ops
from attnfuse.kernels import reference
from attnfuse.passes.simplify import simplify
from attnfuse.spec import Attention, Scale

INF, NAN = math.inf, math.nan
A = torch.arange
B, H, Q, K, D, E = 2, 2, 5, 7, 4, 3
SHAPES = {"q": (B, H, Q, D), "k": (B, H, K, D), "v": (B, H, K, E), "b": (B, H, Q, K), "t": (H, 1, 1)}


def _spelled(s: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    e = (s - s.amax(-1, keepdim=True)).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


def _late(s: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    e = (s - s.amax(-1, keepdim=True)).exp()
    return (e @ v) / e.sum(-1, keepdim=True)


def _with_log_sum_exp(s: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.cat([s.softmax(-1) @ v, s.logsumexp(-1, keepdim=True)], -1)


PROGRAMS: dict[str, Callable[..., torch.Tensor]] = {
    "plain": lambda q, k, v, b, t, keep: (q @ k.mT).softmax(-1) @ v,
    "q scaled": lambda q, k, v, b, t, keep: (q * 0.3 @ k.mT).softmax(-1) @ v,
    "q and k scaled": lambda q, k, v, b, t, keep: (q / 8 @ (k * 4).mT).softmax(-1) @ v,
    "q times 0": lambda q, k, v, b, t, keep: ((q * 0.0) @ k.mT).softmax(-1) @ v,
    "v scaled": lambda q, k, v, b, t, keep: (q @ k.mT).softmax(-1) @ (v * 4),
    "temperature": lambda q, k, v, b, t, keep: (q @ k.mT * t).softmax(-1) @ v,
    "divided": lambda q, k, v, b, t, keep: (q @ k.mT / t).softmax(-1) @ v,
    "bias": lambda q, k, v, b, t, keep: (q @ k.mT + b).softmax(-1) @ v,
    "minus half a bias": lambda q, k, v, b, t, keep: (q @ k.mT - b * 0.5).softmax(-1) @ v,
    "fill -inf": lambda q, k, v, b, t, keep: (q @ k.mT).masked_fill(~keep, -INF).softmax(-1) @ v,
    "fill -3e38": lambda q, k, v, b, t, keep: (q @ k.mT).masked_fill(~keep, -3e38).softmax(-1) @ v,
    "fill inf": lambda q, k, v, b, t, keep: (q @ k.mT).masked_fill(~keep, INF).softmax(-1) @ v,
    "add -inf": lambda q, k, v, b, t, keep: (q @ k.mT + torch.where(keep, 0.0, -INF)).softmax(-1) @ v,
    "add -1e9": lambda q, k, v, b, t, keep: (q @ k.mT + torch.where(keep, 0.0, -1e9)).softmax(-1) @ v,
    "causal": lambda q, k, v, b, t, keep: (q @ k.mT).masked_fill(A(K) > A(Q)[:, None], -INF).softmax(-1) @ v,
    "softcap": lambda q, k, v, b, t, keep: (20 * torch.tanh(q @ k.mT / 20)).softmax(-1) @ v,
    "clamp": lambda q, k, v, b, t, keep: (q @ k.mT).clamp(-5, 5).softmax(-1) @ v,
    "weights masked": lambda q, k, v, b, t, keep: (q @ k.mT).softmax(-1).masked_fill(~keep, 0.0) @ v,
    "sink": lambda q, k, v, b, t, keep: torch.cat([q @ k.mT, b[..., :1]], -1).softmax(-1)[..., :-1] @ v,
    "sink of 0": lambda q, k, v, b, t, keep: F.pad(q @ k.mT, (0, 1)).softmax(-1)[..., :-1] @ v,
    "unshifted": lambda q, k, v, b, t, keep: (lambda e: (e / e.sum(-1, keepdim=True)) @ v)((q @ k.mT).exp()),
    "spelled": lambda q, k, v, b, t, keep: _spelled(q @ k.mT, v),
    "late": lambda q, k, v, b, t, keep: _late(q @ k.mT, v),
    "minus log-sum-exp": lambda q, k, v, b, t, keep: (lambda s: (s - s.logsumexp(-1, keepdim=True)).exp() @ v)(
        q @ k.mT
    ),
    "table": lambda q, k, v, b, t, keep: (q @ k.mT + t * (A(K)[None] - A(Q)[:, None]).abs()).softmax(-1) @ v,
}
SCALED: dict[str, Callable[..., torch.Tensor]] = {
    "scaled": lambda q, k, v, b, t, keep: (q @ k.mT * 0.3).softmax(-1) @ v,
    "times 0": lambda q, k, v, b, t, keep: (q @ k.mT * 0.0).softmax(-1) @ v,
    "up and down": lambda q, k, v, b, t, keep: (q @ k.mT * 4 * 0.125).softmax(-1) @ v,
    "down and up": lambda q, k, v, b, t, keep: (q @ k.mT * 0.125 * 4).softmax(-1) @ v,
}
#: What the kernel of the CPU has a maximum without NaN for, or leaves out of a product with values.
EXACT: dict[str, Callable[..., torch.Tensor]] = {
    "log-sum-exp": lambda q, k, v, b, t, keep: _with_log_sum_exp(q @ k.mT + b, v),
    "log-sum-exp of few": lambda q, k, v, b, t, keep: _with_log_sum_exp((q @ k.mT).masked_fill(~keep, -INF), v),
    "nan_to_num": lambda q, k, v, b, t, keep: (q @ k.mT + torch.where(keep, 0.0, -INF)).softmax(-1).nan_to_num() @ v,
}

#: What PyTorch's own kernel does where products overflow, or a row is NaN, depends on which one it takes.
SDPA: dict[str, Callable[..., torch.Tensor]] = {
    "masked": lambda q, k, v, b, t, keep: F.scaled_dot_product_attention(q, k, v, keep.expand(B, 1, Q, K)),
    "biased": lambda q, k, v, b, t, keep: F.scaled_dot_product_attention(q, k, v, b),
}

Plants = list[tuple[str, int, float]]


def plants(values: tuple[float, ...]) -> st.SearchStrategy[Plants]:
    return st.lists(
        st.tuples(st.sampled_from(sorted(SHAPES)), st.integers(0, 279), st.sampled_from(values)), max_size=4
    )


def inputs(seed: int, planted: Plants) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(*shape, generator=g) for name, shape in SHAPES.items()}
    for name, at, value in planted:
        flat = made[name].view(-1)
        flat[at % flat.numel()] = value
    return [*made.values(), torch.rand(B, 1, Q, K, generator=g) < 0.6]


def kinds(x: torch.Tensor) -> torch.Tensor:
    """0 for a finite number, 1 for NaN, 2 and 3 for infinities."""
    return x.isnan() * 1 + x.isposinf() * 2 + x.isneginf() * 3


def check(programs: dict[str, Callable[..., torch.Tensor]], kernel: str, values: tuple[float, ...], count: int) -> None:
    def run(*given: torch.Tensor) -> list[torch.Tensor]:
        return [program(*given) for program in programs.values()]

    options = {"inner": "eager", "kernel": kernel, "nan_policy": "eager", "strict": True}
    compiled = torch.compile(run, backend="attnfuse", options=options)
    compiled(*inputs(0, []))
    assert attnfuse.reports()[-1].fused == len(programs)

    @settings(max_examples=count, phases=[Phase.explicit, Phase.generate, Phase.shrink])
    @given(st.integers(0, 1 << 20), plants(values))
    @example(0, [("q", 3, 3e38), ("k", 3, 3e38)] if 3e38 in values else [])
    @example(1, [("k", 5, INF)])
    def compare(seed: int, planted: Plants) -> None:
        given = inputs(seed, planted)
        for name, found, expected in zip(programs, compiled(*given), run(*given), strict=True):
            assert torch.equal(kinds(found), kinds(expected)), name

    compare()


PLANTED = (INF, -INF, NAN, 0.0)
LARGE = (*PLANTED, 3e38, -3e38, 2e19, -2e19, 1e30)


def test_the_reference_has_non_finite_values_where_eager_has_them() -> None:
    check({**PROGRAMS, **SCALED, **EXACT}, "reference", LARGE, 40)


def test_masks_of_sdpa_hide_no_nan() -> None:
    check(SDPA, "reference", PLANTED, 40)


def test_the_cpu_kernel_has_non_finite_values_where_eager_has_them() -> None:
    check({**PROGRAMS, **SCALED}, "cpu", PLANTED, 40)


def test_the_cpu_kernel_overflows_where_eager_does() -> None:
    check({**PROGRAMS, **SCALED}, "cpu", (3e38, -3e38, 2e19), 40)


@pytest.mark.parametrize(
    ("scores", "wanted"), [((INF, 1.0), INF), ((-INF, -INF), -INF), ((NAN, INF), NAN), ((0.0, -INF), 0.0)]
)
def test_the_log_sum_exp_of_a_row_is_that_of_torch(scores: tuple[float, ...], wanted: float) -> None:
    """In all three places that make one of the two statistics."""
    row = torch.tensor(scores)
    assert torch.logsumexp(row, -1).isnan() if math.isnan(wanted) else torch.logsumexp(row, -1) == wanted
    top = row.max(-1).values
    stats = torch.stack([top, (row - top).exp().sum()])
    for found in (ops.log_sum_exp(stats), reference.log_sum_exp(stats)):
        assert found.isnan() if math.isnan(wanted) else found == wanted

    def run(q: torch.Tensor, b: torch.Tensor) -> Any:
        s = q @ q.mT + b
        return s.softmax(-1) @ q, s.logsumexp(-1)

    q = torch.zeros(1, 2, 4)
    compiled = torch.compile(run, backend="attnfuse", options={"inner": "eager", "kernel": "reference", "strict": True})
    found = compiled(q, row.expand(1, 2, 2))[1]
    assert attnfuse.reports()[-1].fused == 1
    assert torch.equal(kinds(found), kinds(torch.full((1, 2), wanted)))


@example(4.0, 0.125, 2e38)
@given(st.floats(-1e6, 1e6).filter(bool), st.floats(-1e6, 1e6).filter(bool), st.floats(width=32))
@settings(max_examples=200)
def test_factors_are_joined_only_where_the_same_scores_overflow(first: float, second: float, score: float) -> None:
    spec = Attention(("H",), (1, 2, 2, 1, 1), *["float32"] * 3, steps=(Scale(first), Scale(second)), nan_policy="eager")
    apart, joined = (torch.tensor(score) for _ in range(2))
    for step in spec.steps:
        apart = apart * step.value  # type: ignore[union-attr]
    for step in simplify(spec).steps:
        joined = joined * step.value  # type: ignore[union-attr]
    # at the largest number one rounding decides
    assume(not 3.4e38 < abs(score * first * second) < 3.5e38)
    assert torch.equal(kinds(apart), kinds(joined))


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
def test_gradients_through_nan_to_num_are_left_to_eager_where_nan_counts(kernel: str) -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(q.shape[-2])[:, None] < 1
        return (q @ k.mT + torch.where(rows, -INF, 0.0)).softmax(-1).nan_to_num() @ v

    options = {"inner": "eager", "kernel": kernel, "nan_policy": "eager"}
    given = [torch.randn(1, 1, 5, 4, requires_grad=True) for _ in range(3)]
    torch.compiler.reset()
    compiled = torch.compile(attend, backend="attnfuse", options=options)
    for found, expected in zip(*(torch.autograd.grad(f(*given).sum(), given) for f in (compiled, attend)), strict=True):
        assert torch.equal(kinds(found), kinds(expected))
    assert "nan_to_num" in (attnfuse.reports()[-1].sites[0].reason or "")
    # without gradients it is fused
    with torch.no_grad():
        compiled(*given)
    assert attnfuse.reports()[-1].fused == 1
