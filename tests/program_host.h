// The primitives of kernels/volta/device.cuh for one thread of the host, and drivers of the functions of a spec. Loads outside of the
// operands are counted in place of made. The lanes of a warp are stacks that take turns: at a shuffle each leaves its number and goes on
// when all have left theirs.

#include <setjmp.h>
#include <stdlib.h>
#include <ucontext.h>

#include <cmath>
#include <cstring>

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define DEVICE static inline
#define UNROLL

// ------ what the language leaves undefined: the compiler calls these where it happens

static int undefined;

extern "C" {
void __ubsan_handle_add_overflow(void*, void*, void*) { ++undefined; }
void __ubsan_handle_sub_overflow(void*, void*, void*) { ++undefined; }
void __ubsan_handle_mul_overflow(void*, void*, void*) { ++undefined; }
void __ubsan_handle_negate_overflow(void*, void*) { ++undefined; }
void __ubsan_handle_divrem_overflow(void*, void*, void*) { ++undefined; }
void __ubsan_handle_shift_out_of_bounds(void*, void*, void*) { ++undefined; }
int undefined_so_far() { return undefined; }
}

// ------ numbers

static inline u32 bits_of(float x) { u32 y; memcpy(&y, &x, 4); return y; }
static inline float float_of_bits(u32 x) { float y; memcpy(&y, &x, 4); return y; }
static inline float infinity() { return float_of_bits(0x7f800000u); }
static inline float exp2_approximate(float x) { return exp2f(x); }
static inline float rsqrt_approximate(float x) { return (float)(1.0 / sqrt((double)x)); }
static inline float tanh_approximate(float x) { return tanhf(x); }
static inline float float_of_bfloat16(u16 x) { return float_of_bits((u32)x << 16); }

static inline float float_of_half(u16 x) {
    const int exponent = x >> 10 & 31, rest = x & 1023;
    const float size = exponent == 31 ? (rest ? NAN : INFINITY) : ldexpf((float)(exponent ? rest + 1024 : rest), (exponent ? exponent : 1) - 25);
    return x >> 15 ? -size : size;
}

static inline u16 half_of_float(float x) {
    const u16 sign = (u16)(bits_of(x) >> 31 << 15);
    const float size = fabsf(x);
    if (size != size) return 0x7fff;
    if (size >= 65520.0f) return sign | 0x7c00;
    int exponent = size == 0.0f ? -14 : ilogbf(size);
    if (exponent < -14) exponent = -14;
    // to nearest, ties to even; what is rounded up to a power of two carries into the exponent
    const int rest = (int)nearbyintf(ldexpf(size, 10 - exponent));
    return sign | (u16)(rest + ((exponent + 14) << 10));
}

// ------ memory

struct Arguments {
    const char* at[32];
    i64 bytes[32];
    i64 st[32][2];
    int n[32][2];
    int operands, Qn, Kn;
};

static const Arguments* current;
static int outside;

template <class T> static inline T load_global(const T* x) {
    const char* at = (const char*)x;
    for (int i = 0; i < current->operands; ++i) {
        const i64 offset = at - current->at[i];
        if (offset >= 0 && offset + (i64)sizeof(T) <= current->bytes[i] && offset % sizeof(T) == 0) return *x;
    }
    ++outside;
    return T(1);
}

// ------ a warp

namespace warp {

constexpr int LANES = 32, STACK = 1 << 16;
static ucontext_t first[LANES], begun_from;
static jmp_buf places[LANES], caller;
static bool begun, done[LANES];
static int lane, shuffles[LANES];
static u32 slots[2][LANES];
static void (*job)(int lane);

static void next() {
    // those before this one are as far as it is, or done
    for (int i = 1; i <= LANES; ++i)
        if (!done[(lane + i) % LANES]) {
            lane = (lane + i) % LANES;
            _longjmp(places[lane], 1);
        }
    _longjmp(caller, 1);
}

static void wait() {
    if (!_setjmp(places[lane])) next();
}

static void live() {
    const int own = lane;
    if (!_setjmp(places[own])) setcontext(&begun_from);
    for (;;) {
        job(own);
        done[own] = true;
        if (!_setjmp(places[own])) next();
    }
}

// Whether all lanes called the same number of collectives.
static bool run(void (*made)(int)) {
    if (!begun)
        for (lane = 0; lane < LANES; ++lane) {
            getcontext(&first[lane]);
            first[lane].uc_stack.ss_sp = malloc(STACK);
            first[lane].uc_stack.ss_size = STACK;
            makecontext(&first[lane], live, 0);
            swapcontext(&begun_from, &first[lane]);
        }
    begun = true;
    job = made;
    for (int i = 0; i < LANES; ++i) done[i] = false, shuffles[i] = 0;
    lane = 0;
    if (!_setjmp(caller)) _longjmp(places[0], 1);
    for (int i = 1; i < LANES; ++i)
        if (shuffles[i] != shuffles[0]) return false;
    return true;
}

}  // namespace warp

static inline int thread_index() { return warp::lane; }

static inline u32 shuffle_xor(u32 x, int mask) {
    // the lanes behind may read these while those before fill the others
    const int turn = warp::shuffles[warp::lane]++ % 2;
    warp::slots[turn][warp::lane] = x;
    warp::wait();
    return warp::slots[turn][warp::lane ^ mask];
}

static inline int shuffle_xor(int x, int mask) { return (int)shuffle_xor((u32)x, mask); }

// ------ what a test calls, of spec N: `rows` by `columns` numbers each, which may be more than there are queries and keys

