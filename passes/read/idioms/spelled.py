"""Softmax spelled out: exp(s - max) / sum, with logsumexp, through log_softmax, divided after the product with v.

The rules are in `passes.find`, which looks for them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from attnfuse import reasons
from attnfuse.passes.read.idioms.example import Example, NearMiss


def _late(s: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    e = (s - s.max(-1, keepdim=True)[0]).exp()
    return (e @ v) / e.sum(-1, keepdim=True)


def _early(s: torch.Tensor, v: torch.Tensor, dim: int = -1) -> torch.Tensor:
    e = (s - s.amax(-1, keepdim=True)).exp()
    return (e / e.sum(dim, keepdim=True)) @ v


def _unshifted(s: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    e = s.exp()
    return (e / e.sum(-1, keepdim=True)) @ v


def _by_views(s: torch.Tensor, v: torch.Tensor, back: int = -1) -> torch.Tensor:
    e = (s - s.amax(-1).unsqueeze(-1)).exp()
    return (e / e.sum(-1).unsqueeze(back)) @ v


def _summed(s: torch.Tensor, v: torch.Tensor, how: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    e = (s - s.amax(-1, keepdim=True)).exp()
    return (e / how(e)) @ v


EXAMPLES = (
    Example(lambda q, k, v: _early(q @ k.mT, v), "plain"),
    Example(lambda q, k, v: _late(q @ k.mT, v), "plain"),
    Example(lambda q, k, v: _unshifted(q @ k.mT, v), "softmax unshifted"),
    Example(lambda q, k, v: _by_views(q @ k.mT, v), "plain"),
    Example(lambda q, k, v: (lambda e: (e / e.sum(-1)[..., None]) @ v)((q @ k.mT).exp()), "softmax unshifted"),
    Example(
        lambda q, k, v: (lambda s: (s - s.max(-1).values.detach()[..., None]).softmax(-1) @ v)(q @ k.mT),
        "plain",
    ),
    Example(lambda q, k, v: _summed(q @ k.mT, v, lambda e: e.sum(-1).unsqueeze(-1)), "plain"),
    Example(lambda q, k, v: _summed(q @ k.mT, v, lambda e: e.sum(-1)[..., None]), "plain"),
    Example(lambda q, k, v: _summed(q @ k.mT, v, lambda e: e.sum(-1, keepdim=True).expand_as(e)), "plain"),
    Example(lambda q, k, v: (lambda s: (s.exp() / s.exp().sum(-1, keepdim=True)) @ v)(q @ k.mT), "softmax unshifted"),
    Example(lambda q, k, v: (q @ k.mT).log_softmax(-1).exp() @ v, "plain"),
    Example(lambda q, k, v: (lambda s: (s - s.logsumexp(-1, keepdim=True)).exp() @ v)(q @ k.mT), "plain"),
    Example(lambda q, k, v: (lambda s: (s - s.amax(-1, keepdim=True).detach()).softmax(-1) @ v)(q @ k.mT), "plain"),
)
NEAR_MISSES = (
    NearMiss(lambda q, k, v: _early(q @ k.mT, v, dim=-2), reasons.NOT_SUMMED_OVER_KEYS),
    NearMiss(lambda q, k, v: _by_views(q @ k.mT, v, back=-2), reasons.DENOMINATOR_UNREAD),
    NearMiss(
        lambda q, k, v: (lambda s: (s - s.amax(-1).unsqueeze(-2)).softmax(-1) @ v)(q @ k.mT), reasons.USED_ELSEWHERE
    ),
    NearMiss(
        lambda q, k, v: _summed(q @ k.mT, v, lambda e: e.sum(-1).double().unsqueeze(-1).float()),
        reasons.DENOMINATOR_UNREAD,
    ),
    NearMiss(lambda q, k, v: _summed(q @ k.mT, v, lambda e: e.sum(-1, keepdim=True).amax(-2, keepdim=True)), None),
    NearMiss(lambda q, k, v: (q @ k.mT).log_softmax(-1) @ v, None),
    NearMiss(
        lambda q, k, v: (lambda e, f: (e / f.sum(-1, keepdim=True)) @ v)((q @ k.mT).exp(), (k @ q.mT).exp()), None
    ),
    # of each key, where there are as many of them as queries
    NearMiss(
        lambda q, k, v: (lambda s: (s - s.amax(-2).unsqueeze(-1)).softmax(-1) @ v)(q @ k.mT), reasons.USED_ELSEWHERE
    ),
)
