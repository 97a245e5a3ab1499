"""What travels between ranks: a hop to the next one while a kernel runs, and collectives; with errors that say where they were.

Ranks of one group are a ring. Ranks of two groups (outer, inner) are numbered outer * size of inner + inner: rings of the inner
groups, which hand over to each other through the outer ones, as nodes do whose links are slower than those inside.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist

from attnfuse._compat import process_group

# the names up to torch 2.12, which later ones warn of
_GATHER: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

#: Groups of which all ranks have done something together.
_met: weakref.WeakSet[Any] = weakref.WeakSet()


def numbered(groups: Sequence[str]) -> tuple[int, int]:
    """(the number of this rank, how many there are) in groups (outer, inner), or one, of these names."""
    rank, ranks = 0, 1
    for name in groups:
        group = process_group(name)
        rank, ranks = rank * group.size() + group.rank(), ranks * group.size()
    return rank, ranks


Ring = Literal["inner", "outer"]
Shape = tuple[Sequence[int], torch.dtype]


class Pending:
    """Tensors on their way. wait() gives those that are received, in the shapes that were asked for.

    works: what waits for each transfer, with what it is.
    """

    def __init__(
        self, hops: Hops, works: Sequence[tuple[Any, str]], sent: Sequence[torch.Tensor], received: list[torch.Tensor]
    ) -> None:
        # those that are sent must live as long as they are on their way
        self._hops, self._works, self._sent, self._received = hops, works, sent, received

    def wait(self) -> Sequence[torch.Tensor]:
        """Raises RuntimeError, naming this rank, its peer, the site and the step, where a transfer fails or takes too long."""
        for work, where in self._works:
            with self._hops.said(where):
                work.wait()
        self._works = self._sent = ()
        return self._received


class Hops:
    """The ranks that one attention is over. groups: names of one or two process groups; site: for errors.

    sent: bytes and messages that this rank has sent, by ('bytes' or 'messages', ring, what).
    """

    def __init__(self, groups: Sequence[str], site: str, device: torch.device) -> None:
        if len(groups) not in (1, 2):
            raise ValueError(f"attnfuse: one or two groups of ranks are needed; got {len(groups)}")
        found = [process_group(name) for name in groups]
        self.groups: dict[Ring, Any] = {"inner": found[-1]}
        self.nodes, self.node = 1, 0
        if len(found) == 2:
            self.groups["outer"] = found[0]
            self.nodes, self.node = found[0].size(), found[0].rank()
        self.local, self.place = found[-1].size(), found[-1].rank()
        self.ranks: int = self.nodes * self.local
        self.rank = self.at(self.node, self.place)
        self.site, self.device = site, device
        self.sent: Counter[tuple[str, str, str]] = Counter()
        # what rings and ranks are called
        self._ring_names: dict[Ring, str] = {"inner": "inner", "outer": "outer"}
        self._numbers, self._whole = list(range(self.ranks)), self.ranks
        for _, group in self._rings():
            self._meet(group)

    def of_outer(self) -> Hops:
        """The ranks of the outer group alone; what is sent there is counted here too."""
        found = copy.copy(self)
        found.groups = {"inner": self.groups["outer"]}
        found.nodes, found.node, found.local, found.place = 1, 0, self.nodes, self.node
        found.ranks, found.rank = self.nodes, self.node
        found._ring_names = {"inner": "outer"}
        found._numbers = [self._numbers[self.at(node, self.place)] for node in range(self.nodes)]
        return found

    def _meet(self, group: Any) -> None:
        """A transfer of some ranks must not be the first thing that a group does: NCCL then waits for all of them."""
        if group not in _met:
            _met.add(group)
            self._collective(dist.all_reduce, torch.zeros(1, device=self.device), group=group)

    def at(self, node: int, place: int) -> int:
        """The rank at a place of a node, both counted around."""
        return int((node % self.nodes) * self.local + place % self.local)

    @contextlib.contextmanager
    def said(self, where: str) -> Iterator[None]:
        """In here errors of transfers say where they were."""
        try:
            yield
        except RuntimeError as error:
            place = f"rank {self._numbers[self.rank]} of {self._whole}, at {self.site or 'an attention'}, {where}"
            raise RuntimeError(f"attnfuse: {place}: {error}") from error

    def start(
        self, ring: Ring, what: str, step: int, tensors: Sequence[torch.Tensor], awaited: Sequence[Shape], by: int = 1
    ) -> Pending:
        """Send tensors to the rank that is `by` places on in a ring, and receive what is awaited from the one as far before.

        Either may be nothing, which those ranks know too; of what has no elements nothing is sent. All ranks that have something
        to send or to receive call this in one order, with one `by`, so that none waits for another in a circle.
        """
        group = self.groups[ring]
        own, size = (self.place, self.local) if ring == "inner" else (self.node, self.nodes)
        ahead, behind = (own + by) % size, (own - by) % size
        received = [torch.empty(tuple(shape), dtype=dtype, device=self.device) for shape, dtype in awaited]
        sent = [x.contiguous() for x in tensors if x.numel()]
        # a peer is a rank of the world unless it is said to be one of the group
        ops = [dist.P2POp(dist.isend, x, group=group, group_peer=ahead) for x in sent]
        ops += [dist.P2POp(dist.irecv, x, group=group, group_peer=behind) for x in received if x.numel()]
        ranks = [self.at(self.node, n) if ring == "inner" else self.at(n, self.place) for n in (ahead, behind)]
        peers = [self._numbers[rank] for rank in ranks]
        said = [f"sending to rank {peers[0]}"] * len(sent)
        said += [f"receiving from rank {peers[1]}"] * (len(ops) - len(sent))
        if sent:
            self.sent["bytes", self._ring_names[ring], what] += sum(x.nbytes for x in sent)
            self.sent["messages", self._ring_names[ring], what] += 1
        if not ops:
            return Pending(self, (), (), received)
        step_of = f"step {step} of {what}, "
        both = step_of + " and ".join(dict.fromkeys(said))
        with self.said(both):
            works = dist.batch_isend_irecv(ops)
        # some backends have one for all
        where = [step_of + x for x in said] if len(works) == len(ops) else [both] * len(works)
        return Pending(self, list(zip(works, where)), sent, received)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """[ranks, *x.shape]: the x of every rank."""
        found = x.contiguous()[None]
        for ring, group in reversed(self._rings()):
            whole = found.new_empty((group.size() * found.shape[0], *found.shape[1:]))
            self.sent["bytes", ring, "gather"] += (group.size() - 1) * found.nbytes
            self._collective(_GATHER, whole, found, group=group)
            found = whole
        return found

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of their x [ranks, ...] at this rank's number."""
        found = x.contiguous()
        for ring, group in self._rings():
            own = found.new_empty((found.shape[0] // group.size(), *found.shape[1:]))
            self.sent["bytes", ring, "reduce_scatter"] += (group.size() - 1) * own.nbytes
            self._collective(_REDUCE_SCATTER, own, found, group=group)
            found = own
        return found[0]

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of their x, on each of them."""
        found = x.clone(memory_format=torch.contiguous_format)
        for ring, group in self._rings():
            # as much as a rank sends where its parts are reduced in a ring, and gathered
            self.sent["bytes", ring, "sum"] += 2 * found.nbytes * (group.size() - 1) // group.size()
            self._collective(dist.all_reduce, found, group=group)
        return found

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        """[ranks of the inner group, ...]: what each of them has in its x at this rank's number."""
        if self.local == 1:
            return x
        x = x.contiguous()
        found = torch.empty_like(x)
        self.sent["bytes", "inner", "all_to_all"] += (self.local - 1) * (x.nbytes // self.local)
        self.sent["messages", "inner", "all_to_all"] += 1
        self._collective(dist.all_to_all_single, found, x, group=self.groups["inner"])
        return found

    def _rings(self) -> list[tuple[Ring, Any]]:
        """The groups of more than this rank, the outer one first."""
        rings: tuple[Ring, ...] = ("outer", "inner")
        found = [(ring, self.groups[ring]) for ring in rings if ring in self.groups]
        return [(ring, group) for ring, group in found if group.size() > 1]

    def _collective(self, run: Callable[..., Any], *tensors: torch.Tensor, group: Any) -> None:
        with self.said(f"in {run.__name__} of the {group.size()} ranks of {group.group_name!r}"):
            run(*tensors, group=group)
