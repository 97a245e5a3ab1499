"""Expressions over the index of a query (q) and of a key (k): what masks and table indices are made of.

An expression is a bool or an integer; integers are those of int64, whose sums and products wrap. `Algebra` has the constructors.
They bring what they make to a normal form, so that equal masks in different spellings become equal expressions: sums are
`Linear`, comparisons 'le' and 'eq' of two sums with positive coefficients, the constant on the right; negation stands at leaves
only; what the sizes decide is decided. A rule that holds of numbers but not of sums that wrap is used only where none can.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from attnfuse import reasons
from attnfuse.reasons import ReasonError

Type = Literal["bool", "int", "float"]

Interval = tuple[float, float]
UNBOUNDED: Interval = (-math.inf, math.inf)
INT64: Interval = (-(2**63), 2**63 - 1)
#: Integer dtypes and the values they hold.
_RANGES: dict[str, Interval] = {
    "bool": (0, 1),
    "uint8": (0, 255),
    "uint16": (0, 2**16 - 1),
    "uint32": (0, 2**32 - 1),
    "int8": (-128, 127),
    "int16": (-(2**15), 2**15 - 1),
    "int32": (-(2**31), 2**31 - 1),
    "int64": INT64,
}
#: No dim has more elements, so that int32 holds every index.
LONGEST = 2**31 - 1


def type_of(dtype: str) -> Type:
    """What values of a dtype are. Raises NotExpressible for complex numbers and for integers that int64 does not hold."""
    if dtype in _RANGES:
        return "bool" if dtype == "bool" else "int"
    if "float" not in dtype:
        raise NotExpressible(reasons.MASK_DTYPE(dtype=dtype))
    return "float"


def range_of(dtype: str) -> Interval:
    """The least and the greatest value that a dtype holds."""
    return _RANGES.get(dtype, UNBOUNDED)


def within(inner: Interval, outer: Interval = INT64) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1]


class Expr:
    """Base of all expressions. `type` is that of its values."""

    kind: ClassVar[str]
    type: Type

    @property
    def bounds(self) -> Interval:
        """Least and greatest value, as far as the expression itself tells."""
        return UNBOUNDED

    @property
    def parts(self) -> tuple[Expr, ...]:
        """The expressions it is made of."""
        return ()

    def rebuilt(self, parts: Sequence[Expr], algebra: Algebra) -> Expr:
        """The same of other parts, in normal form."""
        return self


@dataclass(frozen=True)
class Const(Expr):
    """A number. Readers also use floating ones; those never get into a spec."""

    kind: ClassVar[str] = "number"
    value: float
    type: Type = "int"

    @property
    def bounds(self) -> Interval:
        return (self.value, self.value)


@dataclass(frozen=True)
class Index(Expr):
    """The index of the query, or of the key."""

    kind: ClassVar[str] = "index"
    type: ClassVar[Type] = "int"  # type: ignore[misc]
    axis: Literal["q", "k"]


@dataclass(frozen=True)
class Load(Expr):
    """An element of operand [*batch, rows, columns]: at (row, col), or where they are None at (q, k), 0 in dims of size 1."""

    kind: ClassVar[str] = "load"
    operand: int
    dtype: str
    row: Expr | None = None
    col: Expr | None = None

    @property
    def type(self) -> Type:  # type: ignore[override]
        return type_of(self.dtype)

    @property
    def bounds(self) -> Interval:
        return range_of(self.dtype)

    @property
    def parts(self) -> tuple[Expr, ...]:
        return tuple(x for x in (self.row, self.col) if x is not None)

    def rebuilt(self, parts: Sequence[Expr], algebra: Algebra) -> Expr:
        rest = iter(parts)
        row = next(rest) if self.row is not None else None
        return Load(self.operand, self.dtype, row, next(rest) if self.col is not None else None)


@dataclass(frozen=True)
class Linear(Expr):
    """The sum of coefficient * expression over `terms`, plus const."""

    kind: ClassVar[str] = "linear"
    type: ClassVar[Type] = "int"  # type: ignore[misc]
    terms: tuple[tuple[int, Expr], ...]
    const: int = 0

    @property
    def parts(self) -> tuple[Expr, ...]:
        return tuple(t for _, t in self.terms)

    def rebuilt(self, parts: Sequence[Expr], algebra: Algebra) -> Expr:
        out: Expr = Const(self.const)
        for (c, _), x in zip(self.terms, parts, strict=True):
            out = algebra.add(out, x, c)
        return out


#: min, max, abs, floordiv (by a positive constant), mod likewise, where: integers. le, eq, ne: two integers to a bool.
#: and, or (any number), not (of a load, or of an 'le' of sums that may wrap): bools. int: a bool as 0 or 1.
Op = Literal["min", "max", "abs", "floordiv", "mod", "where", "le", "eq", "ne", "and", "or", "not", "int"]


@dataclass(frozen=True)
class Apply(Expr):
    """An operation on expressions."""

    kind: ClassVar[str] = "apply"
    op: Op
    args: tuple[Expr, ...]
    type: Type = "bool"

    @property
    def parts(self) -> tuple[Expr, ...]:
        return self.args

    def rebuilt(self, parts: Sequence[Expr], algebra: Algebra) -> Expr:
        return _CONSTRUCTORS[self.op](algebra, *parts)


TRUE, FALSE = Const(1, "bool"), Const(0, "bool")
Q, K = Index("q"), Index("k")


class NotExpressible(ReasonError):
    """Cannot be expressed; the value stays a tensor."""


def walk(e: Expr) -> Iterator[Expr]:
    """e and everything inside it."""
    yield e
    for part in e.parts:
        yield from walk(part)


def loads(e: Expr) -> list[Load]:
    return [x for x in walk(e) if isinstance(x, Load)]


def _order(e: Expr) -> tuple[int, str]:
    rank = 0 if e == K else 1 if e == Q else 2
    return rank, repr(e)


def sum_of(e: Expr) -> dict[Expr, int]:
    """The terms of a sum with their coefficients, without the constant."""
    return dict(_lin(e)[0])


def _lin(e: Expr) -> tuple[dict[Expr, int], int]:
    if isinstance(e, Const):
        return {}, int(e.value)
    if isinstance(e, Linear):
        return {t: c for c, t in e.terms}, e.const
    return {e: 1}, 0


def _wrapped(n: int) -> int:
    """The number that int64 has for n."""
    return (n + 2**63) % 2**64 - 2**63


def _sum(terms: dict[Expr, int], const: int) -> Expr:
    """The sum as int64 has it."""
    const = _wrapped(const)
    kept = sorted(((_wrapped(c), t) for t, c in terms.items() if _wrapped(c)), key=lambda ct: _order(ct[1]))
    if not kept:
        return Const(const)
    if len(kept) == 1 and kept[0][0] == 1 and const == 0:
        return kept[0][1]
    return Linear(tuple(kept), const)


@dataclass(frozen=True)
class Algebra:
    """Constructors of expressions. Q and K: the numbers of queries and keys, None where they are not known."""

    Q: int | None = None
    K: int | None = None

    # -- bounds

    def bounds(self, e: Expr) -> Interval:
        """Least and greatest value of an integer or bool expression."""
        if isinstance(e, Index):
            size = self.Q if e.axis == "q" else self.K
            return (0, LONGEST if size is None else max(size - 1, 0))
        if isinstance(e, Linear):
            found = self._range(*_lin(e))
            return found if within(found) else INT64
        if isinstance(e, Apply):
            return self._bounds_of(e.op, [self.bounds(a) for a in e.args if a.type != "float"])
        return e.bounds

    def is_exact(self, e: Expr) -> bool:
        """Whether e is the number that its sum comes to: no sum in it that may wrap."""
        return not isinstance(e, Linear) or within(self._range(*_lin(e)))

    def _range(self, terms: dict[Expr, int], const: int) -> Interval:
        """Interval of a sum of numbers, which may lie outside of int64."""
        low = high = const
        for t, c in terms.items():
            a, b = self.bounds(t)
            low += c * (a if c > 0 else b)  # type: ignore[assignment]
            high += c * (b if c > 0 else a)  # type: ignore[assignment]
        return low, high

    def terms(self, e: Expr) -> tuple[dict[Expr, int], int]:
        """The terms of a sum with their coefficients, and the constant."""
        return _lin(e)

    def difference(self, a: Expr, b: Expr) -> tuple[dict[Expr, int], int] | None:
        """a - b as a sum of numbers; None where a sum of a or b may wrap."""
        if not (self.is_exact(a) and self.is_exact(b)):
            return None
        terms, const = _lin(a)
        more, extra = _lin(b)
        for t, c in more.items():
            terms[t] = terms.get(t, 0) - c
        return {t: c for t, c in terms.items() if c}, const - extra

    def _bounds_of(self, op: str, args: list[Interval]) -> Interval:
        if op == "min":
            return min(a for a, _ in args), min(b for _, b in args)
        if op == "max":
            return max(a for a, _ in args), max(b for _, b in args)
        if op == "abs":
            a, b = args[0]
            if a <= INT64[0]:
                # its negative is itself
                return INT64
            return (0 if a <= 0 <= b else min(abs(a), abs(b))), max(abs(a), abs(b))
        if op == "floordiv":
            (a, b), (c, _) = args
            return a // c, b // c
        if op == "mod":
            return 0, args[1][0] - 1
        if op == "where" and len(args) == 3:
            return min(args[1][0], args[2][0]), max(args[1][1], args[2][1])
        return (0, 1) if op in ("le", "eq", "ne", "and", "or", "not", "int") else UNBOUNDED

    # -- integers

    def add(self, a: Expr, b: Expr, times: int = 1) -> Expr:
        """a + times * b."""
        terms, const = _lin(a)
        more, extra = _lin(b)
        for t, c in more.items():
            terms[t] = terms.get(t, 0) + c * times
        return _sum(terms, const + times * extra)

    def sub(self, a: Expr, b: Expr) -> Expr:
        return self.add(a, b, -1)

    def mul(self, a: Expr, b: Expr) -> Expr:
        for x, y in ((a, b), (b, a)):
            if isinstance(x, Const):
                return self.add(Const(0), y, int(x.value))
        raise NotExpressible(reasons.MASK_INDEX_PRODUCT())

    def floordiv(self, a: Expr, b: Expr) -> Expr:
        quotient, rest, by = self._divided(a, b)
        low, high = self.bounds(rest)
        if low >= 0 and high < by:
            return quotient
        return self.add(quotient, Apply("floordiv", (rest, Const(by)), "int"))

    def mod(self, a: Expr, b: Expr) -> Expr:
        _, rest, by = self._divided(a, b)
        low, high = self.bounds(rest)
        return rest if low >= 0 and high < by else Apply("mod", (rest, Const(by)), "int")

    def _divided(self, a: Expr, b: Expr) -> tuple[Expr, Expr, int]:
        """a = quotient * by + rest, with all in the quotient that is surely divisible."""
        if not isinstance(b, Const) or b.value <= 0:
            raise NotExpressible(reasons.MASK_DIVISION())
        by = int(b.value)
        terms, const = _lin(a)
        whole = {t: c // by for t, c in terms.items() if c % by == 0}, const // by
        rest = {t: c for t, c in terms.items() if c % by}, const % by
        if not (self.is_exact(a) and within(self._range(*whole)) and within(self._range(*rest))):
            return Const(0), a, by
        return _sum(*whole), _sum(*rest), by

    def minimum(self, a: Expr, b: Expr) -> Expr:
        return self._least(a, b, 1, "min")

    def maximum(self, a: Expr, b: Expr) -> Expr:
        return self._least(a, b, -1, "max")

    def _least(self, a: Expr, b: Expr, sign: int, op: Literal["min", "max"]) -> Expr:
        """The least of sign * a and sign * b, times sign."""
        difference = self.difference(a, b)
        if difference is not None:
            low, high = self._range(*difference)
            if (high if sign > 0 else -low) <= 0:
                return a
            if (low if sign > 0 else -high) >= 0:
                return b
        return Apply(op, tuple(sorted((a, b), key=_order)), "int")

    def abs(self, a: Expr) -> Expr:
        low, high = self.bounds(a)
        if low >= 0:
            return a
        negative = self.mul(a, Const(-1))
        if high <= 0:
            return negative
        # |x| and |-x| look the same
        return Apply("abs", (min(a, negative, key=lambda e: (_leading(e) < 0, _order(e))),), "int")

    # -- bools

    def compare(self, op: str, a: Expr, b: Expr) -> Expr:
        """op: lt, le, gt, ge, eq, ne."""
        if op == "ne":
            return self.not_(self.compare("eq", a, b))
        if op in ("gt", "ge"):
            return self.compare("lt" if op == "gt" else "le", b, a)
        if op == "lt":
            return self._below(a, b)
        for x, y, flipped in ((a, b, False), (b, a, True)):
            if isinstance(x, Apply) and x.op in ("where", "int"):
                arms = x.args[1:] if x.op == "where" else (Const(1), Const(0))
                if all(isinstance(arm, Const) for arm in arms) or isinstance(y, Const):
                    yes, no = (self.compare(op, y, arm) if flipped else self.compare(op, arm, y) for arm in arms)
                    return self.where(x.args[0], yes, no)
        return self._at_most(a, b) if op == "le" else self._equal(a, b)

    def _below(self, a: Expr, b: Expr) -> Expr:
        """a < b, as a comparison by <= where 1 can be added to one side."""
        if self.is_exact(a) and self.bounds(a)[1] < INT64[1]:
            return self.compare("le", self.add(a, Const(1)), b)
        if self.is_exact(b) and self.bounds(b)[0] > INT64[0]:
            return self.compare("le", a, self.add(b, Const(-1)))
        opposite = self.compare("le", b, a)
        if isinstance(opposite, Apply) and opposite.op == "le":
            return Apply("not", (opposite,))
        return self.not_(opposite)

    def _at_most(self, a: Expr, b: Expr) -> Expr:
        difference = self.difference(a, b)
        if difference is None:
            return Apply("le", (a, b))
        terms, const = difference
        taken_apart = self._le_apart(terms, const)
        if taken_apart is not None:
            return taken_apart
        divisor = math.gcd(*terms.values()) if terms else 1
        terms, const = {t: c // divisor for t, c in terms.items()}, -(-const // divisor)
        low, high = self._range(terms, const)
        if high <= 0:
            return TRUE
        if low > 0:
            return FALSE
        positive = {t: c for t, c in terms.items() if c > 0}
        negative = {t: -c for t, c in terms.items() if c < 0}
        # neither side may wrap, on whichever of them the constant has its place
        for left, right in (((positive, 0), (negative, -const)), ((positive, const), (negative, 0))):
            if within(self._range(*left)) and within(self._range(*right)):
                return Apply("le", (_sum(*left), _sum(*right)))
        return Apply("le", (a, b))

    def _equal(self, a: Expr, b: Expr) -> Expr:
        difference = self.difference(a, b)
        if difference is None:
            # equal numbers stay equal when the same is added to both, wrapped or not
            terms, const = _lin(self.sub(a, b))
            if not terms:
                return FALSE if const else TRUE
        else:
            terms, const = difference
            divisor = math.gcd(*terms.values()) if terms else 1
            if const % divisor:
                return FALSE
            terms, const = {t: c // divisor for t, c in terms.items()}, const // divisor
            low, high = self._range(terms, const)
            if low > 0 or high < 0:
                return FALSE
            if low == high == 0:
                return TRUE
            if (low == 0 or high == 0) and within((low, high)):
                # nothing is below the least value, so that equal to it is the same as not above it
                return self.compare("le", *((_sum(terms, const), Const(0))[:: 1 if low == 0 else -1]))
        if _leading(_sum(terms, const)) < 0:
            terms, const = {t: -c for t, c in terms.items()}, -const
        left = _sum({t: c for t, c in terms.items() if c > 0}, 0)
        right = _sum({t: -c for t, c in terms.items() if c < 0}, -const)
        return Apply("eq", (left, right))

    def _le_apart(self, terms: dict[Expr, int], const: int) -> Expr | None:
        """sum <= 0 without the abs, min or max that is one of its terms."""
        for t, c in terms.items():
            if abs(c) != 1 or not isinstance(t, Apply) or t.op not in ("abs", "min", "max"):
                continue
            if t.op == "abs":
                # abs(x) is the larger of x and -x
                parts = [_lin(t.args[0])]
                parts.append(({x: -y for x, y in parts[0][0].items()}, -parts[0][1]))
            else:
                parts = [_lin(x) for x in t.args]
            sums: list[tuple[dict[Expr, int], int]] = []
            for more, extra in parts:
                sum_ = {x: y for x, y in terms.items() if x != t}
                for x, y in more.items():
                    sum_[x] = sum_.get(x, 0) + c * y
                sums.append((sum_, const + c * extra))
            if not all(self.is_exact(x) for x in t.args) or not all(within(self._range(*x)) for x in (*parts, *sums)):
                continue
            found = [self.compare("le", _sum(*x), Const(0)) for x in sums]
            return self.and_(*found) if (c > 0) == (t.op != "min") else self.or_(*found)
        return None

    def not_(self, a: Expr) -> Expr:
        if isinstance(a, Const):
            return FALSE if a.value else TRUE
        if isinstance(a, Apply):
            if a.op == "not":
                return a.args[0]
            if a.op == "and":
                return self.or_(*(self.not_(x) for x in a.args))
            if a.op == "or":
                return self.and_(*(self.not_(x) for x in a.args))
            if a.op == "le":
                return self.compare("lt", a.args[1], a.args[0])
            if a.op in ("eq", "ne"):
                return Apply("ne" if a.op == "eq" else "eq", a.args)
        return Apply("not", (a,))

    def and_(self, *args: Expr) -> Expr:
        return self._joined("and", args)

    def or_(self, *args: Expr) -> Expr:
        return self._joined("or", args)

    def _joined(self, op: Literal["and", "or"], args: Iterable[Expr]) -> Expr:
        neutral, absorbing = (TRUE, FALSE) if op == "and" else (FALSE, TRUE)
        found: dict[Expr, None] = {}
        for arg in args:
            for part in arg.args if isinstance(arg, Apply) and arg.op == op else (arg,):
                if part == absorbing:
                    return absorbing
                if part != neutral:
                    found[part] = None
        kept = self._tightest(op, list(found))
        if any(self.not_(x) in kept for x in kept):
            return absorbing
        # x & (x | y) is x
        dual = "or" if op == "and" else "and"
        kept = [
            x for x in kept if not (isinstance(x, Apply) and x.op == dual and any(y in kept for y in x.args if y != x))
        ]
        if not kept:
            return neutral
        return kept[0] if len(kept) == 1 else Apply(op, tuple(sorted(kept, key=_order)))

    def _tightest(self, op: str, args: list[Expr]) -> list[Expr]:
        """Of comparisons that differ in their constant alone, the one that matters; FALSE or TRUE where two are at odds."""
        best: dict[tuple[tuple[Expr, int], ...], tuple[int, Expr]] = {}
        rest = []
        for e in args:
            difference = self.difference(*e.args) if isinstance(e, Apply) and e.op == "le" else None
            if difference is None:
                rest.append(e)
                continue
            terms, const = difference
            key = tuple(sorted(terms.items(), key=lambda tc: _order(tc[0])))
            old = best.get(key)
            # sum + const <= 0 says more the greater the constant is
            if old is None or (const > old[0]) == (op == "and"):
                best[key] = (const, e)
        for key, (const, _) in best.items():
            opposite = best.get(tuple((t, -c) for t, c in key))
            if opposite is not None:
                # x <= -const and -opposite <= ... : no integer is in between
                if op == "and" and const + opposite[0] > 0:
                    return [FALSE]
                if op == "or" and const + opposite[0] <= 1:
                    return [TRUE]
        return [e for _, e in best.values()] + rest

    def where(self, c: Expr, a: Expr, b: Expr) -> Expr:
        if isinstance(c, Const):
            return a if c.value else b
        # a choice by the same condition inside is made already
        opposite = self.not_(c)
        a, b = _decided(a, c, opposite, True), _decided(b, c, opposite, False)
        if a == b:
            return a
        if a.type == "bool" and b.type == "bool":
            return self.or_(self.and_(c, a), self.and_(self.not_(c), b))
        pin = self._pinned(c)
        if pin is not None and substitute(b, {pin[0]: Const(pin[1])}, self) == a:
            return b
        if isinstance(c, Apply) and c.op in ("not", "ne"):
            return self.where(self.not_(c), b, a)
        if isinstance(b, Apply) and b.op == "where":
            if b.args[1] == a:
                return self.where(self.or_(c, b.args[0]), a, b.args[2])
            if b.args[2] == a:
                return self.where(self.and_(self.not_(c), b.args[0]), b.args[1], a)
        if isinstance(a, Apply) and a.op == "where":
            if a.args[1] == b:
                return self.where(self.and_(c, self.not_(a.args[0])), a.args[2], b)
            if a.args[2] == b:
                return self.where(self.and_(c, a.args[0]), a.args[1], b)
        if (a, b) == (Const(1), Const(0)):
            return self.int_(c)
        return Apply("where", (c, a, b), a.type)

    def _pinned(self, c: Expr) -> tuple[Expr, int] | None:
        """(x, n) where c says that x is n."""
        if isinstance(c, Apply) and c.op in ("le", "eq") and isinstance(c.args[1], Const):
            x, n = c.args[0], int(c.args[1].value)
            if not isinstance(x, Linear) and (c.op == "eq" or self.bounds(x)[0] == n):
                return x, n
        return None

    def int_(self, a: Expr) -> Expr:
        """A bool as 0 or 1."""
        return Const(int(a.value)) if isinstance(a, Const) else Apply("int", (a,), "int")

    def truth(self, a: Expr) -> Expr:
        """An integer as a bool."""
        return a if a.type == "bool" else self.compare("ne", a, Const(0))


def _decided(e: Expr, c: Expr, opposite: Expr, holds: bool) -> Expr:
    """e where c holds, or does not."""
    while isinstance(e, Apply) and e.op == "where" and e.args[0] in (c, opposite):
        e = e.args[1] if (e.args[0] == c) == holds else e.args[2]
    return e


def _leading(e: Expr) -> int:
    return e.terms[0][0] if isinstance(e, Linear) else 1


_CONSTRUCTORS: dict[str, Callable[..., Expr]] = {
    "min": Algebra.minimum,
    "max": Algebra.maximum,
    "abs": Algebra.abs,
    "floordiv": Algebra.floordiv,
    "mod": Algebra.mod,
    "where": Algebra.where,
    "le": lambda g, a, b: g.compare("le", a, b),
    "eq": lambda g, a, b: g.compare("eq", a, b),
    "ne": lambda g, a, b: g.compare("ne", a, b),
    "and": Algebra.and_,
    "or": Algebra.or_,
    "not": Algebra.not_,
    "int": Algebra.int_,
}


def transform(e: Expr, leaf: Callable[[Expr], Expr | None], algebra: Algebra) -> Expr:
    """e with every part replaced for which `leaf` gives something, from the outside in, and brought to normal form."""
    new = leaf(e)
    if new is not None:
        return new
    return e.rebuilt([transform(x, leaf, algebra) for x in e.parts], algebra) if e.parts else e


def substitute(e: Expr, values: dict[Expr, Expr], algebra: Algebra) -> Expr:
    return transform(e, values.get, algebra)


def causal(offset: int = 0) -> Expr:
    """Key k is kept for query q where k <= q + offset. With Q != K, offset 0 is the top-left alignment, K - Q the other one."""
    return Algebra().compare("le", K, Algebra().add(Q, Const(offset)))


def window(width: int) -> Expr:
    """Key k is kept for query q where k > q - width: with causal(), the query's own key and the width - 1 before it."""
    return Algebra().compare("gt", K, Algebra().add(Q, Const(-width)))


