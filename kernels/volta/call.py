"""Calls of the kernels: what is launched for one attention, and with what."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from attnfuse.kernels import gradients
from attnfuse.kernels.gradients import Keys, Sums
from attnfuse.kernels.sizes import Sizes
from attnfuse.kernels.volta import sources, tiles
from attnfuse.kernels.volta.problem import Problem, in_pieces

#: Queries for which there is one mark, whether one of them may see hidden keys.
_MARKED = 64
#: Rows that are decoded: more of them fill a tile of queries anyway.
_FEW = 64
#: No part of the keys is shorter than so many tiles.
_SHORTEST = 2


@dataclass(frozen=True)
class Launch:
    """text: of the kernels; kernel: the one that is meant; blocks of `threads` threads, with `shared` bytes; argument: a struct;
    tensors: those whose addresses are in it, and whether the kernel writes there."""

    text: str
    kernel: str
    blocks: int
    threads: int
    shared: int
    argument: ctypes.Structure
    tensors: Sequence[tuple[torch.Tensor, bool]]


#: What launches a kernel on the device of its tensors.
Run = Callable[[Launch], None]


def forward(sizes: Sizes, out: torch.Tensor, stats: torch.Tensor, run: Run) -> None:
    """Fill out and stats, as layout.allocate makes them. There is a query and a key."""
    capability, widths = sizes.device.capability, (sizes.D, sizes.E)
    pieces = in_pieces(sizes.q, sizes.k, sizes.v, out)
    group = 1 if sizes.packed_q else sizes.group()
    rows = group * sizes.Q
    heavy = bool(sizes.operands) or sizes.spec.dropout > 0.0 or sizes.spec.sink is not None
    made = tiles.forward(capability, *widths, rows, heavy)
    problem = _problem(sizes)
    problem.matrices(writes=True, o=out)
    problem.addresses(writes=True, stats=stats)
    blocks = sizes.elements // group * -(-rows // made.rows)
    parts = min(-(-sizes.waves // blocks), -(-sizes.K // (_SHORTEST * made.keys)))
    if sizes.packed_q or rows > _FEW or (parts <= 1 and group == 1):
        made = tiles.forward(capability, *widths, sizes.Q, heavy)
        problem.addresses(deal=_deal(sizes, sizes.bounds.q, sizes.Q, made.rows))
        text = sources.forward(sizes.spec, capability, widths, made, pieces, False, sizes.is_inside())
        run(_launch(problem, text, "forward", sizes.query_programs(made.rows), made.threads, made.shared))
        return
    parts = max(parts, 1)
    problem.numbers(group=group, parts=parts)
    problem.addresses(writes=True, partial=sizes.scratch(blocks * parts * made.kept * made.threads))
    text = sources.forward(sizes.spec, capability, widths, made, pieces, True, sizes.is_inside())
    run(_launch(problem, text, "part", blocks * parts, made.threads, made.shared))
    run(_launch(problem, text, "combined", blocks, made.threads, made.shared))


def backward(
    sizes: Sizes,
    dout: torch.Tensor,
    out: torch.Tensor,
    stats: torch.Tensor,
    needs: Sequence[bool],
    dlse: torch.Tensor | None,
    run: Run,
) -> list[torch.Tensor | None]:
    """Gradients of q, k, v and the operands where `needs` asks for them, each with its input's shape and dtype.

    dout [*batch, Q, E], out and stats as of forward, dlse [*batch, Q]. What has no gradient, gradients.check refuses before.
    """
    capability, widths = sizes.device.capability, (sizes.D, sizes.E)
    made = tiles.backward(capability, *widths)
    dout = gradients.cast(sizes, dout, torch.float16)
    sums = Sums(sizes, needs[3:])
    targets = (sizes.q, sizes.k, sizes.v)
    dq = gradients.target(sizes, sizes.q, (True,) * len(sizes.batch), sizes.packed_q)
    count = sizes.K // made.rows + sizes.sequences if sizes.packed_k else -(-sizes.K // made.rows)
    keys = Keys(sizes, count, -(-sizes.Q // made.queries))
    halves = [x for x in (*targets, out, dout, dq, keys.dk, keys.dv) if x.dtype == torch.float16]
    text = sources.backward(
        sizes.spec, capability, widths, made, in_pieces(*halves), sums.by_rows, sums.by_columns, sizes.is_inside()
    )
    stats = sizes.computed(torch.Tensor.contiguous, stats)
    problem = _problem(sizes)
    problem.matrices(o=out, g=dout)
    problem.gradients(sums.targets)
    # the sink's gradient reads the rows of no sequence too
    work = sizes.scratch(3, sizes.lines, zero=sizes.packed_q and sizes.spec.sink is not None)
    marked = sizes.query_programs(_MARKED)
    # one for each tile of queries; packed sequences leave gaps between theirs
    marks = marked + sizes.heads if sizes.packed_q else marked
    flags = sizes.scratch(marks + sizes.elements, dtype=torch.int32, zero=True)
    lse = None if dlse is None else gradients.spread_lines(dlse, stats.shape[1:])
    problem.addresses(stats=stats, lse=lse, deal=_deal(sizes, sizes.bounds.q, sizes.Q, _MARKED))
    problem.addresses(writes=True, work=work, flags=flags)
    problem.numbers(marks=marks)
    run(_launch(problem, text, "rows", marked, made.threads, 0))
    if needs[0] or sums.by_rows:
        problem.matrices(writes=True, dq=dq)
        problem.addresses(deal=_deal(sizes, sizes.bounds.q, sizes.Q, made.rows))
        blocks = sizes.query_programs(made.rows)
        run(_launch(problem, text, "along_queries", blocks, made.threads, made.shared(keys=False)))
    if needs[1] or needs[2] or sums.by_columns:
        outer_heads = keys.elements // sizes.sequences if sizes.packed_k else 1
        problem.matrices(writes=True, dk=keys.dk, dv=keys.dv)
        problem.dims(outer=keys.outer, inner=keys.inner, element=keys.element)
        problem.numbers(members=keys.members, outer_heads=outer_heads)
        problem.addresses(deal=_deal(sizes, sizes.bounds.k, sizes.K, made.rows))
        blocks = count * (outer_heads if sizes.packed_k else keys.elements)
        run(_launch(problem, text, "along_keys", blocks, made.threads, made.shared(keys=True)))
    grads: list[torch.Tensor | None] = [
        gradients.summed(sizes, x, g) if need else None for x, g, need in zip(targets, (dq, keys.dk, keys.dv), needs)
    ]
    grads += sums.results()
    gradients.add_sink(sizes, grads, work, stats.shape[1:])
    return grads


def _problem(sizes: Sizes) -> Problem:
    problem = Problem(sizes)
    problem.matrices(q=sizes.q, k=sizes.k, v=sizes.v)
    return problem


def _deal(sizes: Sizes, bounds: torch.Tensor | None, rows: int, size: int) -> torch.Tensor | None:
    return None if bounds is None else sizes.deal(bounds, rows, size)


def _launch(problem: Problem, text: str, kernel: str, blocks: int, threads: int, shared: int) -> Launch:
    # later launches change the struct
    argument = type(problem.struct).from_buffer_copy(problem.struct)
    return Launch(text, f"attention_{kernel}", blocks, threads, shared, argument, list(problem.tensors))
