"""Is the compiled call as good as the eager one? `verify` measures both against float64, outputs and every gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from attnfuse._compat import original, pytree
from attnfuse.accuracy import calls
from attnfuse.accuracy.compare import Bar, Check, Kind, compare
from attnfuse.accuracy.oracle import Oracle
from attnfuse.compile_fresh import name_of
from attnfuse.report.registry import collecting
from attnfuse.report.report import Report, as_text, merge
from attnfuse.spec import Bias, Ramp

if TYPE_CHECKING:
    import rich.table


class VerificationError(AssertionError):
    """The compiled call is off by more than the bar; the text is the table of the tensors that are."""


@dataclass(frozen=True)
class Verification:
    """What `verify` found. `report` says what attnfuse did in the compiled call; `graphs` how many the oracle ran."""

    name: str
    checks: tuple[Check, ...]
    report: Report
    graphs: int
    warnings: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        return all(check.holds for check in self.checks)

    def raise_if_failed(self) -> Verification:
        """Itself. Raises VerificationError, with the tensors that fail, where the bar does not hold."""
        if not self.holds:
            raise VerificationError("\n" + as_text(self._table([c for c in self.checks if not c.holds])))
        return self

    def __rich__(self) -> rich.table.Table:
        return self._table(list(self.checks))

    def __str__(self) -> str:
        return as_text(self)

    def _table(self, checks: list[Check]) -> rich.table.Table:
        from rich.table import Table
        from rich.text import Text

        failed = sum(not c.holds for c in self.checks)
        verdict = "holds" if not failed else f"fails for {failed} of {len(self.checks)} tensors"
        caption = "\n".join(f"warning: {w}" for w in self.warnings)
        table = Table(
            title=Text(f"{self.name}: errors against float64; the bar {verdict}"),
            caption=Text(caption) if caption else None,
            caption_justify="left",
        )
        table.add_column("tensor", overflow="fold")
        table.add_column("kind")
        table.add_column("dtype")
        for column in ("max", "eager's", "bar", "mean", "eager's", "bar"):
            table.add_column(column, justify="right")
        table.add_column("holds", overflow="fold")
        for c in checks:
            figures = (c.compiled_max, c.eager_max, c.bar_max, c.compiled_mean, c.eager_mean, c.bar_mean)
            table.add_row(
                Text(c.name),
                c.kind,
                str(c.dtype).removeprefix("torch."),
                *("" if f is None else f"{f:.2g}" for f in figures),
                Text("yes", style="green") if c.holds else Text(f"no: {c.reason}", style="red"),
            )
        return table


def verify(
    model_or_function: Callable[..., Any],
    /,
    *args: Any,
    grad: bool = True,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> Verification:
    """Make one call three times, eager, compiled by attnfuse and in float64, and compare what comes out.

    grad       compare gradients too, of every parameter and floating input that requires grad, under one random
               cotangent for all outputs; where nothing among inputs and parameters requires grad, floating inputs are
               made to
    options    of torch.compile(backend='attnfuse', options=...); dynamic as of torch.compile
    seed       of the cotangents

    Compared are all tensors returned (in containers of any kind), and the inputs and buffers that the call mutated.
    Inputs are copied, and the buffers of a module put back, so that each of the three starts from the same state; state
    that a function keeps by other means is not. `attnfuse.accuracy.compare.compare` states the bar.

    Raises ValueError where the call draws random numbers (dropout), which eager and compiled code draw differently,
    where Dynamo captures nothing of it, and for nested tensors, which eager attention does not take on every device.
    """
    if any(isinstance(x, torch.Tensor) and x.is_nested for x in pytree.tree_leaves((args, kwargs))):
        raise ValueError("verify takes no nested tensors: compare each sequence with the same call on it alone")
    target = original(model_or_function)
    module = calls.module_of(target)
    call = calls.Call(target, args, kwargs, grad=grad, module=module)
    oracle = Oracle(beside=_backend(options))
    with torch.set_grad_enabled(grad), collecting() as reports:
        both = oracle.compile(target, dynamic)
        exact, cotangents, leaves = _in_float64(call, oracle, both, seed)
        eager = _run(call, target, cotangents, leaves)
        compiled = _run(call, both, cotangents, leaves)
    warnings = []
    if grad and not cotangents:
        warnings.append("no output requires grad: gradients were not compared")
    if not any(report.sites for report in reports):
        warnings.append("attnfuse found no attention in this call")
    bar: Bar = "layer" if leaves else _attention_bar(reports)
    checks = [*_outputs(exact, eager, compiled), *_gradients(exact, eager, compiled, bar)]
    name = name_of(model_or_function)
    return Verification(name, tuple(checks), merge(reports, name), oracle.graphs, tuple(warnings))


@dataclass
class _Run:
    """Outputs (and mutated state) by name, and gradients by name (None where nothing depends on it)."""

    outputs: dict[str, torch.Tensor]
    state: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor | None]


def _backend(options: Mapping[str, Any] | None) -> Callable[..., Any]:
    from attnfuse.backend import backend

    def attnfuse_backend(gm: Any, example_inputs: Any) -> Any:
        return backend(gm, example_inputs, options=None if options is None else dict(options))

    return attnfuse_backend


def _in_float64(
    call: calls.Call, oracle: Oracle, fn: Callable[..., Any], seed: int
) -> tuple[_Run, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The oracle's run, a cotangent by output name, and the leaves that are no inputs by name."""
    fresh = call.copy()
    with call.state_kept(), oracle, _same_numbers():
        outputs = calls.named(fn(*fresh.args, **fresh.kwargs))
        if oracle.random:
            raise ValueError(
                f"{name_of(call.target)} draws random numbers ({', '.join(oracle.random)}), and eager and compiled code draw "
                "different ones: call model.eval(), or set the dropout probabilities to 0"
            )
        if not oracle.graphs:
            raise ValueError(
                "Dynamo captured no graph of this call, so there is nothing to verify: is torch.compile off?"
            )
        run = _Run(
            {name: oracle.exact(t) for name, t in outputs.items()},
            {name: oracle.exact(t).detach().clone() for name, t in call.mutated(fresh).items()},
            {},
        )
    generator = torch.Generator().manual_seed(seed)
    cotangents = {
        name: torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device, t.dtype)
        for name, t in outputs.items()
        if t.requires_grad and (t.is_floating_point() or t.is_complex())
    }
    leaves: dict[str, torch.Tensor] = {**call.parameters} or _closed_over(oracle, fresh)
    if cotangents:
        wanted = {**fresh.differentiable, **leaves}
        found = oracle.gradients([run.outputs[n] for n in cotangents], list(wanted.values()), list(cotangents.values()))
        run.gradients = dict(zip(wanted, found, strict=True))
    return run, cotangents, leaves


