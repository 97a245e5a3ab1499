"""Peak memory of one call, as the kernel of the operating system counts it for the whole process (Linux).

The allocator's own counters would miss what a kernel takes by itself.
"""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")


def peak_of(call: Callable[[], Any]) -> int:
    """Bytes by which resident memory rose, at its highest, above what it was before `call()`.

    The call should have been made before, so that code and lasting buffers are there; what was freed since is given
    back first. Raises OSError where the system does not tell (anything but Linux).
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _kilobytes("VmRSS")
    # 5: set the high-water mark to what is resident now
    Path("/proc/self/clear_refs").write_text("5")
    result = call()
    peak = _kilobytes("VmHWM")
    del result
    return (peak - before) * 1024


def _kilobytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{_STATUS} has no {field}")
    return int(found[1])
