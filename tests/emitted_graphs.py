"""A backend that runs a rewritten graph node by node and holds each node's fake value against its real one."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

import attnfuse
from attnfuse import nested, pipeline
from attnfuse._compat import HigherOrderOperator, free_unbacked_symbols, pytree
from attnfuse.report import registry
from attnfuse.settings import Settings


class Emitted:
    """A torch.compile backend. works: what `rewrite` did to each graph; nodes: how many values were compared.

        emitted = Emitted()
        torch.compile(model, backend=emitted)(*inputs)

    Runs the rewritten graph eagerly, with gradients as usual, and raises AssertionError for a new node whose example_value
    has another shape, dtype, device or other strides than what the node gives, or that has none. The graph is linted.
    Reports are recorded as the backend's are.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = Settings(**{"strict": True, **settings})
        self.works: list[pipeline.Work] = []
        self.nodes = 0

    def __call__(self, gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        given = {node for graph in _graphs(gm) for node in graph.nodes}
        with nested.active(self.settings):
            work = pipeline.rewrite(gm, self.settings)
        assert not work.spoiled, work.report.warnings
        for graph in _graphs(gm):
            graph.lint()
        self.works.append(work)
        registry.record(work.report)
        return _Checker(gm, self, given).run

    @property
    def statuses(self) -> list[str]:
        return [site.status for work in self.works for site in work.report.sites]

    @property
    def reasons(self) -> list[str | None]:
        return [site.reason for work in self.works for site in work.report.sites]

    @property
    def causes(self) -> list[str | None]:
        return [site.cause for work in self.works for site in work.report.sites]


def _graphs(gm: fx.GraphModule) -> list[fx.Graph]:
    return [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]


class _Checker(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, emitted: Emitted, given: set[fx.Node]) -> None:
        super().__init__(gm)
        self.emitted = emitted
        self.given_nodes = given

    def run_node(self, n: fx.Node) -> Any:
        real = super().run_node(n)
        # PyTorch's own nodes are not always right: a dropout of nothing gives its input, whatever strides that has
        if n not in self.given_nodes:
            assert "example_value" in n.meta, f"nothing is known of the new node {n.format_node()}"
            self._compare(n, real)
        return real

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(target, HigherOrderOperator) and target.name() == "tag_activation_checkpoint":
            # its body is looked into, which runs as it would without checkpointing
            return _Checker(args[0], self.emitted, self.given_nodes).run(*args[1:])
        return super().call_function(target, args, kwargs)

    def _compare(self, n: fx.Node, real: Any) -> None:
        fakes = pytree.tree_leaves(n.meta["example_value"])
        reals = pytree.tree_leaves(real)
        if len(fakes) != len(reals):
            return
        for fake, made in zip(fakes, reals):
            if isinstance(fake, torch.Tensor) and isinstance(made, torch.Tensor) and not made.is_nested:
                told, found = _described(fake), _described(made)
                if told is None or found is None:
                    continue
                self.emitted.nodes += 1
                assert told == found, f"{n.format_node()} is {found} where its fake value says {told}"


def _described(x: torch.Tensor) -> tuple[Any, ...] | None:
    """(shape, strides where they matter, dtype, device); None where that depends on data."""
    if free_unbacked_symbols(x):
        return None
    shape, strides = [tuple(map(_number, given)) for given in (x.shape, x.stride())]
    # the stride of a dim of one element means nothing, and none does where there are no elements
    strides = tuple(s for n, s in zip(shape, strides) if n != 1) if 0 not in shape else ()
    return shape, strides, x.dtype, x.device.type


def _number(x: Any) -> int:
    """A size as it was when the graph was traced."""
    return x if isinstance(x, int) else operator.index(x.node.hint)


def square_tensors(graph: fx.GraphModule, sizes: set[int]) -> list[str]:
    """Nodes that hold a tensor with two dims of these sizes."""
    found = []
    for module in graph.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            for value in torch.utils._pytree.tree_leaves(node.meta.get("val")):
                if isinstance(value, torch.Tensor) and sum(n in sizes for n in value.shape) >= 2:
                    found.append(f"{node.format_node()}: {list(value.shape)}")
    return found


def reads(report: attnfuse.Report) -> set[str]:
    """What is said to be read of the masks and biases of a report's sites, all of which must be fused."""
    assert report.fused == len(report.sites) > 0, report
    return {site.reads.split(", ", 1)[-1] for site in report.sites}
