"""What kernels need to know of a spec's score program, whatever language it is written in."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from attnfuse import expr
from attnfuse.expr import Algebra, Apply, Const, Expr, Index, Linear, Load
from attnfuse.kernels.fills import hiding
from attnfuse.kernels.mask_ranges import Cut, cut, orders
from attnfuse.spec import AddFill, Attention, Bias, Clamp, Ramp, ReplaceFill, Scale, Softcap, Step, Tanh

#: No query or key index is larger: sums with constants below it fit 32 bits.
LONGEST = 2**29
#: Below it, differences of indices are at most LITTLE; there may be as many queries or keys in modules that are for `far`.
NEARBY = 2**21
#: Integers up to it are made floats by an addition.
LITTLE = 2**22
#: Factors that do not make scores of products that models have pass 2^30.
_NEAR = 2**10


@dataclass(frozen=True)
class Traits:
    """What the kernels need to know of a spec at compile time.

    hides     there are hiding fills
    lower     some hiding fill has a first key, so that tiles before the full ones need their masks
    checked   tiles are looked at before they are computed
    doubt     as in Hiding; -inf where no row needs a second look
    fills     weights are filled with 0
    near      no maximum of a row is so far from 0 that its product with log2(e) must not be rounded: one multiply-add takes it
              from a score
    merged    one number says of a row what its weights are but for their scores: far from 0, float32 would lose the sum's
              logarithm, and a row that is NaN and counts as 0 has no such number
    ragged    full tiles may have queries behind the last one
    factor    what the maximum has to be multiplied with, as scores are not
    slope     the same for the gradient of q @ k
    """

    hides: bool
    lower: bool
    checked: bool
    doubt: float
    fills: bool
    near: bool
    merged: bool
    ragged: bool
    factor: float
    slope: float


@functools.lru_cache(maxsize=512)
def traits(spec: Attention) -> Traits:
    found = hiding(spec)
    near, (left, factor) = _near(spec), left_over(spec)
    return Traits(
        hides=bool(found.steps),
        lower=any("from" in x.bounds or "from_q" in x.bounds for x in cuts(spec).values()),
        checked=bool(looked_at(spec)),
        doubt=found.doubt,
        fills=any(isinstance(s, ReplaceFill) for s in spec.weight_steps),
        near=near,
        merged=near and spec.hidden != "nan_to_zero" and not any(isinstance(s, Ramp) for s in spec.steps),
        ragged=_ragged(spec),
        factor=factor,
        slope=factor if left >= 0 and isinstance(spec.steps[left], Scale) else 1.0,
    )


def _near(spec: Attention) -> bool:
    """As Traits.near. From 2^30 on, which only a fill, an added operand or a huge factor reaches, rounding moves exp2 beyond
    float32; from 2^27 on it moves weights beyond float16. A ramp stays below as long as its factor is no fill, which it is not
    where the number is one of distances or places."""
    if not spec.qk_dtype == spec.v_dtype == "bfloat16" or spec.sink is not None or spec.softmax == "unshifted":
        return False
    most = 1.0
    for step in spec.steps:
        if isinstance(step, (ReplaceFill, AddFill)):
            if step.value != -math.inf:
                return False
        elif isinstance(step, Scale) and step.operand is None:
            most *= max(abs(step.value), 1.0)
        elif isinstance(step, Ramp) and _is_place(step.number) and abs(step.alpha) <= _NEAR:
            pass
        elif isinstance(step, (Softcap, Tanh)):
            most *= max(abs(step.cap), 1.0) if isinstance(step, Softcap) else 1.0
        else:
            return False
    return most <= _NEAR


def _is_place(number: Expr) -> bool:
    """Whether a number is made of the indices of queries and keys by sums, and what keeps one of two."""
    return all(
        isinstance(x, (Const, Index, Linear)) or (isinstance(x, Apply) and x.op in ("abs", "min", "max"))
        for x in expr.walk(number)
    )


def left_over(spec: Attention) -> tuple[int, float]:
    """(the step whose positive factor the kernels make good, the factor), or (-1, 1.0): a scale or a softcap that only
    infinite fills follow, which no factor changes, or ramps, which are divided by it. A softcap is left its cap, a scale goes
    whole."""
    steps = [s for s in spec.steps if not isinstance(s, (ReplaceFill, AddFill))]
    ordered = spec.steps[: len(steps)] == tuple(steps)
    while steps and isinstance(steps[-1], Ramp):
        steps.pop()
    last = len(steps) - 1
    if _near(spec) and steps and ordered:
        step = steps[last]
        factor = step.cap if isinstance(step, Softcap) else step.value if isinstance(step, Scale) else 1.0
        if 0.0 < factor < math.inf and (isinstance(step, Softcap) or last == 0):
            return last, factor
    return -1, 1.0


def by_columns(spec: Attention, operand: int) -> bool:
    """Whether the gradient of an operand is summed along the queries of a key tile: it has keys and no queries."""
    return operand not in spec.tables and spec.operands[operand].dims[-2:] == ("1", "K")


def looked_at(spec: Attention) -> list[Expr]:
    """What is left, besides bounds on the key, of masks that hide and that bounds on a tile say something of."""
    made = cuts(spec)
    return [rest for i in looked_at_steps(spec) if (rest := made[i].rest) is not None]


def looked_at_steps(spec: Attention) -> list[int]:
    """The fills that hide and of which something besides bounds on the key can be told for a tile."""
    made = cuts(spec)
    rests = {i: made[i].rest for i in sorted(hiding(spec).steps)}
    return [i for i, rest in rests.items() if rest is not None and tells(spec, rest)]


def documents(spec: Attention) -> list[tuple[int, int]]:
    """Integers that a key and a query must have in common, as operands of keys and of queries, in masks that hide."""
    found: dict[tuple[int, int], None] = {}
    for rest in looked_at(spec):
        for order in orders(rest, functools.partial(uses, spec))[0]:
            sides = order.key, order.query
            if order.how == "eq" and all(_is_own(x) for x in sides):
                found[order.key.operand, order.query.operand] = None  # type: ignore[attr-defined]
    return list(found)


def _is_own(e: Expr) -> bool:
    """Whether e is an integer of the query's or the key's own."""
    return isinstance(e, Load) and e.dtype != "bool" and e.row is None and e.col is None


#: Bounds on a tile: a number, or None for one that is found out there.
_Ends = tuple[int | None, int | None]


def tells(spec: Attention, mask: Expr) -> bool:
    """Whether bounds of a mask on a tile say anything, as those of a load for each query and key do not."""
    ends = _ends(spec, mask)
    return ends is not None and None in ends


def reads_each(spec: Attention, e: Load) -> bool:
    """Whether it is read for each query and key, or anywhere, so that nothing is known of it on a tile."""
    return e.row is not None or e.col is not None or spec.operands[e.operand].dims[-2:] == ("Q", "K")


def may_be_its_negative(e: Apply) -> bool:
    """Whether e is the abs of the least integer, which is that itself."""
    return e.op == "abs" and Algebra(LONGEST + 1, LONGEST + 1).bounds(e.args[0])[0] <= expr.INT64[0]


def is_exact(e: Linear) -> bool:
    """Whether the sum wraps for no indices of tensors that a kernel takes."""
    return Algebra(LONGEST + 1, LONGEST + 1).is_exact(e)


def _ends(spec: Attention, e: Expr) -> _Ends | None:
    """Bounds as a body of intervals (bodies.py) has them; None where nothing is known of e."""
    if isinstance(e, Const):
        return int(e.value), int(e.value)
    if isinstance(e, Load) and reads_each(spec, e):
        return (0, 1) if e.dtype == "bool" else None
    if isinstance(e, (Index, Load)):
        return None, None
    args = [_ends(spec, x) for x in e.parts]
    if isinstance(e, Linear):
        return None if None in args or not is_exact(e) else (None, None)
    assert isinstance(e, Apply)
    if e.op in ("and", "or"):
        known = [x or (0, 1) for x in args]
        low, high = ({x[which] for x in known} for which in (0, 1))
        return low.pop() if len(low) == 1 else None, high.pop() if len(high) == 1 else None
    if may_be_its_negative(e):
        return None
    if None in args:
        return (0, 1) if e.type == "bool" else None
    return args[0] if e.op == "int" else (None, None)


def limits(spec: Attention) -> list[Expr]:
    """The bounds on keys that masks have."""
    return [x for made in cuts(spec).values() for x in made.bounds.values()]


def indices(spec: Attention) -> list[tuple[int, int, Expr]]:
    """(operand, 0 for its row or 1 for its column, index) of what is read at indices of its own."""
    reads: list[Load | Bias] = [*spec.loads, *(s for s in spec.steps if isinstance(s, Bias))]
    return [(x.operand, d, own) for x in reads for d, own in enumerate((x.row, x.col)) if own is not None]


def approximable(spec: Attention) -> bool:
    """Whether there is a tanh that may be the device's own: bfloat16 rounds its result four times as much, and of other dtypes it
    would be the largest error."""
    return spec.qk_dtype == "bfloat16" and any(isinstance(step, (Softcap, Tanh)) for step in spec.steps)


def cuts(spec: Attention) -> dict[int, Cut]:
    """The fills' masks, by step."""
    uniform = frozenset(i for i, o in enumerate(spec.operands) if o.dims[-2:] == ("1", "1") and i not in spec.tables)
    return {i: cut(s.keep, uniform) for i, s in enumerate(spec.steps) if isinstance(s, (ReplaceFill, AddFill))}


