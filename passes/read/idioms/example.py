"""What idiom files show: tiny eager functions that must fuse, and near misses that must not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from attnfuse.reasons import Cause

#: The inputs an example may name as its parameters: [B=2, H=4, Q=K=16, D=8], two key heads in kg and vg.
B, H, L, D = 2, 4, 16, 8


@dataclass(frozen=True)
class Example:
    """run     a function of inputs named in `inputs`
    reads   what its report says: the golden spec, in words
    """

    run: Callable[..., torch.Tensor]
    reads: str


@dataclass(frozen=True)
class NearMiss:
    """run     a function that is no attention, or none that is read
    cause   the cause of the reason that must be given; None where the report must not mention it at all
    """

    run: Callable[..., torch.Tensor]
    cause: Cause | None


def inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    """Fresh example tensors by name; the floating ones require grad."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    keep = torch.rand((B, 1, 1, L), generator=generator) > 0.3
    keep[..., 0] = True
    return {
        "q": normal(B, H, L, D),
        "k": normal(B, H, L, D),
        "v": normal(B, H, L, D),
        "kg": normal(B, H // 2, L, D),
        "vg": normal(B, H // 2, L, D),
        "k1": normal(B, L, D),
        "v1": normal(B, L, D),
        "x": normal(B, L, H * D),
        "keep": keep,
        "bias": normal(1, H, L, L),
        "temperature": normal(H, 1, 1),
        "sink": normal(H),
        "padding": (~keep).float() * -1e9,
        "added": torch.randn((B, 1, L, L), generator=generator),
    }
