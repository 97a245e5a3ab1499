"""Writes the ops of a `Plan` again at the size of a rank's rows, and the edges between them and what stays whole.

Each op is written where it stands in its Dynamo graph, so that grad mode, autocast and checkpointed regions hold for it as they
did. What is replicated stays as it is.
"""

from __future__ import annotations

import contextlib
import math
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import fx

from attnfuse import reasons
from attnfuse._compat import (
    OpOverload,
    enter_autocast,
    exit_autocast,
    keep_sequence_attention,
    pytree,
    save_for_backward,
)
from attnfuse.distributed import edges
from attnfuse.distributed.layouts import Layout, rows_of_rank
from attnfuse.distributed.random import dropped
from attnfuse.kernels.dropout import SEED_LIMIT
from attnfuse.passes.capture.recorder import is_choice
from attnfuse.passes.capture.view import Scope
from attnfuse.passes.emit.edits import EmitError
from attnfuse.passes.emit.emitter import Emitter
from attnfuse.passes.emit.transaction import undone_on_error
from attnfuse.passes.emit.writer import NodeWriter
from attnfuse.passes.graph import moves, views
from attnfuse.passes.graph.aten import (
    arguments,
    dtype_of,
    getitem_source,
    is_tensor,
    name_of,
    shape_of,
    source_of,
    value_of,
)
from attnfuse.passes.graph.labels import Atom, Dim, Labels, Size, known_equal
from attnfuse.passes.sharding.carry import EACH, MEAN, Sum, Tokens, sole
from attnfuse.passes.sharding.find import Distributed, Plan
from attnfuse.passes.site import Leaf

#: Methods that read the shape of a tensor alone, and functions that take one of what they give.
_SIZES = frozenset({"size", "dim", "numel"})
_OF_SIZES = (operator.getitem, operator.eq, operator.ne)
#: How many bytes of gradients go into one message.
_BUCKET = 1 << 25


@dataclass(frozen=True)
class Ranks:
    """How tokens are dealt, for a graph: names and numbers alone.

    groups   names of process groups: one of all ranks, or (outer, inner) of a mesh of two dims
    factor   what gradients of parameters are multiplied by instead of being summed; 0 for none
    """

    layout: Layout
    count: int
    groups: tuple[str, ...]
    factor: int = 0

    def rows(self, length: Size) -> Any:
        """How many rows a rank has."""
        return rows_of_rank(self.layout, self.count, length)


Key = tuple[Any, ...]


class Call(NamedTuple):
    """How a distributed attention is computed. why: for the report; bytes: that a rank sends, a call."""

    kernel: str
    algorithm: str
    why: str
    bytes: int


