// What Python hands over (Plan, from the spec; the layout; the pointers) and what follows from it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <thread>
#include <vector>

#include "gemm.h"

// With AddressSanitizer, what lies behind each part of an allocation may not be touched.
#if defined(__SANITIZE_ADDRESS__)
#define GUARDED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define GUARDED 1
#endif
#endif
#if defined(GUARDED)
#include <sanitizer/asan_interface.h>
#endif

constexpr int MAX_OPERANDS = 16, MAX_STEPS = 32, MAX_INSTRS = 192, MAX_ORDERS = 16, BATCH = 6;
// A tile holds QT queries and KT keys; LD is the row pitch of a score tile, off any power of two.
constexpr i64 QT = 96, KT = ATTNFUSE_VL == 16 ? 288 : 240, LD = KT + 8;
static_assert(QT % MR == 0 && KT % MR == 0 && KT % NR == 0, "tiles are whole blocks");

enum Kind : i64 { SCALE, BIAS, SHIFT, SOFTCAP, TANH, CLAMP, REPLACE, ADD, HALF, BRAIN, SINGLE };
enum Hidden : i64 { HIDDEN_NAN, HIDDEN_ZERO, HIDDEN_NAN_TO_ZERO };

// One operation of a mask's program. a, b and c name earlier ones (-1: none, or the tile's own query or key for a load).
enum Op : i64 {
  X_NUMBER, X_QUERY, X_KEY, X_LOAD, X_ADD, X_TIMES, X_MIN, X_MAX, X_ABS, X_FLOORDIV, X_MOD, X_WHERE, X_LE, X_EQ, X_NE,
  X_AND, X_OR, X_NOT
};

// All fields are 8 bytes wide: Python packs them with struct.
struct Instr {
  i64 op, a, b, c, value, operand;
};

// The instructions of one program, whose last one is the result; empty for none.
struct Span {
  i64 begin, end;
  bool empty() const { return begin == end; }
  bool operator==(const Span& o) const { return begin == o.begin && end == o.end; }
};

// How the number of a key must compare with that of a query.
enum Compared : i64 { SAME, AT_MOST, BELOW, AT_LEAST, ABOVE };

// A comparison of a number of the key with one of the query, by programs that depend on no other index.
struct Order {
  i64 how;
  Span key, query;
};

struct Step {
  // operand -1: a number. Of HALF, BRAIN and SINGLE (casts to float16, bfloat16 and what does not round): how many steps before it
  // are summed on their own
  i64 kind, operand;
  // fills, and added operands with a mask: the keys kept are k < q + below_q, k >= q + from_q, k < below, k >= from, and `keep` on top of these
  // orders: parts of `keep` that a bisection may decide (ranges.h), a span of those of the plan, SAME first; other: the other parts
  Span keep, orders, other, below_q, from_q, below, from;
  // an added table's own indices; slides: its column is k + something that does not depend on k
  Span row, col;
  i64 slides;
  // it hides keys for good, so that these may be skipped (kernels/fills.py)
  i64 hides;
  double value, high;

  bool has_mask() const {
    return kind == REPLACE || kind == ADD ||
           !(keep.empty() && below_q.empty() && from_q.empty() && below.empty() && from.empty());
  }
  bool same_mask(const Step& o) const {
    return keep == o.keep && below_q == o.below_q && from_q == o.from_q && below == o.below && from == o.from;
  }
};

struct Plan {
  i64 qk_dtype, v_dtype, out_dtype, unshifted, hidden, eager_nan, sink_operand;  // -1: the number `sink`, -INF for none
  // a row whose maximum is not above `doubt` may see skipped keys after all; -INF where fills are -inf
  // what an added operand with at most `hidden_below` hides
  double sink, keep_scale, doubt, hidden_below;
  i64 dropout, threshold, n_operands, n_steps, n_weights, n_instrs;
  i64 operand_dtype[MAX_OPERANDS];
  Step steps[MAX_STEPS], weights[MAX_STEPS];
  Instr instrs[MAX_INSTRS];
  Order orders[MAX_ORDERS];
};

