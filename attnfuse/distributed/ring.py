"""Ring attention: what ranks hold goes around, one hop for each step, while a kernel computes the step before.

Forward and `backward_keys` send keys and values around (Liu et al. 2023, arXiv:2310.01889), and gradients of them after; backward
of Burst sends queries, output gradients and row statistics instead (Sun et al. 2024, arXiv:2403.09347). What goes around is a
bundle of one rank. In a double ring it visits the ranks of a node before it goes on to the next node.

The step that a rank computes of its own bundle stays there, so that gradients take no more hops than the bundles do: on from the
first rank that adds to them to the last one, and from there straight home. Sums over the ranks of a node are made in the node, and
only those go on to the next one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from attnfuse.distributed.local import laid_out, padded_statistics
from attnfuse.distributed.merging import Merged, as_one_number, for_parts, from_numbers, is_one_number
from attnfuse.distributed.steps import Call, padded
from attnfuse.distributed.traffic import goes_around, way_home
from attnfuse.distributed.transport import Hops, Pending, Ring, Shape
from attnfuse.kernels import sink
from attnfuse.kernels.layout import batch_shape, precision

Tensors = list[torch.Tensor]
#: (rank whose bundle it is, the bundle) -> what is added up of it where it goes.
Compute = Callable[[int, Sequence[torch.Tensor]], Tensors | None]


class Circuit:
    """The way of bundles. wanted(of, at): whether the rank `at` computes something of that of rank `of`; shapes: of a rank's.

    All ranks decide alike what is sent, from `wanted` alone.
    """

    def __init__(
        self, hops: Hops, what: str, wanted: Callable[[int, int], bool], shapes: Callable[[int], list[Shape]]
    ) -> None:
        self.hops, self.what, self.wanted, self.shapes = hops, what, wanted, shapes

    def on_node(self, bundle: int, nodes_on: int, places_on: range) -> bool:
        """Whether a bundle is wanted so many nodes on from its own, by one of the ranks so many places on."""
        node, place = divmod(bundle, self.hops.local)
        return any(self.wanted(bundle, self.hops.at(node + nodes_on, place + i)) for i in places_on)

    def on_nodes(self, bundle: int, nodes_on: range) -> bool:
        return any(self.on_node(bundle, o, range(self.hops.local)) for o in nodes_on)

    def go_around(self, own: Sequence[torch.Tensor], compute: Callable[[int, int, int, Any], None]) -> None:
        """compute(nodes on, places on, rank, its bundle) for each bundle, one's own first; None for one that is not wanted here."""
        h = self.hops
        outer: Sequence[torch.Tensor] | None = own
        for o in range(h.nodes):
            far: Pending | None = None
            if o < h.nodes - 1:
                far = self._hop("outer", o, h.at(h.node - o, h.place), h.at(h.node - o - 1, h.place), outer)
            current = outer
            for i in range(h.local):
                bundle = h.at(h.node - o, h.place - i)
                near: Pending | None = None
                if i < h.local - 1:
                    near = self._hop("inner", o * h.local + i, bundle, h.at(h.node - o, h.place - i - 1), current, o, i)
                compute(o, i, bundle, current if self.wanted(bundle, h.rank) else None)
                if near is not None:
                    current = near.wait()
            if far is not None:
                outer = far.wait()

    def _hop(
        self,
        ring: Any,
        step: int,
        bundle: int,
        following: int,
        held: Sequence[torch.Tensor] | None,
        o: int = 0,
        i: int = 0,
    ) -> Pending:
        """Start to send what is held on, where it is wanted yet, and to receive the following bundle likewise."""
        if ring == "inner":
            sends, receives = (self.on_node(b, o, range(i + 1, self.hops.local)) for b in (bundle, following))
        else:
            sends, receives = (self.on_nodes(b, range(step + 1, self.hops.nodes)) for b in (bundle, following))
        tensors = (held or ()) if sends else ()
        return self.hops.start(ring, self.what, step, tensors, self.shapes(following) if receives else ())

    def bring_home(
        self, own: Sequence[torch.Tensor], compute: Compute, shapes: Callable[[int], list[Shape]]
    ) -> Tensors | None:
        """The sum of what `compute` gives of this rank's bundle everywhere; None if nobody wants it. shapes: of those sums."""
        h = self.hops
        around = goes_around(self.wanted, h.ranks)

        @functools.cache
        def near(bundle: int, o: int) -> range:
            """Places on, in the node that is o nodes on, from which gradients of a bundle are sent."""
            node, place = divmod(bundle, h.local)
            return way_home([self.wanted(bundle, h.at(node + o, place + i)) for i in range(h.local)], around)

        @functools.cache
        def far(bundle: int) -> range:
            """Nodes on from which they are sent."""
            return way_home([self.on_node(bundle, o, range(h.local)) for o in range(h.nodes)], around)

        within = _Returning(h, "inner", f"{self.what}, gradients", shapes)
        between = _Returning(h, "outer", f"{self.what}, gradients", shapes)
        home: Tensors | None = None
        total: Tensors | None = None

        def step(o: int, i: int, bundle: int, held: Any) -> None:
            nonlocal home, total
            made = None if held is None else compute(bundle, held)
            origin = h.at(h.node - o, h.place)
            if i == 0:
                total = made
            else:
                following = h.at(h.node - o, h.place - i - 1)
                within.send(
                    i,
                    o * h.local + i,
                    made,
                    (near(bundle, o), near(following, o), near(origin, o)),
                    (following, origin),
                )
            if i < h.local - 1:
                return
            # the sum over this node for the same place of the bundles' own
            total = _added(total, within.arrived())
            if o == 0:
                home = total
                return
            following = h.at(h.node - o - 1, h.place)
            between.send(o, o, total, (far(origin), far(following), far(h.rank)), (following, h.rank))

        self.go_around(own, step)
        return _added(home, between.arrived())


