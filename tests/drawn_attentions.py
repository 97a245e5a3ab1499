"""Strategies that draw attentions for kernels: specs with all that they can say, and inputs of every layout."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import kernel_cases
import torch
from hypothesis import strategies as st
from kernel_cases import FLOAT_MIN, INF, bounds_of, randn

from attnfuse.expr import Algebra, Const, Expr, K, Load, Q, causal, dense, documents, window
from attnfuse.kernels.inputs import Bounds, Inputs
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
)

A = Algebra()
WIDTHS = (8, 16, 32, 64, 128, 1, 20, 33, 40, 72, 80, 96, 256)
LENGTHS = (70, 40, 1, 3, 31, 33, 65, 100, 130)
#: Of packed sequences.
LAYOUTS = ("dense", "dense", "dense", "packed", "packed_queries", "packed_keys")


@dataclass(repr=False)
class Drawn:
    """A spec and its inputs. trains: gradients are those of the reference too."""

    spec: Attention
    inputs: Inputs
    trains: bool

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What Hypothesis prints."""
        printer.text(repr(self))

    def __repr__(self) -> str:
        q, k, v, *operands = ((tuple(x.shape), x.stride()) for x in self.inputs.tensors)
        bounds = [x if x is None else x.tolist() for x in self.inputs.bounds]
        return f"Drawn({self.spec}, {q=}, {k=}, {v=}, {operands=}, {bounds=}, {self.spec!r})"


class _Draws:
    """What one attention is drawn from: `shape` is [*batch, Q, K] of its operands."""

    def __init__(self, draw: Callable, batch: tuple[int, ...], queries: int, keys: int) -> None:
        self.draw = draw
        self.shape = (*batch, queries, keys)
        self.operands: list[torch.Tensor] = []
        self.dims: list[tuple[str, ...]] = []

    def one_of(self, *choices):
        return self.draw(st.sampled_from(choices))

    def _broadcast(self, *last: int) -> tuple[int, ...]:
        return (*(self.one_of(1, n) for n in self.shape[:-2]), *last)

    def operand(self, x: torch.Tensor, table: bool = False) -> int:
        names = (*(f"B{i}" for i in range(len(self.shape) - 2)), "1" if table else "Q", "T" if table else "K")
        self.operands.append(x)
        self.dims.append(tuple("1" if n == 1 else name for name, n in zip(names, x.shape)))
        return len(self.operands) - 1

    def floats(self) -> int:
        *_, queries, keys = self.shape
        rows, columns = self.one_of((queries, keys), (queries, 1), (1, keys), (1, 1))
        dtype = self.one_of(kernel_cases.DTYPE, torch.float32, torch.bfloat16)
        return self.operand(randn(*self._broadcast(rows, columns), dtype=dtype))

    def mask(self) -> Expr:
        *_, queries, keys = self.shape
        kind = self.one_of("causal", "window", "dense", "both", "length", "documents", "remainder")
        offset = self.one_of(0, keys - queries, 7, -5, 64)
        if kind == "window":
            return A.and_(causal(offset), window(self.one_of(20, 1, 64)))
        if kind in ("dense", "both"):
            rows, columns = self.one_of((1, keys), (queries, keys), (queries, 1))
            keep = torch.rand(self._broadcast(rows, columns)) < 0.7
            kept = dense(self.operand(keep))
            return kept if kind == "dense" else A.and_(causal(offset), kept)
        if kind == "length":
            ends = torch.randint(0, keys + 2, self._broadcast(1, 1))
            return A.compare("lt", K, Load(self.operand(ends), "int64"))
        if kind == "documents":
            of_queries, of_keys = (torch.randint(0, 3, self._broadcast(*x)) for x in ((queries, 1), (1, keys)))
            return documents(self.operand(of_queries.sort(-2).values), self.operand(of_keys.sort(-1).values))
        if kind == "remainder":
            return A.compare("ne", A.mod(A.add(K, Q), Const(3)), Const(1))
        return causal(offset)

    def simple(self) -> Step:
        kind = self.one_of("scale", "below 0", "softcap", "tanh", "clamp", "shift", "cast", "operand")
        if kind == "operand":
            return Scale(operand=self.floats())
        return {
            "scale": Scale(0.3),
            "below 0": Scale(-0.4),
            "softcap": Softcap(2.0),
            "tanh": Tanh(),
            "clamp": Clamp(-1.0, 1.5),
            "shift": Shift(0.5),
            "cast": Cast(self.one_of("float16", "float32")),
        }[kind]

    def added(self) -> Step:
        *_, queries, keys = self.shape
        kind = self.one_of("bias", "kept bias", "table", "ramp")
        alpha = self.one_of(1.0, -0.5)
        if kind == "table":
            table = randn(*self._broadcast(1, queries + keys - 1))
            at = A.add(A.sub(K, Q), Const(queries - 1))
            return Bias(self.operand(table, table=True), alpha, None, at)
        if kind == "ramp":
            slopes = randn(*self._broadcast(1, 1), scale=0.02)
            return Ramp(self.operand(slopes), self.one_of(A.sub(K, Q), A.abs(A.sub(K, Q)), K), alpha)
        return Bias(self.floats(), alpha, keep=self.mask() if kind == "kept bias" else None)

    def fill(self) -> Step:
        return self.one_of(ReplaceFill, AddFill)(self.mask(), self.one_of(-INF, FLOAT_MIN, -1e9, -10.0))

    def weight_steps(self) -> tuple[Step, ...]:
        kind = self.one_of("none", "none", "scaled", "filled")
        if kind == "none":
            return ()
        return (Scale(0.5), Scale(operand=self.floats())) if kind == "scaled" else (ReplaceFill(self.mask(), 0.0),)


