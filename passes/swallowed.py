"""Sites whose spelling gives something else than a softmax in rows that are hidden whole: these are left alone."""

from __future__ import annotations

import math

from attnfuse.expr import Apply, Const, Expr, K, Q, sum_of
from attnfuse.passes.site import Refusal, Site
from attnfuse.spec import AddFill, Bias, ReplaceFill, Step

#: log K is exact to five digits beside scores of this size.
_SMALL = 100.0


def swallowed(site: Site) -> Refusal | None:
    """Why the site is not a softmax for every input, if it is not.

    Beside a fill such as finfo.min, max + log(sum) is max: in a row that such a fill hides whole the weights are then
    K times softmax's, and the result is the sum of the values instead of their mean.
    """
    if site.by_own_maximum and any(_may_hide_all(s) for s in site.spec.steps):
        return Refusal("a sink relative to the scores' own maximum is NaN in rows that are hidden whole", site.anchor)
    if not site.by_log_sum_exp:
        return None
    for step in site.spec.steps:
        if isinstance(step, (ReplaceFill, AddFill)):
            lost = -math.inf < step.value < -_SMALL and not _keeps_a_key(step.keep)
        else:
            lost = isinstance(step, Bias)
        if lost:
            return Refusal("exp(s - logsumexp(s)) is no softmax in rows that a finite fill hides whole", site.anchor)
    return None


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
