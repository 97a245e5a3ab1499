"""The Triton kernels: tiles of online softmax with the score program of a spec generated into them.

SCORE, WEIGH, KEYS and the like are the functions that codegen.py writes; `ops`, `bst`, `st`, `n` hold one entry for each
operand, sizes and strides one for each batch dim. All sums are float32. Names: q0, q1 (k0, k1) are the first and last query
(key) of a tile; e is the flat number of a batch element.

Sources: Dao 2023, arXiv:2307.08691 (tiles, recomputation in backward); Milakov and Gimelshein 2018, arXiv:1805.02867
(online softmax).
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
#: Of which nothing in a kernel depends on whether 16 divides them: other numbers of these compile no kernel anew.
COUNTS = ("threshold", "sequences", "heads", "outer_heads", "lines", "marks", "members", "Qn", "group", "parts")


@triton.jit
def powers(x, shift, NEAR: tl.constexpr, FACTOR: tl.constexpr):
    """exp(FACTOR * (x - shift)), by the one instruction that devices have for it, exp2.

    NEAR: as codegen.Traits.near; the rounding of the shift's product is the same for a whole row, and falls out by its sum.
    Elsewhere the difference comes first, as fills that hide whole rows have one of 0.
    """
    if NEAR:
        return tl.exp2(x * (FACTOR * LOG2E) - shift * (FACTOR * LOG2E))
    else:
        return tl.exp2((x - shift) * (FACTOR * LOG2E))


@triton.jit
def tile_of(base, rows, row_stride, n_rows, width: tl.constexpr, padded: tl.constexpr, col_stride):
    """[rows, padded] elements of a matrix, 0 outside of it."""
    cols = tl.arange(0, padded)
    at = base + rows.to(tl.int64)[:, None] * row_stride + cols.to(tl.int64)[None, :] * col_stride
    if width == padded:
        return tl.load(at, mask=rows[:, None] < n_rows, other=0.0)
    return tl.load(at, mask=(rows[:, None] < n_rows) & (cols[None, :] < width), other=0.0)


@triton.jit
def matrix_of(X, e, start, sizes, strides, steps, OFFSET: tl.constexpr):
    """Of batch element e, from row `start` on: (X, place) as tile_at takes them.

    X: the address of a tensor, with its batch strides and the steps between rows and columns, of a paged one also what
    Call.blocks gives; or a tensor descriptor, of which `strides` are 1, or 0 where it is broadcast, and which has no start.
    """
    if isinstance(X, tl.tensor):
        if len(steps) == 2:
            return X + OFFSET(e.to(tl.int64), sizes, strides) + start * steps[0], steps
        else:
            table = steps[5] + OFFSET(e.to(tl.int64), sizes, steps[6])
            return X + OFFSET(e.to(tl.int64), sizes, strides), (
                steps[0],
                steps[1],
                steps[2],
                steps[3],
                steps[4],
                table,
                steps[7],
            )
    else:
        return X, index_of(e.to(tl.int32), sizes, strides)


@triton.jit
def index_of(e, sizes, strides):
    """The index of batch element e in each batch dim of a tensor descriptor."""
    found = ()
    for d in tl.static_range(len(sizes) - 1, -1, -1):
        # Triton reads no starred elements
        found = (e % sizes[d] * strides[d],) + found  # noqa: RUF005
        e = e // sizes[d]
    return found


@triton.jit
def tile_at(X, first, rows, place, n_rows, width: tl.constexpr, padded: tl.constexpr, size: tl.constexpr):
    """As tile_of, of the `size` rows from `first` on, through addresses or a tensor descriptor: (X, place) of matrix_of."""
    if isinstance(X, tl.tensor):
        if len(place) == 2:
            return tile_of(X, rows, place[0], n_rows, width, padded, place[1])
        else:
            return rows_at(X, paged(rows, n_rows, place), rows < n_rows, width, padded, place[1])
    else:
        # a block of it has rows of one matrix, and is 0 outside of that
        return tl.reshape(X.load(place + (first, 0)), [size, padded])  # noqa: RUF005


@triton.jit
def paged(rows, n_rows, place):
    """Where rows are that a block table names, int64; place: (step of a row, of a column, of a block, rows of a block, number of
    blocks, table, its step). A negative number counts from the end. One that no block has is cut to one that is there."""
    block = tl.load(place[5] + (rows // place[3]).to(tl.int64) * place[6], mask=rows < n_rows, other=0).to(tl.int64)
    block = tl.where(block < 0, block + place[4], block)
    block = tl.maximum(tl.minimum(block, place[4] - 1), 0)
    return block * place[2] + (rows % place[3]).to(tl.int64) * place[0]


@triton.jit
def rows_at(base, places, inside, width: tl.constexpr, padded: tl.constexpr, col_stride):
    """As tile_of, of rows anywhere: `places` int64 [rows]."""
    cols = tl.arange(0, padded)
    at = base + places[:, None] + cols.to(tl.int64)[None, :] * col_stride
    return tl.load(at, mask=inside[:, None] & (cols[None, :] < width), other=0.0)


@triton.jit
def put_tile(base, rows, row_stride, n_rows, width: tl.constexpr, padded: tl.constexpr, col_stride, x):
    cols = tl.arange(0, padded)
    at = base + rows.to(tl.int64)[:, None] * row_stride + cols.to(tl.int64)[None, :] * col_stride
    tl.store(at, x.to(base.dtype.element_ty), mask=(rows[:, None] < n_rows) & (cols[None, :] < width))


@triton.jit
def clipped(lo, hi, n, size: tl.constexpr):
    """[lo, hi) inside of [0, n), from the beginning of a tile on; [0, 0) where it is empty, which rounding would not leave so."""
    hi = tl.minimum(hi, n)
    hi = tl.where(lo < hi, hi, 0)
    return tl.minimum(lo, hi) // size * size, hi


@triton.jit
def mixed(x):
    """The lowbias32 finaliser on 32-bit words (kernels/dropout.py)."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def token(numbers, i):
    """The numbers of queries, or of keys, that dropout takes them for (Inputs.numbers): int64, of any i."""
    i = i.to(tl.int64)
    moved = tl.where(i >= tl.load(numbers + 2), tl.load(numbers + 3), 0)
    return tl.load(numbers) + tl.load(numbers + 1) * i + moved


@triton.jit
def kept(seed, row, query, key, threshold, Qn):
    """Which weights dropout keeps. row int64 [BM, 1]; query, key int32 [BM, 1] and [1, BN]. seed: int64, alone, or with the numbers
    of queries and keys."""
    if isinstance(seed, tl.tensor):
        word = tl.load(seed)
    else:
        word = tl.load(seed[0])
        row = (row - query) // Qn * tl.load(seed[1] + 4) + token(seed[1], query)
        key = token(seed[1] + 5, key)
    a = mixed((row >> 32).to(tl.uint32) ^ 0x9E3779B9)
    a = mixed(row.to(tl.uint32) + a)
    a = mixed((word >> 32).to(tl.uint32) + a)
    a = mixed(word.to(tl.uint32) + a)
    b = mixed(a ^ 0x85EBCA6B)
    return mixed(mixed(key.to(tl.uint32) ^ a) + b) >= threshold.to(tl.uint32)


