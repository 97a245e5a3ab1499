"""Which score steps hide keys for good, so that kernels may skip them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from attnfuse.spec import AddFill, Attention, Bias, Cast, Ramp, ReplaceFill, Scale, Shift, Step, dtype_of

#: What is added or filled in at most this is hidden for good, unless something of that size is added too: scores that are
#: products of q and k are taken to be smaller.
HIDDEN_BELOW = -1e30
#: What is added from this on may lift a key that is hidden for good.
LIFTS = 1e29
#: Scores that are multiplied by more may be as large.
_LARGE_SCALE = 1e20
#: exp(-VANISHES) is 0 in float32.
VANISHES = 110.0
#: No score of a token is taken to be as small, so that a key that is filled with at most this has no weight beside another.
BELOW_ALL_SCORES = -1e9


@dataclass(frozen=True)
class Hiding:
    """steps: indices of the steps that hide. doubt: a row whose maximum is not above it may see hidden keys after all."""

    steps: frozenset[int] = frozenset()
    doubt: float = -math.inf


def hiding(spec: Attention, in_biases: bool = False) -> Hiding:
    """The steps of `spec` that leave nothing of a score, unless a later step could lift it again.

    in_biases: for a kernel that looks at the values of biases, for what hides (at most HIDDEN_BELOW) and, before it skips a key,
    for what lifts (`lifting`). Then biases may hide as well.
    """
    if spec.nan_policy == "eager" or any(isinstance(s, ReplaceFill) and s.value != 0.0 for s in spec.weight_steps):
        return Hiding()
    if lifts_always(spec) or (not in_biases and lifting(spec, by_bias=False)):
        return Hiding()
    found, doubt = set(), -math.inf
    for i, step in enumerate(spec.steps):
        if isinstance(step, (ReplaceFill, AddFill)):
            left = _left(spec.steps[i + 1 :], step.value, isinstance(step, ReplaceFill))
        elif in_biases and _may_hide(spec, i):
            left = _left(spec.steps[i + 1 :], HIDDEN_BELOW, False)
        else:
            continue
        if left is None:
            continue
        value, exact = left
        # a score that was replaced is a known number; one that was added to is only much smaller than all others
        if value > HIDDEN_BELOW and not (exact and value <= -2 * VANISHES):
            continue
        found.add(i)
        # every finite fill counts, the one nearest to zero most
        limit = 0.5 * value if value <= HIDDEN_BELOW else value + VANISHES
        if value > -math.inf:
            doubt = max(doubt, limit)
    return Hiding(frozenset(found), doubt)


def _may_hide(spec: Attention, i: int) -> bool:
    """Whether step i adds a tensor that hides keys where it is small enough."""
    step = spec.steps[i]
    if not isinstance(step, Bias) or step.alpha <= 0.0 or step.row is not None or step.col is not None:
        return False
    if not dtype_of(spec.operands[step.operand].dtype).is_floating_point:
        return False
    if step.keep is None:
        return True
    # with a mask of its own it hides if the fill after it hides what that mask leaves out
    after = next((s for s in spec.steps[i + 1 :] if not isinstance(s, Cast)), None)
    return isinstance(after, AddFill) and after.keep == step.keep and after.value <= HIDDEN_BELOW


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
    biases = [(j, s) for j, s in enumerate(spec.steps) if isinstance(s, (Bias, Ramp))]
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
            # nobody says how large the numbers of a ramp are
            factor = bias.alpha if isinstance(bias, Bias) else math.copysign(math.inf, bias.alpha)
            found[bias.operand] = max(found.get(bias.operand, 0.0), factor, key=abs)
    return found


def _left(later: Sequence[Step], value: float, exact: bool) -> tuple[float, bool] | None:
    """What `later` steps leave of a score that is `value`, and whether that is exact; None if it may be anything.

    exact: the score is that very number, not only much smaller than all others.
    """
    for step in later:
        if isinstance(step, Scale) and step.operand is None and step.value > 0:
            value *= step.value
        elif isinstance(step, ReplaceFill):
            value = max(value, step.value)
        elif isinstance(step, AddFill):
            if step.value > 0:
                return None
            exact = False
        elif isinstance(step, (Bias, Ramp, Shift)):
            exact = False
        elif not isinstance(step, Cast):
            return None
    return value, exact
