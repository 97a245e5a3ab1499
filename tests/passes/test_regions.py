"""Attentions in regions that a higher-order op runs: torch.compiler.nested_compile_region, and the branches of torch.cond."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import attnfuse
from attnfuse import reasons
from attnfuse.accuracy.compare import compare

Tensor = torch.Tensor
# inner='eager' has no backward through these ops, whatever the backend
FAST = {"inner": "aot_eager", "kernel": "cpu", "strict": True}


def qkv(L: int = 9, H: int = 4) -> list[Tensor]:
    return [torch.randn(2, H, L, 8) for _ in range(3)]


def sites() -> list[Any]:
    return [site for report in attnfuse.reports() for site in report.sites]


def reads() -> list[str]:
    assert [s.status for s in sites()] == ["fused"] * len(sites()), [(s.status, s.reason) for s in sites()]
    return [s.spec.describe() for s in sites()]


def assert_holds_the_bar(function: Callable[..., Tensor], *args: Tensor, **options: Any) -> Tensor:
    """Values and gradients, against eager and float64; the result."""
    attnfuse.reset()
    torch.compiler.reset()
    compiled = torch.compile(function, backend="attnfuse", options={**FAST, **options})
    runs = []
    for run, dtype in ((function, torch.float64), (function, None), (compiled, None)):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in args]
        out = run(*leaves)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        grads = torch.autograd.grad(out, leaves, weight, allow_unused=True)
        runs.append([out.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads))])
    for i, parts in enumerate(zip(*runs, strict=True)):
        check = compare(f"{i}", *parts, kind="gradient" if i else "output", bar="biased attention")
        assert check.holds, f"{i}: {check.reason}"
    return runs[2][0]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * 0.3).softmax(-1) @ v


def masked(q: Tensor, k: Tensor, v: Tensor, hide: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * 0.3).masked_fill(hide, -1e9).softmax(-1) @ v


def later(q: Tensor) -> Tensor:
    i = torch.arange(q.shape[-2])
    return i > i[:, None]


def far(q: Tensor) -> Tensor:
    i = torch.arange(q.shape[-2])
    return (i - i[:, None]).abs() > 3


# -- nested_compile_region

region = torch.compiler.nested_compile_region(attend)
masked_region = torch.compiler.nested_compile_region(masked)


@torch.compiler.nested_compile_region
def causal_region(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return masked(q, k, v, later(q))


@torch.compiler.nested_compile_region
def dropping_region(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.dropout((q @ k.transpose(-1, -2)).softmax(-1), 0.5, True) @ v


@torch.compiler.nested_compile_region
def two_in_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(attend(q, k, v), k, v) + torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


@torch.compiler.nested_compile_region
def scores_alone(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) * 0.3


def stacked(one: Callable[..., Tensor], *more: Callable[[Tensor], Tensor], times: int = 3) -> Callable[..., Tensor]:
    """The region called one after the other, as the layers of a model are; `more` makes further arguments of q."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = q
        for i in range(times):
            masks = [more[i % len(more)](q)] if more else []
            x = one(x, k, v, *masks)
        return x

    return run


@pytest.mark.parametrize(
    ("one", "said"),
    [
        (region, ["scale 0.3"]),
        (causal_region, ["scale 0.3, causal else -1e+09"]),
        (two_in_one, ["scale 0.3", "scale 0.3", "scale 0.353553, causal else -inf"]),
    ],
)
def test_one_rewrite_serves_all_calls_of_a_region(one: Callable[..., Tensor], said: list[str]) -> None:
    assert_holds_the_bar(stacked(one), *qkv())
    assert reads() == said * 3
    (report,) = attnfuse.reports()
    # the body is there once
    assert report.after.count("torch.ops.attnfuse.attention") == len(said)


def test_masks_of_one_structure_are_read_outside_of_a_region() -> None:
    assert_holds_the_bar(stacked(masked_region, later), *qkv())
    assert reads() == ["scale 0.3, causal else -1e+09"] * 3


def test_masks_of_other_structures_are_the_tensors_they_are() -> None:
    assert_holds_the_bar(stacked(masked_region, later, far), *qkv())
    assert reads() == ["scale 0.3, not mask bool[1, 1, Q, K] else -1e+09"] * 3
    assert {cause for s in sites() for cause in s.note_causes} == {reasons.CALLS_OF_OTHERS.name}


