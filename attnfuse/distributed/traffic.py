"""What one rank sends for one attention, in bytes: the formulas. Tests compare them with bytes counted on gloo, which they equal.

n_q, n_k: rows that a rank holds; Hq, Hkv: heads of all batch elements; s: bytes of an input, o of a result, a of a sum and of a
statistic (4; 8 for float64). P ranks, h hops of P - 1 at most.

    gather        forward  (P-1) n_k Hkv (D+E) s      backward  (P-1) n_k Hkv (D+E) (s+a)
    ring          forward      h n_k Hkv (D+E) s      backward      h n_k Hkv (D+E) (s+a)
    burst         forward      as ring                backward      h n_q Hq (D s + E o + D a + t a)

t = 2 (delta and log-sum-exp), or 3 (delta, maximum and sum) where a finite fill swallows the logarithm of the sum. Burst is Sun et
al. 2024 (arXiv:2403.09347), the ring Liu et al. 2023 (arXiv:2310.01889). A double ring sends as much, of which what goes between
nodes is said apart: nodes - 1 sends of keys and values, nodes of gradients.

ulysses, U ranks, each of which gets 1/U of the query heads and c/U of the key heads (c > 1 where it needs one that others need
too); to a rank goes 1/U of a row, so that (U-1)/U of it is sent:

    forward   (U-1)/U (n_q Hq (D s + E o + 2 a) + c n_k Hkv (D+E) s)
    backward  (U-1)/U (n_q Hq (2 D s + 2 E o + 2 a) + 2 c n_k Hkv (D+E) s)

and a more for each row where the log-sum-exp has a gradient. Source: Jacobs et al. 2023 (arXiv:2309.14509). ulysses_ring: the
same within, and a ring of all rows of U ranks, with 1/U of the heads, between.
"""

from __future__ import annotations

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


class Hops(NamedTuple):
    """Sends of what travels, and of gradients that follow it, within a node and between nodes."""

    within: int
    between: int
    back_within: int
    back_between: int


def hops_of(nodes: int, local: int, last: int) -> Hops:
    """The sends of a ring up to step `last` (P - 1 for all). (nodes, local): a double ring; (1, P): a plain one.

    What travels reaches step s by one send, between nodes where s is a multiple of `local`. Gradients go on from each step but the
    first, and from the last one home.
    """
    far = [s for s in range(1, last + 1) if s % local == 0] if nodes > 1 else []
    back = 0
    if nodes > 1 and last:
        back = sum(1 for s in range(1, last) if s % local == local - 1)
        # home from the last step: in another node unless that step was still in this one
        back += 1 if last >= local or nodes * local - 1 == last else 0
    return Hops(last - len(far), len(far), last - back, back)


def ring_forward(sizes: Sizes, rows: int, hops: Hops) -> Sent:
    """rows: keys that a rank holds."""
    one = rows * sizes.kv_rows * (sizes.D + sizes.E) * sizes.itemsize
    return Sent(one * hops.within, one * hops.between)


def ring_backward(sizes: Sizes, rows: int, hops: Hops) -> Sent:
    """K,V circulate, their gradients follow. rows: keys that a rank holds."""
    grads = rows * sizes.kv_rows * (sizes.D + sizes.E) * sizes.sums
    return ring_forward(sizes, rows, hops) + Sent(grads * hops.back_within, grads * hops.back_between)


def burst_backward(sizes: Sizes, rows: int, hops: Hops, apart: bool = False) -> Sent:
    """q, dout, delta and the statistics circulate, the gradient of q follows. rows: queries that a rank holds; apart: maximum and
    sum are sent for the log-sum-exp."""
    count = rows * sizes.q_rows
    one = count * (sizes.D * sizes.itemsize + sizes.E * sizes.out + (3 if apart else 2) * sizes.sums)
    back = count * sizes.D * sizes.sums
    return Sent(one * hops.within + back * hops.back_within, one * hops.between + back * hops.back_between)


def gather(sizes: Sizes, rows: int, nodes: int, local: int) -> tuple[Sent, Sent]:
    """(forward, backward): keys and values gathered in both, their gradients scattered as sums. rows: keys that a rank holds."""
    # first among the ranks of a node, then what a node has among nodes
    hops = Hops(local - 1, (nodes - 1) * local, local - 1, (nodes - 1) * local)
    return ring_forward(sizes, rows, hops), ring_backward(sizes, rows, hops)


def exchange(sizes: Sizes, rows: tuple[int, int], parts: int, copies: int = 1, lse: bool = False) -> tuple[int, int]:
    """(forward, backward) of Ulysses' all-to-all among `parts` ranks. rows: queries and keys that a rank holds; copies: ranks that
    need the same key head; lse: whether the log-sum-exp has a gradient."""
    q = rows[0] * sizes.q_rows * sizes.D * sizes.itemsize
    out = rows[0] * sizes.q_rows * sizes.out * sizes.E
    stats = rows[0] * sizes.q_rows * sizes.sums
    kv = rows[1] * sizes.kv_rows * (sizes.D + sizes.E) * sizes.itemsize * copies
    forward = q + kv + out + 2 * stats
    backward = 2 * (q + kv) + 2 * out + (3 if lse else 2) * stats
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
