"""Reading single ATen nodes: their name, arguments and constant values, whichever overload or alias was used."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from attnfuse._compat import OpOverload
from attnfuse.passes.capture import is_stale, value_of

_ALIASES = {
    "multiply": "mul",
    "divide": "div",
    "true_divide": "div",
    "subtract": "sub",
    "clip": "clamp",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "special_softmax": "softmax",
    "_softmax": "softmax",
    "special_log_softmax": "log_softmax",
    "_log_softmax": "log_softmax",
    "special_logsumexp": "logsumexp",
    "_to_copy": "to",
    "type_as": "to",
    "_unsafe_view": "view",
    "reshape": "view",
    "flatten": "view",
    "unflatten": "view",
    "view_as": "view",
    "reshape_as": "view",
    "squeeze": "view",
    "unsqueeze": "view",
    "moveaxis": "permute",
    "movedim": "permute",
    "transpose": "permute",
    "t": "permute",
    "mT": "permute",
    "numpy_T": "permute",
    "adjoint": "permute",
    "broadcast_to": "expand",
    "expand_as": "expand",
    "negative": "neg",
}


def name_of(node: fx.Node) -> str:
    """The op's name without overload, trailing underscore or alias: 'add' for add_.Tensor, 'view' for every reshape."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, OpOverload):
        return ""
    if target.namespace != "aten":
        return ""
    name = target._schema.name.split("::")[-1]
    if target is torch.ops.aten.view.dtype:
        return "view_dtype"
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    name = _ALIASES.get(name, name)
    return _ALIASES.get(name, name)


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments by their schema name, defaults included."""
    schema = node.target._schema  # type: ignore[union-attr]
    found = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    found.update({a.name: v for a, v in zip(schema.arguments, node.args)})
    found.update(node.kwargs)
    return found


def is_tensor(x: Any) -> bool:
    return isinstance(x, fx.Node) and isinstance(value_of(x), torch.Tensor)


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    return tuple(value_of(node).shape)


def dtype_of(node: fx.Node) -> torch.dtype:
    dtype: torch.dtype = value_of(node).dtype
    return dtype


_FOLDABLE = {
    "sqrt",
    "rsqrt",
    "mul",
    "div",
    "add",
    "sub",
    "neg",
    "reciprocal",
    "pow",
    "exp",
    "log",
    "to",
    "clone",
    "view",
}
_FOLDABLE |= {
    "lift_fresh_copy",
    "lift_fresh",
    "expand",
    "detach",
    "alias",
    "contiguous",
    "tensor",
    "scalar_tensor",
    "square",
}


def constant(x: Any, depth: int = 8) -> float | None:
    """The number that `x` is wherever it is used: a Python number, or a tensor all of whose elements are one number."""
    if isinstance(x, (bool, int, float)):
        return float(x)
    if not isinstance(x, fx.Node) or depth == 0 or is_stale(x):
        return None
    value = value_of(x)
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        number = value.node.maybe_as_int() if isinstance(value, torch.SymInt) else value.node.maybe_as_float()
        return None if number is None else float(number)
    if x.op == "get_attr":
        return _stored_constant(x)
    if not isinstance(value, torch.Tensor) or value.is_complex():
        return None
    args = arguments(x) if isinstance(x.target, OpOverload) else {}
    name = name_of(x)
    if name in ("full", "full_like", "new_full"):
        return _rounded(constant(args["fill_value"], depth - 1), value.dtype)
    if name == "scalar_tensor":
        return _rounded(constant(args["s"], depth - 1), value.dtype)
    if name in ("zeros", "zeros_like", "new_zeros"):
        return 0.0
    if name in ("ones", "ones_like", "new_ones"):
        return 1.0
    if name in _FOLDABLE:
        return _fold(x, depth - 1)
    return None


def _fold(node: fx.Node, depth: int) -> float | None:
    """Run a pointwise op, view or cast on constants, in the dtypes it has."""
    if name_of(node) in ("view", "expand", "clone", "contiguous", "detach", "alias", "lift_fresh", "lift_fresh_copy"):
        return constant(node.args[0], depth)
    if name_of(node) == "to":
        return _rounded(constant(node.args[0], depth), dtype_of(node))
    scalars: list[Any] = []
    for x in node.args:
        number = constant(x, depth)
        if number is None:
            return None
        if not isinstance(x, fx.Node):
            scalars.append(x)
        else:
            scalars.append(torch.tensor(number, dtype=dtype_of(x)) if is_tensor(x) else number)
    if node.kwargs and any(v is not None for v in node.kwargs.values()):
        return None
    return float(node.target(*scalars))  # type: ignore[operator]


def _rounded(number: float | None, dtype: torch.dtype) -> float | None:
    if number is None:
        return None
    if not dtype.is_floating_point:
        return number if math.isfinite(number) else None
    return rounded(number, dtype)


def rounded(number: float, dtype: torch.dtype) -> float:
    """The number that a tensor of a floating `dtype` holds for `number`."""
    return float(torch.tensor(number, dtype=torch.float64).to(dtype))


def _stored_constant(node: fx.Node) -> float | None:
    """A one-element constant kept on the graph, such as torch.tensor(16.0)."""
    module = node.graph.owning_module
    stored = getattr(module, str(node.target), None) if module is not None else None
    stored = getattr(stored, "constant", None) if _is_fake(stored) else stored
    if isinstance(stored, torch.Tensor) and not _is_fake(stored) and stored.numel() == 1 and not stored.requires_grad:
        return float(stored)
    return None


def _is_fake(x: Any) -> bool:
    return type(x).__name__ == "FakeTensor"
