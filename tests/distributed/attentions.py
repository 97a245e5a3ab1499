"""Attentions for the tests over ranks: a spec, whole tensors, and what one device makes of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from attnfuse.distributed import layouts
from attnfuse.expr import Algebra, Const, Expr, K, Load, Q, causal, documents, window
from attnfuse.kernels import kernel_named
from attnfuse.kernels.inputs import Inputs
from attnfuse.spec import Attention, Operand, ReplaceFill, Scale, dtype_name, dtype_of


@dataclass
class Whole:
    """Tensors of whole length, with gradients to send back; needs: of which of (q, k, v, *operands) gradients are asked for."""

    spec: Attention
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    operands: list[torch.Tensor] = field(default_factory=list)
    dout: torch.Tensor | None = None
    dlse: torch.Tensor | None = None

    @property
    def queries(self) -> int:
        return self.q.shape[-2]

    @property
    def keys(self) -> int:
        return self.k.shape[-2]

    @property
    def needs(self) -> list[bool]:
        return [True, True, True, *(x.is_floating_point() for x in self.operands)]


@dataclass
class Results:
    out: torch.Tensor
    lse: torch.Tensor
    grads: list[torch.Tensor | None]


def mask_of(name: str, batch: int, length: int) -> tuple[list[Expr], list[torch.Tensor], list[Operand]]:
    """(what is kept, the operands it reads, theirs)."""
    a = Algebra(length, length)
    if name == "none":
        return [], [], []
    if name == "causal":
        return [causal()], [], []
    if name == "window":
        return [a.and_(causal(), window(max(length // 7, 2)))], [], []
    if name == "halves":
        # two documents that the graph knows, of 8 and 21 of 29 tokens
        of = [a.compare("lt", x, Const(length * 2 // 7)) for x in (Q, K)]
        return [a.and_(causal(), a.compare("eq", *of))], [], []
    if name == "documents":
        ids = (torch.arange(length) // max(length // 5, 1)).expand(batch, length)
        operands = [ids[:, None, None, :, None], ids[:, None, None, None, :]]
        dims = [("B", "1", "1", "Q", "1"), ("B", "1", "1", "1", "K")]
        return [a.and_(causal(), documents(0, 1))], operands, [Operand("int64", d) for d in dims]
    assert name == "padding"
    # on the left: the first rows of the last sequence see nothing
    pad = torch.ones(batch, length, dtype=torch.int64)
    pad[-1, : length // 4] = 0
    operand = Operand("int64", ("B", "1", "1", "1", "K"))
    return [a.and_(causal(), a.truth(Load(0, "int64")))], [pad[:, None, None, None, :]], [operand]


def attention(
    mask: str = "causal",
    length: int = 32,
    keys: int | None = None,
    dtype: torch.dtype = torch.float64,
    heads: tuple[int, int] = (2, 2),
    fill: float = -math.inf,
    batch: int = 2,
    size: int = 8,
    seed: int = 0,
    **more: object,
) -> Whole:
    """heads: of keys, and queries for each of them."""
    keys = length if keys is None else keys
    keep, operands, dims = mask_of(mask, batch, length)
    name = dtype_name(dtype)
    spec = Attention(
        ("B", "H", "G"),
        (batch, *heads, length, keys, size, size + 2),
        name,
        name,
        name,
        (Scale(0.3), *(ReplaceFill(k, fill) for k in keep)),
        tuple(dims),
        hidden="zero",
        broadcast=((), ("G",), ("G",)),
    )
    return filled(dataclasses.replace(spec, **more), operands, seed)


def filled(spec: Attention, operands: Sequence[torch.Tensor] = (), seed: int = 0) -> Whole:
    """Random tensors for a spec of which all sizes are known."""
    made = torch.Generator().manual_seed(seed)

    def drawn(*shape: int, dtype: str) -> torch.Tensor:
        return torch.randn(shape, generator=made, dtype=torch.float64).to(dtype_of(dtype))

    *batch, q, k, d, e = (n or 0 for n in spec.sizes)
    shapes = [tuple(1 if name in alone else n for name, n in zip(spec.batch, batch)) for alone in spec.broadcast]
    return Whole(
        spec,
        drawn(*shapes[0], q, d, dtype=spec.qk_dtype),
        drawn(*shapes[1], k, d, dtype=spec.qk_dtype),
        drawn(*shapes[2], k, e, dtype=spec.v_dtype),
        list(operands),
        drawn(*batch, q, e, dtype=spec.out_dtype),
        drawn(*batch, q, dtype="float64") if spec.lse else None,
    )


def oracle(whole: Whole) -> Results:
    """What the reference makes of the whole tensors in float64."""
    reference = kernel_named("reference").load()
    spec = in_float64(whole.spec)
    tensors = [x.double() if x.is_floating_point() else x for x in (whole.q, whole.k, whole.v, *whole.operands)]
    inputs = Inputs(tensors[0], tensors[1], tensors[2], tensors[3:])
    assert whole.dout is not None
    out, stats = reference.forward(spec, inputs)
    grads = reference.backward(spec, inputs, whole.dout.double(), out, stats, whole.needs, whole.dlse)
    return Results(out, _lse(stats), grads)


def in_float64(spec: Attention) -> Attention:
    """The spec of float64 tensors."""
    operands = tuple(
        dataclasses.replace(o, dtype="float64") if dtype_of(o.dtype).is_floating_point else o for o in spec.operands
    )
    return dataclasses.replace(spec, qk_dtype="float64", v_dtype="float64", out_dtype="float64", operands=operands)


def _lse(stats: torch.Tensor) -> torch.Tensor:
    top, total = stats
    return torch.where(top.isinf(), top, top + total.log())


def part(x: torch.Tensor, layout: str, rank: int, ranks: int, dim: int = -2, value: float = 0.7) -> torch.Tensor:
    """The rows of a rank of a whole tensor, with padding that is some number."""
    n = layouts.rows_of_rank(layout, ranks, x.shape[dim])
    index = layouts.tokens(layout, rank, ranks, n).to(x.device)
    own = x.index_select(dim, index[index < x.shape[dim]])
    shape = list(own.shape)
    shape[dim] = n - own.shape[dim]
    return torch.cat([own, own.new_full(shape, value)], dim)


def joined(own: torch.Tensor, layout: str, length: int, dim: int = -2) -> torch.Tensor:
    """The whole tensor of all ranks' rows."""
    found = [torch.empty_like(own.contiguous()) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own.contiguous())
    ranks, n = len(found), own.shape[dim]
    order = layouts.in_order(layout, ranks, n).to(own.device)
    return torch.cat(found, dim).index_select(dim, order[:length])


