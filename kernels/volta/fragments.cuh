// Products of a warp: 32 rows by any number of columns, by the matrix instruction that the device has.
//
// Both instructions are behind the same names. A thread holds of each 32 x 8 block of a result eight numbers, of SLOTS rows: number
// i lies in the row slot_of(i), which is row row_of(slot) of the tile. Left factors are fragments of 32 x 8: four words each.
//
//   mma.m8n8k4 (7.0)    quad-pairs multiply 8 x 8 blocks by themselves. Each takes 8 of the warp's 32 rows, and all the same columns.
//   mma.m16n8k8 (7.5)   a warp multiplies 16 x 8 blocks: two of them are 32 rows. ldmatrix brings operands to their threads.
//
// zero: of zero_of, so that places are computed where they are used.
//
// Tiles in shared memory have rows of COLUMNS halves, without gaps. A piece is 8 halves, 16 bytes. Pieces of a row change places
// by the row's number, so that eight rows in a place that 8 divides have their pieces of one column in different banks.

//: Rows of a warp's tile.
constexpr int WARP_ROWS = 32;

// Where pieces are, in words. Eight rows more do not change places, so that sums with constants are all there is to compute, and a
// piece's number is exclusive-ored to the place of the first one.
template <int COLUMNS> struct Layout {
    // pieces of a row, how often 2 divides their number, and the bits of a piece's number that rows change
    static constexpr int N = COLUMNS / 8, TWOS = N % 8 == 0 ? 3 : N % 4 == 0 ? 2 : N % 2 == 0 ? 1 : 0, BITS = (1 << TWOS) - 1;
    static constexpr int EIGHT_ROWS = 8 * N * 4;

    METHOD static int first(int row) { return (row * N + ((row >> (3 - TWOS)) & BITS)) * 4; }
    METHOD static int moved(int first, int piece) { return (first ^ ((piece & BITS) * 4)) + (piece & ~BITS) * 4; }
    METHOD static int at(int row, int piece) { return moved(first(row), piece); }
};

// Whether blocks of a warp's columns begin at a multiple of a power of two that is no less than their number: their numbers can
// be put to that of the first one bit by bit.
template <int BLOCKS> constexpr bool REGULAR = (BLOCKS & (BLOCKS - 1)) == 0;

DEVICE int lane() { return thread_index() & 31; }

#if CAPABILITY >= 75

constexpr int SLOTS = 4;

DEVICE constexpr int slot_of(int i) { return i >> 1; }
DEVICE int row_of(int slot) { return (lane() >> 2) + 8 * slot; }
// The column of number i, of a result of multiply_rows.
DEVICE int column_of(int block, int i) { return block * 8 + 2 * (lane() & 3) + (i & 1); }
// The same of multiply_columns.
DEVICE int sum_column_of(int block, int i) { return column_of(block, i); }
// Lanes with the same rows, by differences of their numbers.
DEVICE float greatest_of_row(float x) {
    x = greatest(x, shuffle_xor(x, 1));
    return greatest(x, shuffle_xor(x, 2));
}
DEVICE float sum_of_row(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}
DEVICE bool any_of_row(bool x) {
    int found = x ? 1 : 0;
    found |= shuffle_xor(found, 1);
    return (found | shuffle_xor(found, 2)) != 0;
}
constexpr int LANES_OF_ROW = 4;
DEVICE int lane_of_row() { return lane() & 3; }

// A left factor of 32 x 8 from rows `row` and on.
template <int COLUMNS> DEVICE void load_left(u32 (&a)[4], const u32* tile, int row, int piece, int zero) {
    load_matrices(a, tile + Layout<COLUMNS>::at(row + lane() + zero, piece));
}

// A 32 x 8 block of a result as left factor.
DEVICE void as_left(const float (&x)[8], u32 (&a)[4]) {
    UNROLL
    for (int j = 0; j < 4; ++j) a[j] = half_pair(x[2 * j], x[2 * j + 1]);
}

