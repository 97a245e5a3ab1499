"""What forward keeps for backward has the strides that backward was compiled for, also where sizes are not known.

Inductor gives results the strides they have in the graph, but not those of tensors whose strides depend on a size that no call
tells before. Backward counts on them all the same.
"""

from __future__ import annotations

from torch import fx

from attnfuse import _compat


def keep_strides(gm: fx.GraphModule) -> int:
    """Force the order of the strides of such results; how many there are."""
    graph = gm.graph
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    forced: dict[fx.Node, fx.Node] = {}
    for node in output.all_input_nodes:
        if node.op == "placeholder":
            continue
        order = _compat.strides_unknown_to_inductor(node.meta.get("val"))
        if order is None:
            continue
        with graph.inserting_before(output):
            made = graph.call_function(_compat.force_stride_order(), (node, order))
        made.meta.update(node.meta)
        forced[node] = made
    if forced:
        output.args = fx.node.map_arg(output.args, lambda n: forced.get(n, n))
        gm.recompile()
    return len(forced)
