"""How long a kernel takes, for choosing between kernels and between configurations of one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

#: Of measuring, beside what compiling takes.
_SECONDS = 0.1
_LEAST, _MOST = 3, 100


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """The median time of run() on `device`, after a first call that is not counted.

    On a GPU, which must be the current one, it is that of the work launched, by events of the device, with caches cleared
    between; elsewhere that of the call.
    """
    if device.type != "cpu":
        from triton.testing import do_bench

        return float(do_bench(run, warmup=10, rep=1000 * _SECONDS, return_mode="median"))
    run()
    taken: list[float] = []
    while len(taken) < _LEAST or (sum(taken) < _SECONDS and len(taken) < _MOST):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return 1000.0 * statistics.median(taken)
