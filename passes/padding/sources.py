"""Where padded tensors are made of packed rows, and where they become packed rows again.

Pads: `jagged_to_padded_dense` (ATen's, FBGEMM's), `to_padded_tensor` of nested tensors, `values[offsets[:-1, None] + arange(N)]`
and `padded[arange(N) < lengths[:, None]] = values`. Unpads: `padded_dense_to_jagged`, FBGEMM's `dense_to_jagged`, and
`padded[arange(N) < lengths[:, None]]`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from attnfuse import _compat
from attnfuse.expr import FALSE, TRUE, Algebra, Apply, Const, Expr, Linear, NotExpressible, substitute, walk
from attnfuse.passes.capture.view import View
from attnfuse.passes.graph import moves
from attnfuse.passes.graph.aten import (
    arguments,
    dtype_of,
    getitem_source,
    is_tensor,
    name_of,
    shape_of,
    source_of,
    value_of,
)
from attnfuse.passes.graph.constants import constant
from attnfuse.passes.graph.labels import Atom, is_one, known_equal
from attnfuse.passes.graph.memory import is_stale, opaque
from attnfuse.passes.graph.moves import Slice
from attnfuse.passes.graph.vocabulary import COPIES
from attnfuse.passes.masks.terms import Axis, Symbol, Tensor, Terms
from attnfuse.passes.padding.rowwise import Rows

_PAD_OPS = {
    *("_jagged_to_padded_dense_forward", "jagged_to_padded_dense", "jagged_to_padded_dense_forward"),
    "jagged_2d_to_dense",
}
_UNPAD_OPS = {"_padded_dense_to_jagged_forward", "dense_to_jagged", "dense_to_jagged_forward"}
_PASSED = COPIES | {"to", "detach"}


@dataclass(frozen=True)
class Pad:
    """node [B, N, ...] holds rows of `values`, packed [total, ...], or of a nested tensor (rows.nested)."""

    node: fx.Node
    values: fx.Node | None
    rows: Rows


@dataclass(frozen=True)
class Entry:
    """node is a padded tensor of the graph, whose tokens are taken out of it."""

    node: fx.Node
    rows: Rows


@dataclass(frozen=True)
class Unpad:
    """node [rows, ...] holds the rows of `source`, padded [B, N, ...]: all of them, or those where `mask` is True.

    zeros: rows beyond N are 0 in it. passed: results besides it, with the tensors that they are.
    """

    node: fx.Node
    source: fx.Node
    offsets: fx.Node | None = None
    mask: fx.Node | None = None
    total: Any = None
    zeros: bool = False
    passed: tuple[tuple[fx.Node, fx.Node], ...] = ()


_WHOLE = (torch.int64, torch.int32)


def _base(node: fx.Node) -> fx.Node:
    """The tensor with the same integers."""
    while name_of(node) in _PASSED and is_tensor(node.args[0]) and dtype_of(node) in _WHOLE:
        source = source_of(node)
        if dtype_of(source) not in _WHOLE or is_stale(node) or is_stale(source):
            # one of the two was written to, and they differ
            break
        node = source
    return node


def _is_opaque(node: fx.Node) -> bool:
    source = getitem_source(node)
    return node.target is opaque or (source is not None and source[0].target is opaque)


def _op(node: fx.Node) -> str:
    """The name of an op of ATen or FBGEMM."""
    schema = getattr(node.target, "_schema", None)
    return str(schema.name).split("::")[-1] if schema is not None else ""


class Paddings:
    """The pads and unpads of a view."""

    def __init__(self, view: View, of_graph: bool = True) -> None:
        """of_graph: whether those of the graph are looked for."""
        self.view = view
        self.rows: list[Rows] = []
        self.pads: list[Pad] = []
        for node in view.graph.nodes:
            if of_graph and node in view.live and is_tensor(node):
                found = self._pad(node)
                if found is not None:
                    self.pads.append(found)

    # -- pads

    def _pad(self, node: fx.Node) -> Pad | None:
        if _is_opaque(node):
            return self._of_nested(node)
        if _op(node) in _PAD_OPS:
            args = arguments(node)
            offsets = [args["offsets"]] if is_tensor(args["offsets"]) else args["offsets"]
            if len(offsets) != 1 or not is_tensor(args["values"]):
                return None
            return self._made(node, args["values"], offsets=_base(offsets[0]))
        if name_of(node) == "index":
            return self._of_index(node)
        if name_of(node) == "index_put":
            return self._of_write(node)
        return None

    def _made(
        self,
        node: fx.Node,
        values: fx.Node | None,
        total: Any = None,
        offsets: fx.Node | None = None,
        lengths: fx.Node | None = None,
        nested: fx.Node | None = None,
        exact: bool = False,
    ) -> Pad | None:
        """A pad, with the rows of an earlier one where both are of the same sequences."""
        batch, longest = shape_of(node)[:2]
        if is_one(batch) or is_one(longest):
            return None
        if offsets is not None and not known_equal(shape_of(offsets)[0], batch + 1):
            return None
        total = shape_of(values)[0] if values is not None else total
        for rows in self.rows:
            same = self._same_sequences(rows, offsets, lengths, nested)
            if same and all(known_equal(a, b) for a, b in zip((batch, longest, total), _sizes(rows))):
                return Pad(node, values, rows)
        rows = Rows(Atom(batch), Atom(longest), total, offsets, lengths, nested, exact)
        self.rows.append(rows)
        return Pad(node, values, rows)

    def _same_sequences(
        self, rows: Rows, offsets: fx.Node | None, lengths: fx.Node | None, nested: fx.Node | None
    ) -> bool:
        if nested is not None:
            return rows.nested is not None and _same_nested(rows.nested, nested)
        if offsets is not None:
            return self.is_offsets(rows, offsets)
        return lengths is not None and self.is_lengths(rows, lengths)

    def _of_nested(self, node: fx.Node) -> Pad | None:
        origin = self.view.origin.get(node)
        if origin is None or origin.node.target != "to_padded_tensor" or origin.scope.parent is not None:
            return None
        nested = source_of(origin.node)
        x = nested.meta.get("example_value")
        if not isinstance(x, torch.Tensor) or not x.is_nested or x.layout != torch.jagged:
            return None
        if _compat.ragged_dim(x) != 1 or _compat.offsets_and_lengths(x)[1] is not None or x.dim() < 3:
            return None
        longer = origin.node.args[2:] or origin.node.kwargs.get("output_size")
        if longer:
            return None
        return self._made(node, None, total=x.values().shape[0], nested=nested, exact=True)

    def _of_index(self, node: fx.Node) -> Pad | None:
        """values[offsets[b] + n]; what is read beyond a sequence is another's, or the last row."""
        values, indices = cast("tuple[Any, Any]", node.args[:2])
        if not is_tensor(values) or len(indices) != 1 or not is_tensor(indices[0]):
            return None
        index = indices[0]
        if len(shape_of(index)) != 2 or dtype_of(index) not in (torch.int64, torch.int32):
            return None
        batch, place = (Axis(Atom(n)) for n in shape_of(index))
        reader = self.terms()
        try:
            e = reader.at(index, (batch, place), True)
        except NotExpressible:
            return None
        chosen: Expr = TRUE
        if isinstance(e, Apply) and e.op == "where":
            chosen, e, _ = e.args
        start = reader.algebra.sub(_unclamped(e, shape_of(values)[0]), place)
        if not isinstance(start, Tensor) or start.index != (batch,):
            return None
        offsets = _base(start.node)
        own = Rows(batch.atom, place.atom, None, offsets=offsets)
        if self.assumed(chosen, own, batch, place, True, reader.algebra) != TRUE:
            return None
        return self._made(node, values, offsets=offsets)

    def _of_write(self, node: fx.Node) -> Pad | None:
        """padded[mask] = values, which fails unless there is a row for each True."""
        args = arguments(node)
        target, indices, values = args["self"], args["indices"], args["values"]
        if args["accumulate"] or len(indices) != 1 or not is_tensor(indices[0]) or not is_tensor(values):
            return None
        if dtype_of(indices[0]) != torch.bool or len(shape_of(indices[0])) != 2 or constant(target) is None:
            return None
        if len(shape_of(values)) != len(shape_of(target)) - 1 or dtype_of(values) != dtype_of(target):
            return None
        if is_one(shape_of(values)[0]) or not all(
            known_equal(a, b) for a, b in zip(shape_of(values)[1:], shape_of(target)[2:])
        ):
            # one row may be written to every place, and one feature to every other
            return None
        lengths = self._lengths_of_mask(indices[0])
        if lengths is None:
            return None
        return self._made(node, values, lengths=lengths, exact=True)

    def _lengths_of_mask(self, mask: fx.Node) -> fx.Node | None:
        """The lengths of which mask [B, N] is arange(N) < lengths[:, None]."""
        batch, place = (Axis(Atom(n)) for n in shape_of(mask))
        reader = self.terms()
        try:
            e = reader.at(mask, (batch, place))
        except NotExpressible:
            return None
        for x in _tensors(e):
            if x.index == (batch,) and e == reader.algebra.compare("lt", place, x):
                return _base(x.node)
        return None

    # -- unpads

    def unpad(self, node: fx.Node) -> Unpad | None:
        """What `node`, an op on a padded tensor, makes of it, if that is packed rows."""
        if _op(node) in _UNPAD_OPS:
            args = arguments(node)
            offsets = args.get("offsets", args.get("x_offsets"))
            total = args.get("total_L")
            if offsets is None or len(offsets) != 1 or total is None:
                return None
            total = value_of(total) if isinstance(total, fx.Node) else total
            zeros = not _op(node).startswith("_padded")
            # FBGEMM's gives the offsets too
            made = node if is_tensor(node) else next((u for u in node.users if u.args[1:] == (0,)), None)
            if made is None:
                return None
            lists = [] if made is node else [u for u in node.users if u.args[1:] == (1,)]
            passed = tuple((u, offsets[u.args[1]]) for x in lists for u in x.users)
            return Unpad(made, args["dense"], _base(offsets[0]), None, total, zeros, passed)
        if node.target is opaque:
            return self._masked(node)
        return None

    def _masked(self, node: fx.Node) -> Unpad | None:
        origin = self.view.origin.get(node)
        if origin is None or origin.node.target is not operator.getitem:
            return None
        values = origin.scope.values
        source, mask = (values.get(x) if isinstance(x, fx.Node) else None for x in origin.node.args)
        made = values.get(origin.node)
        if not (is_tensor(source) and is_tensor(mask) and is_tensor(made)):
            return None
        if dtype_of(mask) != torch.bool or len(shape_of(mask)) != 2:
            return None
        return Unpad(made, source, mask=mask)

    # -- which tensors say where the rows are

    def terms(self) -> Terms:
        return Terms(self.view, Algebra(), {}, False)

    def is_offsets(self, rows: Rows, node: fx.Node) -> bool:
        """Whether node [B + 1] holds the first row of each sequence, and the end of the last."""
        node = _base(node)
        if rows.offsets is not None:
            return node is rows.offsets
        if rows.nested is not None:
            return self._is_method(node, "offsets", rows.nested)
        assert rows.lengths is not None
        return _summed(node) is rows.lengths or _differenced(rows.lengths) is node

    def is_lengths(self, rows: Rows, node: fx.Node) -> bool:
        """Whether node [B] holds how many rows each sequence has."""
        node = _base(node)
        if rows.lengths is not None:
            return node is rows.lengths
        offsets = _differenced(node)
        if offsets is not None and self.is_offsets(rows, offsets):
            return True
        lengths = None if rows.offsets is None else _summed(rows.offsets)
        return lengths is not None and _base(lengths) is node

    def _is_method(self, node: fx.Node, name: str, nested: fx.Node) -> bool:
        origin = self.view.origin.get(node)
        if not _is_opaque(node) or origin is None or origin.node.target != name:
            return False
        of = origin.node.args[0]
        return isinstance(of, fx.Node) and _same_nested(of, nested)

    def assumed(self, e: Expr, rows: Rows, sequence: Expr, place: Expr, holds: bool, algebra: Algebra) -> Expr:
        """e, where there is a token at a place of a sequence, or none."""
        if rows.kept is not None:
            return rows.kept.assumed(e, sequence, place, holds, algebra)
        known: dict[Expr, Expr] = {}
        starts: dict[fx.Node, list[Tensor]] = {}
        for x in _tensors(e):
            if x.index == (sequence,) and self.is_lengths(rows, x.node):
                known |= _compared(algebra, place, x, holds)
            if self.is_offsets(rows, x.node):
                starts.setdefault(x.node, []).append(x)
        after = algebra.add(sequence, Const(1))
        for node in starts:
            own = algebra.sub(Tensor(node, (after,)), Tensor(node, (sequence,)))
            known |= _compared(algebra, place, own, holds)
        return substitute(e, known, algebra) if known else e


