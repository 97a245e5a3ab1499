"""The op family of attention over the tokens of several ranks.

    sequence_attention(q, k, v, operands, seed, queries, keys, spec, kernel, strict, layout, algorithm, groups, site)
        -> (out, stats)
    sequence_attention_backward(dout, dlse, q, k, v, operands, seed, out, stats, queries, keys, spec, kernel, strict, layout,
        algorithm, groups, site, needs) -> the gradients needed
    tokens(like, n, layout, groups) -> int64 [n], the numbers of this rank's rows

q [*batch, n_q, D], k [*batch, n_k, D] and v [*batch, n_k, E] are this rank's rows of dims of `queries` and `keys` tokens: as many
as layouts.rows_of_rank says, the last of them padding where that does not divide. Padding may hold anything finite; in results it
is the last row that is none, or 1 on a rank that has no other. spec, operands, seed, kernel and strict are those of
attnfuse::attention for the whole tensors: operands are whole and equal on all ranks. So are k and v with the algorithm 'local'.
Gradients of operands are this rank's part; those of k and v with 'local' are of all ranks' queries, on every rank.
groups are names of process groups: one, or (outer, inner) of a double ring; site says in errors where a model has the attention.
stats and dlse are as in attnfuse.ops.

All raise ValueError for arguments that do not fit together, and RuntimeError, which names this rank, its peer, the site and the
step, where a transfer fails or takes longer than the groups' timeout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from attnfuse import ops
from attnfuse._compat import has_tangent
from attnfuse.distributed import gather, layouts, local, ring, steps, ulysses
from attnfuse.distributed.steps import Call
from attnfuse.distributed.transport import Hops, numbered
from attnfuse.kernels import kernel_named
from attnfuse.kernels.arguments import check_arguments, check_results
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.layout import allocate
from attnfuse.spec import Attention

_LIBRARY = torch.library.Library("attnfuse", "FRAGMENT")
_WHERE = (
    "SymInt queries, SymInt keys, str spec, str kernel, bool strict, str layout, str algorithm, str[] groups, str site"
)
#: Transfers are not recorded in CUDA graphs: nobody has tried that. Inductor cuts its graphs around such ops (torch has the tag).
_UNSAFE = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []
_LIBRARY.define(
    f"sequence_attention(Tensor q, Tensor k, Tensor v, Tensor[]? operands, Tensor? seed, {_WHERE}) -> (Tensor, Tensor)",
    tags=_UNSAFE,
)
_LIBRARY.define(
    "sequence_attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor[] operands, Tensor? seed, "
    f"Tensor out, Tensor stats, {_WHERE}, bool[] needs) -> Tensor[]",
    tags=_UNSAFE,
)
_LIBRARY.define("tokens(Tensor like, SymInt n, str layout, str[] groups) -> Tensor")


class Algorithm(Protocol):
    """Forward and backward over the ranks, as gather.py has them."""

    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., list[torch.Tensor | None]]


class _Local:
    @staticmethod
    def forward(call: Call, hops: Hops, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return local.forward(call, *tensors)

    @staticmethod
    def backward(call: Call, hops: Hops, *given: Any) -> list[torch.Tensor | None]:
        dq, dk, dv, *others = local.backward(call, *given, summed=call.ranks > 1)
        # a kernel may have rounded them, but what is added to them is not rounded again
        whole = [None if g is None else hops.sum(g.to(torch.promote_types(g.dtype, torch.float32))) for g in (dk, dv)]
        return [dq, *whole, *others]


#: How attention is computed over ranks, by name.
ALGORITHMS: dict[str, Any] = {
    "gather": gather,
    "local": _Local,
    "ring": ring.RING,
    "burst": ring.BURST,
    "ulysses": ulysses,
    "ulysses_ring": ulysses,
}
#: Called with the Hops of each forward or backward that has run here, and what it was.
observers: list[Callable[[str, Hops], None]] = []
#: Kinds of arguments that fit their spec.
_fitting: set[Any] = set()


def _begun(
    inputs: Inputs,
    lengths: tuple[int, int],
    spec: str,
    kernel: str,
    strict: bool,
    layout: str,
    algorithm: str,
    groups: Sequence[str],
    site: str,
) -> tuple[Call, Hops]:
    parsed = Attention.parse(spec)
    hops = Hops(groups, site, inputs.q.device)
    _check(parsed, inputs, lengths, layout, algorithm, hops.ranks)
    partial = kernel_named(kernel).capability.partial
    if not partial and algorithm not in steps.WHOLE_KEYS | {"ulysses"}:
        raise ValueError(f"attnfuse: kernel {kernel!r} has no gradients of a part of the keys, which {algorithm} needs")

    def run(which: str, step: Attention, inputs: Inputs, *given: Any) -> Any:
        return ops.run(which, kernel, strict, step, inputs, *given)

    place = (hops.rank, hops.ranks)
    return Call(parsed, layout, place, lengths, inputs.operands, run, partial, seed=inputs.seed), hops


def _check(
    spec: Attention, inputs: Inputs, lengths: tuple[int, int], layout: str, algorithm: str, ranks: int | None
) -> None:
    """Raises ValueError for arguments that are not those of the spec. ranks: None where that is not known."""
    if algorithm not in ALGORITHMS:
        raise ValueError(f"attnfuse: an algorithm is one of {', '.join(ALGORITHMS)}; got {algorithm!r}")
    if has_tangent(inputs.tensors):
        raise NotImplementedError("attnfuse::sequence_attention has no forward-mode derivative")
    layouts.check(layout)
    steps.check(spec)
    if spec.dropout and algorithm.startswith("ulysses"):
        raise ValueError(f"attnfuse: with {algorithm} no weights are dropped: kernels number heads from 0 on")
    kind = (spec.text, lengths, layout, algorithm, ranks, *((x.shape, x.dtype, x.device) for x in inputs.tensors))
    known = all(isinstance(n, int) for x in inputs.tensors for n in (*x.shape, *lengths))
    if known and kind in _fitting:
        return
    sides = (("q", inputs.q, lengths[0], True), ("k", inputs.k, lengths[1], algorithm != "local"))
    for name, x, length, own in sides:
        if ranks is None or not own:
            wanted = length if not own else None
        else:
            wanted = layouts.rows_of_rank(layout, ranks, length)
        rows = x.shape[-2]
        if isinstance(wanted, int) and isinstance(rows, int) and rows != wanted:
            of = f"{layout} over {ranks} ranks" if own else algorithm
            raise ValueError(f"attnfuse: {name} has {rows} rows where {length} tokens, {of}, give {wanted}")
    if isinstance(inputs.k.shape[-2], int) and inputs.k.shape[-2] != inputs.v.shape[-2]:
        raise ValueError(f"attnfuse: k has {inputs.k.shape[-2]} rows and v {inputs.v.shape[-2]}")
    # what the spec says of whole tensors
    whole = [
        x[..., :1, :].expand(*x.shape[:-2], length, x.shape[-1])
        if x.shape[-2] != 0
        else x.new_empty((*x.shape[:-2], 1, x.shape[-1])).expand(*x.shape[:-2], length, x.shape[-1])
        for x, length in zip((inputs.q, inputs.k, inputs.v), (lengths[0], lengths[1], lengths[1]))
    ]
    check_arguments(spec, Inputs(whole[0], whole[1], whole[2], inputs.operands, inputs.seed))
    if known:
        if len(_fitting) >= 4096:
            _fitting.clear()
        _fitting.add(kind)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: Sequence[torch.Tensor] | None,
    seed: torch.Tensor | None,
    queries: int,
    keys: int,
    spec: str,
    kernel: str,
    strict: bool,
    layout: str,
    algorithm: str,
    groups: Sequence[str],
    site: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What sequence_attention does."""
    inputs = Inputs(q, k, v, operands or (), seed)
    call, hops = _begun(inputs, (queries, keys), spec, kernel, strict, layout, algorithm, groups, site)
    found: tuple[torch.Tensor, torch.Tensor] = ALGORITHMS[algorithm].forward(call, hops, q, k, v)
    for observe in observers:
        observe("forward", hops)
    out = found[0]
    rows = call.rows[call.rank]
    if rows < out.shape[-2]:
        # what comes after may divide by a row, so that none of padding is 0
        out[..., rows:, :] = out[..., rows - 1 : rows, :] if rows else 1.0
    # strides as the fake says
    return local.laid_out(call.spec, out), found[1].contiguous()


def backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: Sequence[torch.Tensor],
    seed: torch.Tensor | None,
    out: torch.Tensor,
    stats: torch.Tensor,
    queries: int,
    keys: int,
    spec: str,
    kernel: str,
    strict: bool,
    layout: str,
    algorithm: str,
    groups: Sequence[str],
    site: str,
    needs: Sequence[bool],
) -> list[torch.Tensor]:
    """What sequence_attention_backward does."""
    inputs = Inputs(q, k, v, operands, seed)
    call, hops = _begun(inputs, (queries, keys), spec, kernel, strict, layout, algorithm, groups, site)
    check_results(out, stats, dout, dlse, needs, len(inputs.tensors))
    for i, (x, need) in enumerate(zip(operands, needs[3:])):
        if need and not x.is_floating_point():
            raise ValueError(f"attnfuse: operand {i} of dtype {x.dtype} has no gradient")
    grads = ALGORITHMS[algorithm].backward(call, hops, dout, dlse, q, k, v, out, stats, needs)
    for observe in observers:
        observe("backward", hops)
    found = []
    for x, grad, need in zip(inputs.tensors, grads, needs, strict=True):
        if need:
            # strides as the fake says
            found.append(torch.zeros_like(x) if grad is None else torch.empty_like(x).copy_(grad))
    return found


