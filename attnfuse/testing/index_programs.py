"""Programs of index arithmetic: tensors made of aranges, sizes, constants and integer inputs, by random ops in all dtypes.

What a reader of graphs makes of such a tensor must be what the ops give, wrapping, promotion and rounding included.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

_DTYPES = (
    "int64",
    "int64",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
    "float32",
    "float16",
    "bfloat16",
    "float64",
)
_NUMBERS = ("0", "1", "2", "3", "-1", "-5", "7", "15", "40", "127", "255", "300", "-200", "40000", "2**31", "-2**40")
_EXTREME = ("6364136223846793005", "1442695040888963407", "-2**63", "(2**63 - 1)", "2**62")
_FRACTIONS = ("0.5", "3.7", "-2.5", "1e9", "300.0", "float('inf')")

_UNARY = (
    *("x.to(torch.{dtype})", "x.to(torch.{dtype})", "x.to(torch.{dtype})", "x.abs()", "-x", "x.clamp(min={n})"),
    *("x.clamp(max={n})", "x.clamp({n}, {m})", "x.bool()", "x.long()", "~x", "x.logical_not()", "x.sign()", "x * x"),
    *("x.float().floor().long()", "x.clone()", "x.square()", "torch.absolute(x)", "torch.negative(x)", "x.trunc()"),
    *("x.relu()", "x.clip({n}, {m})", "x.nan_to_num()", "x.isfinite()"),
)
_ALONG = (
    *("x.flip(-1)", "x.cumsum(-1)", "x.cumsum(-1)", "x.roll(2, -1)", "x.cummax(-1).values", "x.sort(-1).values"),
    *(
        "torch.cat([x[..., 2:], x[..., :2]], -1)",
        "torch.cat([x, x], -1)[..., 2 : x.shape[-1] + 2]",
        "x[..., 1:].cumsum(-1)[..., -1:] + x",
    ),
    *(
        "torch.diff(x, prepend=x[..., :1])",
        "torch.cat([x[..., :1], x], -1).cumsum(-1)[..., 1:]",
        "x[..., -1:] + x",
        "x[..., 3:4] - x",
    ),
    *("torch.cat([x, x], -1).cumsum(-1)[..., 2 : x.shape[-1] + 2]", "x - x.amax(-1, keepdim=True)", "x.argsort(-1)"),
    *("x.repeat_interleave(2, -1)[..., 1 : x.shape[-1] + 1]", "(x.cumsum(-1) - x.flip(-1).cumsum(-1).flip(-1))"),
)
_BINARY = (
    *("x + y", "x - y", "x * y", "x < y", "x <= y", "x > y", "x >= y", "x == y", "x != y", "torch.minimum(x, y)"),
    *("torch.maximum(x, y)", "x & y", "x | y", "x ^ y", "torch.add(x, y, alpha={n})", "torch.sub(x, y, alpha={n})"),
    *("torch.where(x > {n}, x, y)", "torch.where(y.bool(), x, {n})", "x.masked_fill(y == {n}, {m})", "(x - y).abs()"),
    *(
        "torch.greater_equal(x, y)",
        "torch.less(x, y)",
        "torch.subtract(x, y)",
        "torch.multiply(x, y)",
        "torch.max(x, y)",
    ),
    *("torch.not_equal(x, y)", "torch.fmod(x, y)", "x.__and__(y)"),
    *("torch.rsub(x, y)", "x.type_as(y)", "torch.logical_xor(x, y)", "(x + {n} <= y - {m})", "((x - y) % 3 == 1)"),
)
_WITH_NUMBER = (
    *("x + {n}", "x - {n}", "{n} - x", "x * {n}", "x < {n}", "x >= {n}", "x == {n}", "x // {n}", "x % {n}", "x / {n}"),
    *("torch.div(x, {n}, rounding_mode='floor')", "x + torch.full((), {n})", "x < torch.full((), {n})", "x ** 2"),
    *(
        "x * torch.full((), {n}, dtype=torch.{dtype})",
        "x // 4",
        "x % 5",
        "x * size",
        "x + size",
        "x < size",
        "x >= size - {m}",
    ),
    *(
        "x + n",
        "x < n",
        "x * n",
        "x + (n - size)",
        "torch.full_like(x, {n})",
        "torch.where(x > {n}, {n}, {m})",
        "x - {f}",
        "x * {f}",
    ),
    *("x < {f}", "torch.full((), {f}).to(torch.{dtype}) + x"),
)
_JOINT = ("x.tril({s})", "x.triu({s})", "x.tril(n)", "x.mT.mT")

_LEAVES: dict[str, tuple[str, ...]] = {
    "": (
        *("torch.full((), {n})", "torch.full((), size - {m})", "torch.full((), {f}, dtype=torch.{dtype})", "ids[3]"),
        *(
            "torch.full((), n)",
            "torch.arange(K)[-1]",
            "torch.full((), {n}, dtype=torch.{dtype})",
            "torch.full((), {f})",
        ),
    ),
    "K": (
        *(
            "torch.arange(K)",
            "torch.arange(K)",
            "torch.arange(size)",
            "torch.arange(-size, 0)",
            "torch.arange(5, 5 + K)",
            "torch.arange(2**31, 2**31 + K)",
        ),
        *(
            "torch.arange(K, dtype=torch.{dtype})",
            "ids",
            "small",
            "ids.int()",
            "torch.arange(0, 2 * K, 2)",
            "narrow",
            "flags",
        ),
        *("torch.arange(K + 3)[3:]", "torch.ones(K, dtype=torch.{dtype})", "torch.zeros(K, dtype=torch.long)"),
        *(
            "torch.cat([torch.zeros(4, dtype=torch.long), torch.ones(K - 4, dtype=torch.long)])",
            "torch.arange(K - 1, -1, -1)",
        ),
        *(
            "torch.arange(n, n + K)",
            "torch.full((K,), {n}, dtype=torch.{dtype})",
            "torch.arange(K).to(torch.{dtype}) * {n}",
        ),
    ),
    "Q": (
        "torch.arange(Q)[:, None]",
        "torch.arange(Q).unsqueeze(-1)",
        "torch.arange(Q).view(-1, 1)",
        "ids[:Q, None]",
        "small[-Q:, None]",
    ),
    "QK": (
        "torch.ones(Q, K, dtype=torch.{dtype})",
        "torch.ones(Q, K).tril()",
        "(torch.arange(K) - torch.arange(Q)[:, None])",
    ),
}


@dataclass(frozen=True)
class IndexProgram:
    """A function whose results are tensors [Q, K], or what broadcasts to it.

    source      the text of `program(q, k, ids, small, narrow, flags, n)`: q [Q], k [K], ids int64 [K] of any size, small int64
                [K], narrow uint8 [K], flags bool [K], n an int
    """

    source: str

    @property
    def function(self) -> Callable[..., list[torch.Tensor]]:
        scope: dict[str, Any] = {"__name__": __name__}
        exec(compile("import torch\n\n\n" + self.source, "<indices>", "exec"), scope)
        return scope["program"]  # type: ignore[no-any-return]

    def __repr__(self) -> str:
        return f"IndexProgram:\n{self.source}"


#: Sizes and the number n that programs are tried with; they hold for others too where these are symbolic.
Q, K, N = 6, 10, -3


def inputs(seed: int = 0) -> dict[str, Any]:
    """Arguments by name; the same for the same seed."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(-(2**62), 2**62, (K,), generator=g)
    ids[:4] = torch.tensor([-(2**63), 2**63 - 1, 0, 2**31])
    return {
        "q": torch.randn(Q, generator=g),
        "k": torch.randn(K, generator=g),
        "ids": ids[torch.randperm(K, generator=g)],
        "small": torch.randint(-4, 9, (K,), generator=g),
        "narrow": torch.randint(0, 256, (K,), generator=g).to(torch.uint8),
        "flags": torch.rand(K, generator=g) < 0.6,
        "n": N,
    }


