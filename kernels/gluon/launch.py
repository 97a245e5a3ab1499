"""Launches of the forward kernels, and their tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from attnfuse.kernels.triton import codegen, descriptors, generated
from attnfuse.kernels.triton.call import HIDDEN, Call

#: Queries of a group: one product of four warps has 64 rows, and one of 10.0 has 128.
ROWS, TALL = 64, 128
#: The compute capability from which on there are those.
TALL_FROM = 100
_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


@dataclass(frozen=True)
class Tiles:
    """BN keys a tile, `stages` of them in memory, at least 2; groups of four warps, 2 or 3 of them, each with `rows` queries and
    with `registers` for a thread; in_turn: whether one issues its products after the other, None where another warp does."""

    BN: int
    groups: int
    stages: int
    registers: int
    in_turn: bool | None = True
    rows: int = ROWS

    def arguments(self) -> dict[str, int]:
        made = {
            "BM": self.rows,
            "BN": self.BN,
            "GROUPS": self.groups,
            "STAGES": self.stages,
            "REGISTERS": self.registers,
        }
        return made if self.in_turn is None else {**made, "IN_TURN": self.in_turn}


#: By head size. Three groups of 64 queries, with the 160 registers that are left for each, spill at head size 64.
TILES = {64: Tiles(128, 2, 2, 240), 128: Tiles(128, 2, 2, 240)}
#: The same for 10.0. Two tiles of scores and two of sums fill tensor memory at head size 128.
TALL_TILES = {64: Tiles(128, 2, 3, 240, None, TALL), 128: Tiles(128, 2, 2, 240, None, TALL)}


def described(x: torch.Tensor, rows: int, columns: int) -> tuple[Any, tuple[int, ...]]:
    """As descriptors.described, laid out for products of warp groups."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    found, steps = descriptors.described(x, rows, columns)
    layout = gl.NVMMASharedLayout.get_default_for(found.block_shape, getattr(gl, _DTYPES[x.dtype]))
    return TensorDescriptor(found.base, found.shape, found.strides, found.block_shape, layout), steps


def fits(call: Call, out: torch.Tensor) -> bool:
    """Whether the kernel takes these tensors, and they are more than what the Triton kernels split the keys of."""
    return call.decoding() is None and all(map(descriptors.fits, (call.q, call.k, call.v, out)))


def forward(call: Call, out: torch.Tensor, stats: torch.Tensor, tiles: Tiles | None = None) -> None:
    """Fill out and stats, as layout.allocate makes them, of a call that fits()."""
    tall = call.device.capability >= TALL_FROM
    if tall:
        from attnfuse.kernels.gluon import blackwell as written
    else:
        from attnfuse.kernels.gluon import hopper as written  # type: ignore[no-redef]

    tiles = (TALL_TILES if tall else TILES)[call.D] if tiles is None else tiles
    f, traits = generated.functions(call.spec, codegen.approximable(call.spec), call.far), call.traits
    matrices: dict[str, Any] = {}
    for name, x, rows in (
        ("q", call.q, tiles.rows),
        ("k", call.k, tiles.BN),
        ("v", call.v, tiles.BN),
        ("o", out, tiles.rows),
    ):
        matrices[name.upper()], matrices[f"{name}b"] = described(x, rows, call.D)
    shared = call.shared()
    call.launch(
        written.forward,
        -(-call.Q // (tiles.groups * tiles.rows)) * call.elements,
        {
            **matrices,
            "M": stats,
            **{name: shared[name] for name in ("ops", "sizes", "bst", "st", "n", "lines", "Qn", "Kn")},
            "D": call.D,
            **tiles.arguments(),
            "BASES": f.bases,
            "SCORE": f.score,
            "KEYS": f.keys,
            "LEFT": f.left,
            "LOWER": traits.lower,
            "WHOLE": traits.doubt > float("-inf"),
            **call.exponents(),
            "HIDDEN": HIDDEN[call.spec.hidden],
            "num_warps": 4,
        },
    )