def _closed_over(oracle: Oracle, fresh: calls.Fresh) -> dict[str, torch.Tensor]:
    """Leaves that a function reached by itself, a model it closes over for one."""
    given = {id(t) for t in fresh.differentiable.values()}
    return {name: leaf for name, leaf in oracle.leaves if id(leaf) not in given}


def _run(
    call: calls.Call,
    fn: Callable[..., Any],
    cotangents: dict[str, torch.Tensor],
    leaves: dict[str, torch.Tensor],
) -> _Run:
    """One run in the model's own dtypes; the module's state is put back after it."""
    fresh = call.copy()
    with call.state_kept(), _same_numbers():
        outputs = calls.named(fn(*fresh.args, **fresh.kwargs))
        mutated = {name: t.detach().clone() for name, t in call.mutated(fresh).items()}
        gradients: dict[str, torch.Tensor | None] = {}
        used = {n: c for n, c in cotangents.items() if n in outputs and outputs[n].requires_grad}
        if used:
            wanted = {**fresh.differentiable, **leaves}
            found = torch.autograd.grad(
                [outputs[n] for n in used], list(wanted.values()), list(used.values()), allow_unused=True
            )
            gradients = dict(zip(wanted, found, strict=True))
    return _Run(outputs, mutated, gradients)


@contextlib.contextmanager
def _same_numbers() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _outputs(exact: _Run, eager: _Run, compiled: _Run) -> Iterator[Check]:
    runs = (exact, eager, compiled)
    yield from _compared("output", *(run.outputs for run in runs))
    yield from _compared("state", *(run.state for run in runs))


def _compared(
    kind: Kind, exact: dict[str, torch.Tensor], eager: dict[str, torch.Tensor], compiled: dict[str, torch.Tensor]
) -> Iterator[Check]:
    for name, reference in eager.items():
        given = compiled.get(name)
        if given is None or name not in exact:
            yield _missing(name, kind, reference, "is not among what the compiled call returned or mutated")
        elif reference.requires_grad and not given.requires_grad:
            yield _missing(name, kind, reference, "does not require grad, eager's does")
        else:
            yield compare(name, exact[name].detach(), reference.detach(), given.detach(), kind)
    for name in compiled.keys() - eager.keys():
        yield _missing(name, kind, compiled[name], "is not among what the eager call returned or mutated")


def _attention_bar(reports: list[Report]) -> Bar:
    """Of a function that is one attention: gradients may err more where a bias or dropout takes part."""
    specs = [site.spec for report in reports for site in report.sites if site.spec is not None]
    biased = any(spec.dropout or any(isinstance(step, (Bias, Ramp)) for step in spec.steps) for spec in specs)
    return "biased attention" if biased else "attention"


def _gradients(exact: _Run, eager: _Run, compiled: _Run, bar: Bar) -> Iterator[Check]:
    largest: dict[str, float] = {}
    for name, gradient in exact.gradients.items():
        if gradient is not None and gradient.numel():
            layer = calls.layer_of(name)
            largest[layer] = max(largest.get(layer, 0.0), float(gradient.abs().max()))
    for name in exact.gradients:
        parts = [run.gradients.get(name) for run in (exact, eager, compiled)]
        shaped = next((p for p in (parts[1], parts[2], parts[0]) if p is not None), None)
        if shaped is None:
            continue
        # no gradient and a gradient of zeros are the same to an optimiser's eyes
        reference, native, given = (torch.zeros_like(shaped) if p is None else p for p in parts)
        yield compare(name, reference.double(), native, given, "gradient", largest.get(calls.layer_of(name), 0.0), bar)


def _missing(name: str, kind: Kind, tensor: torch.Tensor, reason: str) -> Check:
    return Check(name, kind, tensor.dtype, tuple(tensor.shape), 0.0, 0.0, 0.0, 0.0, None, None, reason)
