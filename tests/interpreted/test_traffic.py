"""The bytes that benchmarks/traffic.py counts from a spec, against those that the kernels load and store when they run."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import FLOAT_MIN, INF, make_spec, qkv, randn
from visits import run

from attnfuse.expr import Algebra, Const, K, Load, Q, causal, dense, documents, window
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.triton.configs import Config
from attnfuse.spec import AddFill, Bias, Ramp, ReplaceFill, Scale, Softcap
from benchmarks import traffic

A = Algebra()
HALF = Scale(0.25)
#: What the interpreter's calls take.
TILES = Config(32, 64, 4, 1)


def check(q, k, v, operands=(), seed=None, **fields) -> None:
    spec = make_spec(q, k, v, operands, hidden="zero", **fields)
    found = run(spec, q, k, v, operands, seed, traffic=True)
    counted = [
        *traffic.forward(spec, Inputs(q, k, v, operands), TILES).kernels,
        *traffic.backward(spec, Inputs(q, k, v, operands), TILES).kernels,
    ]
    assert [c.kernel for c in counted] == [name.split("/")[0] for name in found]
    for c, ran in zip(counted, found.values(), strict=True):
        assert (c.programs, c.tiles) == (ran.programs, ran.tiles.total()), c
        assert (c.read, c.written) == (ran.read, ran.written), c


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("D", "E"), [(8, 8), (20, 33)])
def test_without_a_mask(dtype, D, E):
    check(*qkv(1, 2, 70, 150, D, E, dtype=dtype), steps=(HALF, Softcap(3.0)))


MASKS = {
    "causal": causal(),
    "causal, last key": causal(50),
    "window": A.and_(causal(), window(20)),
    "chunks": A.compare("eq", A.floordiv(Q, Const(48)), A.floordiv(K, Const(48))),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("fill", [ReplaceFill, AddFill])
def test_with_masks_of_indices(name, fill):
    check(*qkv(1, 1, 150, 200, 8), steps=(HALF, fill(MASKS[name], -INF)))


def test_with_padding_lengths_and_documents():
    keep = torch.arange(200) < torch.tensor([100, 200]).view(2, 1, 1, 1)
    check(*qkv(2, 2, 70, 200, 8), [keep], steps=(HALF, AddFill(dense(0), FLOAT_MIN)))
    lengths = torch.tensor([3, 60]).view(2, 1, 1, 1)
    check(*qkv(2, 2, 70, 100, 8), [lengths], steps=(HALF, ReplaceFill(A.compare("lt", K, Load(0, "int64")), -INF)))
    ids = torch.cat([torch.full((n,), i) for i, n in enumerate((30, 45, 75))]).view(1, 1, 150, 1)
    steps = (HALF, ReplaceFill(A.and_(causal(), documents(0, 1)), -INF))
    check(*qkv(1, 2, 150, 150, 8), [ids, ids.mT.contiguous()], steps=steps)
    # a tensor of all queries and keys
    check(*qkv(1, 2, 40, 100, 8), [torch.rand(1, 2, 40, 100) < 0.5], steps=(HALF, ReplaceFill(dense(0), -INF)))


@pytest.mark.parametrize("shape", [(2, 2, 40, 70), (1, 2, 40, 70), (1, 2, 40, 1), (2, 1, 1, 70), (1, 2, 1, 1)])
def test_with_operands_and_their_gradients(shape):
    check(*qkv(2, 2, 40, 70, 8), [randn(*shape)], steps=(HALF, Bias(0, keep=causal(3))))
    check(*qkv(2, 2, 40, 70, 8), [randn(*shape).bfloat16()], steps=(Scale(operand=0), ReplaceFill(causal(), -INF)))


def test_with_a_table():
    q, k, v = qkv(2, 2, 70, 70, 8)
    table = randn(1, 2, 1, 139)
    col = A.add(A.sub(K, Q), Const(69))
    check(q, k, v, [table], dims=[("1", "B1", "1", "T")], steps=(HALF, Bias(0, 2.0, None, col)))


def test_with_weight_steps_and_dropout():
    keep, factor = torch.rand(2, 1, 1, 70) < 0.7, randn(1, 2, 1, 1)
    weight_steps = (Scale(operand=1), ReplaceFill(dense(0), 0.0))
    check(*qkv(2, 2, 40, 70, 8), [keep, factor], torch.tensor([7]), weight_steps=weight_steps, dropout=0.3)


def test_with_keys_that_heads_or_batches_share():
    q, k, v = randn(2, 2, 3, 40, 8), randn(2, 2, 1, 70, 8), randn(2, 2, 1, 70, 8)
    check(q, k, v, steps=(HALF, ReplaceFill(causal(0), -INF)))
    check(randn(2, 3, 33, 8), randn(1, 3, 70, 8), randn(2, 1, 70, 8))
    check(randn(1, 3, 33, 8), randn(2, 3, 70, 8), randn(2, 3, 70, 8))


def test_ramps():
    check(*qkv(2, 2, 40, 70, 8), [randn(1, 2, 1, 1)], steps=(HALF, Ramp(0, A.sub(K, Q), keep=causal(3))))
