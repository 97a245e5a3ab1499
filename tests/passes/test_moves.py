"""Where the dims of moving ops come from: what `dim_map` says, and what is carried along it, is what the ops do."""

from __future__ import annotations

import ast
import inspect
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from label_places import digits, index_at
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from attnfuse.expr import Algebra, Const, Expr, substitute
from attnfuse.passes.capture.view import View
from attnfuse.passes.graph import moves, views, vocabulary
from attnfuse.passes.graph.aten import shape_of, value_of
from attnfuse.passes.graph.labels import Atom, Axes, Labels
from attnfuse.passes.graph.memory import Writes
from attnfuse.passes.graph.moves import Dim, DimMap, Interleave, New, Regroup, Slice, Tile, dim_map
from attnfuse.passes.graph.vocabulary import COPIES
from attnfuse.passes.masks import terms
from attnfuse.passes.masks.terms import Axis, Tensor, Terms
from attnfuse.passes.padding import rewrite, rowwise, sources
from attnfuse.passes.read import sinks

aten = torch.ops.aten
Shape = tuple[int, ...]
Call = tuple[Any, list[Any]]


# -- calls of every op


def dims_of(shape: Shape) -> st.SearchStrategy[int]:
    return st.integers(-len(shape), len(shape) - 1)


@st.composite
def permuted(draw: st.DrawFn, shape: Shape) -> Call:
    rank = len(shape)
    choices = [aten.permute.default, aten.movedim.intlist]
    if rank:
        choices += [aten.transpose.int, aten.swapdims.default, aten.moveaxis.int]
    if rank >= 2:
        choices += [aten.mT.default, aten.adjoint.default]
    if rank <= 2:
        choices += [aten.t.default, aten.numpy_T.default]
    op = draw(st.sampled_from(choices))
    order = [d - rank * draw(st.booleans()) for d in draw(st.permutations(range(rank)))]
    if op is aten.permute.default:
        return op, [order]
    if op is aten.movedim.intlist:
        return op, [draw(st.permutations(range(rank))), order]
    takes_dims = op in (aten.transpose.int, aten.swapdims.default, aten.moveaxis.int)
    return op, [draw(dims_of(shape)), draw(dims_of(shape))] if takes_dims else []


def factored(draw: st.DrawFn, total: int) -> list[int]:
    """Sizes with that product, with some of 1."""
    sizes = []
    while total > 1 and len(sizes) < 4:
        size = draw(st.sampled_from([n for n in range(1, total + 1) if total % n == 0]))
        sizes.append(size)
        total //= size
    sizes.insert(draw(st.integers(0, len(sizes))), total)
    return sizes


@st.composite
def viewed(draw: st.DrawFn, shape: Shape) -> Call:
    rank, total = len(shape), math.prod(shape)
    wanted = draw(st.permutations([*shape, 1])) if total == 0 else factored(draw, total)
    choices = [aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.squeeze.default]
    choices += [aten.unsqueeze.default, aten.view_as.default, aten.reshape_as.default]
    if rank:
        choices += [aten.flatten.using_ints, aten.unflatten.int, aten.squeeze.dim, aten.squeeze.dims]
    op = draw(st.sampled_from(choices))
    if op is aten.squeeze.default:
        return op, []
    if op is aten.unsqueeze.default:
        return op, [draw(st.integers(-rank - 1, rank))]
    if op in (aten.view_as.default, aten.reshape_as.default):
        return op, [torch.empty(wanted)]
    if op is aten.flatten.using_ints:
        first, last = sorted((draw(st.integers(0, rank - 1)), draw(st.integers(0, rank - 1))))
        return op, [first, last - rank * draw(st.booleans())]
    if op is aten.unflatten.int:
        dim = draw(dims_of(shape))
        return op, [dim, factored(draw, shape[dim]) if shape[dim] else [0, 1]]
    if op is aten.squeeze.dim:
        return op, [draw(dims_of(shape))]
    if op is aten.squeeze.dims:
        return op, [[d for d in range(rank) if draw(st.booleans())]]
    return op, [wanted]


