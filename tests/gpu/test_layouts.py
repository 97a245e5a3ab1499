"""The cases of packed sequences, of block tables and of decoding in tests/interpreted, on a device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from interpreted import test_decode, test_packed, test_paged
from interpreted.test_decode import decoded, launched
from interpreted.test_packed import kernel

__all__ = ["decoded", "kernel", "launched"]

pytestmark = pytest.mark.gpu

for _module in (test_decode, test_packed, test_paged):
    for _name, _value in list(vars(_module).items()):
        if _name.startswith("test_"):
            assert _name not in globals() or _name == "test_ops_pass_opcheck", _name
            globals()[_name] = _value


@pytest.fixture(autouse=True)
def on_device(device: torch.device) -> Iterator[None]:
    with device:
        yield
