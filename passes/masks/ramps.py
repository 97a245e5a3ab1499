"""Biases that are a number of the head times an integer of query and key, as ALiBi's: the two factors, and how the graph rounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from attnfuse.expr import Apply, Const, Expr, Index, K, Linear, Q, walk, within
from attnfuse.passes.masks.terms import OpCall, Symbol, Tensor, Terms, depends
from attnfuse.rounding import exact_factor
from attnfuse.spec import dtype_name

#: Up to it a dtype has every integer.
_WHOLE = {torch.float32: 2**24, torch.bfloat16: 2**8, torch.float16: 2**11}
#: The largest integer that is finite in float16.
_MOST_HALF = 65504
_CASTS = ("to", "_to_copy")
#: What integers of a ramp are made of, besides sums and what is loaded.
_PARTS = frozenset({"abs", "min", "max", "floordiv", "mod"})


@dataclass(frozen=True)
class Product:
    """alpha * factor * number: a float that no query and no key has a say in, of factor_dtype, and an integer, which is rounded to
    number_dtype; the product is rounded to dtype."""

    factor: Expr
    factor_dtype: torch.dtype
    number: Expr
    alpha: float
    number_dtype: torch.dtype
    dtype: torch.dtype

    @property
    def dtypes(self) -> tuple[str, str]:
        """As a spec has them: of the number, and of the product."""
        return dtype_name(self.number_dtype), dtype_name(self.dtype)


@dataclass(frozen=True)
class _Whole:
    """An integer in a floating dtype: rounded to it, where it is not exact."""

    number: Expr
    dtype: torch.dtype
    exact: bool


def product(e: Expr, terms: Terms) -> Product | None:
    """What e is as a product, rounded where the graph rounds; None for what it is not. Raises NotExpressible."""
    found = _Reader(terms).product(e)
    if found is None or K not in depends(found.number):
        return None
    kinds = (Const, Index, Linear, Symbol, Tensor)
    parts = list(walk(found.number))
    if any(not isinstance(x, kinds) and not (isinstance(x, Apply) and x.op in _PARTS) for x in parts):
        return None
    return found if all(x.type == "int" for x in parts) else None


class _Reader:
    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.algebra = terms.algebra

    def _call(self, e: Expr) -> OpCall | None:
        """The op that e is made by, if it is of a dtype that ramps are in."""
        made = self.terms.made(e) if isinstance(e, Tensor) else e
        return made if isinstance(made, OpCall) and made.dtype in _WHOLE else None

    def product(self, e: Expr) -> Product | None:
        call = self._call(e)
        if call is None:
            return None
        name, parts = _name(call), call.parts
        if name == "neg":
            inner = self.product(parts[0])
            return inner and replace(inner, alpha=-inner.alpha)
        if name in _CASTS and len(parts) == 1:
            return _rounded(self.product(parts[0]), call.dtype)
        if name not in ("mul", "div") or len(parts) != len(call.args) or call.kwargs:
            return None
        (a, b), (own, other) = parts, call.dtypes
        for x, y, of_x in ((a, b, own), (b, a, other)):
            if isinstance(y, Const):
                inner = self.product(x) if name == "mul" or x is a else None
                return None if inner is None else _scaled(inner, y.value, name == "div", of_x, call.dtype)
        if name == "mul" and own == other == call.dtype:
            return self._of(a, b, call.dtype) or self._of(b, a, call.dtype)
        return None

    def _of(self, factor: Expr, number: Expr, dtype: torch.dtype) -> Product | None:
        """factor * number, in a dtype that both are converted to."""
        if factor.type != "float" or {K, Q} & depends(factor):
            return None
        whole = self._whole(number)
        return None if whole is None else Product(factor, dtype, whole.number, 1.0, whole.dtype, dtype)

    def _whole(self, e: Expr) -> _Whole | None:
        """The integer that a floating expression is, rounded to a dtype of it; None where it may be anything else."""
        call = self._call(e)
        if call is None:
            return None
        name, parts = _name(call), call.parts
        if name in _CASTS and len(parts) == 1:
            if parts[0].type == "int":
                return self._in(parts[0], call.dtype)
            inner = self._whole(parts[0])
            if inner is None or inner.dtype == call.dtype:
                return inner
            if inner.exact or inner.dtype == torch.float32:
                return self._in(inner.number, call.dtype)
            return inner if call.dtype == torch.float32 else None
        if any(d not in (None, call.dtype) for d in call.dtypes) or call.kwargs:
            return None
        if name in ("neg", "abs") and len(parts) == 1:
            inner = self._whole(parts[0])
            if inner is None:
                return None
            # rounding is the same for both signs
            made = self.algebra.abs if name == "abs" else lambda x: self.algebra.mul(x, Const(-1))
            return replace(inner, number=made(inner.number))
        return self._combined(name, call) if len(parts) == len(call.args) == 2 else None

    def _combined(self, name: str, call: OpCall) -> _Whole | None:
        """Two integers put together, neither of which is rounded."""
        parts: list[Expr] = []
        for x in call.parts:
            if isinstance(x, Const):
                if not (math.isfinite(x.value) and float(x.value).is_integer() and abs(x.value) <= _WHOLE[call.dtype]):
                    return None
                parts.append(Const(int(x.value)))
                continue
            inner = self._whole(x)
            if inner is None or not inner.exact:
                return None
            parts.append(inner.number)
        a, b = parts
        if name == "mul" and not (isinstance(a, Const) or isinstance(b, Const)):
            return None
        makes: dict[str, Callable[[Expr, Expr], Expr]] = {
            "add": self.algebra.add,
            "sub": self.algebra.sub,
            "rsub": lambda x, y: self.algebra.sub(y, x),
            "mul": self.algebra.mul,
            "minimum": self.algebra.minimum,
            "clamp_max": self.algebra.minimum,
            "maximum": self.algebra.maximum,
            "clamp_min": self.algebra.maximum,
        }
        whole = self._in(makes[name](a, b), call.dtype) if name in makes else None
        return whole if whole is not None and whole.exact else None

    def _in(self, number: Expr, dtype: torch.dtype) -> _Whole | None:
        """An integer in a floating dtype; None where it may be infinite there."""
        bounds = self.algebra.bounds(number)
        if dtype == torch.float16 and not within(bounds, (-_MOST_HALF, _MOST_HALF)):
            return None
        most = _WHOLE[dtype]
        return _Whole(number, dtype, within(bounds, (-most, most)))


def _scaled(x: Product, by: float, divides: bool, own: torch.dtype | None, dtype: torch.dtype) -> Product | None:
    """x times a number, where that rounds nothing; own, dtype: that of x, and of the result."""
    if own not in (None, dtype) or not exact_factor(by):
        return None
    # float16 has few exponents, and a product may leave them
    if dtype == torch.float16 and abs(by) != 1.0:
        return None
    return replace(x, alpha=x.alpha / by if divides else x.alpha * by)


def _rounded(x: Product | None, dtype: torch.dtype) -> Product | None:
    if x is None or x.dtype == dtype:
        return x
    if x.dtype == torch.float32:
        # what is rounded to fewer digits must be the product itself, whose magnitude a dtype may not have
        return replace(x, dtype=dtype) if abs(x.alpha) == 1.0 or dtype == torch.bfloat16 else None
    return x if dtype == torch.float32 else None


def _name(e: OpCall) -> str:
    return str(e.target._schema.name).removeprefix("aten::")
