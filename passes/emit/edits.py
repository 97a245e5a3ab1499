"""What is written into the graphs of a view, and what is known of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from torch import fx

from attnfuse import reasons
from attnfuse._compat import FakeTensorMode, pytree
from attnfuse.passes.capture.view import Scope, View
from attnfuse.reasons import ReasonError


class EmitError(ReasonError):
    """A site cannot be written into its graph."""


@dataclass(eq=False)
class Edits:
    """What has been written into the graphs of a view so far.

    replaced    (scope, view node) -> the Dynamo node that stands for it there
    touched     the scopes whose graphs were changed
    """

    view: View
    replaced: dict[tuple[Scope, fx.Node], fx.Node] = field(default_factory=dict)
    touched: set[Scope] = field(default_factory=set)


def known(node: fx.Node) -> Any:
    """The fake value of a Dynamo node. Raises EmitError where it has none."""
    if "example_value" not in node.meta:
        raise EmitError(reasons.VALUE_UNKNOWN(node=node.name))
    return node.meta["example_value"]


def example_of(node: fx.Node, mode: FakeTensorMode) -> Any:
    """The fake value of a new node from those of its arguments; None if one of them has none."""
    inputs = pytree.tree_leaves((node.args, node.kwargs))
    nodes = [x for x in inputs if isinstance(x, fx.Node)]
    if any("example_value" not in n.meta for n in nodes):
        return None
    args = fx.node.map_arg(node.args, lambda n: n.meta["example_value"])
    kwargs = fx.node.map_arg(node.kwargs, lambda n: n.meta["example_value"])
    with mode:
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return cast("Callable[..., Any]", node.target)(*args, **kwargs)
