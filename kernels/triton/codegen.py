"""Spec -> the source of the Triton functions that the kernels in template.py call: the score program and its masks.

GIVE has a bit set for each operand whose gradient the calling kernel adds up, at the addresses `gat` with the strides `gst`.
Nothing but integers, finite numbers, and names that are made here gets into the text. Every generated function takes the
same context: `at` (each operand's address at the batch element), `st` (its row and column strides), `n` (its rows and
columns), Qn and Kn (the numbers of queries and keys).

    bases(e, sizes, ops, bst)                    at, or the same for gradients
    offset(e, sizes, strides)                    where a batch element begins in a tensor
    score(s, q, k, FULL, ...)                    the scores after all steps, and what their gradients need
    score_grad(g, saved, q, k, FULL, gat, gst, GIVE, QUERIES, ...)
                                                 gradient of the scores before all steps; adds those of operands up
    weigh(p, q, k, ...)                          the weights after their steps
    weigh_grad(g, p, q, k, gat, gst, GIVE, QUERIES, ...)
                                                 gradient of the weights before their steps
    sink(q, ...)                                 the score that each row has besides those of the keys, [rows, 1]
    left(q, k, ...)                              which weights their fills leave
    keys(q0, q1, ...)                            the keys that queries q0 to q1 may see, and those that all of them see
    queries(k0, k1, ...)                         the queries that may see keys k0 to k1, and those that see all of them
    seen(q0, q1, k0, k1, BM, BN, MANY, ...)      whether a tile may hold a key that is not hidden, and whether it surely holds no
                                                 other by what is no bound; MANY: 1 where k0 and k1 are those of many tiles, 2
                                                 where q0 and q1 are

Tiles have a row for each query, or where QUERIES is 1 one for each key; q and k broadcast with them. FULL tells what hides nothing
of a tile, and need not be compared: 1 bounds on the key, 2 also what `seen` looks at. All keys of such a tile exist, and where
the spec is not ragged all queries.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from attnfuse import expr, rounding
from attnfuse.expr import Algebra, Apply, Const, Expr, Index, Linear, Load
from attnfuse.kernels.fills import Hiding, hiding
from attnfuse.kernels.mask_ranges import Cut, cut
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
    Sink,
    Softcap,
    Step,
    Tanh,
    dtype_of,
)

#: No query or key index is larger: sums with constants below it fit 32 bits.
LONGEST = 2**29
#: Below it, differences of indices are at most LITTLE; there may be as many queries or keys in modules that are for `far`.
NEARBY = 2**21
#: Integers up to it are made floats by an addition.
LITTLE = 2**22
#: Factors that do not make scores of products that models have pass 2^30.
_NEAR = 2**10
_CONTEXT = "at, st, n, Qn, Kn"
_HEADER = '''"""Written by attnfuse."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    # the odd polynomial where 1 - 2 / (exp(2x) + 1) would lose digits
    x2 = x * x
    near = x * (1.0 + x2 * (-0.3333333333 + x2 * (0.1333333333 + x2 * (-0.0539682540 + x2 * 0.0218694885))))
    far = 1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0)
    return tl.where(x2 < 0.0625, near, far)


@triton.jit
def tanh_of_half(x2):
    # of x2 / (2 log2(e)), right to 3e-7, where what x2 comes from was rounded by far more
    root = tl.rsqrt(tl.exp2(x2) + 1.0)
    return 1.0 - (2.0 * root) * root


@triton.jit
def held(s, CUT: tl.constexpr, COARSE: tl.constexpr, GREATEST: tl.constexpr):
    # from COARSE on rounded to a dtype with CUT bits less, and beyond its greatest number infinite; NaN is left
    size = s.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    near = (size + ((1 << (CUT - 1)) - 1) + ((size >> CUT) & 1)) >> CUT << CUT
    whole = near.to(tl.float32, bitcast=True)
    whole = tl.where(whole > GREATEST, float("inf"), whole)
    return tl.where(tl.abs(s) >= COARSE, tl.where(s < 0.0, -whole, whole), s)


