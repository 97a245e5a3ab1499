"""Graphs in which ranks meet run with their padding: whether a batch fits the rows of tokens, each rank would say by itself."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from processes import run
from torch.nn import functional as F

import attnfuse


def pooled(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    h = F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], attn_mask=mask[:, None, None])[:, 0]
    return h[:, 0]


def meeting(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return collectives.all_reduce(pooled(x, mask), "sum", dist.group.WORLD)


def of_rank(meets: bool) -> tuple[bool, bool]:
    """Whether a call gives eager's result, and whether its graph was left with its padding."""
    torch._dynamo.reset()
    attnfuse.reset()
    torch.manual_seed(dist.get_rank())
    x, mask = torch.randn(3, 8, 4), torch.ones(3, 8, dtype=torch.bool)
    # the first place of rank 1's first sequence is no token
    mask[0, :2] = dist.get_rank() == 0
    model = meeting if meets else pooled
    found = torch.compile(model, backend="attnfuse", options={"inner": "eager", "strict": True})(x, mask)
    # where a guard fails, the graph with padding is compiled and reported, too
    left = any("the graph has collectives" in line for report in attnfuse.reports() for line in report.padding)
    return torch.allclose(found, model(x, mask), atol=1e-5), left


def test_ranks_that_meet_in_a_graph_run_the_same_one() -> None:
    assert run(of_rank, 2, True) == [(True, True)] * 2


def test_ranks_that_do_not_meet_look_at_their_own_batches() -> None:
    assert run(of_rank, 2, False) == [(True, False)] * 2
