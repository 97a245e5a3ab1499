"""Where a spec's results lie in memory; works on real, fake and symbolically shaped tensors alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attnfuse.spec import Attention, dtype_of


def batch_shape(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """The broadcast of the batch dims (all but the last two) of tensors of one rank. Puts no guard on symbolic sizes.

    Where no tensor has a number other than 1, a symbolic size is taken for the full one.
    """
    rank = tensors[0].dim() - 2
    return tuple(_full([t.shape[d] for t in tensors]) for d in range(rank))


def allocate(
    spec: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, operands: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised out [*batch, Q, E], of spec.out_dtype and in spec.out_order, and stats float32 [2, *batch, Q]."""
    shape = (*batch_shape((q, k, v, *operands)), q.shape[-2], v.shape[-1])
    out = q.new_empty([shape[d] for d in spec.out_order], dtype=dtype_of(spec.out_dtype))
    inverse = [spec.out_order.index(d) for d in range(len(shape))]
    return out.permute(inverse), q.new_empty([2, *shape[:-1]], dtype=torch.float32)


def _full(sizes: Sequence[int]) -> int:
    symbolic: int | None = None
    for size in sizes:
        if not isinstance(size, int):
            symbolic = size if symbolic is None else symbolic
        elif size != 1:
            return size
    return 1 if symbolic is None else symbolic
