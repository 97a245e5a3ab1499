"""Results of parts of the keys made one: each row's maximum, sum and result, with its sink and the rule for hidden rows at the end.

Source: Milakov and Gimelshein 2018, arXiv:1805.02867 (maximum and sum of parts).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from attnfuse.kernels import sink
from attnfuse.kernels.fills import hiding
from attnfuse.spec import AddFill, Attention, Bias, Ramp, ReplaceFill


class Merged:
    """out [*batch, Q, E], and maximum and sum [*batch, Q], of all parts that were added; None before the first."""

    def __init__(self) -> None:
        self.out: torch.Tensor | None = None
        self.top = self.total = torch.empty(0)

    def add(self, out: torch.Tensor, stats: torch.Tensor) -> None:
        """A part's result and statistics [2, *batch, Q]: rows that saw nothing have maximum -inf, and result 0."""
        if self.out is None:
            self.out, (self.top, self.total) = out, stats.unbind()
            # what a row that saw nothing has for a sum is the kernel's affair
            self.total = torch.where(self.top == -math.inf, 0.0, self.total)
            return
        self._scale(stats[0], torch.where(stats[0] == -math.inf, 0.0, stats[1]), out)

    def _scale(self, top: torch.Tensor, total: torch.Tensor, out: torch.Tensor | None) -> None:
        """Take in another part; without a result it has weight alone."""
        assert self.out is not None
        most = torch.maximum(self.top, top)
        parts = []
        for a, b in ((self.top, self.total), (top, total)):
            # exp(-inf - -inf) would be NaN where both saw nothing
            parts.append(torch.where(a == -math.inf, 0.0, b * torch.exp(a - most)))
        self.top, self.total = most, parts[0] + parts[1]
        none = self.total == 0.0
        old, new = (torch.where(none, 0.0, p / self.total).unsqueeze(-1) for p in parts)
        self.out = self.out * old if out is None else self.out.mul_(old).add_(out * new)

    def finished(self, spec: Attention, operands: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, stats) of whole rows: with the sink, and what the spec says of rows without a finite sum."""
        assert self.out is not None
        if spec.sink is not None:
            scores = sink.scores(spec, operands, self.top).expand(self.top.shape)
            self._scale(scores, (scores > -math.inf).to(scores.dtype), None)
        stats = torch.stack([self.top, self.total])
        _, inverse = sink.inverse_sums(spec, stats)
        inverse = inverse.unsqueeze(-1)
        out = torch.where(inverse == 0.0, 0.0, torch.where(inverse.isnan(), math.nan, self.out))
        return out, stats


def for_parts(spec: Attention, stats: torch.Tensor) -> torch.Tensor:
    """Whole rows' statistics as the steps of backward take them, whose spec is plain: rows of which the spec makes 0 have maximum
    -inf, and those of which it makes NaN have that for a sum."""
    _, inverse = sink.inverse_sums(spec, stats)
    none, broken = inverse == 0.0, inverse.isnan()
    top = torch.where(none, -math.inf, torch.where(broken, 0.0, stats[0]))
    return torch.stack([top, torch.where(none, 0.0, torch.where(broken, math.nan, stats[1]))])


def is_one_number(spec: Attention) -> bool:
    """Whether the log-sum-exp says all of a row's statistics: not where a fill, or a tensor that is added, may leave a row a
    maximum so large that log(sum) is lost in it."""
    if hiding(spec).doubt > -math.inf or spec.softmax == "unshifted":
        return False
    finite = any(isinstance(s, (ReplaceFill, AddFill)) and s.value > -math.inf for s in spec.steps)
    return not finite and not any(isinstance(s, (Bias, Ramp)) for s in spec.steps)


def as_one_number(stats: torch.Tensor) -> torch.Tensor:
    """[1, *batch, Q]: the log-sum-exp, -inf or NaN where a row has no weights or is NaN."""
    top, total = stats.unbind()
    return torch.where(top == -math.inf, top, top + total.log())[None]


def from_numbers(numbers: torch.Tensor) -> torch.Tensor:
    """Statistics [2, *batch, Q] from those, or from the log-sum-exp [1, *batch, Q]."""
    if numbers.shape[0] == 2:
        return numbers
    lse = numbers[0]
    # NaN cannot be a maximum: kernels take that for a row like others
    broken = lse.isnan()
    total = torch.where(broken, math.nan, (lse > -math.inf).to(lse.dtype))
    return torch.stack([torch.where(broken, 0.0, lse), total])
