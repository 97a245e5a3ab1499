"""Padded rows through single ops: what is carried keeps rows apart, by the ops themselves, and what mixes them is not carried."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from attnfuse.passes.graph.aten import value_of
from attnfuse.passes.graph.labels import Atom, Axes, Labels
from attnfuse.passes.padding.rowwise import _RULES, Carried, Mixed, Rows

aten = torch.ops.aten
Tensor = torch.Tensor
B, N, C = 2, 3, 4
#: Where a row stands among others: dims (sequence, place) of each layout of [B, N, C], two of them with heads.
LAYOUTS: dict[str, tuple[tuple[int, ...], int, int]] = {
    "rows": ((B, N, C), 0, 1),
    "heads": ((B, 2, N, C), 0, 2),
    "places first": ((N, B, C), 1, 0),
    "last": ((C, B, N), 1, 2),
}


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape)), dtype=torch.float64)


class Padded:
    """A padded tensor x in a graph, and ops on it."""

    def __init__(self, layout: str, x: Tensor | None = None) -> None:
        shape, sequence, place = LAYOUTS[layout]
        self.sequence, self.place = sequence, place
        self.x = randn(*shape) if x is None else x
        self.graph = fx.Graph()
        self.rows = Rows(Atom(B), Atom(N), B * N)
        self.carried = Carried(Axes(), [self.rows])
        self.node = self.graph.placeholder("x")
        self.node.meta["val"] = self.x
        self.carried.labels[self.node] = tuple(
            (self.rows.sequence,) if d == sequence else (self.rows.place,) if d == place else self.carried.axes.fresh(n)
            for d, n in enumerate(self.x.shape)
        )

    def call(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of an op; real tensors among its arguments become inputs."""

        def given(a: Any) -> Any:
            if isinstance(a, (list, tuple)):
                return [given(x) for x in a]
            if not isinstance(a, Tensor):
                return a
            node = self.graph.placeholder("y")
            node.meta["val"] = a
            return node

        node = self.graph.call_function(op, tuple(map(given, args)), {k: given(v) for k, v in kwargs.items()})
        node.meta["val"] = op(*fx.node.map_arg(node.args, value_of), **fx.node.map_arg(node.kwargs, value_of))
        return node

    def after(self, node: fx.Node, x: Tensor) -> Any:
        """What the node is with another x."""

        def value(n: fx.Node) -> Any:
            return x if n is self.node else value_of(n) if n.op == "placeholder" else self.after(n, x)

        target: Any = node.target
        return target(*fx.node.map_arg(node.args, value), **fx.node.map_arg(node.kwargs, value))

    def read(self, node: fx.Node) -> Labels | None:
        """The labels of the result, or None where rows are mixed."""
        try:
            self.carried.carry(node)
        except Mixed:
            return None
        return self.carried.axes.resolve(self.carried.labels[node])

    def row(self, x: Tensor, dims: tuple[int, int], b: int, n: int) -> Tensor:
        at: list[Any] = [slice(None)] * x.dim()
        at[dims[0]], at[dims[1]] = b, n
        return x[tuple(at)]

    def assert_apart(self, node: fx.Node, labels: Labels) -> None:
        """The labels are of the result's sizes, and each row of it is made of the same row of x alone."""
        made = value_of(node)
        for dim, size in zip(labels, made.shape, strict=True):
            assert math.prod(a.size for a in dim) == size
        found = [[d for d, dim in enumerate(labels) if dim == (a,)] for a in (self.rows.sequence, self.rows.place)]
        assert [len(f) for f in found] == [1, 1]
        dims = found[0][0], found[1][0]
        for b, n in ((0, 0), (B - 1, N - 1), (1, 0)):
            # all rows but one are others, and no numbers at all
            other = torch.full_like(self.x, 7 if not self.x.is_floating_point() else math.nan)
            self.row(other, (self.sequence, self.place), b, n).copy_(
                self.row(self.x, (self.sequence, self.place), b, n)
            )
            again = self.row(self.after(node, other), dims, b, n)
            torch.testing.assert_close(again, self.row(made, dims, b, n), equal_nan=False)


