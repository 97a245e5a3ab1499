"""Masks that depend only on k - q: tril, triu and comparisons of two aranges, through pointwise ops on constants."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from attnfuse._compat import OpOverload
from attnfuse.mask import Causal
from attnfuse.passes import views
from attnfuse.passes.aten import arguments, constant, is_tensor, name_of
from attnfuse.passes.capture import is_stale, value_of
from attnfuse.passes.labels import Labels
from attnfuse.passes.read import Reader


@dataclass(frozen=True)
class Band:
    """low where k <= q + offset, high elsewhere."""

    offset: int
    low: float
    high: float

    def keep(self, inverted: bool = False) -> Causal:
        """Keeps the low part, or the high one if inverted."""
        return Causal(self.offset, inverted)


_COMPARE = {"eq", "ne", "lt", "le", "gt", "ge"}
_POINTWISE = _COMPARE | {
    "logical_not",
    "bitwise_not",
    "to",
    "mul",
    "add",
    "sub",
    "rsub",
    "neg",
    "where",
    "masked_fill",
    "div",
}


def band_of(reader: Reader, node: fx.Node, labels: Labels, depth: int = 10) -> Band | None:
    """The band that a node with `labels` is, if it runs over exactly the queries and the keys."""
    if depth == 0 or not is_tensor(node) or is_stale(node):
        return None
    axes = reader.axes
    q_dim, k_dim = _rows(reader), axes.atoms(reader.k_dim)
    flat = [a for dim in axes.resolve(labels) for a in dim]
    if not q_dim or flat != [*q_dim, *k_dim]:
        return None
    name = name_of(node)
    args = arguments(node) if isinstance(node.target, OpOverload) else {}
    if name in ("tril", "triu") and isinstance(args["diagonal"], int):
        value = constant(args["self"])
        if value is None:
            return None
        diagonal = args["diagonal"]
        return Band(diagonal, value, 0.0) if name == "tril" else Band(diagonal - 1, 0.0, value)
    if name in _COMPARE:
        found = _compared(reader, node, labels)
        if found is not None:
            return found
    if name in _POINTWISE:
        return _pointwise(reader, node, labels, depth)
    step = views.back(axes, node, labels)
    return band_of(reader, step.source, step.labels, depth - 1) if step is not None else None


def _rows(reader: Reader) -> tuple[object, ...]:
    return reader.axes.atoms(reader.q_dim)


def _pointwise(reader: Reader, node: fx.Node, labels: Labels, depth: int) -> Band | None:
    """Apply the op to the two values of the one banded argument, all others being constants."""
    offset = None
    values: list[tuple[object, object]] = []
    for x in node.args:
        if is_tensor(x) and constant(x) is None:
            inner = band_of(reader, x, reader.aligned(x, labels), depth - 1)  # type: ignore[arg-type]
            if inner is None or offset not in (None, inner.offset):
                return None
            offset = inner.offset
            dtype = value_of(x).dtype  # type: ignore[arg-type]
            values.append((torch.tensor(inner.low).to(dtype), torch.tensor(inner.high).to(dtype)))
        elif isinstance(x, fx.Node):
            number = constant(x)
            if number is None:
                return None
            item: object = torch.tensor(number).to(value_of(x).dtype) if is_tensor(x) else number
            values.append((item, item))
        else:
            values.append((x, x))
    if offset is None:
        return None
    kwargs = {k: v for k, v in node.kwargs.items() if not isinstance(v, fx.Node)}
    if len(kwargs) != len(node.kwargs):
        return None
    low, high = (node.target(*[v[i] for v in values], **kwargs) for i in (0, 1))  # type: ignore[operator]
    return Band(offset, float(low), float(high))


def _compared(reader: Reader, node: fx.Node, labels: Labels) -> Band | None:
    """arange over keys against arange over queries."""
    a, b = node.args[0], node.args[1]
    if not (is_tensor(a) and is_tensor(b)):
        return None
    first = _line(reader, a, reader.aligned(a, labels))  # type: ignore[arg-type]
    second = _line(reader, b, reader.aligned(b, labels))  # type: ignore[arg-type]
    if first is None or second is None or first[0] == second[0]:
        return None
    name = name_of(node)
    if first[0] == "q":
        first, second = second, first
        name = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}.get(name, name)
    # k + first[1]  <op>  q + second[1]
    offset = second[1] - first[1]
    if name == "le":
        return Band(offset, 1.0, 0.0)
    if name == "lt":
        return Band(offset - 1, 1.0, 0.0)
    if name == "gt":
        return Band(offset, 0.0, 1.0)
    return Band(offset - 1, 0.0, 1.0) if name == "ge" else None


def _line(reader: Reader, node: fx.Node, labels: Labels, depth: int = 8) -> tuple[str, int] | None:
    """('q' or 'k', offset) if node is the index of a query or key plus a number."""
    flat = tuple(a for dim in reader.axes.resolve(labels) for a in dim)
    which = {_rows(reader): "q", reader.axes.atoms(reader.k_dim): "k"}.get(flat) if flat else None
    if which is None or depth == 0 or not is_tensor(node) or is_stale(node):
        return None
    name = name_of(node)
    if name == "arange":
        args = arguments(node)
        start, step = args.get("start", 0), args.get("step", 1)
        return (which, start) if isinstance(start, int) and step == 1 else None
    if name in ("add", "sub"):
        args = arguments(node)
        for x, y in ((args["self"], args["other"]), (args["other"], args["self"])):
            number = constant(y)
            if is_tensor(x) and number is not None and number == int(number) and constant(args["alpha"]) == 1.0:
                inner = _line(reader, x, reader.aligned(x, labels), depth - 1)
                if inner is not None:
                    return which, inner[1] + int(number) * (1 if name == "add" else -1)
            if name == "sub":
                break
        return None
    if name == "to" and value_of(node).dtype not in (torch.int32, torch.int64):
        return None
    step_back = views.back(reader.axes, node, labels)
    if name == "to" and step_back is None:
        return _line(reader, node.args[0], labels, depth - 1)  # type: ignore[arg-type]
    return _line(reader, step_back.source, step_back.labels, depth - 1) if step_back is not None else None
