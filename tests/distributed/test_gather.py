"""Keys and values are gathered, or whole already, and one kernel call sees them."""

from __future__ import annotations

import pytest
import torch
from attentions import attention, oracle, over_ranks, worst
from processes import run

from attnfuse.distributed.layouts import LAYOUTS


def one_case(mask, layout, algorithm, length, dtype, kernel):
    whole = attention(mask, length, dtype=dtype)
    return worst(over_ranks(whole, layout, algorithm, kernel=kernel), oracle(whole))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("algorithm", ["gather", "local"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_devices_results_and_gradients(ranks, algorithm, layout):
    for length in (16, 13):
        for dtype, kernel, close in ((torch.float64, "reference", 1e-12), (torch.float32, "cpu", 1e-5)):
            errors = run(one_case, ranks, "causal", layout, algorithm, length, dtype, kernel)
            assert max(errors) < close, (length, kernel, errors)


def gradients_of_keys(algorithm):
    found = over_ranks(attention("causal", 13, dtype=torch.bfloat16), "zigzag", algorithm, kernel="cpu")
    return [x.tolist() for x in found.grads[1:3]]


def test_parts_of_ranks_are_added_up_before_they_are_rounded():
    """Whole keys are a gather's keys: each rank's part of their gradient is rounded once, after the sum."""
    local, gathered = (run(gradients_of_keys, 2, algorithm) for algorithm in ("local", "gather"))
    assert local[0] == local[1] == gathered[0]
