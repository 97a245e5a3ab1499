"""A spec as the words the C++ side reads, and the layouts of the tensors it was called with, all made once and kept.

The field order here is that of `Plan`, `Step`, `Ref` and `Grad` in problem.h.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch

from attnfuse.kernels import dropout, layout
from attnfuse.mask import Causal, Dense
from attnfuse.spec import (
    AddFill,
    Attention,
    Bias,
    Cast,
    Clamp,
    ReplaceFill,
    Scale,
    Shift,
    Softcap,
    Step,
    Tanh,
    dtype_of,
)

MAX_OPERANDS = 16
MAX_STEPS = 32
BATCH = 6
_MAX_LAYOUTS = 512
_DTYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
    torch.bool: 4,
    torch.uint8: 4,
    torch.int32: 5,
    torch.int64: 6,
    torch.int8: 7,
    torch.int16: 8,
}
_T = TypeVar("_T")
_HIDDEN = {"nan": 0, "zero": 1, "nan_to_zero": 2}
_PLAN = struct.Struct("=6qd5q")
_STEP = struct.Struct("=4q2d")


class Words(NamedTuple):
    """One call's layout: the words, the batch shape, and the number of pointers that go with it."""

    words: bytes
    batch: tuple[int, ...]
    out_shape: tuple[int, ...]
    out_stride: tuple[int, ...]
    stats_shape: tuple[int, ...]
    empty: bool
    pointers: struct.Struct


class Target(NamedTuple):
    """How one gradient is made. mode 0 none, 1 stored in its own dtype, 2 added up in float32.

    shape is that of the sums where they differ from the input's dtype or shape, else None: the gradient itself.
    """

    mode: int
    shape: tuple[int, ...] | None
    thin: bool


@dataclass(slots=True)
class Reverse:
    """One backward call's layout; targets are for q, k, v and the operands. The first call fills in the words."""

    targets: tuple[Target, ...]
    batch: tuple[int, ...]
    chunks: int
    empty: bool
    pointers: struct.Struct
    words: bytes = b""


