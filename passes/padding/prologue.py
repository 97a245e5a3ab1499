"""What is looked at before a graph on packed rows runs: where tokens are, how many, and whether what it counts on holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from attnfuse import reasons
from attnfuse.passes.emit.edits import EmitError, known
from attnfuse.passes.emit.emitter import Emitter
from attnfuse.passes.emit.writer import NodeWriter, is_pure
from attnfuse.passes.graph.aten import value_of
from attnfuse.passes.graph.memory import opaque
from attnfuse.passes.padding.exits import Guard
from attnfuse.passes.padding.kept import Labelled
from attnfuse.passes.padding.rowwise import Rows
from attnfuse.passes.padding.whole import Whole
from attnfuse.passes.site import Leaf


@dataclass(frozen=True, eq=False)
class Prologue:
    """module: of the inputs of the graph: (numbers int64 [rows + guards], for each of the rows the places [B, N] that are tokens).
    The numbers are how many tokens there are, and for each guard whether it holds, 1 or 0. guards: what they say."""

    module: fx.GraphModule
    guards: tuple[str, ...]


def prologue(emitter: Emitter, region: Whole) -> Prologue:
    """That of a region, before it is written. Raises EmitError where it would read more than small tensors of the batch."""
    view = emitter.view
    scope = view.scopes[0]
    graph = scope.module.graph
    before = set(graph.nodes)
    owner = next(n for n in reversed(graph.nodes) if n.op == "output")
    try:
        writer = NodeWriter(emitter, scope, owner, value_of(region.attentions[0].original.q.node).device)
        with graph.inserting_before(owner):
            results = _written(writer, region)
        return Prologue(_apart(emitter, results, before), tuple(map(str, region.guards)))
    finally:
        for node in reversed([n for n in graph.nodes if n not in before]):
            graph.erase_node(node)


def _written(writer: NodeWriter, region: Whole) -> list[fx.Node]:
    """[numbers, masks]."""
    masks: dict[Rows, fx.Node] = {}
    for rows in region.kept:
        assert rows.kept is not None
        if isinstance(rows.kept, Labelled):
            masks[rows] = _labelled(writer, rows, rows.kept)
            continue
        labels = ((rows.sequence,), (rows.place,))
        leaf = Leaf(region.entries[0].node, labels, made=rows.kept.condition, dtype=torch.bool)
        masks[rows] = writer.canonical(leaf, (rows.sequence,), (rows.place,))
    numbers = [writer.method("sum", mask) for mask in masks.values()]
    numbers += [writer.method("to", _guarded(writer, guard, masks[guard.rows]), torch.int64) for guard in region.guards]
    return [writer.call(torch.stack, (numbers,)), *masks.values()]


def _labelled(writer: NodeWriter, rows: Rows, kept: Labelled) -> fx.Node:
    """The places up to the last label that counts."""
    call = writer.call
    line = call(torch.arange, (writer.size(rows.place.size),), {"device": writer.device})
    counts = call(torch.ne, (writer.here(kept.labels), kept.ignored))
    last = call(torch.amax, (call(torch.where, (counts, line, -1)), 1, True))
    return call(torch.le, (line, last))


def _guarded(writer: NodeWriter, guard: Guard, mask: fx.Node) -> fx.Node:
    """Whether a guard holds, as a truth without dims."""
    call = writer.call
    batch, longest = (writer.size(a.size) for a in (guard.rows.sequence, guard.rows.place))
    if guard.kind == "prefix":
        line = call(torch.arange, (longest,), {"device": writer.device})
        first = call(torch.lt, (line, call(torch.sum, (mask, 1, True))))
        holds = call(torch.eq, (mask, first))
    elif guard.kind == "run":
        # one begins where a token has none before it
        before = call(torch.nn.functional.pad, (call(torch.narrow, (mask, 1, 0, _less(writer, longest))), (1, 0)))
        begins = call(torch.logical_and, (mask, call(torch.logical_not, (before,))))
        holds = call(torch.le, (call(torch.sum, (begins, 1)), 1))
    elif guard.kind == "some":
        holds = call(torch.any, (mask, 1))
    elif guard.kind == "at":
        if guard.node is None:
            holds = call(torch.select, (mask, 1, guard.number))
        else:
            lines = call(torch.arange, (batch,), {"device": writer.device})
            at = writer.method("to", writer.method("reshape", writer.here(guard.node), -1), torch.int64)
            holds = call(torch.ops.aten.index.Tensor, (mask, [lines, at]))
    else:
        assert guard.kind == "ignored" and guard.node is not None
        labels = writer.method("reshape", writer.here(guard.node), *(batch, longest))
        holds = call(torch.logical_or, (mask, call(torch.eq, (labels, guard.number))))
    return call(torch.all, (holds,))


def _less(writer: NodeWriter, size: int | fx.Node) -> int | fx.Node:
    return size - 1 if isinstance(size, int) else writer.call(torch.sub, (size, 1))


def _apart(emitter: Emitter, results: Sequence[fx.Node], before: set[fx.Node]) -> fx.GraphModule:
    """The computation of `results` as a module of all inputs of the graph. Raises EmitError."""
    view = emitter.view
    scope = view.scopes[0]
    needed: set[fx.Node] = set()
    stack = list(results)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack += node.all_input_nodes
    places = max((known(x).numel() for x in results[1:]), key=_hint)
    new = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in scope.module.graph.nodes:
        if node.op != "placeholder" and node not in needed:
            continue
        if node in needed and node in before:
            _check(emitter, node, places)
        copies[node] = new.node_copy(node, copies.__getitem__)
    new.output((copies[results[0]], tuple(copies[x] for x in results[1:])))
    return fx.GraphModule(scope.module, new)


def _check(emitter: Emitter, node: fx.Node, places: int) -> None:
    """Whether a node may be computed once more, before the graph runs. Raises EmitError."""
    view = emitter.view
    scope = view.scopes[0]
    made = emitter.owned.get((scope, node), [])
    value = scope.values.get(node)
    if node.op == "placeholder" and isinstance(value, fx.Node):
        made = [value]
    small = all(_is_small(value_of(x), places) for x in made)
    pure = node.op == "placeholder" or all(is_pure(x) and x.target is not opaque for x in made)
    written = any(view.writes.to(x) for x in made)
    if not made or not small or not pure or written or node.op == "get_attr":
        raise EmitError(reasons.PADDING_GUARD())


def _is_small(value: object, places: int) -> bool:
    """Whether it is no more than about a number for each place."""
    if not isinstance(value, torch.Tensor):
        return True
    return _hint(value.numel()) <= 8 * _hint(places) and (not value.is_floating_point() or not value.requires_grad)


def _hint(size: object) -> int:
    found = size if isinstance(size, int) else getattr(getattr(size, "node", None), "hint", None)
    return found if isinstance(found, int) else 1
