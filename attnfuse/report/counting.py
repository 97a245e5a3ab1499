"""How many attentions a call makes, counted without any of the passes: what a rewrite's own count is checked against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from attnfuse import _compat
from attnfuse._compat import OpOverload, TorchDispatchMode

_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addbmm"}
_SOFTMAX = {"softmax", "_softmax", "_safe_softmax", "_masked_softmax"}
_FUSED = {
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_fused_attention_overrideable",
    "_flash_attention_forward",
    "_efficient_attention_forward",
    "_cudnn_attention_forward",
    # whole layers in eval mode
    "_native_multi_head_attention",
    "_transformer_encoder_layer_fwd",
}
# ops besides pointwise ones through which scores and weights are still scores and weights
_MOVES = {
    *(
        "view",
        "_unsafe_view",
        "reshape",
        "_reshape_alias",
        "expand",
        "permute",
        "transpose",
        "t",
        "unsqueeze",
        "squeeze",
    ),
    *("slice", "select", "split", "split_with_sizes", "unbind", "alias", "detach", "as_strided", "clone", "_to_copy"),
    *(
        "unsafe_split",
        "unsafe_split_with_sizes",
        "diagonal",
        "unfold",
        "lift_fresh",
        "repeat",
        "repeat_interleave",
        "flip",
    ),
    *("cat", "stack", "constant_pad_nd", "gather", "index", "index_select", "tril", "triu", "roll", "copy"),
    *("native_dropout", "_fused_dropout", "masked_fill", "index_fill", "masked_scatter", "scatter", "index_put"),
    *("index_copy", "index_add", "scatter_add", "slice_scatter", "select_scatter", "diagonal_scatter"),
}


def count_attention(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> int:
    """The number of attentions in one eager call `function(*args, **kwargs)`, made without gradients.

    An attention is a softmax whose input comes from a product of two activations, and whose output goes into another, with
    nothing but pointwise ops, views, casts and moves between; or a call of scaled_dot_product_attention. A product with a
    parameter is a linear layer, so that a router or a pooling layer does not count.
    Dispatched ops are watched, not source code: spelling does not matter as long as it ends in aten's softmax.
    """
    module = function if isinstance(function, torch.nn.Module) else getattr(function, "__self__", None)
    parameters = list(module.parameters()) if isinstance(module, torch.nn.Module) else []
    counter = _Counter(parameters)
    with torch.no_grad(), counter:
        function(*args, **kwargs)
    return len(counter.counted) + counter.fused


class _Counter(TorchDispatchMode):
    """Follows scores (-1) and weights (the number of their softmax) from op to op."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        super().__init__()
        self.marks: dict[int, frozenset[int]] = {}
        # of what was written into memory, whichever tensor it is read through
        self.written: dict[int, frozenset[int]] = {}
        self.weights = {id(p) for p in parameters}
        # ids stay unique while the tensors live
        self.alive: list[Any] = [*parameters]
        self.counted: set[int] = set()
        self.softmaxes = 0
        self.fused = 0

    def __torch_dispatch__(self, op: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = op(*args, **kwargs)
        outs = {a.name for a in op._schema.arguments if a.is_out}
        given = (args, {name: x for name, x in kwargs.items() if name not in outs})
        inputs = [x for x in _compat.pytree.tree_leaves(given) if isinstance(x, torch.Tensor)]
        name = _name(op)
        made = self._marks_of(name, op, inputs)
        own = name in _MOVES and bool(inputs) and all(id(x) in self.weights for x in inputs)
        for out in _compat.pytree.tree_leaves(result):
            if isinstance(out, torch.Tensor):
                self.alive.append(out)
                self.marks[id(out)] = made
                if op._schema.is_mutable:
                    self._write(out, made)
                if own:
                    self.weights.add(id(out))
        return result

    def _write(self, out: torch.Tensor, made: frozenset[int]) -> None:
        key, storage = _compat.alias_key(out), out.untyped_storage()
        whole = out.numel() * out.element_size() == storage.nbytes()
        self.written[key] = made if whole else made | self.written.get(key, frozenset())

    def _read(self, x: torch.Tensor) -> frozenset[int]:
        return self.marks.get(id(x), frozenset()) | self.written.get(_compat.alias_key(x), frozenset())

    def _marks_of(self, name: str, op: OpOverload, inputs: list[torch.Tensor]) -> frozenset[int]:
        carried = frozenset().union(*map(self._read, inputs))
        if name in _FUSED:
            self.fused += 1
        elif name in _PRODUCTS:
            factors = inputs[-2:]
            if any(id(x) in self.weights for x in factors):
                return frozenset()
            self.counted |= {mark for x in factors for mark in self._read(x) if mark >= 0}
            return frozenset({-1})
        elif name in _SOFTMAX:
            self.softmaxes += 1
            return frozenset({self.softmaxes}) if -1 in carried else frozenset()
        elif name in _MOVES or _is_pointwise(op, name):
            return carried
        return frozenset()


def _name(op: OpOverload) -> str:
    """'masked_fill' for masked_fill_ too, and 'view' for view_copy."""
    name: str = op.name().split("::")[1].split(".")[0]
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    plain = name.removesuffix("_copy")
    return plain if plain in _MOVES else name


def _is_pointwise(op: OpOverload, name: str) -> bool:
    """Ops that write in place may lack the tag that the others have."""
    packet = getattr(torch.ops.aten, name, None)
    others = [getattr(packet, overload) for overload in packet.overloads()] if packet is not None else []
    return any(torch.Tag.pointwise in x.tags for x in (op, *others))
