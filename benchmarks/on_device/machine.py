"""The device that figures are taken on: how its time and memory are measured, and what it is.

On a GPU a time is that between two CUDA events around a call, with the L2 cache overwritten before each. A call that the
host is slower to issue than the device to run has its waiting in it, unless it is replayed from a CUDA graph. On a CPU,
for trying out the benchmark, it is the clock's, and nothing is flushed.
"""

from __future__ import annotations

import gc
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import results
from benchmarks.memory import peak_of

Call = Callable[[], Any]


class Machine:
    """The CPU; CUDA's differs in what it overrides."""

    clock = "time.perf_counter, nothing flushed"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def name(self) -> str:
        return f"{platform.machine()} cpu"

    @property
    def slug(self) -> str:
        return results.slug(self.name)

    def facts(self) -> dict[str, Any]:
        """What figures depend on besides the code, as JSON values."""
        found = results.environment(torch.get_num_threads())
        return {**found, "host": found["device"], "device": self.name, "timed_by": self.clock}

    def sample(self, call: Call, repeats: int) -> float:
        """The mean seconds of `repeats` calls."""
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats

    def peak(self, call: Call) -> int:
        """Bytes above what was there before that one call takes at its highest."""
        return peak_of(call)

    def replayed(self, call: Call) -> Call:
        """The call as a CUDA graph that is replayed; here the call itself."""
        return call

    def clocks(self) -> dict[str, float]:
        """What the device runs at now: MHz, degrees Celsius, watts; empty where nothing tells."""
        return {}

    def tidy(self) -> None:
        """Give back the memory that nothing uses."""
        gc.collect()


class Cuda(Machine):
    """One NVIDIA GPU, or what else torch calls cuda."""

    clock = "CUDA events, the L2 cache overwritten before each call"

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        torch.cuda.set_device(device)
        self.properties = torch.cuda.get_device_properties(device)
        cache = int(getattr(self.properties, "L2_cache_size", 0)) or 64 << 20
        self.scratch = torch.empty(4 * cache, dtype=torch.int8, device=device)

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device)

    def facts(self) -> dict[str, Any]:
        properties = self.properties
        return {
            **super().facts(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda or torch.version.hip,
            "cudnn": torch.backends.cudnn.version(),
            "driver": self._asked("driver_version").get("driver_version"),
            "capability": f"{properties.major}.{properties.minor}",
            # of an AMD GPU
            "arch": str(getattr(properties, "gcnArchName", "")),
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2": int(getattr(properties, "L2_cache_size", 0)),
        }

    def sample(self, call: Call, repeats: int) -> float:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, stop in events:
            self.scratch.zero_()
            start.record()
            call()
            stop.record()
        torch.cuda.synchronize(self.device)
        return sum(start.elapsed_time(stop) for start, stop in events) / 1e3 / repeats

    def peak(self, call: Call) -> int:
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return max(torch.cuda.max_memory_allocated(self.device) - before, 0)

    def replayed(self, call: Call) -> Call:
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = call()

        def replay() -> Any:
            graph.replay()
            return found

        return replay

    def clocks(self) -> dict[str, float]:
        fields = {
            "sm_mhz": "clocks.sm",
            "memory_mhz": "clocks.mem",
            "celsius": "temperature.gpu",
            "watts": "power.draw",
        }
        told = self._asked(*fields.values())
        found = {}
        for name, field in fields.items():
            try:
                found[name] = float(told[field])
            except (KeyError, ValueError):
                # a field that this driver does not tell
                continue
        return found

    def tidy(self) -> None:
        super().tidy()
        torch.cuda.empty_cache()

    def _asked(self, *fields: str) -> dict[str, str]:
        """What nvidia-smi says of this GPU; empty without it."""
        if shutil.which("nvidia-smi") is None:
            return {}
        uuid = getattr(self.properties, "uuid", None)
        which = [f"--id=GPU-{str(uuid).removeprefix('GPU-')}"] if uuid is not None else []
        command = ["nvidia-smi", *which, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
        try:
            text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
        except (OSError, subprocess.SubprocessError):
            return {}
        first = next(iter(text.splitlines()), "")
        return dict(zip(fields, (part.strip() for part in first.split(","))))


def machine(name: str) -> Machine:
    """That of a torch device such as 'cuda' or 'cpu'. Raises RuntimeError where there is none."""
    device = torch.device(name)
    if device.type != "cuda":
        return Machine(device)
    if not torch.cuda.is_available():
        raise RuntimeError(
            "this benchmark needs a CUDA device, and this torch sees none (--device cpu --smoke tries it out)"
        )
    return Cuda(torch.device("cuda", device.index or 0))