def is_wide(e: Linear) -> bool:
    """Whether the sum, or a part of it, may leave int32 for indices of tensors that a kernel takes."""
    index = Algebra(LONGEST + 1, LONGEST + 1)
    reach = abs(e.const) + sum(abs(c) * max(map(abs, index.bounds(t))) for c, t in e.terms)
    return reach >= 2**31


def is_little(e: Expr) -> bool:
    """Whether e is at most LITTLE in magnitude for indices below NEARBY."""
    low, high = Algebra(NEARBY, NEARBY).bounds(e)
    return low >= -LITTLE and high <= LITTLE


def uses(spec: Attention, e: Expr) -> set[str]:
    """Which of q and k the value of e depends on."""
    found: set[str] = set()
    for x in expr.walk(e):
        if isinstance(x, Index):
            found.add(x.axis)
        elif isinstance(x, Load):
            dims = spec.operands[x.operand].dims
            found |= {"q"} if x.row is None and dims[-2] != "1" else set()
            found |= {"k"} if x.col is None and dims[-1] != "1" else set()
    return found


def unmasked(spec: Attention, step: Bias, inside: bool) -> bool:
    """Whether a bias has an element for each query and key that exists, as far as is known here; inside: as `source` takes it."""
    return not spec.packed and (inside or (step.row is None and step.col is None))


def _ragged(spec: Attention) -> bool:
    """Whether a tile is full to `score` whatever queries exist: nothing is added that is read for each of them."""
    biases = [s for s in spec.steps if isinstance(s, Bias) and unmasked(spec, s, inside=True)]
    reads = [Load(s.operand, spec.operands[s.operand].dtype, s.row, s.col) for s in biases]
    return not any("q" in uses(spec, x) for x in reads)


def saves(step: Step) -> bool:
    """Whether the gradient of a step needs its input or result."""
    return isinstance(step, (Softcap, Tanh, Clamp)) or (isinstance(step, Scale) and step.operand is not None)
