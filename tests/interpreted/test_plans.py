"""Planned calls of the Triton kernels, interpreted: other tensors of the same kind give what they give without a plan."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import INF, bounds_of, make_spec, qkv, randn

from attnfuse.expr import causal, dense
from attnfuse.kernels import triton
from attnfuse.kernels.inputs import Bounds, Inputs
from attnfuse.kernels.triton import plans
from attnfuse.spec import Bias, ReplaceFill, Scale, Sink

HALF = Scale(0.5)


def plain():
    return qkv(1, 2, 40, 70, 16), [], {"steps": (HALF, ReplaceFill(causal(), -INF))}


def biased():
    """Operands that are broadcast, of which one gets its gradient by queries and one by keys; one tensor as k and v."""
    q, k, _ = qkv(2, 2, 40, 70, 16)
    return (q, k, k), [randn(1, 2, 40, 70), randn(2, 1, 1, 70)], {"steps": (HALF, Bias(0), Bias(1))}


def flagged():
    return qkv(2, 2, 40, 70, 16), [torch.rand(2, 1, 1, 70) < 0.5], {"steps": (HALF, ReplaceFill(dense(0), -INF))}


def sunk():
    """A sink's gradient is added by the host; a log-sum-exp that is differentiated."""
    return qkv(2, 2, 40, 70, 16), [randn(1, 2, 1, 1)], {"steps": (HALF,), "sink": Sink(operand=0), "lse": True}


def grouped():
    """Gradients of keys in float32, summed over heads by the host."""
    q, k, v = randn(2, 4, 3, 16, dtype=torch.bfloat16), *(randn(2, 1, 150, 16, dtype=torch.bfloat16) for _ in "kv")
    return (q, k, v), [], {"steps": (HALF,)}


def dropped():
    return qkv(1, 2, 40, 70, 16), [], {"steps": (HALF,), "dropout": 0.4}


def packed():
    """Sequences whose lengths differ from call to call, as do the tiles they are dealt."""
    first = int(torch.randint(1, 60, ()))
    bounds = bounds_of(first, 60 - first, gap=2)
    return (*qkv(1, 2, 64, 64, 16), bounds), [], {"layout": "packed"}


KINDS = [plain, biased, flagged, sunk, grouped, dropped, packed]


@pytest.mark.parametrize("kind", KINDS)
def test_planned_calls_compute_what_others_do(kind):
    # the first call leaves its key, the second one is recorded, and the third goes by its plan
    for at in range(3):
        (q, k, v, *bounds), operands, fields = kind()
        seed = torch.randint(2**40, (1,)) if "dropout" in fields else None
        spec = make_spec(q, k, v, operands, **fields)
        inputs = Inputs(q, k, v, operands, seed, Bounds(*bounds * 2))
        needs = [x.is_floating_point() for x in inputs.tensors]

        def both(inputs=inputs, spec=spec, needs=needs):
            out, stats = triton.forward(spec, inputs)
            generator = torch.Generator().manual_seed(1)
            dout = torch.randn(out.shape, generator=generator).to(out.dtype)
            dlse = torch.randn(out.shape[:-1], generator=generator) if spec.lse else None
            return [out, stats, *triton.backward(spec, inputs, dout, out, stats, needs, dlse)]

        found = both()
        assert sum(isinstance(x, plans.Plan) for x in plans._plans.values()) == (2 if at else 0)
    plans.forget()
    for a, b in zip(found, both(), strict=True):
        assert (a is None) == (b is None)
        assert a is None or ((a.dtype, a.stride()) == (b.dtype, b.stride()) and torch.equal(a, b))


def test_plans_are_made_and_used_in_and_out_of_inference_mode():
    (q, k, v), _, fields = plain()
    spec = make_spec(q, k, v, **fields)
    want, _ = triton.forward(spec, Inputs(q, k, v))
    for inference in (True, False, True):
        with torch.inference_mode(inference):
            out, _ = triton.forward(spec, Inputs(q, k, v))
        assert torch.equal(out, want) and out.is_inference() == inference
