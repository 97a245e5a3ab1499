"""The backward kernel for compute capability 9.0, in Gluon."""

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

from attnfuse.kernels.gluon.hopper import copy_in
from attnfuse.kernels.triton.template import COUNTS, LOG2E, clipped, edge_tile, index_of, parted, powers, scores_grad


@core.builtin
def add_out(tensor, place, tile, _semantic=None):
    place = _semantic._convert_to_ir_values(place, require_i64=False)
    _semantic.builder.create_async_tma_reduce(core.ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor.handle, place, tile.handle)


@gluon.jit
def tiles_of(QUERIES: gl.constexpr, k0, k1, whole, context, BM: gl.constexpr, BN: gl.constexpr):
    """(lo, first, last, edges, fulls) of the queries of a tile of keys, as parted() in template.py."""
    at, st, n, Qn, Kn = context
    lo, hi, first, last = QUERIES(k0, k1, at, st, n, Qn, Kn)
    lo, hi = clipped(lo, hi, Qn, BM)
    lo = gl.where(whole, 0, lo)
    hi = gl.where(whole, Qn, hi)
    last = gl.where(k0 + BN <= Kn, last, 0)
    first, last, edges, fulls = parted(lo, hi, first, last, BM)
    return lo, first, last, edges, fulls


@gluon.jit
def element(head, member, outer, inner, eb, sizes, ops, bst, F, marks, HIDES: gl.constexpr, OFFSET: gl.constexpr,
            BASES: gl.constexpr):  # fmt: skip
    other = gl.to_tensor(member).to(gl.int64)
    wide = OFFSET(head, outer, eb) + OFFSET(other, inner, eb)
    whole = False
    if HIDES:
        whole = gl.load(F + marks + wide) != 0
    return wide, BASES(wide, sizes, ops, bst), whole


