"""Keys and values that the graph gathers from a cache of blocks: a site whose op reads them through the block table.

A paged cache in plain PyTorch is `cache[block_table]`, flattened to one row for each key, or the same by slots. From k and v
the labels of their dims are carried back to the op that gathers. It is a block table if the number of a key is the number of
a column of the table, followed by that of a row of the block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from attnfuse import reasons
from attnfuse._compat import OpOverload
from attnfuse.passes import limits
from attnfuse.passes.capture.view import View
from attnfuse.passes.graph import moves, views
from attnfuse.passes.graph.aten import arguments, dtype_of, is_tensor, name_of, shape_of, source_of
from attnfuse.passes.graph.labels import Atom, Axes, Dim, Labels, Size, known_equal
from attnfuse.passes.graph.memory import is_mutating, is_stale
from attnfuse.passes.read.isolation import overwritten, read_by
from attnfuse.passes.site import Leaf, Paging, Site
from attnfuse.reasons import Reason


@dataclass(frozen=True)
class Gather:
    """An op, `node`, that reads a cache by a tensor of integers.

    cache, cache_labels, table, table_labels    with the atoms of the result, and `blocks` for the dim that the table is an index of
    wraps       negative numbers count from the end of it
    """

    node: fx.Node
    cache: fx.Node
    cache_labels: Labels
    blocks: Dim
    table: fx.Node
    table_labels: Labels
    wraps: bool


def paged(view: View, site: Site) -> Site | Reason | None:
    """The site with its keys and values read through a block table; why not, where they are gathered; None where they are not."""
    walk = _Walk(site)
    found = [walk.gather(leaf) for leaf in (site.k, site.v)]
    given = next((x for x in found if x is not None), None)
    if given is None:
        return None
    if isinstance(given, Reason):
        return given
    k, v = found
    if isinstance(v, Reason):
        return v
    if not isinstance(k, Gather) or not isinstance(v, Gather):
        return reasons.GATHER_OF_ONE()
    if view.trains and view.grad.get(site.final, True):
        return reasons.GATHER_GRADIENT()
    if any(_is_kept(view, site, x.node) for x in (k, v)):
        return reasons.GATHER_USED()
    return _joined(view, site, walk, k, v)


def _is_kept(view: View, site: Site, gather: fx.Node) -> bool:
    """Whether something else than the keys and values of the site needs what is gathered, which is made all the same then."""
    others = {source for leaf in (site.q, *site.operands) for source in read_by(leaf)}
    stack, seen = [gather], {gather}
    while stack:
        at = stack.pop()
        users = [u for u in at.users if u in view.live]
        if at in others or not users:
            return True
        more = {u for u in users if u not in site.inside and not _is_size(u)} - seen
        seen |= more
        stack += more
    return False


def _is_size(node: fx.Node) -> bool:
    """Whether only the shape of the argument is read."""
    return name_of(node) in ("sym_size", "sym_stride", "sym_numel", "sym_storage_offset")


def _joined(view: View, site: Site, walk: _Walk, k: Gather, v: Gather) -> Site | Reason:
    axes = walk.axes
    tables = [walk.table(x.table, x.table_labels) for x in (k, v)]
    labels = [axes.resolve(t.labels) for t in tables]
    same = tables[0].node is tables[1].node or _same(tables[0].node, tables[1].node)
    if not same or labels[0] != labels[1] or k.wraps != v.wraps:
        return reasons.GATHER_TABLES()
    order = axes.atoms(walk.whole or site.k_dim)
    named = {a for dim in labels[0] for a in dim}
    columns = tuple(a for a in order if a in named)
    row = order[len(columns) :]
    if order[: len(columns)] != columns or len(row) > 1 or not named - set(columns) <= set(site.batch):
        return reasons.GATHER_ORDER()
    caches = []
    for leaf, x, width in ((site.k, k, site.d_dim), (site.v, v, site.e_dim)):
        cache = walk.cache(x)
        if cache is None or not {a for d in cache.labels for a in d} <= {*site.batch, *row, *width, *x.blocks}:
            return reasons.GATHER_ORDER()
        if leaf.cast is not None:
            # all of the cache would be converted
            return reasons.GATHER_CAST(dtype=leaf.cast)
        caches.append(cache)
    paging = Paging(replace(tables[0], labels=labels[0]), columns, row, k.blocks, v.blocks)
    spec = replace(site.spec, layout="paged", wraps=k.wraps)
    made = replace(site, spec=spec, k=caches[0], v=caches[1], paging=paging, gathered=site)
    problem = overwritten(view, made)
    return reasons.GATHER_WRITTEN() if problem is not None else made


class _Walk:
    """Carries the labels of k and v back through what lies between the op that gathers and the attention.

    axes    how the keys are split into columns of the table and rows of a block, the same for k and v
    whole   the keys that are gathered, where only the first of them are used
    """

    def __init__(self, site: Site) -> None:
        self.axes = Axes()
        self.key = site.k_dim
        self.whole: Dim = ()
        self._others = (*site.batch, *site.d_dim, *site.e_dim)
        # a dim of which the result has a part: what that is labelled, and where it begins
        self._cuts: dict[Atom, tuple[Dim, int]] = {}

    def gather(self, leaf: Leaf) -> Gather | Reason | None:
        """The op that gathers k or v; None where nothing does, and a reason for one that is not read."""
        node, labels = leaf.node, leaf.labels
        if leaf.made is not None or leaf.starts:
            return None
        for _ in range(limits.FACTORS):
            if is_mutating(node) or is_stale(node):
                return None
            if name_of(node) in _READS:
                return self._read(node, labels)
            found = moves.dim_map(node)
            if found is None and not views.is_identity(node):
                return None
            placed = labels if found is None else views.backward(self.axes, found, labels, self._cut)
            if placed is None or self._splits_others():
                return None
            node, labels = source_of(node) if found is None else found.source, placed
        return None

    def _splits_others(self) -> bool:
        return any(atom in self.axes.parts for atom in self._others)

    def _is_keys(self, dim: Dim) -> bool:
        keys = {*self.axes.atoms(self.key), *self.axes.atoms(self.whole)}
        return bool(keys & set(self.axes.atoms(dim)))

    def _cut(self, label: Dim, size: Size, start: Size) -> Dim | None:
        if self._is_keys(label):
            if (
                label != self.key
                or not known_equal(start, 0)
                or (self.whole and not known_equal(self.whole[0].size, size))
            ):
                return None
            self.whole = self.whole or self.axes.fresh(size)
            return self.whole or None
        if not isinstance(start, int):
            return None
        atom = Atom(size)
        self._cuts[atom] = (label, start)
        return (atom,)

    def _read(self, node: fx.Node, labels: Labels) -> Gather | Reason | None:
        found = _READS[name_of(node)](node)
        if found is None:
            return reasons.GATHER_INDEX(op=name_of(node)) if any(map(self._is_keys, labels)) else None
        cache, dim, table, wraps = found
        blocks = self.axes.fresh(shape_of(cache)[dim])
        if name_of(node) == "gather":
            # one number for each element of the result
            end, own = dim + 1, labels
        else:
            end = dim + len(shape_of(table))
            own = labels[dim:end]
        if not any(map(self._is_keys, labels[dim:])):
            # it is heads that are chosen, say
            return None
        return Gather(node, cache, (*labels[:dim], blocks, *labels[end:]), blocks, table, own, wraps)

    def table(self, node: fx.Node, labels: Labels) -> Leaf:
        """The table behind views and wider integers."""
        kept = dict(self.axes.parts)
        found = Leaf(node, labels)
        while not is_mutating(node) and not is_stale(node):
            if name_of(node) == "to" and (dtype_of(source_of(node)), dtype_of(node)) == (torch.int32, torch.int64):
                node = source_of(node)
            else:
                step = views.back(self.axes, node, labels)
                if step is None or self._splits_others():
                    break
                node, labels = step.source, step.labels
            kept, found = dict(self.axes.parts), Leaf(node, labels)
        self.axes.parts = kept
        return found

    def cache(self, found: Gather) -> Leaf | None:
        """The cache, cut to what is used of it; None where that is not told dim by dim."""
        labels, starts = [], []
        for dim in self.axes.resolve(found.cache_labels):
            label, start = self._cuts.get(dim[0], (dim, 0)) if len(dim) == 1 else (dim, 0)
            if any(atom in self._cuts for atom in label):
                return None
            labels.append(label)
            starts.append(start)
        return Leaf(found.cache, tuple(labels), starts=tuple(starts) if any(starts) or self._cuts else ())


#: (cache, which dim of it, the tensor of integers, whether these wrap)
_Found = tuple[fx.Node, int, fx.Node, bool]


def _integers(x: Any) -> bool:
    return is_tensor(x) and dtype_of(x) in (torch.int32, torch.int64) and bool(shape_of(x))


def _index(node: fx.Node) -> _Found | None:
    named = arguments(node)
    given = [(d, x) for d, x in enumerate(named["indices"]) if x is not None]
    if len(given) != 1 or not _integers(given[0][1]):
        return None
    return named["self"], given[0][0], given[0][1], True


def _index_select(node: fx.Node) -> _Found | None:
    named = arguments(node)
    rank = len(shape_of(named["self"]))
    return (named["self"], named["dim"] % rank, named["index"], False) if rank and _integers(named["index"]) else None


def _embedding(node: fx.Node) -> _Found | None:
    named = arguments(node)
    return (named["weight"], 0, named["indices"], False) if _integers(named["indices"]) else None


def _gather(node: fx.Node) -> _Found | None:
    named = arguments(node)
    own, shape = shape_of(named["self"]), shape_of(named["index"])
    if not _integers(named["index"]) or not own:
        return None
    dim = named["dim"] % len(own)
    whole = all(d == dim or known_equal(a, b) for d, (a, b) in enumerate(zip(own, shape, strict=True)))
    return (named["self"], dim, named["index"], False) if whole else None


_READS = {"index": _index, "index_select": _index_select, "embedding": _embedding, "gather": _gather}


def _same(a: Any, b: Any, depth: int = limits.CASTS) -> bool:
    """Whether two values of the view are surely the same: one node, or the same op of the same."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y, depth) for x, y in zip(a, b))
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        # what is made of a stale one at one place need not be what is made of it at another
        return (a is b and not is_stale(a)) or (depth > 0 and _same_op(a, b, depth - 1))
    if isinstance(a, (int, torch.SymInt)) and isinstance(b, (int, torch.SymInt)):
        return known_equal(a, b)
    return type(a) is type(b) and bool(a == b)


def _same_op(a: fx.Node, b: fx.Node, depth: int) -> bool:
    pure = all(
        isinstance(x.target, OpOverload)
        and not (is_mutating(x) or is_stale(x) or torch.Tag.nondeterministic_seeded in x.target.tags)
        for x in (a, b)
    )
    return (
        pure
        and a.target is b.target
        and a.kwargs.keys() == b.kwargs.keys()
        and (_same(a.args, b.args, depth) and _same(list(a.kwargs.values()), [b.kwargs[x] for x in a.kwargs], depth))
    )
