"""Tensors under torch.vmap, as plain tensors with the mapped dims in front.

Dynamo's graph has the ops inside of a vmap between nodes that add and remove a batch dim. Pointwise ops and indexing mean
the same on tensors whose mapped dims stand in front, lined up: this runs them so, so that the view shows plain ATen. Any
other op is `NotBatchable`; its result stays unknown.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attnfuse import _compat
from attnfuse._compat import OpOverload, pytree
from attnfuse.passes.graph.vocabulary import is_elementwise, kind


class NotBatchable(Exception):
    """The op is not one that is understood inside of a vmap."""


@dataclass(frozen=True, eq=False)
class Batched:
    """tensor: [*levels, *logical dims]. levels: the nesting levels of the vmaps it is mapped over, ascending."""

    tensor: torch.Tensor
    levels: tuple[int, ...]

    @property
    def rank(self) -> int:
        """The number of dims that code inside of the vmap sees."""
        return self.tensor.dim() - len(self.levels)


_NEW = {"new_ones", "new_zeros", "new_full"}
_INDEXING = (operator.getitem, torch.ops.aten.index, torch.ops.aten.index.Tensor)


def run(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run a Dynamo node's call that takes part in a vmap. target: a function, or the name of a method.

    Raises NotBatchable, or whatever the op itself raises.
    """
    if target in _compat.ADD_BATCH_DIM:
        return _added(*args)
    if target in _compat.REMOVE_BATCH_DIM:
        return _removed(*args)
    if target in _INDEXING:
        return _indexed(*args)
    return _pointwise(target, args, kwargs)


def takes_part(target: Any, leaves: Sequence[Any]) -> bool:
    """Whether a call with these arguments is one for `run`."""
    return target in _compat.ADD_BATCH_DIM or any(isinstance(x, Batched) for x in leaves)


def _added(x: Any, dim: int, level: int) -> Batched:
    have = x if isinstance(x, Batched) else Batched(x, ())
    if not isinstance(have.tensor, torch.Tensor) or any(n >= level for n in have.levels):
        raise NotBatchable
    lead = len(have.levels)
    return Batched(have.tensor.movedim(lead + dim % have.rank, lead), (*have.levels, level))


def _removed(x: Any, level: int, size: int, dim: int) -> Any:
    have = x if isinstance(x, Batched) else Batched(x, ())
    levels = tuple(n for n in have.levels if n != level)
    to = len(levels) + dim % (have.rank + 1)
    if level in have.levels:
        moved = have.tensor.movedim(have.levels.index(level), to)
    else:
        shape = list(have.tensor.shape)
        moved = have.tensor.unsqueeze(to).expand(*shape[:to], size, *shape[to:])
    # a node of its own for the value that leaves the vmap
    return Batched(moved, levels) if levels else torch.ops.aten.alias(moved)


def _aligned(values: Sequence[Any], rank: int) -> tuple[list[torch.Tensor], tuple[int, ...]]:
    """The tensors so that they broadcast: the union of their levels, then `rank` dims."""
    levels = tuple(sorted({n for x in values if isinstance(x, Batched) for n in x.levels}))
    out: list[torch.Tensor] = []
    for x in values:
        if isinstance(x, Batched):
            own = dict(zip(x.levels, x.tensor.shape))
            inner = x.tensor.shape[len(x.levels) :]
            shape = [*(own.get(n, 1) for n in levels), *(1 for _ in range(rank - x.rank)), *inner]
            out.append(x.tensor.reshape(shape) if len(shape) != x.tensor.dim() else x.tensor)
        else:
            out.append(x)
    return out, levels


def _rank(x: Any) -> int:
    return x.rank if isinstance(x, Batched) else x.dim()


def _pointwise(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    leaves, tree = pytree.tree_flatten((tuple(args), kwargs))
    tensors = [x for x in leaves if isinstance(x, (Batched, torch.Tensor))]
    aligned, levels = _aligned(tensors, max(map(_rank, tensors)))
    rest = iter(aligned)
    given = [next(rest) if isinstance(x, (Batched, torch.Tensor)) else x for x in leaves]
    args, kwargs = pytree.tree_unflatten(given, tree)
    function: Callable[..., Any] = getattr(args[0], target) if isinstance(target, str) else target
    before = len(_compat.traced_graph().nodes)
    result = function(*args[1:], **kwargs) if isinstance(target, str) else function(*args, **kwargs)
    made = list(_compat.traced_graph().nodes)[before:]
    if not isinstance(result, torch.Tensor) or len(made) > 1:
        raise NotBatchable
    if not made:
        if not any(result is x for x in aligned):
            raise NotBatchable
        return Batched(result, levels)
    op = made[0].target
    if not isinstance(op, OpOverload):
        raise NotBatchable
    if kind(op) in _NEW:
        return result
    if not is_elementwise(op):
        raise NotBatchable
    return Batched(result, levels)


def _indexed(base: Any, index: Any) -> Batched:
    """base[i, j, ...] for tensors of integers without dims of their own."""
    index = tuple(index) if isinstance(index, (tuple, list)) else (index,)
    if not index or not all(isinstance(x, (Batched, torch.Tensor)) and _rank(x) == 0 for x in index):
        raise NotBatchable
    if any((x.tensor if isinstance(x, Batched) else x).dtype == torch.bool for x in index):
        raise NotBatchable
    own = base if isinstance(base, Batched) else Batched(base, ())
    places = [
        Batched(torch.arange(n, device=own.tensor.device), (level,)) for n, level in zip(own.tensor.shape, own.levels)
    ]
    aligned, levels = _aligned([*places, *index], 0)
    return Batched(own.tensor[tuple(aligned)], levels)
