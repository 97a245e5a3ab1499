"""Peak memory of one call, as the kernel of the operating system counts it for the whole process (Linux)."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
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


def peaks(peak: Callable[[Any, str], int], case: Any, names: Iterable[str]) -> dict[str, int]:
    """peak(case, name) for each name, in a fresh process each. `peak` is a function of a module."""
    spawn = multiprocessing.get_context("spawn")
    found = {}
    for name in names:
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            found[name] = pool.submit(peak, case, name).result()
    return found
