"""Specs that are drawn: each is right in both orders of the documents, or refused with a reason."""

from __future__ import annotations

import kernel_cases
import operators
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import FLOAT_MIN, INF, make_spec, randn

from attnfuse import expr
from attnfuse.expr import Algebra, causal, dense, window
from attnfuse.kernels import ascend
from attnfuse.kernels.ascend.reading import Reading, read
from attnfuse.spec import AddFill, Bias, Cast, ReplaceFill, Scale, Shift, Softcap

A = Algebra()
POSITIONS = [causal(), causal(3), causal(-2), window(5), A.and_(causal(2), window(4)), A.compare("ne", expr.Q, expr.K)]
# not -1e4: rounding there is as large as what is held to a bar
VALUES = [-INF, FLOAT_MIN, -1e30, -1e9, -50.0, -3.0]


@st.composite
def attentions(draw):
    """(q, k, v, operands, fields): what makes a spec, some of it more than the operators have."""
    groups = draw(st.sampled_from([0, 2]))
    lead = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    Q, K, D, E = (
        draw(st.integers(1, 12)),
        draw(st.integers(1, 12)),
        draw(st.sampled_from([4, 6])),
        draw(st.sampled_from([4, 5])),
    )
    torch.manual_seed(draw(st.integers(0, 1000)))
    shape = (*lead, groups) if groups else lead
    shared = (*lead, 1) if groups else lead
    q, k, v = randn(*shape, Q, D), randn(*shared, K, D), randn(*shared, K, E)
    operands, steps = [], []

    def operand(make):
        sizes = [n if draw(st.booleans()) else 1 for n in (*shape, Q, K)]
        operands.append(make(*sizes))
        return len(operands) - 1

    for _ in range(draw(st.integers(1, 4))):
        kind = draw(
            st.sampled_from(
                ["bias", "replace", "add", "replace", "add", "replace", "scale", "cast", "softcap", "shift"]
            )
        )
        if kind == "scale":
            steps.append(Scale(draw(st.sampled_from([0.5, 0.3, 1.0, -1.0]))))
        elif kind == "bias":
            steps.append(Bias(operand(randn), draw(st.sampled_from([1.0, -0.5]))))
        elif kind in ("replace", "add"):
            keep = draw(st.sampled_from([*POSITIONS, None]))
            if keep is None:
                keep = dense(operand(lambda *sizes: torch.rand(*sizes) > 0.4))
            if draw(st.booleans()):
                keep = A.and_(keep, draw(st.sampled_from(POSITIONS)))
            value = draw(st.sampled_from(VALUES))
            steps.append(ReplaceFill(keep, value) if kind == "replace" else AddFill(keep, value))
        else:
            steps.append({"shift": Shift(1.0), "softcap": Softcap(2.0), "cast": Cast("float32")}[kind])
    if groups:
        names = ("B2",)
        fields = {"broadcast": ((), names, names)}
    else:
        fields = {}
    return q, k, v, operands, {**fields, "steps": tuple(steps), "hidden": draw(st.sampled_from(["nan", "zero"]))}


def taken(spec):
    known = {"scale", "bias", "replace", "add", "cast"}
    return all(step.kind in known for step in spec.steps) and isinstance(read(spec), Reading)


def oracle_is_nan(spec):
    """The oracle's gradients of rows without keys are NaN, also where their weights are 0, unless a fill is all that comes last."""
    infinite = [i for i, s in enumerate(spec.steps) if isinstance(s, (AddFill, ReplaceFill)) and s.value == -INF]
    passes = any(isinstance(spec.steps[i], AddFill) for i in infinite)
    later = any(isinstance(s, Bias) and i > min(infinite, default=i) for i, s in enumerate(spec.steps))
    return spec.hidden == "zero" and (passes or later)


def test_a_drawn_spec_is_right_or_refused():
    counts = {"right": 0, "refused": 0, "left": 0, "masks": 0, "biases": 0}

    @settings(max_examples=300)
    @given(attentions(), st.sampled_from(operators.ORDERS))
    def holds(drawn, order):
        q, k, v, operands, fields = drawn
        spec = make_spec(q, k, v, operands, **fields)
        if not taken(spec):
            counts["refused"] += 1
            assert read(spec) or any(s.kind in ("softcap", "shift") for s in spec.steps)
            return
        with operators.device(order):
            try:
                kernel_cases.check(ascend, q, k, v, operands, backward=not oracle_is_nan(spec), **fields)
            except ValueError as error:
                assert "order may matter" in str(error) or "rows without a key" in str(error)
                counts["left"] += 1
                return
        counts["right"] += 1
        counts["masks"] += any(s.kind in ("replace", "add") for s in spec.steps)
        counts["biases"] += any(s.kind == "bias" for s in spec.steps)

    holds()
    assert counts["right"] > 60 and counts["masks"] > 30 and counts["biases"] > 15 and counts["refused"] > 30, counts
