"""What a row's two statistics, its maximum and its sum of exp(s - maximum), come to together."""

from __future__ import annotations

import torch


def log_sum_exp(top: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """[*batch, Q] log(sum(exp(s))) from the maxima and the sums, both [*batch, Q]; as torch.logsumexp, +-inf where the maximum is.

    Where the maximum is infinite the sum is NaN, or says nothing. Calls of torch alone on its arguments, so that
    `Writer.inline` can write it into a graph.
    """
    return torch.where(torch.isinf(top), top, torch.add(top, torch.log(total)))
