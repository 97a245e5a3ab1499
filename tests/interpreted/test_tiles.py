"""The tiles that the kernels compute, counted in the interpreter, against those in which the mask leaves an element.

Which elements those are is taken from the mask evaluated for every query and key, never from the kernels' own bounds.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from kernel_cases import FLOAT_MIN, INF, assert_close, check, evaluate, make_spec, qkv, randn
from visits import Run, as_set, counted_bytes, run

from attnfuse.expr import Algebra, Const, Expr, K, Load, Q, causal, dense, documents, window
from attnfuse.kernels import layout, reference, triton
from attnfuse.kernels.device import Device
from attnfuse.kernels.inputs import Inputs
from attnfuse.kernels.triton import configs, launch, lists
from attnfuse.kernels.triton.call import Call
from attnfuse.spec import AddFill, ReplaceFill, Scale
from benchmarks.traffic import tiles_of

A = Algebra()
HALF = Scale(0.25)
CPU, GPU = Device("cpu"), Device("cuda", 80)
#: With lists of tiles, and with tests where tiles are computed.
BOTH = pytest.mark.parametrize("_short_lists", [0, 99], indirect=True, ids=["listed", "tested"])
UNLISTED = pytest.mark.parametrize("_short_lists", [99], indirect=True, ids=["tested"])
LOOPS = ("forward", "backward_rows", "backward_columns")

Tiles = set[tuple[int, int, int]]

PREFIX = A.or_(causal(), A.compare("lt", K, Const(70)))
CHUNKS = A.compare("eq", A.floordiv(Q, Const(48)), A.floordiv(K, Const(48)))
#: name: mask, queries, keys
OF_INDICES: dict[str, tuple[Expr, int, int]] = {
    "everything": (A.compare("ge", K, Const(0)), 200, 230),
    "causal": (causal(), 256, 256),
    "causal, ragged": (causal(), 250, 250),
    "causal, fewer queries, last key": (causal(150), 106, 256),
    "causal, fewer keys": (causal(), 256, 100),
    "causal, first queries without keys": (causal(-70), 200, 200),
    "window": (A.and_(causal(), window(40)), 256, 256),
    "window of one": (A.and_(causal(), window(1)), 200, 200),
    "window, fewer queries": (A.and_(causal(130), window(-30)), 126, 256),
    "window, fewer keys": (A.and_(causal(), window(40)), 256, 100),
    "both sides": (A.compare("le", A.abs(A.sub(K, Q)), Const(20)), 256, 256),
    "prefix": (PREFIX, 256, 256),
    "chunks": (CHUNKS, 250, 250),
    "nothing": (A.compare("gt", K, A.add(Q, Const(500))), 100, 100),
}


def size(device: Device, kernel: str) -> tuple[int, int]:
    """Queries and keys of a tile."""
    made = configs.Config(32, 64, 4, 1)
    if device != CPU:
        made = configs.config(device.capability, "forward" if kernel == "forward" else "backward", 32, 8, 8)
    return (made.BN, made.BM) if kernel == "backward_columns" else (made.BM, made.BN)


def ran(
    masks: list[Expr],
    B: int,
    Qn: int,
    Kn: int,
    operands: tuple[torch.Tensor, ...] = (),
    device: Device = CPU,
    fill: float = -INF,
) -> tuple[dict[str, Run], list[torch.Tensor]]:
    """The kernels' runs with a fill for each mask, and what each mask keeps, [B, 1, Q, K]."""
    q, k, v = qkv(B, 1, Qn, Kn, 8)
    spec = make_spec(q, k, v, operands, steps=(HALF, *(ReplaceFill(mask, fill) for mask in masks)), hidden="zero")
    scores = torch.zeros(B, 1, Qn, Kn)
    kept = [reference.keep_of(mask, scores, operands).expand_as(scores) for mask in masks]
    return run(spec, q, k, v, operands, device=device), kept


def visited(found: dict[str, Run]) -> dict[str, Tiles]:
    """By kernel; none may compute a tile twice."""
    for name in LOOPS:
        assert set(found[name].tiles.values()) <= {1}, name
    return {name: set(found[name].tiles) for name in LOOPS}


