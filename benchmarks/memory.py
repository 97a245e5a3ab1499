"""Peak memory of one call, as the kernel of the operating system counts it for the whole process (Linux)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attnfuse import _measure


def peak_of(call: Callable[[], Any]) -> int:
    """Bytes by which resident memory rose, at its highest, above what it was before `call()`.

    The call should have been made before, so that code and lasting buffers are there. Raises OSError where the system
    does not tell.
    """
    peak = _measure.peak_of(call)
    if peak is None:
        raise OSError("this system does not tell a process's peak memory (Linux does)")
    return peak
