"""What a kernel computes an attention of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Bounds(NamedTuple):
    """Where the rows of each sequence are in packed queries, and in packed keys and values; None for a side that is dense.

    int32 or int64 [2, sequences]: the first row, and the one after the last. Any numbers are safe: what lies outside of the
    tensor is cut off.
    """

    q: torch.Tensor | None = None
    k: torch.Tensor | None = None

    def clipped(self, rows: tuple[int, int]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Bounds that ascend from the first to the second number of a sequence and stay within (q, k) of so many rows."""
        found = []
        for bounds, total in zip(self, rows):
            if bounds is not None:
                start = bounds[0].clamp(0, total)
                bounds = torch.stack([start, torch.maximum(start, bounds[1].clamp(max=total))])
            found.append(bounds)
        return found[0], found[1]

    @property
    def sequences(self) -> int:
        """How many there are. Raises ValueError where neither side is packed."""
        for bounds in self:
            if bounds is not None:
                return bounds.shape[-1]
        raise ValueError("a dense layout has no sequences")


DENSE = Bounds()


class Pages(NamedTuple):
    """Where the keys of a paged layout are.

    table   int32 or int64 [*batch, T], of numbers of blocks
    keys    how many of the T * block that the table names are keys: the first ones
    """

    table: torch.Tensor
    keys: int


class Inputs(NamedTuple):
    """The tensors of one attention, beside the spec that says what is computed of them. Any strides; of one device.

    q         [*batch, Q, D] of spec.qk_dtype
    k         [*batch, K, D] of spec.qk_dtype
    v         [*batch, K, E] of spec.v_dtype
    operands  those that the spec's steps name, in their order and with the dtypes of spec.operands: [*batch, Q, K], but tables,
              which are read at computed indices, with any last two dims
    seed      of dropout, int64 of one element; None without
    bounds    of the sequences, in a packed layout
    pages     the block table of a paged layout, in which k is [*batch, blocks, block, D] and v [*batch, blocks, block, E]
    numbers   what dropout takes queries and keys for that are some of a longer attention's, of a dense layout: int64 [2, 5], of
              queries and of keys (base, stride, half, jump, total). Number i is base + stride * i, and jump more from i = half on;
              total is how many there are of all. None: they are counted from 0 on. Unused without dropout.

    Each batch dim is 1 or full. Packed rows of all sequences lie one after the other, in a tensor whose first dim is 1.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    operands: Sequence[torch.Tensor] = ()
    seed: torch.Tensor | None = None
    bounds: Bounds = DENSE
    pages: Pages | None = None
    numbers: torch.Tensor | None = None

    @property
    def keys(self) -> int:
        """The number of keys; of all sequences, where they are packed."""
        return self.k.shape[-2] if self.pages is None else self.pages.keys

    @property
    def shapes(self) -> tuple[Sequence[int], ...]:
        """The shapes of `tensors`, those of k and v as if they were gathered from their blocks."""
        found: list[Sequence[int]] = [x.shape for x in self.tensors]
        if self.pages is not None:
            lead, keys = self.pages.table.shape[:-1], self.pages.keys
            for at, cache in enumerate((self.k, self.v), 1):
                found[at] = (*map(wider, cache.shape[:-3], lead), keys, cache.shape[-1])
        return tuple(found)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """(q, k, v, *operands): what there may be gradients of, in their order."""
        return (self.q, self.k, self.v, *self.operands)

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> Inputs:
        """The same with other (q, k, v, *operands)."""
        q, k, v, *operands = tensors
        return self._replace(q=q, k=k, v=v, operands=operands)


def wider(*sizes: int) -> int:
    """The size that these broadcast to. Puts no guard on symbolic ones: one is taken for the full size where no number is."""
    symbolic: int | None = None
    for size in sizes:
        if not isinstance(size, int):
            symbolic = size if symbolic is None else symbolic
        elif size != 1:
            return size
    return 1 if symbolic is None else symbolic
