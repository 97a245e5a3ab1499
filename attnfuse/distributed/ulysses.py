"""Heads instead of tokens: all-to-all gives a rank all rows of some heads, and another one takes the results back.

Jacobs et al. 2023 (arXiv:2309.14509). With one group every rank sees all tokens of its heads, in their order, so that the kernel's
call is that of one device with fewer heads: right for every spec and every kernel. With two, (outer, inner), heads are shared out
in the inner group, and the rows that its ranks hold together go around a ring of the outer one; backward is that of Burst where
it sends less.

Backward exchanges q, k and v again: what is saved are the rank's own rows, as with other algorithms.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attnfuse.distributed import layouts, local
from attnfuse.distributed.heads import parts_for
from attnfuse.distributed.merging import is_one_number
from attnfuse.distributed.ring import BURST, RING
from attnfuse.distributed.steps import Call, held_by_groups, padded
from attnfuse.distributed.traffic import Sizes, circuit, key_row, query_row
from attnfuse.distributed.transport import Hops
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.layout import batch_shape, precision


def forward(
    call: Call, hops: Hops, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [*batch, n, E] and stats [2, *batch, n] of this rank's q, k and v."""
    heads = _Heads(call, hops, q, k, v)
    q, k, v = heads.there([(q, 0), (k, 1), (v, 1)])
    if heads.ring is None:
        out, stats = heads.run("forward", heads.spec, Inputs(q, k, v, heads.operands))
    else:
        out, stats = RING.forward(heads.ring, heads.outer, q, k, v)
    # padding has a log-sum-exp of 0
    stats = local.padded_statistics(stats, heads.sides[0].rows)
    out, stats = heads.back([(out, 0, heads.batch), (stats.movedim(0, -1), 0, heads.batch)])
    return local.laid_out(call.spec, out), stats.movedim(-1, 0).contiguous()


def backward(
    call: Call,
    hops: Hops,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    stats: torch.Tensor,
    needs: Sequence[bool],
) -> list[torch.Tensor | None]:
    """Gradients of this rank's q, k and v, and its part of those of the operands; None without a need."""
    heads = _Heads(call, hops, q, k, v)
    rows = [(q, 0), (k, 1), (v, 1), (dout, 0), (out, 0), (stats.movedim(0, -1), 0)]
    if dlse is not None:
        rows.append((dlse.to(stats.dtype).expand(stats.shape[1:])[..., None], 0))
    q_, k_, v_, dout, out, stats, *more = heads.there(rows)
    stats, dlse = stats.movedim(-1, 0).contiguous(), more[0][..., 0] if more else None
    dq, dk, dv, *others = heads.gradients(q_, k_, v_, dout, dlse, out, stats, needs)
    made = []
    for grad, side, x in ((dq, 0, q), (dk, 1, k), (dv, 1, v)):
        if grad is not None:
            # sums of what several ranks make of one head are sent as they are, all else as it will be in the end
            made.append((grad if heads.parts.copies(x) > 1 else grad.to(x.dtype), side, x.shape[:-2]))
    sent = iter(heads.back(made))
    own = [None if grad is None else next(sent) for grad in (dq, dk, dv)]
    return [*own, *(None if g is None else heads.in_whole(g, x) for g, x in zip(others, call.operands, strict=True))]


def _burst_sends_less(call: Call, q: torch.Tensor, k: torch.Tensor, dout: torch.Tensor) -> bool:
    """Than a ring of keys and values, in backward: by the bytes of the rank that sends most, as plans have it."""
    heads = math.prod(q.shape[:-2]), math.prod(k.shape[:-2])
    sizes = Sizes(
        1, heads[0], call.queries, call.keys, q.shape[-1], dout.shape[-1], q.itemsize, True, heads[1], dout.itemsize
    )
    empty = call.empty(backward=True)
    keys = circuit(lambda of, at: not empty[at][of], call.columns, 1, call.ranks)
    queries = circuit(lambda of, at: not empty[of][at], call.rows, 1, call.ranks)
    by_queries = max(moves.sent(*query_row(sizes, not is_one_number(call.spec))).total for moves in queries.moves)
    return by_queries < max(moves.sent(*key_row(sizes)).total for moves in keys.moves)


@dataclass(frozen=True)
class _Side:
    """Rows of one side that the ranks of a group hold together: `rows` of them, of which `real` are no padding. order: where they
    are in the order of tokens; place: where each held row is in that order; None where it is that order already."""

    rows: int
    real: int
    order: torch.Tensor | None
    place: torch.Tensor | None

    def in_order(self, x: torch.Tensor) -> torch.Tensor:
        """[..., real, D] in the order of tokens, of the ranks' rows one after the other."""
        return x[..., : self.real, :] if self.order is None else x.index_select(-2, self.order)

    def as_held(self, x: torch.Tensor) -> torch.Tensor:
        """The other way round, padding 0 where there is none yet."""
        x = padded(x, -2, self.rows)
        return x if self.place is None else x.index_select(-2, self.place)


@functools.lru_cache(maxsize=32)
def _side(layout: str, group: range, ranks: int, n: int, length: int, device: torch.device) -> _Side:
    """Of a group of ranks, of which each holds n rows of a dim of `length` tokens."""
    held = torch.cat([layouts.tokens(layout, rank, ranks, n) for rank in group])
    order, real = held.argsort(), int((held < length).sum())
    if torch.equal(order, torch.arange(len(order))):
        return _Side(len(held), real, None, None)
    return _Side(len(held), real, order[:real].to(device), order.argsort().to(device))


