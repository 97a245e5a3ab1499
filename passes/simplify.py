"""Attention -> an equal Attention in its simplest form."""

from __future__ import annotations

import math
from dataclasses import replace

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
    if len(out) >= 2 and _is_factor(out[-1]) and _is_factor(out[-2]):
        first, second = out[-2].value, out[-1].value  # type: ignore[union-attr]
        product = first * second
        keeps = not exact or abs(first) <= 1.0 or abs(second) >= 1.0
        if math.isfinite(product) and product != 0.0 and keeps:
            out[-2:] = [Scale(product)]
            return True
    if len(out) >= 2 and isinstance(out[-1], Cast) and out[-1] == out[-2]:
        out.pop()
        return True
    if len(out) >= 3 and _is_factor(out[-1]) and isinstance(out[-2], Tanh) and _is_factor(out[-3]):
        cap, inner = out[-1].value, out[-3].value  # type: ignore[union-attr]
        if cap > 0.0:
            out[-3:] = [Scale(inner * cap), Softcap(cap)]
            return True
    return False


def _is_factor(step: Step) -> bool:
    return isinstance(step, Scale) and step.operand is None