#define CONTEXT                                                                            \
    current = a;                                                                           \
    outside = 0;                                                                           \
    Problem problem;                                                                       \
    memcpy(problem.st, a->st, sizeof problem.st);                                          \
    memcpy(problem.n, a->n, sizeof problem.n);                                             \
    Context c{problem, {}, a->Qn, a->Kn};                                                  \
    memcpy(c.at, a->at, sizeof c.at);

#define DRIVER(N)                                                                          \
    struct Given {                                                                         \
        float* x;                                                                          \
        i64* places;                                                                       \
        int* counts;                                                                       \
        int columns, elements;                                                             \
        template <int I> static constexpr bool wants() { return true; }                    \
        template <int I> void give(int row, int col, int q, int k, float value) {          \
            put(I, row, col, q, k, value, -1, -1);                                         \
        }                                                                                  \
        template <int I> void scatter(i64 at_row, i64 at_col, int q, int k, float value) { \
            put(I, q + 1000, k + 2000, q, k, value, at_row, at_col);                       \
        }                                                                                  \
        void put(int i, int row, int col, int q, int k, float value, i64 r, i64 t) {       \
            const int e = q * columns + k, at = (i * 8 + counts[i * elements + e]++) * elements + e; \
            x[at] = row == q + 1000 && col == k + 2000 ? value : NAN;                      \
            places[2 * at] = r;                                                            \
            places[2 * at + 1] = t;                                                        \
        }                                                                                  \
    };                                                                                     \
    extern "C" int scores_##N(const Arguments* a, int full, int rows, int columns, const float* s, float* out, float* saved) { \
        CONTEXT                                                                            \
        for (int q = 0; q < rows; ++q)                                                     \
            for (int k = 0; k < columns; ++k) {                                            \
                const int e = q * columns + k;                                             \
                Saved kept{};                                                              \
                out[e] = full == 0   ? score<0>(s[e], q, k, c, kept)                       \
                         : full == 1 ? score<1>(s[e], q, k, c, kept)                       \
                                     : score<2>(s[e], q, k, c, kept);                      \
                memcpy(saved + e * (SAVED + 1), kept.x, SAVED * sizeof(float));            \
            }                                                                              \
        return outside;                                                                    \
    }                                                                                      \
    extern "C" int grads_##N(const Arguments* a, int full, int rows, int columns, const float* g, const float* saved, float* out, \
                             float* x, i64* places, int* counts) {                         \
        CONTEXT                                                                            \
        Given sums{x, places, counts, columns, rows * columns};                            \
        for (int q = 0; q < rows; ++q)                                                     \
            for (int k = 0; k < columns; ++k) {                                            \
                const int e = q * columns + k;                                             \
                Saved kept{};                                                              \
                memcpy(kept.x, saved + e * (SAVED + 1), SAVED * sizeof(float));            \
                out[e] = full == 0   ? score_grad<0>(g[e], kept, q, k, c, sums, q + 1000, k + 2000) \
                         : full == 1 ? score_grad<1>(g[e], kept, q, k, c, sums, q + 1000, k + 2000) \
                                     : score_grad<2>(g[e], kept, q, k, c, sums, q + 1000, k + 2000); \
            }                                                                              \
        return outside;                                                                    \
    }                                                                                      \
    extern "C" int weights_##N(const Arguments* a, int rows, int columns, const float* p, float* out, int* stays, float* of_row) { \
        CONTEXT                                                                            \
        for (int q = 0; q < rows; ++q) {                                                   \
            of_row[q] = sink(q, c);                                                        \
            for (int k = 0; k < columns; ++k) {                                            \
                const int e = q * columns + k;                                             \
                out[e] = weigh(p[e], q, k, c);                                             \
                stays[e] = left(q, k, c);                                                  \
            }                                                                              \
        }                                                                                  \
        return outside;                                                                    \
    }                                                                                      \
    extern "C" int weight_grads_##N(const Arguments* a, int rows, int columns, const float* g, const float* p, float* out, \
                                    float* x, i64* places, int* counts) {                  \
        CONTEXT                                                                            \
        Given sums{x, places, counts, columns, rows * columns};                            \
        for (int q = 0; q < rows; ++q)                                                     \
            for (int k = 0; k < columns; ++k) {                                            \
                const int e = q * columns + k;                                             \
                out[e] = weigh_grad(g[e], p[e], q, k, c, sums, q + 1000, k + 2000);        \
            }                                                                              \
        return outside;                                                                    \
    }                                                                                      \
    static const Context* shared;                                                          \
    static int ends[4];                                                                    \
    static Seen found[32];                                                                 \
    static void look(int lane) { found[lane] = seen(ends[0], ends[1], ends[2], ends[3], *shared); } \
    extern "C" int tiles_##N(const Arguments* a, int count, const int* tiles, int* out) {  \
        CONTEXT                                                                            \
        shared = &c;                                                                       \
        for (int i = 0; i < count; ++i) {                                                  \
            memcpy(ends, tiles + 4 * i, sizeof ends);                                      \
            const bool together = warp::run(look);                                         \
            warp::lane = 0;                                                                \
            const Keys of_queries = keys(ends[0], ends[1], c), of_keys = queries(ends[2], ends[3], c); \
            bool same = true;                                                              \
            for (int j = 1; j < 32; ++j) same = same && found[j].some == found[0].some && found[j].sure == found[0].sure; \
            const int made[] = {found[0].some, found[0].sure, together, same, of_queries.lo, of_queries.hi, of_queries.first, \
                                of_queries.last, of_keys.lo, of_keys.hi, of_keys.first, of_keys.last}; \
            memcpy(out + 12 * i, made, sizeof made);                                       \
        }                                                                                  \
        return outside;                                                                    \
    }
