"""Makes bfloat16 in Triton's interpreter what it is on a device.

The interpreter keeps bfloat16 numbers as the 16 bits they have, and multiplies those bits as integers in tl.dot; it cuts
float32 numbers off instead of rounding them to the nearest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def widened(bits: np.ndarray) -> np.ndarray:
    """float32 for the bits of bfloat16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(x: np.ndarray) -> np.ndarray:
    """The bits of the bfloat16 nearest to float32 x, ties to even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    up = ((bits + half) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), up)


def mend() -> None:
    """Replace what the interpreter does wrong, for this process."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    dot, cast, convert = builder.create_dot, builder.cast_impl, builder.create_fp_to_fp

    def as_float(x: Any) -> Any:
        return handle(widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return dot(self, as_float(a), as_float(b), d, *rest)

    def between(x: Any, dtype: Any) -> Any:
        source, target = x.dtype.scalar, dtype.scalar
        if tl.bfloat16 not in (source, target) or source == target:
            return None
        if target == tl.bfloat16:
            return handle(rounded(x.data.astype(np.float32)), tl.bfloat16)
        return handle(widened(x.data).astype(interpreter._get_np_dtype(target)), target)

    def cast_impl(self: Any, x: Any, dtype: Any) -> Any:
        found = between(x, dtype)
        return cast(self, x, dtype) if found is None else found

    def create_fp_to_fp(self: Any, x: Any, dtype: Any, mode: Any) -> Any:
        found = between(x, dtype)
        return convert(self, x, dtype, mode) if found is None else found

    builder.create_dot, builder.cast_impl, builder.create_fp_to_fp = create_dot, cast_impl, create_fp_to_fp
