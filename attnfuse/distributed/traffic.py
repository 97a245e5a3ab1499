"""What a rank sends for one attention, in bytes: the formulas. Tests compare them with bytes counted on gloo, which they equal.

n_q, n_k: rows that a rank holds; Hq, Hkv: heads of all batch elements; s: bytes of an input, o of a result, a of a sum and of a
statistic (4; 8 for float64); P ranks.

    gather        forward  (P-1) n_k Hkv (D+E) s      backward  (P-1) n_k Hkv (D+E) (s+a)
    ring          forward  (P-1) n_k Hkv (D+E) s      backward  (P-1) n_k Hkv (D+E) (s+a)
    burst         forward  as ring                    backward  (P-1) n_q Hq (D s + E o + D a + t a)

t = 2 (delta and log-sum-exp), or 3 (delta, maximum and sum) where the logarithm of a sum may be lost in the maximum. The ring is of
Liu et al. 2023 (arXiv:2310.01889), Burst of Sun et al. 2024 (arXiv:2403.09347). A double ring of (nodes, local) sends as much, of
it nodes - 1 of P - 1 between nodes. Rings send real rows alone, and a bundle only as far as there is somebody left who computes
something of it. Its gradient goes from the first rank that adds to it on to the last, and from there straight home, unless the mask
is a causal one (`goes_around`, `circuit`).

ulysses, U ranks, each of which gets 1/U of the query heads and c/U of the key heads (c > 1 where it needs one that others need
too); of what a rank holds, (U-1)/U goes to others:

    forward   (U-1)/U (n_q Hq (D s + E o + 2 a) + c n_k Hkv (D+E) s)
    backward  (U-1)/U (n_q Hq (2 D s + 2 E o + 2 a) + c n_k Hkv (D+E) (s+g))

g = s, or a where c > 1 and the kernel gives sums; and a more for each row of backward where the log-sum-exp has a gradient (Jacobs
et al. 2023, arXiv:2309.14509). ulysses_ring: the same in the inner group, and a ring of the outer one, in which a rank holds the
rows of U ranks and 1/U of the heads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from attnfuse.distributed.layouts import rows_of_rank

ALGORITHMS = ("gather", "ring", "burst", "ulysses", "ulysses_ring", "local")


@dataclass(frozen=True)
class Sizes:
    """One attention as it is on one device.

    batch            batch elements that are no heads
    heads, kv_heads  of queries, and of keys and values (None: as many) in one batch element
    queries, keys    whole lengths
    D, E             sizes of a head of q and k, and of v
    itemsize         bytes of an element of q, k and v; out_itemsize of the result (None: as many)
    trains           whether there is a backward
    """

    batch: int
    heads: int
    queries: int
    keys: int
    D: int
    E: int
    itemsize: int
    trains: bool = True
    kv_heads: int | None = None
    out_itemsize: int | None = None

    @property
    def q_rows(self) -> int:
        """Rows of q for one query: heads of all batch elements."""
        return self.batch * self.heads

    @property
    def kv_rows(self) -> int:
        return self.batch * (self.heads if self.kv_heads is None else self.kv_heads)

    @property
    def sums(self) -> int:
        """Bytes of a sum, and of a statistic."""
        return max(self.itemsize, 4)

    @property
    def out(self) -> int:
        return self.itemsize if self.out_itemsize is None else self.out_itemsize


class Sent(NamedTuple):
    """Bytes to ranks of the same node, and to others."""

    within: int
    between: int = 0

    @property
    def total(self) -> int:
        return self.within + self.between

    def __add__(self, other: Sent) -> Sent:  # type: ignore[override]
        return Sent(self.within + other.within, self.between + other.between)


class Moves(NamedTuple):
    """Rows that a rank sends on: what goes around, and its gradients, within a node and between nodes."""

    within: int = 0
    between: int = 0
    back_within: int = 0
    back_between: int = 0

    def sent(self, ahead: int, back: int = 0) -> Sent:
        """In bytes, of so many for a row of what goes around, and of its gradient."""
        return Sent(
            self.within * ahead + self.back_within * back,
            self.between * ahead + self.back_between * back,
        )


class Circuit(NamedTuple):
    """moves: of each rank. Steps after which somebody sends on what goes around, and gradients of it: `steps` and `back` within a
    node, `far` and `far_back` between nodes, by the node's number on the way."""

    moves: list[Moves]
    steps: frozenset[int]
    back: frozenset[int]
    far: frozenset[int]
    far_back: frozenset[int]


def goes_around(wanted: Callable[[int, int], bool], ranks: int) -> bool:
    """Whether gradients go home around the ring, and not straight.

    So it is under a causal mask in any layout, and without one: of any two ranks one wants all that the other wants, and one rank
    all that anybody wants. That one adds to all that travels, and would send as much if gradients went straight.
    """
    wants = sorted(({of for of in range(ranks) if wanted(of, at)} for at in range(ranks)), key=len)
    return all(less <= more for less, more in itertools.pairwise(wants))


