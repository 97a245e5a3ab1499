"""What hides keys and what is added to scores, as tensors that the operators take."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attnfuse import expr
from attnfuse._compat import FakeTensor
from attnfuse.kernels.ascend.plan import Lengths
from attnfuse.kernels.ascend.reading import Reading
from attnfuse.kernels.library.heads import grouped
from attnfuse.spec import Attention, Bias

#: The side of the mask that serves all lengths.
_SIDE = 2048
#: Terms of less than this, and below 0, leave scores their digits in whatever order they are added.
_LARGE = 2.0**10
#: Masks that were made, by device and whether with a prefix. Fake ones are not kept: they hold nothing.
_masks: dict[tuple[torch.device, bool], torch.Tensor] = {}


def triangle(device: torch.device, prefix: bool = False) -> torch.Tensor:
    """The mask of the modes, one for each device; prefix: that of mode 6."""
    found = _masks.get((device, prefix))
    if found is None:
        if prefix:
            lower = torch.ones(_SIDE // 2, _SIDE, dtype=torch.bool, device=device)
            lower[:, : _SIDE // 2] = False
            found = torch.cat([triangle(device), lower])
        else:
            found = torch.ones(_SIDE, _SIDE, dtype=torch.bool, device=device).triu(1)
        if not isinstance(found, FakeTensor):
            _masks[device, prefix] = found
    return found


@dataclass(frozen=True)
class Heads:
    """Which batch dims of a spec are the operators' batch, and which their heads: the last ones."""

    rank: int
    count: int

    @staticmethod
    def of(spec: Attention) -> Heads:
        rank = len(spec.batch)
        if grouped(spec):
            return Heads(rank, 2 if rank > 2 else 1)
        # a lone dim whose keys are shared is one of heads too
        return Heads(rank, 1 if rank > 1 or spec.broadcast[1] else 0)

    def merged(self, x: torch.Tensor, batch: Sequence[int] | None = None) -> torch.Tensor:
        """[B, N, ...] of x [*batch, ...], a view where there is one; of a group of dims that are all 1, it is 1.

        batch: the full sizes, where x may have some dims of a group and lack others.
        """
        split = self.rank - self.count
        shape = list(x.shape[: self.rank])
        if batch is not None:
            for group in (range(split), range(split, self.rank)):
                if any(shape[d] != 1 for d in group):
                    for d in group:
                        shape[d] = batch[d]
            x = x.expand(*shape, *x.shape[self.rank :])
        sizes = math.prod(shape[:split]), math.prod(shape[split:])
        return x.reshape(*sizes, *x.shape[self.rank :])

    def split(self, x: torch.Tensor, batch: Sequence[int]) -> torch.Tensor:
        """The reverse of `merged`: [*batch, ...], with 1 for all dims of a group that is 1."""
        at = self.rank - self.count
        groups = [(1,) * len(own) if n == 1 else own for n, own in zip(x.shape, (tuple(batch[:at]), tuple(batch[at:])))]
        return x.reshape(*groups[0], *groups[1], *x.shape[2:])

    def sizes(self, batch: Sequence[int]) -> tuple[int, int]:
        """B and N."""
        at = self.rank - self.count
        return math.prod(batch[:at]), math.prod(batch[at:])

    def aligned(self, x: torch.Tensor) -> torch.Tensor:
        """x with leading dims of 1, for as many as [*batch, Q, K] has."""
        return x.reshape((1,) * (self.rank + 2 - x.dim()) + tuple(x.shape))


