"""Compiling takes far longer than timing: the code of the next cases is compiled in processes side by side first.

What they compile stays in the caches on disk of Triton, Inductor and attnfuse, where the process that times finds it. A
process that fails or takes too long costs that time and nothing else: what it did not compile is compiled later.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
import warnings
from collections.abc import Iterator, Sequence

import torch

from benchmarks.on_device.cases import Case
from benchmarks.on_device.dense import SDPA
from benchmarks.on_device.machine import machine
from benchmarks.on_device.measure import problem
from benchmarks.on_device.problem import Compilers

_THREADS = "TORCHINDUCTOR_COMPILE_THREADS"
#: What is not compiled, or not by a compiler that takes long.
_SKIPPED = (*SDPA, "eager", "padded flash", "padded cudnn", "padded dense", "nested sdpa", "varlen_attn")


def warm(case: Case, device: str, share: float, smoke: bool) -> list[str]:
    """Call every compiled contender of a case once, with at most that share of the device's memory; those that failed."""
    on = machine(device)
    if on.device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(share, on.device)
    failed = []
    with warnings.catch_warnings(), torch.no_grad() if case.mode == "forward" else contextlib.nullcontext():
        warnings.simplefilter("ignore")
        for name, make in problem(case, on, Compilers(smoke)).contenders.items():
            if name in _SKIPPED:
                continue
            try:
                make().call()
            except Exception as error:
                # mostly out of its share of memory, after compiling; the process that times meets what is a result
                failed.append(f"{name}: {type(error).__name__}")
    return failed


def side_by_side(cases: Sequence[Case], device: str, jobs: int, until: float, smoke: bool) -> int:
    """Warm cases in `jobs` processes until all are done or time.monotonic() is `until`; how many were done."""
    spawn = multiprocessing.get_context("spawn")
    waiting, running, done = list(cases), [], 0
    with _single_threaded():
        while (waiting or running) and time.monotonic() < until:
            while waiting and len(running) < jobs:
                process = spawn.Process(target=warm, args=(waiting.pop(0), device, 0.8 / jobs, smoke), daemon=True)
                process.start()
                running.append(process)
            running[0].join(0.1)
            done += sum(process.exitcode == 0 for process in running)
            running = [process for process in running if process.exitcode is None]
    for process in running:
        process.terminate()
        process.join()
    return done


@contextlib.contextmanager
def _single_threaded() -> Iterator[None]:
    """Processes started in this block compile with a thread each."""
    before = os.environ.get(_THREADS)
    os.environ[_THREADS] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_THREADS]
        else:
            os.environ[_THREADS] = before