class _Returning:
    """Gradients on their way home in a ring: on to the next rank while others add to them, and straight home then.

    shapes: of a rank's. Each step has what goes on first, then what goes home, so that ranks' transfers are in one order.
    """

    def __init__(self, hops: Hops, ring: Ring, what: str, shapes: Callable[[int], list[Shape]]) -> None:
        self.hops, self.ring, self.what, self.shapes = hops, ring, what, shapes
        self.on: Pending | None = None
        self.back: Pending | None = None
        self.home: Tensors | None = None

    def send(
        self, step: int, number: int, made: Tensors | None, ways: tuple[range, range, range], ranks: tuple[int, int]
    ) -> None:
        """At a step of this ring, called `number` in errors: add `made` to what has come of a bundle, and send the sum.

        ways: of that bundle, of the one after it and of the one that has its home here; ranks: whose the latter two are.
        """
        made = _added(made, _arrived(self.on))
        self.home = _added(self.home, _arrived(self.back))
        own, following, homing = ways
        goes = bool(made) and step in own
        last = goes and step == own[-1]
        got = self.shapes(ranks[0]) if step in following[:-1] else ()
        self.on = self.hops.start(self.ring, self.what, number, made or () if goes and not last else (), got)
        got = self.shapes(ranks[1]) if homing and step == homing[-1] else ()
        self.back = self.hops.start(self.ring, self.what, number, made or () if last else (), got, -step)

    def arrived(self) -> Tensors | None:
        """What came home since this was asked for last; all that was sent has left."""
        _arrived(self.on)
        found = _added(self.home, _arrived(self.back))
        self.on = self.back = self.home = None
        return found


def _arrived(pending: Pending | None) -> Tensors | None:
    """What has come, which may be nothing: what was sent with it must have left, too."""
    return None if pending is None else list(pending.wait()) or None


def _added(a: Tensors | None, b: Tensors | None) -> Tensors | None:
    if a is None or b is None:
        return b if a is None else a
    return [x.add_(y) for x, y in zip(a, b)]


