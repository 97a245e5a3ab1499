"""Specs for GPUs that are not here."""

from __future__ import annotations

import torch
from kernel_cases import FLOAT_MIN, INF, make_spec, randn

from attnfuse.expr import Algebra, Const, K, Q, causal, dense, documents, window
from attnfuse.spec import AddFill, Bias, ReplaceFill, Scale, Softcap

HALF = Scale(0.125)


A = Algebra()


def mixed():
    """Most of what a spec can hold: groups, a table, a bias, a softcap, documents, padding, dropout."""
    q = randn(2, 2, 2, 128, 64, dtype=torch.float16)
    k, v = (randn(2, 2, 1, 128, 64, dtype=torch.float16) for _ in range(2))
    ids = torch.zeros(2, 1, 1, 128, 1, dtype=torch.int64)
    operands = [
        randn(1, 2, 1, 1, 255, dtype=torch.float16),
        ids,
        ids.mT.contiguous(),
        torch.ones(2, 1, 1, 1, 128, dtype=torch.bool),
        randn(2, 1, 1, 1, 128, dtype=torch.float16),
    ]

    dims = [
        ("1", "B1", "1", "1", "T"),
        ("B0", "1", "1", "Q", "1"),
        ("B0", "1", "1", "1", "K"),
        ("B0", "1", "1", "1", "K"),
        ("B0", "1", "1", "1", "K"),
    ]
    steps = (
        HALF,
        Softcap(30.0),
        Bias(0, 1.0, None, A.add(A.sub(K, Q), Const(127))),
        Bias(4, 1.0, keep=causal()),
        ReplaceFill(A.and_(causal(), window(40), documents(1, 2)), -INF),
        AddFill(dense(3), FLOAT_MIN),
    )
    spec = make_spec(q, k, v, operands, dims=dims, steps=steps, dropout=0.1, hidden="nan_to_zero")

    return spec, q, k, v, operands
