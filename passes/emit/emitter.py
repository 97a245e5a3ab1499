"""Edit the Dynamo graph itself: put the op where a site's result was made, and leave everything else verbatim."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Iterator, Sequence, Set
from typing import Any

import torch
from torch import fx

from attnfuse import reasons
from attnfuse._compat import pytree
from attnfuse.kernels.statistics import log_sum_exp
from attnfuse.passes.capture.recorder import is_assertion, is_checkpoint, is_choice
from attnfuse.passes.capture.view import Scope, View
from attnfuse.passes.emit.edits import Edits, EmitError, known
from attnfuse.passes.emit.repeated import partners
from attnfuse.passes.emit.transaction import undone_on_error
from attnfuse.passes.emit.writer import NodeWriter, is_pure, writes_own_memory
from attnfuse.passes.graph.aten import value_of
from attnfuse.passes.graph.memory import same_memory, written
from attnfuse.passes.masks.terms import Tensor
from attnfuse.passes.site import Leaf, Refusal, Site


class Emitter(Edits):
    """Edits the Dynamo graphs of one view, site after site."""

    def __init__(self, view: View, strict: bool = False) -> None:
        super().__init__(view)
        self.strict = strict
        #: the calls of the op, one for each site that was emitted
        self.calls: list[fx.Node] = []
        #: sites of the view, among which those of a region's other calls are looked for
        self.sites: Sequence[Site] = ()
        # sites that the rewrite of another call of their region has done, with the call of the op
        self.done: dict[Site, fx.Node] = {}

    def emit(self, site: Site, kernel: str) -> None:
        """Replace the site's result, inside of `attempt`. Raises EmitError."""
        origin = self.view.origin[site.final]
        scope, owner = origin.scope, origin.node
        if site in self.done:
            self.calls.append(self.done[site])
            return
        others = partners(self.view, site, self.sites)
        # what one call may not have, the body may not
        served = [site] if isinstance(others, Refusal) else [site, *others]
        if any(self._trains_a_branch(s) for s in served):
            raise EmitError(reasons.TRAINED_BRANCH())
        if any(self._is_overwritten(leaf, s) for s in served for leaf in s.leaves):
            raise EmitError(reasons.KEPT_TENSOR_WRITTEN())
        if isinstance(others, Refusal):
            raise EmitError(others.reason)
        writer = NodeWriter(self, scope, owner, value_of(site.q.node).device)
        with scope.module.graph.inserting_before(owner):
            call, result = self._insert(site, kernel, writer, any(map(self.may_be_written, served)))
            found, users = self._log_sum_exp(site, scope, owner, call, writer)
            self.redirect(site.final, scope, owner, result, writer)
        if site.lse is not None:
            for user in users:
                user.replace_input_with(self.view.origin[site.lse].node, found)
            self.replaced[scope, site.lse] = found
        self.touched.add(scope)
        self.calls.append(call)
        self.done.update(dict.fromkeys(others, call))

    @contextlib.contextmanager
    def attempt(self, final: fx.Node) -> Iterator[None]:
        """What is written inside, in the graph of `final` and in those around it, is undone if anything is raised."""
        kept = dict(self.replaced), set(self.touched), list(self.calls), dict(self.done)
        graphs: list[fx.Graph] = []
        scope: Scope | None = self.view.origin[final].scope
        while scope is not None:
            # an input that a branch of torch.cond gets is given to the other one too
            beside = [s for s in self.view.scopes if s is scope or (s.call is not None and s.call is scope.call)]
            graphs += [s.module.graph for s in beside if s.module.graph not in graphs]
            scope = scope.parent
        with undone_on_error(graphs):
            try:
                yield
            except BaseException:
                self.replaced, self.touched, self.calls, self.done = kept
                raise

    def _trains_a_branch(self, site: Site) -> bool:
        """Whether a branch of a torch.cond has the site and gradients: a kernel's need not have the strides of eager's."""
        if not (self.view.trains and self.view.grad.get(site.final, True)):
            return False
        at: Scope | None = self.view.origin[site.final].scope
        while at is not None and not (at.call is not None and is_choice(at.call)):
            at = at.parent
        return at is not None

    def _insert(self, site: Site, kernel: str, writer: NodeWriter, own: bool) -> tuple[fx.Node, fx.Node]:
        """The call of the op, and its result as the site's is; own: as a copy."""
        q = writer.canonical(site.q, site.batch, site.q_dim, site.d_dim)
        paging = site.paging
        if paging is None:
            k = writer.canonical(site.k, site.batch, site.k_dim, site.d_dim)
            v = writer.canonical(site.v, site.batch, site.k_dim, site.e_dim)
            pages = None
        else:
            k = writer.canonical(site.k, site.batch, paging.k_blocks, paging.row, site.d_dim)
            v = writer.canonical(site.v, site.batch, paging.v_blocks, paging.row, site.e_dim)
            pages = writer.pages(site, paging, k)
        operands = writer.operands(site, site.spec)
        pair = writer.attention(q, k, v, operands, (None, None), site.spec, kernel, self.strict, pages)
        out = writer.getitem(pair, 0)
        dims = (*((a,) for a in site.batch), site.q_dim, site.e_dim)
        result = writer.shaped(out, dims, site.out_labels, value_of(site.final))
        if own:
            result = writer.call(torch.ops.attnfuse.own.default, (result,))
        return pair, result

    def _is_overwritten(self, leaf: Leaf, site: Site) -> bool:
        """Whether memory that goes into the op is written to after it, though it is kept for backward.

        A copy would not do: Inductor takes the memory itself for the copy that backward gets.
        """
        if not (self.view.trains and self.view.grad.get(site.final, True)):
            return False
        if leaf.made is not None and not isinstance(leaf.made, Tensor):
            return False
        node = leaf.node if leaf.made is None else leaf.made.node
        return bool(self.view.writes.between(node, self.view.order[site.final]))

    def may_be_written(self, site: Site) -> bool:
        """Whether somebody may write to the result: the op keeps it for backward, so that they must have a copy."""
        if not (self.view.trains and self.view.grad.get(site.final, True)):
            return False
        output = next(n for n in reversed(self.view.graph.nodes) if n.op == "output")
        if any(same_memory(n, site.final) for n in output.all_input_nodes):
            return True
        return bool(self.view.writes.between(site.final, self.view.order[site.final]))

    def redirect(self, final: fx.Node, scope: Scope, owner: fx.Node, result: fx.Node, writer: NodeWriter) -> None:
        """Let everything that used `final`, made by the Dynamo node `owner`, use `result`. Raises EmitError; see attempt."""
        self.replaced[scope, final] = result
        made = scope.values[owner]
        if made is final:
            new: Any = result
        else:
            new = pytree.tree_map_only(fx.Node, writer.node_for, made)
        if isinstance(new, fx.Node):
            owner.replace_all_uses_with(new)
            if made is not final:
                self.replaced[scope, made] = new
            return
        for user in list(owner.users):
            if user.target is not operator.getitem:
                raise EmitError(reasons.CALL_NOT_TAKEN_APART())
        for user in list(owner.users):
            part = new[user.args[1]]
            user.replace_all_uses_with(part)
            value = scope.values[user]
            if isinstance(value, fx.Node):
                self.replaced[scope, value] = part

    def _log_sum_exp(
        self, site: Site, scope: Scope, owner: fx.Node, call: fx.Node, writer: NodeWriter
    ) -> tuple[fx.Node, list[fx.Node]]:
        """That of the op, and what after it uses the graph's own; nothing where nothing reads it."""
        lse = site.lse
        if lse is None:
            return call, []
        origin = self.view.origin[lse]
        if origin.scope is not scope or scope.values.get(origin.node) != lse:
            raise EmitError(reasons.LOG_SUM_EXP_IN_CALL())
        later = []
        for user in origin.node.users:
            parts = [n for n, o in self.view.origin.items() if o.node is user and o.scope is scope]
            if owner < user:
                later.append(user)
            elif not parts or not site.inside.issuperset(parts):
                raise EmitError(reasons.LOG_SUM_EXP_USED_EARLY())
        stats = writer.getitem(call, 1)
        top, total = (writer.call(torch.select, (stats, 0, i)) for i in (0, 1))
        # its gradient goes to the maximum alone, as attnfuse.ops says
        found = writer.inline(log_sum_exp, top, writer.method("detach", total))
        like = value_of(lse)
        if like.dtype != known(found).dtype:
            found = writer.method("to", found, like.dtype)
        return writer.shaped(found, (*((a,) for a in site.batch), site.q_dim), site.lse_labels, like), later

    def finish(self, inside: Set[fx.Node]) -> None:
        """Erase the view nodes that the ops took over, and what nothing needs any more."""
        for scope in reversed(self.view.scopes):
            self.clean(scope, inside)
            if scope in self.touched:
                scope.module.graph.lint()
                scope.module.recompile()

    def clean(self, scope: Scope, inside: Set[fx.Node]) -> None:
        """Erase what nothing needs in one graph; those of the regions that it runs come first."""
        bodies = {s.call: s for s in self.view.scopes if s.call is not None and is_checkpoint(s.call)}
        for node in reversed(list(scope.module.graph.nodes)):
            claims = [u for u in node.users if is_assertion(u)]
            if len(claims) < len(node.users) or node.op in ("placeholder", "output"):
                continue
            body = bodies.get(node)
            if body is not None:
                made = [n for n, origin in self.view.origin.items() if origin.scope is body]
                # what it gave is made elsewhere
                gone = [n in inside for n in made]
                if any(gone) and all(x or is_pure(n) or self._writes_inside(n, body) for x, n in zip(gone, made)):
                    scope.module.graph.erase_node(node)
                continue
            parts = self.owned.get((scope, node), [])
            unneeded = all(n in inside or is_pure(n) or writes_own_memory(self.view, n) for n in parts)
            value = scope.values.get(node)
            # one that gave a tensor as it is, such as a cast to the dtype it has, switches no mode either
            given = isinstance(value, fx.Node) and value in inside
            if node in scope.values and unneeded and (given or _may_go(node, parts)):
                for done in (*claims, node):
                    scope.module.graph.erase_node(done)

    def _writes_inside(self, node: fx.Node, body: Scope) -> bool:
        """Whether a writing op only writes to memory that the body of a region makes itself."""
        targets = written(node)
        first = [next(n for n in self.view.graph.nodes if same_memory(n, target)) for target in targets]
        return bool(first) and all(n in self.view.origin and self.view.origin[n].scope is body for n in first)

    @functools.cached_property
    def owned(self) -> dict[tuple[Scope, fx.Node], list[fx.Node]]:
        """What each Dynamo node made in the view."""
        owned: dict[tuple[Scope, fx.Node], list[fx.Node]] = {}
        for made, origin in self.view.origin.items():
            owned.setdefault((origin.scope, origin.node), []).append(made)
        return owned


def _may_go(node: fx.Node, made: list[fx.Node]) -> bool:
    """Nodes that made nothing in the view may switch a mode (no_grad, autocast); only plain reads of them may go."""
    return bool(made) or node.op == "get_attr" or node.target is operator.getitem
