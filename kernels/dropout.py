"""The dropout mask every kernel draws: a hash of (seed, row, key), so that backward and the oracle can draw it again.

A row is the flat index of (batch..., q) in row-major order, in the tensor that holds the result. All arithmetic is on 32-bit words:

    mix(x)  = the lowbias32 finaliser (Ellis 2018, github.com/skeeto/hash-prospector)
    a       = mix(lo + mix(hi + mix(row_lo + mix(row_hi ^ 0x9E3779B9))))
    b       = mix(a ^ 0x85EBCA6B)
    u(k)    = mix(mix(k ^ a) + b)
    keep(k) = u(k) >= floor(p * 2**32)

where lo, hi are the halves of the 64-bit seed and row_lo, row_hi those of the row. Two keys a row (a and b) keep the
streams of two rows from being shifted copies of each other.
"""

from __future__ import annotations

import torch

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


def keep(seed: torch.Tensor, rows: torch.Tensor, k: int, p: float) -> torch.Tensor:
    """Bool [*rows.shape, k], True where a weight is kept. seed int64 with one element; rows int64."""
    word = seed.reshape(1).to(torch.int64)
    low, high = word & _M, (word >> 32) & _M
    a = _mix((rows >> 32) ^ 0x9E3779B9)
    a = _mix(((rows & _M) + a) & _M)
    a = _mix((high + a) & _M)
    a = _mix((low + a) & _M)[..., None]
    b = _mix(a ^ 0x85EBCA6B)
    keys = torch.arange(k, device=seed.device, dtype=torch.int64)
    u = _mix((_mix(keys ^ a) + b) & _M)
    return u >= threshold(p)
