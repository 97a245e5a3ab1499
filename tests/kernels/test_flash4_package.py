"""The package flash-attn-4 itself, where it is installed: it compiles what it is given, for devices that are not there.

    pip install flash-attn-4 && pytest tests/kernels/test_flash4_package.py -m 'slow or not slow'

Its host code runs on tensors without data, asserts included, and the kernels are compiled for the target. Nothing is launched.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from importlib import metadata

import library_doubles
import pytest

from attnfuse.kernels.library import flash4

try:
    metadata.version(flash4.PACKAGE)
except metadata.PackageNotFoundError:
    pytest.skip("flash-attn-4 is not installed", allow_module_level=True)

_CODE = """
import sys
import torch
from attnfuse._compat import FakeTensorMode
from attnfuse.expr import causal, window
from attnfuse.kernels.device import Device
from attnfuse.kernels.inputs import Bounds, Inputs
from attnfuse.kernels import FLASH4
from attnfuse.kernels.library import banded
from attnfuse.spec import Attention, Operand, ReplaceFill, Scale, Sink, Softcap

capability = int(sys.argv[1])
INF = float("inf")
CAUSAL = ReplaceFill(causal(), -INF)
BEHIND = ReplaceFill(causal(64), -INF)
CASES = {
    "plain": {},
    "causal": {"steps": (CAUSAL,)},
    "causal, to the last key": {"steps": (BEHIND,), "K": 320},
    "window": {"steps": (CAUSAL, ReplaceFill(window(100), -INF))},
    "window on both sides": {"steps": (ReplaceFill(causal(30), -INF), ReplaceFill(window(31), -INF))},
    "softcap": {"steps": (Softcap(30.0), CAUSAL)},
    "sinks": {"steps": (CAUSAL,), "sink": Sink(operand=0)},
    "grouped": {"groups": 2},
    "all": {"steps": (Softcap(30.0), CAUSAL), "sink": Sink(operand=0), "groups": 2},
    "packed": {"packed": True},
    "packed, all": {"packed": True, "steps": (Softcap(30.0), CAUSAL), "sink": Sink(operand=0), "groups": 2},
    "large heads": {"D": 256},
    "other values": {"D": 192, "E": 128},
}


def attend(steps=(), K=256, D=128, E=None, groups=0, sink=None, packed=False):
    E = E or D
    batch, own, shared = ("B", "H"), (2, 4), (2, 4)
    if groups:
        batch, own, shared = ("B", "H", "G"), (2, 2, groups), (2, 2, 1)
    if packed:
        own, shared = (1, *own[1:]), (1, *shared[1:])
    made = {"device": "cuda", "dtype": torch.bfloat16}
    make = lambda heads, rows, size: torch.empty(heads[0], rows, *heads[1:], size, **made).movedim(1, -2)
    q, k, v = make(own, 256, D), make(shared, K, D), make(shared, K, E)
    sinks = [torch.empty(1, *own[1:], 1, 1, **made)] if sink else []
    spec = Attention(
        batch,
        (None if packed else 2, *own[1:], *((None, None) if packed else (256, K)), D, E),
        *["bfloat16"] * 3,
        steps=(Scale(0.1), *steps),
        operands=tuple(Operand("bfloat16", ("1", *batch[1:], "1", "1")) for _ in sinks),
        sink=sink,
        broadcast=((), ("G",), ("G",)) if groups else ((), (), ()),
        layout="packed" if packed else "dense",
        out_order=(0, len(batch), *range(1, len(batch)), len(batch) + 1),
    )
    found = FLASH4.capability.reasons(spec, Device("cuda", capability))
    assert not found, found
    bounds = torch.empty(2, 3, dtype=torch.int64, device="cuda") if packed else None
    inputs = Inputs(q, k, v, sinks, bounds=Bounds(bounds, bounds))
    kernel = FLASH4.load()
    out, stats = kernel.forward(spec, inputs)
    # a sink's gradient asks nothing of the package
    needs = [True] * 3 + [False] * len(sinks)
    grads = kernel.backward(spec, inputs, torch.empty_like(out), out, stats, needs)
    assert [(g.shape, g.dtype) for g in grads[:3]] == [(x.shape, x.dtype) for x in (q, k, v)]
    assert out.shape == (*q.shape[:-1], E) and stats.shape == (2, *out.shape[:-1])


# how many blocks a device runs side by side, which the package asks the driver
class Hardware:
    def get_max_active_clusters(self, size):
        return 132 // size

    def get_device_multiprocessor_count(self):
        return 132


if not torch.cuda.is_available():
    import cutlass

    cutlass.utils.HardwareInfo = Hardware


# indexing a fake tensor of a GPU needs the GPU; what is made of bounds is not what is asked here
of = banded.Seams.of
banded.Seams.of = staticmethod(
    lambda bounds, rows: banded.Seams(*(
        torch.empty(shape, dtype=dtype, device=bounds.device)
        for shape, dtype in (((8,), torch.int32), ((rows,), torch.bool), ((), torch.bool))
    ))
)
Bounds.clipped = lambda self, rows: (self.q, self.k)
with FakeTensorMode():
    for name, case in CASES.items():
        attend(**case)
        print("compiled", name, flush=True)
"""


def test_the_recorded_signatures_are_those_of_the_package() -> None:
    kinds = ((library_doubles.FORWARD, flash4.FORWARD), (library_doubles.BACKWARD, flash4.BACKWARD))
    for function, (recorded, names) in zip(flash4.passes(), kinds, strict=True):
        found = inspect.signature(function).parameters
        in_order = [p.name for p in recorded.parameters.values() if p.default is library_doubles.NEEDED]
        assert list(found)[: len(in_order)] == in_order
        assert all(found[name].default == recorded.parameters[name].default for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [90, 100])
def test_what_it_is_given_compiles_for_devices_that_are_not_there(capability: int) -> None:
    target = f"sm_{capability}"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "FLASH_ATTENTION_ARCH": target,
        "CUTE_DSL_ARCH": f"{target}a",
        "FLASH_ATTENTION_NUM_SMS": "132",
    }
    done = subprocess.run(
        [sys.executable, "-c", _CODE, str(capability)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("compiled") == _CODE.count('": {'), done.stdout
