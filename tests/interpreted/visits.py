"""Runs kernels in the interpreter and writes down what each program does: the tiles it computes, the bytes it asks for."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

from attnfuse.kernels import layout
from attnfuse.kernels.device import Device
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.triton import gradients, launch
from attnfuse.kernels.triton.call import Call
from attnfuse.spec import Attention


@dataclass
class Run:
    """What one kernel did.

    tiles          (outer program, query tile, key tile) -> how often its scores were computed; the outer program is the
                   batch element, or for backward_columns the element of k and v
    full           of these, those computed without comparing keys with bounds
    read, written  bytes at distinct addresses, added up over load and store instructions; atomic additions are written
    """

    programs: int
    tiles: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    full: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    read: int = 0
    written: int = 0


def run(
    spec: Attention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: Sequence[torch.Tensor] = (),
    seed: torch.Tensor | None = None,
    dout: torch.Tensor | None = None,
    device: Device = Device("cpu"),  # noqa: B008
    traffic: bool = False,
) -> dict[str, Run]:
    """Forward and backward, for every gradient there is; by kernel. device: whose tile sizes are taken; traffic: whether
    bytes are counted too, which takes time."""
    found: dict[str, Run] = {}

    def record(kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
        name = kernel.__name__
        if name in ("ascending", "listed"):
            # before the kernel whose list it is
            name = f"{name}/{len(found)}"
        found[name] = Run(programs)
        if "SCORE" in arguments:
            arguments = {**arguments, "SCORE": _counting(found[name], name, arguments)}
        with counted_bytes(found[name]) if traffic else contextlib.nullcontext():
            kernel[(programs,)](**arguments)

    inputs = Inputs(q, k, v, operands, seed)
    out, stats = layout.allocate(spec, inputs)
    launch.forward(Call(spec, inputs, device, record), out, stats)
    dout = torch.randn(out.shape).to(out.dtype) if dout is None else dout
    gradients.backward(
        Call(spec, inputs, device, record), dout, out, stats, [x.is_floating_point() for x in inputs.tensors]
    )
    return found


def _counting(into: Run, name: str, arguments: dict[str, Any]) -> Any:
    """The score function, which every tile that is computed calls once, with a count of its calls."""
    score, BM, BN = arguments["SCORE"], arguments["BM"], arguments["BN"]
    by_columns = name == "backward_columns"
    tiles = -(-arguments["Kn"] // BN) if by_columns else -(-arguments["Qn"] // BM)

    def counted(s: Any, q: Any, k: Any, full: Any, *context: Any) -> Any:
        outer = interpreter.interpreter_builder.grid_idx[0] // tiles
        tile = (outer, int(q.handle.data.min()) // BM, int(k.handle.data.min()) // BN)
        into.tiles[tile] += 1
        if full:
            into.full[tile] += 1
        return score(s, q, k, full, *context)

    return counted


@contextlib.contextmanager
def counted_bytes(into: Run) -> Iterator[None]:
    """Adds up the bytes that loads, stores and atomic operations name while it lasts."""
    builder = interpreter.InterpreterBuilder
    load, store, atomic = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw

    def bytes_of(pointers: Any, mask: Any) -> int:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        return np.unique(pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)]).size * size

    def create_masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        into.read += bytes_of(pointers, mask)
        return load(self, pointers, mask, *rest)

    def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        into.written += bytes_of(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def create_atomic_rmw(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        into.written += bytes_of(pointers, mask)
        return atomic(self, op, pointers, value, mask, *rest)

    names = {
        "create_masked_load": create_masked_load,
        "create_masked_store": create_masked_store,
        "create_atomic_rmw": create_atomic_rmw,
    }
    with contextlib.ExitStack() as undo:
        for name, counted in names.items():
            undo.callback(setattr, builder, name, getattr(builder, name))
            setattr(builder, name, counted)
        yield


def as_set(tiles: torch.Tensor) -> set[tuple[int, int, int]]:
    return {tuple(x) for x in tiles.nonzero().tolist()}
