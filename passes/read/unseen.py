"""Attentions that the view does not show, and why: under torch.vmap or torch.func, in regions, on tensor subclasses.

For the report alone: the Dynamo graph is run once more, as a sketch in which a tensor is what the code around it sees of it. The
dims of a vmap, what is differentiated and what a subclass holds are left out, so that a sketch tells what looks like attention
and nothing else. It costs a trace, which is made only where something might be found.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from attnfuse import _compat, reasons
from attnfuse._compat import HigherOrderOperator, pytree
from attnfuse.passes.capture.foreign import holds_foreign, is_foreign, is_nested
from attnfuse.passes.capture.recorder import (
    ENTERS_DUAL_LEVEL,
    EXITS_DUAL_LEVEL,
    UNKNOWN,
    Recorder,
    is_choice,
    region_of,
    stand_ins,
)
from attnfuse.passes.capture.view import Scope, View, source_line
from attnfuse.passes.graph import contraction
from attnfuse.passes.graph.aten import name_of
from attnfuse.passes.graph.memory import opaque
from attnfuse.passes.graph.vocabulary import called
from attnfuse.passes.read.anchors import BARRIERS, find, looks_like_attention
from attnfuse.passes.site import Refusal
from attnfuse.reasons import Reason

#: Dynamo's names of what holds a softmax.
_SOFTMAX = {
    *("softmax", "_softmax", "_safe_softmax", "log_softmax", "_log_softmax", "softmin", "exp", "exp_", "exp2"),
    *("scaled_dot_product_attention", "multi_head_attention_forward"),
    *("_transformer_encoder_layer_fwd", "_native_multi_head_attention"),
}
#: Ops that are an attention each, and why they are not rewritten.
_ATTENTIONS = {
    **dict.fromkeys(
        (
            *(f"_scaled_dot_product_{x}_attention" for x in ("flash", "efficient", "cudnn")),
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_attention_math",
            "_scaled_dot_product_fused_attention_overrideable",
            *("_flash_attention_forward", "_efficient_attention_forward", "_cudnn_attention_forward"),
            *("varlen_attn", "_varlen_attn"),
        ),
        reasons.CALLED_BY_OWN_NAME(),
    ),
    "flex_attention": reasons.FLEX_ATTENTION(),
}
#: What opens a transform in Dynamo's graph, what closes it, and what is said of an attention in it.
_TRANSFORMS = {
    "_vmap": reasons.IN_VMAP(),
    "_grad": reasons.IN_FUNC_GRAD(),
    "_jvp": reasons.IN_FORWARD_MODE(),
    "_dual": reasons.IN_FORWARD_MODE(),
    "_func": reasons.IN_FUNCTIONALIZE(),
}
_TORCH = f"{Path(torch.__file__).parent}/"
_OPENS, _CLOSES = "_increment_nesting", "_decrement_nesting"
_REGIONS = {"autograd_function_apply": reasons.IN_AUTOGRAD_FUNCTION()}


@dataclass(frozen=True)
class Unseen(Refusal):
    """An attention that was not viewed; `node` is Dynamo's."""

    @property
    def name(self) -> str:
        return self.node.name if self.node is not None else ""

    @property
    def where(self) -> str:
        """The user's line, where it is known: PyTorch's own code says little."""
        return source_line(self.node, outside=_TORCH) if self.node is not None else ""


class _Sketch(Recorder):
    """Runs bodies of all higher-order ops, and knows a tensor's shape and dtype as the code sees them."""

    maps_dims = False

    def _run_node(self, scope: Scope, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        args: Any = fx.node.map_arg(node.args, lambda n: env[n])
        if holds_foreign(node) and not any(map(holds_foreign, node.all_input_nodes)):
            # made of plain ones there, such as DTensor.from_local does
            return self._opaque(node, args, {})
        if not isinstance(node.target, HigherOrderOperator) or region_of(node, args) or is_choice(node):
            return super()._run_node(scope, node, env)
        kwargs: Any = fx.node.map_arg(node.kwargs, lambda n: env[n])
        results = []
        for body in _bodies(node, args, kwargs):
            placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
            given = [self._opaque(n, args, kwargs) for n in placeholders]
            results.append(self.run(Scope(body, scope, node), given))
        return self._opaque(node, (args, results), kwargs)


def _bodies(node: fx.Node, args: Any, kwargs: Any) -> list[fx.GraphModule]:
    """The graphs of a higher-order op that compute what it gives; not its backward."""
    found = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, fx.GraphModule)]
    return found[:1] if called(node) == "autograd_function_apply" else found


