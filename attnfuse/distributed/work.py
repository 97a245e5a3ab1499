"""Which tiles of scores a step computes, by rank and layout, as far as a spec's masks say it without looking at any tensor.

A tile is `tile` rows of a rank's queries by `tile` rows of a rank's keys. It is counted unless the masks that hide keys for good
are false on all of it: decided by the bounds of the expression over the tokens of the tile, so that documents, lengths and other
masks that are read from tensors count as if they hid nothing. What a kernel computes is at most what is counted here.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from attnfuse import expr
from attnfuse.distributed.layouts import pieces
from attnfuse.expr import Algebra, Const, Expr
from attnfuse.kernels.fills import HIDDEN_BELOW, hiding
from attnfuse.kernels.mask_ranges import band_of
from attnfuse.spec import AddFill, Attention, Bias, Ramp, ReplaceFill

#: Rows of a tile, where ranks hold few: about what kernels take.
TILE = 128
#: Tiles in a row of all ranks, at most: with more tokens they are larger.
_TILES = 2048
#: Blocks of tokens over which one mask is bounded, at most. What is undecided then counts as computed.
_BOUNDED = 2000


@dataclass(frozen=True)
class Work:
    """Tiles by the rank of the queries and the rank of the keys; `size` rows make one."""

    tiles: tuple[tuple[int, ...], ...]
    size: int

    @property
    def total(self) -> int:
        return sum(map(sum, self.tiles))

    @property
    def of_ranks(self) -> tuple[int, ...]:
        """What each rank computes for its queries."""
        return tuple(map(sum, self.tiles))


@dataclass(frozen=True)
class Step:
    """One step of a ring. tiles: by rank; waits: the most of them, which all ranks wait for.

    By the model of account.py, in seconds: compute of the most loaded rank, transfer that runs meanwhile, and far, the transfer
    between nodes that all steps in a node run beside, said at the last of them.
    """

    tiles: tuple[int, ...]
    compute: float = 0.0
    transfer: float = 0.0
    far: float = 0.0

    @property
    def waits(self) -> int:
        return max(self.tiles)


def masks_of(spec: Attention, square: bool, backward: bool = False) -> tuple[Expr, ...]:
    """What a key must satisfy to be seen: masks outside of which nothing of a score is left, whatever the tensors hold.

    square: query and key of one number are one token. A finite fill counts where no row has it on all of its keys: where a row
    surely sees its own token, that is, and nothing is added that could be as small. backward: of gradients, which a row that is
    hidden whole makes NaN at every key, where it is NaN itself.
    """
    if hiding(spec).doubt > -math.inf:
        others = any(isinstance(s, (Bias, Ramp)) for s in spec.steps)
        if others or any(s.value > HIDDEN_BELOW for s in spec.steps if isinstance(s, (ReplaceFill, AddFill))):
            return ()
        if not _sees_itself(spec, square):
            return ()
    if backward and spec.hidden == "nan" and spec.sink is None and not _sees_itself(spec, square):
        return ()
    return fills_of(spec)


def fills_of(spec: Attention) -> tuple[Expr, ...]:
    """What the fills keep that hide a key from a row that sees another: taken apart where all parts must hold."""
    found: list[Expr] = []
    fills = (spec.steps[i] for i in sorted(hiding(spec).steps))
    for keep in (s.keep for s in fills if isinstance(s, (ReplaceFill, AddFill))):
        found += keep.args if isinstance(keep, expr.Apply) and keep.op == "and" else (keep,)
    return tuple(dict.fromkeys(found))


def _sees_itself(spec: Attention, square: bool) -> bool:
    """Whether no mask hides a row's own token from it. Tables and ramps are taken to be finite."""
    if any(isinstance(s, Bias) and s.row is None and s.col is None for s in spec.steps):
        return False
    algebra = Algebra(spec.Q, spec.K)
    keeps = [s.keep for s in spec.steps if isinstance(s, (ReplaceFill, AddFill))]
    return square and all(expr.substitute(keep, {expr.K: expr.Q}, algebra) == expr.TRUE for keep in keeps)


