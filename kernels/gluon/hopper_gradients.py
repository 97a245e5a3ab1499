"""The backward kernel for compute capability 9.0, in Gluon: one warp loads tiles, two groups of four warps compute.

A program goes through the queries of BN keys, and each group has ROWS of these keys: their K and V, and the gradients of both in
registers. A tile of BM queries takes five products, four of them a group's own. For the fifth, that of the queries' gradients,
both groups put the gradients of their scores in shared memory, and each makes half of the columns from all keys, which are added
up in float32 in memory by a bulk reduction, in no order. PARTS: in how many parts by columns K lies in memory, 1 or 2. In a row of
64 numbers a half would begin inside of what is swizzled together: there it is a tile of its own, and scores are two products.

Scores stand by key and query: as they lie in registers, weights and their gradients are the left factors of the sums for v and k.
Each product is issued before what has to be computed with the one before: weights beside the product of values, gradients of scores
beside the sum for v, and what is added to memory leaves beside the sum for k. The groups wait for each other once a tile, for the
gradients of scores. No product is left running from one tile to the next: the compiler would wait for each instruction of it.

The functions of codegen.py, and `scores_grad` of template.py, are what they are in the Triton kernels.

Source: Shah et al. 2024, arXiv:2407.08608, and its backward kernel (warps that load, a warp group for each part of the keys).
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

from attnfuse.kernels.gluon.hopper import add_out, copy_in
from attnfuse.kernels.triton.template import COUNTS, LOG2E, clipped, edge_tile, index_of, parted, powers, scores_grad

#: Keys of a group: one product of four warps has 64 rows.
ROWS: gl.constexpr = gl.constexpr(64)


@gluon.jit
def element(
    head, member, outer, inner, eb, sizes, ops, bst, F, marks, k0, st, n, Qn, Kn, BM: gl.constexpr, BN: gl.constexpr,
    HIDES: gl.constexpr, OFFSET: gl.constexpr, BASES: gl.constexpr, QUERIES: gl.constexpr,
):  # fmt: skip
    """(flat number, operands, tiles of queries) of the member-th batch element with these keys. tiles: as parted() in template.py,
    after where they begin."""
    wide = OFFSET(head, outer, eb) + OFFSET(gl.to_tensor(member).to(gl.int64), inner, eb)
    at = BASES(wide, sizes, ops, bst)
    lo, hi, first, last = QUERIES(k0, gl.minimum(k0 + BN, Kn) - 1, at, st, n, Qn, Kn)
    lo, hi = clipped(lo, hi, Qn, BM)
    if HIDES:
        # some row may see all keys
        whole = gl.load(F + marks + wide) != 0
        lo = gl.where(whole, 0, lo)
        hi = gl.where(whole, Qn, hi)
    # keys behind the last one are in no full tile
    last = gl.where(k0 + BN <= Kn, last, 0)
    first, last, edges, fulls = parted(lo, hi, first, last, BM)
    return wide, at, (lo, first, last, edges, fulls)


@gluon.jit
def query_of(i, tiles, BM: gl.constexpr):
    """Where the i-th tile begins: full tiles first, as a loop that takes sums over from another one has fewer registers."""
    lo, first, last, edges, fulls = tiles
    return gl.where(i < fulls, first + i * BM, edge_tile(i - fulls, lo, first, last, 0, 0, False, BM, False))


@gluon.jit
def load(
    Q, G, K, V, W, key_places, rings, k0, head, members, outer, inner, eb, sizes, qb, gb, ops, bst, st, n, F, marks, lines, Qn, Kn,
    BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr, HIDES: gl.constexpr,
    MERGED: gl.constexpr, OFFSET: gl.constexpr, BASES: gl.constexpr, QUERIES: gl.constexpr,
):  # fmt: skip
    """What the loading warp does. key_places: the batch indices of k and v."""
    k_place, v_place = key_places
    k_tiles, v_tiles, q_tiles, g_tiles, shifts, inverses, deltas, ready_kv, ready_q, ready_g, free_q, free_g = rings
    for g in gl.static_range(2):
        mbarrier.expect(ready_kv.index(g), PARTS * K.block_type.nbytes + V.block_type.nbytes)
        for part in gl.static_range(PARTS):
            k_columns = (k0 + g * ROWS, part * (D // PARTS))
            copy_in(K, k_place + k_columns, ready_kv.index(g), k_tiles.index(g * PARTS + part))
        copy_in(V, v_place + (k0 + g * ROWS, 0), ready_kv.index(g), v_tiles.index(g))
    rows = gl.arange(0, BM, layout=gl.BlockedLayout([1], [32], [1], [0]))
    c = 0
    for member in range(members):
        wide, at, tiles = element(
            head, member, outer, inner, eb, sizes, ops, bst, F, marks, k0, st, n, Qn, Kn, BM, BN, HIDES, OFFSET, BASES, QUERIES,
        )  # fmt: skip
        q_place = index_of(wide.to(gl.int32), sizes, qb)
        g_place = index_of(wide.to(gl.int32), sizes, gb)
        for i in range(tiles[3] + tiles[4]):
            q0 = query_of(i, tiles, BM)
            q = q0 + rows
            line = W + wide * Qn + q
            shift = gl.load(line, mask=q < Qn, other=0.0)
            inverse = shift
            if not MERGED:
                inverse = gl.load(line + lines, mask=q < Qn, other=0.0)
            delta = gl.load(line + 2 * lines, mask=q < Qn, other=0.0)
            slot = c % STAGES
            # the first tiles find an empty ring
            phase = (c // STAGES & 1) ^ 1
            # that which is free first
            mbarrier.wait(free_g.index(slot), phase)
            mbarrier.expect(ready_g.index(slot), G.block_type.nbytes)
            copy_in(G, g_place + (q0, 0), ready_g.index(slot), g_tiles.index(slot))
            mbarrier.wait(free_q.index(slot), phase)
            mbarrier.expect(ready_q.index(slot), Q.block_type.nbytes)
            copy_in(Q, q_place + (q0, 0), ready_q.index(slot), q_tiles.index(slot))
            shifts.index(slot).store(shift)
            if not MERGED:
                inverses.index(slot).store(inverse)
            deltas.index(slot).store(delta)
            mbarrier.arrive(ready_q.index(slot), count=1)
            c += 1


@gluon.jit
def weights(
    s, shift, inverse, q, k, context, SCORE: gl.constexpr, WEIGH: gl.constexpr, FULL: gl.constexpr, MERGED: gl.constexpr,
    FACTOR: gl.constexpr, ZEROS: gl.constexpr,
):  # fmt: skip
    """As weights_of in template.py, from the product of q and k [keys, queries]."""
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
def half_of(k_tiles, of, HALF: gl.constexpr, D: gl.constexpr, PARTS: gl.constexpr):
    """Half of the columns of the keys that a group has."""
    if PARTS == 1:
        return k_tiles.index(of).reshape([ROWS, D]).slice(HALF * (D // 2), D // 2, 1)
    else:
        return k_tiles.index(2 * of + HALF).reshape([ROWS, D // 2])


@gluon.jit
def step(
    c, q0, dk, dv, rings, sums, zeros, rows, k, DQ, dq_place, context, GROUP: gl.constexpr, BM: gl.constexpr, D: gl.constexpr,
    PARTS: gl.constexpr, STAGES: gl.constexpr, SCORE: gl.constexpr, SCORE_GRAD: gl.constexpr, WEIGH: gl.constexpr,
    WEIGH_GRAD: gl.constexpr, FULL: gl.constexpr, MERGED: gl.constexpr, FACTOR: gl.constexpr, ZEROS: gl.constexpr,
):  # fmt: skip
    """dk and dv after the c-th tile of queries, those from q0 on, whose dq is added to as well."""
    at, st, n, Qn, Kn = context
    k_tiles, v_tiles, q_tiles, g_tiles, shifts, inverses, deltas, ready_kv, ready_q, ready_g, free_q, free_g = rings
    s_tiles, ready_s, add_tiles = sums
    zero, zero_dq = zeros
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=dv.type.layout, k_width=2)
    R: gl.constexpr = gl.SliceLayout(0, zero.type.layout)
    HALF: gl.constexpr = D // 2
    # 0, which the compiler does not know: addresses of tiles that it computed once would fill registers through the loop
    none = c >> 30
    slot, phase = c % STAGES, c // STAGES & 1
    before = c + STAGES - 1
    vt = v_tiles.index(GROUP + none).reshape([ROWS, D])
    qt, gt = q_tiles.index(slot).reshape([BM, D]), g_tiles.index(slot).reshape([BM, D])
    mbarrier.wait(ready_q.index(slot), phase)
    if PARTS == 1:
        s = warpgroup_mma(
            k_tiles.index(GROUP + none).reshape([ROWS, D]), qt.permute((1, 0)), zero, use_acc=False, is_async=True
        )
    else:
        kt, more_kt = k_tiles.index(2 * GROUP + none), k_tiles.index(2 * GROUP + 1 + none)
        s = warpgroup_mma(
            kt.reshape([ROWS, HALF]), qt.slice(0, HALF, 1).permute((1, 0)), zero, use_acc=False, is_async=True,
        )  # fmt: skip
        s = warpgroup_mma(more_kt.reshape([ROWS, HALF]), qt.slice(HALF, HALF, 1).permute((1, 0)), s, is_async=True)
    mbarrier.wait(ready_g.index(slot), phase)
    dw = warpgroup_mma(vt, gt.permute((1, 0)), zero, use_acc=False, is_async=True)
    shift = shifts.index(slot).load(R)
    inverse = shift
    if not MERGED:
        inverse = inverses.index(slot).load(R)
    s = warpgroup_mma_wait(1, deps=[s])
    q = gl.expand_dims(q0 + rows, 0)
    p, w, more = weights(s, shift, inverse, q, k, context, SCORE, WEIGH, FULL, MERGED, FACTOR, ZEROS)
    w = gl.convert_layout(w.to(gt.dtype), A)
    # what a score saves, and masks, are held through the second product: the left factor of a third one has no registers then
    EARLY: gl.constexpr = FULL and (D == 64 or len(more[0]) == 0)
    if EARLY:
        dv = warpgroup_mma(w, gt, dv, is_async=True)
    delta = deltas.index(slot).load(R)
    if EARLY:
        dw = warpgroup_mma_wait(1, deps=[dw])
    else:
        dw = warpgroup_mma_wait(0, deps=[dw])
    ds = scores_grad(
        dw, p, more, delta, q, k, at, st, n, at, st, Qn, Kn, 1.0, SCORE_GRAD, WEIGH_GRAD, FULL, False, ZEROS, 0, 1,
    )  # fmt: skip
    ds = ds.to(gt.dtype)
    if not EARLY:
        dv = warpgroup_mma(w, gt, dv, is_async=True)
    # both groups have read those of the tile before
    mbarrier.wait(free_g.index(before % STAGES), (before // STAGES & 1) ^ 1)
    s_tiles.index(GROUP + none).store(ds)
    fence_async_shared()
    mbarrier.arrive(ready_s, count=1)
    ds = gl.convert_layout(ds, A)
    mbarrier.wait(ready_s, c & 1)
    first, second = s_tiles.index(none), s_tiles.index(1 + none)
    keys, more_keys = half_of(k_tiles, none, GROUP, D, PARTS), half_of(k_tiles, 1 + none, GROUP, D, PARTS)
    dq = warpgroup_mma(first.permute((1, 0)), keys, zero_dq, use_acc=False, is_async=True)
    dq = warpgroup_mma(second.permute((1, 0)), more_keys, dq, is_async=True)
    dk = warpgroup_mma(ds, qt, dk, is_async=True)
    dv, w, dq = warpgroup_mma_wait(1, deps=[dv, w, dq])
    mbarrier.arrive(free_g.index(slot), count=1)
    tile = add_tiles.index(GROUP + none)
    # what was added before has left it
    tma.store_wait(0)
    tile.reshape([BM, HALF]).store(dq)
    fence_async_shared()
    add_out(DQ, dq_place + (q0, GROUP * HALF), tile)
    dk, ds = warpgroup_mma_wait(0, deps=[dk, ds])
    mbarrier.arrive(free_q.index(slot), count=1)
    return dk, dv


@gluon.jit
def put(X, place, first, steps, n_rows, x, D: gl.constexpr):
    """As put_tile in template.py, of ROWS rows from `first` on."""
    L: gl.constexpr = x.type.layout
    rows = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, L))
    cols = gl.arange(0, D, layout=gl.SliceLayout(0, L))
    at = X + place + gl.expand_dims(rows.to(gl.int64) * steps[0], 1) + gl.expand_dims(cols.to(gl.int64) * steps[1], 0)
    gl.store(at, x.to(X.dtype.element_ty), mask=gl.expand_dims(rows < n_rows, 1))


@gluon.jit
def compute(
    GROUP: gl.constexpr, rings, sums, DQ, DK, DV, k0, head, members, outer, inner, eb, sizes, dqb, dkb, dvb, dks, dvs, ops, bst,
    st, n, F, marks, Qn, Kn, D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
    HIDES: gl.constexpr, OFFSET: gl.constexpr, BASES: gl.constexpr, QUERIES: gl.constexpr, SCORE: gl.constexpr,
    SCORE_GRAD: gl.constexpr, WEIGH: gl.constexpr, WEIGH_GRAD: gl.constexpr, MERGED: gl.constexpr, FACTOR: gl.constexpr,
    SLOPE: gl.constexpr, ZEROS: gl.constexpr,
):  # fmt: skip
    """What a group does: ROWS keys from k0 + GROUP * ROWS on."""
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])
    X: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    H: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D // 2, 16])
    ready_kv = rings[7]
    own = k0 + GROUP * ROWS
    rows = gl.arange(0, BM, layout=gl.SliceLayout(0, S))
    k = gl.expand_dims(own + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S)), 1)
    zeros = (gl.zeros((ROWS, BM), gl.float32, layout=S), gl.zeros((BM, D // 2), gl.float32, layout=H))
    dk = gl.zeros((ROWS, D), gl.float32, layout=X)
    dv = gl.zeros((ROWS, D), gl.float32, layout=X)
    # the other group's keys are in this one's half of the queries' gradients
    mbarrier.wait(ready_kv.index(0), 0)
    mbarrier.wait(ready_kv.index(1), 0)
    c = 0
    for member in range(members):
        wide, at, tiles = element(
            head, member, outer, inner, eb, sizes, ops, bst, F, marks, k0, st, n, Qn, Kn, BM, BN, HIDES, OFFSET, BASES, QUERIES,
        )  # fmt: skip
        context = (at, st, n, Qn, Kn)
        dq_place = index_of(wide.to(gl.int32), sizes, dqb)
        fulls = tiles[4]
        for i in range(fulls):
            dk, dv = step(
                c, query_of(i, tiles, BM), dk, dv, rings, sums, zeros, rows, k, DQ, dq_place, context, GROUP, BM, D, PARTS, STAGES,
                SCORE, SCORE_GRAD, WEIGH, WEIGH_GRAD, 1, MERGED, FACTOR, ZEROS,
            )  # fmt: skip
            c += 1
        for i in range(fulls, fulls + tiles[3]):
            dk, dv = step(
                c, query_of(i, tiles, BM), dk, dv, rings, sums, zeros, rows, k, DQ, dq_place, context, GROUP, BM, D, PARTS, STAGES,
                SCORE, SCORE_GRAD, WEIGH, WEIGH_GRAD, 0, MERGED, FACTOR, ZEROS,
            )  # fmt: skip
            c += 1
    tma.store_wait(0)
    put(DK, OFFSET(head, outer, dkb), own, dks, Kn, dk * SLOPE, D)
    put(DV, OFFSET(head, outer, dvb), own, dvs, Kn, dv, D)


@gluon.jit(do_not_specialize_on_alignment=COUNTS)
def backward_columns(
    Q, K, V, G, W, F, DQ, DK, DV, ops, sizes, outer, inner, members, qb, kb, vb, gb, eb, dqb, dkb, dvb, dks, dvs, bst, st, n,
    lines, marks, Qn, Kn, D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, OFFSET: gl.constexpr, BASES: gl.constexpr, QUERIES: gl.constexpr, SCORE: gl.constexpr,
    SCORE_GRAD: gl.constexpr, WEIGH: gl.constexpr, WEIGH_GRAD: gl.constexpr, HIDES: gl.constexpr, MERGED: gl.constexpr,
    FACTOR: gl.constexpr, SLOPE: gl.constexpr, ZEROS: gl.constexpr,
):  # fmt: skip
    """Gradients of BN keys and values, and what these keys add to those of their queries; arguments as in template.py.

    Q, K, V, G, DQ: tensor descriptors, DQ of float32 and half of the columns, with the strides of their batch indices.
    """
    tiles = gl.cdiv(Kn, BN)
    head = (gl.program_id(0) // tiles).to(gl.int64)
    k0 = gl.program_id(0) % tiles * BN
    key_places = (index_of(head.to(gl.int32), outer, kb), index_of(head.to(gl.int32), outer, vb))

    k_tiles = gl.allocate_shared_memory(K.dtype, [2 * PARTS] + K.block_type.shape, K.layout)
    v_tiles = gl.allocate_shared_memory(V.dtype, [2] + V.block_type.shape, V.layout)
    q_tiles = gl.allocate_shared_memory(Q.dtype, [STAGES] + Q.block_type.shape, Q.layout)
    g_tiles = gl.allocate_shared_memory(G.dtype, [STAGES] + G.block_type.shape, G.layout)
    s_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BM], Q.dtype)
    s_tiles = gl.allocate_shared_memory(Q.dtype, [2, ROWS, BM], s_layout)
    add_tiles = gl.allocate_shared_memory(gl.float32, [2] + DQ.block_type.shape, DQ.layout)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    shifts = gl.allocate_shared_memory(gl.float32, [STAGES, BM], flat)
    inverses = gl.allocate_shared_memory(gl.float32, [STAGES, BM], flat)
    deltas = gl.allocate_shared_memory(gl.float32, [STAGES, BM], flat)
    ready_kv = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ready_q = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready_g = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free_q = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free_g = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready_s = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(ready_kv.index(i), count=1)
    for i in gl.static_range(STAGES):
        # the copy, and the numbers of the rows
        mbarrier.init(ready_q.index(i), count=2)
        mbarrier.init(ready_g.index(i), count=1)
        mbarrier.init(free_q.index(i), count=2)
        mbarrier.init(free_g.index(i), count=2)
    mbarrier.init(ready_s.index(0), count=2)
    rings = (k_tiles, v_tiles, q_tiles, g_tiles, shifts, inverses, deltas, ready_kv, ready_q, ready_g, free_q, free_g)
    sums = (s_tiles, ready_s.index(0), add_tiles)
    gl.warp_specialize([
        (compute, (0, rings, sums, DQ, DK, DV, k0, head, members, outer, inner, eb, sizes, dqb, dkb, dvb, dks, dvs, ops, bst, st,
                   n, F, marks, Qn, Kn, D, BM, BN, PARTS, STAGES, HIDES, OFFSET, BASES, QUERIES, SCORE, SCORE_GRAD, WEIGH,
                   WEIGH_GRAD, MERGED, FACTOR, SLOPE, ZEROS)),
        (compute, (1, rings, sums, DQ, DK, DV, k0, head, members, outer, inner, eb, sizes, dqb, dkb, dvb, dks, dvs, ops, bst, st,
                   n, F, marks, Qn, Kn, D, BM, BN, PARTS, STAGES, HIDES, OFFSET, BASES, QUERIES, SCORE, SCORE_GRAD, WEIGH,
                   WEIGH_GRAD, MERGED, FACTOR, SLOPE, ZEROS)),
        (load, (Q, G, K, V, W, key_places, rings, k0, head, members, outer, inner, eb, sizes, qb, gb, ops, bst, st, n, F, marks,
                lines, Qn, Kn, BM, BN, D, PARTS, STAGES, HIDES, MERGED, OFFSET, BASES, QUERIES)),
    ], [4, 1], [REGISTERS, 24])  # fmt: skip
