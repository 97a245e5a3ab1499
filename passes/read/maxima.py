"""The maximum of each row of scores, subtracted before the exponential, as softmax does it in code."""

from __future__ import annotations

from torch import fx

from attnfuse.passes.graph import views
from attnfuse.passes.graph.aten import arguments, getitem_source, is_tensor, name_of, shape_of, source_of, value_of
from attnfuse.passes.graph.constants import constant
from attnfuse.passes.graph.labels import known_equal
from attnfuse.passes.graph.memory import is_stale


def maximum_subtracted(z: fx.Node, dim: int, raised: bool = False) -> tuple[fx.Node, frozenset[fx.Node]] | None:
    """(scores, nodes passed) if z = scores - max(scores, dim, keepdim=True), the maximum detached or not.

    raised: the larger of that maximum and something else will do.
    """
    if name_of(z) != "sub":
        return None
    args = arguments(z)
    scores, top = args["self"], args["other"]
    if not (is_tensor(scores) and is_tensor(top)) or constant(args.get("alpha", 1)) != 1.0:
        return None
    passed = {z}
    if not has_lines(top, scores, dim, kept=True):
        return None
    viewed = without_views(top, scores, dim)
    while viewed is not None and (name_of(viewed[0]) in ("detach", "alias") or (raised and raises(viewed[0]))):
        top = viewed[0]
        passed |= viewed[1] | {top}
        # of two, the one that is the maximum, be it seen through views
        sources = [x for x in top.all_input_nodes if _is_maximum(_looked_through(x))]
        viewed = without_views(sources[0] if sources else top.args[0], scores, dim)
    if viewed is None:
        return None
    top = viewed[0]
    passed |= viewed[1]
    pair = getitem_source(top)
    if pair is not None and pair[1] == 0:
        passed.add(top)
        top = pair[0]
    if name_of(top) not in ("amax", "max"):
        return None
    passed.add(top)
    reduced = arguments(top)
    source, over = reduced["self"], reduced.get("dim")
    while is_tensor(source) and name_of(source) in ("detach", "alias") and source is not scores:
        passed.add(source)
        source = source.args[0]
    over = list(over) if isinstance(over, (list, tuple)) else [over]
    rank = len(value_of(scores).shape)
    if source is not scores or len(over) != 1 or over[0] is None:
        return None
    return (scores, frozenset(passed)) if over[0] % rank == dim % rank else None


def has_lines(node: fx.Node, whole: fx.Node, dim: int, kept: bool) -> bool:
    """Whether `node` has one element for each line of `whole` along `dim`: its shape has 1 there, or, unless kept, no such dim."""
    lines = list(shape_of(whole))
    if not lines:
        return False
    dim %= len(lines)
    shapes = [[*lines[:dim], 1, *lines[dim + 1 :]], lines[:dim] + lines[dim + 1 :]]
    own = shape_of(node)
    return any(len(own) == len(s) and all(map(known_equal, own, s)) for s in (shapes[:1] if kept else shapes))


def without_views(node: object, whole: fx.Node, dim: int) -> tuple[fx.Node, set[fx.Node]] | None:
    """(what `node` is a view of, nodes passed) as long as it has an element for each line of `whole`; None where it has not.

    Views keep the order of elements, so that shapes alone tell that they are those of the same lines.
    """
    passed: set[fx.Node] = set()
    while is_tensor(node) and has_lines(node, whole, dim, kept=False):
        at: fx.Node = node
        moves = name_of(at) == "view" or (views.is_identity(at) and name_of(at) != "alias")
        if is_stale(at) or not moves:
            return at, passed
        passed.add(at)
        node = at.args[0]
    return None


def _looked_through(node: fx.Node) -> fx.Node:
    while name_of(node) == "view" and is_tensor(node.args[0]):
        node = source_of(node)
    return node


def raises(node: fx.Node) -> bool:
    """Whether it gives the larger of its argument and something else."""
    if name_of(node) == "clamp":
        return arguments(node).get("max") is None
    return name_of(node) in ("relu", "maximum", "clamp_min")


def _is_maximum(node: fx.Node) -> bool:
    return name_of(node) == "amax" or getitem_source(node) is not None
