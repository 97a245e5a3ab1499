"""Whether a site can be taken out of its graph: nothing else uses or writes to what the op takes over, or to what it reads."""

from __future__ import annotations

from torch import fx

from attnfuse import reasons
from attnfuse.expr import walk
from attnfuse.passes.capture.view import View
from attnfuse.passes.graph.aten import name_of
from attnfuse.passes.graph.memory import is_mutating, opaque, written
from attnfuse.passes.site import Leaf, Refusal, Site


def isolated(view: View, site: Site) -> Refusal | None:
    """Nothing outside uses or writes to what the op takes over, or to what it reads, in between."""
    for node in site.inside:
        if node is site.final or node is site.lse:
            continue
        for user in node.users:
            if user in view.live and user not in site.inside and not _takes_shape_only(view, user, node, site):
                what = "a hook or opaque code" if user.target is opaque else name_of(user) or user.op
                return Refusal(reasons.USED_ELSEWHERE(what=_role(site, node), user=what), user)
    for leaf in site.leaves:
        if leaf.node in site.inside:
            return Refusal(reasons.USED_ELSEWHERE(what="scores or weights", user="as an operand"), leaf.node)
    problem = overwritten(view, site)
    if problem is not None:
        return problem
    grad = view.grad.get(site.final, True)
    if any(view.grad.get(n, True) != grad for n in site.inside):
        return Refusal(reasons.PARTLY_NO_GRAD(), site.final)
    if is_mutating(site.final) and written(site.final):
        return Refusal(reasons.RESULT_WRITTEN(), site.final)
    return None


def overwritten(view: View, site: Site) -> Refusal | None:
    """Something the attention works on, or reads, is written in place before the op would run, but after it was read.

    None if nothing is.
    """
    end = view.order[site.final]
    for node in site.inside:
        for writer in view.writes.between(node, view.order[node], end):
            if writer not in site.inside:
                return Refusal(reasons.SCORES_WRITTEN(), writer)
    for leaf in site.leaves:
        for source in read_by(leaf):
            first = _first_read(view, source, site)
            # the first that reads it may write to it as well
            writers = view.writes.between(source, first - 1, end)
            if writers:
                return Refusal(reasons.OPERAND_WRITTEN(), writers[0])
    return None


def read_by(leaf: Leaf) -> list[fx.Node]:
    """The nodes whose values an operand is made of."""
    if leaf.made is None:
        return [leaf.node]
    nodes = [getattr(x, "node", None) for x in walk(leaf.made)]
    return [n for n in nodes if isinstance(n, fx.Node)]


def _first_read(view: View, node: fx.Node, site: Site) -> int:
    """The place of the first op through which the site reads `node`."""
    end = view.order[site.final]
    first = end
    for user in node.users:
        stack, seen = [user], set()
        while stack:
            at = stack.pop()
            if at in site.inside:
                first = min(first, view.order[user])
                break
            if at not in seen and view.order[at] < end:
                seen.add(at)
                stack.extend(at.users)
    return first


_LIKE = {made for what in ("zeros", "ones", "full", "empty") for made in (f"new_{what}", f"{what}_like")}


def _takes_shape_only(view: View, user: fx.Node, node: fx.Node, site: Site) -> bool:
    """x.expand_as(node) or node.new_zeros(..) for something that only the site uses: no value of `node` is read."""
    target = getattr(user.target, "_schema", None)
    if target is None:
        return False
    if target.name in ("aten::expand_as", "aten::view_as", "aten::reshape_as"):
        return user.args[0] is not node and all(u in site.inside or u not in view.live for u in user.users)
    if name_of(user) not in _LIKE or user.args[0] is not node:
        return False
    # it is to be gone with the site: what the op takes would keep it
    taken = {source for leaf in site.leaves for source in read_by(leaf)}
    stack, seen = [user], {user}
    while stack:
        at = stack.pop()
        if at in taken or at.op == "output" or is_mutating(at) or at.target is opaque:
            return False
        more = {u for u in at.users if u in view.live and u not in site.inside} - seen
        seen |= more
        stack += more
    return True


def _role(site: Site, node: fx.Node) -> str:
    return "weights" if node is site.anchor or site.anchor in node.all_input_nodes else "scores or weights"
