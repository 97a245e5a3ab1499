"""Which score steps hide keys for good, so that kernels may skip them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from attnfuse.spec import AddFill, Attention, Bias, Cast, ReplaceFill, Scale, Shift

#: What is added or filled in at most this is hidden for good: no score of a model comes near.
HIDDEN_BELOW = -1e30
#: exp(-VANISHES) is 0 in float32.
VANISHES = 110.0


@dataclass(frozen=True)
class Hiding:
    """steps: indices of the fills that hide. doubt: a row whose maximum is not above it may see hidden keys after all."""

    steps: frozenset[int] = frozenset()
    doubt: float = -math.inf


def hiding(spec: Attention) -> Hiding:
    """The fills of `spec` that leave nothing of a score, unless a later step could lift it again."""
    if spec.nan_policy == "eager" or any(isinstance(s, ReplaceFill) and s.value != 0.0 for s in spec.weight_steps):
        return Hiding()
    found, doubt = set(), -math.inf
    for i, step in enumerate(spec.steps):
        if not isinstance(step, (ReplaceFill, AddFill)):
            continue
        value = _value_left(spec, i)
        # a score that was replaced is a known number; one that was added to is only much smaller than all others
        if value is None or not (value[0] <= HIDDEN_BELOW or (value[1] and value[0] <= -2 * VANISHES)):
            continue
        found.add(i)
        limit = 0.5 * value[0] if value[0] <= HIDDEN_BELOW else value[0] + VANISHES
        if value[0] > -math.inf:
            doubt = max(doubt, limit)
    return Hiding(frozenset(found), doubt)


def _value_left(spec: Attention, i: int) -> tuple[float, bool] | None:
    """What the last step leaves of a score that step i filled, and whether that is exact; None if it may be anything."""
    step = spec.steps[i]
    assert isinstance(step, (ReplaceFill, AddFill))
    value, known = step.value, isinstance(step, ReplaceFill)
    for later in spec.steps[i + 1 :]:
        if isinstance(later, Scale) and later.operand is None and later.value > 0:
            value *= later.value
        elif isinstance(later, ReplaceFill):
            value = max(value, later.value)
        elif isinstance(later, AddFill):
            if later.value > 0:
                return None
            known = False
        elif isinstance(later, (Bias, Shift)):
            known = False
        elif not isinstance(later, Cast):
            return None
    return value, known
