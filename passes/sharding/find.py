"""Finds what of a view each rank can compute on its own rows: a `Plan`.

Every value is replicated (equal on all ranks) or sharded (a rank's rows in one dim, alone or merged with others). Where a
replicated tensor becomes a sharded one is a seed. That a seed is sound needs no proof, since whatever mixes rows gets whole
tensors; which ones are worth it is tried out: a seed is kept if the q of an attention arrives with its token dim on the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import fx

from attnfuse import reasons
from attnfuse._compat import OpOverload
from attnfuse.passes.capture.view import View
from attnfuse.passes.graph import views
from attnfuse.passes.graph.aten import arguments, is_tensor, name_of, shape_of, value_of
from attnfuse.passes.graph.labels import Atom, Axes, Dim, Size, is_one, known_equal
from attnfuse.passes.graph.memory import is_mutating, opaque
from attnfuse.passes.padding.rowwise import Mixed
from attnfuse.passes.read.isolation import read_by
from attnfuse.passes.sharding.carry import Sharded, Tokens, sole
from attnfuse.passes.site import Leaf, Site
from attnfuse.reasons import Reason

#: How many seeds are tried for the attentions of a graph.
_TRIES = 24

Seed = tuple[fx.Node, int]


@dataclass(frozen=True, eq=False)
class Distributed:
    """An attention whose queries are sharded. keys: the rows of k and v, or None where they are whole."""

    site: Site
    queries: Tokens
    keys: Tokens | None


@dataclass(eq=False)
class Plan:
    """What is computed on rows.

    carried   labels of sharded values, and sums over rows
    seeds     replicated nodes that are cut, with the dim
    sites     the distributed attentions, by their results
    mixed     why an op with sharded arguments is not computed on rows
    whole     sharded values that are gathered; rows: those that are computed; both as far as results need them
    dropped   calls of dropout whose masks ranks must draw alike
    """

    carried: Sharded
    seeds: dict[fx.Node, int]
    sites: dict[fx.Node, Distributed] = field(default_factory=dict)
    mixed: dict[fx.Node, Reason] = field(default_factory=dict)
    whole: set[fx.Node] = field(default_factory=set)
    rows: set[fx.Node] = field(default_factory=set)
    needed: set[fx.Node] = field(default_factory=set)
    dropped: list[fx.Node] = field(default_factory=list)

    def is_sharded(self, node: fx.Node) -> bool:
        return node in self.carried.labels or node in self.carried.parts

    @property
    def gathered(self) -> list[fx.Node]:
        """The values that are gathered, without seeds, which are there whole, and copies of others."""
        return [n for n in self.whole if n not in self.seeds and self.same(n) is None]

    def same(self, node: fx.Node) -> fx.Node | None:
        """The sharded value that another one has the elements of, in the same places; None if there is none.

        A trace knows a tensor by the last op that gave it, Dynamo by the first.
        """
        if node.op != "call_function" or not node.args:
            return None
        source = sole(node) or (node.args[0] if views.is_identity(node) else None)
        return source if isinstance(source, fx.Node) and source in self.carried.labels else None


def find(
    view: View,
    sites: Sequence[Site],
    runs: Callable[[Distributed], Reason | None],
    outputs: Literal["whole", "own"],
    cut_keys: bool = False,
) -> Plan | Reason:
    """The plan for a view, or why all of it is left whole. runs: why no kernel can run a distributed attention, or None; cut_keys:
    keys and values that every rank has are dealt, too, which an algorithm that is asked for needs."""
    problem = _unsound(view)
    if problem is not None:
        return problem
    finder = _Finder(view, sites, runs, outputs)
    plan = finder.best()
    if plan is not None and cut_keys:
        plan = finder.with_keys(plan)
    if plan is None:
        return finder.problem or reasons.NOTHING_TO_SHARD()
    for site in sites:
        # ranks would draw other masks for what is computed whole on each
        if site.spec.dropout > 0.0 and site.final not in plan.sites and site.final in plan.needed:
            return reasons.SHARDED_RANDOM(op="dropout of an attention that is left whole", at=site.where)
    random = _random(view, plan)
    return plan if random is None else random


def _unsound(view: View) -> Reason | None:
    for scope in view.scopes:
        if scope.call is not None and "invoke_subgraph" in str(scope.call.target):
            return reasons.SHARDED_REGION()
    return None


def _random(view: View, plan: Plan) -> Reason | None:
    """Ranks draw the same masks of dropout; other random numbers would not be equal on all of them."""
    inside = set().union(*(d.site.inside for d in plan.sites.values())) | set(plan.sites)
    for node in drawing(view):
        if node not in plan.needed or node in inside:
            continue
        if name_of(node) == "dropout":
            plan.dropped.append(node)
        else:
            return reasons.SHARDED_RANDOM(op=name_of(node) or str(node.target), at=view.where(node))
    return None


def drawing(view: View) -> Iterator[fx.Node]:
    """The ops that draw random numbers."""
    for node in view.graph.nodes:
        target = node.target
        if not isinstance(target, OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
            continue
        if name_of(node) == "dropout":
            draws = not views.is_identity(node)
        else:
            draws = "scaled_dot_product" not in name_of(node) or _drops(node)
        if draws:
            yield node


def _drops(node: fx.Node) -> bool:
    return bool(arguments(node).get("dropout_p"))


class _Finder:
    def __init__(
        self,
        view: View,
        sites: Sequence[Site],
        runs: Callable[[Distributed], Reason | None],
        outputs: Literal["whole", "own"],
    ) -> None:
        self.view = view
        self.sites = {site.final: site for site in sites}
        self.runs = runs
        self.outputs = outputs
        self.inside: set[fx.Node] = set().union(*(site.inside for site in sites)) if sites else set()
        self.problem: Reason | None = None
        self.lengths: list[Size] = []
        for site in sites:
            for dim in (site.q_dim, site.k_dim):
                for a in dim:
                    if not is_one(a.size) and not any(known_equal(a.size, n) for n in self.lengths):
                        self.lengths.append(a.size)

    # -- which seeds

    def best(self) -> Plan | None:
        candidates = self._candidates()
        alone: dict[Seed, Plan] = {}
        for seed in candidates[:_TRIES]:
            by_itself = self._plan([seed])
            if by_itself.sites:
                alone[seed] = by_itself
        seeds: list[Seed] = []
        plan: Plan | None = None
        while alone:
            done = set() if plan is None else set(plan.sites)
            useful = {s: p for s, p in alone.items() if s[0] not in [n for n, _ in seeds] and set(p.sites) - done}
            if not useful:
                break
            # one that covers more attentions, and of those one with more ops on rows
            seed = max(useful, key=lambda s: (len(set(useful[s].sites) - done), len(useful[s].rows)))
            tried = self._plan([*seeds, seed])
            del alone[seed]
            if plan is None or len(tried.sites) > len(plan.sites):
                seeds, plan = [*seeds, seed], tried
        plan = self._deeper(seeds, plan)
        if plan is None:
            return None
        seeds = list(plan.seeds.items())
        # others that spare the ranks work and are not gathered again
        for seed in candidates[:_TRIES]:
            if seed[0] in [n for n, _ in seeds] or plan.is_sharded(seed[0]):
                continue
            tried = self._plan([*seeds, seed])
            more = len(tried.rows) > len(plan.rows) and len(tried.gathered) <= len(plan.gathered)
            if more and len(tried.sites) >= len(plan.sites):
                seeds, plan = [*seeds, seed], tried
        return plan

    def _deeper(self, seeds: list[Seed], plan: Plan | None) -> Plan | None:
        """Seeds for attentions that none reaches: of what their queries are made of, the earliest that does."""
        for site in self.sites.values():
            if plan is not None and site.final in plan.sites:
                continue
            above: set[fx.Node] = set()
            stack = [site.q.node]
            while stack:
                node = stack.pop()
                if node not in above:
                    above.add(node)
                    stack += node.all_input_nodes
            length = site.q_dim[0].size if site.q_dim else 1
            tries = 0
            for node in sorted(above, key=self.view.order.__getitem__):
                if tries == _TRIES or node in self.inside or not is_tensor(node):
                    continue
                if (node.op == "placeholder" and self.view.is_parameter(node)) or (
                    plan is not None and plan.is_sharded(node)
                ):
                    continue
                for dim, size in enumerate(shape_of(node)):
                    if is_one(size) or not known_equal(size, length) or (node, dim) in seeds:
                        continue
                    tries += 1
                    tried = self._plan([*seeds, (node, dim)])
                    if site.final in tried.sites and (plan is None or len(tried.sites) > len(plan.sites)):
                        seeds, plan = [*seeds, (node, dim)], tried
                        break
                if plan is not None and site.final in plan.sites:
                    break
        return plan

    def with_keys(self, plan: Plan) -> Plan:
        """The same with keys and values on rows where they are whole on every rank and can be cut."""
        for final in list(plan.sites):
            site = self.sites[final]
            if plan.sites[final].keys is not None:
                continue
            seeds = dict(plan.seeds)
            for leaf in (site.k, site.v):
                dims = [d for d, labels in enumerate(leaf.labels) if site.k_dim and labels == (site.k_dim[0],)]
                if len(dims) == 1 and not plan.is_sharded(leaf.node):
                    seeds[leaf.node] = dims[0]
            tried = self._plan(list(seeds.items()))
            if final in tried.sites and tried.sites[final].keys is not None and set(plan.sites) <= set(tried.sites):
                plan = tried
        return plan

    def _candidates(self) -> list[Seed]:
        """Dims as long as an attention's: of inputs, and of tensors that have it though nothing they are made of has."""
        own: list[Seed] = []
        made: list[Seed] = []
        others: list[Seed] = []
        given: set[fx.Node] = set()
        for node in self.view.graph.nodes:
            if not is_tensor(node) or node in self.inside:
                continue
            dims = self._dims(node)
            if node.op == "placeholder":
                if not self.view.is_parameter(node):
                    given.add(node)
                    own += [(node, d) for d in dims]
                continue
            if node not in self.view.live:
                continue
            tensors = [n for n in node.all_input_nodes if is_tensor(n)]
            new = [d for d in dims if not any(known_equal(shape_of(node)[d], s) for n in tensors for s in shape_of(n))]
            if not tensors:
                others += [(node, d) for d in dims]
            elif any(n in given for n in node.all_input_nodes):
                given.add(node)
                made += [(node, d) for d in new]
        return own + made + others

    def _dims(self, node: fx.Node) -> list[int]:
        return [d for d, n in enumerate(shape_of(node)) if any(known_equal(n, length) for length in self.lengths)]

    # -- what follows from them

    def _plan(self, seeds: Sequence[Seed]) -> Plan:
        rows: list[Tokens] = []
        at: dict[fx.Node, int] = dict(seeds)
        carried = Sharded(Axes(), rows)  # type: ignore[arg-type]
        plan = Plan(carried, at)
        for node in self.view.graph.nodes:
            if node not in self.view.live:
                continue
            if (node in at or carried.takes(node)) and self.view.writes.to(node):
                plan.mixed[node] = reasons.SHARDED_WRITTEN(op=name_of(node) or node.name)
                continue
            if node in at:
                if carried.takes(node):
                    plan.mixed[node] = reasons.SHARDED_ANEW()
                tokens = self._tokens(rows, shape_of(node)[at[node]])
                carried.labels[node] = tuple(
                    (tokens.place,) if d == at[node] else carried.axes.fresh(n) for d, n in enumerate(shape_of(node))
                )
            elif node in self.sites:
                self._site(plan, self.sites[node])
            elif node.op == "output" or node in self.inside or node.target is opaque or is_mutating(node):
                continue
            elif carried.takes(node) and (is_tensor(node) or isinstance(value_of(node), (list, tuple))):
                try:
                    carried.carry(node)
                except Mixed as error:
                    plan.mixed[node] = error.reason
        self._need(plan)
        return plan

    def _tokens(self, rows: list[Tokens], size: Size) -> Tokens:
        """One for all dims of a length: what they hold does not matter."""
        for known in rows:
            if known_equal(known.length, size):
                return known
        rows.append(Tokens(size))
        return rows[-1]

    def _site(self, plan: Plan, site: Site) -> None:
        carried = plan.carried
        q = self._side(carried, site.q, site.q_dim)
        if q is None:
            return
        if site.lse is not None:
            plan.mixed[site.final] = reasons.SHARDED_LOG_SUM_EXP()
            return
        k = self._side(carried, site.k, site.k_dim)
        if k is None or self._side(carried, site.v, site.k_dim) is not k:
            k = None
        found = Distributed(site, q, k)
        problem = self.runs(found)
        if problem is not None:
            self.problem = self.problem or problem
            plan.mixed[site.final] = problem
            return
        plan.sites[site.final] = found
        fresh: dict[Atom, Atom] = {site.q_dim[0]: q.place}
        carried.labels[site.final] = tuple(
            tuple(fresh.setdefault(a, Atom(a.size)) for a in dim) for dim in site.out_labels
        )

    def _side(self, carried: Sharded, leaf: Leaf, dim: Dim) -> Tokens | None:
        """The rows of q, k or v, if they are its queries or keys; None if they are not, or it is whole."""
        if leaf.node not in carried.labels or leaf.made is not None or leaf.number or leaf.depth or len(dim) != 1:
            return None
        labels = carried.axes.resolve(carried.labels[leaf.node])
        try:
            tokens = carried.tokens_of(labels)
        except Mixed:
            return None
        for have, found in zip(labels, leaf.labels, strict=True):
            mine = tokens.place in have
            if mine != (dim[0] in found):
                return None
            if mine and (
                len(have) != len(found)
                or any(
                    (a is tokens.place) != (b is dim[0]) or not known_equal(a.size, b.size) for a, b in zip(have, found)
                )
            ):
                return None
        return tokens

    # -- what is needed of it, and how

    def _need(self, plan: Plan) -> None:
        roots: list[tuple[fx.Node, bool]] = []
        for node in self.view.graph.nodes:
            if node.op == "output":
                own = self.outputs == "own"
                roots += [(n, own and plan.is_sharded(n)) for n in node.all_input_nodes]
            elif node.target is opaque or is_mutating(node):
                roots.append((node, False))
        seen: set[tuple[fx.Node, bool]] = set()
        while roots:
            node, as_rows = roots.pop()
            if (node, as_rows) in seen:
                continue
            seen.add((node, as_rows))
            plan.needed.add(node)
            if as_rows:
                plan.rows.add(node)
                if node not in plan.seeds:
                    roots += self._read_by_rows(plan, node)
                else:
                    roots.append((node, False))
            elif plan.is_sharded(node) and node not in plan.seeds:
                plan.whole.add(node)
                same = plan.same(node)
                roots.append((node, True) if same is None else (same, False))
            elif node in plan.carried.sums:
                roots += self._read_by_rows(plan, node)
            elif node in plan.seeds and node.op == "placeholder":
                continue
            elif isinstance(value_of(node), (int, torch.SymInt)) and not is_tensor(node):
                # a size of a sharded tensor is known without it
                roots += [(n, False) for n in node.all_input_nodes if not plan.is_sharded(n)]
            else:
                roots += [(n, False) for n in node.all_input_nodes]

    def _read_by_rows(self, plan: Plan, node: fx.Node) -> Iterable[tuple[fx.Node, bool]]:
        """What a sharded op, or a sum over rows, reads: (value, whether it is sharded)."""
        found = plan.sites.get(node)
        if found is None:
            return [(n, plan.is_sharded(n)) for n in node.all_input_nodes]
        site = found.site
        read = [(site.q.node, True)]
        read += [(leaf.node, found.keys is not None) for leaf in (site.k, site.v)]
        read += [(n, False) for leaf in site.operands for n in read_by(leaf)]
        return read
