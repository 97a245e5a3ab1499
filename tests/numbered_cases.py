"""Dropout by given numbers: what the pieces of an attention on several ranks drop is what the whole attention drops.

Imported by the tests of each kernel that has Capability.numbered, with a fixture `kernel`.
"""

from __future__ import annotations

import pytest
import torch
from kernel_cases import make_spec, qkv, randn

from attnfuse.expr import causal
from attnfuse.kernels import dropout, reference
from attnfuse.kernels.inputs import Bounds, Inputs
from attnfuse.spec import ReplaceFill, Scale

P = 0.4
_NONE = 2**40
#: (layout, ranks)
LAYOUTS = [(name, ranks) for name in ("contiguous", "zigzag", "striped") for ranks in (2, 4)]


def numbers_of_rank(layout: str, rank: int, ranks: int, n: int) -> list[int]:
    """A row of Inputs.numbers: the rows of one rank, of n each."""
    base, stride, half, jump = {
        "contiguous": (rank * n, 1, _NONE, 0),
        "striped": (rank, ranks, _NONE, 0),
        # a half from the beginning, and one from the end
        "zigzag": (rank * (n // 2), 1, n // 2, (2 * ranks - 2 - 2 * rank) * (n // 2)),
    }[layout]
    return [base, stride, half, jump, n * ranks]


def tokens_of_rank(layout: str, rank: int, ranks: int, n: int) -> torch.Tensor:
    """The same numbers, one by one."""
    every = torch.arange(n * ranks)
    if layout == "contiguous":
        return every.chunk(ranks)[rank]
    if layout == "striped":
        return every[rank::ranks]
    halves = every.chunk(2 * ranks)
    return torch.cat([halves[rank], halves[2 * ranks - 1 - rank]])


def pieces(layout: str, ranks: int, Q: int, K: int):
    """(rows, keys, numbers) of each step of a ring, over Q queries and K keys in all."""
    for q_rank in range(ranks):
        for k_rank in range(ranks):
            sides = ((q_rank, Q // ranks), (k_rank, K // ranks))
            numbers = torch.tensor([numbers_of_rank(layout, rank, ranks, n) for rank, n in sides])
            rows, keys = (tokens_of_rank(layout, rank, ranks, n) for rank, n in sides)
            yield rows, keys, numbers


SEED = torch.tensor([2**61 - 987654321])


@pytest.mark.parametrize(("layout", "ranks"), LAYOUTS)
# few queries with the same keys, which kernels of their own decode, and more
@pytest.mark.parametrize(("Q", "K"), [(8, 72), (72, 40)])
def test_pieces_of_an_attention_keep_the_weights_that_the_whole_one_keeps(kernel, layout, ranks, Q, K):
    # uniform weights and an identity for v: out is the mask itself
    q, k = torch.zeros(2, 2, Q, 16), torch.zeros(2, 1, K, 16)
    whole = dropout.keep(SEED, torch.arange(4 * Q).reshape(2, 2, Q), torch.arange(K), P)
    assert torch.equal(kernel.forward(make_spec(q, k, k, dropout=P), Inputs(q, k, v_of(K), seed=SEED))[0] > 0, whole)
    for rows, keys, numbers in pieces(layout, ranks, Q, K):
        some = (q[..., rows, :], k[..., keys, :], v_of(len(keys)))
        out, _ = kernel.forward(make_spec(*some, dropout=P), Inputs(*some, seed=SEED, numbers=numbers))
        assert torch.equal(out > 0, whole[..., rows, :][..., keys]), (rows, keys)


def v_of(keys: int) -> torch.Tensor:
    return torch.eye(keys).expand(2, 1, keys, keys)


@pytest.mark.parametrize(
    ("layout", "ranks", "by_delta"), [("contiguous", 2, False), ("zigzag", 4, True), ("striped", 2, True)]
)
def test_gradients_of_pieces_add_up_to_those_of_the_whole_attention(kernel, layout, ranks, by_delta):
    torch.manual_seed(0)
    q, k, v = qkv(1, 2, 48, 64, 16)
    dout = randn(1, 2, 48, 16)
    spec = make_spec(q, k, v, dropout=P)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out, stats = reference.attend(spec, Inputs(*leaves, seed=SEED), torch.float64)
    want = torch.autograd.grad(out, leaves, dout.double())
    found = [torch.zeros_like(x) for x in (q, k, v)]
    for rows, keys, numbers in pieces(layout, ranks, 48, 64):
        some = Inputs(q[..., rows, :], k[..., keys, :], v[..., keys, :], seed=SEED, numbers=numbers)
        own, lines = out.detach()[..., rows, :].float(), stats.detach()[..., rows].float()
        given = dout[..., rows, :]
        if by_delta:
            grads = kernel.backward_part(spec, some, given, (own * given).sum(-1), lines, [True] * 3)
        else:
            grads = kernel.backward(spec, some, given, own, lines, [True] * 3)
        for total, part, places in zip(found, grads, (rows, keys, keys)):
            total.index_add_(-2, places, part)
    for got, wanted in zip(found, want):
        assert torch.allclose(got.double(), wanted, rtol=1e-4, atol=1e-5)


def test_numbers_go_with_masks_and_any_values(kernel):
    """Numbers that are no rank's: negative strides, jumps in the middle of a vector and of a tile, words beyond 32 bits."""
    q, k, v = qkv(1, 2, 40, 350, 16)
    numbers = torch.tensor([[2**35, -3, 17, 1000, 2**36], [2**32 - 20, 5, 301, -(2**31), 0]])
    spec = make_spec(q, k, v, dropout=P, steps=(Scale(0.25), ReplaceFill(causal(319), -torch.inf)))
    # as they lie in a larger tensor
    room = torch.zeros(2, 7, dtype=torch.int64)
    room[:, :5] = numbers
    inputs = Inputs(q, k, v, seed=SEED, numbers=room[:, :5])
    out, _ = kernel.forward(spec, inputs)
    want, _ = reference.attend(spec, inputs._replace(q=q.double(), k=k.double(), v=v.double()), torch.float64)
    assert torch.allclose(out.double(), want, rtol=1e-4, atol=1e-5)
    token = [2**35 - 3 * i + (1000 if i >= 17 else 0) for i in range(40)]
    lines = torch.tensor([[[e * 2**36 + t for t in token] for e in range(2)]])
    columns = torch.tensor([(2**32 - 20 + 5 * i - (2**31 if i >= 301 else 0)) % 2**32 for i in range(350)])
    hidden = torch.full((40, 350), -torch.inf).triu(320)
    p = torch.softmax((q @ k.mT).double() * 0.25 + hidden, -1)
    kept = dropout.keep(SEED, lines, columns, P)
    assert torch.allclose(out.double(), (p * kept / (1.0 - P)) @ v.double(), rtol=1e-4, atol=1e-5)


def test_numbers_of_a_wrong_form_are_refused_and_without_dropout_not_looked_at(kernel):
    q, k, v = qkv(1, 2, 5, 7, 16)
    spec = make_spec(q, k, v, dropout=P)
    for numbers in (torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 5, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"must be int64 \[2, 5\]"):
            kernel.forward(spec, Inputs(q, k, v, seed=SEED, numbers=numbers))
    good = torch.tensor([[0, 1, _NONE, 0, 5], [0, 1, _NONE, 0, 7]])
    packed = make_spec(q, k, v, dropout=P, layout="packed")
    bounds = torch.tensor([[0], [5]])
    with pytest.raises(ValueError, match="layout packed with numbers"):
        kernel.forward(packed, Inputs(q, k, v, seed=SEED, bounds=Bounds(bounds, bounds), numbers=good))
    plain = make_spec(q, k, v)
    inputs = Inputs(q, k, v, numbers=torch.zeros(3))
    assert torch.equal(kernel.forward(plain, inputs)[0], kernel.forward(plain, Inputs(q, k, v))[0])
    counted, given = (kernel.forward(spec, Inputs(q, k, v, seed=SEED, numbers=n))[0] for n in (None, good))
    assert torch.equal(counted, given)
