"""Between the index of an element and what the atoms of its tensor's labels are there."""

from __future__ import annotations

from attnfuse.passes.graph.labels import Atom, Labels


def digits(labels: Labels, index: tuple[int, ...]) -> dict[Atom, int]:
    """What each atom is at an index."""
    found = {}
    for dim, i in zip(labels, index, strict=True):
        for atom in reversed(dim):
            found[atom] = i % atom.size
            i //= atom.size
    return found


def index_at(labels: Labels, atoms: dict[Atom, int]) -> tuple[int, ...]:
    """The index at which the atoms are these."""
    out = []
    for dim in labels:
        i = 0
        for atom in dim:
            i = i * atom.size + atoms[atom]
        out.append(i)
    return tuple(out)
