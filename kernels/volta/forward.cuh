// The forward pass: an online softmax over tiles of keys, by one block for each tile of queries.
//
// Warps share the tiles of keys and values. A warp has 32 queries; where it would have no registers for all columns of its sums,
// SIDES warps share these, and each makes the scores for itself. Few queries are decoded instead: a block takes a part of the keys and
// leaves its sums, and `attention_combined` adds these up. The queries of `group` batch elements with the same keys are rows of
// one tile then.
//
// Sources: Dao 2023, arXiv:2307.08691 (tiles); Milakov and Gimelshein 2018, arXiv:1805.02867 (online softmax); Lin et al. 2024,
// arXiv:2410.16663 (operands of m8n8k4 in shared memory).

enum Mode { WHOLE, PART, COMBINED };

constexpr int WARPS = ROW_WARPS * SIDES, THREADS = 32 * WARPS, ROWS = WARP_ROWS * ROW_WARPS;
//: Of sums: the columns of a warp, in blocks of eight.
constexpr int SUM_BLOCKS = EP / SIDES / 8, KEY_BLOCKS = KEYS / 8;
static_assert(SUM_BLOCKS % 2 == 0 && EP % (8 * SIDES) == 0 && DP % 16 == 0, "columns come in sixteens");
static_assert(KEY_BLOCKS % 2 == 0, "keys come in sixteens");
//: Words of shared memory.
constexpr int Q_WORDS = ROWS * DP / 2, K_WORDS = KEYS * DP / 2, V_WORDS = KEYS * EP / 2;

// A row of the tile: its query, batch element and line of the statistics.
struct Row {
    bool inside;
    int query, element;
    i64 line;
};

