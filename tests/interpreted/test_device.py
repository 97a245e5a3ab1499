"""tests/device_cases.py in Triton's interpreter: what a GPU is tested with runs here first."""

from __future__ import annotations

from device_cases import *  # noqa: F403