def way_home(want: Sequence[bool], around: bool) -> range:
    """After which steps of a ring a bundle's gradients are sent: on to the next place, and home from the last one.

    want: whether there is something to add, by the number of places on from the bundle's own, which comes first; what is added
    there stays. around: see goes_around; the last place of the ring is next to the bundle's own.
    """
    adds = [i for i, there in enumerate(want) if there and i]
    if not adds:
        return range(0)
    return range(adds[0], len(want) if around else adds[-1] + 1)


def circuit(wanted: Callable[[int, int], bool], rows: Sequence[int], nodes: int, local: int) -> Circuit:
    """What is sent in a double ring of (nodes, local); (1, P) is a plain one.

    wanted(of, at): whether rank `at` computes something of what rank `of` holds; rows: of each rank. A bundle goes from node to
    node by the same place of each, and in each node around, as far as it is wanted. Gradients are summed around each node,
    from the place after the bundle's own on, and those sums node by node: both by way_home.
    """
    around = goes_around(wanted, len(rows))
    found = [[0, 0, 0, 0] for _ in rows]
    ways: tuple[set[int], set[int], set[int], set[int]] = set(), set(), set(), set()

    def sent(kind: int, rank: int, step: int, count: int) -> None:
        found[rank][kind] += count
        ways[kind].add(step)

    for of, count in enumerate(rows):
        home, own = divmod(of, local)
        there = [[(home + o) % nodes * local + (own + i) % local for i in range(local)] for o in range(nodes)]
        want = [[wanted(of, at) for at in node] for node in there]
        for o in range(nodes if count else 0):
            last = next((i for i in range(local - 1, 0, -1) if want[o][i]), 0)
            for i in range(last):
                sent(0, there[o][i], o * local + i, count)
            for i in way_home(want[o], around):
                sent(2, there[o][i], o * local + i, count)
            if any(map(any, want[o + 1 :])):
                sent(1, there[o][0], o, count)
        for o in way_home(list(map(any, want)), around) if count else ():
            sent(3, there[o][0], o, count)
    near, far, back, far_back = map(frozenset, ways)
    return Circuit([Moves(*x) for x in found], near, back, far, far_back)


def key_row(sizes: Sizes) -> tuple[int, int]:
    """Bytes of a row of keys and values of all heads, and of its gradients."""
    count = sizes.kv_rows * (sizes.D + sizes.E)
    return count * sizes.itemsize, count * sizes.sums


def query_row(sizes: Sizes, apart: bool) -> tuple[int, int]:
    """Bytes of what Burst sends for a query of all heads, and of its gradient. apart: maximum and sum for the log-sum-exp."""
    one = sizes.D * sizes.itemsize + sizes.E * sizes.out + (3 if apart else 2) * sizes.sums
    return sizes.q_rows * one, sizes.q_rows * sizes.D * sizes.sums


def gather(sizes: Sizes, rows: int, nodes: int, local: int) -> tuple[Sent, Sent]:
    """(forward, backward): keys and values gathered in both, their gradients scattered as sums. rows: keys that a rank holds."""
    # first among the ranks of a node, then what a node has among nodes
    moves = Moves(rows * (local - 1), rows * (nodes - 1) * local, rows * (local - 1), rows * (nodes - 1) * local)
    ahead, back = key_row(sizes)
    return moves.sent(ahead), moves.sent(ahead, back)


def exchange(
    sizes: Sizes, rows: tuple[int, int], parts: int, copies: int = 1, lse: bool = False, sums: bool = True
) -> tuple[int, int]:
    """(forward, backward) of Ulysses' all-to-all among `parts` ranks. rows: queries and keys that a rank holds; copies: ranks that
    need the same key head; lse: whether the log-sum-exp has a gradient; sums: whether kernels give sums of narrower inputs."""
    q = rows[0] * sizes.q_rows * sizes.D * sizes.itemsize
    out = rows[0] * sizes.q_rows * sizes.out * sizes.E
    stats = rows[0] * sizes.q_rows * sizes.sums
    key, sum_ = (rows[1] * copies * x for x in key_row(sizes))
    forward = q + key + out + 2 * stats
    backward = 2 * q + key + (sum_ if copies > 1 and sums else key) + 2 * out + (3 if lse else 2) * stats
    return forward * (parts - 1) // parts, backward * (parts - 1) // parts


def inner_sizes(sizes: Sizes, parts: int, copies: int = 1) -> Sizes:
    """What is left for a ring between `parts` ranks that share out the heads: rows of all of them, of 1/parts of the heads."""
    return Sizes(
        1,
        sizes.q_rows // parts,
        sizes.queries,
        sizes.keys,
        sizes.D,
        sizes.E,
        sizes.itemsize,
        sizes.trains,
        sizes.kv_rows * copies // parts,
        sizes.out_itemsize,
    )


def rows_of(layout: str, ranks: int, sizes: Sizes) -> tuple[int, int]:
    """Queries and keys that a rank holds, padding included."""
    return rows_of_rank(layout, ranks, sizes.queries), rows_of_rank(layout, ranks, sizes.keys)
