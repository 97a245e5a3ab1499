"""Memory: who writes to it, which tensors lie in the same, and which are read after it was written through another name.

Whatever asks whether something is written between two places of a view asks here. The view has no op for an opaque node, so
nothing says whether what it gives is new or a view of what it takes (as `DTensor.from_local(x)`, `d.to_local()`, a transpose
under torch.vmap): it is taken for the same memory. A write through one name counts as one through all.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Hashable, Iterable
from typing import Any, cast

import torch
from torch import fx

from attnfuse import _compat
from attnfuse._compat import HigherOrderOperator, OpOverload, alias_key, pytree
from attnfuse.passes.graph.aten import value_of
from attnfuse.passes.graph.labels import known_equal, same_sizes
from attnfuse.passes.graph.vocabulary import called, name_called

_HOOKS = {"register_hook", "register_post_accumulate_grad_hook", "retain_grad"}
#: What leaves a tensor's elements alone, whatever its name says or its body does.
_HARMLESS = {*_HOOKS, "requires_grad_", "detach_", "backward"}
#: Functions that change some of their arguments, whatever the name says: the first is given if they do.
_KEEPS_BOOKS = {
    "batch_norm": "running_mean",
    "instance_norm": "running_mean",
    "embedding": "max_norm",
    "embedding_bag": "max_norm",
}


_WRITING = {f for name, f in vars(operator).items() if name.startswith("i") and hasattr(operator, name[1:])}
_WRITING |= {operator.iand, operator.ior, operator.iconcat, operator.setitem}


def writes_by_name(target: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call writes to its arguments, by its name."""
    name = name_called(target)
    # operator.and_ and its like only avoid Python's keywords
    by_name = name.endswith("_") and not name.endswith("__") and getattr(target, "__module__", "") != "_operator"
    return "out" in kwargs or target in _WRITING or by_name


def opaque(*args: Any) -> Any:
    """Target of view nodes that stand for something that was not looked into."""
    raise RuntimeError("an opaque node cannot be run")


