"""What the sharding pass leaves whole, with its reason: the graph stays right."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from processes import run
from sharded import all_checked
from sharded_refusals import CASES
from torch import nn
from torch.nn import functional as F

import attnfuse


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_what_is_left_whole_says_why(name, ranks):
    found = run(all_checked, ranks, "sharded_refusals", [name], {"layout": "striped"}, timeout=60.0)
    assert found == [[]] * ranks


def dropped_apart(drops):
    def attend(q, k, v, weight):
        # one query of whole keys: nothing to shard
        return F.dropout(F.scaled_dot_product_attention(q, k, v), 0.5, training=drops) @ weight

    torch._dynamo.reset()
    attnfuse.reset()
    options = {"sequence_parallel": dist.group.WORLD, "inner": "eager"}
    q, k, v = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    torch.compile(attend, backend="attnfuse", options=options)(q, k, v, nn.Parameter(torch.eye(8)))
    return list(attnfuse.reports()[0].warnings)


def test_a_graph_that_is_left_whole_and_draws_warns():
    for drops in (True, False):
        notes = run(dropped_apart, 1, drops)[0]
        assert any("draws from each rank's own generator. Seed all ranks alike" in n for n in notes) == drops, notes
