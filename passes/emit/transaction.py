"""Editing graphs so that a failure leaves them as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import fx

_VALUE = "example_value"


@contextlib.contextmanager
def undone_on_error(graphs: Sequence[fx.Graph]) -> Iterator[None]:
    """What is done inside to the nodes of `graphs` is undone if it raises, whatever it is; nodes may not be erased inside."""
    before = {node: (node.args, node.kwargs, node.meta.get(_VALUE)) for graph in graphs for node in graph.nodes}
    try:
        yield
    except BaseException:
        for node, (args, kwargs, value) in before.items():
            # tuples of arguments are kept as they are until somebody sets others
            if node.args is not args:
                node.args = args
            if node.kwargs is not kwargs:
                node.kwargs = kwargs
            if node.meta.get(_VALUE) is not value:
                node.meta.pop(_VALUE, None)
                if value is not None:
                    node.meta[_VALUE] = value
        for graph in graphs:
            for node in reversed(list(graph.nodes)):
                if node not in before:
                    graph.erase_node(node)
        raise
