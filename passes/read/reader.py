"""What reading one site keeps: the state of the reader, the score path as far as it was read, and what a rule for an op gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from attnfuse.passes import limits
from attnfuse.passes.capture.view import View
from attnfuse.passes.graph import views
from attnfuse.passes.graph.aten import shape_of
from attnfuse.passes.graph.labels import Axes, Dim, Labels, is_one
from attnfuse.passes.graph.memory import is_mutating, is_stale
from attnfuse.passes.read.anchors import Anchor
from attnfuse.passes.site import Leaf
from attnfuse.reasons import Reason
from attnfuse.spec import (
    Sink,
    Step,
)


@dataclass(frozen=True)
class Recentred:
    """Among the steps of a score path: here the row's maximum is subtracted, which no softmax sees, if nothing else does."""


@dataclass(frozen=True)
class Peeled:
    """One op of the score path, read backwards.

    source, labels    the tensor the scores come from
    build             gives the steps that lead from it to the op's result, registering operands as it does
    inside            further nodes that the op takes over
    """

    source: fx.Node
    labels: Labels
    build: Callable[[], tuple[Step | Recentred, ...]] = tuple
    inside: frozenset[fx.Node] = frozenset()


#: A rule reads one kind of op: all the ways to go on from it, the likeliest first. A reason says why there is none.
Rule = Callable[["Reader", fx.Node, Labels], "Iterator[Peeled | Reason]"]


@dataclass
class Scores:
    """The score path as far as it was read: q @ k^T, and the steps after it."""

    product: fx.Node
    q: Leaf
    k: Leaf
    q_dim: Dim
    d_dim: Dim
    labels: Labels
    steps: list[Any] = field(default_factory=list)
    inside: set[fx.Node] = field(default_factory=set)


class Reader:
    """The state of reading one site. exact: scores overflow where they do in eager, so that factors stay where they are."""

    def __init__(self, view: View, anchor: Anchor, exact: bool = False) -> None:
        self.view = view
        self.anchor = anchor
        self.exact = exact
        self.axes = Axes()
        self.leaves: list[Leaf] = []
        self.q_dim: Dim = ()
        self.k_dim: Dim = ()
        self.protected: list[Dim] = []
        self.start: Labels = ()
        self.budget = limits.SCORE_OPS
        self.sink: Sink | None = None
        self.recentred = False

    def operand(self, leaf: Leaf) -> int:
        """The index of `leaf` among the operands of the op."""
        for index, other in enumerate(self.leaves):
            if other == leaf:
                return index
        self.leaves.append(leaf)
        return len(self.leaves) - 1

    def side(self, node: fx.Node, labels: Labels) -> Leaf:
        """A tensor broadcast against one with `labels`, as small as the graph has it."""
        return self.shrink(node, self.aligned(node, labels))

    def aligned(self, node: fx.Node, labels: Labels) -> Labels:
        """Labels of a tensor that is broadcast against one with `labels`."""
        shape = shape_of(node)
        tail = labels[len(labels) - len(shape) :]
        return tuple(() if is_one(size) else dim for size, dim in zip(shape, tail))

    def shrink(self, node: fx.Node, labels: Labels) -> Leaf:
        """Go back through views as long as they repeat or copy elements."""
        best, kept = Leaf(node, labels), dict(self.axes.parts)
        while True:
            step = views.back(self.axes, node, labels)
            if step is None or not self.whole() or not self.passable(node):
                break
            node, labels = step.source, step.labels
            if step.material:
                best, kept = Leaf(node, labels), dict(self.axes.parts)
        self.axes.parts = kept
        return best

    def passable(self, node: fx.Node) -> bool:
        """Whether a side tensor may be read past `node`.

        Not past an op under no_grad, which stops gradients, nor past one that writes in place, which has happened by then.
        """
        if is_mutating(node) or is_stale(node):
            return False
        return self.view.grad.get(node, True) or not self.view.grad.get(self.anchor.weights, True)

    def whole(self) -> bool:
        """Whether the Q, K, D and E dims are still one atom each."""
        return all(len(self.axes.atoms(dim)) <= 1 for dim in self.protected)
