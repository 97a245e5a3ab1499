"""Bytes that the Triton kernels ask memory for, counted from a spec and its sizes. Caches are not part of the count.

A load or store instruction of a program counts the distinct addresses that it names; an atomic addition counts as a store.
Not counted: the second look at rows that see hidden keys after all, tiles that are computed in vain where masks are looked at one
by one (docs/kernels.md). tests/interpreted/test_traffic.py compares with what the kernels load and store.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from attnfuse import expr
from attnfuse.expr import Expr, Load
from attnfuse.kernels.fills import hiding
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.layout import batch_shape
from attnfuse.kernels.triton import codegen, lists
from attnfuse.kernels.triton.configs import Config
from attnfuse.spec import Attention, Bias, Ramp, ReplaceFill, Scale, Step, dtype_of

_FLOAT, _SEED, _FLAG = 4, 8, 4


@dataclass(frozen=True)
class Traffic:
    """Of one kernel, over all its programs. read, written: bytes; tiles: those whose scores it computes, of `of`."""

    kernel: str
    programs: int
    read: int
    written: int
    tiles: int = 0
    of: int = 0


@dataclass(frozen=True)
class Pass:
    """Kernels in order. least: bytes if each input were read once per tile row of queries and each output written once."""

    kernels: tuple[Traffic, ...]
    least: int

    @property
    def moved(self) -> int:
        return sum(kernel.read + kernel.written for kernel in self.kernels)


def forward(spec: Attention, inputs: Inputs, tiles: Config) -> Pass:
    """Of q, k and v only shapes and dtypes matter (meta tensors will do); operands are read where a mask reads them."""
    q, k, v, *_ = inputs
    c = _Count(spec, inputs, tiles)
    programs = c.elements * c.shape[0]
    written = c.queries * (v.shape[-1] * dtype_of(spec.out_dtype).itemsize + 2 * _FLOAT)
    first = c.lists(columns=False)
    full = c.full & c.sure if first else c.full
    always, edges = c.masks(listed=bool(first))
    read = c.queries * _row(q) + c.over(c.visited, c.columns * (_row(k) + _row(v)))
    read += c.loaded([*_used(spec.steps), *_in(always), *_weighing(spec)], c.visited)
    read += c.loaded(set(_in(edges)) - set(_in(always)), c.visited & ~full)
    read += c.looks(programs, listed=bool(first)) + c.seeds()
    made = Traffic("forward", programs, read, written, c.number(c.visited), c.every)
    return Pass((*first, made), c.queries * _row(q) + c.once() + written)


def backward(spec: Attention, inputs: Inputs, tiles: Config) -> Pass:
    """As forward, for the gradients of q, k, v and of all operands that are floating point numbers.

    Where gradients of queries are added up (tiles.adds), not counted: what makes them 0 before and rounds them afterwards.
    """
    q, k, v, *_ = inputs
    c = _Count(spec, inputs, tiles)
    q_tiles = c.elements * c.shape[0]
    out, dout = c.queries * v.shape[-1] * dtype_of(spec.out_dtype).itemsize, c.queries * _row(v)
    statistics, work = c.queries * 2 * _FLOAT, c.queries * 3 * _FLOAT
    prepare = Traffic("prepare", q_tiles, out + dout + statistics, work)
    # of the three numbers of a row, the sum may be in the shift
    numbers = (2 if codegen.traits(spec).merged else 3) * _FLOAT

    read = c.queries * (_row(q) + numbers) + dout + c.over(c.visited, c.columns * (_row(k) + _row(v)))
    row_lists = c.lists(columns=False)
    read += (
        c.again(bool(row_lists)) + c.looks(q_tiles, bool(row_lists)) + c.seeds() + (q_tiles * _FLAG if c.hides else 0)
    )
    written = c.queries * q.shape[-1] * _stored(q, c.batch) + c.added(by_columns=False)
    rows = Traffic("backward_rows", q_tiles, read, written, c.number(c.visited), c.every)

    c = _Count(spec, inputs, tiles.by_columns())
    # the batch dims that k or v has; one program goes through the elements of the others
    outer = tuple(max(a, b) for a, b in zip(k.shape[:-2], v.shape[:-2]))
    keys = math.prod(outer) * k.shape[-2]
    read = keys * (_row(k) + _row(v)) + c.over(c.visited, c.rows[:, None] * (_row(q) + _row(v) + numbers))
    column_lists = c.lists(columns=True)
    read += c.again(bool(column_lists)) + c.seeds() + c.elements * c.shape[1] * (_FLAG if c.hides else 0)
    read += c.looks(c.elements * c.shape[1], bool(column_lists))
    read += c.number(c.candidates) * _FLAG if c.checked and not column_lists else 0
    written = sum(keys * x.shape[-1] * _stored(x, outer) for x in (k, v)) + c.added(by_columns=True)
    if tiles.adds:
        written += c.over(c.visited, c.rows[:, None] * q.shape[-1]) * _FLOAT + c.added(by_columns=False)
    columns = Traffic("backward_columns", math.prod(outer) * c.shape[1], read, written, c.number(c.visited), c.every)

    gradients = sum(x.numel() * x.element_size() for x in inputs.tensors if x.is_floating_point())
    least = c.queries * _row(q) + out + dout + statistics + c.once() + gradients
    by_rows = () if tiles.adds else (*row_lists, rows)
    # whether ids ascend is found out once
    known = any(x.kernel == "ascending" for x in by_rows)
    of_columns = tuple(x for x in column_lists if not (known and x.kernel == "ascending"))
    return Pass((prepare, *by_rows, *of_columns, columns), least)


def tiles_of(kept: torch.Tensor, BM: int, BN: int, whole: bool = False) -> torch.Tensor:
    """kept [n, Q, K] -> [n, query tiles, key tiles]: which tiles hold a kept element; which hold BN keys and nothing but
    kept elements, if `whole`."""
    Q, K = kept.shape[-2:]
    wide = F.pad(kept, (0, -K % BN))
    # there are no queries past the last one to be hidden from
    wide = F.pad(wide, (0, 0, 0, -Q % BM), value=whole)
    split = wide.view(len(kept), -1, BM, wide.shape[-1] // BN, BN)
    return split.all(4).all(2) if whole else split.any(4).any(2)


def _row(x: torch.Tensor) -> int:
    """Bytes of one query, key or value."""
    return x.shape[-1] * x.element_size()


def _stored(x: torch.Tensor, batch: tuple[int, ...]) -> int:
    """Bytes of an element of what a kernel writes the gradient of x to: float32 where it is summed over dims afterwards."""
    return x.element_size() if tuple(x.shape[:-2]) == batch else _FLOAT


def _used(steps: Iterable[Step]) -> list[Load]:
    """The operands that steps put into the scores or weights."""
    return [
        Load(x.operand, "float32", getattr(x, "row", None), getattr(x, "col", None))
        for x in steps
        if isinstance(x, (Scale, Bias, Ramp)) and x.operand is not None
    ]


def _in(masks: Iterable[Expr]) -> list[Load]:
    """What masks load, each element once."""
    return list(dict.fromkeys(load for mask in masks for load in expr.loads(mask)))


def _weighing(spec: Attention) -> list[Load]:
    return [*_used(spec.weight_steps), *_in(x.keep for x in spec.weight_steps if isinstance(x, ReplaceFill))]


def _bisect(ids: list[int], x: int, after: bool) -> tuple[int, int]:
    """The place of the first id that is not less than x, or with `after` that is more, and how many are looked at to find it."""
    low, high, steps = 0, len(ids), 0
    while low < high:
        middle = (low + high) // 2
        steps += 1
        if ids[middle] < x or (after and ids[middle] == x):
            low = middle + 1
        else:
            high = middle
    return low, steps


def _sizes(total: int, size: int) -> torch.Tensor:
    """How long each tile is."""
    return (total - torch.arange(0, total, size)).clamp(max=size)


class _Count:
    """Which tiles are needed and what each holds. Masks are [n, Q, K], tiles [n, query tiles, key tiles] for some n that
    divides the number of batch elements."""

    def __init__(self, spec: Attention, inputs: Inputs, tiles: Config) -> None:
        q, k, v, operands, *_ = inputs
        self.spec, self.operands, self.tiles = spec, operands, tiles
        self.Q, self.K, self.keys = q.shape[-2], k.shape[-2], _row(k) + _row(v)
        self.batch = batch_shape(inputs.shapes)
        self.elements = math.prod(self.batch)
        self.queries = self.elements * self.Q
        self.rows, self.columns = _sizes(self.Q, tiles.BM), _sizes(self.K, tiles.BN)
        self.shape = (len(self.rows), len(self.columns))
        self.every = self.elements * math.prod(self.shape)
        traits, hides = codegen.traits(spec), hiding(spec).steps
        self.hides, self.checked = traits.hides, traits.checked
        self.cuts = cuts = codegen.cuts(spec)
        self.rests = [cut.rest for cut in cuts.values() if cut.rest is not None]
        self.looked_at, self.limits = codegen.looked_at(spec), codegen.limits(spec)
        self.kept = self._kept(spec.steps[i].keep for i in hides)
        self.visited = tiles_of(self.kept, tiles.BM, tiles.BN)
        bounding = {i: [_bounding(kind, x) for kind, x in cut.bounds.items()] for i, cut in cuts.items()}
        self.candidates = tiles_of(self._kept(x for i in hides for x in bounding[i]), tiles.BM, tiles.BN)
        self.full = tiles_of(self._kept(x for i in cuts for x in bounding[i]), tiles.BM, tiles.BN, whole=True)
        #: tiles in which nothing else is hidden either
        self.sure = tiles_of(self._kept(self.looked_at), tiles.BM, tiles.BN, whole=True)
        #: of the full tiles, those that lie in the matrix
        self.inside = self.full & (self.rows == tiles.BM)[:, None] & (self.columns == tiles.BN)

    def _indices(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.arange(self.Q)[:, None], torch.arange(self.K)[None]

    def _kept(self, masks: Iterable[Expr]) -> torch.Tensor:
        """Where all of them keep."""
        kept = torch.ones(1, self.Q, self.K, dtype=torch.bool)
        for mask in masks:
            kept = kept & expr.evaluate(mask, self.operands, *self._indices())
        return kept.reshape(-1, self.Q, self.K)

    def masks_of(self, steps: Iterable[Step]) -> list[Expr]:
        """Masks and indices of biases, masks and numbers of ramps."""
        names = ("row", "col", "number", "keep")
        added = [s for s in steps if isinstance(s, (Bias, Ramp))]
        return [x for s in added for x in (getattr(s, name, None) for name in names) if x is not None]

    # -- sums over tiles

    def over(self, tiles: torch.Tensor, each: torch.Tensor) -> int:
        """The sum of `each` [query tiles, key tiles] over some tiles, of all batch elements."""
        return int((tiles * each).sum()) * (self.elements // len(tiles))

    def number(self, tiles: torch.Tensor) -> int:
        return self.over(tiles, torch.ones(self.shape, dtype=torch.int64))

    def seeds(self) -> int:
        return self.number(self.visited) * _SEED if self.spec.dropout else 0

    def loaded(self, loads: Iterable[Load], tiles: torch.Tensor) -> int:
        """Bytes of these loads in each of the tiles."""
        return sum(self.over(tiles, self._places(x)) * self.operands[x.operand].element_size() for x in loads)

    def masks(self, listed: bool) -> tuple[list[Expr], list[Expr]]:
        """(masks that are evaluated in every tile, those only in tiles that are not full)."""
        looked_at = set(self.looked_at) if listed else set()
        always = [*self.masks_of(self.spec.steps), *(x for x in self.rests if x not in looked_at)]
        return always, [*self.limits, *looked_at]

    def again(self, listed: bool) -> int:
        """Bytes of operands where scores and weights are made once more and gone through backwards."""
        steps = self.spec.steps
        always, edges = (_in(masks) for masks in self.masks(listed))
        full = self.inside & self.sure if listed else self.inside
        looked_at = set(self.looked_at) if listed else set()
        forwards = [*_used(steps), *always, *_weighing(self.spec)]
        replaced = [cut for i, cut in self.cuts.items() if isinstance(steps[i], ReplaceFill)]
        keeps = [s.keep for s in steps if isinstance(s, (Bias, Ramp)) and s.keep is not None]
        rests = [cut.rest for cut in replaced if cut.rest is not None]
        left = _in([*keeps, *(x for x in rests if x not in looked_at)])
        backwards = [*_used(s for s in steps if isinstance(s, Scale)), *left, *_weighing(self.spec)]
        edges = [*set(edges) - set(always)]
        bounds = [x for cut in replaced for x in cut.bounds.values()]
        edges += [*set(_in([*bounds, *(x for x in rests if x in looked_at)])) - set(left)]
        return self.loaded([*forwards, *backwards], self.visited) + self.loaded(edges, self.visited & ~full)

    def looks(self, programs: int, listed: bool) -> int:
        """Bytes that tell where loops begin and end, and which tiles between are needed."""
        if listed:
            return 2 * programs * _FLAG + self.number(self.visited) * _FLAG
        scalars = sum(self.operands[x.operand].element_size() for x in _in(self.limits)) * programs
        return scalars + (self.loaded(self._spread(), self.candidates) if self.checked else 0)

    def _spread(self) -> list[Load]:
        return [x for x in _in(self.looked_at) if self.spec.operands[x.operand].dims[-2:] != ("Q", "K")]

    def lists(self, columns: bool) -> tuple[Traffic, ...]:
        """The kernel that makes lists of tiles, of keys or with `columns` of queries; none where there are no lists."""
        sizes = lists.elements(self.spec, self.operands, self.batch)
        visited, candidates = self.visited, self.candidates
        own, others, total = self.rows, self.columns, self.K
        if columns:
            visited, candidates = visited.mT, candidates.mT
            own, others, total = self.columns, self.rows, self.Q
        elements, tiles = math.prod(sizes), len(own)
        if not self.checked or not lists.worthwhile(self.spec, len(others), elements * tiles * (2 + len(others))):
            return ()
        size, own_size = (self.tiles.BM, self.tiles.BN) if columns else (self.tiles.BN, self.tiles.BM)
        if documents := codegen.documents(self.spec):
            return self._bisected(documents, sizes, own_size, size, columns, visited)
        many, read = lists.many(size), 0
        for element in candidates:
            for tile, row in zip(own.tolist(), element.tolist()):
                if True not in row:
                    continue
                end = len(row) - row[::-1].index(True)
                for begin in range(row.index(True), end, many):
                    wide = min(total, (begin + many) * size) - begin * size
                    for load in self._spread():
                        dims = self.spec.operands[load.operand].dims[-2:]
                        across, along = dims if columns else dims[::-1]
                        places = (1 if across == "1" else wide) * (1 if along == "1" else tile)
                        read += places * self.operands[load.operand].element_size()
        read *= elements // len(candidates)
        programs = elements * tiles
        read += sum(self.operands[x.operand].element_size() for x in _in(self.limits)) * programs
        written = int(visited.sum()) * (elements // len(visited)) * _FLAG + 2 * programs * _FLAG
        return (Traffic("listed", programs, read, written),)

    def _bisected(
        self,
        documents: list[tuple[int, int]],
        sizes: tuple[int, ...],
        own_size: int,
        size: int,
        columns: bool,
        visited: torch.Tensor,
    ) -> tuple[Traffic, ...]:
        """As lists(), where ids that ascend say which tiles are looked at. What finds out whether they do comes first."""
        elements, (count, total) = math.prod(sizes), (self.K, self.Q) if columns else (self.Q, self.K)
        ids = [
            [self.operands[x].expand(*sizes, -1, -1).reshape(elements, -1) for x in (pair if columns else pair[::-1])]
            for pair in documents
        ]
        ascend = [
            [all(bool((x[1:] >= x[:-1]).all()) for x in sides) for sides in zip(*pair, strict=True)] for pair in ids
        ]
        every = sum(2 * (x.shape[1] - 1) * x.element_size() for pair in ids for x in pair)
        bounds = self._kept(
            _bounding(kind, x) for i in hiding(self.spec).steps for kind, x in self.cuts[i].bounds.items()
        )
        bounds = (bounds.mT if columns else bounds).expand(elements, -1, -1)
        many, read, programs = lists.many(size), 0, 0
        for e in range(elements):
            for begin in range(0, count, own_size):
                programs += 1
                end = min(begin + own_size, count)
                seen = bounds[e, begin:end].any(0).nonzero().flatten().tolist()
                lo, hi = (seen[0], seen[-1] + 1) if seen else (0, 0)
                read += _FLAG
                for pair, fine in zip(ids, ascend, strict=True):
                    if fine[e]:
                        own, other = (x[e].tolist() for x in pair)
                        low, steps = _bisect(other, own[begin], after=False)
                        high, more = _bisect(other, own[end - 1], after=True)
                        lo, hi = max(lo, low), min(hi, high)
                        read += 2 * pair[0].element_size() + (steps + more) * pair[1].element_size()
                for place in range(lo // size, -(-hi // size), many) if lo < hi else ():
                    wide = min(total, (place + many) * size) - place * size
                    for load in self._spread():
                        dims = self.spec.operands[load.operand].dims[-2:]
                        across, along = dims if columns else dims[::-1]
                        places = (1 if across == "1" else wide) * (1 if along == "1" else end - begin)
                        read += places * self.operands[load.operand].element_size()
        read += sum(self.operands[x.operand].element_size() for x in _in(self.limits)) * programs
        written = int(visited.sum()) * (elements // len(visited)) * _FLAG + 2 * programs * _FLAG
        found = Traffic("ascending", elements, every * elements, _FLAG * elements)
        return found, Traffic("listed", programs, read, written)

    def added(self, by_columns: bool) -> int:
        """Bytes of float32 additions to the gradients of operands."""
        loads = [
            x
            for x in _used([*self.spec.steps, *self.spec.weight_steps])
            if self.operands[x.operand].is_floating_point() and codegen.by_columns(self.spec, x.operand) == by_columns
        ]
        return sum(self.over(self.visited, self._places(x)) for x in loads) * _FLOAT

    def once(self) -> int:
        """Bytes of the keys, values and operands that each tile row of queries needs, once."""
        BM = self.tiles.BM
        seen = F.pad(self.kept, (0, 0, 0, -self.Q % BM)).view(len(self.kept), -1, BM, self.K).any(2).sum(2)
        total = seen * self.keys
        steps = [*self.spec.steps, *self.spec.weight_steps]
        masks = [*self.masks_of(steps), *(s.keep for s in steps if getattr(s, "keep", None) is not None)]
        for load in dict.fromkeys([*_used(steps), *_in(masks)]):
            dims = self.spec.operands[load.operand].dims[-2:]
            if load.row is not None or load.col is not None:
                own = torch.tensor([x.unique().numel() for x in self._addresses(load).split(BM)])
            else:
                own = (1 if dims[0] == "1" else self.rows) * (1 if dims[1] == "1" else seen)
            total = total + own * self.operands[load.operand].element_size()
        return int(total.sum()) * (self.elements // len(total))

    # -- elements

    def _places(self, load: Load) -> torch.Tensor:
        """[query tiles, key tiles]: how many distinct elements a load names."""
        if load.row is None and load.col is None:
            dims, one = self.spec.operands[load.operand].dims[-2:], torch.ones(1, 1, dtype=torch.int64)
            rows, columns = self.rows[:, None], self.columns[None]
            return ((one if dims[0] == "1" else rows) * (one if dims[1] == "1" else columns)).expand(self.shape)
        split = [x.split(self.tiles.BN, 1) for x in self._addresses(load).split(self.tiles.BM)]
        return torch.tensor([[tile.unique().numel() for tile in row] for row in split])

    def _addresses(self, load: Load) -> torch.Tensor:
        """A number for each element of a table that a query and a key read, [Q, K]."""
        shape = self.operands[load.operand].shape[-2:]
        places = []
        for own, axis, size in zip((load.row, load.col), self._indices(), shape):
            index = expr.evaluate(own, self.operands, *self._indices()) if own is not None else axis
            places.append(index.clamp(0, size - 1))
        return (places[0] * shape[1] + places[1]).expand(self.Q, self.K)


def _bounding(kind: str, bound: Expr) -> Expr:
    """A bound of attnfuse.kernels.mask_ranges as the mask that it is."""
    algebra = expr.Algebra()
    limit = algebra.add(expr.Q, bound) if kind.endswith("_q") else bound
    return algebra.compare("lt" if kind.startswith("below") else "ge", expr.K, limit)
