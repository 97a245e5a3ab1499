"""B3: bytes by formula are those that ranks send; what is chosen by them, and by the tiles that ranks wait for."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import pytest
import torch
from attentions import attention
from meshes import accounted, counted
from processes import run

from attnfuse import reasons
from attnfuse.distributed import layouts, traffic, work
from attnfuse.distributed.cost import choose, choose_layout, sizes_of
from attnfuse.distributed.heads import parts_of
from attnfuse.distributed.layouts import LAYOUTS
from attnfuse.distributed.links import DEFAULTS, links_of
from attnfuse.distributed.traffic import Sizes
from attnfuse.expr import Algebra, Const, K, Q, causal, documents, window
from attnfuse.reasons import ReasonError
from attnfuse.spec import AddFill, Attention, Bias, Operand, ReplaceFill, Scale

A = Algebra()
CHUNKS = A.compare("eq", A.floordiv(Q, Const(12)), A.floordiv(K, Const(12)))
PREFIX = A.or_(causal(), A.compare("lt", K, Const(9)))
MASKS = {
    "causal": (causal(), lambda q, k: k <= q),
    "window": (A.and_(causal(), window(7)), lambda q, k: (k <= q) & (k > q - 7)),
    "chunks": (CHUNKS, lambda q, k: q // 12 == k // 12),
    "prefix": (PREFIX, lambda q, k: (k <= q) | (k < 9)),
}


def spec_of(*masks, hkv=8, groups=4, length=4096, keys=None, dtype="bfloat16", size=128, fill=-math.inf, **more):
    keys = length if keys is None else keys
    steps = (Scale(0.1), *(ReplaceFill(mask, fill) for mask in masks))
    sizes = (1, hkv, groups, length, keys, size, size)
    shared = ((), ("G",), ("G",))
    return Attention(("B", "Hkv", "G"), sizes, dtype, dtype, dtype, steps, broadcast=shared, hidden="zero", **more)


def decided(spec, ranks, device="cuda", *args, **more):
    return choose(spec, sizes_of(spec), ranks, device, *args, **more)


# -- tiles


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MASKS)
def test_tiles_hold_all_that_a_mask_lets_through(name, layout):
    mask, holds = MASKS[name]
    for ranks, length, tile in ((4, 48, 4), (3, 29, 5), (2, 5, 64)):
        found = work.work_of((mask,), layout, ranks, (length, length), None, tile)
        n = layouts.rows_of_rank(layout, ranks, length)
        tokens = [layouts.tokens(layout, rank, ranks, n) for rank in range(ranks)]
        tokens = [held[held < length] for held in tokens]
        for i, q in enumerate(tokens):
            for j, k in enumerate(tokens):
                seen = holds(q[:, None], k[None])
                # by tiles of each piece of tokens, as they are counted
                cuts = [_cut(layout, rank, ranks, length, tile) for rank in (i, j)]
                least = sum(bool(seen[a:b, c:d].any()) for a, b in cuts[0] for c, d in cuts[1])
                assert found.tiles[i][j] >= least, (ranks, i, j)
                if name in ("causal", "chunks") and layout != "striped":
                    assert found.tiles[i][j] == least, (ranks, i, j)


def _cut(layout, rank, ranks, length, tile):
    found, start = [], 0
    for _, count, _ in layouts.pieces(layout, rank, ranks, length):
        found += [(start + i, start + min(i + tile, count)) for i in range(0, count, tile)]
        start += count
    return found


def test_what_a_causal_ring_waits_for():
    """Figures of the design: 4 ranks, 4096 tokens, tiles of 64."""
    waits = {}
    for layout in LAYOUTS:
        found = work.work_of((causal(),), layout, 4, (4096, 4096), None, 64)
        steps = work.steps_of(found, lambda rank, step: (rank - step) % 4)
        waits[layout] = sum(step.waits for step in steps)
        spread = found.of_ranks
        assert layout == "contiguous" or max(spread) - min(spread) <= 1
    assert waits == {"contiguous": 904, "zigzag": 520, "striped": 544}


def test_masks_that_tensors_hold_and_finite_fills_that_may_be_all_hide_nothing():
    ids = tuple(Operand("int64", ("B", "1", "1", *dims)) for dims in (("Q", "1"), ("1", "K")))
    read = spec_of(documents(0, 1), operands=ids)
    masks = work.masks_of(read, True)
    assert work.work_of(masks, "contiguous", 2, (512, 512)).tiles == ((4, 4), (4, 4))
    finite = spec_of(causal(), fill=torch.finfo(torch.float32).min)
    assert work.masks_of(finite, True) == (causal(),) and work.masks_of(finite, False) == ()
    biased = Operand("float32", ("B", "1", "1", "Q", "K"))
    assert work.masks_of(dataclasses.replace(finite, steps=(*finite.steps, Bias(0)), operands=(biased,)), True) == ()


def test_gradients_of_rows_that_are_nan_go_everywhere():
    late = A.compare("le", K, A.add(Q, Const(-5)))
    spec = dataclasses.replace(spec_of(late), hidden="nan")
    assert work.masks_of(spec, True) == (late,) and work.masks_of(spec, True, backward=True) == ()
    assert work.masks_of(spec_of(late), True, backward=True) == (late,)
    assert work.masks_of(dataclasses.replace(spec_of(causal()), hidden="nan"), True, backward=True) == (causal(),)


# -- bytes


def test_figures_of_the_design():
    """P = 4, d = 8, float32, backward, of a row of a batch element."""
    for heads, kv_heads, keys, queries in ((2, 2, 768, 624), (4, 1, 384, 1248)):
        sizes = Sizes(1, heads, 4, 4, 8, 8, 4, kv_heads=kv_heads)
        moves = traffic.circuit(lambda of, at: True, [1] * 4, 1, 4).moves[0]
        assert moves.sent(*traffic.key_row(sizes)).total == keys
        assert moves.sent(*traffic.query_row(sizes, apart=False)).total == queries
        # maximum and sum apart: three numbers for two
        assert moves.sent(*traffic.query_row(sizes, apart=True)).total == queries + 3 * heads * 4


def test_burst_wins_where_it_sends_less():
    """Above Hkv / Hq = 3/4 where sums have the inputs' dtype, and 2/3 in 16 bits: of 12 query heads."""
    for itemsize, above in ((4, 9), (2, 8)):
        for kv_heads in range(1, 13):
            sizes = Sizes(1, 12, 4096, 4096, 128, 128, itemsize, kv_heads=kv_heads)
            dtype = {4: "float32", 2: "bfloat16"}[itemsize]
            found = choose(spec_of(causal(), dtype=dtype), sizes, (8,), "cuda")
            assert found.algorithm == ("burst" if kv_heads > above else "ring"), (itemsize, kv_heads)
            # the formulas of distributed.md, 7 hops of 512 rows
            row = 7 * 512
            keys = row * kv_heads * 256 * (itemsize + 4)
            queries = row * 12 * (256 * itemsize + 128 * 4 + 8)
            assert found.bytes_backward == min(keys, queries)
            assert found.bytes_forward == row * kv_heads * 256 * itemsize


