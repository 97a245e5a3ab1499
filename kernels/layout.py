"""Where a spec's results lie in memory; works on real, fake and symbolically shaped tensors alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attnfuse.kernels.inputs import Bounds, Inputs, wider
from attnfuse.spec import Attention, dtype_of


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


def check_sequences(spec: Attention, inputs: Inputs) -> None:
    """Raises ValueError where a tensor of a packed layout is for another number of sequences than the bounds, if both are
    known."""
    if not spec.packed:
        return
    sides = (spec.packed_queries, spec.packed_keys, spec.packed_keys, *[False] * len(inputs.operands))
    sequences = inputs.bounds.sequences
    for x, packed in zip(inputs.tensors, sides, strict=True):
        if not (isinstance(x.shape[0], int) and isinstance(sequences, int)):
            continue
        if x.shape[0] != 1 and (packed or x.shape[0] != sequences):
            raise ValueError(f"a tensor {list(x.shape)} for {sequences} sequences")


def batch_shape(shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The broadcast of the batch dims (all but the last two) of shapes of one rank. Puts no guard on symbolic sizes.

    Where no shape has a number other than 1, a symbolic size is taken for the full one.
    """
    return tuple(wider(*(shape[d] for shape in shapes)) for d in range(len(shapes[0]) - 2))


def spread(spec: Attention, inputs: Inputs) -> tuple[int, ...]:
    """The batch dims that the scores have: those of all tensors broadcast, with the number of sequences in a packed layout."""
    found = batch_shape(inputs.shapes)
    return found if not spec.packed else (inputs.bounds.sequences, *found[1:])


def precision(spec: Attention) -> torch.dtype:
    """What scores and statistics are computed in: float32, or float64 where q, k or v are that."""
    return torch.float64 if "float64" in (spec.qk_dtype, spec.v_dtype) else torch.float32


def allocate(spec: Attention, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised out [*batch, Q, E], of spec.out_dtype and in spec.out_order, and stats [2, *batch, Q] in `precision`.

    With packed queries they are [1, *rest, rows of q, ...]. Raises as check_sequences does.
    """
    check_sequences(spec, inputs)
    q, batch = inputs.q, spread(spec, inputs)
    if spec.packed_queries:
        batch = (1, *batch[1:])
    shape = (*batch, q.shape[-2], inputs.v.shape[-1])
    out = q.new_empty([shape[d] for d in spec.out_order], dtype=dtype_of(spec.out_dtype))
    inverse = [spec.out_order.index(d) for d in range(len(shape))]
    return out.permute(inverse), q.new_empty([2, *shape[:-1]], dtype=precision(spec))
