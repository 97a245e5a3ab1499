"""Compiles the kernels without a device for it, as kernels/triton/targets.py does those of Triton."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from attnfuse.kernels.device import Device
from attnfuse.kernels.gluon import gradients, launch
from attnfuse.kernels.gluon.launch import Tiles
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.layout import allocate
from attnfuse.kernels.triton.call import Call
from attnfuse.kernels.triton.targets import Compiled, compile_kernel
from attnfuse.spec import Attention

CAPABILITY = 90


def compiled(
    spec: Attention,
    inputs: Inputs,
    tiles: Tiles | None = None,
    backward: bool = False,
    capability: int = CAPABILITY,
) -> Compiled:
    """The forward kernel that these tensors would run, or the one for gradients of q, k and v. BM, BN and warps are those of all
    groups; tiles: of the forward kernel, in place of what ships.

    Raises what Triton raises where it cannot compile, OSError without its ptxas.
    """
    found: list[Compiled] = []

    def record(kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
        if not kernel.is_gluon():
            # that which prepares rows
            return
        made = compile_kernel(kernel, arguments, capability)
        # of the backward kernel, groups share out the keys
        groups = arguments.get("GROUPS", 0)
        found.append(replace(made, BM=made.BM * (groups or 1), warps=made.warps * (groups or gradients.GROUPS)))

    call = Call(spec, inputs, Device("cuda", capability), record)
    out, stats = allocate(spec, inputs)
    if backward:
        gradients.backward(call, torch.empty_like(out), out, stats, (True,) * 3)
    else:
        launch.forward(call, out, stats, tiles)
    return found[0]
