"""Specs and inputs for testing kernels, and the error bars they are held to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from attnfuse import expr, ops
from attnfuse.expr import Algebra, Const, causal, dense
from attnfuse.kernels import layout, reference
from attnfuse.kernels.inputs import DENSE, Inputs
from attnfuse.spec import (
    AddFill,
    Attention,
    Cast,
    Clamp,
    Operand,
    ReplaceFill,
    Scale,
    Shift,
    Sink,
    Softcap,
    Tanh,
    dtype_name,
)

INF = math.inf
FLOAT_MIN = torch.finfo(torch.float32).min
#: Errors of which a mean is taken.
_MEANT = 16
#: Of inputs for which a test names none, and where it asks for one of 16 bits.
DTYPE, LOW = torch.float32, torch.bfloat16


def make_spec(q, k, v, operands=(), dims=(), **fields) -> Attention:
    """dims: of each operand, where they are not those that its shape tells."""
    rank = q.dim()
    dims = dims or [_dims(o, rank) for o in operands]
    given = {
        "batch": tuple(f"B{i}" for i in range(rank - 2)),
        "sizes": (None,) * (rank + 2),
        "qk_dtype": dtype_name(q.dtype),
        "v_dtype": dtype_name(v.dtype),
        "out_dtype": dtype_name(v.dtype),
        "operands": tuple(Operand(dtype_name(o.dtype), own) for o, own in zip(operands, dims, strict=True)),
        "steps": (Scale(q.shape[-1] ** -0.5 if q.shape[-1] else 1.0),),
    }
    return Attention(**{**given, **fields})


def in_bfloat16(spec: Attention) -> Attention:
    """The same with q, k, v and out in bfloat16."""
    return replace(spec, qk_dtype="bfloat16", v_dtype="bfloat16", out_dtype="bfloat16")


def _dims(operand, rank) -> tuple[str, ...]:
    names = (*(f"B{i}" for i in range(rank - 2)), "Q", "K")
    return tuple("1" if size == 1 else name for size, name in zip(operand.shape, names, strict=True))


def randn(*shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * scale).to(dtype or DTYPE)


def qkv(B=2, H=2, Q=33, K=33, D=16, E=None, dtype=None, scale=1.0):
    E = D if E is None else E
    return randn(B, H, Q, D, dtype=dtype, scale=scale), randn(B, H, K, D, dtype=dtype), randn(B, H, K, E, dtype=dtype)


def evaluate(spec, tensors, seed, compute, dout, bounds=DENSE, dlse=None, pages=None):
    """out and gradients of the reference, through leaves of dtype `compute` (float64) or the inputs' own.

    dlse: a gradient of the log-sum-exp, which then counts as a result after out.
    """
    widen = compute == torch.float64
    leaves = [t.detach().to(compute) if widen and t.is_floating_point() else t.detach() for t in tensors]
    floating = [t for t in leaves if t.is_floating_point()]
    for t in floating:
        t.requires_grad_()
    out, stats = reference.attend(spec, Inputs(*leaves[:3], leaves[3:], seed, bounds, pages), compute)
    lse = None if dlse is None else reference.log_sum_exp(stats)
    pairs = [(out, dout.to(compute))] + ([] if lse is None else [(lse, dlse.to(compute))])
    pairs = [(result, given) for result, given in pairs if result.requires_grad]
    results, given = zip(*pairs) if pairs else ([], [])
    found = torch.autograd.grad(results, floating, given, allow_unused=True) if pairs else []
    found = iter(found)
    out = out if dlse is None else torch.cat([out, lse[..., None]], -1)
    return out.detach(), [next(found, None) if t.is_floating_point() else None for t in leaves]


def evaluate_eager(oracle, spec, tensors, seed, dout, bounds=DENSE, dlse=None, pages=None):
    """(out, gradients, the bar of mean errors) of `evaluate` in the dtype of q, and where that is no number although the oracle is
    one, of what a kernel can be held to.

    Eager attention in float16 has no -1e9, and is NaN where a kernel that computes in float32 is right. What it gives with fills
    and operands cut to what float16 holds comes first, then what float32 gives, rounded. This lacks the rounding of weights and of
    gradients of scores, errors as large as those of results, so that twice its mean is what eager would have at least.
    """
    q, E, mean = tensors[0], tensors[2].shape[-1], 1.1
    found = evaluate(spec, tensors, seed, q.dtype, dout, bounds, dlse, pages)
    if _overflows(found, oracle):
        held, given = _within(spec, tensors)
        found = evaluate(held, given, seed, q.dtype, dout, bounds, dlse, pages)
    if _overflows(found, oracle):
        wide = [t.float() if t.is_floating_point() else t for t in tensors]
        out, grads = evaluate(spec, wide, seed, torch.float32, dout, bounds, dlse, pages)
        rounded = torch.cat([out[..., :E].to(q.dtype).float(), out[..., E:]], -1)
        found, mean = (rounded, [None if x is None else x.to(t.dtype) for x, t in zip(grads, tensors)]), 2.0
    return *found, mean


def _overflows(found, oracle):
    pairs = zip((found[0], *found[1]), (oracle[0], *oracle[1]))
    return any(a is not None and b is not None and bool((~a.isfinite() & b.isfinite()).any()) for a, b in pairs)


def _within(spec, tensors):
    most = torch.finfo(tensors[0].dtype).max

    def cut(step):
        if isinstance(step, (ReplaceFill, AddFill)) and math.isfinite(step.value):
            return replace(step, value=min(max(step.value, -most), most))
        return step

    operands = [t.where(~t.isfinite(), t.clamp(-most, most)) if t.is_floating_point() else t for t in tensors[3:]]
    return replace(spec, steps=tuple(map(cut, spec.steps))), (*tensors[:3], *operands)


def assert_close(got, oracle, eager, what, factor=2.0, mean=1.1):
    """max error <= factor x eager's + 1e-5, mean <= 10x or in lower precision `mean` times; non-finite at the same places."""
    assert torch.equal(got.isnan(), oracle.isnan()), f"{what}: NaN at other places"
    assert torch.equal(got.isinf(), oracle.isinf()), f"{what}: infinities at other places"
    ok = oracle.isfinite()
    if not ok.any():
        return
    ours, theirs = (got.double() - oracle)[ok].abs(), (eager.double() - oracle)[ok].abs()
    assert ours.max() <= factor * theirs.max() + 1e-5, f"{what}: max {ours.max():.2e}, eager {theirs.max():.2e}"
    if theirs.max() == 0 or theirs.numel() < _MEANT:
        # a softmax over one key: eager's differences cancel exactly; the mean of a few is as much chance as the greatest
        return
    mean = mean if got.dtype in (torch.float16, torch.bfloat16) else 10.0
    assert ours.mean() <= mean * theirs.mean() + 1e-6, f"{what}: mean {ours.mean():.2e}, eager {theirs.mean():.2e}"


