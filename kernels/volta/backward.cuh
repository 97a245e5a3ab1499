// The backward pass, without atomic additions to gradients of q, k and v: once along the queries, once along the keys.
//
// Both are one kernel. A block has OWN_ROWS rows of its own side and goes through the other side, OTHER rows at a time:
//
//   AlongQueries    own: q and dout    other: k and v       writes dq, and gradients of operands that have queries
//   AlongKeys       own: k and v       other: q and dout    writes dk and dv, and gradients of operands that have keys alone
//
// Scores are made anew from q, k and what `attention_rows` found of each row. Weights and gradients of scores go through shared
// memory, as each of SIDES_B warps with the same rows has a part of the columns of their products.

constexpr int WARPS_B = ROW_WARPS_B * SIDES_B, THREADS_B = 32 * WARPS_B, OWN_ROWS = WARP_ROWS * ROW_WARPS_B;
constexpr int D_BLOCKS = DB / SIDES_B / 8, E_BLOCKS = EB / SIDES_B / 8;
static_assert(DB % (16 * SIDES_B) == 0 && EB % (16 * SIDES_B) == 0, "columns come in sixteens");
static_assert(OWN_ROWS <= MARKED && MARKED % OWN_ROWS == 0, "a tile of queries has one mark");

// Gradients of operands. Those of elements for each query and key are added where they belong; those of elements for each own row
// are added up in registers, and for all of a tile in one.
template <bool KEYS_OWN, int GIVEN> struct Sums {
    const Problem& p;
    int element, Qn, Kn;
    //: A bit for each operand; numbers of rows and of tiles have places of their own.
    float own[OPERANDS][SLOTS];

    METHOD Sums(const Problem& problem) : p(problem), element(0), Qn(0), Kn(0) { clear(); }

    METHOD void clear() {
        UNROLL
        for (int i = 0; i < OPERANDS; ++i) {
            UNROLL
            for (int s = 0; s < SLOTS; ++s) own[i][s] = 0.0f;
        }
    }

    template <int I> METHOD static constexpr bool wants() { return (GIVEN >> I & 1) != 0; }
    // Whether the other side's index says nothing of the element.
    template <int I> METHOD static constexpr bool along() {
        return KEYS_OWN ? !OPERAND_ROWS[I] : !OPERAND_COLUMNS[I];
    }

    METHOD float* at(int i) const {
        return (float*)p.gradient[i] + offset(element, p.sizes, p.gradient_batch[i]);
    }

    // Nobody has seen how long packed sequences are: an operand that is shorter is read at its last element again.
    METHOD int within(int index, int i, int which) const {
        return PACKED_Q || PACKED_K ? smaller(index, p.n[i][which] - 1) : index;
    }

    template <int I> METHOD void give(int slot, int column, int q, int k, float x) {
        if (along<I>()) {
            // what lies outside of the matrix gives 0
            own[I][slot] += x;
        } else if (q < Qn && k < Kn) {
            i64 row = OPERAND_ROWS[I] ? within(q, I, 0) : 0, col = OPERAND_COLUMNS[I] ? within(k, I, 1) : 0;
            add_global(at(I) + row * p.gradient_st[I][0] + col * p.gradient_st[I][1], x);
        }
    }

    template <int I> METHOD void scatter(i64 row, i64 column, int q, int k, float x) {
        if (q < Qn && k < Kn) add_global(at(I) + row * p.gradient_st[I][0] + column * p.gradient_st[I][1], x);
    }

    // Adds up what threads have of own rows, in one order, and brings it to memory. room: OWN_ROWS * SIDES_B words.
    METHOD void finish(u32* room, int own0, int own_n) {
        UNROLL
        for (int i = 0; i < OPERANDS; ++i) {
            if (!(GIVEN >> i & 1) || OPERAND_TABLE[i] || (KEYS_OWN ? OPERAND_ROWS[i] : OPERAND_COLUMNS[i])) continue;
            int warp = thread_index() / 32, side = warp % SIDES_B, row0 = warp / SIDES_B * WARP_ROWS;
            sync_block();
            UNROLL
            for (int s = 0; s < SLOTS; ++s) {
                float total = sum_of_row(own[i][s]);
                if (lane_of_row() == 0) store_shared(room + side * OWN_ROWS + row0 + row_of(s), bits_of(total));
            }
            sync_block();
            bool rows = KEYS_OWN ? OPERAND_COLUMNS[i] : OPERAND_ROWS[i];
            float whole = 0.0f;
            for (int r = rows ? thread_index() : 0; r < OWN_ROWS; r += rows ? THREADS_B : 1) {
                float total = 0.0f;
                UNROLL
                for (int j = 0; j < SIDES_B; ++j) total += float_of_bits(load_shared(room + j * OWN_ROWS + r));
                if (rows && own0 + r < own_n)
                    add_global(at(i) + within(own0 + r, i, KEYS_OWN ? 1 : 0) * p.gradient_st[i][KEYS_OWN ? 1 : 0], total);
                whole += total;
            }
            // an address for each tile of queries, where sums are kept apart for their order: elsewhere the stride is 0
            if (!rows && thread_index() == 0) add_global(at(i) + (i64)own0 * p.gradient_st[i][0], whole);
        }
        sync_block();
        clear();
    }
};

