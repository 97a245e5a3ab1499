"""Few queries against many keys: keys in parts, heads that share keys in one tile. For the kernel module that the fixture gives.

`decoded`: a function that tells whether the kernels that ran last were those for few queries.
"""

from __future__ import annotations

import pytest
import torch
from kernel_cases import FLOAT_MIN, INF, bounds_of, check, make_spec, qkv, randn

from attnfuse.expr import Algebra, Const, K, Load, Q, causal, dense, documents, window
from attnfuse.kernels.inputs import Bounds, Inputs
from attnfuse.spec import AddFill, Bias, ReplaceFill, Scale

A = Algebra()
HALF = Scale(0.5)


def grouped(B=2, heads=2, group=4, Q=1, K=300, D=16, E=16, dtype=None):
    k, v = randn(B, heads, 1, K, D, dtype=dtype), randn(B, heads, 1, K, E, dtype=dtype)
    return randn(B, heads, group, Q, D, dtype=dtype), k, v


@pytest.mark.parametrize(("heads", "queries"), [(1, 40), (3, 20)])
def test_tiles_are_looked_at_for_all_queries_of_an_element(kernel, decoded, heads, queries):
    # the last queries, of which a first tile has none, are of a sequence of their own
    q, k = randn(1, 1, heads, queries, 16), randn(1, 1, 1, 300, 16)
    of_queries, of_keys = torch.arange(queries) >= queries - 8, torch.arange(300) >= 192
    operands = [of_queries.long().view(1, 1, 1, queries, 1), of_keys.long().view(1, 1, 1, 1, 300)]
    check(kernel, q, k, k.flip(-2), operands, backward=False, steps=(HALF, ReplaceFill(documents(0, 1), -INF)))
    assert decoded()


@pytest.mark.parametrize("queries", [1, 5, 16])
def test_a_cache_that_is_not_full(kernel, queries):
    """The keys that are there end before the tensor does, at a number that the device knows."""
    q, k, v = grouped(Q=queries, K=512)
    # whole tiles of 64 keys beyond the 200
    k[..., 256:, :] = v[..., 256:, :] = torch.nan
    past = torch.tensor(200 - queries).reshape(1, 1, 1, 1, 1)
    seen = A.compare("le", K, A.add(Q, Load(0, "int64")))
    spec = make_spec(q, k, v, [past], steps=(HALF, ReplaceFill(seen, -INF)))
    out, stats = kernel.forward(spec, Inputs(q, k, v, [past]))
    clean = [x.nan_to_num() for x in (q, k, v)]
    want, rows = kernel.forward(spec, Inputs(*clean, [past]))
    assert bool(out.isfinite().all()) and torch.equal(out, want) and torch.equal(stats, rows)
    check(kernel, *clean, [past], steps=(HALF, ReplaceFill(seen, -INF)), backward=False)


def test_a_bias_of_each_head_is_its_own(kernel):
    q, k, v = grouped()
    bias = randn(2, 2, 4, 1, 300)
    slopes = randn(1, 2, 4, 1, 1)
    table = randn(1, 2, 4, 1, 300)
    check(
        kernel,
        q,
        k,
        v,
        [bias, slopes, table],
        dims=[("B0", "B1", "B2", "Q", "K"), ("1", "B1", "B2", "1", "1"), ("1", "B1", "B2", "1", "T")],
        steps=(HALF, Bias(0), Scale(operand=1), Bias(2, col=A.sub(Const(299), K))),
        backward=False,
    )


@pytest.mark.parametrize("value", [-INF, FLOAT_MIN])
@pytest.mark.parametrize("hidden", ["nan", "zero"])
def test_rows_that_see_nothing_in_some_part_or_in_any(kernel, value, hidden):
    q, k, v = grouped(K=600)
    keep = torch.zeros(2, 1, 1, 1, 600, dtype=torch.bool)
    keep[0, ..., 580:] = True
    check(kernel, q, k, v, [keep], steps=(HALF, ReplaceFill(dense(0), value)), hidden=hidden, backward=False)


def test_a_window_at_the_end(kernel, decoded):
    offset = 900
    mask = A.and_(causal(offset), window(64 - offset))
    check(kernel, *grouped(Q=4, K=904), steps=(HALF, AddFill(mask, FLOAT_MIN)), backward=False)
    assert decoded()


def test_dropout_draws_what_other_kernels_draw(kernel):
    check(kernel, *grouped(Q=3), seed=torch.tensor([77]), dropout=0.4, backward=False)


def test_packed_keys(kernel):
    lengths = (300, 0, 5, 700)
    k, v = (randn(1, 2, 1, sum(lengths), 16) for _ in range(2))
    q = randn(4, 2, 3, 1, 16)
    check(kernel, q, k, v, bounds=Bounds(None, bounds_of(*lengths)), layout="packed_keys", backward=False)


def test_weights_that_are_filled(kernel):
    q, k, v = grouped(K=400)
    keep = torch.rand(2, 1, 1, 1, 400) > 0.5
    hides = torch.zeros(2, 1, 1, 1, 400, dtype=torch.bool)
    hides[1] = True
    steps = (HALF, ReplaceFill(dense(1), -INF))
    check(kernel, q, k, v, [keep, hides], steps=steps, weight_steps=(ReplaceFill(dense(0), 0.0),), backward=False)


def test_many_queries_are_not_decoded(kernel, decoded):
    check(kernel, *qkv(1, 2, 65, 300, 16), backward=False)
    assert not decoded()
