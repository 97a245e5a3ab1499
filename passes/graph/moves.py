"""Where the dims of the result of an op that only moves, repeats or cuts elements come from: what each such op means, once.

`dim_map` says it of one node, in terms that no longer name the op. Its readers carry something along such a map: labels
(views.py), an index (terms.py), dims of rows (rowwise.py), the sizes of a smaller tensor (unpadder.py). Each refuses the maps
that it has no use for. Sizes may be symbolic, and are compared only as far as that is known, so that no guard is added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import fx

from attnfuse._compat import OpOverload, statically_known_true
from attnfuse.passes.graph.aten import arguments, getitem_source, is_tensor, name_of, shape_of, value_of
from attnfuse.passes.graph.constants import constant
from attnfuse.passes.graph.labels import Size, is_one, known_equal
from attnfuse.passes.graph.vocabulary import COPIES

T = TypeVar("T")


@dataclass(frozen=True)
class Dim:
    """Dim `dim` of the input, as it is."""

    dim: int


@dataclass(frozen=True)
class New:
    """No dim of the input, or one of size 1: whatever the index here, the element is the same."""


@dataclass(frozen=True)
class Regroup:
    """The dims `outs` of the result are the dims `dims` of the input, flattened and split again; several result dims share it.

    One of `dims` alone is split, one of `outs` alone is made by flattening. Where symbolic sizes do not tell which dims belong
    together there are many of both. Dims of size 1 are in neither.
    """

    dims: tuple[int, ...]
    outs: tuple[int, ...]


# What holds sizes is not compared by ==: that of symbolic sizes would be a guard.


@dataclass(frozen=True, eq=False)
class Slice:
    """The index in `dim` is start + step * index; start: None where the sizes do not tell it. A flip has step -1."""

    dim: int
    start: Size | None
    step: int


@dataclass(frozen=True, eq=False)
class Tile:
    """Dim `dim`, whole, `repeats` times in turn: the index in it is index % its size."""

    dim: int
    repeats: Size


@dataclass(frozen=True, eq=False)
class Interleave:
    """Each element of `dim` `repeats` times in turn: the index in it is index // repeats."""

    dim: int
    repeats: Size


Source = Dim | New | Regroup | Slice | Tile | Interleave


@dataclass(frozen=True, eq=False)
class DimMap:
    """Where the elements of a result come from.

    source   the tensor that they are elements of
    shape    of the result
    dims     for each dim of the result where its index goes
    fixed    (dim of the source, index in it) where one index was chosen; None where the sizes do not tell which. Of a dim of the
             source that is neither here nor in `dims` only index 0 is read: it has size 1
    method   the method of tensors that makes the result given its sizes, for ops whose own arguments are sizes
    """

    source: fx.Node
    shape: tuple[Size, ...]
    dims: tuple[Source, ...]
    fixed: tuple[tuple[int, Size | None], ...] = ()
    method: str | None = None

    @property
    def is_identity(self) -> bool:
        """Whether each element stays in its place."""
        return self.dims == tuple(map(Dim, range(len(shape_of(self.source)))))

    @property
    def runs(self) -> tuple[Regroup, ...]:
        """What is regrouped, each once."""
        return tuple(dict.fromkeys(x for x in self.dims if isinstance(x, Regroup)))

    @property
    def altered(self) -> tuple[int, ...]:
        """The dims of the source whose elements the result does not have each once and in order."""
        chosen = tuple(dim for dim, _ in self.fixed)
        return tuple(x.dim for x in self.dims if isinstance(x, (Slice, Tile, Interleave))) + chosen

    @property
    def repeats(self) -> bool:
        """Whether elements come up several times."""
        pairs = zip(self.dims, self.shape, strict=True)
        return any(isinstance(x, (Tile, Interleave)) or (isinstance(x, New) and not is_one(n)) for x, n in pairs)


def dim_map(node: fx.Node) -> DimMap | None:
    """Where the dims of the result come from; None if `node` is no such op, or where its arguments do not tell."""
    part = getitem_source(node)
    if part is not None:
        each = part_maps(part[0])
        return None if each is None else each[part[1]]
    return _by_rule(_RULES, node)


def part_maps(node: fx.Node) -> list[DimMap] | None:
    """`dim_map` of each result of an op that takes a tensor apart; None if `node` is no such op."""
    return _by_rule(_PARTS, node) if isinstance(value_of(node), (list, tuple)) else None