@triton.jit
def span_of(bounds, s, sequences, total):
    """The first row of sequence s and how many rows it has, within `total` rows."""
    start = tl.minimum(tl.maximum(tl.load(bounds + s).to(tl.int64), 0), total)
    end = tl.minimum(tl.maximum(tl.load(bounds + sequences + s).to(tl.int64), start), total)
    return start, (end - start).to(tl.int32)


@triton.jit
def dealt(deal, sequences, slot):
    """The sequence and the tile of it that a slot is dealt; a negative tile where there are fewer tiles than slots.

    deal int32 [2, sequences]: how many tiles the longest sequences have up to each, and which these are.
    """
    low = slot * 0
    high = low + sequences
    while low < high:
        middle = (low + high) // 2
        beyond = tl.load(deal + middle) > slot
        low = tl.where(beyond, low, middle + 1)
        high = tl.where(beyond, middle, high)
    place = tl.minimum(low, sequences - 1)
    return tl.load(deal + sequences + place), tl.load(deal + place) - 1 - slot


@triton.jit
def query_rows(e, bounds, sequences, heads, Qn, BM: tl.constexpr, PACKED: tl.constexpr):
    """Of batch element e: how many queries it has, where they begin in q, and its first row in M and W and first tile in F."""
    wide = e.to(tl.int64)
    if PACKED:
        s = e // heads
        head = wide % heads
        start, own = span_of(bounds, s, sequences, Qn)
        return own, start, head * Qn + start, head * (Qn // BM + sequences + 1) + start // BM + s
    return Qn, wide * 0, wide * Qn, wide * tl.cdiv(Qn, BM)


@triton.jit
def key_rows(e, bounds, sequences, heads, Kn, PACKED: tl.constexpr):
    """Of batch element e: how many keys it has, and where they begin in k and v."""
    if PACKED:
        start, own = span_of(bounds, e // heads, sequences, Kn)
        return own, start
    return Kn, e.to(tl.int64) * 0


@triton.jit
def visit(
    acc, m, l, qt, line, q, q0, q1, k0, K, V, ks, vs, at, shared, st, n, Qn, Kn, seed, threshold, keep_scale,
    D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SCORE: tl.constexpr, WEIGH: tl.constexpr, SEEN: tl.constexpr, FULL: tl.constexpr, CHECKED: tl.constexpr,
    DROPOUT: tl.constexpr, NEAR: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys: brings the sums of a query tile up to date.

    line, q [BM, 1]: the rows' numbers and their queries, which are q0 to q1. at: the operands of each row; shared: those of
    some row, where they are the same for all. FULL: as `score` takes it.
    """
    needed = True
    if CHECKED:
        needed, sure = SEEN(q0, q1, k0, tl.minimum(k0 + BN, Kn) - 1, BM, BN, 0, shared, st, n, Qn, Kn)
    if needed:
        keys = k0 + tl.arange(0, BN)
        k = keys[None, :]
        kt = tile_at(K, k0, keys, ks, Kn, D, DP, BN)
        s = tl.dot(qt, tl.trans(kt), input_precision=PRECISION)
        s, saved = SCORE(s, q, k, FULL, at, st, n, Qn, Kn)
        if not FULL:
            s = tl.where(k < Kn, s, float("-inf"))
        top = tl.maximum(m, tl.max(s, 1))
        shift = tl.where(top == float("-inf"), 0.0, top)
        p = powers(s, shift[:, None], NEAR, FACTOR)
        fade = powers(m, shift, NEAR, FACTOR)
        l = l * fade + tl.sum(p, 1)
        p = WEIGH(p, q, k, at, st, n, Qn, Kn)
        if DROPOUT:
            p = tl.where(kept(seed, line, q, k, threshold, Qn), p * keep_scale, 0.0)
        vt = tile_at(V, k0, keys, vs, Kn, E, EP, BN)
        acc = tl.dot(p.to(vt.dtype), vt, acc * fade[:, None], input_precision=PRECISION)
        m = top
    return acc, m, l


@triton.jit
def none_of(BM: tl.constexpr, EP: tl.constexpr):
    """The sums over no key: acc, m and l."""
    return tl.zeros([BM, EP], tl.float32), tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)


@triton.jit
def begun(q, at, st, n, Qn, Kn, BM: tl.constexpr, EP: tl.constexpr, SINK: tl.constexpr):
    """The sums before the first key: those over none, or over the row's sink."""
    acc, m, l = none_of(BM, EP)
    if SINK is not None:
        m = tl.sum(SINK(q, at, st, n, Qn, Kn), 1)
        # infinity and NaN make the row NaN
        l = tl.where(m == float("-inf"), 0.0, m - m + 1.0)
    return acc, m, l


@triton.jit
def seen_all(
    acc, m, l, inside, Q, places, qs, line, q, K, V, ks, vs, at, st, n, Qn, Kn, seed, threshold, keep_scale,
    D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SCORE: tl.constexpr, WEIGH: tl.constexpr, SINK: tl.constexpr, SEEN: tl.constexpr, DOUBT: tl.constexpr,
    DROPOUT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The sums of a query tile, over all keys once more where a row may see keys that were skipped."""
    if float("-inf") < DOUBT:
        if tl.min(tl.where(inside, m, float("inf")), 0) <= DOUBT:
            # read again, so that no second form of it is held in registers through the loops before
            qt = rows_at(Q, places, inside, D, DP, qs[1])
            acc, m, l = begun(q, at, st, n, Qn, Kn, BM, EP, SINK)
            for k0 in tl.range(0, Kn, BN, num_stages=STAGES):
                acc, m, l = visit(
                    acc, m, l, qt, line, q, 0, 0, k0, K, V, ks, vs, at, at, st, n, Qn, Kn, seed, threshold, keep_scale, D,
                    E, DP, EP, BM, BN, SCORE, WEIGH, SEEN, 0, False, DROPOUT, False, 1.0, PRECISION,
                )  # fmt: skip
    return acc, m, l


@triton.jit
def marked(m, l):
    """The maximum to keep: NaN of a row of NaN, which -inf would make a row without scores."""
    return tl.where((m == float("-inf")) & (l != l), float("nan"), m)


@triton.jit
def finished(
    acc, m, l, q, at, st, n, Qn, Kn, BM: tl.constexpr, BN: tl.constexpr, LEFT: tl.constexpr, FILLS: tl.constexpr,
    HIDDEN: tl.constexpr, UNSHIFTED: tl.constexpr,
):  # fmt: skip
    """(result [BM, EP], row sum to keep [BM]) from the sums over all keys. Without any key the result is 0.

    HIDDEN 0: a row without a score above -inf is NaN, 1: it is 0, 2: so is every row that is NaN.
    """
    # maxima skip NaN: of a row of NaN alone the maximum is -inf too
    none = (m == float("-inf")) & (l == l) & (Kn > 0)
    broken = none | (l != l)
    if UNSHIFTED:
        total = l * tl.exp2(m * LOG2E)
        broken = broken | (((total == 0.0) | (total == float("inf")) | (total != total)) & (Kn > 0))
    out = acc / tl.where(Kn > 0, l, 1.0)[:, None]
    nan = tl.where(broken, float("nan"), 0.0)
    if FILLS:
        # weights that are filled are not NaN, even in a row that is: such a row is NaN if any weight is left
        if tl.max(broken.to(tl.int32), 0) != 0:
            left = tl.zeros([BM], tl.int32)
            for k0 in tl.range(0, Kn, BN):
                k = (k0 + tl.arange(0, BN))[None, :]
                stays = LEFT(q, k, at, st, n, Qn, Kn) & (k < Kn)
                left = tl.maximum(left, tl.max(stays.to(tl.int32), 1))
            nan = tl.where(left > 0, nan, 0.0)
            out = tl.where(broken[:, None], 0.0, out)
    out += nan[:, None]
    if HIDDEN == 1:
        out = tl.where(none[:, None], 0.0, out)
    if HIDDEN == 2:
        out = tl.where(broken[:, None], 0.0, out)
    return out, tl.where(none, float("nan"), l)


@triton.jit
def parted(lo, hi, first, last, SIZE: tl.constexpr):
    """(first, last, the numbers of other and of full tiles) of [lo, hi), which begins with a tile: from first to last whole tiles
    are full."""
    last = tl.maximum(tl.minimum(last, hi), lo) // SIZE * SIZE
    last = tl.maximum(last, lo)
    first = tl.minimum(tl.cdiv(tl.maximum(first, lo), SIZE) * SIZE, last)
    return first, last, (first - lo) // SIZE + tl.cdiv(hi - last, SIZE), (last - first) // SIZE


@triton.jit
def edge_tile(i, lo, first, last, LIST, total, every, SIZE: tl.constexpr, LISTED: tl.constexpr):
    """Where the i-th tile begins of those that are not full: in [lo, first) and then from `last` on, or as `listed` has found.

    every: all tiles of `total` rows are gone through instead.
    """
    if LISTED:
        # the last entries of the list, from the end on
        found = tl.load(LIST + 1 + tl.cdiv(total, SIZE) - i)
        return tl.where(every, i, found) * SIZE
    else:
        return tl.where(lo + i * SIZE < first, lo + i * SIZE, last + i * SIZE - (first - lo))


@triton.jit
def full_tile(i, first, LIST, SIZE: tl.constexpr, LISTED: tl.constexpr):
    """The same for the full tiles."""
    if LISTED:
        return tl.load(LIST + 2 + i) * SIZE
    else:
        return first + i * SIZE


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def ascending(
    FALLING, ops, sizes, bst, st, n, Qn, Kn, BASES: tl.constexpr, FALLS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Of which pairs of documents the ids do not ascend, as bits: FALLING int32 [elements], of the masks."""
    at = BASES(tl.program_id(0).to(tl.int64), sizes, ops, bst)
    tl.store(FALLING + tl.program_id(0), FALLS(SIZE, at, st, n, Qn, Kn))


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def listed(
    LIST, FALLING, entries, ops, sizes, bst, st, n, Qn, Kn,
    BM: tl.constexpr, BN: tl.constexpr, MANY: tl.constexpr, BASES: tl.constexpr, RANGE: tl.constexpr, DOCUMENTS: tl.constexpr,
    SEEN: tl.constexpr, COLUMNS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Which tiles of keys a tile of queries needs, MANY looked at at once; with COLUMNS which of queries a tile of keys needs.

    LIST int32 [elements, entries], of which [tiles, 2 + others]: the numbers of other and of full tiles, then the full ones'
    numbers, and at the end those of the others, backwards. Elements are those of the masks, which may be fewer than the batch
    has. RAGGED: rows behind the last query do not make a tile less than full. DOCUMENTS: what finds the tiles by ids that ascend,
    which FALLING [elements] tells, or None.
    """
    SIZE: tl.constexpr = BM if COLUMNS else BN
    if COLUMNS:
        own, total = tl.cdiv(Kn, BN), Qn
    else:
        own, total = tl.cdiv(Qn, BM), Kn
    at = BASES((tl.program_id(0) // own).to(tl.int64), sizes, ops, bst)
    tile = tl.program_id(0) % own
    if COLUMNS:
        begin, beyond, count = tile * BN, tile * BN + BN, Kn
    else:
        begin, beyond, count = tile * BM, tile * BM + BM, Qn
    end = tl.minimum(beyond, count) - 1
    lo, hi, first, last = RANGE(begin, end, at, st, n, Qn, Kn)
    if DOCUMENTS is not None:
        low, high = DOCUMENTS(begin, end, tl.load(FALLING + tl.program_id(0) // own), at, st, n, Qn, Kn)
        lo, hi = tl.maximum(lo, low), tl.minimum(hi, high)
    lo, hi = clipped(lo, hi, total, SIZE)
    if not RAGGED:
        last = tl.where(beyond <= count, last, 0)
    LIST += (tl.program_id(0) // own).to(tl.int64) * entries + tile * (2 + tl.cdiv(total, SIZE))
    edges = lo * 0
    fulls = lo * 0
    for place in range(lo // SIZE, tl.cdiv(hi, SIZE), MANY):
        others = place + tl.arange(0, MANY)
        start = others * SIZE
        stop = tl.minimum(start + SIZE, total)
        if COLUMNS:
            some, sure = SEEN(start, stop - 1, begin, end, BM, BN, 2, at, st, n, Qn, Kn)
        else:
            some, sure = SEEN(begin, end, start, stop - 1, BM, BN, 1, at, st, n, Qn, Kn)
        some = some & (start < hi)
        full = some & sure & (start >= first) & (start + SIZE <= last)
        rest = some & (full == 0)
        counts = full.to(tl.int32)
        tl.store(LIST + 2 + fulls + tl.cumsum(counts, 0) - counts, others, mask=full)
        fulls += tl.sum(counts, 0)
        counts = rest.to(tl.int32)
        tl.store(LIST + 1 + tl.cdiv(total, SIZE) - edges - tl.cumsum(counts, 0) + counts, others, mask=rest)
        edges += tl.sum(counts, 0)
    tl.store(LIST, edges)
    tl.store(LIST + 1, fulls)


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def forward(
    Q, K, V, O, M, LIST, lb, ops, seed, threshold, keep_scale, sizes, qb, kb, vb, ob, bst, st, n, qs, ks, vs, os, QB, KB, deal,
    sequences, heads, lines, Qn, Kn,
    D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    OFFSET: tl.constexpr, BASES: tl.constexpr, SCORE: tl.constexpr, WEIGH: tl.constexpr, SINK: tl.constexpr,
    LEFT: tl.constexpr, KEYS: tl.constexpr, DOCUMENTS: tl.constexpr, SEEN: tl.constexpr, LISTED: tl.constexpr,
    CHECKED: tl.constexpr, DOUBT: tl.constexpr, FILLS: tl.constexpr, DROPOUT: tl.constexpr, NEAR: tl.constexpr,
    FACTOR: tl.constexpr, HIDDEN: tl.constexpr, UNSHIFTED: tl.constexpr, PRECISION: tl.constexpr, PACKED_Q: tl.constexpr,
    PACKED_K: tl.constexpr, STAGES: tl.constexpr, SPECIALISED: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """out and stats [2, lines] of one query tile of one batch element. RAGGED, DOCUMENTS: as in `listed`; DOCUMENTS only without a
    list, in whose place FALLING is."""
    # the last queries first: under a causal mask they take longest
    if PACKED_Q:
        s, tile = dealt(deal, sequences, tl.program_id(0) // heads)
        if tile < 0:
            return
        e = s * heads + tl.program_id(0) % heads
    else:
        tiles = tl.cdiv(Qn, BM)
        e = tl.program_id(0) // tiles
        tile = tiles - 1 - tl.program_id(0) % tiles
    wide = e.to(tl.int64)
    Qn, q_start, first_line, mark = query_rows(e, QB, sequences, heads, Qn, BM, PACKED_Q)
    Kn, k_start = key_rows(e, KB, sequences, heads, Kn, PACKED_K)
    q0 = tile * BM
    q1 = tl.minimum(q0 + BM, Qn) - 1
    rows = q0 + tl.arange(0, BM)
    q = rows[:, None]
    line = first_line + q
    at = BASES(wide, sizes, ops, bst)
    K, ks = matrix_of(K, wide, k_start, sizes, kb, ks, OFFSET)
    V, vs = matrix_of(V, wide, k_start, sizes, vb, vs, OFFSET)
    q_place = OFFSET(wide, sizes, qb) + q_start * qs[0]
    qt = tile_of(Q + q_place, rows, qs[0], Qn, D, DP, qs[1])
    acc, m, l = begun(q, at, st, n, Qn, Kn, BM, EP, SINK)

    if LISTED:
        LIST += OFFSET(wide, sizes, lb) + tile * (2 + tl.cdiv(Kn, BN))
        lo, first, last, edges, fulls = 0, 0, 0, tl.load(LIST), tl.load(LIST + 1)
    else:
        lo, hi, first, last = KEYS(q0, q1, at, st, n, Qn, Kn)
        if DOCUMENTS is not None:
            low, high = DOCUMENTS(q0, q1, tl.load(LIST + OFFSET(wide, sizes, lb)), at, st, n, Qn, Kn)
            lo, hi = tl.maximum(lo, low), tl.minimum(hi, high)
        lo, hi = clipped(lo, hi, Kn, BN)
        if not RAGGED:
            last = tl.where(q0 + BM <= Qn, last, 0)
        first, last, edges, fulls = parted(lo, hi, first, last, BN)
    for i in tl.range(0, fulls, num_stages=STAGES, warp_specialize=SPECIALISED):
        k0 = full_tile(i, first, LIST, BN, LISTED)
        acc, m, l = visit(
            acc, m, l, qt, line, q, q0, q1, k0, K, V, ks, vs, at, at, st, n, Qn, Kn, seed, threshold, keep_scale, D, E,
            DP, EP, BM, BN, SCORE, WEIGH, SEEN, 2 if LISTED else 1, CHECKED, DROPOUT, NEAR, FACTOR, PRECISION,
        )  # fmt: skip
    for i in tl.range(0, edges, num_stages=STAGES):
        k0 = edge_tile(i, lo, first, last, LIST, Kn, False, BN, LISTED)
        acc, m, l = visit(
            acc, m, l, qt, line, q, q0, q1, k0, K, V, ks, vs, at, at, st, n, Qn, Kn, seed, threshold, keep_scale, D, E,
            DP, EP, BM, BN, SCORE, WEIGH, SEEN, 0, CHECKED, DROPOUT, NEAR, FACTOR, PRECISION,
        )  # fmt: skip
    m *= FACTOR
    # for the second look q has addresses that the compiler cannot know to be those of before: it would hold q in registers
    again = tl.minimum(q0, Qn) + tl.arange(0, BM)
    acc, m, l = seen_all(
        acc, m, l, rows < Qn, Q, q_place + again.to(tl.int64) * qs[0], qs, line, q, K, V, ks, vs, at, st, n, Qn, Kn,
        seed, threshold, keep_scale, D, E, DP, EP, BM, BN, SCORE, WEIGH, SINK, SEEN, DOUBT, DROPOUT, PRECISION, STAGES,
    )  # fmt: skip
    out, total = finished(acc, m, l, q, at, st, n, Qn, Kn, BM, BN, LEFT, FILLS, HIDDEN, UNSHIFTED)
    put_tile(O + OFFSET(wide, sizes, ob) + q_start * os[0], rows, os[0], Qn, E, EP, os[1], out)
    tl.store(M + first_line + rows, marked(m, l), mask=rows < Qn)
    tl.store(M + lines + first_line + rows, total, mask=rows < Qn)


@triton.jit
def grouped(first, r0, Qn, group, BM: tl.constexpr):
    """Rows r0 and on of `group` batch elements from `first` on, which have the same keys: (whether there is such a row, its
    batch element, its query), all [BM]. Rows are numbered as those of the result."""
    r = r0 + tl.arange(0, BM)
    inside = r < group * Qn
    r = tl.minimum(r, group * Qn - 1)
    return inside, first + r // Qn, r % Qn


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def decode(
    Q, K, V, P, S, ops, seed, threshold, keep_scale, sizes, qb, kb, vb, bst, st, n, qs, ks, vs, QB, KB, sequences, heads, lines,
    Qn, Kn, group, parts,
    D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    OFFSET: tl.constexpr, BASES: tl.constexpr, SCORE: tl.constexpr, WEIGH: tl.constexpr, KEYS: tl.constexpr,
    SEEN: tl.constexpr, CHECKED: tl.constexpr, DROPOUT: tl.constexpr, NEAR: tl.constexpr, FACTOR: tl.constexpr,
    PRECISION: tl.constexpr, PACKED_Q: tl.constexpr, PACKED_K: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums of few queries over one of `parts` parts of their keys, so that a long cache keeps the whole device busy.

    P float32 [parts, lines, EP], S float32 [parts, 2, lines]: acc, and m and l. The rows of a tile are the queries of `group`
    batch elements with the same keys, which are read once for all of them. ROWS: as many as BM and as Qn, at least.
    """
    part = tl.program_id(0) % parts
    tiles = tl.cdiv(group * Qn, BM)
    first = tl.program_id(0) // parts // tiles * group
    r0 = tl.program_id(0) // parts % tiles * BM
    inside, e, query = grouped(first, r0, Qn, group, BM)
    wide = e.to(tl.int64)
    Kn, k_start = key_rows(first, KB, sequences, heads, Kn, PACKED_K)
    line = first.to(tl.int64) * Qn + r0 + tl.arange(0, BM)
    at = BASES(wide[:, None], sizes, ops, bst)
    shared = BASES(first.to(tl.int64), sizes, ops, bst)
    K, ks = matrix_of(K, first, k_start, sizes, kb, ks, OFFSET)
    V, vs = matrix_of(V, first, k_start, sizes, vb, vs, OFFSET)
    qt = rows_at(Q, OFFSET(wide, sizes, qb) + query.to(tl.int64) * qs[0], inside, D, DP, qs[1])
    lo, hi, full_first, full_last = KEYS(0, Qn - 1, shared, st, n, Qn, Kn)
    lo, hi = clipped(lo, hi, Kn, BN)
    share = tl.cdiv(tl.cdiv(hi - lo, BN), parts) * BN
    begin = lo + part * share
    acc, m, l = none_of(BM, EP)
    for k0 in tl.range(begin, tl.minimum(begin + share, hi), BN, num_stages=STAGES):
        acc, m, l = visit(
            acc, m, l, qt, line[:, None], query[:, None], 0, Qn - 1, k0, K, V, ks, vs, at, shared, st, n, Qn, Kn, seed,
            threshold, keep_scale, D, E, DP, EP, ROWS, BN, SCORE, WEIGH, SEEN, 0, CHECKED, DROPOUT, NEAR, FACTOR, PRECISION,
        )  # fmt: skip
    S += part.to(tl.int64) * 2 * lines
    tl.store(S + line, m * FACTOR, mask=inside)
    tl.store(S + lines + line, l, mask=inside)
    cols = tl.arange(0, EP)
    P += part.to(tl.int64) * lines * EP
    tl.store(P + line[:, None] * EP + cols[None, :], acc, mask=inside[:, None])


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def combine(
    Q, K, V, O, M, P, S, ops, seed, threshold, keep_scale, sizes, qb, kb, vb, ob, bst, st, n, qs, ks, vs, os, QB, KB, sequences,
    heads, lines, Qn, Kn, group, parts,
    D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    OFFSET: tl.constexpr, BASES: tl.constexpr, SCORE: tl.constexpr, WEIGH: tl.constexpr, SINK: tl.constexpr,
    LEFT: tl.constexpr, SEEN: tl.constexpr, DOUBT: tl.constexpr, FILLS: tl.constexpr, DROPOUT: tl.constexpr, HIDDEN: tl.constexpr,
    UNSHIFTED: tl.constexpr, PRECISION: tl.constexpr, PACKED_Q: tl.constexpr, PACKED_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out and stats [2, lines] from what decode has summed up."""
    tiles = tl.cdiv(group * Qn, BM)
    first = tl.program_id(0) // tiles * group
    r0 = tl.program_id(0) % tiles * BM
    inside, e, query = grouped(first, r0, Qn, group, BM)
    wide = e.to(tl.int64)
    Kn, k_start = key_rows(first, KB, sequences, heads, Kn, PACKED_K)
    line = first.to(tl.int64) * Qn + r0 + tl.arange(0, BM)
    cols = tl.arange(0, EP)
    at = BASES(wide[:, None], sizes, ops, bst)
    q = query[:, None]
    acc, m, l = begun(q, at, st, n, Qn, Kn, BM, EP, SINK)
    for part in range(parts):
        wide_part = tl.full([], part, tl.int64)
        at_part = S + wide_part * 2 * lines + line
        m_part = tl.load(at_part, mask=inside, other=float("-inf"))
        l_part = tl.load(at_part + lines, mask=inside, other=0.0)
        places = (wide_part * lines + line) * EP
        acc_part = tl.load(P + places[:, None] + cols[None, :], mask=inside[:, None], other=0.0)
        top = tl.maximum(m, m_part)
        shift = tl.where(top == float("-inf"), 0.0, top)
        fade, gain = powers(m, shift, False, 1.0), powers(m_part, shift, False, 1.0)
        acc = acc * fade[:, None] + acc_part * gain[:, None]
        l = l * fade + l_part * gain
        m = top
    if float("-inf") < DOUBT:
        K, ks = matrix_of(K, first, k_start, sizes, kb, ks, OFFSET)
        V, vs = matrix_of(V, first, k_start, sizes, vb, vs, OFFSET)
        acc, m, l = seen_all(
            acc, m, l, inside, Q, OFFSET(wide, sizes, qb) + query.to(tl.int64) * qs[0], qs, line[:, None], q, K, V, ks,
            vs, at, st, n, Qn, Kn, seed, threshold, keep_scale, D, E, DP, EP, BM, BN, SCORE, WEIGH, SINK, SEEN, DOUBT,
            DROPOUT, PRECISION, STAGES,
        )  # fmt: skip
    out, total = finished(acc, m, l, q, at, st, n, Qn, Kn, BM, BN, LEFT, FILLS, HIDDEN, UNSHIFTED)
    places = OFFSET(wide, sizes, ob) + query.to(tl.int64) * os[0]
    inner = inside[:, None] & (cols[None, :] < E)
    tl.store(O + places[:, None] + cols.to(tl.int64)[None, :] * os[1], out.to(O.dtype.element_ty), mask=inner)
    tl.store(M + line, marked(m, l), mask=inside)
    tl.store(M + lines + line, total, mask=inside)


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def prepare(
    O, G, GL, M, W, F, sizes, ob, gb, os, gs, QB, KB, deal, sequences, heads, lines, marks, Qn, Kn, E: tl.constexpr,
    EP: tl.constexpr, BM: tl.constexpr, OFFSET: tl.constexpr, HIDES: tl.constexpr, DOUBT: tl.constexpr,
    HIDDEN: tl.constexpr, UNSHIFTED: tl.constexpr, MERGED: tl.constexpr, LSE: tl.constexpr, PACKED_Q: tl.constexpr,
    PACKED_K: tl.constexpr,
):  # fmt: skip
    """What backward needs of each row: W [3, lines], the shift, 1 / sum and delta = sum(out * dout); F, a mark for each query
    tile, whether a row of it may see hidden keys, and after `marks` of them one for each batch element.

    MERGED: the shift is that of exp2, with the logarithm of the sum in it, and infinite for a row that counts as 0.

    LSE: GL [lines] is the gradient of the log-sum-exp, which adds to that of every weight: delta is less by it.
    """
    if PACKED_Q:
        s, tile = dealt(deal, sequences, tl.program_id(0) // heads)
        if tile < 0:
            return
        e = s * heads + tl.program_id(0) % heads
    else:
        tiles = tl.cdiv(Qn, BM)
        e = tl.program_id(0) // tiles
        tile = tl.program_id(0) % tiles
    wide = e.to(tl.int64)
    Qn, q_start, line, mark = query_rows(e, QB, sequences, heads, Qn, BM, PACKED_Q)
    Kn, k_start = key_rows(e, KB, sequences, heads, Kn, PACKED_K)
    rows = tile * BM + tl.arange(0, BM)
    o = tile_of(O + OFFSET(wide, sizes, ob) + q_start * os[0], rows, os[0], Qn, E, EP, os[1]).to(tl.float32)
    g = tile_of(G + OFFSET(wide, sizes, gb) + q_start * gs[0], rows, gs[0], Qn, E, EP, gs[1]).to(tl.float32)
    m = tl.load(M + line + rows, mask=rows < Qn, other=0.0)
    l = tl.load(M + lines + line + rows, mask=rows < Qn, other=1.0)
    none = m == float("-inf")
    broken = none | (l != l)
    if UNSHIFTED:
        total = l * tl.exp2(m * LOG2E)
        broken = broken | (total == 0.0) | (total == float("inf")) | (total != total)
    inverse = tl.where(broken, float("nan"), 1.0 / l)
    zero = tl.zeros([BM], tl.int1)
    if HIDDEN == 1:
        zero = none
    if HIDDEN == 2:
        zero = broken
    zero = zero | ((Kn <= 0) & none)
    inverse = tl.where(zero, 0.0, inverse)
    delta = tl.sum(o * g, 1)
    used = tl.max(tl.where(g == 0.0, 0, 1), 1) > 0
    if LSE:
        of_lse = tl.load(GL + line + rows, mask=rows < Qn, other=0.0)
        delta -= of_lse
        used = used | (of_lse != 0.0)
    delta = tl.where(zero, 0.0, delta)
    if MERGED:
        shift = tl.where(zero, float("inf"), tl.where(broken, float("nan"), m * LOG2E + tl.log2(l)))
    else:
        shift = tl.where(none, 0.0, m)
    tl.store(W + line + rows, shift, mask=rows < Qn)
    tl.store(W + lines + line + rows, inverse, mask=rows < Qn)
    tl.store(W + 2 * lines + line + rows, delta, mask=rows < Qn)
    if HIDES:
        # NaN reaches all keys; rows without a gradient, such as those of padding, reach none
        doubtful = used & (rows < Qn) & ((inverse != inverse) | ((m <= DOUBT) & (inverse != 0.0)))
        found = tl.max(doubtful.to(tl.int32), 0)
        if found != 0:
            tl.store(F + mark + tile, 1)
            tl.atomic_max(F + marks + wide, 1, sem="relaxed")


@triton.jit
def along(x, QUERIES: tl.constexpr):
    """A number of each query [BM] as a tile takes it, in which queries are the dim QUERIES."""
    if QUERIES == 0:
        return x[:, None]
    else:
        return x[None, :]


@triton.jit
def weights_of(
    qt, kt, shift, inverse, line, q, k, at, st, n, Qn, Kn, seed, threshold, keep_scale,
    SCORE: tl.constexpr, WEIGH: tl.constexpr, FULL: tl.constexpr, DROPOUT: tl.constexpr, MERGED: tl.constexpr, FACTOR: tl.constexpr,
    ZEROS: tl.constexpr, PRECISION: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """(weights, weights that v was multiplied with, what else `scores_grad` needs), [BM, BN] or with QUERIES 1 [BN, BM].

    line, q, k: of such tiles. FULL: the tile lies in the matrix too. ZEROS: there may be rows that count as 0, which have no
    gradient, whatever their scores are.
    """
    if QUERIES == 0:
        s = tl.dot(qt, tl.trans(kt), input_precision=PRECISION)
    else:
        s = tl.dot(kt, tl.trans(qt), input_precision=PRECISION)
    s, saved = SCORE(s, q, k, FULL, at, st, n, Qn, Kn)
    shift, inverse = along(shift, QUERIES), along(inverse, QUERIES)
    if MERGED:
        p = tl.exp2(s * (FACTOR * LOG2E) - shift)
        live = shift != float("inf")
    else:
        if FACTOR == 1.0:
            p = powers(s, shift, False, 1.0)
        else:
            p = tl.exp2(s * (FACTOR * LOG2E) - shift * LOG2E)
        p = p * inverse
        live = inverse != 0.0
    if not FULL:
        live = live & (q < Qn) & (k < Kn)
    if ZEROS or not FULL:
        p = tl.where(live, p, 0.0)
    w = WEIGH(p, q, k, at, st, n, Qn, Kn)
    stays = live
    if DROPOUT:
        stays = kept(seed, line, q, k, threshold, Qn)
        w = tl.where(stays, w * keep_scale, 0.0)
    return p, w, (saved, live, stays)


@triton.jit
def scores_grad(
    dw, p, more, delta, q, k, at, st, n, gat, gst, Qn, Kn, keep_scale,
    SCORE_GRAD: tl.constexpr, WEIGH_GRAD: tl.constexpr, FULL: tl.constexpr, DROPOUT: tl.constexpr, ZEROS: tl.constexpr,
    GIVE: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """The gradient of q @ k but for the spec's slope, from that of the weights that v was multiplied with."""
    saved, live, stays = more
    if DROPOUT:
        dw = tl.where(stays, dw * keep_scale, 0.0)
    dp = WEIGH_GRAD(dw, p, q, k, gat, gst, GIVE, QUERIES, at, st, n, Qn, Kn)
    ds = p * (dp - along(delta, QUERIES))
    if ZEROS or not FULL:
        ds = tl.where(live, ds, 0.0)
    return SCORE_GRAD(ds, saved, q, k, FULL, gat, gst, GIVE, QUERIES, at, st, n, Qn, Kn)


@triton.jit
def row_tile(
    dq, k0, qt, gt, shift, inverse, delta, line, q, q0, q1, whole, K, V, ks, vs, at, st, n, gat, gst, Qn, Kn, seed, threshold,
    keep_scale,
    D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SCORE: tl.constexpr, SCORE_GRAD: tl.constexpr, WEIGH: tl.constexpr, WEIGH_GRAD: tl.constexpr, SEEN: tl.constexpr,
    FULL: tl.constexpr, CHECKED: tl.constexpr, HIDES: tl.constexpr, DROPOUT: tl.constexpr, MERGED: tl.constexpr,
    FACTOR: tl.constexpr, ZEROS: tl.constexpr, PRECISION: tl.constexpr, GIVE: tl.constexpr,
):  # fmt: skip
    """dq with what one tile of keys adds to it."""
    needed = True
    if CHECKED:
        needed, sure = SEEN(q0, q1, k0, tl.minimum(k0 + BN, Kn) - 1, BM, BN, 0, at, st, n, Qn, Kn)
        if HIDES:
            needed = needed | whole
    if needed:
        keys = k0 + tl.arange(0, BN)
        kt = tile_at(K, k0, keys, ks, Kn, D, DP, BN)
        vt = tile_at(V, k0, keys, vs, Kn, E, EP, BN)
        k = keys[None, :]
        p, w, more = weights_of(
            qt, kt, shift, inverse, line, q, k, at, st, n, Qn, Kn, seed, threshold, keep_scale, SCORE, WEIGH, FULL, DROPOUT, MERGED,
            FACTOR, ZEROS, PRECISION, 0,
        )  # fmt: skip
        dw = tl.dot(gt, tl.trans(vt), input_precision=PRECISION)
        ds = scores_grad(
            dw, p, more, delta, q, k, at, st, n, gat, gst, Qn, Kn, keep_scale, SCORE_GRAD, WEIGH_GRAD, FULL, DROPOUT, ZEROS, GIVE,
            0,
        )  # fmt: skip
        dq = tl.dot(ds.to(kt.dtype), kt, dq, input_precision=PRECISION)
    return dq


@triton.jit
def numbers_at(W, rows, Qn, FULL: tl.constexpr):
    """A number of each row; of rows that all exist, if FULL."""
    if FULL:
        return tl.load(W + rows)
    else:
        return tl.load(W + rows, mask=rows < Qn, other=0.0)


@triton.jit
def any_marked(F, q0, Qn, BM: tl.constexpr, MARKED: tl.constexpr):
    """Whether a tile of BM queries from q0 on has a row that may see hidden keys. F: a mark for each MARKED queries."""
    if BM <= MARKED:
        return tl.load(F + q0 // MARKED) != 0
    else:
        marks = q0 // MARKED + tl.arange(0, BM // MARKED)
        return tl.max(tl.load(F + marks, mask=marks * MARKED < Qn, other=0), 0) != 0


@triton.jit
def column_tile(
    dk, dv, q0, kt, vt, k, k0, k1, Q, G, DQ, W, F, qs, gs, dqs, first_line, lines, at, st, n, gat, gst, Qn, Kn, seed, threshold,
    keep_scale, D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SCORE: tl.constexpr, SCORE_GRAD: tl.constexpr, WEIGH: tl.constexpr, WEIGH_GRAD: tl.constexpr, SEEN: tl.constexpr,
    FULL: tl.constexpr, CHECKED: tl.constexpr, DROPOUT: tl.constexpr, MERGED: tl.constexpr, FACTOR: tl.constexpr,
    ZEROS: tl.constexpr, PRECISION: tl.constexpr, GIVE: tl.constexpr, MARKED: tl.constexpr, ADDS: tl.constexpr,
):  # fmt: skip
    """dk and dv with what one tile of queries adds to them; ADDS: and what it adds to that tile's dq, in memory.

    W, F: from the first query and the first tile of the element on; a tile of F is of MARKED queries, more or less than BM.
    """
    needed = True
    if CHECKED:
        needed, sure = SEEN(q0, tl.minimum(q0 + BM, Qn) - 1, k0, k1, BM, BN, 0, at, st, n, Qn, Kn)
        needed = needed | any_marked(F, q0, Qn, BM, MARKED)
    if needed:
        rows = q0 + tl.arange(0, BM)
        qt = tile_at(Q, q0, rows, qs, Qn, D, DP, BM)
        gt = tile_at(G, q0, rows, gs, Qn, E, EP, BM)
        shift = numbers_at(W, rows, Qn, FULL)
        inverse = shift
        if not MERGED:
            inverse = numbers_at(W + lines, rows, Qn, FULL)
        delta = numbers_at(W + 2 * lines, rows, Qn, FULL)
        # weights by key and query are the left factors of both sums as they are
        q = rows[None, :]
        p, w, more = weights_of(
            qt, kt, shift, inverse, first_line + q, q, k, at, st, n, Qn, Kn, seed, threshold, keep_scale, SCORE, WEIGH, FULL,
            DROPOUT, MERGED, FACTOR, ZEROS, PRECISION, 1,
        )  # fmt: skip
        dw = tl.dot(vt, tl.trans(gt), input_precision=PRECISION)
        dv = tl.dot(w.to(gt.dtype), gt, dv, input_precision=PRECISION)
        ds = scores_grad(
            dw, p, more, delta, q, k, at, st, n, gat, gst, Qn, Kn, keep_scale, SCORE_GRAD, WEIGH_GRAD, FULL, DROPOUT, ZEROS, GIVE,
            1,
        )  # fmt: skip
        dk = tl.dot(ds.to(qt.dtype), qt, dk, input_precision=PRECISION)
        if ADDS:
            dq = tl.dot(tl.trans(ds.to(kt.dtype)), kt, input_precision=PRECISION)
            DQ.atomic_add(dqs + (q0, 0), tl.reshape(dq, DQ.block_shape))  # noqa: RUF005
    return dk, dv


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def backward_rows(
    Q, K, V, G, W, F, LIST, lb, DQ, ops, gops, seed, threshold, keep_scale, sizes, qb, kb, vb, gb, dqb, bst, gbst, st, gst, n, qs,
    ks, vs, gs, dqs, QB, KB, deal, sequences, heads, lines, marks, Qn, Kn,
    D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    OFFSET: tl.constexpr, BASES: tl.constexpr, SCORE: tl.constexpr, SCORE_GRAD: tl.constexpr,
    WEIGH: tl.constexpr, WEIGH_GRAD: tl.constexpr, KEYS: tl.constexpr, DOCUMENTS: tl.constexpr, SEEN: tl.constexpr,
    LISTED: tl.constexpr,
    CHECKED: tl.constexpr, HIDES: tl.constexpr, DROPOUT: tl.constexpr, MERGED: tl.constexpr, FACTOR: tl.constexpr,
    SLOPE: tl.constexpr, ZEROS: tl.constexpr, PRECISION: tl.constexpr, PACKED_Q: tl.constexpr, PACKED_K: tl.constexpr,
    GIVE: tl.constexpr, STAGES: tl.constexpr, SPECIALISED: tl.constexpr,
):  # fmt: skip
    """Gradient of one query tile, and of the operands that have queries."""
    if PACKED_Q:
        s, tile = dealt(deal, sequences, tl.program_id(0) // heads)
        if tile < 0:
            return
        e = s * heads + tl.program_id(0) % heads
    else:
        tiles = tl.cdiv(Qn, BM)
        e = tl.program_id(0) // tiles
        tile = tiles - 1 - tl.program_id(0) % tiles
    wide = e.to(tl.int64)
    Qn, q_start, first_line, mark = query_rows(e, QB, sequences, heads, Qn, BM, PACKED_Q)
    Kn, k_start = key_rows(e, KB, sequences, heads, Kn, PACKED_K)
    q0 = tile * BM
    q1 = tl.minimum(q0 + BM, Qn) - 1
    rows = q0 + tl.arange(0, BM)
    q = rows[:, None]
    at = BASES(wide, sizes, ops, bst)
    gat = BASES(wide, sizes, gops, gbst)
    K, ks = matrix_of(K, wide, k_start, sizes, kb, ks, OFFSET)
    V, vs = matrix_of(V, wide, k_start, sizes, vb, vs, OFFSET)
    qt = tile_of(Q + OFFSET(wide, sizes, qb) + q_start * qs[0], rows, qs[0], Qn, D, DP, qs[1])
    gt = tile_of(G + OFFSET(wide, sizes, gb) + q_start * gs[0], rows, gs[0], Qn, E, EP, gs[1])
    W += first_line
    shift = numbers_at(W, rows, Qn, False)
    inverse = shift
    if not MERGED:
        inverse = numbers_at(W + lines, rows, Qn, False)
    delta = numbers_at(W + 2 * lines, rows, Qn, False)
    whole = False
    if HIDES:
        whole = tl.load(F + mark + tile) != 0
    if LISTED:
        LIST += OFFSET(wide, sizes, lb) + tile * (2 + tl.cdiv(Kn, BN))
        lo, first, last = 0, 0, 0
        edges = tl.where(whole, tl.cdiv(Kn, BN), tl.load(LIST))
        fulls = tl.where(whole, 0, tl.load(LIST + 1))
    else:
        lo, hi, first, last = KEYS(q0, q1, at, st, n, Qn, Kn)
        if DOCUMENTS is not None:
            low, high = DOCUMENTS(q0, q1, tl.load(LIST + OFFSET(wide, sizes, lb)), at, st, n, Qn, Kn)
            lo, hi = tl.maximum(lo, low), tl.minimum(hi, high)
        lo, hi = clipped(lo, hi, Kn, BN)
        if HIDES:
            lo = tl.where(whole, 0, lo)
            hi = tl.where(whole, Kn, hi)
        # rows behind the last query are in no full tile
        last = tl.where(q0 + BM <= Qn, last, 0)
        first, last, edges, fulls = parted(lo, hi, first, last, BN)
    dq = tl.zeros([BM, DP], tl.float32)
    # a specialised loop that another one follows does not compile on 10.0
    for i in tl.range(0, edges, num_stages=STAGES):
        dq = row_tile(
            dq, edge_tile(i, lo, first, last, LIST, Kn, whole, BN, LISTED), qt, gt, shift, inverse, delta, first_line + q, q, q0,
            q1, whole, K, V, ks, vs, at, st, n, gat, gst, Qn, Kn, seed, threshold, keep_scale, D, E, DP, EP, BM, BN, SCORE,
            SCORE_GRAD, WEIGH, WEIGH_GRAD, SEEN, 0, CHECKED, HIDES, DROPOUT, MERGED, FACTOR, ZEROS, PRECISION, GIVE,
        )  # fmt: skip
    for i in tl.range(0, fulls, num_stages=STAGES, warp_specialize=SPECIALISED):
        dq = row_tile(
            dq, full_tile(i, first, LIST, BN, LISTED), qt, gt, shift, inverse, delta, first_line + q, q, q0, q1, whole, K, V, ks,
            vs, at, st, n, gat, gst, Qn, Kn, seed, threshold, keep_scale, D, E, DP, EP, BM, BN, SCORE, SCORE_GRAD, WEIGH,
            WEIGH_GRAD, SEEN, 2 if LISTED else 1, CHECKED, HIDES, DROPOUT, MERGED, FACTOR, ZEROS, PRECISION, GIVE,
        )  # fmt: skip
    dq *= SLOPE
    put_tile(DQ + OFFSET(wide, sizes, dqb) + q_start * dqs[0], rows, dqs[0], Qn, D, DP, dqs[1], dq)


@triton.jit(do_not_specialize_on_alignment=COUNTS)
def backward_columns(
    Q, K, V, G, W, F, LIST, lb, DQ, DK, DV, ops, gops, seed, threshold, keep_scale, sizes, outer, inner, members, qb, kb, vb, gb,
    eb, dqb, dkb, dvb, bst, gbst, st, gst, n, qs, ks, vs, gs, dks, dvs, QB, KB, deal, sequences, heads, outer_heads, lines, marks,
    Qn, Kn, D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    OFFSET: tl.constexpr, BASES: tl.constexpr, SCORE: tl.constexpr, SCORE_GRAD: tl.constexpr,
    WEIGH: tl.constexpr, WEIGH_GRAD: tl.constexpr, QUERIES: tl.constexpr, DOCUMENTS: tl.constexpr, SEEN: tl.constexpr,
    LISTED: tl.constexpr,
    CHECKED: tl.constexpr, HIDES: tl.constexpr, DROPOUT: tl.constexpr, MERGED: tl.constexpr, FACTOR: tl.constexpr,
    SLOPE: tl.constexpr, ZEROS: tl.constexpr, PRECISION: tl.constexpr, PACKED_Q: tl.constexpr, PACKED_K: tl.constexpr,
    GIVE: tl.constexpr, MARKED: tl.constexpr, ADDS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values, and of the operands that have keys alone.

    ADDS: DQ is a tensor descriptor, by which the gradients of queries are added up in float32, in no order.

    outer, inner: the batch dims that k or v has, and those that both are broadcast over; `members` elements of the latter
    are gone through one after the other. eb: the strides of the flat element number.
    """
    if PACKED_K:
        s, tile = dealt(deal, sequences, tl.program_id(0) // outer_heads)
        if tile < 0:
            return
        head = (s * outer_heads + tl.program_id(0) % outer_heads).to(tl.int64)
    else:
        tiles = tl.cdiv(Kn, BN)
        head = (tl.program_id(0) // tiles).to(tl.int64)
        tile = tl.program_id(0) % tiles
    Kn, k_start = key_rows(head, KB, sequences, outer_heads, Kn, PACKED_K)
    k0 = tile * BN
    k1 = tl.minimum(k0 + BN, Kn) - 1
    keys = k0 + tl.arange(0, BN)
    kt = tile_of(K + OFFSET(head, outer, kb) + k_start * ks[0], keys, ks[0], Kn, D, DP, ks[1])
    vt = tile_of(V + OFFSET(head, outer, vb) + k_start * vs[0], keys, vs[0], Kn, E, EP, vs[1])
    dk = tl.zeros([BN, DP], tl.float32)
    dv = tl.zeros([BN, EP], tl.float32)
    for member in range(members):
        other = tl.full([], member, tl.int64)
        wide = OFFSET(head, outer, eb) + OFFSET(other, inner, eb)
        own, q_start, first_line, mark = query_rows(wide.to(tl.int32), QB, sequences, heads, Qn, MARKED, PACKED_Q)
        at = BASES(wide, sizes, ops, bst)
        gat = BASES(wide, sizes, gops, gbst)
        if isinstance(Q, tl.tensor):
            Qe = Q + OFFSET(head, outer, qb) + OFFSET(other, inner, qb) + q_start * qs[0]
            Ge = G + OFFSET(head, outer, gb) + OFFSET(other, inner, gb) + q_start * gs[0]
            q_at, g_at = qs, gs
        else:
            Qe, q_at = matrix_of(Q, wide, q_start, sizes, qb, qs, OFFSET)
            Ge, g_at = matrix_of(G, wide, q_start, sizes, gb, gs, OFFSET)
        dq_at = q_at
        if ADDS:
            dq_at = index_of(wide.to(tl.int32), sizes, dqb)
        any_whole = False
        if HIDES:
            # other queries may have rows that see all keys; few elements have any, and those take all tiles
            any_whole = tl.load(F + marks + wide) != 0
        if LISTED:
            tiles_of_member = LIST + OFFSET(wide, sizes, lb) + tile * (2 + tl.cdiv(own, BM))
            lo, first, last = 0, 0, 0
            edges = tl.where(any_whole, tl.cdiv(own, BM), tl.load(tiles_of_member))
            fulls = tl.where(any_whole, 0, tl.load(tiles_of_member + 1))
        else:
            tiles_of_member = LIST
            lo, hi, first, last = QUERIES(k0, k1, at, st, n, own, Kn)
            if DOCUMENTS is not None:
                low, high = DOCUMENTS(k0, k1, tl.load(LIST + OFFSET(wide, sizes, lb)), at, st, n, own, Kn)
                lo, hi = tl.maximum(lo, low), tl.minimum(hi, high)
            lo, hi = clipped(lo, hi, own, BM)
            if HIDES:
                lo = tl.where(any_whole, 0, lo)
                hi = tl.where(any_whole, own, hi)
            # keys behind the last one are in no full tile
            last = tl.where(k0 + BN <= Kn, last, 0)
            first, last, edges, fulls = parted(lo, hi, first, last, BM)
        # full tiles first: a loop that takes sums over from another one has fewer registers
        for i in tl.range(0, fulls, num_stages=STAGES):
            dk, dv = column_tile(
                dk, dv, full_tile(i, first, tiles_of_member, BM, LISTED), kt, vt, keys[:, None], k0, k1, Qe, Ge, DQ, W + first_line,
                F + mark, q_at, g_at, dq_at, first_line, lines, at, st, n, gat, gst, own, Kn, seed, threshold, keep_scale, D, E,
                DP, EP, BM, BN, SCORE, SCORE_GRAD, WEIGH, WEIGH_GRAD, SEEN, 2 if LISTED else 1, CHECKED, DROPOUT, MERGED, FACTOR,
                ZEROS, PRECISION, GIVE, MARKED, ADDS,
            )  # fmt: skip
        for i in tl.range(0, edges, num_stages=STAGES):
            dk, dv = column_tile(
                dk, dv, edge_tile(i, lo, first, last, tiles_of_member, own, any_whole, BM, LISTED), kt, vt, keys[:, None], k0, k1,
                Qe, Ge, DQ, W + first_line, F + mark, q_at, g_at, dq_at, first_line, lines, at, st, n, gat, gst, own, Kn, seed,
                threshold, keep_scale, D, E, DP, EP, BM, BN, SCORE, SCORE_GRAD, WEIGH, WEIGH_GRAD, SEEN, 0, CHECKED, DROPOUT,
                MERGED, FACTOR, ZEROS, PRECISION, GIVE, MARKED, ADDS,
            )  # fmt: skip
    dk *= SLOPE
    put_tile(DK + OFFSET(head, outer, dkb) + k_start * dks[0], keys, dks[0], Kn, D, DP, dks[1], dk)
    put_tile(DV + OFFSET(head, outer, dvb) + k_start * dvs[0], keys, dvs[0], Kn, E, EP, dvs[1], dv)