class _Heads:
    """One attention of which each rank of the inner group takes a part of the heads."""

    def __init__(self, call: Call, hops: Hops, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self.parts = parts_for(call.spec, hops.local)
        self.spec, self.hops = self.parts.spec(call.spec), hops
        self.run, self.partial = call.run, call.partial
        self.shared = any(self.parts.copies(x) > 1 for x in (q, k, v))
        self.batch = batch_shape([x.shape for x in (q, k, v, *call.operands)])
        self.operands = [x[self.parts.index(hops.place, x)] for x in call.operands]
        lengths = (q.shape[-2], call.queries), (k.shape[-2], call.keys)
        group = range(hops.node * hops.local, (hops.node + 1) * hops.local)
        self.sides = [_side(call.layout, group, call.ranks, n, length, q.device) for n, length in lengths]
        self.ring: Call | None = None
        if hops.nodes > 1:
            self.outer = hops.of_outer()
            self.ring = self._around(call)

    def _around(self, call: Call) -> Call:
        """The attention of this part of the heads over the ranks of the outer group."""
        if call.layout == "striped":
            raise ValueError(
                "attnfuse: ranks that share out heads hold no stripe together; take another layout than striped"
            )
        held = self.sides[0].rows, self.sides[1].rows
        spec = held_by_groups(call.spec, call.layout, call.ranks, self.hops.local)
        place, lengths = (self.hops.node, self.hops.nodes), (call.queries, call.keys)
        return Call(spec, call.layout, place, lengths, self.operands, call.run, call.partial, held)

    def gradients(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        dout: torch.Tensor,
        dlse: torch.Tensor | None,
        out: torch.Tensor,
        stats: torch.Tensor,
        needs: Sequence[bool],
    ) -> list[torch.Tensor | None]:
        """Of this part, those of q, k, v and the operands; None without a need."""
        if self.ring is not None:
            around = BURST if _burst_sends_less(self.ring, q, k, dout) else RING
            return around.backward(self.ring, self.outer, dout, dlse, q, k, v, out, stats, needs)
        inputs = Inputs(q, k, v, self.operands)
        found: list[torch.Tensor | None]
        if self.shared and self.partial and q.dtype.itemsize < 4:
            # in float32, since they are added up
            compute = precision(self.spec)
            delta = (dout.to(compute) * out.to(compute)).sum(-1)
            delta = delta if dlse is None else delta - dlse
            found = self.run("backward_part", self.spec, inputs, dout, delta, stats, needs)
        else:
            found = self.run("backward", self.spec, inputs, dout, out, stats, needs, dlse)
        return found

    def there(self, tensors: Sequence[tuple[torch.Tensor, int]]) -> list[torch.Tensor]:
        """[*part of batch, rows, D] of each (tensor [*batch, n, D], side): the rows of all ranks, in the order of tokens."""
        sent = [[x[self.parts.index(part, x)] for part in range(self.parts.count)] for x, _ in tensors]
        return [self.sides[side].in_order(torch.cat(got, -2)) for got, (_, side) in zip(self._swap(sent), tensors)]

    def back(self, tensors: Sequence[tuple[torch.Tensor, int, Sequence[int]]]) -> list[torch.Tensor]:
        """[*batch, n, D] of each (tensor [*part of batch, rows, D], side, batch): this rank's rows of all heads. What several
        ranks have made of one head is added up, in float32 at least."""
        held = [self.sides[side].as_held(x) for x, side, _ in tensors]
        got = self._swap([list(x.chunk(self.parts.count, -2)) for x in held])
        return [self._whole(pieces, batch) for pieces, (_, _, batch) in zip(got, tensors)]

    def _whole(self, pieces: Sequence[torch.Tensor], batch: Sequence[int]) -> torch.Tensor:
        shape = (*batch, *pieces[0].shape[-2:])
        found = pieces[0].new_empty(shape)
        if self.parts.copies(found) == 1:
            for part, piece in enumerate(pieces):
                found[self.parts.index(part, found)] = piece
            return found
        wide = torch.zeros(shape, dtype=torch.promote_types(found.dtype, torch.float32), device=found.device)
        for part, piece in enumerate(pieces):
            wide[self.parts.index(part, wide)] += piece
        return wide

    def in_whole(self, grad: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
        """The gradient of this rank's part of an operand among those of the whole one, which are 0."""
        found = grad.new_zeros(operand.shape)
        found[self.parts.index(self.hops.place, found)] = grad
        return found

    def _swap(self, sent: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
        """For each of several tensors what each rank sent to this one. sent: what each is to get, all of one shape. Tensors of
        one dtype travel together."""
        found: list[list[torch.Tensor]] = [[] for _ in sent]
        for dtype in dict.fromkeys(pieces[0].dtype for pieces in sent):
            those = [i for i, pieces in enumerate(sent) if pieces[0].dtype == dtype]
            flat = [sent[i][part].reshape(-1) for part in range(self.parts.count) for i in those]
            got = self.hops.all_to_all(torch.cat(flat).view(self.parts.count, -1))
            sizes = [sent[i][0].numel() for i in those]
            for i, column in zip(those, got.split(sizes, 1)):
                found[i] = [row.view(sent[i][0].shape) for row in column]
        return found