def _compared(algebra: Algebra, place: Expr, length: Expr, holds: bool) -> dict[Expr, Expr]:
    inside = algebra.compare("lt", place, length)
    yes, no = (TRUE, FALSE) if holds else (FALSE, TRUE)
    return {inside: yes, algebra.not_(inside): no}


def _tensors(e: Expr) -> list[Tensor]:
    return [x for x in walk(e) if isinstance(x, Tensor)]


def _unclamped(e: Expr, total: Any) -> Expr:
    """Without a bound from above that is not below the last of `total` rows: no row that there is lies beyond it."""
    if isinstance(e, Apply) and e.op == "min":
        open_ = [x for x in e.args if _tensors(x)]
        bounds = [_size_of(x) for x in e.args if not _tensors(x)]
        if len(open_) == 1 and all(n is not None and _compat.statically_known_true(n >= total - 1) for n in bounds):
            return open_[0]
    return e


def _size_of(e: Expr) -> Any:
    """The number or symbolic number that e is; None if it depends on more."""
    if isinstance(e, (Const, Symbol)):
        return e.value
    if isinstance(e, Linear) and all(isinstance(x, Symbol) for _, x in e.terms):
        return sum((c * x.value for c, x in e.terms if isinstance(x, Symbol)), e.const)
    return None