@dataclass
class Scores:
    """Of one dense call. like: a tensor of q's dtype and device."""

    reading: Reading
    operands: Sequence[torch.Tensor]
    heads: Heads
    batch: tuple[int, ...]
    lengths: Lengths
    like: torch.Tensor

    @functools.cached_property
    def _indices(self) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.like.device
        queries, keys = (torch.arange(n, device=device) for n in self.lengths)
        return queries[:, None], keys[None]

    @property
    def _real(self) -> bool:
        """Whether there are values to look at."""
        return not isinstance(self.like, FakeTensor)

    @functools.cached_property
    def hidden(self) -> torch.Tensor:
        """bool [B or 1, N or 1, Q, K]: which keys the masks hide. With heads of its own it has a batch."""
        keep = None
        for mask in self.reading.masks:
            found = expr.evaluate(mask, self.operands, *self._indices)
            keep = found if keep is None else keep & found
        assert keep is not None
        hidden = self.heads.aligned(keep.logical_not())
        hidden = self.heads.merged(hidden.expand(*hidden.shape[:-2], *self.lengths), self.batch)
        if hidden.shape[1] > 1:
            hidden = hidden.expand(self.heads.sizes(self.batch)[0], -1, -1, -1)
        return hidden

    def mask(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(the mask for the operator, rows without keys [B or 1, N or 1, Q, 1])."""
        hidden = self.hidden
        bare = hidden.all(-1, keepdim=True)
        if self.reading.finite:
            return (hidden & ~bare).contiguous(), bare
        first = torch.arange(hidden.shape[-1], device=hidden.device) == 0
        return (hidden & ~(bare & first)).contiguous(), bare

    def _sum(self) -> torch.Tensor:
        """float32 [B or 1, N, Q or 1, K] of what is added to scores."""
        total = None
        for step, factor in self.reading.terms:
            if isinstance(step, Bias):
                read_at = expr.Load(step.operand, "float32", step.row, step.col)
                found = expr.load(read_at, self.operands, *self._indices).float() * factor
                if step.keep is not None:
                    found = torch.where(expr.evaluate(step.keep, self.operands, *self._indices), found, 0.0)
            else:
                # float32 whatever torch.get_default_dtype() is, and within it
                most = torch.finfo(torch.float32).max
                value = min(max(step.value * factor, -most), most)
                filled = torch.full((), value, dtype=torch.float32, device=self.like.device)
                found = torch.where(expr.evaluate(step.keep, self.operands, *self._indices), 0.0, filled)
            if self.reading.apart and self._real and bool((found.amax() >= _LARGE).any()):
                raise ValueError("one of several added terms is so large that their order may matter")
            total = found if total is None else total + found
        assert total is not None
        total = self.heads.aligned(total)
        total = self.heads.merged(total.expand(*total.shape[:-1], self.lengths.keys), self.batch)
        B, N = self.heads.sizes(self.batch)
        # one for all queries is taken with a batch, one for the whole batch with all queries
        if total.shape[0] == 1 and total.shape[-2] == 1 and B > 1:
            return total.expand(B, N, 1, -1)
        return total.expand(-1, N, -1 if total.shape[-2] == 1 else self.lengths.queries, -1)

    def added(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(what is added to scores, with the least number in place of -inf; rows that it leaves no key, if it can hold -inf).

        Raises ValueError for values that are another thing in q's dtype, or in the order that the operator adds them in.
        """
        made = self._sum()
        hidden = self.hidden if self.reading.masks else None
        bare = None
        if any(isinstance(t.step, Bias) for t in self.reading.terms):
            gone = made == -math.inf
            bare = (gone if hidden is None else gone | hidden).all(-1, keepdim=True)
            if self.reading.finite and self._real and bool(bare.any()):
                raise ValueError("rows without a key but those that a number hides")
        if self._real:
            self._check(made if hidden is None else made.masked_fill(hidden, -math.inf))
        return made.clamp(min=torch.finfo(self.like.dtype).min).to(self.like.dtype).contiguous(), bare

    def _check(self, seen: torch.Tensor) -> None:
        """seen: the terms of keys that no mask hides, -inf for others."""
        dtype = self.like.dtype
        top, limits = seen.amax(-1, keepdim=True), torch.finfo(dtype)
        if self.reading.swallows < math.inf and bool(((top <= -self.reading.swallows) & (top > -math.inf)).any()):
            raise ValueError("a row's keys all have so much subtracted that their scores are gone in the graph's dtype")
        # keys of less than the least number weigh nothing, unless no other key has more
        less = (seen < top) & ~self.hidden if self.reading.masks else seen < top
        low = (top < limits.min / 2) & (top > -math.inf) & less.any(-1, keepdim=True)
        high = (seen > limits.max) & (seen < math.inf)
        if bool(low.any() | high.any()):
            raise ValueError(f"terms that differ beyond what {str(dtype).removeprefix('torch.')} holds")

    def may_overflow(self, q: torch.Tensor, k: torch.Tensor, added: torch.Tensor) -> bool:
        """Whether a score may be infinite where the graph holds it, by the lengths of q and k and the largest term."""
        if self.reading.overflow == math.inf or not self._real:
            return False
        most = q.float().norm(dim=-1).amax() * k.float().norm(dim=-1).amax()
        # an infinite term is infinite in the kernel too
        term = added.float().masked_fill(added.isinf(), 0.0).amax().clamp(min=0.0)
        return bool(most + term / self.reading.scale >= self.reading.overflow)

    def of_operand(self, step: Bias, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of a bias's operand, in its shape, from that of what it added, [*batch or 1, Q or 1, K]."""
        operand = self.operands[step.operand]
        q, k = self._indices
        if step.keep is not None:
            gradient = torch.where(expr.evaluate(step.keep, self.operands, q, k), gradient, 0.0)
        if step.row is None and step.col is None:
            return gradient.sum_to_size(operand.shape)
        # a table: each score's is added to that of the element which was read
        rows, columns = operand.shape[-2:]
        row = expr.evaluate(step.row, self.operands, q, k) if step.row is not None else q * int(rows > 1)
        col = expr.evaluate(step.col, self.operands, q, k) if step.col is not None else k * int(columns > 1)
        place = (row * columns + col).expand(*self.lengths).flatten()
        gradient = gradient.expand(*gradient.shape[:-2], *self.lengths)
        gradient = gradient.sum_to_size(*operand.shape[:-2], *self.lengths).flatten(-2)
        total = gradient.new_zeros(*operand.shape[:-2], rows * columns).index_add_(-1, place, gradient)
        return total.view(operand.shape)
