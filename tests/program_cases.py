"""Score programs for tests of what writes them: expressions over operands of every dtype, and specs of all steps around them."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import torch

from attnfuse import expr
from attnfuse.expr import Algebra, Const, Expr, Load, NotExpressible
from attnfuse.spec import (
    AddFill,
    Attention,
    Bias,
    Cast,
    Clamp,
    Operand,
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

A, INF = Algebra(), math.inf
#: Queries and keys, and the rows and columns of tables.
Q, K, ROWS, COLUMNS = 19, 41, 5, 7
LEAST, MOST = -(2**63), 2**63 - 1

#: The operands of all specs here: dtype, dims.
OPERANDS = (
    ("int64", "1", "1"),
    ("int64", "Q", "1"),
    ("int64", "1", "K"),
    ("int32", "1", "K"),
    ("int16", "Q", "1"),
    ("int8", "Q", "K"),
    ("uint8", "1", "K"),
    ("bool", "Q", "K"),
    ("bool", "1", "K"),
    ("bool", "Q", "1"),
    ("bool", "1", "1"),
    # tables of integers
    ("int64", "1", "C"),
    ("int32", "R", "C"),
    ("int32", "R", "K"),
    ("bool", "Q", "C"),
    # what is added or multiplied with
    ("float32", "Q", "K"),
    ("float16", "1", "K"),
    ("bfloat16", "Q", "1"),
    ("float64", "1", "1"),
    ("float32", "1", "1"),
    # its tables
    ("float32", "1", "C"),
    ("float16", "R", "C"),
    ("bfloat16", "Q", "C"),
    ("float64", "R", "K"),
)
INTEGERS, BOOLS, TABLES, FLAGS = range(7), range(7, 11), (11, 12, 13), 14
FLOATS, NUMBERS, FLOAT_TABLES = range(15, 20), (18, 19), range(20, 24)
_CONSTANTS = (0, 1, 2, 3, 5, 8, -1, -2, -7, 13, 20, 40, 100, 255)
_EXTREME = (
    2**31 - 1,
    2**31,
    -(2**31),
    2**40,
    2**62,
    MOST,
    LEAST,
    6364136223846793005,
    1442695040888963407,
    2**26,
    2**29,
)


class Writer:
    """Draws expressions."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        #: whether operands are read; an index of a table is the same for all batch elements
        self.reads = True

    def constant(self) -> int:
        return self.chance.choice(_EXTREME if self.chance.random() < 0.12 else _CONSTANTS)

    def index(self, size: int, depth: int) -> Expr:
        """An integer in range(size)."""
        before, self.reads = self.reads, False
        x = self.integer(depth)
        self.reads = before
        if self.chance.random() < 0.5:
            return A.mod(x, Const(size))
        return A.maximum(A.minimum(x, Const(size - 1)), Const(0))

    def places(self, operand: int, depth: int) -> tuple[Expr | None, Expr | None]:
        """Where a table is read, row and column."""
        _, rows, columns = OPERANDS[operand]
        row = self.index(ROWS, depth) if rows == "R" else None
        return row, self.index(COLUMNS, depth) if columns == "C" else None

    def table(self, operand: int, depth: int) -> Load:
        return Load(operand, OPERANDS[operand][0], *self.places(operand, depth))

    def integer(self, depth: int) -> Expr:
        c = self.chance
        if depth == 0:
            of_operand = c.choice(INTEGERS)
            leaves = (expr.Q, expr.K, expr.Q, expr.K, Const(self.constant()), Load(of_operand, OPERANDS[of_operand][0]))
            return c.choice(leaves if self.reads else leaves[:-1])
        less = depth - 1
        which = c.randrange(12)
        if which < 4:
            return A.add(self.integer(less), self.integer(less), c.choice((1, 1, -1, 3, self.constant())))
        if which == 4:
            return A.mul(self.integer(less), Const(self.constant()))
        if which in (5, 6):
            by = Const(min(abs(self.constant()) or 1, MOST))
            return (A.floordiv if which == 5 else A.mod)(self.integer(less), by)
        if which in (7, 8):
            return (A.minimum if which == 7 else A.maximum)(self.integer(less), self.integer(less))
        if which == 9:
            return A.abs(self.integer(less))
        if which == 10:
            return A.where(self.truth(less), self.integer(less), self.integer(less))
        return A.int_(self.truth(less)) if c.random() < 0.5 or not self.reads else self.table(c.choice(TABLES), less)

    def truth(self, depth: int) -> Expr:
        c = self.chance
        if not self.reads:
            return A.compare(c.choice(("lt", "eq")), self.integer(max(depth - 1, 0)), self.integer(0))
        if depth == 0 or c.random() < 0.1:
            operand = c.choice(BOOLS)
            return self.table(FLAGS, 0) if c.random() < 0.2 else Load(operand, "bool")
        less = depth - 1
        which = c.randrange(8)
        if which < 5:
            op = c.choice(("lt", "le", "gt", "ge", "eq", "ne"))
            return A.compare(op, self.integer(less), self.integer(less))
        if which == 7:
            return A.not_(self.truth(less))
        return (A.and_ if which == 5 else A.or_)(self.truth(less), self.truth(less))

    def mask(self, depth: int) -> Expr:
        """A mask, which often has a bound on the key among its parts."""
        c = self.chance
        found = self.truth(depth)
        if c.random() < 0.4:
            offset = A.add(expr.Q, c.choice((Const(self.constant()), Load(0, "int64"))))
            found = A.and_(found, A.compare(c.choice(("le", "gt", "lt", "ge")), expr.K, offset))
        if c.random() < 0.2:
            found = A.and_(found, A.compare(c.choice(("lt", "ge")), expr.K, c.choice((Const(9), Load(0, "int64")))))
        return found

    def bias(self, depth: int) -> Bias:
        keep = self.mask(depth) if self.chance.random() < 0.3 else None
        alpha = self.chance.choice((1.0, 0.5, -2.0))
        if self.chance.random() < 0.5:
            return Bias(self.chance.choice(FLOATS), alpha, keep=keep)
        operand = self.chance.choice(FLOAT_TABLES)
        return Bias(operand, alpha, *self.places(operand, depth), keep)

    def ramp(self, depth: int) -> Ramp:
        c = self.chance
        near = A.sub(expr.K, expr.Q)
        rounded = (("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "float16"))
        dtypes = c.choice((("float32", "float32"),) * 2 + rounded)
        # float16 has no larger ones
        other = A.mod(self.integer(depth), Const(2 ** c.randrange(1, 14 if "float16" in dtypes else 30)))
        number = c.choice((near, A.mul(A.abs(near), Const(-1)), expr.K, other))
        keep = self.mask(depth) if c.random() < 0.3 else None
        return Ramp(c.choice(NUMBERS), number, c.choice((1.0, -0.5)), keep, *dtypes)

    def step(self, depth: int) -> Step:
        c = self.chance
        which = c.randrange(11)
        if which < 2:
            fill = c.choice((-INF, -INF, -1e30, -1e4, 3.0))
            return (ReplaceFill if c.random() < 0.6 else AddFill)(self.mask(depth), fill)
        if which < 4:
            return self.bias(depth)
        if which == 4:
            return self.ramp(depth)
        if which == 5:
            return c.choice((Scale(c.choice((0.25, 0.1, -0.7, 2.0))), Scale(operand=c.choice(FLOATS))))
        if which == 6:
            return Shift(c.choice((0.5, -1e4, 1e-3)))
        if which == 7:
            return c.choice((Softcap(3.0), Softcap(50.0), Tanh()))
        if which == 8:
            return c.choice((Clamp(-1.0, 1.5), Clamp(low=-0.5), Clamp(high=2.0)))
        return Cast(c.choice(("float16", "bfloat16", "float32")))

    def spec(self, depth: int, dtype: str, steps: int = 4, **fields: object) -> Attention:
        """A spec of some steps, masks filling weights among them."""
        c = self.chance
        weights: list[Step] = []
        for _ in range(c.randrange(3)):
            weights.append(c.choice((Scale(0.5), Scale(operand=c.choice(FLOATS)), ReplaceFill(self.mask(depth), 0.0))))
        sink = c.choice((None, Sink(0.5), Sink(operand=17), Sink(operand=18)))
        made = tuple(self.step(depth) for _ in range(c.randrange(1, steps + 1)))
        return spec_of(dtype, made, weight_steps=tuple(weights), sink=sink, **fields)


def spec_of(dtype: str, steps: tuple[Step, ...], **fields: object) -> Attention:
    """A spec with OPERANDS."""
    return Attention(
        **{
            "batch": ("B",),
            "sizes": (None,) * 5,
            "qk_dtype": dtype,
            "v_dtype": dtype,
            "out_dtype": dtype,
            "steps": steps,
            "operands": tuple(Operand(name, ("1", rows, columns)) for name, rows, columns in OPERANDS),
            **fields,
        }
    )


def specs(count: int, seed: int, dtype: str, depth: int = 2, steps: int = 4) -> Iterator[Attention]:
    """So many specs, the same for the same seed."""
    w = Writer(random.Random(seed))
    while count:
        try:
            found = w.spec(depth, dtype, steps)
        except NotExpressible:
            continue
        count -= 1
        yield found


def operands(seed: int, ends: bool = False) -> list[torch.Tensor]:
    """Tensors [rows, columns] for OPERANDS. ends: some integers are at the ends of what their dtype holds."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for i, (name, *dims) in enumerate(OPERANDS):
        shape = [{"1": 1, "Q": Q, "K": K, "R": ROWS, "C": COLUMNS}[x] for x in dims]
        dtype = dtype_of(name)
        if dtype.is_floating_point:
            x = torch.randn(shape, generator=g)
        elif dtype == torch.bool:
            x = torch.rand(shape, generator=g) < 0.6
        else:
            info = torch.iinfo(dtype)
            x = torch.randint(max(info.min, -12), 30, shape, generator=g)
            if ends:
                far = torch.tensor([info.min, info.max, info.max - 5, info.min + 1])
                which = torch.randint(0, 12, shape, generator=g)
                x = torch.where(which < 4, far[which.clamp(max=3)], x)
            if i == 0:
                x[:] = (3, LEAST, MOST, MOST - 5, -2, 11)[seed % 6]
        found.append(x.to(dtype))
    return found
