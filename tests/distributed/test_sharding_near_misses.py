"""What the sharding pass leaves whole, with its reason: the graph stays right."""

from __future__ import annotations

import pytest
from processes import run
from sharded import all_checked
from sharded_refusals import CASES


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_what_is_left_whole_says_why(name, ranks):
    found = run(all_checked, ranks, "sharded_refusals", [name], {"layout": "striped"}, timeout=60.0)
    assert found == [[]] * ranks
