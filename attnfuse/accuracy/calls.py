"""A call that can be made several times from the same state: its tensors by name, copies of them, and what it mutates."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

_DEPTH = 8


def named(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    """Every tensor in `value` by the path to it: mappings, sequences, dataclasses, and attributes of other objects.

    A tensor alone is called 'out' where no name is given.
    """
    found: dict[str, torch.Tensor] = {}
    for path, tensor in _walk(value, name, set(), 0):
        found.setdefault(path or "out", tensor)
    return found


def _walk(value: Any, name: str, seen: set[int], depth: int) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
        return
    if depth > _DEPTH:
        return
    if not isinstance(value, (Mapping, Sequence)):
        # objects may refer to each other in circles
        if id(value) in seen:
            return
        seen.add(id(value))
    for path, child in _children(value, name):
        yield from _walk(child, path, seen, depth + 1)


def _children(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    dotted = f"{name}." if name else ""
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield f"{dotted}{key}", child
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for key in value._fields:
            yield f"{dotted}{key}", getattr(value, key)
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        for index, child in enumerate(value):
            yield f"{name}[{index}]", child
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield f"{dotted}{field.name}", getattr(value, field.name)
    elif (
        hasattr(value, "__dict__")
        and not isinstance(value, (type, ModuleType, torch.nn.Module))
        and not callable(value)
    ):
        # a key-value cache, for one
        for key, child in vars(value).items():
            yield f"{dotted}{key}", child


def module_of(target: Callable[..., Any]) -> torch.nn.Module | None:
    """The module that is called: the target itself, or the one whose method it is."""
    owner = getattr(target, "__self__", target)
    return owner if isinstance(owner, torch.nn.Module) else None


def layer_of(parameter: str) -> str:
    """The name of the module that owns a parameter; '' for an input, since a function is one layer to its inputs."""
    for mark in (".", "_parameters_"):
        if mark in parameter:
            return parameter.rsplit(mark, 1)[0]
    return ""


@dataclass
class Fresh:
    """Copies of a call's arguments. tensors: all in them, by name; differentiable: those that require grad."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @property
    def differentiable(self) -> dict[str, torch.Tensor]:
        return {name: t for name, t in self.tensors.items() if t.requires_grad}


class Call:
    """target(*args, **kwargs), to be made several times.

    grad: make floating inputs require grad where neither an input nor a parameter does.
    """

    def __init__(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        grad: bool,
        module: torch.nn.Module | None = None,
    ) -> None:
        self.target = target
        self.module = module
        self._args, self._kwargs = args, kwargs
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad} if module is not None else {}
        self._buffers = dict(module.named_buffers()) if module is not None else {}
        self._before = {name: buffer.detach().clone() for name, buffer in self._buffers.items()}
        self._given = named(self._named_arguments(args, kwargs))
        self._all_require_grad = grad and module is None and not any(t.requires_grad for t in self._given.values())

    def copy(self) -> Fresh:
        """The arguments with every tensor copied, layout and shared memory kept; those that require grad are leaves."""
        memo: dict[int, Any] = {}
        for tensor in named((self._args, self._kwargs)).values():
            leaf = copy.deepcopy(tensor.detach(), memo)
            floating = leaf.is_floating_point() or leaf.is_complex()
            memo[id(tensor)] = leaf.requires_grad_(tensor.requires_grad or (self._all_require_grad and floating))
        args, kwargs = copy.deepcopy((self._args, self._kwargs), memo)
        return Fresh(args, kwargs, named(self._named_arguments(args, kwargs)))

    def mutated(self, fresh: Fresh) -> dict[str, torch.Tensor]:
        """By name, the arguments and buffers that a call with `fresh` changed or replaced, as they are now."""
        after = named(self._named_arguments(fresh.args, fresh.kwargs))
        before = dict(self._given)
        if self.module is not None:
            after.update(self.module.named_buffers())
            before.update(self._before)
        return {f"{name} (after)": t for name, t in after.items() if _differs(t, before.get(name))}

    @contextlib.contextmanager
    def state_kept(self) -> Iterator[None]:
        """Put the module's buffers back at the end."""
        try:
            yield
        finally:
            self._restore()

    def _restore(self) -> None:
        now = dict(self.module.named_buffers()) if self.module is not None else {}
        with torch.no_grad():
            for name, buffer in self._buffers.items():
                if self.module is not None and now.get(name) is not buffer:
                    owner, _, attribute = name.rpartition(".")
                    setattr(self.module.get_submodule(owner), attribute, buffer)
                if _differs(buffer, self._before[name]):
                    buffer.copy_(self._before[name])

    def _named_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        try:
            inner = self.target if self.module is None or inspect.ismethod(self.target) else self.module.forward
            bound = inspect.signature(inner).bind(*args, **kwargs)
        except (TypeError, ValueError):
            # builtins have no signature; a wrong call will say so itself when it is made
            return {**{f"args[{i}]": a for i, a in enumerate(args)}, **kwargs}
        return dict(bound.arguments)


def _differs(now: torch.Tensor, before: torch.Tensor | None) -> bool:
    """By value: batch norm changes its statistics without counting it as a mutation. NaN differs from itself."""
    return before is None or now.dtype != before.dtype or not torch.equal(now, before)
