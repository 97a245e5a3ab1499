"""What the device is, what it reaches, and whether one plain forward pass is right there.

python -m benchmarks.first.machine facts|ceilings|forward --device cuda [--smoke], as a worker of a pool.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
import time
from importlib import metadata
from typing import Any

import torch

from benchmarks.first.worker import Worker
from benchmarks.on_device.machine import machine
from benchmarks.timing import rounds_of, summary

Row = dict[str, Any]

#: Looked for where they are installed as well as on PATH.
TOOLS = ("compute-sanitizer", "ncu", "nvidia-smi")
_CUDA = "/usr/local/cuda/bin"
_MODULES = ("pytest", "triton", "transformers", "matplotlib", "numpy")
_SIDE, _COPIED = 8192, 2 << 30
#: Seconds of timed calls.
_BUDGET = 0.5


def tool(name: str) -> str | None:
    """The path of a tool of CUDA, None where there is none."""
    return shutil.which(name) or shutil.which(name, path=_CUDA)


def facts(device: str, smoke: bool) -> Row:
    """Names, versions and tools; `absent` where there is no device."""
    try:
        on = machine(device)
    except RuntimeError as error:
        return {"absent": str(error)}
    found = {name: _version(name) for name in _MODULES}
    return {
        **on.facts(),
        "torch": torch.__version__,
        "triton": found["triton"],
        "python": platform.python_version(),
        "slug": f"{on.slug}-smoke" if smoke else on.slug,
        "modules": found,
        "tools": {name: path for name in TOOLS if (path := tool(name)) is not None},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def ceiling(what: str, device: str, smoke: bool) -> Row:
    """matmul: TFLOP/s of a square product in bfloat16; copy: GB/s that a copy reads and writes."""
    on = machine(device)
    if what == "matmul":
        side = 64 if smoke else _SIDE
        a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=on.device) for _ in range(2))
        out = torch.empty_like(a)
        seconds = _median(on, lambda: torch.mm(a, b, out=out), smoke)
        return {"seconds": seconds, "tflops": 2 * side**3 / seconds / 1e12, "clocks": on.clocks()}
    size = 1 << 16 if smoke else _COPIED
    source = torch.ones(size, dtype=torch.uint8, device=on.device)
    target = torch.empty_like(source)
    seconds = _median(on, lambda: target.copy_(source), smoke)
    return {"seconds": seconds, "gbytes": 2 * size / seconds / 1e9}


def _median(on: Any, call: Any, smoke: bool) -> float:
    call()
    samples = rounds_of({"call": call}, 0.001 if smoke else _BUDGET, on.sample)["call"]
    return summary(samples, samples).seconds


def forward(worker: Worker, device: str, smoke: bool) -> Row:
    """One plain forward pass in the shipped configuration, against float64, step by step so that what stops it is known."""
    from benchmarks.first import variants

    started = time.monotonic()

    def say(text: str, **more: Any) -> None:
        worker.say(note={"step": text, "after": round(time.monotonic() - started, 2), **more})

    one = variants.plain(device, smoke)
    problem = variants.problem(one, device, variants.SHORT_SMOKE if smoke else variants.SHORT)
    say("inputs are made")
    launches = variants.Launches(ahead=lambda kernel: say("compiled", kernel=kernel))
    found = variants.forward(one, problem, launches)
    if problem.inputs.q.is_cuda:
        torch.cuda.synchronize()
    say("ran")
    errors = variants.errors(problem, {"out": found})
    wrong = variants.wrong(errors)
    return {"errors": errors, "kernels": launches.kernels, **({"failed": wrong} if wrong else {})}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first.machine")
    parser.add_argument("what", choices=("facts", "ceilings", "forward"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args(arguments)
    worker = Worker()
    if args.what == "facts":
        worker.say(items=["facts"])
        worker.each(["facts"], lambda _: facts(args.device, args.smoke))
    elif args.what == "ceilings":
        worker.say(items=["matmul", "copy"])
        worker.each(["matmul", "copy"], lambda item: ceiling(item, args.device, args.smoke))
    else:
        worker.say(items=["forward"])
        worker.each(["forward"], lambda _: forward(worker, args.device, args.smoke))
    return 0


if __name__ == "__main__":
    sys.exit(main())
