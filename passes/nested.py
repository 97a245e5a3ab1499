"""Nested attentions of a Dynamo graph -> calls of attnfuse.nested.run.

They are single calls with nested arguments, which the view of a graph does not look into.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from attnfuse import _compat
from attnfuse.kernels.dropout import SEED_LIMIT
from attnfuse.nested import JaggedCall, cast, is_jagged, refusal, run, spec_of
from attnfuse.passes.emit.transaction import undone_on_error
from attnfuse.passes.site import Refusal
from attnfuse.settings import Settings
from attnfuse.spec import Attention


def calls(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, JaggedCall]]:
    """The attentions with a jagged argument, in the bodies of regions too, each with its fake arguments.

    They are in the dtype of the result, to which an autocast that is on at the node casts them.
    """
    for module in gm.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        for node in list(module.graph.nodes):
            if node.op != "call_function" or node.target is not _compat.SCALED_DOT_PRODUCT_ATTENTION:
                continue
            if any("example_value" not in n.meta for n in node.all_input_nodes):
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["example_value"])
            call = JaggedCall(*args, **kwargs)
            if any(map(is_jagged, call.qkv)):
                yield node, cast(call, node.meta["example_value"].dtype) if "example_value" in node.meta else call


def read(node: fx.Node, call: JaggedCall) -> Attention | Refusal:
    reason = refusal(call)
    return spec_of(call) if reason is None else Refusal(reason, node)


def emit(node: fx.Node, call: JaggedCall, kernel: str, chosen: Settings) -> None:
    """Put the call of the kernel where the node is."""
    graph = node.graph
    own: dict[str, Any] = {
        "kernel": kernel,
        "strict": chosen.strict,
        "nan_policy": chosen.nan_policy,
        "dtype": call.query.dtype,
    }
    with undone_on_error([graph]):
        with graph.inserting_before(node):
            if call.dropout_p:
                own["seed"] = _seed(node, call)
            made = graph.call_function(run, node.args, {**node.kwargs, **own})
        made.meta.update(node.meta)
        node.replace_all_uses_with(made)
    graph.erase_node(node)


def _seed(node: fx.Node, call: JaggedCall) -> fx.Node:
    """A node of its own, so that it can be told to be kept for backward."""
    args: Any = ((0, SEED_LIMIT, (1,)), {"dtype": torch.int64, "device": call.query.device})
    made = node.graph.call_function(torch.randint, *args)
    made.meta.update({key: node.meta[key] for key in ("stack_trace", "nn_module_stack") if key in node.meta})
    mode = _compat.detect_fake_mode([x.values() if is_jagged(x) else x for x in call.qkv])
    if mode is not None:
        with mode:
            made.meta["example_value"] = torch.randint(*args[0], **args[1])
    _compat.save_for_backward(made)
    return made