@triton.jit
def lifted(i):
    # i as float32, for magnitudes up to 2^22: devices convert four times as slowly as they add
    return (i.to(tl.int32) + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0


@triton.jit
def wide(i):
    # i as int64, as one number of the tile and another one of the place in it: of a sum of such, the compiler keeps the address
    # of one element and knows how far the others lie from it
    if i.shape[0] == 1:
        place = tl.arange(0, i.shape[1])[None, :]
    else:
        place = tl.arange(0, i.shape[0])[:, None]
    return (i - place).to(tl.int64) + place.to(tl.int64)


@triton.jit
def clamped(i, n):
    return tl.minimum(tl.maximum(i, 0), n - 1)


@triton.jit
def ends_of(place, first, last, stride, SIZE: tl.constexpr, MANY: tl.constexpr):
    # the least and the greatest of SIZE elements from `first` on, or from each of many; those after `last` are that one again
    if MANY:
        i = first[:, None] + tl.arange(0, SIZE)[None, :]
    else:
        i = first + tl.arange(0, SIZE)
    x = tl.load(place + tl.minimum(i, last).to(tl.int64) * stride).to(tl.int64)
    return tl.min(x, 1 if MANY else 0), tl.max(x, 1 if MANY else 0)


@triton.jit
def floor_mod(a, b: tl.constexpr):
    return ((a % b) + b) % b


@triton.jit
def floor_div(a, b: tl.constexpr):
    # a multiple of b is divided, towards 0, so that neither rounding nor the ends of the integers matter
    r = ((a % b) + b) % b
    return tl.where(a < 0, (a + (b - r)) // b - 1, (a - r) // b)
'''
#: What is right to 2^-11 of it, of devices that have the instruction.
_APPROXIMATE = """

@triton.jit
def tanh_of_device(x):
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
"""


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
    near, (left, factor) = _near(spec), _left_over(spec)
    return Traits(
        hides=bool(found.steps),
        lower=any("from" in cut.bounds or "from_q" in cut.bounds for cut in _cuts(spec).values()),
        checked=bool(looked_at(spec)),
        doubt=found.doubt,
        fills=any(isinstance(s, ReplaceFill) for s in spec.weight_steps),
        near=near,
        merged=near and spec.hidden != "nan_to_zero" and not any(isinstance(s, Ramp) for s in spec.steps),
        ragged=_Module(spec, inside=True).ragged(),
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


def _left_over(spec: Attention) -> tuple[int, float]:
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
    module = _Module(spec)
    return [rest for i in module.looked_at if (rest := module.cuts[i].rest) is not None]


def limits(spec: Attention) -> list[Expr]:
    """The bounds on keys that masks have."""
    return [x for cut in _cuts(spec).values() for x in cut.bounds.values()]


def indices(spec: Attention) -> list[tuple[int, int, Expr]]:
    """(operand, 0 for its row or 1 for its column, index) of what is read at indices of its own."""
    reads: list[Load | Bias] = [*spec.loads, *(s for s in spec.steps if isinstance(s, Bias))]
    return [(x.operand, d, own) for x in reads for d, own in enumerate((x.row, x.col)) if own is not None]


def approximable(spec: Attention) -> bool:
    """Whether there is a tanh that may be the device's own: bfloat16 rounds its result four times as much, and of other dtypes it
    would be the largest error."""
    return spec.qk_dtype == "bfloat16" and any(isinstance(step, (Softcap, Tanh)) for step in spec.steps)


def source(spec: Attention, approximate: bool = False, far: bool = False, inside: bool = False) -> str:
    """The text of the module for `spec`. Raises ValueError for what the kernels cannot compute.

    approximate: tanh is the instruction of NVIDIA's devices, an error of 2^-11, and takes a factor before it along. far: there may
    be NEARBY queries or keys, or more. inside: of queries and keys that exist, `indices` are those of elements that exist.
    """
    return _Module(spec, approximate, far, inside).text()


def _cuts(spec: Attention) -> dict[int, Cut]:
    """The fills' masks, by step."""
    uniform = frozenset(i for i, o in enumerate(spec.operands) if o.dims[-2:] == ("1", "1") and i not in spec.tables)
    return {i: cut(s.keep, uniform) for i, s in enumerate(spec.steps) if isinstance(s, (ReplaceFill, AddFill))}


def _saves(step: Step) -> bool:
    """Whether the gradient of a step needs its input or result."""
    return isinstance(step, (Softcap, Tanh, Clamp)) or (isinstance(step, Scale) and step.operand is not None)


def _number(x: float) -> str:
    if math.isnan(x):
        raise ValueError("a step with NaN")
    return repr(float(x)) if math.isfinite(x) else f"float('{'-' if x < 0 else ''}inf')"


def _as(dtype: str, x: str) -> str:
    """x, which is in float32, rounded to a dtype."""
    return x if dtype == "float32" else f"({x}).to(tl.{dtype}).to(tl.float32)"


def indented(lines: list[str]) -> list[str]:
    return [f"    {line}" for line in lines]


class _Body:
    """Lines of one function, with each expression computed once."""

    def __init__(self, module: _Module) -> None:
        self.module = module
        self.lines: list[str] = []
        self.known: dict[Expr, str] = {}
        self.count = 0

    def let(self, code: str) -> str:
        self.count += 1
        name = f"x{self.count}"
        self.lines.append(f"{name} = {code}")
        return name

    def inner(self) -> _Body:
        """Lines of a part of the function, which knows what stands before it."""
        found = _Body(self.module)
        found.count = 1000 + self.count
        found.known = dict(self.known)
        return found

    def value(self, e: Expr) -> str:
        """Code for e at queries q and keys k of a tile: a name."""
        if e not in self.known:
            self.known[e] = self._value(e)
        return self.known[e]

    def _value(self, e: Expr) -> str:
        if isinstance(e, Const):
            return str(int(e.value)) if e.type == "int" else "(q >= 0)" if e.value else "(q < 0)"
        if isinstance(e, Index):
            return "q" if e.axis == "q" else "k"
        if isinstance(e, Load):
            x = self.load(e.operand, e.row, e.col)
            # sums in a normal form may leave the range that those of the graph kept to
            return self.let(f"{x} != 0" if e.dtype == "bool" else f"{x}.to(tl.int64)")
        if isinstance(e, Linear):
            return self.let(self._sum(e))
        assert isinstance(e, Apply)
        args = [self.value(x) for x in e.args]
        return self.let(_apply(e, args))

    def _sum(self, e: Linear) -> str:
        wide = is_wide(e)
        parts = []
        for c, t in e.terms:
            x = f"{self.value(t)}.to(tl.int64)" if wide else self.value(t)
            parts.append(("- " if c == -1 else "+ ") + (x if abs(c) == 1 else f"{x} * ({c})"))
        if e.const:
            parts.append(f"+ ({e.const})")
        return " ".join(parts).removeprefix("+ ")

    def number(self, e: Expr) -> str:
        """Code for an integer in float32, rounded to it: a name."""
        x = self.value(e)
        return self.let(f"({x}).to(tl.float32)" if self.module.far or not is_little(e) else f"lifted({x})")

    def load(self, operand: int, row: Expr | None = None, col: Expr | None = None) -> str:
        """An element of an operand for each query and key, 0 outside of them."""
        place, mask = self.place(operand, row, col, f"at[{operand}]", f"st[{operand}]")
        return self.let(f"tl.load({place}, mask={mask}, other=0)" if mask else f"tl.load({place})")

    def added(self, step: Bias) -> str:
        """What a bias adds, before its factor; in full tiles without a look at what exists."""
        place, mask = self.place(step.operand, step.row, step.col, f"at[{step.operand}]", f"st[{step.operand}]")
        if not mask or not self.module.unmasked(step):
            return self.let(f"tl.load({place}, mask={mask}, other=0)" if mask else f"tl.load({place})")
        name = self.let("0")
        self.lines[-1:] = [
            "if FULL:",
            f"    {name} = tl.load({place})",
            "else:",
            f"    {name} = tl.load({place}, mask={mask}, other=0)",
        ]
        return name

    def _index(self, own: Expr) -> str:
        """An index of an operand's element that exists, int64."""
        names: dict[Expr, str] = {expr.Q: "q", expr.K: "wide(k)"}
        if isinstance(own, Linear) and all(t in names for _, t in own.terms):
            parts = [f"+ {c} * {names[t]}.to(tl.int64)" for c, t in own.terms]
            return f"({' '.join([*parts, f'+ ({own.const})']).removeprefix('+ ')})"
        return f"{self.value(own)}.to(tl.int64)"

    def place(self, operand: int, row: Expr | None, col: Expr | None, base: str, strides: str) -> tuple[str, str]:
        """The address of an operand's element, and the mask of those that exist ('' for one number)."""
        dims = self.module.spec.operands[operand].dims
        terms, uses = [base], set()
        table = row is not None or col is not None
        for which, (own, name) in enumerate(((row, "q"), (col, "k"))):
            if own is not None:
                uses |= self.module.uses(own)
                if self.module.inside:
                    terms.append(f"{self._index(own)} * {strides}[{which}]")
                    continue
                found = self.value(own)
                terms.append(f"clamped({found}, n[{operand}][{which}]).to(tl.int64) * {strides}[{which}]")
            elif dims[which - 2] != "1":
                uses.add(name)
                # a table's other dim is the query's or the key's own; nobody has seen how long packed sequences are
                own_size = not table and not self.module.spec.packed
                bound = name if own_size else f"clamped({name}, n[{operand}][{which}])"
                terms.append(f"{bound}.to(tl.int64) * {strides}[{which}]")
        mask = " & ".join(f"({x} < {x.upper()}n)" for x in sorted(uses, reverse=True))
        return " + ".join(terms), mask


def is_wide(e: Linear) -> bool:
    """Whether the sum, or a part of it, may leave int32 for indices of tensors that a kernel takes."""
    index = Algebra(LONGEST + 1, LONGEST + 1)
    reach = abs(e.const) + sum(abs(c) * max(map(abs, index.bounds(t))) for c, t in e.terms)
    return reach >= 2**31


def is_little(e: Expr) -> bool:
    """Whether e is at most LITTLE in magnitude for indices below NEARBY."""
    low, high = Algebra(NEARBY, NEARBY).bounds(e)
    return low >= -LITTLE and high <= LITTLE


def _apply(e: Apply, args: list[str]) -> str:
    two = {"le": "<=", "eq": "==", "ne": "!="}
    if e.op in two:
        return f"{args[0]} {two[e.op]} {args[1]}"
    if e.op in ("and", "or"):
        return f" {'&' if e.op == 'and' else '|'} ".join(args)
    if e.op == "not":
        return f"({args[0]}) == 0"
    if e.op == "int":
        return f"{args[0]}.to(tl.int32)"
    if e.op in ("floordiv", "mod"):
        return f"floor_{'div' if e.op == 'floordiv' else 'mod'}({args[0]}, {args[1]})"
    names = {"min": "tl.minimum", "max": "tl.maximum", "abs": "tl.abs", "where": "tl.where"}
    return f"{names[e.op]}({', '.join(args)})"


class _Module:
    def __init__(self, spec: Attention, approximate: bool = False, far: bool = False, inside: bool = False) -> None:
        self.far = far
        self.inside = inside
        self.spec, self.approximate = spec, approximate
        self.hiding: Hiding = hiding(spec)
        self.cuts = _cuts(spec)
        self.left = _left_over(spec)[0]
        #: of the fills that hide, those that `seen` knows something of besides bounds
        self.looked_at = [i for i in sorted(self.hiding.steps) if self._tells(self.cuts[i].rest)]

    def _tells(self, rest: Expr | None) -> bool:
        """Whether bounds of a mask on a tile say anything, as those of a load for each query and key do not."""
        return rest is not None and not all(map(str.isdecimal, _Intervals(self).of_mask(rest)))

    def uses(self, e: Expr) -> set[str]:
        """Which of q and k the value of e depends on."""
        found: set[str] = set()
        for x in expr.walk(e):
            if isinstance(x, Index):
                found.add(x.axis)
            elif isinstance(x, Load):
                dims = self.spec.operands[x.operand].dims
                found |= {"q"} if x.row is None and dims[-2] != "1" else set()
                found |= {"k"} if x.col is None and dims[-1] != "1" else set()
        return found

    def unmasked(self, step: Bias) -> bool:
        """Whether a bias has an element for each query and key that exists, as far as is known here."""
        return not self.spec.packed and (self.inside or (step.row is None and step.col is None))

    def ragged(self) -> bool:
        """Whether a tile is full to `score` whatever queries exist: nothing is added that is read for each of them."""
        biases = [s for s in self.spec.steps if isinstance(s, Bias) and self.unmasked(s)]
        reads = [Load(s.operand, self.spec.operands[s.operand].dtype, s.row, s.col) for s in biases]
        return not any("q" in self.uses(x) for x in reads)

    def text(self) -> str:
        parts = [
            _HEADER + _APPROXIMATE * self.approximate,
            self._offset(),
            self._bases(),
            self._score(),
            self._score_grad(),
        ]
        parts += [self._weigh(), self._weigh_grad(), self._left(), self._keys(), self._queries(), self._seen()]
        parts += [self._sink()]
        return "\n\n".join(parts)

    def _define(self, name: str, arguments: str, lines: list[str]) -> str:
        return "\n".join(["@triton.jit", f"def {name}({arguments}):", *(f"    {x}" for x in lines)]) + "\n"

    # -- where things are

    def _offset(self) -> str:
        rank = len(self.spec.batch)
        lines = ["o = e * 0", "rest = e"]
        for d in reversed(range(rank)):
            lines.append(f"o += (rest % sizes[{d}]) * strides[{d}]")
            lines.append(f"rest = rest // sizes[{d}]")
        return self._define("offset", "e, sizes, strides", [*lines, "return o"])

    def _bases(self) -> str:
        made = ", ".join(f"ops[{i}] + offset(e, sizes, bst[{i}])" for i in range(len(self.spec.operands)))
        return self._define("bases", "e, sizes, ops, bst", [f"return ({made}{',' if made else ''})"])

    # -- scores

    def _score(self) -> str:
        body = _Body(self)
        saved = []
        joined, end = rounding.joined(self.spec.steps), 0
        for i, step in enumerate(self.spec.steps):
            if i == self.left and isinstance(step, Scale):
                continue
            if self._taken_along(i):
                continue
            if i in joined:
                end = joined[i]
                body.lines += ["scores = s", "s = tl.zeros_like(s)"]
            kept = self._step(body, i, step)
            saved += [kept] if kept else []
            if end and i == end:
                body.lines.append("s = scores + s")
                self._step(body, i, step)
        return self._define(
            "score",
            f"s, q, k, FULL: tl.constexpr, {_CONTEXT}",
            [*body.lines, f"return s, ({', '.join(saved)}{',' if saved else ''})"],
        )

    def _ramp(self, body: _Body, step: Ramp, left: bool) -> str:
        """What a ramp adds; left: to scores that are to be multiplied afterwards."""
        factor = f"{body.load(step.operand)}.to(tl.float32)"
        constant = step.alpha / (_left_over(self.spec)[1] if left else 1.0)
        alpha = "" if constant == 1.0 else f" * {_number(constant)}"
        if step.dtype == "float32":
            # a number of the head takes the constant: one multiply-add for each score
            added = f"{_as(step.number_dtype, body.number(step.number))} * {body.let(factor + alpha)}"
        else:
            added = body.let(f"{_as(step.number_dtype, body.number(step.number))} * {body.let(factor)}")
            added = f"{_as(step.dtype, added)}{alpha}"
        return added if step.keep is None else f"tl.where({body.value(step.keep)}, {added}, 0.0)"

    def _taken_along(self, i: int) -> bool:
        """Whether step i is a factor that the tanh after it multiplies with."""
        if not self.approximate or not 0 <= i < len(self.spec.steps) - 1:
            return False
        step, after = self.spec.steps[i : i + 2]
        return isinstance(step, Scale) and step.operand is None and isinstance(after, (Softcap, Tanh))

    def _step(self, body: _Body, i: int, step: Step) -> str:
        """Write a score step; returns the name of what its gradient needs."""
        put = body.lines.append
        if isinstance(step, Scale):
            if step.operand is None:
                put(f"s = s * {_number(step.value)}")
                return ""
            kept = body.let("s")
            put(f"s = s * {body.load(step.operand)}.to(tl.float32)")
            return kept
        if isinstance(step, Bias):
            x = f"{body.added(step)}.to(tl.float32)"
            added = x if step.alpha == 1.0 else f"{x} * {_number(step.alpha)}"
            put(f"s = s + {added}" if step.keep is None else f"s = s + tl.where({body.value(step.keep)}, {added}, 0.0)")
        elif isinstance(step, Ramp):
            put(f"s = s + {self._ramp(body, step, 0 <= self.left < i)}")
        elif isinstance(step, Shift):
            put(f"s = s + {_number(step.value)}")
        elif isinstance(step, (Softcap, Tanh)):
            cap = step.cap if isinstance(step, Softcap) else 1.0
            if self.approximate:
                before = self.spec.steps[i - 1]
                factor = before.value if self._taken_along(i - 1) and isinstance(before, Scale) else 1.0
                kept = body.let(f"tanh_of_device(s * {_number(factor / cap)})")
            elif self.spec.qk_dtype == "float32":
                kept = body.let(f"tanh(s / {_number(cap)})")
            else:
                kept = body.let(f"tanh_of_half(s * {_number(2.0 * math.log2(math.e) / cap)})")
            put(f"s = {kept}" if i == self.left else f"s = {kept} * {_number(cap)}")
            return kept
        elif isinstance(step, Clamp):
            kept = body.let("s")
            # a comparison with NaN is false: NaN stays
            put(f"s = tl.where(s < {_number(step.low)}, {_number(step.low)}, s)")
            put(f"s = tl.where(s > {_number(step.high)}, {_number(step.high)}, s)")
            return kept
        elif isinstance(step, (ReplaceFill, AddFill)):
            value = _number(step.value)
            self._masked(body, i, "s", value if isinstance(step, ReplaceFill) else f"s + {value}")
        elif isinstance(step, Cast):
            if rounding.rounds(step):
                dtype = dtype_of(step.dtype)
                cut = 13 if step.dtype == "float16" else 16
                put(f"s = held(s, {cut}, {_number(rounding.COARSE[dtype])}, {_number(torch.finfo(dtype).max)})")
        else:
            raise ValueError(f"the Triton kernels do not know the step {step!r}")
        return ""

    def _masked(self, body: _Body, step: int, x: str, filled: str) -> None:
        """Write where the mask of a step leaves x, which is `filled` elsewhere."""
        found = self.cuts[step]
        sure = step in self.looked_at
        # what is computed for some tiles only is not shared with what stands outside
        outer = body.inner() if sure else body
        rest = [] if found.rest is None else [f"({outer.value(found.rest)})"]
        inner = outer.inner()
        edges = [f"({_bound(kind, inner.value(bound))})" for kind, bound in found.bounds.items()]
        lines = [f"{x} = tl.where({' & '.join(rest + edges)}, {x}, {filled})"]
        if edges:
            otherwise = [f"{x} = tl.where({rest[0]}, {x}, {filled})"] if rest else ["pass"]
            lines = ["if not FULL:", *indented([*inner.lines, *lines]), "else:", *indented(otherwise)]
        body.lines += ["if FULL < 2:", *indented([*outer.lines, *lines])] if sure else lines

    def _score_grad(self) -> str:
        body = _Body(self)
        at = sum(map(_saves, self.spec.steps))
        for i, step in reversed(list(enumerate(self.spec.steps))):
            at -= _saves(step)
            if i != self.left or not isinstance(step, Scale):
                self._reverse(body, i, step, f"saved[{at}]")
        return self._define(
            "score_grad",
            f"g, saved, q, k, FULL: tl.constexpr, gat, gst, GIVE: tl.constexpr, QUERIES: tl.constexpr, {_CONTEXT}",
            [*body.lines, "return g"],
        )

    def _reverse(self, body: _Body, i: int, step: Step, saved: str) -> None:
        put = body.lines.append
        if isinstance(step, Scale):
            if step.operand is None:
                put(f"g = g * {_number(step.value)}")
                return
            self._give(body, step.operand, None, None, f"g * {saved}")
            put(f"g = g * {body.load(step.operand)}.to(tl.float32)")
        elif isinstance(step, Bias):
            given = "g" if step.alpha == 1.0 else f"g * {_number(step.alpha)}"
            if step.keep is not None:
                given = f"tl.where({body.value(step.keep)}, {given}, 0.0)"
            self._give(body, step.operand, step.row, step.col, given)
        elif isinstance(step, Ramp):
            inner = body.inner()
            given = f"{_as(step.number_dtype, inner.number(step.number))} * g"
            given = given if step.alpha == 1.0 else f"{given} * {_number(step.alpha)}"
            if step.keep is not None:
                given = f"tl.where({inner.value(step.keep)}, {given}, 0.0)"
            self._give(body, step.operand, None, None, given, inner)
        elif isinstance(step, (Softcap, Tanh)):
            put(f"g = g * (1.0 - {saved} * {saved})")
        elif isinstance(step, Clamp):
            put(f"g = tl.where(({saved} >= {_number(step.low)}) & ({saved} <= {_number(step.high)}), g, 0.0)")
        elif isinstance(step, ReplaceFill):
            self._masked(body, i, "g", "0.0")

    def _give(
        self, body: _Body, operand: int, row: Expr | None, col: Expr | None, given: str, inner: _Body | None = None
    ) -> None:
        """Add `given`, a tile, to the gradient of an operand, in the kernel that is to make it. inner: what computes it."""
        inner = inner or body.inner()
        dims = self.spec.operands[operand].dims[-2:]
        place, mask = inner.place(operand, row, col, f"gat[{operand}]", f"gst[{operand}]")
        x = inner.let(given)
        if row is None and col is None:
            if dims[0] == "1":
                x = inner.let(f"tl.sum({x}, QUERIES, keep_dims=True)")
            if dims[1] == "1":
                x = inner.let(f"tl.sum({x}, 1 - QUERIES, keep_dims=True)")
            if dims == ("1", "1"):
                # an address for each tile of queries, where sums are kept apart for their order: elsewhere the stride is 0
                apart = f"tl.min(q, QUERIES, keep_dims=True).to(tl.int64) * gst[{operand}][0]"
                place, mask = f"{place} + {apart}", ""
        else:
            mask = "(q < Qn) & (k < Kn)"
            place = f"{place} + tl.zeros_like({x}).to(tl.int32)"
        inner.lines.append(f"tl.atomic_add({place}, {x}, {f'mask={mask}, ' if mask else ''}sem='relaxed')")
        body.lines.append(f"if (GIVE >> {operand}) & 1:")
        body.lines += indented(inner.lines)

    # -- weights

    def _factor(self, body: _Body, step: Scale) -> str:
        return _number(step.value) if step.operand is None else body.let(f"{body.load(step.operand)}.to(tl.float32)")

    def _weigh(self) -> str:
        body = _Body(self)
        for step in self.spec.weight_steps:
            if isinstance(step, Scale):
                body.lines.append(f"p = p * {self._factor(body, step)}")
            elif isinstance(step, ReplaceFill) and step.value == 0.0:
                body.lines.append(f"p = tl.where({body.value(step.keep)}, p, 0.0)")
            elif not isinstance(step, Cast):
                raise ValueError(f"the Triton kernels do not know the step {step!r} on weights")
        return self._define("weigh", f"p, q, k, {_CONTEXT}", [*body.lines, "return p"])

    def _weigh_grad(self) -> str:
        """The steps are linear, one after the other: the gradient of each needs the weights before it."""
        body = _Body(self)
        before = ["p"]
        factors = []
        for step in self.spec.weight_steps:
            factor = ""
            if isinstance(step, Scale):
                factor = self._factor(body, step)
                before.append(body.let(f"{before[-1]} * {factor}"))
            elif isinstance(step, ReplaceFill):
                before.append(body.let(f"tl.where({body.value(step.keep)}, {before[-1]}, 0.0)"))
            else:
                before.append(before[-1])
            factors.append(factor)
        for step, p, factor in list(zip(self.spec.weight_steps, before, factors))[::-1]:
            if isinstance(step, Scale):
                if step.operand is not None:
                    self._give(body, step.operand, None, None, f"g * {p}")
                body.lines.append(f"g = g * {factor}")
            elif isinstance(step, ReplaceFill):
                body.lines.append(f"g = tl.where({body.value(step.keep)}, g, 0.0)")
        return self._define(
            "weigh_grad",
            f"g, p, q, k, gat, gst, GIVE: tl.constexpr, QUERIES: tl.constexpr, {_CONTEXT}",
            [*body.lines, "return g"],
        )

    def _left(self) -> str:
        body = _Body(self)
        made = [f"({body.value(s.keep)})" for s in self.spec.weight_steps if isinstance(s, ReplaceFill)]
        return self._define("left", f"q, k, {_CONTEXT}", [*body.lines, f"return {' & '.join([*made, '(q >= 0)'])}"])

    def _sink(self) -> str:
        body, sink = _Body(self), self.spec.sink or Sink()
        value = _number(sink.value) if sink.operand is None else f"{body.load(sink.operand)}.to(tl.float32)"
        return self._define(
            "sink", f"q, {_CONTEXT}", [*body.lines, f"return tl.zeros_like(q).to(tl.float32) + {value}"]
        )

    # -- what tiles see

    def _bounds(self, hiding_only: bool) -> list[tuple[str, Expr]]:
        steps = self.hiding.steps if hiding_only else self.cuts
        return [(kind, bound) for i in sorted(steps) for kind, bound in self.cuts[i].bounds.items()]

    def _scalar(self, body: _Body, e: Expr) -> str:
        """A bound, which depends on no query and no key, as a 32-bit number."""
        found = body.value(e)
        if isinstance(e, Const):
            return str(max(-LONGEST, min(LONGEST, int(e.value))))
        return body.let(f"tl.minimum(tl.maximum({found}, -{LONGEST}), {LONGEST}).to(tl.int32)")

    def _keys(self) -> str:
        body = _Body(self)
        lo, hi, full_lo, full_hi = ["0"], ["Kn"], ["0"], ["Kn"]
        for hides, low, high, first, last in ((True, lo, hi, "q0", "q1"), (False, full_lo, full_hi, "q1", "q0")):
            for kind, bound in self._bounds(hides):
                x = self._scalar(body, bound)
                (low if kind.startswith("from") else high).append(
                    f"{first} + {x}" if kind == "from_q" else f"{last} + {x}" if kind == "below_q" else x
                )
        made = [_most("maximum", lo), _most("minimum", hi), _most("maximum", full_lo), _most("minimum", full_hi)]
        return self._define("keys", f"q0, q1, {_CONTEXT}", [*body.lines, f"return {', '.join(made)}"])

    def _queries(self) -> str:
        body = _Body(self)
        lo, hi, full_lo, full_hi = ["0"], ["Qn"], ["0"], ["Qn"]
        for hides, low, high, first, last in ((True, lo, hi, "k0", "k1"), (False, full_lo, full_hi, "k1", "k0")):
            for kind, bound in self._bounds(hides):
                x = self._scalar(body, bound)
                if kind == "below_q":
                    low.append(f"{first} - {x} + 1")
                elif kind == "from_q":
                    high.append(f"{last} - {x} + 1")
                else:
                    outside = f"{first} >= {x}" if kind == "below" else f"{last} < {x}"
                    high.append(body.let(f"tl.where({outside}, 0, Qn)"))
        made = [_most("maximum", lo), _most("minimum", hi), _most("maximum", full_lo), _most("minimum", full_hi)]
        return self._define("queries", f"k0, k1, {_CONTEXT}", [*body.lines, f"return {', '.join(made)}"])

    def _seen(self) -> str:
        body = _Intervals(self)
        some, sure = ["(k0 <= k1)"], ["(k0 <= k1)"]
        for i in self.looked_at:
            low, high = body.of_mask(self.cuts[i].rest)
            some.append(f"({high} > 0)")
            sure.append(f"({low} > 0)")
        return self._define(
            "seen",
            f"q0, q1, k0, k1, BM: tl.constexpr, BN: tl.constexpr, MANY: tl.constexpr, {_CONTEXT}",
            [*body.lines, f"return {' & '.join(some)}, {' & '.join(sure)}"],
        )


def _bound(kind: str, x: str) -> str:
    return {"below_q": f"k < q + {x}", "from_q": f"k >= q + {x}", "below": f"k < {x}", "from": f"k >= {x}"}[kind]


def _most(op: str, parts: list[str]) -> str:
    found, *others = dict.fromkeys(parts)
    for x in others:
        found = f"tl.{op}({found}, {x})"
    return found


Ends = tuple[str, str]


class _Intervals(_Body):
    """Bounds of expressions on a tile, as scalars; None for a part of which nothing is known."""

    def __init__(self, module: _Module) -> None:
        super().__init__(module)
        self.ends: dict[Expr, Ends | None] = {}

    def of(self, e: Expr) -> Ends | None:
        if e not in self.ends:
            self.ends[e] = self._of(e)
        return self.ends[e]

    def of_mask(self, e: Expr | None) -> Ends:
        assert e is not None
        return self.of(e) or ("0", "1")

    def _both(self, lo: str, hi: str) -> Ends:
        return self.let(lo), self.let(hi)

    def _of(self, e: Expr) -> Ends | None:
        if isinstance(e, Const):
            return (str(int(e.value)),) * 2
        if isinstance(e, Index):
            return ("q0", "q1") if e.axis == "q" else ("k0", "k1")
        if isinstance(e, Load):
            return self._loaded(e)
        if isinstance(e, Linear):
            return self._summed(e)
        assert isinstance(e, Apply)
        if e.op == "abs" and Algebra(LONGEST + 1, LONGEST + 1).bounds(e.args[0])[0] <= expr.INT64[0]:
            # that number's negative is itself
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
        dims = self.module.spec.operands[e.operand].dims[-2:]
        if e.row is not None or e.col is not None or dims == ("Q", "K"):
            return ("0", "1") if e.dtype == "bool" else None
        base, strides = f"at[{e.operand}]", f"st[{e.operand}]"
        if dims == ("1", "1"):
            # any byte but 0 is a true bool
            x = self.let(f"tl.load({base}) != 0" if e.dtype == "bool" else f"tl.load({base}).to(tl.int64)")
            return self._truths(x, x) if e.dtype == "bool" else (x, x)
        by_key = dims[1] != "1"
        first, end, size, stride = (
            ("k0", "Kn", "BN", f"{strides}[1]") if by_key else ("q0", "Qn", "BM", f"{strides}[0]")
        )
        last = f"tl.minimum({end}, n[{e.operand}][{int(by_key)}]) - 1"
        x = self.let(f"ends_of({base}, {first}, {last}, {stride}, {size}, MANY == {1 if by_key else 2})")
        if e.dtype == "bool":
            return self._truths(f"{x}[0] > 0", f"{x}[1] > 0")
        return f"{x}[0]", f"{x}[1]"

    def _summed(self, e: Linear) -> Ends | None:
        # beside numbers that may be anything, bounds wrap where the sum does not
        if not Algebra(LONGEST + 1, LONGEST + 1).is_exact(e):
            return None
        # a scalar of a tile's edge is an int32, and may be a number that the compiler knows
        wide = " + tl.full([], 0, tl.int64)" if is_wide(e) else ""
        lo, hi = [str(e.const)], [str(e.const)]
        for c, t in e.terms:
            ends = self.of(t)
            if ends is None:
                return None
            a, b = (f"({x}{wide})" for x in (ends if c > 0 else ends[::-1]))
            lo.append(f"{a} * ({c})" if c != 1 else a)
            hi.append(f"{b} * ({c})" if c != 1 else b)
        return self._both(" + ".join(lo), " + ".join(hi))

    def _min(self, a: Ends, b: Ends) -> Ends:
        return self._both(f"tl.minimum({a[0]}, {b[0]})", f"tl.minimum({a[1]}, {b[1]})")

    def _max(self, a: Ends, b: Ends) -> Ends:
        return self._both(f"tl.maximum({a[0]}, {b[0]})", f"tl.maximum({a[1]}, {b[1]})")

    def _abs(self, a: Ends) -> Ends:
        return self._both(f"tl.maximum(tl.maximum({a[0]}, -({a[1]})), 0)", f"tl.maximum(-({a[0]}), {a[1]})")

    def _floordiv(self, a: Ends, b: Ends) -> Ends:
        return self._both(f"floor_div({a[0]}, {b[0]})", f"floor_div({a[1]}, {b[0]})")

    def _mod(self, a: Ends, b: Ends) -> Ends:
        same = self.let(f"floor_div({a[0]}, {b[0]}) == floor_div({a[1]}, {b[0]})")
        return self._both(
            f"tl.where({same}, floor_mod({a[0]}, {b[0]}), 0)",
            f"tl.where({same}, floor_mod({a[1]}, {b[0]}), {b[0]} - 1)",
        )

    def _where(self, c: Ends, a: Ends, b: Ends) -> Ends:
        low, high = f"tl.minimum({a[0]}, {b[0]})", f"tl.maximum({a[1]}, {b[1]})"
        return self._both(
            f"tl.where({c[0]} > 0, {a[0]}, tl.where({c[1]} <= 0, {b[0]}, {low}))",
            f"tl.where({c[0]} > 0, {a[1]}, tl.where({c[1]} <= 0, {b[1]}, {high}))",
        )

    def _truths(self, lo: str, hi: str) -> Ends:
        return self._both(f"tl.where({lo}, 1, 0)", f"tl.where({hi}, 1, 0)")

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
        return _most("minimum", [x[0] for x in known]), _most("minimum", [x[1] for x in known])

    def _or(self, args: list[Ends | None]) -> Ends:
        known = [x or ("0", "1") for x in args]
        return _most("maximum", [x[0] for x in known]), _most("maximum", [x[1] for x in known])
