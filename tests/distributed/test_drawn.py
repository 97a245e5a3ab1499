"""Attentions with all that a spec can say, over ranks, are those of whole tensors: the reference in float64 is the oracle."""

from __future__ import annotations

import dataclasses
import io

import pytest
import torch
from attentions import Whole, as_in_float64, filled, oracle, over_ranks, worst
from drawn_attentions import attentions
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run

from attnfuse.distributed.layouts import LAYOUTS

ALGORITHMS = ("ring", "burst", "gather", "local")
#: Short ones, some of them shorter than there are ranks.
LENGTHS = (16, 24, 1, 3, 7, 17, 33)


@st.composite
def wholes(draw):
    """(an attention of one device, whether its gradients are defined), written down."""
    drawn = draw(attentions((8, 1, 5), LENGTHS).filter(lambda d: d.spec.layout == "dense"))
    spec = dataclasses.replace(drawn.spec, dropout=0.0)
    if draw(st.booleans()):
        spec = dataclasses.replace(spec, sizes=(*spec.sizes[:-4], None, None, *spec.sizes[-2:]))
    made = filled(dataclasses.replace(spec, sizes=_sizes(drawn.inputs, spec)), drawn.inputs.operands)
    whole = dataclasses.replace(made, spec=spec, q=drawn.inputs.q, k=drawn.inputs.k, v=drawn.inputs.v)
    written = io.BytesIO()
    torch.save(dataclasses.asdict(dataclasses.replace(whole, spec=None)) | {"spec": spec.text}, written)
    return written.getvalue(), drawn.trains


def _sizes(inputs, spec):
    batch = torch.broadcast_shapes(*(x.shape[:-2] for x in inputs.tensors))
    return (*batch, inputs.q.shape[-2], inputs.keys, inputs.q.shape[-1], inputs.v.shape[-1])


def read(written: bytes) -> Whole:
    from attnfuse.spec import Attention

    found = torch.load(io.BytesIO(written))
    return Whole(**{**found, "spec": Attention.parse(found["spec"])})


def one_case(written, trains, layout, algorithms, kernel):
    torch.set_num_threads(1)
    whole = read(written)
    if kernel == "reference":
        whole = as_in_float64(whole)
    expected = oracle(whole)
    found = {}
    for algorithm in algorithms:
        results = over_ranks(whole, layout, algorithm, kernel=kernel)
        if not trains:
            results.grads = expected.grads
        found[algorithm] = worst(results, expected)
    return found


@given(wholes(), st.sampled_from((2, 4, 2, 1)), st.sampled_from(LAYOUTS))
@settings(max_examples=25)
def test_drawn_attentions(drawn, ranks, layout):
    for found in run(one_case, ranks, *drawn, layout, ALGORITHMS, "reference"):
        assert {name: error for name, error in found.items() if not error < 1e-8} == {}


@pytest.mark.slow
@given(wholes(), st.sampled_from((2, 4, 3)), st.sampled_from(LAYOUTS))
@settings(max_examples=400)
def test_many_drawn_attentions(drawn, ranks, layout):
    for found in run(one_case, ranks, *drawn, layout, ALGORITHMS, "reference"):
        assert {name: error for name, error in found.items() if not error < 1e-8} == {}
