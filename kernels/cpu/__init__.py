"""Fused attention on the CPU: one C++ source that interprets a spec's steps on cache-sized score tiles.

Memory is linear in Q + K. Everything is computed in float32 whatever the inputs are.
Source: Dao 2023, arXiv:2307.08691 (tiling, recomputation);
Milakov and Gimelshein 2018, arXiv:1805.02867 (online softmax).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from attnfuse import reasons
from attnfuse.kernels import sink
from attnfuse.kernels.cache import BuildError
from attnfuse.kernels.capability import FLOATS, LAYOUTS, NUMBERS, STEPS, WEIGHT_STEPS, Capability, filled_weights
from attnfuse.kernels.cpu.build import available, load, warm_up
from attnfuse.kernels.cpu.plan import Plan, Reverse, plan_of, reverse_words
from attnfuse.kernels.inputs import DENSE, Bounds, Inputs
from attnfuse.kernels.layout import check_bounds
from attnfuse.kernels.pages import no_pages, out_of_range
from attnfuse.reasons import Reason
from attnfuse.spec import Attention

__all__ = ["CAPABILITY", "BuildError", "available", "backward", "backward_part", "forward", "warm_up"]

#: What the library returns where the table has a number that no block of k, or of v, has.
_CACHES = (-2, -3)


def _missing() -> Reason | None:
    missing = available()
    return None if missing is None else reasons.KERNEL_NOT_AVAILABLE(error=missing)


def _limits(spec: Attention) -> list[Reason]:
    # the sink's gradient is made of the result, which filled weights have a part in
    return [reasons.KERNEL_SINK_AND_FILLED_WEIGHTS()] if spec.sink is not None and filled_weights(spec) else []


CAPABILITY = Capability(
    frozenset({"cpu"}),
    FLOATS,
    NUMBERS,
    STEPS,
    WEIGHT_STEPS,
    layouts=LAYOUTS | {"paged"},
    partial=True,
    also=_limits,
    available=_missing,
)


def forward(spec: Attention, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """out [*batch, Q, E] of spec.out_dtype in spec.out_order; stats float32 [2, *batch, Q].

    q, k and v in float32, bfloat16 or float16. stats: the row maximum m and the row sum of exp(s - m). Raises
    BuildError if the kernels cannot be built, ValueError for tensors that do not fit the spec, IndexError for a block table with a
    number that no block has, MemoryError.
    """
    library = load()
    plan = plan_of(spec)
    q, k, v, operands, seed, _, pages = inputs
    tensors = inputs.tensors
    _on_cpu(*tensors)
    unhidden = plan.unhidden(operands)
    if unhidden is not None:
        return forward(unhidden, inputs)
    key: tuple[object, ...] = (q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype)
    for o in operands:
        key += (o.shape, o.stride(), o.dtype)
    at = _Packed.of(spec, inputs)
    key += at.key
    table = None
    if pages is not None:
        # the kernel goes through it row by row
        table = pages.table.to(torch.int64).contiguous()
        _on_cpu(table)
        key += (pages.keys, table.shape)
    words = plan.forward.get(key) or plan.lay_out(key, inputs, at.sequences, at.longest)
    out = torch.empty_strided(words.out_shape, words.out_stride, dtype=plan.out)
    stats = torch.empty(words.stats_shape, dtype=torch.float32)
    if spec.packed_queries:
        # the rows of no sequence
        out.zero_()
        sink.without_keys(spec, operands, stats)
    if words.empty:
        return out, stats
    pointers = words.pointers.pack(
        torch.get_num_threads(),
        _seed(spec, seed),
        stats.data_ptr(),
        *at.pointers,
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
        *[o.data_ptr() for o in operands],
        0 if table is None else table.data_ptr(),
    )
    failure = library.attnfuse_forward(plan.words, words.words, pointers)
    if failure in _CACHES and table is not None:
        raise out_of_range(table, (k, v)[_CACHES.index(failure)].shape[-3], spec.wraps)
    if failure:
        raise MemoryError("no memory for the tiles of an attention")
    return out, stats


def backward(
    spec: Attention,
    inputs: Inputs,
    dout: torch.Tensor,
    out: torch.Tensor,
    stats: torch.Tensor,
    needs: Sequence[bool],
    dlse: torch.Tensor | None = None,
) -> list[torch.Tensor | None]:
    """Gradients of q, k, v and the operands where `needs` asks for them, each with its input's shape and dtype.

    out and stats are what forward returned for the same inputs; dout has out's shape and any strides. dlse [*batch, Q]: the
    gradient of the log-sum-exp, where that was used. The same bits come out on every run with the same number of threads.
    Raises as forward does, and ValueError for a paged layout, which has none.
    """
    no_pages(spec)
    library = load()
    plan = plan_of(spec)
    threads = torch.get_num_threads()
    q, k, v, operands, seed, *_ = inputs
    tensors = inputs.tensors
    unhidden = plan.unhidden(operands)
    if unhidden is not None:
        return backward(unhidden, inputs, dout, out, stats, needs, dlse)
    if dout.dtype != plan.out:
        dout = dout.to(plan.out)
    _on_cpu(dout, out, stats, *tensors)
    _check_results(plan, dout, out, stats)
    stats = stats.contiguous()
    key: tuple[object, ...] = (threads, *needs, dout.stride(), out.stride(), out.shape)
    for x in tensors:
        key += (x.shape, x.stride(), x.dtype)
    at = _Packed.of(spec, inputs)
    key += at.key
    made = plan.backward.get(key)
    if made is None:
        tile = library.attnfuse_key_tile()
        made = plan.lay_out_reverse(key, inputs, tuple(out.shape), needs, threads, tile, at.sequences, at.longest)
    if dlse is not None:
        _on_cpu(dlse)
        dlse = dlse.to(torch.float32).expand(stats.shape[1:]).contiguous()
    if made.empty:
        zeros = [torch.zeros_like(x) if needed else None for x, needed in zip(tensors, needs, strict=True)]
        return _with_sink(spec, operands, zeros, dout, out, stats, dlse)
    sums = _sums(spec, made, tensors)
    pointers = made.pointers.pack(
        threads,
        _seed(spec, seed),
        stats.data_ptr(),
        *at.pointers,
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
        dout.data_ptr(),
        0 if dlse is None else dlse.data_ptr(),
        *[o.data_ptr() for o in operands],
        *[0 if s is None else s.data_ptr() for s in sums],
    )
    made.words = made.words or reverse_words(plan, made, tensors, out, dout, sums)
    if library.attnfuse_backward(plan.words, made.words, pointers):
        raise MemoryError("no memory for the tiles of an attention's gradient")
    for i, (x, target) in enumerate(zip(tensors, made.targets, strict=True)):
        total = sums[i]
        if total is not None and target.shape is not None:
            if target.thin:
                total = total.sum(0).sum_to_size(x.shape)
            sums[i] = torch.empty_like(x).copy_(total)
    return _with_sink(spec, operands, sums, dout, out, stats, dlse)


def backward_part(
    spec: Attention,
    inputs: Inputs,
    dout: torch.Tensor,
    delta: torch.Tensor,
    stats: torch.Tensor,
    needs: Sequence[bool],
) -> list[torch.Tensor | None]:
    """As backward where the keys are some of those that the rows have seen, by the rows' sum(out * dout), less the gradient of the
    log-sum-exp, in delta [*batch, Q]: gradients add up over the parts. Those of q, k and v are float32 for narrower inputs too."""
    # all is computed in float32 anyway; a gradient is stored in its input's dtype
    q, k, v, *operands = inputs.tensors
    inputs = inputs.with_tensors([q.float(), k.float(), v.float(), *operands])
    spec = replace(spec, qk_dtype="float32", v_dtype="float32", out_dtype="float32", lse=True)
    dout = dout.float()
    return backward(spec, inputs, dout, dout.new_zeros(()).expand(dout.shape), stats, needs, -delta)


def _check_results(plan: Plan, dout: torch.Tensor, out: torch.Tensor, stats: torch.Tensor) -> None:
    """Raises ValueError where these do not fit together, before C++ reads past the end of one."""
    lines = (2, *out.shape[:-1])
    if dout.shape != out.shape or out.dtype != plan.out or stats.shape != lines or stats.dtype != torch.float32:
        raise ValueError(
            f"dout {list(dout.shape)}, out {out.dtype} {list(out.shape)} and stats {stats.dtype} {list(stats.shape)} are not "
            f"those of one forward, which has {plan.out} and float32 {list(lines)}"
        )


def _sums(spec: Attention, made: Reverse, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """Where the gradient of each of the tensors (q, k, v, *operands) is stored or added up; None where it is not needed."""
    sums: list[torch.Tensor | None] = []
    for i, (x, target) in enumerate(zip(tensors, made.targets, strict=True)):
        if target.mode == 0:
            sums.append(None)
        elif target.thin:
            sums.append(torch.zeros((made.chunks, *(target.shape or ())), dtype=torch.float32))
        elif target.shape is not None:
            sums.append(torch.zeros(target.shape, dtype=torch.float32))
        else:
            # tiles that are skipped leave an operand's gradient as it was, and rows of no sequence every gradient
            written = target.mode == 1 and i < 3 and not spec.packed
            sums.append(torch.empty_like(x) if written else torch.zeros_like(x))
    return sums


def _on_cpu(*tensors: torch.Tensor) -> None:
    """Raises ValueError for a tensor whose address is not one of this process."""
    for x in tensors:
        if not x.is_cpu or x.layout is not torch.strided:
            raise ValueError(f"strided tensors of the CPU are needed; got {x.layout} on {x.device}")


class _Packed(NamedTuple):
    """What the kernels need to know of bounds: as they take them, how many sequences, and the most queries and keys of one."""

    bounds: Bounds = DENSE
    sequences: int = 0
    longest: tuple[int, int] | None = None

    @staticmethod
    def of(spec: Attention, inputs: Inputs) -> _Packed:
        bounds = inputs.bounds
        check_bounds(spec, bounds)
        if not spec.packed:
            return _DENSE
        _on_cpu(*(x for x in bounds if x is not None))
        longest = (inputs.q.shape[-2], inputs.k.shape[-2])
        sides = bounds.clipped(longest)
        inside = Bounds(*(None if x is None else x.to(torch.int64).contiguous() for x in sides))
        for x in inside:
            if x is not None and _overlap(x):
                raise ValueError("sequences that share rows: their results and gradients would be written over")
        if inputs.operands:
            longest = tuple(n if x is None else _longest(x) for x, n in zip(inside, longest))  # type: ignore[assignment]
        return _Packed(inside, bounds.sequences, longest)

    @property
    def key(self) -> tuple[object, ...]:
        return () if self.longest is None else (self.sequences, self.longest)

    @property
    def pointers(self) -> tuple[int, int]:
        q, k = (0 if x is None else x.data_ptr() for x in self.bounds)
        return q, k


_DENSE = _Packed()


def _overlap(bounds: torch.Tensor) -> bool:
    own = bounds[:, bounds[1] > bounds[0]]
    own = own[:, own[0].argsort()]
    return bool((own[0, 1:] < own[1, :-1]).any())


def _longest(bounds: torch.Tensor) -> int:
    return int((bounds[1] - bounds[0]).max()) if bounds.shape[1] else 0


def _with_sink(
    spec: Attention,
    operands: Sequence[torch.Tensor],
    grads: list[torch.Tensor | None],
    dout: torch.Tensor,
    out: torch.Tensor,
    stats: torch.Tensor,
    dlse: torch.Tensor | None,
) -> list[torch.Tensor | None]:
    if spec.sink is not None:
        delta = (dout.float() * out.float()).sum(-1)
        sink.add_gradient(
            spec, operands, grads, *sink.inverse_sums(spec, stats), delta if dlse is None else delta - dlse
        )
    return grads


def _seed(spec: Attention, seed: torch.Tensor | None) -> int:
    if seed is None:
        if spec.dropout > 0.0:
            raise ValueError("a spec with dropout needs a seed")
        return 0
    _on_cpu(seed)
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(f"the seed must be one int64; got {seed.dtype} {tuple(seed.shape)}")
    return seed.data_ptr()