def needed(kept: torch.Tensor, device: Device = CPU) -> dict[str, Tiles]:
    """By kernel: the tiles that hold an element of kept."""
    return {name: as_set(tiles_of(kept.flatten(0, -3), *size(device, name))) for name in LOOPS}


def inside(kept: torch.Tensor, kernel: str) -> Tiles:
    """The tiles of a kernel that lie in the matrix and hold nothing but elements of kept."""
    BM, BN = size(CPU, kernel)
    whole = as_set(tiles_of(kept.flatten(0, -3), BM, BN, whole=True))
    return {(e, i, j) for e, i, j in whole if BM * (i + 1) <= kept.shape[-2] and BN * (j + 1) <= kept.shape[-1]}


@pytest.mark.parametrize("name", OF_INDICES)
def test_masks_of_indices_cost_the_tiles_that_they_leave(name: str) -> None:
    mask, Qn, Kn = OF_INDICES[name]
    found, (kept,) = ran([mask], 1, Qn, Kn)
    assert visited(found) == needed(kept)


@pytest.mark.parametrize("name", ["causal, fewer queries, last key", "window", "chunks"])
def test_tiles_of_other_sizes_are_counted_alike(name: str) -> None:
    mask, Qn, Kn = OF_INDICES[name]
    found, (kept,) = ran([mask], 1, Qn, Kn, device=GPU)
    assert size(GPU, "forward") != size(CPU, "forward")
    assert visited(found) == needed(kept, GPU)


@pytest.mark.parametrize("name", ["everything", "causal", "causal, ragged", "causal, fewer keys", "window", "nothing"])
def test_whole_tiles_are_computed_without_bounds(name: str) -> None:
    mask, Qn, Kn = OF_INDICES[name]
    found, (kept,) = ran([mask], 1, Qn, Kn)
    whole = as_set(tiles_of(kept.flatten(0, -3), 32, 64, whole=True))
    assert set(found["forward"].full) == whole
    # backward has no use for rows behind the last one
    for name in LOOPS[1:]:
        assert set(found[name].full) == inside(kept, name), name


@UNLISTED
def test_without_a_list_what_is_no_bound_on_the_key_is_evaluated_in_every_tile() -> None:
    keep = torch.rand(1, 1, 1, 256) < 0.9
    both = A.and_(causal(), dense(0))
    found, (kept,) = ran([both], 1, 256, 256, (keep,))
    # 'full' tells that the causal comparison holds; the padding is looked up in these tiles too
    causally = reference.keep_of(causal(), torch.zeros(1, 1, 256, 256), []).expand(1, 1, -1, -1)
    assert set(found["forward"].full) == as_set(tiles_of(causally.flatten(0, -3), 32, 64, whole=True))
    assert set(found["forward"].full) > as_set(tiles_of(kept.flatten(0, -3), 32, 64, whole=True))


@pytest.mark.parametrize(("Qn", "Kn"), [(256, 250), (250, 256)])
@pytest.mark.parametrize("name", ["padding", "documents", "chunks"])
def test_in_full_tiles_of_a_list_nothing_is_hidden(name: str, Qn: int, Kn: int) -> None:
    keep = torch.ones(2, 1, 1, Kn, dtype=torch.bool)
    keep[0, ..., 130:140] = False
    keep[1, ..., 60:] = False
    ids = torch.arange(256).div(80, rounding_mode="floor")
    given = (keep, ids[:Qn].view(1, 1, -1, 1), ids[:Kn].view(1, 1, 1, -1))
    chunks = A.compare("eq", A.floordiv(Q, Const(160)), A.floordiv(K, Const(160)))
    rest = {"padding": dense(0), "documents": documents(1, 2), "chunks": chunks}[name]
    found, (kept,) = ran([A.and_(causal(100), rest)], 2, Qn, Kn, given)
    whole = as_set(tiles_of(kept.flatten(0, -3), 32, 64, whole=True))
    assert whole
    assert set(found["forward"].full) == whole
    for name in LOOPS[1:]:
        assert set(found[name].full) == inside(kept, name), name


# -- masks that depend on data


def lengths_of(*kept: int, Kn: int = 256, left: bool = False) -> torch.Tensor:
    """A key padding mask [B, 1, 1, K]."""
    keep = torch.arange(Kn) < torch.tensor(kept).view(-1, 1, 1, 1)
    return keep.flip(-1) if left else keep


