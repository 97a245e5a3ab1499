"""Edit the Dynamo graph itself: put the op where a site's result was made, and leave everything else verbatim."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

import torch
from torch import fx

from attnfuse._compat import FakeTensorMode, OpOverload, alias_key, is_functorch_tensor, pytree, save_for_backward
from attnfuse.expr import Algebra, Apply, Const, Expr, Index, Linear
from attnfuse.kernels.dropout import SEED_LIMIT
from attnfuse.kernels.statistics import log_sum_exp
from attnfuse.passes.aten import name_of, shape_of
from attnfuse.passes.capture import (
    Scope,
    View,
    is_assertion,
    is_choice,
    is_mutating,
    is_stale,
    opaque,
    value_of,
    written,
)
from attnfuse.passes.labels import Atom, Dim, Distances, Labels, is_one, known_equal, stride_hint
from attnfuse.passes.repeated import calls_of, partners
from attnfuse.passes.site import Leaf, Refusal, Site
from attnfuse.passes.terms import Axis, Call, Symbol, Tensor, depends
from attnfuse.passes.transaction import undone_on_error
from attnfuse.passes.vocabulary import functional
from attnfuse.spec import Attention, Operand, dtype_of

_RANDOM = {torch.Tag.nondeterministic_seeded}


class EmitError(Exception):
    """A site cannot be written into its graph; its message is the reason."""


class Emitter:
    """Edits the Dynamo graphs of one view, site after site."""

    def __init__(self, view: View, strict: bool = False) -> None:
        self.view = view
        self.strict = strict
        # results that were replaced: (scope, ATen node) -> Dynamo node
        self.replaced: dict[tuple[Scope, fx.Node], fx.Node] = {}
        self.touched: set[Scope] = set()
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
        if self._trains_a_branch(site, scope):
            raise EmitError(
                "the attention is trained in a branch of torch.cond, where PyTorch wants the gradients of both branches to lie "
                "in memory alike; without gradients it would be fused"
            )
        if any(self._is_overwritten(leaf, site) for leaf in (site.q, site.k, site.v, *site.operands)):
            raise EmitError("a tensor that the attention keeps for backward is written to after it")
        others = partners(self.view, site, self.sites)
        if isinstance(others, Refusal):
            raise EmitError(others.reason)
        writer = Writer(self, scope, owner, value_of(site.q.node).device)
        with scope.module.graph.inserting_before(owner):
            call, result = self._insert(site, kernel, writer, any(map(self.may_be_written, (site, *others))))
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

    def _trains_a_branch(self, site: Site, scope: Scope) -> bool:
        """Whether a branch of a torch.cond has the site and gradients: a kernel's need not have the strides of eager's."""
        if not (self.view.trains and self.view.grad.get(site.final, True)):
            return False
        at: Scope | None = scope
        while at is not None and not (at.call is not None and is_choice(at.call)):
            at = at.parent
        return at is not None

    def _insert(self, site: Site, kernel: str, writer: Writer, own: bool) -> tuple[fx.Node, fx.Node]:
        """The call of the op, and its result as the site's is; own: as a copy."""
        q = writer.canonical(site.q, site.batch, site.q_dim, site.d_dim)
        k = writer.canonical(site.k, site.batch, site.k_dim, site.d_dim)
        v = writer.canonical(site.v, site.batch, site.k_dim, site.e_dim)
        operands = writer.operands(site, site.spec)
        pair = writer.attention(q, k, v, operands, (None, None), site.spec, kernel, self.strict)
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
        value = value_of(leaf.node if leaf.made is None else leaf.made.node)
        if not isinstance(value, torch.Tensor):
            return False
        after = self.view.order[site.final]
        return any(self.view.order[w] > after for w in self.view.writes.get(alias_key(value), ()))

    def may_be_written(self, site: Site) -> bool:
        """Whether somebody may write to the result: the op keeps it for backward, so that they must have a copy."""
        if not (self.view.trains and self.view.grad.get(site.final, True)):
            return False
        key = alias_key(value_of(site.final))
        output = next(n for n in reversed(self.view.graph.nodes) if n.op == "output")
        if any(_lies_at(n, key) for n in output.all_input_nodes):
            return True
        return any(self.view.order[w] > self.view.order[site.final] for w in self.view.writes.get(key, ()))

    def redirect(self, final: fx.Node, scope: Scope, owner: fx.Node, result: fx.Node, writer: Writer) -> None:
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
                raise EmitError("the attention lies inside a call whose results cannot be taken apart")
        for user in list(owner.users):
            part = new[user.args[1]]
            user.replace_all_uses_with(part)
            value = scope.values[user]
            if isinstance(value, fx.Node):
                self.replaced[scope, value] = part

    def _log_sum_exp(
        self, site: Site, scope: Scope, owner: fx.Node, call: fx.Node, writer: Writer
    ) -> tuple[fx.Node, list[fx.Node]]:
        """That of the op, and what after it uses the graph's own; nothing where nothing reads it."""
        lse = site.lse
        if lse is None:
            return call, []
        origin = self.view.origin[lse]
        if origin.scope is not scope or scope.values.get(origin.node) != lse:
            raise EmitError("the log-sum-exp of the scores is made inside of another call")
        later = []
        for user in origin.node.users:
            parts = [n for n, o in self.view.origin.items() if o.node is user and o.scope is scope]
            if owner < user:
                later.append(user)
            elif not parts or not site.inside.issuperset(parts):
                raise EmitError("the log-sum-exp of the scores is used before the attention is done")
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
        owned: dict[tuple[Scope, fx.Node], list[fx.Node]] = {}
        for made, origin in self.view.origin.items():
            owned.setdefault((origin.scope, origin.node), []).append(made)
        for scope in reversed(self.view.scopes):
            for node in reversed(list(scope.module.graph.nodes)):
                claims = [u for u in node.users if is_assertion(u)]
                if len(claims) < len(node.users) or node.op in ("placeholder", "output"):
                    continue
                parts = owned.get((scope, node), [])
                unneeded = all(n in inside or _is_pure(n) or _writes_own_memory(self.view, n) for n in parts)
                if node in scope.values and unneeded and _may_go(node, parts):
                    for done in (*claims, node):
                        scope.module.graph.erase_node(done)
            if scope in self.touched:
                scope.module.graph.lint()
                scope.module.recompile()


