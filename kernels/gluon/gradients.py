"""Launches of the backward kernel, with what the Triton kernels have around theirs: rows are prepared as there, and gradients of
queries finished."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from attnfuse.kernels.gluon import launch
from attnfuse.kernels.gradients import summed
from attnfuse.kernels.triton import codegen, descriptors
from attnfuse.kernels.triton import gradients as shared
from attnfuse.kernels.triton.call import Call
from attnfuse.spec import Attention, Clamp, Scale, Softcap, Tanh

#: Groups of four warps, which share out the keys of a program.
GROUPS = 2
#: Queries of a tile and keys of a program; tiles of queries in memory; registers of a thread.
BM, BN, STAGES, REGISTERS = 64, GROUPS * launch.ROWS, 2, 240
#: By head size, the parts that K lies in.
PARTS = {64: 2, 128: 1}


def takes(spec: Attention, D: int) -> bool:
    """Whether the kernel needs fewer instructions for this spec than that of Triton, as compiled.

    Steps keep tiles of scores for their gradients, which have to be held beside the sums for k and v, or spill.
    """
    kept = [
        step
        for step in spec.steps
        if isinstance(step, (Softcap, Tanh, Clamp)) or (isinstance(step, Scale) and step.operand is not None)
    ]
    if D == 64 or not kept:
        return len(kept) <= 2
    # a clamp makes a mask besides, and where one number of a row does not tell its weights, there is a second one
    alone = isinstance(kept[0], Scale) or (not isinstance(kept[0], Clamp) and codegen.traits(spec).merged)
    return len(kept) == 1 and alone


def fits(call: Call, dout: torch.Tensor, needs: Sequence[bool]) -> bool:
    """Whether the kernel takes these tensors and makes these gradients: of queries, and of no operand, and not on 10.0."""
    if (
        call.device.capability >= launch.TALL_FROM
        or not needs[0]
        or any(needs[3:])
        or dout.dtype != call.q.dtype
        or not takes(call.spec, call.D)
    ):
        return False
    return shared.can_add(call) and all(map(descriptors.fits, (call.q, call.k, call.v, dout)))


def backward(
    call: Call,
    dout: torch.Tensor,
    out: torch.Tensor,
    stats: torch.Tensor,
    needs: Sequence[bool],
    dlse: torch.Tensor | None = None,
) -> list[torch.Tensor | None]:
    """As that of the Triton kernels, of a call that fits()."""
    from attnfuse.kernels.gluon import hopper_gradients

    prepared = shared.prepare(call, BM, dout, out, stats, dlse)
    dq = call.scratch(*call.batch, *call.q.shape[-2:], zero=True)
    matrices: dict[str, Any] = {}
    for name, x, rows, columns in (
        ("q", call.q, BM, call.D),
        ("k", call.k, launch.ROWS, call.D // PARTS[call.D]),
        ("v", call.v, launch.ROWS, call.D),
        ("g", dout, BM, call.D),
        ("dq", dq, BM, call.D // 2),
    ):
        matrices[name.upper()], matrices[f"{name}b"] = launch.described(x, rows, columns)
    tiles = -(-call.K // BN)
    keys, arguments = shared.of_keys(call, tiles, -(-call.Q // BM))
    common = shared.common(call, dout)
    call.launch(
        hopper_gradients.backward_columns,
        tiles * keys.elements,
        {
            **matrices,
            **prepared,
            **arguments,
            **{name: common[name] for name in ("ops", "sizes", "bst", "st", "n", "lines", "Qn", "Kn")},
            "D": call.D,
            "BM": BM,
            "BN": BN,
            "PARTS": PARTS[call.D],
            "STAGES": STAGES,
            "REGISTERS": REGISTERS,
            **{name: common[name] for name in ("OFFSET", "BASES", "SCORE", "SCORE_GRAD", "WEIGH", "WEIGH_GRAD")},
            "QUERIES": call.functions.queries,
            **{name: common[name] for name in ("HIDES", "MERGED", "FACTOR", "SLOPE", "ZEROS")},
            "num_warps": 4,
        },
    )
    made = (shared.scaled(call, dq), keys.dk, keys.dv)
    grads: list[torch.Tensor | None] = [
        summed(call, x, g) if need else None for x, g, need in zip((call.q, call.k, call.v), made, needs)
    ]
    return [*grads, *[None] * len(call.operands)]