class Sharder:
    """Writes a plan into the graphs of an emitter's view."""

    def __init__(
        self, emitter: Emitter, plan: Plan, ranks: Ranks, calls: Mapping[fx.Node, Call], own_outputs: bool
    ) -> None:
        self.emitter = emitter
        self.view = emitter.view
        self.plan = plan
        self.carried = plan.carried
        self.ranks = ranks
        self.calls = calls
        self.own_outputs = own_outputs
        #: (scope, what) -> the node that has it there
        self.made: dict[tuple[Scope, Key], fx.Node] = {}
        self.casting = {scope: _casting(scope) for scope in self.view.scopes}
        self.sizes = {t.place: ranks.rows(t.length) for t in cast("list[Tokens]", self.carried.rows)}
        self.seed_of = {node: i for i, node in enumerate(self._random())}

    def write(self) -> None:
        """Raises EmitError, and leaves the graphs as they were then."""
        main = self.view.scopes[0]
        for scope in self.view.scopes:
            if scope.call is not None and is_choice(scope.call):
                own = (n for n, o in self.view.origin.items() if o.scope is scope)
                if any(n in self.plan.rows for n in own):
                    raise EmitError(reasons.SHARDED_REGION())
        kept = dict(self.emitter.replaced), set(self.emitter.touched)
        with undone_on_error([scope.module.graph for scope in self.view.scopes]):
            try:
                self._begin(main)
                self._walk(main)
            except BaseException:
                self.emitter.replaced, self.emitter.touched = kept
                raise
        self.emitter.touched.update(self.view.scopes)

    @property
    def inside(self) -> set[fx.Node]:
        """View nodes that nothing needs any more."""
        found = set(self.carried.labels) | set(self.carried.parts) | set(self.carried.sums)
        for each in self.plan.sites.values():
            found |= each.site.inside | {each.site.final}
        # dropout that nothing reads draws no mask any more
        dead = {n for n in self.view.graph.nodes if n not in self.view.live and name_of(n) == "dropout"}
        return (found | dead | set(self.plan.dropped)) - set(self.plan.seeds)

    def autocasts(self, scope: Scope, place: fx.Node) -> list[Any]:
        """The autocasts that a graph has on at a place, the outermost first."""
        outer = [] if scope.parent is None or scope.call is None else self.autocasts(scope.parent, scope.call)
        known = self.casting[scope]
        if not known:
            return outer
        while place not in known and place.op != "root":
            place = place.prev
        return [*outer, *(_autocast(n) for n in known.get(place, ()))]

    # -- what is needed from the start on

    def _random(self) -> list[fx.Node]:
        """The nodes that draw random numbers: dropout, and attentions with it."""
        drops = set(self.plan.dropped)
        sites = {final for final, d in self.plan.sites.items() if d.site.spec.dropout > 0.0 and final in self.plan.rows}
        return [n for n in self.view.graph.nodes if n in drops or n in sites]

    def _begin(self, main: Scope) -> None:
        first = next(n for n in main.module.graph.nodes if n.op != "placeholder")
        writer = ShardWriter(self, main, first, self._device())
        with main.module.graph.inserting_before(first):
            if self.seed_of:
                shape = (len(self.seed_of),)
                seeds = writer.call(
                    torch.randint, (0, SEED_LIMIT, shape), {"dtype": torch.int64, "device": writer.device}
                )
                seeds = writer.call(edges.agreed, (seeds, self.ranks.groups))
                save_for_backward(seeds)
                self.made[main, ("seeds",)] = seeds
            bucket: list[tuple[fx.Node, fx.Node]] = []
            size = 0
            for x in self._entered_inputs(main):
                value = value_of(x)
                other = bool(bucket) and self._is_parameter(bucket[0][0]) != self._is_parameter(x)
                if bucket and (other or size + value.nbytes > _BUCKET):
                    self._enter(writer, bucket, main)
                    bucket, size = [], 0
                bucket.append((x, main.nodes[x]))
                size += value.nbytes
            if bucket:
                self._enter(writer, bucket, main)

    def _enter(self, writer: ShardWriter, bucket: Sequence[tuple[fx.Node, fx.Node]], main: Scope) -> None:
        given = [node for _, node in bucket]
        factor = self.ranks.factor if self._is_parameter(bucket[0][0]) else 0
        entered = writer.call(edges.entered, (given, self.ranks.groups, factor))
        for i, (x, _) in enumerate(bucket):
            self.made[main, ("entered", x)] = writer.getitem(entered, i)

    def _entered_inputs(self, main: Scope) -> list[fx.Node]:
        """Inputs of the graph that ops on rows take whole, with gradients, in the order of use."""
        found: dict[fx.Node, None] = {}
        for node in self.view.graph.nodes:
            if node not in self.plan.rows and node not in self.carried.sums:
                continue
            if node in self.plan.sites or node in self.plan.seeds or node not in self.plan.needed:
                continue
            for position, x in enumerate(node.args):
                if not is_tensor(x) or self.plan.is_sharded(x) or x.op != "placeholder":
                    continue
                if (node, position) not in self.carried.gathered and self.needs_gradient(main, x, node):
                    found[x] = None
        return [x for x in found if x in main.nodes]

    def _is_parameter(self, x: fx.Node) -> bool:
        """Whether it is what an optimizer, or a DDP that averages, has the gradient of."""
        node = self.view.scopes[0].nodes.get(x) if x.op == "placeholder" else None
        return node is not None and isinstance(node.meta.get("example_value"), torch.nn.Parameter)

    def _device(self) -> torch.device:
        final = next(iter(self.plan.sites))
        device: torch.device = value_of(final).device
        return device

    # -- the graphs

    def _walk(self, scope: Scope) -> None:
        graph = scope.module.graph
        for node in list(graph.nodes):
            if node.op == "placeholder":
                continue
            if node.op == "output":
                if scope.parent is None and self.own_outputs:
                    self._own_outputs(scope, node)
                continue
            bodies = [s for s in self.view.scopes if s.call is node and s.parent is scope]
            if bodies and not is_choice(node):
                for body in bodies:
                    returned = _returned(body)
                    self._walk(body)
                    self._results(body, returned)
                self._taken(scope, node)
                continue
            self._owner(scope, node)

    def _owner(self, scope: Scope, owner: fx.Node) -> None:
        """Write what a Dynamo node made that is sharded, and let what stays whole use it."""
        value = scope.values.get(owner)
        source = value if isinstance(value, fx.Node) else None
        if (
            source is not None
            and (scope, ("rows", source)) in self.made
            and self.view.origin[source].scope is not scope
        ):
            return
        made = [n for n in self.emitter.owned.get((scope, owner), ()) if n in self.plan.needed]
        device = next((value_of(n).device for n in made if is_tensor(n)), self._device())
        writer = ShardWriter(self, scope, owner, device)
        written: set[fx.Node] = set()
        with scope.module.graph.inserting_before(owner):
            for node in made:
                writer.now = self.view.order[node]
                if node in self.plan.rows and node not in self.plan.seeds:
                    self.made[scope, ("rows", node)] = self._checked(writer, node, self._written(writer, node))
                elif node in self.carried.sums:
                    total = self._summed(writer, node, self.carried.sums[node])
                    self.emitter.replaced[scope, node] = writer.checked(
                        total, name_of(node), shape_of(node), dtype_of(node)
                    )
                elif node in self.seed_of:
                    self.emitter.replaced[scope, node] = self._dropped(writer, node)
                else:
                    continue
                written.add(node)
            if source is None:
                return
            new = self._instead(writer, scope, owner, source, written)
        if new is not None:
            owner.replace_all_uses_with(new)
            self.emitter.replaced[scope, source] = new

    def _instead(
        self, writer: ShardWriter, scope: Scope, owner: fx.Node, value: fx.Node, written: set[fx.Node]
    ) -> fx.Node | None:
        """What takes the place of a Dynamo node; None where it stays, or nothing needs it whole."""
        if value in self.plan.seeds:
            return None
        if self.plan.is_sharded(value):
            if value not in self.plan.whole or value in self.carried.parts:
                return None
            return self.whole(writer, value)
        if (scope, value) in self.emitter.replaced:
            return self.emitter.replaced[scope, value]
        if not is_tensor(value):
            reads = any(
                isinstance(scope.values.get(n), fx.Node) and self.plan.is_sharded(scope.values[n])
                for n in owner.all_input_nodes
            )
            if reads and isinstance(value_of(value), torch.SymInt) and owner.users:
                return cast(fx.Node, writer.size(value_of(value)))
            return None
        if value in self.plan.needed and self._rests_on(value, written):
            return writer.node_for(value)
        return None

    def _rests_on(self, value: fx.Node, written: set[fx.Node]) -> bool:
        """Whether a replicated value is made of what its own Dynamo node has written anew."""
        if not written:
            return False
        owner = self.view.origin.get(value)
        stack, seen = [value], set()
        while stack:
            node = stack.pop()
            if node in written:
                return True
            if node not in seen and self.view.origin.get(node) == owner:
                seen.add(node)
                stack += node.all_input_nodes
        return False

    def _results(self, body: Scope, returned: Any) -> None:
        """Let a region return the rows of what is sharded. returned: its results as they were."""
        output = body.module.graph.output_node()

        def new(node: fx.Node) -> fx.Node:
            value = body.values.get(node)
            if isinstance(value, fx.Node):
                if value in self.plan.rows and value not in self.plan.seeds:
                    return self.rows(ShardWriter(self, body, output, self._device()), value)
                return self.emitter.replaced.get((body, value), node)
            return node

        with body.module.graph.inserting_before(output):
            output.args = (pytree.tree_map_only(fx.Node, new, returned),)

    def _taken(self, scope: Scope, call: fx.Node) -> None:
        """The results of a region as the graph around it has them: rows, and whole ones of them where they are needed."""
        body = next(s for s in self.view.scopes if s.call is call and s.parent is scope)
        output = body.module.graph.output_node()
        if "example_value" in call.meta:
            call.meta["example_value"] = pytree.tree_map_only(
                fx.Node, lambda n: n.meta.get("example_value"), output.args[0]
            )
        value = scope.values.get(call)
        parts = [call] if isinstance(value, fx.Node) else [u for u in call.users if u.target is operator.getitem]
        for part in parts:
            value = scope.values.get(part)
            if not isinstance(value, fx.Node):
                if any(isinstance(x, fx.Node) and x in self.plan.rows for x in pytree.tree_leaves(value)):
                    raise EmitError(reasons.CALL_NOT_TAKEN_APART())
                continue
            if value not in self.plan.rows or value in self.plan.seeds:
                continue
            self.made[scope, ("rows", value)] = part
            given = self.made[body, ("rows", value)]
            part.meta["example_value"] = given.meta["example_value"]
            if value not in self.plan.whole:
                continue
            users = list(part.users)
            writer = ShardWriter(self, scope, part.next, value_of(value).device)
            with scope.module.graph.inserting_before(part.next):
                found = self.whole(writer, value)
            for user in users:
                user.replace_input_with(part, found)

    def _own_outputs(self, main: Scope, output: fx.Node) -> None:
        """Results of the graph with token dims are the rank's rows."""

        def new(node: fx.Node) -> fx.Node:
            value = main.values.get(node)
            if not isinstance(value, fx.Node) or value not in self.plan.rows or not is_tensor(value):
                return node
            writer = ShardWriter(self, main, output, value_of(value).device)
            labels = self.carried.axes.resolve(self.carried.labels[value])
            length, r = writer.size(self.carried.tokens_of(labels).length), self.ranks

            def show(x: fx.Node, dim: int) -> fx.Node:
                return writer.call(edges.shown, (x, dim, length, r.layout, r.count, r.groups))

            return self._apart(writer, self.rows(writer, value), labels, show, local=True, moves=False)

        with main.module.graph.inserting_before(output):
            output.args = (pytree.tree_map_only(fx.Node, new, output.args[0]),)

    def finish(self) -> None:
        """Erase what nothing needs any more. Raises EmitError, and leaves graphs that must not be used, where whole tensors are
        still computed that were meant to be rows."""
        inside = self.inside
        dead = self._erase_dead_calls()
        for scope in reversed(self.view.scopes):
            if scope in dead:
                continue
            _without_unread_sizes(scope)
            self.emitter.clean(scope, inside)
            # sizes may be all that is read of a tensor, and be read by what is gone now alone
            while _without_unread_sizes(scope):
                self.emitter.clean(scope, inside)
            if scope.call is not None and not is_choice(scope.call):
                _without_unused(scope)
            for node in reversed(scope.module.graph.nodes):
                value = scope.values.get(node)
                if node.op == "placeholder" or not isinstance(value, fx.Node) or value in self.plan.seeds:
                    continue
                if value in self.plan.rows and self.made.get((scope, ("rows", value))) is not node:
                    raise EmitError(reasons.SHARDED_KEPT(op=name_of(value) or value.name))

    def _erase_dead_calls(self) -> set[Scope]:
        """Erase calls of checkpointed regions of which nothing is needed; they would still read whole tensors."""
        needed = {self.view.origin[n].scope for n in self.plan.needed if n in self.view.origin}
        for scope in self.view.scopes[::-1]:
            # what is within is needed in it
            if scope in needed and scope.parent is not None:
                needed.add(scope.parent)
        dead: set[Scope] = set()
        for scope in self.view.scopes:
            call = scope.call
            if scope.parent in dead:
                dead.add(scope)
            elif call is not None and scope.parent is not None and scope not in needed and not is_choice(call):
                graph = scope.parent.module.graph
                for user in list(call.users):
                    if user.target is operator.getitem and not user.users:
                        graph.erase_node(user)
                if not call.users:
                    graph.erase_node(call)
                    dead.add(scope)
        return dead

    # -- values at a place

    def rows(self, writer: ShardWriter, node: fx.Node) -> fx.Node:
        """The rank's rows of a sharded value."""
        if node in self.plan.seeds:
            return self.entered(writer, node, self.carried.labels[node])
        return self._brought(writer, ("rows", node), None)

    def whole(self, writer: ShardWriter, node: fx.Node) -> fx.Node:
        """All rows of a sharded value."""
        if node in self.plan.seeds:
            return NodeWriter.node_for(writer, node)
        key = (writer.scope, node)
        same = self.plan.same(node)
        if key not in self.emitter.replaced and same is not None:
            self.emitter.replaced[key] = writer.laid_out(writer.node_for(same), value_of(node))
        if key not in self.emitter.replaced:
            given = self.rows(writer, node)
            labels = self.carried.axes.resolve(self.carried.labels[node])
            tokens = self.carried.tokens_of(labels)
            length = writer.size(tokens.length)

            def gather(x: fx.Node, dim: int) -> fx.Node:
                r = self.ranks
                return writer.call(edges.left, (x, dim, length, r.layout, r.count, r.groups))

            found = self._apart(writer, given, labels, gather, local=True)
            found = writer.checked(found, "what is gathered", shape_of(node), dtype_of(node))
            self.emitter.replaced[key] = writer.laid_out(found, value_of(node))
        return self.emitter.replaced[key]

    def entered(self, writer: ShardWriter, x: fx.Node, dims: Labels | None, user: fx.Node | None = None) -> fx.Node:
        """A replicated tensor for an op on rows: the rank's rows of it where dims say so, else as it is."""
        dims = None if dims is None else self.carried.axes.resolve(dims)
        if dims is None or not self.carried.rows_in(dims):
            if not self.needs_gradient(writer.scope, x, user):
                return writer.node_for(x)

            def enter(w: ShardWriter) -> fx.Node:
                factor = self.ranks.factor if self._is_parameter(x) else 0
                return w.getitem(w.call(edges.entered, ([w.node_for(x)], self.ranks.groups, factor)), 0)

            return self._brought(writer, ("entered", x), enter, x)

        def cut(w: ShardWriter) -> fx.Node:
            def rows(node: fx.Node, dim: int) -> fx.Node:
                r = self.ranks
                return w.call(edges.entered_rows, (node, dim, r.layout, r.count, r.groups))

            return self._apart(w, w.node_for(x), dims, rows, local=False)

        # a cut is a copy: one made before a write to the tensor's memory is no longer its rows
        writes = sum(self.view.order[w] < writer.now for w in self.view.writes.to(x) if w in self.view.order)
        return self._brought(writer, ("rows of", x, dims, writes), cut, x)

    def needs_gradient(self, scope: Scope, x: fx.Node, user: fx.Node | None) -> bool:
        value = value_of(x)
        if not isinstance(value, torch.Tensor) or not (value.is_floating_point() or value.is_complex()):
            return False
        if not self.view.trains or not (user is None or self.view.grad.get(user, True)):
            return False
        dynamo = scope.nodes.get(x)
        example = None if dynamo is None else dynamo.meta.get("example_value")
        return example.requires_grad if isinstance(example, torch.Tensor) and x.op == "placeholder" else True

    def numbers(self, writer: ShardWriter, tokens: Tokens) -> fx.Node:
        """int64 [n], of the rank's rows."""

        def make(w: ShardWriter) -> fx.Node:
            r = self.ranks
            given = (n for n in w.graph.nodes if n.op == "placeholder")
            like = next((n for n in given if _is_on(n.meta.get("example_value"), w.device)), None)
            if like is None:
                raise EmitError(reasons.NOT_AVAILABLE())
            return w.call(edges.tokens, (like, w.size(tokens.length), r.layout, r.count, r.groups))

        return self._brought(writer, ("numbers", tokens), make)

    def _seed(self, writer: ShardWriter, node: fx.Node) -> fx.Node:
        seeds = self._brought(writer, ("seeds",), None)
        return writer.call(torch.narrow, (seeds, 0, self.seed_of[node], 1))

    def _brought(
        self, writer: ShardWriter, key: Key, make: Callable[[ShardWriter], fx.Node] | None, x: fx.Node | None = None
    ) -> fx.Node:
        """What has been made, or is made now in the outermost graph that can, where `writer` writes."""
        scope = writer.scope
        if (scope, key) in self.made:
            return self.made[scope, key]
        parent = scope.parent
        outside = parent is not None and (x is None or self._is_known(parent, x))
        if parent is None or not outside:
            if make is None:
                raise EmitError(reasons.NOT_AVAILABLE())
            node = make(writer)
        else:
            call = scope.call
            assert call is not None
            outer = ShardWriter(self, parent, call, writer.device)
            outer.now = writer.now
            with parent.module.graph.inserting_before(call):
                given = self._brought(outer, key, make, x)
            last = next(n for n in reversed(scope.module.graph.nodes) if n.op == "placeholder")
            with scope.module.graph.inserting_after(last):
                node = scope.module.graph.placeholder(f"attnfuse_{key[0].replace(' ', '_')}_{len(self.made)}")
            node.meta.update(given.meta)
            call.args = (*call.args, given)
        self.made[scope, key] = node
        return node

    def _is_known(self, scope: Scope, x: fx.Node) -> bool:
        origin = self.view.origin.get(x)
        return x in scope.nodes or origin is None or origin.scope is scope

    def _apart(
        self,
        writer: ShardWriter,
        x: fx.Node,
        labels: Labels,
        move: Callable[[fx.Node, int], fx.Node],
        local: bool,
        moves: bool = True,
    ) -> fx.Node:
        """move(x, the dim of the rows), which is taken out of a merged dim for that. local: x has the rank's rows; moves: what
        comes of it has those that x has not."""
        dim = self.carried.dim_of(labels)
        atoms = labels[dim]
        (at,) = [i for i, a in enumerate(atoms) if self.carried.rows_in([(a,)])]
        if len(atoms) == 1:
            return move(x, dim)
        whole = [a.size for a in atoms]
        rows = [self.sizes.get(a, a.size) for a in atoms]
        before, after = (rows, whole) if local else (whole, rows)
        after = after if moves else before
        shape = list(_shape(x))
        split = writer.method("reshape", x, *writer.shape([*shape[:dim], *before, *shape[dim + 1 :]]))
        moved = move(split, dim + at)
        return writer.method("reshape", moved, *writer.shape([*shape[:dim], math.prod(after), *shape[dim + 1 :]]))

    # -- ops

    def _size(self, dim: Dim) -> Any:
        return math.prod([self.sizes.get(a, a.size) for a in dim])

    def _local(self, labels: Labels) -> list[Any]:
        return [self._size(dim) for dim in self.carried.axes.resolve(labels)]

    def _checked(self, writer: ShardWriter, node: fx.Node, made: fx.Node) -> fx.Node:
        """`made`, if it is what `node` is but for the number of its rows. Raises EmitError."""
        if node not in self.carried.labels:
            return made
        return writer.checked(
            made, f"{name_of(node)} of a rank's rows", self._local(self.carried.labels[node]), dtype_of(node)
        )

    def _written(self, writer: ShardWriter, node: fx.Node) -> fx.Node:
        if node in self.plan.sites:
            return self._attention(writer, self.plan.sites[node])
        source = getitem_source(node)
        if source is not None:
            return writer.getitem(self.rows(writer, source[0]), source[1])
        if node in self.seed_of:
            return self._dropped(writer, node)
        if views.is_identity(node):
            return self.rows(writer, source_of(node))
        alone = sole(node)
        if alone is not None and self.plan.is_sharded(alone):
            return self.rows(writer, alone)
        if name_of(node) == "to":
            return writer.method("to", self.rows(writer, source_of(node)), dtype_of(node))
        moved = moves.dim_map(node)
        if moved is not None and moved.method is not None:
            shape = writer.shape(self._local(self.carried.labels[node]))
            return writer.method(moved.method, self.rows(writer, moved.source), *shape)
        args = [self._argument(writer, node, i, x) for i, x in enumerate(node.args)]
        kwargs = fx.node.map_arg(dict(node.kwargs), lambda x: self._given(writer, node, x))
        return writer.call(cast("Callable[..., Any]", node.target), tuple(args), kwargs)

    def _argument(self, writer: ShardWriter, node: fx.Node, position: int, x: Any) -> Any:
        found = self.carried.gathered.get((node, position))
        if found is not None:
            return self.entered(writer, x, found.dims, node)
        return fx.node.map_arg(x, lambda n: self._given(writer, node, n))

    def _given(self, writer: ShardWriter, node: fx.Node, x: fx.Node) -> Any:
        if self.plan.is_sharded(x):
            return self.rows(writer, x)
        if not is_tensor(x):
            return writer.size(value_of(x)) if isinstance(value_of(x), torch.SymInt) else writer.node_for(x)
        return self.entered(writer, x, None, node)

    def _dropped(self, writer: ShardWriter, node: fx.Node) -> fx.Node:
        """Dropout whose mask depends on the seed and the place in the whole tensor alone."""
        source, seed = source_of(node), self._seed(writer, node)
        p = float(arguments(node)["p"])
        if not self.plan.is_sharded(node):
            return writer.call(dropped, (writer.node_for(source), seed, p))
        labels = self.carried.axes.resolve(self.carried.labels[node])
        tokens = self.carried.tokens_of(labels)
        numbers, length = self.numbers(writer, tokens), writer.size(tokens.length)

        def drop(x: fx.Node, dim: int) -> fx.Node:
            return writer.call(dropped, (x, seed, p, dim, numbers, length))

        return self._apart(writer, self.rows(writer, source), labels, drop, local=True, moves=False)

    # -- sums

    def _summed(self, writer: ShardWriter, node: fx.Node, s: Sum) -> fx.Node:
        args = arguments(node)
        acc = torch.float32 if dtype_of(node) in (torch.float16, torch.bfloat16) else dtype_of(node)
        if s.kind in ("sum", "mean"):
            rows = self._shown(writer, self.rows(writer, source_of(node)), s)
            dims = args.get("dim")
            dims = (
                list(range(len(s.labels))) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
            )
            total = writer.call(
                torch.ops.aten.sum.dim_IntList, (rows, list(dims), bool(args.get("keepdim"))), {"dtype": acc}
            )
            total = writer.call(edges.summed, (total, self.ranks.groups))
            if s.kind == "mean":
                whole = shape_of(source_of(node))
                total = self._divided(writer, total, [whole[d] for d in dims])
            return self._cast(writer, total, dtype_of(node))
        if s.kind == "pointwise":
            each = self._call_with(writer, node, {"reduction": EACH})
            total = writer.call(torch.sum, (self._shown(writer, each, s),), {"dtype": acc})
            total = writer.call(edges.summed, (total, self.ranks.groups))
            if args["reduction"] == MEAN:
                total = self._divided(writer, total, shape_of(args["self"]))
            return self._cast(writer, total, dtype_of(node))
        return self._class_loss(writer, node, s, acc)

    def _class_loss(self, writer: ShardWriter, node: fx.Node, s: Sum, acc: torch.dtype) -> fx.Node:
        """Sums and counts of the ranks, added up: a mean of means would weigh ignored targets."""
        args = arguments(node)
        position = node.args.index(args["target"])
        target = self._argument(writer, node, position, args["target"])
        ignored = args["ignore_index"]
        inside = self._inside(writer, s)
        if inside is not None:
            target = writer.call(torch.where, (inside, target, ignored))
        each = self._call_with(writer, node, {"reduction": EACH, "target": target})
        total = writer.call(torch.sum, (each,), {"dtype": acc})
        total = writer.call(edges.summed, (total, self.ranks.groups))
        if args["reduction"] != MEAN:
            return self._cast(writer, total, dtype_of(node))
        counts = writer.call(torch.ne, (target, ignored))
        if args.get("weight") is not None:
            weight = writer.method("detach", writer.node_for(args["weight"]))
            chosen = writer.call(torch.where, (counts, target, 0))
            chosen = writer.call(torch.nn.functional.embedding, (chosen, writer.method("unsqueeze", weight, 1)))
            counts = writer.call(torch.mul, (writer.method("squeeze", chosen, -1), counts))
        count = writer.call(edges.summed, (writer.call(torch.sum, (counts,)), self.ranks.groups))
        return self._cast(writer, writer.call(torch.div, (total, count)), dtype_of(node))

    def _call_with(self, writer: ShardWriter, node: fx.Node, other: dict[str, Any]) -> fx.Node:
        """The op of `node` on rows, with other arguments."""
        assert isinstance(node.target, OpOverload)
        names = [a.name for a in node.target._schema.arguments]
        args, kwargs = [], {}
        given = arguments(node)
        for position, name in enumerate(names):
            value = other[name] if name in other else self._argument(writer, node, position, given[name])
            if node.target._schema.arguments[position].kwarg_only:
                kwargs[name] = value
            else:
                args.append(value)
        return writer.call(node.target, tuple(args), kwargs)

    def _inside(self, writer: ShardWriter, s: Sum) -> fx.Node | None:
        """Which rows are tokens, to broadcast against what is summed; None where all surely are."""
        if known_equal(self.sizes[s.rows.place] * self.ranks.count, s.rows.length):
            return None
        labels = self.carried.axes.resolve(s.labels)
        dim = self.carried.dim_of(labels)
        numbers, length = self.numbers(writer, s.rows), writer.size(s.rows.length)
        atoms = labels[dim]
        inside = writer.call(edges.inside, (numbers, length, atoms.index(s.rows.place), len(atoms)))
        if len(atoms) > 1:
            sizes = writer.shape([self.sizes.get(a, a.size) for a in atoms])
            inside = writer.method("reshape", writer.method("expand", inside, *sizes), -1)
        for _ in range(dim + 1, len(labels)):
            inside = writer.method("unsqueeze", inside, -1)
        return inside

    def _shown(self, writer: ShardWriter, rows: fx.Node, s: Sum) -> fx.Node:
        """The rows, with 0 in those of padding."""
        inside = self._inside(writer, s)
        return rows if inside is None else writer.call(torch.where, (inside, rows, 0))

    def _divided(self, writer: ShardWriter, total: fx.Node, sizes: Sequence[Size]) -> fx.Node:
        for size in sizes:
            total = writer.call(torch.div, (total, writer.size(size)))
        return total

    def _cast(self, writer: ShardWriter, x: fx.Node, dtype: torch.dtype) -> fx.Node:
        return x if x.meta["example_value"].dtype == dtype else writer.method("to", x, dtype)

    # -- attentions

    def _attention(self, writer: ShardWriter, found: Distributed) -> fx.Node:
        site = found.site
        kernel, algorithm, *_ = self.calls[site.final]
        q = self._side(writer, site.q, found.queries, site.q_dim, site.batch, site.d_dim)
        k = self._side(writer, site.k, found.keys, site.k_dim, site.batch, site.d_dim)
        v = self._side(writer, site.v, found.keys, site.k_dim, site.batch, site.e_dim)
        operands = []
        for node, leaf in zip(writer.operands(site, site.spec), site.operands, strict=True):
            floats = node.meta["example_value"].is_floating_point()
            if floats and self.view.trains and self.view.grad.get(site.final, True) and self._may_train(leaf):
                node = writer.getitem(writer.call(edges.entered, ([node], self.ranks.groups, 0)), 0)
            operands.append(node)
        seed = self._seed(writer, site.final) if site.final in self.seed_of else None
        spec, ranks = site.spec, self.ranks
        queries, keys = (writer.size(dim[0].size) if dim else 1 for dim in (site.q_dim, site.k_dim))
        where = "".join(c for c in site.where if c.isalnum() or c in "._:-")
        given = (q, k, v, operands, seed, queries, keys, spec.argument, kernel, self.emitter.strict)
        try:
            call = writer.call(
                torch.ops.attnfuse.sequence_attention.default,
                (*given, ranks.layout, algorithm, list(ranks.groups), where),
            )
        except ValueError as error:
            raise EmitError(reasons.OP_REFUSES(error=error)) from error
        if writer.scope.call is not None:
            # what goes around the ranks is not sent again where a region is computed again
            keep_sequence_attention(writer.scope.module)
        out = writer.getitem(call, 0)
        dims: Labels = (*((atom,) for atom in site.batch), site.q_dim, site.e_dim)
        out = writer.spread(out, dims, site.q_dim)
        if not site.e_dim:
            out = writer.method("squeeze", out, len(dims) - 1)
        flat = [atom for dim in dims for atom in dim]
        order = [flat.index(atom) for dim in site.out_labels for atom in dim]
        if order != list(range(len(order))):
            out = writer.method("permute", out, *order)
        return writer.method("reshape", out, *writer.shape(self._local(self.carried.labels[site.final])))

    def _may_train(self, leaf: Leaf) -> bool:
        stack, seen = [leaf.node], set()
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if node.op == "placeholder":
                if self.needs_gradient(self.view.scopes[0], node, None):
                    return True
            elif node in self.carried.labels:
                return True
            stack += node.all_input_nodes
        return False

    def _side(
        self, writer: ShardWriter, leaf: Leaf, tokens: Tokens | None, dim: Dim, batch: Dim, width: Dim
    ) -> fx.Node:
        """q, k or v as the op takes it: [*batch, n, width], or whole, whose gradients the op adds up over ranks."""
        if tokens is None:
            sharded = self.plan.is_sharded(leaf.node)
            whole = self.whole(writer, leaf.node) if sharded else writer.node_for(leaf.node)
            writer.local = {leaf.node: whole}
            made = writer.canonical(leaf, batch, dim, width)
        else:
            writer.local = {leaf.node: self.rows(writer, leaf.node)}
            rows = (Atom(self.sizes[tokens.place]),)
            labels = tuple(tuple(rows[0] if a is dim[0] else a for a in d) for d in leaf.labels)
            made = writer.canonical(replace(leaf, labels=labels), batch, rows, width)
        writer.local = {}
        return made


