"""Dropout whose mask depends on a seed and the place in the whole tensor, and not on which rank computes it."""

from __future__ import annotations

from typing import Any

import torch

from attnfuse.kernels import dropout


def dropped(
    x: torch.Tensor,
    seed: torch.Tensor,
    p: float,
    dim: int | None = None,
    numbers: torch.Tensor | None = None,
    length: Any = 0,
) -> torch.Tensor:
    """x * mask / (1 - p), by the hash of kernels/dropout.py. seed: int64 [1].

    A row of the hash is the flat index of all dims but the last, a key that of the last, in the whole tensor. dim, numbers and
    length: x has some rows of it alone, those with these numbers (int64 [n]) in a dim that is `length` long.
    """
    if p >= 1.0:
        return x * 0.0
    if x.dim() == 0:
        return dropped(x.view(1), seed, p).view(())

    def places(d: int) -> torch.Tensor:
        return numbers if d == dim and numbers is not None else torch.arange(x.shape[d], device=x.device)

    rows = torch.zeros((), dtype=torch.int64, device=x.device)
    for d in range(x.dim() - 1):
        size = length if d == dim else x.shape[d]
        rows = rows[..., None] * size + places(d)
    keep = dropout.keep(seed, rows, places(x.dim() - 1), p)
    return torch.where(keep, x * (1.0 / (1.0 - p)), torch.zeros((), dtype=x.dtype, device=x.device))