// x += a * b: two products of 16 rows.
DEVICE void multiply_32(float (&x)[8], const u32 (&a)[4], u32 b) {
    float low[4] = {x[0], x[1], x[2], x[3]}, high[4] = {x[4], x[5], x[6], x[7]};
    multiply_1688(low, a[0], a[1], b);
    multiply_1688(high, a[2], a[3], b);
    UNROLL
    for (int i = 0; i < 4; ++i) {
        x[i] = low[i];
        x[4 + i] = high[i];
    }
}

template <int COLUMNS> DEVICE void store_left(const u32 (&a)[4], u32* tile, int row, int piece, int zero) {
    int own = lane() + zero, first = Layout<COLUMNS>::at(row + (own >> 2), piece) + (own & 3);
    UNROLL
    for (int j = 0; j < 4; ++j) store_shared(tile + first + j * Layout<COLUMNS>::EIGHT_ROWS, a[j]);
}

// acc += rows `left_row` and on of one tile, times rows `right_row` and on of another one, 8 * BLOCKS of them.
template <int COLUMNS, int BLOCKS>
DEVICE void multiply_rows(float (&acc)[BLOCKS][8], const u32* left, int left_row, const u32* right, int right_row, int zero) {
    using In = Layout<COLUMNS>;
    static_assert(BLOCKS == 1 || BLOCKS == 2 || BLOCKS % 4 == 0, "right factors are loaded four at once");
    // Lanes name rows: of the left factor; of the right one those of four blocks, or those of two, or one, and of two pieces.
    constexpr bool FOUR = BLOCKS % 4 == 0;
    int own = lane() + zero, of_left = In::first(left_row + own);
    int of_right = FOUR ? In::first(right_row + own)
                        : In::first(right_row + (BLOCKS == 2 ? own & 15 : own & 7)) ^ (own >> 4) * 4;
    UNROLL
    for (int piece = 0; piece < In::N; piece += FOUR ? 1 : 2) {
        u32 b[4];
        if constexpr (FOUR) {
            u32 a[4];
            load_matrices(a, left + In::moved(of_left, piece));
            UNROLL
            for (int block = 0; block < BLOCKS; block += 4) {
                load_matrices(b, right + In::moved(of_right, piece) + block * In::EIGHT_ROWS);
                UNROLL
                for (int u = 0; u < 4; ++u) multiply_32(acc[block + u], a, b[u]);
            }
        } else {
            load_matrices(b, right + In::moved(of_right, piece));
            UNROLL
            for (int h = 0; h < 2; ++h) {
                u32 a[4];
                load_matrices(a, left + In::moved(of_left, piece + h));
                UNROLL
                for (int u = 0; u < BLOCKS; ++u) multiply_32(acc[u], a, b[2 * h + u]);
            }
        }
    }
}

// acc += left factors of 32 x 16, times rows `row` to row + 15 of a tile, in columns from 8 * piece on.
template <int COLUMNS, int BLOCKS>
DEVICE void multiply_columns(
    float (&acc)[BLOCKS][8], const u32 (&a)[4], const u32 (&a2)[4], const u32* right, int row, int piece, int zero) {
    using In = Layout<COLUMNS>;
    static_assert(BLOCKS % 2 == 0, "columns come in sixteens");
    int own = lane() + zero, first = In::first(row + (own & 15)) ^ (own >> 4) * 4;
    if (REGULAR<BLOCKS>) first = In::moved(first, piece);
    UNROLL
    for (int block = 0; block < BLOCKS; block += 2) {
        u32 b[4];
        load_matrices_transposed(b, right + In::moved(first, REGULAR<BLOCKS> ? block : piece + block));
        UNROLL
        for (int u = 0; u < 2; ++u) {
            multiply_32(acc[block + u], a, b[2 * u]);
            multiply_32(acc[block + u], a2, b[2 * u + 1]);
        }
    }
}

#else

constexpr int SLOTS = 2;

