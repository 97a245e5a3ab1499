"""Property tests for attention: Hypothesis strategies for inputs, programs that spell attention, and near misses.

    @given(testing.inputs())
    def test_my_model(inputs):
        attnfuse.verify(my_attention, **inputs).raise_if_failed()

Needs the extra `test`: pip install attnfuse[test].
"""

from __future__ import annotations

try:
    import hypothesis as _hypothesis
except ImportError as error:
    raise ImportError("attnfuse.testing draws its cases with hypothesis: pip install attnfuse[test]") from error

from attnfuse.testing.check import Checked, check_program
from attnfuse.testing.decoys import decoys
from attnfuse.testing.inputs import Shape, inputs, masks, shapes, tensors
from attnfuse.testing.program import Argument, Program
from attnfuse.testing.spellings import programs

assert _hypothesis.__name__, "imported so that its absence is told before anything else fails"

__all__ = [
    "Argument",
    "Checked",
    "Program",
    "Shape",
    "check_program",
    "decoys",
    "inputs",
    "masks",
    "programs",
    "shapes",
    "tensors",
]
