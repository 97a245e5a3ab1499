"""Where values of a graph change between replicated (equal on all ranks) and sharded (a rank's own rows in one dim).

    entered       a replicated tensor goes, as it is, into an op on rows      gradients are summed over ranks
    entered_rows  the rank's rows of a replicated tensor                      gradients are gathered, in token order
    left          rows of all ranks, in token order                           gradients are the rank's rows
    summed        a sum over rows, of all ranks                               gradients pass
    agreed        a number that one rank may have drawn otherwise             none

So gradients of replicated values are equal on all ranks. A rank has n = `rows_of_rank(...)` rows of `length` tokens. Rows whose
number is `length` or more are padding: they repeat the last token's values, get no gradient and are left out of what is gathered.

All are functions of tensors, numbers and names, for graphs: a name of a process group is resolved when the graph runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from attnfuse import _compat
from attnfuse.distributed import ops
from attnfuse.distributed.layouts import Layout, places, rows_of_rank


def tokens(like: torch.Tensor, length: int, layout: Layout, ranks: int, groups: Sequence[str]) -> torch.Tensor:
    """int64 [n]: the numbers of the rank's rows, on the device of `like`; those of padding are `length` and more."""
    made: torch.Tensor = torch.ops.attnfuse.tokens(like, rows_of_rank(layout, ranks, length), layout, groups)
    return made


def _is_padded(length: Any, layout: Layout, ranks: int) -> bool:
    return not _compat.statically_known_true(rows_of_rank(layout, ranks, length) * ranks == length)


def _own(x: torch.Tensor, dim: int, layout: Layout, ranks: int, groups: Sequence[str], zeros: bool) -> torch.Tensor:
    """The rank's rows of x in dim. zeros: rows of padding are 0, else they repeat the last token's."""
    length = x.shape[dim]
    numbers = tokens(x, length, layout, ranks, groups)
    if not _is_padded(length, layout, ranks):
        return x.index_select(dim, numbers)
    found = x.index_select(dim, numbers.clamp(max=length - 1))
    return _without_padding(found, dim, length, numbers) if zeros else found


def _without_padding(rows: torch.Tensor, dim: int, length: int, numbers: torch.Tensor) -> torch.Tensor:
    """The rows with these numbers, with 0 in those of padding."""
    real = inside(numbers, length, dim, rows.dim())
    return torch.where(real, rows, torch.zeros((), dtype=rows.dtype, device=rows.device))


def _whole(x: torch.Tensor, dim: int, length: int, layout: Layout, ranks: int, groups: Sequence[str]) -> torch.Tensor:
    """The rows of all ranks in dim, in token order."""
    # ranks lie one after the other in the first dim of what is gathered, those of the inner group first
    moved = x.movedim(dim, 0)
    every = moved.contiguous()
    for group in reversed(groups):
        every = _compat.all_gather(every, group)
    if layout == "contiguous":
        every = every.narrow(0, 0, length)
    else:
        numbers = torch.arange(length, device=x.device)
        every = every.index_select(0, places(layout, ranks, moved.shape[0], numbers))
    return every.movedim(0, dim).contiguous()


def _reduced(x: torch.Tensor, groups: Sequence[str], how: str = "sum") -> torch.Tensor:
    """The sum over the ranks of all groups, each of which a rank is in."""
    x = x.contiguous()
    for group in reversed(groups):
        x = _compat.all_reduce(x, how, group)
    return x


class _Entered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, groups: Sequence[str], factor: int, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.groups, ctx.factor = groups, factor
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in given)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        found: list[torch.Tensor | None] = list(grads)
        needed = [i for i, g in enumerate(grads) if g is not None and ctx.needs_input_grad[2 + i]]
        if ctx.factor:
            return None, None, *(g if g is None or i not in needed else g * ctx.factor for i, g in enumerate(grads))
        kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for i in needed:
            g = grads[i]
            assert g is not None
            kinds.setdefault((g.dtype, g.device), []).append(i)
        for alike in kinds.values():
            parts = [g for i in alike if (g := grads[i]) is not None]
            if len(parts) == 1:
                found[alike[0]] = _reduced(parts[0], ctx.groups)
                continue
            flat = _reduced(torch.cat([g.reshape(-1) for g in parts]), ctx.groups)
            pieces = flat.split([g.numel() for g in parts])
            for i, g, piece in zip(alike, parts, pieces, strict=True):
                found[i] = piece.view(g.shape)
        return None, None, *found


