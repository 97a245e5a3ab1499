"""The option `verify=N`: what it compares, in which digits, and that it never ends a model that is right."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attnfuse
from attnfuse import checking
from attnfuse.kernels import cpu


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()
    attnfuse.reset()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * 0.3).softmax(-1) @ v


def qkv(dtype: torch.dtype = torch.float32, **more: Any) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 4, 64, 16, dtype=dtype, **more) for _ in range(3)]


def jagged(lengths: tuple[int, ...] = (3, 5, 2)) -> list[Tensor]:
    torch.manual_seed(0)
    first = torch.nested.nested_tensor([torch.randn(n, 4, 16) for n in lengths], layout=torch.jagged)
    others = [
        torch.nested.nested_tensor_from_jagged(torch.randn_like(first.values()), first.offsets()) for _ in range(2)
    ]
    return [x.transpose(1, 2) for x in (first, *others)]


def nested_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def with_a_hook(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = attend(q * 1.0, k, v)
    out.register_hook(lambda g: g * 2.0)
    return out


def in_bfloat16(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q.bfloat16(), k.bfloat16(), v.bfloat16()).float() * 3.0


def under_autocast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(q, k, v)
    return out.float()


RIGHT: dict[str, tuple[Callable[..., Any], Callable[[], list[Tensor]]]] = {
    "nested": (nested_attention, jagged),
    "nested beside plain": (lambda q, k, v: (nested_attention(q, k, v), q.values() * 2), jagged),
    "complex": (lambda q, k, v: torch.view_as_complex(attend(q, k, v).unflatten(-1, (-1, 2))), qkv),
    "conjugate": (lambda q, k, v: torch.view_as_complex(attend(q, k, v).unflatten(-1, (-1, 2))).conj(), qkv),
    "cast to float32": (lambda q, k, v: attend(q, k, v).float(), lambda: qkv(torch.bfloat16)),
    "computed in bfloat16": (in_bfloat16, qkv),
    "autocast": (under_autocast, qkv),
    "a hook": (with_a_hook, lambda: qkv(requires_grad=True)),
    "sparse": (lambda q, k, v: attend(q, k, v).flatten(0, -2).to_sparse(), qkv),
    "integers": (lambda q, k, v: (attend(q, k, v), q.argmax(-1)), qkv),
}


@pytest.mark.parametrize("case", list(RIGHT))
def test_what_is_right_is_said_to_be(case: str) -> None:
    function, inputs = RIGHT[case]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(attnfuse|verify|differs)")
        torch.compile(function, backend="attnfuse", options={"inner": "eager", "verify": 1, "strict": True})(*inputs())
    (report,) = attnfuse.reports()
    assert report.fused == 1 and not report.warnings


@pytest.mark.parametrize("case", ["nested", "complex", "cast to float32", "a hook"])
def test_what_is_wrong_is_still_seen(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, inputs = RIGHT[case]
    original = cpu.forward

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        out, stats = original(*args, **kwargs)
        out[..., :8, :] += 1.0
        return out, stats

    monkeypatch.setattr(cpu, "forward", spoiled)
    options = {"inner": "eager", "kernel": "cpu", "verify": 1}
    with pytest.warns(RuntimeWarning, match="output 0 of a compiled graph differs from eager"):
        torch.compile(function, backend="attnfuse", options=options)(*inputs())
    torch.compiler.reset()
    with pytest.raises(RuntimeError, match="output 0 of a compiled graph differs from eager"):
        torch.compile(function, backend="attnfuse", options={**options, "strict": True})(*inputs())


def test_an_error_of_the_comparison_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise ZeroDivisionError("no scales")

    monkeypatch.setattr(checking, "_parts", broken)
    options = {"inner": "eager", "verify": 1}
    q, k, v = qkv()
    with pytest.warns(RuntimeWarning, match="verify compares nothing: ZeroDivisionError: no scales"):
        found = torch.compile(attend, backend="attnfuse", options=options)(q, k, v)
    torch.testing.assert_close(found, attend(q, k, v), rtol=1e-4, atol=1e-5)
    torch.compiler.reset()
    with pytest.raises(ZeroDivisionError):
        torch.compile(attend, backend="attnfuse", options={**options, "strict": True})(q, k, v)


def test_shapes_classes_and_offsets_are_compared() -> None:
    (a, *_), (b, *_) = jagged((3, 5, 2)), jagged((3, 4, 3))
    assert checking._same(a, a.clone(), set()) and not checking._same(a, b, set())
    plain = torch.ones(3)
    for other in (a, torch.ones(4), torch.ones(3, dtype=torch.float64), torch.ones(3, 1)):
        assert not checking._same(plain, other, set()) and not checking._same(other, plain, set())


def test_digits_are_those_of_what_an_output_is_made_of() -> None:
    """Another output in bfloat16 makes no room for errors of one in float32."""

    def both(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return (x * 2).sin(), (y * 2).float()

    graphs: list[Any] = []
    torch.compile(both, backend=lambda gm, _: graphs.append(gm) or gm.forward)(
        torch.ones(3), torch.ones(3, dtype=torch.bfloat16)
    )
    assert checking._computed_in(graphs[0]) == [{torch.float32}, {torch.float32, torch.bfloat16}]
