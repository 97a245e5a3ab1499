"""Where the dtype of a sum swallows a score: rounding that kernels and the oracle share with the graph.

Kernels hold scores in float32 and the oracle in float64, whatever the graph's dtype is. What the graph rounds away is then an
error of the graph's, but for one case: where a number is added that is so large that a score is less than the distance between
neighbours there, the score is gone. A row of which every key is hidden that way (float16, with finfo.min added) gives the mean
of the values in the graph, and plain attention where nothing is rounded. So from `COARSE` on, where neighbours are 1 apart or
more, a sum is rounded as the graph does.

Terms that are added one after the other before the sum is held in a dtype were one sum in the graph, which was added to the
scores: `joined` finds them. Where two of them may be large and cancel (a difference of two times; a fill that a second one takes
back), kernels have to sum them first in every dtype, as the graph does: added one by one, the score is gone in between. Rounding
passes gradients on as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from attnfuse.spec import AddFill, Bias, Cast, Ramp, Shift, Step, dtype_of

#: From this magnitude on, neighbouring numbers of the dtype are 1 apart or more.
COARSE = {torch.float16: 2.0**10, torch.bfloat16: 2.0**7, torch.float32: 2.0**23}
#: What is added beyond this swallows every score in float32 and float64 too.
SWALLOWS = 1e30
_NARROW = ("float16", "bfloat16")
#: Terms of no more than this leave a score its digits, whatever else is added.
_LITTLE = 2.0**7


def rounds(step: Step) -> bool:
    """Whether scores are held in a dtype from `step` on that kernels have to round to."""
    return isinstance(step, Cast) and step.dtype in _NARROW


def is_sum(step: Step) -> bool:
    return isinstance(step, (Bias, Ramp, Shift, AddFill))


def joined(steps: Sequence[Step]) -> dict[int, int]:
    """Where two or more terms begin that are summed before they are added to the scores, and the cast that they end in."""
    found, first = {}, 0
    for i, step in enumerate(steps):
        if isinstance(step, Cast) and i - first > 1:
            found[first] = i
        if not is_sum(step):
            first = i + 1
    return found


def may_cancel(terms: Sequence[Step]) -> bool:
    """Whether two of the terms may be large and of opposite signs, so that it matters in which order they are added."""
    signs: set[str] = set()
    for i, step in enumerate(terms):
        if isinstance(step, (Bias, Ramp)):
            if "any" in signs:
                return True
            signs.add("any")
        elif isinstance(step, (Shift, AddFill)) and _LITTLE < abs(step.value) < math.inf:
            before = terms[i - 1] if i else None
            if isinstance(step, AddFill) and isinstance(before, (Bias, Ramp)) and before.keep == step.keep:
                # of a choice, one or the other is added
                continue
            signs.add("low" if step.value < 0.0 else "high")
    return len(signs) > 1


def exact_factor(factor: float) -> bool:
    """Whether products with it are exact, but for what overflows: it is a power of two."""
    return math.frexp(abs(factor))[0] == 0.5


def visible(steps: Sequence[Step]) -> tuple[Step, ...]:
    """The steps without casts that no result shows.

    Seen are casts to float16, which may overflow to inf; those to bfloat16 after something was added that may swallow a score;
    those of any dtype that end terms which may cancel; and those that separate sums from such ones.
    """
    swallow = _swallowing(steps)
    kept: list[Step] = []
    matters = False
    for i in reversed(range(len(steps))):
        step = steps[i]
        if not isinstance(step, Cast):
            kept.append(step)
            continue
        # the steps between this cast and the one before
        begin = next((j for j in reversed(range(i)) if isinstance(steps[j], Cast)), -1) + 1
        sums = any(map(is_sum, steps[begin:i]))
        first = next((j for j in reversed(range(begin, i)) if not is_sum(steps[j])), begin - 1) + 1
        cancels = may_cancel(steps[first:i])
        if step.dtype == "float16" or i in swallow or cancels or (matters and sums):
            kept.append(step)
        matters |= i in swallow or cancels
    return tuple(reversed(kept))


def _swallowing(steps: Sequence[Step]) -> set[int]:
    """The casts before which something was added that may be large enough to swallow a score there."""
    found, total = set(), 0.0
    for i, step in enumerate(steps):
        if isinstance(step, (Bias, Ramp)):
            total = math.inf
        elif isinstance(step, (Shift, AddFill)) and abs(step.value) < SWALLOWS:
            total += abs(step.value)
        elif rounds(step) and total >= COARSE[dtype_of(step.dtype)]:  # type: ignore[union-attr]
            found.add(i)
            # float16 leaves digits that bfloat16 does not
            total = 0.0 if step.dtype == "bfloat16" else total  # type: ignore[union-attr]
    return found


def held(s: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scores as `dtype` has them, as far as that matters: infinite where it overflows, rounded from COARSE on."""
    near = s.detach().to(dtype).to(s.dtype)
    over = near.isinf()
    s = torch.where(over, near, s)
    return s + torch.where((s.detach().abs() >= COARSE[dtype]) & ~over, near - s.detach(), 0.0)


def lost(s: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What rounding to `dtype` adds to the finite sums s: 0 below COARSE, and where `dtype` overflows."""
    s = s.detach()
    near = s.to(dtype).to(s.dtype)
    return torch.where((s.abs() >= COARSE.get(dtype, math.inf)) & near.isfinite(), near - s, 0.0)
