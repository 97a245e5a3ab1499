"""What the kernels on GPUs know of one call, before any tile is chosen: its sizes, and where the rows of batch elements are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from attnfuse.expr import Algebra
from attnfuse.kernels import dropout
from attnfuse.kernels.device import Device
from attnfuse.kernels.inputs import Bounds, Inputs
from attnfuse.kernels.layout import spread
from attnfuse.kernels.program.traits import indices
from attnfuse.spec import Attention

#: No dim may be longer: key and query indices are 32-bit numbers in the kernels.
LONGEST = 2**29
#: Taken for the number of processors of a device that does not tell.
_PROCESSORS = 8


@dataclass
class Sizes:
    """The tensors and the sizes of one call, of which there is a query and a key. Raises ValueError for dims that are too long,
    without a seed for dropout, and where an operand has no elements, of which something would be read.

    device: whose configurations are taken.
    """

    spec: Attention
    inputs: Inputs
    device: Device

    def __post_init__(self) -> None:
        self.q, self.k, self.v, operands, self.seed, bounds, self.pages, _ = self.inputs
        # bools as bytes, which every backend loads alike
        self.operands = [self.computed(_bytes, o) if o.dtype == torch.bool else o for o in operands]
        # the kernels step over whole rows of bounds
        self.bounds = Bounds(*(None if b is None else self.computed(torch.Tensor.contiguous, b) for b in bounds))
        self.batch = spread(self.spec, self.inputs)
        self.elements = math.prod(self.batch)
        self.packed_q, self.packed_k = self.spec.packed_queries, self.spec.packed_keys
        self.sequences = self.batch[0] if self.packed_q or self.packed_k else 1
        #: batch elements of one sequence
        self.heads = self.elements // self.sequences
        self.Q, self.K, self.D, self.E = self.q.shape[-2], self.inputs.keys, self.q.shape[-1], self.v.shape[-1]
        if max(self.Q, self.K, self.elements, *(n for o in self.operands for n in o.shape)) > LONGEST:
            raise ValueError(f"no dim may be longer than {LONGEST}")
        if self.spec.dropout and self.seed is None:
            raise ValueError("a spec with dropout needs a seed")
        self.numbers = dropout.numbers_of(self.spec, self.inputs)
        if any(o.numel() == 0 for o in self.operands):
            raise ValueError("an operand has no elements")

    def computed(self, make: Callable[..., torch.Tensor], *given: torch.Tensor, **how: Any) -> torch.Tensor:
        """make(*given, **how)."""
        return make(*given, **how)

    def allocated(self, x: torch.Tensor) -> torch.Tensor:
        """x, which is new and has no contents yet."""
        return x

    def refuse(self) -> None:
        """Nothing of this call holds for others like it."""

    def scratch(self, *shape: int, dtype: torch.dtype = torch.float32, zero: bool = False) -> torch.Tensor:
        """A new tensor, of zeros or without contents."""
        if zero:
            return self.computed(torch.zeros, size=shape, dtype=dtype, device=self.q.device)
        return self.allocated(torch.empty(shape, dtype=dtype, device=self.q.device))

    def is_inside(self) -> bool:
        """Whether what is read at indices of its own exists for all queries and keys that there are, as their numbers tell."""
        algebra = Algebra(self.Q, self.K)
        for operand, d, own in indices(self.spec):
            low, high = algebra.bounds(own)
            if low < 0 or high >= self.operands[operand].shape[d - 2]:
                return False
        return True

    @property
    def waves(self) -> int:
        """How many programs keep the device busy."""
        return 2 * (self.device.processors or _PROCESSORS)

    def group(self) -> int:
        """How many batch elements next to each other have the same keys, values and masks."""
        masks = [self.operands[load.operand] for load in self.spec.loads]
        group = 1
        for d in reversed(range(1 if self.packed_k else 0, len(self.batch))):
            if any(shape[d] != 1 for shape in (*self.inputs.shapes[1:3], *(x.shape for x in masks))):
                break
            group *= self.batch[d]
        return group

    def strides(self, x: torch.Tensor) -> tuple[int, ...]:
        """Of the batch dims, 0 where x is broadcast."""
        return tuple(0 if n == 1 else s for n, s in zip(x.shape[: len(self.batch)], x.stride()))

    @property
    def lines(self) -> int:
        """Rows of the result, over all batch elements."""
        return self.Q * (self.heads if self.packed_q else self.elements)

    def query_tiles(self, size: int) -> int:
        """How many tiles of queries one element has, or at most all sequences together where they are packed."""
        return self.Q // size + self.sequences if self.packed_q else -(-self.Q // size)

    def query_programs(self, size: int) -> int:
        return self.query_tiles(size) * (self.heads if self.packed_q else self.elements)

    def deal(self, bounds: torch.Tensor | None, rows: int, size: int) -> torch.Tensor:
        """Tiles of `size` rows of packed sequences, int32 [2, sequences]: how many the longest sequences have up to each, and which
        these are, so that no long one is left for the end. Nothing is read by the host."""
        if bounds is None:
            return self.q
        return self.computed(_dealt, bounds, rows=rows, size=size)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8)


def _dealt(bounds: torch.Tensor, rows: int, size: int) -> torch.Tensor:
    ends = bounds.clamp(0, rows)
    tiles, order = (
        ((ends[1] - ends[0]).clamp(min=0) + (size - 1)).div(size, rounding_mode="floor").sort(descending=True)
    )
    return torch.stack([tiles.cumsum(0), order]).to(torch.int32)
