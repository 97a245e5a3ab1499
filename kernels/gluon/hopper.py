"""The forward kernel for compute capability 9.0, in Gluon: one warp loads tiles, groups of four warps compute.

Each group has BM queries of its own, and all of them the same keys, so that they share nothing but the tiles in memory: a ring of
STAGES tiles of K and one of V, with a barrier for each tile that is loaded and one for each that is free again. A group issues
the product of a tile's scores and that of the weights before, and makes weights of the scores while the second one runs; the other
groups do the same at other times, so that products of one run beside the exponentials of another.

The functions of codegen.py and the names of template.py are what they are in the Triton kernels, which read the statistics for
backward.

Source: Shah et al. 2024, arXiv:2407.08608 (warps that load, and products beside the softmax, within a group and between groups).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language import core

from attnfuse.kernels.triton.template import COUNTS, clipped, finished, index_of, marked, powers

#: Triton 3.9 has other names for copies.
copy_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
copy_out = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

if hasattr(tma, "async_atomic_add"):
    add_out = tma.async_atomic_add
else:
    # Triton 3.6 and 3.7 have the instruction, but no name for it
    @core.builtin
    def add_out(tensor, place, tile, _semantic=None):
        place = _semantic._convert_to_ir_values(place, require_i64=False)
        _semantic.builder.create_async_tma_reduce(core.ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor.handle, place, tile.handle)


@gluon.jit
def span(KEYS: gl.constexpr, q0, rows: gl.constexpr, context, BN: gl.constexpr, WHOLE: gl.constexpr):
    """(first key, number of tiles) that `rows` queries from q0 on need; at least one tile."""
    at, st, n, Qn, Kn = context
    lo, hi, full_lo, full_hi = KEYS(q0, gl.minimum(q0 + rows, Qn) - 1, at, st, n, Qn, Kn)
    lo, hi = clipped(lo, hi, Kn, BN)
    if WHOLE:
        lo, hi = lo * 0, Kn
    return lo, gl.maximum(gl.cdiv(hi - lo, BN), 1)


@gluon.jit
def load(Q, K, V, places, rings, q0, lo, count, BM: gl.constexpr, BN: gl.constexpr, GROUPS: gl.constexpr,
         STAGES: gl.constexpr):  # fmt: skip
    """What the loading warp does. places: the batch indices of q, k and v."""
    q_place, k_place, v_place = places
    q_tiles, k_tiles, v_tiles, ready_q, ready_k, ready_v, free_k, free_v, turns = rings
    for g in gl.static_range(GROUPS):
        mbarrier.expect(ready_q.index(g), Q.block_type.nbytes)
        copy_in(Q, q_place + (q0 + g * BM, 0), ready_q.index(g), q_tiles.index(g))
    for i in range(count):
        at = i % STAGES
        # the first tiles find an empty ring
        phase = (i // STAGES & 1) ^ 1
        mbarrier.wait(free_k.index(at), phase)
        mbarrier.expect(ready_k.index(at), K.block_type.nbytes)
        copy_in(K, k_place + (lo + i * BN, 0), ready_k.index(at), k_tiles.index(at))
        mbarrier.wait(free_v.index(at), phase)
        mbarrier.expect(ready_v.index(at), V.block_type.nbytes)
        copy_in(V, v_place + (lo + i * BN, 0), ready_v.index(at), v_tiles.index(at))


@gluon.jit
def softmax(s, m, l, q, k, context, SCORE: gl.constexpr, FULL: gl.constexpr, NEAR: gl.constexpr, FACTOR: gl.constexpr):
    """The weights of a tile of q @ k, the new maximum and sum, and what the sums of before have to be multiplied with."""
    at, st, n, Qn, Kn = context
    s, saved = SCORE(s, q, k, FULL, at, st, n, Qn, Kn)
    if not FULL:
        s = gl.where(k < Kn, s, float("-inf"))
    top = gl.maximum(m, gl.max(s, 1))
    shift = gl.where(top == float("-inf"), 0.0, top)
    p = powers(s, gl.expand_dims(shift, 1), NEAR, FACTOR)
    fade = powers(m, shift, NEAR, FACTOR)
    return p, top, l * fade + gl.sum(p, 1), fade


@gluon.jit
def step(i, count, acc, p, m, l, fade, qt, rings, q, k, lo, zero, context, GROUP: gl.constexpr, BN: gl.constexpr,
         D: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, IN_TURN: gl.constexpr, SCORE: gl.constexpr,
         FULL: gl.constexpr, NEAR: gl.constexpr, FACTOR: gl.constexpr):  # fmt: skip
    """(acc, p, m, l, fade) after tile i of the keys. Its weights p are not in acc yet, which fade is for. lo: the first key of tile
    0; k: the keys of a tile, counted from 0.

    The order is that of the instructions: sums are made smaller beside the first product, and the wait for the next keys, a
    loop, keeps the compiler from putting the softmax behind the wait for the second one.
    """
    q_tiles, k_tiles, v_tiles, ready_q, ready_k, ready_v, free_k, free_v, turns = rings
    here, before = i % STAGES, (i - 1) % STAGES
    if IN_TURN:
        # the first group need not wait for its first turn
        mbarrier.wait(turns.index(GROUP), (i if GROUP == 0 else i - 1) & 1)
    s = warpgroup_mma(qt, k_tiles.index(here).reshape([BN, D]).permute((1, 0)), zero, use_acc=False, is_async=True)
    acc = acc * gl.expand_dims(gl.convert_layout(fade, gl.SliceLayout(1, acc.type.layout)), 1)
    mbarrier.wait(ready_v.index(before), (i - 1) // STAGES & 1)
    acc = warpgroup_mma(p, v_tiles.index(before).reshape([BN, D]), acc, is_async=True)
    if IN_TURN:
        mbarrier.arrive(turns.index((GROUP + 1) % GROUPS), count=1)
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(free_k.index(here), count=1)
    w, m, l, fade = softmax(s, m, l, q, (lo + i * BN) + k, context, SCORE, FULL, NEAR, FACTOR)
    w = gl.convert_layout(w.to(p.dtype), p.type.layout)
    mbarrier.wait(ready_k.index((i + 1) % STAGES), (i + 1) // STAGES & 1, pred=i + 1 < count)
    acc, w, fade = warpgroup_mma_wait(0, deps=[acc, w, fade])
    mbarrier.arrive(free_v.index(before), count=1)
    return acc, w, m, l, fade


@gluon.jit
def compute(GROUP: gl.constexpr, O, M, place, line, lines, rings, q0, lo, count, context, BM: gl.constexpr,
            BN: gl.constexpr, D: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, IN_TURN: gl.constexpr,
            SCORE: gl.constexpr, KEYS: gl.constexpr, LEFT: gl.constexpr, LOWER: gl.constexpr, NEAR: gl.constexpr,
            FACTOR: gl.constexpr, HIDDEN: gl.constexpr):  # fmt: skip
    """What a group does: rows q0 + GROUP * BM and on of the result."""
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    A: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    W: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=A, k_width=2)
    at, st, n, Qn, Kn = context
    q_tiles, k_tiles, v_tiles, ready_q, ready_k, ready_v, free_k, free_v, turns = rings
    own = q0 + GROUP * BM
    q = gl.expand_dims(own + gl.arange(0, BM, layout=gl.SliceLayout(1, S)), 1)
    k = gl.expand_dims(gl.arange(0, BN, layout=gl.SliceLayout(0, S)), 0)
    # tiles [first, last) need no comparison with the key in this group
    some_lo, some_hi, full_lo, full_hi = KEYS(own, gl.minimum(own + BM, Qn) - 1, at, st, n, Qn, Kn)
    last = gl.minimum(gl.maximum((gl.minimum(full_hi, Kn) - lo) // BN, 1), count)
    first = 1
    if LOWER:
        first = gl.minimum(gl.maximum(gl.cdiv(full_lo - lo, BN), 1), last)
    q_tile = q_tiles.index(GROUP)
    qt = q_tile.reshape([BM, D])
    zero = gl.zeros((BM, BN), gl.float32, layout=S)
    acc = gl.zeros((BM, D), gl.float32, layout=A)
    m = gl.full((BM,), float("-inf"), gl.float32, layout=gl.SliceLayout(1, S))
    l = gl.zeros((BM,), gl.float32, layout=gl.SliceLayout(1, S))

    mbarrier.wait(ready_q.index(GROUP), 0)
    mbarrier.wait(ready_k.index(0), 0)
    s = warpgroup_mma(qt, k_tiles.index(0).reshape([BN, D]).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(free_k.index(0), count=1)
    p, m, l, fade = softmax(s, m, l, q, lo + k, context, SCORE, False, NEAR, FACTOR)
    p = gl.convert_layout(p.to(O.dtype), W)
    mbarrier.wait(ready_k.index(1), 0, pred=1 < count)
    if LOWER:
        for i in range(1, first):
            acc, p, m, l, fade = step(
                i, count, acc, p, m, l, fade, qt, rings, q, k, lo, zero, context, GROUP, BN, D, GROUPS, STAGES, IN_TURN, SCORE,
                False, NEAR, FACTOR,
            )  # fmt: skip
    for i in range(first, last):
        acc, p, m, l, fade = step(
            i, count, acc, p, m, l, fade, qt, rings, q, k, lo, zero, context, GROUP, BN, D, GROUPS, STAGES, IN_TURN, SCORE,
            True, NEAR, FACTOR,
        )  # fmt: skip
    for i in range(last, count):
        acc, p, m, l, fade = step(
            i, count, acc, p, m, l, fade, qt, rings, q, k, lo, zero, context, GROUP, BN, D, GROUPS, STAGES, IN_TURN, SCORE,
            False, NEAR, FACTOR,
        )  # fmt: skip
    acc = acc * gl.expand_dims(gl.convert_layout(fade, gl.SliceLayout(1, A)), 1)
    before = (count - 1) % STAGES
    mbarrier.wait(ready_v.index(before), (count - 1) // STAGES & 1)
    acc = warpgroup_mma(p, v_tiles.index(before).reshape([BN, D]), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])

    m = gl.convert_layout(m * FACTOR, gl.SliceLayout(1, A))
    l = gl.convert_layout(l, gl.SliceLayout(1, A))
    rows = own + gl.arange(0, BM, layout=gl.SliceLayout(1, A))
    out, total = finished(acc, m, l, gl.expand_dims(rows, 1), at, st, n, Qn, Kn, BM, BN, LEFT, False, HIDDEN, False)
    gl.store(M + line + rows, marked(m, l), mask=rows < Qn)
    gl.store(M + lines + line + rows, total, mask=rows < Qn)
    # nothing reads the queries any more
    qt.store(out.to(O.dtype))
    fence_async_shared()
    copy_out(O, place + (own, 0), q_tile)
    tma.store_wait(0)


@gluon.jit(do_not_specialize_on_alignment=COUNTS)
def forward(
    Q, K, V, O, M, ops, sizes, qb, kb, vb, ob, bst, st, n, lines, Qn, Kn,
    D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
    IN_TURN: gl.constexpr, BASES: gl.constexpr, SCORE: gl.constexpr, KEYS: gl.constexpr, LEFT: gl.constexpr, LOWER: gl.constexpr,
    WHOLE: gl.constexpr, NEAR: gl.constexpr, FACTOR: gl.constexpr, HIDDEN: gl.constexpr,
):  # fmt: skip
    """out and stats [2, lines] of GROUPS * BM queries of one batch element.

    Q, K, V, O: tensor descriptors [*batch, rows, D], with the strides of their batch indices: 1, or 0 where they are broadcast.
    WHOLE: a row may see keys that its masks hide, so that no tile is left out. IN_TURN: groups issue their products one after the
    other.
    """
    # the last queries first: under a causal mask they take longest
    tiles = gl.cdiv(Qn, GROUPS * BM)
    e = gl.program_id(0) // tiles
    q0 = (tiles - 1 - gl.program_id(0) % tiles) * (GROUPS * BM)
    wide = e.to(gl.int64)
    context = (BASES(wide, sizes, ops, bst), st, n, Qn, Kn)
    lo, count = span(KEYS, q0, GROUPS * BM, context, BN, WHOLE)
    places = (index_of(e, sizes, qb), index_of(e, sizes, kb), index_of(e, sizes, vb))
    place = index_of(e, sizes, ob)
    line = wide * Qn

    q_tiles = gl.allocate_shared_memory(Q.dtype, [GROUPS] + Q.block_type.shape, Q.layout)
    k_tiles = gl.allocate_shared_memory(K.dtype, [STAGES] + K.block_type.shape, K.layout)
    v_tiles = gl.allocate_shared_memory(V.dtype, [STAGES] + V.block_type.shape, V.layout)
    ready_q = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    ready_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free_k = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free_v = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    for g in gl.static_range(GROUPS):
        mbarrier.init(ready_q.index(g), count=1)
        mbarrier.init(turns.index(g), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready_k.index(i), count=1)
        mbarrier.init(ready_v.index(i), count=1)
        mbarrier.init(free_k.index(i), count=GROUPS)
        mbarrier.init(free_v.index(i), count=GROUPS)
    rings = (q_tiles, k_tiles, v_tiles, ready_q, ready_k, ready_v, free_k, free_v, turns)
    if GROUPS == 2:
        gl.warp_specialize([
            (compute, (0, O, M, place, line, lines, rings, q0, lo, count, context, BM, BN, D, GROUPS, STAGES, IN_TURN, SCORE,
                       KEYS, LEFT, LOWER, NEAR, FACTOR, HIDDEN)),
            (compute, (1, O, M, place, line, lines, rings, q0, lo, count, context, BM, BN, D, GROUPS, STAGES, IN_TURN, SCORE,
                       KEYS, LEFT, LOWER, NEAR, FACTOR, HIDDEN)),
            (load, (Q, K, V, places, rings, q0, lo, count, BM, BN, GROUPS, STAGES)),
        ], [4, 1], [REGISTERS, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (compute, (0, O, M, place, line, lines, rings, q0, lo, count, context, BM, BN, D, GROUPS, STAGES, IN_TURN, SCORE,
                       KEYS, LEFT, LOWER, NEAR, FACTOR, HIDDEN)),
            (compute, (1, O, M, place, line, lines, rings, q0, lo, count, context, BM, BN, D, GROUPS, STAGES, IN_TURN, SCORE,
                       KEYS, LEFT, LOWER, NEAR, FACTOR, HIDDEN)),
            (compute, (2, O, M, place, line, lines, rings, q0, lo, count, context, BM, BN, D, GROUPS, STAGES, IN_TURN, SCORE,
                       KEYS, LEFT, LOWER, NEAR, FACTOR, HIDDEN)),
            (load, (Q, K, V, places, rings, q0, lo, count, BM, BN, GROUPS, STAGES)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 24])  # fmt: skip
