"""Dynamo graph -> `View`: the graph is run node by node while it is traced to ATen. It is not changed.

What is under torch.vmap is viewed with the mapped dims in front (vmap.py). What cannot be viewed (an autograd.Function, hooks,
other functorch regions and higher-order ops, tensors of foreign classes) is a node whose target is `opaque`. Its results may lie
where its arguments lie: `View.writes` knows (graph/memory.py).
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from attnfuse import _compat, reasons
from attnfuse._compat import HigherOrderOperator, pytree
from attnfuse.passes.capture import vmap
from attnfuse.passes.capture.encoder_layer import FORMULAS
from attnfuse.passes.capture.foreign import fresh_like, is_foreign, is_nested, touches_foreign
from attnfuse.passes.capture.view import Origin, Scope, View
from attnfuse.passes.capture.vmap import Batched
from attnfuse.passes.graph.memory import (
    Memory,
    follow_writes,
    is_hook,
    is_mutating,
    keys_of,
    may_write,
    opaque,
    writes_by_name,
)
from attnfuse.passes.graph.vocabulary import called
from attnfuse.reasons import ReasonError


class CaptureError(ReasonError):
    """The graph cannot be viewed; it is left as it is."""


class NoTensorInput(CaptureError):
    """There is nothing to capture."""


class _Unknown:
    """The value of a node that cannot even be represented, such as a tensor inside vmap."""


UNKNOWN = _Unknown()

# Methods whose effect is not on the values of the graph but on autograd or on the tensor object.
_OPAQUE_METHODS = {
    "register_hook",
    "register_post_accumulate_grad_hook",
    "retain_grad",
    "requires_grad_",
    "backward",
    "set_",
    "resize_",
    "detach_",
}


#: What forward-mode differentiation is in a graph: a level opens, tensors get tangents in it, and it closes.
ENTERS_DUAL_LEVEL, EXITS_DUAL_LEVEL = "_enter_dual_level", "_exit_dual_level"
_DUAL = {ENTERS_DUAL_LEVEL, EXITS_DUAL_LEVEL, "_make_dual", "_unpack_dual", "_set_fwd_grad_enabled"}


def capture(gm: fx.GraphModule) -> View:
    """View a Dynamo graph. Raises CaptureError if it cannot be viewed."""
    examples = [n.meta.get("example_value") for n in gm.graph.nodes if n.op == "placeholder"]
    fake_mode = _compat.detect_fake_mode(examples)
    if fake_mode is None:
        raise NoTensorInput(reasons.NO_TENSOR_INPUT())
    recorder = Recorder(fake_mode)
    if _writes_beside_nested(gm):
        raise CaptureError(reasons.WRITES_BESIDE_NESTED())
    plain = stand_ins(examples, fake_mode)

    def run(*args: Any) -> Any:
        given = iter(args)
        return recorder.run_main(gm, [UNKNOWN if is_nested(x) else next(given) for x in examples])

    trains = any(isinstance(x, torch.Tensor) and x.requires_grad for x in examples)
    return recorder.view(run, plain, trains)


def stand_ins(examples: Sequence[Any], mode: _compat.FakeTensorMode) -> list[Any]:
    """What a trace is given for the inputs of a graph: plain tensors for those of foreign classes, nothing for nested ones.

    A trace would look into neither.
    """
    with mode:
        return [fresh_like(x) if is_foreign(x) else x for x in examples if not is_nested(x)]


class Recorder:
    """Runs a Dynamo graph node by node while it is traced, noting which ATen nodes each one makes."""

    #: Whether tensors under torch.vmap are viewed with the mapped dims, or not known where they cannot be, and nothing is
    #: known of tensors of foreign classes.
    maps_dims = True

    def __init__(self, fake_mode: _compat.FakeTensorMode) -> None:
        self.fake_mode = fake_mode
        self.scopes: list[Scope] = []
        self.origin: dict[fx.Node, Origin] = {}
        self.grad: dict[fx.Node, bool] = {}
        self._seen = 0
        self._last: fx.Node | None = None
        self._dual_levels = 0
        self._memory = Memory()
        # Dynamo nodes that have just been made opaque -> the opaque node
        self._closed: dict[fx.Node, fx.Node] = {}

    def view(self, run: Callable[..., Any], args: list[Any], trains: bool) -> View:
        """What run(*args), which is to run graphs by this recorder, is seen to do."""
        with _compat.keep_global_state():
            module = _compat.trace(run, args, self.fake_mode)
        # sizes that nothing needs are gone by now
        origin = {n: self.origin[n] for n in module.graph.nodes if n in self.origin}
        writes = follow_writes(module.graph, self._memory)
        return View(module.graph, self.scopes, origin, self.grad, self.fake_mode, trains, writes, _live(module.graph))

    def run_main(self, gm: fx.GraphModule, args: Sequence[Any]) -> Any:
        # only tensors may leave a trace; the rest (symbolic numbers, unknowns) is not needed
        out = self.run(Scope(gm), args)
        return [x for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]

    def run(self, scope: Scope, args: Sequence[Any]) -> Any:
        self.scopes.append(scope)
        env: dict[fx.Node, Any] = {}
        inputs = iter(args)
        for node in scope.module.graph.nodes:
            if node.op == "output":
                return fx.node.map_arg(node.args[0], lambda n: env[n])
            if node.op == "placeholder":
                env[node] = next(inputs)
            else:
                self._skip_existing()
                env[node] = self._run_node(scope, node, env)
                self._claim(scope, node)
            self._note(scope, node, env[node])
            self._follow(scope, node, env)
        raise CaptureError(reasons.NO_OUTPUT())

    def _run_node(self, scope: Scope, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        args: Any = fx.node.map_arg(node.args, lambda n: env[n])
        kwargs: Any = fx.node.map_arg(node.kwargs, lambda n: env[n])
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(scope.module)
            return value if isinstance(value, fx.GraphModule) else self._opaque(node, (), {})
        if is_assertion(node):
            # it is no use of the value; the emitter drops it with the node that it is about
            return None
        region = region_of(node, args)
        if region is not None:
            with region.mode:
                return self.run(Scope(region.body, scope, node), region.operands)
        if is_choice(node):
            # either branch may run: nothing is known of the result
            which, *bodies, operands = args
            results = [self.run(Scope(body, scope, node), operands) for body in bodies]
            return self._opaque(node, (which, results), {})
        if node.target is _compat.enter_autocast:
            # a trace before dispatch notes this call without making it, and the dtypes after it would be wrong
            mode = torch.autocast(*args, **kwargs)
            mode.__enter__()
            return mode
        if node.target is _compat.exit_autocast:
            return args[0].__exit__(None, None, None)
        leaves = pytree.tree_leaves((args, kwargs))
        if self.maps_dims:
            mapped = _is_mapped(node) or any(isinstance(x, Batched) for x in leaves)
            if mapped and writes_by_name(node.target, kwargs):
                raise CaptureError(reasons.WRITE_IN_VMAP())
            if vmap.takes_part(node.target, leaves) and not any(x is UNKNOWN for x in leaves):
                return self._run_batched(node, args, kwargs)
        if self._must_stay_opaque(node, args, kwargs):
            return self._opaque(node, args, kwargs)
        try:
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return cast("Callable[..., Any]", FORMULAS.get(node.target, node.target))(*args, **kwargs)
        except Exception:
            # Whatever cannot be run on fake tensors is not attention; what Dynamo knows of its value is enough.
            return self._opaque(node, args, kwargs)

    def _run_batched(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        try:
            found = vmap.run(node.target, args, kwargs)
        except Exception:
            return self._opaque(node, args, kwargs)
        example = node.meta.get("example_value")
        tensor = found.tensor if isinstance(found, Batched) else found
        # a tensor without dims counts as a number where dtypes are promoted; lined up, it has dims
        if not isinstance(example, torch.Tensor) or tensor.dtype != example.dtype:
            return self._opaque(node, args, kwargs)
        return found

    def _must_stay_opaque(self, node: fx.Node, args: Any, kwargs: Any) -> bool:
        leaves = pytree.tree_leaves((args, kwargs))
        if any(x is UNKNOWN or isinstance(x, fx.GraphModule) for x in leaves):
            return True
        name = called(node)
        self._dual_levels += (name == ENTERS_DUAL_LEVEL) - (name == EXITS_DUAL_LEVEL)
        if name in _DUAL or self._is_transformed(node):
            return True
        if self.maps_dims and touches_foreign(node):
            return True
        if node.op == "call_module":
            return True
        if node.op == "call_method":
            return node.target in _OPAQUE_METHODS
        if isinstance(node.target, HigherOrderOperator):
            return True
        if "functorch" in str(getattr(node.target, "__module__", "")):
            return True
        example = node.meta.get("example_value")
        if any(map(is_nested, pytree.tree_leaves(example))):
            return True
        known = set().union(*(_unbacked(x) for x in leaves)) if leaves else set()
        return any(_unbacked(x) - known for x in pytree.tree_leaves(example))

    def _is_transformed(self, node: fx.Node) -> bool:
        """Whether a transform has wrapped the value, or may have given it a tangent, which a plain tensor would hide."""
        return self.maps_dims and (_is_mapped(node) or self._dual_levels > 0)

    def _opaque(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        example = node.meta.get("example_value")
        inputs = [x.tensor if isinstance(x, Batched) else x for x in pytree.tree_leaves((args, kwargs))]
        inputs = [x for x in inputs if isinstance(x, torch.Tensor)]
        inputs = [x for x in inputs if not _compat.is_functorch_tensor(x) and _compat.traced_node(x) is not None]
        proxies = tuple(_proxy(x) for x in inputs)
        leaves, tree = pytree.tree_flatten(example)
        if self._is_transformed(node) or any(map(is_nested, leaves)):
            self._record(node, proxies, None)
            return UNKNOWN
        with _compat.no_proxies():
            fresh = [fresh_like(x) if isinstance(x, torch.Tensor) else x for x in leaves]
        value = pytree.tree_unflatten(fresh, tree)
        if not any(isinstance(x, torch.Tensor) for x in leaves):
            self._record(node, proxies, None)
            # Numbers keep Dynamo's own symbols. Where Dynamo says nothing, nothing is known.
            return value if "example_value" in node.meta else UNKNOWN
        flat = self._record(node, proxies, [x if isinstance(x, torch.Tensor) else None for x in fresh])
        return pytree.tree_unflatten([t if t is not None else x for t, x in zip(flat, fresh)], tree)

    def _record(self, node: fx.Node, proxies: tuple[fx.Proxy, ...], value: Any) -> Any:
        self._closed[node], found = _compat.record_opaque(opaque, proxies, value)
        return found

    def _follow(self, scope: Scope, node: fx.Node, env: dict[fx.Node, Any]) -> None:
        """Note what memory an opaque node may write to, and that its results may lie in it; and that of what is not known."""
        made = self._closed.pop(node, None)
        unknown = any(x is UNKNOWN for x in pytree.tree_leaves(env[node]))
        if node.op == "placeholder":
            example = node.meta.get("example_value")
            if is_foreign(example) and scope.parent is None:
                self._memory.join([node, *_keys_of(env[node]), *keys_of(_compat.tensors_in(example))])
            elif unknown and scope.call is not None:
                self._memory.join([node, *scope.call.all_input_nodes])
            return
        if made is None and not unknown:
            return
        given = [x for n in node.all_input_nodes for x in (n, *_keys_of(env[n]))]
        if made is not None and is_hook(node):
            for hooked in made.all_input_nodes[:1]:
                hooked.meta["hooked"] = True
        if made is not None and may_write(node, touches_foreign(node)):
            self._memory.writers.append((made, given))
        results = pytree.tree_leaves(env[node])
        if not _is_counted(node, env) and any(x is UNKNOWN or isinstance(x, torch.Tensor) for x in results):
            self._memory.join([node, *_keys_of(env[node]), *given])

    def _skip_existing(self) -> None:
        nodes = _compat.traced_graph().nodes
        self._last = next(iter(reversed(nodes)), None)

    def _claim(self, scope: Scope, node: fx.Node) -> None:
        """All ATen nodes made since `_skip_existing` came from `node`, unless an inner node claimed them."""
        grad = torch.is_grad_enabled()
        for made in reversed(_compat.traced_graph().nodes):
            if made is self._last or made in self.origin:
                break
            self.origin[made] = Origin(scope, node)
            self.grad[made] = grad

    def _note(self, scope: Scope, node: fx.Node, value: Any) -> None:
        def made_by(x: Any) -> Any:
            if isinstance(x, torch.Tensor):
                return None if _compat.is_functorch_tensor(x) else _compat.traced_node(x)
            if isinstance(x, Batched):
                return None
            if isinstance(x, (torch.SymInt, torch.SymFloat)):
                return _compat.traced_node(x) or x
            return x

        leaves, tree = pytree.tree_flatten(value)
        made = [made_by(x) for x in leaves]
        scope.values[node] = pytree.tree_unflatten(made, tree)
        if len(leaves) == 1 and value is leaves[0] and isinstance(made[0], fx.Node):
            scope.nodes.setdefault(made[0], node)


def _writes_beside_nested(gm: fx.GraphModule) -> bool:
    modules = [m for m in gm.modules() if isinstance(m, fx.GraphModule)]
    nodes = [n for m in modules for n in m.graph.nodes]
    if not any(is_nested(x) for n in nodes for x in pytree.tree_leaves(n.meta.get("example_value"))):
        return False
    return any(n.op in ("call_function", "call_method") and writes_by_name(n.target, n.kwargs) for n in nodes)


def _is_counted(node: fx.Node, env: dict[fx.Node, Any]) -> bool:
    """Whether the values of its arguments decide how much a node gives (nonzero, indexing by a bool mask): such are copies."""
    given = [x for n in node.all_input_nodes for x in pytree.tree_leaves(env[n])]
    if any(x is UNKNOWN or isinstance(x, Batched) for x in given) or touches_foreign(node):
        return False
    if isinstance(node.target, HigherOrderOperator):
        return False
    known = set().union(*map(_unbacked, given)) if given else set()
    return any(_unbacked(x) - known for x in pytree.tree_leaves(node.meta.get("example_value")))


def _is_mapped(node: fx.Node) -> bool:
    return any(_compat.is_functorch_tensor(x) for x in pytree.tree_leaves(node.meta.get("example_value")))


@dataclass(frozen=True)
class _Region:
    """A graph that a higher-order op runs once, as it is, on its last arguments; mode: what holds inside."""

    body: fx.GraphModule
    operands: Sequence[Any]
    mode: contextlib.AbstractContextManager[Any]


def region_of(node: fx.Node, args: Any) -> _Region | None:
    """What the node runs, if it is a call of that kind: checkpointing, a region that is compiled by itself, or a mode that
    torch.export made a region of."""
    name = node.target.name() if isinstance(node.target, HigherOrderOperator) else ""
    if is_checkpoint(node):
        return _Region(args[0], args[1:], contextlib.nullcontext())
    if name == "invoke_subgraph":
        return _Region(args[0], args[2:], contextlib.nullcontext())
    if name == "wrap_with_set_grad_enabled":
        return _Region(args[1], args[2:], torch.enable_grad() if args[0] else torch.no_grad())
    if name == "wrap_with_autocast":
        device, dtype, enabled, cache, body, *operands = args
        return _Region(body, operands, torch.autocast(device, dtype, enabled, cache))
    return None


def is_checkpoint(node: fx.Node) -> bool:
    """Whether it is torch.utils.checkpoint of a region."""
    return isinstance(node.target, HigherOrderOperator) and node.target.name() == "tag_activation_checkpoint"


def is_choice(node: fx.Node) -> bool:
    """Whether it is torch.cond(which, branch, other branch, operands)."""
    return isinstance(node.target, HigherOrderOperator) and node.target.name() == "cond"


def is_assertion(node: fx.Node) -> bool:
    """Whether the node only checks the dtype, device or shape of a tensor; torch.export puts one before each cast."""
    return node.target is torch.ops.aten._assert_tensor_metadata.default


def _unbacked(value: Any) -> set[Any]:
    if isinstance(value, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)):
        return set() if _compat.is_functorch_tensor(value) else set(_compat.free_unbacked_symbols(value))
    return set()


def _proxy(tensor: torch.Tensor) -> fx.Proxy:
    node = _compat.traced_node(tensor)
    if node is None:
        raise CaptureError(reasons.NOT_TRACED())
    return fx.Proxy(node)


def _live(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that outputs, writes and opaque nodes depend on."""
    live: set[fx.Node] = set()
    stack = [n for n in graph.nodes if n.op == "output" or n.target is opaque or is_mutating(n)]
    while stack:
        node = stack.pop()
        if node not in live:
            live.add(node)
            stack.extend(node.all_input_nodes)
    return live


def _keys_of(value: Any) -> list[int]:
    """The alias keys of the tensors in a value, of those under torch.vmap too."""
    return keys_of([x.tensor if isinstance(x, Batched) else x for x in pytree.tree_leaves(value)])
