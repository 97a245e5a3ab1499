"""View -> anchors: softmax in any spelling, and calls that are attention already."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from torch import fx

from attnfuse import reasons
from attnfuse.passes import limits
from attnfuse.passes.capture.view import View
from attnfuse.passes.graph import contraction
from attnfuse.passes.graph.aten import arguments, is_tensor, name_of, shape_of, source_of, value_of
from attnfuse.passes.graph.constants import constant
from attnfuse.passes.graph.labels import known_equal, same_sizes
from attnfuse.passes.read import sinks
from attnfuse.passes.read.maxima import has_lines, maximum_subtracted, raises, without_views
from attnfuse.reasons import Reason
from attnfuse.spec import Hidden, Softmax


@dataclass(frozen=True)
class Anchor:
    """A softmax over `dim` of `scores`, giving `weights`; with `late`, weights are unnormalised and `total` divides later.

    inside: the nodes between scores and weights, both excluded from what others may use.
    sink: one more score in the sum, a tensor of size 1 in `dim`, or a number.
    problem: why it cannot be read after all.
    """

    scores: fx.Node
    dim: int
    weights: fx.Node
    inside: frozenset[fx.Node]
    softmax: Softmax = "plain"
    hidden: Hidden = "nan"
    kind: Literal["softmax", "late", "sdpa"] = "softmax"
    total: fx.Node | None = None
    sink: fx.Node | float | None = None
    problem: Reason | None = None
    by_log_sum_exp: bool = False
    by_own_maximum: bool = False


def find(view: View, failed: Callable[[fx.Node, Exception], None] | None = None) -> list[Anchor]:
    """All anchors among the live nodes, in program order.

    failed: called with a node and what was raised over it, which then costs that node alone.
    """
    anchors = []
    for node in view.graph.nodes:
        if node in view.live and node.op == "call_function":
            try:
                anchor = _anchor(view, node)
                if anchor is not None:
                    anchors.append(_with_sink(view, anchor))
            except Exception as error:
                if failed is None:
                    raise
                failed(node, error)
    # the softmax inside of a safe one is no anchor of its own
    safe = [a for a in anchors if name_of(a.weights) == "where"]
    within = {node for a in safe for node in a.inside}
    return [a for a in anchors if a in safe or a.weights not in within]


def _anchor(view: View, node: fx.Node) -> Anchor | None:
    name = name_of(node)
    if name == "scaled_dot_product_attention":
        return Anchor(node, -1, node, frozenset({node}), kind="sdpa", hidden="zero")
    if name in ("softmax", "_safe_softmax"):
        args = arguments(node)
        hidden: Hidden = "zero" if name == "_safe_softmax" else "nan"
        return Anchor(args["self"], args["dim"], node, frozenset({node}), hidden=hidden)
    if name == "exp":
        return _exponential(view, node)
    if name == "div":
        return _quotient(node)
    if name == "mul":
        return _product(node)
    if name == "where":
        return _zero_for_hidden_rows(node)
    return None


def _with_sink(view: View, anchor: Anchor) -> Anchor:
    """The anchor without the sink among its scores, if there is one and its weight is cut off."""
    if anchor.kind != "softmax" or anchor.sink is not None:
        return anchor
    found = sinks.joined(anchor.scores, anchor.dim)
    cut = found and sinks.cut_off(view, anchor.weights, anchor.dim, found.first)
    if not found or not cut:
        return anchor
    inside = anchor.inside | found.inside | cut[1]
    return replace(anchor, scores=found.scores, weights=cut[0], inside=inside, sink=found.sink)


def _zero_for_hidden_rows(node: fx.Node) -> Anchor | None:
    """where(every score of the row is -inf, 0, softmax(scores)): what torch makes of _safe_softmax, and of sdpa with it."""
    if len(node.args) != 3 or not all(map(is_tensor, node.args)):
        return None
    row, zero, weights = cast("tuple[fx.Node, fx.Node, fx.Node]", node.args)
    if name_of(weights) != "softmax" or constant(zero) != 0.0:
        return None
    soft = arguments(weights)
    passed: set[Any] = {node, weights}
    if weights in zero.all_input_nodes:
        passed.add(zero)
    # every one is, or not any one is not
    parts = ("all", "eq") if name_of(row) == "all" else ("logical_not", "any", "logical_not", "eq")
    at: Any = row
    for part in parts:
        if not is_tensor(at) or name_of(at) != part:
            return None
        args = arguments(at)
        if part in ("any", "all") and (args.get("dim") != soft["dim"] or not args.get("keepdim")):
            return None
        passed.add(at)
        at, last = args["self"], args
    if at is not soft["self"] or constant(last["other"]) != -math.inf:
        return None
    return Anchor(at, soft["dim"], node, frozenset(passed), hidden="zero")


def _exponential(view: View, node: fx.Node) -> Anchor | None:
    """exp(log_softmax(s)) and exp(s - logsumexp(s))."""
    source = node.args[0]
    if not is_tensor(source):
        return None
    if name_of(source) == "log_softmax":
        args = arguments(source)
        return Anchor(args["self"], args["dim"], node, frozenset({node, source}))
    if name_of(source) == "sub":
        args = arguments(source)
        norm, scores = args["other"], args["self"]
        if is_tensor(norm) and name_of(norm) == "logsumexp" and constant(args.get("alpha", 1)) == 1.0:
            normed = arguments(norm)
            if normed["self"] is scores and normed["keepdim"] and len(normed["dim"]) == 1:
                inside = frozenset({node, source, norm})
                return Anchor(scores, normed["dim"][0], node, inside, by_log_sum_exp=True)
    return None


def _quotient(node: fx.Node) -> Anchor | None:
    args = arguments(node)
    if args.get("rounding_mode") is not None:
        return None
    return _normalised(node, args["self"], args["other"], frozenset({node}))


def _product(node: fx.Node) -> Anchor | None:
    """e * reciprocal(sum(e)), either way round."""
    for a, b in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
        if is_tensor(b) and name_of(b) == "reciprocal":
            found = _normalised(node, a, b.args[0], frozenset({node, b}))
            if found is not None:
                return found
    return None


def _normalised(node: fx.Node, top: object, bottom: object, inside: frozenset[fx.Node]) -> Anchor | None:
    """exp(..) / sum(exp(..)), or exp(..) @ v / sum(exp(..))."""
    if not (is_tensor(top) and is_tensor(bottom)):
        return None
    passed: set[fx.Node] = set()
    total: fx.Node = bottom
    while name_of(total) in ("view", "permute", "expand", "to") and is_tensor(total.args[0]):
        if not value_of(total).dtype.is_floating_point:
            return None
        passed.add(total)
        total = source_of(total)
    whole, sink = total, None
    if name_of(whole) == "add":
        total = next((x for x in whole.all_input_nodes if name_of(x) == "sum"), whole)
    if name_of(total) != "sum":
        return None
    summed = arguments(total)
    e, dims = summed["self"], summed.get("dim")
    if not (is_tensor(e) and name_of(e) == "exp" and dims is not None and len(dims) == 1):
        return None
    if summed.get("dtype") is not None and summed["dtype"] != value_of(e).dtype:
        return None
    dim = dims[0]
    between = inside | passed | {total, e}
    if is_tensor(top) and name_of(top) == "exp" and source_of(top) is source_of(e):
        # the same exponentials, computed once more
        between |= {top}
        top = e
    raised = True
    scores, softmax, more = _unshifted(source_of(e), dim, raised=whole is not total)
    if whole is not total:
        found = sinks.added(whole, None if softmax == "unshifted" else arguments(source_of(e))["other"])
        if found is None or not summed["keepdim"] or not same_sizes(shape_of(whole), shape_of(total)):
            return Anchor(scores, dim, node, between | more, problem=reasons.DENOMINATOR_TERM())
        sink, more = found[0], more | found[1]
        raised = any(raises(n) for n in more)
    if top is e:
        # the sum may get its dim back by a view, or be expanded
        line = source_of(bottom) if name_of(bottom) == "expand" else bottom
        viewed = without_views(line, e, dim) if has_lines(line, e, dim, kept=True) else None
        if viewed is None or viewed[0] is not whole:
            return Anchor(scores, dim, node, between | more, problem=reasons.DENOMINATOR_UNREAD())
        return Anchor(scores, dim, node, between | more, softmax=softmax, sink=sink, by_own_maximum=not raised)
    if _reaches_product_of(top, e):
        return Anchor(
            scores,
            dim,
            e,
            between | more,
            softmax=softmax,
            kind="late",
            total=total,
            sink=sink,
            by_own_maximum=not raised,
        )
    return None


def _reaches_product_of(node: fx.Node, e: fx.Node) -> bool:
    """Whether node, looked through casts and views, is a product with e."""
    for _ in range(limits.CASTS):
        product = contraction.parse(node)
        if isinstance(product, contraction.Contraction):
            return any(_behind_views(x) is e for x in (product.a, product.b))
        if name_of(node) not in ("view", "permute", "to", "clone", "contiguous") or not is_tensor(node.args[0]):
            return False
        node = source_of(node)
    return False


def _behind_views(node: fx.Node) -> fx.Node:
    while name_of(node) in ("view", "permute", "to", "dropout") and is_tensor(node.args[0]):
        node = source_of(node)
    return node


def _unshifted(z: fx.Node, dim: int, raised: bool) -> tuple[fx.Node, Softmax, frozenset[fx.Node]]:
    """(scores, kind, nodes passed) for z = scores - max(scores) or z = scores."""
    found = maximum_subtracted(z, dim, raised)
    if found is not None:
        scores, passed = found
        return scores, "plain", passed
    return z, "unshifted", frozenset()


def looks_like_attention(view: View, anchor: Anchor) -> bool:
    """Whether a product of two computed tensors lies before the softmax and another after it.

    Only used to decide whether a refusal is worth reporting: a classifier's softmax is not.
    """
    if anchor.kind == "sdpa":
        return True
    return _meets_product(anchor.scores, back=True) and _meets_product(anchor.weights, back=False)


BARRIERS = ("layer_norm", "rms_norm", "group_norm", "embedding", "topk", "sort", "linear", "convolution", "conv2d")


def _meets_product(start: fx.Node, back: bool) -> bool:
    queue, seen = deque([(start, 0)]), {start}
    while queue:
        node, depth = queue.popleft()
        if (back or node is not start) and (name_of(node) in contraction.NAMES or _sums_products(node)):
            return True
        if depth > limits.NEARBY_OPS or name_of(node) in BARRIERS:
            continue
        for other in node.all_input_nodes if back else node.users:
            if other not in seen:
                seen.add(other)
                queue.append((other, depth + 1))
    return False


def _sums_products(node: fx.Node) -> bool:
    """(a[..., :, None, :] * b[..., None, :, :]).sum(dim): a product of matrices, written out."""
    source = node.args[0] if name_of(node) == "sum" and node.args else None
    if not is_tensor(source) or name_of(source) != "mul":
        return False
    shape = shape_of(source)
    factors = [shape_of(x) for x in source.args if is_tensor(x)]
    # neither has the whole shape: both are repeated
    return len(factors) == 2 and all(
        len(own) == len(shape) and not all(map(known_equal, own, shape)) for own in factors
    )
