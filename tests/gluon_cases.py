"""Attentions for the Gluon kernels: on a device, and in tests/gluon_emulator.py on the CPU.

The fixture `kernel`, a module with both passes, is that of the folder that imports them.
"""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import INF, check, make_spec, qkv, randn

from attnfuse.expr import Algebra, K, Load, causal, dense, window
from attnfuse.kernels import reference
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.triton import codegen
from attnfuse.spec import AddFill, Clamp, ReplaceFill, Scale, Softcap, Tanh

A = Algebra()
HALF = Scale(0.125)
#: Finite in bfloat16 too.
LOW = -1e30
CAUSAL = (HALF, ReplaceFill(causal(), -INF))
#: Whole tiles, and ones at an edge, in both groups.
CAUSAL_AND_LONG = (HALF, ReplaceFill(causal(750), -INF))
DTYPES = [torch.float16, torch.bfloat16]


def right(kernel, q, k, v, operands=(), backward=True, **fields):
    """Result, log-sum-exp and gradients against the oracle, and the maxima that backward reads."""
    fields = {"lse": True, **fields}
    out, _ = check(kernel, q, k, v, operands, backward=backward, **fields)
    spec = make_spec(q, k, v, operands, **fields)
    wide = [x.double() if x.is_floating_point() else x for x in (q, k, v, *operands)]
    _, expected = reference.attend(spec, Inputs(*wide[:3], wide[3:]), torch.float64)
    _, stats = kernel.forward(spec, Inputs(q, k, v, operands))
    # tanh is the device's own
    error = 5e-3 if codegen.approximable(spec) else 1e-4
    # without a key the sum says nothing
    stats[1].masked_fill_(expected[0] == -INF, 0.0)
    expected[1].masked_fill_(expected[0] == -INF, 0.0)
    for ours, theirs, what in zip(stats.double(), expected, ("maximum", "sum"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=error, atol=error, equal_nan=True, msg=f"{what}s differ")
    return out


STEPS = {
    "plain": (HALF,),
    "no step": (),
    "causal": CAUSAL,
    "window": (HALF, ReplaceFill(A.and_(causal(), window(100)), -INF)),
    "far": (HALF, ReplaceFill(causal(-200), -INF)),
    "softcap": (HALF, Softcap(3.0), ReplaceFill(causal(), -INF)),
    "tanh": (HALF, Tanh(), Scale(4.0)),
    "clamp": (HALF, Clamp(-1.0, 1.5), AddFill(causal(), -INF)),
    "finite": (HALF, ReplaceFill(causal(-200), -1e4)),
    "finite window": (HALF, AddFill(A.and_(causal(-130), window(70)), LOW)),
    "a scale below 0": (Scale(-0.25), ReplaceFill(causal(), -INF)),
}


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_steps(kernel, steps):
    right(kernel, *qkv(1, 1, 200, 300, 64, dtype=torch.bfloat16), steps=steps, hidden="zero")


@pytest.mark.parametrize("hidden", ["nan", "nan_to_zero"])
def test_rows_without_keys(kernel, hidden):
    right(kernel, *qkv(1, 1, 200, 300, 64, dtype=torch.bfloat16), steps=STEPS["far"], hidden=hidden)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_sizes_and_dtypes(kernel, dtype, D):
    right(kernel, *qkv(2, 2, 150, 290, D, dtype=dtype), steps=CAUSAL)


@pytest.mark.parametrize(("Qn", "Kn"), [(65, 1), (128, 128), (129, 127), (70, 129), (65, 700), (400, 64), (193, 385)])
@pytest.mark.parametrize("steps", ["plain", "causal"])
def test_lengths(kernel, Qn, Kn, steps):
    right(kernel, *qkv(1, 1, Qn, Kn, 64, dtype=torch.bfloat16), steps=STEPS[steps], hidden="zero")


def test_padding(kernel):
    kept = torch.ones(2, 1, 1, 300, dtype=torch.bool)
    kept[0, ..., 130:] = False
    kept[1, ..., :140] = False
    q, k, v = qkv(2, 2, 130, 300, 64, dtype=torch.bfloat16)
    right(kernel, q, k, v, [kept], steps=(HALF, ReplaceFill(dense(0), -INF)))
    right(kernel, q, k, v, [kept], steps=(*CAUSAL, AddFill(dense(0), LOW)))
    kept[1] = False
    right(kernel, q, k, v, [kept], steps=(HALF, ReplaceFill(dense(0), LOW)))
    right(kernel, q, k, v, [kept], steps=(HALF, ReplaceFill(dense(0), -INF)), hidden="zero")


#: Keys before a number of each batch element, which is no mask by value: loops end there.
OWN_LENGTHS = {
    "lengths": (HALF, ReplaceFill(A.compare("lt", K, Load(0, "int64")), -INF)),
    "causal, lengths": (HALF, ReplaceFill(A.and_(causal(), A.compare("lt", K, Load(0, "int64"))), -INF)),
}


@pytest.mark.parametrize("steps", OWN_LENGTHS.values(), ids=OWN_LENGTHS)
def test_lengths_of_batch_elements(kernel, steps):
    ends = torch.tensor([130, 300]).view(2, 1, 1, 1)
    right(kernel, *qkv(2, 1, 200, 300, 64, dtype=torch.bfloat16), [ends], steps=steps)


def test_heads_that_share_keys(kernel):
    q, k, v = randn(2, 2, 3, 90, 64), randn(2, 2, 1, 140, 64), randn(1, 2, 1, 140, 64)
    right(kernel, *(x.to(torch.bfloat16) for x in (q, k, v)), steps=CAUSAL)


def test_other_layouts_in_memory(kernel):
    q, k, v = (x.transpose(1, 2) for x in (randn(2, n, 3, 64, dtype=torch.bfloat16) for n in (130, 140, 140)))
    right(kernel, q, k, v, steps=CAUSAL, out_order=(0, 2, 1, 3))
    right(kernel, q[0, :, 0], k[0, :, 0], v[0, :, 0])


@pytest.mark.parametrize("batch", [(), (3,), (2, 1, 2)])
def test_batch_dims(kernel, batch):
    right(kernel, *(randn(*batch, n, 64, dtype=torch.bfloat16) for n in (70, 140, 140)), steps=CAUSAL)


def test_nan_stays_in_its_row(kernel):
    q, k, v = qkv(1, 1, 130, 140, 64, dtype=torch.bfloat16)
    q[0, 0, 70] = math.nan
    out = right(kernel, q, k, v, steps=CAUSAL, lse=False)
    assert out[0, 0, 70].isnan().all() and not out[0, 0, :70].isnan().any()


def test_nothing_is_read_after_the_last_row(kernel):
    q, k, v = qkv(1, 2, 140, 150, 64, dtype=torch.bfloat16)
    for x, rows in ((q, 130), (k, 140), (v, 140)):
        x[:, :, rows:] = math.nan
    right(kernel, q[:, :, :130], k[:, :, :140], v[:, :, :140])
