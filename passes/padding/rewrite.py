"""Writes a region of padded tensors on packed rows into its graph (unpad.py finds it).

A packed tensor is the padded one with 1 for its sequences and the number of packed rows for its places, so that the nodes of
the region are written again one by one with these sizes. Attentions get the bounds of the sequences.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import fx

from attnfuse import _compat, reasons
from attnfuse.passes.capture.view import Scope
from attnfuse.passes.emit.edits import EmitError
from attnfuse.passes.emit.emitter import Emitter
from attnfuse.passes.emit.writer import NodeWriter
from attnfuse.passes.graph import moves, views
from attnfuse.passes.graph.aten import dtype_of, getitem_source, name_of, shape_of, source_of, value_of
from attnfuse.passes.graph.labels import Atom, Dim, Labels, Size
from attnfuse.passes.padding.checkpointed import fold
from attnfuse.passes.padding.exits import Computed, Contracted, Exit
from attnfuse.passes.padding.modes import autocast_regions, within
from attnfuse.passes.padding.packing import Packed
from attnfuse.passes.padding.region import Region
from attnfuse.passes.padding.rowwise import Gathered, Rows
from attnfuse.passes.padding.sources import Entry, Pad, Unpad
from attnfuse.passes.site import Leaf, Site


class RegionRewriter:
    """Writes a region on packed rows into its graph. kernels: the name of one for each of its attentions."""

    def __init__(self, emitter: Emitter, region: Region, kernels: Sequence[str]) -> None:
        self.emitter = emitter
        self.view = emitter.view
        self.region = region
        self.carried = region.carried
        self.scope = self.view.scopes[0]
        # view node -> the node with its packed rows
        self.made: dict[fx.Node, fx.Node] = {}
        self.calls: dict[fx.Node, fx.Node] = {}
        self.tables: dict[tuple[Rows, str], fx.Node] = {}
        #: the checkpointed region that a node was written for
        self.checkpointed: dict[fx.Node, Scope] = {}
        # (packed rows, number of a place) -> that of each sequence
        self.places: dict[tuple[fx.Node, int], fx.Node] = {}
        self.sizes: dict[Atom, Size] = {}
        for rows in self.carried.rows:
            self.sizes[rows.sequence], self.sizes[rows.place] = 1, rows.total
        self.pads = {pad.node: pad for pad in region.pads}
        self.entries = {entry.node: entry for entry in region.entries}
        #: rows that are taken out of the graph's own tensors: the numbers of their places are further inputs, in this order
        self.given: list[Rows] = []
        self.attentions = {a.original.final: (a, kernel) for a, kernel in zip(region.attentions, kernels, strict=True)}

    def emit(self) -> None:
        """Replace the results of the region, inside of `Emitter.attempt`. Raises EmitError."""
        ends: list[tuple[fx.Node, Unpad | Packed | Exit]] = [(u.node, u) for u in self.region.unpads]
        ends += [(e.node, e) for e in self.region.exits]
        ends += [(a.original.final, a) for a in self.region.attentions if a.q is None]
        ends.sort(key=lambda end: self.view.order[end[0]])
        graph = self.scope.module.graph
        for rows in self.carried.rows:
            if rows.index is not None:
                # as the prologue gives them, whichever is read first
                self.tables[rows, "index"] = self._input(rows)
        results = []
        regions = autocast_regions(self.view)
        for node, end in ends:
            origin = self.view.origin[node]
            if origin.scope is not self.scope:
                raise EmitError(reasons.PADDING_CHECKPOINT())
            owner = origin.node
            writer = PackedWriter(self, owner, value_of(node).device)
            with graph.inserting_before(owner), within(regions.get(owner, ())):
                source = node if isinstance(end, Packed) else end.source
                self._write(writer, source)
                if isinstance(end, (Computed, Contracted)):
                    for other in self._sources(node):
                        self._write(writer, other)
                results.append((node, owner, writer, self._result(writer, end, source)))
            if isinstance(end, Packed) and self.scope.values[owner] is not node:
                raise EmitError(reasons.PADDED_KEYS_IN_CALL())
        for (node, owner, writer, result), (_, end) in zip(results, ends, strict=True):
            if isinstance(end, Unpad) and end.mask is not None:
                self._select(writer, node, owner, end, result)
            else:
                self.emitter.redirect(node, self.scope, owner, result, writer)
        for number, scope in enumerate(dict.fromkeys(self.checkpointed.values())):
            fold(scope, [n for n, s in self.checkpointed.items() if s is scope and not n._erased], number)
        self.emitter.touched.add(self.scope)
        self.emitter.calls += [self.calls[a.original.final] for a in self.region.attentions]

    @property
    def inside(self) -> set[fx.Node]:
        """View nodes that nothing needs any more."""
        kept = {u.node for u in self.region.unpads if u.mask is not None}
        own = (set(self.carried.labels) | set(self.carried.parts)) - set(self.entries)
        return (self.region.inside | own | self.region.ends) - kept

    # -- the order of things

    def _write(self, writer: PackedWriter, target: fx.Node) -> None:
        """All that `target` needs, and itself."""
        needed: set[fx.Node] = set()
        stack = [target]
        while stack:
            node = stack.pop()
            if node not in needed and node not in self.made:
                needed.add(node)
                stack += self._sources(node)
        for node in sorted(needed, key=self.view.order.__getitem__):
            writer.written_for = self.view.origin[node].node if node in self.view.origin else writer.owner
            writer.region = self._region(node)
            self.made[node] = self._checked(writer, node, self._written(writer, node))
            writer.region = None
        writer.written_for = writer.owner

    def _region(self, node: fx.Node) -> Scope | None:
        """The checkpointed region that a value is computed in; what comes into packed rows is taken out before."""
        origin = self.view.origin.get(node)
        return None if node in self.entries or origin is None or origin.scope is self.scope else origin.scope

    def _checked(self, writer: PackedWriter, node: fx.Node, made: fx.Node) -> fx.Node:
        """`made`, if it is what `node` is but for the sizes of its rows. Raises EmitError."""
        if node not in self.carried.labels:
            return made
        dims = self.carried.axes.resolve(self.carried.labels[node])
        return writer.checked(made, f"{name_of(node)} of packed rows", [self._size(d) for d in dims], dtype_of(node))

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        if node in self.pads or node in self.entries:
            return []
        if node in self.attentions:
            site = self.attentions[node][0].site
            return [leaf.node for leaf in (site.q, site.k, site.v) if leaf.node in self.carried.labels]
        return [n for n in node.all_input_nodes if n in self.carried.labels or n in self.carried.parts]

    def _written(self, writer: PackedWriter, node: fx.Node) -> fx.Node:
        if node in self.pads:
            return self._values(writer, self.pads[node])
        if node in self.entries:
            return self._taken_out(writer, self.entries[node])
        if node in self.attentions:
            return self._attended(writer, *self.attentions[node])
        source = getitem_source(node)
        if source is not None:
            return writer.getitem(self.made[source[0]], source[1])
        name = name_of(node)
        if views.is_identity(node):
            return self.made[source_of(node)]
        if name == "to":
            return writer.method("to", self.made[source_of(node)], dtype_of(node))
        moved = moves.dim_map(node)
        if moved is not None and moved.method is not None:
            return writer.method(moved.method, self.made[moved.source], *self._shape(writer, node))
        return self.again(writer, node)

    def again(self, writer: PackedWriter, node: fx.Node) -> fx.Node:
        """The same op on the packed rows of its arguments."""
        args = [self._argument(writer, node, i, x) for i, x in enumerate(node.args)]
        kwargs = fx.node.map_arg(dict(node.kwargs), writer.node_for)
        return writer.call(cast("Callable[..., Any]", node.target), tuple(args), kwargs)

    def _argument(self, writer: PackedWriter, node: fx.Node, position: int, x: Any) -> Any:
        found = self.carried.gathered.get((node, position))
        if found is None:
            return fx.node.map_arg(x, writer.node_for)
        sizes = [self._size(dim) if dim else n for dim, n in zip(found.dims, shape_of(x), strict=True)]
        if found.place is not None and (found.rows.place,) not in found.dims:
            sizes[found.place] = found.rows.total
        if found.number is not None:
            sizes = [1] * len(found.dims)
        return writer.checked(self._gathered(writer, found, x), "what packed rows read", sizes, dtype_of(x))

    def _shape(self, writer: PackedWriter, node: fx.Node) -> list[int | fx.Node]:
        return writer.shape([self._size(dim) for dim in self.carried.axes.resolve(self.carried.labels[node])])

    def _size(self, dim: Dim) -> Any:
        size: Any = 1
        for a in dim:
            size = size * self.sizes.get(a, a.size)
        return size

    # -- rows

    def _values(self, writer: PackedWriter, pad: Pad) -> fx.Node:
        if pad.values is not None:
            return writer.method("unsqueeze", writer.node_for(pad.values), 0)
        origin = self.view.origin[pad.node].node
        return writer.method("unsqueeze", writer.method("values", origin.args[0]), 0)

    def _taken_out(self, writer: PackedWriter, entry: Entry) -> fx.Node:
        """The rows of tokens of a padded tensor."""
        rows, whole = entry.rows, NodeWriter.node_for(writer, entry.node)
        labels = self.carried.axes.resolve(self.carried.labels[entry.node])
        index = self.table(writer, rows, "index")
        if (rows.sequence, rows.place) in labels:
            return writer.call(torch.index_select, (whole, labels.index((rows.sequence, rows.place)), index))
        sequence, place = labels.index((rows.sequence,)), labels.index((rows.place,))
        rest = [d for d in range(len(labels)) if d not in (sequence, place)]
        order = [sequence, place, *rest]
        if order != list(range(len(order))):
            whole = writer.method("permute", whole, *order)
        found = writer.call(torch.index_select, (writer.method("flatten", whole, 0, 1), 0, index))
        found = writer.method("unsqueeze", found, 0)
        back = [order.index(d) for d in range(len(order))]
        return found if back == order else writer.method("permute", found, *back)

    def row_of(self, writer: PackedWriter, rows: Rows, place: int | fx.Node) -> fx.Node:
        """The packed row [B] of a place of each sequence: of one number, or of a view node [B]. A guard says that it is there."""
        batch, longest = writer.size(rows.sequence.size), writer.size(rows.place.size)
        numbers = writer.call(torch.mul, (writer.call(torch.arange, (batch,), {"device": writer.device}), longest))
        if isinstance(place, int):
            at: Any = place if place >= 0 else self._plus(writer, longest, place)
        else:
            at = writer.method("to", writer.method("reshape", writer.here(place), -1), torch.int64)
            at = writer.call(torch.where, (writer.call(torch.lt, (at, 0)), writer.call(torch.add, (at, longest)), at))
        wanted = writer.call(torch.add, (numbers, at))
        return writer.call(torch.bucketize, (wanted, self.table(writer, rows, "index")))

    def _plus(self, writer: PackedWriter, a: Any, b: int) -> Any:
        return a + b if isinstance(a, int) else writer.call(operator.add, (a, b))

    def _offsets(self, writer: PackedWriter, rows: Rows) -> fx.Node:
        """[B + 1]."""
        if rows.kept is not None:
            batch, longest = writer.size(rows.sequence.size), writer.size(rows.place.size)
            numbers = writer.call(torch.arange, (self._plus(writer, batch, 1),), {"device": writer.device})
            firsts = writer.call(torch.mul, (numbers, longest))
            return writer.call(torch.bucketize, (firsts, self.table(writer, rows, "index")))
        if rows.nested is not None:
            found = writer.method("offsets", rows.nested)
        elif rows.offsets is not None:
            found = writer.here(rows.offsets)
        else:
            assert rows.lengths is not None
            most = {"min": 0, "max": writer.size(rows.place.size)}
            # there may be lengths of more sequences
            own = writer.call(torch.narrow, (writer.here(rows.lengths), 0, 0, writer.size(rows.sequence.size)))
            sums = writer.call(torch.cumsum, (writer.call(torch.clamp, (own,), most), 0))
            found = writer.call(torch.nn.functional.pad, (sums, (1, 0)))
        if not self.emitter.strict:
            return found
        # rows of no sequence are no error, but for padded[mask] = values
        lengths = None if rows.offsets is None else writer.call(torch.diff, (found,))
        total = writer.size(rows.total)
        return writer.call(torch.ops.attnfuse.checked_offsets.default, (found, lengths, total))

    def _input(self, rows: Rows) -> fx.Node:
        """A further input of the graph: the numbers of the places that are tokens."""
        graph = self.scope.module.graph
        last = next(n for n in reversed(graph.nodes) if n.op == "placeholder")
        with graph.inserting_after(last):
            node = graph.placeholder(f"attnfuse_rows_{len(self.given)}")
        node.meta["example_value"] = rows.index
        _compat.say_source(node)
        self.given.append(rows)
        return node

    def table(self, writer: PackedWriter, rows: Rows, what: str) -> fx.Node:
        """Made once: 'index' [total], the places of tokens; whether sequences are 'padded' [B]; 'offsets' [B + 1]; 'bounds' [2, B]
        as the op takes them; of each packed row its 'sequence' and 'place', and whether it 'lies' in the padded tensor; 'rows'
        [B, N], the packed row of each place."""
        if (rows, what) not in self.tables:
            region, writer.region = writer.region, None
            found, sequences = self._table(writer, rows, what), rows.sequence.size
            shapes = {"bounds": (2, sequences), "rows": (sequences, rows.place.size), "padded": (sequences,)}
            # there may be offsets of more sequences
            if what != "offsets":
                found = writer.checked(found, f"the {what} of packed rows", shapes.get(what, (rows.total,)))
            self.tables[rows, what] = found
            writer.region = region
        return self.tables[rows, what]

    def _table(self, writer: PackedWriter, rows: Rows, what: str) -> fx.Node:
        call = writer.call
        if what == "offsets":
            return self._offsets(writer, rows)
        if rows.kept is not None and what == "rows":
            sizes = (rows.sequence.size, rows.place.size)
            places = call(torch.arange, (writer.product(sizes),), {"device": writer.device})
            found = call(torch.bucketize, (places, self.table(writer, rows, "index")))
            return writer.method("view", found, *writer.shape(sizes))
        if rows.kept is not None and what in ("sequence", "place"):
            divided = torch.div if what == "sequence" else torch.remainder
            given = (self.table(writer, rows, "index"), writer.size(rows.place.size))
            return call(divided, given, {"rounding_mode": "floor"} if what == "sequence" else {})
        offsets = self.table(writer, rows, "offsets")
        start, end = (call(torch.narrow, (offsets, 0, at, writer.size(rows.sequence.size))) for at in (0, 1))
        if what == "padded":
            return call(torch.lt, (call(torch.sub, (end, start)), writer.size(rows.place.size)))
        if what == "bounds":
            # no kernel may read a mask or bias beyond the padded length, whatever the offsets are
            end = call(torch.minimum, (end, call(torch.add, (start, writer.size(rows.place.size)))))
            return call(torch.stack, ([start, end],))
        if what == "rows":
            places = call(torch.arange, (writer.size(rows.place.size),), {"device": writer.device})
            return call(torch.add, (writer.method("unsqueeze", start, 1), places))
        numbers = call(torch.arange, (writer.size(rows.total),), {"device": writer.device})
        if what == "sequence":
            found = call(torch.bucketize, (numbers, writer.method("contiguous", end)), {"right": True})
            return self._below(writer, found, rows.sequence.size)
        sequence = self.table(writer, rows, "sequence")
        place = call(torch.sub, (numbers, call(torch.index_select, (start, 0, sequence))))
        if what == "place":
            return self._below(writer, place, rows.place.size)
        ends = call(torch.index_select, (end, 0, sequence))
        inside = call(torch.lt, (place, writer.size(rows.place.size)))
        return call(torch.logical_and, (inside, call(torch.lt, (numbers, ends))))

    def _below(self, writer: PackedWriter, x: fx.Node, size: Any) -> fx.Node:
        return writer.call(torch.clamp, (x,), {"min": 0, "max": self._less(writer, size)})

    def _less(self, writer: PackedWriter, size: Any) -> Any:
        found = writer.size(size)
        return found - 1 if isinstance(found, int) else writer.call(operator.sub, (found, 1))

    def _gathered(self, writer: PackedWriter, found: Gathered, x: fx.Node) -> fx.Node:
        """What each packed row reads of x: like x, but with 1 for the sequences and all rows for the places."""
        rows = found.rows
        if found.number is not None:
            # dims keep their part in the promotion of dtypes
            shape = (1,) * len(found.dims)
            return writer.call(torch.full, (shape, found.number), {"dtype": dtype_of(x), "device": value_of(x).device})
        node = writer.node_for(x)
        at = {atoms: d for d, atoms in enumerate(found.dims) if atoms}
        merged = (rows.sequence, rows.place)
        if merged in at:
            flat = writer.call(torch.add, (self._place_times(writer, rows), self.table(writer, rows, "place")))
            return writer.call(torch.index_select, (node, at[merged], flat))
        sequence, place = at.get((rows.sequence,)), at.get((rows.place,))
        if sequence is None:
            return writer.call(torch.index_select, (node, place, self.table(writer, rows, "place")))
        if place is None:
            node = writer.call(torch.index_select, (node, sequence, self.table(writer, rows, "sequence")))
            # to the dim of the places, which x has one of
            return writer.method("transpose", node, sequence, found.place)
        rest = [d for d in range(len(found.dims)) if d not in (sequence, place)]
        node = writer.method("permute", node, sequence, place, *rest)
        index = [self.table(writer, rows, "sequence"), self.table(writer, rows, "place")]
        node = writer.call(torch.ops.aten.index.Tensor, (node, index))
        # [rows, *rest], to lie where the places were, with 1 where the sequences were
        order = [0 if d == place else 1 + rest.index(d) for d in range(len(found.dims)) if d != sequence]
        return writer.method("unsqueeze", writer.method("permute", node, *order), sequence)

    def _place_times(self, writer: PackedWriter, rows: Rows) -> fx.Node:
        return writer.call(torch.mul, (self.table(writer, rows, "sequence"), writer.size(rows.place.size)))

    # -- attentions

    def _attended(self, writer: PackedWriter, a: Packed, kernel: str) -> fx.Node:
        site = a.site
        q = self._side(writer, site, site.q, a.q, site.q_dim, site.d_dim)
        k = self._side(writer, site, site.k, a.k, site.k_dim, site.d_dim)
        v = self._side(writer, site, site.v, a.k, site.k_dim, site.e_dim)
        operands = writer.operands(site, a.spec)
        bounds = tuple(None if rows is None else self.table(writer, rows, "bounds") for rows in (a.q, a.k))
        strict = self.emitter.strict
        call = writer.attention(q, k, v, operands, bounds, a.spec, kernel, strict)  # type: ignore[arg-type]
        self.calls[a.original.final] = call
        out = writer.getitem(call, 0)
        dims: Labels = (*((atom,) for atom in site.batch), site.q_dim, site.e_dim)
        if a.q is None:
            result = writer.shaped(out, dims, site.out_labels, value_of(site.final))
            if self.emitter.may_be_written(site):
                result = writer.call(torch.ops.attnfuse.own.default, (result,))
            return result
        out = writer.spread(out, dims, (site.batch[0], *site.q_dim))
        if not site.e_dim:
            out = writer.method("squeeze", out, len(dims) - 1)
        flat = [atom for dim in dims for atom in dim]
        order = [flat.index(atom) for dim in site.out_labels for atom in dim]
        if order != list(range(len(order))):
            out = writer.method("permute", out, *order)
        return writer.method("reshape", out, *self._shape(writer, site.final))

    def _side(self, writer: PackedWriter, site: Site, leaf: Leaf, rows: Rows | None, dim: Dim, width: Dim) -> fx.Node:
        """q, k or v as the op takes it: [1, *batch, rows, width] where it is packed."""
        if rows is None:
            return writer.canonical(leaf, site.batch, dim, width)
        places = (Atom(rows.total),)
        sequence = site.batch[0]
        labels = tuple(
            tuple(b for a in d if a is not sequence for b in (places if (a,) == dim else (a,))) for d in leaf.labels
        )
        return writer.canonical(replace(leaf, labels=labels), site.batch, places, width)

    # -- results

    def _result(self, writer: PackedWriter, end: Unpad | Packed | Exit, source: fx.Node) -> fx.Node:
        found = self.made[source]
        if isinstance(end, Exit):
            like = value_of(end.node)
            result = writer.checked(end.write(writer, found), "what leaves packed rows", like.shape, like.dtype)
            return writer.laid_out(result, like)
        if isinstance(end, Packed):
            return found
        for made, same in end.passed:
            writer.made[made] = writer.node_for(same)
        rows = self.carried.rows_of(self.carried.labels[source])
        found = writer.method("squeeze", found, 0)
        if end.mask is not None:
            # read by _select
            self.table(writer, rows, "rows")
            return found
        if end.zeros and not rows.exact:
            lies = self.table(writer, rows, "lies")
            rank = len(shape_of(source)) - 1
            lies = writer.method("view", lies, -1, *([1] * (rank - 1)))
            zero = writer.call(torch.zeros, ((),), {"dtype": dtype_of(source), "device": writer.device})
            found = writer.call(torch.where, (lies, found, zero))
        writer.checked(found, "what is taken out", [rows.total, *shape_of(end.node)[1:]], dtype_of(end.node))
        # it is nobody else's memory: not the packed input's, nor what an op keeps for backward
        return writer.call(torch.clone, (found,), {"memory_format": torch.contiguous_format})

    def _select(self, writer: PackedWriter, node: fx.Node, owner: fx.Node, end: Unpad, packed: fx.Node) -> None:
        """padded[mask]: the same call on the numbers of the packed rows keeps the size it makes known."""
        rows = self.carried.rows_of(self.carried.labels[end.source])
        users = [u for u in owner.users if not _is_size(u)]
        owner.args = (self.table(writer, rows, "rows"), owner.args[1])
        example = owner.meta["example_value"]
        with self.view.fake_mode:
            owner.meta["example_value"] = example.new_empty(example.shape[:1], dtype=torch.int64)
        with self.scope.module.graph.inserting_after(owner):
            chosen = writer.call(torch.index_select, (packed, 0, owner))
            writer.checked(chosen, "the packed rows of a mask", example.shape, example.dtype)
        for user in users:
            user.replace_input_with(owner, chosen)
        self.emitter.replaced[self.scope, node] = chosen


def _is_size(node: fx.Node) -> bool:
    """Whether the node asks for the number of rows; other sizes are those of the rows themselves."""
    asks = node.target is torch.ops.aten.sym_size.int or (node.op == "call_method" and node.target == "size")
    return asks and node.args[1:] == (0,)


class PackedWriter(NodeWriter):
    """Packed rows in the place of padded tensors."""

    def __init__(self, rewriter: RegionRewriter, owner: fx.Node, device: torch.device) -> None:
        super().__init__(rewriter.emitter, rewriter.scope, owner, device)
        self.rewriter = rewriter
        # the checkpointed region that is written for
        self.region: Scope | None = None

    def _describe(self, node: fx.Node) -> None:
        super()._describe(node)
        if self.region is not None:
            self.rewriter.checkpointed[node] = self.region

    def node_for(self, made: fx.Node) -> fx.Node:
        known = self.rewriter
        if made in known.made:
            return known.made[made]
        if isinstance(value_of(made), torch.Tensor) and made in known.carried.labels:
            raise EmitError(reasons.PADDED_NEEDED())
        if isinstance(value_of(made), torch.SymInt):
            # made again it might be the size of a packed tensor
            return self.size(value_of(made))  # type: ignore[return-value]
        return super().node_for(made)

    def product(self, sizes: Sequence[Size]) -> int | fx.Node:
        """The product of sizes, as an argument."""
        total: Any = 1
        for size in map(self.size, sizes):
            both = isinstance(total, int) and isinstance(size, int)
            total = total * size if both else self.call(operator.mul, (total, size))
        return total  # type: ignore[no-any-return]
