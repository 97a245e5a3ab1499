"""Hidden scores replaced by a number: `masked_fill(hide, c)`, `where(keep, s, c)`, in-place or not."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from attnfuse import reasons
from attnfuse.expr import Expr, dense
from attnfuse.passes.graph.aten import arguments, dtype_of, is_tensor, name_of, shape_of, source_of
from attnfuse.passes.graph.constants import constant, rounded
from attnfuse.passes.graph.labels import Labels, same_sizes
from attnfuse.passes.graph.memory import is_mutating, is_stale
from attnfuse.passes.read.idioms.example import Example, NearMiss
from attnfuse.passes.read.reader import Peeled, Reader
from attnfuse.reasons import Reason
from attnfuse.spec import Cast, ReplaceFill, Step, dtype_name


def parts(node: fx.Node) -> tuple[fx.Node, fx.Node, float, bool] | Reason | None:
    """(x, condition, value, inverted) for where(condition, x, value), or its opposite if inverted."""
    args = arguments(node)
    if name_of(node) == "masked_fill":
        value = constant(args["value"])
        if value is None:
            return reasons.FILL_NOT_CONSTANT()
        return args["self"], args["mask"], value, True
    x, y = args.get("self"), args.get("other")
    if x is None or y is None:
        return None
    for tensor, other, inverted in ((x, y, False), (y, x, True)):
        value = constant(other)
        if is_tensor(tensor) and value is not None and constant(tensor) is None:
            return tensor, args["condition"], value, inverted
    return reasons.WHERE_OF_TENSORS()


def filled(reader: Reader, node: fx.Node, labels: Labels) -> Iterator[Peeled | Reason]:
    """Read masked_fill and where."""
    found = parts(node)
    if found is None or isinstance(found, Reason):
        yield found or reasons.WHERE_WITHOUT_VALUES()
        return
    tensor, condition, value, inverted = found
    if not same_sizes(shape_of(tensor), shape_of(node)):
        yield reasons.FILL_BROADCASTS()
        return
    value = rounded(value, dtype_of(node))
    cast = Cast(dtype_name(dtype_of(node)))
    yield Peeled(tensor, labels, lambda: (replaced(reader, condition, labels, value, inverted), cast))


def replaced(reader: Reader, condition: fx.Node, labels: Labels, value: float, inverted: bool) -> Step:
    """The step that puts `value` where `condition` is false (true if inverted)."""
    return ReplaceFill(mask_of(reader, condition, labels, inverted), value)


def mask_of(reader: Reader, condition: fx.Node, labels: Labels, inverted: bool) -> Expr:
    """A boolean node, broadcast against `labels`, as a mask that keeps where it is true (false if inverted)."""
    leaf = reader.side(condition, labels)
    while (
        name_of(leaf.node) in ("logical_not", "bitwise_not") and not is_mutating(leaf.node) and not is_stale(leaf.node)
    ):
        inverted = not inverted
        leaf = reader.shrink(source_of(leaf.node), leaf.labels)
    return dense(reader.operand(leaf), dtype_name(dtype_of(leaf.node)), inverted)


RULES = {"masked_fill": filled, "where": filled}

EXAMPLES = (
    Example(
        lambda q, k, v, keep: (q @ k.mT).masked_fill(~keep, float("-inf")).softmax(-1) @ v,
        "key padding bool[B, 1, 1, K] else -inf",
    ),
    Example(
        lambda q, k, v, keep: torch.where(keep, q @ k.mT / 2, torch.finfo(torch.float32).min).softmax(-1) @ v,
        "scale 0.5, key padding bool[B, 1, 1, K] else -3.40282e+38",
    ),
    Example(
        lambda q, k, v, keep: torch.where(~keep, torch.full((), -1e9), q @ k.mT).softmax(-1) @ v,
        "key padding bool[B, 1, 1, K] else -1e+09",
    ),
    Example(
        lambda q, k, v: (q @ k.mT).masked_fill(torch.tril(torch.ones(16, 16)) == 0, float("-inf")).softmax(-1) @ v,
        "causal else -inf",
    ),
    Example(
        lambda q, k, v: (
            torch.where(torch.arange(16)[:, None] >= torch.arange(16)[None], q @ k.mT, float("-inf")).softmax(-1) @ v
        ),
        "causal else -inf",
    ),
    Example(
        lambda q, k, v, keep: (q @ k.mT).div_(4.0).masked_fill_(~keep, -1e4).softmax(-1) @ v,
        "scale 0.25, key padding bool[B, 1, 1, K] else -10000",
    ),
)
NEAR_MISSES = (
    NearMiss(lambda q, k, v, added: torch.where(added > 0, q @ k.mT, added).softmax(-1) @ v, reasons.WHERE_OF_TENSORS),
    NearMiss(lambda q, k, v: (lambda s: s.masked_fill(s < 0, -1e9).softmax(-1) @ v)(q @ k.mT), reasons.USED_ELSEWHERE),
)
