"""Attention -> an equal Attention in its simplest form."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TypeGuard

from attnfuse.rounding import visible
from attnfuse.spec import Attention, Cast, Clamp, Scale, Shift, Softcap, Step, Tanh

#: Steps that change no score; -0.0 becomes 0.0 under Shift(0.0), which no softmax sees.
_IDENTITIES = (Scale(1.0), Shift(0.0), Clamp())


def simplify(spec: Attention) -> Attention:
    """Drop casts that cannot be seen, join constant factors, name softcaps. Idempotent."""
    exact = spec.nan_policy == "eager"
    steps = _joined(visible(spec.steps), exact)
    return replace(spec, steps=steps, weight_steps=_joined(spec.weight_steps, exact))


def _joined(steps: tuple[Step, ...], exact: bool) -> tuple[Step, ...]:
    """exact: what overflows between two steps stays infinite."""
    out: list[Step] = []
    for step in steps:
        if step in _IDENTITIES:
            continue
        out.append(step)
        while _join_tail(out, exact):
            pass
    return tuple(s for s in out if s not in _IDENTITIES)


def _join_tail(out: list[Step], exact: bool) -> bool:
    """Replace the last steps of `out` by fewer ones if they can be joined."""
    third, second, last = (*[None] * 3, *out)[-3:]
    if _is_factor(second) and _is_factor(last):
        product = second.value * last.value
        keeps = not exact or abs(second.value) <= 1.0 or abs(last.value) >= 1.0
        if math.isfinite(product) and product != 0.0 and keeps:
            out[-2:] = [Scale(product)]
            return True
    if isinstance(last, Cast) and last == second:
        out.pop()
        return True
    if _is_factor(last) and isinstance(second, Tanh) and _is_factor(third) and last.value > 0.0:
        out[-3:] = [Scale(third.value * last.value), Softcap(last.value)]
        return True
    return False


def _is_factor(step: Step | None) -> TypeGuard[Scale]:
    return isinstance(step, Scale) and step.operand is None
