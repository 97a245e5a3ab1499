"""The option `sequence_parallel`: over which ranks the tokens of a model are dealt, and how."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from attnfuse import _compat
from attnfuse.distributed import layouts
from attnfuse.distributed.layouts import LAYOUTS, Layout
from attnfuse.distributed.transport import numbered

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

LayoutChoice = Literal["auto", "contiguous", "zigzag", "striped"]
AlgorithmChoice = Literal["auto", "gather", "ring", "burst", "ulysses", "ulysses_ring"]
Outputs = Literal["whole", "own"]
Gradients = Literal["whole", "mean"]


@dataclass(frozen=True)
class SequenceParallel:
    """Each rank computes its own tokens of every sequence; the whole batch goes in on every rank.

    mesh        a DeviceMesh of one dim, or of two (nodes, ranks of a node) for a double ring; a process group, or its name
    layout      which tokens a rank has: 'contiguous', 'zigzag' or 'striped'; 'auto' by what the masks leave to each rank
    algorithm   how an attention sees all keys: 'gather', 'ring', 'burst' (a ring, and BurstAttention's backward), 'ulysses' or
                'ulysses_ring'; 'auto' by bytes
    heads       ranks that share out the heads of an attention (Ulysses); 1 for none
    outputs     'whole': results of the compiled function are one device's; 'own': of those with a token dim each rank has its rows
    gradients   'whole': those of parameters are one device's; 'mean': they are each rank's part times the number of ranks, for a
                DDP or FSDP that averages over the same ranks

    Raises ValueError for a choice there is not, and for a mesh of more dims.
    """

    mesh: DeviceMesh | ProcessGroup | str
    layout: LayoutChoice = "auto"
    algorithm: AlgorithmChoice = "auto"
    heads: int = 1
    outputs: Outputs = "whole"
    gradients: Gradients = "whole"

    def __post_init__(self) -> None:
        choices: dict[str, tuple[Any, ...]] = {
            "layout": ("auto", *LAYOUTS),
            "algorithm": get_args(AlgorithmChoice),
            "outputs": get_args(Outputs),
            "gradients": get_args(Gradients),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {', '.join(map(repr, known))}; got {getattr(self, name)!r}")
        if isinstance(self.heads, bool) or not isinstance(self.heads, int) or self.heads < 1:
            raise ValueError(f"heads is a number of ranks, 1 or more; got {self.heads!r}")


@dataclass(frozen=True)
class Dealt:
    """What the option comes to: names and numbers, equal on all ranks.

    groups   names of process groups: (of all ranks,), or (between nodes, in a node)
    sizes    their sizes
    """

    groups: tuple[str, ...]
    sizes: tuple[int, ...]
    layout: LayoutChoice = "auto"
    algorithm: AlgorithmChoice = "auto"
    heads: int = 1
    outputs: Outputs = "whole"
    gradients: Gradients = "whole"

    @property
    def ranks(self) -> int:
        return math.prod(self.sizes)


def dealt(given: Any) -> Dealt:
    """What a value of the option means. Raises ValueError, with what to do, for one that means nothing here."""
    chosen = given if isinstance(given, SequenceParallel) else SequenceParallel(given)
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        raise ValueError("sequence_parallel needs process groups: call torch.distributed.init_process_group() first")
    groups = _groups(chosen.mesh)
    if chosen.algorithm == "ulysses_ring" and len(groups) != 2:
        raise ValueError("algorithm 'ulysses_ring' needs a mesh of two dims: (ring, ulysses)")
    names = tuple(str(group.group_name) for group in groups)
    sizes = tuple(int(group.size()) for group in groups)
    if chosen.heads > 1 and chosen.heads != sizes[-1]:
        raise ValueError(
            f"heads are shared out in the last dim of the mesh: heads={sizes[-1]}; got {chosen.heads}. A mesh of two dims "
            "(ring, heads) shares out heads among some ranks"
        )
    return Dealt(names, sizes, chosen.layout, chosen.algorithm, chosen.heads, chosen.outputs, chosen.gradients)


def _groups(mesh: Any) -> list[Any]:
    if isinstance(mesh, str):
        return [_compat.process_group(mesh)]
    if isinstance(mesh, torch.distributed.ProcessGroup):
        return [mesh]
    if hasattr(mesh, "get_all_groups") and hasattr(mesh, "ndim"):
        if mesh.ndim not in (1, 2):
            dims = f"{mesh.ndim} dims {tuple(mesh.mesh_dim_names or ())}"
            raise ValueError(f"sequence_parallel takes a mesh of one or two dims; got {dims}: pick some, as mesh['sp']")
        found = list(mesh.get_all_groups())
        if any(group.rank() < 0 for group in found):
            raise ValueError("this rank is not in the mesh")
        return found
    raise ValueError(f"sequence_parallel takes a DeviceMesh, a process group or its name; got {type(mesh).__name__}")


def own_tokens(mesh: Any, length: int, layout: Layout) -> torch.Tensor:
    """int64 [n]: which tokens of a sequence of `length` the rows of this rank are, in the order that `outputs="own"` gives them.

    mesh: as of the option; layout: one that the option was given by name. Numbers from `length` on are rows of padding, which
    repeat others and have no gradient. Raises ValueError as the option does, and for what is no layout.
    """
    rank, ranks = numbered(dealt(mesh).groups)
    return layouts.tokens(layout, rank, ranks, layouts.rows_of_rank(layout, ranks, length))
