"""Makes maxima and minima in Triton's interpreter what they are on a device: of a number and NaN, the number.

tl.maximum and tl.minimum skip NaN unless they are asked to pass it on, and so do the reductions; NumPy's maximum passes it on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from triton.runtime import interpreter


def mend() -> None:
    """Replace the element-wise ones, for this process."""
    builder = interpreter.InterpreterBuilder

    def create_maxnumf(self: Any, lhs: Any, rhs: Any) -> Any:
        return self.binary_op(lhs, rhs, np.fmax)

    def create_minnumf(self: Any, lhs: Any, rhs: Any) -> Any:
        return self.binary_op(lhs, rhs, np.fmin)

    builder.create_maxnumf, builder.create_minnumf = create_maxnumf, create_minnumf
