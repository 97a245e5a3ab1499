"""The dropout mask every kernel draws: a hash of (seed, row, key), so that backward and the oracle can draw it again.

A row is the flat index of (batch..., q) in row-major order, in the tensor that holds the result. All arithmetic is on 32-bit words:

    mix(x)  = the lowbias32 finaliser (Ellis 2018, github.com/skeeto/hash-prospector)
    a       = mix(lo + mix(hi + mix(row_lo + mix(row_hi ^ 0x9E3779B9))))
    b       = mix(a ^ 0x85EBCA6B)
    u(k)    = mix(mix(k ^ a) + b)
    keep(k) = u(k) >= floor(p * 2**32)

Where a call has some queries and keys of a longer attention (Inputs.numbers), both are numbered as in that: the row of query i of
batch element e is e * total + token(i), as if the rows of all of them were there.

where lo, hi are the halves of the 64-bit seed and row_lo, row_hi those of the row. Two keys a row (a and b) keep the
streams of two rows from being shifted copies of each other.
"""

from __future__ import annotations

import torch

from attnfuse.kernels.inputs import Inputs
from attnfuse.spec import Attention, dtype_name

_M = 0xFFFFFFFF
#: Graphs draw seeds from 0 up to this.
SEED_LIMIT = 2**62


def threshold(p: float) -> int:
    """The smallest 32-bit word that is kept."""
    return min(int(p * 4294967296.0), _M)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = x ^ (x >> 16)
    x = _mul(x, 0x7FEB352D)
    x = x ^ (x >> 15)
    x = _mul(x, 0x846CA68B)
    return x ^ (x >> 16)


def _mul(x: torch.Tensor, c: int) -> torch.Tensor:
    """x * c mod 2**32 in int64 without overflowing it."""
    low, high = x & 0xFFFF, x >> 16
    return (low * c + (((high * c) & 0xFFFF) << 16)) & _M


def keep(seed: torch.Tensor, rows: torch.Tensor, keys: torch.Tensor, p: float) -> torch.Tensor:
    """Bool [*rows.shape, K], True where a weight is kept. seed int64 with one element; rows int64; keys int64 [K]."""
    word = seed.reshape(1).to(torch.int64)
    low, high = word & _M, (word >> 32) & _M
    a = _mix((rows >> 32) ^ 0x9E3779B9)
    a = _mix(((rows & _M) + a) & _M)
    a = _mix((high + a) & _M)
    a = _mix((low + a) & _M)[..., None]
    b = _mix(a ^ 0x85EBCA6B)
    u = _mix((_mix((keys & _M) ^ a) + b) & _M)
    return u >= threshold(p)


def tokens(numbers: torch.Tensor, n: int) -> torch.Tensor:
    """int64 [n], the numbers of the first n queries or keys, of a row of Inputs.numbers."""
    base, stride, half, jump, _ = numbers.unbind()
    i = torch.arange(n, device=numbers.device)
    return base + stride * i + torch.where(i >= half, jump, 0)


def numbers_of(spec: Attention, inputs: Inputs) -> torch.Tensor | None:
    """inputs.numbers if the spec draws by them. Raises ValueError where they are not as Inputs has them, or go with
    another layout than a dense one.
    """
    numbers = inputs.numbers
    if numbers is None or spec.dropout == 0.0:
        return None
    if numbers.dtype != torch.int64 or tuple(numbers.shape) != (2, 5) or numbers.device != inputs.q.device:
        said = f"{dtype_name(numbers.dtype)} {list(numbers.shape)} on {numbers.device}"
        raise ValueError(
            f"attnfuse: the numbers of queries and keys must be int64 [2, 5] on {inputs.q.device}; got {said}"
        )
    if spec.layout != "dense":
        raise ValueError(
            f"attnfuse: layout {spec.layout} with numbers of queries and keys, which a dense one has alone"
        )
    return numbers


def refuse_numbers(spec: Attention, inputs: Inputs, kernel: str) -> None:
    """Raises ValueError where dropout is to be drawn by numbers: of a kernel that would count from 0 on."""
    if numbers_of(spec, inputs) is not None:
        raise ValueError(f"attnfuse: the kernel {kernel} does not draw dropout by given numbers")
