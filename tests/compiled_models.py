"""Compiling models for comparison with eager: what is fused, and whether results and gradients are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import attnfuse
from attnfuse.backend import backend

FAST = {"inner": "aot_eager", "kernel": "cpu", "strict": True}


models = pytest.mark.models


def compiled(function: Callable[..., Any], dynamic: bool | None = None, **settings: Any) -> Callable[..., Any]:
    return torch.compile(function, backend="attnfuse", dynamic=dynamic, options=dict(FAST), **settings)


def fused() -> int:
    """Rewrites since the test began; every site that was seen must be one."""
    sites = [site for report in attnfuse.reports() for site in report.sites]
    assert all(site.status == "fused" for site in sites), [(s.where, s.status, s.reason) for s in sites]
    return len(sites)


def assert_same(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5, name: str = "") -> None:
    """Within `tolerance` of the largest entry."""
    largest = float(expected.detach().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(
        found, expected, rtol=0, atol=tolerance * max(largest, 1e-2), msg=lambda text: f"{name} {text}"
    )


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def assert_same_gradients(found: nn.Module, expected: nn.Module, tolerance: float = 5e-5) -> None:
    """A gradient of zeros is as good as none: a compiled graph gives one to what did not reach the loss."""
    wanted = gradients(expected)
    given = gradients(found)
    assert given.keys() == wanted.keys()
    for name, reference in wanted.items():
        gradient = given[name]
        shape = next(p.shape for n, p in expected.named_parameters() if n == name)
        gradient, reference = (torch.zeros(shape) if g is None else g for g in (gradient, reference))
        assert_same(gradient, reference, tolerance, name)
    assert any(g is not None and g.abs().max() > 0 for g in wanted.values())


class Counting:
    """attnfuse, with the number of graphs it was asked to compile."""

    def __init__(self) -> None:
        self.compiled = 0

    def __call__(self, gm: Any, example_inputs: Any) -> Any:
        self.compiled += 1
        return backend(gm, example_inputs, options=dict(FAST))
