"""Carrying padded rows through ops that treat each row by itself.

A padded tensor has a dim of sequences and one of places, labelled with the two atoms of its `Rows`. As long as every op works
on each (sequence, place) alone, the same ops on the packed rows give the same numbers where there is a token: a packed tensor
is the padded one with 1 for the sequences and the number of packed rows for the places. What mixes rows is `Mixed`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

import torch
from torch import fx

from attnfuse import reasons
from attnfuse.passes.graph import moves, views
from attnfuse.passes.graph.aten import arguments, getitem_source, is_tensor, name_of, shape_of, source_of, value_of
from attnfuse.passes.graph.labels import Atom, Axes, Dim, Labels, Size, insert, is_one, known_equal
from attnfuse.passes.graph.moves import DimMap
from attnfuse.passes.graph.vocabulary import ELEMENTWISE
from attnfuse.passes.padding.kept import Kept
from attnfuse.reasons import Reason, ReasonError


class Mixed(ReasonError):
    """Rows do not stay by themselves; the reason says where."""


@dataclass(eq=False)
class Rows:
    """How padded tensors came from packed rows.

    sequence, place   the padded dims [B, N]
    total             how many packed rows there are
    offsets, lengths  view nodes with the first row of each sequence [B + 1], and how many it has [B]; one may be None
    nested            the Dynamo node of the nested tensor that was padded, if it was one
    exact             no sequence is longer than N, and every packed row is of one
    kept              the places that are tokens, where padded tensors are the graph's own and packed rows are taken out of them
    index             then the fake value of the numbers of these places, sequence * N + place, in order [total]
    """

    sequence: Atom
    place: Atom
    total: Size
    offsets: fx.Node | None = None
    lengths: fx.Node | None = None
    nested: fx.Node | None = None
    exact: bool = False
    kept: Kept | None = None
    index: torch.Tensor | None = None

    @property
    def atoms(self) -> frozenset[Atom]:
        """The atoms of both padded dims."""
        return frozenset((self.sequence, self.place))


@dataclass(frozen=True)
class Gathered:
    """An argument that is no padded tensor but has dims of rows: what each packed row reads of it.

    dims: for each of its dims the atoms of rows that it runs over, () for others. place: its dim along the places, where the
    result has one. number: what it is wherever there is a token, if that is known.
    """

    rows: Rows
    dims: Labels
    place: int | None = None
    number: float | int | None = None


#: How an op on padded tensors is carried: the labels of its result, or of each of several. Raises Mixed.
Rule = Callable[["Carried", fx.Node], "Labels | list[Labels]"]


@dataclass(eq=False)
class Carried:
    """labels: of padded tensors, or of each of several results. gathered: arguments by (node, position in args)."""

    axes: Axes
    rows: list[Rows] = field(default_factory=list)
    labels: dict[fx.Node, Labels] = field(default_factory=dict)
    parts: dict[fx.Node, list[Labels]] = field(default_factory=dict)
    gathered: dict[tuple[fx.Node, int], Gathered] = field(default_factory=dict)

    def rows_in(self, dims: Sequence[Dim]) -> set[Atom]:
        """Those atoms in these dims that are of padding."""
        own = frozenset().union(*(r.atoms for r in self.rows)) if self.rows else frozenset()
        return {a for d in dims for a in self.axes.atoms(d)} & own

    def rows_of(self, labels: Labels) -> Rows:
        """The rows that a tensor has: of one padding, with both of its dims."""
        found = self.rows_in(labels)
        for rows in self.rows:
            if found == rows.atoms:
                return rows
        raise Mixed(reasons.PADDINGS_TOGETHER())

    def takes(self, node: fx.Node) -> bool:
        """Whether an op has a padded argument."""
        return any(n in self.labels or n in self.parts for n in node.all_input_nodes)

    def carry(self, node: fx.Node) -> None:
        """Label the result of an op on padded tensors. Raises Mixed."""
        source = getitem_source(node)
        if source is not None:
            self.labels[node] = self.parts[source[0]][source[1]]
            return
        found = self.rule(name_of(node))(self, node)
        if isinstance(found, list):
            self.parts[node] = found
            each = found
        else:
            self.labels[node] = found
            each = [found]
        for labels in each:
            rows = self.rows_of(labels)
            if sum(a in rows.atoms for dim in labels for a in self.axes.atoms(dim)) > 2:
                # rows by rows, such as a distance of each two
                raise Mixed(reasons.PADDING_OTHER_PLACES(op=name_of(node)))
            for a in self.rows_in(labels):
                if a in self.axes.parts:
                    raise Mixed(reasons.PADDING_SPLIT(op=name_of(node)))

    def rule(self, name: str) -> Rule:
        """How an op, by its name, is carried."""
        return _RULES.get(name) or (pointwise if name in POINTWISE else _moved)

    def first(self, node: fx.Node) -> Labels:
        """The labels of the one padded argument, the first."""
        if any(n in self.labels for n in node.all_input_nodes if n is not node.args[0]) or not self.is_own(
            node.args[0]
        ):
            raise Mixed(reasons.PADDING_ARGUMENTS(op=name_of(node)))
        return self.labels[source_of(node)]

    def is_own(self, x: Any) -> bool:
        """Whether it is a padded tensor."""
        return isinstance(x, fx.Node) and x in self.labels

    def align(self, node: fx.Node, position: int, out: Labels) -> None:
        """An argument that is no padded tensor: broadcast over the rows, or gathered for each. out: labels of the result."""
        x = cast(fx.Node, node.args[position])
        own = shape_of(x)
        dims: list[Dim] = []
        for size, dim in zip(own, out[len(out) - len(own) :]):
            found = tuple(a for a in self.axes.atoms(dim) if a in self.rows_in([dim]))
            if not found or is_one(size):
                dims.append(())
                continue
            whole: Any = 1
            for a in self.axes.atoms(dim):
                whole = whole * a.size
            if len(found) != len(self.axes.atoms(dim)) or not known_equal(whole, size):
                _fail(reasons.PADDING_SOME_ROWS(op=name_of(node)))
            dims.append(found)
        if not any(dims):
            return
        rows = self.rows_of(out)
        if (rows.place, rows.sequence) in dims:
            _fail(reasons.PADDING_BY_POSITION(op=name_of(node)))
        mine = [self.axes.atoms(d) for d in out[len(out) - len(own) :]]
        place = next((d for d, atoms in enumerate(mine) if atoms == (rows.place,)), None)
        if place is None and (rows.sequence,) in dims:
            _fail(reasons.PADDING_PER_SEQUENCE(op=name_of(node)))
        self.gathered[node, position] = Gathered(rows, tuple(dims), place)

    def features(self, labels: Labels, dims: Sequence[int], name: str) -> list[int]:
        """Dims that run over no rows, counted from the front."""
        found = [d % len(labels) for d in dims]
        if self.rows_in([labels[d] for d in found]):
            raise Mixed(reasons.PADDING_ALONG(op=name))
        return found


#: Each row of the result is made of the same row of the arguments.
POINTWISE = ELEMENTWISE | {"dropout"}


def _fail(reason: Reason) -> NoReturn:
    """Raise Mixed, where an expression is wanted."""
    raise Mixed(reason)


def pointwise(c: Carried, node: fx.Node) -> Labels:
    """Arguments are broadcast; those without padding are read at the row of each token."""
    shape = shape_of(node)
    if len(node.kwargs) and any(isinstance(v, fx.Node) and is_tensor(v) for v in node.kwargs.values()):
        _fail(reasons.PADDING_KEYWORD(op=name_of(node)))
    out: list[Dim] = [()] * len(shape)
    for x in node.args:
        if not isinstance(x, fx.Node) or not c.is_own(x):
            continue
        labels = c.labels[x]
        lead = len(shape) - len(labels)
        for at, dim in enumerate(labels):
            have = out[lead + at]
            if not have:
                out[lead + at] = dim
            elif (c.rows_in([dim]) or c.rows_in([have])) and dim and not same_rows(c, have, dim):
                _fail(reasons.PADDING_OTHER_PLACES(op=name_of(node)))
    for position, x in enumerate(node.args):
        if is_tensor(x) and not c.is_own(x):
            c.align(node, position, tuple(out))
    # others may have made a dim of 1 longer
    return tuple(dim or c.axes.fresh(size) for dim, size in zip(out, shape))


def same_rows(c: Carried, a: Dim, b: Dim) -> bool:
    """Whether two dims run over the same rows in the same order."""
    x, y = c.axes.atoms(a), c.axes.atoms(b)
    own = c.rows_in([a, b])
    return len(x) == len(y) and all(
        i is j if i in own or j in own else known_equal(i.size, j.size) for i, j in zip(x, y)
    )


def _moved(c: Carried, node: fx.Node) -> Labels | list[Labels]:
    """Ops that only move, repeat or cut elements, and not those of rows."""
    each = moves.part_maps(node)
    if each is not None:
        return [_through(c, node, found) for found in each]
    whole = moves.dim_map(node)
    return _through(c, node, whole) if whole is not None else _fail(reasons.PADDING_OP(op=name_of(node) or node.target))


def _through(c: Carried, node: fx.Node, found: DimMap) -> Labels:
    """The labels behind an op that moves elements, if those of rows stay as they are."""
    labels = c.first(node)
    c.features(labels, found.altered, name_of(node))
    carried = views.onward(c.axes, found, labels)
    return carried if carried is not None else _fail(reasons.PADDING_VIEW(op=name_of(node)))


def _cast(c: Carried, node: fx.Node) -> Labels:
    # the other argument may be a tensor that only gives the dtype
    """A cast, on the same device."""
    if not c.is_own(source_of(node)) or value_of(node).device != value_of(source_of(node)).device:
        _fail(reasons.PADDING_CAST())
    return c.labels[source_of(node)]


def _linear(c: Carried, node: fx.Node) -> Labels:
    """Each row times one matrix."""
    labels = c.first(node)
    c.features(labels, [-1], "linear")
    return (*labels[:-1], c.axes.fresh(shape_of(node)[-1]))


def _matmul(c: Carried, node: fx.Node) -> Labels:
    """Rows times a matrix that is the same for all."""
    labels = c.first(node)
    other = shape_of(cast(fx.Node, node.args[1]))
    if len(other) > 2:
        _fail(reasons.PADDING_MATRICES())
    c.features(labels, [-1], "a product")
    return labels[:-1] if len(other) == 1 else (*labels[:-1], c.axes.fresh(other[-1]))


def _addmm(c: Carried, node: fx.Node) -> Labels:
    """Rows [R, C] times one matrix, and a bias for each feature."""
    bias, rows = cast("tuple[fx.Node, fx.Node]", node.args[:2])
    if c.is_own(bias) or not c.is_own(rows) or c.is_own(node.args[2]) or len(shape_of(bias)) != 1:
        _fail(reasons.PADDING_ARGUMENTS(op="addmm"))
    labels = c.labels[rows]
    c.features(labels, [-1], "addmm")
    return (labels[0], c.axes.fresh(shape_of(node)[-1]))


def _normalised(c: Carried, node: fx.Node) -> Labels:
    """Norms over features."""
    labels = c.first(node)
    c.features(labels, range(-len(arguments(node)["normalized_shape"]), 0), name_of(node))
    return labels


def _along(c: Carried, node: fx.Node) -> Labels:
    """softmax and the like."""
    labels = c.first(node)
    c.features(labels, [arguments(node)["dim"]], name_of(node))
    return labels


def _reduced(c: Carried, node: fx.Node) -> Labels:
    """Sums, means and the like over features."""
    labels = c.first(node)
    args = arguments(node)
    dims = args.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    if not dims or not isinstance(value_of(node), torch.Tensor):
        _fail(reasons.PADDING_ALONG(op=name_of(node)))
    gone = c.features(labels, dims, name_of(node))
    if args.get("keepdim"):
        return tuple(() if d in gone else dim for d, dim in enumerate(labels))
    return tuple(dim for d, dim in enumerate(labels) if d not in gone)


def _cat(c: Carried, node: fx.Node) -> Labels:
    """Padded tensors of the same rows, one after the other along features."""
    parts = arguments(node)["tensors"]
    if not all(map(c.is_own, parts)):
        _fail(reasons.PADDING_JOINED())
    first, *rest = (c.labels[x] for x in parts)
    (at,) = c.features(first, [arguments(node).get("dim", 0)], "cat")
    for other in rest:
        if len(other) != len(first) or not all(
            same_rows(c, a, b) for d, (a, b) in enumerate(zip(first, other)) if d != at and c.rows_in([a, b])
        ):
            _fail(reasons.PADDING_JOINED_PLACES())
    return (*first[:at], c.axes.fresh(shape_of(node)[at]), *first[at + 1 :])


def _stack(c: Carried, node: fx.Node) -> Labels:
    """Padded tensors of the same rows, along a new dim."""
    parts = arguments(node)["tensors"]
    if not all(map(c.is_own, parts)):
        _fail(reasons.PADDING_JOINED())
    first, *rest = (c.labels[x] for x in parts)
    if any(
        len(x) != len(first) or not all(same_rows(c, a, b) for a, b in zip(first, x) if c.rows_in([a, b])) for x in rest
    ):
        _fail(reasons.PADDING_JOINED_PLACES())
    return insert(first, arguments(node)["dim"] % (len(first) + 1), c.axes.fresh(len(parts)))


def _embedding(c: Carried, node: fx.Node) -> Labels:
    """A row of the table for each padded index."""
    args = arguments(node)
    if c.is_own(args["weight"]) or args.get("scale_grad_by_freq") or args.get("sparse"):
        _fail(reasons.PADDING_EMBEDDING())
    return (*c.labels[args["indices"]], c.axes.fresh(shape_of(node)[-1]))


def _glu(c: Carried, node: fx.Node) -> Labels:
    """Half of the features, gated by the other half."""
    labels = c.first(node)
    (at,) = c.features(labels, [arguments(node)["dim"]], "glu")
    return (*labels[:at], c.axes.fresh(shape_of(node)[at]), *labels[at + 1 :])


_RULES: dict[str, Rule] = {
    "to": _cast,
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm"), _matmul),
    "addmm": _addmm,
    **dict.fromkeys(("layer_norm", "rms_norm"), _normalised),
    **dict.fromkeys(("softmax", "log_softmax", "cumsum"), _along),
    **dict.fromkeys(("sum", "mean", "amax", "amin", "var", "std", "norm", "linalg_vector_norm", "logsumexp"), _reduced),
    "cat": _cat,
    "stack": _stack,
    "embedding": _embedding,
    "glu": _glu,
}
