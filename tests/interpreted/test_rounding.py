"""Sums that swallow a score, in the Triton kernels, interpreted."""

from __future__ import annotations

import pytest
from rounding_cases import *  # noqa: F403

from attnfuse.kernels import triton


@pytest.fixture
def kernel():
    return triton