def test_a_double_ring_sends_one_less_than_there_are_nodes_between_them():
    found = traffic.circuit(lambda of, at: True, [1] * 12, 3, 4).moves
    assert set(found) == {traffic.Moves(within=9, between=2, back_within=9, back_between=2)}


def test_nothing_is_sent_that_nobody_wants():
    """Of a window that reaches one rank back, and of nothing at all."""
    back = traffic.circuit(lambda of, at: at - of in (0, 1), [3] * 4, 1, 4)
    assert [moves.within for moves in back.moves] == [3, 3, 3, 0] and back.steps == {0}
    assert [moves.back_within for moves in back.moves] == [0, 3, 3, 3] and back.back == {1}
    nothing = traffic.circuit(lambda of, at: of == at, [3] * 4, 2, 2)
    assert set(nothing.moves) == {traffic.Moves()} and not nothing.steps | nothing.back | nothing.far | nothing.far_back


MESHES = ((1, 2), (1, 3), (1, 4), (1, 6), (2, 2), (2, 3), (3, 2), (3, 4))


def _around(want, rows, nodes, local):
    """Rows of gradients that each rank sends within a node and between nodes, where they go on in the rings until they are home."""
    within, between = [0] * len(rows), [0] * len(rows)
    for of, count in enumerate(rows):
        home, own = divmod(of, local)
        added = False
        for o in range(nodes):
            there = [(home + o) % nodes * local + (own + i) % local for i in range(local)]
            here = False
            for rank in there[1:]:
                here |= want[of][rank]
                within[rank] += count * here
            added |= o > 0 and (here or want[of][there[0]])
            between[there[0]] += count * added
    return list(zip(within, between))


def test_gradients_go_no_further_than_what_they_are_of():
    """Whatever ranks want of each other: forward as ever, and less or as much home as around the rings."""
    made = random.Random(0)
    straight = 0
    for _ in range(400):
        nodes, local = made.choice(MESHES)
        rows = [made.choice((0, 2, 3)) for _ in range(nodes * local)]
        share = made.random()
        want = [[bool(n and m) and made.random() < share for m in rows] for n in rows]
        found = traffic.circuit(lambda of, at, want=want: want[of][at], rows, nodes, local)
        around = _around(want, rows, nodes, local)
        back = [(moves.back_within, moves.back_between) for moves in found.moves]
        assert all(a <= b and c <= d for (a, c), (b, d) in zip(back, around))
        if traffic.goes_around(lambda of, at, want=want: want[of][at], len(rows)):
            assert back == around
            continue
        straight += back != around
        for kind in (0, 1):
            assert sum(x[kind] for x in back) <= sum(moves[kind] for moves in found.moves)
    assert straight > 100


