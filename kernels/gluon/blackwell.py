"""The forward kernel for compute capability 10.0, in Gluon: one warp loads tiles, one issues products, two groups of four compute.

Each group has BM queries of its own, a row for each of its threads, and all of them the same keys. Products (tcgen05) take tiles
from shared memory and leave scores and sums in tensor memory; a group reads the scores of a tile there, makes its sums smaller
by what the maximum has grown, and writes weights over the scores, from where the next product takes them. The order of products is
weights times values, then the scores of the next tile, for one group and then for the other: while a group computes, products of
the other one run.

Products of one thread are done in the order in which they are issued, so that scores do not overwrite weights that the product
before them reads, and a group whose scores are ready knows that its weights of the tile before are in the sums.

The functions of codegen.py, loading and softmax are what they are for 9.0 (hopper.py).

Source: Zadouri et al. 2026, arXiv:2603.05451 (two tiles of queries in tensor memory, whose softmax takes turns with products).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.blackwell import (
    TensorMemoryLayout,
    allocate_tensor_memory,
    fence_async_shared,
    mbarrier,
    tcgen05_commit,
    tcgen05_mma,
    tma,
)

from attnfuse.kernels.gluon.hopper import copy_out, load, softmax, span
from attnfuse.kernels.gluon.tensor_memory import registers_of, weights_in
from attnfuse.kernels.triton.template import COUNTS, finished, index_of, marked


@gluon.jit
def multiply(rings, memory, count, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr,
             GROUPS: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """What the warp does that issues products."""
    q_tiles, k_tiles, v_tiles, ready_q, ready_k, ready_v, free_k, free_v, given = rings
    scores, sums, ready_s = memory
    mbarrier.wait(ready_k.index(0), 0)
    keys = k_tiles.index(0).reshape([BN, D]).permute((1, 0))
    for g in gl.static_range(GROUPS):
        mbarrier.wait(ready_q.index(g), 0)
        tcgen05_mma(q_tiles.index(g).reshape([BM, D]), keys, scores.index(g), use_acc=False)
        tcgen05_commit(ready_s.index(g))
    tcgen05_commit(free_k.index(0))
    for i in range(count):
        more = i + 1 < count
        here, after = i % STAGES, (i + 1) % STAGES
        values = v_tiles.index(here).reshape([BN, D])
        keys = k_tiles.index(after).reshape([BN, D]).permute((1, 0))
        mbarrier.wait(ready_v.index(here), i // STAGES & 1)
        mbarrier.wait(ready_k.index(after), (i + 1) // STAGES & 1, pred=more)
        for g in gl.static_range(GROUPS):
            mbarrier.wait(given.index(g), i & 1)
            tcgen05_mma(weights_in(scores.index(g), q_tiles.dtype, BM, BN), values, sums.index(g), use_acc=i > 0)
            if g == GROUPS - 1:
                tcgen05_commit(free_v.index(here))
            tcgen05_mma(q_tiles.index(g).reshape([BM, D]), keys, scores.index(g), use_acc=False, pred=more)
            # after the last tile: that the sums are complete
            tcgen05_commit(ready_s.index(g))
        if more:
            tcgen05_commit(free_k.index(after))


@gluon.jit
def step(i, m, l, scores, sums, ready, given, q, k, lo, context, dtype: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
         D: gl.constexpr, SCORE: gl.constexpr, FIRST: gl.constexpr, FULL: gl.constexpr, NEAR: gl.constexpr,
         FACTOR: gl.constexpr):  # fmt: skip
    """(m, l) after tile i of the keys, whose weights are in tensor memory then. FIRST: there are no sums yet. lo: the first key of
    tile 0; k: those of a tile, counted from 0."""
    S: gl.constexpr = registers_of(gl.float32, BM, BN)
    A: gl.constexpr = registers_of(gl.float32, BM, D)
    W: gl.constexpr = registers_of(dtype, BM, BN)
    mbarrier.wait(ready, i & 1)
    s = scores.load(S)
    p, m, l, fade = softmax(s, m, l, q, (lo + i * BN) + k, context, SCORE, FULL, NEAR, FACTOR)
    # first, so that their registers are free for the sums
    weights_in(scores, dtype, BM, BN).store(gl.convert_layout(p.to(dtype), W))
    if not FIRST:
        sums.store(sums.load(A) * gl.expand_dims(gl.convert_layout(fade, gl.SliceLayout(1, A)), 1))
    mbarrier.arrive(given, count=1)
    return m, l


@gluon.jit
def compute(GROUP: gl.constexpr, O, M, place, line, lines, rings, memory, q0, lo, count, context, BM: gl.constexpr,
            BN: gl.constexpr, D: gl.constexpr, SCORE: gl.constexpr, KEYS: gl.constexpr, LEFT: gl.constexpr,
            LOWER: gl.constexpr, NEAR: gl.constexpr, FACTOR: gl.constexpr, HIDDEN: gl.constexpr):  # fmt: skip
    """What a group does: rows q0 + GROUP * BM and on of the result."""
    S: gl.constexpr = registers_of(gl.float32, BM, BN)
    A: gl.constexpr = registers_of(gl.float32, BM, D)
    at, st, n, Qn, Kn = context
    scores, sums, ready = memory[0].index(GROUP), memory[1].index(GROUP), memory[2].index(GROUP)
    given = rings[8].index(GROUP)
    own = q0 + GROUP * BM
    q = gl.expand_dims(own + gl.arange(0, BM, layout=gl.SliceLayout(1, S)), 1)
    k = gl.expand_dims(gl.arange(0, BN, layout=gl.SliceLayout(0, S)), 0)
    # tiles [first, last) need no comparison with the key in this group
    some_lo, some_hi, full_lo, full_hi = KEYS(own, gl.minimum(own + BM, Qn) - 1, at, st, n, Qn, Kn)
    last = gl.minimum(gl.maximum((gl.minimum(full_hi, Kn) - lo) // BN, 1), count)
    first = 1
    if LOWER:
        first = gl.minimum(gl.maximum(gl.cdiv(full_lo - lo, BN), 1), last)
    m = gl.full((BM,), float("-inf"), gl.float32, layout=gl.SliceLayout(1, S))
    l = gl.zeros((BM,), gl.float32, layout=gl.SliceLayout(1, S))
    m, l = step(0, m, l, scores, sums, ready, given, q, k, lo, context, O.dtype, BM, BN, D, SCORE, True, False, NEAR,
                FACTOR)  # fmt: skip
    if LOWER:
        for i in range(1, first):
            m, l = step(i, m, l, scores, sums, ready, given, q, k, lo, context, O.dtype, BM, BN, D, SCORE, False, False, NEAR,
                        FACTOR)  # fmt: skip
    for i in range(first, last):
        m, l = step(i, m, l, scores, sums, ready, given, q, k, lo, context, O.dtype, BM, BN, D, SCORE, False, True, NEAR,
                    FACTOR)  # fmt: skip
    for i in range(last, count):
        m, l = step(i, m, l, scores, sums, ready, given, q, k, lo, context, O.dtype, BM, BN, D, SCORE, False, False, NEAR,
                    FACTOR)  # fmt: skip
    mbarrier.wait(ready, count & 1)
    acc = sums.load(A)

    m = gl.convert_layout(m * FACTOR, gl.SliceLayout(1, A))
    l = gl.convert_layout(l, gl.SliceLayout(1, A))
    rows = own + gl.arange(0, BM, layout=gl.SliceLayout(1, A))
    out, total = finished(acc, m, l, gl.expand_dims(rows, 1), at, st, n, Qn, Kn, BM, BN, LEFT, False, HIDDEN, False)
    gl.store(M + line + rows, marked(m, l), mask=rows < Qn)
    gl.store(M + lines + line + rows, total, mask=rows < Qn)
    # nothing reads the queries any more
    q_tile = rings[0].index(GROUP)
    q_tile.reshape([BM, D]).store(out.to(O.dtype))
    fence_async_shared()
    copy_out(O, place + (own, 0), q_tile)
    tma.store_wait(0)


@gluon.jit(do_not_specialize_on_alignment=COUNTS)
def forward(
    Q, K, V, O, M, ops, sizes, qb, kb, vb, ob, bst, st, n, lines, Qn, Kn,
    D: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
    BASES: gl.constexpr, SCORE: gl.constexpr, KEYS: gl.constexpr, LEFT: gl.constexpr, LOWER: gl.constexpr, WHOLE: gl.constexpr,
    NEAR: gl.constexpr, FACTOR: gl.constexpr, HIDDEN: gl.constexpr,
):  # fmt: skip
    """out and stats [2, lines] of GROUPS * BM queries of one batch element, 2 * 128. The arguments are those of hopper.forward."""
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
    given = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    ready_s = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    scores = allocate_tensor_memory(gl.float32, [GROUPS, BM, BN], TensorMemoryLayout([BM, BN], col_stride=1))
    sums = allocate_tensor_memory(gl.float32, [GROUPS, BM, D], TensorMemoryLayout([BM, D], col_stride=1))
    for g in gl.static_range(GROUPS):
        mbarrier.init(ready_q.index(g), count=1)
        mbarrier.init(given.index(g), count=1)
        mbarrier.init(ready_s.index(g), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready_k.index(i), count=1)
        mbarrier.init(ready_v.index(i), count=1)
        mbarrier.init(free_k.index(i), count=1)
        mbarrier.init(free_v.index(i), count=1)
    rings = (q_tiles, k_tiles, v_tiles, ready_q, ready_k, ready_v, free_k, free_v, given)
    memory = (scores, sums, ready_s)
    gl.warp_specialize([
        (compute, (0, O, M, place, line, lines, rings, memory, q0, lo, count, context, BM, BN, D, SCORE, KEYS, LEFT, LOWER, NEAR,
                   FACTOR, HIDDEN)),
        (compute, (1, O, M, place, line, lines, rings, memory, q0, lo, count, context, BM, BN, D, SCORE, KEYS, LEFT, LOWER, NEAR,
                   FACTOR, HIDDEN)),
        (multiply, (rings, memory, count, BM, BN, D, GROUPS, STAGES)),
        (load, (Q, K, V, places, rings, q0, lo, count, BM, BN, GROUPS, STAGES)),
    ], [4, 1, 1], [REGISTERS, 24, 24])  # fmt: skip