DEVICE constexpr int slot_of(int i) { return (i >> 1) & 1; }
// The first row of the lane's quad-pair. Lanes 0 to 7 and so on have eight rows one after the other.
DEVICE int first_row() { return 16 * ((lane() >> 3) & 1) + 8 * (lane() >> 4) + 4 * ((lane() >> 2) & 1); }
DEVICE int row_of(int slot) { return first_row() + (lane() & 1) + 2 * slot; }
DEVICE int column_of(int block, int i) { return block * 8 + (i & 4) + (lane() & 2) + (i & 1); }
// One load brings four columns for each of two blocks, which makes these lie between each other.
DEVICE int sum_column_of(int block, int i) {
    return (block >> 1) * 16 + 2 * (i & 4) + (block & 1) * 4 + (lane() & 2) + (i & 1);
}
DEVICE float greatest_of_row(float x) { return greatest(x, shuffle_xor(x, 2)); }
DEVICE float sum_of_row(float x) { return x + shuffle_xor(x, 2); }
DEVICE bool any_of_row(bool x) {
    int found = x ? 1 : 0;
    return (found | shuffle_xor(found, 2)) != 0;
}
constexpr int LANES_OF_ROW = 2;
DEVICE int lane_of_row() { return (lane() >> 1) & 1; }

// Of a left factor a lane holds eight halves of this row.
DEVICE int left_row_of() { return first_row() + (lane() & 3); }

template <int COLUMNS> DEVICE void load_left(u32 (&a)[4], const u32* tile, int row, int piece, int zero) {
    U4 found = load_shared4(tile + Layout<COLUMNS>::at(row + left_row_of() + zero, piece));
    a[0] = found.x; a[1] = found.y; a[2] = found.z; a[3] = found.w;
}

DEVICE void as_left(const float (&x)[8], u32 (&a)[4]) {
    bool upper = (lane() & 2) != 0;
    UNROLL
    for (int g = 0; g < 2; ++g) {
        // two rows of two columns each are exchanged for one row of four
        u32 first = half_pair(x[4 * g], x[4 * g + 1]), second = half_pair(x[4 * g + 2], x[4 * g + 3]);
        u32 own = upper ? second : first, given = shuffle_xor(upper ? first : second, 2);
        a[2 * g] = upper ? given : own;
        a[2 * g + 1] = upper ? own : given;
    }
}

template <int COLUMNS> DEVICE void store_left(const u32 (&a)[4], u32* tile, int row, int piece, int zero) {
    store_shared4(tile + Layout<COLUMNS>::at(row + left_row_of() + zero, piece), U4{a[0], a[1], a[2], a[3]});
}

template <int COLUMNS, int BLOCKS>
DEVICE void multiply_rows(float (&acc)[BLOCKS][8], const u32* left, int left_row, const u32* right, int right_row, int zero) {
    using In = Layout<COLUMNS>;
    int own = lane() + zero, of_right = In::first(right_row + (own & 3) + 4 * (own >> 4));
    int of_left = In::first(left_row + left_row_of() + zero);
    UNROLL
    for (int piece = 0; piece < In::N; ++piece) {
        U4 a = load_shared4(left + In::moved(of_left, piece));
        UNROLL
        for (int block = 0; block < BLOCKS; ++block) {
            U4 b = load_shared4(right + In::moved(of_right, piece) + block * In::EIGHT_ROWS);
            multiply_884<false, false>(acc[block], a.x, a.y, b.x, b.y);
            multiply_884<false, false>(acc[block], a.z, a.w, b.z, b.w);
        }
    }
}

