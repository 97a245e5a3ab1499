"""Sites that give something else than a kernel's softmax in fully masked rows: these are left alone."""

from __future__ import annotations

import math

import torch

from attnfuse import reasons
from attnfuse.expr import Apply, Const, Expr, K, Q, sum_of
from attnfuse.passes.graph.aten import name_of, value_of
from attnfuse.passes.site import Refusal, Site
from attnfuse.rounding import SWALLOWS
from attnfuse.spec import AddFill, Bias, ReplaceFill, Shift, Step

#: log K is exact to five digits beside scores of this size.
_SMALL = 100.0
#: Beside what is added of this size, float32 has lost digits of a score that float64 keeps.
_LARGE = 2.0**10
_SUMS = ("add", "sub", "rsub", "baddbmm", "addbmm", "addmm")


def fully_masked(site: Site) -> Refusal | None:
    """Why the site is not a softmax for every input, if it is not.

    Beside a fill such as finfo.min, max + log(sum) is max: in a row that such a fill hides whole the weights are then
    K times softmax's, and the result is the sum of the values instead of their mean.
    """
    if site.by_own_maximum and any(_may_hide_all(s) for s in site.spec.steps):
        return Refusal(reasons.SINK_BY_OWN_MAXIMUM(), site.anchor)
    if _in_float64(site):
        return Refusal(reasons.MASK_IN_FLOAT64(), site.anchor)
    if not site.by_log_sum_exp:
        return None
    for step in site.spec.steps:
        if isinstance(step, (ReplaceFill, AddFill)):
            lost = -math.inf < step.value < -_SMALL and not _keeps_a_key(step.keep)
        else:
            lost = isinstance(step, Bias)
        if lost:
            return Refusal(reasons.LOG_SUM_EXP_OF_MASKED_ROWS(), site.anchor)
    return None


def _in_float64(site: Site) -> bool:
    """Whether scores of fewer digits are added to in float64, and something that may hide a row whole is added."""
    if site.spec.qk_dtype == "float64":
        return False
    if not any(name_of(n) in _SUMS and getattr(value_of(n), "dtype", None) == torch.float64 for n in site.inside):
        return False
    for step in site.spec.steps:
        if isinstance(step, Bias):
            return True
        lost = isinstance(step, (AddFill, Shift)) and _LARGE <= abs(step.value) < SWALLOWS
        if lost and not (isinstance(step, AddFill) and _keeps_a_key(step.keep)):
            return True
    return False


def _may_hide_all(step: Step) -> bool:
    """Whether it may leave nothing but -inf of a row."""
    if isinstance(step, (ReplaceFill, AddFill)):
        return step.value == -math.inf and not _keeps_a_key(step.keep)
    return isinstance(step, Bias)


def _keeps_a_key(keep: Expr) -> bool:
    """Whether key 0 is kept for every query, as under a causal mask."""
    if not (isinstance(keep, Apply) and keep.op == "le" and keep.args[0] == K):
        return isinstance(keep, Const) and bool(keep.value)
    terms = sum_of(keep.args[1])
    return terms == {Q: 1} and getattr(keep.args[1], "const", 0) >= 0
