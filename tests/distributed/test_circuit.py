"""The ways of bundles and gradients, whatever ranks want of each other: right sums, bytes as accounted, no deadlock."""

from __future__ import annotations

import queue
import random
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from attnfuse.distributed import traffic
from attnfuse.distributed.ring import Circuit
from attnfuse.distributed.transport import Hops

#: Seconds after which a transfer counts as one that nobody answers.
LIMIT = 20.0


class Arrived:
    def __init__(self, received):
        self.received = received

    def wait(self):
        return self.received


class Blocking(Hops):
    """Ranks in threads. A transfer ends before the next one of its rank starts, and a send when it is received: stricter than any
    backend, so that what ends here ends there."""

    def __init__(self, rank, nodes, local, boxes):
        self.nodes, self.local, self.ranks, self.rank = nodes, local, nodes * local, rank
        self.node, self.place = divmod(rank, local)
        self.boxes, self.rows = (
            boxes,
            {("inner", False): 0, ("inner", True): 0, ("outer", False): 0, ("outer", True): 0},
        )

    def start(self, ring, what, step, tensors, awaited, by=1):
        ahead, behind = (
            self.at(self.node, self.place + x) if ring == "inner" else self.at(self.node + x, self.place)
            for x in (by, -by)
        )
        left = threading.Event()
        if tensors:
            assert ahead != self.rank
            self.rows[ring, "gradients" in what] += tensors[0].numel()
            self.boxes[self.rank, ahead].put((what, step, [x.clone() for x in tensors], left))
        received = []
        if awaited:
            sent_what, sent_step, received, taken = self.boxes[behind, self.rank].get(timeout=LIMIT)
            assert (sent_what, sent_step) == (what, step)
            assert [tuple(x.shape) for x in received] == [tuple(shape) for shape, _ in awaited]
            taken.set()
        assert not tensors or left.wait(LIMIT), f"rank {ahead} takes nothing from {self.rank} at step {step} of {what}"
        return Arrived(received)


def sums(want, rows, nodes, local):
    """(the sum that each rank gets home, or None, and the rows it sends, as Moves has them). A rank adds 2 to its number to what
    it wants, times the number that it has been sent of the bundle's rank."""
    boxes = defaultdict(queue.Queue)
    for a in range(len(rows)):
        for b in range(len(rows)):
            boxes[a, b] = queue.Queue()

    def one(rank):
        hops = Blocking(rank, nodes, local, boxes)

        def shapes(of):
            return [((rows[of],), torch.float64)]

        def compute(of, held):
            return [2.0**rank * held[0]]

        circuit = Circuit(hops, "keys", lambda of, at: want[of][at], shapes)
        own = [torch.full((rows[rank],), rank + 1.0, dtype=torch.float64)]
        found = circuit.bring_home(own, compute, shapes)
        sent = [hops.rows[ring, back] for back in (False, True) for ring in ("inner", "outer")]
        return found, traffic.Moves(*sent)

    with ThreadPoolExecutor(len(rows)) as pool:
        return list(pool.map(one, range(len(rows))))


@pytest.mark.parametrize(("nodes", "local"), [(1, 2), (1, 5), (4, 1), (2, 2), (2, 3), (3, 2), (3, 4)])
def test_gradients_of_all_who_want_a_bundle_come_home(nodes, local):
    made = random.Random(nodes * 10 + local)
    ranks, seen = nodes * local, set()
    for number in range(25):
        rows = [made.choice((0, 1, 2, 3)) for _ in range(ranks)]
        share = made.random()
        want = [[bool(n and m) and made.random() < share for m in rows] for n in rows]
        if number % 5 == 0:
            want = [[bool(n and m) and at >= of for at, m in enumerate(rows)] for of, n in enumerate(rows)]
        elif number % 5 == 1:
            want = [[bool(n and m) and at - of in (0, 1) for at, m in enumerate(rows)] for of, n in enumerate(rows)]
        seen.add(traffic.goes_around(lambda of, at, want=want: want[of][at], ranks))
        expected = traffic.circuit(lambda of, at, want=want: want[of][at], rows, nodes, local)
        for rank, (found, sent) in enumerate(sums(want, rows, nodes, local)):
            assert sent == expected.moves[rank], (want, rows, rank)
            total = (rank + 1.0) * sum(2.0**at for at in range(ranks) if want[rank][at])
            if found is None:
                assert not any(want[rank])
            else:
                assert found[0].tolist() == [total] * rows[rank], (want, rows, rank)
    assert seen == {False, True} or ranks == 2
