"""What capture gives: a `View` of a Dynamo graph, the same computation in canonical ATen, to read from.

Each ATen node knows the Dynamo node it came from (`View.origin`), and each Dynamo node the ATen node that holds its value
(`Scope.values`). The body of a region (checkpointing, nested_compile_region, the branches of cond) is viewed in line, in a
`Scope` of its own, so that a mask made outside is read outside.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from attnfuse import _compat
from attnfuse.passes.graph.aten import value_of
from attnfuse.passes.graph.memory import Writes

#: Key of a placeholder's metadata: the input's name in reports, where it does not follow from the placeholder's own.
NAME = "attnfuse_name"


@dataclass(eq=False)
class Scope:
    """One Dynamo graph: the main one, or the body of a region that `call`, a node of `parent`, runs."""

    module: fx.GraphModule
    parent: Scope | None = None
    call: fx.Node | None = None
    # Dynamo node -> its value, a pytree with ATen nodes for tensors
    values: dict[fx.Node, Any] = field(default_factory=dict)
    # ATen node -> the first Dynamo node with that value
    nodes: dict[fx.Node, fx.Node] = field(default_factory=dict)


@dataclass(frozen=True)
class Origin:
    scope: Scope
    node: fx.Node


@dataclass(eq=False)
class View:
    graph: fx.Graph
    scopes: list[Scope]
    origin: dict[fx.Node, Origin]
    # whether autograd records the node
    grad: dict[fx.Node, bool]
    fake_mode: _compat.FakeTensorMode
    # whether any input of the graph requires a gradient
    trains: bool
    writes: Writes
    # nodes that outputs, writes and opaque nodes depend on
    live: set[fx.Node]

    @property
    def order(self) -> dict[fx.Node, int]:
        """The place of each node in the graph."""
        return self.writes.order

    def is_parameter(self, node: fx.Node) -> bool:
        """Whether it is an input of the graph that is a parameter or a buffer of a module."""
        dynamo = self.scopes[0].nodes.get(node) if node.op == "placeholder" else None
        if dynamo is None:
            return False
        name = str(dynamo.target)
        given = isinstance(dynamo.meta.get("example_value"), torch.nn.Parameter)
        return given or "_parameters_" in name or "_buffers_" in name

    def where(self, node: fx.Node) -> str:
        """'file.py:12' of the user's line that made `node`, or '' if it is not known."""
        origin = self.origin.get(node)
        return source_line(origin.node) if origin else ""

    def input_of(self, node: fx.Node) -> str:
        """The name of the graph's input that `node` is made of; '' if there is none, or more than one."""
        found: set[fx.Node] = set()
        stack, seen = [node], set()
        while stack and len(found) < 2:
            at = stack.pop()
            if at in seen:
                continue
            seen.add(at)
            if at.op == "placeholder":
                if isinstance(value_of(at), torch.Tensor):
                    found.add(at)
            else:
                stack += at.all_input_nodes
        if len(found) != 1:
            return ""
        given = self.scopes[0].nodes.get(found.pop())
        if given is None:
            return ""
        return str(given.meta.get(NAME) or _plain_name(str(given.target)))


def _plain_name(target: str) -> str:
    """'attention_mask' for Dynamo's l_kwargs_attention_mask_, 'encoder.bias' for a parameter's."""
    name = target.removeprefix("L_").removeprefix("l_").removesuffix("_")
    for prefix in ("kwargs_", "args_", "stack0_"):
        name = name.removeprefix(prefix)
    if "modules_" in name or "buffers_" in name or "parameters_" in name:
        parts = [p for p in re.split(r"_*(?:self_)?_?(?:modules|buffers|parameters)_", name) if p and p != "self"]
        name = ".".join(p.strip("_") for p in parts[-2:])
    return name


def source_line(node: fx.Node, outside: str = "") -> str:
    """'file.py:12' for the innermost frame of the stack trace that Dynamo kept for `node`.

    outside: a folder; frames of files in it are passed over, if there are others.
    """
    trace = node.meta.get("stack_trace") or ""
    first = ""
    for line in reversed(trace.splitlines()):
        line = line.strip()
        if line.startswith('File "') and '", line ' in line:
            name, rest = line[6:].split('", line ', 1)
            found = f"{name.rsplit('/', 1)[-1]}:{rest.split(',', 1)[0].strip()}"
            if not outside or not name.startswith(outside):
                return found
            first = first or found
    return first
