"""Attentions with all that a spec can say, over ranks, are those of whole tensors: the reference in float64 is the oracle."""

from __future__ import annotations

import dataclasses
import io

import pytest
import torch
import torch.distributed as dist
from attentions import Results, Whole, as_in_float64, filled, oracle, over_ranks, worst
from drawn_attentions import attentions
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run

from attnfuse import ops
from attnfuse.distributed import steps
from attnfuse.distributed.layouts import LAYOUTS
from attnfuse.kernels import choose

ALGORITHMS = ("ring", "burst", "gather", "local")
#: Short ones, some of them shorter than there are ranks.
LENGTHS = (16, 24, 1, 3, 7, 17, 33)


class Written:
    """An attention of one device as bytes, and whether its gradients are defined."""

    def __init__(self, data: bytes, trains: bool, said: str) -> None:
        self.data, self.trains, self.said = data, trains, said

    def __repr__(self) -> str:
        return f"Written(trains={self.trains}, {self.said})"


@st.composite
def wholes(draw):
    drawn = draw(attentions((8, 1, 5), LENGTHS).filter(lambda d: d.spec.layout == "dense"))
    spec = dataclasses.replace(drawn.spec, dropout=0.0)
    if draw(st.booleans()):
        spec = dataclasses.replace(spec, sizes=(*spec.sizes[:-4], None, None, *spec.sizes[-2:]))
    made = filled(dataclasses.replace(spec, sizes=_sizes(drawn.inputs, spec)), drawn.inputs.operands)
    whole = dataclasses.replace(made, spec=spec, q=drawn.inputs.q, k=drawn.inputs.k, v=drawn.inputs.v)
    written = io.BytesIO()
    torch.save(dataclasses.asdict(dataclasses.replace(whole, spec=None)) | {"spec": spec.text}, written)
    return Written(written.getvalue(), drawn.trains, repr(drawn))


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
@settings(max_examples=8)
def test_drawn_attentions(drawn, ranks, layout):
    for found in run(one_case, ranks, drawn.data, drawn.trains, layout, ALGORITHMS, "reference"):
        assert {name: error for name, error in found.items() if not error < 1e-8} == {}


@pytest.mark.slow
@given(wholes(), st.sampled_from((2, 4, 3)), st.sampled_from(LAYOUTS))
@settings(max_examples=400)
def test_many_drawn_attentions(drawn, ranks, layout):
    for found in run(one_case, ranks, drawn.data, drawn.trains, layout, ALGORITHMS, "reference"):
        assert {name: error for name, error in found.items() if not error < 1e-8} == {}


def on_cpu(written, layout, algorithms):
    """(the error of whole tensors on the CPU kernel, those of parts), or None where it does not take the spec."""
    whole = read(written)
    found = []
    for algorithm in ("gather", *algorithms):
        spec = steps.step_spec(whole.spec, layout, dist.get_world_size(), algorithm)
        if choose(spec, torch.device("cpu"), "cpu", True, algorithm != "gather").kernel is None:
            return None
    expected = oracle(whole)
    for algorithm in algorithms:
        found.append(worst(over_ranks(whole, layout, algorithm, kernel="cpu"), expected, 0.1))
    q, k, v, *operands = (
        x.clone().requires_grad_(x.is_floating_point()) for x in (whole.q, whole.k, whole.v, *whole.operands)
    )
    call = (q, k, v, operands, None, None, None, whole.spec.argument, "cpu", True)
    out, stats = torch.ops.attnfuse.attention(*call)
    given, results = [whole.dout], [out]
    if whole.dlse is not None:
        given.append(whole.dlse.float())
        results.append(ops.log_sum_exp(stats))
    leaves = [q, k, v, *(x for x in operands if x.requires_grad)]
    grads = iter(torch.autograd.grad(results, leaves, given))
    made = [next(grads), next(grads), next(grads), *(next(grads) if x.requires_grad else None for x in operands)]
    alone = worst(Results(out.detach(), ops.log_sum_exp(stats.detach()), made), expected, 0.1)
    return alone, found


@pytest.mark.slow
@given(wholes().filter(lambda x: x.trains), st.sampled_from((2, 4, 3)), st.sampled_from(LAYOUTS))
@settings(max_examples=150)
def test_drawn_attentions_on_the_cpu_kernel(drawn, ranks, layout):
    """As near to float64 as that kernel is with the whole tensors."""
    for found in run(on_cpu, ranks, drawn.data, layout, ("ring", "burst", "gather")):
        if found is None:
            continue
        alone, errors = found
        assert max(errors) <= max(8.0 * alone, 3e-5), (alone, errors)