@st.composite
def expanded(draw: st.DrawFn, shape: Shape) -> Call:
    lead = draw(st.lists(st.integers(0, 3), max_size=2))
    wanted = [*lead, *(draw(st.integers(0, 3)) if n == 1 else n for n in shape)]
    op = draw(st.sampled_from([aten.expand.default, aten.broadcast_to.default, aten.expand_as.default]))
    if op is aten.expand_as.default:
        return op, [torch.empty(wanted)]
    own = [None] * len(lead) + list(shape)
    return op, [[-1 if n == o and draw(st.booleans()) else n for n, o in zip(wanted, own, strict=True)]]


@st.composite
def repeated(draw: st.DrawFn, shape: Shape) -> Call:
    lead = draw(st.integers(0, 2))
    return aten.repeat.default, [
        draw(st.lists(st.integers(0, 3), min_size=len(shape) + lead, max_size=len(shape) + lead))
    ]


@st.composite
def interleaved(draw: st.DrawFn, shape: Shape) -> Call:
    return aten.repeat_interleave.self_int, [draw(st.integers(1, 3)), draw(dims_of(shape))]


@st.composite
def sliced(draw: st.DrawFn, shape: Shape) -> Call:
    places = st.none() | st.integers(-6, 6)
    return aten.slice.Tensor, [draw(dims_of(shape)), draw(places), draw(places), draw(st.integers(1, 3))]


@st.composite
def narrowed(draw: st.DrawFn, shape: Shape) -> Call:
    dim = draw(dims_of(shape))
    start = draw(st.integers(0, shape[dim]))
    length = draw(st.integers(0, shape[dim] - start))
    from_end = 0 < start < shape[dim] and draw(st.booleans())
    return aten.narrow.default, [dim, start - shape[dim] if from_end else start, length]


@st.composite
def selected(draw: st.DrawFn, shape: Shape) -> Call:
    dim = draw(dims_of(shape).filter(lambda d: shape[d] > 0))
    return aten.select.int, [dim, draw(st.integers(-shape[dim], shape[dim] - 1))]


@st.composite
def flipped(draw: st.DrawFn, shape: Shape) -> Call:
    return aten.flip.default, [[d - len(shape) * draw(st.booleans()) for d in range(len(shape)) if draw(st.booleans())]]


@st.composite
def copied(draw: st.DrawFn, shape: Shape) -> Call:
    ops = {
        "alias": aten.alias.default,
        "clone": aten.clone.default,
        "contiguous": aten.contiguous.default,
        "lift_fresh": aten.lift_fresh.default,
        "lift_fresh_copy": aten.lift_fresh_copy.default,
    }
    assert set(ops) == COPIES
    return draw(st.sampled_from(list(ops.values()))), []


@st.composite
def taken_apart(draw: st.DrawFn, shape: Shape) -> Call:
    dim = draw(dims_of(shape))
    size = shape[dim]
    cuts = sorted(draw(st.lists(st.integers(0, size), max_size=3)))
    anywhere = draw(st.lists(st.integers(-5, 5), min_size=1, max_size=3))
    sizes = [b - a for a, b in itertools.pairwise([0, *cuts, size])]
    choices: list[Call] = [
        (aten.split.Tensor, [draw(st.integers(1, 4)), dim]),
        (aten.split_with_sizes.default, [sizes, dim]),
        (aten.split.sizes, [sizes, dim]),
        (aten.chunk.default, [draw(st.integers(1, 4)), dim]),
        (aten.tensor_split.sections, [draw(st.integers(1, 4)), dim]),
        (aten.tensor_split.indices, [anywhere, dim]),
        (aten.tensor_split.tensor_indices_or_sections, [torch.tensor(anywhere), dim]),
        (aten.unbind.int, [dim]),
    ]
    return draw(st.sampled_from(choices if size else choices[:-1]))