def test_a_mask_of_values_from_outside_is_the_tensor_it_is() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        last = q[:, 0, :, 0].detach().mul(4).long()
        hide = later(q) | (last[:, None, None, :] > 5)
        return masked_region(masked_region(q, k, v, hide), k, v, hide)

    assert_holds_the_bar(run, *qkv())
    assert len(set(reads())) == 1 and "not mask bool[B, 1, Q, K]" in reads()[0]
    assert {cause for s in sites() for cause in s.note_causes} == {reasons.CALLS_READ_OUTSIDE.name}


def test_keys_that_are_repeated_outside_are_taken_as_they_come_in() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x[:, :2].repeat_interleave(2, 1) for x in (k, v))
        return region(region(q, k, v), k, v)

    attnfuse.reset()
    given = qkv()
    call = torch.compile(run, backend="attnfuse", options=FAST)
    torch.testing.assert_close(call(*given), run(*given), rtol=1e-4, atol=1e-5)
    assert [(s.status, s.cause) for s in sites()] == [("refused", reasons.CALLS_READ_OUTSIDE.name)] * 2


def test_a_region_that_is_called_once_takes_what_it_reads_from_outside() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x[:, :2].repeat_interleave(2, 1) for x in (k, v))
        return region(q, k, v)

    assert_holds_the_bar(run, *qkv())
    assert reads() == ["scale 0.3, GQA 2:1"]


def test_scores_of_a_region_meet_their_softmax_outside() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = scores_alone(q, k).softmax(-1) @ v
        return scores_alone(first, k).softmax(-1) @ v

    assert_holds_the_bar(run, *qkv())
    assert reads() == ["scale 0.3"] * 2


def test_dropout_in_a_region_is_drawn_for_each_call() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return dropping_region(q, k, v), dropping_region(q + 0, k, v)

    q, k, _ = qkv(32)
    # with these values the result is the weights' sum: other masks give other sums
    first, second = torch.compile(run, backend="attnfuse", options=FAST)(q, k, torch.ones(2, 4, 32, 8))
    assert [s.spec.dropout for s in sites() if s.status == "fused"] == [0.5, 0.5]
    assert not torch.equal(first, second)
    assert abs(float(first.mean()) - 1) < 0.1


def test_results_of_a_region_may_be_written_to() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return region(region(q, k, v), k, v)

    given = qkv()
    grads = []
    for function in (run, torch.compile(run, backend="attnfuse", options=FAST)):
        leaves = [x.clone().requires_grad_() for x in given]
        out = function(*leaves)
        out.mul_(3.0)
        grads.append(torch.autograd.grad(out.pow(2).sum(), leaves))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    assert reads() == ["scale 0.3"] * 2


def test_fuel_is_spent_on_a_region_once_it_is_lit() -> None:
    attnfuse.reset()
    given = qkv()
    run = stacked(region)
    found = torch.compile(run, backend="attnfuse", options={**FAST, "fuel": 1})(*given)
    torch.testing.assert_close(found, run(*given), rtol=1e-4, atol=1e-5)
    assert [s.status for s in sites()] == ["fused"] * 3


