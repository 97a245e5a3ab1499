"""What hides keys for good, and that kernels which skip it leave nothing out that has a weight."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import make_spec, qkv, randn

from attnfuse.expr import causal
from attnfuse.kernels import reference
from attnfuse.kernels.fills import HIDDEN_BELOW, VANISHES, Hiding, hiding
from attnfuse.kernels.inputs import Inputs
from attnfuse.spec import AddFill, Bias, Cast, ReplaceFill, Scale, Shift, Softcap

INF = math.inf
LOW = -3e38


@pytest.mark.parametrize(
    "steps, fills, with_biases",
    [
        ([ReplaceFill(causal(), -INF)], {0}, {0}),
        ([ReplaceFill(causal(), -1e4)], {0}, {0}),
        # near enough to scores to have a weight beside them
        ([ReplaceFill(causal(), -100.0)], set(), set()),
        ([AddFill(causal(), -INF)], {0}, {0}),
        ([AddFill(causal(), LOW)], {0}, {0}),
        # added to a score of any size
        ([AddFill(causal(), -1e4)], set(), set()),
        ([AddFill(causal(), LOW), Cast("bfloat16")], {0}, {0}),
        ([AddFill(causal(), LOW), Scale(0.5)], {0}, {0}),
        ([AddFill(causal(), LOW), Scale(-1.0)], set(), set()),
        ([AddFill(causal(), -INF), Softcap(30.0)], set(), set()),
        ([ReplaceFill(causal(), -1e4), Shift(3.0)], set(), set()),
        ([ReplaceFill(causal(), LOW), Shift(1e30)], set(), set()),
        ([ReplaceFill(causal(), -1e4), ReplaceFill(causal(), -50.0)], set(), set()),
        ([Bias(0, 1.0)], set(), {0}),
        ([Bias(0, -1.0)], set(), set()),
        ([Bias(0, 1.0), Scale(2.0)], set(), {0}),
        ([Bias(0, 1.0), Softcap(30.0)], set(), set()),
        ([Bias(0, 1.0, keep=causal()), AddFill(causal(), LOW)], {1}, {0, 1}),
        ([Bias(0, 1.0, keep=causal()), AddFill(causal(), -1.0)], set(), set()),
        ([Bias(0, 1.0, keep=causal())], set(), set()),
        # a kernel that does not look at the bias may not skip what it can lift
        ([Bias(0, 1.0), AddFill(causal(), LOW)], set(), {0, 1}),
        ([Bias(0, 1.0), AddFill(causal(), -INF)], {1}, {0, 1}),
    ],
)
def test_which_steps_hide(steps, fills, with_biases):
    q, k, v = qkv(1, 1, 6, 6, 8)
    operands = [randn(1, 1, 6, 6)] if any(isinstance(s, Bias) for s in steps) else []
    spec = make_spec(q, k, v, operands, steps=tuple(steps))
    assert hiding(spec).steps == fills
    assert hiding(spec, in_biases=True).steps == with_biases


def test_nothing_hides_where_eager_nan_is_asked_for_or_weights_are_filled():
    q, k, v = qkv(1, 1, 6, 6, 8)
    steps = (ReplaceFill(causal(), -INF),)
    assert hiding(make_spec(q, k, v, steps=steps, nan_policy="eager")) == Hiding()
    spec = make_spec(q, k, v, steps=steps, weight_steps=(ReplaceFill(causal(), 0.5),))
    assert hiding(spec) == hiding(spec, in_biases=True) == Hiding()


_STEPS = st.one_of(
    st.builds(ReplaceFill, st.just(causal()), st.sampled_from([-INF, LOW, -1e30, -1e9, -1e4, -300.0, -100.0])),
    st.builds(AddFill, st.just(causal()), st.sampled_from([-INF, LOW, -1e30, -1e9, -1e4, -100.0])),
    st.builds(Scale, st.sampled_from([0.5, 1.0, 3.0, -1.0])),
    st.builds(Shift, st.sampled_from([-2.0, 5.0, 200.0])),
    st.just(Softcap(4.0)),
)


@given(steps=st.lists(_STEPS, min_size=1, max_size=4), seed=st.integers(0, 3))
def test_what_hides_has_no_weight_in_rows_above_the_doubt(steps, seed):
    """In float64 the score of a key that step i hides is so far below its row's maximum that exp gives 0 in float32."""
    torch.manual_seed(seed)
    q, k, v = qkv(1, 1, 6, 6, 8)
    spec = make_spec(q, k, v, steps=tuple(steps))
    found = hiding(spec)
    scores = reference.scores(spec, Inputs(q.double(), k.double(), v.double()), torch.float64)
    kept = torch.ones(6, 6, dtype=torch.bool).tril()
    top = scores.amax(-1, keepdim=True)
    sure = top > found.doubt
    if found.steps:
        hidden = scores.masked_fill(kept, -INF)
        assert bool(((hidden - top <= -VANISHES) | kept | ~sure | (hidden == -INF)).all())
        assert found.doubt == -INF or found.doubt <= max(0.5 * HIDDEN_BELOW, -VANISHES)
