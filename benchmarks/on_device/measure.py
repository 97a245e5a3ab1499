"""One case: every contender is made, called once and checked, then all that are right are timed in turns."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

import attnfuse
from attnfuse.accuracy.compare import compare
from benchmarks.on_device import dense, jagged
from benchmarks.on_device.cases import Case
from benchmarks.on_device.machine import Machine
from benchmarks.on_device.problem import OURS, Compilers, Contender, Problem, Results
from benchmarks.spelled import deviation
from benchmarks.timing import rounds_of, summary

Row = dict[str, Any]

CONTROL = "control"
#: The largest difference from the exact results, over their largest value, that rounding explains in what others compute.
_ROUNDING = {"bfloat16": 8e-2, "float16": 2e-2, "float32": 1e-3}
_LONGEST_REASON = 400


class Wrong(ArithmeticError):
    """attnfuse does not compute what it should."""


class _Failed(Exception):
    """A contender that could be called once failed while it was timed."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


def problem(case: Case, machine: Machine, compilers: Compilers) -> Problem:
    """The problem that a case is."""
    return (jagged if case.kind == "jagged" else dense).problem(case, machine.device, compilers)


def measure(case: Case, machine: Machine, compilers: Compilers, budget: float) -> Row:
    """The row of a case, as JSON values; `budget` seconds are for the timed calls.

    Of each contender it has the seconds and bytes of a call, or else the reason why not: it is not there, it cannot do
    the case, it ran out of memory, it is wrong. `wrong` lists what attnfuse computes wrongly, which is an error of the
    run and no result.
    """
    torch.compiler.reset()
    attnfuse.reset()
    machine.tidy()
    posed = problem(case, machine, compilers)
    with torch.no_grad() if case.mode == "forward" else contextlib.nullcontext():
        expected = _Expected(case, posed)
        found = {name: _tried(name, make, expected, machine, posed) for name, make in posed.contenders.items()}
        exact = str(expected.exact[0].dtype).removeprefix("torch.")
        del expected
        machine.tidy()
        calls = {name: one["contender"].call for name, one in found.items() if "reason" not in one}
        samples = _timed(calls, found, machine, budget)
        clocks = machine.clocks()
    row = {
        "case": case.to_dict(),
        "notes": list(posed.notes),
        "replayed": posed.replayed and machine.device.type == "cuda",
        "held against": exact,
        "contenders": {},
        "ratios": _ratios(samples),
        "wrong": [f"{name}: {one['reason']}" for name, one in found.items() if one.get("wrong")],
        "clocks": clocks,
    }
    for name, one in found.items():
        told = {key: value for key, value in one.items() if key not in ("contender", "wrong")}
        row["contenders"][name] = told | (_figures(samples[name]) if name in samples else {})
    if CONTROL in samples:
        row["contenders"][CONTROL] = _figures(samples[CONTROL])
    del found, calls, posed
    machine.tidy()
    return row


class _Expected:
    """What all contenders should compute: exactly, and as a plain computation in the case's own dtype rounds it."""

    def __init__(self, case: Case, posed: Problem) -> None:
        self.case, self.biased = case, posed.biased
        dtype = getattr(torch, case.dtype)
        try:
            self.exact = posed.expected(torch.float64)
        except torch.OutOfMemoryError:
            self.exact = posed.expected(torch.float32)
        self.native = tuple(x.to(dtype) for x in posed.expected(dtype))

    def bar(self, shown: Results) -> dict[str, float]:
        """attnfuse's largest error over the bar's, for each result. Raises Wrong where one is over the bar."""
        found = {}
        if len(shown) != len(self.exact):
            raise Wrong(f"{len(shown)} results instead of {len(self.exact)}")
        names = ("out", "dq", "dk", "dv", "dbias")
        for name, exact, native, own in zip(names, self.exact, self.native, shown):
            kind, bar = ("output", "attention") if name == "out" else ("gradient", "biased attention")
            bar = bar if self.biased else "attention"
            check = compare(name, exact, native, own.detach(), kind, bar=bar)  # type: ignore[arg-type]
            if not check.holds:
                raise Wrong(f"{name}: {check.reason}")
            found[name] = check.compiled_max / check.bar_max if check.bar_max else 0.0
        return found

    def alike(self, shown: Results) -> None:
        """Raises ArithmeticError where another contender's results are not those of the case, up to rounding."""
        pairs = list(zip(shown, self.exact))
        error = deviation(tuple(a for a, _ in pairs), tuple(b for _, b in pairs)) if pairs else 0.0
        if not error <= _ROUNDING[self.case.dtype]:
            raise ArithmeticError(f"computes something else: off by {error:.2g} of the largest value")


