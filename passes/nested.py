"""Nested attentions of a Dynamo graph -> calls of attnfuse.nested.run.

They are single calls with nested arguments, which the view of a graph does not look into.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from attnfuse._compat import SCALED_DOT_PRODUCT_ATTENTION
from attnfuse.nested import Call, is_jagged, refusal, run, spec_of
from attnfuse.passes.site import Refusal
from attnfuse.passes.transaction import undone_on_error
from attnfuse.settings import Settings
from attnfuse.spec import Attention


def calls(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, Call]]:
    """The attentions with a jagged argument, in the bodies of regions too, each with its fake arguments."""
    for module in gm.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        for node in list(module.graph.nodes):
            if node.op != "call_function" or node.target is not SCALED_DOT_PRODUCT_ATTENTION:
                continue
            if any("example_value" not in n.meta for n in node.all_input_nodes):
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["example_value"])
            call = Call(*args, **kwargs)
            if any(map(is_jagged, call.qkv)):
                yield node, call


def read(node: fx.Node, call: Call) -> Attention | Refusal:
    reason = refusal(call)
    return spec_of(call) if reason is None else Refusal(reason, node)


def emit(node: fx.Node, kernel: str, chosen: Settings) -> None:
    """Put the call of the kernel where the node is."""
    graph = node.graph
    with undone_on_error([graph]):
        with graph.inserting_before(node):
            own: dict[str, Any] = {"kernel": kernel, "strict": chosen.strict, "nan_policy": chosen.nan_policy}
            made = graph.call_function(run, node.args, {**node.kwargs, **own})
        made.meta.update(node.meta)
        node.replace_all_uses_with(made)
    graph.erase_node(node)