HOLES = torch.ones(2, 1, 1, 256, dtype=torch.bool)
HOLES[0, ..., 60:200] = False
HOLES[1, ..., ::3] = False
HOLES[1, ..., 128:192] = False
PADDING = {
    "right": lengths_of(100, 256),
    "left": lengths_of(100, 256, left=True),
    "holes": HOLES,
}


@BOTH
@pytest.mark.parametrize("name", PADDING)
@pytest.mark.parametrize("fill", [-INF, FLOAT_MIN])
def test_key_padding_costs_the_tiles_that_it_leaves(name: str, fill: float) -> None:
    keep = PADDING[name]
    found, (kept,) = ran([dense(0)], 2, 100, 256, (keep,), fill=fill)
    assert visited(found) == needed(kept)


@BOTH
def test_lengths_cost_the_tiles_that_they_leave() -> None:
    lengths = torch.tensor([3, 60, 64, 65]).view(4, 1, 1, 1)
    found, (kept,) = ran([A.compare("lt", K, Load(0, "int64"))], 4, 70, 200, (lengths,))
    assert visited(found) == needed(kept)


def ids_of(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Document ids of queries [1, 1, L, 1] and of keys [1, 1, 1, L]."""
    ids = torch.cat([torch.full((n,), 3 * i) for i, n in enumerate(lengths)]).view(1, 1, -1, 1)
    return ids, ids.mT.contiguous()


@BOTH
@pytest.mark.parametrize("lengths", [(64, 64, 128), (30, 45, 25, 100, 50), (1,) * 200, (250,)])
@pytest.mark.parametrize("also", ["", "causal"])
def test_sorted_documents_cost_the_tiles_that_they_leave(lengths: tuple[int, ...], also: str) -> None:
    ids = ids_of(*lengths)
    total = sum(lengths)
    mask = A.and_(causal(), documents(0, 1)) if also else documents(0, 1)
    found, (kept,) = ran([mask], 1, total, total, ids)
    assert visited(found) == needed(kept)


@BOTH
def test_unsorted_documents_cost_no_more_than_the_tiles_whose_ranges_of_ids_meet() -> None:
    # runs of 16 tokens; of the ids of a tile only the least and the greatest are known
    ids = torch.randint(0, 12, (16,)).repeat_interleave(16).view(1, 1, 256, 1)
    found, (kept,) = ran([documents(0, 1)], 1, 256, 256, (ids, ids.mT.contiguous()))
    for name, tiles in visited(found).items():
        BM, BN = size(CPU, name)
        rows, columns = ids.view(-1, BM), ids.view(-1, BN)
        meet = (rows.amin(1)[:, None] <= columns.amax(1)) & (columns.amin(1) <= rows.amax(1)[:, None])
        assert needed(kept)[name] <= tiles, name
        assert tiles == as_set(meet[None]), name


@BOTH
@pytest.mark.parametrize("name", PADDING)
@pytest.mark.parametrize("joined", [False, True])
def test_masks_together_cost_no_more_than_the_tiles_in_which_each_leaves_something(name: str, joined: bool) -> None:
    masks = [causal(), dense(0)]
    given = [A.and_(*masks)] if joined else masks
    found, kept = ran(given, 2, 256, 256, (PADDING[name],))
    scores = torch.zeros(2, 1, 256, 256)
    each = [reference.keep_of(mask, scores, [PADDING[name]]).expand_as(scores) for mask in masks]
    # a tile in which one mask leaves some elements and the other one only others is computed in vain
    bound = needed(each[0])
    for kernel, tiles in needed(each[1]).items():
        bound[kernel] &= tiles
    every = torch.stack(kept).all(0)
    for kernel, tiles in visited(found).items():
        assert tiles == bound[kernel], kernel
        assert needed(every)[kernel] <= tiles, kernel
        if name == "right":
            assert needed(every)[kernel] == tiles, kernel


def test_a_mask_tensor_of_all_queries_and_keys_skips_nothing() -> None:
    keep = torch.ones(1, 1, 100, 200, dtype=torch.bool).tril()
    found, (kept,) = ran([dense(0)], 1, 100, 200, (keep,))
    for name, tiles in visited(found).items():
        assert tiles == as_set(torch.ones_like(tiles_of(kept.flatten(0, -3), *size(CPU, name)))), name


# -- rows that see hidden keys after all


def test_a_tile_with_a_row_that_has_no_key_is_computed_over_all_keys_once_more() -> None:
    # with a finite fill such a row is the mean over all keys
    q, k, v = qkv(1, 1, 200, 200, 8)
    scores = torch.zeros(1, 1, 200, 200)
    mask = causal(-40)
    spec = make_spec(q, k, v, steps=(HALF, AddFill(mask, FLOAT_MIN)))
    found = run(spec, q, k, v)
    kept = reference.keep_of(mask, scores, []).expand_as(scores)
    doubtful = torch.nn.functional.pad(~kept.any(-1), (0, 24)).view(1, 7, 32).any(-1)
    again = as_set(doubtful[:, :, None].expand(-1, -1, 4))
    expected = Counter(needed(kept)["forward"]) + Counter(again)
    assert found["forward"].tiles == expected
    # in backward the flag is there before the loop is: no tile is computed twice
    assert set(found["backward_rows"].tiles) == needed(kept)["backward_rows"] | again
    # without a mask that is looked at tile by tile a column takes all queries of such an element
    assert set(found["backward_columns"].tiles) == as_set(torch.ones(1, 4, 7))
    assert {n for name in LOOPS[1:] for n in found[name].tiles.values()} == {1}


@BOTH
@pytest.mark.parametrize("tile", [(16, 64), (64, 16)])
def test_all_queries_of_a_tile_may_see_hidden_keys(tile: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    # queries 16 to 31 are of no document; keys from 64 on are of another one than the queries before those
    monkeypatch.setattr(Call, "table", lambda self, which: configs.Config(*tile, 4, 1))
    of_queries, of_keys = torch.zeros(1, 1, 70, 1, dtype=torch.int64), torch.zeros(1, 1, 1, 150, dtype=torch.int64)
    of_queries[..., 16:32, :] = -1
    of_keys[..., 64:] = 7
    check(triton, *qkv(1, 1, 70, 150, 16), [of_queries, of_keys], steps=(HALF, ReplaceFill(documents(0, 1), FLOAT_MIN)))


@BOTH
@pytest.mark.parametrize("shape", [(1, 1, 1, 150), (1, 1, 70, 1), (1, 1, 1, 1)])
def test_any_byte_but_0_is_a_true_bool(shape: tuple[int, ...]) -> None:
    keep = torch.full(shape, 2, dtype=torch.uint8).view(torch.bool)
    once = A.compare("eq", A.add(A.int_(Load(0, "bool")), A.int_(Load(1, "bool"))), Const(1))
    check(triton, *qkv(1, 1, 70, 150, 16), [keep, torch.zeros_like(keep)], steps=(HALF, ReplaceFill(once, -INF)))


def test_rows_of_padding_without_a_gradient_cost_nothing_in_backward() -> None:
    q, k, v = qkv(2, 1, 256, 256, 8)
    keep = PADDING["left"]
    mask = A.and_(causal(), dense(0))
    spec = make_spec(q, k, v, [keep], steps=(HALF, AddFill(mask, FLOAT_MIN)))
    dout = torch.randn(2, 1, 256, 8) * keep.mT
    found = run(spec, q, k, v, [keep], dout=dout)
    scores = torch.zeros(2, 1, 256, 256)
    bound = needed(reference.keep_of(causal(), scores, []).expand_as(scores))
    for name, tiles in needed(keep.expand_as(scores)).items():
        bound[name] &= tiles
    assert set(found["backward_rows"].tiles) == bound["backward_rows"]
    assert set(found["backward_columns"].tiles) == bound["backward_columns"]


def test_heads_that_share_keys_each_cost_their_tiles() -> None:
    q, k, v = randn(1, 2, 3, 200, 8), randn(1, 2, 1, 200, 8), randn(1, 2, 1, 200, 8)
    spec = make_spec(q, k, v, steps=(HALF, ReplaceFill(causal(), -INF)), hidden="zero")
    found = run(spec, q, k, v)
    kept = reference.keep_of(causal(), torch.zeros(1, 2, 3, 200, 200), []).expand(1, 2, 3, -1, -1)
    for name in LOOPS[:2]:
        assert found[name].tiles == Counter(needed(kept)[name]), name
    # one program goes through the queries of all three heads
    expected = Counter(dict.fromkeys(needed(kept[:, :, 0])["backward_columns"], 3))
    assert found["backward_columns"].tiles == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_heads_that_share_keys_are_split_where_programs_would_be_few(dtype: torch.dtype) -> None:
    # one head of keys for 6 of queries: 2 programs, of which each would go through 6 * 5 tiles of queries
    q, k, v = randn(1, 6, 320, 8, dtype=dtype), *(randn(1, 1, 40, 8, dtype=dtype) for _ in range(2))
    found = run(make_spec(q, k, v, steps=(HALF,)), q, k, v)["backward_columns"]
    assert found.programs == 6 * 2
    assert found.tiles == Counter({(e, i, j): 1 for e in range(6) for i in range(5) for j in range(2)})
    check(triton, q, k, v, steps=(HALF, ReplaceFill(causal(), -INF)))


def test_a_list_is_made_of_chunks_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    # two tiles of keys at once, or four of queries
    monkeypatch.setattr(lists, "_WIDTH", 128)
    keep = torch.ones(2, 1, 1, 500, dtype=torch.bool)
    keep[0, ..., :130] = keep[0, ..., 200:330] = keep[1, ..., 64:128] = keep[1, ..., 400:] = False
    found, (kept,) = ran([dense(0)], 2, 300, 500, (keep,))
    assert visited(found) == needed(kept)
    for name in LOOPS[1:]:
        assert set(found[name].full) == inside(kept, name), name
    given = qkv(2, 2, 300, 500, 8)
    check(triton, *given, [keep], steps=(HALF, ReplaceFill(A.and_(causal(150), dense(0)), -INF)), hidden="zero")


# -- ids that ascend, of which bisection finds the tiles


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tiles are looked at at once, as if there were many."""
    monkeypatch.setattr(lists, "_WIDTH", 128)


def samples_of(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of samples of 16 to 64 tokens in a row of that length."""
    lengths = torch.randint(16, 65, (length // 16,), generator=torch.Generator().manual_seed(0)).tolist()
    ids, keys = ids_of(*lengths)
    return ids[..., :length, :], keys[..., :length]


def lists_of(mask: Expr, ids: tuple[torch.Tensor, torch.Tensor]) -> tuple[dict[str, Tiles], int]:
    """What `listed` names for the queries of a tile and for the keys of one, as the kernels' tiles, and the bytes that are read for
    it. Ids are those of a whole batch, of which each element has lists of its own."""
    B, Qn, Kn = ids[0].shape[0], ids[0].shape[-2], ids[1].shape[-1]
    q, k, v = qkv(B, 1, Qn, Kn, 1)
    spec = make_spec(q, k, v, ids, steps=(ReplaceFill(mask, -INF),), hidden="zero")
    counted, names = Run(0), []

    def counting(kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
        names.append(kernel.__name__)
        with counted_bytes(counted):
            kernel[(programs,)](**arguments)

    call = Call(spec, Inputs(q, k, v, list(ids)), CPU, counting)
    BM, BN = size(CPU, "forward")
    made = configs.Config(BM, BN, 4, 1)
    found = {}
    for name, given, own, others in (
        ("forward", lists.rows(call, made, ragged=False), -(-Qn // BM), -(-Kn // BN)),
        ("columns", lists.columns(call, made), -(-Kn // BN), -(-Qn // BM)),
    ):
        assert given["LISTED"]
        found[name] = {
            (e, tile, other) if name == "forward" else (e, other, tile)
            for e, row in enumerate(given["LIST"].flatten(0, -2).tolist())
            for tile in range(own)
            for one in [row[tile * (2 + others) : (tile + 1) * (2 + others)]]
            for other in one[2 : 2 + one[1]] + one[2 + others - one[0] : 2 + others]
        }
    assert names == ["ascending", "listed", "listed"]
    return found, counted.read


def tiles_left(mask: Expr, ids: tuple[torch.Tensor, torch.Tensor]) -> Tiles:
    """The tiles of 32 queries and 64 keys that hold an element."""
    scores = torch.zeros(ids[0].shape[0], 1, ids[0].shape[-2], ids[1].shape[-1])
    return as_set(
        tiles_of(reference.keep_of(mask, scores, ids).expand_as(scores).flatten(0, -3), *size(CPU, "forward"))
    )


@pytest.mark.usefixtures("narrow")
def test_lists_of_short_samples_cost_what_is_linear_in_their_number() -> None:
    mask = A.and_(causal(), documents(0, 1))
    once, twice = (lists_of(mask, samples_of(length))[1] for length in (512, 1024))
    # a step of the bisections more
    assert 1.9 * once < twice < 2.2 * once
    of_queries, of_keys = (x.clone() for x in samples_of(1024))
    of_queries[..., -1, :] = of_keys[..., -1] = -1
    # all tiles of the causal half
    assert lists_of(mask, (of_queries, of_keys))[1] > 2 * twice


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("ascending", torch.int32),
        ("other keys", torch.int64),
        ("one falls", torch.int64),
        ("by element", torch.uint8),
    ],
)
def test_bisection_leaves_the_tiles_that_ids_leave(kind: str, dtype: torch.dtype) -> None:
    mask = documents(0, 1, str(dtype).removeprefix("torch."))
    of_queries, of_keys = (x.clone() for x in samples_of(500))
    if kind == "other keys":
        # of other lengths, with ids that no query has
        of_queries, of_keys = (
            of_queries[..., 130:430, :],
            torch.arange(500).div(37, rounding_mode="floor").view(1, 1, 1, 500),
        )
    if kind == "one falls":
        of_keys[..., 250] = 0
    if kind == "by element":
        falling = of_keys.flip(-1)
        of_queries, of_keys = torch.cat([of_queries, falling.mT]), torch.cat([of_keys, falling])
    ids = (of_queries.to(dtype), of_keys.to(dtype))
    for tiles in lists_of(mask, ids)[0].values():
        assert tiles >= tiles_left(mask, ids)
        # of ids that do not ascend no more than the least and the greatest of a tile is known
        assert tiles == tiles_left(mask, ids) or kind == "one falls"


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("fall", [False, True])
def test_where_lists_would_be_too_large_loops_begin_and_end_by_bisection(
    fall: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lists, "_MOST", 0)
    looked: list[int] = []
    first, second = ids_of(*(40,) * 8), ids_of(*(64, 16) * 4)
    ids = tuple(torch.cat(x) for x in zip(first, second, strict=True))
    if fall:
        ids[0][1, ..., 100, :] = 99
    q, k, v = qkv(2, 2, 320, 320, 8)
    spec = make_spec(q, k, v, ids, steps=(HALF, ReplaceFill(documents(0, 1), -INF)), hidden="zero")

    def counting(kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
        if "SEEN" in arguments:
            seen = arguments["SEEN"]
            arguments = {**arguments, "SEEN": lambda *given: looked.append(1) or seen(*given)}
        kernel[(programs,)](**arguments)

    out, stats = layout.allocate(spec, Inputs(q, k, v, list(ids)))
    call = Call(spec, Inputs(q, k, v, list(ids)), CPU, counting)
    launch.forward(call, out, stats)
    # 10 tiles of queries by 5 of keys, of each element and head
    left = 2 * len(tiles_left(documents(0, 1), ids))  # type: ignore[arg-type]
    assert len(looked) == left if not fall else len(looked) >= left + 10
    check(triton, q, k, v, ids, steps=(HALF, AddFill(documents(0, 1), FLOAT_MIN)))


@pytest.mark.usefixtures("narrow")
def test_a_planned_call_finds_out_anew_whether_ids_ascend() -> None:
    q, k, v = qkv(1, 1, 192, 192, 8)
    ids = ids_of(*(32,) * 6)
    spec = make_spec(q, k, v, ids, steps=(HALF, ReplaceFill(documents(0, 1), -INF)))
    for _ in range(3):
        triton.forward(spec, Inputs(q, k, v, list(ids)))
    for x in ids:
        x[..., -1, -1] = 0
    out, _ = triton.forward(spec, Inputs(q, k, v, list(ids)))
    exact, eager = (
        evaluate(spec, [q, k, v, *ids], None, dtype, torch.ones_like(out))[0]
        for dtype in (torch.float64, torch.float32)
    )
    assert_close(out, exact, eager, "out")
    check(triton, q, k, v, ids, steps=(HALF, AddFill(documents(0, 1), FLOAT_MIN)))
