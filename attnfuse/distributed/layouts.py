"""Which tokens a rank holds, as numbers and as an expression.

Of a dim of `length` tokens each of P ranks holds n = rows_of_rank(...) rows. Row i of a rank is token

    contiguous  n * rank + i            striped  i * P + rank            (Brandon et al. 2023, arXiv:2311.09431)
    zigzag      the rank-th and the rank-th last of 2 P equal pieces     (as in context parallelism of Llama 3, arXiv:2407.21783)

Tokens from `length` on are padding. On every rank those are its last rows.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch

from attnfuse.expr import Algebra, Const, Expr

Layout = Literal["contiguous", "zigzag", "striped"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


class Numbers(NamedTuple):
    """Row i is token base + stride * i, and from row `half` on so many more as `jump` says."""

    base: int
    stride: int
    half: int
    jump: int


def check(layout: str) -> None:
    """Raises ValueError for what is no layout."""
    if layout not in LAYOUTS:
        raise ValueError(f"attnfuse: a layout is one of {', '.join(LAYOUTS)}; got {layout!r}")


def rows_of_rank(layout: str, ranks: int, length: Any) -> Any:
    """How many rows each rank holds: length / ranks rounded up, for zigzag to an even number. Works on symbolic sizes."""
    check(layout)
    if layout == "zigzag":
        return 2 * ((length + 2 * ranks - 1) // (2 * ranks))
    return (length + ranks - 1) // ranks


def numbers(layout: str, rank: int, ranks: int, n: int) -> Numbers:
    """How the n rows of `rank` are numbered."""
    check(layout)
    if not 0 <= rank < ranks:
        raise ValueError(f"attnfuse: rank {rank} of {ranks}")
    if layout == "contiguous":
        return Numbers(rank * n, 1, n, 0)
    if layout == "striped":
        return Numbers(rank, ranks, n, 0)
    if n % 2:
        raise ValueError(f"attnfuse: zigzag needs an even number of rows; got {n}")
    half = n // 2
    return Numbers(rank * half, 1, half, (2 * ranks - 2 - 2 * rank) * half)


def tokens(layout: str, rank: int, ranks: int, n: int, device: torch.device | None = None) -> torch.Tensor:
    """int64 [n]: the numbers of the rows of `rank`, in the order it holds them, from 0 to n * ranks - 1."""
    base, stride, half, jump = numbers(layout, rank, ranks, n)
    i = torch.arange(n, device=device)
    found = i * stride + base
    return torch.where(i < half, found, found + jump) if jump else found


def places(layout: str, ranks: int, n: Any, numbers: torch.Tensor) -> torch.Tensor:
    """Where tokens with these numbers are in the rows of all ranks, n of each, one rank after another. Takes symbolic sizes."""
    if layout == "contiguous":
        return numbers
    if layout == "striped":
        return torch.add(numbers % ranks * n, torch.div(numbers, ranks, rounding_mode="floor"))
    half = n // 2
    piece, within = torch.div(numbers, half, rounding_mode="floor"), numbers % half
    # the second piece of a rank is one of the last
    last = piece >= ranks
    rank = torch.where(last, 2 * ranks - 1 - piece, piece)
    return torch.add(rank * n, torch.where(last, within + half, within))


def in_order(layout: str, ranks: int, n: int, device: torch.device | None = None) -> torch.Tensor:
    """int64 [n * ranks]: where each token is in the rows of all ranks, one rank after the other."""
    return places(layout, ranks, n, torch.arange(n * ranks, device=device))


def real(layout: str, rank: int, ranks: int, length: int, held: int | None = None) -> int:
    """How many rows of `rank` are no padding: its first ones. held: rows of each rank, where they are more than rows_of_rank."""
    n = rows_of_rank(layout, ranks, length) if held is None else held
    base, stride, half, jump = numbers(layout, rank, ranks, n)
    before = len(range(base, min(length, base + stride * half), stride))
    after = len(range(base + stride * half + jump, min(length, base + stride * n + jump), stride))
    return before + after


def pieces(layout: str, rank: int, ranks: int, length: int, held: int | None = None) -> list[tuple[int, int, int]]:
    """(first token, how many, distance) of the runs that the real rows of `rank` are; without empty ones. held: as in `real`."""
    n = rows_of_rank(layout, ranks, length) if held is None else held
    base, stride, half, jump = numbers(layout, rank, ranks, n)
    found = []
    for first, rows in ((base, half), (base + stride * half + jump, n - half)):
        count = len(range(first, min(length, first + stride * rows), stride))
        if count:
            found.append((first, count, stride))
    return found


def token(
    layout: str, index: Expr, ranks: int, base: Expr, half: Expr | None, jump: Expr | None, algebra: Algebra
) -> Expr:
    """The token of row `index`: base, and for zigzag half and jump, are loads, so that one expression, and so one kernel, is
    that of all ranks and lengths."""
    check(layout)
    found = algebra.add(base, index, ranks if layout == "striped" else 1)
    if layout != "zigzag":
        return found
    assert half is not None and jump is not None
    return algebra.add(found, algebra.where(algebra.compare("lt", index, half), Const(0), jump))
