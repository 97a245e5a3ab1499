"""Which algorithm and which layout: from spec, sizes, mesh and link speeds alone, so that all ranks choose alike.

Ring or Burst: the fewer bytes (traffic.py). Contiguous or zigzag: the less time by the model of account.py, and among layouts
within a hundredth of it the fewest tiles that ranks wait for. `gather` is for what no parts can be computed of. Ulysses and
striped layouts are never chosen, only asked for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from attnfuse import reasons
from attnfuse.distributed import traffic
from attnfuse.distributed.account import Account, Attended, Mesh
from attnfuse.distributed.heads import parts_of
from attnfuse.distributed.layouts import LAYOUTS
from attnfuse.distributed.links import Links, links_of
from attnfuse.distributed.merging import is_one_number
from attnfuse.distributed.traffic import Sizes
from attnfuse.distributed.work import Step
from attnfuse.reasons import ReasonError
from attnfuse.spec import Attention, dtype_of

#: Layouts that are chosen among, the simplest first.
_CHOSEN = ("contiguous", "zigzag")
#: Times closer than this are taken for equal.
_EQUAL = 1.01


@dataclass(frozen=True)
class Decision:
    """What an attention over several ranks does.

    heads                          ranks that share out the heads (Ulysses)
    reason                         for the report
    bytes_forward, bytes_backward  of the rank that sends most
    steps                          of forward, without empty ones at the end: tiles by rank
    account                        all that is known of it
    """

    layout: str
    algorithm: str
    heads: int
    reason: str
    bytes_forward: int
    bytes_backward: int
    steps: tuple[Step, ...]
    account: Account


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
        itemsize=dtype_of(spec.qk_dtype).itemsize,
        trains=trains,
        kv_heads=rows(1) // outer,
        out_itemsize=dtype_of(spec.out_dtype).itemsize,
    )


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
    mesh = _mesh(ranks, heads, algorithm, layout)
    names = dict.fromkeys([*([layout] if layout != "auto" else []), *_CHOSEN[: 1 + (mesh.rings > 1)]])
    made = _accounts(spec, sizes, mesh, links or links_of(device_type), _names(algorithm, mesh, partial), partial)
    found = {name: made(name) for name in names}
    chosen = layout
    if layout == "auto":
        chosen = _least({name: (sum(of[0].seconds), of[0].waits) for name, of in found.items()})
    best, *others = found[chosen]
    forward, backward = best.most
    reason = _reason(best, others, [of[0] for of in found.values()], mesh)
    return Decision(chosen, best.algorithm, mesh.parts, reason, forward.total, backward.total, best.steps, best)


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
    mesh = _mesh(ranks, heads, algorithm, "auto")
    costs = dict.fromkeys(_CHOSEN, (0.0, 0))
    for (spec, sizes), count in Counter(attentions).items():
        made = _accounts(spec, sizes, mesh, links or links_of(device_type), _names(algorithm, mesh, partial), partial)
        for layout, (time, waits) in costs.items():
            best = made(layout)[0]
            costs[layout] = time + count * sum(best.seconds), waits + count * best.waits
    return _least(costs)


def _accounts(
    spec: Attention, sizes: Sizes, mesh: Mesh, links: Links, names: Sequence[str], partial: bool
) -> Callable[[str], list[Account]]:
    """Of a layout: by each algorithm, that which sends least first, and of those the first."""
    copies, apart = _copies(spec, mesh.parts), not is_one_number(spec)

    def made(layout: str) -> list[Account]:
        attended = Attended(spec, sizes, mesh, layout, links, copies, apart, partial)
        return sorted(map(attended.account, names), key=lambda account: account.total)

    return made


def _least(costs: dict[str, tuple[float, int]]) -> str:
    """The layout of the least time; of those that are as good, the one that waits least; of those, the first."""
    limit = min(seconds for seconds, _ in costs.values()) * _EQUAL
    good = [layout for layout, (seconds, _) in costs.items() if seconds <= limit]
    return min(good, key=lambda layout: costs[layout][1])


def _mesh(ranks: tuple[int, ...], heads: int, algorithm: str, layout: str) -> Mesh:
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
        return Mesh(1 if len(ranks) == 1 else ranks[0], ranks[-1], 1)
    if len(ranks) == 2 and heads != ranks[1]:
        raise ValueError(
            f"attnfuse: on a mesh {ranks} heads are shared out within the inner dim: heads={ranks[1]}; got {heads}"
        )
    if algorithm == "ulysses" and heads != total:
        raise ValueError(f"attnfuse: 'ulysses' shares out heads among all {total} ranks; got heads={heads}")
    if layout == "striped" and heads != total:
        raise ValueError("attnfuse: ranks that share out heads hold no stripe together: layout 'striped' needs heads=1")
    return Mesh(1, total // heads, heads, apart=len(ranks) == 2)


def _copies(spec: Attention, ranks: int) -> int:
    """Ranks that need the same head of k and v. Raises ReasonError where heads cannot be dealt."""
    if ranks == 1:
        return 1
    parts = parts_of(spec, ranks)
    if parts is None:
        dims = ", ".join(f"{name} {'symbolic' if n is None else n}" for name, n in zip(spec.batch, spec.sizes))
        raise ReasonError(reasons.HEADS_NOT_SHARED_OUT(ranks=ranks, dims=dims or "none"))
    return math.prod(n for n, name in zip(parts.cuts, spec.batch) if name in spec.broadcast[1])


def _names(algorithm: str, mesh: Mesh, partial: bool) -> list[str]:
    """The algorithms to choose among."""
    if algorithm != "auto":
        return [algorithm]
    if mesh.parts > 1:
        return ["ulysses" if mesh.rings == 1 else "ulysses_ring"]
    return ["ring", "burst"] if partial else ["gather"]


def _reason(best: Account, others: Sequence[Account], layouts: Sequence[Account], mesh: Mesh) -> str:
    """'burst, zigzag: 3.1 MB a rank a layer, ring 4.2 MB; ranks wait for 520 tiles, contiguous for 904'."""
    said = f"{best.algorithm}, {best.layout}: {amount(best.total)} a rank a layer"
    said += "".join(f", {other.algorithm} {amount(other.total)}" for other in others)
    between = sum(sent.between for sent in best.most)
    if between:
        said += f" (of it {amount(between)} between nodes)"
    return f"{said}; {_work_said(best, layouts, mesh)}" if mesh.rings > 1 and best.steps else said


def _work_said(best: Account, layouts: Sequence[Account], mesh: Mesh) -> str:
    other = next((account for account in layouts if account.layout != best.layout), None)
    busy = sum(1 for step in best.steps for tiles in step.tiles if tiles)
    parts = []
    if len(best.steps) > 1 and busy < mesh.rings**2:
        parts.append(f"{busy} of {mesh.rings**2} steps have work")
    if other is not None and other.waits != best.waits:
        parts.append(f"ranks wait for {best.waits} tiles, {other.layout} for {other.waits}")
    elif len({sum(step.tiles[rank] for step in best.steps) for rank in range(mesh.rings)}) == 1:
        parts.append("work is even")
    else:
        parts.append(f"ranks wait for {best.waits} tiles")
    if other is not None and other.total > best.total:
        parts.append(f"{other.layout} sends {amount(other.total)}")
    return ", ".join(parts)


def amount(size: float) -> str:
    """'3.1 MB' for bytes."""
    if size < 1000:
        return f"{size:.0f} B"
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 1000:
            return f"{size:.1f} {unit}"
    return f"{size / 1000:.1f} TB"