OPS: dict[str, Callable[[Shape], st.SearchStrategy[Call]]] = {
    "permute": permuted,
    "view": viewed,
    "expand": expanded,
    "repeat": repeated,
    "repeat_interleave": interleaved,
    "slice": sliced,
    "narrow": narrowed,
    "select": selected,
    "flip": flipped,
    "copies": copied,
    "parts": taken_apart,
}
WITH_DIMS = {"repeat_interleave", "slice", "narrow", "select", "parts"}


@st.composite
def moving(draw: st.DrawFn, name: str) -> list[fx.Node]:
    """The results of a call of the op on a tensor of distinct values."""
    sizes = st.sampled_from([0, 1, 1, 2, 2, 3, 4, 6])
    shape = tuple(draw(st.lists(sizes, min_size=name in WITH_DIMS, max_size=4).filter(lambda s: math.prod(s) <= 72)))
    if name == "select" and not any(shape):
        shape = (*shape, 2)
    return called(torch.arange(math.prod(shape)).reshape(shape), *draw(OPS[name](shape)))


def called(x: torch.Tensor, op: Any, args: Sequence[Any]) -> list[fx.Node]:
    graph = fx.Graph()

    def given(value: Any) -> Any:
        if isinstance(value, list):
            return [given(x) for x in value]
        if not isinstance(value, (torch.Tensor, torch.SymInt)):
            return value
        node = graph.placeholder("x")
        node.meta["val"] = value
        return node

    node = graph.call_function(op, tuple(given(a) for a in (x, *args)))
    node.meta["val"] = made = op(x, *args)
    if isinstance(made, torch.Tensor):
        return [node]
    parts = [graph.call_function(operator.getitem, (node, i)) for i in range(len(made))]
    for part, value in zip(parts, made, strict=True):
        part.meta["val"] = value
    return parts


def source_of(node: fx.Node) -> fx.Node:
    found = dim_map(node)
    assert found is not None
    return found.source


# -- what a map says, by itself


def number(size: Any) -> int:
    return size if isinstance(size, int) else int(size.node.hint)


def through(found: DimMap, index: Shape) -> Shape:
    """The index in the source, as the docstrings of moves.py have it."""
    own, shape = ([number(n) for n in sizes] for sizes in (shape_of(found.source), found.shape))
    at = [0] * len(own)
    named: list[int] = []
    for d, place in found.fixed:
        at[d] = number(place)
        named.append(d)
    for x, i in zip(found.dims, index, strict=True):
        if isinstance(x, Dim):
            at[x.dim] = i
        elif isinstance(x, Slice):
            at[x.dim] = number(x.start) + x.step * i
        elif isinstance(x, Tile):
            at[x.dim] = i % own[x.dim]
        elif isinstance(x, Interleave):
            at[x.dim] = i // number(x.repeats)
        if not isinstance(x, (New, Regroup)):
            named.append(x.dim)
    for run in found.runs:
        flat = 0
        for out in run.outs:
            flat = flat * shape[out] + index[out]
        for d in reversed(run.dims):
            at[d] = flat % own[d]
            flat //= own[d]
        named += run.dims
    assert len(set(named)) == len(named)
    assert all(own[d] == 1 for d in range(len(own)) if d not in named)
    return tuple(at)


def places(shape: Sequence[Any]) -> Iterator[Shape]:
    return itertools.product(*(range(number(n)) for n in shape))


def is_unsaid(found: DimMap) -> bool:
    """Whether a place is not known: a tensor says where to cut."""
    return any(isinstance(x, Slice) and x.start is None for x in found.dims)


@pytest.mark.parametrize("name", OPS)
def test_a_map_says_of_each_element_where_it_comes_from(name: str) -> None:
    @given(moving(name))
    def check(results: list[fx.Node]) -> None:
        for node in results:
            found, made = dim_map(node), value_of(node)
            assert found is not None
            assert found.shape == tuple(made.shape) and len(found.dims) == made.dim()
            if is_unsaid(found):
                assert "tensor_indices" in str(node.args[0].target)  # type: ignore[union-attr]
                continue
            for index in places(made.shape):
                assert made[index] == value_of(found.source)[through(found, index)]

    check()


