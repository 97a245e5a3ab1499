"""Reading q, k and v: tensors behind views, copies, casts and constant factors."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import fx

from attnfuse.passes import limits
from attnfuse.passes.graph import views
from attnfuse.passes.graph.aten import arguments, dtype_of, is_tensor, name_of, shape_of, source_of, value_of
from attnfuse.passes.graph.constants import constant
from attnfuse.passes.graph.labels import Labels, same_sizes
from attnfuse.passes.read.reader import Reader
from attnfuse.passes.site import Leaf

_WIDER = {
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float64),
    (torch.float16, torch.float64),
    (torch.float32, torch.float64),
}


def read_factor(reader: Reader, node: fx.Node, labels: Labels, dtype: torch.dtype) -> tuple[Leaf, float]:
    """q, k or v behind copies, exact casts and constant factors: the leaf, and the factor to multiply by."""
    factor = 1.0
    leaf = reader.shrink(node, labels)
    for _ in range(limits.FACTORS):
        # constant factors and widening casts are looked for behind views, and taken only if they are there
        kept, seen, at = dict(reader.axes.parts), leaf.node, leaf.labels
        while True:
            passed = constant_factor(seen)
            if passed is not None and reader.exact and abs(passed[1]) != 1.0:
                passed = None
            if passed is not None or _is_widening(seen):
                break
            step = views.back(reader.axes, seen, at)
            if step is None or not reader.whole() or not reader.passable(seen):
                break
            seen, at = step.source, step.labels
        may_pass = reader.passable(seen) and reader.whole()
        if passed is not None and may_pass:
            factor *= passed[1]
            leaf = reader.shrink(passed[0], at)
        elif may_pass and _is_widening(seen):
            leaf = reader.shrink(source_of(seen), at)
        else:
            reader.axes.parts = kept
            break
    return leaf, factor


def read_value(reader: Reader, node: fx.Node, labels: Labels, dtype: torch.dtype) -> tuple[Leaf, float]:
    """v behind copies, exact casts and constant factors, in `dtype` at most."""
    leaf, factor = read_factor(reader, node, labels, dtype)
    return _in_dtype(leaf, dtype), factor


def one_dtype(q: Leaf, k: Leaf, dtype: torch.dtype) -> tuple[Leaf, Leaf]:
    """Both sides in one dtype: their own if it is the same and exact in the product's, else the product's."""
    q, k = _in_dtype(q, dtype), _in_dtype(k, dtype)
    if q.given == k.given:
        return q, k
    q, k = (x if dtype_of(x.node) == dtype else replace(x, cast=dtype) for x in (q, k))
    return q, k


def _in_dtype(leaf: Leaf, dtype: torch.dtype) -> Leaf:
    own = dtype_of(leaf.node)
    exact = own == dtype or (own, dtype) in _WIDER
    return leaf if exact else replace(leaf, cast=dtype)


def _is_widening(node: fx.Node) -> bool:
    return (
        name_of(node) == "to"
        and is_tensor(node.args[0])
        and (dtype_of(node.args[0]), dtype_of(node)) in _WIDER
        and value_of(node.args[0]).device == value_of(node).device
    )


def constant_factor(node: fx.Node) -> tuple[fx.Node, float] | None:
    """(x, c) if node is x * c for a finite number c, without change of dtype."""
    name = name_of(node)
    if name not in ("mul", "div", "neg"):
        return None
    if name == "neg":
        return (node.args[0], -1.0) if is_tensor(node.args[0]) else None
    args = arguments(node)
    if args.get("rounding_mode") is not None:
        return None
    a, b = args["self"], args["other"]
    pairs = [(a, b)] if name == "div" else [(a, b), (b, a)]
    for tensor, other in pairs:
        number = constant(other)
        if not is_tensor(tensor) or number is None or constant(tensor) is not None:
            continue
        if dtype_of(tensor) != dtype_of(node) or not same_sizes(shape_of(tensor), shape_of(node)):
            continue
        if name == "div":
            if number == 0.0:
                continue
            number = 1.0 / number
        if math.isfinite(number):
            return tensor, float(number)
    return None
