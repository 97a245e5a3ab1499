"""The edges of sharded graphs, with the ranks played by one process, and the dropout that all ranks draw alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from attnfuse.distributed import edges, layouts
from attnfuse.distributed.random import dropped


class Played:
    """`ranks` ranks in one process: what one of them does is done for each, and collectives see the tensors of all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, layout: Any, ranks: int) -> None:
        self.layout, self.ranks, self.rank = layout, ranks, 0
        self.every: list[torch.Tensor] = []
        monkeypatch.setattr(edges, "tokens", self.tokens)
        monkeypatch.setattr(edges._compat, "all_gather", lambda x, group: torch.cat(self.every))
        monkeypatch.setattr(edges._compat, "all_reduce", lambda x, how, group: self.reduced(how))

    def tokens(self, like: torch.Tensor, length: int, layout: Any, ranks: int, groups: Any) -> torch.Tensor:
        return layouts.tokens(layout, self.rank, ranks, layouts.rows_of_rank(layout, ranks, length))

    def reduced(self, how: str) -> torch.Tensor:
        every = torch.stack(self.every)
        return every.sum(0) if how == "sum" else every.amax(0)

    def each(self, function: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
        found = []
        for rank in range(self.ranks):
            self.rank = rank
            found.append(function())
        return found


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 5, 6, 12, 13])
@pytest.mark.parametrize("dim", [0, 1])
def test_rows_leave_as_they_entered(monkeypatch, layout, ranks, length, dim):
    played = Played(monkeypatch, layout, ranks)
    shape = [3, 3, 2]
    shape[dim] = length
    x = torch.randn(shape, dtype=torch.float64)
    own = played.each(lambda: edges.entered_rows(x, dim, layout, ranks, ("group",)))
    assert all(rows.shape[dim] == layouts.rows_of_rank(layout, ranks, length) for rows in own)
    played.every = [rows.movedim(dim, 0).contiguous() for rows in own]
    left = played.each(lambda: edges.left(own[played.rank], dim, length, layout, ranks, ("group",)))
    assert all(torch.equal(whole, x) for whole in left)
    if length == 1:
        return
    played.every = [(rows > 0).to(torch.uint8).movedim(dim, 0).contiguous() for rows in own]
    flags = edges.left(own[0] > 0, dim, length, layout, ranks, ("group",))
    assert flags.dtype == torch.bool and torch.equal(flags, x > 0)


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("length", [5, 12])
def test_gradients_are_conjugate(monkeypatch, layout, ranks, length):
    """sum over ranks of <rows of x, g> = <x, gradient> with padding left out, and the other way round for `left`."""
    played = Played(monkeypatch, layout, ranks)
    n = layouts.rows_of_rank(layout, ranks, length)
    cotangents = [torch.randn(2, n, dtype=torch.float64) for _ in range(ranks)]
    held = [layouts.tokens(layout, rank, ranks, n) for rank in range(ranks)]
    x = torch.randn(2, length, dtype=torch.float64, requires_grad=True)
    played.every = [g.movedim(1, 0).contiguous() for g in cotangents]
    wanted = torch.zeros(2, length, dtype=torch.float64)
    for g, numbers in zip(cotangents, held, strict=True):
        inside = numbers < length
        wanted[:, numbers[inside]] += g[:, inside]
    for rank in range(ranks):
        played.rank = rank
        rows = edges.entered_rows(x, 1, layout, ranks, ("group",))
        (grad,) = torch.autograd.grad(rows, x, cotangents[rank])
        assert torch.equal(grad, wanted)
    whole = torch.randn(2, length, dtype=torch.float64)
    for rank in range(ranks):
        played.rank = rank
        rows = torch.randn(2, n, dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad(edges.left(rows, 1, length, layout, ranks, ("group",)), rows, whole)
        inside = held[rank] < length
        assert torch.equal(grad[:, inside], whole[:, held[rank][inside]]) and not grad[:, ~inside].any()


def test_gradients_of_what_enters_are_summed_in_one_message_a_dtype(monkeypatch):
    played = Played(monkeypatch, "contiguous", 2)
    sizes = []

    def reduce(x, how, group):
        sizes.append((x.dtype, x.numel()))
        return x * 2

    monkeypatch.setattr(edges._compat, "all_reduce", reduce)
    assert played.ranks == 2
    given = [torch.randn(2, 3), torch.randn(4), torch.randn(5).double(), torch.randn(6), torch.randn(7)]
    for x in given[:4]:
        x.requires_grad_()
    made = edges.entered(given, ("group",))
    assert [x.requires_grad for x in made[:4]] == [True] * 4
    # of the fourth nothing is used
    sum((i + 1.0) * made[i].double().sum() for i in (0, 1, 2)).backward()
    assert sizes == [(torch.float32, 10), (torch.float64, 5)]
    for i in range(3):
        assert torch.equal(given[i].grad, torch.full_like(given[i], 2.0 * (i + 1)))
    assert given[3].grad is None and given[4].grad is None
    x = torch.randn(3, requires_grad=True)
    edges.entered([x], ("group",), 4)[0].sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 4.0)) and len(sizes) == 2


def test_sums_pass_gradients_and_counts_have_none(monkeypatch):
    played = Played(monkeypatch, "contiguous", 2)
    x = torch.randn(3, requires_grad=True)
    played.every = [x.detach(), x.detach() + 1]
    total = edges.summed(x, ("group",))
    assert torch.equal(total, 2 * x + 1)
    total.sum().backward()
    assert torch.equal(x.grad, torch.ones(3))
    played.every = [torch.tensor([3, 1]), torch.tensor([2, 5])]
    assert edges.summed(torch.tensor([3, 1]), ("group",)).tolist() == [5, 6]
    assert edges.agreed(torch.tensor([3, 1]), ("group",)).tolist() == [3, 5]


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_what_is_inside(layout):
    numbers = layouts.tokens(layout, 1, 2, layouts.rows_of_rank(layout, 2, 5))
    found = edges.inside(numbers, 5, 1, 3)
    assert found.shape == (1, len(numbers), 1) and torch.equal(found.view(-1), numbers < 5)


# -- dropout


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("layout", layouts.LAYOUTS)
@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_a_rank_drops_what_one_device_drops(p, layout, dim):
    dim = dim % 3
    seed = torch.tensor([12345])
    shape = [3, 4, 5]
    shape[dim] = 8
    x = torch.randn(shape)
    whole = dropped(x, seed, p)
    for rank in range(2):
        numbers = layouts.tokens(layout, rank, 2, 4)
        rows = dropped(x.index_select(dim, numbers), seed, p, dim, numbers, 8)
        assert torch.equal(rows, whole.index_select(dim, numbers))


def test_dropout_keeps_what_it_should_and_scales_it():
    x = torch.ones(200, 300)
    made = dropped(x, torch.tensor([7]), 0.25)
    kept = made != 0
    assert abs(kept.float().mean().item() - 0.75) < 0.01
    assert torch.equal(made[kept], torch.full_like(made[kept], 1 / 0.75))
    other = dropped(x, torch.tensor([8]), 0.25)
    assert abs(((other != 0) == kept).float().mean().item() - (0.75**2 + 0.25**2)) < 0.01
    assert dropped(torch.tensor(2.0), torch.tensor([7]), 0.0).item() == 2.0
    assert dropped(torch.ones(3, dtype=torch.bfloat16), torch.tensor([7]), 0.5).dtype == torch.bfloat16
