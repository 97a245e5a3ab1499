"""simplify(): the same attention in fewer steps."""

from __future__ import annotations

import pytest

from attnfuse.passes.simplify import simplify
from attnfuse.spec import Attention, Bias, Cast, Clamp, Operand, Scale, Shift, Softcap, Step, Tanh


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ((), ()),
        ((Scale(1.0), Shift(0.0), Clamp()), ()),
        ((Scale(2.0), Scale(0.25)), (Scale(0.5),)),
        ((Scale(2.0), Shift(0.0), Scale(0.5)), ()),
        ((Shift(1.0), Scale(2.0)), (Shift(1.0), Scale(2.0))),
        ((Scale(1e-300), Scale(1e-300)), (Scale(1e-300), Scale(1e-300))),
        ((Scale(2.0, operand=0), Scale(2.0)), (Scale(2.0, operand=0), Scale(2.0))),
        ((Cast("bfloat16"), Bias(0), Cast("float32")), (Bias(0),)),
        ((Cast("float16"), Cast("float16")), (Cast("float16"),)),
        ((Scale(0.1), Tanh(), Scale(50.0)), (Scale(5.0), Softcap(50.0))),
        ((Scale(0.1), Tanh(), Scale(-50.0)), (Scale(0.1), Tanh(), Scale(-50.0))),
    ],
)
def test_steps(steps: tuple[Step, ...], expected: tuple[Step, ...]) -> None:
    operand = Operand(dtype="float32", dims=("B", "H", "Q", "K"))
    spec = Attention(("B", "H"), (1, 2, 3, 4, 8, 8), "float32", "float32", "float32", steps, (operand,))
    assert simplify(spec).steps == expected
    assert simplify(simplify(spec)) == simplify(spec)
