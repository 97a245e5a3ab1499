"""The reference as a kernel, in float32 (float64 for float64 inputs): asked for by name, or taken when another one fails."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from attnfuse.kernels.layout import DENSE, Bounds, allocate
from attnfuse.kernels.reference import attend, log_sum_exp
from attnfuse.spec import Attention


def forward(
    spec: Attention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: Sequence[torch.Tensor],
    seed: torch.Tensor | None,
    bounds: Bounds = DENSE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [*batch, Q, E] in spec.out_dtype and stats float32 [2, *batch, Q]."""
    out, stats = allocate(spec, q, k, v, operands, bounds)
    with torch.no_grad():
        values, rows = attend(spec, q, k, v, operands, seed, _precision(spec), bounds)
    out.copy_(values)
    stats.copy_(rows)
    return out, stats


def backward(
    spec: Attention,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    operands: Sequence[torch.Tensor],
    seed: torch.Tensor | None,
    out: torch.Tensor,
    stats: torch.Tensor,
    needs: Sequence[bool],
    bounds: Bounds = DENSE,
    dlse: torch.Tensor | None = None,
) -> list[torch.Tensor | None]:
    """Gradients for those of (q, k, v, *operands) that `needs` names, in their shapes and dtypes.

    dlse [*batch, Q]: the gradient of the log-sum-exp, where that was used.
    """
    inputs = [q, k, v, *operands]
    # another thread has a stream of its own, which does not wait for this one's, and which no CUDA graph records
    stream = torch.cuda.current_stream(q.device) if q.is_cuda else None

    def differentiate() -> tuple[torch.Tensor | None, ...]:
        with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
            leaves = [x.detach().requires_grad_() if need else x.detach() for x, need in zip(inputs, needs)]
            values, lines = attend(spec, leaves[0], leaves[1], leaves[2], leaves[3:], seed, _precision(spec), bounds)
            wanted = [x for x, need in zip(leaves, needs) if need]
            pairs = [(values, dout)]
            if dlse is not None:
                pairs.append((log_sum_exp(lines), dlse))
            # without a key nothing depends on the inputs
            pairs = [(result, given) for result, given in pairs if result.requires_grad]
            if not pairs:
                return (None,) * len(wanted)
            results, given = zip(*((result, given.to(result.dtype)) for result, given in pairs))
            return torch.autograd.grad(results, wanted, given, allow_unused=True)

    # inside of an op autograd is off for its thread, whatever enable_grad says
    with ThreadPoolExecutor(1) as aside:
        found = aside.submit(differentiate).result()
    grads = iter(found)
    result: list[torch.Tensor | None] = []
    for x, need in zip(inputs, needs):
        grad = next(grads) if need else None
        result.append(None if not need else torch.zeros_like(x) if grad is None else torch.empty_like(x).copy_(grad))
    return result


def _precision(spec: Attention) -> torch.dtype:
    return torch.float64 if "float64" in (spec.qk_dtype, spec.v_dtype) else torch.float32
