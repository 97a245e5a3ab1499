"""How batch dims become the batch and the heads of a library's kernel, which knows no other."""

from __future__ import annotations

import math

import torch

from attnfuse.kernels.inputs import Inputs
from attnfuse.spec import Attention

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def grouped(spec: Attention) -> bool:
    """Whether the innermost batch dim is that of query heads which share a key head."""
    return len(spec.batch) > 1 and all(spec.batch[-1] in names for names in spec.broadcast[1:])


def ordered(spec: Attention) -> bool:
    """Whether the batch dims are B, H or B, Hkv, group, or fewer of them, and no other is shared."""
    q, k, v = spec.broadcast
    shared = 1 if grouped(spec) else 0
    return not q and k == v and len(k) <= shared and len(spec.batch) - shared <= 2


def of_heads(spec: Attention, inputs: Inputs) -> Tensors:
    """q [B, H, Q, D], k [B, Hkv, K, D] and v [B, Hkv, K, E]; libraries step over whole rows."""
    q, k, v = (with_heads(x, spec, 4) for x in (inputs.q, inputs.k, inputs.v))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return q, k, v


def with_heads(x: torch.Tensor, spec: Attention, dims: int) -> torch.Tensor:
    """[B, H, ...] of so many dims from [*batch, ...]."""
    if grouped(spec):
        first = len(spec.batch) - 2
        x = x.flatten(first, first + 1)
    return x.reshape((1,) * (dims - x.dim()) + tuple(x.shape))


def of_rows(x: torch.Tensor) -> torch.Tensor:
    """Packed [1, *heads, rows, D] as [rows, H, D]."""
    rows, size = x.shape[-2:]
    found = x.reshape(math.prod(x.shape[:-2]), rows, size).transpose(0, 1)
    return found if found.stride(-1) == 1 else found.contiguous()


def laid_out(out: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """The result, of out's shape, as out lies in memory: libraries lay results out as models most often read them."""
    same = all(a == b or n == 1 for a, b, n in zip(result.stride(), out.stride(), out.shape))
    return result.as_strided(out.shape, out.stride()) if same and result.dtype == out.dtype else out.copy_(result)


def like(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The gradient in the shape, strides and dtype of x."""
    return laid_out(torch.empty_like(x), grad.reshape(x.shape))
