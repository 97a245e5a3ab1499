"""simplify(): the same attention in fewer steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from attnfuse.passes.simplify import simplify
from attnfuse.spec import Attention, Bias, Cast, Clamp, Operand, Scale, Shift, Softcap, Step, Tanh

Steps = tuple[Step, ...]
OPERAND = Operand(dtype="float32", dims=("B", "H", "Q", "K"))


def of(steps: Sequence[Step], **fields: object) -> Attention:
    sizes = (1, 2, 3, 4, 8, 8)
    return Attention(("B", "H"), sizes, "float32", "float32", "float32", tuple(steps), (OPERAND,), **fields)  # type: ignore[arg-type]


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
        ((Scale(1e30), Scale(1e30)), (Scale(1e30), Scale(1e30))),
        ((Scale(1e-30), Scale(1e-30)), (Scale(1e-30), Scale(1e-30))),
        ((Scale(1e30), Tanh(), Scale(1e30)), (Scale(1e30), Tanh(), Scale(1e30))),
        ((Cast("float16"), Scale(2.0), Scale(0.5), Cast("float16")), (Cast("float16"),)),
    ],
)
def test_steps(steps: Steps, expected: Steps) -> None:
    spec = of(steps)
    assert simplify(spec).steps == expected
    assert simplify(simplify(spec)) == simplify(spec)


# -- what the steps do, by the ops themselves

#: From numbers that a product of two leaves float32 with to plain ones, powers of two so that nothing is rounded.
FACTORS = [2.0**n for n in (-100, -60, -2, -1, 0, 1, 2, 60, 100)] + [-1.0, -0.5, -4.0, 0.0]
FACTOR = st.sampled_from([*FACTORS, *[1.0, 0.5, 2.0, 0.25] * 4])
SCALES = st.builds(Scale, FACTOR)
STEP: st.SearchStrategy[Step] = st.one_of(
    SCALES,
    SCALES,
    SCALES,
    st.just(Tanh()),
    st.sampled_from([Cast("float16"), Cast("float16"), Clamp(), Clamp(-2.0, 8.0), Shift(0.0), Shift(1.0)]),
    st.sampled_from([Scale(operand=0), Softcap(4.0), Bias(0)]),
)
#: Those of softcaps, and of casts with nothing between them, are rare among others.
RUNS = st.one_of(
    st.lists(STEP, max_size=3),
    st.lists(SCALES, min_size=2, max_size=3),
    st.builds(lambda a, b: [a, Tanh(), b], SCALES, SCALES),
    st.builds(lambda a, b: [Cast("float16"), a, b, Cast("float16")], SCALES, SCALES),
)
STEPS = st.lists(RUNS, min_size=1, max_size=3).map(lambda runs: tuple(x for run in runs for x in run))
SCORES = torch.tensor([0.0, -0.0, 1.0, -0.75, 3.0, -20.0, 300.0, 1e5, -1e20, 2e38, math.inf, -math.inf, math.nan])
OPERANDS = torch.tensor([0.5, -2.0, 4.0])


def applied(steps: Sequence[Step], s: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
    """The scores after the steps, each by its own op in float32."""
    for step in steps:
        if isinstance(step, Scale):
            s = s * (step.value if step.operand is None else operand)
        elif isinstance(step, Shift):
            s = s + step.value
        elif isinstance(step, Bias):
            s = s + step.alpha * operand
        elif isinstance(step, Clamp):
            s = s.clamp(step.low, step.high) if step != Clamp() else s
        elif isinstance(step, Tanh):
            s = s.tanh()
        elif isinstance(step, Softcap):
            s = step.cap * (s / step.cap).tanh()
        else:
            assert step == Cast("float16")
            s = s.half().float()
    return s


GRID = SCORES[:, None].expand(-1, len(OPERANDS))


def assert_same(a: Sequence[Step], b: Sequence[Step], exact: bool) -> None:
    found, wanted = (applied(steps, GRID, OPERANDS) for steps in (a, b))
    if not exact:
        # what overflows on the way, or is lost, may be kept instead
        plain = wanted.isfinite() & (GRID.abs() <= 1e5) & (wanted != 0.0)
        # a number that was finite all the way stays finite
        assert not found[GRID == 0.0].isnan().logical_and(~wanted[GRID == 0.0].isnan()).any()
        found, wanted = found[plain], wanted[plain]
    else:
        # factors of a plain size do not lead these beyond float32
        near = (GRID.abs() <= 1e20) | ~GRID.isfinite()
        found, wanted = found[near], wanted[near]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-30, equal_nan=True)


def tame(steps: Sequence[Step]) -> bool:
    """Whether no factor leads out of float32 or back into it."""
    return all(not isinstance(s, Scale) or s.value == 0.0 or 0.1 < abs(s.value) < 10.0 for s in steps)


def test_fewer_steps_give_the_same_scores() -> None:
    met = {"shorter": 0, "softcap": 0, "the same": 0}

    @settings(max_examples=300)
    @given(STEPS)
    def check(steps: Steps) -> None:
        found = simplify(of(steps)).steps
        assert len(found) <= len(steps)
        met["shorter"] += len(found) < len(steps)
        met["softcap"] += any(isinstance(s, Softcap) and s not in steps for s in found)
        met["the same"] += found == steps
        assert_same(found, steps, exact=tame(steps))

    check()
    assert min(met.values()) > 5, met


def lost(steps: Sequence[Step]) -> torch.Tensor:
    """Which scores become less than the least number on the way."""
    found = torch.zeros_like(GRID, dtype=torch.bool)
    for i, step in enumerate(steps):
        if isinstance(step, Scale) and step.value != 0.0:
            before, after = (applied(steps[:n], GRID, OPERANDS) for n in (i, i + 1))
            found |= (after.abs() < torch.finfo(torch.float32).tiny) & (before != 0.0)
    return found


@settings(max_examples=300)
@given(STEPS)
@example((Scale(2.0), Scale(0.5)))
@example((Scale(4.0), Tanh(), Scale(2.0), Scale(0.5)))
def test_scores_overflow_where_they_did_if_they_must(steps: Steps) -> None:
    found = simplify(of(steps, nan_policy="eager")).steps
    # a factor that is joined may keep what was lost
    kept = ~lost(steps) & ~lost(found)
    a, b = (applied(s, GRID, OPERANDS)[kept] for s in (found, steps))
    assert torch.equal(a.isinf(), b.isinf()) and torch.equal(a.isnan(), b.isnan())


@settings(max_examples=300)
@given(STEPS, st.sampled_from(["skip", "eager"]))
def test_what_is_simple_stays_as_it_is(steps: Steps, policy: str) -> None:
    once = simplify(of(steps, nan_policy=policy, weight_steps=(Scale(2.0), Scale(0.5))))
    assert simplify(once) == once
    assert once.weight_steps == () or policy == "eager"


@given(STEPS)
def test_steps_that_can_be_joined_are_not_left(steps: Steps) -> None:
    left = simplify(of(steps)).steps
    assert not {Scale(1.0), Shift(0.0), Clamp()} & set(left)
    for a, b in itertools.pairwise(left):
        factors = [s.value for s in (a, b) if isinstance(s, Scale) and s.operand is None]
        assert len(factors) < 2 or not 1e-30 < abs(factors[0] * factors[1]) < 1e30
        assert a != b or not isinstance(a, Cast)
