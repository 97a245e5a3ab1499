"""What a kernel for compute capability 10.0 has beside what gluon_emulator.py runs: tensor memory, and products (tcgen05) in it.

- Products and commits are done at any time after they were issued, those of one warp in the order in which they were issued.
- A commit arrives at its barrier when all products before it are done. Who waits there knows that they are, and what the warp knew
  that issued them.
- A tile of tensor memory is read and written by products and by the threads of a group. A product must be issued by a warp that
  knows of all that threads have done to its tiles; what products of the same warp did comes before it anyway. Threads must know
  that all products that have to do with a tile are done.
- Weights lie over scores: both are the same tile.

What threads load from tensor memory and store there is there afterwards: the compiler waits for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import gluon_emulator as base
import torch
from gluon_emulator import Agent, Barrier, Copy, Fault, Shared, Tile, Value, View, World


class Columns(Tile):
    """A tile of tensor memory. pending: products that may still read or write it."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        super().__init__(name, shape, torch.float32)
        self.pending: list[Product] = []

    def touched(self, agent: Agent) -> None:
        if self.pending:
            raise Fault(f"{agent.name} uses {self.name}, which a product may still use")


class Area:
    """Some of a tile of tensor memory, as numbers of some dtype."""

    def __init__(self, tile: Columns, look: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> None:
        self.tile, self.look = tile, look

    def reinterpret(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Area:
        def look(x: torch.Tensor) -> torch.Tensor:
            found = self.look(x).view(dtype)
            if list(found.shape) != shape:
                raise Fault(f"{self.tile.name} is no {shape}")
            return found

        return Area(self.tile, look)

    _reinterpret = reinterpret

    def slice(self, start: int, length: int) -> Area:
        return Area(self.tile, lambda x: self.look(x).narrow(1, start, length))

    def load(self, layout: Any) -> Value:
        agent = base._current()
        self.tile.touched(agent)
        self.tile.read(agent)
        self.tile.was_read(agent)
        return Value(self.look(self.tile.data).clone())

    def store(self, value: Value) -> None:
        agent = base._current()
        self.tile.touched(agent)
        self.tile.write(agent)
        place = self.look(self.tile.data)
        if value.x.dtype != place.dtype or value.x.shape != place.shape:
            raise Fault(f"{value.x.dtype} {list(value.x.shape)} for {self.tile.name}")
        place.copy_(value.x)
        self.tile.written = (agent.name, agent.clock[agent.name])


class Issued(Copy):
    """What a warp has issued: done at any time, after what it issued before."""

    def __init__(self, agent: Agent) -> None:
        self.agent, self.queue = agent, _queue(agent)
        self.pipe = f"products of {agent.name}"
        self.queue.append(self)
        if self.queue[0] is self:
            agent.world.copies.append(self)

    def done(self) -> None:
        raise NotImplementedError

    def complete(self) -> None:
        self.done()
        self.queue.pop(0)
        if self.queue:
            self.agent.world.copies.append(self.queue[0])


def _queue(agent: Agent) -> list[Issued]:
    return agent.__dict__.setdefault("issued", [])


class Product(Issued):
    """A tcgen05.mma."""

    def __init__(self, agent: Agent, a: Any, b: View, sums: Area, use_acc: bool) -> None:
        super().__init__(agent)
        self.a, self.b, self.sums, self.use_acc = a, b, sums, use_acc
        agent.__dict__["count"] = self.number = agent.__dict__.get("count", 0) + 1
        for x in (a, b):
            if isinstance(x, View):
                x.tile.read(agent)
                if x.tile.unfenced:
                    raise Fault(f"a product reads {x.tile.name} without a fence after its store")
                x.tile.reading.append(self)
        self.columns = [x.tile for x in (a, sums) if isinstance(x, Area)]
        if isinstance(a, Area):
            self._ordered(a.tile, reads=False)
        self._ordered(sums.tile, reads=True)
        for tile in self.columns:
            tile.pending.append(self)

    def _ordered(self, tile: Columns, reads: bool) -> None:
        """Raises Fault if something has been done to a tile that is not known to come before this product."""
        others = [*([tile.written] if tile.written else []), *(tile.reads.items() if reads else ())]
        for who, when in others:
            if who != self.pipe and not self.agent.knows(who, when):
                raise Fault(
                    f"a product of {self.agent.name} uses {tile.name} without knowing that {who} is done with it"
                )

    def done(self) -> None:
        a, b = (x.look(x.tile.data) for x in (self.a, self.b))
        place = self.sums.look(self.sums.tile.data)
        found = a.float() @ b.float()
        if found.shape != place.shape:
            raise Fault(f"a product of {list(found.shape)} in {self.sums.tile.name}")
        if isinstance(self.a, Area) and self.a.tile.written is None:
            raise Fault(f"a product reads {self.a.tile.name}, which nobody has written")
        place.copy_(found + place if self.use_acc else found)
        for x in (self.a, self.b):
            if isinstance(x, View):
                x.tile.reading.remove(self)
            x.tile.reads[self.pipe] = self.number
        self.sums.tile.written, self.sums.tile.reads = (self.pipe, self.number), {}
        for tile in self.columns:
            tile.pending.remove(self)


class Commit(Issued):
    """A tcgen05.commit."""

    def __init__(self, agent: Agent, barrier: Barrier) -> None:
        super().__init__(agent)
        self.barrier = barrier
        self.clock = {**agent.told(), self.pipe: agent.__dict__.get("count", 0)}

    def done(self) -> None:
        self.barrier.arrive(self.clock)


def _product(a: Any, b: View, acc: Area, *, use_acc: Any = True, pred: Any = True) -> None:
    agent = base._current()
    agent.pause()
    if pred:
        Product(agent, a, b, acc, bool(use_acc))


def _commit(barrier: Barrier) -> None:
    agent = base._current()
    agent.pause()
    Commit(agent, barrier)


class Program(base._Program):
    """What the names of modules stand for, those of 10.0 among them."""

    def __init__(self, world: World, number: int) -> None:
        super().__init__(world, number)
        from triton.experimental.gluon.language.nvidia import blackwell

        from attnfuse.kernels.gluon import tensor_memory

        made: list[Columns] = []

        def allocate(dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
            count, *rest = shape
            tiles = [Columns(f"{'scores' if not made else 'sums'}[{i}]", tuple(rest)) for i in range(count)]
            made.extend(tiles)
            if dtype != torch.float32 or sum(math.prod(x.data.shape) // 128 for x in made) > 512:
                raise Fault("tensor memory has 128 rows of 512 columns")
            return Shared([Area(tile) for tile in tiles])

        shared = self.language.allocate_shared_memory

        def typed(dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
            found = shared(dtype, shape, layout)
            found.dtype = dtype
            return found

        self.language.allocate_shared_memory = typed
        specialised = self.language.warp_specialize

        def specialize(given: list[Any], warps: list[int], registers: list[int]) -> None:
            specialised(given, warps, registers)
            if any(isinstance(x, Issued) for x in world.copies):
                raise Fault("products that nobody waits for")

        self.language.warp_specialize = specialize
        self.modules[blackwell.tma.__name__] = SimpleNamespace(store_wait=base._store_wait)
        self.functions |= {
            id(blackwell.TensorMemoryLayout): lambda *given, **named: None,
            id(tensor_memory.registers_of): lambda *given: None,
            id(blackwell.allocate_tensor_memory): allocate,
            id(blackwell.tcgen05_mma): _product,
            id(blackwell.tcgen05_commit): _commit,
        }


def run(kernel: Any, programs: int, arguments: dict[str, Any], seed: int = 0) -> None:
    """As gluon_emulator.run."""
    base.run(kernel, programs, arguments, seed, Program)
