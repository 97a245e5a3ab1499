"""The autocast regions of a graph: which lie around a node, and the same mode while fake values are computed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import fx

from attnfuse import _compat
from attnfuse.passes.capture.view import View

Regions = tuple[fx.Node, ...]


def autocast_regions(view: View) -> dict[fx.Node, Regions]:
    """The calls that begin the autocast regions around each node of the main Dynamo graph, outermost first."""
    found: dict[fx.Node, Regions] = {}
    open_: list[fx.Node] = []
    for node in view.scopes[0].module.graph.nodes:
        if node.target is _compat.exit_autocast and open_:
            open_.pop()
        found[node] = tuple(open_)
        if node.target is _compat.enter_autocast:
            open_.append(node)
    return found


@contextlib.contextmanager
def within(regions: Regions) -> Iterator[None]:
    """As inside of these regions."""
    with contextlib.ExitStack() as stack:
        for enter in regions:
            stack.enter_context(torch.autocast(*enter.args, **enter.kwargs))  # type: ignore[arg-type]
        yield