def test_a_causal_mask_and_none_send_gradients_around():
    for nodes, local in MESHES:
        ranks = nodes * local
        for layout, masks in itertools.product(LAYOUTS, ((), (causal(),))):
            for lengths in ((24, 24), (29, 29), (5, 5), (9, 30), (30, 9)):
                tiles = work.work_of(masks, layout, ranks, lengths, None, 1).tiles
                want = [[bool(tiles[at][of]) for at in range(ranks)] for of in range(ranks)]
                for side, wanted in ((1, want), (0, list(map(list, zip(*want))))):
                    rows = [layouts.real(layout, rank, ranks, lengths[side]) for rank in range(ranks)]
                    found = traffic.circuit(lambda of, at, wanted=wanted: wanted[of][at], rows, nodes, local).moves
                    back = [(moves.back_within, moves.back_between) for moves in found]
                    assert back == _around(wanted, rows, nodes, local), (nodes, local, layout, masks, lengths, side)


def _counted(cases, shape, kernel):
    return [
        counted(attention(mask, *more), layout, algorithm, shape, kernel) for mask, layout, algorithm, *more in cases
    ]


@pytest.mark.parametrize("shape", [(4,), (2, 2)])
def test_ranks_send_what_is_accounted(shape):
    """Also where the length does not divide, where steps are empty, and where the maximum and the sum are sent."""
    cases = []
    for algorithm in ("gather", "ring", "burst"):
        cases += [(mask, "contiguous", algorithm, 29) for mask in ("none", "window", "padding", "halves")]
        cases += [("causal", "zigzag", algorithm, 32), ("window", "striped", algorithm, 30)]
        cases += [("window", "zigzag", algorithm, 45), ("halves", "zigzag", algorithm, 29)]
        cases += [("causal", "zigzag", algorithm, 20, None, torch.float32, (1, 4), -3e38)]
        cases += [("causal", "contiguous", algorithm, 20, None, torch.bfloat16, (2, 2))]
    check_counted(cases, shape)


@pytest.mark.parametrize("shape", [(6,), (2, 3), (3, 2)])
def test_six_ranks_send_what_is_accounted(shape):
    cases = [
        (mask, layout, algorithm, length)
        for algorithm in ("ring", "burst")
        for mask, layout, length in (
            ("window", "contiguous", 48),
            ("window", "zigzag", 53),
            ("halves", "contiguous", 29),
            ("causal", "contiguous", 31),
        )
    ]
    check_counted(cases, shape)


def check_counted(cases, shape):
    found = run(_counted, math.prod(shape), cases, shape, "reference")
    for at, (mask, layout, algorithm, *more) in enumerate(cases):
        whole = attention(mask, *more)
        close = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}[whole.q.dtype]
        for rank, expected in enumerate(accounted(whole, layout, algorithm, shape)):
            error, forward, backward = found[rank][at]
            assert (forward, backward) == expected, (cases[at], rank)
            assert error < close, (cases[at], rank)


# -- choices


def test_layouts_are_chosen_by_what_ranks_wait_for():
    for device in DEFAULTS:
        for ranks in ((8,), (2, 4)):
            chosen = {
                name: decided(spec_of(*masks, length=8192), ranks, device).layout
                for name, masks in {
                    "causal": (causal(),),
                    "none": (),
                    "window": (causal(), window(512)),
                }.items()
            }
            assert chosen == {"causal": "zigzag", "none": "contiguous", "window": "contiguous"}, (device, ranks)
    ids = tuple(Operand("int64", ("B", "1", "1", *dims)) for dims in (("Q", "1"), ("1", "K")))
    assert decided(spec_of(documents(0, 1), operands=ids), (8,)).layout == "contiguous"
    # what documents hide is not known: they may be one
    assert decided(spec_of(causal(), documents(0, 1), operands=ids), (8,)).layout == "zigzag"


def test_a_graph_has_one_layout_for_all_of_its_attentions():
    full, narrow = spec_of(causal(), length=8192), spec_of(causal(), window(128), length=8192)
    pairs = [(spec, sizes_of(spec)) for spec in (full, narrow)]
    assert choose_layout(pairs, (8,), "cuda") == "zigzag"
    assert choose_layout([pairs[1]], (8,), "cuda") == "contiguous"
    assert choose_layout([pairs[0], *[pairs[1]] * 200], (8,), "npu") == "contiguous"
    assert choose_layout([], (8,), "cuda") == "contiguous"


