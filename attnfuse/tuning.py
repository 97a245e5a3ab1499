"""Takes the fastest kernels for the attentions in a rewritten graph, and tunes them, when the user asks for it."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnfuse.kernels import TRITON, Kernel, compared, not_compared
from attnfuse.kernels.device import Device, tf32_allowed
from attnfuse.kernels.inputs import Bounds, Inputs
from attnfuse.kernels.measured import fastest, records, timing
from attnfuse.passes.capture.view import Scope
from attnfuse.passes.graph.labels import stride_hint
from attnfuse.reasons import Reason
from attnfuse.spec import Attention
from attnfuse.warning import said, warn

#: Arguments of the op.
_BOUNDS, _SPEC, _KERNEL = slice(5, 7), 7, 8

log = logging.getLogger("attnfuse")


@dataclass(frozen=True)
class Job:
    """An attention to tune for, on `device`. inputs: on 'meta' and without a seed; needs: of which of (q, k, v, *operands) it
    gives gradients."""

    spec: Attention
    inputs: Inputs
    needs: tuple[bool, ...]
    device: torch.device


#: What was measured in this process: the kernel that won, by spec, device, and the inputs' shapes, strides and dtypes.
_fastest: dict[tuple[object, ...], str] = {}


def take_fastest(calls: Sequence[fx.Node], strict: bool) -> list[str]:
    """Give each call of the op the kernel that is measured to be fastest, among those that can run it; their names.

    Measured are forward, and backward where there is one, with the example's sizes. What goes wrong is warned of and leaves a
    call as it is; in strict mode it is raised.
    """
    for node in calls:
        try:
            name = _fastest_of(job(node))
        except Exception as error:
            if strict:
                raise
            warn(f"the kernels of an attention were not compared ({said(error)})")
            log.debug("while comparing kernels", exc_info=True)
            continue
        node.args = (*node.args[:_KERNEL], name or node.args[_KERNEL], *node.args[_KERNEL + 1 :])
    return [str(node.args[_KERNEL]) for node in calls]


def passed_over(node: fx.Node) -> list[Reason]:
    """Why kernels that only measuring could choose were not measured for a call of the op."""
    query: Any = node.args[0]
    example = query.meta.get("example_value")
    if not isinstance(example, torch.Tensor):
        return []
    return not_compared(Attention.parse(str(node.args[_SPEC])), example.device)


def _fastest_of(job: Job) -> str | None:
    """None where there is nothing to choose."""
    found = compared(job.spec, job.device, job.inputs.bounds)
    if len(found) < 2:
        return None
    names = [kernel.name for kernel in found]
    tensors = (*job.inputs.tensors, *(x for x in job.inputs.bounds if x is not None))
    key = (job.spec.text, job.device, job.needs, *names, *((tuple(x.shape), x.stride(), x.dtype) for x in tensors))
    if key not in _fastest:
        name = fastest.key(job.spec, job.inputs.tensors, job.needs, Device.of(job.device), names)
        known = fastest.entries().get(name) if name else None
        # a name that is not among them was not written by attnfuse
        _fastest[key] = known.kernel if known and known.kernel in names else _compared(found, job, name)
    return _fastest[key]


def _compared(found: Sequence[Kernel], job: Job, name: str | None) -> str:
    """The kernel that is fastest; name: what the comparison is kept under, if it is."""
    # the last one is attnfuse's own: what gives other results than it is not taken, however fast
    own, *others = reversed(found)
    best, expected = _measured(own, job)
    times, failed = {own.name: best}, not expected
    for kernel in others:
        taken, results = _measured(kernel, job)
        failed = failed or not results
        if expected and results and not _same(results, expected):
            warn(f"kernel {kernel.name} gives other results than kernel {own.name} and is not taken ({job.spec})")
            taken = math.inf
        times[kernel.name] = taken
    log.info("fastest of %s for %s", times, job.spec)
    winner = min(times, key=lambda kernel: times[kernel])
    # what failed may have had no memory this time
    if name and not failed:
        _keep(name, fastest.Fastest(winner, {kernel: ms for kernel, ms in times.items() if ms < math.inf}))
    return winner


def _keep(name: str, entry: fastest.Fastest) -> None:
    try:
        fastest.add({name: entry})
    except records.NOT_KEPT as error:
        warn(f"which kernel is fastest is not kept ({said(error)})")


def _same(results: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    from attnfuse.kernels.triton.tuning import close

    precision = "tf32" if tf32_allowed() else "ieee"
    return all(close(a, b, precision) for a, b in zip(results, expected, strict=True))


def _measured(kernel: Kernel, job: Job) -> tuple[float, list[torch.Tensor]]:
    """Milliseconds of one forward, and one backward where gradients are needed, and their results; infinite and nothing for
    a kernel that fails."""
    from attnfuse.kernels.triton.tuning import skewed, tensors_like

    inputs = job.inputs.with_tensors(tensors_like(job.inputs.tensors, job.device, True, 0))
    lengths = inputs.q.shape[-2], inputs.k.shape[-2]
    inputs = inputs._replace(bounds=skewed(inputs.bounds, lengths, job.device))
    if job.spec.dropout:
        inputs = inputs._replace(seed=torch.zeros(1, dtype=torch.int64, device=job.device))
    module = kernel.load()

    def run() -> list[torch.Tensor]:
        out, stats = module.forward(job.spec, inputs)
        if not any(job.needs):
            return [out]
        # any gradient that has the result's shape will do
        dout = inputs.q if inputs.q.shape == out.shape and inputs.q.dtype == out.dtype else torch.ones_like(out)
        grads = module.backward(job.spec, inputs, dout, out, stats, job.needs)
        return [out, *(g for g in grads if g is not None)]

    try:
        with torch.no_grad():
            return timing.milliseconds(run, job.device), run()
    except Exception as error:
        log.info("kernel %s is out: %s: %s", kernel.name, type(error).__name__, error)
        return math.inf, []


def tune_all(scopes: Sequence[Scope], strict: bool) -> None:
    """Measure, for the example's sizes, the kernels of all ops in these graphs that can be tuned and have not been yet.

    What goes wrong is warned of and leaves the shipped configurations; in strict mode it is raised.
    """
    found = [node for scope in scopes for node in scope.module.graph.nodes if _can_be_tuned(node)]
    if not found:
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        for number, node in enumerate(found, 1):
            task = progress.add_task(f"attnfuse: tuning attention {number} of {len(found)}")

            def step(which: str, done: int, total: int, task: Any = task, number: int = number) -> None:
                text = f"attnfuse: tuning attention {number} of {len(found)}, {which}"
                progress.update(task, description=text, completed=done, total=total)

            try:
                _tune(job(node), step)
            except Exception as error:
                if strict:
                    raise
                warn(f"an attention was not tuned ({said(error)})")
                log.debug("while tuning", exc_info=True)
            progress.remove_task(task)


def _tune(job: Job, step: Any) -> None:
    from attnfuse.kernels.triton import tuning

    for result in tuning.tune(job.spec, job.inputs, job.needs, job.device, step=step):
        log.info("tuned %s: %s, skipped %s", result.key, result.entry, list(result.skipped))


def _can_be_tuned(node: fx.Node) -> bool:
    if node.target is not torch.ops.attnfuse.attention.default or node.args[_KERNEL] != TRITON.name:
        return False
    # what a block table holds is not known when a graph is compiled
    return not Attention.parse(str(node.args[_SPEC])).paged


def job(node: fx.Node) -> Job:
    """What a node that calls the op has for inputs, with hints for symbolic sizes. Raises ValueError where one has none."""
    given_operands: Any = node.args[3]
    bounds: Any = node.args[_BOUNDS]
    nodes: list[Any] = [*node.args[:3], *given_operands]
    examples = [n.meta.get("example_value") for n in (*nodes, *(b for b in bounds if b is not None))]
    if not all(isinstance(x, torch.Tensor) for x in examples):
        raise ValueError("an input whose shape is not known")
    needs = tuple(x.requires_grad for x in examples[: len(nodes)])
    tensors = tuple(_like(x) for x in examples)
    given = iter(tensors[len(nodes) :])
    parsed = Attention.parse(str(node.args[_SPEC]))
    packed = Bounds(*(None if b is None else next(given) for b in bounds))
    if bounds[0] is bounds[1]:
        packed = packed._replace(k=packed.q)
    q, k, v, *operands = tensors[: len(nodes)]
    return Job(parsed, Inputs(q, k, v, operands, bounds=packed), needs, examples[0].device)


def _like(x: torch.Tensor) -> torch.Tensor:
    """A tensor without memory that tells shape, strides and dtype, from the hints of symbolic ones."""
    shape, strides = [stride_hint(n) for n in x.shape], [stride_hint(n) for n in x.stride()]
    if any(n == 0 for n in shape):
        raise ValueError(f"an input of shape {list(x.shape)}")
    return torch.empty_strided(shape, strides, dtype=x.dtype, device="meta")