def unseen(
    gm: fx.GraphModule, view: View | None, known: Collection[fx.Node], problem: Reason | None = None
) -> list[Unseen]:
    """The attentions of a Dynamo graph besides those at the view nodes `known`, before it is edited.

    view: None where there is none, for the reason `problem`.
    """
    done = {view.origin[n].node for n in known if n in view.origin} if view else set()
    found = [Unseen(_ATTENTIONS[called(n)], n) for n in _nodes(gm) if called(n) in _ATTENTIONS]
    if any(called(n) in _SOFTMAX and n not in done and _is_doubtful(view, n) for n in _nodes(gm)):
        sketch = _sketched(gm)
        for anchor in find(sketch):
            origin = sketch.origin.get(anchor.weights)
            if origin is None or origin.node in done or not looks_like_attention(sketch, anchor):
                continue
            done.add(origin.node)
            found.append(
                Unseen(_reason(origin.scope, origin.node) or problem or reasons.OF_UNKNOWN_VALUES(), origin.node)
            )
    order: dict[fx.Node | None, int] = {n: i for i, n in enumerate(_nodes(gm))}
    return sorted(found, key=lambda x: order.get(x.node, 0))


def _nodes(gm: fx.GraphModule) -> Iterator[fx.Node]:
    """Calls of the graph and of all graphs in it."""
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            yield from (n for n in module.graph.nodes if n.op in ("call_function", "call_method"))


def _is_doubtful(view: View | None, node: fx.Node) -> bool:
    """Whether the view does not show what `node` is, or what is around it."""
    if view is None:
        return True
    made = [n for n, origin in view.origin.items() if origin.node is node]
    return not made or any(n.target is opaque or _meets_opaque(n, back) for n in made for back in (True, False))


def _meets_opaque(start: fx.Node, back: bool) -> bool:
    queue, seen = deque([start]), {start}
    while queue:
        node = queue.popleft()
        for other in node.all_input_nodes if back else node.users:
            if other.target is opaque:
                return True
            if other not in seen and name_of(other) not in (*BARRIERS, *contraction.NAMES):
                seen.add(other)
                queue.append(other)
    return False


def _sketched(gm: fx.GraphModule) -> View:
    examples = [n.meta.get("example_value") for n in gm.graph.nodes if n.op == "placeholder"]
    mode = _compat.detect_fake_mode(examples) or _compat.FakeTensorMode()
    plain = stand_ins(examples, mode)
    recorder = _Sketch(mode)

    def run(*args: Any) -> Any:
        given = iter(args)
        return recorder.run_main(gm, [UNKNOWN if is_nested(x) else next(given) for x in examples])

    return recorder.view(run, plain, False)


def _reason(scope: Scope, node: fx.Node) -> Reason | None:
    """What lies around a Dynamo node that is not looked into; None if nothing does."""
    around = _transform(scope, node)
    if around:
        return _TRANSFORMS[around]
    if scope.call is not None and scope.parent is not None:
        name = called(scope.call)
        if name in _REGIONS:
            return _REGIONS[name]
        if name not in _VIEWED:
            return reasons.IN_REGION(op=name)
        return _reason(scope.parent, scope.call)
    values = [n.meta.get("example_value") for n in (node, *node.all_input_nodes)]
    if any(map(is_nested, values)):
        return reasons.ON_NESTED_BY_OPS()
    foreign = next((type(x).__name__ for x in values if is_foreign(x)), None)
    if foreign is not None:
        return reasons.ON_TENSOR_CLASS(kind=foreign)
    return None


_VIEWED = {"tag_activation_checkpoint", "invoke_subgraph", "wrap_with_set_grad_enabled", "wrap_with_autocast", "cond"}


def _transform(scope: Scope, node: fx.Node) -> str:
    """The innermost transform of torch.func that is open at `node`."""
    stack: list[str] = []
    for at in scope.module.graph.nodes:
        if at is node:
            break
        name = called(at)
        if name.endswith(_OPENS) and name.removesuffix(_OPENS) in _TRANSFORMS:
            stack.append(name.removesuffix(_OPENS))
        elif name == ENTERS_DUAL_LEVEL:
            stack.append("_dual")
        elif (name.endswith(_CLOSES) or name == EXITS_DUAL_LEVEL) and stack:
            stack.pop()
    return stack[-1] if stack else ""
