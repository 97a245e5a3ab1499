"""The number that a node is wherever it is used, found by the ops themselves, so that promotion and rounding are PyTorch's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from attnfuse._compat import OpOverload
from attnfuse.passes import limits
from attnfuse.passes.graph.aten import arguments, dtype_of, is_tensor, name_of, shape_of, value_of
from attnfuse.passes.graph.memory import is_stale
from attnfuse.passes.graph.vocabulary import COPIES

#: All elements of the result are elements of the argument.
_KEEPING = COPIES | {"view", "expand", "detach"}
#: Ops that are run on numbers as they are.
_FOLDABLE = (*("sqrt", "rsqrt", "mul", "div", "add", "sub", "neg", "reciprocal", "pow", "exp", "log", "square"),)

Number = int | float


def constant(x: Any, depth: int = limits.CONSTANT_OPS) -> Number | None:
    """The number that `x` is wherever it is used: a Python number, or a tensor all of whose elements are one number.

    A tensor's number is what its dtype holds, found by the ops themselves: an int for integers and bools.
    """
    if isinstance(x, (bool, int)):
        return int(x)
    if isinstance(x, float):
        return x
    if not isinstance(x, fx.Node) or depth == 0 or is_stale(x):
        return None
    value = value_of(x)
    if isinstance(value, (int, float)):
        return constant(value)
    if isinstance(value, torch.SymInt):
        number = value.node.maybe_as_int()
        return None if number is None else int(number)
    if isinstance(value, torch.SymFloat):
        number = value.node.maybe_as_float()
        return None if number is None else float(number)
    if x.op == "get_attr":
        return _stored_constant(x)
    if not isinstance(value, torch.Tensor) or value.is_complex():
        return None
    args = arguments(x) if isinstance(x.target, OpOverload) else {}
    name = name_of(x)
    if name in ("full", "full_like", "new_full"):
        return _filled(constant(args["fill_value"], depth - 1), value.dtype)
    if name == "scalar_tensor":
        return _filled(constant(args["s"], depth - 1), value.dtype)
    if name in ("zeros", "zeros_like", "new_zeros"):
        return number_in(0, value.dtype)
    if name in ("ones", "ones_like", "new_ones"):
        return number_in(1, value.dtype)
    if name in _KEEPING:
        return constant(x.args[0], depth - 1)
    if name == "to":
        source = x.args[0]
        number = constant(source, depth - 1)
        return None if number is None or not is_tensor(source) else converted(number, dtype_of(source), value.dtype)
    if name in _FOLDABLE and not any(v is not None for v in x.kwargs.values()):
        return folded(x.target, [_argument(a, depth - 1) for a in x.args], value.dtype)
    return None


def _argument(x: Any, depth: int) -> Any:
    """An argument of an op on constants: a number, or a tensor of one element with as many dims; None if it is no constant."""
    number = constant(x, depth)
    if number is None or not is_tensor(x):
        return number
    return one_element(number, dtype_of(x), not shape_of(x))


def one_element(number: Number, dtype: torch.dtype, scalar: bool) -> torch.Tensor:
    """A tensor that promotes others as one of that dtype does: without dims if it is a scalar. The dtype must hold the number."""
    return torch.tensor(number, dtype=dtype).reshape(() if scalar else (1,))


def folded(target: Any, args: Sequence[Any], dtype: torch.dtype, kwargs: dict[str, Any] | None = None) -> Number | None:
    """What an op gives for constants; None where it gives no `dtype`, as it does in the graph, or raises."""
    if any(a is None for a in args):
        return None
    try:
        made = target(*args, **(kwargs or {}))
    except (RuntimeError, ZeroDivisionError, OverflowError):
        # it would raise in the graph too
        return None
    if not isinstance(made, torch.Tensor) or made.dtype != dtype or made.numel() != 1:
        return None
    return number_in(made.item(), dtype)


def number_in(number: Number, dtype: torch.dtype) -> Number:
    """A number as `constant` gives it for a tensor of that dtype."""
    return float(number) if dtype.is_floating_point else int(number)


def converted(number: Number, source: torch.dtype, dtype: torch.dtype) -> Number | None:
    """The number that a tensor of dtype `source` becomes in `dtype`; None where that depends on the machine."""
    if source.is_floating_point and not (dtype.is_floating_point or dtype == torch.bool):
        info = torch.iinfo(dtype)
        if not (math.isfinite(number) and info.min <= math.trunc(number) <= info.max):
            return None
    return number_in(torch.tensor(number, dtype=source).to(dtype).item(), dtype)


def _filled(number: Number | None, dtype: torch.dtype) -> Number | None:
    """The number that torch.full makes of a Python number in `dtype`."""
    if number is None:
        return None
    try:
        return number_in(torch.full((), number, dtype=dtype).item(), dtype)
    except (RuntimeError, OverflowError):
        # it does not fit, and the graph would raise too
        return None


def rounded(number: float, dtype: torch.dtype) -> float:
    """The number that a tensor of a floating `dtype` holds for `number`."""
    return float(torch.tensor(number, dtype=torch.float64).to(dtype))


def _stored_constant(node: fx.Node) -> Number | None:
    """A one-element constant kept on the graph, such as torch.tensor(16.0)."""
    module = node.graph.owning_module
    stored = getattr(module, str(node.target), None) if module is not None else None
    stored = getattr(stored, "constant", None) if _is_fake(stored) else stored
    if not isinstance(stored, torch.Tensor) or _is_fake(stored) or stored.requires_grad or stored.is_complex():
        return None
    return number_in(stored.item(), stored.dtype) if stored.numel() == 1 else None


def _is_fake(x: Any) -> bool:
    return type(x).__name__ == "FakeTensor"
