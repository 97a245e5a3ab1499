"""Paged layouts in the Triton kernels."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import make_spec
from paged_cases import *  # noqa: F403
from paged_cases import PLAIN, attention

from attnfuse.kernels import triton
from attnfuse.kernels.device import Device
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.triton import launch
from attnfuse.kernels.triton.call import Call


@pytest.fixture
def kernel():
    return triton


@pytest.mark.parametrize("Q", [1, 40])
def test_numbers_that_no_block_has_are_read_inside_of_the_cache(Q):
    q, k, v, pages = attention(Q)
    spec = make_spec(q, k, v, layout="paged", wraps=True, steps=PLAIN)
    room = [torch.full((x.numel() + 2000,), torch.nan) for x in (k, v)]
    held = []
    for x, around in zip((k, v), room):
        around[1000:-1000] = x.permute(3, 4, 1, 0, 2, 5).flatten()
        held.append(around[1000:-1000].view(9, 16, 2, 1, 1, 16).permute(3, 2, 4, 0, 1, 5))
    for number in (9, 100, -10, -100):
        pages.table[0, 0, 0, 2] = number
        out, _ = triton.forward(spec, Inputs(q, *held, pages=pages))
        assert bool(out.isfinite().all())


def test_query_heads_of_one_sequence_share_what_the_table_names():
    q, k, v, pages = attention(B=3, H=2, G=4)
    spec = make_spec(q, k, v, layout="paged", wraps=True, steps=PLAIN)
    found = Call(spec, Inputs(q, k, v, pages=pages), Device("cpu"), launch.run).decoding()
    assert found is not None and found.group == 4
    per_head = pages._replace(table=pages.table.expand(3, 2, 4, -1).contiguous())
    found = Call(spec, Inputs(q, k, v, pages=per_head), Device("cpu"), launch.run).decoding()
    assert found is None or found.group == 1
