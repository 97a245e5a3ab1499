"""Spec -> the source of the Triton functions that the kernels in template.py call: the score program and its masks.

What they say is kernels/program; this is how it is written for tiles. GIVE has a bit set for each operand whose gradient the
calling kernel adds up, at the addresses `gat` with the strides `gst`. Every generated function takes the same context: `at` (each
operand's address at the batch element), `st` (its row and column strides), `n` (its rows and columns), Qn and Kn (the numbers of
queries and keys).

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
    falling(SIZE, ...)                           which pairs of documents have ids that do not ascend, as bits
    documents_of_keys(k0, k1, falling, ...)      the queries that may see keys k0 to k1, by ids that ascend
    documents_of_queries(q0, q1, falling, ...)   the keys that queries q0 to q1 may see, by the same
    seen(q0, q1, k0, k1, BM, BN, MANY, ...)      whether a tile may hold a key that is not hidden, and whether it surely holds no
                                                 other by what is no bound; MANY: 1 where k0 and k1 are those of many tiles, 2
                                                 where q0 and q1 are

Tiles have a row for each query, or where QUERIES is 1 one for each key; q and k broadcast with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

from attnfuse import expr
from attnfuse.expr import Expr, Linear
from attnfuse.kernels.program.dialect import Dialect, Let, Read, indented
from attnfuse.kernels.program.module import Module
from attnfuse.kernels.program.traits import NEARBY as NEARBY
from attnfuse.kernels.program.traits import Traits as Traits
from attnfuse.kernels.program.traits import approximable as approximable
from attnfuse.kernels.program.traits import by_columns as by_columns
from attnfuse.kernels.program.traits import cuts as cuts
from attnfuse.kernels.program.traits import documents as documents
from attnfuse.kernels.program.traits import indices as indices
from attnfuse.kernels.program.traits import limits as limits
from attnfuse.kernels.program.traits import looked_at as looked_at
from attnfuse.kernels.program.traits import traits as traits
from attnfuse.spec import Attention

_CONTEXT = "at, st, n, Qn, Kn"
_GRADIENTS = "gat, gst, GIVE: tl.constexpr, QUERIES: tl.constexpr"
_ARGUMENTS = {
    "offset": "e, sizes, strides",
    "bases": "e, sizes, ops, bst",
    "score": f"s, q, k, FULL: tl.constexpr, {_CONTEXT}",
    "score_grad": f"g, saved, q, k, FULL: tl.constexpr, {_GRADIENTS}, {_CONTEXT}",
    "weigh": f"p, q, k, {_CONTEXT}",
    "weigh_grad": f"g, p, q, k, {_GRADIENTS}, {_CONTEXT}",
    "left": f"q, k, {_CONTEXT}",
    "keys": f"q0, q1, {_CONTEXT}",
    "queries": f"k0, k1, {_CONTEXT}",
    "seen": f"q0, q1, k0, k1, BM: tl.constexpr, BN: tl.constexpr, MANY: tl.constexpr, {_CONTEXT}",
    "falling": f"SIZE: tl.constexpr, {_CONTEXT}",
    "documents_of_keys": f"k0, k1, falling, {_CONTEXT}",
    "documents_of_queries": f"q0, q1, falling, {_CONTEXT}",
    "sink": f"q, {_CONTEXT}",
}
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
def falls(place, stride, count, SIZE: tl.constexpr):
    # whether one of `count` integers is less than the one before, SIZE looked at at once
    found = tl.full([], 0, tl.int32)
    for start in range(1, count, SIZE):
        i = start + tl.arange(0, SIZE)
        x = tl.load(place + (i - 1).to(tl.int64) * stride, mask=i < count, other=0)
        y = tl.load(place + i.to(tl.int64) * stride, mask=i < count, other=0)
        found = found | tl.max(((y < x) & (i < count)).to(tl.int32), 0)
    return found


@triton.jit
def bisected(place, stride, count, x, AFTER: tl.constexpr):
    # the place of the first of `count` ascending integers that is x or more, or with AFTER of the first that is more
    low = tl.full([], 0, tl.int32)
    high = low + count
    while low < high:
        middle = (low + high) // 2
        y = tl.load(place + middle.to(tl.int64) * stride).to(tl.int64)
        before = y <= x if AFTER else y < x
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    return low


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


def source(spec: Attention, approximate: bool = False, far: bool = False, inside: bool = False) -> str:
    """The text of the module for `spec`. Raises ValueError for what the kernels cannot compute.

    approximate: tanh is the instruction of NVIDIA's devices, an error of 2^-11, and takes a factor before it along. far: there may
    be NEARBY queries or keys, or more. inside: of queries and keys that exist, `indices` are those of elements that exist.
    """
    made = Module(TRITON, spec, approximate, far, inside)
    return "\n\n".join(
        [
            _HEADER + _APPROXIMATE * approximate,
            TRITON.define("offset", _offset(len(spec.batch))),
            TRITON.define("bases", _bases(len(spec.operands))),
            made.score(),
            made.score_grad(),
            made.weigh(),
            made.weigh_grad(),
            made.left_weights(),
            made.keys(),
            made.queries(),
            made.seen(),
            made.sink(),
            *_documents(spec),
        ]
    )


def _offset(rank: int) -> list[str]:
    lines = ["o = e * 0", "rest = e"]
    for d in reversed(range(rank)):
        lines.append(f"o += (rest % sizes[{d}]) * strides[{d}]")
        lines.append(f"rest = rest // sizes[{d}]")
    return [*lines, "return o"]


def _bases(operands: int) -> list[str]:
    made = ", ".join(f"ops[{i}] + offset(e, sizes, bst[{i}])" for i in range(operands))
    return [f"return ({made}{',' if made else ''})"]


def _documents(spec: Attention) -> list[str]:
    """The functions of documents, where there are any: ids of keys lie in columns, those of queries in rows."""
    pairs = documents(spec)
    if not pairs:
        return []
    falling = [f"falls(at[{x}], st[{x}][1], Kn, SIZE) | falls(at[{y}], st[{y}][0], Qn, SIZE)" for x, y in pairs]
    made = [TRITON.define("falling", [f"return {' | '.join(f'(({f}) << {i})' for i, f in enumerate(falling))}"])]
    for name, first, last, own, other, count in (
        ("documents_of_keys", "k0", "k1", 1, 0, "Qn"),
        ("documents_of_queries", "q0", "q1", 0, 1, "Kn"),
    ):
        lines = ["lo = tl.full([], 0, tl.int32)", f"hi = lo + {count}"]
        for i, (key, query) in enumerate(pairs):
            x, y = (key, query) if own else (query, key)
            ids = [f"tl.load(at[{x}] + {end}.to(tl.int64) * st[{x}][{own}]).to(tl.int64)" for end in (first, last)]
            place = f"at[{y}], st[{y}][{other}], {count}"
            lines += [
                f"if (falling >> {i}) & 1 == 0:",
                f"    lo = tl.maximum(lo, bisected({place}, {ids[0]}, False))",
                f"    hi = tl.minimum(hi, bisected({place}, {ids[1]}, True))",
            ]
        made.append(TRITON.define(name, [*lines, "return lo, hi"]))
    return made


class _Triton(Dialect):
    """Tiles: q is [rows, 1] and k [1, columns], or the other way round."""

    kernels = "Triton"
    sizes: ClassVar = {"q": "Qn", "k": "Kn"}

    # -- numbers

    def truth(self, value: bool) -> str:
        return "(q >= 0)" if value else "(q < 0)"

    def real(self, value: float) -> str:
        if math.isnan(value):
            raise ValueError("a step with NaN")
        return repr(float(value)) if math.isfinite(value) else f"float('{'-' if value < 0 else ''}inf')"

    # -- lines

    def let(self, name: str, code: str) -> str:
        return f"{name} = {code}"

    set = let

    def define(self, name: str, lines: Sequence[str]) -> str:
        return "\n".join(["@triton.jit", f"def {name}({_ARGUMENTS[name]}):", *indented(lines)]) + "\n"

    def returned(self, *codes: str) -> str:
        return f"return {', '.join(codes)}"

    def scored(self, saved: Sequence[str]) -> list[str]:
        return [f"return s, ({', '.join(saved)}{',' if saved else ''})"]

    def saved(self, place: int) -> str:
        return f"saved[{place}]"

    def apart(self, step: int) -> tuple[list[str], str]:
        return ["scores = s", "s = tl.zeros_like(s)"], "scores"

    def unless_full(self, level: int, lines: Sequence[str], otherwise: Sequence[str] | None = None) -> list[str]:
        made = ["if not FULL:" if level == 1 else f"if FULL < {level}:", *indented(lines)]
        return made if otherwise is None else [*made, "else:", *indented(otherwise or ["pass"])]

    # -- expressions

    def call(self, name: str, *args: str) -> str:
        return f"{name}({', '.join(args)})"

    def choose(self, condition: str, a: str, b: str) -> str:
        return f"tl.where({condition}, {a}, {b})"

    def least(self, a: str, b: str) -> str:
        return f"tl.minimum({a}, {b})"

    def greatest(self, a: str, b: str) -> str:
        return f"tl.maximum({a}, {b})"

    def every(self, conditions: Sequence[str]) -> str:
        return " & ".join(conditions)

    def sum(self, terms: Sequence[tuple[int, str]], const: int, wide: bool) -> str:
        parts = []
        for c, t in terms:
            x = f"{t}.to(tl.int64)" if wide else t
            parts.append(("- " if c == -1 else "+ ") + (x if abs(c) == 1 else f"{x} * ({c})"))
        if const:
            parts.append(f"+ ({const})")
        return " ".join(parts).removeprefix("+ ")

    def sum_of_ends(self, terms: Sequence[tuple[int, str]], const: int, wide: bool) -> str:
        # a scalar of a tile's edge is an int32, and may be a number that the compiler knows
        zero = " + tl.full([], 0, tl.int64)" if wide else ""
        return " + ".join([str(const), *(f"({x}{zero})" + (f" * ({c})" if c != 1 else "") for c, x in terms)])

    def apply(self, op: str, args: Sequence[str]) -> str:
        two = {"le": "<=", "eq": "==", "ne": "!="}
        if op in two:
            return f"{args[0]} {two[op]} {args[1]}"
        if op in ("and", "or"):
            return f" {'&' if op == 'and' else '|'} ".join(args)
        if op == "not":
            return f"({args[0]}) == 0"
        if op == "int":
            return f"{args[0]}.to(tl.int32)"
        if op in ("floordiv", "mod"):
            return f"floor_{'div' if op == 'floordiv' else 'mod'}({args[0]}, {args[1]})"
        names = {"min": "tl.minimum", "max": "tl.maximum", "abs": "tl.abs", "where": "tl.where"}
        return f"{names[op]}({', '.join(args)})"

    def narrow(self, x: str, most: int) -> str:
        return f"tl.minimum(tl.maximum({x}, -{most}), {most}).to(tl.int32)"

    def of_integer(self, x: str, little: bool) -> str:
        return f"lifted({x})" if little else f"({x}).to(tl.float32)"

    def rounded(self, dtype: str, x: str) -> str:
        return f"({x}).to(tl.{dtype}).to(tl.float32)"

    def of_rows(self, x: str) -> str:
        return f"tl.zeros_like(q).to(tl.float32) + {x}"

    # -- operands

    def place(self, x: str) -> str:
        return f"{x}.to(tl.int64)"

    def clamped(self, x: str, operand: int, which: int) -> str:
        return f"clamped({x}, n[{operand}][{which}])"

    def own_index(self, own: Expr, value: Callable[[Expr], str]) -> str:
        names: dict[Expr, str] = {expr.Q: "q", expr.K: "wide(k)"}
        if isinstance(own, Linear) and all(t in names for _, t in own.terms):
            parts = [f"+ {c} * {self.place(names[t])}" for c, t in own.terms]
            return f"({' '.join([*parts, f'+ ({own.const})']).removeprefix('+ ')})"
        return self.place(value(own))

    def load(self, read: Read) -> str:
        return self._load(read, masked=bool(read.mask))

    def _load(self, read: Read, masked: bool) -> str:
        return f"tl.load({_address(read)}, mask={read.mask}, other=0)" if masked else f"tl.load({_address(read)})"

    def load_added(self, name: str, read: Read) -> list[str]:
        return [
            "if FULL:",
            f"    {name} = {self._load(read, masked=False)}",
            "else:",
            f"    {name} = {self._load(read, masked=True)}",
        ]

    def loaded(self, x: str, dtype: str) -> str:
        return f"{x} != 0" if dtype == "bool" else f"{x}.to(tl.int64)"

    def real_of(self, x: str, dtype: str) -> str:
        return f"{x}.to(tl.float32)"

    def ends(self, read: Read, which: int, let: Let) -> tuple[str, str]:
        first, count, size = ("k0", "Kn", "BN") if which else ("q0", "Qn", "BM")
        last = f"tl.minimum({count}, n[{read.operand}][{which}]) - 1"
        stride = f"st[{read.operand}][{which}]"
        x = let(f"ends_of({_address(read)}, {first}, {last}, {stride}, {size}, MANY == {1 if which else 2})")
        return f"{x}[0]", f"{x}[1]"

    def give(self, read: Read, given: str, let: Let) -> list[str]:
        x, place, mask = let(given), _address(read, "g"), read.mask
        if read.table:
            mask = self.exists(("q", "k"))
            place = f"{place} + tl.zeros_like({x}).to(tl.int32)"
        else:
            if read.dims[0] == "1":
                x = let(f"tl.sum({x}, QUERIES, keep_dims=True)")
            if read.dims[1] == "1":
                x = let(f"tl.sum({x}, 1 - QUERIES, keep_dims=True)")
            if read.dims == ("1", "1"):
                # an address for each tile of queries, where sums are kept apart for their order: elsewhere the stride is 0
                apart = f"tl.min(q, QUERIES, keep_dims=True).to(tl.int64) * gst[{read.operand}][0]"
                place, mask = f"{place} + {apart}", ""
        return [f"tl.atomic_add({place}, {x}, {f'mask={mask}, ' if mask else ''}sem='relaxed')"]

    def given(self, operand: int, lines: Sequence[str]) -> list[str]:
        return [f"if (GIVE >> {operand}) & 1:", *indented(lines)]


TRITON = _Triton()


def _address(read: Read, of: str = "") -> str:
    """Where an element is; of: 'g' for that of the operand's gradient."""
    base, strides = f"{of}at[{read.operand}]", f"{of}st[{read.operand}]"
    return " + ".join([base, *(f"{x} * {strides}[{which}]" for which, x in read.parts)])
