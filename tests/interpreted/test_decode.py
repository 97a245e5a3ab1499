"""Few queries against many keys in the Triton kernels: keys in parts, heads that share keys in one tile."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import FLOAT_MIN, INF, bounds_of, check, make_spec, qkv, randn

from attnfuse.expr import Algebra, Const, K, Load, Q, causal, dense, documents, window
from attnfuse.kernels import triton
from attnfuse.kernels.device import Device
from attnfuse.kernels.inputs import Bounds, Inputs
from attnfuse.kernels.triton import launch
from attnfuse.kernels.triton.call import Call
from attnfuse.spec import AddFill, Bias, ReplaceFill, Scale, Softcap

A = Algebra()
HALF = Scale(0.5)


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that run, with their arguments."""
    found = []

    def run(kernel, programs, arguments):
        found.append((kernel.__name__, programs, arguments))
        kernel[(programs,)](**arguments)

    monkeypatch.setattr(launch, "run", run)
    return found


def grouped(B=2, heads=2, group=4, Q=1, K=300, D=16, E=16, dtype=torch.float32):
    k, v = randn(B, heads, 1, K, D, dtype=dtype), randn(B, heads, 1, K, E, dtype=dtype)
    return randn(B, heads, group, Q, D, dtype=dtype), k, v


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 3])
def test_one_or_few_queries(launched, queries, dtype):
    check(triton, *qkv(1, 2, queries, 700, 16, E=24, dtype=dtype), backward=queries == 3)
    assert [x[0] for x in launched[:2]] == ["decode", "combine"]
    parts = launched[0][2]["parts"]
    assert launched[0][1] == 2 * parts and parts > 1
    # parts of 128 keys at least
    assert parts == 6 or not triton.interpreted()


def test_heads_that_share_keys_share_a_tile(launched):
    check(triton, *grouped(), steps=(HALF, Softcap(20.0)), backward=False)
    name, programs, arguments = launched[0]
    assert (name, arguments["group"], programs) == ("decode", 4, 4 * arguments["parts"])


@pytest.mark.parametrize(("heads", "queries"), [(1, 40), (3, 20)])
def test_tiles_are_looked_at_for_all_queries_of_an_element(launched, heads, queries):
    # the last queries, of which a first tile has none, are of a sequence of their own
    q, k = randn(1, 1, heads, queries, 16), randn(1, 1, 1, 300, 16)
    of_queries, of_keys = torch.arange(queries) >= queries - 8, torch.arange(300) >= 192
    operands = [of_queries.long().view(1, 1, 1, queries, 1), of_keys.long().view(1, 1, 1, 1, 300)]
    check(triton, q, k, k.flip(-2), operands, backward=False, steps=(HALF, ReplaceFill(documents(0, 1), -INF)))
    assert [x[0] for x in launched] == ["decode", "combine"]


@pytest.mark.parametrize("queries", [1, 5, 16])
def test_a_cache_that_is_not_full(queries):
    """The keys that are there end before the tensor does, at a number that the device knows."""
    q, k, v = grouped(Q=queries, K=512)
    # whole tiles of 64 keys beyond the 200
    k[..., 256:, :] = v[..., 256:, :] = torch.nan
    past = torch.tensor(200 - queries).reshape(1, 1, 1, 1, 1)
    seen = A.compare("le", K, A.add(Q, Load(0, "int64")))
    spec = make_spec(q, k, v, [past], steps=(HALF, ReplaceFill(seen, -INF)))
    out, stats = triton.forward(spec, Inputs(q, k, v, [past]))
    clean = [x.nan_to_num() for x in (q, k, v)]
    want, rows = triton.forward(spec, Inputs(*clean, [past]))
    assert bool(out.isfinite().all()) and torch.equal(out, want) and torch.equal(stats, rows)
    check(triton, *clean, [past], steps=(HALF, ReplaceFill(seen, -INF)), backward=False)


def test_a_bias_of_each_head_is_its_own():
    q, k, v = grouped()
    bias = torch.randn(2, 2, 4, 1, 300)
    slopes = torch.randn(1, 2, 4, 1, 1)
    table = torch.randn(1, 2, 4, 1, 300)
    check(
        triton,
        q,
        k,
        v,
        [bias, slopes, table],
        dims=[("B0", "B1", "B2", "Q", "K"), ("1", "B1", "B2", "1", "1"), ("1", "B1", "B2", "1", "T")],
        steps=(HALF, Bias(0), Scale(operand=1), Bias(2, col=A.sub(Const(299), K))),
        backward=False,
    )


def test_heads_with_masks_of_their_own_do_not_share(launched):
    q, k, v = grouped()
    keep = torch.rand(2, 2, 4, 1, 300) > 0.5
    check(triton, q, k, v, [keep], steps=(ReplaceFill(dense(0), -INF),), backward=False)
    assert all(x[2]["group"] == 1 for x in launched if x[0] == "decode")


@pytest.mark.parametrize("value", [-INF, FLOAT_MIN])
@pytest.mark.parametrize("hidden", ["nan", "zero"])
def test_rows_that_see_nothing_in_some_part_or_in_any(value, hidden):
    q, k, v = grouped(K=600)
    keep = torch.zeros(2, 1, 1, 1, 600, dtype=torch.bool)
    keep[0, ..., 580:] = True
    check(triton, q, k, v, [keep], steps=(HALF, ReplaceFill(dense(0), value)), hidden=hidden, backward=False)


def test_a_window_at_the_end(launched):
    offset = 900
    mask = A.and_(causal(offset), window(64 - offset))
    check(triton, *grouped(Q=4, K=904), steps=(HALF, AddFill(mask, FLOAT_MIN)), backward=False)
    assert launched[0][0] == "decode"


def test_dropout_draws_what_other_kernels_draw():
    check(triton, *grouped(Q=3), seed=torch.tensor([77]), dropout=0.4, backward=False)


def test_packed_keys():
    lengths = (300, 0, 5, 700)
    k, v = (torch.randn(1, 2, 1, sum(lengths), 16) for _ in range(2))
    q = torch.randn(4, 2, 3, 1, 16)
    check(triton, q, k, v, bounds=Bounds(None, bounds_of(*lengths)), layout="packed_keys", backward=False)


def test_weights_that_are_filled():
    q, k, v = grouped(K=400)
    keep = torch.rand(2, 1, 1, 1, 400) > 0.5
    hides = torch.zeros(2, 1, 1, 1, 400, dtype=torch.bool)
    hides[1] = True
    steps = (HALF, ReplaceFill(dense(1), -INF))
    check(triton, q, k, v, [keep, hides], steps=steps, weight_steps=(ReplaceFill(dense(0), 0.0),), backward=False)


def test_many_queries_are_not_decoded(launched):
    check(triton, *qkv(1, 2, 65, 300, 16), backward=False)
    assert "decode" not in [x[0] for x in launched]


def test_few_queries_of_many_heads_get_tiles_of_their_size():
    # enough programs without parts, and no keys that are shared
    q, k, v = randn(4, 4, 3, 8), randn(4, 4, 70, 8), randn(4, 4, 70, 8)
    spec = make_spec(q, k, v)
    made = Call(spec, Inputs(q, k, v), Device("cuda", 90), launch.run)
    assert made.decoding() is None
    assert made.config("forward").BM == 16
    check(triton, q, k, v)
