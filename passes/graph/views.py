"""Carrying labels through ops that only move, repeat or copy elements."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from attnfuse._compat import alias_key
from attnfuse.passes.graph.aten import arguments, dtype_of, is_tensor, name_of, shape_of, value_of
from attnfuse.passes.graph.labels import Axes, Labels, is_one, known_equal
from attnfuse.passes.graph.memory import is_stale
from attnfuse.passes.graph.vocabulary import COPIES


@dataclass(frozen=True)
class Step:
    """A view read backwards: its input, labelled. `material`: it repeats or copies elements, so that passing it saves work."""

    source: fx.Node
    labels: Labels
    material: bool


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    x, y = shape_of(a), shape_of(b)
    return len(x) == len(y) and all(known_equal(i, j) for i, j in zip(x, y))


def permutation(node: fx.Node) -> list[int]:
    """For each output dim of a permuting op, the input dim it is."""
    rank = len(shape_of(node))
    probe = torch.empty([2 + i for i in range(rank)], device="meta")
    moved = node.target(probe, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return [size - 2 for size in moved.shape]


def is_identity(node: fx.Node) -> bool:
    """The op gives its first argument's elements in the same places: copies, full-range slices, expand to the same shape."""
    name = name_of(node)
    if name in COPIES:
        return True
    if name == "to":
        return dtype_of(node) == dtype_of(node.args[0])  # type: ignore[arg-type]
    if name == "dropout":
        args = arguments(node)
        return not args["train"] or args["p"] == 0.0
    if name == "slice":
        return arguments(node)["step"] == 1 and _same_shape(node, node.args[0])  # type: ignore[arg-type]
    return name == "expand" and _same_shape(node, node.args[0])  # type: ignore[arg-type]


def back(axes: Axes, node: fx.Node, labels: Labels) -> Step | None:
    """From the labels of a view's result to those of its input; None if `node` is not such an op."""
    if not node.args or not is_tensor(node.args[0]) or is_stale(node):
        return None
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    name = name_of(node)
    if is_identity(node):
        return Step(source, labels, alias_key(value_of(source)) != alias_key(value_of(node)))
    if name == "view":
        found = axes.regroup(labels, shape_of(source))
        if found is None:
            return None
        return Step(source, found, alias_key(value_of(source)) != alias_key(value_of(node)))
    if name == "permute":
        placed = list(labels)
        for out_dim, in_dim in enumerate(permutation(node)):
            placed[in_dim] = labels[out_dim]
        return Step(source, tuple(placed), False)
    if name == "expand":
        lead = len(labels) - len(shape_of(source))
        pairs = zip(labels[lead:], shape_of(source))
        return Step(source, tuple(() if is_one(size) else dim for dim, size in pairs), True)
    if name == "repeat_interleave":
        return _interleaved(axes, node, source, labels)
    if name == "repeat":
        return _repeated(axes, node, source, labels)
    return None


def _interleaved(axes: Axes, node: fx.Node, source: fx.Node, labels: Labels) -> Step | None:
    args = arguments(node)
    repeats, dim = args.get("repeats"), args.get("dim")
    if not isinstance(repeats, int) or not isinstance(dim, int):
        return None
    inner = shape_of(source)[dim]
    split = axes.regroup((labels[dim],), (inner, repeats))
    if split is None:
        return None
    placed = list(labels)
    placed[dim] = split[0]
    return Step(source, tuple(placed), True)


def _repeated(axes: Axes, node: fx.Node, source: fx.Node, labels: Labels) -> Step | None:
    repeats = arguments(node)["repeats"]
    if not all(isinstance(r, int) for r in repeats):
        return None
    lead = len(repeats) - len(shape_of(source))
    placed = []
    for dim, size in enumerate(shape_of(source)):
        split = axes.regroup((labels[lead + dim],), (repeats[lead + dim], size))
        if split is None:
            return None
        placed.append(split[1])
    return Step(source, tuple(placed), True)


def forward(axes: Axes, node: fx.Node, labels: Labels) -> Labels | None:
    """From the labels of the input of a view to those of its result; None if `node` is not such an op."""
    name = name_of(node)
    if is_identity(node):
        return labels
    if name == "view":
        return axes.regroup(labels, shape_of(node))
    if name == "permute":
        return tuple(labels[i] for i in permutation(node))
    return None