def check(
    kernel, q, k, v, operands: Sequence[torch.Tensor] = (), seed=None, backward=True, bounds=DENSE, pages=None, **fields
):
    """Forward and backward of a kernel module against the oracle; returns (out, gradients)."""
    spec = make_spec(q, k, v, operands, **fields)
    inputs = Inputs(q, k, v, operands, seed, bounds, pages)
    tensors = inputs.tensors
    out, stats = kernel.forward(spec, inputs)
    fake_out, fake_stats = layout.allocate(spec, inputs)
    assert (out.shape, out.stride(), out.dtype) == (fake_out.shape, fake_out.stride(), fake_out.dtype)
    assert (stats.shape, stats.stride(), stats.dtype) == (fake_stats.shape, fake_stats.stride(), fake_stats.dtype)
    dout = torch.randn(out.shape).to(out.dtype)
    dlse = torch.randn(out.shape[:-1]) if spec.lse else None
    oracle, oracle_grads = evaluate(spec, tensors, seed, torch.float64, dout, bounds, dlse, pages)
    eager, eager_grads, mean = evaluate_eager((oracle, oracle_grads), spec, tensors, seed, dout, bounds, dlse, pages)
    assert_close(out, oracle[..., : v.shape[-1]], eager[..., : v.shape[-1]], "out", mean=mean)
    if spec.lse:
        assert_close(ops.log_sum_exp(stats), oracle[..., -1], eager[..., -1], "log-sum-exp", mean=mean)
    if not backward:
        return out, []
    needs = [t.is_floating_point() for t in tensors]
    grads = kernel.backward(spec, inputs, dout, out, stats, needs, dlse)
    factor = 3.0 if operands or spec.dropout else 2.0
    for i, (grad, want, other) in enumerate(zip(grads, oracle_grads, eager_grads, strict=True)):
        if want is None:
            assert grad is None or not grad.any(), f"gradient {i} should be zero"
            continue
        assert grad.shape == tensors[i].shape and grad.dtype == tensors[i].dtype
        if want.numel():
            assert_close(grad, want, want if other is None else other, f"gradient {i}", factor, mean)
    return out, grads


def bounds_of(*lengths: int, gap: int = 0) -> torch.Tensor:
    """Bounds of sequences of these lengths, with `gap` rows of no sequence before each."""
    ends = torch.cumsum(torch.tensor([n + gap for n in lengths]), 0)
    return torch.stack([ends - torch.tensor(lengths), ends])


GATES = {
    "band": causal(3),
    "rest": Algebra().compare("eq", Algebra().mod(expr.Q, Const(3)), Algebra().mod(expr.K, Const(3))),
    "never": Const(0, "bool"),
}