// Why no load or store leaves its memory.
// Tensors: plan.py checks shapes, dtypes and devices before anything here runs. q, k, v, out and dout are read at [0, Q),
// [0, K), [0, D) and [0, E); operands at the query's own row and the key's own column only where their shape has them, or
// has 1, which is stride 0. Batch indices stay below the batch's sizes, which every tensor has or has 1 of.
// Indices that are data (those of tables, loads in masks, bounds of packed layouts): clamped into [0, size) where they are
// used, by Masks::clamped, Place::inside, and Bounds.clipped in inputs.py. No table is empty. Block tables: each number is held
// against the number of blocks before anything is read, and what is read is the copy that was looked at; K is at most what the
// table names (pages.py).
// Rows of a tile: [0, QT) queries of pitch LD, [lo, hi) within [0, keys) for every row (Limits, Masks::edges). Whole vectors
// and whole blocks of MR rows reach up to round_up(keys, NR) <= KT <= LD and round_up(n, MR) <= QT.
// Panels: [ceil(cols / NR)][rows][NR] with rows up to a multiple of MR, as carve lays them out.
struct Ref {
  char* data = nullptr;
  const i64* stride = nullptr;  // [BATCH + 2] in elements, 0 where broadcast
  i64 dtype = F32;
  i64 offset(const i64* index) const {
    i64 o = 0;
    for (int d = 0; d < BATCH; ++d) o += index[d] * stride[d];
    return o;
  }
  char* at(const i64* index) const { return data + offset(index) * size_of(dtype); }
  i64 row() const { return stride[BATCH]; }
  i64 col() const { return stride[BATCH + 1]; }
};

// k or v. Paged: a row of `stride` lies in a block, and the table says which block comes where.
struct Keys : Ref {
  const i64* table = nullptr;  // numbers of blocks, all of them there; null where rows lie one after the other
  const i64* hop = nullptr;    // [BATCH + 1], between elements of the table: batch dims, and blocks of a sequence
  i64 block = 1, step = 0;     // rows of a block; elements between blocks
  // Whether all along this dim of the batch have the same rows.
  bool shared(int d) const { return stride[d] == 0 && (!table || hop[d] == 0); }
};

// The rows of one element of the batch.
struct Lines {
  const Keys& x;
  const char* base;
  const i64* blocks;
  Lines(const Keys& keys, const i64* index) : x(keys), base(keys.at(index)), blocks(keys.table) {
    if (blocks)
      for (int d = 0; d < BATCH; ++d) blocks += index[d] * x.hop[d];
  }
  // Where row k is. n: how many rows are wanted; less where fewer than that lie row() apart from there on.
  INLINE const char* run(i64 k, i64& n) const {
    i64 at = k * x.row();
    if (blocks) {
      const i64 own = k % x.block;
      if (n > x.block - own) n = x.block - own;
      at = blocks[k / x.block * x.hop[BATCH]] * x.step + own * x.row();
    }
    return base + at * size_of(x.dtype);
  }
  // Fetches rows out of blocks, which no machine foresees: up to `count` from row k on, of `cols` elements.
  INLINE void prefetch(i64 k, i64 count, i64 cols) const {
    if (!blocks || count <= 0) return;
    for (i64 n; count > 0; k += n, count -= n) {
      n = count;
      const char* row = run(k, n);
      for (i64 r = 0; r < n; ++r, row += x.row() * size_of(x.dtype))
        for (i64 b = 0; b < cols * size_of(x.dtype); b += 64) __builtin_prefetch(row + b);
    }
  }
};

struct Operand : Ref {
  i64 rows = 1, cols = 1;
};

struct Grad : Ref {
  i64 mode = 0;  // 0 not needed, 1 store, 2 add in float32
  i64 chunk = 0;  // elements between the partial sums of two chunks of keys
};

// What dropout takes the queries, or the keys, of a call for (Inputs.numbers): any words, of which sums wrap.
struct Numbers {
  uint64_t base, stride;
  i64 half;
  uint64_t jump, total;
  uint64_t of(i64 i) const { return base + stride * static_cast<uint64_t>(i) + (i >= half ? jump : 0); }
};

// What bisection has found of a step's mask: the keys that each query sees are within [first, last).
struct Ranges {
  enum Left : uint8_t { ALL, SOME, NONE };
  int32_t *first = nullptr, *last = nullptr;  // [elements][Q]; null for no ranges
  uint8_t* left = nullptr;                    // [elements]: which of the step's orders the ranges do not say
  i64 elements = 0, stride[BATCH];            // of batch dims; 0 where the masks are the same
};

