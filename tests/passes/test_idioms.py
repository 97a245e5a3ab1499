"""Every idiom file: its examples fuse, read as they should and equal eager; its near misses are refused for the cause given."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest
import torch
from emitted_graphs import Emitted

import attnfuse
from attnfuse.passes.read import idioms
from attnfuse.passes.read.idioms.example import Example, NearMiss, inputs

FOUND = {m.name: importlib.import_module(f"{idioms.__name__}.{m.name}") for m in pkgutil.iter_modules(idioms.__path__)}
MODULES = {name: module for name, module in FOUND.items() if name != "example"}
EXAMPLES = [pytest.param(e, id=f"{n}-{i}") for n, m in MODULES.items() for i, e in enumerate(m.EXAMPLES)]
NEAR_MISSES = [pytest.param(e, id=f"{n}-{i}") for n, m in MODULES.items() for i, e in enumerate(m.NEAR_MISSES)]


def arguments(run, seed=0):
    everything = inputs(seed)
    return [
        everything[name].detach().requires_grad_(everything[name].requires_grad)
        for name in inspect.signature(run).parameters
    ]


def compile_and_run(run, kernel, dynamic=None, checked=False):
    """(result, gradients, report) of the compiled function. checked: its nodes are held against what they give."""
    torch.compiler.reset()
    attnfuse.reset()
    if checked:
        compiled = torch.compile(run, backend=Emitted(kernel=kernel), dynamic=dynamic)
    else:
        options = {"inner": "eager", "kernel": kernel, "strict": True}
        compiled = torch.compile(run, backend="attnfuse", dynamic=dynamic, options=options)
    return *value_and_gradients(compiled, arguments(run)), attnfuse.reports()


def value_and_gradients(run, args):
    out = run(*args)
    wanted = [a for a in args if a.requires_grad]
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    return out, torch.autograd.grad((out * weight).sum(), wanted, allow_unused=True)


def assert_equal_to_eager(run, out, grads):
    expected, expected_grads = value_and_gradients(run, arguments(run))
    low = out.dtype != torch.float32 or any(w in inspect.getsource(run) for w in ("half", "bfloat16"))
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if low else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(out, expected, **tolerance)
    assert out.stride() == expected.stride()
    for found, wanted in zip(grads, expected_grads, strict=True):
        assert (found is None) == (wanted is None)
        if found is not None:
            torch.testing.assert_close(found, wanted, **tolerance)


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
@pytest.mark.parametrize("example", EXAMPLES)
def test_example_fuses_reads_right_and_equals_eager(example: Example, kernel: str) -> None:
    out, grads, reports = compile_and_run(example.run, kernel, checked=kernel == "reference")
    sites = [s for r in reports for s in r.sites]
    assert [(s.status, s.reason) for s in sites] == [("fused", None)]
    assert sites[0].spec.describe() == example.reads
    assert_equal_to_eager(example.run, out, grads)


@pytest.mark.parametrize("near_miss", NEAR_MISSES)
def test_near_miss_is_refused_with_its_cause_and_equals_eager(near_miss: NearMiss) -> None:
    out, grads, reports = compile_and_run(near_miss.run, "cpu")
    sites = [s for r in reports for s in r.sites]
    assert not any(s.status == "fused" for s in sites)
    if near_miss.cause is None:
        assert not sites
    else:
        assert [s.cause for s in sites] == [near_miss.cause.name], sites[0].reason
    assert_equal_to_eager(near_miss.run, out, grads)


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_fuses_with_dynamic_shapes(example: Example) -> None:
    out, grads, reports = compile_and_run(example.run, "cpu", dynamic=True, checked=True)
    assert all(s.status == "fused" for r in reports for s in r.sites), [s.reason for r in reports for s in r.sites]
    assert any(r.sites for r in reports)
    assert_equal_to_eager(example.run, out, grads)
