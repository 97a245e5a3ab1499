"""Fallbacks: a warning never ends what it speaks of, and says no more of an error than a person reads."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attnfuse
from attnfuse import backend as backend_module
from attnfuse import ops, pipeline
from attnfuse.kernels import cpu
from attnfuse.spec import Attention, Bias, Operand
from attnfuse.warning import said, warn


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch.compiler.reset()
    attnfuse.reset()
    ops.forget()
    yield
    ops.forget()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * 0.3).softmax(-1) @ v


def qkv() -> list[Tensor]:
    return [torch.randn(2, 4, 8, 8) for _ in range(3)]


def broken(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("out of ink " + "x" * 100_000)


def in_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "structure", broken)


def in_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "forward", broken)


def in_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    original = backend_module._compat.aot_eager

    def picky(gm: Any, inputs: Any, lowered: Any = None) -> Any:
        return broken() if any("attnfuse" in str(n.target) for n in gm.graph.nodes) else original(gm, inputs)

    monkeypatch.setattr(backend_module._compat, "aot_eager", picky)


def in_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "unseen", broken)


def in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module.registry, "record", broken)


FAILURES = [in_structure, in_the_kernel, in_the_compiler, in_the_search, in_the_report]


@pytest.mark.parametrize("fail", FAILURES)
def test_filters_that_make_errors_of_warnings_stop_no_model(
    fail: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fail(monkeypatch)
    q, k, v = qkv()
    call = torch.compile(attend, backend="attnfuse", options={"kernel": "cpu", "inner": "aot_eager"})
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, "attnfuse"):
        # PyTorch's own warnings may be errors here too
        warnings.filterwarnings("error", message="attnfuse")
        found = call(q, k, v)
    torch.testing.assert_close(found, attend(q, k, v), rtol=1e-5, atol=1e-5)
    logged = [r.getMessage() for r in caplog.records if "out of ink" in r.getMessage()]
    assert len(logged) == 1


@pytest.mark.parametrize("fail", FAILURES)
def test_what_is_said_of_an_error_is_short(
    fail: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch)
    with pytest.warns(RuntimeWarning, match="out of ink") as caught:
        torch.compile(attend, backend="attnfuse", options={"kernel": "cpu", "inner": "aot_eager"})(*qkv())
    texts = [str(w.message) for w in caught]
    for report in attnfuse.reports():
        texts += [*report.warnings, *(s.reason or "" for s in report.sites)]
    assert max(map(len, texts)) < 600


def test_a_warning_is_one_unless_it_would_be_an_error(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.warns(RuntimeWarning, match="attnfuse: something"):
        warn("something")
    assert not caplog.records
    for action in ("error", "ignore"):
        with warnings.catch_warnings():
            warnings.simplefilter(action)  # type: ignore[arg-type]
            warn("something else")
    assert [r.getMessage() for r in caplog.records] == ["something else"]


def test_short_errors_are_said_as_they_are() -> None:
    assert said(ValueError("no")) == "ValueError: no"
    assert said(ValueError("x" * 1000)).endswith("x [...]")


# -- strings in compiled code


def test_the_argument_of_the_op_needs_no_escapes() -> None:
    """Inductor's C++ wrapper writes strings between double quotes as they are."""
    spec = Attention(
        ("B", "H"),
        (1, 2, 8, 8, 4, 4),
        *("float32",) * 3,
        steps=(Bias(0, -torch.inf),),
        operands=(Operand("float32", ("B", "1", "Q", "K")),),
    )
    assert not set(spec.argument) & {'"', "\\"}
    # compiled and exported graphs of before have the other form
    assert Attention.parse(spec.argument) == Attention.parse(spec.text) == spec
    for name in ("it's", 'a "name"', "back\\slash"):
        odd = Attention((name,), (1, 8, 8, 4, 4), *("float32",) * 3)
        assert Attention.parse(odd.argument) == odd
    with pytest.raises(ValueError, match="not an attention spec"):
        Attention.parse("{'version':1}")


@pytest.mark.slow
def test_the_cpp_wrapper_takes_fused_attention() -> None:
    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        return (q @ k.transpose(-1, -2) * 0.3).masked_fill(~keep, -torch.inf).softmax(-1) @ v

    q, k, v = (x.requires_grad_() for x in qkv())
    call = torch.compile(masked, backend="attnfuse", options={"kernel": "cpu", "cpp_wrapper": True})
    found, expected = call(q, k, v), masked(q, k, v)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = (torch.autograd.grad(x.pow(2).sum(), (q, k, v)) for x in (found, expected))
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert [s.status for r in attnfuse.reports() for s in r.sites] == ["fused"]