def _by_rule(rules: dict[str, Callable[[fx.Node, fx.Node], T]], node: fx.Node) -> T | None:
    rule = rules.get(name_of(node))
    source = node.args[0] if node.args else None
    return rule(node, source) if rule is not None and isinstance(source, fx.Node) and is_tensor(source) else None


# -- arguments


def _number(x: Any) -> Size | None:
    """The number, symbolic or not, that an argument is."""
    number = constant(x)
    if isinstance(number, int):
        return number
    value = value_of(x) if isinstance(x, fx.Node) else x
    return value if isinstance(value, torch.SymInt) else None


def _place(x: Any, size: Size) -> Size | None:
    """Where in a dim of that size `x` is, counted from its beginning; None where that is not known."""
    at = _number(x)
    if at is None or statically_known_true(at >= 0):
        return at
    if isinstance(at, int) and isinstance(size, int):
        # a slice from before the beginning begins there
        return max(at + size, 0)
    return at + size if statically_known_true(at < 0) and statically_known_true(at + size >= 0) else None


def _changed(node: fx.Node, source: fx.Node, changed: dict[int, Source]) -> DimMap:
    """Of the same rank: all dims as they are, but for some."""
    dims = tuple(changed.get(d, Dim(d)) for d in range(len(shape_of(source))))
    return DimMap(source, shape_of(node), dims)


# -- the same elements, each once


def _copy(node: fx.Node, source: fx.Node) -> DimMap:
    return _changed(node, source, {})


def _permute(node: fx.Node, source: fx.Node) -> DimMap:
    """Which dim goes where is told by the op itself, on a tensor whose dims are told apart by their sizes."""
    assert isinstance(node.target, OpOverload)
    probe = torch.empty([2 + d for d in range(len(shape_of(source)))], device="meta")
    moved: torch.Tensor = node.target(probe, *node.args[1:], **node.kwargs)
    return DimMap(source, shape_of(node), tuple(Dim(size - 2) for size in moved.shape))


def _view(node: fx.Node, source: fx.Node) -> DimMap | None:
    """Elements keep their order, so that the shapes tell all."""
    own, shape = shape_of(source), shape_of(node)
    runs = _runs(own, shape)
    if runs is None:
        return None
    dims: list[Source] = [New() for _ in shape]
    for ins, outs in runs:
        for out in outs:
            dims[out] = Dim(ins[0]) if len(ins) == len(outs) == 1 else Regroup(tuple(ins), tuple(outs))
    return DimMap(source, shape, tuple(dims), method="reshape")


def _runs(own: Sequence[Size], shape: Sequence[Size]) -> list[tuple[list[int], list[int]]] | None:
    """Dims of two shapes that hold the same elements in the same order, as few together as is known."""
    whole = tuple([d for d, n in enumerate(sizes) if not is_one(n)] for sizes in (own, shape))
    ins, outs = whole
    runs = []
    while (found := _run([own[d] for d in ins], [shape[d] for d in outs])) is not None:
        i, j = found
        runs.append((ins[:i], outs[:j]))
        ins, outs = ins[i:], outs[j:]
    while (found := _run([own[d] for d in reversed(ins)], [shape[d] for d in reversed(outs)])) is not None:
        i, j = found
        runs.append((ins[-i:], outs[-j:]))
        ins, outs = ins[:-i], outs[:-j]
    if not ins and not outs:
        return runs
    if any(known_equal(n, 0) for n in own):
        # without elements the sizes of the rest need not be equal
        runs, (ins, outs) = [], whole
    return [*runs, (ins, outs)] if ins and outs else None


def _run(own: Sequence[Size], shape: Sequence[Size]) -> tuple[int, int] | None:
    """How many of the first sizes, at least one of each, have the same product; None where that is not known."""
    if not own or not shape:
        return None
    i = j = 1
    a, b = own[0], shape[0]
    while not known_equal(a, b):
        if not isinstance(a, int) or not isinstance(b, int):
            return None
        if a < b and i < len(own):
            a, i = a * own[i], i + 1
        elif b < a and j < len(shape):
            b, j = b * shape[j], j + 1
        else:
            return None
    return i, j


# -- elements several times


def _expand(node: fx.Node, source: fx.Node) -> DimMap:
    own, shape = shape_of(source), shape_of(node)
    lead = len(shape) - len(own)
    dims = [New() if is_one(n) and not is_one(shape[lead + d]) else Dim(d) for d, n in enumerate(own)]
    return DimMap(source, shape, (*(New() for _ in range(lead)), *dims), method="expand")