STEPS = {
    "softcap": (Scale(2.0), Softcap(3.0)),
    "tanh": (Scale(0.5), Tanh(), Scale(4.0)),
    "clamp": (Clamp(-1.0, 1.5),),
    "clamp below": (Clamp(low=-0.5), Shift(2.0)),
    "half": (Cast("float16"), Scale(0.25)),
    "negative scale": (Scale(-0.7), Softcap(2.0), Clamp(high=1.0)),
    "fill then cap": (ReplaceFill(causal(0), -1e9), Softcap(5.0)),
    "many": (Scale(0.5), Shift(1.0), Tanh(), Scale(3.0), AddFill(causal(3), -1e4), Clamp(-50.0, 2.0), Cast("bfloat16")),
}

WEIGHTS = {
    "zeroed": (ReplaceFill(dense(0), 0.0),),
    "scaled": (Scale(0.5), Scale(operand=1)),
    "zeroed and scaled": (Scale(operand=1), ReplaceFill(dense(0, inverted=True), 0.0), Scale(2.0)),
    "filled": (ReplaceFill(dense(0), 0.25), Scale(operand=1)),
    "causal": (ReplaceFill(causal(0), 0.0),),
}

#: Sinks: a spec's sink, and its operand's [*batch, Q, 1] where it has one.
SINKS = {
    "off by one": (Sink(0.0), None),
    "of heads": (Sink(operand=0), (1, 2, 1, 1)),
    "of rows": (Sink(operand=0), (2, 2, 40, 1)),
    "of queries": (Sink(operand=0), (1, 1, 40, 1)),
    "of batches": (Sink(operand=0), (2, 1, 1, 1)),
}


LEAST, MOST = -(2**63), 2**63 - 1
#: Masks made of numbers at the ends of int64: of each batch element (0), of queries (1) and of keys (2).
_A, _Q, _K = Algebra(), expr.Q, expr.K
_OF_ALL, _OF_QUERIES, _OF_KEYS = (expr.Load(i, "int64") for i in range(3))
WRAPPING = {
    "length": _A.compare("lt", _K, _OF_ALL),
    "last key": _A.compare("le", _K, _OF_ALL),
    "first key": _A.compare("ge", _K, _OF_ALL),
    "causal from an offset": _A.compare("le", _K, _A.add(_Q, _OF_ALL)),
    "window from an offset": _A.compare("gt", _K, _A.sub(_A.add(_Q, _OF_ALL), Const(9))),
    "ordered": _A.compare("lt", _OF_KEYS, _OF_QUERIES),
    "ordered, shifted": _A.compare("le", _OF_KEYS, _A.add(_OF_QUERIES, Const(3))),
    "distance": _A.compare("le", _A.abs(_A.sub(_OF_KEYS, _OF_QUERIES)), Const(40)),
    "least": _A.compare("lt", _A.abs(_OF_KEYS), Const(0)),
    "equal": _A.compare("eq", _A.sub(_OF_KEYS, _OF_QUERIES), Const(5)),
    "hash": _A.compare(
        "ge",
        _A.add(_A.mul(_K, Const(6364136223846793005)), Const(1442695040888963407)),
        _A.mul(_Q, Const(6364136223846793005)),
    ),
    "remainder": _A.compare("eq", _A.mod(_A.add(_OF_KEYS, _Q), Const(3)), Const(1)),
    "quotient": _A.compare("lt", _A.floordiv(_A.sub(_OF_KEYS, _K), Const(7)), _OF_QUERIES),
    "sum over keys": _A.compare("lt", _A.add(_OF_KEYS, _K, 3), _A.minimum(_OF_QUERIES, _A.add(_OF_ALL, _Q))),
    # a sum just beyond 32 bits, beside a number that may be anything
    "31 bits": _A.compare("le", _A.add(_K, Const(2**31 - 20)), _OF_QUERIES),
    "almost 31 bits from a query": _A.compare("le", _K, _A.add(_Q, Const(2**31 - 5))),
    "32 bits": _A.compare("le", _A.mul(_K, Const(2**26)), _A.add(_A.mul(_Q, Const(2**26)), Const(2**30))),
}


def wrapping_operands(Q: int, K: int) -> list[torch.Tensor]:
    """Operands of WRAPPING for five batch elements: [5, 1, 1, 1], [5, 1, Q, 1] and [5, 1, 1, K]."""
    ends = torch.tensor([3, LEAST, MOST, MOST - 5, -2])
    of_queries, of_keys = torch.randint(-30, 30, (5, 1, Q, 1)), torch.randint(-30, 30, (5, 1, 1, K))
    of_queries[1::2, :, ::3], of_keys[1::2, ..., ::4] = MOST, LEAST
    of_queries[1, :, 1::3], of_keys[2, ..., 1::4] = LEAST + 1, MOST - 1
    of_keys[4] = MOST
    of_queries[4] = MOST - 2
    return [ends.view(5, 1, 1, 1), of_queries, of_keys]
