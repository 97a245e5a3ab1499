"""The oracle: what a spec means, in plain PyTorch and in any precision. No other kernel serves as an oracle.

It holds the whole [*batch, Q, K] score tensor and is slow; it is what the others are measured against, and what a failing
kernel falls back to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from attnfuse import expr, rounding
from attnfuse.kernels import dropout, statistics
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.layout import check_bounds, check_sequences
from attnfuse.kernels.pages import check_pages, gathered
from attnfuse.spec import (
    AddFill,
    Attention,
    Bias,
    Cast,
    Clamp,
    Ramp,
    ReplaceFill,
    Scale,
    Shift,
    Softcap,
    Step,
    Tanh,
    dtype_of,
)


def attend(spec: Attention, inputs: Inputs, compute: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """out [*batch, Q, E] and stats [2, *batch, Q] (row maximum, row sum of exp(s - maximum)), both in `compute`.

    A sink is one of the scores here. Differentiable in q, k, v and in floating operands; stats only through log_sum_exp, of
    a spec with lse. Fill values are taken as they are, however `compute` rounds; a
    `Cast` does what it does in kernels. Raises IndexError for a block table with a number that no block has.
    """
    check_bounds(spec, inputs.bounds)
    check_pages(spec, inputs)
    if spec.paged:
        inputs = gathered(spec, inputs)
    if not spec.packed:
        return _attend(spec, inputs, compute)
    check_sequences(spec, inputs)
    return _packed(spec, inputs, compute)


class Part(NamedTuple):
    """One sequence of a packed layout, or all of a dense one: views of the inputs, and where the rest is.

    rows: int64 [*batch, Q], the numbers that dropout draws by, or None where they are counted from 0 on. sequence, span:
    which element of the first dim, or which rows, of the results are its own; None for all.
    """

    inputs: Inputs
    rows: torch.Tensor | None = None
    sequence: int | None = None
    span: tuple[int, int] | None = None

    def of(self, lines: torch.Tensor, dim: int) -> torch.Tensor:
        """What belongs to it of a tensor whose batch begins at dim 0 and whose queries are dim `dim`."""
        if self.sequence is not None:
            return lines[self.sequence : self.sequence + 1]
        return lines if self.span is None else lines.narrow(dim, self.span[0], self.span[1] - self.span[0])


def parts(spec: Attention, inputs: Inputs) -> Iterator[Part]:
    """The attentions that a layout holds, which are computed one after the other."""
    if not spec.packed:
        yield Part(inputs)
        return
    # which it has none of
    dropout.numbers_of(spec, inputs)
    q, k, v, operands, seed, bounds, *_ = inputs
    rest = torch.broadcast_shapes(*(x.shape[1:-2] for x in inputs.tensors))
    heads, total = math.prod(rest), q.shape[-2]
    q_ends, k_ends = (None if b is None else b.T.tolist() for b in bounds.clipped((total, k.shape[-2])))
    for s in range(bounds.sequences):
        q0, q1 = (0, total) if q_ends is None else q_ends[s]
        k0, k1 = (0, k.shape[-2]) if k_ends is None else k_ends[s]
        own = [_of_sequence(o, s, i not in spec.tables, q1 - q0, k1 - k0) for i, o in enumerate(operands)]
        # a row's number is its place in the tensor that holds the result
        first = q0 if spec.packed_queries else s * heads * total
        numbers = torch.arange(heads, device=q.device)[:, None] * total + torch.arange(q1 - q0, device=q.device)
        alone = Inputs(
            (q if spec.packed_queries or q.shape[0] == 1 else q[s : s + 1])[..., q0:q1, :],
            (k if spec.packed_keys or k.shape[0] == 1 else k[s : s + 1])[..., k0:k1, :],
            (v if spec.packed_keys or v.shape[0] == 1 else v[s : s + 1])[..., k0:k1, :],
            own,
            seed,
        )
        yield Part(
            alone,
            (numbers + first).reshape(1, *rest, q1 - q0),
            None if spec.packed_queries else s,
            (q0, q1) if spec.packed_queries else None,
        )


def _packed(spec: Attention, inputs: Inputs, compute: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence after the other."""
    q, v = inputs.q, inputs.v
    rest = torch.broadcast_shapes(*(x.shape[1:-2] for x in inputs.tensors))
    outs, stats, places = [], [], []
    for part in parts(spec, inputs):
        out, found = _attend(spec, part.inputs, compute, part.rows)
        # tensors without a rest of their own still give every head
        outs.append(out.expand(1, *rest, *out.shape[-2:]))
        stats.append(found.expand(2, 1, *rest, found.shape[-1]))
        places.append(part.span)
    if not spec.packed_queries:
        return torch.cat(outs), torch.cat(stats, 1)
    whole = q.new_zeros((1, *rest, q.shape[-2], v.shape[-1]), dtype=compute)
    lines = q.new_zeros((2, 1, *rest, q.shape[-2]), dtype=compute)
    lines[0] = -torch.inf
    for place, out, found in zip(places, outs, stats):
        index = torch.arange(*place, device=q.device)  # type: ignore[misc]
        whole = whole.index_copy(-2, index, out)
        lines = lines.index_copy(-1, index, found)
    return whole, lines


