"""One eager call as a list of the ATen operations it ran, and which of them each operand came from."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from attnfuse._compat import OpOverload, TorchDispatchMode, alias_key, arguments_of, pytree, writes


@dataclass(frozen=True)
class Operand:
    """A tensor that an operation took: the operations that made it or wrote to its memory, none for an input."""

    makers: tuple[int, ...]
    shape: tuple[int, ...]
    parameter: bool


@dataclass(frozen=True)
class Op:
    """in_call: it ran inside a call of scaled_dot_product_attention."""

    index: int
    name: str
    operands: tuple[Operand, ...]
    shape: tuple[int, ...]
    pointwise: bool
    in_call: bool


class Trace(TorchDispatchMode):
    """Records what runs inside the block into `ops`; `calls` counts calls of scaled_dot_product_attention."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.calls = 0
        self.depth = 0
        self._parameters = {id(p) for p in parameters}
        self._maker: dict[int, int] = {}
        self._writers: dict[int, list[int]] = collections.defaultdict(list)
        # ids name tensors only while these live
        self._alive: list[Any] = [*parameters]

    def __torch_dispatch__(self, op: OpOverload, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = tuple(
            self._operand(x) for x in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(x, torch.Tensor)
        )
        result = op(*args, **kwargs)
        index = len(self.ops)
        results = [x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
        shape = tuple(results[0].shape) if results else ()
        name = op.name().split("::")[1].split(".")[0]
        self.ops.append(Op(index, name, operands, shape, torch.Tag.pointwise in op.tags, self.depth > 0))
        if writes(op):
            for tensor in _written(op, args, kwargs):
                self._writers[alias_key(tensor)].append(index)
                self._made(tensor, index)
        for tensor in results:
            self._made(tensor, index)
        return result

    def _operand(self, tensor: torch.Tensor) -> Operand:
        maker = self._maker.get(id(tensor), -1)
        later = [w for w in self._writers.get(alias_key(tensor), ()) if w > maker]
        makers = ([maker] if maker >= 0 else []) + later
        parameter = not makers and (isinstance(tensor, torch.nn.Parameter) or id(tensor) in self._parameters)
        return Operand(tuple(makers), tuple(tensor.shape), parameter)

    def _made(self, tensor: torch.Tensor, index: int) -> None:
        self._maker[id(tensor)] = index
        self._alive.append(tensor)

    @contextlib.contextmanager
    def attention_call(self) -> Iterator[None]:
        """What runs inside belongs to one call of scaled_dot_product_attention."""
        self.calls += self.depth == 0
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1


def _written(op: OpOverload, args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
    written = {a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    for name, value in arguments_of(op, args, kwargs).items():
        if name in written:
            yield from (x for x in pytree.tree_leaves(value) if isinstance(x, torch.Tensor))


class _Calls(TorchFunctionMode):
    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") == "scaled_dot_product_attention":
            with self.trace.attention_call():
                return function(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def traced(model: torch.nn.Module, call: Callable[[], Any]) -> tuple[Any, Trace]:
    """The result of `call()`, which runs `model`, and the trace of it."""
    trace = Trace(list(model.parameters()))
    called = F.scaled_dot_product_attention

    # the mode is off inside of other torch functions, multi_head_attention_forward say: hence the patch as well
    def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> Any:
        with trace.attention_call():
            return called(*args, **kwargs)

    with mock.patch.object(F, "scaled_dot_product_attention", scaled_dot_product_attention), _Calls(trace), trace:
        return call(), trace
