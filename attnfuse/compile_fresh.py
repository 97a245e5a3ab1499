"""Compiling a callable as if nothing had been compiled before, and what it is called."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch

from attnfuse._compat import original


def compile_fresh(
    model_or_function: Callable[..., Any], backend: Callable[..., Any], **settings: Any
) -> Callable[..., Any]:
    """torch.compile of `model_or_function` that finds nothing in Dynamo's caches and leaves what is there as it is.

    backend: called with (graph module, example inputs). settings: more keywords of torch.compile.
    What is compiled already (a compiled module or function) is unwrapped first.
    """
    if not callable(model_or_function):
        raise TypeError(
            f"expected an nn.Module or a function, got {type(model_or_function).__name__}: "
            "pass the callable first and its arguments after it"
        )
    target = original(model_or_function)

    def call(*args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    # Dynamo keeps compiled code by code object, and compares backends: a copy of each starts empty
    fresh = types.FunctionType(
        call.__code__.replace(), call.__globals__, name_of(target), call.__defaults__, call.__closure__
    )

    def fresh_backend(gm: Any, example_inputs: Any) -> Any:
        return backend(gm, example_inputs)

    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        # frames after a graph break are the user's own code objects: count their recompiles apart
        settings["isolate_recompiles"] = True
    return torch.compile(fresh, backend=fresh_backend, **settings)


def name_of(model_or_function: Callable[..., Any]) -> str:
    """A name to show: the function's own, or the class of a module."""
    target = original(model_or_function)
    name: str | None = getattr(target, "__name__", None)
    if name == "_call_impl":
        # a module that was compiled in place comes back as its bound call
        name = type(target.__self__).__name__  # type: ignore[attr-defined]
    return name or type(target).__name__
