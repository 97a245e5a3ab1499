"""One rank on the CPU: what tests/gpu/test_sequence.py runs on a device."""

from __future__ import annotations

import one_rank
import pytest
import torch
from processes import run


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_every_algorithm_and_layout(dtype, close):
    (found,) = run(one_rank.errors, 1, "cpu", dtype, "cpu", (29,))
    assert len(found) == 5 * 3 * 6
    assert {case: error for case, error in found.items() if not error < close} == {}


@pytest.mark.parametrize("algorithm", one_rank.RECORDED)
def test_calls_give_the_same_for_the_same(algorithm):
    (found,) = run(one_rank.recorded, 1, "cpu", algorithm, "zigzag", "cpu")
    for apart, moved in found:
        assert apart == 0.0
        assert moved > 1e-3


@pytest.mark.parametrize(
    ("dtype", "inner"),
    [
        (torch.float32, "aot_eager"),
        pytest.param(torch.bfloat16, "inductor", marks=pytest.mark.slow),
        pytest.param(torch.float32, "inductor", marks=pytest.mark.slow),
    ],
)
def test_a_llama(dtype, inner):
    pytest.importorskip("transformers")
    (found,) = run(one_rank.llama, 1, "cpu", dtype, inner)
    *ratios, over = found
    assert over == 2
    assert max(ratios) < 2.0, ratios
