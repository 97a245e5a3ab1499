"""Packed layouts in the Triton kernels, and how they deal tiles out."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import make_spec
from packed_cases import *  # noqa: F403
from packed_cases import attention

from attnfuse.kernels import triton
from attnfuse.kernels.device import Device
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.triton import launch
from attnfuse.kernels.triton.call import Call
from attnfuse.spec import Bias


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


def test_an_operand_without_elements_is_refused_where_it_would_be_read():
    q, k, v, bounds = attention()
    table = torch.randn(1, 2, 1, 0)
    spec = make_spec(q, k, v, [table], [("1", "B1", "1", "K")], layout="packed", steps=(Bias(0),))
    with pytest.raises(ValueError, match="an operand has no elements"):
        triton.forward(spec, Inputs(q, k, v, [table], bounds=bounds))


def test_statistics_of_any_strides():
    q, k, v, bounds = attention()
    spec, inputs = make_spec(q, k, v, layout="packed"), Inputs(q, k, v, bounds=bounds)
    out, stats = triton.forward(spec, inputs)
    found = [
        triton.backward(spec, inputs, out.flip(-1), out, given, [True] * 3)
        for given in (stats, stats.movedim(0, -1).contiguous().movedim(-1, 0), torch.stack([stats, -stats], -1)[..., 0])
    ]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
