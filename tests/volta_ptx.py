"""The kernels for 7.0 and 7.5 as PTX, which newer GPUs run: made beforehand where NVRTC knows these, as theirs may not.

python tests/volta_ptx.py FOLDER writes one file for each text that the cases need.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from kernel_cases import GATES, STEPS, bounds_of, check, randn

from attnfuse.expr import causal, dense
from attnfuse.kernels import volta
from attnfuse.kernels.device import Device
from attnfuse.kernels.inputs import Bounds
from attnfuse.kernels.reference import kernel as reference
from attnfuse.kernels.volta import nvrtc, sources
from attnfuse.kernels.volta.call import Run
from attnfuse.spec import Bias, ReplaceFill, Scale

HALF = Scale(0.25)
Case = Callable[["Newer"], None]


class Newer:
    """A kernel module whose launches are those of a GPU of this compute capability, made by `run`."""

    def __init__(self, capability: int, run: Run) -> None:
        self.device, self.run = Device("cuda", capability, processors=4), run

    def forward(self, spec, inputs):
        return volta.forward(spec, inputs, self.device, self.run)

    def backward(self, spec, inputs, dout, out, stats, needs, dlse=None):
        return volta.backward(spec, inputs, dout, out, stats, needs, dlse, self.device, self.run)


def _drawn(*sizes: int, D: int = 64, E: int | None = None) -> list[torch.Tensor]:
    B, H, Q, K = sizes
    shapes = ((B, H, Q, D), (B, H, K, D), (B, H, K, E or D))
    return [randn(*shape, dtype=torch.float16) for shape in shapes]


def _causal(kernel: Newer) -> None:
    check(kernel, *_drawn(2, 2, 200, 300, D=128), steps=(HALF, ReplaceFill(causal(100), -math.inf)))


def _ragged(kernel: Newer) -> None:
    check(kernel, *_drawn(1, 2, 130, 77, D=40, E=72), steps=STEPS["softcap"])


def _wide(kernel: Newer) -> None:
    check(kernel, *_drawn(1, 1, 100, 130, D=256), steps=(HALF,))


def _hidden(kernel: Newer) -> None:
    keep = torch.rand(2, 1, 1, 150) < 0.7
    keep[0] = False
    check(kernel, *_drawn(2, 2, 90, 150), [keep], steps=(HALF, ReplaceFill(dense(0), -1e4)))


def _bias(kernel: Newer) -> None:
    q, k, v = _drawn(2, 2, 90, 150)
    operands = [randn(1, 2, 90, 150, dtype=torch.float16)]
    check(kernel, q, k, v, operands, steps=(HALF, Bias(0, keep=GATES["rest"])))


def _decoding(kernel: Newer) -> None:
    q, k, v = _drawn(1, 8, 1, 500)
    check(kernel, q, k[:, :1], v[:, :1], steps=(HALF,), backward=False)


def _packed(kernel: Newer) -> None:
    lengths = (70, 0, 130, 1)
    bounds = bounds_of(*lengths, gap=3)
    rows = int(bounds[1, -1])
    q, k, v = _drawn(1, 2, rows, rows)
    check(
        kernel, q, k, v, bounds=Bounds(bounds, bounds), layout="packed", steps=(HALF, ReplaceFill(causal(), -math.inf))
    )


def _dropped(kernel: Newer) -> None:
    check(kernel, *_drawn(1, 2, 130, 140), seed=torch.tensor([7]), dropout=0.3, steps=(HALF,))


CASES: dict[str, Case] = {
    "causal": _causal,
    "ragged": _ragged,
    "wide": _wide,
    "hidden": _hidden,
    "bias": _bias,
    "decoding": _decoding,
    "packed": _packed,
    "dropped": _dropped,
}


def name_of(text: str, capability: int) -> str:
    """The file of a text."""
    return f"{capability}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.ptx"


def made(text: str, capability: int) -> str:
    """PTX of a text. Raises BuildError without an NVRTC that knows the compute capability."""
    return nvrtc.ptx(sources.for_device(text), capability)


class _Recording(Newer):
    """Runs nothing: results are the reference's."""

    def forward(self, spec, inputs):
        super().forward(spec, inputs)
        return reference.forward(spec, inputs)

    def backward(self, spec, inputs, dout, out, stats, needs, dlse=None):
        super().backward(spec, inputs, dout, out, stats, needs, dlse)
        return reference.backward(spec, inputs, dout, out, stats, needs, dlse)


def texts(capability: int) -> list[str]:
    """Those that the cases need."""
    found: dict[str, None] = {}
    for case in CASES.values():
        case(_Recording(capability, lambda launch: found.setdefault(launch.text)))
    return list(found)


def write(folder: Path) -> None:
    """Write PTX of all cases."""
    folder.mkdir(parents=True, exist_ok=True)
    for capability in (70, 75):
        for text in texts(capability):
            (folder / name_of(text, capability)).write_text(made(text, capability))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
