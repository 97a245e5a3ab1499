"""tests/descriptor_cases.py in Triton's interpreter, where loops are specialised in name alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from descriptor_cases import *  # noqa: F403

from attnfuse.kernels.triton.configs import Config


@pytest.mark.parametrize("stages", [1, 2])
def test_specialised_loops_and_descriptors_are_given_up_first(stages):
    made = Config(32, 64, 4, stages, descriptors=True, specialised=True)
    assert made.smaller() == replace(made, specialised=False)
    assert made.smaller().smaller() == Config(32, 64, 4, stages)
