"""What an attention computes, free of any graph: the `Attention` spec and the steps it is made of.

Shapes, everywhere in attnfuse:

    q [*batch, Q, D]   k [*batch, K, D]   v [*batch, K, E]   operands [*batch, Q, K]   out [*batch, Q, E]

Every batch dim of q, k, v and of an operand is either full or 1 (broadcast); an operand's Q and K may be 1 too. Grouped
query attention is a broadcast like any other: q [B, Hkv, G, Q, D] against k [B, Hkv, 1, K, D].

In a packed layout the first batch dim is that of the sequences. Packed queries are q [1, *rest, rows, D], in which sequence s
has the rows from bounds[0, s] on and before bounds[1, s]; the result lies like them. Packed keys likewise in k and v. Q and K
are the sequence's own: its first query and its first key are number 0, in masks and in operands [sequences or 1, *rest, Q, K],
which are as long as the longest sequence. No row belongs to two sequences; rows of none give 0.

In the paged layout k and v lie in caches of blocks, k [*batch, blocks, block, D] and v [*batch, blocks, block, E], and a table of
integers [*batch, T] says which block comes where: key j is row j % block of block table[..., j // block]. Each batch dim of a
cache and of the table is full or 1. K, the number of keys, is at most T * block.

A spec holds no tensor, no graph node and no symbolic size. It is hashable and survives a trip through JSON text, which is
how it reaches the op: `Attention.parse(spec.argument) == spec`, and that of `spec.text` too.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch

from attnfuse import expr
from attnfuse.expr import Expr

#: Part of every spec's text, so that a compiled graph cached under an older meaning of a spec is never reused.
OP_VERSION = 8

#: What a row whose scores are all -inf gives: NaN as softmax does, 0 as scaled_dot_product_attention does, or 0 for every
#: row that is NaN for whatever reason (softmax followed by nan_to_num).
Hidden = Literal["nan", "zero", "nan_to_zero"]

#: 'packed': the rows of q, and of k and v, lie one sequence after the other; 'packed_queries' and 'packed_keys': those of q
#: alone, and of k and v alone. 'paged': those of k and v are read through a block table.
Layout = Literal["dense", "packed", "packed_queries", "packed_keys", "paged"]

#: 'plain' is softmax. 'unshifted' is exp(s) / sum(exp(s)) without subtracting the maximum: the same where that sum is a
#: finite positive float32, NaN elsewhere.
Softmax = Literal["plain", "unshifted"]


def _number(x: float) -> str:
    return f"{x:.6g}"


@dataclass(frozen=True)
class Scale:
    """s * value; `value` is a number, or the index of an operand that is multiplied in (and may need a gradient)."""

    kind: ClassVar[str] = "scale"
    value: float = 1.0
    operand: int | None = None

    def __str__(self) -> str:
        return f"scale {_number(self.value)}" if self.operand is None else f"times operand {self.operand}"


@dataclass(frozen=True)
class Bias:
    """s + alpha * operand, only where `keep` holds if there is one; the operand may need a gradient.

    Of operand [*batch, rows, columns] it takes the element at (row, col), or where they are None that at (q, k): a table of
    relative positions is an operand [1, H, 1, T] read at col k - q + offset.
    """

    kind: ClassVar[str] = "bias"
    operand: int
    alpha: float = 1.0
    row: Expr | None = None
    col: Expr | None = None
    keep: Expr | None = None

    def __str__(self) -> str:
        return f"bias {self.operand}" if self.alpha == 1.0 else f"{_number(self.alpha)} * bias {self.operand}"


@dataclass(frozen=True)
class Ramp:
    """s + alpha * (operand * number), only where `keep` holds if there is one; the operand may need a gradient.

    Of operand [*batch, 1, 1] there is one element for all queries and keys, and number is an integer: ALiBi (Press et al. 2022,
    arXiv:2108.12409) is slopes [1, H, 1, 1] times k - q. The integer is rounded to `number_dtype` and the product to `dtype`, by
    way of float32. float32 is what kernels compute in, so that with it a product need not be rounded.
    """

    kind: ClassVar[str] = "ramp"
    operand: int
    number: Expr
    alpha: float = 1.0
    keep: Expr | None = None
    number_dtype: str = "float32"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in (self.number_dtype, self.dtype):
            if name not in ("float32", "bfloat16", "float16"):
                raise ValueError(f"a ramp is in float32, bfloat16 or float16; got {name}")

    def __str__(self) -> str:
        factor = "" if self.alpha == 1.0 else f"{_number(self.alpha)} * "
        return f"{factor}operand {self.operand} * ({expr.text(self.number)})"


@dataclass(frozen=True)
class Shift:
    """s + value for a number."""

    kind: ClassVar[str] = "shift"
    value: float

    def __str__(self) -> str:
        return f"shift {_number(self.value)}"


@dataclass(frozen=True)
class Softcap:
    """cap * tanh(s / cap)."""

    kind: ClassVar[str] = "softcap"
    cap: float

    def __str__(self) -> str:
        return f"softcap {_number(self.cap)}"


@dataclass(frozen=True)
class Tanh:
    """tanh(s)."""

    kind: ClassVar[str] = "tanh"

    def __str__(self) -> str:
        return "tanh"


@dataclass(frozen=True)
class Clamp:
    """min(max(s, low), high); the gradient is that of torch.clamp (1 on the bounds)."""

    kind: ClassVar[str] = "clamp"
    low: float = -math.inf
    high: float = math.inf

    def __str__(self) -> str:
        return f"clamp [{_number(self.low)}, {_number(self.high)}]"


@dataclass(frozen=True)
class ReplaceFill:
    """where(keep, s, value): no gradient reaches q and k where keep is false."""

    kind: ClassVar[str] = "replace"
    keep: Expr
    value: float

    def __str__(self) -> str:
        return f"{expr.text(self.keep)} else {_number(self.value)}"


@dataclass(frozen=True)
class AddFill:
    """s + where(keep, 0, value): the gradient passes everywhere."""

    kind: ClassVar[str] = "add"
    keep: Expr
    value: float

    def __str__(self) -> str:
        return f"{expr.text(self.keep)} plus {_number(self.value)}"


@dataclass(frozen=True)
class Cast:
    """Scores are held in `dtype` from here on.

    Kernels compute in float32 and do not round, but for what a reader can see: where `dtype` is narrower, a sum too large for
    it is inf, and one so large that it swallows what was added to it is rounded (attnfuse/rounding.py). Terms added one after
    the other right before such a cast are summed first, and their sum is added to the scores.
    """

    kind: ClassVar[str] = "cast"
    dtype: str

    def __str__(self) -> str:
        return f"in {self.dtype}"


@dataclass(frozen=True)
class Sink:
    """A score that every row has besides those of its keys, and that weighs nothing: the softmax sums over it too.

    It is operand [*batch, Q, 1], whose Q may be 1, or without one a number; softmax "off by one" has a sink of 0. It is a
    score after all steps, and may need a gradient.
    """

    kind: ClassVar[str] = "sink"
    value: float = 0.0
    operand: int | None = None

    def __str__(self) -> str:
        return f"sink {_number(self.value)}" if self.operand is None else f"sink operand {self.operand}"


Step = Scale | Bias | Ramp | Shift | Softcap | Tanh | Clamp | ReplaceFill | AddFill | Cast
_STEPS: dict[str, type] = {
    c.kind: c for c in (Scale, Bias, Ramp, Shift, Softcap, Tanh, Clamp, ReplaceFill, AddFill, Cast)
}
_PARTS: dict[str, type] = {**_STEPS, Sink.kind: Sink}
_EXPRS: dict[str, type] = {c.kind: c for c in (expr.Const, expr.Index, expr.Load, expr.Linear, expr.Apply)}


@dataclass(frozen=True)
class Operand:
    """A side tensor of the score path: dtype, and the dims it has ('1' where it is broadcast), aligned to [*batch, Q, K]."""

    dtype: str
    dims: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(self.dims)}]"


@dataclass(frozen=True)
class Attention:
    """out = dropout(weight_steps(softmax(steps(q @ k^T)))) @ v.

    batch        names of the batch dims, outermost first, such as ('B', 'H') or ('B', 'Hkv', 'G')
    sizes        the size of each dim in batch + (Q, K, D, E), None where it is symbolic
    broadcast    for q, k and v, the names of the batch dims in which it has size 1 while the batch has more (or may have); in a
                 paged layout a cache may have 1 where the table has more, and the other way round
    qk_dtype     dtype of q and k; v_dtype of v; out_dtype of the result
    steps        applied to the scores in order; weight_steps (ReplaceFill with 0, Scale) to the weights after softmax
    sink         a score besides those of the keys, or None
    lse          whether the log-sum-exp of each row's scores (and sink) is a result too, which may have a gradient
    dropout      probability of dropping a weight, 0 for none
    wraps        in a paged layout: a negative number in the table counts blocks from the end, and is no error
    out_order    the dims of out from the slowest to the fastest in memory
    """

    batch: tuple[str, ...]
    sizes: tuple[int | None, ...]
    qk_dtype: str
    v_dtype: str
    out_dtype: str
    steps: tuple[Step, ...] = ()
    operands: tuple[Operand, ...] = ()
    weight_steps: tuple[Step, ...] = ()
    softmax: Softmax = "plain"
    hidden: Hidden = "nan"
    sink: Sink | None = None
    lse: bool = False
    dropout: float = 0.0
    broadcast: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]] = ((), (), ())
    layout: Layout = "dense"
    wraps: bool = False
    out_order: tuple[int, ...] = ()
    nan_policy: Literal["skip", "eager"] = "skip"
    version: int = field(default=OP_VERSION)

    def __post_init__(self) -> None:
        rank = len(self.batch) + 2
        if len(self.sizes) != rank + 2:
            raise ValueError(f"sizes must name batch + (Q, K, D, E), {rank + 2} entries; got {self.sizes}")
        if not self.out_order:
            object.__setattr__(self, "out_order", tuple(range(rank)))
        if self.packed and not self.batch:
            raise ValueError(f"layout {self.layout} needs a batch dim for the sequences")
        if sorted(self.out_order) != list(range(rank)):
            raise ValueError(f"out_order must be a permutation of range({rank}); got {self.out_order}")
        for used in self.used_operands:
            if not 0 <= used < len(self.operands):
                raise ValueError(f"a step names operand {used} of {len(self.operands)}")
        for operand in self.operands:
            if len(operand.dims) != rank:
                raise ValueError(f"operand {operand} must have {rank} dims, as [*batch, Q, K]")
        if self.wraps and not self.paged:
            raise ValueError(f"only a paged layout has a table whose numbers wrap; got {self.layout}")
        for load in self.loads:
            if load.dtype != self.operands[load.operand].dtype:
                raise ValueError(f"operand {load.operand} is {self.operands[load.operand].dtype}, not {load.dtype}")
        for step in self.steps:
            if isinstance(step, Ramp) and self.operands[step.operand].dims[-2:] != ("1", "1"):
                raise ValueError(
                    f"what a number is multiplied with must be [*batch, 1, 1]; got {self.operands[step.operand]}"
                )
        if self.sink is not None and self.sink.operand is not None:
            operand = self.operands[self.sink.operand]
            if operand.dims[-1] != "1" or operand.dims[-2] not in ("1", "Q") or self.sink.operand in self.tables:
                raise ValueError(f"a sink must be [*batch, Q, 1]; got {operand}")
            if self.packed_queries and (operand.dims[0] != "1" or operand.dims[-2] != "1"):
                raise ValueError(f"sinks of packed queries must be one for all rows of a head; got {operand}")

    @functools.cached_property
    def loads(self) -> tuple[expr.Load, ...]:
        """What the masks, the indices of tables and the numbers of ramps read, in order of use."""
        found = []
        for step in self.steps + self.weight_steps:
            for name in ("keep", "row", "col", "number"):
                part = getattr(step, name, None)
                if part is not None:
                    found += expr.loads(part)
        return tuple(found)

    @property
    def used_operands(self) -> tuple[int, ...]:
        """Indices of the operands the steps read."""
        used = [load.operand for load in self.loads]
        for step in self.steps + self.weight_steps:
            index = getattr(step, "operand", None)
            if index is not None:
                used.append(index)
        if self.sink is not None and self.sink.operand is not None:
            used.append(self.sink.operand)
        return tuple(used)

    @property
    def tables(self) -> frozenset[int]:
        """Operands that are read at an index of their own: their last two dims need not be Q and K."""
        steps = [s for s in self.steps + self.weight_steps if isinstance(s, Bias)]
        reads: list[expr.Load | Bias] = [*self.loads, *steps]
        return frozenset(x.operand for x in reads if x.row is not None or x.col is not None)

    @property
    def packed(self) -> bool:
        """Whether the rows of a side lie one sequence after the other."""
        return self.packed_queries or self.packed_keys

    @property
    def paged(self) -> bool:
        """Whether k and v are read through a block table."""
        return self.layout == "paged"

    @property
    def packed_queries(self) -> bool:
        return self.layout in ("packed", "packed_queries")

    @property
    def packed_keys(self) -> bool:
        return self.layout in ("packed", "packed_keys")

    @property
    def Q(self) -> int | None:
        return self.sizes[-4]

    @property
    def K(self) -> int | None:
        return self.sizes[-3]

    @property
    def D(self) -> int | None:
        return self.sizes[-2]

    @property
    def E(self) -> int | None:
        return self.sizes[-1]

    @property
    def groups(self) -> int | None:
        """Query heads per key head where k is broadcast over the innermost batch dim, else 1; None if symbolic."""
        if self.batch and self.batch[-1] in self.broadcast[1] and self.batch[-1] in self.broadcast[2]:
            return self.sizes[len(self.batch) - 1]
        return 1

    @functools.cached_property
    def text(self) -> str:
        """JSON text; equal specs have equal text."""
        return json.dumps(_encode(self), sort_keys=True, separators=(",", ":"))

    @property
    def argument(self) -> str:
        """The text as the op gets it, with ' for ": Inductor's C++ wrapper puts strings between quotes as they are."""
        text = self.text
        return text if "'" in text or "\\" in text else text.replace('"', "'")

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def parse(text: str) -> Attention:
        """The spec that `text` was made from, or `argument`. Raises ValueError if it is neither, or is of another OP_VERSION."""
        data = json.loads(text.replace("'", '"') if text.startswith("{'") else text)
        if not isinstance(data, dict) or data.get("version") != OP_VERSION:
            raise ValueError(f"not an attention spec of version {OP_VERSION}: {text[:80]!r}")
        return Attention(**{f.name: _decode(data[f.name]) for f in fields(Attention)})

    def describe(self, names: Sequence[str] = ()) -> str:
        """One line for the report, such as 'scale 0.125, causal & key padding from attention_mask else -inf, GQA 4:1'.

        names: what each operand is called; its dtype and dims are said for one that has no name.
        """
        called = [f"from {n}" if n else str(o) for o, n in zip(self.operands, (*names, *[""] * len(self.operands)))]
        words = expr.Words([o.dims for o in self.operands], called)
        # a cast to what scores are computed in only ends the terms of a sum
        steps = [s for s in self.steps if not (isinstance(s, Cast) and s.dtype in ("float32", "float64"))]
        late = (Cast, Bias, Ramp, ReplaceFill, AddFill)
        parts = [_said(s, words, called) for s in steps if not isinstance(s, late)]
        parts += [_said(s, words, called) for s in steps if isinstance(s, late)]
        parts += [f"weights {_said(s, words, called)}" for s in self.weight_steps]
        if self.sink is not None:
            parts.append(str(self.sink) if self.sink.operand is None else f"sink {called[self.sink.operand]}")
        if self.softmax != "plain":
            parts.append(f"softmax {self.softmax}")
        if self.dropout:
            parts.append(f"dropout {_number(self.dropout)}")
        if self.groups not in (1, None) and len(self.batch) >= 2:
            parts.append(f"GQA {self.groups}:1")
        if self.packed:
            parts.append(self.layout.replace("_", " "))
        if self.paged:
            parts.append("reads through the block table")
        if self.E != self.D:
            parts.append(f"E {self.E} != D {self.D}")
        if self.lse:
            parts.append("gives its log-sum-exp")
        return ", ".join(parts) or "plain"

    def __str__(self) -> str:
        return self.describe()


def _said(step: Step, words: expr.Words, called: Sequence[str]) -> str:
    if isinstance(step, (ReplaceFill, AddFill)):
        return f"{words.say(step.keep)} {'else' if isinstance(step, ReplaceFill) else 'plus'} {_number(step.value)}"
    if isinstance(step, Bias):
        factor = "" if step.alpha == 1.0 else f"{_number(step.alpha)} * "
        where = ", ".join(expr.text(x) for x in (step.row, step.col) if x is not None)
        said = f"{factor}{'table' if where else 'bias'} {called[step.operand]}{f' at {where}' if where else ''}"
        return said if step.keep is None else f"{said} where {words.say(step.keep)}"
    if isinstance(step, Ramp):
        factor = "" if step.alpha == 1.0 else f"{_number(step.alpha)} * "
        rounded = "" if step.dtype == "float32" else f" in {step.dtype}"
        said = f"{factor}{called[step.operand]} times {expr.text(step.number)}{rounded}"
        return said if step.keep is None else f"{said} where {words.say(step.keep)}"
    return str(step)


def dtype_name(dtype: torch.dtype) -> str:
    """'float32' for torch.float32."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """torch.float32 for 'float32'. Raises ValueError for anything that is not a dtype's name."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is not the name of a torch dtype")
    return dtype


def _encode(value: Any) -> Any:
    """To plain JSON values. Infinities become strings, since JSON has none."""
    if isinstance(value, Attention):
        return {f.name: _encode(getattr(value, f.name)) for f in fields(value)}
    if hasattr(value, "kind"):
        return {"kind": value.kind, **{f.name: _encode(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, Operand):
        return {"kind": "operand", **{k: _encode(v) for k, v in asdict(value).items()}}
    if isinstance(value, tuple):
        return [_encode(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"kind": "float", "value": str(value)}
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decode(v) for v in value)
    if isinstance(value, dict):
        kind = value["kind"]
        if kind == "float":
            return float(value["value"])
        rest = {k: _decode(v) for k, v in value.items() if k != "kind"}
        if kind == "operand":
            return Operand(**rest)
        return (_PARTS.get(kind) or _EXPRS[kind])(**rest)
    return value
