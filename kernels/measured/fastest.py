"""Which kernel was measured to be the fastest for an attention, kept in tuning.json (kernels/measured/records.py).

Only those who ask for measurements ask for what was measured: what is in the file never changes a kernel on its own.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from attnfuse.kernels.device import Device, tf32_allowed
from attnfuse.kernels.layout import batch_shape
from attnfuse.kernels.measured import records
from attnfuse.spec import Attention


@dataclass(frozen=True)
class Fastest:
    """kernel: the name of the fastest; ms: by name, milliseconds of it and of the others that ran with the right results."""

    kernel: str
    ms: dict[str, float]

    def fields(self) -> dict[str, Any]:
        return {"kernel": self.kernel, "ms": {name: round(ms, 5) for name, ms in self.ms.items()}}

    @staticmethod
    def of(given: Any) -> Fastest:
        """The entry with these fields. Raises ValueError for anything that cannot be one."""
        if not isinstance(given, dict) or not isinstance(given.get("ms"), dict):
            raise ValueError("an entry must be an object with the milliseconds of kernels")
        times = {name: records.milliseconds(ms) for name, ms in given["ms"].items()}
        kernel = given.get("kernel")
        if not isinstance(kernel, str) or kernel not in times or times[kernel] > min(times.values()):
            raise ValueError(f"the fastest of {times} is not {kernel!r}")
        return Fastest(kernel, times)


_table = records.Table("fastest", Fastest.of, "kernels are compared again")
entries, add, reset = _table.entries, _table.add, _table.reset


def key(
    spec: Attention, tensors: Sequence[torch.Tensor], needs: Sequence[bool], device: Device, names: Sequence[str]
) -> str | None:
    """What a comparison is kept under. tensors: (q, k, v, *operands); needs: of which of them there are gradients; names: of the
    kernels that were compared. None for a device without a name: nobody could tell it from another one."""
    name = _processor() if device.type == "cpu" else device.name
    if not name:
        return None
    q, k, v, *_ = tensors
    lengths = (q.shape[-2], k.shape[-2], math.prod(batch_shape([x.shape for x in tensors])))
    tf32 = " tf32" if spec.qk_dtype == "float32" and tf32_allowed() else ""
    return (
        f"{name}, {_software()}, {' or '.join(names)}, {records.digest(spec)}, {spec.qk_dtype}{tf32}, "
        f"gradients {''.join(str(int(need)) for need in needs)}, {records.sizes((q.shape[-1], v.shape[-1]), lengths)}"
    )


def _processor() -> str:
    """The name of the CPU and of how many threads it is used with; empty where the system does not tell."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return ""
    return f"{found[1]} with {torch.get_num_threads()} threads" if found else ""


@functools.lru_cache(maxsize=1)
def _software() -> str:
    """The versions of PyTorch and Triton, and a digest of the source of all kernels."""
    here = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for path in sorted(here.rglob("*")):
        if path.suffix in (".py", ".cpp", ".h"):
            digest.update(str(path.relative_to(here)).encode() + path.read_bytes())
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    return f"torch {torch.__version__}, triton {triton}, kernels {digest.hexdigest()[:8]}"
