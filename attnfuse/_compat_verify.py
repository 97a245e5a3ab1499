"""Private torch names that explain, verify and the oracle use."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "HigherOrderOperator",
    "OpOverload",
    "TorchDispatchMode",
    "arguments_of",
    "hooks_of",
    "original",
    "writes",
]


def original(model_or_function: Callable[..., Any]) -> Callable[..., Any]:
    """The module or function that torch.compile or Module.compile was given; the argument itself if it is not compiled."""
    for attribute in ("_orig_mod", "_torchdynamo_orig_callable"):
        inner = inspect.getattr_static(model_or_function, attribute, None)
        if inner is None:
            # a module holds its submodules in a dict of their own
            inner = getattr(model_or_function, "__dict__", {}).get("_modules", {}).get(attribute)
        if inner is not None:
            return original(inner)
    if getattr(model_or_function, "_compiled_call_impl", None) is not None:
        return model_or_function._call_impl  # type: ignore[attr-defined,no-any-return]
    return model_or_function


def hooks_of(tensor: torch.Tensor) -> list[Callable[..., Any]]:
    """The gradient hooks registered on a tensor."""
    return list((tensor._backward_hooks or {}).values())


def arguments_of(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Argument name to value for a call of an op, defaults included."""
    named = {}
    for position, argument in enumerate(op._schema.arguments):
        if position < len(args):
            named[argument.name] = args[position]
        else:
            named[argument.name] = kwargs.get(argument.name, argument.default_value)
    return named


def writes(op: OpOverload) -> bool:
    """True where a call of the op changes one of its arguments."""
    return bool(op._schema.is_mutable)
