"""Packed rows of checkpointed regions: what was written for one is put into a region of its own, which backward computes again."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import fx

from attnfuse import reasons
from attnfuse.passes.capture.recorder import is_checkpoint
from attnfuse.passes.capture.view import Scope
from attnfuse.passes.emit.edits import EmitError


def is_checkpointed(scope: Scope) -> bool:
    """Whether it is the body of a checkpointed region of the main graph."""
    if scope.call is None or scope.parent is None or scope.parent.parent is not None:
        return False
    return is_checkpoint(scope.call)


def fold(scope: Scope, own: Sequence[fx.Node], number: int) -> None:
    """Move nodes of the main graph, written for the body of a region, into a new region of the same kind. Raises EmitError."""
    call, parent = scope.call, scope.parent
    assert call is not None and parent is not None
    inside = set(own)
    graph = parent.module.graph
    own = [n for n in graph.nodes if n in inside]
    _together(graph, own, inside)
    given = list(dict.fromkeys(x for n in own for x in n.all_input_nodes if x not in inside))
    results = [n for n in own if any(u not in inside for u in n.users)]
    body, copies = fx.Graph(), {}
    for x in given:
        copies[x] = body.placeholder(x.name)
        copies[x].meta.update(x.meta)
    for n in own:
        copies[n] = body.node_copy(n, copies.__getitem__)
    body.output(tuple(copies[n] for n in results))
    module = fx.GraphModule(parent.module, body)
    module.meta.update(scope.module.meta)
    name = f"attnfuse_packed_{number}"
    parent.module.add_module(name, module)
    with graph.inserting_after(own[-1]):
        made = graph.call_function(cast("Callable[..., Any]", call.target), (), dict(call.kwargs))
    made.meta.update({k: v for k, v in call.meta.items() if k != "example_value"})
    made.meta["example_value"] = tuple(n.meta.get("example_value") for n in results)
    with graph.inserting_before(made):
        held = graph.get_attr(name)
    made.args = (held, *given)
    place = made
    for i, n in enumerate(results):
        with graph.inserting_after(place):
            place = graph.call_function(operator.getitem, (made, i))
        place.meta.update(n.meta)
        n.replace_all_uses_with(place, delete_user_cb=lambda user: user not in inside)
    for n in reversed(own):
        graph.erase_node(n)


def _together(graph: fx.Graph, own: list[fx.Node], inside: set[fx.Node]) -> None:
    """Nothing else lies between the first and the last of the nodes. Raises EmitError where something has to."""
    first, last = own[0], own[-1]
    between = [n for n in _from(first, last) if n not in inside]
    needed: set[fx.Node] = set()
    stack = [x for n in own for x in n.all_input_nodes if x not in inside]
    after = set(between)
    while stack:
        node = stack.pop()
        if node in inside:
            raise EmitError(reasons.PADDING_CHECKPOINT())
        if node in after and node not in needed:
            needed.add(node)
            stack += node.all_input_nodes
    place = last
    for node in between:
        if node in needed:
            first.prepend(node)
        else:
            place.append(node)
            place = node


def _from(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    found, node = [], first
    while node is not last:
        found.append(node)
        node = node.next
    return [*found, last]