def _may_go(node: fx.Node, made: list[fx.Node]) -> bool:
    """Nodes that made nothing in the view may switch a mode (no_grad, autocast); only plain reads of them may go."""
    return bool(made) or node.op == "get_attr" or node.target is operator.getitem


def _is_pure(node: fx.Node) -> bool:
    if node.target is opaque or is_mutating(node):
        return False
    if isinstance(node.target, OpOverload):
        # random ops are impure in some versions of torch; assertions about sizes are in all
        return not (_RANDOM & set(node.target.tags)) and not node.is_impure()
    return getattr(node.target, "__module__", "") in ("_operator", "math") or _is_symbolic(node)


def _is_symbolic(node: fx.Node) -> bool:
    """Arithmetic on sizes, such as torch.sym_sqrt."""
    return isinstance(value_of(node), (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool))


def _writes_own_memory(view: View, node: fx.Node) -> bool:
    """Whether a writing op only writes to memory that was made inside the same Dynamo node, so that nobody else sees it."""
    owner = view.origin.get(node)
    targets = written(node)
    if owner is None or len(targets) != 1:
        return False
    key = alias_key(value_of(targets[0]))
    first = next((n for n in view.graph.nodes if _lies_at(n, key)), None)
    return first is not None and view.origin.get(first) == owner


