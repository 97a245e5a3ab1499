"""What is written for an expression is what its ops give on every element; what is written for a leaf is that tensor."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from traced_programs import Values as Run
from traced_programs import viewed

from attnfuse import reasons
from attnfuse.expr import Algebra, Const, Expr, K, Q
from attnfuse.passes.capture.view import View
from attnfuse.passes.emit.edits import Edits, EmitError, known
from attnfuse.passes.emit.values import Values
from attnfuse.passes.emit.writer import NodeWriter
from attnfuse.passes.graph.labels import Atom, Dim, Distances, Labels
from attnfuse.passes.masks.terms import Axis, OpCall, Tensor
from attnfuse.passes.site import Leaf

ATEN = torch.ops.aten
B, Qs, Ks = 2, 3, 4
algebra = Algebra(Qs, Ks)
TABLES = {
    "uint8": torch.arange(250, 256, dtype=torch.uint8),
    "int64": torch.tensor([3, -4, 0, 7, -1, 2]),
    "bool": torch.tensor([True, False, False, True, False, True]),
    "double": torch.linspace(-1.5, 2.0, 6, dtype=torch.float64),
    "half": torch.linspace(-1.5, 2.0, 6, dtype=torch.float16),
    "square": torch.arange(36).view(6, 6) * 7 % 11,
}
NAMES = tuple(TABLES)


class Written:
    """A graph with an input for each tensor, and a writer at its end."""

    def __init__(self, *given: torch.Tensor) -> None:
        self.given = given
        # a use of each, so that it is live
        self.view: View = viewed(lambda *xs: [x.clone() for x in xs], *given)
        self.inputs = [n for n in self.view.graph.nodes if n.op == "placeholder"]
        self.scope = self.view.scopes[0]
        self.graph = self.scope.module.graph
        owner = self.graph.output_node()
        self.writer = NodeWriter(Edits(self.view), self.scope, owner, torch.device("cpu"))

    def written(self, write: Callable[[NodeWriter], Any]) -> Any:
        with self.graph.inserting_before(self.writer.owner):
            return write(self.writer)

    def value(self, node: fx.Node) -> Any:
        """What a written node gives, which is held against its fake value."""
        self.graph.lint()
        self.scope.module.recompile()
        run = Run(self.scope.module, self.graph)
        run.run(*self.given)
        for made in self.graph.nodes:
            if made.op in ("call_function", "call_method") and isinstance(run.found[made], torch.Tensor):
                fake = known(made)
                assert (fake.shape, fake.dtype) == (run.found[made].shape, run.found[made].dtype)
        return run.found[node]


# -- expressions


@dataclass(frozen=True)
class Both:
    """An expression, and what it is on all of [B, Q, K] by the ops themselves."""

    e: Expr
    value: torch.Tensor


WHOLE = ("sum", "mul", "floordiv", "mod", "min", "max", "abs", "where", "int", "load")
TRUTH = ("lt", "le", "eq", "ne", "load", "and", "or", "not")
FLOATING = ("load", "unary", "of whole", "sum", "number", "where")


class Drawn:
    def __init__(self, draw: st.DrawFn, nodes: dict[str, fx.Node], atom: Atom) -> None:
        self.draw, self.nodes = draw, nodes
        self.batch = Both(Axis(atom), torch.arange(B).view(B, 1, 1))

    def index(self, last: Sequence[Both]) -> Both:
        return self.draw(st.sampled_from([self.batch, *last]))

    def whole(self, depth: int, last: Sequence[Both], kind: str = "") -> Both:
        """Of integers."""
        kind = kind or self.draw(st.sampled_from(["index", "index", "number", *(WHOLE if depth else ())]))
        if kind == "index":
            return self.index(last)
        if kind == "number":
            n = self.draw(st.integers(-3, 9))
            return Both(Const(n), torch.tensor(n))
        if kind == "int":
            x = self.truth(depth - 1, last)
            return Both(algebra.int_(x.e), x.value.long())
        if kind == "load":
            return self.element(self.draw(st.sampled_from(["uint8", "int64", "square"])), depth - 1, last)
        a = self.whole(depth - 1, last)
        if kind in ("floordiv", "mod", "mul"):
            n = self.draw(st.integers(2, 4))
            # numbers below 0 as well, where quotients are rounded down
            a = a if kind == "mul" or self.draw(st.booleans()) else self.element("int64", depth - 1, last)
            made = {"floordiv": algebra.floordiv, "mod": algebra.mod, "mul": algebra.mul}[kind](a.e, Const(n))
            by = {"floordiv": torch.floor_divide, "mod": torch.remainder, "mul": torch.mul}[kind]
            return Both(made, by(a.value, n))
        if kind == "abs":
            return Both(algebra.abs(a.e), a.value.abs())
        b = self.whole(depth - 1, last)
        if kind == "sum":
            c = self.draw(st.sampled_from([1, -1, 2, -3]))
            return Both(algebra.add(a.e, b.e, c), a.value + c * b.value)
        if kind == "where":
            x = self.truth(depth - 1, last)
            return Both(algebra.where(x.e, a.e, b.e), torch.where(x.value, a.value, b.value))
        made = algebra.minimum if kind == "min" else algebra.maximum
        return Both(made(a.e, b.e), getattr(torch, f"{kind}imum")(a.value, b.value))

    def truth(self, depth: int, last: Sequence[Both], kind: str = "") -> Both:
        kind = kind or self.draw(st.sampled_from(TRUTH if depth else TRUTH[:5]))
        if kind == "load":
            return self.element("bool", depth - 1, last)
        if kind in ("and", "or"):
            a, b = (self.truth(depth - 1, last) for _ in range(2))
            joined = algebra.and_ if kind == "and" else algebra.or_
            return Both(joined(a.e, b.e), a.value & b.value if kind == "and" else a.value | b.value)
        if kind == "not":
            a = self.truth(depth - 1, last)
            return Both(algebra.not_(a.e), ~a.value)
        x, y = (self.whole(max(depth - 1, 0), last) for _ in range(2))
        return Both(algebra.compare(kind, x.e, y.e), getattr(torch, kind)(x.value, y.value))  # type: ignore[arg-type]

    def element(self, name: str, depth: int, last: Sequence[Both]) -> Both:
        """An element of a table, whose dims are of 6."""
        at = []
        for _ in range(TABLES[name].dim()):
            x = self.whole(max(depth, 0), last)
            at.append(Both(algebra.mod(x.e, Const(6)), x.value % 6))
        found = TABLES[name][tuple(x.value for x in at)]
        found = found if found.dtype in (torch.bool, torch.float64, torch.float16) else found.long()
        return Both(Tensor(self.nodes[name], tuple(x.e for x in at)), found)

    def floating(self, depth: int, last: Sequence[Both], kind: str = "") -> tuple[Both, torch.dtype]:
        kind = kind or self.draw(st.sampled_from(FLOATING if depth else FLOATING[:1]))
        if kind == "load":
            name = self.draw(st.sampled_from(["double", "half"]))
            return self.element(name, depth - 1, last), TABLES[name].dtype
        if kind == "of whole":
            x = self.whole(depth - 1, last)
            call = OpCall(ATEN.exp.default, (x.e,), (torch.int64,), (), torch.float32)
            return Both(call, torch.exp(x.value)), torch.float32
        a, dtype = self.floating(depth - 1, last)
        if kind == "unary":
            call = OpCall(ATEN.sin.default, (a.e,), (dtype,), (), dtype)
            return Both(call, torch.sin(a.value)), dtype
        if kind == "number":
            call = OpCall(ATEN.mul.Tensor, (a.e, 0.5), (dtype, None), (), dtype)
            return Both(call, a.value * 0.5), dtype
        if kind == "where":
            x = self.truth(depth - 1, last)
            made = algebra.where(x.e, a.e, Const(0.25, "float"))
            return Both(made, torch.where(x.value, a.value, torch.tensor(0.25, dtype=dtype))), dtype
        b = self.whole(depth - 1, last)
        # a tensor of integers beside it promotes nothing
        call = OpCall(ATEN.add.Tensor, (a.e, b.e), (dtype, torch.int64), (("alpha", 2),), dtype, scalars=(False, False))
        return Both(call, torch.add(a.value.expand(B, Qs, Ks), b.value.expand(B, Qs, Ks), alpha=2)), dtype


@pytest.mark.parametrize(
    ("kind", "op"),
    [("whole", op) for op in WHOLE] + [("truth", op) for op in TRUTH] + [("floating", op) for op in FLOATING],
)
def test_what_is_written_for_an_expression_is_what_its_ops_give(kind: str, op: str) -> None:
    written = [0, 0]

    @settings(max_examples=12)
    @given(st.data(), st.sampled_from([Q, K]))
    def check(data: st.DataObject, line: Expr) -> None:
        w = Written(*TABLES.values())
        atom, size = Atom(B), Qs if line == Q else Ks
        drawn = Drawn(data.draw, dict(zip(NAMES, w.inputs, strict=True)), atom)
        last = [Both(line, torch.arange(size).view(-1, 1) if line == Q else torch.arange(size))]
        dtype = torch.int64 if kind == "whole" else torch.bool
        if kind == "floating":
            both, dtype = drawn.floating(2, last, op)
        else:
            both = getattr(drawn, kind)(2, last, op)
        labels: Labels = ((atom,), (Atom(size),))
        node = w.written(lambda x: Values(x, labels).tensor(both.e, dtype))
        found = w.value(node)
        # the other of q and k is in nothing that was drawn
        wanted = both.value.broadcast_to(B, Qs, Ks)
        wanted = wanted[:, :, 0] if line == Q else wanted[:, 0]
        written[found.unique().numel() > 1] += 1
        assert found.dtype == dtype and found.shape == (B, size)
        torch.testing.assert_close(found, wanted.to(dtype), rtol=1e-3 if dtype == torch.float16 else 1e-6, atol=1e-6)

    check()
    # not numbers alone
    assert written[True]


@pytest.mark.parametrize("what", ["an element at an element", "two places", "an op of two dtypes"])
def test_what_depends_on_no_index_is_one_number(what: str) -> None:
    w = Written(*TABLES.values())
    nodes = dict(zip(NAMES, w.inputs, strict=True))
    first, last = (Tensor(nodes["uint8"], (Const(i),)) for i in (0, 5))
    places = [algebra.mod(x, Const(6)) for x in (first, last)]
    at, double = [250 % 6, 255 % 6], TABLES["double"]
    args = (Tensor(nodes["double"], (Const(2),)), Tensor(nodes["int64"], (Const(3),)))
    both = OpCall(ATEN.add.Tensor, args, (torch.float64, torch.int64), (), torch.float64, scalars=(False, False))
    e, wanted = {
        "an element at an element": (Tensor(nodes["double"], (places[0],)), double[at[0]]),
        "two places": (Tensor(nodes["square"], tuple(places)), TABLES["square"][at[0], at[1]]),
        "an op of two dtypes": (both, double[2:3] + TABLES["int64"][3:4]),
    }[what]
    node = w.written(lambda x: Values(x, ((Atom(B),), (Atom(Ks),))).tensor(e, wanted.dtype))
    torch.testing.assert_close(w.value(node), wanted.expand(B, Ks))


@pytest.mark.parametrize("first", [False, True])
def test_a_number_among_indices_is_that_of_its_own_dim(first: bool) -> None:
    w = Written(*TABLES.values())
    index = (Const(2), K) if first else (K, Const(2))
    e = Tensor(w.inputs[NAMES.index("square")], index)
    node = w.written(lambda x: Values(x, ((Atom(B),), (Atom(Ks),))).tensor(e, torch.int64))
    row = TABLES["square"][2] if first else TABLES["square"][:, 2]
    assert w.value(node).equal(row[:Ks].expand(B, Ks))


def test_a_part_that_comes_twice_is_written_once() -> None:
    w = Written(*TABLES.values())
    element = Tensor(w.inputs[NAMES.index("int64")], (K,))
    e = algebra.minimum(algebra.abs(element), algebra.add(algebra.abs(element), Const(1), 2))
    w.written(lambda x: Values(x, ((Atom(Ks),),)).tensor(e, torch.int64))
    made = [n for n in w.graph.nodes if n.op == "call_function"]
    assert sum(n.target is torch.abs for n in made) == sum(n.target is torch.arange for n in made) == 1


def test_an_op_that_gives_another_dtype_is_not_written() -> None:
    w = Written(*TABLES.values())
    element = Tensor(w.inputs[NAMES.index("half")], (K,))
    call = OpCall(ATEN.exp.default, (element,), (torch.float16,), (), torch.float32)
    with pytest.raises(EmitError) as error:
        w.written(lambda x: Values(x, ((Atom(Ks),),)).tensor(call, torch.float32))
    assert error.value.reason.cause is reasons.MASK_DTYPE_DIFFERS


@settings(max_examples=20)
@given(st.integers(-2, 2), st.sampled_from([torch.int64, torch.float64, torch.bool]))
def test_numbers_are_written_for_all_indices(number: int, dtype: torch.dtype) -> None:
    w = Written(torch.zeros(1))
    node = w.written(lambda x: Values(x, ((Atom(B),), (Atom(Ks),))).tensor(Const(number), dtype))
    assert w.value(node).equal(torch.full((B, Ks), number).to(dtype))


# -- leaves


@st.composite
def leaves(draw: st.DrawFn) -> tuple[torch.Tensor, Labels, Dim, Dim, Dim, tuple[int, ...]]:
    """A tensor with the labels of some atoms in any order, some merged, and the dims that are wanted of it."""
    atoms = [Atom(n) for n in (2, 3, 4, 5)]
    batch, row, column = tuple(atoms[:2]), (atoms[2],), (atoms[3],)
    own = draw(st.permutations([a for a in atoms if draw(st.sampled_from([True, True, False]))]))
    dims: list[Dim] = []
    for a in own:
        if dims and len(dims[-1]) == 1 and draw(st.sampled_from([True, False, False])):
            dims[-1] = (*dims[-1], a)
        else:
            dims.append((a,))
    for _ in range(draw(st.integers(0, 2))):
        dims.insert(draw(st.integers(0, len(dims))), ())
    starts = []
    shape = []
    cut = draw(st.booleans())
    for dim in dims:
        before, after = (draw(st.integers(0, 2)) if cut and len(dim) == 1 else 0 for _ in range(2))
        starts.append(before)
        shape.append(before + math.prod(a.size for a in dim) + after)
    x = torch.arange(math.prod(shape), dtype=torch.float64).view(shape)
    labels = tuple(dims)
    whole = not any(starts) and all(n == math.prod(a.size for a in d) for n, d in zip(shape, dims))
    return x, labels, batch, row, column, () if whole else tuple(starts)


def element(x: torch.Tensor, labels: Labels, starts: Sequence[int], at: dict[Atom, int]) -> torch.Tensor:
    index = []
    for d, dim in enumerate(labels):
        place = 0
        for atom in dim:
            place = place * atom.size + at[atom]
        index.append(place + (starts[d] if starts else 0))
    return x[tuple(index)]


@settings(max_examples=30)
@given(leaves(), st.sampled_from([None, torch.float32]), st.booleans())
def test_a_leaf_has_the_dims_of_the_op_and_the_elements_of_its_tensor(
    case: tuple[torch.Tensor, Labels, Dim, Dim, Dim, tuple[int, ...]], cast: torch.dtype | None, inverse: bool
) -> None:
    x, labels, batch, row, column, starts = case
    w = Written(x + 1.0)
    leaf = Leaf(w.inputs[0], labels, cast=cast, inverse=inverse, starts=starts)
    found = w.value(w.written(lambda writer: writer.canonical(leaf, batch, row, column)))
    have = {a for dim in labels for a in dim}
    order = [*batch, *row, *column]
    assert found.shape == tuple(a.size if a in have else 1 for a in order)
    assert found.dtype == (cast or torch.float64)
    for index in itertools.product(*(range(a.size if a in have else 1) for a in order)):
        own = element(w.given[0], labels, starts, dict(zip(order, index, strict=True)))
        torch.testing.assert_close(found[index].double(), 1.0 / own if inverse else own, rtol=1e-6, atol=0.0)


@settings(max_examples=30)
@given(st.data())
def test_a_result_has_the_dims_and_strides_of_what_it_replaces(data: st.DataObject) -> None:
    atoms = [Atom(n) for n in (2, 3, 4)]
    dims = tuple((a,) for a in atoms)
    order = data.draw(st.permutations(atoms))
    merged = data.draw(st.booleans())
    labels: Labels = (order[0:1] and (order[0], order[1]), (order[2],)) if merged else tuple((a,) for a in order)
    if data.draw(st.booleans()):
        labels = (labels[0], (), *labels[1:])
    shape = [math.prod(a.size for a in dim) for dim in labels]
    memory = data.draw(st.permutations(range(len(shape))))
    like = torch.empty([shape[d] for d in memory]).permute([memory.index(d) for d in range(len(shape))])
    # where the op's result is the same along a dim, it has it once
    short = data.draw(st.sampled_from([None, 0, 1]))
    x = torch.arange(24.0).view(2, 3, 4)
    x = x if short is None else x.narrow(short, 0, 1)
    w = Written(x)
    (given_,) = [n for n in w.graph.nodes if n.op == "placeholder"]
    found = w.value(w.written(lambda writer: writer.shaped(given_, dims, labels, like)))
    assert found.shape == like.shape
    # the stride of a dim of one element means nothing
    assert all(a == b for n, a, b in zip(like.shape, found.stride(), like.stride()) if n > 1)
    whole = x.expand(2, 3, 4)
    for index in itertools.product(*(range(a.size) for a in atoms)):
        assert element(found, labels, (), dict(zip(atoms, index, strict=True))) == whole[index]


@settings(max_examples=25)
@given(
    st.lists(st.integers(1, 3), max_size=2),
    st.lists(st.integers(1, 3), max_size=2),
    st.sampled_from([None, torch.float32, torch.int64]),
)
def test_a_node_is_checked_by_its_own_shape_and_dtype(shape: list[int], said: list[int], dtype: Any) -> None:
    w = Written(torch.zeros(shape))
    (node,) = [n for n in w.graph.nodes if n.op == "placeholder"]
    if shape == said and dtype in (None, torch.float32):
        assert w.writer.checked(node, "a tensor", said, dtype) is node
        return
    with pytest.raises(EmitError) as error:
        w.writer.checked(node, "a tensor", said, dtype)
    assert error.value.reason.cause is reasons.NOT_AS_STATED


def test_what_is_no_tensor_is_not_checked_as_one() -> None:
    w = Written(torch.zeros(3))
    (node,) = [n for n in w.graph.nodes if n.op == "placeholder"]
    size = w.written(lambda x: x.method("size", node, 0))
    with pytest.raises(EmitError) as error:
        w.writer.checked(size, "a size", [])
    assert error.value.reason.cause is reasons.NOT_A_TENSOR


def test_a_function_is_written_call_by_call() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.where(x > y, x.exp(), -y) + torch.tanh(x)

    given_ = torch.randn(3, 1), torch.randn(4)
    w = Written(*given_)
    nodes = [n for n in w.graph.nodes if n.op == "placeholder"]
    found = w.value(w.written(lambda x: x.inline(function, *nodes)))
    torch.testing.assert_close(found, function(*given_))


@pytest.mark.parametrize(("queries", "keys"), [(3, 4), (1, 1), (5, 2)])
def test_distances_are_as_many_as_differences_of_places(queries: int, keys: int) -> None:
    w = Written(torch.zeros(1))
    differences = {k - q for q in range(queries) for k in range(keys)}
    assert w.writer.size_of(Distances(queries, keys)) == len(differences)


# -- values that are made again


#: What one node of the graph computes: the values in it have no nodes of their own.
CALLS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda x: (x * 2.0 + 1.0).tanh().sum(0),
    "views": lambda x: x.t().reshape(-1)[1:].clone() + 1.0,
    "own memory": lambda x: (x * 2.0).mul_(3.0).add_(1.0).exp(),
    "masked": lambda x: torch.where(x > 1.0, x, -x).masked_fill(x > 2.0, 0.5).sqrt(),
    "random": lambda x: (x + torch.rand(4, 4)).sin(),
}


@pytest.mark.parametrize("overwritten", [False, True], ids=["kept", "overwritten"])
@pytest.mark.parametrize("name", CALLS)
def test_a_value_that_is_made_again_is_what_it_was(name: str, overwritten: bool) -> None:
    x = torch.rand(4, 4, dtype=torch.float64) + 1.0

    def program(x: Any) -> Any:
        y = x.tracer.create_proxy("call_function", CALLS[name], (x,), {})
        if overwritten:
            x.mul_(0.5)
        return y, y.exp()

    view = viewed(program, x)
    eager = Run(torch.nn.Module(), view.graph)
    eager.run(x.clone())
    scope = view.scopes[0]
    inner, *_, owner = (n for n in scope.module.graph.nodes if n.op != "placeholder" and n.op != "output")
    writer = NodeWriter(Edits(view), scope, owner, torch.device("cpu"))
    again: dict[fx.Node, fx.Node] = {}
    refused: dict[fx.Node, reasons.Cause] = {}
    inside = [n for n, o in view.origin.items() if o.node is inner and n not in scope.nodes]
    with scope.module.graph.inserting_before(owner):
        for made in inside:
            try:
                again[made] = writer.node_for(made)
            except EmitError as error:
                refused[made] = error.reason.cause
    assert set(refused.values()) <= {reasons.NOT_REPEATABLE, reasons.MADE_FROM_WRITTEN}
    if overwritten or name == "random":
        # all are made of what is not there any more
        assert refused and not again
    if not overwritten and name in ("sum", "views", "masked"):
        assert again and not refused
    scope.module.recompile()
    run = Run(scope.module, scope.module.graph)
    run.run(x.clone())
    for made, node in again.items():
        torch.testing.assert_close(run.found[node], eager.found[made])
