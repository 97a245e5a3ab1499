"""Masks: which keys a query keeps, as values a kernel can evaluate tile by tile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Causal:
    """Keep key k for query q where k <= q + offset, or its opposite where `inverted`.

    With Q != K, offset 0 is the top-left alignment and K - Q the bottom-right one.
    """

    kind: ClassVar[str] = "causal"
    offset: int = 0
    inverted: bool = False

    def __str__(self) -> str:
        name = "causal" if not self.inverted else "anti-causal"
        return name if not self.offset else f"{name} {self.offset:+d}"


@dataclass(frozen=True)
class Dense:
    """Keep where the operand, bool or an integer type, is nonzero; where it is zero if `inverted`."""

    kind: ClassVar[str] = "dense"
    operand: int
    inverted: bool = False

    def __str__(self) -> str:
        return f"{'not ' if self.inverted else ''}mask {self.operand}"


Mask = Causal | Dense
