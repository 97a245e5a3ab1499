"""What the sharding pass leaves whole, with its reason: the graph stays right."""

from __future__ import annotations

import pytest
from processes import run
from sharded import all_checked
from sharded_refusals import CASES


@pytest.mark.parametrize("name", CASES)
def test_what_is_left_whole_says_why(name):
    assert run(all_checked, 2, "sharded_refusals", [name], {}, timeout=30.0) == [[], []]
