"""Scores held in another dtype: `softmax(s.float())`, `.to(q.dtype)`, `.half()`."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from attnfuse.passes.aten import dtype_of, is_tensor
from attnfuse.passes.capture import value_of
from attnfuse.passes.labels import Labels
from attnfuse.passes.read import Peeled, Reader
from attnfuse.spec import Cast, dtype_name


def cast(reader: Reader, node: fx.Node, labels: Labels) -> Iterator[Peeled | str]:
    """Read to, float, half, bfloat16 and type_as between floating dtypes on one device."""
    source = node.args[0]
    if not is_tensor(source):
        return
    if not (dtype_of(source).is_floating_point and dtype_of(node).is_floating_point):  # type: ignore[arg-type]
        yield "the scores are cast to a dtype that is not floating"
        return
    if value_of(source).device != value_of(node).device:  # type: ignore[arg-type]
        yield "the scores move to another device"
        return
    yield Peeled(source, labels, lambda: (Cast(dtype_name(dtype_of(node))),))  # type: ignore[arg-type]


RULES = {"to": cast}
