"""Masks and factors whose integers are narrow, wrap, are cast, summed up or symbolic: what eager makes of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import attnfuse

A = torch.arange
Mask = Callable[..., torch.Tensor]
QUERIES, KEYS = 16, 16

#: Of sizes Q and K.
OF_SIZES: dict[str, Mask] = {
    "an arange that ends at 0": lambda Q, K: A(-K, 0) >= -8,
    "a difference of sizes kept from below": lambda Q, K: A(K) <= A(Q)[:, None] + torch.full((), K - 40).clamp(min=0),
    "the size of a difference": lambda Q, K: A(K) <= A(Q)[:, None] + torch.full((), K - 20).abs(),
    "a negative difference": lambda Q, K: A(K) <= A(Q)[:, None] + (K - 20),
    "a window from a difference": lambda Q, K: (A(Q)[:, None] - A(K)).abs() < torch.full((), 20 - K).abs(),
    "a quotient of a difference": lambda Q, K: A(K) - K >= -(K // 2),
    "a triangle from a difference": lambda Q, K: torch.ones(Q, K, dtype=torch.bool).tril(K - 20),
    "a running sum at its end": lambda Q, K: A(K) >= (A(K) >= 8).long().cumsum(0)[-1],
    "a running sum from the middle": lambda Q, K: (
        A(K) >= torch.cat([torch.zeros(4).long(), torch.ones(K).long()]).cumsum(0)[4:].flip(0)
    ),
    "a running sum of a choice": lambda Q, K: torch.where(A(2 * K) < 4, 0, 1).cumsum(0)[K:] <= A(Q)[:, None] + K - 4,
    "a running sum of a flip": lambda Q, K: (A(K) < 3).long().flip(0).cumsum(0) < 2,
    "a running maximum": lambda Q, K: (A(K) * (A(K) < 5)).cummax(0).values <= A(Q)[:, None],
    "sorted": lambda Q, K: ((A(K) * 7) % 16).sort().values <= A(Q)[:, None],
    "the place of the greatest": lambda Q, K: A(K) <= ((A(K) * 7) % 16).argmax(),
    "the greatest": lambda Q, K: A(K) * 2 <= A(K).max(),
    "places in a sorted list": lambda Q, K: torch.searchsorted(A(0, 2 * K, 3), A(K)) <= A(Q)[:, None],
    "rolled": lambda Q, K: A(K).roll(3) <= A(Q)[:, None],
    "uint8 that wraps": lambda Q, K: A(K).to(torch.uint8) * 15 < 300,
    "uint8 beside an int64 tensor": lambda Q, K: A(K).to(torch.uint8) * 15 < torch.tensor(300),
    "uint8 below a tensor without dims": lambda Q, K: A(K).to(torch.uint8) < torch.tensor(260),
    "uint8 divided by more than it holds": lambda Q, K: (A(K).to(torch.uint8) + 30) // 300 < 1,
    "int8 negated": lambda Q, K: -(A(K).to(torch.int8) * 16) <= A(Q)[:, None],
    "uint8 less a number": lambda Q, K: A(K).to(torch.uint8) - 3 <= A(Q)[:, None],
    "int16 squared": lambda Q, K: (A(K) * 100).to(torch.int16) * 40 > A(Q)[:, None],
    "int32 that wraps": lambda Q, K: A(K, dtype=torch.int32) * 2**28 >= A(Q, dtype=torch.int32)[:, None],
    "int64 that wraps": lambda Q, K: (
        A(K) * 6364136223846793005 + 1442695040888963407 >= A(Q)[:, None] * 6364136223846793005
    ),
    "int64 that wraps by a sum": lambda Q, K: A(K) + (2**63 - 8) > A(Q)[:, None],
    "int64 that wraps by a difference": lambda Q, K: A(K) - (2**63 - 1) - A(Q)[:, None] < 0,
    "cast down and up": lambda Q, K: (A(K) * 40).to(torch.uint8).long() <= A(Q)[:, None] * 16,
    "bools as numbers": lambda Q, K: (A(K) > 3).to(torch.uint8) * 255 + 1 <= A(Q)[:, None],
    "fractions as integers": lambda Q, K: (A(K) * 0.7).long() <= A(Q)[:, None],
    "negative fractions as integers": lambda Q, K: (A(K) * -0.7).to(torch.int32) >= -A(Q)[:, None],
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", OF_SIZES)
def test_masks_of_integers_are_what_eager_makes_of_them(name: str, dynamic: bool) -> None:
    mask = OF_SIZES[name]

    def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT).masked_fill(~mask(q.shape[2], k.shape[2]), -1e9).softmax(-1) @ v

    _check(attended, dynamic, torch.randn(2, 2, QUERIES, 8), *torch.randn(2, 2, 2, KEYS, 8))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32], ids=str)
def test_a_distance_cast_to_a_narrower_dtype_is_what_eager_makes_of_it(dtype: torch.dtype) -> None:
    """With the default inner compiler, which drops a cast that is followed by one to a wider dtype."""
    times = torch.iinfo(dtype).max // 6

    def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keep = ((A(KEYS) - A(QUERIES)[:, None]) * times).to(dtype) <= 8
        return (q @ k.mT).masked_fill(~keep, -1e9).softmax(-1) @ v

    torch.compiler.reset()
    q, k, v = torch.randn(3, 2, 2, KEYS, 8)
    found = torch.compile(attended, backend="attnfuse", options={"strict": True})(q, k, v)
    torch.testing.assert_close(found, attended(q, k, v), rtol=1e-4, atol=1e-5)


#: Factors on the scores, and numbers added to them.
NUMBERS = {
    "a fraction as int64": lambda: torch.full((), 3.7).long(),
    "a number as bool": lambda: torch.full((), 3).bool(),
    "more than uint8 holds": lambda: torch.full((), 300.0).to(torch.uint8),
    "an int64 tensor filled with a fraction": lambda: torch.full((), 3.7, dtype=torch.int64),
    "an int8 tensor filled and doubled": lambda: torch.full((), 100, dtype=torch.int8) * 2,
    "a fraction in bfloat16": lambda: torch.full((), 0.3).bfloat16().float(),
    "a bool tensor of a fraction": lambda: torch.full((), 0.4, dtype=torch.bool),
    "int32 of more than it holds": lambda: torch.full((), 2**33 + 1).to(torch.int32),
}


@pytest.mark.parametrize("how", ["times", "divided", "added"])
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_those_of_their_dtype(name: str, how: str) -> None:
    def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        s, number = q @ k.mT, NUMBERS[name]()
        keep = torch.arange(KEYS) < torch.arange(QUERIES)[:, None]
        s = s * number if how == "times" else s / number if how == "divided" else s + torch.where(keep, number, 0)
        return s.softmax(-1) @ v

    _check(attended, False, *torch.randn(3, 2, 2, KEYS, 8))


def test_a_number_given_as_an_argument_may_be_negative() -> None:
    def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, n: int) -> torch.Tensor:
        keep = (A(KEYS) + n >= 0) | (A(KEYS) <= A(QUERIES)[:, None] + n)
        return (q @ k.mT).masked_fill(~keep, -1e9).softmax(-1) @ v

    torch.compiler.reset()
    compiled = torch.compile(attended, backend="attnfuse", options={"inner": "eager", "strict": True})
    given = torch.randn(3, 2, 2, KEYS, 8)
    for n in (3, 5, -4, -20, 0, 2**62, -(2**62)):
        torch.testing.assert_close(compiled(*given, n), attended(*given, n))


def test_a_number_read_from_a_tensor_may_be_negative() -> None:
    def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        keep = (A(KEYS) + n.item() >= 0) | (A(KEYS) <= A(QUERIES)[:, None] - n.item())
        return (q @ k.mT).masked_fill(~keep, -1e9).softmax(-1) @ v

    torch.compiler.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(attended, backend="attnfuse", options={"inner": "eager"}, fullgraph=True)
        given = torch.randn(3, 2, 2, KEYS, 8)
        for n in (3, -4, -20, 2**62):
            torch.testing.assert_close(compiled(*given, torch.tensor(n)), attended(*given, torch.tensor(n)))


def _check(attended: Callable[..., torch.Tensor], dynamic: bool, *given: torch.Tensor) -> None:
    torch.compiler.reset()
    attnfuse.reset()
    compiled = torch.compile(attended, backend="attnfuse", dynamic=dynamic, options={"inner": "eager", "strict": True})
    torch.testing.assert_close(compiled(*given), attended(*given))
    (site,) = (s for report in attnfuse.reports() for s in report.sites)
    assert site.status == "fused", site


def test_an_op_that_raises_for_zero_is_not_computed_where_the_graph_does_not() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # True everywhere, which symbolic sizes do not tell
        near = (torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None]).abs() <= 15
        keep = torch.fmod(torch.arange(k.shape[2]), near) >= 0
        return (q @ k.mT).masked_fill(~keep, -1e9).softmax(-1) @ v

    given = torch.randn(3, 2, 4, 16, 8).unbind()
    torch.compiler.reset()
    for dynamic in (False, True):
        options = {"inner": "eager", "kernel": "cpu", "strict": True}
        found = torch.compile(attend, backend="attnfuse", dynamic=dynamic, options=options)(*given)
        torch.testing.assert_close(found, attend(*given), rtol=1e-4, atol=1e-5)
