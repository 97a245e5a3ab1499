"""Drawn programs through torch.compile onto the Triton kernels, interpreted."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from kernel_cases import INF, make_spec
from paged_programs import Sizes, program, tensors

import attnfuse
from attnfuse import testing
from attnfuse.expr import causal
from attnfuse.spec import Bias, ReplaceFill
from attnfuse.testing import graph_masks

OPTIONS = {"inner": "aot_eager", "kernel": "triton", "strict": True}
# the interpreter takes its time: a few here, the rest by the long profile
EXAMPLES = 200 if os.environ.get("HYPOTHESIS_PROFILE") == "long" else 6
FEW = hypothesis.settings(max_examples=EXAMPLES, phases=[hypothesis.Phase.generate])


@FEW
@hypothesis.given(st.data())
def test_drawn_inputs_hold_the_bar(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    # in low precision the rounded result gives a rounded delta, which shows where scores are large (docs/kernels.md)
    gains = (1.0, 0.0, 4.0) if dtype == torch.float32 else (1.0, 0.0)
    mask = data.draw(st.sampled_from([None, "bool", "additive"]))
    drawn = data.draw(testing.inputs(dtype=dtype, mask=mask, gains=gains))

    def attend(q, k, v, mask=None):
        # spelled out: SDPA's CPU kernels keep weights in float32, which no kernel of a GPU does
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(-1) @ v

    attnfuse.reset()
    torch.compiler.reset()
    attnfuse.verify(attend, options=OPTIONS, **drawn).raise_if_failed()


@FEW
@hypothesis.given(testing.programs())
def test_drawn_programs_are_right(program: testing.Program) -> None:
    attnfuse.reset()
    torch.compiler.reset()
    # what Triton cannot do is left as it was, and right all the same
    testing.check_program(program, options={"kernel": "triton"})


@FEW
@hypothesis.given(graph_masks.mask_programs(5))
def test_drawn_masks_are_right(program: graph_masks.MaskProgram) -> None:
    attnfuse.reset()
    torch.compiler.reset()
    run = torch.compile(program.function, backend="attnfuse", options=OPTIONS | {"inner": "eager"})
    found, expected = run(**program.inputs()), program.function(**program.inputs())
    (report,) = attnfuse.reports()
    for site, a, b in zip(report.sites, found, expected, strict=True):
        assert site.kernel == "triton"
        torch.testing.assert_close(
            a, b, rtol=1e-5, atol=1e-5, equal_nan=True, msg=lambda text, s=site: f"{s.reads}: {text}"
        )


@pytest.mark.parametrize("grad", [False, True])
def test_ops_pass_opcheck(grad: bool) -> None:
    q, k, v = (torch.randn(1, 2, 20, 8, requires_grad=grad) for _ in range(3))
    bias = torch.randn(1, 2, 20, 20, requires_grad=grad)
    spec = make_spec(q, k, v, [bias], steps=(Bias(0), ReplaceFill(causal(), -INF)))
    torch.library.opcheck(
        torch.ops.attnfuse.attention.default,
        (q, k, v, [bias], None, None, None, spec.text, "triton", True),
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize(("form", "Q"), [("blocks", 1), ("blocks of heads", 24), ("slots", 1)])
def test_paged_caches_are_read_through_the_table(form, Q):
    given = tensors(Sizes(Q=Q, M=9), form)
    run = program(form, "repeated")
    torch.compiler.reset()
    attnfuse.reset()
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(run, backend="attnfuse", options=OPTIONS)(**given), run(**given), rtol=1e-3, atol=1e-4
        )
    (site,) = (s for r in attnfuse.reports() for s in r.sites)
    assert site.kernel == "triton" and site.spec is not None and site.spec.paged
