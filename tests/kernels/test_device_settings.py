"""What the kernels ask of the device and of PyTorch's settings for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from attnfuse.kernels.device import tf32_allowed

MATMUL = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def settings_are_put_back() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    # as it was in the beginning, when the setting for all holds
    MATMUL.fp32_precision = "none"
    # raises where the older and the newer setting contradict each other
    assert MATMUL.allow_tf32 is False


def older() -> None:
    MATMUL.allow_tf32 = True


def newer() -> None:
    MATMUL.fp32_precision = "tf32"


def by_name() -> None:
    torch.set_float32_matmul_precision("high")


@pytest.mark.parametrize("allow", [older, newer, by_name])
def test_tf32_is_seen_however_it_was_allowed(allow: Callable[[], None]) -> None:
    assert not tf32_allowed()
    allow()
    assert tf32_allowed()


def test_float32_products_that_are_asked_for_are_not_tf32() -> None:
    MATMUL.fp32_precision = "ieee"
    assert not tf32_allowed()


def test_what_is_allowed_for_all_backends_is_seen() -> None:
    # other tests may have frozen the setting but for this way
    with torch.backends.flags(fp32_precision="tf32"):
        assert tf32_allowed()
    assert not tf32_allowed()
