"""Which index of the attention each dim of a tensor runs over.

A dim is labelled with the `Atom`s it is made of, the slowest first: one atom for an ordinary dim, several for a merged one
(B and H in [B*H, Q, D]), none for a dim of size 1. Labels are carried backwards or forwards through views; a view that
splits a dim splits its atom everywhere, since labels are resolved through `Axes` when they are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attnfuse._compat import statically_known_true

# int or SymInt
Size = int | Any


#: A length that is taken for longer than all that are known.
UNKNOWN = 1 << 30


class Atom:
    """An index that is not known to be made of others. Compared by identity."""

    __slots__ = ("size",)

    def __init__(self, size: Size) -> None:
        self.size = size

    def __repr__(self) -> str:
        return f"<{self.size}@{id(self) % 9973}>"


class Distances(Atom):
    """The index k - q + Q - 1 of how far a key is from a query: Q + K - 1 values."""

    __slots__ = ("keys", "queries")

    def __init__(self, queries: Size, keys: Size) -> None:
        super().__init__(queries + keys - 1)
        self.queries, self.keys = queries, keys


Dim = tuple[Atom, ...]
Labels = tuple[Dim, ...]


def known_equal(a: Size, b: Size) -> bool:
    return a is b or statically_known_true(a == b)


def same_sizes(a: Sequence[Size], b: Sequence[Size]) -> bool:
    """Whether two shapes, or strides, are known to be the same."""
    return len(a) == len(b) and all(map(known_equal, a, b))


def is_one(size: Size) -> bool:
    return known_equal(size, 1)


def _divides(a: Size, b: Size) -> bool:
    """Whether b is known to be a multiple of a."""
    return not known_equal(a, 0) and statically_known_true(b % a == 0)


class Axes:
    """The atoms of one site and how they were split."""

    def __init__(self) -> None:
        self.parts: dict[Atom, Dim] = {}

    def fresh(self, size: Size) -> Dim:
        return () if is_one(size) else (Atom(size),)

    def atoms(self, dim: Dim) -> Dim:
        """`dim` in terms of atoms that are not split further."""
        out: list[Atom] = []
        for atom in dim:
            out += self.atoms(self.parts[atom]) if atom in self.parts else (atom,)
        return tuple(out)

    def resolve(self, labels: Labels) -> Labels:
        return tuple(self.atoms(d) for d in labels)

    def split(self, atom: Atom, sizes: Sequence[Size]) -> Dim:
        self.parts[atom] = tuple(Atom(s) for s in sizes)
        return self.parts[atom]

    def regroup(self, labels: Labels, shape: Sequence[Size]) -> Labels | None:
        """The labels of a tensor of `shape` with the same elements in the same order; None if dims do not line up."""
        queue = [a for d in self.resolve(labels) for a in d]
        out: list[Dim] = []
        for size in shape:
            dim: list[Atom] = []
            left = size
            while not is_one(left):
                if not queue:
                    return None
                atom = queue.pop(0)
                if known_equal(atom.size, left):
                    dim.append(atom)
                    left = 1
                elif _divides(left, atom.size):
                    outer, inner = self.split(atom, (left, atom.size // left))
                    dim.append(outer)
                    queue.insert(0, inner)
                    left = 1
                elif _divides(atom.size, left):
                    dim.append(atom)
                    left = left // atom.size
                else:
                    return None
            out.append(tuple(dim))
        return tuple(out) if not queue else None


def drop(labels: Labels, index: int) -> Labels:
    return labels[:index] + labels[index + 1 :]


def insert(labels: Labels, index: int, dim: Dim) -> Labels:
    return (*labels[:index], dim, *labels[index:])


def hint(atom: Atom) -> int:
    """How long the dim was when the graph was traced; UNKNOWN where that is not known."""
    size = atom.size
    if isinstance(size, int):
        return size
    known = getattr(size.node, "hint", None)
    return known if isinstance(known, int) else UNKNOWN


def stride_hint(stride: Size) -> int:
    """The stride, or what it was when the graph was traced; 0 where that is not known."""
    if isinstance(stride, int):
        return stride
    hint = getattr(stride.node, "hint", None)
    return hint if isinstance(hint, int) else 0
