"""What a launch is given: the struct `Problem` of problem.cuh, filled from tensors."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch

from attnfuse.kernels import dropout
from attnfuse.kernels.gradients import steps
from attnfuse.kernels.sizes import Sizes

#: Matrices in their order.
_MATRICES = ("q", "k", "v", "o", "g", "dq", "dk", "dv")
_ADDRESSES = ("stats", "work", "flags", "lse", "partial", "seed", "q_bounds", "k_bounds", "deal")
#: Bytes that a kernel's arguments may have, all together.
MOST = 4096


@functools.lru_cache(maxsize=64)
def _struct(rank: int, operands: int) -> tuple[type[ctypes.Structure], type[ctypes.Structure]]:
    """(Problem, Matrix) for so many batch dims and operands."""
    u64, i64, i32 = ctypes.c_uint64, ctypes.c_int64, ctypes.c_int32
    strides, pairs, numbers = i64 * rank, (i64 * 2) * operands, (i32 * 2) * operands

    class Matrix(ctypes.Structure):
        _fields_ = (
            ("address", u64),
            ("batch", strides),
            ("row", i64),
            ("column", i64),
            ("wide", i32),
        )

    class Problem(ctypes.Structure):
        _fields_ = (
            *((name, Matrix) for name in _MATRICES),
            *((name, u64) for name in _ADDRESSES),
            ("operand", u64 * operands),
            ("gradient", u64 * operands),
            ("operand_batch", strides * operands),
            ("gradient_batch", strides * operands),
            ("st", pairs),
            ("gradient_st", pairs),
            ("lines", i64),
            ("marks", i64),
            ("element", strides),
            ("n", numbers),
            ("sizes", i32 * rank),
            ("outer", i32 * rank),
            ("inner", i32 * rank),
            *((name, i32) for name in _NUMBERS),
            ("threshold", ctypes.c_uint32),
            ("keep_scale", ctypes.c_float),
        )

    return Problem, Matrix


def most_operands(batch: int) -> int:
    """How many operands a launch takes with so many batch dims."""
    one, two = (ctypes.sizeof(_struct(max(batch, 1), n)[0]) for n in (1, 2))
    return 1 + (MOST - one) // (two - one)


_NUMBERS = ("Qn", "Kn", "sequences", "heads", "outer_heads", "members", "group", "parts")


class Problem:
    """The struct of one launch. `tensors` holds what it has addresses of, and whether kernels write there.

    Raises ValueError where the operands are too many for a kernel's arguments.
    """

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.tensors: list[tuple[torch.Tensor, bool]] = []
        rank = max(len(sizes.batch), 1)
        made, self._matrix = _struct(rank, max(len(sizes.operands), 1))
        if ctypes.sizeof(made) > MOST:
            raise ValueError(f"{len(sizes.operands)} operands of rank {rank + 2} are too many for one kernel")
        self.struct: Any = made()
        self.dims(sizes=sizes.batch)
        for i, o in enumerate(sizes.operands):
            self.struct.operand[i] = self._address(o)
            self._set_row("operand_batch", i, sizes.strides(o))
            self._set_row("st", i, o.stride()[-2:])
            self._set_row("n", i, o.shape[-2:])
        given = self.struct
        given.Qn, given.Kn, given.lines = sizes.Q, sizes.K, sizes.lines
        given.sequences, given.heads = sizes.sequences, sizes.heads
        given.threshold = dropout.threshold(sizes.spec.dropout)
        given.keep_scale = 1.0 / (1.0 - sizes.spec.dropout) if sizes.spec.dropout < 1.0 else 0.0
        self.addresses(
            seed=sizes.seed,
            q_bounds=_wide(sizes.bounds.q),
            k_bounds=_wide(sizes.bounds.k),
        )

    def _address(self, x: torch.Tensor, writes: bool = False) -> int:
        self.tensors.append((x, writes))
        return x.data_ptr()

    def _set_row(self, name: str, row: int, values: Sequence[int]) -> None:
        where = getattr(self.struct, name)[row]
        for d, value in enumerate(values):
            where[d] = value

    def addresses(self, writes: bool = False, **named: torch.Tensor | None) -> None:
        """Tensors without strides: contiguous ones. None where there is none."""
        for name, x in named.items():
            setattr(self.struct, name, 0 if x is None else self._address(x, writes))

    def matrices(self, writes: bool = False, **named: torch.Tensor) -> None:
        """Tensors [*batch, rows, columns] of float16, or of float32 where kernels only write to them."""
        for name, x in named.items():
            made = self._matrix()
            made.address = self._address(x, writes)
            for d, step in enumerate(self.sizes.strides(x)):
                made.batch[d] = step
            made.row, made.column = x.stride()[-2:]
            made.wide = x.dtype == torch.float32
            setattr(self.struct, name, made)

    def numbers(self, **named: int) -> None:
        for name, value in named.items():
            setattr(self.struct, name, value)

    def dims(self, **named: Sequence[int]) -> None:
        """One number for each batch dim; where there is none, the struct has one of size 1."""
        for name, values in named.items():
            where = getattr(self.struct, name)
            for d, value in enumerate(values or (1,)):
                where[d] = value

    def gradients(self, targets: Sequence[torch.Tensor | None]) -> None:
        """Where gradients of operands are added up, float32."""
        for i, x in enumerate(targets):
            if x is None:
                continue
            self.struct.gradient[i] = self._address(x, True)
            self._set_row("gradient_batch", i, self.sizes.strides(x))
            self._set_row("gradient_st", i, steps(x))


def _wide(bounds: torch.Tensor | None) -> torch.Tensor | None:
    return None if bounds is None else bounds.to(torch.int64)


def in_pieces(*tensors: torch.Tensor) -> bool:
    """Whether each eight elements of a row are sixteen bytes of float16 in one place, of all these tensors."""
    return all(map(_in_pieces, tensors))


def _in_pieces(x: torch.Tensor) -> bool:
    steps = [s for n, s in zip(x.shape[:-1], x.stride()[:-1]) if n > 1]
    return x.shape[-1] % 8 == 0 and x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in steps)
