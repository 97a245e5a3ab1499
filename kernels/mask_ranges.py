"""Masks as bounds on the key, for kernels that solve them for where their loops begin and end."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from attnfuse import expr
from attnfuse.expr import Expr


@dataclass(frozen=True)
class Cut:
    """A mask as bounds on the key, and what is left of it. A bound is below_q (k < q + x), from_q (k >= q + x), below or from."""

    bounds: dict[str, Expr]
    rest: Expr | None


def cut(keep: Expr, uniform: frozenset[int] = frozenset()) -> Cut:
    """Split a mask into one bound of each kind and the rest; it keeps where all of them hold.

    uniform: the operands that are one number for a whole batch element.
    """
    parts = keep.args if isinstance(keep, expr.Apply) and keep.op == "and" else (keep,)
    bounds: dict[str, Expr] = {}
    rest = []
    for part in parts:
        found = _bound(part, uniform)
        if found is None or found[0] in bounds:
            rest.append(part)
            continue
        kind, bound, whole = found
        bounds[kind] = bound
        if not whole:
            rest.append(part)
    if not rest:
        return Cut(bounds, None)
    return Cut(bounds, rest[0] if len(rest) == 1 else expr.Apply("and", tuple(rest)))


@dataclass(frozen=True)
class Order:
    """A comparison of a number of the key, which depends on k alone, with one of the query: key `how` query."""

    how: Literal["eq", "le", "lt", "ge", "gt"]
    key: Expr
    query: Expr


_TURNED: dict[str, Literal["le", "lt", "ge", "gt"]] = {"le": "ge", "lt": "gt", "ge": "le", "gt": "lt"}


def orders(keep: Expr | None, uses: Callable[[Expr], set[str]]) -> tuple[tuple[Order, ...], Expr | None]:
    """The parts of a mask that are orders, 'eq' first, and what is left of it.

    Where the keys' numbers ascend, what an order keeps for a query is a range of keys, which bisection finds; among keys that all
    'eq' keep, it is enough that numbers ascend there. uses: which of 'q' and 'k' an expression depends on.
    """
    parts = keep.args if isinstance(keep, expr.Apply) and keep.op == "and" else () if keep is None else (keep,)
    found: list[Order] = []
    rest = []
    for part in parts:
        order = _order(part, uses)
        if order is None:
            rest.append(part)
        else:
            found.append(order)
    found.sort(key=lambda x: x.how != "eq")
    if not rest:
        return tuple(found), None
    return tuple(found), rest[0] if len(rest) == 1 else expr.Apply("and", tuple(rest))


def _order(part: Expr, uses: Callable[[Expr], set[str]]) -> Order | None:
    how: Literal["eq", "le", "lt", "ge", "gt"]
    if isinstance(part, expr.Apply) and part.op == "not" and isinstance(part.args[0], expr.Apply):
        # not a <= b is b < a
        part, how = part.args[0], "gt"
        if part.op != "le":
            return None
    elif isinstance(part, expr.Apply) and part.op in ("eq", "le"):
        how = "eq" if part.op == "eq" else "le"
    else:
        return None
    a, b = part.args
    used = uses(a), uses(b)
    if used == ({"k"}, {"q"}):
        return Order(how, a, b)
    return Order(_TURNED.get(how, "eq"), b, a) if used == ({"q"}, {"k"}) else None


@dataclass(frozen=True)
class Band:
    """Query q sees the keys from q - back to q + ahead, both included; None: all there are on that side."""

    back: int | None = None
    ahead: int | None = None

    def hides_rows(self, queries: int, keys: int) -> bool:
        """Whether the band leaves a row without a key, though there are keys."""
        ahead = keys if self.ahead is None else self.ahead
        back = queries if self.back is None else self.back
        return ahead < 0 or queries - 1 - back > keys - 1 or back + ahead < 0


@functools.lru_cache(maxsize=512)
def band_of(masks: tuple[Expr, ...]) -> Band | None:
    """What several masks together say of distance; None where one of them says more."""
    back: list[int] = []
    ahead: list[int] = []
    for mask in masks:
        found = cut(mask)
        if found.rest is not None or not found.bounds.keys() <= {"from_q", "below_q"}:
            return None
        for kind, bound in found.bounds.items():
            if not isinstance(bound, expr.Const):
                return None
            back += [-int(bound.value)] if kind == "from_q" else []
            ahead += [int(bound.value) - 1] if kind == "below_q" else []
    return Band(min(back, default=None), min(ahead, default=None))


#: Farther than any index lies from another: numbers beyond it bound no key, or every one.
_FAR = 2**40


def _bound(part: Expr, uniform: frozenset[int]) -> tuple[str, Expr, bool] | None:
    """A kind of bound, the bound, and whether it says all that `part` does."""
    if not (isinstance(part, expr.Apply) and part.op == "le"):
        return None
    algebra = expr.Algebra()
    difference = algebra.difference(*part.args)
    terms, const = difference or algebra.terms(algebra.sub(*part.args))
    of_k, of_q = terms.pop(expr.K, 0), terms.pop(expr.Q, 0)
    for x in (x for t in terms for x in expr.walk(t)):
        plain = isinstance(x, expr.Load) and x.operand in uniform and x.row is None and x.col is None
        if isinstance(x, expr.Index) or (isinstance(x, expr.Load) and not plain):
            return None
    # of_k * k + of_q * q + rest <= 0
    if (of_k, of_q) not in ((1, 0), (1, -1), (-1, 0), (-1, 1)):
        return None
    rest = _near(terms, const, algebra, difference is not None)
    if rest is None:
        return None
    if of_k == 1:
        return ("below_q" if of_q else "below"), algebra.sub(expr.Const(1), rest), difference is not None
    return ("from_q" if of_q else "from"), rest, difference is not None


def _near(terms: dict[Expr, int], const: int, algebra: expr.Algebra, exact: bool) -> Expr | None:
    """The sum, or one that compares with indices as it does, with room for kernels to add indices to it.

    exact: whether the graph's own sum never wraps. If it may, the bound hides nothing where it could have.
    """
    total: Expr = expr.Const(const)
    lone = len(terms) == 1 and abs(const) < _FAR
    if not (exact or lone):
        return None
    for x, c in terms.items():
        if lone and abs(c) == 1 and not expr.within(algebra.bounds(x), (-_FAR, _FAR)):
            far = expr.Const(2 * _FAR)
            near = algebra.maximum(algebra.minimum(x, far), algebra.mul(far, expr.Const(-1)))
            total = algebra.add(total, near, c)
            if not exact:
                safe = algebra.compare("le", x, expr.Const(2**62)), algebra.compare("le", expr.Const(-(2**62)), x)
                return algebra.where(algebra.and_(*safe), total, expr.Const(-_FAR))
        else:
            total = algebra.add(total, x, c)
    small = all(abs(n) < 2**62 for n in (const, *terms.values()))
    inside = small and algebra.is_exact(total) and expr.within(algebra.bounds(total), (-(2**62), 2**62))
    return total if inside and exact else None
