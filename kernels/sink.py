"""What a kernel does about a sink outside of its loops: the rows that have no keys, and the sink's own gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from attnfuse.spec import Attention


def without_keys(spec: Attention, operands: Sequence[torch.Tensor], stats: torch.Tensor) -> None:
    """Fill stats [2, *batch, Q] for rows without a key: the sink alone, if there is one."""
    stats[0].copy_(scores(spec, operands, stats[0]))
    stats[1].copy_((stats[0] > -math.inf).float())


def scores(spec: Attention, operands: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """The sink of each row, broadcastable to like [*batch, Q] and of its dtype; -inf where there is none."""
    if spec.sink is None:
        return like.new_full((), -math.inf)
    if spec.sink.operand is None:
        return like.new_full((), spec.sink.value)
    return operands[spec.sink.operand].squeeze(-1).to(like.dtype)


def inverse_sums(spec: Attention, stats: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(what to subtract from a row's scores, what to multiply exp of the rest by) from stats [2, *batch, Q], as kernels do."""
    top, total = stats.unbind()
    none = top == -math.inf
    broken = none | total.isnan() | top.isnan()
    if spec.softmax == "unshifted":
        whole = total * top.exp()
        broken = broken | ~((whole > 0.0) & (whole < math.inf))
    inverse = torch.where(broken, math.nan, 1.0 / total)
    if spec.hidden != "nan":
        inverse = torch.where(none if spec.hidden == "zero" else broken, 0.0, inverse)
    return torch.where(none, 0.0, top), inverse


def add_gradient(
    spec: Attention,
    operands: Sequence[torch.Tensor],
    grads: list[torch.Tensor | None],
    shift: torch.Tensor,
    inverse: torch.Tensor,
    delta: torch.Tensor,
) -> None:
    """Add the sink's gradient to that of its operand in grads (those of q, k, v and the operands), if one is there.

    shift, inverse as inverse_sums gives them; delta: sum(dout * out) less the gradient of the log-sum-exp. All are [*batch, Q].
    The sink's value is 0, so that its weight has the gradient -delta.
    """
    if spec.sink is None or spec.sink.operand is None:
        return
    at = 3 + spec.sink.operand
    others = grads[at]
    if others is None:
        return
    sink = scores(spec, operands, shift)
    weight = torch.where(inverse == 0.0, 0.0, torch.exp(sink - shift) * inverse)
    found = (weight * delta).neg().unsqueeze(-1)
    grads[at] = others.add_(found.sum_to_size(others.shape))
