"""Carrying token dims, of which each rank has its own rows, through ops that treat each row by itself.

It is passes/padding/rowwise.py with rows of one dim: batch dims are ordinary ones here, so that several matrices and merged dims
may stand where padding's two dims may not. What sums over rows gives a result that is replicated: a `Sum`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import fx

from attnfuse import reasons
from attnfuse.passes.graph import contraction
from attnfuse.passes.graph.aten import arguments, is_tensor, name_of, shape_of, value_of
from attnfuse.passes.graph.contraction import Contraction
from attnfuse.passes.graph.labels import Atom, Dim, Labels, Size, is_one, known_equal
from attnfuse.passes.padding.rowwise import Carried, Gathered, Mixed, Rows, Rule, same_rows


class Tokens(Rows):
    """A token dim. Each rank has `n` rows of its `place.size`."""

    def __init__(self, size: Size) -> None:
        super().__init__(Atom(1), Atom(size), size)

    @property
    def length(self) -> Size:
        return self.place.size

    @property
    def atoms(self) -> frozenset[Atom]:
        return frozenset((self.place,))


@dataclass(frozen=True, eq=False)
class Sum:
    """A result that is a sum over rows, made of each rank's.

    kind      'sum' and 'mean' of a tensor over dims; 'pointwise', a loss of its elements; 'classes', a loss of logits
    rows      which
    labels    of the tensor that is summed
    """

    kind: Literal["sum", "mean", "pointwise", "classes"]
    rows: Tokens
    labels: Labels


#: Losses that take an element for an element.
POINTWISE_LOSSES = frozenset(
    {"mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits"}
)
#: Losses of logits [N, C, ...] by numbers of classes [N, ...].
CLASS_LOSSES = frozenset({"cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss2d"})
_SUMS = frozenset({"sum", "mean"})
#: What a loss gives: each element's, or their mean (torch.nn._reduction).
EACH, MEAN = 0, 1


@dataclass(eq=False)
class Sharded(Carried):
    """sums: what is replicated after a sum over rows."""

    sums: dict[fx.Node, Sum] = field(default_factory=dict)

    def rows_of(self, labels: Labels) -> Rows:
        """Raises Mixed where rows stand against rows, as in x[:, :, None] - x[:, None, :]: a rank has not all pairs of them."""
        own = self.rows_in(labels)
        if sum(a in own for dim in labels for a in self.axes.atoms(dim)) > len(own):
            raise Mixed(reasons.SHARDED_PAIRS())
        return super().rows_of(labels)

    def tokens_of(self, labels: Labels) -> Tokens:
        return cast(Tokens, self.rows_of(labels))

    def dim_of(self, labels: Labels) -> int:
        """Which dim the rows are in, alone or merged with others."""
        place = self.tokens_of(labels).place
        (dim,) = [d for d, atoms in enumerate(self.axes.resolve(labels)) if place in atoms]
        return dim

    def rule(self, name: str) -> Rule:
        return _RULES.get(name) or super().rule(name)

    def align(self, node: fx.Node, position: int, out: Labels) -> None:
        """A replicated argument: as it is where it is broadcast over the rows, else the rank's rows of it."""
        x = cast(fx.Node, node.args[position])
        dims = self.placed(x, out[len(out) - len(shape_of(x)) :], name_of(node))
        if any(dims):
            self.gathered[node, position] = Gathered(self.rows_of(out), dims)

    def placed(self, x: fx.Node, out: Labels, op: str) -> Labels:
        """The labels of those dims of x that are rows, where its dims stand against `out`; () for others."""
        dims: list[Dim] = []
        for size, dim in zip(shape_of(x), out, strict=True):
            if is_one(size) or not self.rows_in([dim]):
                dims.append(())
                continue
            atoms = self.axes.atoms(dim)
            if not known_equal(math.prod(a.size for a in atoms), size):
                raise Mixed(reasons.PADDING_SOME_ROWS(op=op))
            dims.append(atoms)
        return tuple(dims)

    def carry(self, node: fx.Node) -> None:
        found = self._sum(node)
        if found is not None:
            self.sums[node] = found
            return
        try:
            super().carry(node)
        except Mixed:
            # it goes on without the op
            self.labels.pop(node, None)
            self.parts.pop(node, None)
            raise

    def _sum(self, node: fx.Node) -> Sum | None:
        """What a sum over rows is; None for other ops. Raises Mixed."""
        name = name_of(node)
        if name in _SUMS and isinstance(value_of(node), torch.Tensor):
            labels = self.first(node)
            dims = arguments(node).get("dim")
            over = range(len(labels)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
            if not self.rows_in([labels[d] for d in over]):
                return None
            return Sum("sum" if name == "sum" else "mean", self.tokens_of(labels), labels)
        if name in POINTWISE_LOSSES and arguments(node)["reduction"] != EACH:
            labels = self._of_pair(node)
            return Sum("pointwise", self.tokens_of(labels), labels)
        if name in CLASS_LOSSES:
            labels = _of_classes(self, node)
            if arguments(node)["reduction"] == EACH:
                return None
            return Sum("classes", self.tokens_of(labels), labels)
        return None

    def _of_pair(self, node: fx.Node) -> Labels:
        """The labels of the elements that a loss of two tensors of one shape has."""
        args = arguments(node)
        pair = (args["self"], args["target"])
        if any(is_tensor(args.get(other)) for other in ("weight", "pos_weight")):
            raise Mixed(reasons.PADDING_ARGUMENTS(op=name_of(node)))
        if len(shape_of(pair[0])) != len(shape_of(pair[1])) or not all(map(known_equal, *map(shape_of, pair))):
            raise Mixed(reasons.PADDING_SOME_ROWS(op=name_of(node)))
        own = [x for x in pair if self.is_own(x)]
        labels = self.labels[own[0]]
        for x in pair:
            if not self.is_own(x):
                self.align(node, node.args.index(x), labels)
            elif not all(same_rows(self, a, b) for a, b in zip(labels, self.labels[x]) if self.rows_in([a, b])):
                raise Mixed(reasons.PADDING_OTHER_PLACES(op=name_of(node)))
        return labels


def _of_classes(c: Sharded, node: fx.Node) -> Labels:
    """The labels of the targets of a loss of logits."""
    args, name = arguments(node), name_of(node)
    logits, target = args["self"], args["target"]
    if not c.is_own(logits) or not is_tensor(target) or (args.get("weight") is not None and c.is_own(args["weight"])):
        raise Mixed(reasons.PADDING_ARGUMENTS(op=name))
    labels = c.labels[logits]
    at = 1 if len(labels) > 1 else 0
    c.features(labels, [at], name)
    # floats are the probabilities of classes
    if value_of(target).is_floating_point() or len(shape_of(target)) != len(labels) - 1:
        raise Mixed(reasons.PADDING_ARGUMENTS(op=name))
    rest = (*labels[:at], *labels[at + 1 :])
    if c.is_own(target):
        if not all(same_rows(c, a, b) for a, b in zip(rest, c.labels[target]) if c.rows_in([a, b])):
            raise Mixed(reasons.PADDING_OTHER_PLACES(op=name))
    else:
        c.align(node, node.args.index(target), rest)
    return rest


def _class_loss(c: Carried, node: fx.Node) -> Labels:
    """Of each row by itself."""
    return _of_classes(cast(Sharded, c), node)


def _each_loss(c: Carried, node: fx.Node) -> Labels:
    return cast(Sharded, c)._of_pair(node)


def _product(c: Carried, node: fx.Node) -> Labels:
    """Rows times matrices that are the same for all of them."""
    found = contraction.parse(node)
    if not isinstance(found, Contraction):
        raise Mixed(reasons.PADDING_OP(op=name_of(node)))
    left, right = c.is_own(found.a), c.is_own(found.b)
    if left == right or (found.added is not None and c.is_own(found.added)):
        raise Mixed(reasons.PADDING_ARGUMENTS(op=name_of(node)))
    own, letters, others = (found.a, found.a_dims, found.b_dims) if left else (found.b, found.b_dims, found.a_dims)
    labels = dict(zip(letters, c.labels[own], strict=True))
    shape = shape_of(node)
    out: list[Dim] = []
    for letter, size in zip(found.out, shape, strict=True):
        dim = labels.get(letter, ())
        if c.rows_in([dim]) and letter in others:
            # a matrix for each row
            raise Mixed(reasons.PADDING_MATRICES())
        # a dim of 1 against a longer one is made longer
        whole = math.prod(a.size for a in c.axes.atoms(dim))
        out.append(dim if known_equal(whole, size) else c.axes.fresh(size))
    if not c.rows_in(out):
        raise Mixed(reasons.PADDING_ALONG(op=name_of(node)))
    if found.added is not None:
        position = node.args.index(found.added)
        x = found.added
        dims = cast(Sharded, c).placed(x, tuple(out[len(out) - len(shape_of(x)) :]), name_of(node))
        if any(dims):
            c.gathered[node, position] = Gathered(c.rows_of(tuple(out)), dims)
    return tuple(out)


def sole(node: fx.Node) -> fx.Node | None:
    """The one tensor that has elements of those a cat joins, as where keys are put behind an empty cache; None for other nodes."""
    if name_of(node) != "cat":
        return None
    parts = arguments(node)["tensors"]
    full = [x for x in parts if not any(known_equal(n, 0) for n in shape_of(x))]
    return full[0] if len(full) == 1 and len(parts) > 1 and len(shape_of(full[0])) == len(shape_of(node)) else None


def _joined(c: Carried, node: fx.Node) -> Labels | list[Labels]:
    """Behind what is empty a tensor stays as it is."""
    source = sole(node)
    if source is None or not c.is_own(source):
        return Carried.rule(c, "cat")(c, node)
    return c.labels[source]


_RULES: dict[str, Rule] = {
    "cat": _joined,
    **dict.fromkeys(contraction.NAMES, _product),
    **dict.fromkeys(CLASS_LOSSES, _class_loss),
    **dict.fromkeys(POINTWISE_LOSSES, _each_loss),
}
