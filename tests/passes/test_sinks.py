"""Sinks and log-sum-exps in compiled functions: values, gradients, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import make_spec, qkv, randn

import attnfuse
from attnfuse import ops, reasons
from attnfuse.kernels import CPU, REFERENCE, TRITON, library
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.reference import kernel as reference
from attnfuse.spec import Attention, ReplaceFill, Sink

FAST = {"inner": "aot_eager", "kernel": "cpu", "strict": True}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(3)


def leaves(*shapes: Sequence[int]) -> list[torch.Tensor]:
    return [torch.randn(*shape, requires_grad=True) for shape in shapes]


def run(function: Callable, tensors: Sequence[torch.Tensor], **options: object) -> attnfuse.Report:
    """Compare results and gradients of all of them with eager's in float64; what was done."""
    compiled = torch.compile(function, backend="attnfuse", options={**FAST, **options}, fullgraph=True)
    found = compiled(*tensors)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    expected = function(*wide)
    weights = [torch.randn_like(x) for x in found]
    gots = torch.autograd.grad(list(found), tensors, weights, allow_unused=True)
    wants = torch.autograd.grad(list(expected), wide, [w.double() for w in weights], allow_unused=True)
    assert [(x.shape, x.stride()) for x in found] == [(x.shape, x.stride()) for x in expected]
    for got, want in zip((*found, *gots), (*expected, *wants), strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    return attnfuse.reports()[-1]


HEADS = ((2, 4, 20, 8),) * 3


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_scores_that_a_router_reads_too_give_their_log_sum_exp(inner):
    def model(q, k, v):
        s = (q @ k.mT * 0.3).masked_fill(torch.ones(20, 20).triu(1) > 0, -torch.inf)
        out = torch.softmax(s, -1) @ v
        return out.transpose(1, 2).flatten(2), s.logsumexp(-1).pow(2).mean()

    report = run(model, leaves(*HEADS), inner=inner)
    assert [str(s.spec) for s in report.sites] == ["scale 0.3, causal else -inf, gives its log-sum-exp"]


@pytest.mark.parametrize("keepdim", [False, True])
def test_a_log_sum_exp_has_the_dims_that_it_has_in_eager(keepdim):
    def model(q, k, v):
        s = torch.einsum("bhqd,bhkd->bqhk", q, k)
        out = torch.einsum("bqhk,bhkd->bqhd", s.softmax(-1), v).reshape(2, 20, 32)
        return out, s.logsumexp(-1, keepdim=keepdim)

    assert run(model, leaves(*HEADS)).fused == 1


def test_a_log_sum_exp_that_spells_the_softmax_may_be_a_result():
    def model(q, k, v):
        s = q @ k.mT
        lse = s.logsumexp(-1, keepdim=True)
        return (s - lse).exp() @ v, lse

    assert run(model, leaves(*HEADS)).fused == 1


def test_only_the_log_sum_exp_may_have_a_gradient():
    def model(q, k, v):
        s = q @ k.mT
        return (s.softmax(-1) @ v).detach() + 0, s.logsumexp(-1)

    q, k, v = leaves(*HEADS)
    compiled = torch.compile(model, backend="attnfuse", options=FAST)
    _, lse = compiled(q, k, v)
    assert attnfuse.reports()[-1].fused == 1
    found = torch.autograd.grad(lse.square().sum(), [q, k])
    want = torch.autograd.grad((q @ k.mT).logsumexp(-1).square().sum(), [q, k])
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_a_log_sum_exp_that_is_used_before_the_attention_is_left():
    def model(q, k, v):
        s = q @ k.mT
        lse = s.logsumexp(-1, keepdim=True) * 2
        return s.softmax(-1) @ (v + lse), lse

    report = run(model, leaves(*HEADS))
    assert [s.cause for s in report.sites] == [reasons.LOG_SUM_EXP_USED_EARLY.name]


def test_rows_hidden_by_a_finite_fill_keep_what_eager_makes_of_its_own_logarithm():
    """Beside finfo.min the logarithm of the sum is lost: eager gives the sum of all values there."""
    keep = torch.ones(20, 20, dtype=torch.bool)
    keep[3] = False

    def model(q, k, v):
        s = (q @ k.mT).masked_fill(~keep, torch.finfo(torch.float32).min)
        return (s - s.logsumexp(-1, keepdim=True)).exp() @ v

    q, k, v = leaves(*HEADS)
    found = torch.compile(model, backend="attnfuse", options={**FAST, "strict": False})(q, k, v)
    assert [s.status for s in attnfuse.reports()[-1].sites] == ["refused"]
    torch.testing.assert_close(found[:, :, 3], v.sum(2))


def test_sinks_of_heads_and_queries_get_gradients_through_views():
    def model(q, k, v, heads, rows):
        s = q @ k.mT
        sink = heads.view(1, -1, 1, 1) + rows.unsqueeze(-1)
        p = torch.cat([s, sink.to(s.dtype)], dim=-1).softmax(-1)
        return (torch.nn.functional.dropout(p[..., :-1], 0.0) @ v,)

    report = run(model, leaves(*HEADS, (4,), (2, 4, 20)))
    assert [str(s.spec) for s in report.sites] == ["sink float32[B, H, Q, 1]"]


def test_sinks_in_grouped_heads_and_any_number_of_keys():
    def model(q, k, v, sinks):
        s = torch.einsum("bhgqd,bhkd->bhgqk", q, k)
        sink = sinks.view(1, 2, 2, 1, 1).expand(s.shape[0], -1, -1, s.shape[3], -1)
        p = torch.cat([s, sink], dim=-1).softmax(-1)[..., :-1]
        return (torch.einsum("bhgqk,bhkd->bhgqd", p, v),)

    compiled = torch.compile(model, backend="attnfuse", options=FAST, dynamic=True)
    for keys in (9, 30, 33):
        q, k, v, sinks = leaves((2, 2, 2, 7, 8), (2, 2, keys, 8), (2, 2, keys, 8), (4,))
        torch.testing.assert_close(compiled(q, k, v, sinks), model(q, k, v, sinks), rtol=1e-4, atol=1e-5)
    assert [s.status for r in attnfuse.reports() for s in r.sites] == ["fused"]


@pytest.mark.parametrize("keys", [0, 5])
def test_the_op_and_its_gradients_are_consistent(keys):
    q, k, v = qkv(1, 2, 5, keys, 8)
    operands = [randn(1, 2, 1, 1).requires_grad_()]
    spec = make_spec(q, k, v, operands, sink=Sink(operand=0), lse=True)
    given = (*(x.requires_grad_() for x in (q, k, v)), operands, None, None, None, spec.text, "cpu", True)
    torch.library.opcheck(torch.ops.attnfuse.attention.default, given)
    out, stats = torch.ops.attnfuse.attention(*given)
    (ops.log_sum_exp(stats).sum() + out.sum()).backward()
    found = [x.grad for x in (q, k, v, *operands)]
    needs = [True] * 4
    dlse = torch.ones(1, 2, 5)
    plain = [x.detach() for x in (q, k, v, *operands)]
    with torch.no_grad():
        out, stats = reference.forward(spec, Inputs(*plain[:3], plain[3:]))
        want = reference.backward(
            spec, Inputs(*plain[:3], plain[3:]), torch.ones_like(out), out, stats, needs, dlse=dlse
        )
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_take_sinks_or_give_log_sum_exps_says_so():
    q, k, v = qkv(1, 2, 16, 16, 8)
    sunk, summed = make_spec(q, k, v, sink=Sink()), make_spec(q, k, v, lse=True)
    assert reasons.KERNEL_SINK() in list(library.limits(sunk, False))
    assert reasons.KERNEL_LOG_SUM_EXP() in list(library.limits(summed, False))
    filled = make_spec(q, k, v, [randn(1, 1, 16, 16) > 0], sink=Sink(), weight_steps=(ReplaceFill(_dense(), 0.5),))
    assert CPU.capability.reasons(filled, torch.device("cpu")) == (reasons.KERNEL_SINK_AND_FILLED_WEIGHTS(),)
    for kernel, device in ((REFERENCE, "cpu"), (TRITON, "cuda")):
        against = kernel.capability.reasons(sunk, torch.device(device))
        assert not any("sink" in r.cause.name for r in against)


def _dense():
    from attnfuse.expr import dense

    return dense(0)


def test_a_spec_with_a_sink_survives_its_text_and_refuses_other_shapes():
    q, k, v = qkv(1, 2, 16, 16, 8)
    spec = make_spec(q, k, v, [randn(1, 2, 1, 1)], sink=Sink(operand=0), lse=True)
    assert Attention.parse(spec.text) == spec
    with pytest.raises(ValueError, match="must be"):
        make_spec(q, k, v, [randn(1, 2, 1, 16)], sink=Sink(operand=0))
    with pytest.raises(ValueError, match="packed queries"):
        make_spec(q, k, v, [randn(1, 2, 16, 1)], sink=Sink(operand=0), layout="packed")
    with pytest.raises(ValueError, match="operand 3"):
        make_spec(q, k, v, sink=Sink(operand=3))


def less_maximum(s: torch.Tensor) -> torch.Tensor:
    return s - s.amax(-1, keepdim=True)


SUNK = {
    "padded": lambda q, k, v, b: F.pad(less_maximum(q @ k.mT), (0, 1)).softmax(-1)[..., :-1] @ v,
    "concatenated": lambda q, k, v, b: _joined(less_maximum(q @ k.mT), b).softmax(-1)[..., :-1] @ v,
    "scaled afterwards": lambda q, k, v, b: _off_by_one((less_maximum(q @ k.mT) * 0.5).exp()) @ v,
    "capped": lambda q, k, v, b: (torch.tanh(less_maximum(q @ k.mT) / 5) * 5).softmax(-1) @ v,
    "clamped": lambda q, k, v, b: less_maximum(q @ k.mT).clamp(-1, 1).softmax(-1) @ v,
    "filled near it": lambda q, k, v, b: less_maximum(q @ k.mT).masked_fill(q[..., :1] > 0, -3.0).softmax(-1) @ v,
    "log-sum-exp": lambda q, k, v, b: (lambda s: s.softmax(-1) @ v + s.logsumexp(-1)[..., None])(
        less_maximum(q @ k.mT)
    ),
    "whole numbers": lambda q, k, v, b: _joined(q @ k.mT, b).softmax(-1).to(torch.int32)[..., :-1].float() @ v,
    "late whole numbers": lambda q, k, v, b: (lambda e: (e @ v).int() / e.sum(-1, keepdim=True))((q @ k.mT).exp()),
    "sum of whole numbers": lambda q, k, v, b: (lambda e: (e @ v) / (e.sum(-1, keepdim=True) + 1).int())(
        (q @ k.mT).exp()
    ),
    "infinite by itself": lambda q, k, v, b: (lambda e: e / (b.exp() + e.sum(-1, keepdim=True)))((q @ k.mT).exp()) @ v,
}


def _joined(s: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.cat([s, b.expand(2, 4, 20, 1)], dim=-1)


def _off_by_one(e: torch.Tensor) -> torch.Tensor:
    return e / (1 + e.sum(-1, keepdim=True))


@pytest.mark.parametrize("name", SUNK)
def test_what_a_softmax_with_a_sink_would_see_is_not_passed_over(name):
    q, k, v = (x.detach() for x in leaves(*HEADS))
    sink = torch.full((1, 4, 1, 1), 200.0 if name == "infinite by itself" else 0.7)
    found = torch.compile(SUNK[name], backend="attnfuse", options={**FAST, "strict": False})(q, k, v, sink)
    assert "fused" not in [s.status for r in attnfuse.reports() for s in r.sites]
    torch.testing.assert_close(found, SUNK[name](q, k, v, sink))


def test_a_subtracted_maximum_is_nothing_to_what_moves_with_it():
    def model(q, k, v):
        s = less_maximum(q @ k.mT) * 0.3 + 2.0
        return (s.masked_fill(torch.ones(20, 20).triu(1) > 0, -torch.inf).softmax(-1) @ v,)

    assert run(model, leaves(*HEADS)).fused == 1


def test_rows_hidden_whole_are_nan_beside_a_sink_that_is_relative_to_their_own_maximum():
    def model(q, k, v):
        s = (q @ k.mT).masked_fill(torch.arange(20)[:, None] == 3, -torch.inf)
        top = s.amax(-1, keepdim=True)
        e = torch.exp(s - top)
        return (e / (torch.exp(-top) + e.sum(-1, keepdim=True))) @ v

    q, k, v = (x.detach() for x in leaves(*HEADS))
    found = torch.compile(model, backend="attnfuse", options={**FAST, "strict": False})(q, k, v)
    assert bool(found[:, :, 3].isnan().all())
    torch.testing.assert_close(found, model(q, k, v), equal_nan=True)