def tile_of(length: int) -> int:
    """Rows of a tile for so many tokens: TILE or a multiple, so that there are not too many to count."""
    return TILE * max(1, -(-length // (_TILES * TILE)))


@functools.lru_cache(maxsize=256)
def work_of(
    masks: tuple[Expr, ...],
    layout: str,
    ranks: int,
    lengths: tuple[int, int],
    held: tuple[int, int] | None = None,
    tile: int | None = None,
) -> Work:
    """The tiles that each rank computes of each other's keys. lengths: queries and keys of all ranks together; held: rows that a
    rank holds of both, where they are not layouts.rows_of_rank."""
    tile = tile or tile_of(max(lengths))
    n = held or (None, None)
    of_q, q = _blocks(layout, ranks, lengths[0], tile, n[0])
    of_k, k = _blocks(layout, ranks, lengths[1], tile, n[1])
    seen = torch.ones(len(q), len(k), dtype=torch.bool)
    for mask in masks:
        seen &= _seen(mask, q, k)
    counted = torch.zeros(ranks, ranks, dtype=torch.int64)
    rows = torch.zeros(ranks, len(k), dtype=torch.int64).index_add_(0, of_q, seen.long())
    counted.index_add_(1, of_k, rows)
    return Work(tuple(map(tuple, counted.tolist())), tile)


def steps_of(work: Work, holder: Callable[[int, int], int], queries_travel: bool = False) -> list[Step]:
    """The steps of a ring, one for each rank. holder(rank, step): whose tensors a rank holds then. queries_travel: keys stay where
    they are, as in Burst's backward."""
    found = []
    for step in range(len(work.tiles)):
        pairs = [(r, holder(r, step)) for r in range(len(work.tiles))]
        found.append(Step(tuple(work.tiles[h][r] if queries_travel else work.tiles[r][h] for r, h in pairs)))
    return found


def _blocks(layout: str, ranks: int, length: int, tile: int, n: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The rank of each tile, and its first and last token [tiles, 2], in order of the first token."""
    found = []
    for rank in range(ranks):
        for first, count, stride in pieces(layout, rank, ranks, length, n):
            for i in range(0, count, tile):
                found.append((first + i * stride, first + (min(i + tile, count) - 1) * stride, rank))
    ordered = torch.tensor(sorted(found), dtype=torch.int64).reshape(-1, 3)
    return ordered[:, 2], ordered[:, :2]


def _seen(mask: Expr, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Whether the mask may hold somewhere in the tile of each block of queries [m, 2] and of keys [n, 2]."""
    band = band_of((mask,))
    if band is None:
        return _bounded(mask, q, k)
    seen = torch.ones(len(q), len(k), dtype=torch.bool)
    if band.ahead is not None:
        seen &= k[None, :, 0] <= q[:, None, 1] + band.ahead
    if band.back is not None:
        seen &= k[None, :, 1] >= q[:, None, 0] - band.back
    return seen


def _bounded(mask: Expr, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The same of any expression: large blocks first, which are halved while they are undecided."""
    seen = torch.ones(len(q), len(k), dtype=torch.bool)
    if all(isinstance(x, expr.Load) for x in mask.parts) and mask.parts:
        # numbers of tensors: their bounds decide nothing
        return seen
    waiting, left = deque([(0, len(q), 0, len(k))]), _BOUNDED
    while waiting and left:
        left -= 1
        a, b, c, d = waiting.popleft()
        if a == b or c == d:
            continue
        known = _over(mask, _hull(q[a:b]), _hull(k[c:d]))
        if known == expr.FALSE:
            seen[a:b, c:d] = False
        elif known != expr.TRUE and (b - a > 1 or d - c > 1):
            rows, columns = (((x, (x + y) // 2), ((x + y) // 2, y)) for x, y in ((a, b), (c, d)))
            waiting += [(*row, *column) for row in rows for column in columns]
    return seen


def _hull(blocks: torch.Tensor) -> tuple[int, int]:
    return int(blocks[:, 0].min()), int(blocks[:, 1].max())


def _over(mask: Expr, q: tuple[int, int], k: tuple[int, int]) -> Expr:
    """The mask in normal form for the queries and keys from the first to the second number, counted from there."""
    algebra = Algebra(q[1] - q[0] + 1, k[1] - k[0] + 1)
    indices: dict[Expr, Expr] = {
        expr.Q: algebra.add(expr.Q, Const(q[0])),
        expr.K: algebra.add(expr.K, Const(k[0])),
    }
    return expr.substitute(mask, indices, algebra)
