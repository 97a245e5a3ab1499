"""Sums that their dtype swallows a score in (attnfuse/rounding.py). For the kernel module that the fixture gives."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import check, make_spec, qkv, randn

from attnfuse import rounding
from attnfuse.expr import causal
from attnfuse.kernels import reference
from attnfuse.kernels.inputs import Inputs
from attnfuse.spec import AddFill, Bias, Cast, ReplaceFill, Scale, Shift, dtype_name, dtype_of

HALVES = [torch.float16, torch.bfloat16]


def around(dtype: torch.dtype) -> torch.Tensor:
    """float32 numbers [N] of all sizes: random ones, those of `dtype`, and halfway between its neighbours."""
    generator = torch.Generator().manual_seed(7)
    limit = math.log2(torch.finfo(dtype).max)
    sizes = torch.exp2(torch.rand(150, generator=generator) * (limit + 4.0) - 4.0).clamp(max=3e38)
    near = sizes[:90].to(dtype)
    near = near[near.isfinite()]
    ties = (near.float() + near.nextafter(torch.zeros_like(near)).float()) / 2
    ends = torch.tensor([0.0, 1023.9, 1024.0, 127.9, 128.0, 65504.0, 65519.0, 65520.0, 65536.0, math.inf])
    found = torch.cat([sizes, near.float(), ties, ends])
    return torch.cat([found, -found])


@pytest.mark.parametrize("dtype", HALVES)
def test_a_cast_rounds_as_torch_does_from_where_neighbours_are_one_apart(kernel, dtype):
    x = around(dtype)
    q, k, v = x[None, None, :, None], torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    spec = make_spec(q, k, v, steps=(Cast(dtype_name(dtype)),))
    # with a single key the row's maximum is its score
    _, stats = kernel.forward(spec, Inputs(q, k, v))
    rounded = x.to(dtype).float()
    want = torch.where((x.abs() >= rounding.COARSE[dtype]) | rounded.isinf(), rounded, x)
    assert torch.equal(stats[0].flatten(), want)


STEPS = {
    "one": (Bias(0),),
    "summed first": (Bias(0), Bias(1)),
    "one after the other": (Bias(0), "cast", Bias(1)),
    "a bias before": (Bias(1), "cast", Bias(0)),
    "three": (Bias(0), Bias(1), Shift(-200.0), "cast", Shift(3.0)),
    "a constant": (AddFill(causal(-300), -20000.0), Bias(1)),
    "a constant everywhere": (Shift(-20000.0), "cast", Bias(1)),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("value", [-60000.0, -300.0, 2e4])
@pytest.mark.parametrize(("dtype", "Q"), [(torch.float16, 40), (torch.bfloat16, 40), (torch.bfloat16, 3)])
def test_rows_that_are_swallowed_match_the_oracle_in_value_and_gradient(kernel, name, value, dtype, Q):
    q, k, v = qkv(1, 2, Q, 70, 8, dtype=dtype)
    mask = torch.zeros(1, 1, Q, 70)
    mask[..., ::2, :] = value
    mask[..., 1::4, 35:] = value
    cast = Cast(dtype_name(dtype))
    steps = [cast if step == "cast" else step for step in STEPS[name]]
    operands = [mask.to(dtype), randn(1, 2, Q, 70, dtype=dtype)]
    check(kernel, q, k, v, operands, steps=(Scale(0.25), cast, *steps, cast))


@pytest.mark.parametrize("dtype", HALVES)
def test_a_row_of_swallowed_scores_is_the_mean_of_the_values(kernel, dtype):
    q, k, v = qkv(1, 2, 40, 70, 8, dtype=dtype)
    mask = torch.full((1, 1, 40, 1), -60000.0, dtype=dtype)
    spec = make_spec(q, k, v, [mask], steps=(Scale(0.25), Bias(0), Cast(dtype_name(dtype))))
    out, _ = kernel.forward(spec, Inputs(q, k, v, [mask]))
    mean = v.double().mean(-2, keepdim=True).expand(1, 2, 40, 8)
    torch.testing.assert_close(out.double(), mean, rtol=0.0, atol=torch.finfo(dtype).eps)
    # in float32, and without a cast, they are not swallowed
    plain = make_spec(q, k, v, [mask], steps=(Scale(0.25), Bias(0)))
    want = reference.attend(plain, Inputs(q, k, v, [mask]), torch.float64)[0]
    assert float((want - mean).abs().max()) > 0.1
    assert dtype_of(spec.out_dtype) == dtype


@pytest.mark.parametrize("value", [1e4, 1.7e6, 2e7])
@pytest.mark.parametrize("second", [Bias(1), AddFill(causal(10), 1e9)], ids=["bias", "fill"])
def test_terms_that_cancel_are_summed_before_they_are_added(kernel, value, second):
    q, k, v = qkv(1, 2, 40, 70, 8)
    times = value + torch.arange(70.0) * 2.0
    operands = [times[:40].view(1, 1, 40, 1), times.view(1, 1, 1, 70)]
    first = Bias(0, -1.0) if isinstance(second, Bias) else AddFill(causal(10), -1e9)
    check(kernel, q, k, v, operands, steps=(Scale(0.25), first, second, Cast("float32"), Shift(1.0)))


def test_a_key_is_lifted_beside_nan_too(kernel):
    q, k, v = qkv(1, 1, 40, 70, 8)
    bias = torch.zeros(1, 1, 40, 70)
    bias[..., ::5] = 1e30
    bias[:, :, 3] = torch.nan
    spec = make_spec(q, k, v, [bias], steps=(ReplaceFill(causal(0), -1e30), Bias(0)))
    inputs = Inputs(q, k, v, [bias])
    out, _ = kernel.forward(spec, inputs)
    want = reference.attend(spec, inputs, torch.float64)[0]
    bar = max(1e-4, 2 * torch.finfo(out.dtype).eps)
    torch.testing.assert_close(out.double(), want, rtol=bar, atol=bar, equal_nan=True)


LIFTED = {
    "replaced": (ReplaceFill(causal(0), -1e30), Bias(0)),
    "replaced, a number added": (ReplaceFill(causal(0), -1e30), Shift(1e30)),
    "added": (Scale(0.0), AddFill(causal(0), -1e30), Bias(0)),
    "added after it": (Scale(0.0), Bias(0), AddFill(causal(0), -1e30)),
    "of two biases": (Scale(0.0), Bias(0), Bias(0, -1.0)),
    "of a bias and a fill": (Scale(0.0), Bias(0), AddFill(causal(100), -1e30)),
    "scaled": (Scale(1e30), AddFill(causal(0), -1e30)),
}


@pytest.mark.parametrize("name", LIFTED)
@pytest.mark.parametrize(("Q", "K"), [(40, 70), (5, 7), (3, 300), (130, 260)])
def test_a_key_that_is_hidden_by_a_large_number_is_seen_where_another_lifts_it(kernel, name, Q, K):
    """Scores that are 0 or far below leave no doubt of what is right."""
    q, k, v = qkv(1, 1, Q, K, 8)
    bias = torch.zeros(1, 1, 1, K)
    bias[..., ::5] = bias[..., -1] = 1e30
    # gradients of scores that were multiplied by 1e30 are rounding errors
    check(kernel, q, k, v, [bias], steps=LIFTED[name], backward=name != "scaled")
