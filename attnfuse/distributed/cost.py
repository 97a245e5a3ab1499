"""Which algorithm and which layout: from spec, sizes, mesh and link speeds alone, so that all ranks choose alike.

Ring or Burst: the fewer bytes in backward (traffic.py). Contiguous or zigzag: the less time by the model below, and among layouts
within a hundredth of it the fewest tiles that a ring waits for. `gather` is for what no parts can be computed of; Ulysses and
layouts that are striped are never chosen, only asked for.

The model of time: a step takes as long as the most loaded rank computes, or as the transfer that runs meanwhile, whichever is
more; products at links.REACHED of the peak, backward two and a half times forward.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from attnfuse import reasons
from attnfuse.distributed import traffic, work
from attnfuse.distributed.heads import parts_of
from attnfuse.distributed.layouts import LAYOUTS
from attnfuse.distributed.links import REACHED, Links, links_of
from attnfuse.distributed.traffic import Sent, Sizes
from attnfuse.distributed.work import Step, Work
from attnfuse.reasons import ReasonError
from attnfuse.spec import AddFill, Attention, ReplaceFill

#: Layouts that are chosen among, the simplest first.
_CHOSEN = ("contiguous", "zigzag")
#: Times closer than this are taken for equal.
_EQUAL = 1.01
#: Products of backward for one of forward: q k', dout v', and the three gradients, for q k' and p v.
_BACKWARD = 2.5


@dataclass(frozen=True)
class Decision:
    """What an attention over several ranks does.

    heads                          ranks that share out the heads (Ulysses)
    reason                         for the report
    bytes_forward, bytes_backward  what one rank sends, at most: ranks at the end of a length that does not divide send less
    steps, back_steps              of a ring, forward and backward: tiles by rank
    forward, backward              the same bytes, by where they go
    tile                           rows of a tile
    seconds                        by the model of time, forward and backward
    """

    layout: str
    algorithm: str
    heads: int
    reason: str
    bytes_forward: int
    bytes_backward: int
    steps: tuple[Step, ...]
    back_steps: tuple[Step, ...]
    forward: Sent
    backward: Sent
    tile: int
    seconds: float

    @property
    def waits(self) -> int:
        """Tiles that a ring waits for, in forward."""
        return sum(step.waits for step in self.steps)


def sizes_of(
    spec: Attention,
    batch: Sequence[int | None] | None = None,
    queries: int | None = None,
    keys: int | None = None,
    trains: bool = True,
    heads_from: int = 1,
) -> Sizes:
    """The sizes of a spec. batch, queries, keys: hints for those that are symbolic; heads_from: the first batch dim of heads.

    Raises ValueError for a size that is neither known nor hinted at.
    """
    hints = (*(batch or (None,) * len(spec.batch)), queries, keys, None, None)
    if len(hints) != len(spec.sizes):
        raise ValueError(f"attnfuse: {len(spec.batch)} batch dims; got hints {list(batch or ())}")
    found = [hint if size is None else size for size, hint in zip(spec.sizes, hints)]
    names = (*spec.batch, "queries", "keys", "D", "E")
    missing = [name for name, size in zip(names, found) if size is None]
    if missing:
        raise ValueError(f"attnfuse: no size and no hint for {', '.join(missing)}")
    known = [size for size in found if size is not None]
    dims = known[: len(spec.batch)]
    heads_from = min(heads_from, max(len(dims) - 1, 0))

    def rows(side: int) -> int:
        return math.prod(n for n, name in zip(dims, spec.batch) if name not in spec.broadcast[side])

    outer = math.prod(
        n for n, name in zip(dims[:heads_from], spec.batch) if not any(name in side for side in spec.broadcast)
    )
    return Sizes(
        batch=outer,
        heads=rows(0) // outer,
        queries=known[-4],
        keys=known[-3],
        D=known[-2],
        E=known[-1],
        itemsize=_bytes(spec.qk_dtype),
        trains=trains,
        kv_heads=rows(1) // outer,
        out_itemsize=_bytes(spec.out_dtype),
    )


def _bytes(dtype: str) -> int:
    return {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}[dtype]


def sums_apart(spec: Attention) -> bool:
    """Whether the maximum and the sum of a row are sent, since a finite fill may swallow the logarithm of the sum."""
    return any(isinstance(s, (ReplaceFill, AddFill)) and s.value > -math.inf for s in spec.steps)


def choose(
    spec: Attention,
    sizes: Sizes,
    ranks: tuple[int, ...],
    device_type: str,
    layout: str = "auto",
    algorithm: str = "auto",
    heads: int = 1,
    *,
    partial: bool = True,
    links: Links | None = None,
) -> Decision:
    """What one attention does on a mesh of `ranks`, the outer dim first.

    layout, algorithm, heads: as the user asks; partial: whether a kernel computes parts (Capability.partial); links: instead of
    the defaults of the device type. Raises ReasonError where heads cannot be dealt so, ValueError for what is none of the names.
    """
    links = links or links_of(device_type)
    mesh = _mesh(ranks, heads, algorithm, layout)
    copies = _copies(spec, mesh.parts)
    layouts = [layout] if layout != "auto" else [x for x in _CHOSEN if x == "contiguous" or mesh.rings > 1]
    options = {x: _best(spec, sizes, mesh, copies, x, algorithm, partial, links) for x in layouts}
    chosen = _least({name: (options[name][0].seconds, options[name][0].waits) for name in layouts})
    best, others = options[chosen]
    return replace(best, reason=_reason(best, others, [options[x][0] for x in layouts], mesh, sizes))


def choose_layout(
    attentions: Sequence[tuple[Attention, Sizes]],
    ranks: tuple[int, ...],
    device_type: str,
    algorithm: str = "auto",
    heads: int = 1,
    *,
    partial: bool = True,
    links: Links | None = None,
) -> str:
    """The layout of a whole graph: that of the least time for all of its attentions together."""
    found = {}
    for layout in _CHOSEN:
        decisions = [
            choose(spec, sizes, ranks, device_type, layout, algorithm, heads, partial=partial, links=links)
            for spec, sizes in attentions
        ]
        found[layout] = (sum(d.seconds for d in decisions), sum(d.waits for d in decisions))
    return _least(found)


def _least(costs: dict[str, tuple[float, int]]) -> str:
    """The layout of the least time; of those that are as good, the one that waits least; of those, the first."""
    limit = min(seconds for seconds, _ in costs.values()) * _EQUAL
    good = [layout for layout, (seconds, _) in costs.items() if seconds <= limit]
    return min(good, key=lambda layout: costs[layout][1])


@dataclass(frozen=True)
class _Mesh:
    """nodes, local: of the ring. parts: ranks that share out the heads, of which there are `rings` groups."""

    nodes: int
    local: int
    parts: int

    @property
    def rings(self) -> int:
        return self.nodes * self.local

    @property
    def ranks(self) -> int:
        return self.rings * self.parts


def _mesh(ranks: tuple[int, ...], heads: int, algorithm: str, layout: str) -> _Mesh:
    if layout != "auto" and layout not in LAYOUTS:
        raise ValueError(f"attnfuse: a layout is 'auto' or one of {', '.join(LAYOUTS)}; got {layout!r}")
    if algorithm != "auto" and algorithm not in traffic.ALGORITHMS:
        raise ValueError(
            f"attnfuse: an algorithm is 'auto' or one of {', '.join(traffic.ALGORITHMS)}; got {algorithm!r}"
        )
    if len(ranks) not in (1, 2) or min(ranks) < 1:
        raise ValueError(f"attnfuse: a mesh has one or two dims of ranks; got {ranks}")
    total = math.prod(ranks)
    if algorithm == "ulysses" and heads == 1:
        heads = total
    if algorithm == "ulysses_ring" and heads == 1 and len(ranks) == 2:
        heads = ranks[1]
    if heads < 1 or total % heads:
        raise ValueError(f"attnfuse: heads={heads} does not divide the {total} ranks")
    if heads == 1:
        return _Mesh(1 if len(ranks) == 1 else ranks[0], ranks[-1], 1)
    if len(ranks) == 2 and heads != ranks[1]:
        raise ValueError(
            f"attnfuse: on a mesh {ranks} heads are shared out within the inner dim: heads={ranks[1]}; got {heads}"
        )
    if algorithm == "ulysses" and heads != total:
        raise ValueError(f"attnfuse: 'ulysses' shares out heads among all {total} ranks; got heads={heads}")
    if layout == "striped" and heads != total:
        raise ValueError("attnfuse: ranks that share out heads hold no stripe together: layout 'striped' needs heads=1")
    return _Mesh(1, total // heads, heads)


def _copies(spec: Attention, ranks: int) -> int:
    """Ranks that need the same head of k and v. Raises ReasonError where heads cannot be dealt."""
    if ranks == 1:
        return 1
    parts = parts_of(spec, ranks)
    if parts is None:
        dims = ", ".join(f"{name} {'symbolic' if n is None else n}" for name, n in zip(spec.batch, spec.sizes))
        raise ReasonError(reasons.HEADS_NOT_SHARED_OUT(ranks=ranks, dims=dims or "none"))
    return math.prod(n for n, name in zip(parts.cuts, spec.batch) if name in spec.broadcast[1])


def _best(
    spec: Attention, sizes: Sizes, mesh: _Mesh, copies: int, layout: str, algorithm: str, partial: bool, links: Links
) -> tuple[Decision, list[Decision]]:
    """(what is done in a layout, what else could be)."""
    if algorithm == "auto":
        names = ["ring", "burst"] if partial else ["gather"]
        if mesh.parts > 1:
            names = ["ulysses" if mesh.rings == 1 else "ulysses_ring"]
    else:
        names = [algorithm]
    found = [_decision(spec, sizes, mesh, copies, layout, name, links) for name in names]
    best = min(found, key=lambda d: d.bytes_forward + d.bytes_backward)
    return best, [d for d in found if d is not best]


def _decision(
    spec: Attention, sizes: Sizes, mesh: _Mesh, copies: int, layout: str, algorithm: str, links: Links
) -> Decision:
    ranks = mesh.ranks
    rows = traffic.rows_of(layout, ranks, sizes)
    done = work.work_of(work.masks_of(spec), layout, mesh.rings, sizes.queries, sizes.keys)
    apart, none = sums_apart(spec), Sent(0)
    tile_flops = 2.0 * done.size**2 * sizes.q_rows / mesh.parts * (sizes.D + sizes.E)
    per_tile = tile_flops / (links.flops * REACHED)
    if algorithm in ("gather", "local", "ulysses"):
        forward = backward = none
        if algorithm == "gather":
            forward, backward = traffic.gather(sizes, rows[1], mesh.nodes, mesh.local)
        elif algorithm == "ulysses":
            forward, backward = map(Sent, traffic.exchange(sizes, rows, mesh.parts, copies, spec.lse))
        busiest = max(done.of_ranks) * per_tile
        steps: tuple[Step, ...] = (Step(done.of_ranks),)
        seconds = _sent(forward, links) + busiest
        if sizes.trains:
            seconds += _sent(backward, links) + busiest * _BACKWARD
        else:
            backward = none
        return _made(layout, algorithm, mesh, forward, backward, steps, steps * sizes.trains, done, seconds)
    inner, outside, inside = sizes, rows, (0, 0)
    if mesh.parts > 1:
        inner = traffic.inner_sizes(sizes, mesh.parts, copies)
        outside = rows[0] * mesh.parts, rows[1] * mesh.parts
        inside = traffic.exchange(sizes, rows, mesh.parts, copies, spec.lse)
    steps = work.steps_of(done, functools.partial(_holder, mesh.nodes, mesh.local))
    forward, ahead = _ring(inner, outside, mesh, steps, "forward", apart)
    seconds = _ring_seconds(steps, per_tile, ahead, forward, mesh, links)
    backward = none
    back_steps: tuple[Step, ...] = ()
    if sizes.trains:
        ways = {"ring": ("keys",), "burst": ("burst",), "ulysses_ring": ("keys", "burst")}[algorithm]
        options = []
        for way in ways:
            there = work.steps_of(done, functools.partial(_holder, mesh.nodes, mesh.local), way == "burst")
            options.append((*_ring(inner, outside, mesh, there, way, apart), there))
        backward, ahead, back_steps = min(options, key=lambda option: option[0].total)
        seconds += _ring_seconds(back_steps, per_tile * _BACKWARD, ahead, backward, mesh, links)
    if mesh.parts > 1:
        # a ring between nodes where heads are shared out within them
        forward, backward = Sent(inside[0], forward.total), Sent(inside[1] * sizes.trains, backward.total)
        seconds += _sent(Sent(inside[0] + inside[1] * sizes.trains), links)
    return _made(layout, algorithm, mesh, forward, backward, steps, back_steps, done, seconds)


def _made(
    layout: str,
    algorithm: str,
    mesh: _Mesh,
    forward: Sent,
    backward: Sent,
    steps: tuple[Step, ...],
    back_steps: tuple[Step, ...],
    done: Work,
    seconds: float,
) -> Decision:
    return Decision(
        layout,
        algorithm,
        mesh.parts,
        "",
        forward.total,
        backward.total,
        steps,
        back_steps,
        forward,
        backward,
        done.size,
        seconds,
    )


def _holder(nodes: int, local: int, rank: int, step: int) -> int:
    """Whose tensors a rank holds at a step of a double ring of (nodes, local)."""
    node, place = divmod(rank, local)
    far, near = divmod(step, local)
    return (node - far) % nodes * local + (place - near) % local


def _ring(
    sizes: Sizes, rows: tuple[int, int], mesh: _Mesh, steps: tuple[Step, ...], way: str, apart: bool
) -> tuple[Sent, traffic.Hops]:
    hops = traffic.hops_of(mesh.nodes, mesh.local, len(steps) - 1)
    if way == "burst":
        return traffic.burst_backward(sizes, rows[0], hops, apart), hops
    return (traffic.ring_forward if way == "forward" else traffic.ring_backward)(sizes, rows[1], hops), hops


def _sent(sent: Sent, links: Links) -> float:
    """Seconds to send so much at once."""
    return (
        sent.within / links.within
        + sent.between / links.between
        + links.latency * bool(sent.within)
        + links.far_latency * bool(sent.between)
    )


def _ring_seconds(
    steps: tuple[Step, ...], per_tile: float, hops: traffic.Hops, sent: Sent, mesh: _Mesh, links: Links
) -> float:
    """A step lasts as long as its most loaded rank computes, or as its transfer; one between nodes, as a whole node's steps."""
    # a ring of one dim goes through the slowest link there is; one between groups that share out heads likewise
    far = mesh.nodes == 1 and mesh.ranks > links.node
    count, far_count = max(hops.within, 1), max(hops.between, 1)
    speed, latency = (links.between, links.far_latency) if far else (links.within, links.latency)
    near = (sent.within / count / speed + latency) * bool(hops.within)
    between = (sent.between / far_count / links.between + links.far_latency) * bool(hops.between)
    total = 0.0
    for first in range(0, len(steps), mesh.local):
        node = steps[first : first + mesh.local]
        there = sum(max(step.waits * per_tile, near * (i + 1 < len(node))) for i, step in enumerate(node))
        total += max(there, between * (first + mesh.local < len(steps)))
    return total


