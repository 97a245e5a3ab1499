"""Attentions that a graph break has taken apart, as far as one graph tells: for a warning, never rewritten."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from attnfuse.passes.capture.view import source_line
from attnfuse.passes.graph.labels import same_sizes
from attnfuse.passes.graph.vocabulary import called

_SOFTMAX = {"softmax", "_softmax", "_safe_softmax"}
_PRODUCTS = {"matmul", "__matmul__", "bmm", "baddbmm", "einsum"}
#: What makes other values than scores or weights.
_OTHERS = ("linear", "conv", "norm", "embedding", "attention", "softmax", "mm")


def split(gm: fx.GraphModule) -> list[str]:
    """The user's line of each softmax that is an attention's with a product in another graph; '' where it is not known.

    Either the scores come in from another graph and a product of the weights follows, or scores are made of two values
    here and the weights leave the graph. To be asked where there is more than one graph.
    """
    found = []
    for node in gm.graph.nodes:
        if called(node) not in _SOFTMAX:
            continue
        before = _reached(node, lambda n: n.all_input_nodes)
        after = _reached(node, lambda n: n.users)
        made = [n for n in before if called(n) in _PRODUCTS]
        leaves = any(n.op == "output" for n in after)
        weighs = any(called(n) in _PRODUCTS for n in after)
        comes_in = not made and any(_is_scores(n, node) for n in before)
        if (comes_in and weighs) or (leaves and not weighs and any(map(_of_two_values, made))):
            found.append(source_line(node))
    return found


def _reached(start: fx.Node, next_to: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """What is reached without going past something that makes other values."""
    found: set[fx.Node] = set()
    stack = list(next_to(start))
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            if not _makes_other(node):
                stack += next_to(node)
    return found


def _makes_other(node: fx.Node) -> bool:
    return called(node) in _PRODUCTS or any(part in called(node) for part in _OTHERS)


def _value(node: fx.Node) -> Any:
    return node.meta.get("example_value")


def _is_parameter(node: fx.Node) -> bool:
    return isinstance(_value(node), torch.nn.Parameter) or "parameters_" in str(node.target)


def _is_scores(node: fx.Node, softmax: fx.Node) -> bool:
    """Whether it is an input of the graph that may be the scores: of their shape, and no parameter."""
    value, scores = _value(node), _value(softmax)
    if node.op != "placeholder" or _is_parameter(node) or not isinstance(value, torch.Tensor):
        return False
    return isinstance(scores, torch.Tensor) and value.is_floating_point() and same_sizes(value.shape, scores.shape)


def _of_two_values(product: fx.Node) -> bool:
    """Whether no argument of a product is a parameter, as what a classifier or a router multiplies by is."""

    def is_made_of_parameters(node: fx.Node) -> bool:
        if _makes_other(node):
            return False
        reached = {node, *_reached(node, lambda n: n.all_input_nodes)}
        sources = [n for n in reached if n.op == "placeholder" or _makes_other(n)]
        return bool(sources) and all(n.op == "placeholder" and _is_parameter(n) for n in sources)

    given = product.all_input_nodes
    return len(given) > 1 and not any(map(is_made_of_parameters, given))
