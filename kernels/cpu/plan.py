"""A spec as the words the C++ side reads, and the layouts of the tensors it was called with, all made once and kept.

The field order here is that of `Plan`, `Step`, `Ref` and `Grad` in problem.h.
"""

from __future__ import annotations

import functools
import itertools
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch

from attnfuse import expr, rounding
from attnfuse.expr import Expr
from attnfuse.kernels import dropout, fills, layout
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.mask_ranges import cut, orders
from attnfuse.kernels.pages import check_pages
from attnfuse.kernels.program.traits import uses
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
MAX_INSTRS = 192
MAX_ORDERS = 16
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
_PLAN = struct.Struct("=7q4d6q")
_STEP = struct.Struct("=22q2d")
_INSTR = struct.Struct("=6q")
_ORDER = struct.Struct("=5q")
#: In the order of `Compared` in problem.h.
_COMPARED = ("eq", "le", "lt", "ge", "gt")


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
        self.tables = spec.tables
        # operands that are read at the query's own row, and at the key's own column
        reads: list[Bias | expr.Load] = [*spec.loads, *(s for s in spec.steps if isinstance(s, Bias))]
        whole = {s.operand for s in spec.steps + spec.weight_steps if isinstance(s, Scale) and s.operand is not None}
        sinks = {spec.sink.operand} if spec.sink is not None and spec.sink.operand is not None else set()
        self._by_query = frozenset(x.operand for x in reads if x.row is None) | whole | sinks
        self._by_key = frozenset(x.operand for x in reads if x.col is None) | whole
        if len(spec.batch) > BATCH or len(self.operands) > MAX_OPERANDS:
            given = f"{len(spec.batch)} and {len(self.operands)}"
            raise ValueError(f"at most {BATCH} batch dims and {MAX_OPERANDS} operands; got {given}")
        self.words = self._encode()
        #: Operands that could make a hidden key visible, with their factors.
        self.lifting = fills.lifting(spec, by_bias=True) if spec.nan_policy != "eager" else {}
        self.lifted = spec.nan_policy != "eager" and fills.lifts_always(spec)
        self._unhidden: Attention | None = None
        self.forward: dict[object, Words] = {}
        self.backward: dict[object, Reverse] = {}

    def unhidden(self, operands: Sequence[torch.Tensor]) -> Attention | None:
        """The spec that skips no key, where something in these operands could make a hidden key visible again."""
        if not self.lifted and not any(_largest(operands[i], a) >= fills.LIFTS for i, a in self.lifting.items()):
            return None
        if self._unhidden is None:
            self._unhidden = replace(self.spec, nan_policy="eager")
        return self._unhidden

    def _encode(self) -> bytes:
        try:
            return self._encoded(Programs(functools.partial(uses, self.spec)))
        except _TooMany:
            # what a bisection may decide comes on top of what decides it otherwise
            return self._encoded(Programs())

    def _encoded(self, programs: Programs) -> bytes:
        spec = self.spec
        uniform = frozenset(i for i, o in enumerate(spec.operands) if o.dims[-2:] == ("1", "1"))
        joined = {end: end - first for first, end in rounding.joined(spec.steps).items()}
        hiding = fills.hiding(spec, in_biases=True)
        steps = [
            _words(s, programs, uniform, joined.get(i, 0), i in hiding.steps)
            for i, s in enumerate(spec.steps)
            if rounding.rounds(s) or i in joined or not isinstance(s, Cast)
        ]
        weights = [_words(s, programs, uniform) for s in spec.weight_steps if not isinstance(s, Cast)]
        if max(len(steps), len(weights)) > MAX_STEPS:
            raise ValueError(f"at most {MAX_STEPS} steps; got {len(steps)} and {len(weights)} on the weights")
        p, sink = spec.dropout, spec.sink
        head = _PLAN.pack(
            _DTYPES[self.qk],
            _DTYPES[self.v],
            _DTYPES[self.out],
            spec.softmax == "unshifted",
            _HIDDEN[spec.hidden],
            spec.nan_policy == "eager",
            -1 if sink is None or sink.operand is None else sink.operand,
            -math.inf if sink is None else sink.value,
            1.0 / (1.0 - p) if p < 1.0 else 0.0,
            hiding.doubt,
            fills.HIDDEN_BELOW,
            p > 0.0,
            dropout.threshold(p),
            len(self.operands),
            len(steps),
            len(weights),
            len(programs.words),
        )
        dtypes = [_DTYPES[d] for d in self.operands] + [0] * (MAX_OPERANDS - len(self.operands))
        body = [_pad(steps), _pad(weights), programs.packed()]
        return head + struct.pack(f"={MAX_OPERANDS}q", *dtypes) + b"".join(body)

    def batch(self, inputs: Inputs, sequences: int) -> tuple[int, ...]:
        """The batch dims of the scores; sequences: how many, in a packed layout."""
        found = layout.batch_shape(inputs.shapes)
        return (sequences, *found[1:]) if self.spec.packed else found

    def check(self, inputs: Inputs, sequences: int = 0, longest: tuple[int, int] | None = None) -> None:
        """Raises ValueError for inputs that are not what the spec says, before C++ reads past one's end.

        longest: the most queries and keys of a sequence; None for those of the tensors.
        """
        tensors = inputs.tensors
        given = tuple(t.dtype for t in tensors)
        wanted = (self.qk, self.qk, self.v, *self.operands)
        if given != wanted:
            raise ValueError(f"dtypes {given} where the spec has {wanted}")
        rank = len(self.spec.batch) + 2
        if any(t.dim() != rank + (self.spec.paged and i in (1, 2)) for i, t in enumerate(tensors)):
            raise ValueError(f"tensors of {rank} dims are needed; got {[t.dim() for t in tensors]}")
        check_pages(self.spec, inputs)
        q, k, v, *operands = tensors
        batch = self.batch(inputs, sequences)
        fits = all(t.shape[d] in (1, batch[d]) for t in tensors for d in range(rank - 2))
        fits = fits and q.shape[-1] == k.shape[-1] and k.shape[-2] == v.shape[-2]
        fits = fits and (
            inputs.pages is None or all(inputs.pages.table.shape[d] in (1, n) for d, n in enumerate(batch))
        )
        packed = [(q, self.spec.packed_queries), (k, self.spec.packed_keys), (v, self.spec.packed_keys)]
        fits = fits and all(x.shape[0] == 1 for x, side in packed if side)
        lengths = (q.shape[-2], inputs.keys)
        for i, o in enumerate(operands):
            if i not in self.tables and longest is None:
                fits = fits and o.shape[-2] in (1, lengths[0]) and o.shape[-1] in (1, lengths[1])
                continue
            # one for all sequences is as long as the longest; what it has beyond is not read
            least = lengths if longest is None else longest
            own = (i not in self.tables or i in self._by_query, i not in self.tables or i in self._by_key)
            fits = fits and all(n == 1 or n >= m for n, m, need in zip(o.shape[-2:], least, own) if need)
            # an index is clamped to the table's last element, which must be there
            fits = fits and (0 in least or min(o.shape[-2:]) > 0)
        if not fits:
            raise ValueError(
                f"shapes do not fit as [*batch, Q, D], [*batch, K, D], [*batch, K, E] and operands [*batch, Q, K]: "
                f"{[tuple(t.shape) for t in tensors]}"
                + (
                    ""
                    if longest is None
                    else f" for {sequences} sequences of at most {longest[0]} and {longest[1]} rows"
                )
            )

    def lay_out(
        self,
        key: object,
        inputs: Inputs,
        sequences: int = 0,
        longest: tuple[int, int] | None = None,
    ) -> Words:
        """The forward layout of the inputs, kept under `key`. A block table must be contiguous."""
        self.check(inputs, sequences, longest)
        q, k, v, *operands = inputs.tensors
        batch = self.batch(inputs, sequences)
        Q, K, D, E = q.shape[-2], inputs.keys, q.shape[-1], v.shape[-1]
        lines = (1, *batch[1:], Q) if self.spec.packed_queries else (*batch, Q)
        shape = (*lines, E)
        stride = [0] * len(shape)
        step = 1
        for d in reversed(self.spec.out_order):
            stride[d] = step
            step *= max(shape[d], 1)
        sides = (_strides(x) if inputs.pages is None else _block_strides(x) for x in (k, v))
        words = [*self.sizes(batch, Q, K, D, E, 1), *_strides(q), *itertools.chain(*sides), *_from(shape, stride)]
        for o in operands:
            words += [*_strides(o, masked=True), o.shape[-2], o.shape[-1]]
        words += _page_words(self.spec, inputs)
        made = Words(
            struct.pack(f"={len(words)}q", *words),
            batch,
            shape,
            tuple(stride),
            (2, *lines),
            math.prod(batch) * Q == 0,
            struct.Struct(f"={11 + len(operands)}q"),
        )
        return _keep(self.forward, key, made)

    def lay_out_reverse(
        self,
        key: object,
        inputs: Inputs,
        out_shape: tuple[int, ...],
        needs: Sequence[bool],
        threads: int,
        key_tile: int,
        sequences: int = 0,
        longest: tuple[int, int] | None = None,
    ) -> Reverse:
        """How the gradients of (q, k, v, *operands) are made, kept under `key`."""
        tensors = inputs.tensors
        q, k, v, *operands = tensors
        self.check(inputs, sequences, longest)
        batch = self.batch(inputs, sequences)
        Q, K = q.shape[-2], k.shape[-2]
        rows = ((1, *batch[1:]) if self.spec.packed_queries else batch) + (Q,)
        if out_shape != (*rows, v.shape[-1]):
            raise ValueError(f"out is {list(out_shape)} where forward gives {[*rows, v.shape[-1]]}")
        packed = (self.spec.packed_queries, self.spec.packed_keys, self.spec.packed_keys)
        used = self.spec.used_operands
        targets = []
        summed = [False] * len(batch)
        for i, (x, needed) in enumerate(zip(tensors, needs, strict=True)):
            if not needed:
                targets.append(Target(0, None, False))
                continue
            if not x.dtype.is_floating_point:
                raise ValueError(f"input {i} of dtype {x.dtype} has no gradient")
            table = i - 3 in self.tables
            thin = table or (i >= 3 and ((x.shape[-2] == 1 and Q > 1) or (x.shape[-1] == 1 and K > 1)))
            reduced = [not thin and x.shape[d] == 1 and size > 1 for d, size in enumerate(batch)]
            if i < 3 and packed[i]:
                reduced[0] = False
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
        if classes < threads and work > 1_000_000 and not self.spec.packed:
            chunks = max(1, min(-(-threads // max(classes, 1)), -(-K // key_tile)))
        empty = math.prod(batch) * Q * K * v.shape[-1] == 0
        made = Reverse(tuple(targets), batch, chunks, empty, struct.Struct(f"={15 + 2 * len(operands)}q"))
        return _keep(self.backward, key, made)

    def sizes(self, batch: Sequence[int], Q: int, K: int, D: int, E: int, chunks: int) -> list[int]:
        """The words before the tensors'."""
        dim = BATCH - len(batch) if self.spec.packed else -1
        return [1] * (BATCH - len(batch)) + [*batch, Q, K, D, E, chunks, dim]


def _largest(x: torch.Tensor, factor: float) -> float:
    """The largest factor * x, NaN aside; -inf of no element."""
    if x.numel() == 0 or not x.is_floating_point():
        return -math.inf
    x = x.detach()
    most = x.amax if factor > 0.0 else x.amin
    found = float(most())
    if found != found:
        end = math.copysign(math.inf, -factor)
        x = torch.where(x.isnan(), end, x)
        found = float(x.amax() if factor > 0.0 else x.amin())
    return factor * found


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
    plan: Plan,
    made: Reverse,
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    dout: torch.Tensor,
    grads: Sequence[torch.Tensor | None],
) -> bytes:
    """The words of a backward call: strides of inputs and of the tensors the gradients are summed in."""
    q, k, v, *operands = tensors
    words = plan.sizes(made.batch, q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1], made.chunks)
    for x in (q, k, v, out, dout):
        words += _strides(x)
    for o in operands:
        words += [*_strides(o, masked=True), o.shape[-2], o.shape[-1]]
    for i, (target, grad) in enumerate(zip(made.targets, grads, strict=True)):
        if grad is None:
            words += [0] * (3 + BATCH + 2)
            continue
        chunk = grad.stride(0) if target.thin else 0
        words += [target.mode, _DTYPES[grad.dtype], chunk, *_strides(grad[0] if target.thin else grad, masked=i >= 3)]
    return struct.pack(f"={len(words)}q", *words)


def _strides(x: torch.Tensor, masked: bool = False) -> list[int]:
    return _from(x.shape, x.stride(), masked)


def _from(shape: Sequence[int], stride: Sequence[int], masked: bool = False) -> list[int]:
    """Strides for [6 batch dims, row, column], 0 where broadcast; an operand (`masked`) may be in its last two dims."""
    own = [0 if n == 1 else s for n, s in zip(shape, stride, strict=True)]
    if not masked and shape[-1] == 1:
        own[-1] = 1
    return list(itertools.chain([0] * (BATCH + 2 - len(own)), own))


def _block_strides(cache: torch.Tensor) -> list[int]:
    """Those of one block of [*batch, blocks, block, columns]."""
    at = cache.dim() - 3
    shape, stride = list(cache.shape), list(cache.stride())
    return _from(shape[:at] + shape[at + 1 :], stride[:at] + stride[at + 1 :])


def _page_words(spec: Attention, inputs: Inputs) -> list[int]:
    """Rows of a block (0: there are none), whether numbers wrap, elements of the table, its strides [6 batch dims, column] where
    it is contiguous, and for each cache how many blocks it has and how far they are apart."""
    if inputs.pages is None:
        return [0] * (3 + BATCH + 1 + 4)
    shape, step, strides = inputs.pages.table.shape, 1, [0] * len(inputs.pages.table.shape)
    for d in reversed(range(len(shape))):
        strides[d] = 0 if shape[d] == 1 else step
        step *= shape[d]
    found = [inputs.k.shape[-2], int(spec.wraps), step, *[0] * (BATCH + 1 - len(strides)), *strides]
    for cache in (inputs.k, inputs.v):
        found += [cache.shape[-3], cache.stride(-3)]
    return found


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


class _TooMany(ValueError):
    """A plan has no room for so many operations."""


class Programs:
    """Instructions of all expressions of a spec, one after the other, and the orders of its masks.

    uses: which of 'q' and 'k' an expression depends on; without it there are no orders.
    """

    def __init__(self, uses: Callable[[Expr], set[str]] | None = None) -> None:
        self.words: list[bytes] = []
        self._uses = uses
        self._orders: list[bytes] = []
        self._spans: dict[Expr, tuple[int, int]] = {}

    def packed(self) -> bytes:
        if len(self.words) > MAX_INSTRS:
            raise _TooMany(f"masks of at most {MAX_INSTRS} operations; got {len(self.words)}")
        room = (
            bytes(_INSTR.size * (MAX_INSTRS - len(self.words))),
            bytes(_ORDER.size * (MAX_ORDERS - len(self._orders))),
        )
        return b"".join([*self.words, room[0], *self._orders, room[1]])

    def add_orders(self, keep: Expr | None) -> tuple[tuple[int, int], tuple[int, int]]:
        """The span of a mask's orders, empty where there are none or no room for them, and that of the program of its rest."""
        found, rest = ((), None) if self._uses is None else orders(keep, self._uses)
        if not found or len(self._orders) + len(found) > MAX_ORDERS:
            return (0, 0), (0, 0)
        begin = len(self._orders)
        for order in found:
            spans = (*self.add(order.key), *self.add(order.query))
            self._orders.append(_ORDER.pack(_COMPARED.index(order.how), *spans))
        return (begin, len(self._orders)), self.add(rest)

    def add(self, e: Expr | None) -> tuple[int, int]:
        """The span of the program for e, empty for None: one span for equal expressions. What occurs twice in it is computed
        once."""
        if e is None:
            return 0, 0
        if e not in self._spans:
            begin = len(self.words)
            self._run(e, {})
            self._spans[e] = begin, len(self.words)
        return self._spans[e]

    def _run(self, e: Expr, known: dict[Expr, int]) -> int:
        if e not in known:
            known[e] = self._made(e, known)
        return known[e]

    def _put(self, op: str, a: int = -1, b: int = -1, c: int = -1, value: int = 0, operand: int = -1) -> int:
        self.words.append(_INSTR.pack(_OPS.index(op), a, b, c, value, operand))
        return len(self.words) - 1

    def _made(self, e: Expr, known: dict[Expr, int]) -> int:
        if isinstance(e, expr.Const):
            return self._put("number", value=int(e.value))
        if isinstance(e, expr.Index):
            return self._put("query" if e.axis == "q" else "key")
        if isinstance(e, expr.Load):
            row = -1 if e.row is None else self._run(e.row, known)
            col = -1 if e.col is None else self._run(e.col, known)
            return self._put("load", row, col, operand=e.operand)
        if isinstance(e, expr.Linear):
            return self._sum(e, known)
        assert isinstance(e, expr.Apply)
        if e.op in ("floordiv", "mod"):
            assert isinstance(e.args[1], expr.Const)
            if e.args[1].value <= 0:
                raise ValueError(f"{e.op} by {e.args[1].value}, where a positive number is needed")
            return self._put(e.op, self._run(e.args[0], known), value=int(e.args[1].value))
        args = [self._run(x, known) for x in e.args]
        if e.op in ("and", "or"):
            total = args[0]
            for x in args[1:]:
                total = self._put(e.op, total, x)
            return total
        # a bool is an integer here
        return args[0] if e.op == "int" else self._put(e.op, *args)

    def _sum(self, e: expr.Linear, known: dict[Expr, int]) -> int:
        parts = []
        for c, t in e.terms:
            x = self._run(t, known)
            parts.append(x if c == 1 else self._put("times", x, value=c))
        if e.const:
            parts.append(self._put("number", value=e.const))
        total = parts[0]
        for x in parts[1:]:
            total = self._put("add", total, x)
        return total


#: In the order of `Op` in problem.h.
_OPS = (
    *("number", "query", "key", "load", "add", "times", "min", "max", "abs", "floordiv", "mod", "where"),
    *("le", "eq", "ne", "and", "or", "not"),
)


def _words(step: Step, programs: Programs, uniform: frozenset[int], joined: int = 0, hides: bool = False) -> bytes:
    """joined: how many of the steps before a cast are summed on their own. hides: it hides keys for good (kernels/fills.py)."""
    names = ("keep", "orders", "other", "below_q", "from_q", "below", "from", "row", "col")
    spans = dict.fromkeys(names, (0, 0))
    mask = getattr(step, "keep", None)
    if mask is not None:
        found = cut(mask, uniform)
        spans["keep"] = programs.add(found.rest)
        for name, bound in found.bounds.items():
            spans[name] = programs.add(bound)
        if hides and not isinstance(step, Bias):
            spans["orders"], spans["other"] = programs.add_orders(found.rest)
    kind, operand, slides, value, high = 0, -1, 0, 0.0, 0.0
    if isinstance(step, Scale):
        kind, operand, value = 0, -1 if step.operand is None else step.operand, step.value
    elif isinstance(step, Bias):
        kind, operand, value = 1, step.operand, step.alpha
        spans["row"], spans["col"] = programs.add(step.row), programs.add(step.col)
        slides = step.col is not None and _slides(step.col) and (step.row is None or not _by_key(step.row))
    elif isinstance(step, Shift):
        kind, value = 2, step.value
    elif isinstance(step, Softcap):
        kind, value = 3, step.cap
    elif isinstance(step, Tanh):
        kind = 4
    elif isinstance(step, Clamp):
        kind, value, high = 5, step.low, step.high
    elif isinstance(step, (ReplaceFill, AddFill)):
        kind, value = 6 if isinstance(step, ReplaceFill) else 7, step.value
    elif isinstance(step, Cast):
        kind, operand = {"float16": 8, "bfloat16": 9}.get(step.dtype, 10), joined
        value = rounding.COARSE.get(dtype_of(step.dtype), math.inf)
    else:
        raise ValueError(f"the CPU kernel does not know the step {step!r}")
    return _STEP.pack(kind, operand, *itertools.chain.from_iterable(spans.values()), slides, hides, value, high)


def _by_key(e: Expr) -> bool:
    """Whether e may differ between keys."""
    return any(x == expr.K or isinstance(x, expr.Load) for x in expr.walk(e))


def _slides(col: Expr) -> bool:
    """Whether the column is k plus something without k."""
    terms = expr.sum_of(col)
    return terms.get(expr.K) == 1 and not any(_by_key(t) for t in terms if t != expr.K)
