"""Scores held in another dtype: `softmax(s.float())`, `.to(q.dtype)`, `.half()`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from attnfuse import reasons
from attnfuse.passes.graph.aten import dtype_of, is_tensor, value_of
from attnfuse.passes.graph.labels import Labels
from attnfuse.passes.read.idioms.example import Example, NearMiss
from attnfuse.passes.read.reader import Peeled, Reader
from attnfuse.reasons import Reason
from attnfuse.spec import Cast, dtype_name


def cast(reader: Reader, node: fx.Node, labels: Labels) -> Iterator[Peeled | Reason]:
    """Read to, float, half, bfloat16 and type_as between floating dtypes on one device."""
    source = node.args[0]
    if not is_tensor(source):
        return
    if not (dtype_of(source).is_floating_point and dtype_of(node).is_floating_point):
        yield reasons.SCORES_NOT_FLOATING()
        return
    if value_of(source).device != value_of(node).device:
        yield reasons.SCORES_MOVED()
        return
    yield Peeled(source, labels, lambda: (Cast(dtype_name(dtype_of(node))),))


RULES = {"to": cast}

EXAMPLES = (
    Example(
        lambda q, k, v: (q.bfloat16() @ k.bfloat16().mT).softmax(-1, dtype=torch.float32).bfloat16() @ v.bfloat16(),
        "plain",
    ),
    Example(lambda q, k, v: (q.half().float() @ k.half().float().mT).softmax(-1).half() @ v.half(), "plain"),
    Example(lambda q, k, v: (q.half() @ k.half().mT).float().softmax(-1) @ v, "in float16"),
)
NEAR_MISSES = (NearMiss(lambda q, k, v: (q @ k.mT).int().float().softmax(-1) @ v, reasons.SCORES_NOT_FLOATING),)
