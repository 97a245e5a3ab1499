"""tests/device_cases.py on a device."""

from __future__ import annotations

import pytest
from device_cases import *  # noqa: F403

pytestmark = pytest.mark.gpu