struct Problem {
  const Plan* plan;
  i64 threads, Q, K, D, E, Dp, Ep, elements;
  // the rows of all elements are counted as they lie in stats: `lines` of them, those of element e from line(e, 0) on
  i64 lines, first_line, line_step;
  const i64* batch;
  bool dropout;
  uint64_t seed;
  bool numbered;  // else dropout counts from 0 on
  Numbers query_numbers, key_numbers;
  float* stats;
  const float* dlse = nullptr;  // [lines] or null
  Ref q, out, dout;
  Keys k, v;
  Operand operand[MAX_OPERANDS];
  Grad dq, dk, dv, doperand[MAX_OPERANDS];
  // the scale folded into q, and the first step left to do
  float fold;
  int first;
  // where terms begin that are summed before they are added to the scores: the cast that they end in, else 0
  int joined[MAX_STEPS];
  // whether a cast to float16 or bfloat16 comes next
  bool held[MAX_STEPS];
  // some score step hides keys for good
  bool skips;
  float doubt;
  bool fills_weights, nonlinear_weights;
  // the only fill, where a row that it hides whole weighs all keys alike; -1 for none
  int uniform;
  // of each instruction, what its value depends on, and for those of ON_KEY the place of its vector
  uint8_t depends[MAX_INSTRS], slot[MAX_INSTRS];
  i64 n_vectors, n_kept;
  const Ranges* ranges = nullptr;  // [n_steps], or null

  i64 line(i64 element, i64 query) const { return first_line + element * line_step + query; }
  void index_of(i64 element, i64* index) const {
    for (int d = BATCH - 1; d >= 0; --d) {
      index[d] = element % batch[d];
      element /= batch[d];
    }
  }
};

// The sums over no key: m and l of a row, which its sink begins.
inline void begin_row(const Problem& p, const i64* index, i64 query, float& m, float& l) {
  float x = static_cast<float>(p.plan->sink);
  if (p.plan->sink_operand >= 0) {
    const Operand& o = p.operand[p.plan->sink_operand];
    convert(o.dtype, o.at(index) + query * o.row() * size_of(o.dtype), 1, &x, 1);
  }
  m = x;
  // infinity and NaN make the row NaN
  l = x == -INF ? 0.0f : x - x + 1.0f;
}

enum Depends : uint8_t { ON_QUERY = 1, ON_KEY = 2 };

// A fill that is the last step turns a row without keys into one of equal scores: surely if it replaces them, and if it
// adds what no score of bearable size changes.
inline void find_uniform(Problem& p) {
  const Plan& plan = *p.plan;
  p.uniform = -1;
  if (!p.skips || plan.n_weights || p.dropout || plan.unshifted || plan.n_steps == 0) return;
  if (plan.sink_operand >= 0 || plan.sink > -INF) return;
  const int last = static_cast<int>(plan.n_steps) - 1;
  const Step& step = plan.steps[last];
  if (!step.hides || !(step.value > -INF)) return;
  for (int i = 0; i < last; ++i)
    if (plan.steps[i].hides) return;
  if (step.kind == REPLACE || (step.kind == ADD && step.value <= -1e37 && p.first == last)) p.uniform = last;
}

// What each instruction depends on, and where the vectors of those that depend on the key are kept.
inline void find_dependencies(Problem& p) {
  const Plan& plan = *p.plan;
  p.n_vectors = p.n_kept = 0;
  for (i64 i = 0; i < plan.n_instrs; ++i) {
    const Instr& x = plan.instrs[i];
    uint8_t on = x.op == X_QUERY ? ON_QUERY : (x.op == X_KEY ? ON_KEY : 0);
    for (const i64 a : {x.a, x.b, x.c})
      if (a >= 0) on |= p.depends[a];
    if (x.op == X_LOAD) {
      if (x.a < 0 && p.operand[x.operand].row()) on |= ON_QUERY;
      if (x.b < 0 && p.operand[x.operand].col()) on |= ON_KEY;
    }
    p.depends[i] = on;
    p.slot[i] = static_cast<uint8_t>(p.n_vectors);
    if (on & ON_KEY) ++p.n_vectors;
  }
  for (int i = 0; i < plan.n_steps; ++i) p.n_kept += !plan.steps[i].keep.empty();
  for (int i = 0; i < plan.n_weights; ++i) p.n_kept += !plan.weights[i].keep.empty();
}