def over_ranks(
    whole: Whole,
    layout: str,
    algorithm: str,
    groups: Sequence[str] = (),
    kernel: str = "reference",
    site: str = "model.py:1",
    strict: bool = True,
) -> Results:
    """What this and the other ranks make of it, whole again; the same on each."""
    import attnfuse.distributed.ops as _  # noqa: F401

    groups = groups or [dist.group.WORLD.group_name]
    rank, ranks = dist.get_rank(), dist.get_world_size()
    local = algorithm == "local"
    q = part(whole.q, layout, rank, ranks).requires_grad_()
    k, v = ((x.clone() if local else part(x, layout, rank, ranks)).requires_grad_() for x in (whole.k, whole.v))
    operands = [x.clone().requires_grad_(x.is_floating_point()) for x in whole.operands]
    out, stats = torch.ops.attnfuse.sequence_attention(
        q,
        k,
        v,
        operands,
        None,
        whole.queries,
        whole.keys,
        whole.spec.argument,
        kernel,
        strict,
        layout,
        algorithm,
        list(groups),
        site,
    )
    assert whole.dout is not None
    results, given = [out], [part(whole.dout, layout, rank, ranks, value=0.0)]
    if whole.dlse is not None:
        from attnfuse.ops import log_sum_exp

        results.append(log_sum_exp(stats))
        given.append(part(whole.dlse, layout, rank, ranks, -1, 0.0).to(stats.dtype))
    leaves = [q, k, v, *(x for x in operands if x.requires_grad)]
    found = iter(torch.autograd.grad(results, leaves, given))
    dq, dk, dv = next(found), next(found), next(found)
    grads: list[torch.Tensor | None] = [joined(dq, layout, whole.queries)]
    for x in (dk, dv):
        grads.append(x if local else joined(x, layout, whole.keys))
    grads += [summed(next(found)) if x.requires_grad else None for x in operands]
    if not local:
        rows = layouts.real(layout, rank, ranks, whole.queries)
        last = out[..., rows - 1 : rows, :] if rows else torch.ones_like(out[..., :1, :])
        # bits, since a row may be NaN
        repeated = torch.equal(out[..., rows:, :].nan_to_num(7.0), last.expand_as(out[..., rows:, :]).nan_to_num(7.0))
        assert repeated, "padding of a result is its last row"
    lse = _lse(stats.detach())
    return Results(joined(out.detach(), layout, whole.queries), joined(lse, layout, whole.queries, -1), grads)


def summed(x: torch.Tensor) -> torch.Tensor:
    total = x.clone()
    dist.all_reduce(total)
    return total


def worst(found: Results, expected: Results, least: float = 1e-3) -> float:
    """The largest difference of results and gradients, each by its largest number, but by `least` where that is smaller (a
    gradient that cancels); infinite where one is NaN alone."""
    pairs = [(found.out, expected.out), (found.lse, expected.lse), *zip(found.grads, expected.grads)]
    most = 0.0
    for a, b in pairs:
        if a is None or b is None:
            assert a is b
            continue
        assert a.shape == b.shape, (a.shape, b.shape)
        a, b = a.double(), b.double()
        same = (a == b) | (a.isnan() & b.isnan())
        if not bool((a.isfinite() == b.isfinite())[~same].all()):
            return math.inf
        size = max(float(b[b.isfinite()].abs().amax()) if b.isfinite().any() else 0.0, 1e-30)
        difference = torch.where(same, 0.0, a - b).abs()
        if difference.numel():
            most = max(most, float(difference.amax()) / max(size, least))
    return most


def as_in_float64(whole: Whole) -> Whole:
    """The same in float64."""
    tensors = {
        name: None if x is None else x.double()
        for name, x in vars(whole).items()
        if name in ("q", "k", "v", "dout", "dlse")
    }
    operands = [x.double() if x.is_floating_point() else x for x in whole.operands]
    return dataclasses.replace(whole, **tensors, operands=operands, spec=in_float64(whole.spec))
