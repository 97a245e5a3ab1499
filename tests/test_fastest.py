"""mode="max-autotune" takes the kernel that is measured to be fastest."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import attnfuse
from attnfuse import kernels, tuning
from attnfuse.kernels import FLASH_CPU, measure

pytest.importorskip("triton")


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """ATen's CPU kernel as a candidate, and milliseconds by kernel in place of measured ones; it runs what is measured."""
    times = {"cpu": 2.0, "flash_cpu": 1.0}
    monkeypatch.setattr(tuning, "_fastest", {})
    monkeypatch.setitem(kernels.PLAIN_FIRST, 0, (FLASH_CPU,))

    def measured(kernel: kernels.Kernel, job: tuning.Job) -> tuple[float, list[torch.Tensor]]:
        real, results = original(kernel, job)
        return times[kernel.name] if results else real, results

    original = tuning._measured
    monkeypatch.setattr(tuning, "_measured", measured)
    return times


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def run(function=attend, grad: bool = True, **more) -> attnfuse.Report:
    inputs = [torch.randn(1, 2, 24, 16, requires_grad=grad) for _ in range(3)]
    more = {"mode": "max-autotune", **more} if "options" not in more else more
    out = torch.compile(function, backend="attnfuse", **more)(*inputs)
    torch.testing.assert_close(out, function(*inputs), rtol=1e-4, atol=1e-5)
    if grad:
        found = torch.autograd.grad(out.sum(), inputs)
        for a, b in zip(found, torch.autograd.grad(function(*inputs).sum(), inputs)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    return attnfuse.reports()[-1]


EAGER = {"inner": "aot_eager", "strict": True, "tune": True}


@pytest.mark.parametrize("fastest", ["cpu", "flash_cpu"])
def test_the_fastest_kernel_is_taken_and_reported(timed, fastest):
    timed[fastest] = 0.5
    assert [s.kernel for s in run(options=EAGER).sites] == [fastest]


def test_through_inductor(timed):
    assert [s.kernel for s in run(grad=False).sites] == ["flash_cpu"]


def test_default_mode_measures_nothing(timed, monkeypatch):
    def measured(*_):
        raise AssertionError("measured in default mode")

    monkeypatch.setattr(tuning, "_measured", measured)
    assert [s.kernel for s in run(options={**EAGER, "tune": False}).sites] == ["flash_cpu"]


def test_a_kernel_that_is_asked_for_is_not_compared(timed):
    assert [s.kernel for s in run(options={**EAGER, "kernel": "cpu"}).sites] == ["cpu"]


def test_equal_attentions_are_measured_once(timed, monkeypatch):
    calls = []
    once = tuning._measured
    monkeypatch.setattr(tuning, "_measured", lambda kernel, job: calls.append(kernel.name) or once(kernel, job))
    report = run(lambda q, k, v: attend(attend(q, k, v), k, v), options=EAGER)
    assert [s.kernel for s in report.sites] == ["flash_cpu"] * 2
    assert sorted(calls) == ["cpu", "flash_cpu"]


def test_a_kernel_that_fails_is_out(timed, monkeypatch):
    def failing(*_):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(type(FLASH_CPU.load()), "forward", failing)
    assert [s.kernel for s in run(options=EAGER).sites] == ["cpu"]


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_a_kernel_with_other_results_is_not_taken(timed, monkeypatch, part):
    right = getattr(type(FLASH_CPU.load()), part)

    def wrong(*args):
        first, *rest = right(*args)
        return [first * 1.1, *rest] if part == "backward" else (first * 1.1, *rest)

    monkeypatch.setattr(type(FLASH_CPU.load()), part, wrong)
    with pytest.warns(RuntimeWarning, match="kernel flash_cpu gives other results than kernel cpu and is not taken"):
        report = run(options=EAGER)
    assert [s.kernel for s in report.sites] == ["cpu"]


def test_what_goes_wrong_leaves_the_choice(timed, monkeypatch):
    def broken(*_):
        raise RuntimeError("the clock stopped")

    monkeypatch.setattr(tuning, "_fastest_of", broken)
    with pytest.warns(RuntimeWarning, match="were not compared .RuntimeError: the clock stopped"):
        report = run(options={**EAGER, "strict": False})
    assert [s.kernel for s in report.sites] == ["flash_cpu"]
    with pytest.raises(Exception, match="the clock stopped"):
        run(options=EAGER)


def test_a_measured_time_is_that_of_the_call():
    taken = measure.milliseconds(lambda: torch.ones(10).sum(), torch.device("cpu"))
    assert 0.0 < taken < 1000.0
