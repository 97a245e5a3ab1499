"""Gives Triton's interpreter the additions by tensor descriptor, which it lacks: to what lies in the tensor, one at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter


def mend() -> None:
    """Add them to the interpreter's builder, for this process."""

    def create_descriptor_reduce(self: Any, kind: Any, descriptor: Any, value: Any, indices: Any) -> Any:
        if kind != ir.DESCRIPTOR_REDUCE_KIND.ADD or value.dtype != tl.float32:
            raise NotImplementedError(f"{kind} of {value.dtype}")
        places, inside = descriptor.materialize_pointers(indices)
        mask = interpreter.TensorHandle(np.broadcast_to(inside, places.data.shape), tl.int1)
        relaxed, device = ir.MEM_SEMANTIC.RELAXED, ir.MEM_SYNC_SCOPE.GPU
        return self.create_atomic_rmw(ir.ATOMIC_OP.FADD, places, value, mask, relaxed, device)

    interpreter.InterpreterBuilder.create_descriptor_reduce = create_descriptor_reduce