def is_mutating(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def written(node: fx.Node) -> list[fx.Node]:
    """The nodes whose memory `node` writes to."""
    if not isinstance(node.target, OpOverload) or not is_mutating(node):
        return []
    schema = node.target._schema.arguments
    given = {**dict(zip((a.name for a in schema), node.args)), **node.kwargs}
    values = [given[a.name] for a in schema if a.alias_info is not None and a.alias_info.is_write and a.name in given]
    return [x for x in pytree.tree_leaves(values) if isinstance(x, fx.Node)]


def is_stale(node: fx.Node) -> bool:
    """Whether the node's value may differ from what its op gave, at some place where it is read, or its gradient from what
    the op passes on: what made it says not enough to do without it."""
    return "stale" in node.meta or is_hooked(node)


def is_hooked(node: fx.Node) -> bool:
    """Whether there is a hook on the gradient of this very tensor."""
    return "hooked" in node.meta


class Memory:
    """Classes of memory that may be the same, and who may write to it.

    A memory is the alias key of a tensor in the trace, or the Dynamo node of a value that the trace does not hold.
    """

    def __init__(self) -> None:
        self._parents: dict[Hashable, Hashable] = {}
        #: (opaque node, the memory it may write to)
        self.writers: list[tuple[fx.Node, list[Hashable]]] = []

    def _root(self, memory: Hashable) -> Hashable:
        while (above := self._parents.setdefault(memory, memory)) != memory:
            self._parents[memory] = self._parents[above]
            memory = above
        return memory

    def join(self, memories: Iterable[Hashable]) -> None:
        """They may be the same."""
        first, *others = map(self._root, memories)
        for other in others:
            self._parents[self._root(other)] = self._root(first)

    def add_writes(self, writes: dict[int, list[fx.Node]], order: dict[fx.Node, int]) -> None:
        """Add what opaque nodes may write to `writes` (by alias key), and let memory that may be the same have the same."""
        for key in writes:
            self._root(key)
        for _, memories in self.writers:
            for memory in memories:
                self._root(memory)
        classes: dict[Hashable, list[int]] = {}
        for memory in list(self._parents):
            if isinstance(memory, int):
                classes.setdefault(self._root(memory), []).append(memory)
        found: dict[Hashable, set[fx.Node]] = {}
        for key, nodes in writes.items():
            found.setdefault(self._root(key), set()).update(nodes)
        for node, memories in self.writers:
            if node in order:
                for memory in memories:
                    found.setdefault(self._root(memory), set()).add(node)
        for root, writing in found.items():
            for key in classes.get(root, ()):
                writes[key] = sorted(writing, key=order.__getitem__)


def keys_of(value: Any) -> list[int]:
    """The alias keys of the tensors in a value."""
    found = []
    for x in pytree.tree_leaves(value):
        if isinstance(x, torch.Tensor) and x.layout == torch.strided and not _compat.is_functorch_tensor(x):
            found.append(_compat.alias_key(x))
    return found


def is_hook(node: fx.Node) -> bool:
    """Whether a Dynamo node only puts a hook on the gradient of its first argument, or keeps that gradient."""
    name = node.target.name() if isinstance(node.target, HigherOrderOperator) else node.target
    return node.op in ("call_function", "call_method") and name in _HOOKS


def may_write(node: fx.Node, foreign: bool) -> bool:
    """Whether an opaque node may write to its arguments; where nothing says that it does not, it may.

    foreign: whether it takes or gives tensors of a foreign class, which may have methods of its own.
    """
    target: Any = node.target
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(target, str):
        if target in _HARMLESS:
            return False
        return writes_by_name(target, node.kwargs) or (foreign and not _is_known_method(target, node))
    if isinstance(target, HigherOrderOperator):
        if target.name() in _HARMLESS:
            # its body runs in backward
            return False
        bodies = [b for x in node.all_input_nodes if (b := body_of(x)) is not None]
        nodes = [n for body in bodies for m in body.modules() if isinstance(m, fx.GraphModule) for n in m.graph.nodes]
        # one without a body, such as the call of a kernel of the user's, says nothing of what it does
        return not bodies or any(may_write(n, False) for n in nodes)
    if isinstance(target, OpOverload):
        return _compat.writes(target)
    if hasattr(target, "overloads"):
        return any(_compat.writes(getattr(target, name)) for name in target.overloads() if not name.endswith("out"))
    if writes_by_name(target, node.kwargs) or _is_told_to(node):
        return True
    home = getattr(target, "__module__", None)
    return home is not None and str(home).split(".")[0] not in ("torch", "_operator", "builtins", "math")


def body_of(node: fx.Node) -> fx.GraphModule | None:
    """The graph module that a get_attr node names, as the body of a higher-order op is."""
    if node.op != "get_attr" or node.graph.owning_module is None:
        return None
    found = operator.attrgetter(str(node.target))(node.graph.owning_module)
    return found if isinstance(found, fx.GraphModule) else None


def _is_known_method(name: str, node: fx.Node) -> bool:
    """Whether it is a method of plain tensors, or one that PyTorch's own class adds."""
    if hasattr(torch.Tensor, name):
        return True
    values = [x for n in node.all_input_nodes[:1] for x in pytree.tree_leaves(n.meta.get("example_value"))]
    return bool(values) and all(type(x).__module__.split(".")[0] == "torch" for x in values)


def _is_told_to(node: fx.Node) -> bool:
    """Whether a function is told to write: `inplace`, statistics that it keeps, a norm that it enforces."""
    try:
        given = inspect.signature(cast("Callable[..., Any]", node.target)).bind(*node.args, **node.kwargs).arguments
    except (TypeError, ValueError):
        return False
    kept = _KEEPS_BOOKS.get(called(node))
    # what is a node may be anything
    return given.get("inplace", False) is not False or (kept is not None and given.get(kept) is not None)


class Writes:
    """The nodes of a view that write to memory, or may, in order.

    order     the place of each node in the graph
    by_key    memory, by the alias key of its tensors -> what writes to it; memory that may be the same has the same
    """

    def __init__(self, order: dict[fx.Node, int], by_key: dict[int, list[fx.Node]]) -> None:
        self.order = order
        self._by_key = by_key

    def to(self, node: fx.Node) -> list[fx.Node]:
        """What writes to the memory of a tensor; nothing where `node` is no tensor."""
        value = value_of(node)
        return self._by_key.get(alias_key(value), []) if isinstance(value, torch.Tensor) else []

    def between(self, node: fx.Node, start: int, end: float = math.inf) -> list[fx.Node]:
        """What writes to the memory of a tensor after the place `start` and before `end`."""
        return [w for w in self.to(node) if start < self.order[w] < end]


def same_memory(a: fx.Node, b: fx.Node) -> bool:
    """Whether both are tensors in the same memory. That it may be the same, for opaque nodes between them, is not said."""
    x, y = value_of(a), value_of(b)
    return isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) and alias_key(x) == alias_key(y)


def returned_as_written(node: fx.Node) -> fx.Node | None:
    """The tensor that an op writes to and gives back, where it is that very tensor."""
    targets = written(node)
    value = value_of(node)
    if len(targets) != 1 or not isinstance(value, torch.Tensor):
        return None
    other = value_of(targets[0])
    same = same_memory(targets[0], node) and same_sizes(other.stride(), value.stride())
    same = same and same_sizes(other.shape, value.shape) and known_equal(other.storage_offset(), value.storage_offset())
    return targets[0] if same else None


def follow_writes(graph: fx.Graph, memory: Memory) -> Writes:
    """What writes to what in a view. After x.op_(...), later readers of x read the op's result from now on, so that reading back
    from them meets the write; nodes that are read after a write through another name are marked (`is_stale`)."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    writes: dict[int, list[fx.Node]] = {}
    for node in list(graph.nodes):
        targets = written(node)
        for target in targets:
            value = value_of(target)
            if isinstance(value, torch.Tensor):
                writes.setdefault(alias_key(value), []).append(node)
            if len(targets) == 1 and isinstance(value_of(node), torch.Tensor) and target is not node:
                for user in [u for u in target.users if order[u] > order[node]]:
                    user.replace_input_with(target, node)
    memory.add_writes(writes, order)
    found = Writes(order, writes)
    for node in order:
        last = max((order[u] for u in node.users), default=-1)
        if found.between(node, order[node], last):
            node.meta["stale"] = True
    return found