inline void finish(Problem& p) {
  const Plan& plan = *p.plan;
  p.Dp = round_up(p.D, NR);
  p.Ep = round_up(p.E, NR);
  p.elements = 1;
  for (int d = 0; d < BATCH; ++d) p.elements *= p.batch[d];
  p.first_line = 0;
  p.line_step = p.Q;
  p.lines = p.elements * p.Q;
  p.fold = 1.0f;
  p.first = 0;
  // a scaled query may overflow where scaled scores do not, and the other way round
  while (!plan.eager_nan && p.first < plan.n_steps && plan.steps[p.first].kind == SCALE && plan.steps[p.first].operand < 0)
    p.fold *= static_cast<float>(plan.steps[p.first++].value);
  for (int i = 0; i < MAX_STEPS; ++i) p.joined[i] = 0, p.held[i] = false;
  for (int i = 0; i < plan.n_steps; ++i) {
    const Step& step = plan.steps[i];
    if (step.kind != HALF && step.kind != BRAIN && step.kind != SINGLE) continue;
    if (step.operand > 0) p.joined[i - step.operand] = i;
    if (i > 0) p.held[i - 1] = step.kind != SINGLE;
  }
  p.fills_weights = p.nonlinear_weights = false;
  for (int i = 0; i < plan.n_weights; ++i) {
    p.fills_weights |= plan.weights[i].kind == REPLACE;
    p.nonlinear_weights |= plan.weights[i].kind == REPLACE && plan.weights[i].value != 0;
  }
  p.dropout = plan.dropout != 0;
  p.doubt = static_cast<float>(plan.doubt);
  p.skips = false;
  for (int i = 0; i < plan.n_steps; ++i) p.skips |= plan.steps[i].hides != 0;
  find_uniform(p);
  find_dependencies(p);
}

// Memory a thread keeps between calls, up to a limit.
class Arena {
 public:
  ~Arena() { release(); }
  // At least n bytes, aligned to a cache line; null when there are none. What it held is lost.
  void* take(i64 n) {
    if (n > size_) {
      release();
      n = round_up(n, 4096);
      if (posix_memalign(&data_, 64, n) != 0) data_ = nullptr;
      size_ = data_ ? n : 0;
    }
    return data_;
  }
  void trim(i64 limit) {
    if (size_ > limit) release();
  }

 private:
  void release() {
#if defined(GUARDED)
    if (data_) ASAN_UNPOISON_MEMORY_REGION(data_, size_);
#endif
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }
  void* data_ = nullptr;
  i64 size_ = 0;
};

constexpr i64 KEPT_BYTES = i64(48) << 20;

// What each thread works in, and what all threads of a call read.
inline thread_local Arena tile_arena, shared_arena;

// Adds up the parts of one allocation, then hands them out.
struct Carver {
  char* base = nullptr;
  i64 used = 0;
  float* floats(i64 n) { return reinterpret_cast<float*>(bytes(n * 4)); }
  char* bytes(i64 n) {
    char* p = base ? base + used : nullptr;
#if defined(GUARDED)
    const i64 whole = round_up(n, 64) + 64;
    if (base) {
      ASAN_UNPOISON_MEMORY_REGION(p, n);
      ASAN_POISON_MEMORY_REGION(p + n, whole - n);
    }
#else
    const i64 whole = round_up(n, 64);
#endif
    used += whole;
    return p;
  }
};

// GOMP_parallel of the OpenMP runtime that torch uses, so that both share one pool of threads; null for none.
typedef void (*Launch)(void (*)(void*), void*, unsigned, unsigned);
inline std::atomic<Launch> launch{nullptr};

// body(i) for i in [0, n), each by whichever thread comes first.
template <class F>
void parallel_for(i64 threads, i64 n, const F& body) {
  if (threads > n) threads = n;
  if (threads <= 1) {
    for (i64 i = 0; i < n; ++i) body(i);
    return;
  }
  struct Job {
    const F* body;
    i64 n;
    std::atomic<i64> next;
  } job{&body, n, {0}};
  const auto work = [](void* p) {
    Job* j = static_cast<Job*>(p);
    for (i64 i; (i = j->next.fetch_add(1, std::memory_order_relaxed)) < j->n;) (*j->body)(i);
  };
  if (Launch start = launch.load(std::memory_order_relaxed)) {
    start(work, &job, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> others;
  for (i64 t = 1; t < threads; ++t) others.emplace_back(work, &job);
  work(&job);
  for (auto& t : others) t.join();
}
