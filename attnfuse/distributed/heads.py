"""Batch dims and heads dealt to ranks, as Ulysses does: which part of each tensor a rank gets, and the spec of a part."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from attnfuse.spec import Attention


@dataclass(frozen=True)
class Parts:
    """cuts: into how many pieces each batch dim is cut; a part is one piece of each, the last dim counting fastest."""

    cuts: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.cuts)

    def spec(self, spec: Attention) -> Attention:
        """The spec of one part: the same of smaller batch dims."""
        batch = zip(spec.sizes, self.cuts)
        sizes = tuple(n if n is None else n // by for n, by in batch)
        return replace(spec, sizes=(*sizes, *spec.sizes[len(self.cuts) :]))

    def index(self, part: int, x: torch.Tensor) -> tuple[slice, ...]:
        """Where part number `part` of x [*batch, ...] is; the whole of dims in which x has size 1."""
        pieces = list(itertools.product(*map(range, self.cuts)))[part]
        return tuple(_piece(x.shape[d], by, i) for d, (by, i) in enumerate(zip(self.cuts, pieces)))

    def copies(self, x: torch.Tensor) -> int:
        """How many parts need the same piece of x."""
        return math.prod(by for by, n in zip(self.cuts, x.shape) if n == 1)


def _piece(size: int, by: int, number: int) -> slice:
    if size == 1 or by == 1:
        return slice(None)
    return slice(number * (size // by), (number + 1) * (size // by))


@functools.lru_cache(maxsize=256)
def parts_of(spec: Attention, ranks: int) -> Parts | None:
    """How the attention is dealt to so many ranks, or None where it cannot be in equal parts.

    Fewer key heads than ranks are sent to each rank that needs one. Since that costs bytes, dims in which k and v are not broadcast
    are cut first; of those the last ones, which are heads. Dims whose size a spec does not say stay whole.
    """
    sizes = spec.sizes[: len(spec.batch)]
    shared = [name in spec.broadcast[1] for name in spec.batch]
    found = [cuts for cuts in _products(len(sizes), ranks) if all(map(_divides, cuts, sizes))]
    if not found:
        return None
    best = max(found, key=lambda cuts: (math.prod(n for n, s in zip(cuts, shared) if not s), cuts[::-1]))
    return Parts(best)


def parts_for(spec: Attention, ranks: int) -> Parts:
    """Raises ValueError where the attention cannot be dealt to so many ranks."""
    parts = parts_of(spec, ranks)
    if parts is None:
        dims = ", ".join(f"{name} {size}" for name, size in zip(spec.batch, spec.sizes))
        raise ValueError(f"attnfuse: heads of an attention with {dims} cannot be dealt to {ranks} ranks")
    return parts


def _divides(cut: int, size: int | None) -> bool:
    return cut == 1 or (size is not None and size > 0 and size % cut == 0)


def _products(dims: int, total: int) -> list[tuple[int, ...]]:
    """All ways to write total as a product of so many numbers."""
    if not dims:
        return [()] if total == 1 else []
    divisors: Sequence[int] = [n for n in range(1, total + 1) if total % n == 0]
    return [(n, *rest) for n in divisors for rest in _products(dims - 1, total // n)]