@gluon.jit
def load(Q, G, K, V, key_places, rings, k0, k1, tile, head, members, outer, inner, eb, sizes, qb, gb, ops, bst, st, n, F, marks, W,
         lines, Qn, Kn, MERGED: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, HIDES: gl.constexpr, OFFSET: gl.constexpr,
         BASES: gl.constexpr, QUERIES: gl.constexpr):  # fmt: skip
    k_place, v_place = key_places
    k_tiles, v_tiles, q_tiles, g_tiles, ready_kv, ready_q, ready_g, free_q, free_g, shifts, deltas, inverses = rings
    for g in gl.static_range(2):
        mbarrier.expect(ready_kv.index(g), K.block_type.nbytes + V.block_type.nbytes)
        copy_in(K, k_place + (k0 + g * 64, 0), ready_kv.index(g), k_tiles.index(g))
        copy_in(V, v_place + (k0 + g * 64, 0), ready_kv.index(g), v_tiles.index(g))
    c = 0
    rows = gl.arange(0, BM, layout=gl.BlockedLayout([1], [32], [1], [0]))
    for member in range(members):
        wide, at, whole = element(head, member, outer, inner, eb, sizes, ops, bst, F, marks, HIDES, OFFSET, BASES)
        context = (at, st, n, Qn, Kn)
        lo, first, last, edges, fulls = tiles_of(QUERIES, k0, k1, whole, context, BM, BN)
        q_place = index_of(wide.to(gl.int32), sizes, qb)
        g_place = index_of(wide.to(gl.int32), sizes, gb)
        for i in range(fulls + edges):
            q0 = gl.where(i < fulls, first + i * BM, edge_tile(i - fulls, lo, first, last, F, Qn, False, BM, False))
            slot = c % STAGES
            phase = (c // STAGES & 1) ^ 1
            numbers = q0 + rows
            shift = gl.load(W + wide * Qn + numbers, mask=numbers < Qn, other=0.0)
            delta = gl.load(W + 2 * lines + wide * Qn + numbers, mask=numbers < Qn, other=0.0)
            mbarrier.wait(free_q.index(slot), phase)
            mbarrier.expect(ready_q.index(slot), Q.block_type.nbytes)
            copy_in(Q, q_place + (q0, 0), ready_q.index(slot), q_tiles.index(slot))
            shifts.index(slot).store(shift)
            deltas.index(slot).store(delta)
            if not MERGED:
                inverse = gl.load(W + lines + wide * Qn + numbers, mask=numbers < Qn, other=0.0)
                inverses.index(slot).store(inverse)
            mbarrier.arrive(ready_q.index(slot), count=1)
            mbarrier.wait(free_g.index(slot), phase)
            mbarrier.expect(ready_g.index(slot), G.block_type.nbytes)
            copy_in(G, g_place + (q0, 0), ready_g.index(slot), g_tiles.index(slot))
            c += 1


@gluon.jit
def weights(s, shift, inverse, q, k, context, SCORE: gl.constexpr, WEIGH: gl.constexpr, FULL: gl.constexpr, MERGED: gl.constexpr,
            FACTOR: gl.constexpr, ZEROS: gl.constexpr):  # fmt: skip
    at, st, n, Qn, Kn = context
    s, saved = SCORE(s, q, k, FULL, at, st, n, Qn, Kn)
    shift, inverse = gl.expand_dims(shift, 0), gl.expand_dims(inverse, 0)
    if MERGED:
        p = gl.exp2(s * (FACTOR * LOG2E) - shift)
        live = shift != float("inf")
    else:
        if FACTOR == 1.0:
            p = powers(s, shift, False, 1.0)
        else:
            p = gl.exp2(s * (FACTOR * LOG2E) - shift * LOG2E)
        p = p * inverse
        live = inverse != 0.0
    if not FULL:
        live = live & (q < Qn) & (k < Kn)
    if ZEROS or not FULL:
        p = gl.where(live, p, 0.0)
    return p, WEIGH(p, q, k, at, st, n, Qn, Kn), (saved, live, live)


@gluon.jit
def step(c, q0, dk, dv, rings, own, rows, k, dq_place, DQ, context, GROUP: gl.constexpr, BM: gl.constexpr,
         D: gl.constexpr, STAGES: gl.constexpr, SCORE: gl.constexpr, SCORE_GRAD: gl.constexpr, WEIGH: gl.constexpr,
         WEIGH_GRAD: gl.constexpr, FULL: gl.constexpr, MERGED: gl.constexpr, FACTOR: gl.constexpr, ZEROS: gl.constexpr):  # fmt: skip
    at, st, n, Qn, Kn = context
    k_tiles, v_tiles, q_tiles, g_tiles, ready_kv, ready_q, ready_g, free_q, free_g, shifts, deltas, inverses = rings
    s_tiles, ready_s, add_tiles, zero, zero_dq = own
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=dv.type.layout, k_width=2)
    slot = c % STAGES
    phase = c // STAGES & 1
    HALF: gl.constexpr = D // 2
    none = c >> 30
    qt = q_tiles.index(slot).reshape([BM, D])
    gt = g_tiles.index(slot).reshape([BM, D])
    kt = k_tiles.index(GROUP + none).reshape([64, D])
    vt = v_tiles.index(GROUP + none).reshape([64, D])
    numbers = q0 + rows
    mbarrier.wait(ready_q.index(slot), phase)
    s = warpgroup_mma(kt, qt.permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(ready_g.index(slot), phase)
    dw = warpgroup_mma(vt, gt.permute((1, 0)), zero, use_acc=False, is_async=True)
    L: gl.constexpr = gl.SliceLayout(0, zero.type.layout)
    shift = shifts.index(slot).load(L)
    inverse = shift
    if not MERGED:
        inverse = inverses.index(slot).load(L)
    s = warpgroup_mma_wait(1, deps=[s])
    q = gl.expand_dims(numbers, 0)
    p, w, more = weights(s, shift, inverse, q, k, context, SCORE, WEIGH, FULL, MERGED, FACTOR, ZEROS)
    w = gl.convert_layout(w.to(gt.dtype), A)
    EARLY: gl.constexpr = FULL and (D == 64 or len(more[0]) == 0)
    if EARLY:
        dv = warpgroup_mma(w, gt, dv, is_async=True)
    delta = deltas.index(slot).load(L)
    if EARLY:
        dw = warpgroup_mma_wait(1, deps=[dw])
    else:
        dw = warpgroup_mma_wait(0, deps=[dw])
    ds = scores_grad(dw, p, more, delta, q, k, at, st, n, at, n, Qn, Kn, 1.0, SCORE_GRAD, WEIGH_GRAD, FULL, False, ZEROS, 0, 1)
    ds = ds.to(gt.dtype)
    if not EARLY:
        dv = warpgroup_mma(w, gt, dv, is_async=True)
    # both groups have read what stands there
    mbarrier.wait(free_g.index((c + 1) % 2), (c + 1) // 2 & 1 ^ 1)
    s_tiles.index(GROUP + none).store(ds)
    fence_async_shared()
    mbarrier.arrive(ready_s, count=1)
    ds = gl.convert_layout(ds, A)
    mbarrier.wait(ready_s, c & 1)
    dq = warpgroup_mma(s_tiles.index(none).permute((1, 0)), k_tiles.index(none).reshape([64, D]).slice(GROUP * HALF, HALF, 1),
                       zero_dq, use_acc=False, is_async=True)  # fmt: skip
    dq = warpgroup_mma(s_tiles.index(1 + none).permute((1, 0)), k_tiles.index(1 + none).reshape([64, D]).slice(GROUP * HALF, HALF, 1),
                       dq, is_async=True)  # fmt: skip
    dk = warpgroup_mma(ds, qt, dk, is_async=True)
    dv, w, dq = warpgroup_mma_wait(1, deps=[dv, w, dq])
    mbarrier.arrive(free_g.index(slot), count=1)
    tile = add_tiles.index(GROUP + none)
    tma.store_wait(0)
    tile.reshape([BM, HALF]).store(dq)
    fence_async_shared()
    add_out(DQ, dq_place + (q0, GROUP * HALF), tile)
    dk, ds = warpgroup_mma_wait(0, deps=[dk, ds])
    mbarrier.arrive(free_q.index(slot), count=1)
    return dk, dv


@gluon.jit
def put(X, place, rows, steps, n_rows, x, D: gl.constexpr):
    """As put_tile in template.py."""
    L: gl.constexpr = x.type.layout
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, L))
    r = rows + gl.arange(0, 64, layout=gl.SliceLayout(1, L))
    at = X + place + gl.expand_dims(r.to(gl.int64) * steps[0], 1) + gl.expand_dims(cols.to(gl.int64) * steps[1], 0)
    gl.store(at, x.to(X.dtype.element_ty), mask=gl.expand_dims(r < n_rows, 1))


