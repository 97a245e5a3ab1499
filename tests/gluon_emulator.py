"""Runs the Gluon kernels without a device: their Python functions, with the language replaced by what is here.

Gluon has no interpreter, and what may be wrong in such a kernel is mostly not arithmetic: a product that is not waited for, a tile
that is overwritten while it is read, warps that wait for each other for ever. So values are torch tensors, and what runs at the
same time is modelled:

- The functions of a warp_specialize run as threads, one at a time; which one goes on where they wait is drawn by a seed.
- Copies (TMA) happen at any time between their start and the barrier that waits for them, and put 0 outside of the tensor.
- What is copied or added to a tensor (TMA) is read from its tile at any time before who started it has waited for that, and
  arrives in any order.
- Products (wgmma) happen when they are waited for, with what is in shared memory then; a result that is taken before is an error.
- Barriers (mbarrier) have phases, numbers of arrivals and of bytes. Who waits at one knows from then on of all that was done
  before its phase came to an end (a vector clock for each thread); reading a tile whose copy one does not know to be complete, and
  writing one that others are not known to have read, are errors even where the order of this run was right.
- If nobody can go on, that is an error: a deadlock.

Layouts are not modelled: the compiler holds a kernel to those. A kernel in Triton that goes with them runs too, program by program.
"""

from __future__ import annotations

import builtins
import math
import random
import threading
from collections.abc import Callable
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch

_INTEGERS = (torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64)


class Fault(AssertionError):
    """Something that a device would do wrong, or never."""


# -- values


def _weak(x: Any) -> bool:
    return isinstance(x, (builtins.bool, builtins.int, builtins.float))


def _raw(x: Any, like: torch.dtype | None = None) -> torch.Tensor:
    if isinstance(x, Value):
        return x.x
    if isinstance(x, Token):
        raise Fault("a product is used that was not waited for")
    if isinstance(x, builtins.bool):
        return torch.tensor(x)
    if isinstance(x, builtins.int):
        return torch.tensor(x, dtype=like or torch.int32)
    return torch.tensor(x, dtype=like if like is not None and like.is_floating_point else torch.float32)


def _same(*given: Any) -> list[torch.Tensor]:
    """All in the dtype that Triton would compute in: a number of Python's takes that of the others."""
    dtypes = [_raw(x).dtype for x in given if not _weak(x)]
    dtype = dtypes[0] if dtypes else None
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    if any(isinstance(x, float) for x in given) and dtype in _INTEGERS:
        dtype = torch.float32
    found = [_raw(x, dtype) for x in given]
    return found if dtype is None else [x.to(dtype) for x in found]


