"""Packed layouts in the Triton kernels, and how they deal tiles out."""

from __future__ import annotations

import pytest
from kernel_cases import make_spec
from packed_cases import *  # noqa: F403
from packed_cases import attention

from attnfuse.kernels import triton
from attnfuse.kernels.device import Device
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.triton import launch
from attnfuse.kernels.triton.call import Call


@pytest.fixture
def kernel():
    return triton


def test_long_sequences_are_dealt_first():
    q, k, v, bounds = attention((3, 200, 40, 0, 70))
    spec = make_spec(q, k, v, layout="packed")
    call = Call(spec, Inputs(q, k, v, bounds=bounds), Device("cpu"), launch.run)
    ends, order = call.deal(bounds.q, q.shape[-2], 32).tolist()
    tiles = [-(-n // 32) for n in (3, 200, 40, 0, 70)]
    assert sorted(order) == list(range(5)) and [tiles[s] for s in order] == sorted(tiles, reverse=True)
    assert ends[-1] == sum(tiles) <= call.query_tiles(32)
