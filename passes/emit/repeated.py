"""Regions that are called more than once, as torch.compiler.nested_compile_region makes them: one body serves all calls.

The view has the body once for each call, in a `Scope` of its own, so that an attention in it is as many sites. The body can
be rewritten where all of these are the same attention of the same values of the body.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx

from attnfuse import reasons
from attnfuse.passes.capture.view import Scope, View
from attnfuse.passes.graph.labels import Atom, Labels
from attnfuse.passes.site import Leaf, Refusal, Site

#: What a value of one call is in another one.
Matching = dict[fx.Node, fx.Node]


def calls_of(view: View, scope: Scope) -> list[Scope]:
    """The scopes of all calls of a region, this one included."""
    return [s for s in view.scopes if s.module is scope.module]


def partners(view: View, site: Site, sites: Iterable[Site]) -> list[Site] | Refusal:
    """The same attention in each other call of the site's region, from among `sites`."""
    scope = view.origin[site.final].scope
    found: list[Site] = []
    every = [x for s in sites for x in (s, s.gathered) if x is not None]
    candidates = [x for s in every for x in (s, s.unread) if x is not None]
    for other in calls_of(view, scope):
        if other is scope:
            continue
        same = matching(view, scope, other)
        if same is None:
            return Refusal(reasons.CALLS_DIFFER(), site.final)
        if not same.keys() >= {*site.inside, *(leaf.node for leaf in site.leaves)}:
            return Refusal(reasons.CALLS_READ_OUTSIDE(), site.final)
        partner = next((c for c in candidates if _is_same(site, c, same)), None)
        if partner is None:
            return Refusal(reasons.CALLS_OF_OTHERS(), site.final)
        found.append(partner)
    return found


def matching(view: View, scope: Scope, other: Scope) -> Matching | None:
    """The value in the call `other` for each one that is known in the call `scope`; None if their ops differ."""
    mine, theirs = (_made_in(view, s) for s in (scope, other))
    if len(mine) != len(theirs) or any(a.target != b.target for a, b in zip(mine, theirs)):
        return None
    found, back = (dict(zip(a, b, strict=True)) for a, b in ((mine, theirs), (theirs, mine)))
    for node in scope.module.graph.nodes:
        if node.op != "placeholder":
            continue
        a, b = scope.values.get(node), other.values.get(node)
        if isinstance(a, fx.Node) != isinstance(b, fx.Node):
            return None
        # one value that is given twice in one call may be two values in the other
        if (
            isinstance(a, fx.Node)
            and isinstance(b, fx.Node)
            and not (found.setdefault(a, b) is b and back.setdefault(b, a) is a)
        ):
            return None
    return found


def _made_in(view: View, scope: Scope) -> list[fx.Node]:
    return [n for n in view.graph.nodes if n in view.origin and view.origin[n].scope is scope]


def _is_same(site: Site, other: Site, same: Matching) -> bool:
    if other.spec != site.spec:
        return False
    if same.get(site.final) is not other.final or same.get(site.anchor) is not other.anchor:
        return False
    if {same.get(n) for n in site.inside} != other.inside:
        return False
    if (site.lse is None) != (other.lse is None) or (site.lse is not None and same.get(site.lse) is not other.lse):
        return False
    names = [_names(s) for s in (site, other)]
    leaves, others = site.leaves, other.leaves
    return (
        _named(site.out_labels, names[0]) == _named(other.out_labels, names[1])
        and len(leaves) == len(others)
        and all(
            same.get(a.node) is b.node and _described(a, names[0]) == _described(b, names[1])
            for a, b in zip(leaves, others)
        )
    )


def _names(site: Site) -> dict[Atom, str]:
    dims = {"q": site.q_dim, "k": site.k_dim, "d": site.d_dim, "e": site.e_dim, "b": site.batch}
    if site.paging is not None:
        own = site.paging
        dims |= {"column": own.columns, "row": own.row, "k block": own.k_blocks, "v block": own.v_blocks}
    return {atom: f"{name}{i}" for name, dim in dims.items() for i, atom in enumerate(dim)}


def _named(labels: Labels, names: dict[Atom, str]) -> Sequence[Any]:
    return [[names.get(atom, atom) for atom in dim] for dim in labels]


def _described(leaf: Leaf, names: dict[Atom, str]) -> Any:
    """All that is said of an operand but its node. What is computed for it alone is like nothing else."""
    own = [] if leaf.row is None and leaf.column is None and leaf.made is None else [object()]
    return [
        *own,
        _named(leaf.labels, names),
        (leaf.cast, leaf.inverse, leaf.number, leaf.depth, leaf.starts, leaf.dtype),
    ]