def _repeat(node: fx.Node, source: fx.Node) -> DimMap | None:
    own, shape = shape_of(source), shape_of(node)
    lead = len(shape) - len(own)
    dims: list[Source] = [New() for _ in range(lead)]
    for d, (n, repeats) in enumerate(zip(own, arguments(node)["repeats"][lead:], strict=True)):
        count = _number(repeats)
        if known_equal(n, shape[lead + d]):
            dims.append(Dim(d))
        elif is_one(n):
            dims.append(New())
        elif count is None:
            return None
        else:
            dims.append(Tile(d, count))
    return DimMap(source, shape, tuple(dims))


def _repeat_interleave(node: fx.Node, source: fx.Node) -> DimMap | None:
    args = arguments(node)
    repeats, own = _number(args["repeats"]), shape_of(source)
    # without a dim the tensor is flattened; repeats may be a tensor
    if repeats is None or not isinstance(args["dim"], int) or not own:
        return None
    at = args["dim"] % len(own)
    if is_one(repeats):
        return _copy(node, source)
    return _changed(node, source, {at: New() if is_one(own[at]) else Interleave(at, repeats)})


# -- some of the elements


def _slice(node: fx.Node, source: fx.Node) -> DimMap | None:
    args = arguments(node)
    return _cut(node, source, args["dim"], 0 if args["start"] is None else args["start"], _number(args["step"]))


def _narrow(node: fx.Node, source: fx.Node) -> DimMap | None:
    args = arguments(node)
    return _cut(node, source, args["dim"], args["start"], 1)


def _cut(node: fx.Node, source: fx.Node, dim: int, start: Any, step: Size | None) -> DimMap | None:
    own = shape_of(source)
    at = dim % len(own)
    if not isinstance(step, int):
        return None
    if step == 1 and known_equal(own[at], shape_of(node)[at]):
        return _copy(node, source)
    return _changed(node, source, {at: Slice(at, _place(start, own[at]), step)})


def _flip(node: fx.Node, source: fx.Node) -> DimMap:
    own = shape_of(source)
    turned = {d % len(own) for d in arguments(node)["dims"]} if own else set()
    return _changed(node, source, {d: Slice(d, own[d] - 1, -1) for d in turned if not is_one(own[d])})


def _select(node: fx.Node, source: fx.Node) -> DimMap:
    args, own = arguments(node), shape_of(source)
    at = args["dim"] % len(own)
    return _chosen(source, at, _place(args["index"], own[at]), shape_of(node))


def _chosen(source: fx.Node, dim: int, index: Size | None, shape: tuple[Size, ...]) -> DimMap:
    own = shape_of(source)
    dims = tuple(Dim(d) for d in range(len(own)) if d != dim)
    return DimMap(source, shape, dims, () if is_one(own[dim]) else ((dim, index),))


# -- several results


def _split(node: fx.Node, source: fx.Node) -> list[DimMap]:
    args, own = arguments(node), shape_of(source)
    at = args["dim"] % len(own)
    shapes = [tuple(x.shape) for x in value_of(node)]
    starts: list[Any] = [0]
    for shape in shapes:
        starts.append(starts[-1] + shape[at])
    # tensor_split may be told where to cut, in any order
    if "indices" in args:
        starts = [0, *args["indices"]]
    elif is_tensor(args.get("tensor_indices_or_sections")):
        starts = [None] * len(shapes)
    keep = tuple(map(Dim, range(len(own))))
    cuts = [Slice(at, _place(start, own[at]), 1) for start in starts[: len(shapes)]]
    return [DimMap(source, shape, (*keep[:at], cut, *keep[at + 1 :])) for cut, shape in zip(cuts, shapes, strict=True)]


def _unbind(node: fx.Node, source: fx.Node) -> list[DimMap]:
    at = arguments(node)["dim"] % len(shape_of(source))
    return [_chosen(source, at, index, tuple(x.shape)) for index, x in enumerate(value_of(node))]


_RULES: dict[str, Callable[[fx.Node, fx.Node], DimMap | None]] = {
    **dict.fromkeys(COPIES, _copy),
    "expand": _expand,
    "flip": _flip,
    "narrow": _narrow,
    "permute": _permute,
    "repeat": _repeat,
    "repeat_interleave": _repeat_interleave,
    "select": _select,
    "slice": _slice,
    "view": _view,
}
_PARTS: dict[str, Callable[[fx.Node, fx.Node], list[DimMap]]] = {
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split"), _split),
    "unbind": _unbind,
}
#: The ops that have a rule, by the names that `vocabulary.kind` gives them.
MOVES = frozenset(_RULES) | frozenset(_PARTS)
