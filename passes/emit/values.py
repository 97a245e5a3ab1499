"""Writes nodes that compute an expression: operands and tables that the graph does not have."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import fx

from attnfuse import reasons
from attnfuse.expr import Algebra, Apply, Const, Expr, Index, Linear
from attnfuse.passes.emit.edits import EmitError, known

if TYPE_CHECKING:
    from attnfuse.passes.emit.writer import NodeWriter

from attnfuse.passes.graph.labels import Labels
from attnfuse.passes.masks.terms import Axis, OpCall, Symbol, Tensor, depends


class Values:
    """Writes nodes that compute an expression for all values of some indices, one dim for each."""

    def __init__(self, writer: NodeWriter, labels: Labels) -> None:
        self.writer = writer
        self.dims = [dim[0] for dim in labels]
        self.done: dict[Expr, Any] = {}

    def tensor(self, e: Expr, dtype: torch.dtype) -> fx.Node:
        """The expression as a tensor of `dtype`."""
        w = self.writer
        found = self._cast(self.as_tensor(self.run(e), dtype), dtype)
        if self.dims:
            found = w.method("expand", found, *(w.size_of(atom) for atom in self.dims))
        return w.checked(found, "a computed operand", [atom.size for atom in self.dims], dtype)

    def run(self, e: Expr) -> Any:
        """A number; or a node: of a symbolic number, or a tensor with a dim for each of `dims`, or without dims.

        Tensors of integers are int64 and those of truths bool, whatever they are in the graph: the arithmetic of expressions
        has no end, and an index in uint8 would be a mask.
        """
        if e not in self.done:
            found = self._run(e)
            if _is_tensor(found):
                if e.type != "float":
                    found = self._cast(found, torch.bool if e.type == "bool" else torch.int64)
                used = {self._dim_of(x) for x in depends(e)}
                sizes = [atom.size if d in used else 1 for d, atom in enumerate(self.dims)] if used else []
                self.writer.checked(found, "a part of a computed operand", sizes)
            self.done[e] = found
        return self.done[e]

    def as_tensor(self, x: Any, dtype: torch.dtype | None = None) -> fx.Node:
        if _is_tensor(x):
            return x
        return self.writer.call(torch.full, ((), x), {"dtype": dtype or torch.int64, "device": self.writer.device})

    def _run(self, e: Expr) -> Any:
        w = self.writer
        if isinstance(e, Const):
            return bool(e.value) if e.type == "bool" else int(e.value) if e.type == "int" else e.value
        if isinstance(e, (Index, Axis)):
            return self._line(e)
        if isinstance(e, Symbol):
            return w.size(e.value)
        if isinstance(e, Linear):
            total: Any = e.const
            # symbolic numbers do not wrap as tensors do
            wraps = not Algebra().is_exact(e)
            for c, t in e.terms:
                x = self._whole(t, wraps)
                x = w.call(operator.mul, (x, c)) if c != 1 else x
                total = x if isinstance(total, int) and total == 0 else w.call(operator.add, (total, x))
            return total
        if isinstance(e, Tensor):
            return self._element(e)
        if isinstance(e, OpCall):
            return self._call(e)
        assert isinstance(e, Apply)
        args = [self.run(a) for a in e.args]
        if e.op in ("and", "or"):
            total = self.as_tensor(args[0], torch.bool)
            for x in args[1:]:
                op = torch.logical_and if e.op == "and" else torch.logical_or
                total = w.call(op, (total, self.as_tensor(x, torch.bool)))
            return total
        if e.op == "int":
            return w.method("to", self.as_tensor(args[0], torch.bool), torch.int64)
        if e.op in ("floordiv", "mod"):
            divided = operator.floordiv if e.op == "floordiv" else operator.mod
            return w.call(divided, (self._whole(e.args[0], False), args[1]))
        floats = [known(x).dtype for x, a in zip(args, e.args) if a.type == "float" and _is_tensor(x)]
        float_ = floats[0] if floats else torch.float64
        kinds = [torch.bool if a.type == "bool" else torch.int64 if a.type == "int" else float_ for a in e.args]
        return w.call(_FUNCTIONS[e.op], tuple(self._cast(self.as_tensor(x, k), k) for x, k in zip(args, kinds)))

    def _whole(self, e: Expr, as_tensor: bool) -> Any:
        """An integer expression in int64, whatever the dtype of the tensor that it comes from."""
        x = self.run(e)
        return self._cast(self.as_tensor(x), torch.int64) if as_tensor or _is_tensor(x) else x

    def _cast(self, x: fx.Node, dtype: torch.dtype) -> fx.Node:
        return x if known(x).dtype == dtype else self.writer.method("to", x, dtype)

    def _element(self, e: Tensor) -> fx.Node:
        w, node = self.writer, self.writer.here(e.node)
        index: list[fx.Node] = []
        for i in e.index:
            at = self.run(i)
            if not _is_tensor(at):
                node = w.call(torch.select, (node, len(index), at))
                continue
            if not known(at).dim() and depends(e):
                # PyTorch's fake tensors do not broadcast index tensors without dims
                at = w.method("view", at, *[1] * len(self.dims))
            index.append(at)
        return w.call(torch.ops.aten.index.Tensor, (node, index)) if index else node

    def _dim_of(self, e: Expr) -> int:
        # an index of the query or key is the last dim, batch dims come before it
        return self.dims.index(e.atom if isinstance(e, Axis) else self.dims[-1])

    def _line(self, e: Index | Axis) -> fx.Node:
        w = self.writer
        at = self._dim_of(e)
        line = w.call(torch.arange, (w.size_of(self.dims[at]),), {"device": w.device})
        shape = [-1 if d == at else 1 for d in range(len(self.dims))]
        return w.method("view", line, *shape)

    def _call(self, e: OpCall) -> fx.Node:
        w = self.writer
        args = []
        for i, (a, dtype) in enumerate(zip(e.args, e.dtypes, strict=True)):
            x = self.run(a) if isinstance(a, Expr) else a
            if dtype is not None:
                x = self._cast(self.as_tensor(x, dtype), dtype)
                if e.scalars and not e.scalars[i] and not known(x).dim():
                    x = w.method("unsqueeze", x, 0)
            args.append(x)
        found = w.call(e.target, tuple(args), dict(e.kwargs))
        if known(found).dtype != e.dtype:
            raise EmitError(reasons.MASK_DTYPE_DIFFERS(op=e.target, found=known(found).dtype, wanted=e.dtype))
        # nothing but a dim that was added above
        return w.method("squeeze", found, 0) if known(found).dim() and not depends(e) else found


def _is_tensor(x: Any) -> TypeGuard[fx.Node]:
    """Whether it is a node of a tensor, as opposed to a number or the node of a symbolic one."""
    return isinstance(x, fx.Node) and isinstance(known(x), torch.Tensor)


_FUNCTIONS: dict[str, Any] = {
    "min": torch.minimum,
    "max": torch.maximum,
    "abs": torch.abs,
    "where": torch.where,
    "le": torch.le,
    "eq": torch.eq,
    "ne": torch.ne,
    "not": torch.logical_not,
}
