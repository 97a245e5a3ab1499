"""Small programs on two ranks, and on one, give what they give uncompiled: outputs, and gradients of inputs and parameters."""

from __future__ import annotations

import pytest
from processes import run
from sharded import all_checked
from sharded_cases import CASES, FAST


@pytest.mark.parametrize("part", FAST)
def test_programs_over_two_ranks(part):
    assert run(all_checked, 2, "sharded_cases", FAST[part], {"layout": "zigzag"}) == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [("contiguous", "ring"), ("striped", "burst"), ("zigzag", "gather")])
@pytest.mark.parametrize("name", CASES)
def test_every_program(name, parallel):
    layout, algorithm = parallel
    found = run(all_checked, 2, "sharded_cases", [name], {"layout": layout, "algorithm": algorithm})
    assert found == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_program_over_three_ranks(name):
    assert run(all_checked, 3, "sharded_cases", [name], {}) == [[], [], []]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["striped", "zigzag"])
@pytest.mark.parametrize("name", CASES)
def test_every_program_on_one_rank(name, layout):
    """The control: padding, edges and all, with nobody to talk to."""
    assert run(all_checked, 1, "sharded_cases", [name], {"layout": layout}) == [[]]