def _tried(name: str, make: Callable[[], Contender], expected: _Expected, machine: Machine, posed: Problem) -> Row:
    """The contender, ready to be timed, and what is known of it; or the reason why it cannot be."""
    ours = name.startswith(OURS)
    attnfuse.reset()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            made = make()
            sites = _called(made, ours)
            contender = replace(made, call=machine.replayed(made.call)) if posed.replayed else made
            shown = contender.shown(contender.call())
            errors = expected.bar(shown) if ours else expected.alike(shown)
            del shown
            held = sum(map(_bytes, contender.held))
            # a graph's replay allocates nothing
            found = {"contender": contender, "peak": machine.peak(made.call), "held": held}
            return {**found, **({"sites": sites, "errors": errors} if ours else {})}
        except torch.OutOfMemoryError:
            failed: Row = {"reason": "out of memory"}
        except Wrong as error:
            failed = {"reason": f"wrong: {error}", "wrong": True}
        except Exception as error:
            # whatever keeps a contender from running is its result
            failed = {"reason": _reason(error, [str(w.message) for w in told])}
    # frames of the exception held tensors
    machine.tidy()
    return failed


def _bytes(x: torch.Tensor) -> int:
    values = x.values() if x.is_nested else x
    return values.numel() * values.element_size()


def _called(contender: Contender, ours: bool) -> list[dict[str, Any]]:
    """Call it; what attnfuse read and on which kernel it runs. Raises LookupError where that is not one attention, fused."""
    contender.call()
    if not ours:
        return []
    reports = attnfuse.reports()
    sites = [site for report in reports for site in report.sites]
    refused = [site.reason or site.status for site in sites if site.status != "fused"]
    if not sites or refused:
        notes = [text for report in reports for text in report.warnings]
        raise LookupError("; ".join(refused or notes or ["attnfuse found no attention in it"]))
    return [{"kernel": site.kernel, "reads": site.reads, "notes": list(site.notes)} for site in sites]


def _reason(error: BaseException, told: list[str]) -> str:
    inner = getattr(error, "inner_exception", None) or error
    if isinstance(inner, torch.OutOfMemoryError):
        return "out of memory"
    first = next((line.strip() for line in str(inner).splitlines() if line.strip()), "")
    # SDPA says in warnings why a backend cannot
    because = [text.split(" (Triggered internally")[0].strip() for text in dict.fromkeys(told)]
    because = [text for text in because if "attention" in text.lower() or "cudnn" in text.lower()]
    text = f"{type(inner).__name__}: {first}" + (f" ({'; '.join(because)})" if because else "")
    return text if len(text) <= _LONGEST_REASON else f"{text[: _LONGEST_REASON - 3]}..."


def _timed(calls: dict[str, Callable[[], Any]], found: dict[str, Row], machine: Machine, budget: float) -> Any:
    """Samples by contender, of the control too: the first of ours once more. Those that fail by now are left out."""
    calls = dict(calls)
    while calls:
        control = next((name for name in calls if name.startswith(OURS)), None)
        names = list(calls)
        if control:
            # not beside the one it repeats, which would find its data in the caches
            names.insert(len(names) // 2 + 1, CONTROL)
        named = {name: _named(name, calls[control if name == CONTROL and control else name]) for name in names}
        try:
            return rounds_of(named, budget, machine.sample)
        except _Failed as error:
            name = control if error.name == CONTROL and control else error.name
            found[name] = {"reason": f"while it was timed: {error.reason}"}
            del calls[name]
        machine.tidy()
    return {}


def _named(name: str, call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> None:
        try:
            call()
        except Exception as error:
            raise _Failed(name, _reason(error, [])) from None

    return run


def _figures(samples: list[float]) -> Row:
    timing = summary(samples, samples)
    ordered = sorted(samples)
    return {"seconds": timing.seconds, "least": ordered[0], "most": ordered[-1], "rounds": timing.rounds}


def _ratios(samples: dict[str, list[float]]) -> dict[str, dict[str, list[float]]]:
    """By contender of ours and other contender: how many times as long the other takes, median and quartiles over rounds."""
    found: dict[str, dict[str, list[float]]] = {}
    for name in samples:
        if name.startswith(OURS):
            others = {other: summary(samples[name], taken) for other, taken in samples.items() if other != name}
            found[name] = {other: [t.speedup, t.low, t.high] for other, t in others.items()}
    return found