def _written_to(node: fx.Node) -> fx.Node | None:
    """The tensor that an op writes to and gives back, where it is that very tensor."""
    targets = written(node)
    value = value_of(node)
    if len(targets) != 1 or not isinstance(value, torch.Tensor):
        return None
    other = value_of(targets[0])
    same = alias_key(other) == alias_key(value) and other.stride() == value.stride() and other.shape == value.shape
    return targets[0] if same and other.storage_offset() == value.storage_offset() else None


def _lies_at(node: fx.Node, key: int) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and alias_key(value) == key


class Writer:
    """Writes nodes before one node of a Dynamo graph, in terms of values of the view."""

    def __init__(self, emitter: Emitter, scope: Scope, owner: fx.Node, device: torch.device) -> None:
        self.emitter = emitter
        self.device = device
        self.scope = scope
        self.owner = owner
        # whose source line new nodes get
        self.written_for = owner
        self.graph = scope.module.graph
        self.made: dict[fx.Node, fx.Node] = {}
        self.tables: dict[Any, fx.Node] = {}
        self.depth = 0

    def call(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs or {})
        self._describe(node)
        return node

    def method(self, name: str, *args: Any) -> fx.Node:
        node = self.graph.call_method(name, args)
        self._describe(node)
        return node

    def attention(
        self,
        q: fx.Node,
        k: fx.Node,
        v: fx.Node,
        operands: Sequence[fx.Node],
        bounds: tuple[fx.Node | None, fx.Node | None],
        spec: Attention,
        kernel: str,
        strict: bool,
    ) -> fx.Node:
        """A call of the op. Raises EmitError for nodes that are not what the spec says."""
        seed = None
        if spec.dropout > 0.0:
            seed = self.call(torch.randint, (0, SEED_LIMIT, (1,)), {"dtype": torch.int64, "device": self.device})
            save_for_backward(seed)
        op = torch.ops.attnfuse.attention.default
        try:
            return self.call(op, (q, k, v, list(operands), seed, *bounds, spec.argument, kernel, strict))
        except ValueError as error:
            raise EmitError(f"the op does not take it ({error})") from error

    def inline(self, function: Callable[..., Any], *args: fx.Node) -> fx.Node:
        """The calls that `function`, of tensors to a tensor and without branches, makes of these nodes."""
        placed: dict[fx.Node, Any] = {}
        given = iter(args)
        for node in fx.Tracer().trace(function).nodes:
            if node.op == "placeholder":
                placed[node] = next(given)
            elif node.op == "output":
                return placed[node.args[0]]  # type: ignore[index,no-any-return]
            else:
                made = self.graph.node_copy(node, placed.__getitem__)
                self._describe(made)
                placed[node] = made
        raise AssertionError("a graph without an output")

    def checked(self, node: fx.Node, what: str, shape: Sequence[Any], dtype: torch.dtype | None = None) -> fx.Node:
        """The node, if its value is a tensor of that shape and dtype (of any, for None). Raises EmitError.

        Whoever knows what a node is to be says so: a graph whose fake values are not the real ones is compiled to something
        else, silently.
        """
        value = known(node)
        if not isinstance(value, torch.Tensor):
            raise EmitError(f"{what} is not a tensor")
        fits = len(value.shape) == len(shape) and all(map(known_equal, value.shape, shape))
        if not fits or dtype not in (None, value.dtype):
            wanted = f"{list(shape)}" if dtype is None else f"{dtype} {list(shape)}"
            raise EmitError(f"{what} is {value.dtype} {list(value.shape)} where it was to be {wanted}")
        return node

    def getitem(self, node: fx.Node, index: int) -> fx.Node:
        return self.call(operator.getitem, (node, index))

    def _describe(self, node: fx.Node) -> None:
        """Metadata as Dynamo gives it: where the code is, and a fake value."""
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            if key in self.written_for.meta:
                node.meta[key] = self.written_for.meta[key]
        example = _example(node, self.emitter.view.fake_mode)
        if example is not None:
            node.meta["example_value"] = example

    def node_for(self, made: fx.Node) -> fx.Node:
        """The Dynamo node with the value of a view node, computing it again from others if there is none."""
        key = (self.scope, made)
        if key in self.emitter.replaced:
            return self.emitter.replaced[key]
        existing = self.scope.nodes.get(made)
        if existing is not None and self._comes_first(existing):
            return existing
        if made in self.made:
            return self.made[made]
        if self.scope.parent is not None and self._is_outside(made):
            return self._imported(made)
        return self._copy(made)

    def here(self, made: fx.Node) -> fx.Node:
        """node_for, on the device of q: a tensor without dims may be the CPU's, and a mask be read past its way there."""
        node = self.node_for(made)
        value = value_of(made)
        if not isinstance(value, torch.Tensor) or value.device == self.device:
            return node
        return self.method("to", node, self.device)

    def _is_outside(self, made: fx.Node) -> bool:
        """Whether the value is made outside of this checkpointed region."""
        origin = self.emitter.view.origin.get(made)
        return origin is None or origin.scope is not self.scope

    def _imported(self, made: fx.Node) -> fx.Node:
        """A value of the graph around a checkpointed region, as one more input of the region."""
        parent, call = self.scope.parent, self.scope.call
        assert parent is not None and call is not None
        if len(calls_of(self.emitter.view, self.scope)) > 1:
            raise EmitError("a value the attention needs is made outside of its region, which is called more than once")
        outer = Writer(self.emitter, parent, call, self.device)
        with parent.module.graph.inserting_before(call):
            node = outer.node_for(made)
        self.emitter.touched.add(parent)
        last = next(n for n in reversed(self.graph.nodes) if n.op == "placeholder")
        with self.graph.inserting_after(last):
            given = self.graph.placeholder(f"attnfuse_{made.name}")
        given.meta.update(node.meta)
        self._pass(call, node, made, given)
        self.made[made] = self.emitter.replaced[self.scope, made] = given
        return given

    def _pass(self, call: fx.Node, node: fx.Node, made: fx.Node, given: fx.Node) -> None:
        """Let `call` give `node`, the value `made`, to its region as a further argument: the placeholder `given`."""
        others = [s for s in self.emitter.view.scopes if s.call is call and s is not self.scope]
        if not others:
            call.args = (*call.args, node)
            return
        # the branches of a torch.cond take the same arguments
        *rest, operands = call.args
        call.args = (*rest, (*operands, node))  # type: ignore[misc]
        for scope in others:
            last = next(n for n in reversed(scope.module.graph.nodes) if n.op == "placeholder")
            with scope.module.graph.inserting_after(last):
                other = scope.module.graph.placeholder(str(given.target))
            other.meta.update(given.meta)
            self.emitter.replaced[scope, made] = other
            self.emitter.touched.add(scope)

    def _comes_first(self, node: fx.Node) -> bool:
        return node.op == "placeholder" or (not node._erased and node < self.owner)

    def _copy(self, made: fx.Node) -> fx.Node:
        same = _written_to(made)
        if same is not None and not _writes_own_memory(self.emitter.view, made):
            # x.op_() leaves its result in x
            return self.node_for(same)
        if made.op != "call_function":
            raise EmitError("a value the attention needs is not available where its result is made")
        target = made.target
        if _writes_own_memory(self.emitter.view, made):
            target = functional(made.target)  # type: ignore[arg-type, assignment]
        elif not _is_pure(made):
            target = None  # type: ignore[assignment]
        if target is None:
            what = name_of(made) or "an opaque call"
            raise EmitError(f"a value the attention needs comes from code that cannot be repeated ({what})")
        if is_stale(made) or self._overwritten_since(made):
            raise EmitError("a value the attention needs was made from memory that is written before the result")
        self.depth += 1
        if self.depth > 200:
            raise EmitError("the attention is too deep inside one call")
        args = fx.node.map_arg(made.args, self.node_for)
        kwargs = fx.node.map_arg(made.kwargs, self.node_for)
        copy, value = self.call(target, tuple(args), dict(kwargs)), value_of(made)  # type: ignore[arg-type]
        if isinstance(value, torch.Tensor):
            self.checked(copy, f"{name_of(made)} made again", value.shape, value.dtype)
        self.made[made] = copy
        return copy

    def _overwritten_since(self, made: fx.Node) -> bool:
        """Whether repeating `made` where the op stands would read other values than it did."""
        view = self.emitter.view
        now = max((view.order[n] for n, o in view.origin.items() if o.node is self.owner), default=0)
        for source in made.all_input_nodes:
            value = value_of(source)
            if isinstance(value, torch.Tensor):
                writers = view.writes.get(alias_key(value), ())
                if any(view.order[made] < view.order[w] < now for w in writers):
                    return True
        return False

    def size(self, wanted: Any) -> int | fx.Node:
        """A size as an argument: a number, or a node that gives it."""
        if isinstance(wanted, int):
            return wanted
        number = wanted.node.maybe_as_int()
        if number is not None:
            return int(number)
        for node in self.graph.nodes:
            if node is self.owner:
                break
            example = node.meta.get("example_value")
            if isinstance(example, torch.SymInt) and known_equal(example, wanted):
                symbol: fx.Node = node
                return symbol
            if is_functorch_tensor(example):
                continue
            if isinstance(example, torch.Tensor) and not isinstance(example, torch.nn.Parameter):
                for dim, size in enumerate(example.shape):
                    if not isinstance(size, int) and known_equal(size, wanted):
                        return self.method("size", node, dim)
        raise EmitError(f"no tensor of the graph has the size {wanted}")

    def size_of(self, atom: Atom) -> int | fx.Node:
        """The number of values of an index, as an argument."""
        if not isinstance(atom, Distances):
            return self.size(atom.size)
        queries, keys = self.size(atom.queries), self.size(atom.keys)
        if isinstance(queries, int) and isinstance(keys, int):
            return queries + keys - 1
        return self.call(operator.sub, (self.call(operator.add, (queries, keys)), 1))

    def canonical(self, leaf: Leaf, batch: Dim, row: Dim, column: Dim) -> fx.Node:
        """The leaf as [*batch, row, column] with 1 where it has no such dim: only views, no copy."""
        node = self.here(leaf.node) if leaf.made is None else self._made(leaf)
        for at, start in enumerate(leaf.starts):
            length: Any = 1
            for atom in leaf.labels[at]:
                length = length * atom.size
            if not known_equal(length, shape_of(leaf.node)[at]):
                node = self.call(torch.narrow, (node, at, start, self.size(length)))
        if leaf.depth:
            node = self.call(operator.pow, (self.method("size", node, -1), -0.5))
        if leaf.number or leaf.depth:
            node = self.call(torch.full, ((), node), {"dtype": torch.float64, "device": self.device})
        if leaf.cast is not None:
            node = self.method("to", node, leaf.cast)
        if leaf.inverse:
            node = self.call(torch.reciprocal, (node,))
        labels = leaf.labels
        if any(len(dim) != 1 for dim in labels):
            node = (
                self.method("view", node, *self.shape([a.size for dim in labels for a in dim]))
                if self._splits(labels)
                else node
            )
            node = self._squeezed(node, labels)
        flat = [a for dim in labels for a in dim]
        wanted = [*((a,) for a in batch), row, column]
        order = [flat.index(dim[0]) for dim in wanted if dim and dim[0] in flat]
        if order != list(range(len(order))):
            node = self.method("permute", node, *order)
        for at, dim in enumerate(wanted):
            if not dim or dim[0] not in flat:
                node = self.method("unsqueeze", node, at)
        sizes = [dim[0].size if dim and dim[0] in flat else 1 for dim in wanted]
        return self.checked(node, "a tensor that the attention takes", sizes, leaf.given)

    def operands(self, site: Site, spec: Attention) -> list[fx.Node]:
        """The site's side tensors as `spec` says that they are."""
        return [self.operand(leaf, site, said) for leaf, said in zip(site.operands, spec.operands, strict=True)]

    def operand(self, leaf: Leaf, site: Site, said: Operand) -> fx.Node:
        """A side tensor as [*batch, Q, K], or for a table [*batch, row, column]; 1 where `said` has no dim."""
        row = site.q_dim if leaf.row is None else leaf.row
        column = site.k_dim if leaf.column is None else leaf.column
        node = self.canonical(leaf, site.batch, row, column)
        dims = [*((a,) for a in site.batch), row, column]
        sizes = [1 if name == "1" else dim[0].size for name, dim in zip(said.dims, dims, strict=True)]
        return self.checked(node, "an operand of the attention", sizes, dtype_of(said.dtype))

    def _made(self, leaf: Leaf) -> fx.Node:
        """A tensor computed from an expression, with the dims that the leaf's labels name."""
        assert leaf.made is not None and leaf.dtype is not None
        key = (leaf.made, leaf.labels, leaf.dtype)
        if key not in self.tables:
            self.tables[key] = Values(self, leaf.labels).tensor(leaf.made, leaf.dtype)
        return self.tables[key]

    def _splits(self, labels: Labels) -> bool:
        return any(len(dim) > 1 for dim in labels)

    def _squeezed(self, node: fx.Node, labels: Labels) -> fx.Node:
        """Without the dims of size 1; a view that split dims has dropped them already."""
        if self._splits(labels):
            return node
        for at in reversed(range(len(labels))):
            if not labels[at]:
                node = self.method("squeeze", node, at)
        return node

    def shape(self, sizes: Sequence[Any]) -> list[int | fx.Node]:
        """Sizes for a view; one that no tensor has is left to be inferred."""
        symbolic = [i for i, s in enumerate(sizes) if not isinstance(s, int)]
        if len(symbolic) == 1:
            return [-1 if i in symbolic else s for i, s in enumerate(sizes)]
        found: list[int | fx.Node] = []
        for size in sizes:
            try:
                found.append(self.size(size))
            except EmitError:
                if -1 in found:
                    raise
                found.append(-1)
        return found

    def shaped(self, out: fx.Node, dims: Labels, labels: Labels, like: torch.Tensor) -> fx.Node:
        """A result of the op, whose dims are `dims`, with the dims `labels` of what it replaces, laid out like that."""
        flat = [a for dim in labels for a in dim]
        have = [dim[0] for dim in dims if dim]
        out = self.spread(out, dims)
        for at in reversed(range(len(dims))):
            if not dims[at]:
                out = self.method("squeeze", out, at)
        order = [have.index(a) for a in flat]
        if order != list(range(len(order))):
            out = self.method("permute", out, *order)
        if any(len(dim) != 1 for dim in labels):
            out = self.method("reshape", out, *self.shape(tuple(like.shape)))
        return self._laid_out(self.checked(out, "the result of the attention", like.shape, like.dtype), like)

    def spread(self, out: fx.Node, dims: Labels, but: Dim = ()) -> fx.Node:
        """A result of the op, whose dims are `dims`, at full size where q, k and v were all expanded, `but` for some atoms."""
        made = known(out).shape
        short = [
            bool(dim) and dim[0] not in but and is_one(n) and not is_one(dim[0].size) for n, dim in zip(made, dims)
        ]
        if not any(short):
            return out
        return self.method("expand", out, *(self.size(dim[0].size) if s else -1 for s, dim in zip(short, dims)))

    def _laid_out(self, out: fx.Node, eager: torch.Tensor) -> fx.Node:
        """`out` with the strides of the eager result, since a later view may count on them."""
        made = known(out)
        if all(known_equal(a, b) for a, b in zip(made.stride(), eager.stride())):
            return out
        if eager.is_contiguous():
            return self.method("contiguous", out)
        order = sorted(range(eager.dim()), key=lambda i: -stride_hint(eager.stride(i)))
        moved = self.method("contiguous", self.method("permute", out, *order))
        return self.method("permute", moved, *[order.index(i) for i in range(len(order))])


