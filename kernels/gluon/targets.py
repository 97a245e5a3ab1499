"""Compiles the kernel without a device for it, as kernels/triton/targets.py does those of Triton."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from attnfuse.kernels.device import Device
from attnfuse.kernels.gluon import launch
from attnfuse.kernels.gluon.launch import Tiles
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.layout import allocate
from attnfuse.kernels.triton.call import Call
from attnfuse.kernels.triton.targets import Compiled, compile_kernel
from attnfuse.spec import Attention

CAPABILITY = 90


def compiled(spec: Attention, inputs: Inputs, tiles: Tiles | None = None, capability: int = CAPABILITY) -> Compiled:
    """The forward kernel that these tensors would run. BM and warps are those of all groups; tiles: in place of what ships.

    Raises what Triton raises where it cannot compile, OSError without its ptxas.
    """
    found: list[Compiled] = []

    def record(kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
        made = compile_kernel(kernel, arguments, capability)
        found.append(replace(made, BM=made.BM * arguments["GROUPS"], warps=made.warps * arguments["GROUPS"]))

    call = Call(spec, inputs, Device("cuda", capability), record)
    launch.forward(call, *allocate(spec, inputs), tiles)
    return found[0]
