// What Python hands over (Plan, from the spec; the layout; the pointers) and what follows from it.
#pragma once

#include <atomic>
#include <cstdlib>
#include <thread>
#include <vector>

#include "gemm.h"

constexpr int MAX_OPERANDS = 16, MAX_STEPS = 32, BATCH = 6;
// A tile holds QT queries and KT keys; LD is the row pitch of a score tile, off any power of two.
constexpr i64 QT = 96, KT = ATTNFUSE_VL == 16 ? 288 : 240, LD = KT + 8;
static_assert(QT % MR == 0 && KT % MR == 0 && KT % NR == 0, "tiles are whole blocks");

enum Kind : i64 { SCALE, BIAS, SHIFT, SOFTCAP, TANH, CLAMP, REPLACE, ADD, HALF };
enum Hidden : i64 { HIDDEN_NAN, HIDDEN_ZERO, HIDDEN_NAN_TO_ZERO };

// All fields are 8 bytes wide: Python packs them with struct.
struct Step {
  i64 kind, operand, inverted, offset;  // operand -1: a number, or a causal mask
  double value, high;
};

struct Plan {
  i64 qk_dtype, v_dtype, out_dtype, unshifted, hidden, eager_nan;
  double keep_scale;
  i64 dropout, threshold, n_operands, n_steps, n_weights;
  i64 operand_dtype[MAX_OPERANDS];
  Step steps[MAX_STEPS], weights[MAX_STEPS];
};

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

struct Grad : Ref {
  i64 mode = 0;  // 0 not needed, 1 store, 2 add in float32
  i64 chunk = 0;  // elements between the partial sums of two chunks of keys
};

struct Problem {
  const Plan* plan;
  i64 threads, Q, K, D, E, Dp, Ep, elements;
  const i64* batch;
  bool dropout;
  uint64_t seed;
  float* stats;
  Ref q, k, v, out, dout, operand[MAX_OPERANDS];
  Grad dq, dk, dv, doperand[MAX_OPERANDS];
  // the scale folded into q, and the first step left to do
  float fold;
  int first;
  // keys a query may see: k < q + high, k >= q + low; hides says that anything at all is skipped
  bool skips;
  i64 high, low;
  // a row whose maximum is not above this may see skipped keys after all; -INF where fills are -inf
  float doubt;
  bool fills_weights, nonlinear_weights;

  void index_of(i64 element, i64* index) const {
    for (int d = BATCH - 1; d >= 0; --d) {
      index[d] = element % batch[d];
      element /= batch[d];
    }
  }
  i64 first_key(i64 query) const {
    const i64 k = query + low;
    return !skips || k < 0 ? 0 : (k > K ? K : k);
  }
  i64 last_key(i64 query) const {
    const i64 k = query + high;
    return !skips || k > K ? K : (k < 0 ? 0 : k);
  }
};

constexpr i64 FAR = i64(1) << 60;

// Which keys no query of a row needs to see: those a causal fill hides, unless a later step could lift them again.
inline void find_skips(Problem& p) {
  const Plan& plan = *p.plan;
  p.high = FAR;
  p.low = -FAR;
  p.doubt = -INF;
  if (plan.eager_nan || p.nonlinear_weights) return;
  for (int i = 0; i < plan.n_steps; ++i) {
    const Step& step = plan.steps[i];
    if ((step.kind != REPLACE && step.kind != ADD) || step.operand >= 0 || step.value > -1e30) continue;
    double value = step.value;
    bool stays = true;
    for (int j = i + 1; j < plan.n_steps && stays; ++j) {
      const Step& later = plan.steps[j];
      if (later.kind == SCALE && later.operand < 0 && later.value > 0) value *= later.value;
      else if (later.kind == REPLACE) stays = later.value <= -1e30;
      else if (later.kind == ADD) stays = later.value <= 0;
      else stays = later.kind == BIAS || later.kind == SHIFT || later.kind == HALF;
      stays = stays && value <= -1e30;
    }
    if (!stays) continue;
    p.skips = true;
    if (step.inverted) {
      if (step.offset + 1 > p.low) p.low = step.offset + 1;
    } else if (step.offset + 1 < p.high) {
      p.high = step.offset + 1;
    }
    // every finite fill counts, the one nearest to zero most
    if (value > -INF && 0.5 * value > p.doubt) p.doubt = static_cast<float>(0.5 * value);
  }
}

inline void finish(Problem& p) {
  const Plan& plan = *p.plan;
  p.Dp = round_up(p.D, NR);
  p.Ep = round_up(p.E, NR);
  p.elements = 1;
  for (int d = 0; d < BATCH; ++d) p.elements *= p.batch[d];
  p.fold = 1.0f;
  p.first = 0;
  while (p.first < plan.n_steps && plan.steps[p.first].kind == SCALE && plan.steps[p.first].operand < 0)
    p.fold *= static_cast<float>(plan.steps[p.first++].value);
  p.fills_weights = p.nonlinear_weights = p.skips = false;
  for (int i = 0; i < plan.n_weights; ++i) {
    p.fills_weights |= plan.weights[i].kind == REPLACE;
    p.nonlinear_weights |= plan.weights[i].kind == REPLACE && plan.weights[i].value != 0;
  }
  p.dropout = plan.dropout != 0;
  find_skips(p);
}

// Memory a thread keeps between calls, up to a limit.
class Arena {
 public:
  ~Arena() { std::free(data_); }
  // At least n bytes, aligned to a cache line; null when there are none. What it held is lost.
  void* take(i64 n) {
    if (n > size_) {
      std::free(data_);
      n = round_up(n, 4096);
      data_ = nullptr;
      if (posix_memalign(&data_, 64, n) != 0) data_ = nullptr;
      size_ = data_ ? n : 0;
    }
    return data_;
  }
  void trim(i64 limit) {
    if (size_ <= limit) return;
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }

 private:
  void* data_ = nullptr;
  i64 size_ = 0;
};

constexpr i64 KEPT_BYTES = i64(48) << 20;

// Adds up the parts of one allocation, then hands them out.
struct Carver {
  char* base = nullptr;
  i64 used = 0;
  float* floats(i64 n) { return reinterpret_cast<float*>(bytes(n * 4)); }
  char* bytes(i64 n) {
    char* p = base + used;
    used += round_up(n, 64);
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
