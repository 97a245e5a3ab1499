"""Padding taken out around attentions: what lies between a pad and an unpad runs on the packed rows.

A region begins at pads (padding.py), goes on through ops that keep rows apart (rowwise.py) and through attentions that hide
the padding, and ends at unpads and at attentions of dense queries. It is written anew on packed rows, as long as nothing else
uses a padded tensor of it; otherwise nothing changes, and its attentions say why.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from attnfuse import _compat
from attnfuse.expr import FALSE, TRUE, Algebra, Const, Expr, K, NotExpressible, Q, substitute
from attnfuse.passes import views
from attnfuse.passes.aten import dtype_of, is_tensor, name_of, shape_of
from attnfuse.passes.capture import View, getitem_source, opaque, value_of
from attnfuse.passes.emit import EmitError, Emitter, Writer
from attnfuse.passes.labels import Atom, Axes, Dim, Labels, Size, is_one, known_equal
from attnfuse.passes.padding import Pad, Paddings, Unpad
from attnfuse.passes.read import read_by
from attnfuse.passes.rowwise import Carried, Gathered, Mixed, Rows
from attnfuse.passes.site import Leaf, Site
from attnfuse.passes.structure import Fill, structured_assuming
from attnfuse.passes.terms import Axis
from attnfuse.spec import AddFill, Attention, Bias, Cast, Layout, ReplaceFill, Shift

#: What a hidden score must be filled with, so that no score of a token is as small.
_HIDES = -1e9
#: Steps after which a hidden score is hidden.
_LEAVE_HIDDEN = (ReplaceFill, AddFill, Bias, Shift, Cast)


@dataclass(eq=False)
class Packed:
    """An attention on packed rows. site: as it is in the graph, but for what is known of the padding.

    q, k: the rows of the queries, and of the keys and values; None where they are dense.
    """

    site: Site
    original: Site
    spec: Attention
    q: Rows | None
    k: Rows | None


@dataclass(eq=False)
class Region:
    """What is to run on packed rows, and where its results leave it."""

    carried: Carried
    pads: list[Pad]
    attentions: list[Packed] = field(default_factory=list)
    unpads: list[Unpad] = field(default_factory=list)
    inside: set[fx.Node] = field(default_factory=set)
    # the unpads, and what they make besides
    ends: set[fx.Node] = field(default_factory=set)


def find(view: View, sites: Sequence[Site]) -> tuple[list[Region], str]:
    """The regions of a view that can run on packed rows, and why something padded cannot, or ''."""
    paddings = Paddings(view)
    if not paddings.pads or not sites:
        return [], ""
    problem = ""
    # all together, or else those of each padding by themselves
    tries = [paddings.rows] + ([[rows] for rows in paddings.rows] if len(paddings.rows) > 1 else [])
    found: list[Region] = []
    for rows in tries:
        try:
            region = _Finder(view, paddings, sites, rows).run()
        except Mixed as reason:
            problem = problem or f"padding stays: {reason}"
            continue
        found += [region] if region is not None else []
        if rows is paddings.rows:
            break
    return found, problem


class _Finder:
    def __init__(self, view: View, paddings: Paddings, sites: Sequence[Site], rows: Sequence[Rows]) -> None:
        self.view = view
        self.paddings = paddings
        self.region = Region(Carried(Axes(), list(rows)), [pad for pad in paddings.pads if pad.rows in rows])
        self.carried = self.region.carried
        self.finals = {site.final: site for site in sites}
        # what attentions of the region do themselves
        self.taken: dict[fx.Node, Site] = {}
        for site in sites:
            for node in site.inside:
                self.taken[node] = site

    def run(self) -> Region | None:
        region, carried = self.region, self.carried
        pads = {pad.node: pad for pad in region.pads}
        for node in self.view.graph.nodes:
            if node not in self.view.live:
                continue
            if node in pads:
                rest = [carried.axes.fresh(n) for n in shape_of(node)[2:]]
                carried.labels[node] = ((pads[node].rows.sequence,), (pads[node].rows.place,), *rest)
            elif node in self.finals:
                self._attention(self.finals[node])
            elif carried.takes(node) and node not in self.taken and node not in region.ends:
                self._op(node)
        if not region.attentions:
            return None
        self._check_uses()
        return region

    def _op(self, node: fx.Node) -> None:
        unpad = self.paddings.unpad(node)
        if unpad is not None and unpad.source in self.carried.labels:
            self._unpad(node, unpad)
        elif node.target is opaque:
            raise Mixed("opaque code takes padded tensors")
        elif is_tensor(node) or isinstance(value_of(node), (list, tuple)):
            self.carried.carry(node)
            self._substitute(node)

    def _unpad(self, node: fx.Node, unpad: Unpad) -> None:
        labels = self.carried.labels[unpad.source]
        rows = self.carried.rows_of(labels)
        if labels[:2] != ((rows.sequence,), (rows.place,)) or self.carried.rows_in(labels[2:]):
            raise Mixed("rows are taken out of a tensor whose first dims are not those of the padding")
        if unpad.offsets is not None:
            if not self.paddings.is_offsets(rows, unpad.offsets) or not known_equal(unpad.total, rows.total):
                raise Mixed("rows are taken out by other offsets than they were padded by")
        else:
            assert unpad.mask is not None
            if self._mask(unpad.mask, rows, False) != FALSE:
                raise Mixed("rows are taken out by a mask that is not known to leave out the padding")
        self.region.unpads.append(unpad)
        parts = [] if is_tensor(node) else node.users
        self.region.ends |= {node, unpad.node, *(made for made, _ in unpad.passed), *parts}

    def _mask(self, mask: fx.Node, rows: Rows, holds: bool) -> Expr | None:
        """A tensor [B, N] where places are within their sequences, or are not; None if it is not made of indices."""
        reader = self.paddings.terms()
        sequence, place = Axis(rows.sequence), Axis(rows.place)
        try:
            e = reader.at(mask, (sequence, place))
        except NotExpressible:
            return None
        return self.paddings.assumed(e, rows, sequence, place, holds, reader.algebra)

    def _substitute(self, node: fx.Node) -> None:
        """Arguments that hold one number wherever there is a token need not be gathered."""
        for position in range(len(node.args)):
            found = self.carried.gathered.get((node, position))
            if found is None:
                continue
            x: fx.Node = node.args[position]  # type: ignore[assignment]
            reader = self.paddings.terms()
            index = tuple(Axis(d[0]) if len(d) == 1 else None for d in found.dims)
            if any(i is None for i, d in zip(index, found.dims) if d):
                continue
            if any(i is None and not is_one(n) for i, n in zip(index, shape_of(x))):
                continue
            try:
                e = reader.at(x, tuple(Const(0) if i is None else i for i in index))
            except NotExpressible:
                continue
            rows = found.rows
            e = self.paddings.assumed(e, rows, Axis(rows.sequence), Axis(rows.place), True, reader.algebra)
            if isinstance(e, Const):
                self.carried.gathered[node, position] = replace(found, number=e.value)

    # -- attentions

    def _attention(self, site: Site) -> None:
        carried = self.carried
        own = [leaf.node in carried.labels for leaf in (site.q, site.k, site.v)]
        if not any(own):
            if any(n in carried.labels for leaf in site.operands for n in read_by(leaf)):
                raise Mixed("an attention's mask or bias is made of padded tensors")
            return
        if own[1] != own[2]:
            raise Mixed("keys or values are not padded alike")
        if site.lse is not None:
            raise Mixed("the log-sum-exp of scores is used")
        q = self._side(site, site.q, site.q_dim) if own[0] else None
        k = self._side(site, site.k, site.k_dim) if own[1] else None
        if k is not None and self._side(site, site.v, site.k_dim) is not k:
            raise Mixed("keys and values are padded by other lengths")
        raw = site.unread or site
        assumed, fills, algebra = structured_assuming(self.view, raw, lambda e, g: self._assume(e, g, raw, q, k))
        if any(n in carried.labels for leaf in assumed.operands for n in read_by(leaf)):
            raise Mixed("an attention's mask or bias is made of padded tensors")
        problem = None if k is None else self._unhidden(raw, fills, algebra, q, k)
        if problem is not None:
            raise Mixed(problem)
        self.region.attentions.append(Packed(assumed, site, _packed_spec(assumed, q, k), q, k))
        self.region.inside |= site.inside | {site.final}
        if q is not None:
            self._label_result(site, q)

    def _side(self, site: Site, leaf: Leaf, dim: Dim) -> Rows:
        """The rows of q, k or v, if its padded dims are the first batch dim and that of the queries or keys."""
        labels = self.carried.axes.resolve(self.carried.labels[leaf.node])
        rows = self.carried.rows_of(labels)
        if not site.batch or len(dim) != 1:
            raise Mixed("an attention of one sequence")
        expected = {rows.sequence: site.batch[0], rows.place: dim[0]}
        for have, found in zip(labels, leaf.labels, strict=True):
            if not self.carried.rows_in([have]):
                continue
            if len(have) != len(found) or any(
                (a in expected and expected[a] is not b) or not known_equal(a.size, b.size) for a, b in zip(have, found)
            ):
                raise Mixed("an attention whose first batch dim is not that of the sequences")
        return rows

    def _assume(self, e: Expr, algebra: Algebra, site: Site, q: Rows | None, k: Rows | None) -> Expr:
        sequence = Axis(site.batch[0])
        if k is not None:
            e = self.paddings.assumed(e, k, sequence, K, True, algebra)
        if q is not None:
            # other queries are not read
            e = self.paddings.assumed(e, q, sequence, Q, True, algebra)
        return e

    def _unhidden(self, site: Site, fills: list[Fill], algebra: Algebra, q: Rows | None, k: Rows) -> str | None:
        """Why keys of padding may have a weight, or be needed for a row that sees no other; None if neither is so."""
        sequence = Axis(site.batch[0])
        hiding = [f for f in fills if self.paddings.assumed(f.keep, k, sequence, K, False, algebra) == FALSE]
        if not hiding:
            return "the attention is not known to hide keys of padding"
        last = hiding[-1]
        if any(not isinstance(step, _LEAVE_HIDDEN) for step in site.spec.steps[last.step + 1 :]):
            return "what is done to hidden scores may show keys of padding"
        later = [f.value for f in fills if f.step >= last.step]
        if all(value == -torch.inf for value in later) and (q is k or site.spec.hidden == "zero"):
            return None
        if q is not k:
            return "a query without keys would see padding"
        low = torch.finfo(torch.float16).min if site.spec.qk_dtype == "float16" else _HIDES
        if any(value > low for value in later):
            return "keys of padding are filled with a number that a score may come near to"
        own = [substitute(self._assume(f.keep, algebra, site, q, k), {K: Q}, algebra) for f in fills]
        if any(keep != TRUE for keep in own):
            return "a row may hide all of its keys, and would see padding"
        return None

    def _label_result(self, site: Site, rows: Rows) -> None:
        own = {site.batch[0]: rows.sequence, site.q_dim[0]: rows.place}
        fresh: dict[Atom, Atom] = {}
        self.carried.labels[site.final] = tuple(
            tuple(own.get(a) or fresh.setdefault(a, Atom(a.size)) for a in dim) for dim in site.out_labels
        )

    # -- what must hold of the whole

    def _check_uses(self) -> None:
        view, carried = self.view, self.carried
        consumed = self.region.inside | self.region.ends
        grads = set()
        for node in [*carried.labels, *carried.parts]:
            origin = view.origin.get(node)
            if origin is not None and origin.scope.parent is not None:
                raise Mixed("padded tensors go into a checkpointed region")
            if node not in {pad.node for pad in self.region.pads}:
                grads.add(view.grad.get(node, True))
                self._check_writes(node)
            for user in node.users:
                if user not in view.live or user in consumed or user in carried.labels or user in carried.parts:
                    continue
                if is_tensor(user) or user.op == "output" or user.target is opaque or not _is_number(user):
                    what = "the graph's output" if user.op == "output" else name_of(user) or "other code"
                    raise Mixed(f"a padded tensor is used by {what}")
        if len(grads) > 1:
            raise Mixed("part of what is padded is computed without gradients")
        first = min(view.order[n] for n in carried.labels)
        last = max(view.order[n] for n in (*self.region.ends, *self.region.inside))
        modes = (_compat.enter_autocast, _compat.exit_autocast)
        between = {view.origin[n].node for n in view.graph.nodes if first <= view.order[n] <= last and n in view.origin}
        graph = view.scopes[0].module.graph
        within = False
        for node in graph.nodes:
            within = within or node in between
            if within and node.target in modes and any(later in between for later in _after(node)):
                raise Mixed("an autocast region begins or ends within the padded part")

    def _check_writes(self, node: fx.Node) -> None:
        value = value_of(node)
        own = [value] if isinstance(value, torch.Tensor) else []
        if any(self.view.writes.get(_compat.alias_key(x)) for x in own):
            raise Mixed("a padded tensor is written in place")


def _after(node: fx.Node) -> Any:
    at = node.next
    while at.op != "root":
        yield at
        at = at.next


def _is_number(node: fx.Node) -> bool:
    return isinstance(value_of(node), (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))


def _packed_spec(site: Site, q: Rows | None, k: Rows | None) -> Attention:
    spec = site.spec
    layout: Layout = "packed" if q and k else "packed_queries" if q else "packed_keys"
    sizes = list(spec.sizes)
    rank = len(spec.batch) + 2
    sizes[0] = None
    for rows, at in ((q, -4), (k, -3)):
        if rows is not None:
            sizes[at] = None
    order = (0, rank - 2, *range(1, rank - 2), rank - 1) if q is not None else spec.out_order
    return replace(spec, sizes=tuple(sizes), layout=layout, out_order=order)


# -- writing


class Unpadder:
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
        self.sizes: dict[Atom, Size] = {}
        for rows in self.carried.rows:
            self.sizes[rows.sequence], self.sizes[rows.place] = 1, rows.total
        self.pads = {pad.node: pad for pad in region.pads}
        self.attentions = {a.original.final: (a, kernel) for a, kernel in zip(region.attentions, kernels, strict=True)}

    def emit(self) -> None:
        """Replace the results of the region. Raises EmitError with the graph as it was."""
        ends: list[tuple[fx.Node, Unpad | Packed]] = [(u.node, u) for u in self.region.unpads]
        ends += [(a.original.final, a) for a in self.region.attentions if a.q is None]
        ends.sort(key=lambda end: self.view.order[end[0]])
        graph = self.scope.module.graph
        before = set(graph.nodes)
        results = []
        try:
            for node, end in ends:
                owner = self.view.origin[node].node
                writer = _Writer(self, owner, value_of(node).device)
                with graph.inserting_before(owner):
                    source = end.source if isinstance(end, Unpad) else node
                    self._write(writer, source)
                    results.append((node, owner, writer, self._result(writer, end, source)))
                if isinstance(end, Packed) and self.scope.values[owner] is not node:
                    raise EmitError("an attention of padded keys lies inside of another call")
        except EmitError:
            for new in reversed(list(graph.nodes)):
                if new not in before:
                    graph.erase_node(new)
            raise
        for (node, owner, writer, result), (_, end) in zip(results, ends, strict=True):
            if isinstance(end, Unpad) and end.mask is not None:
                self._select(writer, node, owner, end, result)
            else:
                self.emitter.redirect(node, self.scope, owner, result, writer)
        self.emitter.touched.add(self.scope)
        self.emitter.calls += [self.calls[a.original.final] for a in self.region.attentions]

    @property
    def inside(self) -> set[fx.Node]:
        """View nodes that nothing needs any more."""
        kept = {u.node for u in self.region.unpads if u.mask is not None}
        own = set(self.carried.labels) | set(self.carried.parts)
        return (self.region.inside | own | self.region.ends) - kept

    # -- the order of things

    def _write(self, writer: _Writer, target: fx.Node) -> None:
        """All that `target` needs, and itself."""
        needed: set[fx.Node] = set()
        stack = [target]
        while stack:
            node = stack.pop()
            if node not in needed and node not in self.made:
                needed.add(node)
                stack += self._sources(node)
        for node in sorted(needed, key=self.view.order.__getitem__):
            writer.written_for = self.view.origin[node].node
            self.made[node] = self._written(writer, node)
        writer.written_for = writer.owner

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        if node in self.pads:
            return []
        if node in self.attentions:
            site = self.attentions[node][0].site
            return [leaf.node for leaf in (site.q, site.k, site.v) if leaf.node in self.carried.labels]
        return [n for n in node.all_input_nodes if n in self.carried.labels or n in self.carried.parts]

    def _written(self, writer: _Writer, node: fx.Node) -> fx.Node:
        if node in self.pads:
            return self._values(writer, self.pads[node])
        if node in self.attentions:
            return self._attended(writer, *self.attentions[node])
        source = getitem_source(node)
        if source is not None:
            return writer.getitem(self.made[source[0]], source[1])
        name = name_of(node)
        if views.is_identity(node):
            return self.made[node.args[0]]  # type: ignore[index]
        if name == "to":
            return writer.method("to", self.made[node.args[0]], dtype_of(node))  # type: ignore[index]
        if name in ("view", "expand"):
            shape = self._shape(writer, node)
            return writer.method("expand" if name == "expand" else "reshape", self.made[node.args[0]], *shape)  # type: ignore[index]
        args = [self._argument(writer, node, i, x) for i, x in enumerate(node.args)]
        kwargs = fx.node.map_arg(dict(node.kwargs), writer.node_for)
        return writer.call(node.target, tuple(args), kwargs)  # type: ignore[arg-type]

    def _argument(self, writer: _Writer, node: fx.Node, position: int, x: Any) -> Any:
        found = self.carried.gathered.get((node, position))
        return fx.node.map_arg(x, writer.node_for) if found is None else self._gathered(writer, found, x)

    def _shape(self, writer: _Writer, node: fx.Node) -> list[int | fx.Node]:
        return writer.shape([self._size(dim) for dim in self.carried.axes.resolve(self.carried.labels[node])])

    def _size(self, dim: Dim) -> Any:
        size: Any = 1
        for a in dim:
            size = size * self.sizes.get(a, a.size)
        return size

    # -- rows

    def _values(self, writer: _Writer, pad: Pad) -> fx.Node:
        if pad.values is not None:
            return writer.method("unsqueeze", writer.node_for(pad.values), 0)
        origin = self.view.origin[pad.node].node
        return writer.method("unsqueeze", writer.method("values", origin.args[0]), 0)

    def _offsets(self, writer: _Writer, rows: Rows) -> fx.Node:
        """[B + 1]."""
        if rows.nested is not None:
            return writer.method("offsets", rows.nested)
        if rows.offsets is not None:
            return writer.here(rows.offsets)
        assert rows.lengths is not None
        lengths = writer.call(
            torch.clamp, (writer.here(rows.lengths),), {"min": 0, "max": writer.size(rows.place.size)}
        )
        return writer.call(torch.nn.functional.pad, (writer.call(torch.cumsum, (lengths, 0)), (1, 0)))

    def table(self, writer: _Writer, rows: Rows, what: str) -> fx.Node:
        """Made once: 'offsets' [B + 1]; 'bounds' [2, B] as the op takes them; of each packed row its 'sequence' and 'place',
        and whether it 'lies' in the padded tensor; 'rows' [B, N], the packed row of each place."""
        if (rows, what) not in self.tables:
            self.tables[rows, what] = self._table(writer, rows, what)
        return self.tables[rows, what]

    def _table(self, writer: _Writer, rows: Rows, what: str) -> fx.Node:
        call = writer.call
        if what == "offsets":
            return self._offsets(writer, rows)
        offsets = self.table(writer, rows, "offsets")
        start, end = (call(torch.narrow, (offsets, 0, at, writer.size(rows.sequence.size))) for at in (0, 1))
        if what == "bounds":
            if not rows.exact:
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

    def _below(self, writer: _Writer, x: fx.Node, size: Any) -> fx.Node:
        return writer.call(torch.clamp, (x,), {"min": 0, "max": self._less(writer, size)})

    def _less(self, writer: _Writer, size: Any) -> Any:
        found = writer.size(size)
        return found - 1 if isinstance(found, int) else writer.call(operator.sub, (found, 1))

    def _gathered(self, writer: _Writer, found: Gathered, x: fx.Node) -> fx.Node:
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

    def _place_times(self, writer: _Writer, rows: Rows) -> fx.Node:
        return writer.call(torch.mul, (self.table(writer, rows, "sequence"), writer.size(rows.place.size)))

    # -- attentions

    def _attended(self, writer: _Writer, a: Packed, kernel: str) -> fx.Node:
        site = a.site
        q = self._side(writer, site, site.q, a.q, site.q_dim, site.d_dim)
        k = self._side(writer, site, site.k, a.k, site.k_dim, site.d_dim)
        v = self._side(writer, site, site.v, a.k, site.k_dim, site.e_dim)
        operands = [writer.operand(leaf, site) for leaf in site.operands]
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
        if not site.e_dim:
            out = writer.method("squeeze", out, len(dims) - 1)
        flat = [atom for dim in dims for atom in dim]
        order = [flat.index(atom) for dim in site.out_labels for atom in dim]
        if order != list(range(len(order))):
            out = writer.method("permute", out, *order)
        return writer.method("reshape", out, *self._shape(writer, site.final))

    def _side(self, writer: _Writer, site: Site, leaf: Leaf, rows: Rows | None, dim: Dim, width: Dim) -> fx.Node:
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

    def _result(self, writer: _Writer, end: Unpad | Packed, source: fx.Node) -> fx.Node:
        found = self.made[source]
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
        return writer.method("contiguous", found)

    def _select(self, writer: _Writer, node: fx.Node, owner: fx.Node, end: Unpad, packed: fx.Node) -> None:
        """padded[mask]: the same call on the numbers of the packed rows keeps the size it makes known."""
        rows = self.carried.rows_of(self.carried.labels[end.source])
        users = [u for u in owner.users if not _is_size(u)]
        owner.args = (self.table(writer, rows, "rows"), owner.args[1])
        example = owner.meta["example_value"]
        with self.view.fake_mode:
            owner.meta["example_value"] = example.new_empty(example.shape[:1], dtype=torch.int64)
        with self.scope.module.graph.inserting_after(owner):
            chosen = writer.call(torch.index_select, (packed, 0, owner))
        for user in users:
            user.replace_input_with(owner, chosen)
        self.emitter.replaced[self.scope, node] = chosen


def _is_size(node: fx.Node) -> bool:
    if node.target is torch.ops.aten.sym_size.int:
        return True
    return node.op == "call_method" and node.target == "size"


class _Writer(Writer):
    """Packed rows in the place of padded tensors."""

    def __init__(self, unpadder: Unpadder, owner: fx.Node, device: torch.device) -> None:
        super().__init__(unpadder.emitter, unpadder.scope, owner, device)
        self.unpadder = unpadder

    def node_for(self, made: fx.Node) -> fx.Node:
        known = self.unpadder
        if made in known.made:
            return known.made[made]
        if isinstance(value_of(made), torch.Tensor) and made in known.carried.labels:
            raise EmitError("a padded tensor is needed where it is not packed")
        return super().node_for(made)
