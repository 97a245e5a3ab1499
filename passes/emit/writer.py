"""Writes nodes into a Dynamo graph, in terms of values of the view."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import fx

from attnfuse import reasons
from attnfuse._compat import OpOverload, is_functorch_tensor, save_for_backward
from attnfuse.kernels.dropout import SEED_LIMIT
from attnfuse.passes import limits
from attnfuse.passes.capture.view import Scope, View
from attnfuse.passes.emit.edits import Edits, EmitError, example_of, known
from attnfuse.passes.emit.repeated import calls_of
from attnfuse.passes.emit.values import Values
from attnfuse.passes.graph.aten import name_of, source_of, value_of
from attnfuse.passes.graph.labels import Atom, Dim, Distances, Labels, is_one, known_equal, stride_hint
from attnfuse.passes.graph.memory import is_mutating, is_stale, opaque, returned_as_written, same_memory, written
from attnfuse.passes.graph.vocabulary import functional
from attnfuse.passes.site import Leaf, Paging, Site
from attnfuse.spec import Attention, Operand, dtype_of

_RANDOM = {torch.Tag.nondeterministic_seeded}


def is_pure(node: fx.Node) -> bool:
    if node.target is opaque or is_mutating(node):
        return False
    if isinstance(node.target, OpOverload):
        # random ops are impure in some versions of torch; assertions about sizes are in all
        return not (_RANDOM & set(node.target.tags)) and not node.is_impure()
    return getattr(node.target, "__module__", "") in ("_operator", "math") or _is_symbolic(node)


def _is_symbolic(node: fx.Node) -> bool:
    """Arithmetic on sizes, such as torch.sym_sqrt."""
    return isinstance(value_of(node), (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool))


def writes_own_memory(view: View, node: fx.Node) -> bool:
    """Whether a writing op only writes to memory that was made inside the same Dynamo node, so that nobody else sees it."""
    owner = view.origin.get(node)
    targets = written(node)
    if owner is None or len(targets) != 1:
        return False
    first = next((n for n in view.graph.nodes if same_memory(n, targets[0])), None)
    return first is not None and view.origin.get(first) == owner


class NodeWriter:
    """Writes nodes before one node of a Dynamo graph, in terms of values of the view."""

    def __init__(self, edits: Edits, scope: Scope, owner: fx.Node, device: torch.device) -> None:
        self.edits = edits
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
        pages: tuple[fx.Node, int | fx.Node] | None = None,
    ) -> fx.Node:
        """A call of the op. Raises EmitError for nodes that are not what the spec says."""
        seed = None
        if spec.dropout > 0.0:
            seed = self.call(torch.randint, (0, SEED_LIMIT, (1,)), {"dtype": torch.int64, "device": self.device})
            save_for_backward(seed)
        op = torch.ops.attnfuse.attention.default
        try:
            given = (q, k, v, list(operands), seed, *bounds, spec.argument, kernel, strict)
            return self.call(op, given if pages is None else (*given, *pages))
        except ValueError as error:
            raise EmitError(reasons.OP_REFUSES(error=error)) from error

    def inline(self, function: Callable[..., Any], *args: fx.Node) -> fx.Node:
        """The calls that `function`, of tensors to a tensor and without branches, makes of these nodes."""
        placed: dict[fx.Node, Any] = {}
        given = iter(args)
        for node in fx.Tracer().trace(function).nodes:
            if node.op == "placeholder":
                placed[node] = next(given)
            elif node.op == "output":
                return cast(fx.Node, placed[source_of(node)])
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
            raise EmitError(reasons.NOT_A_TENSOR(what=what))
        fits = len(value.shape) == len(shape) and all(map(known_equal, value.shape, shape))
        if not fits or dtype not in (None, value.dtype):
            wanted = f"{list(shape)}" if dtype is None else f"{dtype} {list(shape)}"
            raise EmitError(reasons.NOT_AS_STATED(what=what, found=f"{value.dtype} {list(value.shape)}", wanted=wanted))
        return node

    def getitem(self, node: fx.Node, index: int) -> fx.Node:
        return self.call(operator.getitem, (node, index))

    def _describe(self, node: fx.Node) -> None:
        """Metadata as Dynamo gives it: where the code is, and a fake value."""
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            if key in self.written_for.meta:
                node.meta[key] = self.written_for.meta[key]
        example = example_of(node, self.edits.view.fake_mode)
        if example is not None:
            node.meta["example_value"] = example

    def node_for(self, made: fx.Node) -> fx.Node:
        """The Dynamo node with the value of a view node, computing it again from others if there is none."""
        key = (self.scope, made)
        if key in self.edits.replaced:
            return self.edits.replaced[key]
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
        origin = self.edits.view.origin.get(made)
        return origin is None or origin.scope is not self.scope

    def _imported(self, made: fx.Node) -> fx.Node:
        """A value of the graph around a checkpointed region, as one more input of the region."""
        parent, call = self.scope.parent, self.scope.call
        assert parent is not None and call is not None
        if len(calls_of(self.edits.view, self.scope)) > 1:
            raise EmitError(reasons.MADE_OUTSIDE())
        outer = NodeWriter(self.edits, parent, call, self.device)
        with parent.module.graph.inserting_before(call):
            node = outer.node_for(made)
        self.edits.touched.add(parent)
        last = next(n for n in reversed(self.graph.nodes) if n.op == "placeholder")
        with self.graph.inserting_after(last):
            given = self.graph.placeholder(f"attnfuse_{made.name}")
        given.meta.update(node.meta)
        self._pass(call, node, made, given)
        self.made[made] = self.edits.replaced[self.scope, made] = given
        return given

    def _pass(self, call: fx.Node, node: fx.Node, made: fx.Node, given: fx.Node) -> None:
        """Let `call` give `node`, the value `made`, to its region as a further argument: the placeholder `given`."""
        others = [s for s in self.edits.view.scopes if s.call is call and s is not self.scope]
        if not others:
            call.args = (*call.args, node)
            return
        # the branches of a torch.cond take the same arguments
        *rest, operands = cast("tuple[Any, ...]", call.args)
        call.args = (*rest, (*operands, node))
        for scope in others:
            last = next(n for n in reversed(scope.module.graph.nodes) if n.op == "placeholder")
            with scope.module.graph.inserting_after(last):
                other = scope.module.graph.placeholder(str(given.target))
            other.meta.update(given.meta)
            self.edits.replaced[scope, made] = other
            self.edits.touched.add(scope)

    def _comes_first(self, node: fx.Node) -> bool:
        return node.op == "placeholder" or (not node._erased and node < self.owner)

    def _copy(self, made: fx.Node) -> fx.Node:
        same = returned_as_written(made)
        if same is not None and not writes_own_memory(self.edits.view, made):
            # x.op_() leaves its result in x
            return self.node_for(same)
        if made.op != "call_function":
            raise EmitError(reasons.NOT_AVAILABLE())
        target: Any = made.target
        if writes_own_memory(self.edits.view, made):
            target = functional(target)
        elif not is_pure(made):
            target = None
        if target is None:
            raise EmitError(reasons.NOT_REPEATABLE(op=name_of(made) or "an opaque call"))
        if is_stale(made) or self._overwritten_since(made):
            raise EmitError(reasons.MADE_FROM_WRITTEN())
        self.depth += 1
        if self.depth > limits.REPEATED_NODES:
            raise EmitError(reasons.TOO_DEEP())
        args = fx.node.map_arg(made.args, self.node_for)
        kwargs = fx.node.map_arg(made.kwargs, self.node_for)
        copy, value = self.call(target, tuple(args), dict(kwargs)), value_of(made)
        if isinstance(value, torch.Tensor):
            self.checked(copy, f"{name_of(made)} made again", value.shape, value.dtype)
        self.made[made] = copy
        return copy

    def _overwritten_since(self, made: fx.Node) -> bool:
        """Whether repeating `made` where the op stands would read other values than it did."""
        view = self.edits.view
        now = max((view.order[n] for n, o in view.origin.items() if o.node is self.owner), default=0)
        return any(view.writes.between(source, view.order[made], now) for source in made.all_input_nodes)

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
        raise EmitError(reasons.NO_SUCH_SIZE(size=wanted))

    def size_of(self, atom: Atom) -> int | fx.Node:
        """The number of values of an index, as an argument."""
        if not isinstance(atom, Distances):
            return self.size(atom.size)
        queries, keys = self.size(atom.queries), self.size(atom.keys)
        if isinstance(queries, int) and isinstance(keys, int):
            return queries + keys - 1
        return self.call(operator.sub, (self.call(operator.add, (queries, keys)), 1))

    def canonical(self, leaf: Leaf, batch: Dim, *rest: Dim) -> fx.Node:
        """The leaf as [*batch, *rest], such as rows and columns, with 1 where it has no such dim: only views, no copy."""
        node = self.here(leaf.node) if leaf.made is None else self._made(leaf)
        for at, start in enumerate(leaf.starts):
            length: Any = 1
            for atom in leaf.labels[at]:
                length = length * atom.size
            if not known_equal(length, known(node).shape[at]):
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
        wanted = [*((a,) for a in batch), *rest]
        order = [flat.index(dim[0]) for dim in wanted if dim and dim[0] in flat]
        if order != list(range(len(order))):
            node = self.method("permute", node, *order)
        for at, dim in enumerate(wanted):
            if not dim or dim[0] not in flat:
                node = self.method("unsqueeze", node, at)
        sizes = [dim[0].size if dim and dim[0] in flat else 1 for dim in wanted]
        return self.checked(node, "a tensor that the attention takes", sizes, leaf.given)

    def pages(self, site: Site, paging: Paging, cache: fx.Node) -> tuple[fx.Node, int | fx.Node]:
        """The block table as [*batch, T], and the number of keys. cache: [*batch, blocks, block, D]."""
        table = self.canonical(paging.table, site.batch, *((a,) for a in paging.columns))
        if len(paging.columns) > 1:
            table = self.method("flatten", table, -len(paging.columns))
        elif not paging.columns:
            table = self.method("unsqueeze", table, -1)
        (atom,), blocks = site.k_dim, known(table).shape[-1]
        number = atom.size if isinstance(atom.size, int) else atom.size.node.maybe_as_int()
        if number is not None:
            return table, int(number)
        rows = known(cache).shape[-2]
        if known_equal(blocks * rows, atom.size):
            # what the graph has of this size is what it gathers
            rows = rows if isinstance(rows, int) else self.method("size", cache, -2)
            return table, self.call(operator.mul, (self.method("size", table, -1), rows))
        return table, self.size(atom.size)

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
        return self.laid_out(self.checked(out, "the result of the attention", like.shape, like.dtype), like)

    def spread(self, out: fx.Node, dims: Labels, but: Dim = ()) -> fx.Node:
        """A result of the op, whose dims are `dims`, at full size where q, k and v were all expanded, `but` for some atoms."""
        made = known(out).shape
        short = [
            bool(dim) and dim[0] not in but and is_one(n) and not is_one(dim[0].size) for n, dim in zip(made, dims)
        ]
        if not any(short):
            return out
        return self.method("expand", out, *(self.size(dim[0].size) if s else -1 for s, dim in zip(short, dims)))

    def laid_out(self, out: fx.Node, eager: torch.Tensor) -> fx.Node:
        """`out` with the strides of the eager result, since a later view may count on them."""
        made = known(out)
        if all(known_equal(a, b) for a, b in zip(made.stride(), eager.stride())):
            return out
        if eager.is_contiguous():
            return self.method("contiguous", out)
        order = sorted(range(eager.dim()), key=lambda i: -stride_hint(eager.stride(i)))
        moved = self.method("contiguous", self.method("permute", out, *order))
        return self.method("permute", moved, *[order.index(i) for i in range(len(order))])
