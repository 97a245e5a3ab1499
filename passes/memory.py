"""What memory opaque nodes may write to, and which tensors may lie in the same memory because of them.

The view has no op for an opaque node, so nothing says whether what it gives is new or a view of what it takes (as
`DTensor.from_local(x)`, `d.to_local()`, a transpose under torch.vmap): it is taken for the same memory. A write through one name
counts as one through all.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import fx

from attnfuse import _compat
from attnfuse._compat import HigherOrderOperator, OpOverload, pytree
from attnfuse.passes import batched
from attnfuse.passes.batched import Batched

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
        x = x.tensor if isinstance(x, Batched) else x
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
        return batched.may_write(target, node.kwargs) or (foreign and not _is_known_method(target, node))
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
    if batched.may_write(target, node.kwargs) or _is_told_to(node):
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
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    kept = _KEEPS_BOOKS.get(getattr(node.target, "__name__", ""))
    # what is a node may be anything
    return given.get("inplace", False) is not False or (kept is not None and given.get(kept) is not None)
