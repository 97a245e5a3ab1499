"""Graphs of small functions without Dynamo: as ATen ops, as Dynamo would give them, and as a view of that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from attnfuse import _compat
from attnfuse._compat import FakeTensorMode, pytree
from attnfuse.passes.capture.recorder import capture
from attnfuse.passes.capture.view import View

Function = Callable[..., Any]


def faked(tensors: Sequence[torch.Tensor], mode: FakeTensorMode) -> list[torch.Tensor]:
    return [mode.from_tensor(x, static_shapes=True) for x in tensors]


def aten(function: Function, *tensors: torch.Tensor) -> fx.GraphModule:
    """The ATen ops of function(*tensors), as the passes see them."""
    mode = FakeTensorMode()
    return _compat.trace(function, faked(tensors, mode), mode)


def result(gm: fx.GraphModule) -> Any:
    """What the graph gives, with nodes for tensors."""
    return gm.graph.output_node().args[0]


def like_dynamo(function: Function, *tensors: torch.Tensor) -> fx.GraphModule:
    """A graph of the calls that `function` makes, with fake values, as Dynamo gives to a backend.

    A function with an attribute `fake` is a call of its own, whose fake value that function gives.
    """
    mode = FakeTensorMode()
    graph = fx.Graph()
    given = []
    for at, value in enumerate(faked(tensors, mode)):
        node = graph.placeholder(f"l_x{at}_")
        node.meta["example_value"] = value
        given.append(node)
    tracer = fx.proxy.GraphAppendingTracer(graph)
    out = function(*(fx.Proxy(n, tracer) for n in given))
    graph.output(pytree.tree_map(lambda x: x.node if isinstance(x, fx.Proxy) else x, out))
    gm = fx.GraphModule(torch.nn.Module(), graph)
    with mode:
        for node in graph.nodes:
            if node.op in ("call_function", "call_method"):
                node.meta["example_value"] = _fake_value(node)
    return gm


def _fake_value(node: fx.Node) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["example_value"])  # type: ignore[misc]
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    target: Any = node.target
    return getattr(target, "fake", target)(*args, **kwargs)


def viewed(function: Function, *tensors: torch.Tensor) -> View:
    return capture(like_dynamo(function, *tensors))


class Values(fx.Interpreter):
    """Runs a graph, and keeps what each node gave as it was then: `found`, copies in the memory of nothing else."""

    def __init__(self, gm: torch.nn.Module, graph: fx.Graph | None = None) -> None:
        super().__init__(gm, graph=graph)
        self.found: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        self.found[n] = pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, torch.Tensor) else x, out)
        return out


def values_of(graph: fx.Graph, *tensors: torch.Tensor) -> dict[fx.Node, Any]:
    """What each node of an ATen graph gives for real tensors."""
    owner = graph.owning_module or torch.nn.Module()
    run = Values(owner, graph)
    run.run(*tensors)
    return run.found
