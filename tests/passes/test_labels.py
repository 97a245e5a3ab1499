"""Labels of dims: after any reshape, and any split of atoms, they name the same element."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from attnfuse.passes.graph.labels import (
    UNKNOWN,
    Atom,
    Axes,
    Distances,
    Labels,
    drop,
    hint,
    insert,
    is_one,
    known_equal,
    stride_hint,
)

Shape = Sequence[int]


def elements(labels: Labels, shape: Sequence[int], atoms: Sequence[Atom]) -> torch.Tensor:
    """A tensor of that shape whose element is the number of its place among the atoms, each a digit."""
    steps, step = {}, 1
    for atom in reversed(atoms):
        steps[atom], step = step, step * hint(atom)
    out = torch.zeros(tuple(shape), dtype=torch.int64)
    for d, dim in enumerate(labels):
        line, width = torch.zeros(1, dtype=torch.int64), 1
        # the fastest atom of a dim is the last
        for atom in reversed(dim):
            size = hint(atom)
            line = (torch.arange(size)[:, None] * steps[atom] + line[None]).reshape(-1)
            width *= size
        assert width == out.shape[d]
        out = out + line.reshape([-1 if i == d else 1 for i in range(out.dim())])
    return out


@st.composite
def factors(draw: st.DrawFn, total: int, ones: int = 2) -> list[int]:
    """Sizes with that product, so many of them 1 at most."""
    sizes = []
    while total > 1:
        size = draw(st.sampled_from([n for n in range(2, total + 1) if total % n == 0]))
        sizes.append(size)
        total //= size
    for _ in range(draw(st.integers(0, ones))):
        sizes.insert(draw(st.integers(0, len(sizes))), 1)
    return sizes


def lines_up(a: Shape, b: Shape) -> bool:
    """Whether there are sizes of which both are made by merging neighbours."""
    places = {math.prod(sizes[i:]) for sizes in (a, b) for i in range(len(sizes) + 1)}
    return all(large % small == 0 for small, large in itertools.pairwise(sorted(places)))


TOTALS = st.sampled_from([24, 36, 12, 16, 60, 6])


@st.composite
def labelled(draw: st.DrawFn) -> tuple[Axes, Labels, list[int]]:
    """Dims of none, one or several atoms, and some of these split once more; the shape."""
    axes = Axes()
    dims: list[list[Atom]] = [[]]
    for size in draw(factors(draw(TOTALS))):
        if draw(st.booleans()):
            dims.append([])
        dims[-1] += axes.fresh(size)
    labels = tuple(map(tuple, dims))
    shape = [math.prod(a.size for a in dim) for dim in labels]
    for dim in labels:
        for atom in dim:
            if atom.size > 1 and draw(st.integers(0, 4)) == 0:
                axes.split(atom, draw(factors(atom.size, 0)))
    return axes, labels, shape


@given(st.data())
def test_a_regrouped_tensor_has_the_same_elements_under_the_labels(data: st.DataObject) -> None:
    axes, labels, shape = data.draw(labelled())
    wanted = data.draw(factors(math.prod(shape)))
    before = axes.resolve(labels)
    found = axes.regroup(labels, wanted)
    if found is None:
        # only where sizes do not line up
        assert not lines_up([a.size for d in before for a in d], wanted)
        return
    ends = axes.resolve(labels), axes.resolve(found)
    atoms = [a for d in ends[0] for a in d]
    assert [a for d in ends[1] for a in d] == atoms
    x = elements(ends[0], shape, atoms)
    assert torch.equal(elements(ends[1], wanted, atoms), x.reshape(wanted))


@given(st.data())
def test_a_dim_has_the_same_elements_however_often_its_atoms_are_split(data: st.DataObject) -> None:
    axes, labels, shape = data.draw(labelled())
    whole = [a for d in axes.resolve(labels) for a in d]
    for atom in whole:
        if atom.size > 1 and data.draw(st.booleans()):
            parts = axes.split(atom, data.draw(factors(atom.size, 0)))
            assert axes.atoms((atom,)) == parts and atom not in axes.atoms((atom,))
    parts = [a for d in axes.resolve(labels) for a in d]
    assert not set(parts) & set(axes.parts) and axes.resolve(axes.resolve(labels)) == axes.resolve(labels)
    # digits of the parts count on as those of the whole do
    assert torch.equal(elements(axes.resolve(labels), shape, parts), torch.arange(math.prod(shape)).reshape(shape))


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_dims_are_dropped_and_put_in_where_squeeze_and_unsqueeze_do(shape: list[int], data: st.DataObject) -> None:
    axes = Axes()
    labels = tuple(axes.fresh(n) for n in shape)
    at = data.draw(st.integers(0, len(shape)))
    x = torch.empty(shape)
    wider = insert(labels, at, axes.fresh(5))
    assert [math.prod(a.size for a in d) for d in wider] == list(
        x.unsqueeze(at).expand(*shape[:at], 5, *shape[at:]).shape
    )
    assert drop(wider, at) == labels
    gone = data.draw(st.integers(0, len(shape) - 1))
    assert [math.prod(a.size for a in d) for d in drop(labels, gone)] == list(x.select(gone, 0).shape)


def test_a_shape_of_fewer_or_more_elements_is_not_one_of_the_same() -> None:
    axes = Axes()
    assert axes.regroup((axes.fresh(6),), [3]) is None and axes.regroup((axes.fresh(3),), [3, 2]) is None


def test_nothing_is_known_to_be_a_multiple_of_nothing() -> None:
    axes = Axes()
    (six,) = axes.fresh(6)
    assert axes.regroup(((six,),), [0]) is None
    (none,) = axes.fresh(0)
    found = axes.regroup(((none,),), [3, 0])
    assert found is not None and [math.prod(a.size for a in axes.atoms(d)) for d in found] == [3, 0]


def symbolic(shape: Shape, names: Sequence[int]) -> tuple[list[Any], ShapeEnv]:
    """Sizes, those of `names` symbolic."""
    env = ShapeEnv()
    dynamic = [DimDynamic.DYNAMIC if n in names else DimDynamic.STATIC for n in shape]
    real = torch.empty(tuple(shape))
    with FakeTensorMode(shape_env=env) as mode:
        x = mode.from_tensor(real, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dynamic))
    return list(x.shape), env


@settings(max_examples=40)
@given(st.permutations([5, 7, 4, 3]), st.integers(1, 3), st.data())
def test_symbolic_sizes_line_up_without_a_guard(order: list[int], dynamic: int, data: st.DataObject) -> None:
    sizes, env = symbolic(order, order[:dynamic])
    axes = Axes()
    labels = tuple(axes.fresh(n) for n in sizes)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(sizes) - 1))))
    groups = [sizes[a:b] for a, b in itertools.pairwise([0, *cuts, len(sizes)])]
    merged = []
    for group in groups:
        total: Any = 1
        for n in group:
            total = total * n
        merged.append(total)
    guards = len(env.guards)
    found = axes.regroup(labels, merged)
    assert found is not None and len(env.guards) == guards
    # there and back again
    assert axes.regroup(found, sizes) == labels and len(env.guards) == guards
    atoms = [a for d in axes.resolve(labels) for a in d]
    wanted = [math.prod(hint(a) for a in d) for d in found]
    numbers = [hint(Atom(n)) for n in sizes]
    assert torch.equal(elements(found, wanted, atoms), elements(labels, numbers, atoms).reshape(wanted))


def test_sizes_that_are_equal_by_chance_do_not_line_up() -> None:
    (a, b), env = symbolic([4, 4], [4])
    other, _ = symbolic([4, 6], [4, 6])
    axes = Axes()
    assert axes.regroup((axes.fresh(other[0]),), [4]) is None
    assert not known_equal(other[0], 4) and known_equal(a, a) and not is_one(a)
    assert axes.regroup((axes.fresh(a), axes.fresh(3)), [3, b]) is None and not env.guards


def test_hints_are_the_sizes_that_the_graph_was_traced_with() -> None:
    (n, m), _ = symbolic([5, 7], [5, 7])
    assert [hint(Atom(x)) for x in (3, n, n * m)] == [3, 5, 35]
    assert [stride_hint(x) for x in (3, n, n * m)] == [3, 5, 35]
    unknown = ShapeEnv().create_unbacked_symint()
    assert hint(Atom(unknown)) == UNKNOWN and stride_hint(unknown) == 0


@given(st.integers(1, 6), st.integers(1, 6))
def test_distances_count_every_pair_of_a_query_and_a_key(queries: int, keys: int) -> None:
    found = {k - q + queries - 1 for q in range(queries) for k in range(keys)}
    assert found == set(range(Distances(queries, keys).size))
