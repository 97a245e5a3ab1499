"""Anchors whose softmax sums over one score more than there are keys: concatenated or padded, or added to the sum.

softmax(cat([s, sink], -1))[..., :-1]        softmax(pad(s, (1, 0)))[..., 1:]
exp(s) / (c + exp(s).sum())                  exp(s - m) / (exp(sink - m) + exp(s - m).sum())
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from attnfuse.passes import limits
from attnfuse.passes.capture.view import View
from attnfuse.passes.graph import moves, views
from attnfuse.passes.graph.aten import arguments, dtype_of, is_tensor, name_of, shape_of, source_of
from attnfuse.passes.graph.constants import constant
from attnfuse.passes.graph.labels import is_one, known_equal
from attnfuse.passes.graph.memory import is_stale
from attnfuse.passes.graph.moves import Slice
from attnfuse.passes.read.maxima import maximum_subtracted


@dataclass(frozen=True)
class Joined:
    """scores with one more score: a tensor whose size in that dim is 1, or a number; first: it comes before them."""

    scores: fx.Node
    sink: fx.Node | float
    first: bool
    inside: frozenset[fx.Node]


def joined(node: fx.Node, dim: int) -> Joined | None:
    """What `node` is made of, if that is scores with one more along `dim`, looked through casts and a subtracted maximum."""
    inside: set[fx.Node] = set()
    for _ in range(limits.CASTS):
        less = maximum_subtracted(node, dim)
        if less is not None:
            inside |= less[1]
            node = less[0]
        elif _is_cast(node) or (views.is_identity(node) and is_tensor(node.args[0])):
            inside.add(node)
            node = source_of(node)
        else:
            break
    if is_stale(node):
        return None
    found = _concatenated(node, dim) if name_of(node) == "cat" else _padded(node, dim)
    return found and replace(found, inside=frozenset(inside | found.inside))


def _is_cast(node: fx.Node) -> bool:
    # a float16 may hold infinities that the sink's own dtype has not
    return (
        name_of(node) == "to"
        and is_tensor(node.args[0])
        and dtype_of(node) in (torch.float32, torch.float64, torch.bfloat16)
        and dtype_of(node.args[0]).is_floating_point
    )


def _concatenated(node: fx.Node, dim: int) -> Joined | None:
    args = arguments(node)
    parts, rank = args["tensors"], len(shape_of(node))
    if args["dim"] % rank != dim % rank or len(parts) != 2 or not all(map(is_tensor, parts)):
        return None
    for first in (False, True):
        sink, scores = parts if first else parts[::-1]
        # one key and one sink look alike: what is cut off afterwards tells
        if is_one(shape_of(sink)[dim]) and not is_one(shape_of(scores)[dim]):
            number = constant(sink)
            return Joined(scores, sink if number is None else float(number), first, frozenset({node}))
    return None


def _padded(node: fx.Node, dim: int) -> Joined | None:
    if name_of(node) not in ("constant_pad_nd", "pad"):
        return None
    args = arguments(node)
    number = constant(args["value"] or 0.0)
    if args.get("mode", "constant") != "constant" or dim % len(shape_of(node)) != len(shape_of(node)) - 1:
        return None
    pads = [constant(x) for x in args["pad"]]
    if number is None or set(pads[:2]) != {0, 1} or any(x != 0.0 for x in pads[2:]):
        return None
    return Joined(args["self"], float(number), pads[0] == 1, frozenset({node}))


def cut_off(view: View, weights: fx.Node, dim: int, first: bool) -> tuple[fx.Node, frozenset[fx.Node]] | None:
    """(the weights without the first or last one along `dim`, nodes passed), if nothing else is done with them but casts."""
    inside: set[fx.Node] = set()
    node = weights
    for _ in range(limits.CASTS):
        users = [u for u in node.users if u in view.live]
        if len(users) != 1:
            return None
        inside.add(node)
        user = users[0]
        if _drops_one(user, node, dim, first):
            return user, frozenset(inside | {user})
        cast = name_of(user) == "to" and dtype_of(user).is_floating_point
        if not cast and not views.is_identity(user):
            return None
        node = user
    return None


def _drops_one(cut: fx.Node, source: fx.Node, dim: int, first: bool) -> bool:
    found, own = moves.dim_map(cut), shape_of(source)
    at = dim % len(own)
    if found is None or found.fixed or len(found.dims) != len(own) or not known_equal(found.shape[at] + 1, own[at]):
        return False
    taken = found.dims[at]
    return isinstance(taken, Slice) and taken.step == 1 and known_equal(taken.start, 1 if first else 0)


def added(total: fx.Node, shift: fx.Node | None) -> tuple[fx.Node | float, frozenset[fx.Node]] | None:
    """(sink, nodes passed) for sum + exp(sink - shift) or, without a shift, sum + a number."""
    if name_of(total) != "add":
        return None
    args = arguments(total)
    if constant(args.get("alpha", 1)) != 1.0:
        return None
    for own, more in ((args["self"], args["other"]), (args["other"], args["self"])):
        if not is_tensor(own) or name_of(own) != "sum":
            continue
        number = constant(more)
        if number is not None:
            # relative to a maximum that the scores have, a number is no sink of its own
            return (math.log(number), frozenset({total})) if shift is None and number > 0.0 else None
        # without a shift exp of it may be infinite by itself
        sink = None if shift is None else _exponent(more, shift)
        if sink is not None:
            return sink[0], frozenset({total}) | sink[1]
    return None


def _exponent(node: Any, shift: fx.Node) -> tuple[fx.Node | float, frozenset[fx.Node]] | None:
    if not is_tensor(node) or name_of(node) != "exp":
        return None
    power = source_of(node)
    if name_of(power) == "neg" and power.args[0] is shift:
        return 0.0, frozenset({node, power})
    if name_of(power) != "sub":
        return None
    args = arguments(power)
    if args["other"] is not shift or constant(args.get("alpha", 1)) != 1.0:
        return None
    number = constant(args["self"])
    return (args["self"] if number is None else float(number)), frozenset({node, power})
