"""The parts of an attention that were read -> a `Site`, or why they are none."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from attnfuse import reasons
from attnfuse.passes.graph.aten import dtype_of, value_of
from attnfuse.passes.graph.labels import UNKNOWN, Axes, Dim, Labels, hint, stride_hint
from attnfuse.passes.read.reader import Reader, Scores
from attnfuse.passes.simplify import simplify
from attnfuse.passes.site import Leaf, Refusal, Site
from attnfuse.spec import (
    Attention,
    Hidden,
    Operand,
    Step,
    dtype_name,
)


def build_site(
    reader: Reader,
    scores: Scores,
    v: Leaf,
    e_dim: Dim,
    final: fx.Node,
    out_labels: Labels,
    inside: set[fx.Node],
    weight_steps: list[Step],
    dropout: float,
    hidden: Hidden,
) -> Site | Refusal:
    """Put the parts together, in terms of unsplit atoms."""
    axes = reader.axes
    if not reader.whole():
        return Refusal(reasons.VIEW_SPLITS_ATTENTION(), final)
    q_dim, k_dim, d_dim, e_dim = map(axes.atoms, (scores.q_dim, reader.k_dim, scores.d_dim, e_dim))
    rows = set(q_dim + k_dim)
    batch = tuple(a for dim in axes.resolve(scores.labels) for a in dim if a not in rows)
    fixed = [replace(x, labels=axes.resolve(x.labels)) for x in (scores.q, scores.k, v, *reader.leaves)]
    problem = _misplaced(fixed, batch, q_dim, k_dim, d_dim, e_dim)
    if problem is not None:
        return problem
    names = batch_names(axes, batch, fixed[1])
    labels_out = axes.resolve(out_labels)
    if {a for dim in labels_out for a in dim} != set(batch) | set(q_dim) | set(e_dim):
        return Refusal(reasons.RESULT_DIMS(), final)

    def absent(leaf: Leaf) -> tuple[str, ...]:
        """The batch dims that a tensor does not have."""
        return tuple(n for a, n in zip(batch, names) if all(a not in d for d in leaf.labels))

    spec = Attention(
        batch=names,
        sizes=tuple(_static(d) for d in [*((a,) for a in batch), q_dim, k_dim, d_dim, e_dim]),
        qk_dtype=dtype_name(fixed[0].given),
        v_dtype=dtype_name(fixed[2].given),
        out_dtype=dtype_name(dtype_of(final)),
        steps=tuple(scores.steps),
        operands=tuple(describe_operand(leaf, batch, q_dim, k_dim, names) for leaf in fixed[3:]),
        weight_steps=tuple(weight_steps),
        softmax=reader.anchor.softmax,
        hidden=hidden,
        sink=reader.sink,
        dropout=dropout,
        broadcast=(absent(fixed[0]), absent(fixed[1]), absent(fixed[2])),
        out_order=out_order(final, labels_out, batch, q_dim, e_dim),
        nan_policy="eager" if reader.exact else "skip",
    )
    return Site(
        spec=simplify(spec),
        q=fixed[0],
        k=fixed[1],
        v=fixed[2],
        operands=tuple(fixed[3:]),
        batch=batch,
        q_dim=q_dim,
        k_dim=k_dim,
        d_dim=d_dim,
        e_dim=e_dim,
        anchor=reader.anchor.weights,
        final=final,
        out_labels=labels_out,
        inside=frozenset(inside),
        where=reader.view.where(reader.anchor.weights) or reader.view.where(final),
        kind="sdpa" if reader.anchor.kind == "sdpa" else "softmax",
        by_log_sum_exp=reader.anchor.by_log_sum_exp,
        by_own_maximum=reader.anchor.by_own_maximum and reader.anchor.softmax == "plain",
        hints={
            n: _hint_of(d)
            for n, d in zip([*names, "Q", "K", "D", "E"], [*((a,) for a in batch), q_dim, k_dim, d_dim, e_dim])
        },
    )


def _misplaced(leaves: list[Leaf], batch: Dim, q_dim: Dim, k_dim: Dim, d_dim: Dim, e_dim: Dim) -> Refusal | None:
    """Why q, k, v and the operands, in this order, do not have the dims that the op takes; None if they do."""
    # which of the dims of the attention each may have besides those of the batch
    own = [(*q_dim, *d_dim), (*k_dim, *d_dim), (*k_dim, *e_dim), *[(*q_dim, *k_dim)] * (len(leaves) - 3)]
    for place, (leaf, dims) in enumerate(zip(leaves, own, strict=True)):
        found = [a for dim in leaf.labels for a in dim]
        if place == 2 and set(found) & set(q_dim):
            return Refusal(reasons.ROWS_DIFFER(what="values", other="query"), leaf.node)
        if len(set(found)) != len(found) or not set(found) <= {*batch, *dims}:
            return Refusal(reasons.OPERAND_DIMS(), leaf.node)
    for leaf, other, what in zip(leaves, (k_dim, q_dim), ("queries", "keys")):
        if any(a in other for dim in leaf.labels for a in dim):
            return Refusal(reasons.ROWS_DIFFER(what=what, other="key" if what == "queries" else "query"), leaf.node)
    return None


def batch_names(axes: Axes, batch: Dim, k: Leaf) -> tuple[str, ...]:
    """Names for the batch dims: B and H, or B, Hkv and G where k is broadcast over the innermost."""
    present = {a for dim in axes.resolve(k.labels) for a in dim}
    count = len(batch)
    if count >= 2 and batch[-1] not in present and batch[-2] in present:
        tail = ["Hkv", "G"]
    elif count >= 1:
        tail = ["H"]
    else:
        tail = []
    lead = count - len(tail)
    if lead < 0:
        tail, lead = tail[-count:], 0
    return tuple(["B"] * min(lead, 1) + [f"B{i}" for i in range(1, lead)] + tail)


def describe_operand(leaf: Leaf, batch: Dim, q_dim: Dim, k_dim: Dim, names: tuple[str, ...]) -> Operand:
    """The spec's word for an operand."""
    present = {a for dim in leaf.labels for a in dim}
    dims = [n if a in present else "1" for a, n in zip(batch, names)]
    for own, default in ((leaf.row, q_dim), (leaf.column, k_dim)):
        dim = default if own is None else own
        known = {q_dim: "Q", k_dim: "K"}.get(dim, "T")
        dims.append(known if set(dim) & present else "1")
    return Operand(dtype_name(leaf.given), tuple(dims))


def out_order(final: fx.Node, labels: Labels, batch: Dim, q_dim: Dim, e_dim: Dim) -> tuple[int, ...]:
    """The order of the op's dims in memory that gives the result the strides it has in eager, as far as it can."""
    strides = value_of(final).stride()
    canonical = [*((a,) for a in batch), q_dim, e_dim]
    position = {dim[0]: i for i, dim in enumerate(canonical) if dim}
    dims = sorted(range(len(labels)), key=lambda i: -stride_hint(strides[i]))
    order = [position[a] for i in dims for a in labels[i]]
    missing = [i for i in range(len(canonical)) if i not in order]
    return tuple(missing + order)


def _static(dim: Dim) -> int | None:
    if not dim:
        return 1
    size = dim[0].size
    if isinstance(size, int):
        return size
    number = size.node.maybe_as_int()
    return None if number is None else int(number)


def _hint_of(dim: Dim) -> int | None:
    if not dim:
        return 1
    known = hint(dim[0])
    return None if known == UNKNOWN else known
