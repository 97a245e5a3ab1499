"""Reading single ATen nodes: their value, name and arguments, whichever overload or alias was used."""

from __future__ import annotations

import operator
from typing import Any, TypeGuard, cast

import torch
from torch import fx

from attnfuse._compat import OpOverload
from attnfuse.passes.graph.vocabulary import kind


def value_of(node: fx.Node) -> Any:
    """The fake value of an ATen node."""
    return node.meta.get("val")


def getitem_source(node: fx.Node) -> tuple[fx.Node, Any] | None:
    """(sequence node, index) of an operator.getitem node."""
    if node.op == "call_function" and node.target is operator.getitem:
        return source_of(node), node.args[1]
    return None


def name_of(node: fx.Node) -> str:
    """What the node's op does, as `vocabulary.kind` names it; '' if it is no op of ATen."""
    target = node.target
    return kind(target) if node.op == "call_function" and isinstance(target, OpOverload) else ""


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments by their schema name, defaults included."""
    assert isinstance(node.target, OpOverload)
    schema = node.target._schema
    found = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    found.update({a.name: v for a, v in zip(schema.arguments, node.args)})
    found.update(node.kwargs)
    return found


def source_of(node: fx.Node) -> fx.Node:
    """The first argument of an op, where it is a node."""
    return cast(fx.Node, node.args[0])


def is_tensor(x: Any) -> TypeGuard[fx.Node]:
    """Whether it is a node that holds a tensor."""
    return isinstance(x, fx.Node) and isinstance(value_of(x), torch.Tensor)


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    return tuple(value_of(node).shape)


def dtype_of(node: fx.Node) -> torch.dtype:
    dtype: torch.dtype = value_of(node).dtype
    return dtype
