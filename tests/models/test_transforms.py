"""Every transform of a compiled function from outside gives the right value or raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import func
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnfuse
from attnfuse import ops
from attnfuse.spec import Attention, Scale

OPTIONS = {"inner": "eager", "strict": True}


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT * 0.3).softmax(-1) @ v


def biased(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return (5.0 * torch.tanh(q @ k.mT / 5.0) + bias).softmax(-1) @ v


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = (q @ k.mT).masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), torch.finfo(torch.float32).min)
    return scores.softmax(-1) @ v


def hidden_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Rows without any key give 0."""
    keep = torch.arange(6)[:, None] > torch.arange(6)
    return F.scaled_dot_product_attention(q, k, v, keep)


def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k, v = (x[:, :1].expand(-1, 2, -1, -1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v)


def with_sink(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
    scores = torch.cat([q @ k.mT, sink[..., :1].expand(2, 2, 6, 1)], -1)
    return scores.softmax(-1)[..., :-1] @ v


def with_lse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q @ k.mT * 0.3
    return scores.softmax(-1) @ v + scores.logsumexp(-1, keepdim=True).sin()


FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    f.__name__: f for f in (attend, biased, causal, hidden_rows, grouped, with_sink, with_lse)
}


def inputs(function: Callable[..., Any], **kwargs: Any) -> list[torch.Tensor]:
    shapes = [(2, 2, 6, 4)] * 3
    if function is biased:
        shapes.append((1, 2, 6, 6))
    if function is with_sink:
        shapes.append((1, 2, 1, 4))
    return [torch.randn(shape, **kwargs).requires_grad_() for shape in shapes]


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(function, backend="attnfuse", options={**OPTIONS, **options})


def in_plain_ops(function: Callable[..., Any]) -> Callable[..., Any]:
    """Eager, with attention in ops that have derivatives of every order."""

    def call(*args: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return function(*args)

    return call


def fused() -> int:
    return sum(report.fused for report in attnfuse.reports())


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_gradients_of_gradients_are_eagers(function: Callable[..., Any]) -> None:
    given = inputs(function)
    found = []
    call = compiled(function)
    call(*given)
    for run in (call, in_plain_ops(function)):
        first = torch.autograd.grad(run(*given).pow(3).sum(), given, create_graph=True)
        loss = sum(g.pow(2).sum() for g in first)
        second = torch.autograd.grad(loss, given, create_graph=True)
        third = torch.autograd.grad(sum(g.sin().sum() for g in second), given)
        found.append((*first, *second, *third))
    assert fused() == 1
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * max(1.0, float(b.abs().max())))


def test_a_gradient_penalty_trains_the_cotangent_too() -> None:
    """The gradient of what came from above, through the product with the gradient."""
    q, k, v = inputs(attend)
    weight = torch.randn(2, 2, 6, 4, requires_grad=True)
    found = []
    for call in (compiled(attend), attend):
        (first,) = torch.autograd.grad((call(q, k, v) * weight).sum(), q, create_graph=True)
        found.append(torch.autograd.grad(first.pow(2).sum(), (weight, q, v)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_gradients_of_gradients_replay_the_dropout_mask() -> None:
    """Against finite differences of the first gradient, in float64, along one direction."""

    def dropping(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.dropout((q @ k.mT * 0.3).softmax(-1), 0.5) @ v

    given = inputs(dropping, dtype=torch.float64)
    call = compiled(dropping, kernel="reference")
    along = [torch.randn_like(x) for x in given]

    def slope(step: float) -> Any:
        torch.manual_seed(3)
        at = [(x + step * d).detach().requires_grad_() for x, d in zip(given, along, strict=True)]
        first = torch.autograd.grad(call(*at).pow(2).sum(), at, create_graph=True)
        return at, sum((g * d).sum() for g, d in zip(first, along, strict=True))

    at, value = slope(0.0)
    second = torch.autograd.grad(value, at)
    exact = sum((g * d).sum() for g, d in zip(second, along, strict=True))
    measured = (slope(1e-4)[1] - slope(-1e-4)[1]) / 2e-4
    torch.testing.assert_close(exact, measured.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("inner", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("trains", [False, True])
def test_forward_mode_derivatives_are_eagers(inner: str, trains: bool) -> None:
    given = [x.requires_grad_(trains) for x in (y.detach() for y in inputs(attend))]
    along = [torch.randn_like(x) for x in given]
    call = compiled(attend, inner=inner)
    assert forward_ad._current_level < 0
    torch.testing.assert_close(call(*given), attend(*given), rtol=1e-5, atol=1e-5)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, d) for x, d in zip(given, along, strict=True)]
        found, expected = (forward_ad.unpack_dual(f(*duals)) for f in (call, attend))
        assert found.tangent is not None
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        # without a tangent the kernels run
        seen: list[Attention] = []
        ops.observers.append(lambda spec, *_: seen.append(spec))
        try:
            call(*given)
        finally:
            ops.observers.clear()
        assert len(seen) == 1
    assert fused() == 1


def test_the_op_itself_raises_for_dual_tensors() -> None:
    x = torch.randn(1, 2, 6, 4)
    text = Attention(("B", "H"), (None,) * 6, "float32", "float32", "float32", (Scale(1.0),)).text
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        for given in ((dual, x, x), (x, x, dual)):
            with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                torch.ops.attnfuse.attention(*given, [], None, None, None, text, "cpu", False)
        torch.ops.attnfuse.attention(x, x, x, [], None, None, None, text, "cpu", False)


def _double(call: Callable[..., Any], q: torch.Tensor, *rest: torch.Tensor) -> Any:
    (first,) = torch.autograd.grad(call(q, *rest).pow(2).sum(), q, create_graph=True)
    return torch.autograd.grad(first.pow(2).sum(), q)[0]


def _batched(call: Callable[..., Any], q: torch.Tensor, *rest: torch.Tensor) -> Any:
    out = call(q, *rest)
    return torch.autograd.grad(out, q, torch.stack([out.detach()] * 2), is_grads_batched=True)[0]


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "double backward": _double,
    "batched gradients": _batched,
    "grad": lambda f, q, k, v: func.grad(lambda x: f(x, k, v).sum())(q),
    "jvp": lambda f, q, k, v: func.jvp(lambda x: f(x, k, v), (q,), (q,))[1],
    "vmap": lambda f, q, k, v: func.vmap(f)(q, k, v),
    "jacrev": lambda f, q, k, v: func.jacrev(lambda x: f(x, k, v))(q),
    "jacfwd": lambda f, q, k, v: func.jacfwd(lambda x: f(x, k, v))(q),
    "hessian": lambda f, q, k, v: func.hessian(lambda x: f(x, k, v).pow(2).sum())(q),
    "functional jacobian": lambda f, q, k, v: torch.autograd.functional.jacobian(lambda x: f(x, k, v), q),
    "vectorized jacobian": lambda f, q, k, v: torch.autograd.functional.jacobian(
        lambda x: f(x, k, v), q, vectorize=True
    ),
    "forward-mode jacobian": lambda f, q, k, v: torch.autograd.functional.jacobian(
        lambda x: f(x, k, v), q, vectorize=True, strategy="forward-mode"
    ),
    "vhp": lambda f, q, k, v: torch.autograd.functional.vhp(lambda x: f(x, k, v).pow(2).sum(), q, q)[1],
}

#: What raises, by the inner compiler: AOTAutograd knows no double backward, and the kernels no batches of gradients.
RAISES = {
    "eager": {"batched gradients", "vectorized jacobian"},
    "aot_eager": {"double backward", "vhp", "batched gradients", "vectorized jacobian"},
}


@pytest.mark.parametrize("inner", RAISES)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_gives_eagers_value_or_raises(transform: str, inner: str) -> None:
    given = [x[:1, :, :4] for x in inputs(attend)]
    call, apply = compiled(attend, inner=inner), TRANSFORMS[transform]
    # compiled before the transform, as in a model that has run
    call(*given)
    assert fused() == 1
    if transform in RAISES[inner]:
        with pytest.raises(RuntimeError, match=r"double backward|Batching rule not implemented"):
            apply(call, *given)
        return
    torch.testing.assert_close(apply(call, *given), apply(attend, *given), rtol=1e-4, atol=1e-5)
