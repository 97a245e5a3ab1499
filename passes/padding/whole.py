"""Padding that comes in with the batch: which rows of padded tensors nothing reads, from the graph's inputs to its results.

A mask that hides keys says which places of a batch [B, N] are tokens. Tensors with these two dims are labelled going forward:
what that says is only which index each dim runs over. Going back, a tensor is read at hidden places if something does that reads
it there: an op that keeps rows apart and whose own result is, a result of the graph, an op that mixes rows. Attentions do not read
hidden keys, and of queries those that are read; and some ops read a padded tensor, but not its padding (exits.py). What is not read
at hidden places is written anew on the rows of the tokens (rewrite.py), which come out of the tensors that stay as they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from attnfuse import _compat, reasons
from attnfuse.expr import (
    FALSE,
    TRUE,
    Algebra,
    Apply,
    Const,
    Expr,
    Index,
    K,
    Linear,
    Load,
    NotExpressible,
    Q,
    substitute,
    walk,
)
from attnfuse.kernels.fills import HIDDEN_BELOW
from attnfuse.passes.capture.view import Origin, Scope, View
from attnfuse.passes.graph.aten import (
    arguments,
    dtype_of,
    is_tensor,
    name_of,
    shape_of,
    source_of,
    value_of,
)
from attnfuse.passes.graph.constants import constant, converted
from attnfuse.passes.graph.labels import Atom, Axes, Labels, is_one, known_equal
from attnfuse.passes.graph.memory import is_mutating, is_stale, opaque, same_memory
from attnfuse.passes.masks.structure import Fill, structured_assuming
from attnfuse.passes.masks.terms import Axis
from attnfuse.passes.padding.checkpointed import is_checkpointed
from attnfuse.passes.padding.exits import Computed, Contracted, Exit, Greatest, Guard, Selected, Spread, Summed
from attnfuse.passes.padding.kept import Kept, Labelled, conditions
from attnfuse.passes.padding.modes import autocast_regions
from attnfuse.passes.padding.packing import Packed, Packing
from attnfuse.passes.padding.region import Region, is_number
from attnfuse.passes.padding.rowwise import Carried, Mixed, Rows
from attnfuse.passes.padding.sources import Entry, Paddings, Unpad
from attnfuse.passes.read.isolation import read_by
from attnfuse.passes.site import Leaf, Site
from attnfuse.reasons import Reason, ReasonError
from attnfuse.spec import Attention

#: A fill of masked places that no value of a tensor is taken to be as low as.
_LOW = -1e4


@dataclass(eq=False)
class Whole(Region):
    """A region that begins in tensors of the graph. kept: what says where tokens are."""

    kept: list[Rows] = field(default_factory=list)
    guards: list[Guard] = field(default_factory=list)
    # why some tensors stay padded: what reads them, with the line
    read: list[Reason] = field(default_factory=list)


def find_whole(
    view: View, sites: Sequence[Site], runs: Callable[[Attention, Site], Reason | None], drop: bool
) -> Whole | Reason | None:
    """The region, why there is none though something is padded, or None where nothing is. drop: results are not read there."""
    finder = _Finder(view, sites, runs, drop)
    if not finder.rows:
        return None
    try:
        return finder.run()
    except Mixed as error:
        return error.reason


class _Finder:
    def __init__(
        self, view: View, sites: Sequence[Site], runs: Callable[[Attention, Site], Reason | None], drop: bool
    ) -> None:
        self.view = view
        self.runs = runs
        self.drop = drop
        self.sites = list(sites)
        self.finals = {site.final: site for site in sites}
        self.inside: set[fx.Node] = set().union(*(site.inside for site in sites))
        self.packing = Packing(Paddings(view, of_graph=False))
        self.rows: list[Rows] = []
        # the rows of each attention's keys
        self.keys: dict[Site, Rows] = {}
        for site in sites:
            self._find_rows(site)
        self.carried = Carried(Axes(), list(self.rows))
        # labelled by an op on labelled tensors; the others stand for themselves
        self.derived: set[fx.Node] = set()
        # what an attention takes, and as what
        self.leaves: dict[fx.Node, list[tuple[Site, str]]] = {}
        for site in sites:
            for leaf, role in ((site.q, "q"), (site.k, "k"), (site.v, "v"), *((x, "operand") for x in site.operands)):
                for node in read_by(leaf):
                    self.leaves.setdefault(node, []).append((site, role))
        self.problems: dict[fx.Node, Reason] = {}
        # whether what regions make can be packed
        self.regions: dict[Scope, bool] = {}
        # rows of which each sequence must have one for what is known of padding
        self.some: set[Rows] = set()
        self.modes = autocast_regions(view)
        self.main = {self._mode(site.final) for site in sites}
        self.given = [n for n in view.graph.nodes if n.op == "placeholder" and is_tensor(n)]

    # -- which places are kept

    def _find_rows(self, site: Site) -> None:
        raw = site.unread or site
        if not site.batch or not site.k_dim or is_one(site.batch[0].size) or is_one(site.k_dim[0].size):
            return
        fills = structured_assuming(self.view, raw, lambda e, algebra: e)[1]
        self._find_masked(site, raw, fills)
        if site not in self.keys:
            self._find_labelled(site, fills)

    def _find_labelled(self, site: Site, fills: Sequence[Fill]) -> None:
        """The rows of an attention that sees no key behind a query, where a loss says which queries count."""
        batch, longest = site.batch[0].size, site.k_dim[0].size
        if not site.q_dim or not known_equal(site.q_dim[0].size, longest):
            return
        for node, ignored in self._labels():
            if not all(map(known_equal, shape_of(node), (batch, longest))):
                continue
            for rows in self.rows:
                if isinstance(rows.kept, Labelled) and rows.kept.labels is node:
                    self.keys[site] = rows
                    return
            sequence, place = Atom(batch), Atom(longest)
            kept = Labelled(sequence, place, TRUE, node, ignored)
            if not any(kept.assumed(f.keep, Axis(site.batch[0]), K, False, Algebra()) == FALSE for f in fills):
                continue
            rows = Rows(sequence, place, None, exact=True, kept=kept)
            self.rows.append(rows)
            self.keys[site] = rows
            return

    def _labels(self) -> Iterator[tuple[fx.Node, int]]:
        """The labels [B, N] of losses, with the number that does not count."""
        for node in self.view.graph.nodes:
            if name_of(node) not in _LOSSES or node not in self.view.live:
                continue
            args = arguments(node)
            target = args["target"]
            while (
                is_tensor(target) and len(shape_of(target)) != 2 and name_of(target) in _MOVED and not is_stale(target)
            ):
                target = source_of(target)
            if is_tensor(target) and len(shape_of(target)) == 2 and not dtype_of(target).is_floating_point:
                yield target, int(args["ignore_index"])

    def _find_masked(self, site: Site, raw: Site, fills: Sequence[Fill]) -> None:
        for condition in conditions(raw, fills):
            for rows in self.rows:
                if rows.kept is None or isinstance(rows.kept, Labelled):
                    continue
                same = all(
                    known_equal(a.size, b.size)
                    for a, b in ((rows.sequence, site.batch[0]), (rows.place, site.k_dim[0]))
                )
                if same and rows.kept.at(Axis(site.batch[0]), K, Algebra()) == condition:
                    self.keys[site] = rows
                    return
            sequence, place = Atom(site.batch[0].size), Atom(site.k_dim[0].size)
            own: dict[Expr, Expr] = {Axis(site.batch[0]): Axis(sequence), K: Axis(place)}
            kept = Kept(sequence, place, substitute(condition, own, Algebra()))
            rows = Rows(sequence, place, None, exact=True, kept=kept)
            self.rows.append(rows)
            self.keys[site] = rows
            return

    # -- labels

    def run(self) -> Whole | Reason | None:
        self._label()
        forced = self._forced()
        while True:
            found = self._liveness(forced)
            # what cannot be gathered, since its dims lie otherwise, makes what would read it stay
            more = {user for x, users in found.entries.items() for user in users if not self._can_be_gathered(x)}
            if not more - forced:
                break
            forced |= more
        if not found.packs:
            return self._why_not(found)
        # hidden keys of dense queries are skipped as it is, and a cache may be read through its block table
        return self._whole(found) if any(p.q is not None for p in found.packs.values()) else None

    def _label(self) -> None:
        view, carried = self.view, self.carried
        for node in view.graph.nodes:
            site = self.finals.get(node)
            if site is not None:
                self._label_site(site)
                continue
            if node not in view.live or node in self.inside:
                continue
            if node.op == "output" or not self._is_in_reach(node):
                continue
            if node.target is not opaque and not is_mutating(node) and carried.takes(node):
                if not (is_tensor(node) or isinstance(value_of(node), (list, tuple))):
                    continue
                before = dict(carried.axes.parts)
                try:
                    carried.carry(node)
                except Mixed as error:
                    carried.axes.parts = before
                    carried.labels.pop(node, None)
                    carried.parts.pop(node, None)
                    self.problems[node] = error.reason
                else:
                    self.derived.add(node)
                    continue
            self._label_anew(node)

    def _is_in_reach(self, node: fx.Node) -> bool:
        """Whether it is made in the main graph, or in a checkpointed region of it that has no modes of its own."""
        origin = self.view.origin.get(node)
        if origin is None or origin.scope.parent is None:
            return True
        if origin.scope not in self.regions:
            plain = not any(n.target in _compat.MODE_CALLS for n in origin.scope.module.graph.nodes)
            self.regions[origin.scope] = plain and is_checkpointed(origin.scope)
        return self.regions[origin.scope]

    def _label_anew(self, node: fx.Node) -> None:
        """A tensor with dims of sequences and places that none of the labelled ones gave it."""
        if not is_tensor(node) or value_of(node).dim() < 2 or self.view.is_parameter(node):
            return
        fitting = [r for r in self.rows if all(map(known_equal, shape_of(node)[:2], (r.sequence.size, r.place.size)))]
        if len(fitting) > 1:
            fitting = [r for r in fitting if r is self._reached(node)]
        if fitting:
            rows, axes = fitting[0], self.carried.axes
            self.carried.labels[node] = (
                (rows.sequence,),
                (rows.place,),
                *(axes.fresh(n) for n in shape_of(node)[2:]),
            )

    def _reached(self, node: fx.Node) -> Rows | None:
        """The rows of the first attention whose keys are made of a tensor, without another attention between."""
        order = self.view.order
        queue, seen = [node], {node}
        while queue:
            queue.sort(key=order.__getitem__)
            at = queue.pop(0)
            for site, role in self.leaves.get(at, ()):
                if role == "k":
                    return self.keys.get(site)
            more = {u for u in at.users if u not in seen and u not in self.finals and u not in self.inside}
            seen |= more
            queue += more
        return None

    def _label_site(self, site: Site) -> None:
        leaf = site.q
        if not self._is_in_reach(site.final):
            return
        if leaf.node not in self.carried.labels or not _is_plain(leaf):
            return
        try:
            rows = self.packing.side(self.carried, site, leaf, site.q_dim)
        except Mixed as error:
            self.problems[site.final] = error.reason
            return
        self.packing.label_result(self.carried, site, rows)
        self.derived.add(site.final)

    def _forced(self) -> set[fx.Node]:
        """What stays as it is, whatever reads it: written in place, or computed in another mode than the attentions are."""
        found: set[fx.Node] = set()
        for node in (*self.carried.labels, *self.carried.parts):
            if node.op != "placeholder" and (self._is_odd(node) or self.view.writes.to(node)):
                found.add(node)
        return found

    def _mode(self, node: fx.Node) -> Any:
        """Whether gradients are followed where a node is computed, and the autocast regions that it lies in."""
        origin = self.view.origin.get(node)
        return self.view.grad.get(node, True), None if origin is None else self.modes.get(_in_main(origin), ())

    def _is_odd(self, node: fx.Node) -> bool:
        """Whether it is computed in another mode than the attentions are."""
        return len(self.main) > 1 or self._mode(node) not in self.main

    # -- what is read at hidden places

    def _liveness(self, forced: set[fx.Node]) -> _Found:
        view, carried = self.view, self.carried
        found = _Found(set(forced))
        for node in reversed(view.graph.nodes):
            site = self.finals.get(node)
            is_labelled = node in carried.labels or node in carried.parts
            if not is_labelled and site is None:
                continue
            if not is_labelled or node in found.read or self._is_read(node, found):
                found.read.add(node)
            if site is None:
                continue
            try:
                found.packs[node] = self._packed(site, node not in found.read, found)
            except ReasonError as error:
                found.read.add(node)
                found.reasons.setdefault(site, error.reason)

        def reads(x: fx.Node, user: fx.Node) -> None:
            if x in carried.labels and (x in found.read or x not in self.derived):
                found.entries.setdefault(x, []).append(user)

        for node in sorted(self.derived - found.read - set(self.finals), key=view.order.__getitem__):
            for x in node.all_input_nodes:
                reads(x, node)
        for final, packed in found.packs.items():
            site = packed.original
            for leaf, rows in ((site.q, packed.q), (site.k, packed.k), (site.v, packed.k)):
                if rows is not None:
                    reads(leaf.node, final)
        for each in found.exits.values():
            for x in self._sources(each):
                reads(x, each.node)
        return found

    def _is_read(self, node: fx.Node, found: _Found) -> bool:
        """Whether something reads it where padding is."""
        for site, role in self.leaves.get(node, ()):
            packed = found.packs.get(site.final)
            dense = packed is None or (packed.q if role == "q" else packed.k) is None
            if dense or role == "operand":
                found.readers.setdefault(node, site.final)
                return True
        exits: dict[fx.Node, Exit | Unpad] = {}
        for user in node.users:
            if user not in self.view.live or user in self.inside or user in self.finals:
                continue
            each: Exit | Unpad | None = None
            if user in self.derived:
                is_read = user in found.read
            elif user.op != "output" and is_number(user):
                is_read = False
            else:
                each = self._exit(user, node)
                is_read = each is None
            if is_read:
                spread = self._spread(node)
                if spread is not None:
                    found.exits |= {node: spread}
                    return False
                found.readers.setdefault(node, user)
                return True
            if each is not None:
                exits[each.node] = each
        found.exits |= exits
        return False

    # -- attentions

    def _packed(self, site: Site, with_queries: bool, found: _Found) -> Packed:
        """An attention on packed rows: of queries too, where its result is not read at hidden places. Raises Mixed."""
        carried = self.carried
        k_rows = self.keys.get(site)
        if site.lse is not None:
            raise Mixed(reasons.PADDING_LOG_SUM_EXP())
        if not self._is_in_reach(site.final):
            raise Mixed(reasons.PADDING_CHECKPOINT())
        if k_rows is None and not (with_queries and self._is_apart(site)):
            raise Mixed(reasons.PADDING_NOT_HIDDEN())
        for leaf in (site.k, site.v) if k_rows is not None else ():
            if leaf.node not in carried.labels or not _is_plain(leaf):
                raise Mixed(reasons.PADDING_OF_KEYS_ALONE())
            if self.packing.side(carried, site, leaf, site.k_dim) is not k_rows:
                raise Mixed(reasons.PADDING_OTHER_LENGTHS())
        q_rows = self.packing.side(carried, site, site.q, site.q_dim) if with_queries else None
        if (
            q_rows is None
            and site.q.node in carried.labels
            and self.packing.side(carried, site, site.q, site.q_dim) is k_rows
        ):
            # its keys are skipped as it is
            raise Mixed(reasons.PADDING_READ(op="an attention", at=site.where))
        if k_rows is not None and isinstance(k_rows.kept, Labelled) and q_rows is not k_rows:
            # that no key behind the labels is seen holds of the queries before them alone
            raise Mixed(reasons.PADDING_NOT_HIDDEN())
        packed = self.packing.packed(self.view, site, q_rows, k_rows)
        problem = self.runs(packed.spec, packed.site)
        if problem is not None:
            raise Mixed(problem)
        if packed.some and k_rows is not None:
            found.some.add(k_rows)
        need = _needed(packed.site, q_rows is k_rows)
        for rows in (q_rows, k_rows):
            if need is not None and rows is not None:
                found.need(rows, need)
        return packed

    def _is_apart(self, site: Site) -> bool:
        """Whether the keys are no tensor of the rows of the queries."""
        labels = self.carried.labels
        if site.q.node not in labels or not _is_plain(site.q):
            return False
        own = self.carried.rows_in(labels[site.q.node])
        return not any(own & self.carried.rows_in(labels[x.node]) for x in (site.k, site.v) if x.node in labels)

    # -- exits

    def _exit(self, user: fx.Node, x: fx.Node) -> Exit | Unpad | None:
        """How `user` reads a labelled tensor without its padding; None if it may read that."""
        if user.op == "output":
            # what shares memory with an input, or with another result, is to go on doing so
            others = {*self.given, *user.all_input_nodes} - {x}
            if not self.drop or x in self.given or any(same_memory(x, other) for other in others):
                return None
            labels = self._dims(x)
            return None if labels is None else Spread(x, x, self.carried.rows_of(labels), labels)
        if user.target is opaque:
            return _masked(self, user, x) if x in self.carried.labels else None
        rule = _EXITS.get(name_of(user))
        origin = self.view.origin.get(user)
        if rule is None or origin is None or origin.scope.parent is not None or x not in self.carried.labels:
            return None
        # the region is written at its exits, in their mode; and a view of an input is to stay one
        if self._is_odd(user) or any(same_memory(user, given) for given in self.given):
            return None
        try:
            return rule(self, user, x)
        except ReasonError:
            return None

    def _spread(self, x: fx.Node) -> Spread | None:
        """A tensor of features that is one number in padding can be padded again for what reads it there."""
        if (
            x not in self.derived
            or x in self.finals
            or x not in self.carried.labels
            or not dtype_of(x).is_floating_point
        ):
            return None
        labels = self._dims(x)
        origin = self.view.origin.get(x)
        if labels is None or origin is None or origin.scope.parent is not None:
            return None
        if origin.scope.values.get(origin.node) is not x:
            return None
        number = self.hidden(x, labels)
        return None if number is None else Spread(x, x, self.carried.rows_of(labels), labels, fill=number)

    def _dims(self, x: fx.Node) -> Labels | None:
        """The labels of a tensor that has one dim for sequences and one for places."""
        labels = self.carried.axes.resolve(self.carried.labels[x])
        rows = self.carried.rows_of(labels)
        return labels if (rows.sequence,) in labels and (rows.place,) in labels else None

    def _at(self, x: fx.Node, index: tuple[Expr, ...], rows: Rows, holds: bool) -> Expr | None:
        """What x is at an index of Axis(sequence) and Axis(place) of rows, where there is a token, or none."""
        assert rows.kept is not None
        terms = self.packing.paddings.terms()
        try:
            e = terms.at(x, index)
        except NotExpressible:
            return None
        return rows.kept.assumed(e, Axis(rows.sequence), Axis(rows.place), holds, terms.algebra)

    def hidden(self, x: Any, out: Labels) -> float | None:
        """The one number that x, broadcast to a tensor with labels `out`, is in all places of padding; None if it is not known."""
        if not isinstance(x, fx.Node):
            return float(x) if isinstance(x, (int, float, bool)) else None
        rows = self.carried.rows_of(out)
        if not is_tensor(x):
            return None
        if isinstance(rows.kept, Labelled) and x is rows.kept.labels:
            return rows.kept.ignored
        known = self._index_number(x, out, rows)
        if known is None and name_of(x) == "softmax":
            known = self._weight(x, rows)
        if known is not None or x not in self.derived:
            return known
        labels = self.carried.labels.get(x)
        if labels is None or x.target is opaque:
            return None
        name, args = name_of(x), x.args
        if name in _MOVED:
            source = source_of(x)
            number = self.hidden(source, self.carried.labels[source]) if source in self.carried.labels else None
            return number if number is None or name != "to" else converted(number, dtype_of(source), dtype_of(x))
        if name == "mul":
            # what padding holds is finite, as docs/padding.md says
            return 0.0 if 0.0 in [self.hidden(a, labels) for a in args[:2]] else None
        if name == "masked_fill":
            mask = self.hidden(args[1], labels)
            return None if mask is None else self.hidden(args[2] if mask else args[0], labels)
        if name == "where" and len(args) == 3:
            mask = self.hidden(args[0], labels)
            return None if mask is None else self.hidden(args[1] if mask else args[2], labels)
        return None

    def _weight(self, x: fx.Node, rows: Rows) -> float | None:
        """0 for a softmax over the places of scores that are hidden in padding; each sequence must have others."""
        scores = source_of(x)
        if scores not in self.carried.labels:
            return None
        labels = self.carried.axes.resolve(self.carried.labels[scores])
        at = arguments(x)["dim"]
        if self.carried.rows_of(labels) is not rows or labels[at % len(labels)] != (rows.place,):
            return None
        fill = self.hidden(scores, labels)
        # a fill that is a number is what is left of a sequence whose tokens are hidden for good
        if fill is None or not (fill == -math.inf or (fill <= HIDDEN_BELOW and self._is_filled_once(scores))):
            return None
        self.some.add(rows)
        return 0.0

    def _is_filled_once(self, x: fx.Node) -> bool:
        """Whether scores are finite but for one fill: of what is made of products, norms and bounded functions alone."""
        fills, stack = 0, [x]
        while stack:
            node = stack.pop()
            name = name_of(node)
            if name in ("masked_fill", "where"):
                fills += 1
            elif name in _FINITE:
                continue
            elif name not in _MOVED | {"add", "mul", "sub"}:
                return False
            stack += [n for n in node.all_input_nodes if n in self.derived and dtype_of(n).is_floating_point]
        return fills == 1

    def _index_number(self, x: fx.Node, out: Labels, rows: Rows) -> float | None:
        """The number that is read off how x is made of indices."""
        index: list[Expr] = []
        for size, dim in zip(shape_of(x), out[len(out) - len(shape_of(x)) :]):
            atoms = self.carried.axes.atoms(dim)
            if is_one(size) or not atoms:
                index.append(Const(0))
            elif len(atoms) == 1:
                index.append(Axis(atoms[0]))
            else:
                return None
        e = self._at(x, tuple(index), rows, False)
        return e.value if isinstance(e, Const) else None

    def is_numbered(self, x: Any, size: Any) -> bool:
        """Whether x [size] is 0, 1, 2 and so on."""
        if not is_tensor(x) or len(shape_of(x)) != 1 or not known_equal(shape_of(x)[0], size):
            return False
        line = Axis(Atom(size))
        try:
            return bool(self.packing.paddings.terms().at(x, (line,)) == line)
        except NotExpressible:
            return False

    # -- the region

    def _can_be_gathered(self, x: fx.Node) -> bool:
        labels = self.carried.axes.resolve(self.carried.labels[x])
        rows = self.carried.rows_of(labels)
        apart = (rows.sequence,) in labels and (rows.place,) in labels
        return apart or (rows.sequence, rows.place) in labels

    def _why_not(self, found: _Found) -> Reason | None:
        return next(self._readers(found), None) or next(iter(found.reasons.values()), None)

    def _readers(self, found: _Found) -> Iterator[Reason]:
        """Why tensors of features are read at hidden places, the last ones first."""
        for node, user in found.readers.items():
            if (
                not is_tensor(node)
                or not dtype_of(node).is_floating_point
                or user in self.derived
                or user in self.finals
            ):
                continue
            if user.op == "output":
                yield reasons.PADDING_RETURNED()
            else:
                why = self.problems.get(user)
                at = self.view.where(user)
                yield why if why is not None else reasons.PADDING_READ(op=name_of(user) or "other code", at=at)

    def _whole(self, found: _Found) -> Whole:
        carried, view = self.carried, self.view
        # only what leads to an exit is written
        ends = [each for each in found.exits.values() if each.source not in found.read]
        packs = [found.packs[f] for f in sorted(found.packs, key=view.order.__getitem__)]
        needed = self._needed_for(ends, [p for p in packs if p.q is None], found)
        packs = [p for p in packs if p.q is None or p.original.final in needed]
        if not packs:
            raise Mixed(reasons.PADDING_NOT_HIDDEN())
        # what no attention is packed for is left as it is
        mine = {rows for p in packs for rows in (p.q, p.k)}
        ends = [each for each in ends if carried.rows_of(carried.axes.resolve(carried.labels[each.source])) in mine]
        needed = self._needed_for(ends, [p for p in packs if p.q is None], found)
        own = Carried(carried.axes, list(self.rows))
        own.labels = {n: labels for n, labels in carried.labels.items() if n in needed}
        own.parts = {n: parts for n, parts in carried.parts.items() if n in needed}
        own.gathered = {key: g for key, g in carried.gathered.items() if key[0] in needed or key[0] in found.exits}
        rows = [r for r in self.rows if any(r in (p.q, p.k) for p in packs)]
        for r in rows:
            r.index = _compat.unknown_rows(view.fake_mode, value_of(packs[0].original.q.node).device)
            r.total = r.index.shape[0]
        entries = [
            Entry(x, carried.rows_of(carried.axes.resolve(carried.labels[x]))) for x in found.entries if x in needed
        ]
        exits = [each for each in ends if isinstance(each, Exit)]
        unpads = [each for each in ends if isinstance(each, Unpad)]
        region = Whole(own, [], packs, unpads, entries=entries, exits=exits, kept=rows)
        # up to the last label that counts they are the first ones as it is
        guards = [Guard(kind, r) for r, kind in found.needs.items() if r in rows and not isinstance(r.kept, Labelled)]
        guards += [Guard("some", r) for r in rows if r in found.some | self.some]
        region.guards = list(dict.fromkeys([*guards, *(g for each in exits for g in each.guards)]))
        region.read = list(dict.fromkeys(self._readers(found)))
        for p in packs:
            region.inside |= p.original.inside | {p.original.final}
        region.ends |= {each.node for each in ends if not isinstance(each, Spread)}
        self._check(region)
        return region

    def _sources(self, each: Exit | Unpad) -> list[fx.Node]:
        """The packed tensors that an exit reads."""
        more = each.node.all_input_nodes if isinstance(each, (Computed, Contracted)) else ()
        return list(dict.fromkeys([each.source, *more]))

    def _needed_for(self, ends: Sequence[Exit | Unpad], alone: Sequence[Packed], found: _Found) -> set[fx.Node]:
        """What is packed for the exits, and for attentions of dense queries."""
        carried = self.carried
        stack = [leaf.node for p in alone for leaf in (p.original.k, p.original.v)]
        for each in ends:
            stack += self._sources(each)
        needed: set[fx.Node] = set()
        while stack:
            node = stack.pop()
            if node in needed or not (node in carried.labels or node in carried.parts):
                continue
            needed.add(node)
            if node in found.entries:
                continue
            packed = found.packs.get(node)
            if packed is None:
                stack += node.all_input_nodes
            else:
                site = packed.original
                stack += [site.q.node] if packed.q is not None else []
                stack += [site.k.node, site.v.node] if packed.k is not None else []
        return needed

    def _check(self, region: Whole) -> None:
        """Nothing that is read where the region is written has changed since."""
        view = self.view
        leaving = [*(e.node for e in region.exits), *(u.node for u in region.unpads)]
        order, writes = view.order, view.writes
        ends = [
            *leaving,
            *(p.original.final for p in region.attentions if p.q is None),
        ]
        last = max(map(order.__getitem__, ends))
        read = {e.node for e in region.entries}
        for p in region.attentions:
            for leaf in (p.site.q, p.site.k, p.site.v, *p.site.operands):
                read.update(n for n in read_by(leaf) if n not in region.carried.labels)
        for node in (*region.carried.labels.keys() - read, *leaving):
            read.update(x for x in node.all_input_nodes if x not in region.carried.labels)
        for node in read:
            if writes.between(node, order[node], last):
                raise Mixed(reasons.PADDING_WRITES_NEAR())
        inside = {self.modes.get(_in_main(view.origin[n]), ()) for n in (*region.inside, *ends) if n in view.origin}
        if len(inside) > 1:
            raise Mixed(reasons.PADDING_AUTOCAST())


@dataclass(eq=False)
class _Found:
    """read: what is read at hidden places, and what stays as it is; packs: attentions on packed rows, by results; exits, by what
    they give; entries: what comes into packed rows, and what reads it there; readers: what reads a tensor at hidden places; needs:
    what masks need of the places of tokens; some: rows of which each sequence must have one; reasons: why attentions stay."""

    read: set[fx.Node]
    packs: dict[fx.Node, Packed] = field(default_factory=dict)
    exits: dict[fx.Node, Exit | Unpad] = field(default_factory=dict)
    entries: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    readers: dict[fx.Node, fx.Node] = field(default_factory=dict)
    needs: dict[Rows, str] = field(default_factory=dict)
    reasons: dict[Site, Reason] = field(default_factory=dict)
    some: set[Rows] = field(default_factory=set)

    def need(self, rows: Rows, kind: str) -> None:
        if self.needs.get(rows) != "prefix":
            self.needs[rows] = kind


def _in_main(origin: Origin) -> fx.Node:
    """The node of the main graph that made a value, or runs the region that did."""
    scope, node = origin.scope, origin.node
    while scope.parent is not None and scope.call is not None:
        node, scope = scope.call, scope.parent
    return node


def _is_plain(leaf: Leaf) -> bool:
    return leaf.made is None and not (leaf.number or leaf.depth or leaf.starts)


# -- what packed rows may not tell


def _needed(site: Site, same: bool) -> str | None:
    """What the places of tokens must be for masks and biases to mean the same of packed rows: 'prefix', 'run', or None for any.

    same: queries and keys are of the same rows, so that which comes first, and how far they are apart, is as in the padded tensor.
    """
    spec = site.spec
    found = [_level(x, site, same) for x in _expressions(spec)]
    for leaf in site.operands:
        if leaf.row is None and leaf.column is None:
            atoms = {a for dim in leaf.labels for a in dim}
            found += [2 for dim in (site.q_dim, site.k_dim) if dim and dim[0] in atoms]
        elif leaf.row in (site.q_dim, site.k_dim) and leaf.row:
            found.append(2)
    return (None, "run", "prefix")[max(found, default=0)]


def _expressions(spec: Attention) -> Iterator[Expr]:
    for step in (*spec.steps, *spec.weight_steps):
        for name in ("keep", "number", "row", "col"):
            e = getattr(step, name, None)
            if isinstance(e, Expr):
                yield e


def _level(e: Expr, site: Site, same: bool) -> int:
    """0: what it tells depends on which of two tokens comes first; 1: on how far they are apart; 2: on where they are."""
    if not any(isinstance(x, Index) for x in walk(e)):
        return 0 if not any(isinstance(x, Load) for x in walk(e)) else _loaded(e, site, same)
    if isinstance(e, Index):
        return 2
    if isinstance(e, Apply) and e.op in ("le", "eq", "ne"):
        difference = Algebra().sub(*e.args)
        apart = _apart(difference)
        if apart is not None and same:
            return 0 if apart in (0, 1) and (e.op == "le" or apart == 0) else 1
    if isinstance(e, Linear) and _apart(e) is not None:
        return 1 if same else 2
    if isinstance(e, Load):
        return _loaded(e, site, same)
    return max((_level(x, site, same) for x in e.parts), default=0)


def _loaded(e: Expr, site: Site, same: bool) -> int:
    """Of elements of operands: those that are read at the query or the key are told by their dims."""
    return max((_level(p, site, same) for x in walk(e) if isinstance(x, Load) for p in x.parts), default=0)


def _apart(e: Expr) -> float | None:
    """c, where e is K - Q + c or Q - K + c."""
    if not isinstance(e, Linear) or len(e.terms) != 2:
        return None
    terms = {x: c for c, x in e.terms}
    return e.const if set(terms) == {Q, K} and sorted(terms.values()) == [-1, 1] else None


# -- the rules of exits


_Rule = Callable[[_Finder, fx.Node, fx.Node], "Exit | None"]
#: What has a finite result of finite arguments, in the range of scores.
_FINITE = frozenset(
    {"linear", "matmul", "mm", "bmm", "addmm", "layer_norm", "rms_norm", "tanh", "sigmoid", "gelu", "relu"}
)
_MOVED = frozenset({"to", "view", "permute", "expand", "clone", "contiguous", "detach", "alias"})


def _masked(f: _Finder, user: fx.Node, x: fx.Node) -> Unpad | None:
    """x[mask], where the mask keeps tokens alone."""
    unpad = f.packing.paddings.unpad(user)
    if unpad is None or unpad.mask is None or unpad.source is not x:
        return None
    labels = f._dims(x)
    if labels is None:
        return None
    rows = f.carried.rows_of(labels)
    if labels[:2] != ((rows.sequence,), (rows.place,)):
        return None
    hidden = f._at(unpad.mask, (Axis(rows.sequence), Axis(rows.place)), rows, False)
    return unpad if hidden == FALSE else None


def _select(f: _Finder, user: fx.Node, x: fx.Node) -> Exit | None:
    args = arguments(user)
    labels, number = f._dims(x), constant(args["index"])
    if args["self"] is not x or labels is None or not isinstance(number, int):
        return None
    rows = f.carried.rows_of(labels)
    if labels[args["dim"] % len(labels)] != (rows.place,):
        return None
    return Selected(user, x, rows, labels, (Guard("at", rows, None, number),), number)


def _slice(f: _Finder, user: fx.Node, x: fx.Node) -> Exit | None:
    args = arguments(user)
    labels = f._dims(x)
    size = shape_of(user)
    if args["self"] is not x or labels is None:
        return None
    rows = f.carried.rows_of(labels)
    at = args["dim"] % len(labels)
    start = constant(args["start"]) if args["start"] is not None else 0
    if labels[at] != (rows.place,) or not is_one(size[at]) or not isinstance(start, int):
        return None
    longest = shape_of(x)[at]
    if not _compat.statically_known_true(-longest <= start):
        # it may begin before the first place, and is cut there
        if not isinstance(longest, int):
            return None
        start = 0
    return Selected(user, x, rows, labels, (Guard("at", rows, None, start),), start, keeps=True)


def _index(f: _Finder, user: fx.Node, x: fx.Node) -> Exit | None:
    """x[arange(B), index]."""
    args = arguments(user)
    labels, indices = f._dims(x), args["indices"]
    if args["self"] is not x or labels is None or len(indices) != 2:
        return None
    rows = f.carried.rows_of(labels)
    if labels[:2] != ((rows.sequence,), (rows.place,)) or not f.is_numbered(indices[0], rows.sequence.size):
        return None
    index = indices[1]
    if not is_tensor(index) or dtype_of(index) not in (torch.int64, torch.int32) or len(shape_of(index)) != 1:
        return None
    if index in f.carried.labels or not known_equal(shape_of(index)[0], rows.sequence.size):
        return None
    return Selected(user, x, rows, labels, (Guard("at", rows, index),), 0, index)


def _gather(f: _Finder, user: fx.Node, x: fx.Node) -> Exit | None:
    """x.gather(1, index), where index is one place for all features of a sequence."""
    args = arguments(user)
    labels = f._dims(x)
    if args["self"] is not x or labels is None or args["sparse_grad"]:
        return None
    rows, index = f.carried.rows_of(labels), args["index"]
    at, shape = args["dim"] % len(labels), shape_of(user)
    if labels[at] != (rows.place,) or not is_one(shape[at]) or index in f.carried.labels:
        return None
    if not all(known_equal(a, b) for d, (a, b) in enumerate(zip(shape, shape_of(x))) if d != at):
        return None
    sequence = labels.index((rows.sequence,))
    while name_of(index) == "expand" and not is_stale(index):
        index = source_of(index)
    size = rows.sequence.size
    if (
        len(shape_of(index)) != len(labels)
        or not _is_line(index, size)
        or not known_equal(shape_of(index)[sequence], size)
    ):
        return None
    return Selected(user, x, rows, labels, (Guard("at", rows, index),), 0, index, keeps=True)


def _is_line(x: fx.Node, size: Any) -> bool:
    """Whether all dims but one of that size are 1."""
    long = [n for n in shape_of(x) if not is_one(n)]
    return len(long) == 1 and known_equal(long[0], size)


def _product(f: _Finder, user: fx.Node, x: fx.Node) -> Exit | None:
    """weights [B, M, N] @ values [B, N, E], with weights or values of 0 in padding."""
    if len(user.args) != 2 or any(not is_tensor(n) or len(shape_of(n)) != 3 for n in user.args):
        return None
    first, second = user.args
    return _contracted(f, user, ((first, "bmn"), (second, "bne")), "bme")  # type: ignore[arg-type]


def _einsum(f: _Finder, user: fx.Node, x: fx.Node) -> Exit | None:
    args = arguments(user)
    equation, tensors = str(args["equation"]).replace(" ", ""), args["tensors"]
    if not re.fullmatch(r"[a-zA-Z]+,[a-zA-Z]+->[a-zA-Z]+", equation) or len(tensors) != 2:
        return None
    given, result = equation.split("->")
    factors = tuple(zip(tensors, given.split(",")))
    if any(len(set(own)) != len(own) or len(own) != len(shape_of(n)) for n, own in factors) or len(set(result)) != len(
        result
    ):
        return None
    return _contracted(f, user, factors, result)


def _contracted(f: _Finder, user: fx.Node, factors: tuple[tuple[fx.Node, str], ...], result: str) -> Exit | None:
    found = []
    for node, own in factors:
        labels = f._dims(node) if node in f.carried.labels else None
        if labels is None:
            return None
        rows = f.carried.rows_of(labels)
        letters = own[labels.index((rows.sequence,))], own[labels.index((rows.place,))]
        found.append((node, rows, labels, letters))
    (node, rows, labels, letters), other = found
    batch, along = letters
    if other[1] is not rows or other[3] != letters or batch not in result or along in result:
        return None
    # a letter that one factor has alone is summed there, which is another product
    if any(set(own) - set(result) != {along} for _, own in factors):
        return None
    if 0.0 not in [f.hidden(n, of) for n, _, of, _ in found]:
        return None
    return Contracted(user, node, rows, labels, (), factors, result, batch, along)


def _max(f: _Finder, user: fx.Node, x: fx.Node) -> Exit | None:
    """x.max(1) of which the places are not used; ties give gradients to the first, so that none may be needed."""
    parts = [u for u in user.users if u in f.view.live]
    if "dim" not in arguments(user) or len(parts) != 1 or parts[0].args[1:] != (0,):
        return None
    return None if f.view.trains and f.view.grad.get(user, True) else _greatest(f, user, parts[0], x)


def _amax(f: _Finder, user: fx.Node, x: fx.Node) -> Exit | None:
    return _greatest(f, user, user, x)


def _greatest(f: _Finder, op: fx.Node, result: fx.Node, x: fx.Node) -> Exit | None:
    """What an op finds of the places of each sequence, where padding is low."""
    args = arguments(op)
    labels = f._dims(x)
    if labels is None:
        return None
    rows, dims, fill = f.carried.rows_of(labels), args.get("dim"), f.hidden(x, labels)
    dims = [dims] if isinstance(dims, int) else dims
    if not dims or {d % len(labels) for d in dims} != {labels.index((rows.place,))}:
        return None
    # of a fill of nan all is nan; truths have nothing low
    if fill is None or not fill <= _LOW or not dtype_of(x).is_floating_point:
        return None
    return Greatest(result, x, rows, labels, (), bool(args.get("keepdim")), fill)


def _sum(f: _Finder, user: fx.Node, x: fx.Node) -> Exit | None:
    args = arguments(user)
    labels = f.carried.axes.resolve(f.carried.labels[x])
    rows = f.carried.rows_of(labels)
    if f.hidden(x, labels) != 0.0:
        return None
    dims = args.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    gone = set(range(len(labels))) if not dims else {d % len(labels) for d in dims}
    of_rows = {d for d, dim in enumerate(labels) if f.carried.rows_in([dim])}
    mean = name_of(user) == "mean"
    if of_rows <= gone:
        return None if mean else Computed(user, x, rows, labels)
    if f._dims(x) is None or gone != {labels.index((rows.place,))}:
        return None
    return Summed(user, x, rows, labels, (), bool(args.get("keepdim")), mean)


def _loss(f: _Finder, user: fx.Node, x: fx.Node) -> Exit | None:
    """A loss whose labels say which rows count."""
    args = arguments(user)
    given, target = args["self"], args["target"]
    if args["reduction"] == _EACH or target not in f.carried.labels or given not in f.carried.labels:
        return None
    if args["weight"] in f.carried.labels:
        return None
    labels = f.carried.axes.resolve(f.carried.labels[given])
    own = f.carried.axes.resolve(f.carried.labels[target])
    rows = f.carried.rows_of(labels)
    if len(labels) != 2 or labels[0] != (rows.sequence, rows.place) or own != labels[:1]:
        return None
    if dtype_of(target) not in (torch.int64, torch.int32, torch.uint8):
        return None
    ignored = int(args["ignore_index"])
    known = f.hidden(target, own) == ignored
    return Computed(user, given, rows, labels, () if known else (Guard("ignored", rows, target, ignored),))


#: The reduction 'none', as ATen numbers them.
_EACH = 0
#: Losses whose labels say which rows count.
_LOSSES = frozenset({"cross_entropy_loss", "nll_loss", "nll_loss_nd"})
_EXITS: dict[str, _Rule] = {
    "select": _select,
    "slice": _slice,
    "index": _index,
    "sum": _sum,
    "mean": _sum,
    "amax": _amax,
    "max": _max,
    "gather": _gather,
    "bmm": _product,
    "matmul": _product,
    "einsum": _einsum,
    **dict.fromkeys(_LOSSES, _loss),
}
