"""Carrying labels through ops that only move, repeat or copy elements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from attnfuse._compat import alias_key
from attnfuse.passes.graph import moves
from attnfuse.passes.graph.aten import arguments, dtype_of, is_tensor, name_of, shape_of, source_of, value_of
from attnfuse.passes.graph.labels import Axes, Dim, Labels, Size
from attnfuse.passes.graph.memory import is_stale
from attnfuse.passes.graph.moves import DimMap


@dataclass(frozen=True)
class ViewInput:
    """A view read backwards: its input, labelled. `material`: it repeats or copies elements, so that passing it saves work."""

    source: fx.Node
    labels: Labels
    material: bool


def is_identity(node: fx.Node) -> bool:
    """The op gives its first argument's elements in the same places: copies, full-range slices, views of the same shape."""
    name = name_of(node)
    if name == "to":
        return dtype_of(node) == dtype_of(source_of(node))
    if name == "dropout":
        args = arguments(node)
        return not args["train"] or args["p"] == 0.0
    if name in ("pad", "constant_pad_nd"):
        return all(isinstance(n, int) and n == 0 for n in arguments(node)["pad"])
    found = moves.dim_map(node)
    return found is not None and found.is_identity


def back(axes: Axes, node: fx.Node, labels: Labels) -> ViewInput | None:
    """From the labels of a view's result to those of its input; None if `node` is not such an op."""
    if not node.args or not is_tensor(node.args[0]) or is_stale(node):
        return None
    source = source_of(node)
    found = moves.dim_map(node)
    if found is None:
        placed = labels if is_identity(node) else None
    else:
        placed = backward(axes, found, labels)
    if placed is None:
        return None
    copied = alias_key(value_of(source)) != alias_key(value_of(node))
    return ViewInput(source, placed, copied or (found is not None and found.repeats))


#: Labels a dim of a source of which the result has a part: from the label of the part (none where one index was chosen), the
#: size of the dim, and where the part begins. None where that cannot be labelled.
Cut = Callable[[Dim, Size, Size], Dim | None]


def backward(axes: Axes, found: DimMap, labels: Labels, cut: Cut = lambda label, size, start: None) -> Labels | None:
    """The labels of the source of a map; None where there are none, as for one of which the result has not all elements."""
    own = shape_of(found.source)
    placed: list[Dim] = [()] * len(own)
    parts: list[tuple[int, Dim, Size | None, int]] = [(dim, (), start, 1) for dim, start in found.fixed]
    parts += [
        (x.dim, y, x.start, x.step) for x, y in zip(found.dims, labels, strict=True) if isinstance(x, moves.Slice)
    ]
    for dim, label, start, step in parts:
        whole = None if start is None or step != 1 else cut(label, own[dim], start)
        if whole is None:
            return None
        placed[dim] = whole
    for x, label in zip(found.dims, labels, strict=True):
        if isinstance(x, moves.Dim):
            placed[x.dim] = label
        elif isinstance(x, (moves.Tile, moves.Interleave)):
            inner = isinstance(x, moves.Tile)
            sizes = (x.repeats, own[x.dim]) if inner else (own[x.dim], x.repeats)
            split = axes.regroup((label,), sizes)
            if split is None:
                return None
            placed[x.dim] = split[inner]
    for run in found.runs:
        regrouped = axes.regroup(tuple(labels[d] for d in run.outs), [own[d] for d in run.dims])
        if regrouped is None:
            return None
        for d, part in zip(run.dims, regrouped, strict=True):
            placed[d] = part
    return tuple(placed)


def forward(axes: Axes, node: fx.Node, labels: Labels) -> Labels | None:
    """From the labels of the input of a view to those of its result; None if `node` is not such an op."""
    found = moves.dim_map(node)
    if found is None:
        return labels if is_identity(node) else None
    return None if found.altered or found.repeats else onward(axes, found, labels)


def onward(axes: Axes, found: DimMap, labels: Labels) -> Labels | None:
    """The labels of the result: dims that are not whole dims of the source, or made of such, are new."""
    out = [
        labels[x.dim] if isinstance(x, moves.Dim) else () if isinstance(x, moves.Regroup) else axes.fresh(size)
        for x, size in zip(found.dims, found.shape, strict=True)
    ]
    for run in found.runs:
        parts = axes.regroup(tuple(labels[d] for d in run.dims), [found.shape[d] for d in run.outs])
        if parts is None:
            return None
        for d, part in zip(run.outs, parts, strict=True):
            out[d] = part
    return tuple(out)
