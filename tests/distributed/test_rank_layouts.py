"""Which tokens ranks hold: every token once, padding last, and the same numbers as an expression."""

from __future__ import annotations

import pytest
import torch

from attnfuse.distributed import layouts
from attnfuse.distributed.layouts import LAYOUTS
from attnfuse.expr import Algebra, Load, Q, evaluate

RANKS, LENGTHS = (1, 2, 3, 4, 8), (0, 1, 2, 5, 8, 16, 17, 31, 64)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_token_is_a_row_of_one_rank_and_padding_comes_last(layout):
    for ranks in RANKS:
        for length in LENGTHS:
            n = layouts.rows_of_rank(layout, ranks, length)
            held = [layouts.tokens(layout, rank, ranks, n) for rank in range(ranks)]
            assert sorted(torch.cat(held).tolist()) == list(range(n * ranks))
            order = layouts.in_order(layout, ranks, n)
            assert torch.cat(held)[order].tolist() == list(range(n * ranks))
            for rank, own in enumerate(held):
                real = layouts.real(layout, rank, ranks, length)
                assert (own < length).tolist() == [True] * real + [False] * (n - real)
                runs = layouts.pieces(layout, rank, ranks, length)
                assert [x for first, count, by in runs for x in range(first, first + count * by, by)] == own[
                    :real
                ].tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_expression_gives_the_tokens(layout):
    loads = [Load(i, "int32") for i in range(3)]
    for ranks in RANKS:
        n = layouts.rows_of_rank(layout, ranks, 48)
        e = layouts.token(layout, Q, ranks, *loads, Algebra(n, n))
        for rank in range(ranks):
            base, _, half, jump = layouts.numbers(layout, rank, ranks, n)
            operands = [torch.full((1, 1, 1), x, dtype=torch.int32) for x in (base, half, jump)]
            found = evaluate(e, operands, torch.arange(n)[:, None], torch.zeros(1, 1, dtype=torch.int64))
            assert torch.equal(found.expand(1, n, 1).flatten(), layouts.tokens(layout, rank, ranks, n))


def test_zigzag_deals_the_first_and_the_last_piece_to_the_first_rank():
    assert layouts.tokens("zigzag", 0, 2, 4).tolist() == [0, 1, 6, 7]
    assert layouts.tokens("zigzag", 1, 2, 4).tolist() == [2, 3, 4, 5]
    assert layouts.tokens("striped", 1, 2, 4).tolist() == [1, 3, 5, 7]


@pytest.mark.parametrize(
    "call",
    [
        lambda: layouts.rows_of_rank("spiral", 2, 8),
        lambda: layouts.tokens("zigzag", 0, 2, 3),
        lambda: layouts.tokens("contiguous", 2, 2, 4),
    ],
)
def test_what_is_no_layout_is_refused(call):
    with pytest.raises(ValueError, match="attnfuse: "):
        call()


@pytest.mark.parametrize("layout", ["zigzag", "striped"])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_b4_causal_tiles_are_spread_evenly(layout, ranks):
    """Of tiles that a causal mask leaves, no rank has more than one more than another; contiguous rows have."""
    tile, length = 16, 16 * 8 * ranks

    def work(layout):
        found = []
        for rank in range(ranks):
            q = layouts.tokens(layout, rank, ranks, length // ranks).view(-1, tile)
            tiles = 0
            for other in range(ranks):
                k = layouts.tokens(layout, other, ranks, length // ranks).view(-1, tile)
                tiles += int((k.amin(1)[None] <= q.amax(1)[:, None]).sum())
            found.append(tiles)
        return found

    even, ring = work(layout), work("contiguous")
    assert max(even) - min(even) <= 1
    assert max(ring) - min(ring) > ranks and max(ring) > 1.3 * max(even)
