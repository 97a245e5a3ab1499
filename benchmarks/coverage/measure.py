"""One case: eager, then compiled by attnfuse, in eval and, for some, in training."""

from __future__ import annotations

import collections
import copy
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest import mock

import torch

import attnfuse
from attnfuse.kernels import cpu
from benchmarks.coverage import cases
from benchmarks.coverage.sites import count
from benchmarks.coverage.trace import traced

#: Kernels are asked for by name, so that no site is left as it is because it is too small to pay.
OPTIONS = {"inner": "aot_eager", "kernel": "cpu"}
_LEAST_SCALE = 0.01
_OFF = "off by"
#: Relative to the largest value; more than this is verified against float64.
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float64: 1e-8}

Emit = Callable[["Row"], None]


@dataclass
class Outcome:
    """What attnfuse did in one mode.

    fused     attentions that ran on its kernel in the first call: kernel calls, so that a frame that serves several layers
              counts as often as it ran
    graphs    graphs that Dynamo made of the call
    missed    why sites were not fused, with the number of sites
    error     largest difference to eager, over the tensor's largest value in eager (or a hundredth of the largest of all
              tensors, if that is more); outputs in eval, gradients in training
    wrong     what is wrong with the result, if anything is; a difference counts where it misses the bar of attnfuse.verify
    failed    the exception that ended it, if one did
    """

    fused: int = 0
    graphs: int = 0
    missed: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    error: float | None = None
    wrong: str | None = None
    failed: str | None = None
    seconds: float = 0.0


@dataclass
class Row:
    """sites: attentions that the model spells out; calls: its calls of scaled_dot_product_attention, and other operations
    that are attention whole. Both are counted on the eager call, in training on a call in training mode."""

    name: str
    family: str
    sites: int | None = None
    calls: int | None = None
    training_sites: int | None = None
    training_calls: int | None = None
    eval: Outcome | None = None
    training: Outcome | None = None
    failed: str | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(name: str, emit: Emit = lambda row: None, train: bool = True, inner: str = OPTIONS["inner"]) -> Row:
    """Run one case in this process; `emit` gets the row at each stage, as far as it has come."""
    start = time.perf_counter()
    row = Row(name, cases.family(name))
    try:
        model, inputs = cases.build(name)
        model.eval()
        expected = _in_eager(model, inputs, row)
        emit(row)
    except Exception as error:
        # some cases need what is not installed: that is a result
        row.failed = _shown(error)
    else:
        row.eval = _evaluated(model, inputs, expected, inner)
        emit(row)
        if train and cases.trains(name):
            row.training_sites, row.training_calls = _trained_sites(model, inputs)
            row.training = _trained(model, inputs, inner)
    row.seconds = time.perf_counter() - start
    emit(row)
    return row


def _call(model: Callable[..., Any], inputs: Any) -> Any:
    torch.manual_seed(1)
    given = copy.deepcopy(inputs)
    return model(**given) if isinstance(given, dict) else model(*given)


def _in_eager(model: torch.nn.Module, inputs: Any, row: Row) -> list[torch.Tensor]:
    """The outputs of an eager call; its attentions go into the row."""
    with torch.no_grad():
        result, trace = traced(model, lambda: _call(model, inputs))
    found = count(trace.ops)
    row.sites, row.calls = len(found.spelled), trace.calls or found.fused
    return [x.detach().clone() for x in tensors(result)]


def _trained_sites(model: torch.nn.Module, inputs: Any) -> tuple[int, int]:
    with _training(model, dropout=True), torch.no_grad():
        _, trace = traced(model, lambda: _call(model, inputs))
    found = count(trace.ops)
    return len(found.spelled), trace.calls or found.fused


def _evaluated(model: torch.nn.Module, inputs: Any, expected: list[torch.Tensor], inner: str) -> Outcome:
    model.eval()
    with _compiled(model, inner) as (compiled, outcome), torch.no_grad():
        _compare(outcome, expected, tensors(_call(compiled, inputs)))
    return _judged(outcome, model, inputs, inner, grad=False)


def _trained(model: torch.nn.Module, inputs: Any, inner: str) -> Outcome:
    """Sites are counted with the model's dropout, and gradients compared without it, since eager draws other numbers."""
    with _training(model, dropout=True), _compiled(model, inner) as (compiled, outcome):
        gradients = _gradients(model, compiled, inputs)
        if any(not bool(g.isfinite().all()) for g in gradients.values()):
            # an eager model may well give such gradients on random weights
            outcome.warnings.append("gradients with dropout are not all finite")
    if outcome.failed is None:
        with _training(model, dropout=False), _compiled(model, inner) as (compiled, exact):
            expected = _gradients(model, model, inputs)
            found = _gradients(model, compiled, inputs)
            _compare(exact, list(expected.values()), list(found.values()))
        if exact.failed is None:
            if expected.keys() != found.keys():
                exact.wrong = f"{len(expected)} parameters have a gradient in eager, {len(found)} compiled"
            with _training(model, dropout=False):
                _judged(exact, model, inputs, inner, grad=True)
        outcome.error, outcome.wrong, outcome.failed = exact.error, exact.wrong, exact.failed
    return outcome