def test_maps_are_as_plain_as_the_shapes_allow() -> None:
    def of(shape: Shape, op: Any, *args: Any) -> tuple[Any, ...]:
        (node,) = called(torch.empty(shape), op, args)
        found = dim_map(node)
        assert found is not None
        return found.dims

    assert of((2, 3, 4), aten.view.default, [2, 12]) == (Dim(0), Regroup((1, 2), (1,)))
    assert of((2, 3, 8), aten.view.default, [2, 3, 2, 4]) == (Dim(0), Dim(1), *[Regroup((2,), (2, 3))] * 2)
    assert of((6, 4), aten.view.default, [4, 1, 6]) == (Regroup((0, 1), (0, 2)), New(), Regroup((0, 1), (0, 2)))
    assert of((2, 1, 3), aten.view.default, [2, 3, 1]) == (Dim(0), Dim(2), New())
    assert of((2, 1), aten.expand.default, [5, 2, 3]) == (New(), Dim(0), New())
    assert of((2, 3), aten.slice.Tensor, 1, 0, 9) == (Dim(0), Dim(1))
    assert of((2, 1), aten.flip.default, [1]) == (Dim(0), Dim(1))


# -- labels


def fresh(axes: Axes, shape: Sequence[Any]) -> Labels:
    return tuple(axes.fresh(n) for n in shape)


@pytest.mark.parametrize("name", OPS)
def test_labels_are_carried_to_the_same_elements_both_ways(name: str) -> None:
    carried = [0, 0]

    @given(moving(name))
    def check(results: list[fx.Node]) -> None:
        for node in results:
            made, source = value_of(node), source_of(node)
            axes, own = Axes(), value_of(source)
            step = views.back(axes, node, start := fresh(axes, made.shape))
            if step is not None:
                assert step.source is source
                carried[0] += 1
                ends = axes.resolve(start), axes.resolve(step.labels)
                for index in places(made.shape):
                    assert made[index] == own[index_at(ends[1], digits(ends[0], index))]
            axes = Axes()
            found = views.forward(axes, node, start := fresh(axes, own.shape))
            if found is not None:
                carried[1] += 1
                ends = axes.resolve(start), axes.resolve(found)
                assert own.numel() == made.numel()
                for index in places(own.shape):
                    assert own[index] == made[index_at(ends[1], digits(ends[0], index))]

    check()
    # an op with several results is not read backwards
    assert (carried[0] > 0) == (name != "parts")
    # and forwards only where it gives one, which few draws do
    assert carried[1] > 0 or name == "parts"


@pytest.mark.parametrize("name", sorted(set(OPS) - {"parts"}))
def test_rows_are_carried_to_the_same_elements(name: str) -> None:
    """Atoms of the source that are in the result say which of its elements a result's element is."""

    @given(moving(name))
    def check(results: list[fx.Node]) -> None:
        (node,) = results
        found, axes = dim_map(node), Axes()
        assert found is not None
        made, own = value_of(node), value_of(found.source)
        out = views.onward(axes, found, start := fresh(axes, own.shape))
        if out is None:
            return
        kept = {a for d in axes.resolve(start) for a in d}
        ends = axes.resolve(start), axes.resolve(out)
        for index in places(made.shape):
            given_ = {a: i for a, i in digits(ends[1], index).items() if a in kept}
            came = digits(ends[0], through(found, index))
            assert {a: came[a] for a in given_} == given_
        for d, dim in enumerate(start):
            if d not in found.altered and made.numel():
                assert set(axes.atoms(dim)) <= {a for x in ends[1] for a in x}

    check()


# -- indices of masks


def reader() -> Terms:
    return Terms(View(fx.Graph(), [], {}, {}, FakeTensorMode(), False, Writes({}, {}), set()), Algebra(), {}, False)


def read(node: fx.Node) -> tuple[Tensor, tuple[Axis, ...]]:
    axes = tuple(Axis(Atom(n)) for n in shape_of(node))
    found = reader().at(node, axes)
    assert isinstance(found, Tensor)
    return found, axes


