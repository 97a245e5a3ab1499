"""Few queries against many keys in the Triton kernels: keys in parts, heads that share keys in one tile."""

from __future__ import annotations

import numbered_cases
import pytest
import torch
from decode_cases import *  # noqa: F403
from decode_cases import grouped
from kernel_cases import INF, check, make_spec, qkv, randn
from numbered_cases import SEED

from attnfuse.expr import Algebra, dense
from attnfuse.kernels import dropout, triton
from attnfuse.kernels.device import Device
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.triton import launch
from attnfuse.kernels.triton.call import Call
from attnfuse.spec import ReplaceFill, Scale, Softcap


@pytest.fixture
def kernel():
    return triton


@pytest.fixture
def decoded(launched):
    return lambda: [x[0] for x in launched[-2:]] == ["decode", "combine"]


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


def test_dropout_by_given_numbers(launched):
    q, k, v = torch.zeros(2, 2, 8, 16), torch.zeros(2, 1, 36, 16), numbered_cases.v_of(36)
    whole = dropout.keep(SEED, torch.arange(64).reshape(2, 2, 16), torch.arange(72), 0.4)
    for rows, keys, numbers in numbered_cases.pieces("zigzag", 2, 16, 72):
        out, _ = triton.forward(make_spec(q, k, v, dropout=0.4), Inputs(q, k, v, seed=SEED, numbers=numbers))
        assert launched[-2][0] == "decode" and torch.equal(out > 0, whole[..., rows, :][..., keys])


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


def test_heads_with_masks_of_their_own_do_not_share(launched):
    q, k, v = grouped()
    keep = torch.rand(2, 2, 4, 1, 300) > 0.5
    check(triton, q, k, v, [keep], steps=(ReplaceFill(dense(0), -INF),), backward=False)
    assert all(x[2]["group"] == 1 for x in launched if x[0] == "decode")


def test_few_queries_of_many_heads_get_tiles_of_their_size():
    # enough programs without parts, and no keys that are shared
    q, k, v = randn(4, 4, 3, 8), randn(4, 4, 70, 8), randn(4, 4, 70, 8)
    spec = make_spec(q, k, v)
    made = Call(spec, Inputs(q, k, v), Device("cuda", 90), launch.run)
    assert made.decoding() is None
    assert made.config("forward").BM == 16
    check(triton, q, k, v)
