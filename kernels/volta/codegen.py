"""Spec -> the CUDA C++ functions that the kernels for 7.0 and 7.5 call: the score program and its masks, for one query and key.

What they say is kernels/program; this is how it is written for one score. The text is C++17 without headers, and comes after that
of device.cuh and problem.cuh. An operand is read at `c.at[i]` with the strides `c.p.st[i]`, and has `c.p.n[i]` rows and columns.

    score<FULL>(s, q, k, c, saved)         the score after all steps; `saved`: what the gradients of steps need
    score_grad<FULL>(g, saved, q, k, c, sums, row, col)
                                           gradient of the score before all steps
    weigh(p, q, k, c)                      the weight after its steps
    weigh_grad(g, p, q, k, c, sums, row, col)
                                           gradient of the weight before its steps
    sink(q, c)                             the score that a row has besides those of its keys
    left(q, k, c)                          whether the fills of weights leave this one
    keys(q0, q1, c), queries(k0, k1, c)    the keys that queries q0 to q1 may see, [lo, hi), and those that all of them see,
                                           [first, last); and the other way round
    seen(q0, q1, k0, k1, c)                of a tile: `some`, whether it may hold a key that is not hidden, and `sure`, whether it
                                           surely holds no other by what is no bound; all lanes of a warp call it alike

Gradients of operands go to `sums`. Where `wants<I>()`, operand I gets x by `give<I>(row, col, q, k, x)` if it is read at (q, k),
and by `scatter<I>(row_index, col_index, q, k, x)` if it is read at computed indices; `row` and `col` are passed on. Outside of the
matrix nothing is read, but x is given: `sums` knows what exists.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Sequence
from typing import ClassVar

from attnfuse.kernels.program.dialect import Dialect, Let, Read, indented
from attnfuse.kernels.program.module import Module
from attnfuse.kernels.program.traits import saves
from attnfuse.spec import Attention

#: What an element of an operand is read as, and its bytes.
_TYPES = {
    "float32": ("float", 4),
    "float16": ("u16", 2),
    "bfloat16": ("u16", 2),
    "float64": ("double", 8),
    "bool": ("unsigned char", 1),
    "uint8": ("unsigned char", 1),
    "int8": ("signed char", 1),
    "int16": ("short", 2),
    "int32": ("int", 4),
    "int64": ("i64", 8),
}
#: Integers of a smaller magnitude are int in the text: the sum with an index still is one.
_SHORT = 2**30
_HEADER = """\
namespace program {

DEVICE float tanh(float x) {
    // the odd polynomial where 1 - 2 / (exp(2x) + 1) would lose digits
    const float x2 = x * x;
    const float near =
        x * (1.0f + x2 * (-0.3333333333f + x2 * (0.1333333333f + x2 * (-0.0539682540f + x2 * 0.0218694885f))));
    const float far = 1.0f - 2.0f / (exp2_approximate(x * 2.8853900817779268f) + 1.0f);
    return x2 < 0.0625f ? near : far;
}

DEVICE float tanh_of_half(float x2) {
    // of x2 / (2 log2(e)), right to 3e-7, where what x2 comes from was rounded by far more
    const float root = rsqrt_approximate(exp2_approximate(x2) + 1.0f);
    return 1.0f - (2.0f * root) * root;
}

DEVICE float held(float s, int cut, float coarse, float greatest) {
    // from `coarse` on rounded to a dtype with `cut` bits less, and beyond its greatest number infinite; NaN is left
    const u32 size = bits_of(s) & 0x7FFFFFFFu;
    const float near = float_of_bits((size + ((1u << (cut - 1)) - 1u) + ((size >> cut) & 1u)) >> cut << cut);
    const float whole = near > greatest ? infinity() : near;
    return float_of_bits(size) >= coarse ? (s < 0.0f ? -whole : whole) : s;
}

DEVICE float rounded_to_float16(float x) { return float_of_half(half_of_float(x)); }

DEVICE float rounded_to_bfloat16(float x) {
    const u32 bits = bits_of(x);
    return x != x ? x : float_of_bits((bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u);
}

template <class A, class B> DEVICE auto lower(A a, B b) -> decltype(a + b) { return a < b ? a : b; }
template <class A, class B> DEVICE auto higher(A a, B b) -> decltype(a + b) { return a < b ? b : a; }

// The negative of the least integer is itself.
DEVICE int magnitude(int a) { return a < 0 ? (int)(0u - (u32)a) : a; }
DEVICE i64 magnitude(i64 a) { return a < 0 ? (i64)(0ull - (u64)a) : a; }

// By a positive number.
template <class A, class B> DEVICE auto floor_mod(A a, B b) -> decltype(a + b) { return a % b < 0 ? a % b + b : a % b; }
template <class A, class B> DEVICE auto floor_div(A a, B b) -> decltype(a + b) { return a / b - (a % b < 0 ? 1 : 0); }

template <class T> DEVICE i64 clamped(T i, int n) { return i < 0 ? 0 : i < n ? (i64)i : (i64)n - 1; }

struct Ends {
    i64 low, high;
};

DEVICE i64 shuffled(i64 x, int mask) {
    const u64 low = shuffle_xor((u32)(u64)x, mask), high = shuffle_xor((u32)((u64)x >> 32), mask);
    return (i64)(high << 32 | low);
}

DEVICE int shuffled(int x, int mask) { return shuffle_xor(x, mask); }

// The least and the greatest of the elements from `first` to `last`, found by all lanes of a warp; `last` is one that exists.
template <class Wide, class T> DEVICE Ends ends_of(const T* at, i64 stride, int first, int last) {
    int i = lower(first + thread_index() % 32, last);
    Wide low = load_global(at + (i64)i * stride), high = low;
    for (i += 32; i <= last; i += 32) {
        const Wide x = load_global(at + (i64)i * stride);
        low = lower(low, x);
        high = higher(high, x);
    }
    UNROLL
    for (int mask = 16; mask > 0; mask /= 2) {
        low = lower(low, shuffled(low, mask));
        high = higher(high, shuffled(high, mask));
    }
    return {low, high};
}

}  // namespace program

struct Keys {
    int lo, hi, first, last;
};

struct Seen {
    bool some, sure;
};
"""
#: What is right to 2^-11 of it; 7.5 has the instruction.
_APPROXIMATE = """
namespace program {
DEVICE float tanh_of_device(float x) { return tanh_approximate(x); }
}  // namespace program
"""
_SUMS = "Sums& sums, int row, int col"
_FUNCTIONS = {
    "score": "template <int FULL> DEVICE float score(float s, int q, int k, const Context& c, Saved& saved)",
    "score_grad": "template <int FULL, class Sums>\n"
    f"DEVICE float score_grad(float g, const Saved& saved, int q, int k, const Context& c, {_SUMS})",
    "weigh": "DEVICE float weigh(float p, int q, int k, const Context& c)",
    "weigh_grad": "template <class Sums>\n"
    f"DEVICE float weigh_grad(float g, float p, int q, int k, const Context& c, {_SUMS})",
    "left": "DEVICE bool left(int q, int k, const Context& c)",
    "keys": "DEVICE Keys keys(int q0, int q1, const Context& c)",
    "queries": "DEVICE Keys queries(int k0, int k1, const Context& c)",
    "seen": "DEVICE Seen seen(int q0, int q1, int k0, int k1, const Context& c)",
    "sink": "DEVICE float sink(int q, const Context& c)",
}


def constants(spec: Attention) -> str:
    """What stands before problem.cuh: OPERANDS, how many there are, or 1, and OPERAND_BYTES, those of an element of each."""
    sizes = [_TYPES[_taken(o.dtype)][1] for o in spec.operands] or [1]
    return f"constexpr int OPERANDS = {len(sizes)};\n{_array('int OPERAND_BYTES', map(str, sizes))}\n"


def source(spec: Attention, approximate: bool = False, far: bool = False, inside: bool = False) -> str:
    """The functions. Raises ValueError for what the kernels cannot compute.