ALL = st.sampled_from(sorted(LAYOUTS))

REDUCTIONS: dict[str, Callable[[Padded, list[int], bool], fx.Node]] = {
    "sum": lambda p, d, k: p.call(aten.sum.dim_IntList, p.node, d, k),
    "mean": lambda p, d, k: p.call(aten.mean.dim, p.node, d, k),
    "amax": lambda p, d, k: p.call(aten.amax.default, p.node, d, k),
    "amin": lambda p, d, k: p.call(aten.amin.default, p.node, d, k),
    "var": lambda p, d, k: p.call(aten.var.dim, p.node, d, True, k),
    "std": lambda p, d, k: p.call(aten.std.correction, p.node, d, correction=0, keepdim=k),
    "norm": lambda p, d, k: p.call(aten.norm.ScalarOpt_dim, p.node, 2, d, k),
    "linalg_vector_norm": lambda p, d, k: p.call(aten.linalg_vector_norm.default, p.node, 3, d, k),
    "logsumexp": lambda p, d, k: p.call(aten.logsumexp.default, p.node, d, k),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_a_reduction_is_carried_over_features_alone(name: str) -> None:
    @settings(max_examples=25)
    @given(ALL, st.sets(st.integers(0, 3), min_size=1, max_size=2), st.booleans(), st.booleans())
    def run(layout: str, dims: set[int], keepdim: bool, from_end: bool) -> None:
        p = Padded(layout)
        rank = p.x.dim()
        dims = {d % rank for d in dims}
        apart = not dims & {p.sequence, p.place}
        node = REDUCTIONS[name](p, [d - rank * from_end for d in sorted(dims)], keepdim)
        labels = p.read(node)
        assert (labels is not None) == apart
        if labels is not None:
            p.assert_apart(node, labels)

    run()


@pytest.mark.parametrize("name", ["sum", "mean", "norm", "var"])
def test_a_reduction_of_everything_is_not_carried(name: str) -> None:
    p = Padded("rows")
    op = {"sum": aten.sum.default, "mean": aten.mean.default, "norm": aten.norm.Scalar, "var": aten.var.default}[name]
    assert p.read(p.call(op, p.node)) is None


def test_a_sum_over_no_dims_is_one_of_everything() -> None:
    p = Padded("rows")
    node = p.call(aten.sum.dim_IntList, p.node, [])
    assert value_of(node).dim() == 0 and p.read(node) is None


ALONG: dict[str, Callable[[Padded, int], fx.Node]] = {
    "softmax": lambda p, d: p.call(aten.softmax.int, p.node, d),
    "log_softmax": lambda p, d: p.call(aten.log_softmax.int, p.node, d),
    "cumsum": lambda p, d: p.call(aten.cumsum.default, p.node, d),
    "flip": lambda p, d: p.call(aten.flip.default, p.node, [d]),
}


@pytest.mark.parametrize("name", ALONG)
def test_what_runs_along_a_dim_is_carried_along_features_alone(name: str) -> None:
    @settings(max_examples=16)
    @given(ALL, st.integers(-4, 3))
    def run(layout: str, dim: int) -> None:
        p = Padded(layout)
        rank = p.x.dim()
        dim = max(-rank, min(rank - 1, dim))
        apart = dim % rank not in (p.sequence, p.place)
        node = ALONG[name](p, dim)
        labels = p.read(node)
        assert (labels is not None) == apart
        if labels is not None:
            p.assert_apart(node, labels)

    run()


@settings(max_examples=24)
@given(ALL, st.integers(1, 3), st.sampled_from(["layer_norm", "rms_norm"]), st.booleans())
def test_a_norm_is_carried_over_features_alone(layout: str, count: int, name: str, weighted: bool) -> None:
    p = Padded(layout)
    shape = list(p.x.shape[-count:])
    weight = randn(*shape) if weighted else None
    op = aten.layer_norm.default if name == "layer_norm" else aten.rms_norm.default
    node = p.call(op, p.node, shape, weight)
    apart = min(p.x.dim() - count, p.x.dim()) > max(p.sequence, p.place)
    labels = p.read(node)
    assert (labels is not None) == apart
    if labels is not None:
        p.assert_apart(node, labels)


@settings(max_examples=16)
@given(ALL, st.integers(-4, 3))
def test_a_gated_unit_is_carried_along_features_alone(layout: str, dim: int) -> None:
    shape, *_ = LAYOUTS[layout]
    rank = len(shape)
    dim = max(-rank, min(rank - 1, dim))
    p = Padded(layout)
    if shape[dim] % 2:
        return
    labels = p.read(node := p.call(aten.glu.default, p.node, dim))
    assert (labels is not None) == (dim % rank not in (p.sequence, p.place))
    if labels is not None:
        p.assert_apart(node, labels)


PRODUCTS: dict[str, Callable[[Padded], fx.Node]] = {
    "linear": lambda p: p.call(aten.linear.default, p.node, randn(5, p.x.shape[-1]), randn(5)),
    "matmul": lambda p: p.call(aten.matmul.default, p.node, randn(p.x.shape[-1], 5)),
    "a vector": lambda p: p.call(aten.matmul.default, p.node, randn(p.x.shape[-1])),
}


@settings(max_examples=16)
@given(ALL, st.sampled_from(sorted(PRODUCTS)))
def test_a_product_with_one_matrix_is_carried_where_it_sums_features(layout: str, name: str) -> None:
    p = Padded(layout)
    labels = p.read(node := PRODUCTS[name](p))
    assert (labels is not None) == (layout != "last")
    if labels is not None:
        p.assert_apart(node, labels)


def flat(p: Padded) -> fx.Node:
    """x [B, N, C] as [B * N, C]."""
    node = p.call(aten.view.default, p.node, [B * N, p.x.shape[-1]])
    assert p.read(node) is not None
    return node


def assert_rows_apart(p: Padded, node: fx.Node) -> None:
    """As Padded.assert_apart, of a result whose first dim is of all rows."""
    made, labels = value_of(node), p.carried.axes.resolve(p.carried.labels[node])
    assert labels[0] == (p.rows.sequence, p.rows.place)
    assert [math.prod(a.size for a in dim) for dim in labels] == list(made.shape)
    for row in range(B * N):
        other = torch.full_like(p.x, math.nan)
        other[row // N, row % N] = p.x[row // N, row % N]
        torch.testing.assert_close(p.after(node, other)[row], made[row])


FLAT: dict[str, tuple[Callable[[Padded], fx.Node], bool]] = {
    "addmm": (lambda p: p.call(aten.addmm.default, randn(5), flat(p), randn(C, 5)), True),
    "mm": (lambda p: p.call(aten.mm.default, flat(p), randn(C, 5)), True),
    # a bias for each row is another tensor for each
    "a bias of rows": (lambda p: p.call(aten.addmm.default, randn(B * N, 5), flat(p), randn(C, 5)), False),
    "a matrix on the left": (lambda p: p.call(aten.mm.default, randn(2, B * N), flat(p)), False),
    "rows as the matrix": (lambda p: p.call(aten.addmm.default, randn(C), randn(2, B * N), flat(p)), False),
    "rows with rows": (lambda p: p.call(aten.mm.default, flat(p), carried(p, aten.t.default, flat(p))), False),
    "turned rows": (lambda p: p.call(aten.mm.default, carried(p, aten.t.default, flat(p)), randn(B * N, 5)), False),
}


def carried(p: Padded, op: Any, *args: Any) -> fx.Node:
    node = p.call(op, *args)
    assert p.read(node) is not None
    return node


@pytest.mark.parametrize("name", FLAT)
def test_a_product_of_flat_rows_is_carried_with_one_matrix_on_the_right(name: str) -> None:
    run, apart = FLAT[name]
    p = Padded("rows")
    node = run(p)
    assert (p.read(node) is not None) == apart
    if apart:
        assert_rows_apart(p, node)


def test_a_bias_that_is_padded_itself_is_not_carried() -> None:
    p = Padded("rows", randn(B, N, C))
    feature = carried(p, aten.select.int, p.node, 2, 0)
    row = p.call(aten.view.default, feature, [B * N])
    assert p.read(row) is not None
    assert p.read(p.call(aten.addmm.default, row, randn(2, C), randn(C, B * N))) is None


def test_matrices_of_their_own_for_each_sequence_are_not_carried() -> None:
    p = Padded("rows")
    assert p.read(p.call(aten.matmul.default, p.node, randn(B, C, 5))) is None
    turned = p.call(aten.matmul.default, randn(5, N), p.node)
    assert p.read(turned) is None


@settings(max_examples=12)
@given(st.sampled_from(["rows", "places first"]), st.sampled_from([{}, {"padding_idx": 0}]))
def test_a_row_of_a_table_is_read_for_each_padded_index(layout: str, more: dict[str, Any]) -> None:
    p = Padded(layout, torch.arange(B * N * C).view(LAYOUTS[layout][0]) % 8)
    node = p.call(aten.embedding.default, randn(8, 5), p.node, *more.values())
    labels = p.read(node)
    assert labels is not None
    p.assert_apart(node, labels)


def test_a_table_that_is_padded_itself_is_not_carried() -> None:
    p = Padded("rows")
    index = torch.tensor([0, 3, 5])
    assert p.read(p.call(aten.embedding.default, flat(p), index)) is None
    # gradients by how often a row is read depend on all rows
    p = Padded("rows", torch.arange(B * N * C).view(B, N, C) % 8)
    assert p.read(p.call(aten.embedding.default, randn(8, 5), p.node, -1, True)) is None


@settings(max_examples=30)
@given(ALL, st.sampled_from(["cat", "stack"]), st.integers(-4, 4), st.booleans())
def test_padded_tensors_are_joined_along_features(layout: str, name: str, dim: int, own: bool) -> None:
    p = Padded(layout)
    rank = p.x.dim() + (name == "stack")
    dim = max(-rank, min(rank - 1, dim))
    if own:
        second = carried(p, aten.mul.Tensor, p.node, 2.0)
    else:
        second = p.graph.placeholder("y")
        second.meta["val"] = randn(*p.x.shape)
    op = aten.cat.default if name == "cat" else aten.stack.default
    node = p.call(op, [p.node, second], dim)
    labels = p.read(node)
    joins_rows = name == "cat" and dim % rank in (p.sequence, p.place)
    assert (labels is not None) == (own and not joins_rows)
    if labels is not None:
        p.assert_apart(node, labels)


def test_rows_in_another_order_are_not_taken_for_the_same() -> None:
    # as many sequences as places, so that shapes tell nothing
    x = randn(3, 3, C)
    graph, rows = fx.Graph(), Rows(Atom(3), Atom(3), 9)
    c, node = Carried(Axes(), [rows]), graph.placeholder("x")
    node.meta["val"] = x
    c.labels[node] = ((rows.sequence,), (rows.place,), c.axes.fresh(C))
    turned = graph.call_function(aten.transpose.int, (node, 0, 1))
    turned.meta["val"] = x.transpose(0, 1)
    c.carry(turned)
    for op, args in (
        (aten.add.Tensor, (node, turned)),
        (aten.cat.default, ([node, turned], 2)),
        (aten.stack.default, ([node, turned], 0)),
    ):
        both = graph.call_function(op, args)
        both.meta["val"] = op(*fx.node.map_arg(args, value_of))
        with pytest.raises(Mixed):
            c.carry(both)
        same = graph.call_function(op, fx.node.map_arg(args, lambda n: turned))
        same.meta["val"] = op(*fx.node.map_arg(same.args, value_of))
        c.carry(same)
        dims = [d for d in c.labels[same] if d in ((rows.sequence,), (rows.place,))]
        assert dims == [(rows.place,), (rows.sequence,)]


#: The shape of another tensor beside x [B, N, C]: the rows that its dims run over, () where it has none.
BESIDE: dict[tuple[int, ...], tuple[str, ...]] = {
    (C,): (),
    (1, 1, C): (),
    (1,): (),
    (): (),
    (N, C): ("place", ""),
    (N, 1): ("place", ""),
    (1, N, 1): ("", "place", ""),
    (B, N, C): ("sequence", "place", ""),
    (B, N, 1): ("sequence", "place", ""),
    (B, 1, C): ("sequence", "", ""),
}


@pytest.mark.parametrize("shape", BESIDE, ids=str)
@pytest.mark.parametrize("first", [False, True], ids=["after", "before"])
def test_another_tensor_is_gathered_where_it_has_rows(shape: tuple[int, ...], first: bool) -> None:
    p = Padded("rows")
    y = randn(*shape)
    node = p.call(aten.add.Tensor, *((y, p.node) if first else (p.node, y)))
    labels, wanted = p.read(node), BESIDE[shape]
    assert labels is not None
    p.assert_apart(node, labels)
    found = p.carried.gathered.get((node, 0 if first else 1))
    assert (found is not None) == bool(wanted)
    if found is not None:
        names = {p.rows.sequence: "sequence", p.rows.place: "place"}
        said = tuple("".join(names[a] for a in dim) for dim in found.dims)
        assert said == wanted
        # each packed row reads the elements that the padded one does
        for b, n in ((0, 0), (1, 2)):
            at = tuple({"sequence": slice(b, b + 1), "place": slice(n, n + 1)}.get(s, slice(None)) for s in said)
            torch.testing.assert_close(p.x[b : b + 1, n : n + 1] + y[at], value_of(node)[b : b + 1, n : n + 1])


def test_a_tensor_that_is_broadcast_over_rows_and_others_is_not_carried_by_place() -> None:
    p = Padded("places first")
    assert p.read(p.call(aten.add.Tensor, p.node, randn(B, C))) is None


def test_two_paddings_are_not_one() -> None:
    p = Padded("rows")
    other = Rows(Atom(B), Atom(N), B * N)
    p.carried.rows.append(other)
    second = p.graph.placeholder("y")
    second.meta["val"] = randn(B, N, C)
    p.carried.labels[second] = ((other.sequence,), (other.place,), p.carried.axes.fresh(C))
    node = p.graph.call_function(aten.mul.Tensor, (p.node, second))
    node.meta["val"] = p.x * value_of(second)
    assert p.read(node) is None


@given(st.sampled_from(["rows", "heads"]), st.integers(1, 3))
@settings(max_examples=8)
def test_parts_along_features_are_carried_each(layout: str, size: int) -> None:
    p = Padded(layout)
    split = p.call(aten.split.Tensor, p.node, size, -1)
    p.carried.carry(split)
    for i, part in enumerate(value_of(split)):
        node = p.graph.call_function(operator.getitem, (split, i))
        node.meta["val"] = part
        labels = p.read(node)
        assert labels is not None
        p.assert_apart(node, labels)
    assert p.carried.takes(node) is True
    with pytest.raises(Mixed):
        p.carried.carry(p.call(aten.split.Tensor, p.node, 1, p.place))


def test_a_cast_is_carried_whatever_gives_the_dtype() -> None:
    p = Padded("rows")
    for node in (p.call(aten.to.dtype, p.node, torch.float32), p.call(aten.to.other, p.node, randn(2).half())):
        labels = p.read(node)
        assert labels is not None
        p.assert_apart(node, labels)
    # a tensor that gets the dtype of padded ones holds none of their rows
    assert p.read(p.call(aten.to.other, randn(2).half(), p.node)) is None


def test_every_rule_is_met_here() -> None:
    drawn = {*REDUCTIONS, *ALONG, *PRODUCTS, *FLAT, "layer_norm", "rms_norm", "cat", "stack", "embedding", "glu", "to"}
    assert set(_RULES) <= drawn


def test_a_tensor_by_rows_in_the_order_of_places_is_not_gathered() -> None:
    p = Padded("places first")
    rows = carried(p, aten.view.default, p.node, [N * B, C])
    assert p.read(p.call(aten.add.Tensor, rows, randn(N * B, C))) is None
    # packed rows are in the order of sequences
    p = Padded("rows")
    node = p.call(aten.add.Tensor, flat(p), randn(B * N, C))
    assert p.read(node) is not None
    assert_rows_apart(p, node)
