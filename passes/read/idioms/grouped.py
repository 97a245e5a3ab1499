"""Grouped-query attention: key heads repeated by expand, repeat_interleave or repeat, or broadcast in five dims.

There is no rule of its own: `passes.views` drops the repeated index when it reads back through the repetition.
"""

from __future__ import annotations

import torch

from attnfuse import reasons
from attnfuse.passes.read.idioms.example import Example, NearMiss


def _repeat_kv(x: torch.Tensor) -> torch.Tensor:
    b, h, n, d = x.shape
    return x[:, :, None, :, :].expand(b, h, 2, n, d).reshape(b, h * 2, n, d)


def _latents() -> torch.Tensor:
    return torch.linspace(-1, 1, 40).cos().view(5, 8)


def _matrices() -> torch.Tensor:
    return torch.linspace(-1, 1, 256).sin().view(4, 8, 8)


EXAMPLES = (
    Example(lambda q, kg, vg: (q @ _repeat_kv(kg).mT).softmax(-1) @ _repeat_kv(vg), "GQA 2:1"),
    Example(
        lambda q, kg, vg: (q @ kg.repeat_interleave(2, 1).mT).softmax(-1) @ vg.repeat_interleave(2, dim=1), "GQA 2:1"
    ),
    Example(lambda q, kg, vg: (q @ kg.repeat(1, 2, 1, 1).mT).softmax(-1) @ vg.repeat(1, 2, 1, 1), "plain"),
    Example(
        lambda q, kg, vg: ((q.view(2, 2, 2, 16, 8) @ kg[:, :, None].mT).softmax(-1) @ vg[:, :, None]).flatten(1, 2),
        "GQA 2:1",
    ),
    Example(
        lambda q, kg, vg: torch.einsum(
            "bhgqk,bhkd->bqhgd", torch.einsum("bhgqd,bhkd->bhgqk", q.view(2, 2, 2, 16, 8), kg).softmax(-1), vg
        ),
        "GQA 2:1",
    ),
    Example(lambda q, k1, v1: (q @ k1[:, None].mT).softmax(-1) @ v1[:, None], "GQA 4:1"),
    # keys projected by a matrix for each head, and queries that are one for all heads
    Example(
        lambda k, v: (_latents() @ torch.einsum("bhkc,hcd->bhkd", k, _matrices()).mT).softmax(-1) @ v,
        "plain",
    ),
    Example(
        lambda k1, v1: (_latents() @ torch.einsum("bkc,hcd->bhkd", k1, _matrices()).mT).softmax(-1) @ v1[:, None],
        "plain",
    ),
)
NEAR_MISSES = (
    NearMiss(lambda q, kg, vg: (q @ _repeat_kv(kg).mT).softmax(1) @ _repeat_kv(vg), reasons.SOFTMAX_OVER_BATCH),
    # heads that are mixed before the softmax, or after it
    NearMiss(
        lambda q, v: torch.einsum("hg,bgqk->bhqk", torch.ones(4, 4).triu(), q @ q.mT).softmax(-1) @ v,
        reasons.HEADS_MIXED,
    ),
    NearMiss(
        lambda q, k, v: (
            ((q @ k.mT / 3 + 1).permute(0, 2, 3, 1) @ torch.ones(4, 4).triu()).permute(0, 3, 1, 2).softmax(-1) @ v
        ),
        reasons.HEADS_MIXED,
    ),
    NearMiss(
        lambda q, k1, v1: (
            torch.einsum("hg,bgqk->bhqk", torch.ones(4, 4).triu(), q @ k1[:, None].mT).softmax(-1) @ v1[:, None]
        ),
        reasons.HEADS_MIXED,
    ),
    NearMiss(
        lambda q, k, v: torch.einsum("hg,bgqk->bhqk", torch.ones(4, 4).triu(), (q @ k.mT).softmax(-1)) @ v,
        reasons.NOT_SUMMED_OVER_KEYS,
    ),
)
