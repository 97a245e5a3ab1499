"""Sites that give something else than a kernel's softmax in fully masked rows: these are left alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from attnfuse import reasons
from attnfuse.expr import TRUE, Apply, Const, Expr, K, Q, sum_of
from attnfuse.passes.graph.aten import name_of, value_of
from attnfuse.passes.site import Refusal, Site
from attnfuse.rounding import SWALLOWS
from attnfuse.spec import AddFill, Bias, Ramp, ReplaceFill, Scale, Shift, Step

#: log K is exact to five digits beside scores of this size.
_SMALL = 100.0
#: Beside what is added of this size, float32 has lost digits of a score that float64 keeps.
_LARGE = 2.0**10
#: The largest number of float32, in which scores are.
_MOST = torch.finfo(torch.float32).max
_SUMS = ("add", "sub", "rsub", "baddbmm", "addbmm", "addmm")


def fully_masked(site: Site) -> Refusal | None:
    """Why the site is not a softmax for every input, if it is not.

    Beside a fill such as finfo.min, max + log(sum) is max: in a row that such a fill hides whole the weights are then
    K times softmax's, and the result is the sum of the values instead of their mean.
    """
    if site.by_own_maximum and _may_hide_all(site.spec.steps):
        return Refusal(reasons.SINK_BY_OWN_MAXIMUM(), site.anchor)
    if _in_float64(site):
        return Refusal(reasons.MASK_IN_FLOAT64(), site.anchor)
    if site.by_log_sum_exp and _may_be_large(site.spec.steps, _SMALL):
        return Refusal(reasons.LOG_SUM_EXP_OF_MASKED_ROWS(), site.anchor)
    return None


def _in_float64(site: Site) -> bool:
    """Whether scores of fewer digits are added to in float64, and something that may hide a row whole is added."""
    if site.spec.qk_dtype == "float64":
        return False
    if not any(name_of(n) in _SUMS and getattr(value_of(n), "dtype", None) == torch.float64 for n in site.inside):
        return False
    # what is finite in float64 may be infinite in float32
    return _may_be_large(site.spec.steps, _LARGE, added=True) or -math.inf < _lowest(site.spec.steps) < -_MOST


def _may_be_large(steps: Sequence[Step], least: float, added: bool = False) -> bool:
    """Whether the greatest score of a row may be a finite number beyond `least`, by what is added to it or put in its place.

    added: only by what is added and leaves digits of the score in float64.
    """
    keeps = all(_keeps_a_key(s.keep) for s in steps if isinstance(s, (ReplaceFill, AddFill)))
    if _scaled_later(steps) or any(isinstance(step, (Bias, Ramp)) for step in steps):
        return True
    for step in steps:
        if isinstance(step, (Shift, ReplaceFill, AddFill)):
            size = abs(step.value)
            if size == math.inf or (added and (isinstance(step, ReplaceFill) or size >= SWALLOWS)):
                continue
            # a fill that is low is the greatest only where nothing else is left
            low = isinstance(step, (ReplaceFill, AddFill)) and (step.keep == TRUE or (keeps and step.value < 0.0))
            if size > least and not low:
                return True
    return False


def _scaled_later(steps: Sequence[Step]) -> bool:
    """Whether what was added or filled in is multiplied after that: what was little may be large, what was low high."""
    first = next((i for i, s in enumerate(steps) if isinstance(s, (Shift, ReplaceFill, AddFill))), len(steps))
    scales = [s for s in steps[first:] if isinstance(s, Scale)]
    return any(s.operand is not None or not 0.0 <= s.value <= 1.0 for s in scales)


def _may_hide_all(steps: Sequence[Step]) -> bool:
    """Whether they may leave nothing but -inf of a row."""
    return _lowest(steps) < -_MOST or _scaled_later(steps) or any(isinstance(step, (Bias, Ramp)) for step in steps)


def _lowest(steps: Sequence[Step]) -> float:
    """What all fills that may hide a row whole come to together; those that are finite may overflow where they meet."""
    fills = [s for s in steps if isinstance(s, (ReplaceFill, AddFill)) and not _keeps_a_key(s.keep)]
    return sum(min(s.value, 0.0) for s in fills)


def _keeps_a_key(keep: Expr) -> bool:
    """Whether key 0 is kept for every query, as under a causal mask."""
    if not (isinstance(keep, Apply) and keep.op == "le" and keep.args[0] == K):
        return isinstance(keep, Const) and bool(keep.value)
    terms = sum_of(keep.args[1])
    return terms == {Q: 1} and getattr(keep.args[1], "const", 0) >= 0