    SAVED is how many numbers `score` keeps for `score_grad`. Of each operand, OPERAND_ROWS and OPERAND_COLUMNS say whether it has a
    row for each query, or each of a table, and a column for each key; OPERAND_TABLE whether it is read at computed indices. Its
    gradient has the same form.

    approximate: tanh is the instruction that 7.5 has, an error of 2^-11, and takes a factor before it along. far: there may be
    traits.NEARBY queries or keys, or more, which makes no difference here. inside: of queries and keys that exist,
    `traits.indices` are those of elements that exist.
    """
    made = Module(CUDA, spec, approximate, far, inside)
    saved = sum(map(saves, spec.steps))
    dims = [(o.dims[-2] != "1", o.dims[-1] != "1") for o in spec.operands] or [(False, False)]
    lines = [
        f"constexpr int SAVED = {saved};",
        _array("bool OPERAND_ROWS", (_truth(rows) for rows, _ in dims)),
        _array("bool OPERAND_COLUMNS", (_truth(columns) for _, columns in dims)),
        _array("bool OPERAND_TABLE", (_truth(i in spec.tables) for i in range(len(dims)))),
        f"\nstruct Saved {{\n    float x[{max(1, saved)}];\n}};\n",
    ]
    return "\n".join(
        [
            _HEADER + _APPROXIMATE * approximate,
            *lines,
            made.score(),
            made.score_grad(),
            made.weigh(),
            made.weigh_grad(),
            made.left_weights(),
            made.keys(),
            made.queries(),
            made.seen(),
            made.sink(),
        ]
    )


def _array(name: str, values: Iterable[str]) -> str:
    return f"constexpr {name}[OPERANDS] = {{{', '.join(values)}}};"


def _taken(dtype: str) -> str:
    if dtype not in _TYPES:
        raise ValueError(f"the Volta kernels take no operand of dtype {dtype}")
    return dtype


def _truth(value: bool) -> str:
    return "true" if value else "false"


class _Cuda(Dialect):
    """One score: q and k are int."""

    kernels = "Volta"
    sizes: ClassVar = {"q": "c.Qn", "k": "c.Kn"}

    # -- numbers

    def integer(self, value: int) -> str:
        if abs(value) < _SHORT:
            return str(value)
        return f"{value}LL" if value > -(2**63) else f"({value + 1}LL - 1)"

    def truth(self, value: bool) -> str:
        return _truth(value)

    def real(self, value: float) -> str:
        if math.isnan(value):
            raise ValueError("a step with NaN")
        single = ctypes.c_float(value).value
        return f"{single!r}f" if math.isfinite(single) else f"{'-' if single < 0 else ''}infinity()"

    # -- lines

    def let(self, name: str, code: str) -> str:
        return f"const auto {name} = {code};"

    def set(self, name: str, code: str) -> str:
        return f"{name} = {code};"

    def define(self, name: str, lines: Sequence[str]) -> str:
        # of a tile without queries or keys there is nothing to look at
        first = ["if (k0 > k1 || q0 > q1) return {false, false};"] if name == "seen" else []
        return "\n".join([f"{_FUNCTIONS[name]} {{", *indented([*first, *lines]), "}"]) + "\n"

    def returned(self, *codes: str) -> str:
        return f"return {codes[0]};" if len(codes) == 1 else f"return {{{', '.join(codes)}}};"

    def scored(self, saved: Sequence[str]) -> list[str]:
        return [*(f"saved.x[{i}] = {x};" for i, x in enumerate(saved)), "return s;"]

    def saved(self, place: int) -> str:
        return f"saved.x[{place}]"

    def apart(self, step: int) -> tuple[list[str], str]:
        return [f"const float scores{step} = s;", "s = 0.0f;"], f"scores{step}"

    def unless_full(self, level: int, lines: Sequence[str], otherwise: Sequence[str] | None = None) -> list[str]:
        made = [f"if constexpr (FULL < {level}) {{", *indented(lines)]
        return [*made, "}"] if not otherwise else [*made, "} else {", *indented(otherwise), "}"]

    # -- expressions

    def call(self, name: str, *args: str) -> str:
        return f"program::{name}({', '.join(args)})"

    def choose(self, condition: str, a: str, b: str) -> str:
        return f"({condition} ? {a} : {b})"

    def least(self, a: str, b: str) -> str:
        return self.call("lower", a, b)

    def greatest(self, a: str, b: str) -> str:
        return self.call("higher", a, b)

    def every(self, conditions: Sequence[str]) -> str:
        return " && ".join(conditions)

    def sum(self, terms: Sequence[tuple[int, str]], const: int, wide: bool) -> str:
        if not wide:
            parts = [f"{x} * {self._factor(c)}" if c != 1 else x for c, x in terms]
            return " + ".join([*parts, *([self._factor(const)] if const else [])])
        # what wraps is unsigned
        parts = [f"(u64){x} * {c % 2**64}ull" if c != 1 else f"(u64){x}" for c, x in terms]
        return f"(i64)({' + '.join([*parts, *([f'{const % 2**64}ull'] if const else [])])})"

    def _factor(self, value: int) -> str:
        return self.integer(value) if value >= 0 else f"({self.integer(value)})"

    def sum_of_ends(self, terms: Sequence[tuple[int, str]], const: int, wide: bool) -> str:
        return self.sum([(c, f"({x})") for c, x in terms], const, wide)

    def apply(self, op: str, args: Sequence[str]) -> str:
        two = {"le": "<=", "eq": "==", "ne": "!="}
        if op in two:
            return f"{args[0]} {two[op]} {args[1]}"
        if op in ("and", "or"):
            return f" {'&&' if op == 'and' else '||'} ".join(args)
        if op == "not":
            return f"!{args[0]}"
        if op == "int":
            return f"(int){args[0]}"
        if op == "where":
            return self.choose(*args)
        names = {"floordiv": "floor_div", "mod": "floor_mod", "min": "lower", "max": "higher", "abs": "magnitude"}
        return self.call(names[op], *args)

    def narrow(self, x: str, most: int) -> str:
        return f"(int){self.least(self.greatest(x, str(-most)), str(most))}"

    def of_integer(self, x: str, little: bool) -> str:
        return f"(float){x}"

    def rounded(self, dtype: str, x: str) -> str:
        return self.call(f"rounded_to_{dtype}", x)

    def of_rows(self, x: str) -> str:
        return x

    # -- operands

    def place(self, x: str) -> str:
        return f"(i64)({x})"

    def clamped(self, x: str, operand: int, which: int) -> str:
        return self.call("clamped", x, f"c.p.n[{operand}][{which}]")

    def exists(self, uses: Sequence[str]) -> str:
        return " && ".join(f"{x} < {self.sizes[x]}" for x in uses)

    def load(self, read: Read) -> str:
        found = f"load_global({_address(read)})"
        return f"{read.mask} ? {found} : ({_TYPES[_taken(read.dtype)][0]})0" if read.mask else found

    def load_added(self, name: str, read: Read) -> list[str]:
        kind = _TYPES[_taken(read.dtype)][0]
        return [self.let(name, f"FULL > 0 || ({read.mask}) ? load_global({_address(read)}) : ({kind})0")]

    def loaded(self, x: str, dtype: str) -> str:
        return f"{x} != 0" if dtype == "bool" else f"(i64){x}"

    def real_of(self, x: str, dtype: str) -> str:
        known = {
            "float32": x,
            "float16": f"float_of_half({x})",
            "bfloat16": f"float_of_bfloat16({x})",
            "bool": f"({x} != 0 ? 1.0f : 0.0f)",
        }
        return known.get(dtype, f"(float){x}")

    def ends(self, read: Read, which: int, let: Let) -> tuple[str, str]:
        first, end, count = ("k0", "k1", "c.Kn") if which else ("q0", "q1", "c.Qn")
        last = self.least(end, f"{self.least(count, f'c.p.n[{read.operand}][{which}]')} - 1")
        wide = "i64" if _TYPES[_taken(read.dtype)][1] == 8 else "int"
        stride = f"c.p.st[{read.operand}][{which}]"
        x = let(f"program::ends_of<{wide}>({_address(read)}, {stride}, {first}, {last})")
        return f"{x}.low", f"{x}.high"

    def give(self, read: Read, given: str, let: Let) -> list[str]:
        x = let(given)
        if not read.table:
            return [f"sums.template give<{read.operand}>(row, col, q, k, {x});"]
        parts = dict(read.parts)
        places = ", ".join(parts.get(which, "(i64)0") for which in (0, 1))
        return [f"sums.template scatter<{read.operand}>({places}, q, k, {x});"]

    def given(self, operand: int, lines: Sequence[str]) -> list[str]:
        return [f"if (sums.template wants<{operand}>()) {{", *indented(lines), "}"]


def _address(read: Read) -> str:
    """Where an element is."""
    parts = "".join(f" + {x} * c.p.st[{read.operand}][{which}]" for which, x in read.parts)
    return f"(const {_TYPES[_taken(read.dtype)][0]}*)c.at[{read.operand}]{parts}"


CUDA = _Cuda()