def _sizes(rows: Rows) -> tuple[Any, Any, Any]:
    return rows.sequence.size, rows.place.size, rows.total


def _same_nested(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta["example_value"], b.meta["example_value"]
    return a is b or (_compat.ragged_dim(x) == _compat.ragged_dim(y) == 1 and _compat.same_raggedness(x, y))


def _differenced(node: fx.Node) -> fx.Node | None:
    """The offsets of which node is the differences."""
    if is_stale(node):
        return None
    if name_of(node) == "diff":
        args = arguments(node)
        plain = args["n"] == 1 and args["prepend"] is None and args["append"] is None
        return _base(args["self"]) if plain and len(shape_of(args["self"])) == 1 else None
    if name_of(node) != "sub" or constant(arguments(node).get("alpha", 1)) != 1.0:
        return None
    later, sooner = (_base(x) if is_tensor(x) else None for x in node.args[:2])
    if later is None or sooner is None or _cut(later, 1) is None or _cut(later, 1) is not _cut(sooner, 0):
        return None
    return _cut(later, 1)


def _cut(node: fx.Node, start: int) -> fx.Node | None:
    """The offsets of which node is all but the first (start 1), or all but the last (start 0)."""
    found = moves.dim_map(node)
    if found is None or len(found.dims) != 1 or is_stale(node):
        return None
    cut, source = found.dims[0], found.source
    if not isinstance(cut, Slice) or cut.step != 1 or not known_equal(cut.start, start):
        return None
    return _base(source) if known_equal(found.shape[0], shape_of(source)[0] - 1) else None


def _summed(node: fx.Node) -> fx.Node | None:
    """The lengths of which node is the running sums, after a 0."""
    inner: Any = None
    if is_stale(node):
        return None
    if name_of(node) == "constant_pad_nd":
        args = arguments(node)
        if list(args["pad"]) == [1, 0] and args["value"] == 0:
            inner = args["self"]
    elif name_of(node) == "cat":
        parts = arguments(node)["tensors"]
        if len(parts) == 2 and constant(parts[0]) == 0.0 and known_equal(shape_of(parts[0])[0], 1):
            inner = parts[1]
    elif _op(node) == "asynchronous_complete_cumsum":
        return _base(arguments(node)["t_in"])
    if inner is None:
        return None
    inner = _base(inner)
    if name_of(inner) != "cumsum" or len(shape_of(inner)) != 1 or is_stale(inner):
        return None
    return _base(arguments(inner)["self"])
