"""Which score steps hide keys for good, so that kernels may skip them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from attnfuse.spec import AddFill, Attention, Bias, Cast, ReplaceFill, Scale, Shift

#: What is added or filled in at most this is hidden for good, unless something of that size is added too: scores that are
#: products of q and k are taken to be smaller.
HIDDEN_BELOW = -1e30
#: What is added from this on may lift a key that is hidden for good.
LIFTS = 1e29
#: Scores that are multiplied by more may be as large.
_LARGE_SCALE = 1e20
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
    if lifts_always(spec) or lifting(spec, by_bias=False):
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


def lifts_always(spec: Attention) -> bool:
    """Whether numbers among the steps may lift a key that a finite fill hides for good."""
    if not any(isinstance(s, (ReplaceFill, AddFill)) and -math.inf < s.value <= HIDDEN_BELOW for s in spec.steps):
        return False
    factor = 1.0
    for step in spec.steps:
        if isinstance(step, Scale) and step.operand is None:
            factor *= max(abs(step.value), 1.0)
        elif isinstance(step, (Shift, AddFill)) and step.value >= LIFTS:
            return True
    return factor > _LARGE_SCALE


def lifting(spec: Attention, by_bias: bool) -> dict[int, float]:
    """Operands that may lift a key that something else hides for good, with their factors: by values of LIFTS and more.

    Those are biases beside a finite fill that is added, or after one that replaces; by_bias: and beside another bias, which may
    hide keys too.
    """
    found: dict[int, float] = {}
    biases = [(j, s) for j, s in enumerate(spec.steps) if isinstance(s, Bias)]
    for i, step in enumerate(spec.steps):
        if isinstance(step, (ReplaceFill, AddFill)):
            hides = -math.inf < step.value <= HIDDEN_BELOW
        else:
            hides = by_bias and isinstance(step, Bias) and step.alpha > 0.0 and step.row is None and step.col is None
        if not hides:
            continue
        for j, bias in biases:
            # of a choice between a bias and a fill one or the other is added
            if (
                j == i
                or (isinstance(step, ReplaceFill) and j < i)
                or bias.keep == getattr(step, "keep", None) is not None
            ):
                continue
            found[bias.operand] = max(found.get(bias.operand, 0.0), bias.alpha, key=abs)
    return found


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