def dense(operand: int, dtype: str = "bool", inverted: bool = False) -> Expr:
    """Kept where operand [*batch, Q, K] is nonzero; where it is zero if inverted."""
    algebra = Algebra()
    kept = algebra.truth(Load(operand, dtype))
    return algebra.not_(kept) if inverted else kept


def documents(of_queries: int, of_keys: int, dtype: str = "int64") -> Expr:
    """Kept where operands [*batch, Q, 1] and [*batch, 1, K] are equal."""
    return Algebra().compare("eq", Load(of_queries, dtype), Load(of_keys, dtype))


# -- what an expression is on tensors


def evaluate(e: Expr, operands: Sequence[torch.Tensor], q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The values of e at query indices q [Q, 1] and key indices k [1, K]: [*batch, Q, K], or what broadcasts to it."""

    def run(x: Expr) -> torch.Tensor:
        if isinstance(x, Const):
            return torch.tensor(bool(x.value) if x.type == "bool" else int(x.value), device=q.device)
        if isinstance(x, Index):
            return q if x.axis == "q" else k
        if isinstance(x, Load):
            return load(x, operands, q, k)
        if isinstance(x, Linear):
            total = torch.tensor(x.const, device=q.device)
            for c, t in x.terms:
                total = total + c * run(t).to(torch.int64)
            return total
        assert isinstance(x, Apply)
        return _RUN[x.op](*(run(a) for a in x.args))

    return run(e)


def load(e: Load, operands: Sequence[torch.Tensor], q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The elements of the operand that e names, [*batch, Q, K] or what broadcasts to it."""
    x = operands[e.operand]
    if not (x.is_floating_point() or x.dtype == torch.bool):
        # a number without dims takes the dtype of the tensor beside it: uint8 % 300 would be uint8 % 44
        x = x.to(torch.int64)
    if e.row is None and e.col is None:
        return x
    # an index of its own may be anything: taken once per row and column, in the operand's batch dims
    row = evaluate(e.row, operands, q, k) if e.row is not None else (q if x.shape[-2] > 1 else torch.zeros_like(q))
    col = evaluate(e.col, operands, q, k) if e.col is not None else (k if x.shape[-1] > 1 else torch.zeros_like(k))
    # one number for all, whatever batch dims it has
    row, col = (i.reshape(i.shape[-2:]) if i.numel() == i.shape[-2:].numel() and i.dim() > 2 else i for i in (row, col))
    row, col = torch.broadcast_tensors(row, col)
    if row.dim() > 2:
        raise NotExpressible(reasons.MASK_INDEX_OF_BATCH())
    return x[..., row, col]


_RUN: dict[str, Callable[..., torch.Tensor]] = {
    "min": torch.minimum,
    "max": torch.maximum,
    "abs": torch.abs,
    "floordiv": lambda a, b: torch.div(a, b, rounding_mode="floor"),
    "mod": torch.remainder,
    "where": torch.where,
    "le": torch.le,
    "eq": torch.eq,
    "ne": torch.ne,
    "and": lambda *x: _reduced(torch.logical_and, x),
    "or": lambda *x: _reduced(torch.logical_or, x),
    "not": torch.logical_not,
    "int": lambda a: a.to(torch.int64),
}


def _reduced(op: Callable[..., torch.Tensor], args: Sequence[torch.Tensor]) -> torch.Tensor:
    total = args[0]
    for x in args[1:]:
        total = op(total, x)
    return total


# -- words


class Words:
    """Says masks. dims: of each operand, the last two; names: what each is called, such as 'from attention_mask'."""

    def __init__(self, dims: Sequence[Sequence[str]], names: Sequence[str]) -> None:
        self.dims = [(d[-2], d[-1]) for d in dims]
        self.names = names

    def say(self, e: Expr) -> str:
        """Such as 'causal & window 256 & key padding from attention_mask'."""
        if isinstance(e, Const):
            return "always" if e.value else "never"
        if isinstance(e, Apply) and e.op in ("and", "or"):
            parts = sorted((self.say(x) for x in e.args), key=_place)
            sign, other = (" & ", " | ") if e.op == "and" else (" | ", " & ")
            return sign.join(f"({p})" if other in p else p for p in parts)
        return self._of_one(e) or self._compared(e) or text(e)

    def _of_one(self, e: Expr) -> str | None:
        """A mask that is an operand, nonzero or zero."""
        found = loads(e)
        if len(found) != 1 or found[0].row is not None or found[0].col is not None:
            return None
        algebra = Algebra()
        kept = algebra.truth(found[0])
        if e not in (kept, algebra.not_(kept)):
            return None
        what = {("1", "K"): "key padding", ("Q", "1"): "query padding"}.get(self.dims[found[0].operand], "mask")
        return f"{'' if e == kept else 'not '}{what} {self.names[found[0].operand]}"

    def _compared(self, e: Expr) -> str | None:
        if not isinstance(e, Apply):
            return None
        if e.op == "not" and isinstance(e.args[0], Apply) and e.args[0].op == "le":
            left, right = e.args[0].args
            return self._ordered(Algebra().add(right, Const(1)), left)
        if e.op not in ("le", "eq", "ne"):
            return None
        left, right = e.args
        no = "not " if e.op == "ne" else ""
        if e.op == "le":
            return self._ordered(left, right)
        if isinstance(left, Load) and isinstance(right, Load):
            names = dict.fromkeys(self.names[x.operand] for x in (left, right))
            return f"{no}documents {', '.join(names)}"
        if all(isinstance(x, Apply) and x.op == "floordiv" for x in (left, right)):
            sizes = {x.args[1] for x in (left, right)}  # type: ignore[attr-defined]
            if len(sizes) == 1:
                return f"{no}chunks of {text(sizes.pop())}"
        return None

    def _ordered(self, left: Expr, right: Expr) -> str | None:
        algebra = Algebra()
        by, const = _lin(algebra.sub(left, right))
        by_position = self._by_position(by, const)
        if by_position is not None:
            return by_position
        of_k, of_q = by.pop(K, 0), by.pop(Q, 0)
        rest = _sum(by, const)
        if any(x in (Q, K) or (isinstance(x, Load) and self.dims[x.operand] != ("1", "1")) for x in walk(rest)):
            return None
        if (of_k, of_q) == (1, -1):
            offset = algebra.mul(rest, Const(-1))
            return "causal" if offset == Const(0) else f"causal + {text(offset)}".replace("+ -", "- ")
        if (of_k, of_q) == (-1, 1):
            # q <= k - rest: the keys from q + rest on
            width = algebra.sub(Const(1), rest)
            if isinstance(width, Const) and width.value <= 1:
                return "anti-causal" if width.value == 1 else f"anti-causal + {int(1 - width.value)}"
            return f"window {text(width)}"
        return f"prefix {text(algebra.sub(Const(1), rest))}" if (of_k, of_q) == (1, 0) else None

    def _by_position(self, by: dict[Expr, int], const: int) -> str | None:
        """Causal and window masks over loaded positions."""
        dims = {self.dims[x.operand]: (x, c) for x, c in by.items() if isinstance(x, Load) and x.row is x.col is None}
        if len(by) != 2 or set(dims) != {("1", "K"), ("Q", "1")}:
            return None
        (of_keys, c), (_, d) = dims["1", "K"], dims["Q", "1"]
        source = self.names[of_keys.operand].replace("from", "by")
        if (c, d) == (1, -1):
            return f"causal {f'{-const:+d} ' if const else ''}{source}"
        return f"window {1 - const} {source}" if (c, d) == (-1, 1) and const < 1 else None


def _place(said: str) -> int:
    known = ("causal", "anti-causal", "prefix", "window", "chunks", "documents")
    return next((i for i, word in enumerate(known) if said.startswith(word)), len(known))


_SIGNS = {"le": "<=", "eq": "==", "ne": "!=", "and": "&", "or": "|", "floordiv": "//", "mod": "%"}


def text(e: Expr) -> str:
    """The expression as code, such as 'k <= q + 3'."""
    if isinstance(e, Const):
        return str(bool(e.value)) if e.type == "bool" else f"{int(e.value)}" if e.type == "int" else f"{e.value:g}"
    if isinstance(e, Index):
        return e.axis
    if isinstance(e, Load):
        at = [text(x) for x in (e.row, e.col) if x is not None]
        return f"operand{e.operand}" + (f"[{', '.join(at)}]" if at else "")
    if isinstance(e, Linear):
        parts = []
        for c, t in e.terms:
            sign = "- " if c < 0 else "+ "
            parts.append(sign + (f"{abs(c)} * " if abs(c) != 1 else "") + _inner(t))
        if e.const:
            parts.append(f"{'-' if e.const < 0 else '+'} {abs(e.const)}")
        return " ".join(parts).removeprefix("+ ").replace("- ", "-", 1 if parts[0][0] == "-" else 0)
    if isinstance(e, Apply) and e.op in _SIGNS:
        compared = e.op in ("le", "eq", "ne")
        return f" {_SIGNS[e.op]} ".join(text(a) if compared and isinstance(a, Linear) else _inner(a) for a in e.args)
    if isinstance(e, Apply):
        return f"{e.op}({', '.join(text(a) for a in e.args)})"
    return repr(e)


def _inner(e: Expr) -> str:
    compound = isinstance(e, Linear) or (isinstance(e, Apply) and e.op in _SIGNS)
    return f"({text(e)})" if compound else text(e)