template <bool KEYS_OWN> struct Backward {
    static constexpr int GIVEN = KEYS_OWN ? GIVEN_BY_KEYS : GIVEN_BY_QUERIES;
    //: Rows of a tile of the other side, and columns of a warp's scores in blocks of eight.
    static constexpr int OTHER = KEYS_OWN ? OTHER_QUERIES : OTHER_KEYS, OTHER_BLOCKS = OTHER / SIDES_B / 8;
    static_assert(OTHER % 16 == 0 && OTHER % (8 * SIDES_B) == 0 && MARKED % OTHER == 0, "rows come in sixteens");
    const Problem& p;
    //: Tiles of the own side: of D and of E columns; of the other side; weights and gradients of scores.
    u32 *own_d, *own_e, *other_d, *other_e, *weights, *slopes;
    //: Of rows of the other side, if these are queries: shift, 1 / sum, delta and two words of dropout.
    float* row_numbers;
    int side, row0, own0, Qn, Kn;
    float d_sums[D_BLOCKS][8], e_sums[KEYS_OWN ? E_BLOCKS : 1][8];
    Sums<KEYS_OWN, GIVEN> sums;
    //: Of own rows, if these are queries.
    float shift[SLOTS], inverse[SLOTS], delta[SLOTS];
    Dropped dropped[SLOTS];
    i64 line;

    static constexpr int OWN_D_WORDS = OWN_ROWS * DB / 2, OWN_E_WORDS = OWN_ROWS * EB / 2, OTHER_D_WORDS = OTHER * DB / 2,
                         OTHER_E_WORDS = OTHER * EB / 2, TILE_WORDS = OWN_ROWS * OTHER / 2;

    METHOD Backward(const Problem& problem) : p(problem), sums(problem) {
        own_d = shared_memory();
        own_e = own_d + OWN_D_WORDS;
        other_d = own_e + OWN_E_WORDS;
        other_e = other_d + OTHER_D_WORDS;
        slopes = other_e + OTHER_E_WORDS;
        weights = slopes + TILE_WORDS;
        row_numbers = (float*)(weights + (KEYS_OWN ? TILE_WORDS : 0));
        int warp = thread_index() / 32;
        side = warp % SIDES_B;
        row0 = warp / SIDES_B * WARP_ROWS;
    }

    // Weights and gradients of scores of the other tile from `other0` on, to shared memory. FULL: as `score` takes it.
    template <int FULL> METHOD void slope(int other0, const Context& c, int zero) {
        float s[OTHER_BLOCKS][8], g[OTHER_BLOCKS][8];
        UNROLL
        for (int b = 0; b < OTHER_BLOCKS; ++b) {
            UNROLL
            for (int i = 0; i < 8; ++i) s[b][i] = g[b][i] = 0.0f;
        }
        int column0 = side * OTHER_BLOCKS * 8;
        multiply_rows<DB, OTHER_BLOCKS>(s, own_d, row0, other_d, column0, zero);
        multiply_rows<EB, OTHER_BLOCKS>(g, own_e, row0, other_e, column0, zero);
        UNROLL
        for (int b = 0; b < OTHER_BLOCKS; ++b) {
            UNROLL
            for (int i = 0; i < 8; ++i) {
                int slot = slot_of(i), column = column0 + column_of(b, i);
                int own = own0 + row0 + row_of(slot), other = other0 + column;
                int q = KEYS_OWN ? other : own, k = KEYS_OWN ? own : other;
                float of_shift, of_inverse, of_delta;
                if (KEYS_OWN) {
                    of_shift = load_shared_float(row_numbers + column);
                    of_inverse = load_shared_float(row_numbers + OTHER + column);
                    of_delta = load_shared_float(row_numbers + 2 * OTHER + column);
                } else {
                    of_shift = shift[slot];
                    of_inverse = inverse[slot];
                    of_delta = delta[slot];
                }
                Saved saved;
                float x = score<FULL>(s[b][i], q, k, c, saved);
                float w = exp2_approximate((x - of_shift) * LOG2E) * of_inverse;
                bool live = of_inverse != 0.0f;
                if (FULL == 0) live = live && q < Qn && k < Kn;
                if (ZEROS || FULL == 0) w = live ? w : 0.0f;
                float dropped_w = weigh(w, q, k, c), dw = g[b][i];
                if (DROPOUT) {
                    Dropped of = dropped[slot];
                    if (KEYS_OWN) {
                        of.a = load_shared((const u32*)row_numbers + 3 * OTHER + column);
                        of.b = load_shared((const u32*)row_numbers + 4 * OTHER + column);
                    }
                    bool kept = of.kept(k, p.threshold);
                    dropped_w = kept ? dropped_w * p.keep_scale : 0.0f;
                    dw = kept ? dw * p.keep_scale : 0.0f;
                }
                dw = weigh_grad(dw, w, q, k, c, sums, slot, 0);
                float ds = w * (dw - of_delta);
                if (ZEROS || FULL == 0) ds = live ? ds : 0.0f;
                g[b][i] = score_grad<FULL>(ds, saved, q, k, c, sums, slot, 0);
                s[b][i] = dropped_w;
            }
        }
        UNROLL
        for (int b = 0; b < OTHER_BLOCKS; ++b) {
            u32 a[4];
            as_left(g[b], a);
            store_left<OTHER>(a, slopes, row0, side * OTHER_BLOCKS + b, zero);
            if (KEYS_OWN) {
                as_left(s[b], a);
                store_left<OTHER>(a, weights, row0, side * OTHER_BLOCKS + b, zero);
            }
        }
    }

    // What the other tile adds to the sums.
    METHOD void multiply(int zero) {
        UNROLL
        for (int j = 0; j < OTHER / 8; j += 2) {
            u32 a[4], a2[4];
            load_left<OTHER>(a, slopes, row0, j, zero);
            load_left<OTHER>(a2, slopes, row0, j + 1, zero);
            multiply_columns<DB, D_BLOCKS>(d_sums, a, a2, other_d, 8 * j, side * D_BLOCKS, zero);
            if constexpr (KEYS_OWN) {
                load_left<OTHER>(a, weights, row0, j, zero);
                load_left<OTHER>(a2, weights, row0, j + 1, zero);
                multiply_columns<EB, E_BLOCKS>(e_sums, a, a2, other_e, 8 * j, side * E_BLOCKS, zero);
            }
        }
    }

    // The first tile of the other side from `at` on that is needed, and whether masks hide nothing of it.
    struct Tile {
        int at;
        bool full;
    };

    METHOD Tile next(int at, int hi, const Keys& range, bool whole, i64 mark, const Context& c) const {
        int own1 = smaller(own0 + OWN_ROWS, KEYS_OWN ? Kn : Qn) - 1, n = KEYS_OWN ? Qn : Kn;
        for (; at < hi; at += OTHER) {
            bool full = at >= range.first && at + OTHER <= range.last;
            if (!CHECKED) return {at, full};
            int last = smaller(at + OTHER, n) - 1;
            Seen found = KEYS_OWN ? seen(at, last, own0, own1, c) : seen(own0, own1, at, last, c);
            bool needed = found.some;
            if (HIDES) needed = needed || (KEYS_OWN ? load_global_changing((const int*)p.flags + mark + at / MARKED) != 0 : whole);
            if (needed) return {at, full && found.sure};
        }
        return {at, false};
    }

    METHOD void number_rows(int q0) {
        const float* work = (const float*)p.work + line;
        for (int at = thread_index(); at < 3 * OTHER; at += THREADS_B) {
            int q = q0 + at % OTHER;
            store_shared_float(row_numbers + at, q < Qn ? load_global(work + at / OTHER * p.lines + q) : 0.0f);
        }
        if (DROPOUT) {
            for (int at = thread_index(); at < OTHER; at += THREADS_B) {
                Dropped of(p, line + q0 + at);
                store_shared((u32*)row_numbers + 3 * OTHER + at, of.a);
                store_shared((u32*)row_numbers + 4 * OTHER + at, of.b);
            }
        }
    }

    // All that the other side's rows of one batch element add. d_base, e_base: where the element begins in its tensors; before: a
    // zero of what is around.
    METHOD void pass(const Matrix& of_d, const Matrix& of_e, i64 d_base, i64 e_base, int lo, int hi, const Keys& range,
                     bool whole, i64 mark, const Context& c, int before) {
        int n = KEYS_OWN ? Qn : Kn;
        Pieces<OTHER, DB, THREADS_B> d_pieces;
        Pieces<OTHER, EB, THREADS_B> e_pieces;
        Tile tile = next(lo, hi, range, whole, mark, c);
        if (tile.at < hi) {
            d_pieces.load(of_d, d_base, tile.at, n, D, before);
            e_pieces.load(of_e, e_base, tile.at, n, E, before);
        }
        while (tile.at < hi) {
            sync_block();
            int zero = zero_of(tile.at);
            d_pieces.store(other_d, zero);
            e_pieces.store(other_e, zero);
            if (KEYS_OWN) number_rows(tile.at);
            sync_block();
            if (tile.full || !EDGES) slope<2>(tile.at, c, zero);
            else slope<0>(tile.at, c, zero);
            sync_block();
            // on their way while this tile is multiplied: before, scores and their gradients have the registers
            Tile after = next(tile.at + OTHER, hi, range, whole, mark, c);
            if (after.at < hi) {
                d_pieces.load(of_d, d_base, after.at, n, D, zero);
                e_pieces.load(of_e, e_base, after.at, n, E, zero);
            }
            multiply(zero);
            tile = after;
        }
    }

    METHOD static void clip(int& lo, int& hi, int n) {
        hi = smaller(hi, n);
        if (lo >= hi) hi = 0;
        lo = larger(smaller(lo, hi) / OTHER * OTHER, 0);
    }

    template <int BLOCKS>
    METHOD void put(const float (&x)[BLOCKS][8], const Matrix& m, i64 base, int own_n, int width) const {
        UNROLL
        for (int b = 0; b < BLOCKS; ++b) {
            UNROLL
            for (int i = 0; i < 8; i += 2) {
                int row = own0 + row0 + row_of(slot_of(i));
                int column = side * BLOCKS * 8 + sum_column_of(b, i);
                if (row < own_n) put_pair(m, base + row * m.row, column, width, x[b][i], x[b][i + 1]);
            }
        }
    }

    // Tiles of the own side, to shared memory.
    METHOD void load_own(const Matrix& of_d, const Matrix& of_e, i64 d_base, i64 e_base, int n) const {
        Pieces<OWN_ROWS, DB, THREADS_B> d_pieces;
        Pieces<OWN_ROWS, EB, THREADS_B> e_pieces;
        d_pieces.load(of_d, d_base, own0, n, D, 0);
        d_pieces.store(own_d, 0);
        e_pieces.load(of_e, e_base, own0, n, E, 0);
        e_pieces.store(own_e, 0);
    }

    METHOD void run() {
        UNROLL
        for (int b = 0; b < D_BLOCKS; ++b) {
            UNROLL
            for (int i = 0; i < 8; ++i) d_sums[b][i] = 0.0f;
        }
        UNROLL
        for (int b = 0; b < (KEYS_OWN ? E_BLOCKS : 1); ++b) {
            UNROLL
            for (int i = 0; i < 8; ++i) e_sums[b][i] = 0.0f;
        }
        if constexpr (KEYS_OWN) along_keys(); else along_queries();
    }

    METHOD void along_queries() {
        Place at = PACKED_Q ? dealt(p, p.heads, block_index()) : counted(block_index(), tiles_of(p.Qn, OWN_ROWS), true);
        if (at.tile < 0) return;
        int e = at.element;
        own0 = at.tile * OWN_ROWS;
        Queries own = queries_of(p, e);
        Span of_keys = keys_of(p, e, p.heads);
        Qn = own.n;
        Kn = of_keys.rows;
        line = own.line;
        Context c(p, e, Qn, Kn);
        sums.element = e;
        sums.Qn = Qn;
        sums.Kn = Kn;
        load_own(p.q, p.g, offset(e, p.sizes, p.q.batch) + own.start * p.q.row,
                 offset(e, p.sizes, p.g.batch) + own.start * p.g.row, Qn);
        const float* work = (const float*)p.work + line;
        UNROLL
        for (int s = 0; s < SLOTS; ++s) {
            int q = own0 + row0 + row_of(s);
            bool inside = q < Qn;
            shift[s] = inside ? load_global(work + q) : 0.0f;
            inverse[s] = inside ? load_global(work + p.lines + q) : 0.0f;
            delta[s] = inside ? load_global(work + 2 * p.lines + q) : 0.0f;
            if (DROPOUT) dropped[s] = Dropped(p, line + q);
        }
        bool whole = HIDES && load_global_changing((const int*)p.flags + own.mark + own0 / MARKED) != 0;
        Keys range = keys(own0, smaller(own0 + OWN_ROWS, Qn) - 1, c);
        int lo = range.lo, hi = range.hi;
        clip(lo, hi, Kn);
        if (HIDES && whole) { lo = 0; hi = Kn; }
        // rows behind the last query are in no full tile
        if (own0 + OWN_ROWS > Qn) range.last = 0;
        pass(p.k, p.v, offset(e, p.sizes, p.k.batch) + of_keys.start * p.k.row,
             offset(e, p.sizes, p.v.batch) + of_keys.start * p.v.row, lo, hi, range, whole, 0, c, 0);
        put<D_BLOCKS>(d_sums, p.dq, offset(e, p.sizes, p.dq.batch) + own.start * p.dq.row, Qn, D);
        if (GIVEN != 0) sums.finish(slopes, own0, Qn);
    }

    // The batch element of the outer dims whose keys these are, and where they begin. False for a block that has none.
    METHOD bool locate_keys(int zero, int& head, i64& k_start) {
        int block = block_index() + zero, warp = (thread_index() + zero) / 32;
        Place at = PACKED_K ? dealt(p, p.outer_heads, block) : counted(block, tiles_of(p.Kn, OWN_ROWS), false);
        if (at.tile < 0) return false;
        head = at.element;
        own0 = at.tile * OWN_ROWS;
        Span own = keys_of(p, head, p.outer_heads);
        Kn = own.rows;
        k_start = own.start;
        side = warp % SIDES_B;
        row0 = warp / SIDES_B * WARP_ROWS;
        return true;
    }

    METHOD void along_keys() {
        int head, last = 0;
        i64 k_start;
        if (!locate_keys(0, head, k_start)) return;
        load_own(p.k, p.v, offset(head, p.outer, p.k.batch) + k_start * p.k.row,
                 offset(head, p.outer, p.v.batch) + k_start * p.v.row, Kn);
        for (int member = 0; member < p.members; ++member) {
            // the elements that share these keys, one after the other
            int e = (int)(offset(head, p.outer, p.element) + offset(member, p.inner, p.element));
            last = e;
            Queries of = queries_of(p, e);
            Qn = of.n;
            line = of.line;
            Context c(p, e, Qn, Kn);
            sums.element = e;
            sums.Qn = Qn;
            sums.Kn = Kn;
            // other queries may have rows that see all keys; few elements have any, and those take all tiles
            bool whole = HIDES && load_global_changing((const int*)p.flags + p.marks + e) != 0;
            Keys range = queries(own0, smaller(own0 + OWN_ROWS, Kn) - 1, c);
            int lo = range.lo, hi = range.hi;
            clip(lo, hi, Qn);
            if (whole) { lo = 0; hi = Qn; }
            if (own0 + OWN_ROWS > Kn) range.last = 0;
            pass(p.q, p.g, offset(e, p.sizes, p.q.batch) + of.start * p.q.row,
                 offset(e, p.sizes, p.g.batch) + of.start * p.g.row, lo, hi, range, whole, of.mark, c, zero_of(e));
            if (GIVEN != 0) sums.finish(slopes, own0, Kn);
        }
        // found again, so that nothing of it is held in registers through the loops
        locate_keys(zero_of(last), head, k_start);
        put<D_BLOCKS>(d_sums, p.dk, offset(head, p.outer, p.dk.batch) + k_start * p.dk.row, Kn, D);
        put<E_BLOCKS>(e_sums, p.dv, offset(head, p.outer, p.dv.batch) + k_start * p.dv.row, Kn, E);
    }
};

