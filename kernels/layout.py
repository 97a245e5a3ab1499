"""Where a spec's results lie in memory; works on real, fake and symbolically shaped tensors alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from attnfuse.spec import Attention, dtype_of


class Bounds(NamedTuple):
    """Where the rows of each sequence are in packed queries, and in packed keys and values; None for a side that is dense.

    int32 or int64 [2, sequences]: the first row, and the one after the last. Any numbers are safe: what lies outside of the
    tensor is cut off.
    """

    q: torch.Tensor | None = None
    k: torch.Tensor | None = None

    def clipped(self, rows: tuple[int, int]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Bounds that ascend from the first to the second number of a sequence and stay within (q, k) of so many rows."""
        found = []
        for bounds, total in zip(self, rows):
            if bounds is not None:
                start = bounds[0].clamp(0, total)
                bounds = torch.stack([start, torch.maximum(start, bounds[1].clamp(max=total))])
            found.append(bounds)
        return found[0], found[1]

    @property
    def sequences(self) -> int:
        """How many there are. Raises ValueError where neither side is packed."""
        for bounds in self:
            if bounds is not None:
                return bounds.shape[-1]
        raise ValueError("a dense layout has no sequences")


DENSE = Bounds()


def check_bounds(spec: Attention, bounds: Bounds) -> None:
    """Raises ValueError where the bounds are not those of the spec's layout. Their values are not looked at."""
    for side, packed, given in (("q", spec.packed_queries, bounds.q), ("k", spec.packed_keys, bounds.k)):
        if packed != (given is not None):
            raise ValueError(f"layout {spec.layout} with{'out' if packed else ''} bounds of {side}")
        if given is None:
            continue
        if given.dim() != 2 or given.shape[0] != 2 or given.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"bounds must be int32 or int64 [2, sequences]; got {given.dtype} {list(given.shape)}")
    if bounds.q is not None and bounds.k is not None and bounds.q.shape != bounds.k.shape:
        raise ValueError(f"{bounds.q.shape[1]} sequences of queries and {bounds.k.shape[1]} of keys")


def check_sequences(
    spec: Attention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: Sequence[torch.Tensor],
    bounds: Bounds,
) -> None:
    """Raises ValueError where a tensor of a packed layout is for another number of sequences than the bounds, if both are
    known."""
    if spec.layout == "dense":
        return
    sides = [(q, spec.packed_queries), (k, spec.packed_keys), (v, spec.packed_keys), *((o, False) for o in operands)]
    for x, packed in sides:
        if not (isinstance(x.shape[0], int) and isinstance(bounds.sequences, int)):
            continue
        if x.shape[0] != 1 and (packed or x.shape[0] != bounds.sequences):
            raise ValueError(f"a tensor {list(x.shape)} for {bounds.sequences} sequences")


def batch_shape(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """The broadcast of the batch dims (all but the last two) of tensors of one rank. Puts no guard on symbolic sizes.

    Where no tensor has a number other than 1, a symbolic size is taken for the full one.
    """
    rank = tensors[0].dim() - 2
    return tuple(_full([t.shape[d] for t in tensors]) for d in range(rank))


def spread(
    spec: Attention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: Sequence[torch.Tensor],
    bounds: Bounds = DENSE,
) -> tuple[int, ...]:
    """The batch dims that the scores have: those of all tensors broadcast, with the number of sequences in a packed layout."""
    found = batch_shape((q, k, v, *operands))
    return found if spec.layout == "dense" else (bounds.sequences, *found[1:])


def precision(spec: Attention) -> torch.dtype:
    """What scores and statistics are computed in: float32, or float64 where q, k or v are that."""
    return torch.float64 if "float64" in (spec.qk_dtype, spec.v_dtype) else torch.float32


def allocate(
    spec: Attention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: Sequence[torch.Tensor],
    bounds: Bounds = DENSE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised out [*batch, Q, E], of spec.out_dtype and in spec.out_order, and stats [2, *batch, Q] in `precision`.

    With packed queries they are [1, *rest, rows of q, ...]. Raises as check_sequences does.
    """
    check_sequences(spec, q, k, v, operands, bounds)
    batch = spread(spec, q, k, v, operands, bounds)
    if spec.packed_queries:
        batch = (1, *batch[1:])
    shape = (*batch, q.shape[-2], v.shape[-1])
    out = q.new_empty([shape[d] for d in spec.out_order], dtype=dtype_of(spec.out_dtype))
    inverse = [spec.out_order.index(d) for d in range(len(shape))]
    return out.permute(inverse), q.new_empty([2, *shape[:-1]], dtype=precision(spec))


def _full(sizes: Sequence[int]) -> int:
    symbolic: int | None = None
    for size in sizes:
        if not isinstance(size, int):
            symbolic = size if symbolic is None else symbolic
        elif size != 1:
            return size
    return 1 if symbolic is None else symbolic