def test_fuel_is_spent_once_on_a_region_whose_mask_is_a_tensor_in_one_call() -> None:
    @torch.compiler.nested_compile_region
    def region(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2) + mask).softmax(-1) @ v

    def run(q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
        at = torch.arange(9)
        return region(region(q, k, v, given), k, v, torch.where(at <= at[:, None], 0.0, -1e9))

    inputs = [*qkv(), torch.randn(9, 9)]
    attnfuse.reset()
    torch.compiler.reset()
    found = torch.compile(run, backend="attnfuse", options={**FAST, "fuel": 1})(*inputs)
    assert [s.status for s in sites()] == ["fused", "fused"]
    torch.testing.assert_close(found, run(*inputs), rtol=1e-4, atol=1e-5)


def test_nan_policy_reaches_every_call() -> None:
    assert_holds_the_bar(stacked(region), *qkv(), nan_policy="eager")
    assert [s.spec.nan_policy for s in sites()] == ["eager"] * 3 and reads()


def test_a_region_under_dynamic_shapes() -> None:
    attnfuse.reset()
    run = stacked(causal_region)
    call = torch.compile(run, backend="attnfuse", options=FAST, dynamic=True)
    for length in (5, 12, 33):
        given = qkv(length)
        torch.testing.assert_close(call(*given), run(*given), rtol=1e-4, atol=1e-5)
    assert len(attnfuse.reports()) == 1 and len(reads()) == 3


# -- cond


def choosing(yes: Callable[..., Tensor], no: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v: torch.cond(q[0, 0, 0, 0] > 0, yes, no, (q, k, v))


def assert_same_without_gradients(function: Callable[..., Tensor], *args: Tensor) -> None:
    attnfuse.reset()
    torch.compiler.reset()
    compiled = torch.compile(function, backend="attnfuse", options=FAST)
    # the first value chooses the branch
    for sign in (1.0, -1.0):
        given = [args[0].abs() * sign, *args[1:]]
        found, eager, exact = (
            f(*x) for f, x in ((compiled, given), (function, given), (function, [x.double() for x in given]))
        )
        check = compare("out", exact, eager, found)
        assert check.holds and found.stride() == eager.stride(), check.reason


def test_both_branches_of_a_cond_are_rewritten() -> None:
    assert_same_without_gradients(choosing(attend, lambda q, k, v: masked(q, k, v, later(q)) + 1), *qkv())
    assert reads() == ["scale 0.3", "scale 0.3, causal else -1e+09"]


def test_a_branch_takes_what_it_reads_from_outside() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x[:, :2].repeat_interleave(2, 1) for x in (k, v))
        hide = later(q)
        bias = q.sum(-1, keepdim=True)

        def no(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q @ k.transpose(-1, -2) + bias).softmax(-1) @ v * 2

        return torch.cond(q[0, 0, 0, 0] > 0, lambda q, k, v: masked(q, k, v, hide), no, (q, k, v))

    assert_same_without_gradients(run, *qkv())
    assert reads() == ["scale 0.3, causal else -1e+09, GQA 2:1", "bias float32[B, Hkv, G, Q, 1], GQA 2:1"]


def test_a_branch_in_a_branch_takes_what_it_reads_from_outside_of_both() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hide = later(q) | (q[:, :1, :, 0].abs() > 2)[..., None, :]

        def yes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.cond(k.sum() > 0, lambda q, k, v: masked(q, k, v, hide), attend, (q, k, v))

        return torch.cond(q[0, 0, 0, 0] > 0, yes, lambda q, k, v: q * 2, (q, k, v))

    q, k, v = qkv()
    for sign in (1.0, -1.0):
        assert_same_without_gradients(run, q, k.abs() * sign, v)
        assert len(reads()) == 2


def test_one_branch_without_attention() -> None:
    assert_same_without_gradients(choosing(lambda q, k, v: v * 2, attend), *qkv())
    assert reads() == ["scale 0.3"]


def summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Like an attention, and none."""
    return (q @ k.transpose(-1, -2) * 0.3).softmax(-1).cumsum(-1) @ v


@pytest.mark.parametrize("other", [attend, summed])
def test_branches_that_are_trained_are_left(other: Callable[..., Tensor]) -> None:
    """PyTorch compares the strides of the branches' gradients, which with a kernel need not be eager's."""
    q, k, v = qkv()
    run = choosing(attend, other)
    assert_holds_the_bar(lambda q, k, v: run(q, k, v) + attend(q, k, v), q.abs(), k, v)
    assert sorted(s.status for s in sites()) == ["fused", "refused", "refused"]
    assert {s.cause for s in sites() if s.status == "refused"} >= {reasons.TRAINED_BRANCH.name}


def test_what_a_cond_gives_is_not_read_through() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.cond(q[0, 0, 0, 0] > 0, lambda s: s + 1, lambda s: s * 2, (q @ k.transpose(-1, -2),))
        return scores.softmax(-1) @ v

    assert_same_without_gradients(run, *qkv())
    ((status, reason),) = [(s.status, s.reason) for s in sites()]
    assert status == "refused" and reason
