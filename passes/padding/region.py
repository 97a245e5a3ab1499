"""Padding taken out around attentions: what lies between a pad and an unpad runs on the packed rows.

A region begins at pads (padding.py), goes on through ops that keep rows apart (rowwise.py) and through attentions that hide
the padding, and ends at unpads and at attentions of dense queries. It is written anew on packed rows, as long as nothing else
uses a padded tensor of it; otherwise nothing changes, and its attentions say why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import fx

from attnfuse import _compat, reasons
from attnfuse.expr import FALSE, Const, Expr, NotExpressible
from attnfuse.passes.capture.view import View
from attnfuse.passes.graph.aten import is_tensor, name_of, shape_of, value_of
from attnfuse.passes.graph.labels import Axes, is_one, known_equal
from attnfuse.passes.graph.memory import opaque, same_memory
from attnfuse.passes.masks.terms import Axis
from attnfuse.passes.padding.exits import Exit
from attnfuse.passes.padding.packing import Packed, Packing
from attnfuse.passes.padding.rowwise import Carried, Mixed, Rows
from attnfuse.passes.padding.sources import Entry, Pad, Paddings, Unpad
from attnfuse.passes.read.isolation import read_by
from attnfuse.passes.site import Site
from attnfuse.reasons import Reason


@dataclass(eq=False)
class Region:
    """What is to run on packed rows, and where its results leave it."""

    carried: Carried
    pads: list[Pad]
    attentions: list[Packed] = field(default_factory=list)
    unpads: list[Unpad] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    exits: list[Exit] = field(default_factory=list)
    inside: set[fx.Node] = field(default_factory=set)
    # the unpads, and what they make besides
    ends: set[fx.Node] = field(default_factory=set)


def find_regions(view: View, sites: Sequence[Site]) -> tuple[list[Region], Reason | None]:
    """The regions of a view that can run on packed rows, and why something padded cannot, if that is so."""
    paddings = Paddings(view)
    if not paddings.pads or not sites:
        return [], None
    problem: Reason | None = None
    # all together, or else those of each padding by themselves
    tries = [paddings.rows] + ([[rows] for rows in paddings.rows] if len(paddings.rows) > 1 else [])
    found: list[Region] = []
    for rows in tries:
        try:
            region = _Finder(view, paddings, sites, rows).run()
        except Mixed as error:
            problem = problem or reasons.PADDING_STAYS(why=error.reason)
            continue
        if region is None:
            continue
        if any(region.ends & r.ends or region.inside & r.inside for r in found):
            problem = problem or reasons.PADDING_STAYS(why=reasons.PADDINGS_MEET())
            continue
        found.append(region)
        if rows is paddings.rows:
            break
    return found, problem


class _Finder:
    def __init__(self, view: View, paddings: Paddings, sites: Sequence[Site], rows: Sequence[Rows]) -> None:
        self.view = view
        self.paddings = paddings
        self.packing = Packing(paddings)
        self.region = Region(Carried(Axes(), list(rows)), [pad for pad in paddings.pads if pad.rows in rows])
        self.carried = self.region.carried
        self.pads = {pad.node: pad for pad in self.region.pads}
        self.finals = {site.final: site for site in sites}
        # what attentions do themselves
        self.taken: set[fx.Node] = set().union(*(site.inside for site in sites))

    def run(self) -> Region | None:
        region, carried = self.region, self.carried
        pads = self.pads
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
        self._check()
        return region

    def _op(self, node: fx.Node) -> None:
        unpad = self.paddings.unpad(node)
        if unpad is not None and unpad.source in self.carried.labels:
            self._unpad(node, unpad)
        elif node.target is opaque:
            raise Mixed(reasons.PADDING_OPAQUE())
        elif is_tensor(node) or isinstance(value_of(node), (list, tuple)):
            self.carried.carry(node)
            self._substitute(node)

    def _unpad(self, node: fx.Node, unpad: Unpad) -> None:
        labels = self.carried.labels[unpad.source]
        rows = self.carried.rows_of(labels)
        if labels[:2] != ((rows.sequence,), (rows.place,)) or self.carried.rows_in(labels[2:]):
            raise Mixed(reasons.PADDING_OUT_OF_DIMS())
        if unpad.offsets is not None:
            if not self.paddings.is_offsets(rows, unpad.offsets) or not known_equal(unpad.total, rows.total):
                raise Mixed(reasons.PADDING_OTHER_OFFSETS())
        else:
            assert unpad.mask is not None
            if self._beyond(unpad.mask, rows) != FALSE:
                raise Mixed(reasons.PADDING_OTHER_MASK())
        self.region.unpads.append(unpad)
        parts = [] if is_tensor(node) else node.users
        self.region.ends |= {node, unpad.node, *(made for made, _ in unpad.passed), *parts}

    def _beyond(self, mask: fx.Node, rows: Rows) -> Expr | None:
        """A mask [B, N] where places are beyond their sequences; None if it is not made of indices."""
        reader = self.paddings.terms()
        sequence, place = Axis(rows.sequence), Axis(rows.place)
        try:
            e = reader.at(mask, (sequence, place))
        except NotExpressible:
            return None
        return self.paddings.assumed(e, rows, sequence, place, False, reader.algebra)

    def _substitute(self, node: fx.Node) -> None:
        """Arguments that hold one number wherever there is a token need not be gathered."""
        for position in range(len(node.args)):
            found = self.carried.gathered.get((node, position))
            if found is None:
                continue
            x = cast(fx.Node, node.args[position])
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

    def _attention(self, site: Site) -> None:
        carried = self.carried
        own = [leaf.node in carried.labels for leaf in (site.q, site.k, site.v)]
        if not any(own):
            if any(n in carried.labels for leaf in site.operands for n in read_by(leaf)):
                raise Mixed(reasons.PADDING_IN_MASK())
            return
        if own[1] != own[2]:
            raise Mixed(reasons.PADDING_OF_KEYS_ALONE())
        if site.lse is not None:
            raise Mixed(reasons.PADDING_LOG_SUM_EXP())
        q = self.packing.side(carried, site, site.q, site.q_dim) if own[0] else None
        k = self.packing.side(carried, site, site.k, site.k_dim) if own[1] else None
        if k is not None and self.packing.side(carried, site, site.v, site.k_dim) is not k:
            raise Mixed(reasons.PADDING_OTHER_LENGTHS())
        packed = self.packing.packed(self.view, site, q, k)
        if any(n in carried.labels for leaf in packed.site.operands for n in read_by(leaf)):
            raise Mixed(reasons.PADDING_IN_MASK())
        self.region.attentions.append(packed)
        self.region.inside |= site.inside | {site.final}
        if q is not None:
            self.packing.label_result(carried, site, q)

    # -- what must hold of the whole

    def _check(self) -> None:
        view, carried = self.view, self.carried
        padded = [*carried.labels, *carried.parts]
        ends = self.region.ends | {a.original.final for a in self.region.attentions if a.q is None}
        for node in padded:
            origin = view.origin.get(node)
            if origin is not None and origin.scope.parent is not None:
                raise Mixed(reasons.PADDING_CHECKPOINT())
            self._check_uses(node)
        if len({view.grad.get(n, True) for n in (*padded, *ends)}) > 1:
            raise Mixed(reasons.PADDING_PARTLY_NO_GRAD())
        first, last = min(map(view.order.__getitem__, padded)), max(map(view.order.__getitem__, ends))
        for node in padded:
            self._check_writes(node, last)
        for node in self._read_late():
            if view.writes.between(node, view.order[node], last):
                raise Mixed(reasons.PADDING_WRITES_NEAR())
        self._check_modes(first, last)

    def _read_late(self) -> set[fx.Node]:
        """What is read only where the region ends: the rows of sequences, and what attentions read besides padded tensors."""
        read = {n for rows in self.carried.rows for n in (rows.offsets, rows.lengths) if n is not None}
        for a in self.region.attentions:
            for leaf in (a.site.q, a.site.k, a.site.v, *a.site.operands):
                read.update(n for n in read_by(leaf) if n not in self.carried.labels)
        return read

    def _check_uses(self, node: fx.Node) -> None:
        known = self.region.inside | self.region.ends
        for user in node.users:
            if user not in self.view.live or user in known or user in self.carried.labels or user in self.carried.parts:
                continue
            if is_tensor(user) or user.op == "output" or user.target is opaque or not is_number(user):
                what = "the graph's output" if user.op == "output" else name_of(user) or "other code"
                raise Mixed(reasons.PADDING_USED(user=what))

    def _check_writes(self, node: fx.Node, last: int) -> None:
        """Nothing of the region is written in place, and nothing it reads between where it is read now and its end."""
        order, writes = self.view.order, self.view.writes
        if node in self.pads and node.args and any(same_memory(node, x) for x in node.all_input_nodes):
            # padded[mask] = values: no other name of that memory is known to be read
            target = node.args[0]
            for other in self.view.graph.nodes:
                if other not in (node, target) and other not in self.carried.labels and same_memory(other, node):
                    raise Mixed(reasons.PADDING_WRITTEN())
        elif any(w not in self.pads for w in writes.to(node)):
            raise Mixed(reasons.PADDING_WRITTEN())
        for source in node.all_input_nodes:
            if source not in self.carried.labels and writes.between(source, order[node], last):
                raise Mixed(reasons.PADDING_WRITES_NEAR())

    def _check_modes(self, first: int, last: int) -> None:
        """No autocast region begins or ends in between."""
        view = self.view
        own = {view.origin[n].node for n in view.graph.nodes if first <= view.order[n] <= last and n in view.origin}
        nodes = list(view.scopes[0].module.graph.nodes)
        places = [i for i, node in enumerate(nodes) if node in own]
        for node in nodes[places[0] : places[-1]]:
            if node.target in (_compat.enter_autocast, _compat.exit_autocast):
                raise Mixed(reasons.PADDING_AUTOCAST())


def is_number(node: fx.Node) -> bool:
    """Whether it is a number, symbolic or not, and no tensor."""
    return isinstance(value_of(node), (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))
