"""Tensor descriptors: with them a device of compute capability 9.0 or later copies tiles by itself (TMA).

The host makes one for each tensor and launch. Those that a kernel makes need memory, for which Triton has an allocator that the
whole process shares. A descriptor is a parameter that holds the tensor's address, which stays what it is where a CUDA graph is
replayed.
"""

from __future__ import annotations

from typing import Any

import torch

#: What cuTensorMapEncodeTiled takes: dims, and bytes from one element to the next in any dim but the last.
DIMS, ALIGNED, _FARTHEST = 5, 16, 2**40


def fits(x: torch.Tensor) -> bool:
    """Whether there can be a descriptor of x [*batch, rows, columns]."""
    if x.dim() > DIMS or x.numel() == 0 or x.data_ptr() % ALIGNED:
        return False
    *apart, last = [s * x.element_size() if n > 1 else ALIGNED for n, s in zip(x.shape, x.stride())]
    adjacent = x.shape[-1] == 1 or last == x.element_size()
    return adjacent and all(0 < s < _FARTHEST and s % ALIGNED == 0 for s in apart)


def described(x: torch.Tensor, rows: int, columns: int) -> tuple[Any, tuple[int, ...]]:
    """A descriptor of x, for which fits() holds, and the strides of its batch indices: 1, or 0 where x is broadcast.

    What is read at once is `rows` by `columns` elements of one matrix, and 0 outside of it.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    # where there is one element, its stride is never used, and may be none that is allowed
    strides = [s if n > 1 else ALIGNED for n, s in zip(x.shape[:-1], x.stride())]
    block = [1] * (x.dim() - 2) + [rows, columns]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], block), tuple(int(n > 1) for n in x.shape[:-2])
