"""Packed rows for the operators: those of all sequences one after the other, without gaps, and their ends on the host.

Bounds are copied to the host in each call. Nothing of them is kept by the tensor: Inductor writes others to the same one, by code
that leaves its version as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attnfuse.kernels.ascend.plan import Lengths
from attnfuse.kernels.inputs import Inputs
from attnfuse.spec import Attention

#: More sequences than the operators take in one call.
_MOST = 1024


@dataclass(frozen=True)
class Side:
    """Rows of queries, or of keys and values. count: of all rows that there are. taken: int64, those of the call, in their order;
    None for all of them. ends: where each sequence ends among those taken."""

    count: int
    taken: torch.Tensor | None
    ends: tuple[int, ...]

    def gathered(self, x: torch.Tensor) -> torch.Tensor:
        """[N, rows taken, columns] of [N, count, columns]."""
        return x if self.taken is None else x.index_select(-2, self.taken)

    def spread(self, x: torch.Tensor, rest: float) -> torch.Tensor:
        """The reverse, with `rest` in rows that were not taken."""
        if self.taken is None:
            return x
        whole = x.new_full((*x.shape[:-2], self.count, x.shape[-1]), rest)
        return whole.index_copy(-2, self.taken, x)


def sides(spec: Attention, inputs: Inputs) -> tuple[Side, Side, list[Lengths]]:
    """(queries, keys, lengths of the sequences). Left out are sequences without queries or without keys.

    Raises ValueError for more sequences than the operators take.
    """
    count = inputs.bounds.sequences
    of_queries, of_keys = inputs.bounds
    on_host = None if of_queries is None else of_queries.tolist()
    of_both = (on_host, on_host if of_keys is of_queries else None if of_keys is None else of_keys.tolist())
    found = [_places(bounds, x.shape[-2], count) for bounds, x in zip(of_both, (inputs.q, inputs.k))]
    used = [pair for pair in zip(*found) if all(last > first for first, last in pair)]
    if len(used) > _MOST:
        raise ValueError(f"{len(used)} sequences (the operators take up to {_MOST})")
    rows = [x.shape[-2] * (count if bounds is None else 1) for bounds, x in zip(inputs.bounds, (inputs.q, inputs.k))]
    q, k = (_side([pair[at] for pair in used], rows[at], inputs.q.device) for at in range(2))
    return q, k, [Lengths(b - a, d - c) for (a, b), (c, d) in used]


def _side(places: Sequence[tuple[int, int]], count: int, device: torch.device) -> Side:
    ends = (*itertools.accumulate(last - first for first, last in places),)
    whole = [0, *ends] == [*(first for first, _ in places), count]
    if whole:
        return Side(count, None, ends)
    taken = [row for first, last in places for row in range(first, last)]
    return Side(count, torch.tensor(taken, dtype=torch.int64, device=device), ends)


def _places(bounds: list[list[int]] | None, rows: int, count: int) -> list[tuple[int, int]]:
    """Where the rows of each sequence are; of a dense side, the elements one after the other."""
    if bounds is None:
        return [(s * rows, (s + 1) * rows) for s in range(count)]
    clipped = [(min(max(a, 0), rows), min(b, rows)) for a, b in zip(*bounds)]
    return [(a, max(a, b)) for a, b in clipped]


def flat(x: torch.Tensor, dense: bool) -> torch.Tensor:
    """[N, rows, columns] of [1, *rest, rows, columns]; of a dense side [sequences, *rest, rows, columns], one after the other."""
    if dense:
        x = x.movedim(0, -3).flatten(-3, -2).unsqueeze(0)
    return x.flatten(0, -3) if x.dim() > 3 else x


def unflattened(x: torch.Tensor, shape: Sequence[int], dense: bool) -> torch.Tensor:
    """The reverse, for a tensor of that shape."""
    if not dense:
        return x.reshape(*shape)
    sequences, *rest, rows, columns = shape
    return x.reshape(*rest, sequences, rows, columns).movedim(-3, 0)
