"""Forward kernels that others are known for, to count beside this project's: whole tiles, no mask, bfloat16.

Written here for their arithmetic and their loads alone. `tutorial`: Triton's tutorial 06 (scores scaled by scale * log2 e after
their maximum, exp2, no guard for rows without keys). `flex`: the template of FlexAttention (scores scaled, then by log2 e, a
guard for such rows, a list of blocks of 128 keys), with the configurations that torch 2.13 has for each device.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from attnfuse.kernels.triton.configs import Config
from attnfuse.kernels.triton.targets import Compiled, compile_kernel

LOG2E = tl.constexpr(1.44269504)
#: Keys of a block in FlexAttention's list.
BLOCK = 128
_LENGTH = 2048


@triton.jit
def tile_at(X, first, stride, size: tl.constexpr, D: tl.constexpr):
    """[size, D] rows from `first` on, through an address or a tensor descriptor."""
    if isinstance(X, tl.tensor):
        return tl.load(X + (first + tl.arange(0, size))[:, None] * stride + tl.arange(0, D)[None, :])
    else:
        return X.load([first, 0])


@triton.jit
def head_of(X, head, stride):
    """A head's matrix and its first row: the address moves, or the row in a descriptor."""
    if isinstance(X, tl.tensor):
        return X + head.to(tl.int64) * stride, head * 0
    else:
        return X, head


@triton.jit
def put(O, M, acc, m, l, head, first, stride, BM: tl.constexpr, D: tl.constexpr):
    rows = head + first + tl.arange(0, BM)
    acc = acc / l[:, None]
    tl.store(O + rows.to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :], acc.to(O.dtype.element_ty))
    tl.store(M + rows, m + tl.math.log2(l))


@triton.jit
def tutorial(
    Q, K, V, O, M, scale, length, stride, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr
):
    first = tl.program_id(0) * BM
    head = tl.program_id(1) * length
    Q, q_row = head_of(Q, head, stride)
    K, k_row = head_of(K, head, stride)
    V, v_row = head_of(V, head, stride)
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.full([BM], 1.0, tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    qt = tile_at(Q, q_row + first, stride, BM, D)
    factor = scale * LOG2E
    for k0 in tl.range(0, length, BN, num_stages=STAGES):
        kt = tile_at(K, k_row + k0, stride, BN, D)
        s = tl.dot(qt, tl.trans(kt))
        top = tl.maximum(m, tl.max(s, 1) * factor)
        p = tl.math.exp2(s * factor - top[:, None])
        fade = tl.math.exp2(m - top)
        row = tl.sum(p, 1)
        acc = acc * fade[:, None]
        vt = tile_at(V, v_row + k0, stride, BN, D)
        acc = tl.dot(p.to(vt.dtype), vt, acc)
        l = l * fade + row
        m = top
    put(O, M, acc, m, l, head, first, stride, BM, D)


@triton.jit
def flex(
    Q, K, V, O, M, scale, length, stride, COUNTS, BLOCKS,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SIZE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BM
    head = tl.program_id(1) * length
    Q, q_row = head_of(Q, head, stride)
    K, k_row = head_of(K, head, stride)
    V, v_row = head_of(V, head, stride)
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    qt = tile_at(Q, q_row + first, stride, BM, D)
    PARTS: tl.constexpr = SIZE // BN
    line = first // SIZE
    blocks = BLOCKS + line * (length // SIZE)
    count = tl.load(COUNTS + line)
    k0 = tl.load(blocks) * SIZE
    for i in tl.range(0, tl.minimum(count * PARTS, length // BN), num_stages=STAGES):
        kt = tile_at(K, k_row + k0, stride, BN, D)
        s = tl.dot(qt, tl.trans(kt)) * scale * LOG2E
        top = tl.maximum(m, tl.max(s, 1))
        shift = tl.where(top == float("-inf"), 0.0, top)
        fade = tl.math.exp2(m - shift)
        p = tl.math.exp2(s - shift[:, None])
        l = l * fade + tl.sum(p, 1)
        acc = acc * fade[:, None]
        vt = tile_at(V, v_row + k0, stride, BN, D)
        acc = tl.dot(p.to(vt.dtype), vt, acc)
        m = top
        # after the last part of a block comes the first of the next one in the list
        here = tl.load(blocks + i // PARTS)
        after = tl.load(blocks + i // PARTS + 1, mask=i // PARTS + 1 < count, other=0)
        jump = (after - here) * SIZE - (PARTS - 1) * BN
        k0 += tl.where((i + 1) % PARTS == 0, jump, BN)
    put(O, M, acc, m, tl.where(l == 0.0, 1.0, l), head, first, stride, BM, D)


def config(capability: int, name: str, D: int) -> Config:
    """The tutorial's are those of its candidates with the largest tiles that fit."""
    described = name.endswith("tma")
    if name.startswith("flex"):
        if capability in (90, 100):
            return Config(128, 128, 4, 3, described) if D == 64 else Config(128, 64, 8, 3, described)
        return Config(128, 64, 4 if D == 64 else 8, 2 if capability == 120 else 3, described)
    if capability in (90, 100):
        return Config(128, 128, 8, 3 if D == 64 else 2, described)
    return Config(128, 64, 8, 2 if capability == 120 else 3, described)


def compiled(capability: int, name: str, D: int) -> list[Compiled]:
    """'tutorial' or 'flex', with addresses, or with tensor descriptors where ' tma' follows."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    made = config(capability, name, D)
    x = torch.empty(16 * _LENGTH, D, dtype=torch.bfloat16)
    rows = {"Q": made.BM, "K": made.BN, "V": made.BN}
    read: dict[str, Any] = {
        at: TensorDescriptor.from_tensor(x, [n, D]) if made.descriptors else x for at, n in rows.items()
    }
    arguments = {
        **read,
        "O": x,
        "M": torch.empty(len(x)),
        "scale": D**-0.5,
        "length": _LENGTH,
        "stride": D,
        "D": D,
        **made.arguments(),
    }
    if name.startswith("tutorial"):
        return [compile_kernel(tutorial, arguments, capability)]
    lists = {at: torch.empty(0, dtype=torch.int32) for at in ("COUNTS", "BLOCKS")}
    return [compile_kernel(flex, {**arguments, **lists, "SIZE": BLOCK}, capability)]
