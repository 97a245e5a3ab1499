"""Layouts and spellings of the two products: einsum, tensordot, bmm over merged heads, [B, Q, H, D], channel-first and more.

There is no rule of its own: `passes.contraction` reads the products as letters, `passes.views` carries the dims.
"""

from __future__ import annotations

import torch

from attnfuse import reasons
from attnfuse.passes.read.idioms.example import Example, NearMiss


def _heads(x: torch.Tensor) -> torch.Tensor:
    return x.view(2, 16, 4, 8)


EXAMPLES = (
    Example(
        lambda q, k, v: torch.einsum("bhqk,bhkd->bqhd", torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1), v), "plain"
    ),
    Example(
        lambda x: torch.einsum(
            "bhqk,bkhd->bqhd", torch.einsum("bqhd,bkhd->bhqk", _heads(x), _heads(x)).softmax(-1), _heads(x)
        ).reshape(2, 16, 32),
        "plain",
    ),
    Example(
        lambda q, k, v: torch.bmm(
            torch.bmm(q.reshape(8, 16, 8), k.reshape(8, 16, 8).transpose(1, 2)).softmax(-1), v.reshape(8, 16, 8)
        ).view(2, 4, 16, 8),
        "plain",
    ),
    Example(lambda q, k, v: v.mT @ (q @ k.mT).softmax(-1).mT, "plain"),
    Example(lambda q, k, v: (v.mT @ (k @ q.mT).softmax(-2)).mT, "plain"),
    Example(lambda q, k, v: (q @ k.mT).mT.softmax(-1) @ v, "plain"),
    Example(lambda k1, v1: torch.softmax(k1[0] @ k1[1].t() / 8.0, dim=1) @ v1[0], "scale 0.125"),
    Example(
        lambda q, k1, v1: (
            (q.transpose(1, 2).reshape(2, 64, 8) @ k1.mT).view(2, 16, 4, 16).softmax(-1).reshape(2, 64, 16) @ v1
        ),
        "GQA 4:1",
    ),
    # [B, H, Q, D] and [K, D] give [B, H, Q, K]
    Example(lambda q, k1, v1: torch.tensordot(torch.tensordot(q, k1[0], ([3], [1])).softmax(-1), v1[0], 1), "GQA 4:1"),
    Example(lambda k1, v1: torch.tensordot(v1[0], torch.inner(k1[0], k1[1]).softmax(0), ([0], [0])).mT, "plain"),
)
NEAR_MISSES = (
    NearMiss(lambda q, k, v: (q @ k.mT).softmax(-2) @ v, reasons.NOT_SUMMED_OVER_KEYS),
    NearMiss(lambda q, k, v: (q @ k.mT).softmax(1) @ v, reasons.SOFTMAX_OVER_BATCH),
    NearMiss(lambda q, k, v: (q @ k.mT).flatten(2).softmax(-1).view(2, 4, 16, 16) @ v, reasons.VIEW_SPLITS_KEYS),
    NearMiss(
        lambda q, k1, v1: torch.tensordot((q @ k1[0].mT).softmax(-1), v1[0], ([2], [0])), reasons.NOT_SUMMED_OVER_KEYS
    ),
    NearMiss(
        lambda q, k1, v1: torch.tensordot((q @ k1[0].mT).softmax(-1), v1[0, :1], ([3], [0])),
        reasons.PRODUCT_OF_UNEQUAL_DIMS,
    ),
    NearMiss(lambda k1, v1: torch.inner((k1[0] @ k1[1, 0]).softmax(0), v1[0, :, 0]), reasons.PRODUCT_WITH_VECTOR),
)