// What backward needs of each row. A block has MARKED queries, a warp one after the other.
DEVICE void rows_of_block(const Problem& p) {
    Place at = PACKED_Q ? dealt(p, p.heads, block_index()) : counted(block_index(), tiles_of(p.Qn, MARKED), false);
    if (at.tile < 0) return;
    int e = at.element;
    Queries own = queries_of(p, e);
    Span of_keys = keys_of(p, e, p.heads);
    i64 o_base = offset(e, p.sizes, p.o.batch) + own.start * p.o.row, g_base = offset(e, p.sizes, p.g.batch) + own.start * p.g.row;
    const float* stats = (const float*)p.stats;
    float* work = (float*)p.work;
    bool marked = false;
    for (int r = thread_index() / 32; r < MARKED; r += THREADS_B / 32) {
        int q = at.tile * MARKED + r;
        if (q >= own.n) break;
        const u16* o = (const u16*)p.o.address + o_base + q * p.o.row;
        const u16* g = (const u16*)p.g.address + g_base + q * p.g.row;
        float delta = 0.0f;
        bool used = false;
        for (int column = lane(); column < E; column += 32) {
            float of_g = float_of_half(load_global(g + column * p.g.column));
            delta += float_of_half(load_global(o + column * p.o.column)) * of_g;
            used = used || !(of_g == 0.0f);
        }
        UNROLL
        for (int step = 16; step > 0; step /= 2) delta += shuffle_xor(delta, step);
        used = any_of_warp(used);
        i64 line = own.line + q;
        float m = load_global(stats + line), l = load_global(stats + p.lines + line);
        bool none = m == -infinity(), broken = none || l != l, zero = false;
        if (UNSHIFTED) {
            float total = l * exp2_approximate(m * LOG2E);
            broken = broken || total == 0.0f || total == infinity() || total != total;
        }
        float inverse = broken ? not_a_number() : 1.0f / l;
        if (HIDDEN == 1) zero = none;
        if (HIDDEN == 2) zero = broken;
        zero = zero || (of_keys.rows <= 0 && none);
        if (zero) inverse = 0.0f;
        if (p.lse != 0) {
            float of_lse = load_global((const float*)p.lse + line);
            delta -= of_lse;
            used = used || of_lse != 0.0f;
        }
        if (zero) delta = 0.0f;
        if (lane() == 0) {
            store_global(work + line, none ? 0.0f : m);
            store_global(work + p.lines + line, inverse);
            store_global(work + 2 * p.lines + line, delta);
        }
        // NaN reaches all keys; rows without a gradient, such as those of padding, reach none
        marked = marked || (used && (inverse != inverse || (m <= DOUBT && inverse != 0.0f)));
    }
    if (HIDES && marked && lane() == 0) {
        max_global((int*)p.flags + own.mark + at.tile, 1);
        max_global((int*)p.flags + p.marks + e, 1);
    }
}