#: What a line may raise that says no more than that its ops do not go together.
_UNFIT = (RuntimeError, TypeError, IndexError, ValueError, OverflowError, ZeroDivisionError)


class _Writer:
    """Writes lines that run: each is tried on the inputs, and left out if it raises or gives another shape than those known."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.lines: list[str] = []
        self.names: list[str] = []
        self.scope: dict[str, Any] = {"torch": torch, "Q": Q, "K": K, "size": K, **inputs()}

    def pick(self, options: Sequence[str]) -> str:
        return self.draw(st.sampled_from(options))

    def filled(self, text: str) -> str:
        while "{" in text:
            at, end = text.index("{"), text.index("}")
            options = {
                "n": _NUMBERS + (_EXTREME if self.draw(st.integers(0, 9)) == 0 else ()),
                "m": _NUMBERS,
                "f": _FRACTIONS,
                "s": ("0", "1", "-1", "-3", "5"),
                "dtype": _DTYPES,
            }
            text = text[:at] + self.pick(options[text[at + 1 : end]]) + text[end + 1 :]
        return text

    def let(self, text: str) -> str:
        """The name of a new variable; of the newest one where the line does not run."""
        name, code = f"x{len(self.names)}", self.filled(text)
        try:
            made = eval(code, self.scope)
        except _UNFIT:
            return self.names[-1]
        if not isinstance(made, torch.Tensor) or tuple(made.shape) not in ((), (K,), (Q, 1), (Q, K)):
            return self.names[-1]
        self.scope[name] = made
        self.lines.append(f"{name} = {code}")
        self.names.append(name)
        return name

    def some(self) -> str:
        if self.draw(st.integers(0, 3)) == 0:
            return self.let(self.pick(_LEAVES[self.pick(("", "K", "K", "Q", "QK"))]))
        return self.pick(self.names[-4:])

    def step(self) -> None:
        which, x = self.draw(st.integers(0, 9)), self.some()
        shape = tuple(self.scope[x].shape)
        if which < 3:
            self.let(_named(self.pick(_BINARY), x, self.some()))
        elif which < 5:
            self.let(_named(self.pick(_UNARY), x))
        elif which < 7 and shape in ((K,), (Q, K)):
            self.let(_named(self.pick(_ALONG + (_JOINT if shape == (Q, K) else ())), x))
        else:
            self.let(_named(self.pick(_WITH_NUMBER), x))


def _named(text: str, x: str, y: str = "") -> str:
    """The template with names for x and y."""
    return re.sub(r"(?<![\w.])[xy](?!\w)", lambda m: x if m[0] == "x" else y, text)


_LAST = (
    *("{x} <= {{m}}", "{x}", "{x} + torch.zeros(Q, K, dtype=torch.long)", "{x} == x1", "x0 <= {x}"),
    *("torch.where({x} > {{m}}, 1.0, 0.0)", "({x} >= {{m}}) | (x0 <= x1)"),
)


@st.composite
def index_programs(draw: st.DrawFn, results: int = 4, most: int = 5) -> IndexProgram:
    """Programs with so many results, each made in up to `most` steps from what came before it."""
    w = _Writer(draw)
    w.let("torch.arange(K)")
    w.let("torch.arange(Q)[:, None]")
    for _ in range(results):
        for _ in range(draw(st.integers(1, most))):
            w.step()
        last = w.let(w.pick(_LAST).replace("{x}", w.names[-1]).replace("{{", "{").replace("}}", "}"))
        w.lines.append(f"out.append({last})")
    body = "".join(
        f"    {line}\n" for line in ("Q, K, size, out = q.shape[0], k.shape[0], k.shape[0], []", *w.lines, "return out")
    )
    return IndexProgram(f"def program(q, k, ids, small, narrow, flags, n):\n{body}")
