"""Triton's kernels in its interpreter, on the CPU: TRITON_INTERPRET must be set before Triton is imported."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.exit("these tests run with TRITON_INTERPRET=1 (make test does)", returncode=2)

import bfloat16

bfloat16.mend()


def pytest_configure(config: pytest.Config) -> None:
    # NumPy, which computes here, tells what a device does silently
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton")
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:numpy")
