"""Sites that are let through give what a kernel's softmax gives, whatever a mask hides; others are refused."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import make_spec
from torch import fx

from attnfuse import reasons
from attnfuse.expr import FALSE, TRUE, Algebra, Const, K, Load, Q, causal, dense
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.reference import scores
from attnfuse.passes.read.fully_masked import fully_masked
from attnfuse.passes.site import Leaf, Refusal, Site
from attnfuse.spec import AddFill, Bias, ReplaceFill, Scale, Shift, Sink, Step

Queries, Keys = 4, 5
VALUES = (-math.inf, torch.finfo(torch.float32).min, -1e9, -1e5, -2000.0, -60.0, 0.0, 60.0, 2000.0, 1e5, 1e9)
algebra = Algebra(Queries, Keys)
KEEPS = {
    "all": TRUE,
    "none": FALSE,
    "mask": dense(0),
    "causal": causal(),
    "more": causal(2),
    "less": causal(-1),
    "window": algebra.and_(causal(), algebra.compare("lt", algebra.sub(Q, K), Const(2))),
    "one key": algebra.compare("eq", K, Const(2)),
    "length": algebra.compare("lt", K, Load(1, "int64")),
}
FILLS = st.builds(
    lambda kind, keep, value: kind(KEEPS[keep], value),
    st.sampled_from([ReplaceFill, AddFill]),
    st.sampled_from(sorted(KEEPS)),
    st.sampled_from(VALUES),
)
STEPS: st.SearchStrategy[Step] = st.one_of(
    FILLS,
    FILLS,
    st.builds(Shift, st.sampled_from([0.0, 1.0, -3.0, 50.0])),
    st.sampled_from([Scale(0.5), Scale(-30.0), Scale(30.0), Scale(1.0, operand=3), Bias(2)]),
)


@dataclass
class Case:
    steps: list[Step]
    operands: list[torch.Tensor]

    def scores(self, compute: torch.dtype) -> torch.Tensor:
        spec = make_spec(*self.tensors, operands=self.operands, steps=tuple(self.steps))
        return scores(spec, Inputs(*self.tensors, self.operands), compute)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(1)
        q, k, v = (torch.randn(1, n, 4, generator=generator) for n in (Queries, Keys, Keys))
        return q, k, v

    def site(self, dtype: torch.dtype, **fields: Any) -> Site:
        """A site of that spec whose scores are added to in `dtype`."""
        graph = fx.Graph()
        node = graph.placeholder("q")
        node.meta["val"] = self.tensors[0]
        added = graph.call_function(torch.ops.aten.add.Tensor, (node, node))
        added.meta["val"] = torch.zeros((), dtype=dtype)
        leaf = Leaf(node, ())
        spec = make_spec(*self.tensors, operands=self.operands, steps=tuple(self.steps))
        atoms: tuple[Any, ...] = ((), (), (), (), ())
        return Site(spec, leaf, leaf, leaf, (), *atoms, node, node, (), frozenset({added}), **fields)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Rows without a key, with one, and with all of them."""
    kept = draw(st.lists(st.sampled_from([0, 4, 16, 31, 21]), min_size=Queries, max_size=Queries))
    mask = torch.tensor([[bool(bits & (1 << k)) for k in range(Keys)] for bits in kept])[None]
    length = torch.tensor([[[draw(st.integers(0, Keys))]]])
    large = draw(st.sampled_from([1.0, 1.0, 1e5]))
    bias = torch.linspace(-large, large, Queries * Keys).reshape(1, Queries, Keys)
    if draw(st.booleans()):
        bias = torch.where(mask, 0.0, -math.inf)
    return Case(draw(st.lists(STEPS, min_size=1, max_size=3)), [mask, length, bias, torch.full((1, 1, 1), -40.0)])


def differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    return not torch.allclose(a.double(), b.double(), rtol=0.02, atol=0.02, equal_nan=True)


def causes(found: Refusal | None, *known: reasons.Cause) -> bool:
    assert found is None or found.reason.cause in known
    return found is not None


def test_a_softmax_by_its_log_sum_exp_is_one_in_every_row() -> None:
    met = [0, 0, 0]

    @given(cases())
    @settings(max_examples=600)
    def check(case: Case) -> None:
        site = case.site(torch.float32, by_log_sum_exp=True)
        refused = causes(fully_masked(site), reasons.LOG_SUM_EXP_OF_MASKED_ROWS)
        s = case.scores(torch.float32)
        wrong = differ(torch.exp(s - torch.logsumexp(s, -1, keepdim=True)), s.softmax(-1))
        met[0 if wrong else 1 + refused] += 1
        assert refused or not wrong
        # another spelling is softmax's own
        assert fully_masked(replace(site, by_log_sum_exp=False)) is None

    check()
    assert min(met) >= 5


def test_scores_that_are_added_to_in_float64_are_as_exact_in_float32() -> None:
    met = [0, 0, 0]

    @given(cases())
    @settings(max_examples=600)
    def check(case: Case) -> None:
        refused = causes(fully_masked(case.site(torch.float64)), reasons.MASK_IN_FLOAT64)
        exact, held = case.scores(torch.float64), case.scores(torch.float32)
        wrong = differ(exact.softmax(-1), held.softmax(-1))
        met[0 if wrong else 1 + refused] += 1
        assert refused or not wrong
        assert fully_masked(case.site(torch.float32)) is None

    check()
    assert min(met) >= 5


def test_a_sink_beside_the_maximum_of_the_scores_is_one_of_the_scores() -> None:
    met = [0, 0, 0]

    @given(cases(), st.sampled_from([-3.0, 0.0, 2.0]))
    @settings(max_examples=600)
    def check(case: Case, sink: float) -> None:
        site = case.site(torch.float32, by_own_maximum=True)
        site = replace(site, spec=replace(site.spec, sink=Sink(sink)))
        refused = causes(fully_masked(site), reasons.SINK_BY_OWN_MAXIMUM)
        s = case.scores(torch.float32)
        top = s.amax(-1, keepdim=True)
        e = torch.exp(s - top)
        weights = e / (e.sum(-1, keepdim=True) + torch.exp(sink - top))
        joined = torch.cat([s, torch.full_like(top, sink)], -1).softmax(-1)[..., :-1]
        wrong = differ(weights, joined)
        met[0 if wrong else 1 + refused] += 1
        assert refused or not wrong

    check()
    assert min(met) >= 5


@given(st.integers(-2, 3), st.sampled_from(VALUES), st.sampled_from([ReplaceFill, AddFill]))
def test_a_causal_fill_that_leaves_every_row_a_key_is_let_through(offset: int, value: float, kind: Any) -> None:
    case = Case([kind(causal(offset), value)], [])
    site = case.site(torch.float32, by_log_sum_exp=True)
    hides = offset < 0 and math.isfinite(value)
    assert (fully_masked(site) is not None) == ((value < -100.0 and hides) or value > 100.0)
