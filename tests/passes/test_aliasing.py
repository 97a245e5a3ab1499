"""Writes in place, hooks, no_grad and opaque code around an attention: the result and every gradient are eager's."""

from __future__ import annotations

import pytest
import torch

import attnfuse

B, H, L, D = 2, 4, 16, 8


class Tripled(torch.autograd.Function):
    """x * 2 with a gradient of 3, so that a lost autograd.Function is seen."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 3


def key_copied_under_no_grad(q, k, v):
    with torch.no_grad():
        k = (k * 0.5).contiguous()
    return (q @ k.mT).softmax(-1) @ v


def scores_under_no_grad(q, k, v):
    with torch.no_grad():
        s = q @ k.mT
    return s.softmax(-1) @ v


def detached_scores(q, k, v):
    return (q @ k.mT).detach().softmax(-1) @ v


def key_copy_written_through_a_view(q, k, v):
    k = k.clone()
    k[:, 0] = 0
    return (q @ k.mT).softmax(-1) @ v


def key_scaled_in_place(q, k, v):
    k = k * 1.0
    k.mul_(0.5)
    return (q @ k.mT).softmax(-1) @ v


def cache_filled_by_slices(q, k, v):
    keys, values = torch.zeros(B, H, 2 * L, D), torch.zeros(B, H, 2 * L, D)
    keys[:, :, :L] = k
    values[:, :, :L] = v
    return (q @ keys.mT).softmax(-1) @ values


def scores_written_through_a_slice(q, k, v):
    s = q @ k.mT
    s[:, :, :, 0] = -5.0
    return s.softmax(-1) @ v


def scores_written_through_a_view(q, k, v):
    s = q @ k.mT
    s.view(-1).mul_(0.5)
    return s.softmax(-1) @ v


def zero_mask_with_a_row_written(q, k, v):
    m = torch.zeros(L, L)
    m[0, 1:5] = 5
    return (q @ k.mT + m).softmax(-1) @ v


def mask_written_through_another_name(q, k, v):
    m = torch.zeros(L, L)
    seen = m.view(1, L, L)
    m[0, 1] = 3.0
    return (q @ k.mT + seen).softmax(-1) @ v


def triangle_with_a_column_written(q, k, v):
    m = torch.tril(torch.ones(L, L))
    m[1:, 0] = 0
    return (q @ k.mT).masked_fill(m == 0, -1e4).softmax(-1) @ v


def causal_mask_made_in_place(q, k, v):
    m = torch.full((L, L), float("-inf"))
    m.masked_fill_(torch.arange(L) < (torch.arange(L) + 1).view(L, 1), 0)
    return (q @ k.mT + m).softmax(-1) @ v


def inverted_mask_whose_source_is_written_later(q, k, v):
    m = torch.ones(L, L, dtype=torch.bool)
    hide = torch.logical_not(m)
    m.view(-1)[:3] = False
    return (q @ k.mT).masked_fill(hide, -1e4).softmax(-1) @ v


def mask_written_after_use(q, k, v):
    m = torch.zeros(L, L)
    s = q @ k.mT + m
    m.fill_(-1e9)
    return s.softmax(-1) @ v + m.sum() * 0


def bias_written_after_the_result(q, k, v):
    m = torch.arange(L).float() / L
    m = m * q[0, 0, 0, 0].detach()
    out = (q @ k.mT + m).softmax(-1) @ v
    m += 1
    return out + m.mean()


def lengths_written_after_the_result(q, k, v):
    n = (q.detach()[:, 0, 0, 0] > 0).long() * 4 + 5
    keep = torch.arange(L) < n[:, None, None, None]
    out = (q @ k.mT).masked_fill(~keep, -1e9).softmax(-1) @ v
    n += 1
    return out * n[:, None, None, None]


def result_written_in_place(q, k, v):
    out = (q @ k.mT).softmax(-1) @ v
    out.mul_(2)
    return out


def view_of_the_result_written_in_place(q, k, v):
    out = (q @ k.mT).softmax(-1) @ v
    out.transpose(1, 2)[:, 0].zero_()
    return out


def scores_used_twice(q, k, v):
    s = q @ k.mT
    return s.softmax(-1) @ v + (s * 2).softmax(-1) @ v


def hook_on_the_scores(q, k, v):
    s = q @ k.mT
    s.register_hook(lambda g: g * 2)
    return s.softmax(-1) @ v


def hook_on_the_query(q, k, v):
    q = q * 0.5
    q.register_hook(lambda g: g * 2)
    return (q @ k.mT).softmax(-1) @ v


def function_on_the_query(q, k, v):
    return (Tripled.apply(q) @ k.mT).softmax(-1) @ v


def function_on_the_scores(q, k, v):
    return Tripled.apply(q @ k.mT).softmax(-1) @ v


def function_on_the_result(q, k, v):
    return Tripled.apply((q @ k.mT).softmax(-1) @ v)


def gradient_transform_beside(q, k, v):
    g = torch.func.grad(lambda x: ((x @ k.mT).softmax(-1) @ v).sum())(q)
    return g + (q @ k.mT).softmax(-1) @ v


def inside_vmap(q, k, v):
    return torch.vmap(lambda a, b, c: (a @ b.mT).softmax(-1) @ c)(q, k, v)


# how many sites fuse; a refusal is as right as a rewrite, but a change of these numbers should be noticed
CASES = {
    key_copied_under_no_grad: 1,
    scores_under_no_grad: 0,
    detached_scores: 0,
    key_copy_written_through_a_view: 1,
    key_scaled_in_place: 1,
    cache_filled_by_slices: 1,
    scores_written_through_a_slice: 0,
    scores_written_through_a_view: 0,
    zero_mask_with_a_row_written: 1,
    mask_written_through_another_name: 1,
    triangle_with_a_column_written: 1,
    causal_mask_made_in_place: 1,
    inverted_mask_whose_source_is_written_later: 0,
    mask_written_after_use: 1,
    # the op would keep the bias for backward; a mask of its own is kept in place of the lengths
    bias_written_after_the_result: 0,
    lengths_written_after_the_result: 1,
    result_written_in_place: 1,
    view_of_the_result_written_in_place: 1,
    scores_used_twice: 0,
    hook_on_the_scores: 0,
    hook_on_the_query: 1,
    function_on_the_query: 1,
    function_on_the_scores: 0,
    function_on_the_result: 1,
    gradient_transform_beside: 1,
    inside_vmap: 0,
}


def run(function):
    torch.manual_seed(0)
    args = [torch.randn(B, H, L, D, requires_grad=True) for _ in range(3)]
    out = function(*args)
    out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape))
    return out.detach(), [a.grad for a in args]


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("function", CASES, ids=lambda f: f.__name__)
def test_result_and_gradients_are_those_of_eager(function, inner):
    torch.compiler.reset()
    attnfuse.reset()
    expected, expected_grads = run(function)
    options = {"inner": inner, "strict": True, "kernel": "cpu"}
    found, grads = run(torch.compile(function, backend="attnfuse", options=options))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(grads, expected_grads, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
    assert sum(r.fused for r in attnfuse.reports()) == CASES[function]


def bias_given_and_written(q, k, v, m, n):
    out = (q @ k.mT + m).softmax(-1) @ v
    m += torch.arange(L)
    return out


def lengths_given_and_written(q, k, v, m, n):
    keep = torch.arange(L) < n[:, None, None, None]
    out = (q @ k.mT + 0 * m).masked_fill(~keep, -1e9).softmax(-1) @ v
    n += 1
    return out


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("function", [bias_given_and_written, lengths_given_and_written], ids=lambda f: f.__name__)
def test_inputs_that_are_written_after_the_attention_have_not_changed_in_its_backward(function, inner):
    torch.compiler.reset()
    compiled = torch.compile(function, backend="attnfuse", options={"inner": inner, "strict": True})
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, H, L, D, requires_grad=True) for _ in range(3))
    found = []
    for f in (function, compiled):
        out = f(q, k, v, torch.linspace(-1, 1, L * L).view(L, L), torch.tensor([5, 9]))
        grads = torch.autograd.grad(out, (q, k, v), torch.linspace(-1, 1, out.numel()).view(out.shape))
        found.append((out.detach(), *grads))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_key_written_in_place_without_gradients(when):
    def function(q, k, v):
        k = k.clone()
        seen = k.view(B, H, L, D)
        if when == "before":
            k[:, 0].zero_()
        s = q @ seen.mT
        if when == "between":
            k[:, 0].zero_()
        out = s.softmax(-1) @ v
        if when == "after":
            k[:, 0].zero_()
        return out + k.sum()

    torch.compiler.reset()
    args = [torch.randn(B, H, L, D) for _ in range(3)]
    compiled = torch.compile(function, backend="attnfuse", options={"inner": "eager", "strict": True})
    torch.testing.assert_close(compiled(*args), function(*args), rtol=1e-5, atol=1e-5)
