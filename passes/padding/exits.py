"""Where packed rows leave a region that begins in the graph's own inputs: what reads a padded tensor, but not its padding.

Each exit knows what must hold of the values of a batch for that (`Guard`), which one look at small tensors tells before the
graph runs, and writes what it reads from the packed rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

from attnfuse.passes.graph.aten import dtype_of, shape_of, value_of
from attnfuse.passes.graph.labels import Labels
from attnfuse.passes.padding.rowwise import Rows

if TYPE_CHECKING:
    from attnfuse.passes.padding.rewrite import PackedWriter


@dataclass(frozen=True)
class Guard:
    """What must hold of the places that are kept.

    kind     'prefix': those of each sequence are its first ones; 'run': they lie side by side; 'some': there is one in each
             sequence; 'at': those of `node` [B], or the place `number`, are kept in each; 'ignored': elsewhere `node` [B, N] is
             `number`
    """

    kind: str
    rows: Rows
    node: fx.Node | None = None
    number: int = 0

    def __str__(self) -> str:
        name = "" if self.node is None else self.node.name
        return {
            "prefix": "padding lies behind each sequence",
            "run": "no padding lies between tokens",
            "some": "each sequence has a token",
            "at": f"place {name or self.number} of each sequence is a token",
            "ignored": f"labels of padding are {self.number}",
        }[self.kind]


@dataclass(frozen=True, eq=False)
class Exit(ABC):
    """`node` is what the graph makes of `source`, whose rows are packed, with its labels."""

    node: fx.Node
    source: fx.Node
    rows: Rows
    labels: Labels
    guards: tuple[Guard, ...] = ()

    @property
    def sequence(self) -> int:
        """The dim of the sequences, which is 1 in packed rows."""
        return self.labels.index((self.rows.sequence,))

    @property
    def place(self) -> int:
        """The dim of the places, which is all rows in packed ones."""
        return self.labels.index((self.rows.place,))

    @property
    def rest(self) -> list[int]:
        """The other dims."""
        return [d for d in range(len(self.labels)) if d not in (self.sequence, self.place)]

    @abstractmethod
    def write(self, writer: PackedWriter, packed: fx.Node) -> fx.Node:
        """What stands for `node`, made of the packed rows of `source`."""

    def _leading(self, writer: PackedWriter, packed: fx.Node) -> fx.Node:
        """[rows, *the other dims in their order]."""
        order = [self.sequence, self.place, *self.rest]
        if order != list(range(len(order))):
            packed = writer.method("permute", packed, *order)
        return writer.method("squeeze", packed, 0)

    def _back(self, writer: PackedWriter, x: fx.Node, keeps: bool) -> fx.Node:
        """[B, *the other dims in their order], with the sequences where they were; keeps: and with 1 where the places were."""
        at = self.sequence - (self.place < self.sequence)
        x = x if at == 0 else writer.method("movedim", x, 0, at)
        return writer.method("unsqueeze", x, self.place) if keeps else x

    def _shape(self, writer: PackedWriter) -> list[int | fx.Node]:
        """[B, *the other dims in their order]."""
        sizes = shape_of(self.source)
        return [writer.size(self.rows.sequence.size), *(writer.size(sizes[d]) for d in self.rest)]

    def _summed(self, writer: PackedWriter, own: fx.Node, shape: Sequence[int | fx.Node]) -> fx.Node:
        """The sums [B, ...], of that shape, of the rows [rows, ...] of each sequence."""
        zeros = writer.method("new_zeros", own, list(shape))
        return writer.call(torch.index_add, (zeros, 0, writer.rewriter.table(writer, self.rows, "sequence"), own))


class Computed(Exit):
    """The same op on the packed rows: what it makes of padding is nothing."""

    def write(self, writer: PackedWriter, packed: fx.Node) -> fx.Node:
        return writer.rewriter.again(writer, self.node)


@dataclass(frozen=True, eq=False)
class Spread(Exit):
    """A padded tensor again, with `fill` for padding: which it has there, or, for a result that is not read there, 0."""

    fill: float = 0.0

    def write(self, writer: PackedWriter, packed: fx.Node) -> fx.Node:
        sizes = (self.rows.sequence.size, self.rows.place.size)
        own = self._leading(writer, packed)
        flat = writer.method("new_full", own, [writer.product(sizes), *self._shape(writer)[1:]], self.fill)
        index = writer.rewriter.table(writer, self.rows, "index")
        whole = writer.method("unflatten", writer.call(torch.index_copy, (flat, 0, index, own)), 0, writer.shape(sizes))
        order = [self.sequence, self.place, *self.rest]
        if order != list(range(len(order))):
            whole = writer.method("permute", whole, *[order.index(d) for d in range(len(order))])
        return writer.laid_out(whole, value_of(self.source))


@dataclass(frozen=True, eq=False)
class Selected(Exit):
    """One place of each sequence: the one of that number, or of `index` [B]."""

    number: int = 0
    index: fx.Node | None = None
    # whether the dim of the places is kept, as 1
    keeps: bool = False

    def write(self, writer: PackedWriter, packed: fx.Node) -> fx.Node:
        if self.index is not None:
            row = writer.rewriter.row_of(writer, self.rows, self.index)
            found = writer.call(torch.index_select, (self._leading(writer, packed), 0, row))
            # advanced indices give their dim in front
            return self._back(writer, found, True) if self.keeps else found
        # views of the same place stay views of the same memory
        made = writer.rewriter.places
        if (packed, self.number) not in made:
            row = writer.rewriter.row_of(writer, self.rows, self.number)
            made[packed, self.number] = writer.call(torch.index_select, (self._leading(writer, packed), 0, row))
        return self._back(writer, made[packed, self.number], self.keeps)


@dataclass(frozen=True, eq=False)
class Summed(Exit):
    """The sum over the places of each sequence, of a tensor that is 0 in those of padding.

    keeps: whether the dim of the places is kept, as 1; mean: divided by how many places there are
    """

    keeps: bool = False
    mean: bool = False

    def write(self, writer: PackedWriter, packed: fx.Node) -> fx.Node:
        own, wanted = self._leading(writer, packed), dtype_of(self.node)
        # added up as a sum is, and rounded once
        compute = torch.promote_types(wanted, torch.float32) if wanted.is_floating_point else wanted
        if dtype_of(self.source) != compute:
            own = writer.method("to", own, compute)
        found = self._summed(writer, own, self._shape(writer))
        if self.mean:
            found = writer.call(torch.div, (found, writer.size(self.rows.place.size)))
        if compute != wanted:
            found = writer.method("to", found, wanted)
        return self._back(writer, found, self.keeps)


@dataclass(frozen=True, eq=False)
class Contracted(Exit):
    """A product that sums over places, of which one factor is 0 in padding.

    factors: the two tensors, with the letters of their dims as einsum has them; result: its letters; batch and along are those of
    sequences and places.
    """

    factors: tuple[tuple[fx.Node, str], ...] = ()
    result: str = ""
    batch: str = ""
    along: str = ""

    def write(self, writer: PackedWriter, packed: fx.Node) -> fx.Node:
        wanted = dtype_of(self.node)
        # a product adds up in float32 and rounds once
        compute = torch.promote_types(wanted, torch.float32)
        rows, letters = [], []
        for node, own in self.factors:
            x = writer.rewriter.made[node]
            rest = [d for d, letter in enumerate(own) if letter not in (self.batch, self.along)]
            x = writer.method("permute", x, own.index(self.batch), own.index(self.along), *rest)
            x = writer.method("squeeze", x, 0)
            rows.append(x if dtype_of(node) == compute else writer.method("to", x, compute))
            letters.append(self.along + "".join(own[d] for d in rest))
        of_each = self.result.replace(self.batch, "")
        terms = writer.call(torch.einsum, (f"{','.join(letters)}->{self.along}{of_each}", *rows))
        sizes = {letter: n for node, own in self.factors for letter, n in zip(own, shape_of(node))}
        found = self._summed(writer, terms, [writer.size(sizes[letter]) for letter in (self.batch, *of_each)])
        found = writer.method("movedim", found, 0, self.result.index(self.batch))
        return found if wanted == compute else writer.method("to", found, wanted)


@dataclass(frozen=True, eq=False)
class Greatest(Exit):
    """The greatest over the places of each sequence, of a tensor that is `fill` in those of padding."""

    keeps: bool = False
    fill: float = 0.0

    def write(self, writer: PackedWriter, packed: fx.Node) -> fx.Node:
        own = self._leading(writer, packed)
        shape = self._shape(writer)
        # what padding holds counts where there is padding
        padded = writer.rewriter.table(writer, self.rows, "padded")
        padded = writer.method("view", padded, -1, *[1] * len(self.rest))
        fill, none = (writer.method("new_full", own, shape, x) for x in (self.fill, -float("inf")))
        start = writer.call(torch.where, (padded, fill, none))
        index = writer.rewriter.table(writer, self.rows, "sequence")
        index = writer.method("view", index, -1, *[1] * len(self.rest))
        index = writer.method("expand_as", index, own)
        return self._back(writer, writer.call(torch.scatter_reduce, (start, 0, index, own, "amax")), self.keeps)