class Values:
    """Writes nodes that compute an expression for all values of some indices, one dim for each."""

    def __init__(self, writer: Writer, labels: Labels) -> None:
        self.writer = writer
        self.dims = [dim[0] for dim in labels]
        self.done: dict[Expr, Any] = {}

    def tensor(self, e: Expr, dtype: torch.dtype) -> fx.Node:
        """The expression as a tensor of `dtype`."""
        w = self.writer
        found = self._cast(self.as_tensor(self.run(e), dtype), dtype)
        if self.dims:
            found = w.method("expand", found, *(w.size_of(atom) for atom in self.dims))
        return w.checked(found, "a computed operand", [atom.size for atom in self.dims], dtype)

    def run(self, e: Expr) -> Any:
        """A number; or a node: of a symbolic number, or a tensor with a dim for each of `dims`, or without dims.

        Tensors of integers are int64 and those of truths bool, whatever they are in the graph: the arithmetic of expressions
        has no end, and an index in uint8 would be a mask.
        """
        if e not in self.done:
            found = self._run(e)
            if _is_tensor(found):
                if e.type != "float":
                    found = self._cast(found, torch.bool if e.type == "bool" else torch.int64)
                used = {self._dim_of(x) for x in depends(e)}
                sizes = [atom.size if d in used else 1 for d, atom in enumerate(self.dims)] if used else []
                self.writer.checked(found, "a part of a computed operand", sizes)
            self.done[e] = found
        return self.done[e]

    def as_tensor(self, x: Any, dtype: torch.dtype | None = None) -> fx.Node:
        if _is_tensor(x):
            return x  # type: ignore[no-any-return]
        return self.writer.call(torch.full, ((), x), {"dtype": dtype or torch.int64, "device": self.writer.device})

    def _run(self, e: Expr) -> Any:
        w = self.writer
        if isinstance(e, Const):
            return bool(e.value) if e.type == "bool" else int(e.value) if e.type == "int" else e.value
        if isinstance(e, (Index, Axis)):
            return self._line(e)
        if isinstance(e, Symbol):
            return w.size(e.value)
        if isinstance(e, Linear):
            total: Any = e.const
            # symbolic numbers do not wrap as tensors do
            wraps = not Algebra().is_exact(e)
            for c, t in e.terms:
                x = self._whole(t, wraps)
                x = w.call(operator.mul, (x, c)) if c != 1 else x
                total = x if isinstance(total, int) and total == 0 else w.call(operator.add, (total, x))
            return total
        if isinstance(e, Tensor):
            return self._element(e)
        if isinstance(e, Call):
            return self._call(e)
        assert isinstance(e, Apply)
        args = [self.run(a) for a in e.args]
        if e.op in ("and", "or"):
            total = self.as_tensor(args[0], torch.bool)
            for x in args[1:]:
                op = torch.logical_and if e.op == "and" else torch.logical_or
                total = w.call(op, (total, self.as_tensor(x, torch.bool)))
            return total
        if e.op == "int":
            return w.method("to", self.as_tensor(args[0], torch.bool), torch.int64)
        if e.op in ("floordiv", "mod"):
            divided = operator.floordiv if e.op == "floordiv" else operator.mod
            return w.call(divided, (self._whole(e.args[0], False), args[1]))
        floats = [known(x).dtype for x, a in zip(args, e.args) if a.type == "float" and _is_tensor(x)]
        float_ = floats[0] if floats else torch.float64
        kinds = [torch.bool if a.type == "bool" else torch.int64 if a.type == "int" else float_ for a in e.args]
        return w.call(_FUNCTIONS[e.op], tuple(self._cast(self.as_tensor(x, k), k) for x, k in zip(args, kinds)))

    def _whole(self, e: Expr, as_tensor: bool) -> Any:
        """An integer expression in int64, whatever the dtype of the tensor that it comes from."""
        x = self.run(e)
        return self._cast(self.as_tensor(x), torch.int64) if as_tensor or _is_tensor(x) else x

    def _cast(self, x: fx.Node, dtype: torch.dtype) -> fx.Node:
        return x if known(x).dtype == dtype else self.writer.method("to", x, dtype)

    def _element(self, e: Tensor) -> fx.Node:
        w, node = self.writer, self.writer.here(e.node)
        index: list[fx.Node] = []
        for i in e.index:
            at = self.run(i)
            if not _is_tensor(at):
                node = w.call(torch.select, (node, len(index), at))
                continue
            if self.dims and not known(at).dim():
                # PyTorch's fake tensors do not broadcast index tensors without dims
                at = w.method("view", at, *[1] * len(self.dims))
            index.append(at)
        return w.call(torch.ops.aten.index.Tensor, (node, index)) if index else node

    def _dim_of(self, e: Expr) -> int:
        # an index of the query or key is the last dim, batch dims come before it
        return self.dims.index(e.atom if isinstance(e, Axis) else self.dims[-1])

    def _line(self, e: Index | Axis) -> fx.Node:
        w = self.writer
        at = self._dim_of(e)
        line = w.call(torch.arange, (w.size_of(self.dims[at]),), {"device": w.device})
        shape = [-1 if d == at else 1 for d in range(len(self.dims))]
        return w.method("view", line, *shape)

    def _call(self, e: Call) -> fx.Node:
        w = self.writer
        args = []
        for i, (a, dtype) in enumerate(zip(e.args, e.dtypes, strict=True)):
            x = self.run(a) if isinstance(a, Expr) else a
            if dtype is not None:
                x = self._cast(self.as_tensor(x, dtype), dtype)
                if e.scalars and not e.scalars[i] and not known(x).dim():
                    x = w.method("unsqueeze", x, 0)
            args.append(x)
        found = w.call(e.target, tuple(args), dict(e.kwargs))
        if known(found).dtype != e.dtype:
            raise EmitError(f"{e.target} gives {known(found).dtype} for elements of a mask, and {e.dtype} in the graph")
        return w.method("squeeze", found, 0) if known(found).dim() > len(self.dims) else found


