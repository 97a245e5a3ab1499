"""The names of ATen's ops: one name for all spellings of an op, and the classes of ops that the passes tell apart.

A class holds canonical names. A reader that takes fewer ops than a class has subtracts them where it says why.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import fx

from attnfuse._compat import HigherOrderOperator, OpOverload

#: ATen's own aliases: the same op under another name.
_SPELLINGS = {
    "absolute": "abs",
    "arccos": "acos",
    "arccosh": "acosh",
    "arcsin": "asin",
    "arcsinh": "asinh",
    "arctan": "atan",
    "arctan2": "atan2",
    "arctanh": "atanh",
    "clip": "clamp",
    "concat": "cat",
    "concatenate": "cat",
    "det": "linalg_det",
    "divide": "div",
    "fix": "trunc",
    "ger": "outer",
    "greater": "gt",
    "greater_equal": "ge",
    "inverse": "linalg_inv",
    "less": "lt",
    "less_equal": "le",
    "linalg_matmul": "matmul",
    "linalg_matrix_exp": "matrix_exp",
    "matrix_power": "linalg_matrix_power",
    "multiply": "mul",
    "negative": "neg",
    "not_equal": "ne",
    "orgqr": "linalg_householder_product",
    "row_stack": "vstack",
    "special_digamma": "digamma",
    "special_erf": "erf",
    "special_erfc": "erfc",
    "special_erfinv": "erfinv",
    "special_exp2": "exp2",
    "special_expit": "sigmoid",
    "special_expm1": "expm1",
    "special_gammaln": "lgamma",
    "special_i0": "i0",
    "special_log1p": "log1p",
    "special_log_softmax": "log_softmax",
    "special_logit": "logit",
    "special_logsumexp": "logsumexp",
    "special_multigammaln": "mvlgamma",
    "special_psi": "digamma",
    "special_round": "round",
    "special_sinc": "sinc",
    "special_softmax": "softmax",
    "special_xlogy": "xlogy",
    "subtract": "sub",
    "true_divide": "div",
    # Python's operators
    "__and__": "bitwise_and",
    "__iand__": "bitwise_and",
    "__ior__": "bitwise_or",
    "__ixor__": "bitwise_xor",
    "__or__": "bitwise_or",
    "__xor__": "bitwise_xor",
    # what autograd or export makes of it
    "_log_softmax": "log_softmax",
    "_softmax": "softmax",
    "_to_copy": "to",
    "_unsafe_view": "view",
}
#: Ops that do the same in other words: their arguments differ, what they do to elements does not.
_KINDS = {
    "type_as": "to",
    # the same elements in the same order
    **dict.fromkeys(("reshape", "flatten", "unflatten", "view_as", "reshape_as", "squeeze", "unsqueeze"), "view"),
    # dims in another order
    **dict.fromkeys(("moveaxis", "movedim", "transpose", "swapaxes", "swapdims", "t"), "permute"),
    **dict.fromkeys(("mT", "mH", "numpy_T", "matrix_H", "adjoint"), "permute"),
    # dims of size 1 made longer
    **dict.fromkeys(("broadcast_to", "expand_as"), "expand"),
}

#: The same elements in the same places, in memory of their own or not.
COPIES = frozenset({"alias", "clone", "contiguous", "lift_fresh", "lift_fresh_copy"})
COMPARISONS = frozenset({"eq", "ge", "gt", "le", "lt", "ne"})
ANDS = frozenset({"bitwise_and", "logical_and"})
ORS = frozenset({"bitwise_or", "logical_or"})
XORS = frozenset({"bitwise_xor", "logical_xor"})
NOTS = frozenset({"bitwise_not", "logical_not"})
#: A tensor like another one, of values of its own.
LIKE = frozenset({"full_like", "ones_like", "zeros_like"})
_UNARY = frozenset(
    (
        *("abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "ceil", "cos", "cosh", "digamma", "erf", "erfc"),
        *("erfinv", "exp", "exp2", "expm1", "floor", "frac", "i0", "isfinite", "isinf", "isnan", "lgamma", "log"),
        *(
            "log10",
            "log1p",
            "log2",
            "logit",
            "nan_to_num",
            "neg",
            "reciprocal",
            "round",
            "rsqrt",
            "sign",
            "sin",
            "sinc",
        ),
        *("sinh", "sqrt", "square", "tan", "tanh", "trunc"),
    )
)
_ACTIVATIONS = frozenset(
    (
        *("celu", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log_sigmoid", "mish", "relu"),
        *("relu6", "selu", "sigmoid", "silu", "softplus", "threshold"),
    )
)
_BINARY = frozenset(
    (
        *("add", "atan2", "div", "floor_divide", "fmod", "hypot", "maximum", "minimum", "mul", "pow", "remainder"),
        *("rsub", "sub", "xlogy"),
    )
)
_CHOICES = frozenset({"clamp", "clamp_max", "clamp_min", "masked_fill", "where"})
TERNARY = frozenset({"addcdiv", "addcmul", "lerp"})
#: Each element of the result is made of the elements at the same place, and of nothing else.
ELEMENTWISE = (
    _UNARY | _ACTIVATIONS | _BINARY | _CHOICES | TERNARY | COMPARISONS | ANDS | ORS | XORS | NOTS | LIKE | {"detach"}
)


def spelling(name: str) -> str:
    """The one name of an op: without the underscore of one that writes to its argument, and without aliases."""
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    return _SPELLINGS.get(name, name)


@cache
def kind(target: OpOverload) -> str:
    """What an op of ATen does: 'add' for `add_.Tensor`, 'view' for every reshape, 'maximum' for `max.other`; '' for others."""
    if target.namespace != "aten":
        return ""
    if target is torch.ops.aten.view.dtype:
        return "view_dtype"
    name = spelling(_plain(target))
    if name in ("max", "min") and target._schema.overload_name == "other":
        return f"{name}imum"
    return _KINDS.get(name, name)


def functional(target: OpOverload) -> OpOverload | None:
    """The op under its one name, taking the same arguments, and giving a new tensor instead of writing to its first argument.

    The op itself where no other takes its arguments; None for one that writes and has no such form.
    """
    name, overload = spelling(_plain(target)), target._schema.overload_name or "default"
    if name in ("max", "min") and overload == "other":
        name, overload = f"{name}imum", "default"
    for packet in (name, _plain(target).removesuffix("_")):
        found = getattr(getattr(torch.ops.aten, packet, None), overload, None)
        if isinstance(found, OpOverload) and not found._schema.is_mutable and _names(found) == _names(target):
            return found
    return None if target._schema.is_mutable else target


def is_elementwise(target: OpOverload) -> bool:
    """By ATen's tag or by name. Ops that draw random numbers are not: what they draw depends on the shape."""
    if torch.Tag.nondeterministic_seeded in target.tags:
        return False
    return torch.Tag.pointwise in target.tags or kind(target) in ELEMENTWISE | {"to"}


def name_called(target: Any) -> str:
    """The name of a method, a function, an op or a higher-order op, without its overload or module; '' if it has none."""
    if isinstance(target, HigherOrderOperator):
        return str(target.name())
    return target if isinstance(target, str) else str(getattr(target, "__name__", "")).split(".")[0]


def called(node: fx.Node) -> str:
    """The name of what a Dynamo node calls; '' if it calls nothing, or a module."""
    return name_called(node.target) if node.op in ("call_function", "call_method") else ""


def _names(target: OpOverload) -> list[str]:
    return [a.name for a in target._schema.arguments]


def _plain(target: OpOverload) -> str:
    return target._schema.name.split("::")[-1]
