"""The simulator: what a model would send, wait for and hold on a mesh that nobody has to have.

    print(plan(config, tokens=1_000_000, ranks=(16, 8)))          python -m attnfuse plan config.json --tokens 1M --ranks 16x8

Counted, by the same code that plans a real run: the algorithm, the layout, bytes that a rank sends, the steps of a ring and the
tiles of each. Modelled: seconds (account.py), what a rank holds (`Memory`), and collectives outside of attentions (`Edges`).
Nothing is measured, and links are data sheets' (links.py) or the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from attnfuse.distributed import tables
from attnfuse.distributed.account import Account
from attnfuse.distributed.cost import choose, choose_layout, sizes_of
from attnfuse.distributed.layouts import rows_of_rank
from attnfuse.distributed.links import Links, links_of
from attnfuse.distributed.shape import Model
from attnfuse.distributed.traffic import Sent
from attnfuse.spec import dtype_of


@dataclass(frozen=True)
class Layers:
    """Layers with one attention. forward, backward: what the rank that sends most sends in one layer; seconds: of one layer."""

    count: int
    mask: str
    reason: str
    forward: Sent
    backward: Sent
    seconds: tuple[float, float]
    account: Account


@dataclass(frozen=True)
class Memory:
    """Bytes that a rank holds, by the model of `memory_of`.

    parameters, gradients   whole on every rank: sequences are sharded, not parameters; optimizer states are not counted
    activations             what backward needs of own rows, or in inference of one layer
    kv                      of them, or in inference of a cache: own rows of keys and values of all layers
    logits                  own rows in the model's dtype and float32, and with outputs='whole' those of all ranks
    transit                 buffers of one attention
    """

    parameters: int
    gradients: int
    activations: int
    kv: int
    logits: int
    transit: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.activations + self.kv + self.logits + self.transit


@dataclass(frozen=True)
class Edges:
    """Bytes that a rank sends outside of attentions: gradients of parameters summed by a ring all-reduce, and logits gathered."""

    gradients: int
    logits: int


@dataclass(frozen=True)
class Plan:
    """What `plan` finds. Times are in seconds, sizes in bytes, of one rank."""

    model: Model
    tokens: int
    batch: int
    ranks: tuple[int, ...]
    device: str
    links: Links
    trains: bool
    layout: str
    rows: int
    layers: tuple[Layers, ...]
    memory: Memory
    edges: Edges

    @property
    def bytes_sent(self) -> int:
        """In the attentions of all layers, forward and backward."""
        return sum(of.count * (of.forward.total + of.backward.total) for of in self.layers)

    @property
    def seconds(self) -> float:
        """In the attentions of all layers."""
        return sum(of.count * sum(of.seconds) for of in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        found = asdict(self)
        found.update(bytes_sent=self.bytes_sent, seconds=self.seconds)
        found["memory"]["total"] = self.memory.total
        return found

    def __str__(self) -> str:
        return "\n".join(tables.lines(self))


def plan(
    model: Any = None,
    *,
    tokens: int,
    ranks: int | Sequence[int],
    batch: int = 1,
    device: str = "cuda",
    links: Links | None = None,
    layout: str = "auto",
    algorithm: str = "auto",
    heads: int = 1,
    trains: bool = True,
    outputs: str = "whole",
    checkpointing: bool = False,
) -> Plan:
    """Plan a model's attentions over ranks.

    model: a Model, a transformers config or its dict; None for a Llama of 8 billion parameters. tokens: of a sequence; ranks: how
    many, or (nodes, ranks of a node). links: instead of those of the device type. layout, algorithm, heads, outputs: as in
    SequenceParallel. checkpointing: each layer is computed again in backward. Raises ValueError, or ReasonError where heads cannot
    be shared out so.
    """
    shape = model if isinstance(model, Model) else Model() if model is None else Model.from_config(model)
    mesh = (ranks,) if isinstance(ranks, int) else tuple(ranks)
    if tokens < 1 or batch < 1:
        raise ValueError(f"attnfuse: a plan needs tokens and batch elements; got {tokens} and {batch}")
    if outputs not in ("whole", "own"):
        raise ValueError(f"attnfuse: outputs are 'whole' or 'own'; got {outputs!r}")
    links = links or links_of(device)
    attentions = [(spec, sizes_of(spec, trains=trains), count) for spec, count in shape.attentions(tokens, batch)]
    if layout == "auto":
        repeated = [(spec, sizes) for spec, sizes, count in attentions for _ in range(count)]
        layout = choose_layout(repeated, mesh, device, algorithm, heads, links=links)
    layers = []
    for spec, sizes, count in attentions:
        found = choose(spec, sizes, mesh, device, layout, algorithm, heads, links=links)
        forward, backward = found.account.most
        times = found.account.seconds
        layers.append(Layers(count, spec.describe(), found.reason, forward, backward, times, found.account))
    total = math.prod(mesh)
    rows = rows_of_rank(layout, total, tokens)
    memory = memory_of(shape, tokens, batch, rows, total, layers, trains, outputs, checkpointing)
    size = dtype_of(shape.dtype).itemsize
    edges = Edges(
        gradients=2 * (total - 1) * -(-shape.counted_parameters // total) * size * trains,
        logits=(total - 1) * rows * batch * shape.vocab * size * (outputs == "whole"),
    )
    return Plan(shape, tokens, batch, mesh, device, links, trains, layout, rows, tuple(layers), memory, edges)


def memory_of(
    model: Model,
    tokens: int,
    batch: int,
    rows: int,
    ranks: int,
    layers: Sequence[Layers],
    trains: bool,
    outputs: str,
    checkpointing: bool,
) -> Memory:
    """What a rank holds, of `rows` of each sequence.

    Of each row and layer backward needs, in the model's dtype, the inputs of two norms and of two blocks (4 hidden), q, k, v and
    the attention's result, and the MLP's inner rows (3 where it is gated: gate, up and their product; else 2) of each
    expert, and two float32 of statistics a head. With checkpointing it is the input of each layer, and all that of one layer.
    """
    size, own = dtype_of(model.dtype).itemsize, rows * batch
    kv = 2 * model.kv_heads * model.head_size * size * own
    inner = (3 if model.gated else 2) * model.intermediate * model.active
    layer = (4 * model.hidden + 2 * model.heads * model.head_size + inner) * size * own + 8 * model.heads * own
    if not trains:
        activations, kept = layer, kv * model.layers
    elif checkpointing:
        activations, kept = model.layers * model.hidden * size * own + layer, kv
    else:
        activations, kept = model.layers * layer, kv * model.layers
    logits = own * model.vocab * (size + 4 * trains)
    if outputs == "whole" and ranks > 1:
        logits += tokens * batch * model.vocab * size
    return Memory(
        parameters=model.counted_parameters * size,
        gradients=model.counted_parameters * size * trains,
        activations=activations,
        kv=kept,
        logits=logits,
        transit=max(_transit(model, of.account.algorithm, own, tokens * batch, ranks, trains) for of in layers),
    )


def _transit(model: Model, algorithm: str, own: int, tokens: int, ranks: int, trains: bool) -> int:
    """Buffers of one attention: what has come and what is coming, with sums in float32 where gradients travel."""
    if ranks == 1:
        return 0
    size = dtype_of(model.dtype).itemsize
    key, query = 2 * model.kv_heads * model.head_size, model.heads * model.head_size
    if algorithm == "gather":
        return tokens * key * (size + (size + 4) * trains)
    if algorithm.startswith("ulysses"):
        # q, k, v and results of all rows of some heads, and in backward their gradients
        return own * (2 * query + key) * size * (2 if trains else 1)
    if algorithm == "burst" and trains:
        return 2 * own * (2 * query * size + query * 4 + 8 * model.heads)
    return 2 * own * key * (size + 4 * trains)
