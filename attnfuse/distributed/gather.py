"""All keys and values are gathered, and one kernel call sees them: right for every spec. Gradients are added up and scattered."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attnfuse.distributed import layouts, local
from attnfuse.distributed.steps import Call, padded
from attnfuse.distributed.transport import Hops


def forward(
    call: Call, hops: Hops, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [*batch, n, E] and stats [2, *batch, n] of this rank's q, k and v."""
    return local.forward(call, q, whole(call, hops, k), whole(call, hops, v))


def backward(
    call: Call,
    hops: Hops,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    stats: torch.Tensor,
    needs: Sequence[bool],
) -> list[torch.Tensor | None]:
    """Gradients of this rank's q, k and v, and its part of those of the operands; None without a need."""
    keys, values = whole(call, hops, k), whole(call, hops, v)
    dq, dk, dv, *others = local.backward(call, dout, dlse, q, keys, values, out, stats, needs, summed=call.ranks > 1)
    own = [None if g is None else scattered(call, hops, g, x) for g, x in ((dk, k), (dv, v))]
    return [dq, *own, *others]


def whole(call: Call, hops: Hops, x: torch.Tensor) -> torch.Tensor:
    """[*batch, keys, D]: the rows of all ranks in the order of their tokens."""
    n = x.shape[-2]
    found = hops.gather(x).movedim(0, -3).flatten(-3, -2)
    if call.layout != "contiguous" and call.ranks > 1:
        found = found.index_select(-2, layouts.in_order(call.layout, call.ranks, n, x.device))
    return found[..., : call.keys, :]


def scattered(call: Call, hops: Hops, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """This rank's rows, as many as x has, of the sum of all ranks' grad [*batch, keys, D]; added up in float32 at least."""
    n = x.shape[-2]
    grad = padded(grad.to(torch.promote_types(grad.dtype, torch.float32)), -2, n * call.ranks)
    if call.layout != "contiguous" and call.ranks > 1:
        held = [layouts.tokens(call.layout, r, call.ranks, n, grad.device) for r in range(call.ranks)]
        grad = grad.index_select(-2, torch.cat(held))
    return hops.reduce_scatter(grad.unflatten(-2, (call.ranks, n)).movedim(-3, 0))
