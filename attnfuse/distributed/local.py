"""Attention of a rank's queries to whole keys and values, which every rank has: nothing is sent."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attnfuse.distributed.steps import Call, padded
from attnfuse.kernels.layout import precision
from attnfuse.spec import Attention, dtype_of


def forward(call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """out [*batch, n, E] and stats [2, *batch, n] of q [*batch, n, D], k [*batch, keys, D] and v [*batch, keys, E]."""
    n = q.shape[-2]
    inputs = call.inputs("rows", q[..., : call.rows[call.rank], :], k, v, call.rank, 0)
    out, stats = call.run("forward", call.step("rows").spec, inputs)
    return laid_out(call.spec, padded(out, -2, n)), padded_statistics(stats, n)


def backward(
    call: Call,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    stats: torch.Tensor,
    needs: Sequence[bool],
    *,
    summed: bool,
) -> list[torch.Tensor | None]:
    """Gradients of q and, as far as this rank's queries make them, of k, v and the operands, whole; None without a need.

    summed: they are added to those of other ranks, so that they are float32 where the kernel has them.
    """
    n, rows = q.shape[-2], call.rows[call.rank]
    inputs = call.inputs("rows", q[..., :rows, :], k, v, call.rank, 0)
    numbers = [False] * sum(call.step("rows").numbers)
    step, wanted = call.step("rows").spec, [*needs, *numbers]
    dout, out, stats = dout[..., :rows, :], out[..., :rows, :], stats[..., :rows]
    dlse = None if dlse is None else dlse.expand(*stats.shape[1:-1], n)[..., :rows]
    if summed and call.partial and q.dtype.itemsize < 4:
        compute = precision(step)
        delta = (dout.to(compute) * out.to(compute)).sum(-1)
        delta = delta if dlse is None else delta - dlse
        dq, dk, dv, *others = call.run("backward_part", step, inputs, dout, delta, stats, wanted)
    else:
        dq, dk, dv, *others = call.run("backward", step, inputs, dout, out, stats, wanted, dlse)
    sums: list[torch.Tensor | None] = [None] * len(call.operands)
    call.add_to_whole(sums, others[: len(call.operands)], "rows", call.rank, 0)
    return [None if dq is None else padded(dq, -2, n), dk, dv, *sums]


def padded_statistics(stats: torch.Tensor, n: int) -> torch.Tensor:
    """Statistics of n rows: padding has a log-sum-exp of 0, so that nothing of it is infinite."""
    if stats.shape[-1] == n:
        return stats
    return torch.stack([padded(stats[0], -1, n), padded(stats[1], -1, n, 1.0)])


def laid_out(spec: Attention, out: torch.Tensor) -> torch.Tensor:
    """out in the spec's dtype, its dims in memory in the spec's order."""
    order = spec.out_order
    inverse = [order.index(d) for d in range(len(order))]
    return out.to(dtype_of(spec.out_dtype)).permute(order).contiguous().permute(inverse)
