"""Gradients of parts of the keys, for tests of the kernels that have them."""

from __future__ import annotations

import dataclasses

import torch
from kernel_cases import make_spec, qkv

from attnfuse import expr
from attnfuse.expr import Algebra, Const, K
from attnfuse.kernels import REFERENCE
from attnfuse.kernels.inputs import Inputs
from attnfuse.spec import Bias, ReplaceFill, Scale


def parts_and_whole(module, dtype, keep):
    """Of a kernel: (gradients of both halves of the keys put together, those of all keys in float64)."""
    torch.manual_seed(0)
    q, k, v = qkv(Q=20, K=24, D=8, E=9, dtype=dtype)
    bias = torch.randn(1, 2, 20, 24)
    steps = (Scale(0.4), Bias(0), *([ReplaceFill(keep, -torch.inf)] if keep else []))
    spec = make_spec(q, k, v, [bias], steps=steps, hidden="zero")
    wide = make_spec(*(x.double() for x in (q, k, v)), [bias.double()], steps=steps, hidden="zero")
    reference = REFERENCE.load()
    whole = Inputs(q.double(), k.double(), v.double(), [bias.double()])
    out, stats = reference.forward(wide, whole)
    dout = torch.randn_like(out).to(dtype)
    expected = reference.backward(wide, whole, dout.double(), out, stats, [True] * 4)
    found = []
    for first in (0, 12):
        at = slice(first, first + 12)
        algebra = Algebra(20, 12)
        shifted = None
        if keep:
            shifted = expr.substitute(keep, {K: algebra.add(K, Const(first))}, algebra)
        of_half = (Scale(0.4), Bias(0), *([ReplaceFill(shifted, -torch.inf)] if shifted else []))
        sizes = (*spec.sizes[:-3], 12, *spec.sizes[-2:])
        part = dataclasses.replace(spec, steps=of_half, sizes=sizes, out_dtype="float32")
        inputs = Inputs(q, k[..., at, :], v[..., at, :], [bias[..., at]])
        delta = (dout.double() * out).sum(-1).float()
        found.append(module.backward_part(part, inputs, dout, delta, stats.float(), [True] * 4))
    (dq, dk, dv, db), (eq, ek, ev, eb) = found
    together = [dq + eq, torch.cat([dk, ek], -2), torch.cat([dv, ev], -2), torch.cat([db, eb], -1)]
    return together, expected
