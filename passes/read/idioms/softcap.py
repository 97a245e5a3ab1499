"""Bounded scores: `tanh(s / c) * c`, `clamp(s, low, high)`."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import fx

from attnfuse import reasons
from attnfuse.passes.graph.aten import arguments, is_tensor, name_of
from attnfuse.passes.graph.constants import constant
from attnfuse.passes.graph.labels import Labels
from attnfuse.passes.read.idioms.example import Example, NearMiss
from attnfuse.passes.read.reader import Peeled, Reader
from attnfuse.reasons import Reason
from attnfuse.spec import Clamp, Tanh


def bounded(reader: Reader, node: fx.Node, labels: Labels) -> Iterator[Peeled | Reason]:
    """Read tanh, clamp, clamp_min and clamp_max."""
    source = node.args[0]
    if not is_tensor(source):
        return
    if name_of(node) == "tanh":
        yield Peeled(source, labels, lambda: (Tanh(),))
        return
    args = arguments(node)
    bounds = []
    for name, default in (("min", -math.inf), ("max", math.inf)):
        bound = args.get(name)
        number = default if bound is None else constant(bound)
        if number is None:
            yield reasons.CLAMP_NOT_CONSTANT()
            return
        bounds.append(float(number))
    if not bounds[0] <= bounds[1]:
        # every score is then the greatest one allowed (or NaN), without a gradient
        yield reasons.CLAMP_OUT_OF_ORDER()
        return
    yield Peeled(source, labels, lambda: (Clamp(*bounds),))


RULES = {"tanh": bounded, "clamp": bounded, "clamp_min": bounded, "clamp_max": bounded}

EXAMPLES = (
    Example(lambda q, k, v: (torch.tanh(q @ k.mT / 50) * 50).softmax(-1) @ v, "softcap 50"),
    Example(lambda q, k, v: (q @ k.mT).tanh().softmax(-1) @ v, "tanh"),
    Example(lambda q, k, v: (q @ k.mT).clamp(-5, 5).softmax(-1) @ v, "clamp [-5, 5]"),
    Example(lambda q, k, v: (q @ k.mT).clamp_min(-5).softmax(-1) @ v, "clamp [-5, inf]"),
)
NEAR_MISSES = (
    NearMiss(lambda q, k, v: (q @ k.mT).sigmoid().softmax(-1) @ v, reasons.UNREAD_ON_SCORES),
    NearMiss(lambda q, k, v: (q @ k.mT).relu().softmax(-1) @ v, reasons.UNREAD_ON_SCORES),
    NearMiss(lambda q, k, v: (q @ k.mT).clamp(2, -1).softmax(-1) @ v, reasons.CLAMP_OUT_OF_ORDER),
    NearMiss(lambda q, k, v: (q @ k.mT).pow(2).softmax(-1) @ v, reasons.UNREAD_ON_SCORES),
)
