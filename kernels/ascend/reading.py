"""A spec in the words of the NPU's fused operators: softmax(mask(scale * q @ k^T + added)) @ v, or why it is more than that.

The operators hide keys for good. What a finite number hides is the same for them where a row sees a key; a row that sees none is
the mean of all values then, which the caller has to see to (call.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from attnfuse import reasons, rounding
from attnfuse.expr import Apply, Const, Expr
from attnfuse.kernels.fills import BELOW_ALL_SCORES, HIDDEN_BELOW, hiding
from attnfuse.kernels.mask_ranges import Band, band_of, cut
from attnfuse.reasons import Reason
from attnfuse.spec import AddFill, Attention, Bias, Cast, ReplaceFill, Scale, dtype_of

_INF = math.inf


class Term(NamedTuple):
    """What is added to the scores: factor times that of a Bias, or of an AddFill that hides nothing for good."""

    step: Bias | AddFill
    factor: float


@dataclass(frozen=True)
class Reading:
    """scale: of q @ k^T. masks: a key is seen where all of them hold. fill: the score of hidden keys; passes: it was added to
    theirs, so that gradients pass. terms: what is added to the scores, scale included.
    overflow: the magnitude from which on a product of q and k is infinite in the graph, at one of its casts.
    swallows: from which on a term that is subtracted leaves nothing of a score, since the graph holds their sum in 16 bits.
    apart: terms were added one after the other, which is not their sum where one is large and positive.
    """

    scale: float = 1.0
    masks: tuple[Expr, ...] = ()
    fill: float = -_INF
    passes: bool = False
    terms: tuple[Term, ...] = ()
    overflow: float = _INF
    swallows: float = _INF
    apart: bool = False

    @property
    def finite(self) -> bool:
        return self.fill > -_INF

    @property
    def band(self) -> Band | None:
        """The masks, if all they say is how far a query sees."""
        return band_of(self.masks)

    @property
    def prefix(self) -> Prefix | None:
        """The masks, if all they say is that the first keys are seen by all, and others as far as a query sees ahead."""
        return _prefix(self.masks)


@dataclass(frozen=True)
class Prefix:
    """Query q sees the keys to q + ahead, and the first `count` ones."""

    ahead: int
    count: int


@functools.lru_cache(maxsize=512)
def _prefix(masks: tuple[Expr, ...]) -> Prefix | None:
    if len(masks) != 1 or not (isinstance(masks[0], Apply) and masks[0].op == "or"):
        return None
    found: dict[str, int] = {}
    for part in masks[0].args:
        own = cut(part)
        if own.rest is not None or len(own.bounds) != 1:
            return None
        ((kind, bound),) = own.bounds.items()
        if not isinstance(bound, Const) or kind in found:
            return None
        found[kind] = int(bound.value)
    if found.keys() != {"below_q", "below"}:
        return None
    return Prefix(found["below_q"] - 1, found["below"])


@functools.lru_cache(maxsize=512)
def read(spec: Attention) -> Reading | tuple[Reason, ...]:
    """The spec as a Reading, or what it has that the operators have not."""
    found = tuple(_limits(spec))
    if found:
        return found
    hides = hiding(spec).steps
    scale, fill = 1.0, -_INF
    masks: list[Expr] = []
    terms: list[Term] = []
    for i, step in enumerate(spec.steps):
        if isinstance(step, Scale):
            scale, fill = scale * step.value, fill * step.value
            terms = [Term(t.step, t.factor * step.value) for t in terms]
        elif isinstance(step, (ReplaceFill, AddFill)) and i in hides and not _as_term(spec, step):
            masks.append(step.keep)
            fill = max(fill, step.value)
        elif isinstance(step, Bias):
            terms.append(Term(step, step.alpha))
        elif isinstance(step, AddFill):
            terms.append(Term(step, 1.0))
    passes = any(_passes(spec, i) for i in hides)
    narrow = [dtype_of(s.dtype) for s in spec.steps if isinstance(s, Cast) and rounding.rounds(s)]
    return Reading(
        scale,
        tuple(masks),
        fill,
        passes,
        tuple(terms),
        _overflow(spec),
        min((rounding.COARSE[dtype] for dtype in narrow), default=_INF) if terms else _INF,
        _apart(spec),
    )


def _passes(spec: Attention, i: int) -> bool:
    """Whether the gradient of a score that step i hides passes: it was added to, and no cast finds it infinite."""
    step = spec.steps[i]
    return isinstance(step, AddFill) and (step.value > -_INF or not any(map(rounding.rounds, spec.steps[i:])))


def _infinite_from(dtype: torch.dtype) -> float:
    """The least number that is infinite in a dtype: what lies half a step beyond its greatest one."""
    return torch.finfo(dtype).max + 2.0 ** (math.frexp(torch.finfo(dtype).max)[1] - 1) * torch.finfo(dtype).eps / 2.0


def _overflow(spec: Attention) -> float:
    found, scale = _INF, 1.0
    for step in spec.steps:
        if isinstance(step, Scale):
            scale *= step.value
        elif isinstance(step, Cast) and rounding.rounds(step):
            found = min(found, _infinite_from(dtype_of(step.dtype)) / scale)
    return found


def _fill_overflows(spec: Attention) -> bool:
    """Whether a number that is put in or added is infinite at a cast after it, or in float32, which hides otherwise than the
    number does."""
    for i, fill in enumerate(spec.steps):
        if not isinstance(fill, (ReplaceFill, AddFill)) or not math.isfinite(fill.value):
            continue
        value = abs(fill.value)
        for step in spec.steps[i + 1 :]:
            if isinstance(step, Scale):
                value *= step.value
                if value > torch.finfo(torch.float32).max:
                    return True
            elif isinstance(step, Cast) and rounding.rounds(step) and value >= _infinite_from(dtype_of(step.dtype)):
                return True
    return False


def _apart(spec: Attention) -> bool:
    sums = [i for i, s in enumerate(spec.steps) if rounding.is_sum(s)]
    whole = (
        any(first <= min(sums) and max(sums) < end for first, end in rounding.joined(spec.steps).items())
        if sums
        else True
    )
    return not whole and rounding.may_cancel([spec.steps[i] for i in sums])


def _as_term(spec: Attention, step: ReplaceFill | AddFill) -> bool:
    """Whether a number that hides keys is added to scores in fact: dropped weights of a row without keys cannot be made else, where
    the gradient of its scores passes."""
    return spec.dropout > 0.0 and isinstance(step, AddFill) and step.value > -_INF


def _below_all(spec: Attention) -> float:
    """What leaves a key no weight in place of its score, whatever those of others are: in float16 the least number too."""
    return float(torch.finfo(torch.float16).min) if spec.qk_dtype == "float16" else BELOW_ALL_SCORES


def _limits(spec: Attention) -> Iterator[Reason]:
    hides = hiding(spec).steps
    steps = spec.steps
    fills = [(i, s) for i, s in enumerate(steps) if isinstance(s, (ReplaceFill, AddFill))]
    biases = [s for s in steps if isinstance(s, Bias)]
    factors = [s.value for s in steps if isinstance(s, Scale) and s.operand is None]
    finite = [(i, s) for i, s in fills if i in hides and s.value > -_INF]
    masks = tuple(s.keep for i, s in fills if i in hides)
    kinds = {type(s) for i, s in fills if i in hides}
    for holds, reason in (
        (spec.softmax != "plain", reasons.KERNEL_UNSHIFTED()),
        (spec.lse, reasons.KERNEL_LOG_SUM_EXP()),
        (spec.sink is not None, reasons.KERNEL_SINK()),
        (spec.nan_policy == "eager", reasons.KERNEL_NAN_POLICY()),
        (spec.hidden == "nan_to_zero", reasons.KERNEL_NAN_TO_ZERO()),
        (not spec.dropout < 1.0, reasons.KERNEL_DROPOUT()),
        (len({spec.qk_dtype, spec.v_dtype, spec.out_dtype}) > 1, reasons.KERNEL_SEVERAL_DTYPES()),
        (any(not 0.0 < x < _INF for x in factors), reasons.KERNEL_SCALE(scale=f"{min(factors, default=1.0):g}")),
        (any(isinstance(s, Scale) and s.operand is not None for s in steps), reasons.KERNEL_FACTOR()),
        # a number in place of a score, which leaves it some weight; or an infinite one that hides nothing for good
        (
            any(i not in hides and (isinstance(s, ReplaceFill) or not math.isfinite(s.value)) for i, s in fills)
            or any(s.value > _below_all(spec) for _, s in finite),
            reasons.KERNEL_FILL(),
        ),
        (_fill_overflows(spec), reasons.KERNEL_FILL()),
        # which of several numbers is left in a row without keys is not looked into
        (
            len({s.value for i, s in fills if i in hides}) > 1
            or len(kinds) > 1
            or (AddFill in kinds and len(finite) > 1)
            or (len(finite) > 1 and any(isinstance(s, Scale) for s in steps[finite[0][0] :])),
            reasons.KERNEL_FILL(),
        ),
        (
            bool(finite) and spec.dropout > 0.0 and spec.qk_dtype == "float16" and AddFill in kinds,
            reasons.KERNEL_FILL(),
        ),
        (
            bool(finite)
            and any(map(rounding.is_sum, (s for i, s in enumerate(steps) if i not in hides)))
            and band_of(masks) is None,
            reasons.KERNEL_ROW_WITHOUT_KEYS(),
        ),
        # a term may take the score of a key that is seen below the number that hides others
        (
            (any(s.value > HIDDEN_BELOW for _, s in finite) and any(map(rounding.is_sum, steps)))
            or (bool(finite) and any(isinstance(s, AddFill) and i not in hides for i, s in fills)),
            reasons.KERNEL_FILL(),
        ),
        # in rows without keys the gradient of some scores is NaN then, and that of others 0
        (
            spec.hidden == "nan" and len(kinds) == 1 and len({_passes(spec, i) for i in hides}) > 1,
            reasons.KERNEL_ROW_WITHOUT_KEYS(),
        ),
        # whose gradient is NaN in rows without keys, where that of a term before the fill is 0
        (
            spec.hidden == "nan" and not all(_passes(spec, i) for i in hides) and _term_after_fill(spec, hides),
            reasons.KERNEL_ROW_WITHOUT_KEYS(),
        ),
        (
            any(spec.operands[s.operand].dtype != spec.qk_dtype for s in biases),
            reasons.KERNEL_BIAS_DTYPE(dtype=spec.qk_dtype),
        ),
        (
            spec.packed and bool(biases or [s for i, s in fills if i not in hides]),
            reasons.KERNEL_STEP(what="packed score step", kind="bias", taken="none"),
        ),
        (spec.packed and masks != () and band_of(masks) is None, reasons.KERNEL_NOT_BANDED()),
        (_shared(spec), reasons.KERNEL_BATCH_ORDER()),
    ):
        if holds:
            yield reason


def _term_after_fill(spec: Attention, hides: frozenset[int]) -> bool:
    return any(isinstance(s, Bias) and i > min(hides, default=i) for i, s in enumerate(spec.steps))


def _shared(spec: Attention) -> bool:
    """Whether q, k or v is shared over a batch dim other than the innermost one, of query heads with the same keys. That of
    packed sequences is none of heads."""
    q, k, v = spec.broadcast
    heads = spec.batch[1:] if spec.packed else spec.batch
    return bool(q) or k != v or not set(k) <= {*heads[-1:]}
