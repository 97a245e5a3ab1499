"""The reference as a kernel, in float32 (float64 for float64 inputs): asked for by name, or taken when another one fails."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from attnfuse.kernels import reference, sink
from attnfuse.kernels.capability import FLOATS, LAYOUTS, NUMBERS, STEPS, WEIGHT_STEPS, Capability
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.layout import allocate, precision
from attnfuse.kernels.pages import no_pages
from attnfuse.kernels.reference import attend
from attnfuse.spec import Attention, ReplaceFill

CAPABILITY = Capability(
    frozenset({"cpu", "cuda", "npu", "xpu", "mps"}),
    FLOATS | {"float64"},
    NUMBERS | {"int16", "int8"},
    STEPS | {"ramp"},
    WEIGHT_STEPS,
    layouts=LAYOUTS | {"paged"},
    partial=True,
)

#: How far the weights of all keys of a row may be from 1 in sum.
_WHOLE = 1e-6


def forward(spec: Attention, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """out [*batch, Q, E] in spec.out_dtype and stats [2, *batch, Q], float32 or float64 as computed."""
    out, stats = allocate(spec, inputs)
    with torch.no_grad():
        values, rows = attend(spec, inputs, precision(spec))
    out.copy_(values)
    stats.copy_(rows)
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
    """Gradients for those of (q, k, v, *operands) that `needs` names, in their shapes and dtypes.

    out and stats are what a forward gave, this kernel's or another's: the weights are made of the row maxima and sums in stats,
    and delta, which the gradient of every weight is less by, is sum(out * dout). So the keys may be some of those that the
    rows have seen (a step of a ring): the gradients of all of them add up. Where weights are filled with another number than 0,
    out does not tell delta, and the keys must be all.
    dlse [*batch, Q]: the gradient of the log-sum-exp, where that was used. A paged layout has no gradients (ValueError).
    """
    no_pages(spec)
    delta = (dout.to(precision(spec)) * out.to(precision(spec))).sum(-1)
    return _backward(spec, inputs, dout, delta, stats, needs, dlse, False)


def backward_part(
    spec: Attention,
    inputs: Inputs,
    dout: torch.Tensor,
    delta: torch.Tensor,
    stats: torch.Tensor,
    needs: Sequence[bool],
) -> list[torch.Tensor | None]:
    """As backward where the keys are some of those that the rows have seen, by the rows' sum(out * dout), less the gradient of the
    log-sum-exp, in delta [*batch, Q]: gradients add up over the parts. They are float32 (float64) for narrower inputs too."""
    no_pages(spec)
    return _backward(spec, inputs, dout, delta.to(precision(spec)).clone(), stats, needs, None, True)


def _backward(
    spec: Attention,
    inputs: Inputs,
    dout: torch.Tensor,
    delta: torch.Tensor,
    stats: torch.Tensor,
    needs: Sequence[bool],
    dlse: torch.Tensor | None,
    part: bool,
) -> list[torch.Tensor | None]:
    """Of a part of the keys, or of what may be all; delta is written over."""
    compute = precision(spec)
    shift, inverse = sink.inverse_sums(spec, stats.to(compute))
    # another thread has a stream of its own, which does not wait for this one's, and which no CUDA graph records
    stream = torch.cuda.current_stream(inputs.q.device) if inputs.q.is_cuda else None

    def differentiate() -> list[torch.Tensor | None]:
        with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
            leaves = [x.detach() for x in inputs.tensors]
            if part:
                leaves = [x.to(torch.promote_types(x.dtype, torch.float32)) if n else x for x, n in zip(leaves, needs)]
            leaves = [x.requires_grad_() if need else x for x, need in zip(leaves, needs)]
            rows = (shift, inverse, delta, None if dlse is None else dlse.to(compute).expand(delta.shape))
            return _gradients(spec, inputs.with_tensors(leaves), dout.to(compute), rows, compute, part)

    # inside of an op autograd is off for its thread, whatever enable_grad says
    with ThreadPoolExecutor(1) as aside:
        found = iter(aside.submit(differentiate).result())
    result: list[torch.Tensor | None] = []
    for x, need in zip(inputs.tensors, needs):
        grad = next(found) if need else None
        dtype = torch.promote_types(x.dtype, torch.float32) if part and need else x.dtype
        empty = torch.zeros_like(x, dtype=dtype) if need else x
        result.append(None if not need else empty if grad is None else empty.copy_(grad))
    sink.add_gradient(spec, inputs.operands, result, shift, inverse, delta if dlse is None else delta - dlse)
    return result


def _gradients(
    spec: Attention,
    leaves: Inputs,
    dout: torch.Tensor,
    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None],
    compute: torch.dtype,
    part_only: bool,
) -> list[torch.Tensor | None]:
    """Gradients of those leaves that require them, without that of a sink. rows: shift, inverse, delta (in place replaced by the
    keys' own sum where they are all there, unless part_only), and the gradient of the log-sum-exp, all [*batch, Q]."""
    filled = any(isinstance(s, ReplaceFill) and s.value != 0.0 for s in spec.weight_steps)
    shift, inverse, delta, dlse = rows
    scores, weights, results, given = [], [], [], []
    held = list(reference.parts(spec, leaves))
    held = [part for part in held if part.inputs.k.shape[-2] > 0 and part.inputs.q.shape[-2] > 0]
    for part in held:
        s = reference.scores(spec, part.inputs, compute)
        less, factor = (part.of(x, -1).unsqueeze(-1) for x in (shift, inverse))
        p = torch.where(factor == 0.0, 0.0, torch.exp(s.detach() - less) * factor).requires_grad_()
        scores.append(s)
        weights.append(p)
        results.append(reference.weigh(spec, p, part.inputs, part.rows) @ part.inputs.v.to(compute))
        given.append(part.of(dout, -2))
    wanted = [x for x in leaves.tensors if x.requires_grad]
    if not held:
        return [None] * len(wanted)
    found = torch.autograd.grad(results, [*weights, *wanted], given, allow_unused=True)
    grads: list[torch.Tensor | None] = list(found[len(held) :])
    pairs = []
    for part, s, p, dp in zip(held, scores, weights, found):
        dp = torch.zeros_like(p) if dp is None else dp
        if not part_only:
            # with all keys at hand their own sum serves, in which a row of a single key cancels exactly
            whole = filled | ((p.detach().sum(-1) - 1.0).abs() <= _WHOLE)
            part.of(delta, -1).copy_(torch.where(whole, (p.detach() * dp).sum(-1), part.of(delta, -1)))
        less = part.of(delta if dlse is None else delta - dlse, -1).unsqueeze(-1)
        if s.requires_grad:
            pairs.append((s, p.detach() * (dp - less)))
    if pairs:
        others = torch.autograd.grad([s for s, _ in pairs], wanted, [ds for _, ds in pairs], allow_unused=True)
        grads = [b if a is None else a if b is None else a + b for a, b in zip(grads, others)]
    return grads
