"""Packed layouts in the CPU kernel."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import bounds_of, check, make_spec
from packed_cases import *  # noqa: F403
from packed_cases import LENGTHS, attention, packed

from attnfuse.expr import causal
from attnfuse.kernels import cpu
from attnfuse.kernels.inputs import Bounds, Inputs
from attnfuse.spec import Bias, ReplaceFill, Scale, Sink

pytestmark = pytest.mark.skipif(cpu.available() is not None, reason=str(cpu.available()))


@pytest.fixture
def kernel():
    return cpu


def test_operands_shorter_than_a_sequence_are_refused():
    q, k, v, bounds = attention()
    bias = torch.randn(len(LENGTHS), 1, 64, 70)
    spec = make_spec(q, k, v, [bias], layout="packed", steps=(Bias(0),))
    with pytest.raises(ValueError, match="6 sequences of at most 70 and 70 rows"):
        cpu.forward(spec, Inputs(q, k, v, [bias], bounds=bounds))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_long_and_short_sequences_come_out_right_on_any_number_of_threads(threads):
    """A sequence that would keep one thread busy for longer than all others together is done by all of them."""
    q, k, v, bounds = attention((900, 3, 40, 0, 70), D=32, E=32)
    spec = make_spec(q, k, v, layout="packed", steps=(Scale(0.2), ReplaceFill(causal(0), -torch.inf)))
    before, found = torch.get_num_threads(), []
    for n in (1, threads):
        torch.set_num_threads(n)
        try:
            out, stats = cpu.forward(spec, Inputs(q, k, v, bounds=bounds))
            found.append([out, *cpu.backward(spec, Inputs(q, k, v, bounds=bounds), out, out, stats, [True] * 3)])
        finally:
            torch.set_num_threads(before)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_gradients_that_all_sequences_add_to():
    k, bounds = packed(LENGTHS, 2)
    v, _ = packed(LENGTHS, 2)
    q = torch.randn(1, 2, 9, 16)
    bias = torch.randn(1, 2, 9, 70)
    check(cpu, q, k, v, [bias], bounds=Bounds(None, bounds), layout="packed_keys", steps=(Scale(0.3), Bias(0)))


def test_sinks_and_log_sum_exps_of_packed_sequences():
    q, k, v, bounds = attention()
    sinks = torch.randn(1, 2, 1, 1)
    check(cpu, q, k, v, [sinks], bounds=bounds, layout="packed", sink=Sink(operand=0), lse=True)
    empty = bounds_of(0, 0)
    out, stats = cpu.forward(make_spec(q, k, v, layout="packed"), Inputs(q, k, v, bounds=Bounds(empty, empty)))
    assert not out.any() and bool((stats[0] == -torch.inf).all())


def test_sequences_that_share_rows_are_refused():
    q, k, v, bounds = attention((5, 9, 7))
    spec = make_spec(q, k, v, layout="packed")
    shared = bounds.k.clone()
    shared[0, 1] -= 2
    with pytest.raises(ValueError, match="share rows"):
        cpu.forward(spec, Inputs(q, k, v, bounds=Bounds(bounds.q, shared)))
    empty = bounds.k.clone()
    empty[:, 1] = 2
    assert cpu.forward(spec, Inputs(q, k, v, bounds=Bounds(bounds.q, empty)))[0].shape == q.shape
