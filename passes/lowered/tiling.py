"""Tiling-AllReduce: a product whose result is all-reduced becomes blocks of rows, and the sum over ranks of one block is on its way
while the product of the next one is computed.

In tensor-parallel models that are the linear layers of DTensor's RowwiseParallel, forward, and the gradients of the inputs of
ColwiseParallel, backward: `mm` or `addmm` (or sums and casts of such), views that leave elements in their order, all_reduce, wait.
Of it come, for each block, the product of its rows and an all_reduce that starts at once; the waits are where the wait was, and
after them the blocks are put together. `bmm` is left alone, and so is whatever else reads the product.

All ranks must cut alike. The number of blocks depends on what is all-reduced, which is equal on them, and where it is chosen here
also on the number of columns that a product sums over: the caller sees to it that this is equal too.

Source: Lin et al. 2024, arXiv:2410.16663, tiling-AllReduce.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from attnfuse import reasons
from attnfuse._compat import OpOverload
from attnfuse.distributed.links import REACHED, Links, links_of
from attnfuse.reasons import Reason, ReasonError

#: What leaves elements in their order.
_VIEWS = frozenset({"aten::view", "aten::_unsafe_view", "aten::reshape"})
_CASTS = frozenset({"aten::_to_copy", "prims::convert_element_type"})
_ALL_REDUCE, _WAIT = "_c10d_functional::all_reduce", "_c10d_functional::wait_tensor"
#: Rows of a block are a multiple of this: libraries compute rows of a smaller product by other kernels.
ROWS = 16
#: Numbers of blocks that are tried, and the part of the time that they must save.
_TRIED = (2, 3, 4, 6, 8, 12, 16)
_WORTH = 0.05


@dataclass(frozen=True)
class Tiled:
    """What was done to one all_reduce: blocks of so many rows, of `columns` elements, over so many ranks."""

    blocks: int
    rows: int
    columns: int
    ranks: int

    def __str__(self) -> str:
        return f"{self.blocks} x {self.rows} rows of {self.columns} over {self.ranks} ranks"


@dataclass
class Found:
    """The all_reduces of a graph: what was cut, and why the others were not."""

    tiled: list[Tiled] = field(default_factory=list)
    left: list[Reason] = field(default_factory=list)

    def line(self, graph: str) -> str:
        """For a report; empty where there was none. graph: 'forward' or 'backward'."""
        if not self.tiled and not self.left:
            return ""
        parts = [f"{len(self.tiled)} of {len(self.tiled) + len(self.left)} all-reduces of the {graph} graph in blocks"]
        parts += [f"{self.tiled.count(x)} of {x}" for x in dict.fromkeys(self.tiled)]
        parts += [f"{self.left.count(x)} left: {x}" for x in dict.fromkeys(self.left)]
        return "; ".join(parts)


def reduces(graph: fx.Graph) -> bool:
    """Whether there is an all_reduce."""
    return any(_name(node) == _ALL_REDUCE for node in graph.nodes)


def tile(graph: fx.Graph, blocks: int | None, ranks_of: Callable[[str], int], even: bool = True) -> Found:
    """Cut the products of a graph after AOTAutograd whose results are all-reduced.

    blocks: how many; None for the number that `best` gives, which is for graphs of which all ranks have the same sizes (`even`).
    ranks_of: the size of the process group of a name, or ValueError. Where it raises the graph may be half changed.
    """
    found = Found()
    for node in list(graph.nodes):
        if _name(node) != _ALL_REDUCE:
            continue
        try:
            found.tiled.append(_tiled(graph, node, blocks, ranks_of, even))
        except ReasonError as error:
            found.left.append(error.reason)
    if found.tiled:
        graph.lint()
    return found


def best(rows: int, inner: int, columns: int, size: int, ranks: int, links: Links) -> int:
    """How many blocks of a product [rows, inner] @ [inner, columns], of elements of `size` bytes, take the least time with their
    all_reduces, 1 where they save nothing to speak of. inner: of several products that are added, their sum.

    A block's all_reduce runs while the next block's product does, and after that of the block before. It takes
    2 log2(ranks) latencies and sends 2 (ranks - 1) / ranks of its bytes; products reach links.REACHED of the peak, in 32 bits of
    half of that, and begin after one latency.
    """
    within = ranks <= links.node
    latency, speed = (links.latency, links.within) if within else (links.far_latency, links.between)
    flops = links.flops * REACHED * min(2.0 / size, 1.0)

    def seconds(count: int) -> float:
        part = _part(rows, count)
        product = links.latency + 2.0 * part * inner * columns / flops
        sent = 2.0 * (ranks - 1) / ranks * part * columns * size
        reduced = 2.0 * math.ceil(math.log2(ranks)) * latency + sent / speed
        number = -(-rows // part)
        return product + (number - 1) * max(product, reduced) + reduced

    if ranks < 2:
        return 1
    least = min(_TRIED, key=seconds)
    return least if seconds(least) <= (1.0 - _WORTH) * seconds(1) and _part(rows, least) < rows else 1


def _part(rows: int, blocks: int) -> int:
    """Rows of a block: the last one may have fewer."""
    return -(-rows // (blocks * ROWS)) * ROWS if blocks > 1 else rows


def _tiled(graph: fx.Graph, reduced: fx.Node, blocks: int | None, ranks_of: Callable[[str], int], even: bool) -> Tiled:
    """Raises ReasonError where it is left alone."""
    partial, how, name = _arguments(reduced)
    if how != "sum":
        raise ReasonError(reasons.TILING_REDUCTION(how=how))
    wait = next(iter(reduced.users), None)
    if wait is None or len(reduced.users) != 1 or _name(wait) != _WAIT:
        raise ReasonError(reasons.TILING_WAIT())
    tree = list(_tree(partial))
    products = [node for node in tree if _is_product(node)]
    shape = products[0].meta["val"].shape
    if any(not isinstance(n, int) for product in products for n in _sizes(product)):
        raise ReasonError(reasons.TILING_SYMBOLIC())
    if any(product.meta["val"].shape != shape for product in products):
        raise ReasonError(reasons.TILING_NO_PRODUCT())
    try:
        ranks = ranks_of(name)
    except ValueError as error:
        raise ReasonError(reasons.TILING_GROUP(error=str(error))) from None
    rows, columns = shape
    if blocks is None and not even:
        raise ReasonError(reasons.TILING_UNEVEN())
    value = reduced.meta["val"]
    inner = sum(_sizes(product)[2] for product in products)
    count = blocks or best(rows, inner, columns, value.element_size(), ranks, links_of(value.device.type))
    part = _part(rows, count)
    if ranks < 2 or count < 2 or part >= rows:
        raise ReasonError(reasons.TILING_SMALL(rows=rows, columns=columns, ranks=ranks))

    started = []
    with graph.inserting_before(reduced):
        for start in range(0, rows, part):
            own = _block(graph, partial, start, min(start + part, rows), rows)
            started.append(_call(graph, reduced, (own, how, name)))
    with graph.inserting_before(wait):
        ready = [_call(graph, wait, (one,)) for one in started]
        whole = _call(graph, torch.ops.aten.cat.default, (ready,), like=wait)
        if tuple(value.shape) != (rows, columns):
            whole = _call(graph, torch.ops.aten.view.default, (whole, list(value.shape)), like=wait)
    wait.replace_all_uses_with(whole)
    # nothing that finds dead code takes an all_reduce for dead
    for gone in (wait, reduced, *tree):
        graph.erase_node(gone)
    return Tiled(len(started), part, columns, ranks)


def _arguments(reduced: fx.Node) -> tuple[fx.Node, str, str]:
    """(what is summed, how, name of the group)."""
    if len(reduced.args) != 3 or reduced.kwargs:
        raise ReasonError(reasons.TILING_NO_PRODUCT())
    partial, how, name = reduced.args
    if not (isinstance(partial, fx.Node) and isinstance(how, str) and isinstance(name, str)):
        raise ReasonError(reasons.TILING_NO_PRODUCT())
    return partial, how, name


def _tree(node: fx.Node) -> Iterator[fx.Node]:
    """Products, their sums, casts and views, each before what it is made of. ReasonError where there is anything else."""
    if len(node.users) != 1:
        raise ReasonError(reasons.TILING_USERS())
    yield node
    if _is_product(node):
        return
    sources = _sources(node)
    if not sources:
        raise ReasonError(reasons.TILING_NO_PRODUCT())
    for source in sources:
        yield from _tree(source)


def _sources(node: fx.Node) -> list[fx.Node]:
    """What a sum, a cast or a view is made of, element by element; empty for anything else."""
    name, value = _name(node), node.meta.get("val")
    takes_two = name == "aten::add"
    if not (takes_two or name in _VIEWS or (name in _CASTS and set(node.kwargs) <= {"dtype"})):
        return []
    sources = [x for x in node.args[: 1 + takes_two] if isinstance(x, fx.Node)]
    # a number, or one that is broadcast
    alike = name in _VIEWS or all(x.meta["val"].shape == value.shape for x in sources)  # type: ignore[union-attr]
    return sources if alike and len(sources) == 1 + takes_two and len(set(sources)) == len(sources) else []


def _is_product(node: fx.Node) -> bool:
    return _name(node) in ("aten::mm", "aten::addmm") and "val" in node.meta


def _sizes(product: fx.Node) -> tuple[Any, Any, Any]:
    """(rows, columns, what it sums over)."""
    left = product.args[-2]
    assert isinstance(left, fx.Node)
    rows, columns = product.meta["val"].shape
    return rows, columns, left.meta["val"].shape[-1]


def _block(graph: fx.Graph, node: fx.Node, start: int, stop: int, rows: int) -> fx.Node:
    """Rows [start, stop) of what `node` is a view of, computed by themselves: [stop - start, columns]."""

    def of(x: Any) -> Any:
        return _block(graph, x, start, stop, rows)

    name = _name(node)
    if name in _VIEWS:
        return of(node.args[0])  # type: ignore[no-any-return]
    if not _is_product(node):
        takes_two = name == "aten::add"
        return _call(graph, node, (*map(of, node.args[: 1 + takes_two]), *node.args[1 + takes_two :]), node.kwargs)
    *bias, left, right = node.args
    given = []
    for x in (*bias, left):
        assert isinstance(x, fx.Node)
        value = x.meta["val"]
        own = x is left or (value.dim() == 2 and value.shape[0] != 1)
        given.append(_call(graph, torch.ops.aten.slice.Tensor, (x, 0, start, stop), like=node) if own else x)
    return _call(graph, node, (*given, right), node.kwargs)


def _call(
    graph: fx.Graph,
    what: fx.Node | OpOverload,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    like: fx.Node | None = None,
) -> fx.Node:
    """A call with its value. what: an op, or a node whose op and origin are taken; like: a node whose origin is."""
    if isinstance(what, fx.Node):
        like, target = what, what.target
    else:
        target = what
    made = graph.call_function(target, args, dict(kwargs or {}))  # type: ignore[arg-type]
    made.meta = {k: v for k, v in like.meta.items() if k not in ("val", "tensor_meta")} if like is not None else {}
    values: Any = fx.node.map_arg((args, dict(kwargs or {})), lambda x: x.meta["val"])
    made.meta["val"] = target(*values[0], **values[1])  # type: ignore[operator]
    return made


def _name(node: object) -> str:
    target = getattr(node, "target", None)
    return target._schema.name if isinstance(target, OpOverload) else ""
