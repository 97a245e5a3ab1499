"""Dynamo's graphs as they are: copies of them, their code as text, the name of where they begin."""

from __future__ import annotations

import copy

from torch import fx

from attnfuse.passes.capture.view import source_line


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy with graphs of its own, checkpointed regions included; parameters and metadata are shared."""
    twin = fx.GraphModule(gm, _graph_copy(gm.graph), class_name=type(gm).__name__)
    twin.meta = dict(gm.meta)
    for name, value in vars(gm).items():
        if name not in vars(twin) and not name.startswith("_modules"):
            setattr(twin, name, value)
    for name, child in list(twin.named_children()):
        if isinstance(child, fx.GraphModule):
            setattr(twin, name, copied(child))
    return twin


def _graph_copy(graph: fx.Graph) -> fx.Graph:
    new = fx.Graph(tracer_cls=getattr(graph, "_tracer_cls", None))
    mapping: dict[fx.Node, fx.Node] = {}
    result = new.graph_copy(graph, mapping)
    for old, twin in mapping.items():
        # an exported program's inputs may have names that a graph does not give, such as 'input'
        twin.name = old.name
        # Dynamo keeps where an input comes from in attributes of its own
        for name, value in getattr(old, "__dict__", {}).items():
            if name not in vars(twin):
                setattr(twin, name, value)
    made = new.output(result)
    old = next(n for n in reversed(graph.nodes) if n.op == "output")
    made.meta = dict(old.meta)
    new._codegen = copy.deepcopy(graph._codegen)
    return new


def readable(gm: fx.GraphModule) -> str:
    """The graph as code, with the bodies of checkpointed regions."""
    return str(gm.print_readable(print_output=False))


def name_of(gm: fx.GraphModule) -> str:
    """Where the graph begins, as 'model.py:12', for want of a name."""
    return next((line for line in map(source_line, gm.graph.nodes) if line), "graph")