template <Mode MODE> struct Forward {
    const Problem& p;
    u32 *q_tile, *k_tile, *v_tile, *slots;
    //: The batch element whose keys and masks these are, and its numbers of queries and keys.
    int first, Qn, Kn, q0, q1, row0, side;
    i64 q_start, k_start, first_line;
    float acc[SUM_BLOCKS][8], m[SLOTS], l[SLOTS];
    Dropped dropped[SLOTS];

    METHOD Forward(const Problem& problem) : p(problem) {
        q_tile = shared_memory();
        k_tile = q_tile + Q_WORDS;
        v_tile = k_tile + K_WORDS;
        slots = v_tile + V_WORDS;
    }

    // Row r of the tile. Rows of a group are numbered as those of the result.
    METHOD Row row(int r) const {
        if (MODE == WHOLE) return {q0 + r < Qn, q0 + r, first, first_line + q0 + r};
        int at = q0 + r;
        bool inside = at < p.group * Qn;
        at = smaller(at, p.group * Qn - 1);
        return {inside, at % Qn, first + at / Qn, first_line + q0 + r};
    }

    // Of the contexts of rows: there is one, where all rows are of one batch element.
    METHOD static constexpr int own_of(int slot) { return MODE == WHOLE ? 0 : slot; }

    METHOD Context context(int slot) const {
        if (MODE == WHOLE) return Context(p, first, Qn, Kn);
        return Context(p, row(row0 + row_of(slot)).element, Qn, Kn);
    }

    // Queries of the tile to shared memory.
    METHOD void load_queries() {
        if (MODE == WHOLE) {
            Pieces<ROWS, DP, THREADS> pieces;
            pieces.load(p.q, offset(first, p.sizes, p.q.batch) + q_start * p.q.row, q0, Qn, D, 0);
            pieces.store(q_tile, 0);
            return;
        }
        for (int at = thread_index(); at < ROWS * DP / 8; at += THREADS) {
            Row of = row(at / (DP / 8));
            Pieces<1, 8, 1> piece;
            piece.x[0] = U4{0, 0, 0, 0};
            int column = at % (DP / 8) * 8;
            if (of.inside && column < D) {
                const u16* place = (const u16*)p.q.address + offset(of.element, p.sizes, p.q.batch) + of.query * p.q.row;
                piece.x[0] = IN_PIECES ? load_global((const U4*)(place + column))
                                        : Pieces<1, 8, 1>::gathered(place, column, p.q.column, D);
            }
            store_shared4(q_tile + Layout<DP>::at(at / (DP / 8), at % (DP / 8)), piece.x[0]);
        }
    }

    METHOD void begin(const Context (&c)[SLOTS]) {
        UNROLL
        for (int b = 0; b < SUM_BLOCKS; ++b) {
            UNROLL
            for (int i = 0; i < 8; ++i) acc[b][i] = 0.0f;
        }
        UNROLL
        for (int s = 0; s < SLOTS; ++s) {
            m[s] = -infinity();
            l[s] = 0.0f;
            if (SINK && MODE != PART) {
                m[s] = sink(row(row0 + row_of(s)).query, c[own_of(s)]);
                // once for all lanes of the row; infinity and NaN make it NaN
                l[s] = m[s] == -infinity() || lane_of_row() != 0 ? 0.0f : m[s] - m[s] + 1.0f;
            }
        }
    }

    // The weights of the keys from k0 on, of their scores s, and what was summed up before in proportion to them. FULL: as `score`
    // takes it.
    template <int FULL> METHOD void weights(float (&s)[KEY_BLOCKS][8], int k0, const Context (&c)[SLOTS]) {
        float top[SLOTS], fade[SLOTS], shift[SLOTS];
        int query[SLOTS];
        UNROLL
        for (int z = 0; z < SLOTS; ++z) {
            top[z] = m[z];
            query[z] = row(row0 + row_of(z)).query;
        }
        UNROLL
        for (int b = 0; b < KEY_BLOCKS; ++b) {
            UNROLL
            for (int i = 0; i < 8; ++i) {
                int z = slot_of(i), k = k0 + column_of(b, i);
                Saved saved;
                float x = score<FULL>(s[b][i], query[z], k, c[own_of(z)], saved);
                if (FULL == 0 && k >= Kn) x = -infinity();
                s[b][i] = x;
                top[z] = greatest(top[z], x);
            }
        }
        UNROLL
        for (int z = 0; z < SLOTS; ++z) {
            top[z] = greatest_of_row(top[z]);
            shift[z] = top[z] == -infinity() ? 0.0f : top[z];
            fade[z] = exp2_approximate((m[z] - shift[z]) * LOG2E);
            m[z] = top[z];
            l[z] *= fade[z];
        }
        UNROLL
        for (int b = 0; b < KEY_BLOCKS; ++b) {
            UNROLL
            for (int i = 0; i < 8; ++i) {
                int z = slot_of(i), k = k0 + column_of(b, i);
                float w = exp2_approximate((s[b][i] - shift[z]) * LOG2E);
                l[z] += w;
                w = weigh(w, query[z], k, c[own_of(z)]);
                if (DROPOUT) w = dropped[z].kept(k, p.threshold) ? w * p.keep_scale : 0.0f;
                s[b][i] = w;
            }
        }
        UNROLL
        for (int b = 0; b < SUM_BLOCKS; ++b) {
            UNROLL
            for (int i = 0; i < 8; ++i) acc[b][i] *= fade[slot_of(i)];
        }
    }

    // The first tile from k0 on that may hold a key that is not hidden, and whether it surely holds no other.
    struct Tile {
        int k0;
        bool full;
    };

    METHOD Tile next(int k0, int hi, const Keys& range, bool whole, const Context& shared) const {
        for (; k0 < hi; k0 += KEYS) {
            bool full = !whole && k0 >= range.first && k0 + KEYS <= range.last;
            if (!CHECKED || whole) return {k0, full};
            Seen found = seen(q0_of_mask(), q1, k0, smaller(k0 + KEYS, Kn) - 1, shared);
            if (found.some) return {k0, full && found.sure};
        }
        return {k0, false};
    }

    // Tiles of a group are looked at for all queries of an element.
    METHOD int q0_of_mask() const { return MODE == WHOLE ? q0 : 0; }

    // The sums over keys from lo to hi, of all tiles if `whole`. Returns where it ended, which is not negative.
    //
    // While weights are made of scores the values are on their way, and while these are multiplied the keys of the next tile: no
    // thread has registers for more. A tile is written where nobody reads since the last barrier.
    METHOD int pass(int lo, int hi, const Keys& range, bool whole, const Context (&c)[SLOTS], const Context& shared) {
        i64 k_base = offset(first, p.sizes, p.k.batch) + k_start * p.k.row;
        i64 v_base = offset(first, p.sizes, p.v.batch) + k_start * p.v.row;
        Tile tile = next(lo, hi, range, whole, shared);
        // queries of this pass are written, and the tiles of the pass before read
        sync_block();
        if (tile.k0 < hi) {
            Pieces<KEYS, DP, THREADS> keys;
            keys.load(p.k, k_base, tile.k0, Kn, D, 0);
            keys.store(k_tile, 0);
        }
        while (tile.k0 < hi) {
            sync_block();
            int zero = zero_of(tile.k0);
            float s[KEY_BLOCKS][8];
            UNROLL
            for (int b = 0; b < KEY_BLOCKS; ++b) {
                UNROLL
                for (int i = 0; i < 8; ++i) s[b][i] = 0.0f;
            }
            multiply_rows<DP, KEY_BLOCKS>(s, q_tile, row0, k_tile, 0, zero);
            Pieces<KEYS, EP, THREADS> values;
            values.load(p.v, v_base, tile.k0, Kn, E, zero);
            if (MODE == WHOLE && (tile.full || !EDGES)) weights<2>(s, tile.k0, c);
            else weights<0>(s, tile.k0, c);
            values.store(v_tile, zero);
            sync_block();
            Tile after = next(tile.k0 + KEYS, hi, range, whole, shared);
            Pieces<KEYS, DP, THREADS> keys;
            UNROLL
            for (int b = 0; b < KEY_BLOCKS; b += 2) {
                // half of the weights are used up then
                if (b == KEY_BLOCKS / 4 * 2 && after.k0 < hi) keys.load(p.k, k_base, after.k0, Kn, D, zero);
                u32 a[4], a2[4];
                as_left(s[b], a);
                as_left(s[b + 1], a2);
                multiply_columns<EP, SUM_BLOCKS>(acc, a, a2, v_tile, 8 * b, side * SUM_BLOCKS, zero);
            }
            if (after.k0 < hi) keys.store(k_tile, zero);
            tile = after;
        }
        return tile.k0;
    }

    // Makes [lo, hi) lie inside of [0, n), and begin where a tile does.
    METHOD static void clip(int& lo, int& hi, int n) {
        hi = smaller(hi, n);
        if (lo >= hi) hi = 0;
        lo = smaller(lo, hi) / KEYS * KEYS;
        lo = larger(lo, 0);
    }

    // Whether a row may see keys that were skipped.
    METHOD bool doubtful() const {
        bool found = false;
        UNROLL
        for (int s = 0; s < SLOTS; ++s) found |= row(row0 + row_of(s)).inside && m[s] <= DOUBT;
        return found;
    }

    METHOD void finish(const Context (&c)[SLOTS]) {
        float* stats = (float*)p.stats;
        float inverse[SLOTS], added[SLOTS];
        i64 place[SLOTS];
        bool zero[SLOTS], inside[SLOTS];
        UNROLL
        for (int s = 0; s < SLOTS; ++s) {
            Row of = row(row0 + row_of(s));
            inside[s] = of.inside;
            place[s] = offset(of.element, p.sizes, p.o.batch) + (q_start + of.query) * p.o.row;
            float total = sum_of_row(l[s]);
            // maxima skip NaN: of a row of NaN alone the maximum is -inf too
            bool none = m[s] == -infinity() && total == total && Kn > 0;
            bool broken = none || total != total;
            if (UNSHIFTED) {
                float sum = total * exp2_approximate(m[s] * LOG2E);
                broken = broken || ((sum == 0.0f || sum == infinity() || sum != sum) && Kn > 0);
            }
            inverse[s] = 1.0f / (Kn > 0 ? total : 1.0f);
            added[s] = broken ? not_a_number() : 0.0f;
            zero[s] = false;
            if (FILLS) {
                // weights that are filled are not NaN, even in a row that is: such a row is NaN if any weight is left
                bool stays = false;
                if (any_of_warp(broken)) {
                    for (int k = lane_of_row(); k < Kn; k += LANES_OF_ROW) stays = stays || left(of.query, k, c[own_of(s)]);
                    stays = any_of_row(stays);
                    if (broken) {
                        added[s] = stays ? not_a_number() : 0.0f;
                        zero[s] = true;
                    }
                }
            }
            if (HIDDEN == 1 && none) { zero[s] = true; added[s] = 0.0f; }
            if (HIDDEN == 2 && broken) { zero[s] = true; added[s] = 0.0f; }
            if (side == 0 && lane_of_row() == 0 && of.inside) {
                // NaN of a row of NaN, which -inf would make a row without scores
                bool marked = m[s] == -infinity() && total != total;
                store_global(stats + of.line, marked ? not_a_number() : m[s]);
                store_global(stats + p.lines + of.line, none ? not_a_number() : total);
            }
        }
        UNROLL
        for (int b = 0; b < SUM_BLOCKS; ++b) {
            UNROLL
            for (int i = 0; i < 8; i += 2) {
                int s = slot_of(i);
                float first_number = (zero[s] ? 0.0f : acc[b][i] * inverse[s]) + added[s];
                float second_number = (zero[s] ? 0.0f : acc[b][i + 1] * inverse[s]) + added[s];
                int column = side * SUM_BLOCKS * 8 + sum_column_of(b, i);
                if (inside[s]) put_pair(p.o, place[s], column, E, first_number, second_number);
            }
        }
    }

    // Sums of a part, in the order of threads.
    METHOD float* kept(int part, int tile) const {
        constexpr int NUMBERS = SUM_BLOCKS * 8 + 2 * SLOTS;
        return (float*)p.partial + ((i64)tile * p.parts + part) * NUMBERS * THREADS + thread_index();
    }

    METHOD void keep(int part, int tile) const {
        float* to = kept(part, tile);
        UNROLL
        for (int s = 0; s < SLOTS; ++s) {
            store_global(to + (2 * s) * THREADS, m[s]);
            store_global(to + (2 * s + 1) * THREADS, l[s]);
        }
        UNROLL
        for (int b = 0; b < SUM_BLOCKS; ++b) {
            UNROLL
            for (int i = 0; i < 8; ++i) store_global(to + (2 * SLOTS + b * 8 + i) * THREADS, acc[b][i]);
        }
    }

    METHOD void add(int part, int tile) {
        const float* from = kept(part, tile);
        float fade[SLOTS], gain[SLOTS];
        UNROLL
        for (int s = 0; s < SLOTS; ++s) {
            float own = load_global(from + (2 * s) * THREADS);
            float top = greatest(m[s], own), shift = top == -infinity() ? 0.0f : top;
            fade[s] = exp2_approximate((m[s] - shift) * LOG2E);
            gain[s] = exp2_approximate((own - shift) * LOG2E);
            l[s] = l[s] * fade[s] + load_global(from + (2 * s + 1) * THREADS) * gain[s];
            m[s] = top;
        }
        UNROLL
        for (int b = 0; b < SUM_BLOCKS; ++b) {
            UNROLL
            for (int i = 0; i < 8; ++i) {
                int s = slot_of(i);
                float own = load_global(from + (2 * SLOTS + b * 8 + i) * THREADS);
                acc[b][i] = acc[b][i] * fade[s] + own * gain[s];
            }
        }
    }

    // Which rows these are. False for a block that has none.
    METHOD bool locate(int zero) {
        int block = block_index() + zero;
        if (MODE == WHOLE) {
            Place at = PACKED_Q ? dealt(p, p.heads, block) : counted(block, tiles_of(p.Qn, ROWS), true);
            if (at.tile < 0) return false;
            first = at.element;
            q0 = at.tile * ROWS;
            Queries own = queries_of(p, first);
            Qn = own.n;
            q_start = own.start;
            first_line = own.line;
        } else {
            if (MODE == PART) block /= p.parts;
            int tiles = tiles_of(p.group * p.Qn, ROWS);
            first = block / tiles * p.group;
            q0 = block % tiles * ROWS;
            Qn = p.Qn;
            q_start = 0;
            first_line = (i64)first * Qn;
        }
        Span own = keys_of(p, first, p.heads);
        Kn = own.rows;
        k_start = own.start;
        q1 = MODE == WHOLE ? smaller(q0 + ROWS, Qn) - 1 : Qn - 1;
        int warp = (thread_index() + zero) / 32;
        row0 = warp / SIDES * WARP_ROWS;
        side = warp % SIDES;
        return true;
    }

    METHOD void run() {
        if (!locate(0)) return;
        load_queries();
        Context shared(p, first, Qn, Kn);
        const Context c[SLOTS] = {
            context(0), context(1),
#if CAPABILITY >= 75
            context(2), context(3),
#endif
        };
        if (DROPOUT) {
            UNROLL
            for (int s = 0; s < SLOTS; ++s) dropped[s] = Dropped(p, row(row0 + row_of(s)).line);
        }
        begin(c);
        Keys range = keys(q0_of_mask(), q1, shared);
        int lo = range.lo, hi = range.hi;
        clip(lo, hi, Kn);
        // nothing is full where some rows of a tile may lack what is read for them
        if (MODE != WHOLE || (!RAGGED && q0 + ROWS > Qn)) range.last = 0;
        if (MODE == PART) {
            int part = block_index() % p.parts, share = tiles_of(tiles_of(hi - lo, KEYS), p.parts) * KEYS;
            lo += part * share;
            pass(lo, smaller(lo + share, hi), range, false, c, shared);
            keep(part, block_index() / p.parts);
            return;
        }
        if (MODE == COMBINED) {
            for (int i = 0; i < p.parts; ++i) add(i, block_index());
        }
        // once more over all keys where a row may see some that were skipped
        bool whole = false;
        int last = 0;
        for (;;) {
            if (MODE == WHOLE || whole) last = pass(whole ? 0 : lo, whole ? Kn : hi, range, whole, c, shared);
            if (DOUBT == -infinity() || whole || !any_of_block<WARPS>(doubtful(), slots)) break;
            whole = true;
            begin(c);
        }
        // found again, so that nothing of it is held in registers through the loop
        locate(zero_of(last));
        finish(c);
    }
};
