"""Attention -> an equal Attention in its simplest form."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeGuard

import torch

from attnfuse.rounding import visible
from attnfuse.spec import Attention, Cast, Clamp, Scale, Shift, Softcap, Step, Tanh

#: Steps that change no score; -0.0 becomes 0.0 under Shift(0.0), which no softmax sees.
_IDENTITIES = (Scale(1.0), Shift(0.0), Clamp())
_LEAST, _MOST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def simplify(spec: Attention) -> Attention:
    """Drop casts that cannot be seen, join constant factors, name softcaps. Idempotent."""
    exact = spec.nan_policy == "eager"
    found = replace(spec, steps=_joined(visible(spec.steps), exact), weight_steps=_joined(spec.weight_steps, exact))
    # what stood between two steps may be gone
    return found if found == spec else simplify(found)


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
        if _is_plain(product) and keeps:
            out[-2:] = [Scale(product)]
            return True
    if isinstance(last, Cast) and last == second:
        out.pop()
        return True
    if _is_factor(last) and isinstance(second, Tanh) and _is_factor(third) and last.value > 0.0:
        product = third.value * last.value
        if _is_plain(product):
            out[-3:] = [Scale(product), Softcap(last.value)]
            return True
    return False


def _is_plain(product: float) -> bool:
    """Whether float32, which kernels compute in, has it in full: with 0 or an infinity, 0 and NaN stand where scores did."""
    return _LEAST <= abs(product) <= _MOST


def _is_factor(step: Step | None) -> TypeGuard[Scale]:
    return isinstance(step, Scale) and step.operand is None