class ShardWriter(NodeWriter):
    """Writes where replicated values are meant: of a sharded one all rows.

    now      the place in the view of what is written
    local    what stands for a value meanwhile
    """

    def __init__(self, sharder: Sharder, scope: Scope, owner: fx.Node, device: torch.device) -> None:
        super().__init__(sharder.emitter, scope, owner, device)
        self.sharder = sharder
        self.now = sys.maxsize
        self.local: dict[fx.Node, fx.Node] = {}

    def _describe(self, node: fx.Node) -> None:
        """With a fake value as ops give it under the autocast that is on here."""
        with contextlib.ExitStack() as modes:
            for mode in self.sharder.autocasts(self.scope, self.owner):
                modes.enter_context(mode)
            super()._describe(node)

    def node_for(self, made: fx.Node) -> fx.Node:
        if made in self.local:
            return self.local[made]
        plan = self.sharder.plan
        if made in plan.carried.labels and made not in plan.seeds and (self.scope, made) not in self.edits.replaced:
            if made in plan.rows:
                return self.sharder.whole(self, made)
            raise EmitError(reasons.NOT_AVAILABLE())
        return super().node_for(made)


def _is_on(x: Any, device: torch.device) -> bool:
    return isinstance(x, torch.Tensor) and x.device == device