class _Ring:
    """One call's forward and backward. burst: queries go around in backward, not keys and values."""

    def __init__(self, burst: bool) -> None:
        self.burst = burst

    def forward(
        self, call: Call, hops: Hops, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """out [*batch, n, E] and stats [2, *batch, n] of this rank's q, k and v."""
        n, spec = q.shape[-2], call.step("part").spec
        own = q[..., : call.rows[call.rank], :]
        merged = Merged()

        def compute(o: int, i: int, rank: int, held: Any) -> None:
            if held is not None and not (merged.out is not None and call.is_faint(call.rank, rank, merged.top)):
                merged.add(*call.run("forward", spec, call.inputs("part", own, held[0], held[1], call.rank, rank)))

        empty = call.empty()
        circuit = Circuit(hops, "forward", lambda of, at: not empty[at][of], _shapes_of_keys(call, k, v))
        columns = call.columns[call.rank]
        circuit.go_around([k[..., :columns, :], v[..., :columns, :]], compute)
        operands = call.own(call.operands, "part", call.rank, call.rank)
        if merged.out is None:
            merged.add(*_of_nothing(call, own, k, v))
        out, stats = merged.finished(call.spec, operands)
        if not call.keys:
            out = torch.zeros_like(out)
        return laid_out(call.spec, padded(out, -2, n)), padded_statistics(stats, n)

    def backward(
        self,
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
        n, m = q.shape[-2], k.shape[-2]
        rows, columns = call.rows[call.rank], call.columns[call.rank]
        q, dout, out, stats = q[..., :rows, :], dout[..., :rows, :], out[..., :rows, :], stats[..., :rows]
        k, v = k[..., :columns, :], v[..., :columns, :]
        compute = precision(call.spec)
        delta = (dout.to(compute) * out.to(compute)).sum(-1)
        if dlse is not None:
            delta = delta - dlse.expand(*delta.shape[:-1], n)[..., :rows]
        sums: list[torch.Tensor | None] = [None] * len(call.operands)
        self._add_sink(call, stats, delta, needs, sums)
        whole = for_parts(call.spec, stats)
        numbers = as_one_number(whole) if is_one_number(call.spec) else whole
        if self.burst:
            grads = self._by_queries(call, hops, (q, dout, delta, numbers), k, v, needs, sums)
        else:
            grads = self._by_keys(call, hops, (q, dout, delta, whole), k, v, needs, sums)
        lengths = (n, m, m)
        return [*(None if g is None else padded(g, -2, size) for g, size in zip(grads, lengths)), *sums]

    @staticmethod
    def _add_sink(
        call: Call, stats: torch.Tensor, delta: torch.Tensor, needs: Sequence[bool], sums: list[torch.Tensor | None]
    ) -> None:
        """What a sink itself adds to its operand's gradient, of this rank's rows."""
        s = call.spec.sink
        if s is None or s.operand is None or not needs[3 + s.operand]:
            return
        operands = call.own(call.operands, "part", call.rank, call.rank)
        wide = torch.zeros_like(
            operands[s.operand], dtype=torch.promote_types(operands[s.operand].dtype, torch.float32)
        )
        grads: list[torch.Tensor | None] = [None] * (3 + len(operands))
        grads[3 + s.operand] = wide
        sink.add_gradient(call.spec, operands, grads, *sink.inverse_sums(call.spec, stats), delta)
        call.add_to_whole(sums, grads[3:], "part", call.rank, call.rank)

    def _step(
        self,
        call: Call,
        queries: Sequence[torch.Tensor],
        k: torch.Tensor,
        v: torch.Tensor,
        ranks: tuple[int, int],
        needs: Sequence[bool],
        sums: list[torch.Tensor | None],
    ) -> list[torch.Tensor | None]:
        """Gradients of q, k and v of the step of two ranks, in what sums are held in; those of operands are added to sums."""
        q, dout, delta, numbers = queries
        step = call.step("part")
        inputs = call.inputs("part", q, k, v, *ranks)
        wanted = [*needs, *[False] * sum(step.numbers)]
        grads = call.run("backward_part", step.spec, inputs, dout, delta, from_numbers(numbers), wanted)
        call.add_to_whole(sums, grads[3 : 3 + len(call.operands)], "part", *ranks)
        wide = precision(call.spec)
        return [None if g is None else g.to(wide) for g in grads[:3]]

    def _by_keys(
        self,
        call: Call,
        hops: Hops,
        queries: Sequence[torch.Tensor],
        k: torch.Tensor,
        v: torch.Tensor,
        needs: Sequence[bool],
        sums: list[torch.Tensor | None],
    ) -> list[torch.Tensor | None]:
        """Keys and values go around, and their gradients after them."""
        dq: torch.Tensor | None = None

        def compute(rank: int, held: Sequence[torch.Tensor]) -> Tensors | None:
            nonlocal dq
            grads = self._step(call, queries, held[0], held[1], (call.rank, rank), needs, sums)
            dq = grads[0] if dq is None or grads[0] is None else dq.add_(grads[0])
            return [g for g in grads[1:] if g is not None]

        empty = call.empty(backward=True)
        circuit = Circuit(hops, "keys", lambda of, at: not empty[at][of], _shapes_of_keys(call, k, v))
        wide = precision(call.spec)
        which = [x for x, need in zip((k, v), needs[1:3]) if need]

        def shapes(rank: int) -> list[Shape]:
            return [((*x.shape[:-2], call.columns[rank], x.shape[-1]), wide) for x in which]

        found = iter(circuit.bring_home([k, v], compute, shapes) or [])
        return [dq, *(next(found, None) if need else None for need in needs[1:3])]

    def _by_queries(
        self,
        call: Call,
        hops: Hops,
        queries: Sequence[torch.Tensor],
        k: torch.Tensor,
        v: torch.Tensor,
        needs: Sequence[bool],
        sums: list[torch.Tensor | None],
    ) -> list[torch.Tensor | None]:
        """Burst: queries, what came for their results and their statistics go around, and the gradients of queries after them."""
        still: list[torch.Tensor | None] = [None, None]

        def compute(rank: int, held: Sequence[torch.Tensor]) -> Tensors | None:
            grads = self._step(call, held, k, v, (rank, call.rank), needs, sums)
            for at, g in enumerate(grads[1:]):
                old = still[at]
                still[at] = g if old is None or g is None else old.add_(g)
            return [] if grads[0] is None else [grads[0]]

        def bundle(rank: int) -> list[Shape]:
            n = call.rows[rank]
            q, dout, delta, numbers = queries
            return [
                ((*q.shape[:-2], n, q.shape[-1]), q.dtype),
                ((*dout.shape[:-2], n, dout.shape[-1]), dout.dtype),
                ((*delta.shape[:-1], n), delta.dtype),
                ((*numbers.shape[:-1], n), numbers.dtype),
            ]

        empty = call.empty(backward=True)
        circuit = Circuit(hops, "burst", lambda of, at: not empty[of][at], bundle)
        q = queries[0]

        def shapes(rank: int) -> list[Shape]:
            return [((*q.shape[:-2], call.rows[rank], q.shape[-1]), precision(call.spec))] if needs[0] else []

        found = circuit.bring_home(queries, compute, shapes)
        return [found[0] if found else None, *still]


def _shapes_of_keys(call: Call, k: torch.Tensor, v: torch.Tensor) -> Callable[[int], list[Shape]]:
    return lambda rank: [((*x.shape[:-2], call.columns[rank], x.shape[-1]), x.dtype) for x in (k, v)]


def _of_nothing(call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The result and statistics of rows that see no key."""
    shapes = [x.shape for x in (q, k, v, *call.operands)]
    lines = (*batch_shape(shapes), q.shape[-2])
    stats = q.new_zeros((2, *lines), dtype=precision(call.spec))
    stats[0] = -torch.inf
    return q.new_zeros((*lines, v.shape[-1]), dtype=precision(call.spec)), stats


RING, BURST = _Ring(False), _Ring(True)