def _judged(outcome: Outcome, model: torch.nn.Module, inputs: Any, inner: str, grad: bool) -> Outcome:
    """Where the difference to eager is too large at first sight, compare both with float64: eager may be as far off."""
    if outcome.wrong is None or not outcome.wrong.startswith(_OFF):
        return outcome
    options = {**OPTIONS, "inner": inner}
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    try:
        if attnfuse.verify(model, *args, grad=grad, options=options, **kwargs).holds:
            outcome.wrong = None
    except ValueError as error:
        # what draws random numbers cannot be verified
        outcome.warnings.append(f"not verified: {_shown(error)}")
    return outcome


def _gradients(model: torch.nn.Module, call: Callable[..., Any], inputs: Any) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    outputs = [x for x in tensors(_call(call, inputs)) if x.is_floating_point() and x.requires_grad]
    loss = torch.stack([x.float().square().mean() for x in outputs]).sum()
    loss.backward()
    found = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


class _training:
    """The model in training mode, layer dropping off (which layers run would be drawn), and other dropout on or off."""

    def __init__(self, model: torch.nn.Module, dropout: bool) -> None:
        self.model, self.dropout = model, dropout
        self.kept: list[tuple[torch.nn.Module, str, float]] = []

    def __enter__(self) -> None:
        self.model.train()
        for module in self.model.modules():
            for name, value in vars(module).items():
                drops = name == "layerdrop" or (not self.dropout and (name == "p" or "drop" in name))
                if drops and isinstance(value, float):
                    self.kept.append((module, name, value))
        for module, name, _ in self.kept:
            setattr(module, name, 0.0)

    def __exit__(self, *exception: object) -> None:
        for module, name, value in self.kept:
            setattr(module, name, value)
        self.model.eval()


class _compiled:
    """The model compiled by attnfuse, and an Outcome that is filled while the block runs.

    An exception that ends the block is kept in the outcome: that a model does not compile is a result.
    """

    def __init__(self, model: torch.nn.Module, inner: str) -> None:
        self.model, self.inner = model, inner
        self.outcome = Outcome()

    def __enter__(self) -> tuple[Callable[..., Any], Outcome]:
        torch.compiler.reset()
        attnfuse.reset()
        self.start = time.perf_counter()
        self.counting = mock.patch.object(cpu, "forward", wraps=cpu.forward)
        self.kernel = self.counting.__enter__()
        options: dict[str, Any] = {**OPTIONS, "inner": self.inner}
        return torch.compile(self.model, backend="attnfuse", options=options), self.outcome

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        self.counting.__exit__(None, None, None)
        outcome, reports = self.outcome, attnfuse.reports()
        outcome.fused = self.kernel.call_count
        outcome.graphs = len(reports)
        sites = [site for report in reports for site in report.sites if site.status != "fused"]
        outcome.missed = dict(collections.Counter(f"{site.reason} ({site.where})" for site in sites))
        outcome.warnings += list(dict.fromkeys(w for report in reports for w in report.warnings))
        outcome.seconds = time.perf_counter() - self.start
        if isinstance(error, Exception):
            outcome.failed = _shown(error)
            return True
        return False


def _compare(outcome: Outcome, expected: list[torch.Tensor], found: list[torch.Tensor]) -> None:
    """Fill in the error, and say what is wrong with the result if rounding does not explain it."""
    if [x.shape for x in expected] != [x.shape for x in found]:
        outcome.wrong = f"{len(found)} tensors come out, {len(expected)} in eager, or of other shapes"
        return
    pairs = [(x, y) for x, y in zip(expected, found, strict=True) if x.is_floating_point() and x.numel()]
    overall = max((_largest(x) for x, _ in pairs), default=0.0)
    outcome.error = 0.0
    for x, y in pairs:
        if x.dtype != y.dtype:
            outcome.wrong = f"{y.dtype} comes out, {x.dtype} in eager"
        elif not torch.equal(x.isfinite(), y.isfinite()):
            outcome.wrong = "values are finite in other places than in eager"
        else:
            # a tensor that is nothing but rounding (a key's bias has no gradient) is measured by the others
            scale = max(_largest(x), _LEAST_SCALE * overall)
            error = _largest(x.double() - y.double()) / scale if scale else _largest(y)
            outcome.error = max(outcome.error, error)
            if error > ROUNDING[x.dtype]:
                outcome.wrong = f"{_OFF} {error:.2g} of the largest value"


def _largest(x: torch.Tensor) -> float:
    """The largest finite magnitude."""
    return float(x.detach().double().abs().nan_to_num(nan=0.0, posinf=0.0).max())


def tensors(result: Any) -> list[torch.Tensor]:
    """All tensors of a model's output, in order."""
    return list(_tensors(result))


def _tensors(result: Any) -> Iterator[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, Mapping):
        for value in result.values():
            yield from _tensors(value)
    elif isinstance(result, (list, tuple)):
        for value in result:
            yield from _tensors(value)
    elif isinstance(getattr(result, "sample", None), torch.Tensor):
        yield result.sample


def _shown(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