@pytest.mark.parametrize("name", OPS)
def test_masks_are_read_at_the_same_elements(name: str) -> None:
    @given(moving(name))
    def check(results: list[fx.Node]) -> None:
        for node in results:
            made, algebra = value_of(node), Algebra()
            if not made.numel():
                continue
            found, axes = read(node)
            # no element is asked for where one of all is known
            assert found.node is (node if name == "parts" else source_of(node))
            for index in places(made.shape):
                values: dict[Expr, Expr] = {a: Const(i) for a, i in zip(axes, index, strict=True)}
                at = [substitute(e, values, algebra) for e in found.index]
                assert all(isinstance(e, Const) for e in at)
                assert made[index] == value_of(found.node)[tuple(int(e.value) for e in at)]  # type: ignore[attr-defined]

    check()


@st.composite
def indexed(draw: st.DrawFn) -> fx.Node:
    """x[..] by tensors of indices in some of its dims, before, after and between others."""
    shape = tuple(draw(st.lists(st.integers(2, 4), min_size=2, max_size=4)))
    graph, rank = fx.Graph(), draw(st.integers(1, 2))

    def call(op: Any, *args: Any) -> fx.Node:
        node = graph.call_function(op, args)
        node.meta["val"] = op(*fx.node.map_arg(args, value_of))
        return node

    x = graph.placeholder("x")
    x.meta["val"] = torch.arange(math.prod(shape)).view(shape)
    given: list[fx.Node | None] = []
    for n in shape:
        if draw(st.booleans()):
            first = draw(st.integers(0, n - 2)) - n * draw(st.booleans())
            line = call(aten.arange.start, first, first + 2)
            given.append(call(aten.view.default, line, draw(st.sampled_from([[2], [2, 1]][:rank]))))
        else:
            given.append(None)
    assume(any(i is not None for i in given))
    # none behind the last, as x[i] has it
    last = max(d for d, i in enumerate(given) if i is not None)
    return call(aten.index.Tensor, x, given[: last + 1] if draw(st.booleans()) else given)


@given(indexed())
def test_tensors_of_indices_are_read_at_the_same_elements(node: fx.Node) -> None:
    made, algebra = value_of(node), Algebra()
    found, axes = read(node)
    for index in places(made.shape):
        values: dict[Expr, Expr] = {a: Const(i) for a, i in zip(axes, index, strict=True)}
        at = [substitute(e, values, algebra) for e in found.index]
        assert all(isinstance(e, Const) for e in at)
        assert made[index] == value_of(found.node)[tuple(int(e.value) for e in at)]  # type: ignore[attr-defined]


# -- symbolic sizes

B, N, H, C = 2, 5, 4, 6
SYMBOLIC: dict[str, tuple[Shape, Callable[[torch.Tensor], Call], tuple[Any, ...]]] = {
    "split": (
        (B, N, H * C),
        lambda x: (aten.view.default, [[x.shape[0], x.shape[1], H, C]]),
        (Dim, Dim, Regroup, Regroup),
    ),
    "merged": ((B, N, H, C), lambda x: (aten.flatten.using_ints, [2, 3]), (Dim, Dim, Regroup)),
    "rows": ((B, N, C), lambda x: (aten.view.default, [[x.shape[0] * x.shape[1], C]]), (Regroup, Dim)),
    "both": (
        (B, N, H, C),
        lambda x: (aten.view.default, [[x.shape[0] * x.shape[1], H * C]]),
        (Regroup, Regroup),
    ),
    "swapped": ((B, N, C), lambda x: (aten.view.default, [[x.shape[1], x.shape[0], C]]), (Regroup, Regroup, Dim)),
    "unsqueezed": ((B, N), lambda x: (aten.unsqueeze.default, [1]), (Dim, New, Dim)),
    "transposed": ((B, N, C), lambda x: (aten.transpose.int, [0, 1]), (Dim, Dim, Dim)),
    "expanded": ((B, 1, C), lambda x: (aten.expand.default, [[-1, x.shape[0], -1]]), (Dim, New, Dim)),
    "repeated": ((1, N), lambda x: (aten.repeat.default, [[x.shape[1], 2]]), (New, Tile)),
    "interleaved": ((B, N), lambda x: (aten.repeat_interleave.self_int, [2, 1]), (Dim, Interleave)),
    "flipped": ((B, N), lambda x: (aten.flip.default, [[1]]), (Dim, Slice)),
    "cut": ((B, N), lambda x: (aten.slice.Tensor, [1, 2]), (Dim, Slice)),
    "whole": ((B, N), lambda x: (aten.slice.Tensor, [1, 0, x.shape[1]]), (Dim, Dim)),
    "narrowed": ((B, N), lambda x: (aten.narrow.default, [1, x.shape[0], 2]), (Dim, Slice)),
    "last": ((B, N, C), lambda x: (aten.select.int, [1, -1]), (Dim, Dim)),
    "parts": ((B, N, C), lambda x: (aten.split.Tensor, [4, 2]), (Dim, Dim, Slice)),
}