def test_what_is_asked_for_is_done():
    spec = spec_of(causal())
    for layout in LAYOUTS:
        for algorithm in ("gather", "ring", "burst", "ulysses"):
            found = decided(spec, (4,), "cuda", layout, algorithm)
            assert (found.layout, found.algorithm) == (layout, algorithm)
    assert decided(spec, (4,), heads=4).algorithm == "ulysses"
    assert decided(spec, (8,), heads=2).algorithm == "ulysses_ring"
    assert decided(spec, (2, 4), heads=4).heads == 4
    assert decided(spec, (4,), partial=False).algorithm == "gather"
    assert decided(spec, (1,)).bytes_forward == 0


def test_without_gradients_there_is_no_backward():
    spec = spec_of(causal())
    for algorithm in ("gather", "ring", "ulysses"):
        trained = decided(spec, (4,), "cuda", "auto", algorithm)
        found = choose(spec, sizes_of(spec, trains=False), (4,), "cuda", "auto", algorithm)
        assert (found.bytes_forward, found.bytes_backward) == (trained.bytes_forward, 0)
        assert found.account.seconds[1] == 0.0


def test_reasons_say_bytes_and_waits():
    found = decided(spec_of(causal(), groups=1, length=4096, size=64), (4,))
    assert found.reason == (
        "burst, zigzag: 19.1 MB a rank a layer, ring 25.2 MB; ranks wait for 132 tiles, contiguous for 228"
    )
    assert "work is even" in decided(spec_of(), (4,)).reason
    narrow = decided(spec_of(causal(), window(128), length=8192), (8,)).reason
    assert "15 of 64 steps have work" in narrow and "zigzag sends" in narrow
    assert "between nodes" in decided(spec_of(), (2, 2)).reason


def test_names_and_meshes_that_are_none():
    spec = spec_of(causal())
    for ranks, more, said in (
        ((4,), {"layout": "spiral"}, "a layout is"),
        ((4,), {"algorithm": "star"}, "an algorithm is"),
        ((2, 2, 2), {}, "one or two dims"),
        ((4,), {"heads": 3}, "does not divide"),
        ((2, 4), {"heads": 2}, "within the inner dim"),
        ((8,), {"heads": 2, "algorithm": "ulysses"}, "among all 8 ranks"),
        ((8,), {"heads": 2, "layout": "striped"}, "no stripe"),
    ):
        with pytest.raises(ValueError, match=said):
            decided(spec, ranks, **more)


def test_heads_that_cannot_be_shared_out_are_refused():
    with pytest.raises(ReasonError, match=r"5 ranks .*\(B 1, Hkv 8, G 4\)") as error:
        decided(spec_of(causal()), (5,), heads=5)
    assert error.value.reason.cause is reasons.HEADS_NOT_SHARED_OUT
    spec = spec_of(causal())
    symbolic = dataclasses.replace(spec, sizes=(1, None, None, *spec.sizes[3:]))
    sizes = sizes_of(symbolic, (None, 8, 4))
    with pytest.raises(ReasonError, match="Hkv symbolic"):
        choose(symbolic, sizes, (4,), "cuda", heads=4)


def test_key_heads_are_cut_before_those_that_share_one():
    assert parts_of(spec_of(hkv=8, groups=4), 4).cuts == (1, 4, 1)
    assert parts_of(spec_of(hkv=2, groups=4), 8).cuts == (1, 2, 4)
    assert parts_of(spec_of(hkv=1, groups=4), 4).cuts == (1, 1, 4)
    assert parts_of(spec_of(hkv=3, groups=1), 2) is None


def test_sizes_of_a_spec():
    spec = spec_of(causal(), length=64, hkv=2, groups=3)
    assert sizes_of(spec) == Sizes(1, 6, 64, 64, 128, 128, 2, True, 2, 2)
    open_ = dataclasses.replace(spec, sizes=(None, 2, 3, None, None, 128, 128))
    assert sizes_of(open_, (5, None, None), 10, 20) == Sizes(5, 6, 10, 20, 128, 128, 2, True, 2, 2)
    with pytest.raises(ValueError, match="B, queries"):
        sizes_of(open_, keys=3)
    flat = Attention(("H",), (4, 8, 8, 16, 16), *["float32"] * 3, (Scale(1.0), AddFill(causal(), -1.0)))
    assert sizes_of(flat).q_rows == sizes_of(flat).kv_rows == 4


def test_link_speeds_are_equal_on_all_ranks_and_have_a_source():
    assert all(links.source and links.within >= links.between for links in DEFAULTS.values())
    assert links_of("unknown") is DEFAULTS["cuda"]
