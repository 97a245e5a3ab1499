"""tests/descriptor_cases.py on a device that has tensor descriptors."""

from __future__ import annotations

from collections.abc import Iterator

import descriptor_cases as shared
import pytest
import torch
from descriptor_cases import added, described

from attnfuse.kernels.device import Device

__all__ = ["added", "described"]

pytestmark = pytest.mark.gpu

#: Within the minutes that `make gpu-check` has.
_QUICK = (
    "test_head_sizes_by_descriptors",
    "test_broadcast_inputs_by_descriptors",
    "test_one_pass_of_backward_adds_up_the_gradients_of_queries",
    "test_few_queries_by_descriptors",
    "test_specialised_loops_give_the_same",
)

for _name, _value in list(vars(shared).items()):
    if _name.startswith("test_"):
        globals()[_name] = _value if _name in _QUICK else pytest.mark.slow(_value)


@pytest.fixture(autouse=True)
def on_device(device: torch.device) -> Iterator[None]:
    # what ROCm calls a capability is none
    if device.type == "cuda" and Device.of(device).capability < 90:
        pytest.skip("the device has no tensor descriptors")
    with device:
        yield