@gluon.jit
def compute(GROUP: gl.constexpr, rings, sums, DQ, DK, DV, W, lines, k0, k1, head, members, outer, inner, eb, sizes, dqb, dkb, dvb,
            dks, dvs, ops, bst, st, n, F, marks, Qn, Kn, D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
            HIDES: gl.constexpr, OFFSET: gl.constexpr, BASES: gl.constexpr, QUERIES: gl.constexpr, SCORE: gl.constexpr,
            SCORE_GRAD: gl.constexpr, WEIGH: gl.constexpr, WEIGH_GRAD: gl.constexpr, MERGED: gl.constexpr, FACTOR: gl.constexpr,
            SLOPE: gl.constexpr, ZEROS: gl.constexpr):  # fmt: skip
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])
    X: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    H: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D // 2, 16])
    s_tiles, ready_s, add_tiles = sums
    zero = gl.zeros((64, BM), gl.float32, layout=S)
    zero_dq = gl.zeros((BM, D // 2), gl.float32, layout=H)
    own = (s_tiles, ready_s, add_tiles, zero, zero_dq)
    dk = gl.zeros((64, D), gl.float32, layout=X)
    dv = gl.zeros((64, D), gl.float32, layout=X)
    rows = gl.arange(0, BM, layout=gl.SliceLayout(0, S))
    k = gl.expand_dims(k0 + GROUP * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, S)), 1)
    mbarrier.wait(rings[4].index(0), 0)
    mbarrier.wait(rings[4].index(1), 0)
    c = 0
    for member in range(members):
        wide, at, whole = element(head, member, outer, inner, eb, sizes, ops, bst, F, marks, HIDES, OFFSET, BASES)
        context = (at, st, n, Qn, Kn)
        lo, first, last, edges, fulls = tiles_of(QUERIES, k0, k1, whole, context, BM, BN)
        dq_place = index_of(wide.to(gl.int32), sizes, dqb)
        for i in range(fulls):
            dk, dv = step(
                c, first + i * BM, dk, dv, rings, own, rows, k, dq_place, DQ, context, GROUP, BM, D, STAGES, SCORE,
                SCORE_GRAD, WEIGH, WEIGH_GRAD, True, MERGED, FACTOR, ZEROS,
            )  # fmt: skip
            c += 1
        for i in range(edges):
            q0 = edge_tile(i, lo, first, last, F, Qn, False, BM, False)
            dk, dv = step(
                c, q0, dk, dv, rings, own, rows, k, dq_place, DQ, context, GROUP, BM, D, STAGES, SCORE,
                SCORE_GRAD, WEIGH, WEIGH_GRAD, False, MERGED, FACTOR, ZEROS,
            )  # fmt: skip
            c += 1
    tma.store_wait(0)
    put(DK, OFFSET(head, outer, dkb), k0 + GROUP * 64, dks, Kn, dk * SLOPE, D)
    put(DV, OFFSET(head, outer, dvb), k0 + GROUP * 64, dvs, Kn, dv, D)