def _strided(x: torch.Tensor, how: str) -> torch.Tensor:
    """The same numbers, laid out otherwise; what is between them is NaN."""
    if how == "transposed":
        return x.mT.contiguous().mT
    if how == "rows apart":
        room = torch.full((*x.shape[:-1], x.shape[-1] + 8), torch.nan, dtype=x.dtype)
        room[..., : x.shape[-1]] = x
        return room[..., : x.shape[-1]]
    if how == "misaligned":
        room = torch.full((*x.shape[:-1], x.shape[-1] + 3), torch.nan, dtype=x.dtype)
        room[..., 1:-2] = x
        return room[..., 1:-2]
    if how == "heads after rows" and x.dim() > 3:
        return x.transpose(-2, -3).contiguous().transpose(-2, -3)
    return x


@st.composite
def attentions(draw, widths: tuple[int, ...] = WIDTHS, lengths: tuple[int, ...] = LENGTHS) -> Drawn:
    """Attentions with batch dims [B, heads of k, heads of q for each]."""

    def one_of(*choices):
        return draw(st.sampled_from(choices))

    torch.manual_seed(draw(st.integers(0, 2**20)))
    layout = one_of(*LAYOUTS)
    D, E = one_of(*widths), one_of(*widths)
    heads, group = one_of(1, 2), one_of(1, 1, 2, 3)
    B = one_of(1, 2)
    queries, keys = one_of(*lengths), one_of(*lengths, 400)
    packed_q, packed_k = layout in ("packed", "packed_queries"), layout in ("packed", "packed_keys")
    bounds = Bounds()
    rows, columns = queries, keys
    if layout != "dense":
        B = draw(st.integers(1, 4))
        gap = one_of(0, 0, 2)
        spans = [bounds_of(*(one_of(0, 1, 5, 33, 64, 70) for _ in range(B)), gap=gap) for _ in range(2)]
        if one_of(True, False):
            spans[1] = spans[0]
        bounds = Bounds(spans[0] if packed_q else None, spans[1] if packed_k else None)
        if packed_q:
            rows, queries = int(spans[0].max()) + gap, max(int((spans[0][1] - spans[0][0]).max()), 1)
        if packed_k:
            columns, keys = int(spans[1].max()) + gap, max(int((spans[1][1] - spans[1][0]).max()), 1)
        rows, columns = max(rows, 1), max(columns, 1)
    of_keys = (1 if packed_k else one_of(B, B, 1), heads, 1)
    of_values = (1 if packed_k else one_of(B, B, 1), heads, 1)
    # packed operands of one sequence, which a broadcast dim would say nothing of
    q = randn(1 if packed_q else B, heads, group, rows, D)
    k, v = randn(*of_keys, columns, D), randn(*of_values, columns, E)
    if not packed_q and not packed_k and max(of_keys[0], of_values[0]) < B:
        q = q if one_of(True, False) else q[:1]
    how = [one_of("plain", "plain", "rows apart", "misaligned", "transposed", "heads after rows") for _ in range(3)]
    q, k, v = (_strided(x, own) for x, own in zip((q, k, v), how))
    sequences = B if layout != "dense" else max(q.shape[0], k.shape[0], v.shape[0])
    made = _Draws(draw, (sequences, heads, group), queries, keys)
    steps = [Scale(D**-0.5), *(made.simple() for _ in range(one_of(0, 1, 2)))]
    steps += [made.added() for _ in range(one_of(0, 0, 1, 2))]
    steps += [made.fill() for _ in range(one_of(0, 1, 1))]
    hidden = one_of("nan", "zero", "nan_to_zero")
    fields = {
        "steps": tuple(steps),
        "weight_steps": made.weight_steps(),
        "hidden": hidden,
        "layout": layout,
        "lse": one_of(False, False, True),
        "dropout": one_of(0.0, 0.0, 0.3),
    }
    if one_of(False, False, True):
        fields["sink"] = (
            Sink(operand=made.operand(randn(1, heads, one_of(1, group), 1, 1))) if one_of(True, False) else Sink(0.5)
        )
        # kernels say the sink's of rows of no sequence, of which nothing is said
        nobodys = bounds.q is not None and rows > int((bounds.q[1] - bounds.q[0]).sum())
        fields["lse"] = fields["lse"] and not nobodys
    if all(not isinstance(step, (ReplaceFill, AddFill)) for step in steps) and one_of(False, False, True):
        fields["softmax"] = "unshifted"
    if one_of(False, True):
        fields["out_order"] = one_of((0, 3, 1, 2, 4), (0, 1, 2, 3, 4), (3, 0, 1, 2, 4))
    spec = kernel_cases.make_spec(q, k, v, made.operands, made.dims, **fields)
    seed = torch.tensor([draw(st.integers(0, 2**62))]) if spec.dropout else None
    # autograd's softmax over infinite scores alone has NaN gradients, where a row that counts as 0 has none
    infinite = [step for step in steps if isinstance(step, (ReplaceFill, AddFill)) and step.value == -math.inf]
    differs = hidden != "nan" and any(isinstance(step, AddFill) for step in infinite)
    trains = not differs and not (infinite and spec.lse and hidden != "zero")
    return Drawn(spec, Inputs(q, k, v, made.operands, seed, bounds), trains)