def _reason(best: Decision, others: list[Decision], layouts: list[Decision], mesh: _Mesh, sizes: Sizes) -> str:
    """'burst, zigzag: 3.1 MB a rank a layer, ring 4.2 MB; zigzag waits for 520 tiles, contiguous for 904'."""
    said = f"{best.algorithm}, {best.layout}: {amount(best.bytes_forward + best.bytes_backward)} a rank a layer"
    said += "".join(f", {d.algorithm} {amount(d.bytes_forward + d.bytes_backward)}" for d in others)
    if best.forward.between + best.backward.between:
        said += f" (of it {amount(best.forward.between + best.backward.between)} between nodes)"
    return f"{said}; {_work_said(best, layouts, mesh)}" if mesh.rings > 1 else said


def _work_said(best: Decision, layouts: list[Decision], mesh: _Mesh) -> str:
    other = next((d for d in layouts if d.layout != best.layout), None)
    computed = sum(1 for step in best.steps for tiles in step.tiles if tiles)
    parts = []
    if len(best.steps) > 1 and computed < mesh.rings**2:
        parts.append(f"{computed} of {mesh.rings**2} steps have work")
    if other is not None and (other.waits, len(other.steps)) != (best.waits, len(best.steps)):
        parts.append(f"ranks wait for {best.waits} tiles, {other.layout} for {other.waits}")
        if len(other.steps) != len(best.steps):
            parts[-1] += f", in {len(best.steps)} steps for {len(other.steps)}"
    elif len({sum(step.tiles[r] for step in best.steps) for r in range(mesh.rings)}) == 1:
        parts.append("work is even")
    else:
        parts.append(f"ranks wait for {best.waits} tiles")
    return ", ".join(parts)


def amount(size: float) -> str:
    """'3.1 MB' for bytes."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("the last unit returns")