@gluon.jit(do_not_specialize_on_alignment=COUNTS)
def backward(
    Q, K, V, G, W, F, DQ, DK, DV, ops, sizes, outer, inner, members, qb, kb, vb, gb, eb, dqb, dkb, dvb, dks, dvs, bst, st, n,
    lines, marks, Qn, Kn, D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, OFFSET: gl.constexpr, BASES: gl.constexpr, QUERIES: gl.constexpr, SCORE: gl.constexpr,
    SCORE_GRAD: gl.constexpr, WEIGH: gl.constexpr, WEIGH_GRAD: gl.constexpr, HIDES: gl.constexpr, MERGED: gl.constexpr,
    FACTOR: gl.constexpr, SLOPE: gl.constexpr, ZEROS: gl.constexpr,
):  # fmt: skip
    tiles = gl.cdiv(Kn, BN)
    head = (gl.program_id(0) // tiles).to(gl.int64)
    tile = gl.program_id(0) % tiles
    k0 = tile * BN
    k1 = gl.minimum(k0 + BN, Kn) - 1
    key_places = (index_of(head.to(gl.int32), outer, kb), index_of(head.to(gl.int32), outer, vb))
    k_tiles = gl.allocate_shared_memory(K.dtype, [2] + K.block_type.shape, K.layout)
    v_tiles = gl.allocate_shared_memory(V.dtype, [2] + V.block_type.shape, V.layout)
    q_tiles = gl.allocate_shared_memory(Q.dtype, [STAGES] + Q.block_type.shape, Q.layout)
    g_tiles = gl.allocate_shared_memory(G.dtype, [STAGES] + G.block_type.shape, G.layout)
    add_tiles = gl.allocate_shared_memory(gl.float32, [2] + DQ.block_type.shape, DQ.layout)
    s_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BM], Q.dtype)
    s_tiles = gl.allocate_shared_memory(Q.dtype, [2, 64, BM], s_layout)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    shifts = gl.allocate_shared_memory(gl.float32, [STAGES, BM], flat)
    deltas = gl.allocate_shared_memory(gl.float32, [STAGES, BM], flat)
    inverses = gl.allocate_shared_memory(gl.float32, [STAGES, BM], flat)
    ready_kv = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ready_q = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready_g = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free_q = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free_g = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready_s = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(ready_kv.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready_q.index(i), count=2)
        mbarrier.init(ready_g.index(i), count=1)
        mbarrier.init(free_q.index(i), count=2)
        mbarrier.init(free_g.index(i), count=2)
    mbarrier.init(ready_s.index(0), count=2)
    rings = (k_tiles, v_tiles, q_tiles, g_tiles, ready_kv, ready_q, ready_g, free_q, free_g, shifts, deltas, inverses)
    sums = (s_tiles, ready_s.index(0), add_tiles)
    gl.warp_specialize([
        (compute, (0, rings, sums, DQ, DK, DV, W, lines, k0, k1, head, members, outer, inner, eb, sizes, dqb, dkb, dvb, dks, dvs,
                   ops, bst, st, n, F, marks, Qn, Kn, D, BM, BN, STAGES, HIDES, OFFSET, BASES, QUERIES, SCORE, SCORE_GRAD, WEIGH,
                   WEIGH_GRAD, MERGED, FACTOR, SLOPE, ZEROS)),
        (compute, (1, rings, sums, DQ, DK, DV, W, lines, k0, k1, head, members, outer, inner, eb, sizes, dqb, dkb, dvb, dks, dvs,
                   ops, bst, st, n, F, marks, Qn, Kn, D, BM, BN, STAGES, HIDES, OFFSET, BASES, QUERIES, SCORE, SCORE_GRAD, WEIGH,
                   WEIGH_GRAD, MERGED, FACTOR, SLOPE, ZEROS)),
        (load, (Q, G, K, V, key_places, rings, k0, k1, tile, head, members, outer, inner, eb, sizes, qb, gb, ops, bst, st, n, F,
                marks, W, lines, Qn, Kn, MERGED, BM, BN, STAGES, HIDES, OFFSET, BASES, QUERIES)),
    ], [4, 1], [REGISTERS, 24])  # fmt: skip
