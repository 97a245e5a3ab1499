"""`explain`: one call of a model, and what attnfuse does to each attention in it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.export import ExportedProgram

from attnfuse import _compat, ops, reasons
from attnfuse._compat import original
from attnfuse.backend import backend
from attnfuse.compile_fresh import compile_fresh, name_of
from attnfuse.exported import rewrite
from attnfuse.passes.read.graph_breaks import split
from attnfuse.reasons import Reason
from attnfuse.report.drawing import kept_keys
from attnfuse.report.registry import collecting
from attnfuse.report.report import Report, merge
from attnfuse.spec import Attention


def explain(model_or_function: Callable[..., Any] | ExportedProgram, /, *args: Any, **kwargs: Any) -> Report:
    """Make one call, `model_or_function(*args, **kwargs)`, and say what attnfuse does to each attention in it.

    The call is compiled anew with the rest of the graph run eagerly (options={'inner': 'eager'}), whatever has been
    compiled before; code that is compiled already stays as it is and `reports()` does not list this call. The call is
    really made: what it mutates is mutated, and grad mode, train or eval mode and autocast are taken as they are.

    An exported program is rewritten instead (attnfuse.rewrite), and called only if there are arguments.

    Raises TypeError for something that cannot be called.
    """
    if isinstance(model_or_function, ExportedProgram):
        return _explain_exported(model_or_function, args, kwargs)

    broken: list[str] = []

    def explaining(gm: Any, example_inputs: Any) -> Any:
        # a remark must not cost the report
        with contextlib.suppress(Exception):
            broken.extend(split(gm))
        return backend(gm, example_inputs, options={"inner": "eager"})

    calls: list[tuple[str, torch.Tensor | None]] = []
    with collecting() as collected, _observing(calls):
        positional, keywords = _by_name(model_or_function, args, kwargs)
        compile_fresh(model_or_function, explaining)(*positional, **keywords)
    name = name_of(model_or_function)
    notes = (*_strided(args, kwargs), *map(_split, broken if len(collected) > 1 else ()))
    if not collected:
        return Report((), "", "", name, (_with_advice(reasons.NO_GRAPH()), *notes))
    found = merge(collected, name)
    return _with_masks(replace(found, warnings=(*found.warnings, *notes)), calls)


def _split(at: str) -> str:
    return _with_advice(reasons.GRAPH_BREAK(at=f" ({at})" if at else ""))


def _with_advice(reason: Reason) -> str:
    """A warning is all that is said: there is no site that has the cause."""
    return f"{reason}. {reason.cause.advice}"


def _strided(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, ...]:
    leaves = _compat.pytree.tree_leaves((args, kwargs))
    if not any(isinstance(x, torch.Tensor) and x.is_nested and x.layout == torch.strided for x in leaves):
        return ()
    return (_with_advice(reasons.STRIDED_REACH_NO_COMPILER()),)


def _explain_exported(program: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Report:
    calls: list[tuple[str, torch.Tensor | None]] = []
    with collecting() as collected, _observing(calls):
        made = rewrite(program)
        if args or kwargs:
            made.module()(*args, **kwargs)
    return _with_masks(collected[0], calls)


@contextlib.contextmanager
def _observing(calls: list[tuple[str, torch.Tensor | None]]) -> Iterator[None]:
    """Note the spec of every attention that runs, and the keys its masks leave."""

    def observe(spec: Attention, q: torch.Tensor, k: torch.Tensor, operands: Sequence[torch.Tensor]) -> None:
        calls.append((spec.text, kept_keys(spec, q, k, operands)))

    ops.observers.append(observe)
    try:
        yield
    finally:
        ops.observers.remove(observe)


def _with_masks(report: Report, calls: list[tuple[str, torch.Tensor | None]]) -> Report:
    """The report with the masks of the calls: those of one spec are made in the order of its sites."""
    left: dict[str, list[torch.Tensor | None]] = {}
    for text, kept in calls:
        left.setdefault(text, []).append(kept)
    sites = []
    for site in report.sites:
        waiting = left.get(site.spec.text, []) if site.spec is not None and site.status == "fused" else []
        sites.append(replace(site, kept=waiting.pop(0)) if waiting else site)
    return replace(report, sites=tuple(sites))


def _by_name(
    model_or_function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments by keyword where that is the same call, so that the graph's inputs have names to report."""
    target = original(model_or_function)
    forward = getattr(target, "forward", target)
    if getattr(target, "_forward_pre_hooks", None):
        # a hook may look at positional arguments
        return args, kwargs
    try:
        parameters = list(inspect.signature(forward).parameters.values())
    except (TypeError, ValueError):
        return args, kwargs
    taken = parameters[: len(args)]
    if len(taken) < len(args) or any(p.kind is not p.POSITIONAL_OR_KEYWORD or p.name in kwargs for p in taken):
        return args, kwargs
    return (), {**{p.name: a for p, a in zip(taken, args, strict=True)}, **kwargs}
