"""One graph on the tokens of a rank: found, planned and written; what comes of it, for the report."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import fx

from attnfuse import reasons
from attnfuse.distributed import cost, steps
from attnfuse.distributed.layouts import Layout
from attnfuse.distributed.options import Dealt
from attnfuse.distributed.traffic import Sizes
from attnfuse.kernels import Choice, choose
from attnfuse.passes.capture.view import View
from attnfuse.passes.emit.edits import EmitError
from attnfuse.passes.emit.emitter import Emitter
from attnfuse.passes.graph.aten import name_of, shape_of, value_of
from attnfuse.passes.graph.labels import hint
from attnfuse.passes.sharding.find import Distributed, Plan, drawing, find
from attnfuse.passes.sharding.write import Call, Ranks, Sharder
from attnfuse.passes.site import Site
from attnfuse.reasons import Reason, ReasonError
from attnfuse.settings import Settings


@dataclass(frozen=True)
class Gather:
    """A sharded value that is gathered. bytes: of the whole, a call; why: what needs it; at: the user's line; of_result: it is
    gathered only since the graph returns it."""

    what: str
    at: str
    why: str
    bytes: int
    of_result: bool


@dataclass(frozen=True)
class Sharding:
    """What became of a graph under sequence_parallel.

    reason   why all of it is whole, or None
    layout   how tokens are dealt; lengths: of the token dims
    calls    of the distributed attentions, by result
    inside   view nodes that nothing needs any more
    on_rows, whole   how many ops are computed on a rank's rows, and how many live ones on whole tensors
    gathers  what is gathered
    drawn    an op that draws random numbers, and the user's line, where all is whole
    """

    dealt: Dealt
    reason: Reason | None = None
    layout: Layout = "contiguous"
    lengths: tuple[int, ...] = ()
    plan: Plan | None = None
    calls: dict[fx.Node, Call] = field(default_factory=dict)
    inside: frozenset[fx.Node] = frozenset()
    on_rows: int = 0
    whole: int = 0
    gathers: tuple[Gather, ...] = ()
    drawn: tuple[str, str] | None = None

    @staticmethod
    def left_whole(dealt: Dealt, reason: Reason, view: View | None = None) -> Sharding:
        drawn = None if view is None else next(drawing(view), None)
        return Sharding(
            dealt, reason, drawn=None if view is None or drawn is None else (name_of(drawn), view.where(drawn))
        )

    def said(self, each: Distributed) -> str:
        """How one attention is computed, for its report."""
        call = self.calls[each.site.final]
        if call.algorithm == "local":
            return f"over {_ranks(self.dealt.ranks)}: whole keys, nothing is sent"
        return f"over {_ranks(self.dealt.ranks)}: {call.why}"

    @property
    def lines(self) -> tuple[str, ...]:
        """What the report says."""
        if self.reason is not None:
            return (str(reasons.SHARDED_NOT(why=self.reason)),)
        tokens = " and ".join(map(str, self.lengths))
        found = [
            f"sequence parallel: {tokens} tokens over {_ranks(self.dealt.ranks)}, {self.layout}; {self.on_rows} ops on a rank's "
            f"tokens, {self.whole} on whole tensors"
        ]
        sent = sum(call.bytes for call in self.calls.values())
        found.append(f"attentions send {cost.amount(sent)} a rank, a call")
        for gather in self.gathers:
            at = f" ({gather.at})" if gather.at else ""
            found.append(f"gathered: {gather.what}{at}, {cost.amount(gather.bytes)}, for {gather.why}")
        return tuple(found)

    @property
    def warning(self) -> Reason | None:
        """That ranks draw numbers of their own where all is whole, or that results are most of what is sent, if it is so."""
        if self.reason is not None:
            return None if self.drawn is None else reasons.SHARDED_APART(op=self.drawn[0], at=self.drawn[1])
        results = sum(g.bytes for g in self.gathers if g.of_result)
        # of what is gathered a rank sends its own part to each other one, as much as it receives
        share = results * (self.dealt.ranks - 1) // self.dealt.ranks
        rest = sum(call.bytes for call in self.calls.values()) + sum(g.bytes for g in self.gathers if not g.of_result)
        if share <= rest:
            return None
        return reasons.RESULTS_GATHERED(results=cost.amount(results), rest=cost.amount(rest))

    @property
    def words(self) -> tuple[Any, ...]:
        """What all ranks must have alike."""
        calls = sorted((node.name, *call) for node, call in self.calls.items())
        return (None if self.reason is None else str(self.reason), self.layout, self.lengths, calls, self.on_rows)


def shard(emitter: Emitter, sites: Sequence[Site], settings: Settings, dealt: Dealt) -> Sharding:
    """Write the emitter's view on a rank's tokens, or say why it is left whole."""
    view = emitter.view
    try:
        layout = _layout(dealt, view, sites)
    except ReasonError as error:
        return Sharding.left_whole(dealt, error.reason, view)
    calls: dict[fx.Node, Call] = {}

    def runs(each: Distributed) -> Reason | None:
        site = each.site
        device = value_of(site.q.node).device
        trains = view.trains and view.grad.get(site.final, True)

        def chosen(algorithm: str) -> Choice | Reason:
            try:
                spec = steps.step_spec(site.spec, layout, dealt.ranks, algorithm)
            except ValueError as error:
                return reasons.SHARDED_SPEC(why=error)
            parts = algorithm not in steps.WHOLE_KEYS
            return choose(spec, device, settings.kernel, trains, parts, site.spec.dropout > 0.0)

        algorithm, why, sent = "local", "", 0
        if each.keys is not None:
            ring = chosen("ring")
            partial = isinstance(ring, Choice) and ring.kernel is not None
            try:
                decision = _decided(dealt, view, site, layout, partial)
            except ReasonError as error:
                return error.reason
            except ValueError as error:
                return reasons.SHARDED_SPEC(why=error)
            algorithm, why = decision.algorithm, decision.reason
            sent = decision.bytes_forward + decision.bytes_backward
        choice = chosen(algorithm)
        if isinstance(choice, Reason):
            return choice
        if choice.kernel is None:
            return choice.reason
        calls[site.final] = Call(choice.kernel.name, algorithm, why, sent)
        return None

    plan = find(view, sites, runs, dealt.outputs, dealt.algorithm != "auto")
    if isinstance(plan, Reason):
        return Sharding.left_whole(dealt, plan, view)
    factor = dealt.ranks if dealt.gradients == "mean" else 0
    ranks = Ranks(layout, dealt.ranks, dealt.groups, factor)
    sharder = Sharder(emitter, plan, ranks, calls, dealt.outputs == "own")
    try:
        sharder.write()
    except EmitError as error:
        return Sharding.left_whole(dealt, error.reason, view)
    sharder.finish()
    used = {final: calls[final] for final in plan.sites}
    return Sharding(
        dealt,
        None,
        layout,
        tuple(hint(t.place) for t in plan.carried.rows),
        plan,
        used,
        frozenset(sharder.inside),
        len(plan.rows),
        _count(view, plan),
        _gathers(view, plan),
    )


def _sizes(view: View, site: Site) -> Sizes:
    """Those of a site, with hints for symbolic ones."""
    trains = view.trains and view.grad.get(site.final, True)
    queries, keys = (hint(dim[0]) if dim else 1 for dim in (site.q_dim, site.k_dim))
    return cost.sizes_of(site.spec, [hint(a) for a in site.batch], queries, keys, trains)


def _layout(dealt: Dealt, view: View, sites: Sequence[Site]) -> Layout:
    """One for the whole graph. Raises ReasonError where heads cannot be dealt."""
    if dealt.layout != "auto":
        return dealt.layout
    device = value_of(sites[0].q.node).device.type
    attentions = []
    for site in sites:
        # a size that is not known is a reason of that attention alone
        with contextlib.suppress(ValueError):
            if site.spec.layout == "dense":
                attentions.append((site.spec, _sizes(view, site)))
    if not attentions:
        return "contiguous"
    found = cost.choose_layout(attentions, dealt.sizes, device, dealt.algorithm, dealt.heads)
    return cast(Layout, found)


def _decided(dealt: Dealt, view: View, site: Site, layout: Layout, partial: bool) -> cost.Decision:
    """How one attention sees all keys. Raises ReasonError."""
    device = value_of(site.q.node).device.type
    sizes = _sizes(view, site)
    return cost.choose(site.spec, sizes, dealt.sizes, device, layout, dealt.algorithm, dealt.heads, partial=partial)


def _count(view: View, plan: Plan) -> int:
    """How many ops are computed on whole tensors."""
    own = plan.rows | set(plan.carried.sums)
    return sum(n.op == "call_function" and n not in own for n in plan.needed if n in view.live)


def _gathers(view: View, plan: Plan) -> tuple[Gather, ...]:
    found = []
    for node in sorted(plan.gathered, key=view.order.__getitem__):
        # what a copy of it is used for, too
        users, stack = [], [node]
        while stack:
            for user in stack.pop().users:
                if user in plan.whole and plan.same(user) is not None:
                    stack.append(user)
                elif user.op == "output" or (
                    user in plan.needed
                    and (user in plan.seeds or not plan.is_sharded(user))
                    and user not in plan.carried.sums
                ):
                    users.append(user)
        why = [_why(view, plan, u) for u in users]
        size = value_of(node).element_size()
        for n in shape_of(node):
            size *= n if isinstance(n, int) else _hint(n)
        found.append(
            Gather(
                name_of(node) or node.name, view.where(node), ", ".join(dict.fromkeys(why)), size, set(why) == {_RESULT}
            )
        )
    return tuple(found)


def _ranks(count: int) -> str:
    return f"{count} rank{'' if count == 1 else 's'}"


#: What the output of a graph is for a gather.
_RESULT = "the result"


def _why(view: View, plan: Plan, user: fx.Node) -> str:
    if user.op == "output":
        return _RESULT
    at = view.where(user)
    said = f"{name_of(user) or 'other code'}{f' at {at}' if at else ''}"
    reason = plan.mixed.get(user)
    return said if reason is None else f"{said}, as {reason}"


def _hint(size: Any) -> int:
    known = getattr(size.node, "hint", None)
    return known if isinstance(known, int) else 1
