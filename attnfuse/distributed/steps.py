"""The attentions that one over all ranks is made of: their specs, the operands they read, and which of them are surely empty.

Indices of a spec are global, those of a step are rows of a rank: in a step's masks and tables the query is token(row), and the
key likewise. The numbers that this depends on are operands, so that one spec, and one compiled kernel, serves all ranks and steps.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from attnfuse import expr
from attnfuse.distributed import layouts, work
from attnfuse.distributed.heads import parts_for
from attnfuse.expr import Algebra, Expr, K, Load, Q
from attnfuse.kernels.fills import hiding
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.layout import precision
from attnfuse.spec import AddFill, Attention, Bias, Operand, Ramp, ReplaceFill, Step, dtype_name

#: 'part': rows of one rank and keys of one, results to be merged. 'rows': rows of one rank and all keys.
Kind = Literal["part", "rows"]
#: Algorithms whose kernels see all keys at once.
WHOLE_KEYS = frozenset({"gather", "local"})
#: What the numbers of a side are, in the order of their operands; the last two are those of zigzag alone.
_NUMBERS = ("base", "half", "jump")


@dataclass(frozen=True)
class StepSpec:
    """spec: that of the kernel. numbers: how many operands at the end number the queries, and the keys after them.
    cut: for each of the others whether its rows are the queries' own, and its columns the keys'."""

    spec: Attention
    numbers: tuple[int, int]
    cut: tuple[tuple[bool, bool], ...]


def check(spec: Attention) -> None:
    """Raises ValueError for a spec that is not computed over several ranks."""
    if spec.layout != "dense":
        raise ValueError(f"attnfuse: attention over several ranks takes dense layouts; got {spec.layout}")
    if any(isinstance(s, ReplaceFill) and s.value != 0.0 for s in spec.weight_steps):
        raise ValueError("attnfuse: weights that are filled with another number than 0 have no parts that add up")


def step_spec(spec: Attention, layout: str, ranks: int, algorithm: str, heads: int = 1) -> Attention:
    """The spec that the kernel is given: what to choose one for; a `partial` one unless the algorithm is one of WHOLE_KEYS or
    'ulysses'. heads: ranks that share out the heads, in 'ulysses_ring'. Raises ValueError where they cannot be."""
    if algorithm == "ulysses":
        return parts_for(spec, ranks).spec(spec)
    if algorithm == "ulysses_ring":
        return step(held_by_groups(spec, layout, ranks, heads).text, layout, ranks // heads, "part").spec
    kind: Kind = "rows" if algorithm in WHOLE_KEYS else "part"
    return step(spec.text, layout, ranks, kind).spec


def held_by_groups(spec: Attention, layout: str, ranks: int, heads: int) -> Attention:
    """Of a part of the heads, the spec of a ring of groups of so many ranks, which hold their rows together."""
    part = parts_for(spec, heads).spec(spec)
    # rows are not those that a layout gives so many groups, where the length does not divide
    sizes = [n if _rows(layout, ranks, n) else None for n in (spec.Q, spec.K)]
    return dataclasses.replace(part, sizes=(*part.sizes[:-4], *sizes, *part.sizes[-2:]))


@functools.lru_cache(maxsize=256)
def step(text: str, layout: str, ranks: int, kind: Kind) -> StepSpec:
    """The step of the spec with this text."""
    spec = Attention.parse(text)
    check(spec)
    sides = (ranks > 1, ranks > 1 and kind == "part")
    sizes = [_rows(layout, ranks, n) if own else n for n, own in zip((spec.Q, spec.K), sides)]
    spec, cut = _in_rows(spec, layout, ranks, sides, (sizes[0], sizes[1]))
    per_side = len(_NUMBERS) if layout == "zigzag" else 1
    if kind == "part":
        name = dtype_name(precision(spec))
        order = tuple(range(len(spec.batch) + 2))
        spec = dataclasses.replace(
            spec, sink=None, softmax="plain", hidden="zero", lse=True, out_dtype=name, out_order=order
        )
    return StepSpec(spec, (per_side * sides[0], per_side * sides[1]), cut)


def _rows(layout: str, ranks: int, length: int | None) -> int | None:
    """How many rows every rank has, if it is one number that is known."""
    if length is None or layouts.rows_of_rank(layout, ranks, length) * ranks != length:
        return None
    return length // ranks


def _in_rows(
    spec: Attention, layout: str, ranks: int, sides: tuple[bool, bool], sizes: tuple[int | None, int | None]
) -> tuple[Attention, tuple[tuple[bool, bool], ...]]:
    """(the spec with the tokens of rows for the indices of `sides`, which operands are cut on which side)."""
    algebra = Algebra(*sizes)
    operands = list(spec.operands)
    tokens: list[Expr] = []
    for index, own in zip((Q, K), sides):
        if not own:
            tokens.append(index)
            continue
        loads = []
        for _ in _NUMBERS if layout == "zigzag" else _NUMBERS[:1]:
            loads.append(Load(len(operands), "int32"))
            operands.append(Operand("int32", ("1",) * (len(spec.batch) + 2)))
        base, half, jump = (*loads, None, None)[:3]
        assert base is not None
        tokens.append(layouts.token(layout, index, ranks, base, half, jump, algebra))
    cut = _cut(spec, sides)

    def of(e: Expr | None) -> Expr | None:
        return None if e is None else expr.transform(e, leaf, algebra)

    def at(operand: int, side: int, index: Expr | None) -> Expr | None:
        """Where a table is read on one side."""
        if index is not None:
            return of(index)
        # what is not cut though others are is read with an index of its own beside this one
        local = not sides[side] or cut[operand][side] or spec.operands[operand].dims[side - 2] == "1"
        return None if local else tokens[side]

    def leaf(e: Expr) -> Expr | None:
        if isinstance(e, expr.Index):
            return tokens[0] if e == Q else tokens[1]
        if isinstance(e, Load):
            if e.operand not in spec.tables:
                return e
            return Load(e.operand, e.dtype, at(e.operand, 0, e.row), at(e.operand, 1, e.col))
        return None

    def stepped(step: Step) -> Step:
        if isinstance(step, (ReplaceFill, AddFill)):
            keep = of(step.keep)
            assert keep is not None
            return dataclasses.replace(step, keep=keep)
        if isinstance(step, Ramp):
            number = of(step.number)
            assert number is not None
            return dataclasses.replace(step, number=number, keep=of(step.keep))
        if isinstance(step, Bias):
            row, col = step.row, step.col
            if step.operand in spec.tables:
                row, col = at(step.operand, 0, row), at(step.operand, 1, col)
            return dataclasses.replace(step, row=row, col=col, keep=of(step.keep))
        return step

    whole = dataclasses.replace(
        spec,
        steps=tuple(map(stepped, spec.steps)),
        weight_steps=tuple(map(stepped, spec.weight_steps)),
        operands=tuple(operands),
        sizes=(*spec.sizes[:-4], *sizes, *spec.sizes[-2:]),
    )
    return whole, cut


def _cut(spec: Attention, sides: tuple[bool, bool]) -> tuple[tuple[bool, bool], ...]:
    """Which operands are cut: those read at the query, and tables that on this side are read there alone."""
    biases = [s for s in spec.steps + spec.weight_steps if isinstance(s, Bias)]
    reads: list[Load | Bias] = [*spec.loads, *biases]
    found = []
    for i in range(len(spec.operands)):
        own = [x for x in reads if x.operand == i]
        rows, columns = all(x.row is None for x in own), all(x.col is None for x in own)
        found.append((sides[0] and rows, sides[1] and columns))
    return tuple(found)


@functools.lru_cache(maxsize=256)
def empty(
    text: str,
    layout: str,
    ranks: int,
    queries: int,
    keys: int,
    backward: bool = False,
    held: tuple[int, int] | None = None,
) -> tuple[tuple[bool, ...], ...]:
    """[rank of the queries][rank of the keys]: whether no query sees a key there, and nothing of them is left, whatever the
    tensors hold. Those who have no rows see nothing either.

    backward: of gradients, which a row that is hidden whole makes NaN at every key, where it is NaN itself. held: as in Call.
    """
    masks = work.masks_of(Attention.parse(text), queries == keys, backward)
    return _outside(masks, layout, ranks, queries, keys, held)


@functools.lru_cache(maxsize=256)
def faint(
    text: str, layout: str, ranks: int, queries: int, keys: int, held: tuple[int, int] | None = None
) -> tuple[tuple[bool, ...], ...]:
    """[rank of the queries][rank of the keys]: whether nothing is left of keys there beside a maximum above `doubt` of the spec's
    Hiding, which a finite fill may have for one. held: as in Call."""
    return _outside(work.fills_of(Attention.parse(text)), layout, ranks, queries, keys, held)


def _outside(
    masks: tuple[Expr, ...], layout: str, ranks: int, queries: int, keys: int, held: tuple[int, int] | None
) -> tuple[tuple[bool, ...], ...]:
    """[rank of the queries][rank of the keys]: whether one of the masks surely keeps nothing there, of any tile."""
    found = work.work_of(masks, layout, ranks, (queries, keys), held)
    return tuple(tuple(not tiles for tiles in row) for row in found.tiles)


class Call:
    """One attention over all ranks, as this rank takes part in it.

    run(which, spec, inputs, *given): a kernel's; partial: whether it is one with backward_part; operands: whole; rank: this one
    of `ranks`; held: queries and keys that each rank has rows for, where they are not layouts.rows_of_rank; seed: of dropout.
    """

    def __init__(
        self,
        spec: Attention,
        layout: str,
        place: tuple[int, int],
        lengths: tuple[int, int],
        operands: Sequence[torch.Tensor],
        run: Callable[..., Any],
        partial: bool,
        held: tuple[int, int] | None = None,
        seed: torch.Tensor | None = None,
    ) -> None:
        self.seed = seed
        self.spec, self.layout, self.operands, self.run, self.partial = spec, layout, operands, run, partial
        self.rank, self.ranks = place
        self.queries, self.keys = lengths
        n, m = (layouts.rows_of_rank(layout, self.ranks, length) for length in lengths)
        self.held: tuple[int, int] = held or (n, m)
        self.rows, self.columns = (
            [layouts.real(layout, r, self.ranks, length, n) for r in range(self.ranks)]
            for length, n in zip(lengths, self.held)
        )

    def step(self, kind: Kind) -> StepSpec:
        return step(self.spec.text, self.layout, self.ranks, kind)

    def empty(self, backward: bool = False) -> tuple[tuple[bool, ...], ...]:
        """[rank of the queries][rank of the keys]: which steps are; see the function of this name."""
        return empty(self.spec.text, self.layout, self.ranks, self.queries, self.keys, backward, self.held)

    def is_faint(self, q_rank: int, k_rank: int, tops: torch.Tensor) -> bool:
        """Whether these keys are nothing beside what the rows have seen, whose maxima are `tops`. Only asked on the CPU: a device
        would have to be waited for."""
        if (
            not tops.is_cpu
            or not faint(self.spec.text, self.layout, self.ranks, self.queries, self.keys, self.held)[q_rank][k_rank]
        ):
            return False
        return bool((tops > hiding(self.spec).doubt).all())

    def take(self, x: torch.Tensor, dim: int, rank: int) -> torch.Tensor:
        """What `rank` has of a dim of whole length, without padding; x itself where that has size 1."""
        if x.shape[dim] == 1:
            return x
        length = self.queries if dim == -2 else self.keys
        if x.shape[dim] != length:
            raise ValueError(f"attnfuse: dim {dim} of an operand {list(x.shape)} must be 1 or {length}")
        parts = []
        for first, count, stride in layouts.pieces(self.layout, rank, self.ranks, length, self.held[dim + 2]):
            index = [slice(None)] * x.dim()
            index[dim] = slice(first, first + (count - 1) * stride + 1, stride)
            parts.append(x[tuple(index)])
        if not parts:
            return x.narrow(dim, 0, 0)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def own(self, operands: Sequence[torch.Tensor], kind: Kind, q_rank: int, k_rank: int) -> list[torch.Tensor]:
        """The operands of a step without its numbers."""
        found = []
        for x, (rows, columns) in zip(operands, self.step(kind).cut, strict=True):
            x = self.take(x, -2, q_rank) if rows else x
            found.append(self.take(x, -1, k_rank) if columns else x)
        return found

    def inputs(self, kind: Kind, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_rank: int, k_rank: int) -> Inputs:
        """Those of the step of two ranks' rows."""
        operands = self.own(self.operands, kind, q_rank, k_rank)
        for count, rank, n in zip(self.step(kind).numbers, (q_rank, k_rank), self.held):
            base, _, half, jump = layouts.numbers(self.layout, rank, self.ranks, n)
            shape = (1,) * q.dim()
            operands += [torch.full(shape, x, dtype=torch.int32, device=q.device) for x in (base, half, jump)[:count]]
        if not self.spec.dropout:
            return Inputs(q, k, v, operands)
        # masks are drawn by the numbers that queries and keys have in the whole tensors
        numbers = []
        sides = zip((True, kind == "part"), (q_rank, k_rank), self.held, (self.queries, self.keys))
        for own, rank, n, total in sides:
            found = layouts.numbers(self.layout, rank, self.ranks, n) if own else (0, 1, total, 0)
            numbers.append([*found, total])
        return Inputs(q, k, v, operands, self.seed, numbers=torch.tensor(numbers, device=q.device))

    def add_to_whole(
        self,
        sums: list[torch.Tensor | None],
        grads: Sequence[torch.Tensor | None],
        kind: Kind,
        q_rank: int,
        k_rank: int,
    ) -> None:
        """Add the gradients of a step's operands to those of the whole ones; `sums` has None where there is none yet."""
        for i, grad in enumerate(grads):
            if grad is None:
                continue
            total = sums[i]
            if total is None:
                wide = torch.promote_types(self.operands[i].dtype, torch.float32)
                total = sums[i] = torch.zeros_like(self.operands[i], dtype=wide)
            rows, columns = self.step(kind).cut[i]
            self._add(total, grad, q_rank if rows else None, k_rank if columns else None)

    def _add(self, total: torch.Tensor, grad: torch.Tensor, q_rank: int | None, k_rank: int | None) -> None:
        index: list[list[slice]] = []
        for dim, rank, length in ((-2, q_rank, self.queries), (-1, k_rank, self.keys)):
            if rank is None or total.shape[dim] == 1:
                index.append([slice(None)])
                continue
            held = layouts.pieces(self.layout, rank, self.ranks, length, self.held[dim + 2])
            index.append([slice(first, first + (n - 1) * by + 1, by) for first, n, by in held])
        row = 0
        for rows in index[0]:
            column = 0
            for columns in index[1]:
                target = total[..., rows, columns]
                n, m = target.shape[-2:]
                target += grad[..., row : row + n, column : column + m]
                column += m
            row += target.shape[-2] if index[1] else 0


def padded(x: torch.Tensor, dim: int, rows: int, value: float = 0.0) -> torch.Tensor:
    """x with so many rows in `dim`, the last ones of them `value`."""
    missing = rows - x.shape[dim]
    if not missing:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat([x, x.new_full(shape, value)], dim)