class Plan:
    """All that follows from a spec alone, and the layouts met so far."""

    def __init__(self, spec: Attention) -> None:
        # keeps the spec alive, so that its id stays its own
        self.spec = spec
        self.qk = _kernel_float(spec.qk_dtype, "q and k")
        self.v = _kernel_float(spec.v_dtype, "v")
        self.out = _kernel_float(spec.out_dtype, "out")
        self.operands = tuple(_known(dtype_of(o.dtype)) for o in spec.operands)
        if len(spec.batch) > BATCH or len(self.operands) > MAX_OPERANDS:
            given = f"{len(spec.batch)} and {len(self.operands)}"
            raise ValueError(f"at most {BATCH} batch dims and {MAX_OPERANDS} operands; got {given}")
        self.words = self._encode()
        self.forward: dict[object, Words] = {}
        self.backward: dict[object, Reverse] = {}

    def _encode(self) -> bytes:
        spec = self.spec
        steps = [_words(s) for s in spec.steps if not (isinstance(s, Cast) and s.dtype != "float16")]
        weights = [_words(s) for s in spec.weight_steps if not isinstance(s, Cast)]
        if max(len(steps), len(weights)) > MAX_STEPS:
            raise ValueError(f"at most {MAX_STEPS} steps; got {len(steps)} and {len(weights)} on the weights")
        p = spec.dropout
        head = _PLAN.pack(
            _DTYPES[self.qk],
            _DTYPES[self.v],
            _DTYPES[self.out],
            spec.softmax == "unshifted",
            _HIDDEN[spec.hidden],
            spec.nan_policy == "eager",
            1.0 / (1.0 - p) if p < 1.0 else 0.0,
            p > 0.0,
            dropout.threshold(p),
            len(self.operands),
            len(steps),
            len(weights),
        )
        dtypes = [_DTYPES[d] for d in self.operands] + [0] * (MAX_OPERANDS - len(self.operands))
        body = [_pad(steps), _pad(weights)]
        return head + struct.pack(f"={MAX_OPERANDS}q", *dtypes) + b"".join(body)

    def check(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, operands: Sequence[torch.Tensor]) -> None:
        """Raises ValueError for tensors that are not what the spec says, before C++ reads past one's end."""
        given = (q.dtype, k.dtype, v.dtype, *(o.dtype for o in operands))
        wanted = (self.qk, self.qk, self.v, *self.operands)
        if given != wanted:
            raise ValueError(f"dtypes {given} where the spec has {wanted}")
        rank = len(self.spec.batch) + 2
        tensors = (q, k, v, *operands)
        if any(t.dim() != rank or t.device.type != "cpu" for t in tensors):
            raise ValueError(
                f"CPU tensors of {rank} dims are needed; got {[(t.device.type, t.dim()) for t in tensors]}"
            )
        batch = layout.batch_shape(tensors)
        fits = all(t.shape[d] in (1, batch[d]) for t in tensors for d in range(rank - 2))
        fits = fits and q.shape[-1] == k.shape[-1] and k.shape[-2] == v.shape[-2]
        for o in operands:
            fits = fits and o.shape[-2] in (1, q.shape[-2]) and o.shape[-1] in (1, k.shape[-2])
        if not fits:
            raise ValueError(
                f"shapes do not fit as [*batch, Q, D], [*batch, K, D], [*batch, K, E] and operands [*batch, Q, K]: "
                f"{[tuple(t.shape) for t in tensors]}"
            )

    def lay_out(
        self, key: object, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, operands: Sequence[torch.Tensor]
    ) -> Words:
        """The forward layout of these tensors, kept under `key`."""
        self.check(q, k, v, operands)
        batch = layout.batch_shape((q, k, v, *operands))
        Q, K, D, E = q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]
        shape = (*batch, Q, E)
        stride = [0] * len(shape)
        step = 1
        for d in reversed(self.spec.out_order):
            stride[d] = step
            step *= max(shape[d], 1)
        words = [*_sizes(batch, Q, K, D, E, 1), *_strides(q), *_strides(k), *_strides(v), *_from(shape, stride)]
        for o in operands:
            words += _strides(o, masked=True)
        made = Words(
            struct.pack(f"={len(words)}q", *words),
            batch,
            shape,
            tuple(stride),
            (2, *batch, Q),
            math.prod(batch) * Q == 0,
            struct.Struct(f"={7 + len(operands)}q"),
        )
        return _keep(self.forward, key, made)

    def lay_out_reverse(
        self,
        key: object,
        tensors: Sequence[torch.Tensor],
        needs: Sequence[bool],
        threads: int,
        key_tile: int,
    ) -> Reverse:
        """How the gradients of tensors (q, k, v, *operands) are made, kept under `key`."""
        q, k, v, *operands = tensors
        self.check(q, k, v, operands)
        batch = layout.batch_shape(tensors)
        Q, K = q.shape[-2], k.shape[-2]
        used = self.spec.used_operands
        targets = []
        summed = [False] * len(batch)
        for i, (x, needed) in enumerate(zip(tensors, needs, strict=True)):
            if not needed:
                targets.append(Target(0, None, False))
                continue
            if not x.dtype.is_floating_point:
                raise ValueError(f"input {i} of dtype {x.dtype} has no gradient")
            thin = i >= 3 and ((x.shape[-2] == 1 and Q > 1) or (x.shape[-1] == 1 and K > 1))
            reduced = [not thin and x.shape[d] == 1 and size > 1 for d, size in enumerate(batch)]
            summed = [a or b for a, b in zip(summed, reduced, strict=True)]
            again = i >= 3 and used.count(i - 3) > 1
            if thin:
                targets.append(Target(2, (*batch, x.shape[-2], x.shape[-1]), True))
            elif any(reduced) or again or x.dtype == torch.float64:
                targets.append(Target(2, None if x.dtype == torch.float32 else tuple(x.shape), False))
            else:
                targets.append(Target(1, None, False))
        classes = math.prod(s for s, b in zip(batch, summed, strict=True) if not b)
        chunks = 1
        work = math.prod(batch) * Q * K * (q.shape[-1] + v.shape[-1])
        if classes < threads and work > 1_000_000:
            chunks = max(1, min(-(-threads // max(classes, 1)), -(-K // key_tile)))
        empty = math.prod(batch) * Q * K * v.shape[-1] == 0
        made = Reverse(tuple(targets), batch, chunks, empty, struct.Struct(f"={11 + 2 * len(operands)}q"))
        return _keep(self.backward, key, made)


_plans: dict[int, Plan] = {}


def plan_of(spec: Attention) -> Plan:
    """The plan of a spec object, found by identity: hashing a spec takes longer than a small attention."""
    plan = _plans.get(id(spec))
    if plan is None:
        if len(_plans) >= _MAX_LAYOUTS:
            _plans.clear()
        plan = _plans[id(spec)] = Plan(spec)
    return plan


def reverse_words(
    made: Reverse,
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    dout: torch.Tensor,
    grads: Sequence[torch.Tensor | None],
) -> bytes:
    """The words of a backward call: strides of inputs and of the tensors the gradients are summed in."""
    q, k, v, *operands = tensors
    words = _sizes(made.batch, q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1], made.chunks)
    for x in (q, k, v, out, dout):
        words += _strides(x)
    for o in operands:
        words += _strides(o, masked=True)
    for i, (target, grad) in enumerate(zip(made.targets, grads, strict=True)):
        if grad is None:
            words += [0] * (3 + BATCH + 2)
            continue
        chunk = grad.stride(0) if target.thin else 0
        words += [target.mode, _DTYPES[grad.dtype], chunk, *_strides(grad[0] if target.thin else grad, masked=i >= 3)]
    return struct.pack(f"={len(words)}q", *words)


def _sizes(batch: Sequence[int], Q: int, K: int, D: int, E: int, chunks: int) -> list[int]:
    return [1] * (BATCH - len(batch)) + [*batch, Q, K, D, E, chunks]


def _strides(x: torch.Tensor, masked: bool = False) -> list[int]:
    return _from(x.shape, x.stride(), masked)


def _from(shape: Sequence[int], stride: Sequence[int], masked: bool = False) -> list[int]:
    """Strides for [6 batch dims, row, column], 0 where broadcast; an operand (`masked`) may be in its last two dims."""
    own = [0 if n == 1 else s for n, s in zip(shape, stride, strict=True)]
    if not masked and shape[-1] == 1:
        own[-1] = 1
    return list(itertools.chain([0] * (BATCH + 2 - len(own)), own))


def _keep(kept: dict[object, _T], key: object, made: _T) -> _T:
    if len(kept) >= _MAX_LAYOUTS:
        kept.clear()
    kept[key] = made
    return made


def _known(dtype: torch.dtype) -> torch.dtype:
    if dtype not in _DTYPES:
        raise ValueError(f"operands of dtype {dtype} are not supported; {', '.join(map(str, _DTYPES))} are")
    return dtype


def _kernel_float(name: str, what: str) -> torch.dtype:
    dtype = dtype_of(name)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{what} must be float32, bfloat16 or float16; got {name}")
    return dtype


def _pad(steps: Sequence[bytes]) -> bytes:
    return b"".join(steps) + bytes(_STEP.size * (MAX_STEPS - len(steps)))


def _words(step: Step) -> bytes:
    if isinstance(step, Scale):
        return _STEP.pack(0, -1 if step.operand is None else step.operand, 0, 0, step.value, 0.0)
    if isinstance(step, Bias):
        return _STEP.pack(1, step.operand, 0, 0, step.alpha, 0.0)
    if isinstance(step, Shift):
        return _STEP.pack(2, -1, 0, 0, step.value, 0.0)
    if isinstance(step, Softcap):
        return _STEP.pack(3, -1, 0, 0, step.cap, 0.0)
    if isinstance(step, Tanh):
        return _STEP.pack(4, -1, 0, 0, 0.0, 0.0)
    if isinstance(step, Clamp):
        return _STEP.pack(5, -1, 0, 0, step.low, step.high)
    if isinstance(step, (ReplaceFill, AddFill)):
        kind = 6 if isinstance(step, ReplaceFill) else 7
        if isinstance(step.keep, Dense):
            return _STEP.pack(kind, step.keep.operand, step.keep.inverted, 0, step.value, 0.0)
        if isinstance(step.keep, Causal):
            return _STEP.pack(kind, -1, step.keep.inverted, step.keep.offset, step.value, 0.0)
    if isinstance(step, Cast):
        return _STEP.pack(8, -1, 0, 0, 0.0, 0.0)
    raise ValueError(f"the CPU kernel does not know the step {step!r}")