def _is_tensor(x: Any) -> bool:
    """Whether it is a node of a tensor, as opposed to a number or the node of a symbolic one."""
    return isinstance(x, fx.Node) and isinstance(known(x), torch.Tensor)


_FUNCTIONS: dict[str, Any] = {
    "min": torch.minimum,
    "max": torch.maximum,
    "abs": torch.abs,
    "where": torch.where,
    "le": torch.le,
    "eq": torch.eq,
    "ne": torch.ne,
    "not": torch.logical_not,
}


def known(node: fx.Node) -> Any:
    """The fake value of a Dynamo node. Raises EmitError where it has none."""
    if "example_value" not in node.meta:
        raise EmitError(f"nothing is known of the value of {node.name}")
    return node.meta["example_value"]


def _example(node: fx.Node, mode: FakeTensorMode) -> Any:
    """The fake value of a new node from those of its arguments; None if one of them has none."""
    inputs = pytree.tree_leaves((node.args, node.kwargs))
    nodes = [x for x in inputs if isinstance(x, fx.Node)]
    if any("example_value" not in n.meta for n in nodes):
        return None
    args = fx.node.map_arg(node.args, lambda n: n.meta["example_value"])
    kwargs = fx.node.map_arg(node.kwargs, lambda n: n.meta["example_value"])
    with mode:
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]