template <int COLUMNS, int BLOCKS>
DEVICE void multiply_columns(
    float (&acc)[BLOCKS][8], const u32 (&a)[4], const u32 (&a2)[4], const u32* right, int row, int piece, int zero) {
    using In = Layout<COLUMNS>;
    static_assert(BLOCKS % 2 == 0, "columns come in sixteens");
    int own = lane() + zero;
    UNROLL
    for (int step = 0; step < 4; ++step) {
        u32 first = step < 2 ? a[2 * step] : a2[2 * step - 4], second = step < 2 ? a[2 * step + 1] : a2[2 * step - 3];
        // rows 8 and on are as far from the first ones whatever these are
        int place = In::first(row + 4 * (step & 1) + (own & 3)) ^ (own >> 4) * 4;
        if (REGULAR<BLOCKS>) place = In::moved(place, piece);
        UNROLL
        for (int block = 0; block < BLOCKS; block += 2) {
            int moved = In::moved(place, REGULAR<BLOCKS> ? block : piece + block);
            U4 b = load_shared4(right + moved + (step >> 1) * In::EIGHT_ROWS);
            multiply_884<false, true>(acc[block], first, second, b.x, b.y);
            multiply_884<false, true>(acc[block + 1], first, second, b.z, b.w);
        }
    }
}

#endif

// What a tile of ROWS rows brings from global to shared memory: pieces on their way, in registers.
template <int ROWS, int COLUMNS, int THREADS> struct Pieces {
    static constexpr int PIECES = ROWS * COLUMNS / 8, EACH = (PIECES + THREADS - 1) / THREADS;
    U4 x[EACH];

    // Rows from `first` on of the `rows` that there are of a matrix whose first element is at `base`; 0 outside of it. width: columns.
    METHOD void load(const Matrix& m, i64 base, int first, int rows, int width, int zero) {
        const u16* from = (const u16*)m.address + base;
        int own = thread_index() + zero;
        UNROLL
        for (int j = 0; j < EACH; ++j) {
            int at = own + j * THREADS;
            int row = first + at / (COLUMNS / 8), column = at % (COLUMNS / 8) * 8;
            U4 found = {0, 0, 0, 0};
            if ((PIECES % THREADS == 0 || at < PIECES) && row < rows && column < width) {
                const u16* place = from + row * m.row;
                if (IN_PIECES) found = load_global((const U4*)(place + column));
                else found = gathered(place, column, m.column, width);
            }
            x[j] = found;
        }
    }

    METHOD void store(u32* tile, int zero) const {
        using In = Layout<COLUMNS>;
        // whether a thread's pieces are those of one column, in rows that eight divides the distance of
        constexpr bool EVEN = THREADS % (8 * In::N) == 0;
        int own = thread_index() + zero, first = In::at(own / In::N, own % In::N);
        UNROLL
        for (int j = 0; j < EACH; ++j) {
            int at = own + j * THREADS;
            int place = EVEN ? first + j * THREADS / (8 * In::N) * In::EIGHT_ROWS : In::at(at / In::N, at % In::N);
            if (PIECES % THREADS == 0 || at < PIECES) store_shared4(tile + place, x[j]);
        }
    }

    // The same of elements that are not sixteen bytes in one place.
    METHOD static U4 gathered(const u16* place, int column, i64 step, int width) {
        u32 words[4];
        UNROLL
        for (int w = 0; w < 4; ++w) {
            int c = column + 2 * w;
            u32 low = c < width ? load_global(place + c * step) : 0;
            u32 high = c + 1 < width ? load_global(place + (c + 1) * step) : 0;
            words[w] = low | high << 16;
        }
        return {words[0], words[1], words[2], words[3]};
    }
};

// Two numbers of a result, in columns next to each other; `place`: of the first element of the row.
DEVICE void put_pair(const Matrix& m, i64 place, int column, int width, float first, float second) {
    if (m.wide != 0) {
        float* to = (float*)m.address + place;
        if (column < width) store_global(to + column * m.column, first);
        if (column + 1 < width) store_global(to + (column + 1) * m.column, second);
        return;
    }
    u16* to = (u16*)m.address + place;
    if (IN_PIECES) {
        if (column < width) store_global((u32*)(to + column), half_pair(first, second));
        return;
    }
    if (column < width) store_global(to + column * m.column, half_of_float(first));
    if (column + 1 < width) store_global(to + (column + 1) * m.column, half_of_float(second));
}