@pytest.mark.parametrize("name", SYMBOLIC)
def test_symbolic_sizes_are_followed_without_a_guard(name: str) -> None:
    shape, call, expected = SYMBOLIC[name]
    env = ShapeEnv()
    dynamic = [DimDynamic.DYNAMIC if n in (B, N) else DimDynamic.STATIC for n in shape]
    real = torch.arange(math.prod(shape)).reshape(shape)
    with FakeTensorMode(shape_env=env) as mode:
        x = mode.from_tensor(real, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dynamic))
        op, args = call(x)
        results = called(x, op, args)
    plain = [[number(n) for n in a] if isinstance(a, list) else a for a in args]
    plain = [number(a) if isinstance(a, torch.SymInt) else a for a in plain]
    concrete = op(real, *plain)
    guards = len(env.guards)
    for node, made in zip(results, [concrete] if isinstance(concrete, torch.Tensor) else concrete, strict=True):
        found = dim_map(node)
        assert found is not None and tuple(map(type, found.dims)) == expected
        for index in places(made.shape):
            assert made[index] == real[through(found, index)]
        axes = Axes()
        views.back(axes, node, fresh(axes, shape_of(node)))
        views.forward(axes, node, fresh(axes, shape_of(found.source)))
        read(node)
    assert len(env.guards) == guards


def test_places_that_symbolic_sizes_do_not_tell_are_not_read() -> None:
    env = ShapeEnv()
    dynamic, real = [DimDynamic.DYNAMIC] * 2, torch.empty(B, N)
    with FakeTensorMode(shape_env=env) as mode:
        x = mode.from_tensor(real, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dynamic))
        nodes = [*called(x, aten.slice.Tensor, [1, x.shape[0]]), *called(x, aten.flip.default, [[0]])]
    for node in nodes:
        found = dim_map(node)
        assert found is not None
        (cut,) = (d for d in found.dims if isinstance(d, Slice))
        assert isinstance(cut.start, torch.SymInt)
        # the tensor stays as it is
        assert read(node)[0].node is node


# -- one table


def test_every_op_that_is_taken_for_a_move_has_a_rule() -> None:
    spelled = set(vocabulary._KINDS.values()) - {"to"}
    assert spelled | COPIES <= moves.MOVES
    # each rule is drawn by its name, in every spelling
    assert set(OPS) | {"split", "split_with_sizes", "chunk", "tensor_split", "unbind"} >= moves.MOVES - COPIES


def names_in(module: ModuleType) -> set[str]:
    """Names of moving ops in the code of a reader, but for those of the methods that it writes."""
    tree = ast.parse(inspect.getsource(module))
    written = {
        id(arg)
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "method"
        for arg in call.args
    }
    texts = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in written]
    return {text for text in texts if isinstance(text, str)} & moves.MOVES


@pytest.mark.parametrize("module", [views, terms, rowwise, rewrite, sinks, sources], ids=lambda m: m.__name__)
def test_no_reader_names_a_moving_op_itself(module: ModuleType) -> None:
    assert names_in(module) == set()
    assert names_in(moves) >= {"view", "permute", "unbind"}