def _of_sequence(operand: torch.Tensor, s: int, cropped: bool, Q: int, K: int) -> torch.Tensor:
    """An operand for one sequence, no longer than that where it has queries and keys of its own."""
    operand = operand if operand.shape[0] == 1 else operand[s : s + 1]
    if not cropped:
        return operand
    queries = operand if operand.shape[-2] == 1 else operand[..., :Q, :]
    return queries if operand.shape[-1] == 1 else queries[..., :K]


def _attend(
    spec: Attention, inputs: Inputs, compute: torch.dtype, rows: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """rows: as in `Part`."""
    s, v = scores(spec, inputs, compute), inputs.v
    sink = s.new_full((), -torch.inf) if spec.sink is None else s.new_full((), spec.sink.value)
    if spec.sink is not None and spec.sink.operand is not None:
        sink = inputs.operands[spec.sink.operand].to(compute)
    sink = sink.expand(*s.shape[:-1], 1)
    if s.shape[-1] == 0:
        sums = torch.exp(sink - sink.detach()).squeeze(-1) if spec.sink else s.new_zeros(s.shape[:-1])
        return s.new_zeros(*s.shape[:-1], v.shape[-1]), torch.stack([sink.detach().squeeze(-1), sums])
    top = torch.maximum(s.detach().amax(-1, keepdim=True), sink.detach())
    shift = torch.zeros_like(top) if spec.softmax == "unshifted" else top
    e = torch.exp(s - shift)
    total = e.sum(-1, keepdim=True)
    if spec.sink is not None:
        total = total + torch.exp(sink - shift)
    p = e / total
    if spec.hidden == "zero":
        p = torch.where(top == -torch.inf, 0.0, p)
    elif spec.hidden == "nan_to_zero":
        # rows whose weights are NaN, whatever made them so
        p = torch.where(total.isnan() | p.isnan().any(-1, keepdim=True), 0.0, p)
    p = weigh(spec, p, inputs, rows)
    held, held_sink = (s, sink) if spec.lse else (s.detach(), sink.detach())
    # rows without a finite score have no sum that could be differentiated
    hidden = spec.lse & (top == -torch.inf)
    sums = torch.exp(torch.where(hidden, 0.0, held - top)).sum(-1)
    if spec.sink is not None:
        sums = sums + torch.exp(torch.where(hidden, -torch.inf, held_sink - top)).squeeze(-1)
    stats = torch.stack([top.squeeze(-1), sums])
    return torch.matmul(p, v.to(compute)), stats


def scores(spec: Attention, inputs: Inputs, compute: torch.dtype) -> torch.Tensor:
    """[*batch, Q, K] after all steps; v gives its part of the batch."""
    q, k = inputs.q, inputs.k
    batch = torch.broadcast_shapes(*(x.shape[:-2] for x in inputs.tensors))
    s = torch.matmul(q.to(compute), k.to(compute).transpose(-1, -2)).expand(*batch, q.shape[-2], k.shape[-2])
    return _stepped(spec.steps, s, inputs.operands)


def weigh(spec: Attention, p: torch.Tensor, inputs: Inputs, rows: torch.Tensor | None) -> torch.Tensor:
    """What multiplies v, from the softmax p [*batch, Q, K]; rows as in `Part`."""
    for step in spec.weight_steps:
        p = _apply(step, p, inputs.operands)
    if spec.dropout == 0.0:
        return p
    if inputs.seed is None:
        raise ValueError("a spec with dropout needs a seed")
    keys = torch.arange(p.shape[-1], device=p.device)
    numbers = dropout.numbers_of(spec, inputs)
    if numbers is not None:
        elements = torch.arange(math.prod(p.shape[:-2]), device=p.device).reshape(*p.shape[:-2], 1)
        rows = elements * numbers[0, 4] + dropout.tokens(numbers[0], p.shape[-2])
        keys = dropout.tokens(numbers[1], p.shape[-1])
    elif rows is None:
        rows = torch.arange(math.prod(p.shape[:-1]), device=p.device).reshape(p.shape[:-1])
    kept = dropout.keep(inputs.seed, rows, keys, spec.dropout)
    # dropout of 1 multiplies by 0 / 0 nowhere: torch gives zeros
    return p * kept * (1.0 / (1.0 - spec.dropout) if spec.dropout < 1.0 else 0.0)


def log_sum_exp(stats: torch.Tensor) -> torch.Tensor:
    """[*batch, Q] from stats [2, *batch, Q]: -inf in rows without a score above that."""
    return statistics.log_sum_exp(*stats.unbind())


def keep_of(keep: expr.Expr, s: torch.Tensor, operands: Sequence[torch.Tensor]) -> torch.Tensor:
    """Bool, broadcastable to s [*batch, Q, K]: True where the mask keeps."""
    return expr.evaluate(keep, operands, *_indices(s))


def _indices(s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(s.shape[-2], device=s.device)[:, None], torch.arange(s.shape[-1], device=s.device)[None]


def _added(step: Bias, s: torch.Tensor, operands: Sequence[torch.Tensor]) -> torch.Tensor:
    read = expr.Load(step.operand, "float32", step.row, step.col)
    return expr.load(read, operands, *_indices(s))


def _ramp(step: Ramp, s: torch.Tensor, operands: Sequence[torch.Tensor]) -> torch.Tensor:
    number = expr.evaluate(step.number, operands, *_indices(s))
    if step.number_dtype != "float32":
        number = number.to(torch.float32).to(dtype_of(step.number_dtype))
    made = operands[step.operand].to(s.dtype) * number.to(s.dtype)
    if step.dtype != "float32":
        # rounded to float32 on the way whatever it is computed in, as in the graph; gradients pass
        made = made + (made.detach().to(torch.float32).to(dtype_of(step.dtype)).to(s.dtype) - made.detach())
    return step.alpha * made


def _stepped(steps: Sequence[Step], s: torch.Tensor, operands: Sequence[torch.Tensor]) -> torch.Tensor:
    """The scores after the steps."""
    joined = rounding.joined(steps)
    at = 0
    while at < len(steps):
        end = joined.get(at)
        if end is None:
            s = _apply(steps[at], s, operands)
            at += 1
            continue
        term = torch.zeros_like(s)
        # the cast holds the terms' sum, and then its sum with the scores
        for step in steps[at : end + 1]:
            term = _apply(step, term, operands)
        s, at = s + term, end
    return s


def _apply(step: Step, s: torch.Tensor, operands: Sequence[torch.Tensor]) -> torch.Tensor:
    if isinstance(step, Scale):
        return s * (step.value if step.operand is None else operands[step.operand].to(s.dtype))
    if isinstance(step, Bias):
        added = step.alpha * _added(step, s, operands).to(s.dtype)
        return s + (added if step.keep is None else torch.where(keep_of(step.keep, s, operands), added, 0.0))
    if isinstance(step, Ramp):
        added = _ramp(step, s, operands)
        return s + (added if step.keep is None else torch.where(keep_of(step.keep, s, operands), added, 0.0))
    if isinstance(step, Shift):
        return s + step.value
    if isinstance(step, Softcap):
        return step.cap * torch.tanh(s / step.cap)
    if isinstance(step, Tanh):
        return torch.tanh(s)
    if isinstance(step, Clamp):
        return torch.clamp(s, step.low, step.high)
    if isinstance(step, ReplaceFill):
        return torch.where(keep_of(step.keep, s, operands), s, step.value)
    if isinstance(step, AddFill):
        return s + torch.where(keep_of(step.keep, s, operands), 0.0, step.value).to(s.dtype)
    if isinstance(step, Cast):
        return rounding.held(s, dtype_of(step.dtype)) if rounding.rounds(step) else s
    raise TypeError(f"unknown step {step!r}")
