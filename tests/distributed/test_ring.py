"""B1 and B2: ring attention and Burst are one device's, in results, statistics and gradients, and send what formulas say."""

from __future__ import annotations

import pytest
import torch
from attentions import attention, oracle, over_ranks, worst
from processes import run

from attnfuse.distributed.layouts import LAYOUTS


def cases(masks, layouts, algorithms, lengths, heads, dtype, kernel, **more):
    """The largest error of each case."""
    found = {}
    for mask in masks:
        for length in lengths:
            for h in heads:
                whole = attention(mask, length, dtype=dtype, heads=h, **more)
                expected = oracle(whole)
                for layout in layouts:
                    for algorithm in algorithms:
                        error = worst(over_ranks(whole, layout, algorithm, kernel=kernel), expected)
                        found[mask, length, h, layout, algorithm] = error
    return found


def check(found, close):
    for of_rank in found:
        assert {case: error for case, error in of_rank.items() if not error < close} == {}


MASKS = ("none", "causal", "window", "documents", "padding")


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_one_devices_results_and_gradients(ranks):
    check(run(cases, ranks, MASKS, LAYOUTS, ("ring", "burst"), (16, 29), ((2, 2),), torch.float64, "reference"), 1e-10)
    check(run(cases, ranks, MASKS, LAYOUTS, ("ring", "burst"), (40,), ((1, 3),), torch.float32, "cpu"), 1e-5)