_LIBRARY.impl("sequence_attention", forward, "CompositeExplicitAutograd")
_LIBRARY.impl("sequence_attention_backward", backward, "CompositeExplicitAutograd")


@torch.library.register_fake("attnfuse::sequence_attention", lib=_LIBRARY)
def _(
    q: Any,
    k: Any,
    v: Any,
    operands: Any,
    seed: Any,
    queries: Any,
    keys: Any,
    spec: str,
    kernel: str,
    strict: bool,
    layout: str,
    algorithm: str,
    groups: Any,
    site: str,
) -> Any:
    parsed, inputs = Attention.parse(spec), Inputs(q, k, v, operands or (), seed)
    _check(parsed, inputs, (queries, keys), layout, algorithm, None)
    return allocate(parsed, inputs)


@torch.library.register_fake("attnfuse::sequence_attention_backward", lib=_LIBRARY)
def _(
    dout: Any,
    dlse: Any,
    q: Any,
    k: Any,
    v: Any,
    operands: Any,
    seed: Any,
    out: Any,
    stats: Any,
    queries: Any,
    keys: Any,
    spec: str,
    kernel: str,
    strict: bool,
    layout: str,
    algorithm: str,
    groups: Any,
    site: str,
    needs: Any,
) -> Any:
    return [torch.empty_like(x) for x, need in zip([q, k, v, *operands], needs) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    q, k, v, operands, seed, *where = inputs
    operands = operands or ()
    out, stats = output
    if not Attention.parse(where[2]).lse:
        ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.where, ctx.count, ctx.seeded = where, len(operands), seed is not None
    ctx.needs = [x.requires_grad for x in (q, k, v, *operands)]
    ctx.save_for_backward(q, k, v, *operands, *(() if seed is None else (seed,)), out, stats)


def _differentiate(ctx: Any, dout: torch.Tensor | None, dstats: torch.Tensor | None) -> tuple[Any, ...]:
    rest = [None] * (1 + len(ctx.where))
    if dout is None and dstats is None:
        return None, None, None, [None] * ctx.count, *rest
    q, k, v, *others, out, stats = ctx.saved_tensors
    operands, seed = others[: ctx.count], others[-1] if ctx.seeded else None
    dout = torch.zeros_like(out) if dout is None else dout
    dlse = None if dstats is None else dstats[0]
    made = torch.ops.attnfuse.sequence_attention_backward(
        dout, dlse, q, k, v, operands, seed, out, stats, *ctx.where, ctx.needs
    )
    grads = iter(made)
    found = [next(grads) if need else None for need in ctx.needs]
    return found[0], found[1], found[2], found[3:], *rest


torch.library.register_autograd(
    "attnfuse::sequence_attention", _differentiate, setup_context=_setup_context, lib=_LIBRARY
)


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise NotImplementedError("attnfuse::sequence_attention has no second derivative")


torch.library.register_autograd("attnfuse::sequence_attention_backward", _refuse, lib=_LIBRARY)


def _tokens(like: torch.Tensor, n: int, layout: str, groups: Sequence[str]) -> torch.Tensor:
    return layouts.tokens(layout, *numbered(groups), n, like.device)


_LIBRARY.impl("tokens", _tokens, "CompositeExplicitAutograd")


@torch.library.register_fake("attnfuse::tokens", lib=_LIBRARY)
def _(like: Any, n: Any, layout: str, groups: Any) -> Any:
    return like.new_empty((n,), dtype=torch.int64)
