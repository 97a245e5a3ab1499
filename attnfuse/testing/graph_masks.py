"""Programs whose attention masks are computed in the graph: random masks in random spellings, and the masks' mutations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

#: A mask as a tree: (kind, *numbers) for a leaf, ('and' or 'or', a, b), ('not', a).
Tree = tuple[Any, ...]

B, H, D = 2, 2, 4
_MIN = float(torch.finfo(torch.float32).min)

#: Leaves with the numbers they take.
_LEAVES: dict[str, int] = {
    "causal": 1,
    "window": 1,
    "near": 1,
    "chunk": 1,
    "prefix": 1,
    "stride": 2,
    "padding": 0,
    "other padding": 0,
    "lengths": 0,
    "documents": 0,
    "positions": 1,
    "queries": 0,
    "all": 0,
}


@dataclass(frozen=True)
class MaskProgram:
    """A function with one attention for each mask.

    source      the text of `program(q, k, v, keep, other, longer, buffer, lengths, ids_q, ids_k, keep_q, dense)`, which
                returns a list
    trees       the masks it means
    Q, K        sizes
    """

    source: str
    trees: tuple[Tree, ...]
    Q: int
    K: int

    @property
    def function(self) -> Callable[..., Any]:
        scope: dict[str, Any] = {}
        exec(compile("import torch\nimport torch.nn.functional as F\n\n\n" + self.source, "<masks>", "exec"), scope)
        return scope["program"]  # type: ignore[no-any-return]

    def inputs(self, seed: int = 0) -> dict[str, torch.Tensor]:
        """Arguments by name; the same for the same seed."""
        g = torch.Generator().manual_seed(seed)
        Q, K = self.Q, self.K
        made = {name: torch.randn(B, H, n, D, generator=g) for name, n in (("q", Q), ("k", K), ("v", K))}
        made["keep"] = torch.rand(B, K, generator=g) < 0.7
        made["other"] = (torch.rand(B, K, generator=g) < 0.7).long()
        # larger than what is attended to: read from some place on
        made["longer"] = torch.rand(B, K + 5, generator=g) < 0.7
        made["buffer"] = torch.rand(1, 1, 16, 16, generator=g) < 0.7
        made["lengths"] = torch.randint(0, K + 1, (B,), generator=g)
        made["ids_q"] = torch.randint(0, 3, (B, Q), generator=g).sort(-1).values
        made["ids_k"] = torch.randint(0, 3, (B, K), generator=g)
        made["keep_q"] = torch.rand(B, Q, generator=g) < 0.8
        made["dense"] = torch.rand(B, 1, Q, K, generator=g) < 0.7
        return made

    def kept(self, tree: Tree, given: dict[str, torch.Tensor]) -> torch.Tensor:
        """The mask that a tree means, bool [B, 1, Q, K]."""
        return _kept(tree, given, torch.arange(self.Q)[:, None], torch.arange(self.K)).expand(B, 1, self.Q, self.K)

    def __repr__(self) -> str:
        return f"MaskProgram(Q={self.Q}, K={self.K}, {self.trees}):\n{self.source}"


def _kept(t: Tree, x: dict[str, torch.Tensor], q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    if t[0] in ("and", "or"):
        a, b = (_kept(s, x, q, k) for s in t[1:])
        return a & b if t[0] == "and" else a | b
    if t[0] == "not":
        return ~_kept(t[1], x, q, k)
    n = t[1] if len(t) > 1 else 0
    found: torch.Tensor = {
        "causal": lambda: k <= q + n,
        "window": lambda: k > q - n,
        "near": lambda: (q - k).abs() <= n,
        "chunk": lambda: (
            torch.div(q, max(n, 1), rounding_mode="floor") == torch.div(k, max(n, 1), rounding_mode="floor")
        ),
        "prefix": lambda: (k < n) | (q < 0),
        "stride": lambda: torch.remainder(k - q, max(n, 1)) == t[2],
        "padding": lambda: x["keep"][:, None, None],
        "other padding": lambda: x["other"][:, None, None] != 0,
        "longer": lambda: x["longer"][:, n : n + k.shape[-1]][:, None, None],
        "buffer": lambda: x["buffer"][:, :, n : n + q.shape[0], : k.shape[-1]],
        "lengths": lambda: k < x["lengths"][:, None, None, None],
        "documents": lambda: x["ids_q"][:, None, :, None] == x["ids_k"][:, None, None],
        "positions": lambda: x["ids_k"][:, None, None] <= x["ids_q"][:, None, :, None] + n,
        "queries": lambda: x["keep_q"][:, None, :, None],
        "dense": lambda: x["dense"],
        "all": lambda: q >= 0,
    }[t[0]]()
    return found


def trees(depth: int = 2, dense: bool = False) -> st.SearchStrategy[Tree]:
    """Masks; with `dense`, some of them partly a [B, 1, Q, K] input."""
    kinds = [*_LEAVES, *(["dense"] if dense else [])]

    @st.composite
    def leaf(draw: st.DrawFn) -> Tree:
        kind = draw(st.sampled_from(kinds))
        return (kind, *(draw(st.integers(0 if kind != "chunk" else 1, 4)) for _ in range(_LEAVES.get(kind, 0))))

    if depth == 0:
        return leaf()
    inner = trees(depth - 1, dense)
    joined = st.tuples(st.sampled_from(("and", "and", "or")), inner, inner)
    return st.one_of(leaf(), leaf(), joined, joined, st.tuples(st.just("not"), inner))


@st.composite
def mask_programs(draw: st.DrawFn, count: int = 5, dense: bool = False) -> MaskProgram:
    """`count` attentions with a mask each, spelled at random."""
    Q, K = draw(st.integers(2, 9)), draw(st.integers(2, 9))
    return spelled(draw, [draw(trees(dense=dense)) for _ in range(count)], Q, K)


@st.composite
def mutated_masks(draw: st.DrawFn, count: int = 5) -> MaskProgram:
    """Pairs of a mask and a mutation of it: trees 0 and 1, 2 and 3, and so on."""
    Q, K = draw(st.integers(3, 9)), draw(st.integers(3, 9))
    found: list[Tree] = []
    for _ in range(count):
        tree = draw(trees())
        found += [tree, _mutated(draw, tree)]
    return spelled(draw, found, Q, K)


def _mutated(draw: st.DrawFn, t: Tree) -> Tree:
    """One constant, operation or operand changed."""
    if t[0] in ("and", "or"):
        where = draw(st.integers(0, 2))
        if where == 0:
            return ("or" if t[0] == "and" else "and", *t[1:])
        return (*t[:where], _mutated(draw, t[where]), *t[where + 1 :])
    if t[0] == "not":
        return t[1] if draw(st.booleans()) else ("not", _mutated(draw, t[1]))
    if len(t) > 1 and draw(st.booleans()):
        at = draw(st.integers(1, len(t) - 1))
        return (*t[:at], t[at] + draw(st.sampled_from((1, 2))), *t[at + 1 :])
    swaps = {"causal": "window", "padding": "other padding", "other padding": "padding", "near": "causal"}
    return (swaps[t[0]], *t[1:]) if t[0] in swaps and draw(st.booleans()) else ("not", t)


def spelled(draw: st.DrawFn, masks: Sequence[Tree], Q: int, K: int) -> MaskProgram:
    """The program for these masks."""
    w = _Speller(draw, Q, K)
    lines = ["out = []"]
    for tree in masks:
        lines += [f"m = {w.mask(tree)}", f"out.append({w.attention()})"]
    names = "q, k, v, keep, other, longer, buffer, lengths, ids_q, ids_k, keep_q, dense"
    body = "".join(f"    {line}\n" for line in [*lines, "return out"])
    return MaskProgram(f"def program({names}):\n{body}", tuple(masks), Q, K)


class _Speller:
    def __init__(self, draw: st.DrawFn, Q: int, K: int) -> None:
        self.draw, self.Q, self.K = draw, Q, K

    def pick(self, *options: str) -> str:
        return self.draw(st.sampled_from(options))

    def q(self) -> str:
        n = self.Q
        return self.pick(
            f"torch.arange({n})[:, None]",
            f"torch.arange({n}).view(-1, 1)",
            f"torch.arange({n}).unsqueeze(1)",
            f"torch.arange({n})[None, None, :, None]",
            f"(torch.arange(1, {n + 1}) - 1)[:, None]",
            "torch.arange(q.shape[-2], device=q.device).reshape(-1, 1)",
            f"torch.arange({n}, dtype=torch.int32)[:, None].expand({n}, {self.K})",
            f"torch.ones({n}, dtype=torch.long).cumsum(0)[:, None] - 1",
        )

    def k(self) -> str:
        n = self.K
        return self.pick(
            f"torch.arange({n})",
            f"torch.arange({n})[None, :]",
            f"torch.arange({n}).view(1, 1, 1, -1)",
            f"torch.arange(0, {2 * n}, 2) // 2",
            "torch.arange(k.shape[2], device=k.device)",
            f"torch.arange({n}).repeat({self.Q}, 1)",
            f"(torch.arange({n + 2})[2:] - 2)",
        )

    def over_keys(self, name: str) -> str:
        return self.pick(
            f"{name}[:, None, None, :]",
            f"{name}.view({B}, 1, 1, {self.K})",
            f"{name}.unsqueeze(1).unsqueeze(2)",
            f"{name}[:, None, None].expand({B}, 1, {self.Q}, {self.K})",
            f"{name}[torch.arange({B})[:, None, None, None], torch.arange({self.K})]",
        )

    def mask(self, t: Tree) -> str:
        """A bool expression that broadcasts to [B, H, Q, K]."""
        kind, Q, K = t[0], self.Q, self.K
        if kind == "and":
            a, b = self.mask(t[1]), self.mask(t[2])
            return self.pick(
                f"({a} & {b})",
                f"torch.logical_and({a}, {b})",
                f"({a} * {b})",
                f"torch.where({a}, {b}, False)",
                f"({a} & {b}).expand({B}, 1, {Q}, {K}).masked_fill(~({b}), False)",
            )
        if kind == "or":
            a, b = self.mask(t[1]), self.mask(t[2])
            return self.pick(
                f"({a} | {b})",
                f"torch.logical_or({a}, {b})",
                f"torch.where({a}, True, {b})",
                f"(({a}).int() + ({b}).int() > 0)",
                f"~(~({a}) & ~({b}))",
            )
        if kind == "not":
            a = self.mask(t[1])
            return self.pick(f"(~({a}))", f"torch.logical_not({a})", f"(({a}) == False)", f"(1 - ({a}).long()).bool()")
        return f"({self.leaf(t, kind)})"

    def leaf(self, t: Tree, kind: str) -> str:
        q, k, Q, K = self.q(), self.k(), self.Q, self.K
        n = t[1] if len(t) > 1 else 0
        options: dict[str, tuple[str, ...]] = {
            "causal": (
                f"{k} <= {q} + {n}",
                f"{q} + {n} >= {k}",
                f"({k}) - ({q}) < {n + 1}",
                f"torch.tril(torch.ones({Q}, {K}, dtype=torch.bool), {n})",
                f"torch.triu(torch.ones({Q}, {K}), {n + 1}) == 0",
                f"~torch.ones({Q}, {K}, dtype=torch.bool).triu({n + 1})",
                f"torch.full(({Q}, {K}), 1).tril({n}).bool()",
            ),
            "window": (
                f"({k}) > ({q}) - {n}",
                f"({q}) - ({k}) < {n}",
                f"torch.ones({Q}, {K}).triu({1 - n}) > 0",
                f"({q}) < ({k}) + {n}",
            ),
            "near": (
                f"(({q}) - ({k})).abs() <= {n}",
                f"torch.abs(({k}) - ({q})) < {n + 1}",
                f"torch.maximum(({k}) - ({q}), ({q}) - ({k})) <= {n}",
                f"(({k}) - ({q})).clamp(min={-n - 1}, max={n + 1}).abs() <= {n}",
            ),
            "chunk": (
                f"({q}) // {max(n, 1)} == ({k}) // {max(n, 1)}",
                f'torch.div({q}, {max(n, 1)}, rounding_mode="floor").eq(({k}) // {max(n, 1)})',
            ),
            "prefix": (f"({k}).lt({n}) | (({q}) < 0)", f"(({k}) < {n}) & (({q}) >= 0)"),
            "stride": (f"(({k}) - ({q})) % {max(n, 1)} == {t[-1]}",),
            "padding": (
                self.over_keys("keep"),
                f"{self.over_keys('keep')} == 1",
                f"~{self.over_keys('keep')} == False",
            ),
            "other padding": (f"{self.over_keys('other')} != 0", f"{self.over_keys('other')}.bool()"),
            "longer": (
                f"longer[:, {n}:{n + K}][:, None, None]",
                f"longer[:, None, None, {n} : {n + K}]",
                f"longer.narrow(1, {n}, {K}).view({B}, 1, 1, {K})",
                f"longer[:, torch.arange({K}) + {n}][:, None, None, :]",
            ),
            "buffer": (f"buffer[:, :, {n}:{n + Q}, :{K}]", f"buffer[0, 0, {n}:{n + Q}, :{K}]"),
            "lengths": (f"({k}) < lengths[:, None, None, None]", f"lengths.view(-1, 1, 1, 1) > ({k})"),
            "documents": (
                "ids_q[:, None, :, None] == ids_k[:, None, None, :]",
                "(ids_q.unsqueeze(2) == ids_k.unsqueeze(1)).unsqueeze(1)",
                "(ids_q[:, None, :, None] - ids_k[:, None, None, :]) == 0",
            ),
            "positions": (
                f"ids_k[:, None, None, :] <= ids_q[:, None, :, None] + {n}",
                f"ids_k[:, None, None, :] - {n} <= ids_q[:, None, :, None]",
            ),
            "queries": ("keep_q[:, None, :, None]", f"keep_q.view({B}, 1, {Q}, 1)"),
            "dense": ("dense", "dense == True"),
            "all": (f"({q}) >= 0", f"torch.ones({Q}, {K}, dtype=torch.bool)"),
        }
        return self.pick(*options[kind])

    def attention(self) -> str:
        """One attention with the mask m."""
        s, fill = "(q @ k.transpose(-2, -1) * 0.5)", self.pick('float("-inf")', repr(_MIN), "-1e9")
        full = f"m.expand({B}, 1, {self.Q}, {self.K})"
        scores = self.pick(
            f"{s}.masked_fill(~m, {fill})",
            f"torch.where(m, {s}, {fill})",
            f"({s} + torch.where(m, 0.0, {fill}))",
            f"({s} + (1.0 - m.float()) * {_MIN!r})",
            f"({s} + torch.zeros({self.Q}, {self.K}).masked_fill(~{full}, {fill}))",
        )
        return self.pick(
            f"torch.softmax({scores}, dim=-1) @ v",
            f"torch.softmax({scores}, dim=-1) @ v",
            f"F.scaled_dot_product_attention(q, k, v, attn_mask={full})",
            f"F.scaled_dot_product_attention(q, k, v, attn_mask=torch.where({full}, 0.0, -1e9))",
        )
