"""tests/descriptor_cases.py in Triton's interpreter, and loops that are specialised, which it runs as any other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from descriptor_cases import *  # noqa: F403
from kernel_cases import INF, check, qkv

from attnfuse.expr import causal
from attnfuse.kernels import triton
from attnfuse.kernels.triton.configs import Config
from attnfuse.spec import ReplaceFill, Scale


def test_specialised_loops_give_the_same(described, monkeypatch):
    table = triton._Call.table
    monkeypatch.setattr(triton._Call, "table", lambda call, which: replace(table(call, which), specialised=True))
    check(triton, *qkv(1, 2, 70, 90, 16, dtype=torch.float16), steps=(Scale(0.25), ReplaceFill(causal(), -INF)))


@pytest.mark.parametrize("stages", [1, 2])
def test_descriptors_and_specialised_loops_are_given_up_first(stages):
    made = Config(32, 64, 4, stages, descriptors=True, specialised=True)
    assert made.smaller() == replace(made, specialised=False)
    assert made.smaller().smaller() == Config(32, 64, 4, stages)
