"""One score more than there are keys: attention sinks, softmax "off by one"; and the log-sum-exp as a result.

The rules are in `passes.read.sinks`, `passes.read.anchors` and `passes.read.fully_masked`.
"""

from __future__ import annotations

import torch

from attnfuse import reasons
from attnfuse.passes.read.idioms.example import Example, NearMiss


def _concatenated(q: torch.Tensor, k: torch.Tensor, sink: torch.Tensor, first: bool = False) -> torch.Tensor:
    s = q @ k.mT
    extra = sink.reshape(1, -1, 1, 1).expand(s.shape[0], -1, s.shape[2], -1)
    s = torch.cat([extra, s] if first else [s, extra], dim=-1)
    return (s - s.max(dim=-1, keepdim=True).values).softmax(-1)


def _padded(s: torch.Tensor, pads: tuple[int, int]) -> torch.Tensor:
    return torch.nn.functional.pad(s, pads).softmax(-1)


def _off_by_one(s: torch.Tensor, v: torch.Tensor, least: float | None = None) -> torch.Tensor:
    top = s.amax(-1, keepdim=True)
    top = top if least is None else top.clamp(min=least)
    e = torch.exp(s - top)
    return (e / (torch.exp(-top) + e.sum(-1, keepdim=True))) @ v


def _relative(s: torch.Tensor, v: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
    sink = sink.view(1, -1, 1, 1)
    top = torch.maximum(s.amax(-1, keepdim=True), sink)
    e = torch.exp(s - top)
    return (e @ v) / (e.sum(-1, keepdim=True) + torch.exp(sink - top))


def _sum_and_one(s: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    e = torch.exp(s - s.amax(-1, keepdim=True).clamp(min=0))
    return (e / (1.0 + e.sum(-1, keepdim=True))) @ v


def _by_log_sum_exp(s: torch.Tensor, v: torch.Tensor, diagonal: int) -> torch.Tensor:
    """Hidden by a finite number, of which eager's logarithm of the sum leaves nothing in rows that it hides whole."""
    s = s.masked_fill(torch.ones(16, 16).tril(diagonal) == 0, torch.finfo(torch.float32).min)
    return (s - s.logsumexp(-1, keepdim=True)).exp() @ v


def _both(s: torch.Tensor, v: torch.Tensor, dim: int = -1) -> torch.Tensor:
    return s.softmax(-1) @ v * s.logsumexp(dim).mean()


EXAMPLES = (
    Example(lambda q, k, v, sink: _concatenated(q, k, sink)[..., :-1] @ v, "sink float32[1, H, 1, 1]"),
    Example(lambda q, k, v, sink: _concatenated(q, k, sink, first=True)[..., 1:] @ v, "sink float32[1, H, 1, 1]"),
    Example(lambda q, k, v, sink: _concatenated(q, k, sink)[..., :16].contiguous() @ v, "sink float32[1, H, 1, 1]"),
    Example(lambda q, k, v: _padded(q @ k.mT, (0, 1))[..., :-1] @ v, "sink 0"),
    Example(lambda q, k, v: _padded(q @ k.mT, (1, 0))[..., 1:] @ v, "sink 0"),
    Example(lambda q, k, v: _off_by_one(q @ k.mT, v), "sink 0"),
    Example(lambda q, k, v: _off_by_one(q @ k.mT, v, 0.0), "sink 0"),
    Example(
        lambda q, k, v: (lambda e: (e / (1 + e.sum(-1, keepdim=True))) @ v)((q @ k.mT).exp()),
        "sink 0, softmax unshifted",
    ),
    Example(lambda q, k, v, sink: _relative(q @ k.mT, v, sink), "sink float32[1, H, 1, 1]"),
    Example(lambda q, k, v: _both(q @ k.mT, v), "gives its log-sum-exp"),
    Example(lambda q, k, v: _by_log_sum_exp(q @ k.mT, v, 0), "causal else -3.40282e+38"),
)
NEAR_MISSES = (
    NearMiss(lambda q, k, v, sink: _concatenated(q, k, sink)[..., 1:] @ v, reasons.UNREAD_ON_SCORES),
    NearMiss(lambda q, k, v, sink: _concatenated(q, k, sink, first=True)[..., :-1] @ v, reasons.UNREAD_ON_SCORES),
    NearMiss(
        lambda q, k, v, sink: (lambda p: p[..., :-1] @ v + p[..., -1:])(_concatenated(q, k, sink)),
        reasons.UNREAD_ON_SCORES,
    ),
    NearMiss(lambda q, k, v: _padded(q @ k.mT, (0, 2))[..., :-2] @ v, reasons.UNREAD_ON_SCORES),
    NearMiss(lambda q, k, v: _padded(q @ k.mT, (1, 0))[..., :-1] @ v, reasons.UNREAD_ON_SCORES),
    NearMiss(lambda q, k, v: _sum_and_one(q @ k.mT, v), reasons.DENOMINATOR_TERM),
    NearMiss(lambda q, k, v: _both(q @ k.mT, v, -2), reasons.USED_ELSEWHERE),
    NearMiss(
        lambda q, k, v, added: (lambda s: (s - s.logsumexp(-1, keepdim=True)).exp() @ v)(q @ k.mT + added),
        reasons.LOG_SUM_EXP_OF_MASKED_ROWS,
    ),
    # the first query sees no key
    NearMiss(lambda q, k, v: _by_log_sum_exp(q @ k.mT, v, -1), reasons.LOG_SUM_EXP_OF_MASKED_ROWS),
)
