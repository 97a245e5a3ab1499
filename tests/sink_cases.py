"""Sinks and log-sum-exps against the oracle. For the kernel module that the fixture gives."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import FLOAT_MIN, INF, SINKS, check, qkv, randn

from attnfuse.expr import Algebra, causal, dense, window
from attnfuse.spec import AddFill, Bias, ReplaceFill, Scale, Sink, Softcap

HALF = Scale(0.25)
A = Algebra()


@pytest.mark.parametrize("name", SINKS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_sinks_forward_and_backward(kernel, name, dtype):
    sink, shape = SINKS[name]
    operands = [] if shape is None else [randn(*shape, dtype=dtype)]
    for lse in (False, True):
        check(
            kernel,
            *qkv(2, 2, 40, 70, 8, dtype=dtype),
            operands,
            steps=(HALF, AddFill(causal(), FLOAT_MIN)),
            sink=sink,
            lse=lse,
        )


@pytest.mark.parametrize("hidden", ["nan", "zero", "nan_to_zero"])
@pytest.mark.parametrize("value", [-INF, FLOAT_MIN, -1e9])
@pytest.mark.parametrize("height", [-INF, -2e9, -3.0, 50.0])
def test_rows_whose_only_score_is_the_sink(kernel, hidden, value, height):
    keep = torch.rand(2, 1, 1, 90) < 0.7
    keep[0, ..., :40] = False
    sinks = torch.full((1, 2, 1, 1), height)
    # over infinite scores alone autograd's softmax has NaN gradients, ours are those of the hidden rows' result
    differs = value == height == -INF and hidden != "nan"
    steps = (HALF, ReplaceFill(A.and_(causal(), dense(0)), value))
    check(
        kernel,
        *qkv(2, 2, 70, 90, 8),
        [keep, sinks],
        steps=steps,
        hidden=hidden,
        sink=Sink(operand=1),
        backward=not differs,
    )


@pytest.mark.parametrize("height", [INF, torch.nan])
def test_a_sink_that_is_no_number_makes_rows_nan(kernel, height):
    sinks = torch.zeros(1, 2, 1, 1)
    sinks[0, 1] = height
    out, _ = check(kernel, *qkv(1, 2, 40, 70, 8), [sinks], sink=Sink(operand=0))
    assert bool(out[0, 1].isnan().all()) and bool(out[0, 0].isfinite().all())


def test_a_sink_with_dropout_and_weights_and_without_a_maximum(kernel):
    keep, sinks = torch.rand(2, 1, 1, 70) < 0.7, randn(1, 2, 1, 1)
    given = ([keep, sinks],)
    check(kernel, *qkv(2, 2, 40, 70, 8), *given, sink=Sink(operand=1), seed=torch.tensor([5]), dropout=0.3)
    check(
        kernel,
        *qkv(2, 2, 40, 70, 8),
        *given,
        sink=Sink(operand=1),
        weight_steps=(ReplaceFill(dense(0), 0.0), Scale(0.5)),
    )
    check(kernel, *qkv(2, 2, 40, 70, 8), *given, sink=Sink(operand=1), softmax="unshifted")
    check(kernel, *qkv(2, 2, 3, 70, 8), *given, sink=Sink(operand=1), lse=True)


def test_an_operand_may_be_sink_and_bias_at_once(kernel):
    check(
        kernel,
        *qkv(2, 2, 40, 70, 8),
        [randn(1, 2, 40, 1)],
        steps=(Bias(0), Softcap(2.0)),
        sink=Sink(operand=0),
        lse=True,
    )


def test_a_row_without_keys_has_the_sink_for_its_log_sum_exp(kernel):
    check(kernel, *qkv(1, 2, 5, 0, 8), [randn(1, 2, 1, 1)], sink=Sink(operand=0), lse=True)


@pytest.mark.parametrize("hidden", ["nan", "zero"])
def test_log_sum_exp_and_its_gradient(kernel, hidden):
    steps = (HALF, Softcap(3.0), ReplaceFill(A.and_(causal(), window(20)), FLOAT_MIN))
    check(kernel, *qkv(2, 2, 70, 90, 8), steps=steps, hidden=hidden, lse=True, dropout=0.2, seed=torch.tensor([3]))
    check(kernel, *qkv(2, 2, 70, 90, 8), [randn(2, 1, 70, 90)], steps=(Bias(0),), lse=True)
    # a group of queries with the same keys, which decode takes
    check(kernel, randn(2, 1, 4, 1, 16), randn(2, 1, 1, 400, 16), randn(2, 1, 1, 400, 16), lse=True, sink=Sink(1.5))
    hides_all = (ReplaceFill(causal(-3), -INF),)
    check(kernel, *qkv(1, 1, 40, 40, 8), steps=hides_all, hidden=hidden, lse=True, backward=hidden == "zero")
