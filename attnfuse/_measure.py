"""Time and memory of calls, as the demo shows them."""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each call, made in turns, so that the machine's other work hits all of them alike."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def peak_of(call: Callable[[], Any]) -> int | None:
    """Bytes by which the resident memory of this process rose, at its highest, during `call()`.

    The operating system's high-water mark, set back before the call, counts what threads and compiled code take as well
    as torch's allocator. None where the system does not tell (anything but Linux).
    """
    status = Path("/proc/self/status")

    def resident(name: str) -> int:
        found = re.search(rf"^{name}:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
        if found is None:
            raise OSError(f"{status} has no {name}")
        return int(found[1]) * 1024

    try:
        gc.collect()
        # give free memory back, or the call would reuse it without a trace
        ctypes.CDLL(None).malloc_trim(0)
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        call()
        return max(resident("VmHWM") - before, 0)
    except (OSError, AttributeError):
        return None
