"""One attention by one algorithm in one layout: what each rank sends, the tiles of each step, and the time by a model.

Bytes are exact, tiles an upper bound (work.py). The model of time: a step takes as long as its most loaded rank computes, or as the
transfer that runs meanwhile, whichever is more; products run at links.REACHED of the peak, backward takes BACKWARD times forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from attnfuse.distributed import layouts, traffic, work
from attnfuse.distributed.links import REACHED, Links
from attnfuse.distributed.traffic import Circuit, Sent, Sizes
from attnfuse.distributed.work import Step, Work
from attnfuse.spec import Attention

#: Products of backward (q k', dout v', and three gradients) for those of forward (q k', p v).
BACKWARD = 2.5


@dataclass(frozen=True)
class Mesh:
    """nodes, local: of the ring. parts: ranks that share out the heads, of which there are nodes * local groups; apart: which are
    in different nodes."""

    nodes: int
    local: int
    parts: int = 1
    apart: bool = False

    @property
    def rings(self) -> int:
        return self.nodes * self.local

    @property
    def ranks(self) -> int:
        return self.rings * self.parts


@dataclass(frozen=True)
class Account:
    """forward, backward: what each rank sends. steps: tiles by rank of the ring, at each step; one step without a ring.
    seconds: forward and backward. tile: rows of a tile."""

    algorithm: str
    layout: str
    forward: tuple[Sent, ...]
    backward: tuple[Sent, ...]
    steps: tuple[Step, ...]
    back_steps: tuple[Step, ...]
    seconds: tuple[float, float]
    tile: int

    @property
    def most(self) -> tuple[Sent, Sent]:
        """Forward and backward of the rank that sends most."""
        total = [a.total + b.total for a, b in zip(self.forward, self.backward)]
        at = total.index(max(total))
        return self.forward[at], self.backward[at]

    @property
    def total(self) -> int:
        return sum(x.total for x in self.most)

    @property
    def waits(self) -> int:
        """Tiles that ranks wait for in forward."""
        return sum(step.waits for step in self.steps)


@dataclass(frozen=True)
class Attended:
    """One attention on a mesh. copies: ranks that need the same key head; apart: see traffic.query_row; partial: whether the kernel
    gives sums."""

    spec: Attention
    sizes: Sizes
    mesh: Mesh
    layout: str
    links: Links
    copies: int = 1
    apart: bool = False
    partial: bool = True

    def account(self, algorithm: str) -> Account:
        """By an algorithm of traffic.ALGORITHMS."""
        if algorithm in ("ring", "burst", "ulysses_ring"):
            return self._around(algorithm)
        return self._at_once(algorithm)

    @property
    def rows(self) -> tuple[int, int]:
        """Queries and keys that a rank holds, padding included."""
        return traffic.rows_of(self.layout, self.mesh.ranks, self.sizes)

    def work(self, backward: bool = False) -> Work:
        """Tiles by rank of the ring; backward: those that are surely empty in backward, too, are 0."""
        held = self.rows[0] * self.mesh.parts, self.rows[1] * self.mesh.parts
        masks = work.masks_of(self.spec, self.sizes.queries == self.sizes.keys, backward)
        return work.work_of(masks, self.layout, self.mesh.rings, (self.sizes.queries, self.sizes.keys), held)

    def _per_tile(self, done: Work) -> float:
        """Seconds of one tile, forward."""
        products = 2.0 * done.size**2 * self.sizes.q_rows / self.mesh.parts * (self.sizes.D + self.sizes.E)
        return products / (self.links.flops * REACHED)

    def _at_once(self, algorithm: str) -> Account:
        """All that is needed comes before one call of a kernel."""
        forward = backward = Sent(0)
        if algorithm == "gather":
            forward, backward = traffic.gather(self.sizes, self.rows[1], self.mesh.nodes, self.mesh.local)
        elif algorithm == "ulysses":
            forward, backward = self._exchanged()
        if not self.sizes.trains:
            backward = Sent(0)
        done = self.work()
        busiest = max(done.of_ranks) * self._per_tile(done)
        links = slowest(self.mesh.nodes, self.mesh.local * self.mesh.parts, self.links)
        steps = [
            Step(done.of_ranks, times * busiest, seconds_to_send(sent, links))
            for sent, times in ((forward, 1.0), (backward, BACKWARD))
        ]
        trains = self.sizes.trains
        return Account(
            algorithm,
            self.layout,
            (forward,) * self.mesh.ranks,
            (backward,) * self.mesh.ranks,
            (steps[0],),
            (steps[1],) * trains,
            # one after the other: nothing is computed before all has come
            (steps[0].compute + steps[0].transfer, (steps[1].compute + steps[1].transfer) * trains),
            done.size,
        )

    def _exchanged(self) -> tuple[Sent, Sent]:
        forward, backward = traffic.exchange(
            self.sizes, self.rows, self.mesh.parts, self.copies, self.spec.lse, self.partial
        )
        return Sent(forward), Sent(backward)

    def _around(self, algorithm: str) -> Account:
        """A ring, of groups that share out the heads where there are `parts`."""
        mesh, sizes = self.mesh, self.sizes
        if mesh.parts > 1:
            sizes = traffic.inner_sizes(sizes, mesh.parts, self.copies)
        done = self.work()
        rows = [self._real(sizes.queries), self._real(sizes.keys)]
        ring, back = (_Ring(mesh, self.work(backward), rows, self.links) for backward in (False, True))
        per_tile, key, query = self._per_tile(done), traffic.key_row(sizes), traffic.query_row(sizes, self.apart)
        forward, steps, seconds = ring.sent(False, key[0], 0, per_tile)
        backward, back_seconds = (Sent(0),) * mesh.rings, 0.0
        back_steps: tuple[Step, ...] = ()
        if sizes.trains:
            ways = {"ring": [False], "burst": [True], "ulysses_ring": [False, True]}[algorithm]
            found = [back.sent(way, *(query if way else key), BACKWARD * per_tile) for way in ways]
            backward, back_steps, back_seconds = min(found, key=lambda x: max(sent.total for sent in x[0]))
        if mesh.parts > 1:
            inside = self._exchanged() if sizes.trains else (self._exchanged()[0], Sent(0))
            # what goes around a ring of such groups goes between nodes
            forward, backward = (
                tuple(Sent(within.total, x.total) for x in sent for _ in range(mesh.parts))
                for within, sent in zip(inside, (forward, backward))
            )
            links = slowest(1, mesh.parts, self.links)
            seconds += seconds_to_send(Sent(inside[0].total), links)
            back_seconds += seconds_to_send(Sent(inside[1].total), links)
        times = seconds, back_seconds
        return Account(algorithm, self.layout, forward, backward, steps, back_steps, times, done.size)

    def _real(self, length: int) -> list[int]:
        """Rows of each rank of the ring that are no padding."""
        ranks, parts = self.mesh.ranks, self.mesh.parts
        real = [layouts.real(self.layout, rank, ranks, length) for rank in range(ranks)]
        return [sum(real[i : i + parts]) for i in range(0, ranks, parts)]


def seconds_to_send(sent: Sent, links: Links) -> float:
    """So much at once."""
    found = 0.0
    if sent.within:
        found += sent.within / links.within + links.latency
    if sent.between:
        found += sent.between / links.between + links.far_latency
    return found


def slowest(nodes: int, local: int, links: Links) -> Links:
    """The links of a mesh: one of a single dim with more ranks than a node goes through links between nodes."""
    if nodes > 1 or local <= links.node:
        return links
    return replace(links, within=links.between, latency=links.far_latency)


@dataclass(frozen=True)
class _Ring:
    """rows: of queries and of keys, of each rank of the ring."""

    mesh: Mesh
    work: Work
    rows: list[list[int]]
    links: Links

    def sent(
        self, queries: bool, ahead: int, back: int, per_tile: float
    ) -> tuple[tuple[Sent, ...], tuple[Step, ...], float]:
        """(what each rank sends, the steps, seconds). ahead, back: bytes of a row of queries, or of keys, and of its gradient."""
        nodes, local, tiles = self.mesh.nodes, self.mesh.local, self.work.tiles
        wanted: Callable[[int, int], bool] = (
            (lambda of, at: tiles[of][at] > 0) if queries else (lambda of, at: tiles[at][of] > 0)
        )
        rows = self.rows[not queries]
        circuit = traffic.circuit(wanted, rows, nodes, local)
        steps = work.steps_of(self.work, self._holder, queries)
        timed, seconds = self._timed(steps, per_tile, (max(rows) * ahead, max(rows) * back), circuit)
        while len(timed) > 1 and not timed[-1].waits:
            timed.pop()
        return tuple(moves.sent(ahead, back) for moves in circuit.moves), tuple(timed), seconds

    def _holder(self, rank: int, step: int) -> int:
        """Whose tensors a rank holds at a step."""
        node, place = divmod(rank, self.mesh.local)
        far, near = divmod(step, self.mesh.local)
        return (node - far) % self.mesh.nodes * self.mesh.local + (place - near) % self.mesh.local

    def _timed(
        self, steps: Sequence[Step], per_tile: float, bundle: tuple[int, int], circuit: Circuit
    ) -> tuple[list[Step], float]:
        """The steps with their times, and the sum: each lasts as long as its most loaded rank or its transfers, and those in a node
        together as long as a transfer between nodes. bundle: bytes of what goes around, and of its gradients, at most."""
        links = slowest(self.mesh.nodes, self.mesh.ranks, self.links)
        speed, latency = (links.between, links.far_latency) if self.mesh.apart else (links.within, links.latency)
        found: list[Step] = []
        total, local = 0.0, self.mesh.local
        for o in range(self.mesh.nodes):
            there = 0.0
            for n in range(o * local, (o + 1) * local):
                sent = bundle[0] * (n in circuit.steps) + bundle[1] * (n in circuit.back)
                step = replace(
                    steps[n], compute=steps[n].waits * per_tile, transfer=(sent / speed + latency) * bool(sent)
                )
                there += max(step.compute, step.transfer)
                found.append(step)
            sent = bundle[0] * (o in circuit.far) + bundle[1] * (o in circuit.far_back)
            found[-1] = replace(found[-1], far=(sent / links.between + links.far_latency) * bool(sent))
            total += max(there, found[-1].far)
        return found, total
