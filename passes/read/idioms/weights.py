"""From the softmax to the result: casts, dropout, masks on the weights, nan_to_num, the product with v, late division."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import fx

from attnfuse import reasons
from attnfuse.passes import limits
from attnfuse.passes.graph import contraction, views
from attnfuse.passes.graph.aten import (
    arguments,
    dtype_of,
    getitem_source,
    is_tensor,
    name_of,
    shape_of,
    source_of,
    value_of,
)
from attnfuse.passes.graph.constants import constant
from attnfuse.passes.graph.labels import Dim, Labels, insert, is_one, known_equal, same_sizes
from attnfuse.passes.graph.memory import opaque
from attnfuse.passes.read.assemble import build_site
from attnfuse.passes.read.idioms import fill
from attnfuse.passes.read.idioms.example import Example, NearMiss
from attnfuse.passes.read.operands import constant_factor, read_value
from attnfuse.passes.read.reader import Reader, Scores
from attnfuse.passes.site import Leaf, Refusal, Site
from attnfuse.reasons import Reason
from attnfuse.spec import Hidden, ReplaceFill, Scale, Step


@dataclass
class _Path:
    """The weights on their way to the product with v."""

    node: fx.Node
    labels: Labels
    inside: set[fx.Node]
    steps: list[Step] = field(default_factory=list)
    hidden: Hidden = "nan"
    dropout: float = 0.0


def read(reader: Reader, scores: Scores, labels: Labels) -> Site | Refusal:
    """Follow the weights forward from the anchor; labels are those of the scores there."""
    anchor = reader.anchor
    inside = scores.inside | set(anchor.inside)
    path = _Path(anchor.weights, labels, inside, hidden=anchor.hidden)
    for _ in range(limits.WEIGHT_OPS):
        user = _next(reader, path)
        if isinstance(user, Refusal):
            return user
        product = contraction.parse(user)
        if isinstance(product, Reason):
            return Refusal(product, user)
        if product is not None:
            return _finish(reader, scores, path, user, product)
        problem = _advance(reader, path, user)
        if problem is not None:
            return Refusal(problem, user)
        path.inside.add(user)
        path.node = user
    return Refusal(reasons.WEIGHT_PATH_TOO_LONG(), path.node)


def _next(reader: Reader, path: _Path) -> fx.Node | Refusal:
    """The one live node, outside what was read already, that uses the weights."""
    users = [u for u in path.node.users if u in reader.view.live and u not in path.inside]
    if len(users) == 1:
        return users[0]
    if not users:
        return Refusal(reasons.WEIGHTS_WITHOUT_V(), path.node)
    names = ", ".join(sorted(name_of(u) or ("a hook or opaque code" if u.target is opaque else u.op) for u in users))
    return Refusal(reasons.WEIGHTS_USED_TWICE(users=names), path.node)


def _advance(reader: Reader, path: _Path, user: fx.Node) -> Reason | None:
    """Take one op on the weights into `path`; a reason if it cannot be taken."""
    if user.target is opaque:
        return reasons.WEIGHTS_NOT_VIEWABLE()
    name = name_of(user)
    moved = views.forward(reader.axes, user, path.labels)
    if moved is not None:
        if not reader.whole():
            return reasons.VIEW_SPLITS_WEIGHTS()
        path.labels = moved
        return None
    if name == "to":
        ok = dtype_of(user).is_floating_point and value_of(user).device == value_of(path.node).device
        return None if ok else reasons.WEIGHTS_CAST()
    if name == "dropout":
        return _drop(path, float(arguments(user)["p"]))
    if name == "native_dropout":
        args = arguments(user)
        return _drop(path, float(args["p"])) if args["train"] is not False else None
    pair = getitem_source(user)
    if pair is not None and name_of(pair[0]) == "native_dropout" and pair[1] == 0:
        return None
    if path.dropout and name in ("masked_fill", "where", "mul", "div"):
        return reasons.MASKED_AFTER_DROPOUT()
    if name == "nan_to_num":
        args = arguments(user)
        if args.get("nan") not in (None, 0, 0.0) or path.steps:
            return reasons.NAN_TO_NUM_VALUE()
        if reader.exact and reader.view.trains and reader.view.grad.get(user, True):
            return reasons.NAN_TO_NUM_GRADIENT()
        path.hidden = "nan_to_zero"
        return None
    if name in ("masked_fill", "where"):
        return _mask(reader, path, user)
    if name in ("mul", "div"):
        return _multiply(reader, path, user)
    return reasons.UNREAD_ON_WEIGHTS(op=name or user.target)


def _drop(path: _Path, p: float) -> Reason | None:
    if path.dropout:
        return reasons.DROPOUT_TWICE()
    path.dropout = p
    return None


def _mask(reader: Reader, path: _Path, user: fx.Node) -> Reason | None:
    found = fill.parts(user)
    if found is None or isinstance(found, Reason):
        return found or reasons.WHERE_WITHOUT_VALUES()
    tensor, condition, value, inverted = found
    if tensor is not path.node or value != 0.0 or not same_sizes(shape_of(user), shape_of(path.node)):
        return reasons.WEIGHTS_FILLED()
    path.steps.append(ReplaceFill(fill.mask_of(reader, condition, path.labels, inverted), 0.0))
    return None


def _multiply(reader: Reader, path: _Path, user: fx.Node) -> Reason | None:
    found = constant_factor(user)
    if found is not None and found[0] is path.node:
        path.steps.append(Scale(found[1]))
        return None
    args = arguments(user)
    other = args["other"] if args["self"] is path.node else args["self"]
    if name_of(user) == "div" or not is_tensor(other) or other is path.node:
        return reasons.WEIGHTS_FACTOR()
    if not same_sizes(shape_of(user), shape_of(path.node)):
        return reasons.FACTOR_BROADCASTS()
    leaf = reader.side(other, path.labels)
    if not value_of(leaf.node).dtype.is_floating_point:
        return reasons.FACTOR_NOT_FLOATING()
    path.steps.append(Scale(operand=reader.operand(leaf)))
    return None


def _finish(
    reader: Reader, scores: Scores, path: _Path, node: fx.Node, product: contraction.Contraction
) -> Site | Refusal:
    """The product with v."""
    axes = reader.axes
    if product.added is not None or product.alpha != 1.0:
        return Refusal(reasons.RESULT_ADDED_TO(), node)
    if product.a is path.node and product.b is path.node:
        return Refusal(reasons.WEIGHTS_SQUARED(), node)
    p_letters, v_letters = (
        (product.a_dims, product.b_dims) if product.a is path.node else (product.b_dims, product.a_dims)
    )
    v_node = product.b if product.a is path.node else product.a
    dims: dict[str, Dim] = dict(zip(p_letters, path.labels))
    keys = axes.atoms(reader.k_dim)
    summed = product.summed
    if len(summed) != 1 or axes.atoms(dims.get(summed, ())) != keys:
        return Refusal(reasons.NOT_SUMMED_OVER_KEYS(), node)
    if not known_equal(shape_of(v_node)[v_letters.index(summed)], keys[0].size):
        return Refusal(reasons.V_BROADCAST(), node)
    own = [c for c in v_letters if c not in p_letters]
    if len(own) != 1:
        return Refusal(reasons.V_DIMS(count=len(own)), node)
    widened = [
        c for c in v_letters if c in p_letters and not dims[c] and not is_one(shape_of(v_node)[v_letters.index(c)])
    ]
    if widened:
        return Refusal(reasons.V_BATCH(), node)
    e_dim = axes.fresh(shape_of(v_node)[v_letters.index(own[0])])
    dims[own[0]] = e_dim
    reader.protected.append(e_dim)
    labels = tuple(() if is_one(size) else dims[c] for c, size in zip(v_letters, shape_of(v_node)))
    leaf, factor = read_value(reader, v_node, labels, dtype_of(node))
    if factor != 1.0:
        path.steps.append(Scale(factor))
    out_labels = tuple(dims[c] for c in product.out)
    path.inside.add(node)
    final = node
    if reader.anchor.kind == "late":
        late = _divided(reader, path, node, out_labels)
        if isinstance(late, Refusal):
            return late
        final, out_labels = late
        path.inside.add(final)
    return build_site(
        reader, scores, leaf, e_dim, final, out_labels, path.inside, path.steps, path.dropout, path.hidden
    )


def _divided(reader: Reader, path: _Path, node: fx.Node, labels: Labels) -> tuple[fx.Node, Labels] | Refusal:
    """The division of exp(s) @ v by the sum of exp(s), which the anchor promised, over the right dims."""
    anchor = reader.anchor
    if path.dropout or path.steps:
        return Refusal(reasons.DENOMINATOR_LATE_CHANGED(), node)
    for _ in range(limits.LATE_OPS):
        users = [u for u in node.users if u in reader.view.live]
        if len(users) != 1:
            return Refusal(reasons.DENOMINATOR_LATE_USED(), node)
        user = users[0]
        if name_of(user) == "div" and user.args[0] is node:
            break
        moved = views.forward(reader.axes, user, labels)
        if moved is None and not (name_of(user) == "to" and dtype_of(user).is_floating_point):
            return Refusal(reasons.DENOMINATOR_LATE_UNREAD(), user)
        labels = labels if moved is None else moved
        path.inside.add(user)
        node = user
    else:
        return Refusal(reasons.DENOMINATOR_LATE_UNREAD(), node)
    bottom = cast(fx.Node, user.args[1])
    at = reader.aligned(bottom, labels)
    while bottom is not anchor.total:
        step = views.back(reader.axes, bottom, at)
        if step is None:
            if bottom in anchor.inside and name_of(bottom) == "add":
                # a sink in the sum
                assert anchor.total is not None
                bottom = anchor.total
                continue
            if name_of(bottom) != "to" or not dtype_of(bottom).is_floating_point:
                return Refusal(reasons.DENOMINATOR_LATE_UNREAD(), user)
            bottom = source_of(bottom)
            continue
        bottom, at = step.source, step.labels
    args = arguments(bottom)
    rank = len(shape_of(args["self"]))
    dim = args["dim"][0] % rank
    full = (*at[:dim], reader.k_dim, *at[dim + 1 :]) if args["keepdim"] else insert(at, dim, reader.k_dim)
    axes = reader.axes
    start = reader.start
    if axes.resolve(full) != axes.resolve(start):
        return Refusal(reasons.DENOMINATOR_LATE_DIMS(), user)
    if not torch.is_tensor(value_of(user)) or constant(args.get("dtype") or 0) is None:
        return Refusal(reasons.DENOMINATOR_LATE_DTYPE(), user)
    return user, labels


__all__ = ["Leaf", "read"]

EXAMPLES = (
    Example(lambda q, k, v: (q @ k.mT).softmax(-1).to(v.dtype).contiguous() @ v, "plain"),
    Example(lambda q, k, v: torch.nn.functional.dropout((q @ k.mT).softmax(-1), 0.0) @ v, "plain"),
    Example(
        lambda q, k, v, keep: (q @ k.mT).softmax(-1).masked_fill(~keep, 0.0) @ v,
        "weights key padding bool[B, 1, 1, K] else 0",
    ),
    Example(lambda q, k, v, temperature: ((q @ k.mT).softmax(-1) * temperature) @ v, "weights times operand 0"),
    Example(lambda q, k, v: (q @ k.mT).softmax(-1).nan_to_num() @ v, "plain"),
    Example(lambda q, k, v: (q @ k.mT).softmax(-1) @ (v * 2), "weights scale 2"),
)
NEAR_MISSES = (
    NearMiss(lambda q, k, v: (lambda p: p @ v + p.sum())((q @ k.mT).softmax(-1)), reasons.WEIGHTS_USED_TWICE),
    NearMiss(lambda q, k, v: (q @ k.mT).softmax(-1).mT @ v, reasons.NOT_SUMMED_OVER_KEYS),
    NearMiss(lambda q, k, v: (q @ k.mT).softmax(-1).cumsum(-1) @ v, reasons.UNREAD_ON_WEIGHTS),
    NearMiss(lambda q, k, v: (q @ k.mT).softmax(-1).flip(-1) @ v, reasons.UNREAD_ON_WEIGHTS),
    NearMiss(lambda q, k, v: (q @ k.mT).softmax(-1).pow(2) @ v, reasons.UNREAD_ON_WEIGHTS),
    NearMiss(lambda q, k, v: torch.einsum("bhqk,bhld->bhqd", (q @ k.mT).softmax(-1), v), reasons.EINSUM_SUMS_ONE),
    NearMiss(lambda q, k, v: torch.baddbmm(v[0], (q @ k.mT).softmax(-1)[0], v[0]), reasons.UNREAD_ON_WEIGHTS),
)
