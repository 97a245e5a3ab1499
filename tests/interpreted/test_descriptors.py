"""tests/descriptor_cases.py in Triton's interpreter, where loops are specialised in name alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from descriptor_cases import *  # noqa: F403
from descriptor_cases import ADDED, FORWARD, HALF, A
from kernel_cases import FLOAT_MIN, INF, check, qkv

from attnfuse.expr import causal, dense
from attnfuse.kernels import triton
from attnfuse.kernels.triton.call import Call
from attnfuse.kernels.triton.configs import Config
from attnfuse.spec import AddFill, ReplaceFill


@pytest.mark.parametrize("stages", [1, 2])
def test_specialised_loops_and_descriptors_are_given_up_first(stages):
    made = Config(32, 64, 4, stages, descriptors=True, specialised=True)
    assert made.smaller() == replace(made, specialised=False)
    assert made.smaller().smaller() == Config(32, 64, 4, stages)


@pytest.mark.parametrize(("BM", "BN"), [(64, 32), (64, 64)])
def test_one_pass_of_backward_with_tiles_as_on_other_devices(BM, BN, added, monkeypatch):
    monkeypatch.setattr(Call, "table", lambda self, which: Config(BM, BN, 4, 1, descriptors=True, adds=True))
    check(triton, *qkv(2, 1, 97, 150, 64, dtype=torch.float16), steps=(HALF, ReplaceFill(causal(50), -INF)))
    # rows that see all keys after all, of marked tiles of queries
    keep = torch.rand(2, 1, 1, 150) < 0.7
    keep[0, ..., :90] = False
    steps = (HALF, AddFill(A.and_(causal(50), dense(0)), FLOAT_MIN))
    check(triton, *qkv(2, 1, 97, 150, 16), [keep], steps=steps)
    assert added == (FORWARD + ADDED) * 2
