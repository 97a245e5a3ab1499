// One attention as the kernels see it: where its tensors lie, how many rows there are, and what tiles of batch elements are whose.
//
// The host fills `Problem` (problem.py has the same fields in the same order). RANK, OPERANDS and the like are constants of the text.

// A function of a struct.
#ifdef EMULATED
#define METHOD inline
#else
#define METHOD __device__ __forceinline__
#endif

// 0, made of a row's number, which is never negative. What it is added to is computed in a loop and not held in registers
// through it: compilers take it for another number each time.
DEVICE int zero_of(int row) { return row >> 31; }

constexpr float LOG2E = 1.4426950408889634f;

// A tensor [*batch, rows, columns]. batch: strides of the batch dims, 0 where it is broadcast; row, column: strides; all in elements.
// wide: float32 in place of float16. Where IN_PIECES, each eight elements of a row are sixteen bytes in one place.
struct Matrix {
    u64 address;
    i64 batch[RANK];
    i64 row, column;
    int wide;
};

struct Problem {
    Matrix q, k, v, o, g, dq, dk, dv;
    // float32 [2, lines]: the maximum and the sum of each row of the result
    u64 stats;
    // of backward: float32 [3, lines]: shift, 1 / sum and delta; int32 marks; float32 [lines], the gradient of the log-sum-exp
    u64 work, flags, lse;
    // of decoding: the sums of each part
    u64 partial;
    // int64 of one element; int64 [2, sequences] twice; int32 [2, sequences]
    u64 seed, q_bounds, k_bounds, deal;
    u64 operand[OPERANDS], gradient[OPERANDS];
    i64 operand_batch[OPERANDS][RANK], gradient_batch[OPERANDS][RANK];
    i64 st[OPERANDS][2], gradient_st[OPERANDS][2];
    i64 lines, marks;
    // the strides of the flat number of a batch element
    i64 element[RANK];
    int n[OPERANDS][2];
    int sizes[RANK], outer[RANK], inner[RANK];
    int Qn, Kn, sequences, heads, outer_heads, members, group, parts;
    u32 threshold;
    float keep_scale;
};

DEVICE int smaller(int a, int b) { return a < b ? a : b; }
DEVICE int larger(int a, int b) { return a > b ? a : b; }
DEVICE i64 smaller(i64 a, i64 b) { return a < b ? a : b; }
DEVICE i64 larger(i64 a, i64 b) { return a > b ? a : b; }
DEVICE int tiles_of(int n, int size) { return (n + size - 1) / size; }

// Where batch element e begins in a tensor.
DEVICE i64 offset(int e, const int (&sizes)[RANK], const i64 (&strides)[RANK]) {
    // no number of elements needs more than 32 bits, whose division is short
    u32 rest = (u32)e;
    i64 found = 0;
    UNROLL
    for (int d = RANK - 1; d > 0; --d) {
        u32 above = rest / (u32)sizes[d];
        found += (i64)(rest - above * (u32)sizes[d]) * strides[d];
        rest = above;
    }
    return found + (i64)rest * strides[0];
}

// What the functions of a spec read of operands at one batch element.
struct Context {
    const Problem& p;
    const char* at[OPERANDS];
    int Qn, Kn;

    METHOD Context(const Problem& problem, int e, int queries, int keys) : p(problem), Qn(queries), Kn(keys) {
        UNROLL
        for (int i = 0; i < OPERANDS; ++i)
            at[i] = (const char*)p.operand[i] + offset(e, p.sizes, p.operand_batch[i]) * OPERAND_BYTES[i];
    }
};

// The first row of sequence s and how many rows it has, within `total` rows.
struct Span {
    i64 start;
    int rows;
};

DEVICE Span span_of(u64 bounds, int s, int sequences, int total) {
    const i64* at = (const i64*)bounds;
    i64 start = smaller(larger(load_global(at + s), (i64)0), (i64)total);
    i64 end = smaller(larger(load_global(at + sequences + s), start), (i64)total);
    return {start, (int)(end - start)};
}

// The tile of a block: its batch element and its number in it, negative where there are fewer tiles than blocks.
struct Place {
    int element, tile;
};

// Tiles of packed sequences, those of the longest first: `deal` has how many the longest have up to each, and which these are.
DEVICE Place dealt(const Problem& p, int heads, int block) {
    const int* deal = (const int*)p.deal;
    int slot = block / heads, low = 0, high = p.sequences;
    while (low < high) {
        int middle = (low + high) / 2;
        if (load_global(deal + middle) > slot) high = middle; else low = middle + 1;
    }
    int place = smaller(low, p.sequences - 1);
    int s = load_global(deal + p.sequences + place);
    return {s * heads + block % heads, load_global(deal + place) - 1 - slot};
}

// Tiles of a dense side, the last ones of an element first if they are to be: under a causal mask the last queries take longest.
DEVICE Place counted(int block, int tiles, bool last_first) {
    int tile = block % tiles;
    return {block / tiles, last_first ? tiles - 1 - tile : tile};
}

// Of batch element e: how many queries it has, where they begin in q, its first row in statistics and its first mark.
struct Queries {
    int n;
    i64 start, line, mark;
};

//: A mark is one of so many queries.
constexpr int MARKED = 64;

DEVICE Queries queries_of(const Problem& p, int e) {
    if (PACKED_Q) {
        int s = e / p.heads;
        i64 head = e % p.heads;
        Span own = span_of(p.q_bounds, s, p.sequences, p.Qn);
        return {own.rows, own.start, head * p.Qn + own.start,
                head * (p.Qn / MARKED + p.sequences + 1) + own.start / MARKED + s};
    }
    return {p.Qn, 0, (i64)e * p.Qn, (i64)e * tiles_of(p.Qn, MARKED)};
}

DEVICE Span keys_of(const Problem& p, int e, int heads) {
    if (PACKED_K) return span_of(p.k_bounds, e / heads, p.sequences, p.Kn);
    return {0, p.Kn};
}

// The lowbias32 finaliser on 32-bit words (kernels/dropout.py).
DEVICE u32 mixed(u32 x) {
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
}

// Which weights of a row dropout keeps.
struct Dropped {
    u32 a, b;

    METHOD Dropped() : a(0), b(0) {}
    METHOD Dropped(const Problem& p, i64 line) {
        u64 word = load_global((const u64*)p.seed);
        a = mixed((u32)((u64)line >> 32) ^ 0x9E3779B9u);
        a = mixed((u32)line + a);
        a = mixed((u32)(word >> 32) + a);
        a = mixed((u32)word + a);
        b = mixed(a ^ 0x85EBCA6Bu);
    }
    METHOD bool kept(int key, u32 threshold) const { return mixed(mixed((u32)key ^ a) + b) >= threshold; }
};

// Whether it is so for a thread of the block. slots: a word of shared memory for each warp.
template <int WARPS> DEVICE bool any_of_block(bool found, u32* slots) {
    bool any = any_of_warp(found);
    sync_block();
    if (thread_index() % 32 == 0) store_shared(slots + thread_index() / 32, any ? 1u : 0u);
    sync_block();
    u32 all = 0;
    UNROLL
    for (int i = 0; i < WARPS; ++i) all |= load_shared(slots + i);
    sync_block();
    return all != 0;
}
