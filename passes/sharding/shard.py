"""One graph on the tokens of a rank: found, planned and written; what comes of it, for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import fx

from attnfuse import reasons
from attnfuse.distributed import steps
from attnfuse.distributed.layouts import Layout
from attnfuse.distributed.options import Dealt
from attnfuse.kernels import choose
from attnfuse.passes.capture.view import View
from attnfuse.passes.emit.edits import EmitError
from attnfuse.passes.emit.emitter import Emitter
from attnfuse.passes.graph.aten import name_of, shape_of, value_of
from attnfuse.passes.graph.labels import hint
from attnfuse.passes.sharding.carry import Tokens
from attnfuse.passes.sharding.find import Distributed, Plan, find
from attnfuse.passes.sharding.write import Ranks, Sharder
from attnfuse.passes.site import Site
from attnfuse.reasons import Reason
from attnfuse.settings import Settings


class Call(NamedTuple):
    """How a distributed attention is computed."""

    kernel: str
    algorithm: str


@dataclass(frozen=True)
class Gather:
    """A sharded value that is gathered. bytes: of the whole, a call; why: what needs it; at: the user's line."""

    what: str
    at: str
    why: str
    bytes: int


@dataclass(frozen=True)
class Sharding:
    """What became of a graph under sequence_parallel.

    reason   why all of it is whole, or None
    layout   how tokens are dealt; lengths: of the token dims
    calls    of the distributed attentions, by result
    inside   view nodes that nothing needs any more
    on_rows, whole   how many ops are computed on a rank's rows, and how many live ones on whole tensors
    gathers  what is gathered
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

    @staticmethod
    def left_whole(dealt: Dealt, reason: Reason) -> Sharding:
        return Sharding(dealt, reason)

    def said(self, each: Distributed) -> str:
        """How one attention is computed, for its report."""
        call = self.calls[each.site.final]
        return f"over {self.dealt.ranks} ranks by {call.algorithm}, {self.layout}"

    @property
    def lines(self) -> tuple[str, ...]:
        """What the report says."""
        if self.reason is not None:
            return (str(reasons.SHARDED_NOT(why=self.reason)),)
        tokens = " and ".join(map(str, self.lengths))
        found = [
            f"sequence parallel: {tokens} tokens over {self.dealt.ranks} ranks, {self.layout}; {self.on_rows} ops on a rank's "
            f"tokens, {self.whole} on whole tensors"
        ]
        for gather in self.gathers:
            at = f" ({gather.at})" if gather.at else ""
            found.append(f"gathered: {gather.what}{at}, {_said(gather.bytes)}, for {gather.why}")
        return tuple(found)

    @property
    def words(self) -> tuple[Any, ...]:
        """What all ranks must have alike."""
        calls = sorted((node.name, *call) for node, call in self.calls.items())
        return (None if self.reason is None else str(self.reason), self.layout, self.lengths, calls, self.on_rows)


def shard(emitter: Emitter, sites: Sequence[Site], settings: Settings, dealt: Dealt) -> Sharding:
    """Write the emitter's view on a rank's tokens, or say why it is left whole."""
    view = emitter.view
    layout = _layout(dealt, sites)
    calls: dict[fx.Node, Call] = {}

    def runs(each: Distributed) -> Reason | None:
        site = each.site
        algorithm = "local" if each.keys is None else _algorithm(dealt, site)
        trains = view.trains and view.grad.get(site.final, True)
        try:
            spec = steps.step_spec(site.spec, layout, dealt.ranks, algorithm)
        except ValueError as error:
            return reasons.SHARDED_SPEC(why=error)
        device = value_of(site.q.node).device
        partial = algorithm not in steps.WHOLE_KEYS
        choice = choose(spec, device, settings.kernel, trains, partial)
        if choice.kernel is None:
            return choice.reason
        calls[site.final] = Call(choice.kernel.name, algorithm)
        return None

    plan = find(view, sites, runs, dealt.outputs)
    if isinstance(plan, Reason):
        return Sharding.left_whole(dealt, plan)
    factor = dealt.ranks if dealt.gradients == "mean" else 0
    ranks = Ranks(layout, dealt.ranks, dealt.groups, factor)
    sharder = Sharder(emitter, plan, ranks, calls, dealt.outputs == "own")
    try:
        sharder.write()
    except EmitError as error:
        return Sharding.left_whole(dealt, error.reason)
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


def _layout(dealt: Dealt, sites: Sequence[Site]) -> Layout:
    if dealt.layout != "auto":
        return dealt.layout
    return "zigzag" if dealt.ranks > 1 else "contiguous"


def _algorithm(dealt: Dealt, site: Site) -> str:
    return dealt.algorithm if dealt.algorithm != "auto" else "gather"


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
                    user in plan.needed and not plan.is_sharded(user) and user not in plan.carried.sums
                ):
                    users.append(user)
        why = [_why(view, plan, u) for u in users]
        size = value_of(node).element_size()
        for n in shape_of(node):
            size *= n if isinstance(n, int) else _hint(n)
        found.append(Gather(name_of(node) or node.name, view.where(node), ", ".join(dict.fromkeys(why)), size))
    return tuple(found)


def _why(view: View, plan: Plan, user: fx.Node) -> str:
    if user.op == "output":
        return "the result"
    at = view.where(user)
    said = f"{name_of(user) or 'other code'}{f' at {at}' if at else ''}"
    reason = plan.mixed.get(user)
    return said if reason is None else f"{said}, as {reason}"


def _hint(size: Any) -> int:
    known = getattr(size.node, "hint", None)
    return known if isinstance(known, int) else 1


def _said(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count} bytes"


assert Tokens and torch and cast
