"""Whether the arguments of a call are those of its spec; checked before a kernel sees them.

Works on real, fake and symbolically shaped tensors: what is not known is not looked at, and no guard is put on a size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from attnfuse.kernels import dropout
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.layout import check_bounds, check_sequences
from attnfuse.kernels.pages import check_pages
from attnfuse.spec import Attention, dtype_name


def check_arguments(spec: Attention, inputs: Inputs) -> None:
    """Raises ValueError, naming the tensor, where an input has not the dtype, device, rank or size that the spec says.

    Values are not looked at.
    """
    q, k, v, operands, seed, bounds, *_ = inputs
    if len(operands) != len(spec.operands):
        raise ValueError(f"attnfuse: {len(operands)} operands for a spec with {len(spec.operands)}")
    named = [("q", q, spec.qk_dtype), ("k", k, spec.qk_dtype), ("v", v, spec.v_dtype)]
    named += [(f"operand {i}", x, spec.operands[i].dtype) for i, x in enumerate(operands)]
    for name, x, dtype in named:
        paged = spec.paged and name in ("k", "v")
        rank = len(spec.batch) + (3 if paged else 2)
        if x.dim() != rank:
            raise ValueError(f"attnfuse: {name} must have the {rank} dims of {_dims(spec, paged)}; got {_said(x)}")
        if dtype_name(x.dtype) != dtype:
            raise ValueError(f"attnfuse: {name} must be {dtype}; got {_said(x)}")
        if x.device != q.device:
            raise ValueError(f"attnfuse: {name} is on {x.device}, q on {q.device}")
    check_pages(spec, inputs)
    _check_features(spec, inputs)
    _check_batch(spec, inputs, [name for name, _, _ in named])
    _check_operands(spec, inputs)
    check_bounds(spec, bounds)
    check_sequences(spec, inputs)
    _check_seed(spec, seed, q.device)
    dropout.numbers_of(spec, inputs)


def check_results(
    out: torch.Tensor,
    stats: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    needs: Sequence[bool],
    inputs: int,
) -> None:
    """Raises ValueError where what backward is given of forward's results, of `inputs` tensors, does not fit together."""
    if _differ(dout.shape, out.shape):
        raise ValueError(f"attnfuse: the gradient {_said(dout)} is not that of a result {_said(out)}")
    if _differ(stats.shape, (2, *out.shape[:-1])):
        raise ValueError(f"attnfuse: statistics {_said(stats)} of a result {_said(out)}")
    if dlse is not None and any(n != 1 and _unequal(n, m) for n, m in zip(dlse.shape, out.shape[:-1], strict=True)):
        raise ValueError(f"attnfuse: the log-sum-exp's gradient {_said(dlse)} for a result {_said(out)}")
    if len(needs) != inputs:
        raise ValueError(f"attnfuse: needs must say of {inputs} inputs whether they need a gradient; got {len(needs)}")


def _check_features(spec: Attention, inputs: Inputs) -> None:
    q, k, v, *_ = inputs
    if _unequal(q.shape[-1], k.shape[-1]):
        raise ValueError(f"attnfuse: q {_said(q)} and k {_said(k)} must have one head size")
    if _unequal(k.shape[-2], v.shape[-2]):
        what = "block size" if spec.paged else "number of keys"
        raise ValueError(f"attnfuse: k {_said(k)} and v {_said(v)} must have one {what}")
    # the rows of a packed tensor are those of all sequences
    queries, keys = None if spec.packed_queries else spec.Q, None if spec.packed_keys or spec.paged else spec.K
    for name, x, dim, wanted in (
        ("q", q, -2, queries),
        ("k", k, -2, keys),
        ("q", q, -1, spec.D),
        ("v", v, -1, spec.E),
    ):
        if wanted is not None and _unequal(x.shape[dim], wanted):
            raise ValueError(f"attnfuse: dim {dim} of {name} {_said(x)} must be {wanted}")
    if spec.paged and spec.K is not None and _unequal(inputs.keys, spec.K):
        raise ValueError(f"attnfuse: {inputs.keys} keys in blocks where the spec has {spec.K}")


def _check_batch(spec: Attention, inputs: Inputs, names: Sequence[str]) -> None:
    shapes = inputs.shapes
    for d, dim in enumerate(spec.batch):
        if d == 0 and spec.packed:
            # that of the sequences: see check_sequences
            continue
        full = spec.sizes[d]
        for at, (name, x) in enumerate(zip(names, inputs.tensors, strict=True)):
            size = shapes[at][d]
            alone = dim in spec.broadcast[at] if at < 3 else spec.operands[at - 3].dims[d] == "1"
            if not isinstance(size, int) or size == 1:
                continue
            if alone or (full is not None and size != full):
                wanted = "1" if alone else f"1 or {full}"
                raise ValueError(f"attnfuse: dim {dim} of {name} {_said(x)} must be {wanted}")
            full = size


def _check_operands(spec: Attention, inputs: Inputs) -> None:
    tables = spec.tables
    for i, x in enumerate(inputs.operands):
        if i in tables:
            continue
        dims = spec.operands[i].dims[-2:]
        # an operand of a packed layout is as long as the longest sequence
        sizes = (None if spec.packed_queries else inputs.q.shape[-2], None if spec.packed_keys else inputs.keys)
        for at, (dim, full) in enumerate(zip(dims, sizes, strict=True)):
            size = x.shape[at - 2]
            if isinstance(size, int) and size != 1 and (dim == "1" or (full is not None and _unequal(size, full))):
                wanted = "1" if dim == "1" else f"1 or {full}"
                raise ValueError(f"attnfuse: dim {at - 2} of operand {i} {_said(x)} must be {wanted}")


def _check_seed(spec: Attention, seed: torch.Tensor | None, device: torch.device) -> None:
    if spec.dropout == 0.0:
        return
    if seed is None:
        raise ValueError("attnfuse: a spec with dropout needs a seed")
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
        raise ValueError(f"attnfuse: the seed must be one int64 on {device}; got {_said(seed)} on {seed.device}")


def _unequal(a: Any, b: Any) -> bool:
    return isinstance(a, int) and isinstance(b, int) and a != b


def _differ(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) != len(b) or any(map(_unequal, a, b))


def _dims(spec: Attention, paged: bool) -> str:
    return f"[{', '.join((*spec.batch, *(('blocks',) if paged else ()), 'rows', 'columns'))}]"


def _said(x: torch.Tensor) -> str:
    return f"{dtype_name(x.dtype)} {list(x.shape)}"
