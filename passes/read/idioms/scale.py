"""Factors on the scores: `s * c`, `s / c`, `-s`, `s * temperature`, a 0-d tensor or symbolic number as the factor."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import fx

from attnfuse import reasons
from attnfuse.passes.graph.aten import arguments, dtype_of, is_tensor, name_of, shape_of, value_of
from attnfuse.passes.graph.labels import Labels, same_sizes
from attnfuse.passes.read.idioms.example import Example, NearMiss
from attnfuse.passes.read.operands import constant_factor
from attnfuse.passes.read.reader import Peeled, Reader
from attnfuse.passes.site import Leaf
from attnfuse.reasons import Reason
from attnfuse.spec import Scale


def score_factor(reader: Reader, node: fx.Node, labels: Labels) -> Iterator[Peeled | Reason]:
    """Read mul, div and neg."""
    found = constant_factor(node)
    if found is not None:
        tensor, number = found
        yield Peeled(tensor, labels, lambda: (Scale(number),))
        return
    if name_of(node) == "neg":
        return
    args = arguments(node)
    if args.get("rounding_mode") is not None:
        yield reasons.DIVIDED_WITH_ROUNDING()
        return
    divides = name_of(node) == "div"
    pairs = [(args["self"], args["other"])]
    if not divides:
        pairs.append((args["other"], args["self"]))
    for tensor, other in pairs:
        if not is_tensor(tensor) or not isinstance(other, fx.Node):
            continue
        if not same_sizes(shape_of(tensor), shape_of(node)):
            continue
        yield Peeled(tensor, labels, functools.partial(_times, reader, other, labels, divides))


def _times(reader: Reader, other: fx.Node, labels: Labels, divides: bool) -> tuple[Scale, ...]:
    if isinstance(value_of(other), torch.Tensor):
        leaf = reader.side(other, labels)
        if divides:
            # the quotient is rounded once: the reciprocal of a half, or of an integer, must not be rounded to its dtype
            exact = dtype_of(leaf.node) in (torch.float32, torch.float64)
            leaf = replace(leaf, inverse=True, cast=None if exact else torch.float32)
    else:
        leaf = Leaf(other, (), inverse=divides, number=True)
    return (Scale(operand=reader.operand(leaf)),)


RULES = {"mul": score_factor, "div": score_factor, "neg": score_factor}

EXAMPLES = (
    Example(lambda q, k, v: (q @ k.mT * 0.25).softmax(-1) @ v, "scale 0.25"),
    Example(lambda q, k, v: (q @ k.mT / math.sqrt(16)).softmax(-1) @ v, "scale 0.25"),
    Example(lambda q, k, v: ((q * 0.25) @ k.mT).softmax(-1) @ v, "scale 0.25"),
    Example(lambda q, k, v: ((q * 0.5) @ (k * 0.5).mT).softmax(-1) @ v, "scale 0.25"),
    Example(lambda q, k, v: (q @ (k.mT / 4)).softmax(-1) @ v, "scale 0.25"),
    Example(lambda q, k, v: (-(q @ k.mT)).softmax(-1) @ v, "scale -1"),
    Example(lambda q, k, v: (q @ k.mT / torch.sqrt(torch.tensor(16.0))).softmax(-1) @ v, "scale 0.25"),
    Example(lambda q, k, v, temperature: (q @ k.mT * temperature).softmax(-1) @ v, "times operand 0"),
    Example(
        lambda q, k, v, keep: (q @ k.mT / (1 + keep.long().sum(-1, keepdim=True))).softmax(-1) @ v, "times operand 0"
    ),
    # what is divided by a query is no factor of it
    Example(lambda q, k, v: ((torch.full((), 4.0) / (q.abs() + 1)) @ k.mT).softmax(-1) @ v, "plain"),
)
NEAR_MISSES = (
    NearMiss(lambda q, k, v: (lambda s: (s * s).softmax(-1) @ v)(q @ k.mT), reasons.USED_ELSEWHERE),
    NearMiss(lambda q, k, v: (q @ k.mT).div(4, rounding_mode="floor").softmax(-1) @ v, reasons.DIVIDED_WITH_ROUNDING),
    NearMiss(lambda q, k, v: (torch.full((), 4.0) / (q @ k.mT)).softmax(-1) @ v, reasons.UNREAD_ON_SCORES),
)