class Value:
    """A tensor, or a number that is not known at compile time."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def type(self) -> Any:
        return SimpleNamespace(layout=None)

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Value:
        return Value(self.x.view(dtype) if bitcast else self.x.to(dtype))

    def __getitem__(self, at: Any) -> Value:
        return Value(self.x[at])

    def __bool__(self) -> bool:
        return bool(self.x)

    def __index__(self) -> int:
        return int(self.x)

    def __neg__(self) -> Value:
        return Value(-self.x)

    def _with(self, op: Callable[..., torch.Tensor], a: Any, b: Any) -> Any:
        return NotImplemented if isinstance(b, Pointer) else Value(op(*_same(a, b)))

    def __add__(self, o: Any) -> Any:
        return self._with(torch.add, self, o)

    def __radd__(self, o: Any) -> Any:
        return self._with(torch.add, o, self)

    def __sub__(self, o: Any) -> Any:
        return self._with(torch.sub, self, o)

    def __rsub__(self, o: Any) -> Any:
        return self._with(torch.sub, o, self)

    def __mul__(self, o: Any) -> Any:
        return self._with(torch.mul, self, o)

    __rmul__ = __mul__

    def __truediv__(self, o: Any) -> Any:
        return self._with(torch.true_divide, self, o)

    def __rtruediv__(self, o: Any) -> Any:
        return self._with(torch.true_divide, o, self)

    def __floordiv__(self, o: Any) -> Any:
        return self._with(lambda a, b: torch.div(a, b, rounding_mode="trunc"), self, o)

    def __mod__(self, o: Any) -> Any:
        return self._with(torch.fmod, self, o)

    def __and__(self, o: Any) -> Any:
        return self._with(torch.bitwise_and, self, o)

    __rand__ = __and__

    def __or__(self, o: Any) -> Any:
        return self._with(torch.bitwise_or, self, o)

    __ror__ = __or__

    def __lt__(self, o: Any) -> Any:
        return self._with(torch.lt, self, o)

    def __le__(self, o: Any) -> Any:
        return self._with(torch.le, self, o)

    def __gt__(self, o: Any) -> Any:
        return self._with(torch.gt, self, o)

    def __ge__(self, o: Any) -> Any:
        return self._with(torch.ge, self, o)

    def __eq__(self, o: Any) -> Any:
        return self._with(torch.eq, self, o)

    def __ne__(self, o: Any) -> Any:
        return self._with(torch.ne, self, o)

    __hash__ = None  # type: ignore[assignment]


class Pointer:
    """Addresses of elements of a tensor's memory."""

    def __init__(self, tensor: torch.Tensor, at: torch.Tensor) -> None:
        self.tensor, self.at = tensor, at

    @staticmethod
    def of(x: torch.Tensor) -> Pointer:
        flat = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
        return Pointer(flat, torch.tensor(x.storage_offset()))

    def __add__(self, o: Any) -> Pointer:
        return Pointer(self.tensor, self.at + _raw(o).long())

    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=self.tensor.dtype)

    def _places(self, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
        kept = torch.tensor(True) if mask is None else _raw(mask)
        at, kept = torch.broadcast_tensors(self.at, kept)
        if bool((kept & ((at < 0) | (at >= self.tensor.numel()))).any()):
            raise Fault("an address outside of a tensor's memory")
        return at.where(kept, 0), kept


# -- what runs at the same time


class Agent(threading.Thread):
    """One function of a warp_specialize, or what comes before it."""

    def __init__(self, world: World, name: str, run: Callable[[], object]) -> None:
        super().__init__(name=name, daemon=True)
        self.world, self.body = world, run
        self.turn = threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True
        self.waits_for = ""
        self.clock: dict[str, int] = {name: 1}
        self.products: list[Product] = []
        self.fenced = True
        self.stores: list[Store] = []
        self.over = False

    def run(self) -> None:
        self.turn.acquire()
        try:
            if not self.world.failed:
                self.body()
                if self.products:
                    raise Fault(f"{self.name} ends with products that it has not waited for")
                if self.stores:
                    raise Fault(f"{self.name} ends before what it stores was read")
        except BaseException as error:
            self.world.failed = self.world.failed or error
        self.over = True
        self.world.turn.release()

    def pause(self, ready: Callable[[], bool] = lambda: True, why: str = "") -> None:
        """Let others go on, and wait until `ready`."""
        self.ready, self.waits_for = ready, why
        self.world.turn.release()
        self.turn.acquire()
        if self.world.failed:
            raise SystemExit

    def knows(self, who: str, when: int) -> bool:
        return self.clock.get(who, 0) >= when

    def learn(self, clock: dict[str, int]) -> None:
        for who, when in clock.items():
            self.clock[who] = max(self.clock.get(who, 0), when)

    def told(self) -> dict[str, int]:
        """What others learn from it now; what it does from now on comes later."""
        found = dict(self.clock)
        self.clock[self.name] += 1
        return found


class Tile:
    """One tile in shared memory, with who has read and written it. Accesses are (name, time by its clock)."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.name = name
        self.data = torch.full(shape, math.nan).to(dtype)
        self.written: tuple[str, int] | None = None
        self.reads: dict[str, int] = {}
        self.copying: Copy | None = None
        self.reading: list[Product] = []
        self.unfenced = False

    def read(self, agent: Agent) -> None:
        if self.copying is not None:
            raise Fault(f"{agent.name} reads {self.name}, whose copy is not complete")
        if self.written is None or not agent.knows(*self.written):
            raise Fault(f"{agent.name} reads {self.name} without having waited for its barrier")

    def write(self, agent: Agent) -> None:
        if self.copying is not None:
            raise Fault(f"{agent.name} writes {self.name}, which is being copied to")
        if self.reading:
            raise Fault(f"{agent.name} writes {self.name}, which a product of {self.reading[0].agent.name} reads")
        for who, when in [*self.reads.items(), *([self.written] if self.written else [])]:
            if not agent.knows(who, when):
                raise Fault(f"{agent.name} writes {self.name} without knowing that {who} is done with it")
        self.reads = {}

    def was_read(self, agent: Agent) -> None:
        self.reads[agent.name] = agent.clock[agent.name]


class View:
    """A tile as a product takes it: reshaped and permuted."""

    def __init__(self, tile: Tile, look: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> None:
        self.tile, self.look = tile, look

    def reshape(self, shape: list[int]) -> View:
        return View(self.tile, lambda x: self.look(x).view(shape))

    def permute(self, order: tuple[int, ...]) -> View:
        return View(self.tile, lambda x: self.look(x).permute(order))

    def slice(self, start: int, size: int, dim: int) -> View:
        return View(self.tile, lambda x: self.look(x).narrow(dim, start, size))

    @property
    def dtype(self) -> torch.dtype:
        return self.tile.data.dtype

    def load(self, layout: Any) -> Value:
        agent = _current()
        self.tile.read(agent)
        self.tile.was_read(agent)
        return Value(self.look(self.tile.data).clone())

    def store(self, value: Value) -> None:
        agent = _current()
        self.tile.write(agent)
        self.look(self.tile.data).copy_(_raw(value))
        self.tile.written = (agent.name, agent.clock[agent.name])
        self.tile.unfenced = True


class Shared:
    """An array of tiles, or of barriers, in shared memory."""

    def __init__(self, made: list[Any]) -> None:
        self.made = made

    def index(self, i: Any) -> Any:
        i = int(i)
        if not 0 <= i < len(self.made):
            raise Fault(f"place {i} of {len(self.made)} in shared memory")
        return self.made[i]


class Barrier:
    """An mbarrier."""

    def __init__(self, name: str) -> None:
        self.name, self.count = name, 0
        self.missing = self.bytes = self.phase = 0
        # of the phases that are over, and of this one
        self.known: dict[str, int] = {}
        self.gathered: dict[str, int] = {}

    def _add(self, clock: dict[str, int]) -> None:
        for who, when in clock.items():
            self.gathered[who] = max(self.gathered.get(who, 0), when)

    def arrive(self, clock: dict[str, int]) -> None:
        if not self.count:
            raise Fault(f"{self.name} is used before it is there")
        if self.missing == 0:
            raise Fault(f"too many arrive at {self.name}")
        self.missing -= 1
        self._add(clock)
        self._end()

    def arrived(self, size: int, clock: dict[str, int]) -> None:
        self.bytes -= size
        self._add(clock)
        self._end()

    def _end(self) -> None:
        if self.missing == 0 and self.bytes == 0:
            self.phase += 1
            self.missing = self.count
            self.known, self.gathered = {**self.known, **self.gathered}, {}


class Copy:
    """A tile on its way from a tensor to shared memory."""

    def __init__(self, agent: Agent, data: torch.Tensor, tile: Tile, barrier: Barrier, number: int) -> None:
        self.data, self.tile, self.barrier = data, tile, barrier
        self.name = f"copy {number}"
        self.clock = {**agent.clock, self.name: 1}

    def complete(self) -> None:
        self.tile.data = self.data
        self.tile.copying = None
        self.tile.written = (self.name, 1)
        self.barrier.arrived(self.data.numel() * self.data.element_size(), self.clock)


class Store:
    """A tile on its way from shared memory to a tensor, where it is added to what is there or replaces it."""

    def __init__(self, agent: Agent, tensor: Descriptor, place: Any, tile: Tile, adds: bool) -> None:
        agent.world.made += 1
        self.name, self.tensor, self.tile, self.adds = f"store {agent.world.made}", tensor, tile, adds
        self.there, self.here = tensor.within(place)
        # who writes the tile next has to know that this was read
        tile.reads[self.name] = 1

    def complete(self) -> None:
        data = self.tile.data[self.here]
        self.tensor.x[self.there] = self.tensor.x[self.there] + data if self.adds else data


class Product:
    """A wgmma that runs. result is None until it was waited for."""

    def __init__(self, agent: Agent, a: Any, b: View, sums: Any, use_acc: bool) -> None:
        self.agent, self.a, self.b, self.sums, self.use_acc = agent, a, b, sums, use_acc
        self.tiles = [x.tile for x in (a, b) if isinstance(x, View)]
        self.result: Value | None = None
        for tile in self.tiles:
            tile.read(agent)
            if tile.unfenced:
                raise Fault(f"a product reads {tile.name} without a fence after its store")
            tile.reading.append(self)

    def complete(self) -> None:
        a, b = (x.look(x.tile.data) if isinstance(x, View) else _raw(x) for x in (self.a, self.b))
        found = a.float() @ b.float()
        if self.use_acc:
            # one product after the other: the one that made the sums is complete
            sums = self.sums.product.result if isinstance(self.sums, Token) else self.sums
            found = found + _raw(sums)
        self.result = Value(found)
        for tile in self.tiles:
            tile.reading.remove(self)
            tile.was_read(self.agent)


class Token:
    """What a product will be."""

    def __init__(self, product: Product) -> None:
        self.product = product


class World:
    """One program."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.turn = threading.Semaphore(0)
        self.failed: BaseException | None = None
        self.copies: list[Copy | Store] = []
        self.made = 0

    def go(self, agents: list[Agent]) -> None:
        """Run them to their ends. Raises what they raise, and Fault where none can go on."""
        for agent in agents:
            agent.start()
        while not all(a.over for a in agents):
            able = [a for a in agents if not a.over and (self.failed or a.ready())]
            choice = self.random.choice([*able, *self.copies]) if able or self.copies else None
            if choice is None:
                said = "; ".join(f"{a.name} waits for {a.waits_for}" for a in agents if not a.over)
                self.failed = Fault(f"a deadlock: {said}")
            elif isinstance(choice, (Copy, Store)) and not self.failed:
                self.copies.remove(choice)
                choice.complete()
            else:
                agent = choice if isinstance(choice, Agent) else able[0]
                agent.turn.release()
                self.turn.acquire()
        for agent in agents:
            agent.join()
        if self.failed:
            raise self.failed


def _current() -> Agent:
    found = threading.current_thread()
    assert isinstance(found, Agent)
    return found


# -- the language


class Descriptor:
    """A tensor descriptor."""

    def __init__(self, made: Any) -> None:
        self.x = made.base.as_strided(made.shape, made.strides)
        self.dtype, self.layout = self.x.dtype, None
        size = math.prod(made.block_shape) * self.x.element_size()
        self.block_type = SimpleNamespace(shape=list(made.block_shape), nbytes=size)

    def within(self, place: Any) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Of the block at `place`, what lies in the tensor: where there, and where in the block."""
        there, here = [], []
        for first, size, whole in zip(map(int, place), self.block_type.shape, self.x.shape, strict=True):
            low, high = min(max(first, 0), whole), max(min(first + size, whole), 0)
            there.append(slice(low, max(low, high)))
            here.append(slice(low - first, max(low, high) - first))
        return tuple(there), tuple(here)


def _copy_in(tensor: Descriptor, place: Any, barrier: Barrier, view: View) -> None:
    agent = _current()
    agent.pause()
    tile = view.tile
    tile.write(agent)
    there, here = tensor.within(place)
    data = torch.zeros(tensor.block_type.shape, dtype=tensor.dtype)
    data[here] = tensor.x[there]
    tile.data = torch.full_like(data, math.nan)
    agent.world.made += 1
    tile.copying = Copy(agent, data, tile, barrier, agent.world.made)
    tile.unfenced = False
    agent.world.copies.append(tile.copying)


def _out(adds: bool) -> Callable[[Descriptor, Any, View], None]:
    def run(tensor: Descriptor, place: Any, view: View) -> None:
        agent = _current()
        view.tile.read(agent)
        if view.tile.unfenced:
            raise Fault(f"{view.tile.name} is copied from without a fence after its store")
        if tuple(tensor.block_type.shape) != tuple(view.look(view.tile.data).shape) or tensor.dtype != view.dtype:
            raise Fault(f"{view.tile.name} is no block of the tensor that it is copied to")
        agent.stores.append(Store(agent, tensor, place, view.tile, adds))
        agent.world.copies.append(agent.stores[-1])

    return run


def _store_wait(pendings: int) -> None:
    agent = _current()
    agent.pause()
    while len(agent.stores) > pendings:
        store = agent.stores.pop(0)
        if store in agent.world.copies:
            agent.world.copies.remove(store)
            store.complete()
        agent.learn({store.name: 1})


class _Fence:
    """fence_async_shared: what this agent stored is seen by copies and products from now on."""

    def __init__(self, tiles: list[Tile]) -> None:
        self.tiles = tiles

    def __call__(self) -> None:
        name = _current().name
        for tile in self.tiles:
            if tile.written and tile.written[0] == name:
                tile.unfenced = False


def _init(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.missing = count


def _wait(barrier: Barrier, phase: Any, pred: Any = True) -> None:
    if not pred:
        return
    agent = _current()
    parity = int(phase)
    if parity not in (0, 1):
        raise Fault(f"phase {parity} of {barrier.name}")
    agent.pause(lambda: barrier.phase & 1 != parity, f"{barrier.name} (phase {parity})")
    agent.learn(barrier.known)


def _arrive(barrier: Barrier, *, count: int = 1, pred: Any = True) -> None:
    if not pred:
        return
    agent = _current()
    agent.pause()
    clock = agent.told()
    for _ in range(count):
        barrier.arrive(clock)


def _expect(barrier: Barrier, size: int, pred: Any = True) -> None:
    if pred:
        barrier.bytes += size
        barrier.arrive(_current().told())


def _product(a: Any, b: View, acc: Any, *, use_acc: Any = True, is_async: bool = False) -> Any:
    agent = _current()
    if isinstance(a, Token):
        raise Fault("a product of what was not waited for")
    made = Product(agent, a, b, acc, bool(use_acc))
    agent.products.append(made)
    if is_async:
        return Token(made)
    return _product_wait(0, [Token(made)])


def _product_wait(num_outstanding: int = 0, deps: Any = ()) -> Any:
    agent = _current()
    agent.pause()
    while len(agent.products) > num_outstanding:
        agent.products.pop(0).complete()
    found = []
    for x in deps:
        if isinstance(x, Token):
            if x.product.result is None:
                raise Fault("a wait gives a product that may still run")
            x = x.product.result
        found.append(x)
    return found[0] if len(found) == 1 else tuple(found)


def _without_nan(x: torch.Tensor, other: float) -> torch.Tensor:
    # maxima and minima of a device skip NaN
    return x.where(~x.isnan(), other) if x.is_floating_point() else x


def _reduced(op: Callable[..., torch.Tensor], other: float) -> Callable[..., Value]:
    def run(x: Value, axis: int, keep_dims: bool = False) -> Value:
        return Value(op(_without_nan(x.x, other), dim=axis, keepdim=keep_dims))

    return run


def _one(op: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Value], Value]:
    return lambda x: Value(op(_raw(x)))


def _two(of_floats: Callable[..., torch.Tensor], of_integers: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def run(a: Any, b: Any) -> Any:
        x, y = _same(a, b)
        return Value((of_floats if x.is_floating_point() else of_integers)(x, y))

    return run


def _where(keep: Any, a: Any, b: Any) -> Value:
    x, y = _same(a, b)
    return Value(torch.where(_raw(keep).bool(), x, y))


def _load(at: Pointer, mask: Any = None, other: Any = 0) -> Value:
    places, kept = at._places(mask)
    return Value(at.tensor[places].where(kept, torch.tensor(other, dtype=at.tensor.dtype)))


def _store(at: Pointer, value: Any, mask: Any = None) -> None:
    places, kept = at._places(mask)
    x = torch.broadcast_to(_raw(value).to(at.tensor.dtype), places.shape)
    at.tensor[places[kept]] = x[kept]


def _atomic_max(at: Pointer, value: Any, sem: str = "") -> None:
    places, _ = at._places(None)
    at.tensor[places] = torch.maximum(at.tensor[places], _raw(value).to(at.tensor.dtype))


def _assembly(text: str, constraints: str, given: list[Value], **rest: Any) -> Value:
    if not text.startswith("tanh.approx.f32"):
        raise Fault(f"no emulation of {text}")
    # an error of up to 2^-11
    return Value(given[0].x.tanh().half().float())


def _full(shape: Any, value: Any, dtype: torch.dtype, layout: Any = None) -> Value:
    return Value(torch.full(tuple(shape), value, dtype=dtype))


def _language(world: World, number: int) -> dict[str, Any]:
    """What `gl` and `tl` have."""
    tiles: list[Tile] = []
    arrays: list[Shared] = []

    def allocate(dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
        count, *rest = shape
        names = [f"array {len(arrays)}[{i}]" for i in range(count)]
        if dtype == torch.int64:
            arrays.append(Shared([Barrier(name) for name in names]))
        else:
            made = [Tile(name, tuple(rest), dtype) for name in names]
            tiles.extend(made)
            arrays.append(Shared([View(tile) for tile in made]))
        return arrays[-1]

    def specialize(given: list[Any], warps: list[int], registers: list[int]) -> None:
        if not len(given) - 1 == len(warps) == len(registers):
            raise Fault("a warp_specialize with other numbers of functions, warps and registers")
        before = _current().told()
        agents = []
        for i, (run, arguments) in enumerate(given):
            agents.append(Agent(world, f"{run.name} {i}", lambda run=run, arguments=arguments: run(*arguments)))
            agents[-1].learn(before)
        world.go(agents)

    nothing = SimpleNamespace
    return {
        "fence": _Fence(tiles),
        "program_id": lambda axis: Value(torch.tensor(number, dtype=torch.int32)),
        "allocate_shared_memory": allocate,
        "warp_specialize": specialize,
        "static_range": range,
        "arange": lambda a, b, layout=None: Value(torch.arange(a, b, dtype=torch.int32)),
        "full": _full,
        "zeros": lambda shape, dtype, layout=None: _full(shape, 0, dtype),
        "to_tensor": lambda x: Value(_raw(x)),
        "atomic_max": _atomic_max,
        "zeros_like": lambda x: Value(torch.zeros_like(_raw(x))),
        "expand_dims": lambda x, at: Value(_raw(x).unsqueeze(at)),
        "convert_layout": lambda x, layout: Value(_raw(x)),
        "cdiv": lambda a, b: (a + b - 1) // b,
        "where": _where,
        "maximum": _two(torch.fmax, torch.maximum),
        "minimum": _two(torch.fmin, torch.minimum),
        "max": _reduced(torch.amax, -math.inf),
        "min": _reduced(torch.amin, math.inf),
        "sum": lambda x, axis, keep_dims=False: Value(x.x.sum(axis, keepdim=keep_dims)),
        "exp2": _one(torch.exp2),
        "log2": _one(torch.log2),
        "rsqrt": _one(torch.rsqrt),
        "abs": _one(torch.abs),
        "inline_asm_elementwise": _assembly,
        "load": _load,
        "store": _store,
        "NVMMADistributedLayout": nothing,
        "DotOperandLayout": nothing,
        "SliceLayout": lambda dim, parent: None,
        "BlockedLayout": lambda *given: None,
        "SwizzledSharedLayout": lambda *given: None,
        "NVMMASharedLayout": nothing(get_default_for=lambda shape, dtype: None),
        "constexpr": None,
        **{name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "int32", "int64", "uint8")},
        "int1": torch.bool,
    }


class _Function:
    """A jitted function as Python runs it, with other globals."""

    def __init__(self, made: Any, globals_of: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.name, self._made, self._globals_of = made.fn.__name__, made, globals_of

    def __call__(self, *given: Any, **named: Any) -> Any:
        f = self._made.fn
        return FunctionType(f.__code__, self._globals_of(f.__globals__), f.__name__, f.__defaults__)(*given, **named)


class _Program:
    """What the names of modules stand for in one program."""

    def __init__(self, world: World, number: int) -> None:
        from triton.experimental.gluon.language.nvidia import hopper

        from attnfuse.kernels.gluon import hopper as kernel
        from attnfuse.kernels.gluon import hopper_gradients

        language = _language(world, number)
        self.language = SimpleNamespace(**language)
        self.modules = {
            "triton.language": self.language,
            "triton.experimental.gluon.language": self.language,
            hopper.mbarrier.__name__: SimpleNamespace(
                init=_init, wait=_wait, arrive=_arrive, expect=_expect, MBarrierLayout=lambda: None
            ),
            hopper.tma.__name__: SimpleNamespace(store_wait=_store_wait),
        }
        self.functions = {
            id(hopper.warpgroup_mma): _product,
            id(hopper.warpgroup_mma_wait): _product_wait,
            id(hopper.fence_async_shared): language["fence"],
            id(kernel.copy_in): _copy_in,
            id(kernel.copy_out): _out(adds=False),
            id(hopper_gradients.add_out): _out(adds=True),
        }
        self.known: dict[int, dict[str, Any]] = {}

    def globals_of(self, given: dict[str, Any]) -> dict[str, Any]:
        if id(given) not in self.known:
            found = self.known[id(given)] = {"__builtins__": builtins}
            found.update({name: self.value(x) for name, x in given.items() if not name.startswith("__")})
        return self.known[id(given)]

    def value(self, x: Any) -> Any:
        from triton.language import constexpr
        from triton.runtime.jit import JITFunction

        if isinstance(x, JITFunction):
            return _Function(x, self.globals_of)
        if isinstance(x, ModuleType):
            return self.modules.get(x.__name__, x)
        return x.value if isinstance(x, constexpr) else self.functions.get(id(x), x)

    def argument(self, x: Any, constant: bool) -> Any:
        if isinstance(x, tuple):
            return tuple(self.argument(y, constant) for y in x)
        if isinstance(x, torch.Tensor):
            return Pointer.of(x)
        if hasattr(x, "block_shape"):
            return Descriptor(x)
        number = isinstance(x, int) and not isinstance(x, bool)
        # as a launch does, 1 is known to the compiler
        return Value(torch.tensor(x, dtype=torch.int32)) if number and not constant and x != 1 else self.value(x)


def run(
    kernel: Any, programs: int, arguments: dict[str, Any], seed: int = 0, made: type[_Program] | None = None
) -> None:
    """Run all programs of a launch, one after the other. Raises Fault, and what else goes wrong in the kernel.

    made: a program whose modules have more than those of 9.0.
    """
    for number in range(programs):
        world = World(seed + number)
        program = (made or _Program)(world, number)
        given = {
            name: program.argument(arguments[name], kernel.params[i].is_constexpr)
            for i, name in enumerate(kernel.arg_names)
        }
        function = _Function(kernel, program.globals_of)
        outer = Agent(world, "program", lambda function=function, given=given: function(**given))
        # what comes before the functions at the same time runs alone
        outer.turn.release()
        outer.start()
        outer.join()
        if world.failed:
            raise world.failed