def _returned(body: Scope) -> Any:
    return body.module.graph.output_node().args[0]


def _casting(scope: Scope) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """Which autocasts are on at each node of a graph that has some: the nodes that switch them on."""
    nodes = list(scope.module.graph.nodes)
    if not any(n.target is enter_autocast for n in nodes):
        return {}
    found: dict[fx.Node, tuple[fx.Node, ...]] = {}
    on: list[fx.Node] = []
    for node in nodes:
        if node.target is exit_autocast:
            on.remove(node.args[0])
        found[node] = tuple(on)
        if node.target is enter_autocast:
            on.append(node)
    return found


def _autocast(node: fx.Node) -> Any:
    device, dtype, enabled, *_ = node.args
    return torch.autocast(cast(str, device), cast("torch.dtype", dtype), cast(bool, enabled), cache_enabled=False)


def _without_unread_sizes(scope: Scope) -> bool:
    """Drop reads of sizes, and what is made of them, that nothing needs; whether there were any."""
    found = False
    for node in reversed(scope.module.graph.nodes):
        if node.users or node.op not in ("call_method", "call_function"):
            continue
        if (node.op == "call_method" and node.target in _SIZES) or (
            node.target in _OF_SIZES and not isinstance(node.meta.get("example_value"), torch.Tensor)
        ):
            scope.module.graph.erase_node(node)
            found = True
    return found


def _without_unused(scope: Scope) -> None:
    """Drop the inputs of a region that nothing in it reads, and what its call gives for them."""
    call = scope.call
    assert call is not None
    inputs = [n for n in scope.module.graph.nodes if n.op == "placeholder"]
    unused = [i for i, n in enumerate(inputs) if not n.users]
    if not unused:
        return
    lead = len(call.args) - len(inputs)
    call.args = tuple(x for i, x in enumerate(call.args) if i - lead not in unused)
    for i in unused:
        scope.module.graph.erase_node(inputs[i])
    scope.module.recompile()


def _shape(node: fx.Node) -> Sequence[Any]:
    return tuple(node.meta["example_value"].shape)