class _EnteredRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dim: int, layout: Layout, ranks: int, groups: Sequence[str]) -> torch.Tensor:
        ctx.given = dim, x.shape[dim], layout, ranks, groups
        return _own(x, dim, layout, ranks, groups, zeros=False)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        return _whole(grad, *ctx.given), None, None, None, None


class _Left(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, dim: int, length: int, layout: Layout, ranks: int, groups: Sequence[str]
    ) -> torch.Tensor:
        ctx.given = dim, layout, ranks, groups
        return _whole(x, dim, length, layout, ranks, groups)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        dim, layout, ranks, groups = ctx.given
        return _own(grad, dim, layout, ranks, groups, zeros=True), None, None, None, None, None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, groups: Sequence[str]) -> torch.Tensor:
        return _reduced(x, groups)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        return grad, None


class _Shown(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, dim: int, length: int, layout: Layout, ranks: int, groups: Sequence[str]
    ) -> Any:
        ctx.given = dim, length, layout, ranks, groups
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        dim, length, layout, ranks, groups = ctx.given
        return _without_padding(grad, dim, length, tokens(grad, length, layout, ranks, groups)), *[None] * 5


def shown(x: torch.Tensor, dim: int, length: int, layout: Layout, ranks: int, groups: Sequence[str]) -> torch.Tensor:
    """The rank's rows as a result of their own; what their padding is given for a gradient is dropped."""
    if not (x.is_floating_point() or x.is_complex()) or not _is_padded(length, layout, ranks):
        return x
    made: torch.Tensor = _Shown.apply(x, dim, length, layout, ranks, groups)
    return made


def entered(given: Sequence[torch.Tensor], groups: Sequence[str], factor: int = 0) -> tuple[torch.Tensor, ...]:
    """The tensors, whose gradients are summed over ranks, all in one message for each dtype.

    factor: they are not summed, but multiplied by it (for a DDP or FSDP that averages over the same ranks); 0 for none.
    """
    # the same entered tensor may be read where autograd records, though it was first read where it does not
    with torch.enable_grad():
        made: tuple[torch.Tensor, ...] = _Entered.apply(groups, factor, *given)
    return made


def entered_rows(x: torch.Tensor, dim: int, layout: Layout, ranks: int, groups: Sequence[str]) -> torch.Tensor:
    """The rank's rows of x in dim; gradients are those of all ranks' rows. Differentiable where x is of floats."""
    if not (x.is_floating_point() or x.is_complex()):
        return _own(x, dim, layout, ranks, groups, zeros=False)
    with torch.enable_grad():
        made: torch.Tensor = _EnteredRows.apply(x, dim, layout, ranks, groups)
    return made


def left(x: torch.Tensor, dim: int, length: int, layout: Layout, ranks: int, groups: Sequence[str]) -> torch.Tensor:
    """The rows of all ranks in dim, in token order, without padding."""
    if not (x.is_floating_point() or x.is_complex()):
        # no collective takes bool everywhere
        if x.dtype == torch.bool:
            return _whole(x.to(torch.uint8), dim, length, layout, ranks, groups).to(torch.bool)
        return _whole(x, dim, length, layout, ranks, groups)
    made: torch.Tensor = _Left.apply(x, dim, length, layout, ranks, groups)
    return made


def summed(x: torch.Tensor, groups: Sequence[str]) -> torch.Tensor:
    """The sum over ranks."""
    if not (x.is_floating_point() or x.is_complex()):
        return _reduced(x, groups)
    made: torch.Tensor = _Summed.apply(x, groups)
    return made


def agreed(x: torch.Tensor, groups: Sequence[str]) -> torch.Tensor:
    """Integers that are equal on all ranks, where each drew its own: the greatest."""
    return _reduced(x, groups, "max")


def inside(numbers: torch.Tensor, length: int, dim: int, rank: int) -> torch.Tensor:
    """Which of the rows with these numbers [n] are tokens and no padding: bool, of `rank` dims, 1 but for `dim`."""
    return (numbers < length).view([-1 if d == dim else 1 for d in range(rank)])


assert ops.__doc__, "importing it registers the op that says which tokens a rank has"
