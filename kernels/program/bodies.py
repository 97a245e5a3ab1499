"""Lines of a function with each expression computed once: its value for a query and a key, or its bounds on a tile of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from attnfuse.expr import Apply, Const, Expr, Index, Linear, Load
from attnfuse.kernels.program.dialect import Dialect, Read
from attnfuse.kernels.program.traits import (
    is_exact,
    is_little,
    is_wide,
    may_be_its_negative,
    reads_each,
    unmasked,
    uses,
)
from attnfuse.spec import Attention, Bias


class Body:
    """Lines of one function. far, inside: as `source` takes them."""

    def __init__(self, dialect: Dialect, spec: Attention, far: bool = False, inside: bool = False) -> None:
        self.dialect, self.spec, self.far, self.inside = dialect, spec, far, inside
        self.lines: list[str] = []
        self.known: dict[Expr, str] = {}
        self.count = 0

    def let(self, code: str) -> str:
        name = self._name()
        self.lines.append(self.dialect.let(name, code))
        return name

    def _name(self) -> str:
        self.count += 1
        return f"x{self.count}"

    def set(self, name: str, code: str) -> None:
        self.lines.append(self.dialect.set(name, code))

    def nested(self) -> Body:
        """Lines of a part of the function, which knows what stands before it."""
        found = Body(self.dialect, self.spec, self.far, self.inside)
        found.count = 1000 + self.count
        found.known = dict(self.known)
        return found

    # -- expressions

    def value(self, e: Expr) -> str:
        """Code for e at query q and key k: a name, or a number."""
        if e not in self.known:
            self.known[e] = self._value(e)
        return self.known[e]

    def _value(self, e: Expr) -> str:
        if isinstance(e, Const):
            return self.dialect.integer(int(e.value)) if e.type == "int" else self.dialect.truth(bool(e.value))
        if isinstance(e, Index):
            return e.axis
        if isinstance(e, Load):
            # sums in a normal form may leave the range that those of the graph kept to
            return self.let(self.dialect.loaded(self.load(e.operand, e.row, e.col), e.dtype))
        if isinstance(e, Linear):
            terms = [(c, self.value(t)) for c, t in e.terms]
            return self.let(self.dialect.sum(terms, e.const, is_wide(e)))
        assert isinstance(e, Apply)
        return self.let(self.dialect.apply(e.op, [self.value(x) for x in e.args]))

    def number(self, e: Expr) -> str:
        """Code for an integer in float32, rounded to it: a name."""
        return self.let(self.dialect.of_integer(self.value(e), not self.far and is_little(e)))

    # -- operands

    def read(self, operand: int, row: Expr | None = None, col: Expr | None = None) -> Read:
        """An element of an operand, at (row, col) or where they are None at (q, k)."""
        own = self.spec.operands[operand]
        dims, table = (own.dims[-2], own.dims[-1]), row is not None or col is not None
        parts, used = [], set()
        for which, (index, name) in enumerate(((row, "q"), (col, "k"))):
            if index is not None:
                used |= uses(self.spec, index)
                if self.inside:
                    parts.append((which, self.dialect.own_index(index, self.value)))
                    continue
                found = self.value(index)
                parts.append((which, self.dialect.place(self.dialect.clamped(found, operand, which))))
            elif dims[which] != "1":
                used.add(name)
                # a table's other dim is the query's or the key's own; nobody has seen how long packed sequences are
                own_size = not table and not self.spec.packed
                bound = name if own_size else self.dialect.clamped(name, operand, which)
                parts.append((which, self.dialect.place(bound)))
        mask = self.dialect.exists(sorted(used, reverse=True))
        return Read(operand, own.dtype, dims, tuple(parts), mask, table)

    def load(self, operand: int, row: Expr | None = None, col: Expr | None = None) -> str:
        """An element of an operand for each query and key, 0 outside of them."""
        return self.let(self.dialect.load(self.read(operand, row, col)))

    def real(self, operand: int) -> str:
        """The same at (q, k) in float32."""
        return self.dialect.real_of(self.load(operand), self.spec.operands[operand].dtype)

    def added(self, step: Bias) -> str:
        """What a bias adds, before its factor; in full tiles without a look at what exists."""
        read = self.read(step.operand, step.row, step.col)
        if not read.mask or not unmasked(self.spec, step, self.inside):
            name = self.let(self.dialect.load(read))
        else:
            name = self._name()
            self.lines += self.dialect.load_added(name, read)
        return self.dialect.real_of(name, read.dtype)


def most(of: Callable[[str, str], str], parts: Sequence[str]) -> str:
    """The least or the greatest of all parts, as `of` gives that of two."""
    found, *others = dict.fromkeys(parts)
    for x in others:
        found = of(found, x)
    return found


Ends = tuple[str, str]


class Intervals(Body):
    """Bounds of expressions on a tile, which has one each; None for a part of which nothing is known."""

    def __init__(self, dialect: Dialect, spec: Attention) -> None:
        super().__init__(dialect, spec)
        self.ends: dict[Expr, Ends | None] = {}

    def of(self, e: Expr) -> Ends | None:
        if e not in self.ends:
            self.ends[e] = self._of(e)
        return self.ends[e]

    def of_mask(self, e: Expr) -> Ends:
        return self.of(e) or ("0", "1")

    def _both(self, lo: str, hi: str) -> Ends:
        return self.let(lo), self.let(hi)

    def _of(self, e: Expr) -> Ends | None:
        if isinstance(e, Const):
            return (self.dialect.integer(int(e.value)),) * 2
        if isinstance(e, Index):
            return f"{e.axis}0", f"{e.axis}1"
        if isinstance(e, Load):
            return self._loaded(e)
        if isinstance(e, Linear):
            return self._summed(e)
        assert isinstance(e, Apply)
        if may_be_its_negative(e):
            return None
        args = [self.of(x) for x in e.args]
        rule: Callable[..., Ends | None] = getattr(self, f"_{e.op}")
        if e.op in ("and", "or"):
            return rule(args)
        if any(x is None for x in args):
            # a bool is at least 0 and at most 1
            return ("0", "1") if e.type == "bool" else None
        return rule(*args)

    def _loaded(self, e: Load) -> Ends | None:
        if reads_each(self.spec, e):
            return ("0", "1") if e.dtype == "bool" else None
        own = self.spec.operands[e.operand]
        read = Read(e.operand, own.dtype, (own.dims[-2], own.dims[-1]), (), "", False)
        if read.dims == ("1", "1"):
            # any byte but 0 is a true bool
            x = self.let(self.dialect.loaded(self.dialect.load(read), e.dtype))
            return self._truths(x, x) if e.dtype == "bool" else (x, x)
        low, high = self.dialect.ends(read, int(read.dims[1] != "1"), self.let)
        return self._truths(f"{low} > 0", f"{high} > 0") if e.dtype == "bool" else (low, high)

    def _summed(self, e: Linear) -> Ends | None:
        # beside numbers that may be anything, bounds wrap where the sum does not
        if not is_exact(e):
            return None
        lo, hi = [], []
        for c, t in e.terms:
            ends = self.of(t)
            if ends is None:
                return None
            a, b = ends if c > 0 else ends[::-1]
            lo.append((c, a))
            hi.append((c, b))
        wide = is_wide(e)
        return self._both(*(self.dialect.sum_of_ends(terms, e.const, wide) for terms in (lo, hi)))

    def _least(self, *parts: str) -> str:
        return most(self.dialect.least, parts)

    def _greatest(self, *parts: str) -> str:
        return most(self.dialect.greatest, parts)

    def _min(self, a: Ends, b: Ends) -> Ends:
        return self._both(self.dialect.least(a[0], b[0]), self.dialect.least(a[1], b[1]))

    def _max(self, a: Ends, b: Ends) -> Ends:
        return self._both(self.dialect.greatest(a[0], b[0]), self.dialect.greatest(a[1], b[1]))

    def _abs(self, a: Ends) -> Ends:
        of = self.dialect.greatest
        return self._both(of(of(a[0], f"-({a[1]})"), "0"), of(f"-({a[0]})", a[1]))

    def _floordiv(self, a: Ends, b: Ends) -> Ends:
        return self._both(self.dialect.call("floor_div", a[0], b[0]), self.dialect.call("floor_div", a[1], b[0]))

    def _mod(self, a: Ends, b: Ends) -> Ends:
        call, choose = self.dialect.call, self.dialect.choose
        same = self.let(f"{call('floor_div', a[0], b[0])} == {call('floor_div', a[1], b[0])}")
        return self._both(
            choose(same, call("floor_mod", a[0], b[0]), "0"),
            choose(same, call("floor_mod", a[1], b[0]), f"{b[0]} - 1"),
        )

    def _where(self, c: Ends, a: Ends, b: Ends) -> Ends:
        choose = self.dialect.choose
        low, high = self.dialect.least(a[0], b[0]), self.dialect.greatest(a[1], b[1])
        return self._both(
            choose(f"{c[0]} > 0", a[0], choose(f"{c[1]} <= 0", b[0], low)),
            choose(f"{c[0]} > 0", a[1], choose(f"{c[1]} <= 0", b[1], high)),
        )

    def _truths(self, lo: str, hi: str) -> Ends:
        return self._both(self.dialect.choose(lo, "1", "0"), self.dialect.choose(hi, "1", "0"))

    def _le(self, a: Ends, b: Ends) -> Ends:
        return self._truths(f"{a[1]} <= {b[0]}", f"{a[0]} <= {b[1]}")

    def _eq(self, a: Ends, b: Ends) -> Ends:
        sure = f"({a[0]} == {a[1]}) & ({b[0]} == {b[1]}) & ({a[0]} == {b[0]})"
        return self._truths(sure, f"({a[0]} <= {b[1]}) & ({b[0]} <= {a[1]})")

    def _ne(self, a: Ends, b: Ends) -> Ends:
        lo, hi = self._eq(a, b)
        return self._both(f"1 - {hi}", f"1 - {lo}")

    def _not(self, a: Ends) -> Ends:
        return self._truths(f"{a[1]} <= 0", f"{a[0]} <= 0")

    def _int(self, a: Ends) -> Ends:
        return a

    def _and(self, args: list[Ends | None]) -> Ends:
        known = [x or ("0", "1") for x in args]
        return self._least(*(x[0] for x in known)), self._least(*(x[1] for x in known))

    def _or(self, args: list[Ends | None]) -> Ends:
        known = [x or ("0", "1") for x in args]
        return self._greatest(*(x[0] for x in known)), self._greatest(*(x[1] for x in known))
