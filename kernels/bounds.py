"""Masks as bounds on the key, for kernels that solve them for where their loops begin and end."""

from __future__ import annotations

from dataclasses import dataclass

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
        else:
            bounds[found[0]] = found[1]
    if not rest:
        return Cut(bounds, None)
    return Cut(bounds, rest[0] if len(rest) == 1 else expr.Apply("and", tuple(rest)))


def _bound(part: Expr, uniform: frozenset[int]) -> tuple[str, Expr] | None:
    if not (isinstance(part, expr.Apply) and part.op == "le"):
        return None
    algebra = expr.Algebra()
    rest = algebra.sub(*part.args)
    terms = expr.sum_of(rest)
    of_k, of_q = terms.get(expr.K, 0), terms.get(expr.Q, 0)
    rest = algebra.add(algebra.add(rest, expr.K, -of_k), expr.Q, -of_q)
    for x in expr.walk(rest):
        plain = isinstance(x, expr.Load) and x.operand in uniform and x.row is None and x.col is None
        if isinstance(x, expr.Index) or (isinstance(x, expr.Load) and not plain):
            return None
    # of_k * k + of_q * q + rest <= 0
    if of_k == 1 and of_q in (0, -1):
        return ("below_q" if of_q else "below"), algebra.sub(expr.Const(1), rest)
    if of_k == -1 and of_q in (0, 1):
        return ("from_q" if of_q else "from"), rest
    return None
