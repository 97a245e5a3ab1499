"""How a score program is written: what a language has for each thing that it says. Code is text, an expression or lines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from attnfuse.expr import Expr

#: Makes a new variable of code, and gives its name.
Let = Callable[[str], str]


@dataclass(frozen=True)
class Read:
    """An element of an operand for each query and key.

    parts: where it is, as (0 for the row or 1 for the column, index); a dim of size 1 has none. mask: of those that exist, ''
    for one number. table: read at an index of its own.
    """

    operand: int
    dtype: str
    dims: tuple[str, str]
    parts: tuple[tuple[int, str], ...]
    mask: str
    table: bool


class Dialect(ABC):
    """Queries are `q` and keys `k`; scores are `s`, weights `p` and gradients `g`."""

    #: What the kernels are called in errors.
    kernels: ClassVar[str]
    #: How many queries and keys there are.
    sizes: ClassVar[dict[str, str]]

    # -- numbers

    def integer(self, value: int) -> str:
        return str(value)

    @abstractmethod
    def truth(self, value: bool) -> str: ...

    @abstractmethod
    def real(self, value: float) -> str:
        """A number, or an infinity."""

    # -- lines

    @abstractmethod
    def let(self, name: str, code: str) -> str:
        """A new variable."""

    @abstractmethod
    def set(self, name: str, code: str) -> str: ...

    @abstractmethod
    def define(self, name: str, lines: Sequence[str]) -> str:
        """One of the functions."""

    @abstractmethod
    def returned(self, *codes: str) -> str: ...

    @abstractmethod
    def scored(self, saved: Sequence[str]) -> list[str]:
        """The end of `score`. saved: what the gradients of steps need."""

    @abstractmethod
    def saved(self, place: int) -> str:
        """What is there of it in `score_grad`."""

    @abstractmethod
    def apart(self, step: int) -> tuple[list[str], str]:
        """Lines that put the scores aside and begin a sum in their place, and where they are."""

    @abstractmethod
    def unless_full(self, level: int, lines: Sequence[str], otherwise: Sequence[str] | None = None) -> list[str]:
        """Lines for where FULL is less than `level`; otherwise: those for where it is not, which may be none."""

    # -- expressions

    @abstractmethod
    def call(self, name: str, *args: str) -> str:
        """A function of the dialect's own: tanh, tanh_of_half, tanh_of_device, held, floor_div, floor_mod."""

    @abstractmethod
    def choose(self, condition: str, a: str, b: str) -> str: ...

    @abstractmethod
    def least(self, a: str, b: str) -> str:
        """Of integers."""

    @abstractmethod
    def greatest(self, a: str, b: str) -> str: ...

    @abstractmethod
    def every(self, conditions: Sequence[str]) -> str:
        """All of them."""

    @abstractmethod
    def sum(self, terms: Sequence[tuple[int, str]], const: int, wide: bool) -> str:
        """Of coefficient * integer; wide: as int64 has it."""

    @abstractmethod
    def sum_of_ends(self, terms: Sequence[tuple[int, str]], const: int, wide: bool) -> str:
        """The same of bounds on a tile."""

    @abstractmethod
    def apply(self, op: str, args: Sequence[str]) -> str:
        """An operation of expressions."""

    @abstractmethod
    def narrow(self, x: str, most: int) -> str:
        """An integer cut to -most and most, in 32 bits."""

    @abstractmethod
    def of_integer(self, x: str, little: bool) -> str:
        """An integer in float32, rounded to it; little: its magnitude is at most traits.LITTLE."""

    @abstractmethod
    def rounded(self, dtype: str, x: str) -> str:
        """x, which is in float32, rounded to a narrower dtype and in float32 again."""

    @abstractmethod
    def of_rows(self, x: str) -> str:
        """A number of each row, or one of all, as the result of `sink`."""

    # -- operands

    @abstractmethod
    def place(self, x: str) -> str:
        """An index, in 64 bits."""

    @abstractmethod
    def clamped(self, x: str, operand: int, which: int) -> str:
        """An index cut to the rows (0) or columns (1) that the operand has."""

    def own_index(self, own: Expr, value: Callable[[Expr], str]) -> str:
        """An index of an element that exists, in 64 bits."""
        return self.place(value(own))

    def exists(self, uses: Sequence[str]) -> str:
        """Which queries and keys there are; '' where neither is used."""
        return " & ".join(f"({x} < {self.sizes[x]})" for x in uses)

    @abstractmethod
    def load(self, read: Read) -> str:
        """The element as it is, 0 outside of those that exist."""

    @abstractmethod
    def load_added(self, name: str, read: Read) -> list[str]:
        """Lines that make a variable of it; in full tiles without a look at what exists."""

    @abstractmethod
    def loaded(self, x: str, dtype: str) -> str:
        """An element of an operand as a bool or an int64."""

    @abstractmethod
    def real_of(self, x: str, dtype: str) -> str:
        """An element of an operand in float32."""

    @abstractmethod
    def ends(self, read: Read, which: int, let: Let) -> tuple[str, str]:
        """The least and the greatest element along the queries (which = 0) or keys (1) of a tile, int64; of bools not 0 for true.

        read: without parts and mask.
        """

    @abstractmethod
    def give(self, read: Read, given: str, let: Let) -> list[str]:
        """Lines that add a number of each query and key to the operand's gradient."""

    @abstractmethod
    def given(self, operand: int, lines: Sequence[str]) -> list[str]:
        """Lines for a kernel that is to make the operand's gradient."""


def indented(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]
