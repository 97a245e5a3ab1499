// The score program on one row of a score tile: forwards, and backwards for gradients.
#pragma once

#include "masks.h"

INLINE void fill(float* s, i64 from, i64 to, float x) {
  for (i64 j = from; j < to; ++j) s[j] = x;
}

// Where a batch element's operands begin, and one row of each as the steps want it.
struct Rows {
  const Problem& p;
  Masks masks;
  i64 element = 0, k0 = 0, n = 0;
  float* number[MAX_OPERANDS];    // [LD] each, converted
  i64 number_of[MAX_OPERANDS];    // the row each holds, -1 for none
  float* saved = nullptr;         // [n_steps + n_weights][LD], for gradients
  float* kept = nullptr;          // [LD] dropout factors
  float* gated = nullptr;         // [LD] an added operand, 0 where its mask leaves it out
  float* summed = nullptr;        // [LD] terms that are summed before they are added
  // the bits of the largest magnitude on the row, where the step before a cast has measured it
  uint32_t most = 0;
  bool measured = false;

  explicit Rows(const Problem& problem) : p(problem), masks(problem) {}

  void carve(Carver& c, bool gradients) {
    const Plan& plan = *p.plan;
    for (int i = 0; i < plan.n_operands; ++i) number[i] = c.floats(LD);
    kept = c.floats(LD);
    gated = c.floats(LD);
    summed = c.floats(LD);
    if (gradients) saved = c.floats((plan.n_steps + plan.n_weights) * LD);
    masks.carve(c);
  }

  void enter_element(i64 e, const i64* index) {
    element = e;
    masks.enter_element(index);
    n = 0;
  }
  // Enters the tile of queries [q, q + count) and keys [key, key + keys), and finds out which of them matter.
  void enter_tile(i64 q, i64 count, i64 key, i64 keys, bool full, Limits& limits) {
    k0 = key;
    n = keys;
    for (int i = 0; i < p.plan->n_operands; ++i) number_of[i] = -1;
    masks.enter_tile(q, count, key, keys, full, limits);
    if (!limits.any) return;
    for (int i = 0; i < p.plan->n_steps; ++i) {
      const Step& step = p.plan->steps[i];
      if (step.col.begin < step.col.end && !step.slides) masks.key_vectors(step.col);
      if (step.row.begin < step.row.end) masks.key_vectors(step.row);
    }
  }

  const char* row_of(int i, i64 query) const {
    const Ref& r = p.operand[i];
    return masks.base[i] + (query * r.row() + k0 * r.col()) * size_of(r.dtype);
  }
  void prefetch(i64 query) const {
    for (int i = 0; i < p.plan->n_operands; ++i) {
      const Operand& r = p.operand[i];
      if (r.row() == 0 || r.col() != 1 || r.rows < p.Q || r.cols < p.K) continue;
      const char* at = row_of(i, query);
      for (i64 b = 0; b < n * size_of(r.dtype); b += 64) __builtin_prefetch(at + b);
    }
  }

  // Operand i on this row of the tile as float32.
  const float* numbers(int i, i64 query) {
    const Ref& r = p.operand[i];
    if (r.dtype == F32 && r.col() == 1) return reinterpret_cast<const float*>(row_of(i, query));
    const i64 row = r.row() ? query : 0;
    if (number_of[i] == row) return number[i];
    number_of[i] = row;
    if (r.col() == 0) {
      float x;
      convert(r.dtype, row_of(i, query), 1, &x, 1);
      for (i64 j = 0; j < n; ++j) number[i][j] = x;
    } else {
      convert(r.dtype, row_of(i, query), r.col(), number[i], n);
    }
    return number[i];
  }

  // Where an added table is read on a row of the tile: at rows and columns of their own for each key where these are not
  // null, else at `row`, and at columns from `first` on, or at the single one `only`. Indices that may lie outside of the
  // table are clamped key by key; `inside`: those from `first` on need not be.
  struct Place {
    i64 row, first, only;
    const i64 *rows, *cols;
    bool inside;
  };
  const i64* vector_of(const Span& s, i64& number) const {
    const i64 last = s.end - 1;
    if (p.depends[last] & ON_KEY) return masks.vectors + p.slot[last] * LD;
    number = masks.scalar[last];
    return nullptr;
  }
  Place place(const Step& step, i64 query) {
    const Operand& r = p.operand[step.operand];
    // the query's own row, and the tile's own keys, are inside by the shapes that plan.py checks
    Place x{query, k0, -1, nullptr, nullptr, true};
    if (step.row.begin < step.row.end) {
      masks.row_vectors(step.row, query);
      x.rows = vector_of(step.row, x.row);
      x.row = masks.clamped(x.row, r.rows);
    }
    if (step.col.begin == step.col.end) return x;
    if (step.slides) {
      x.first = masks.value_at(step.col, query, k0);
      x.inside = x.first >= 0 && x.first <= r.cols - n;
      // far outside, one place is as good as another, and adding to it cannot overflow
      x.first = x.first < -n ? -n : (x.first > r.cols ? r.cols : x.first);
      return x;
    }
    masks.row_vectors(step.col, query);
    x.cols = vector_of(step.col, x.only);
    x.only = masks.clamped(x.only, r.cols);
    return x;
  }
  // The element of the table for key j of the tile, as an offset in elements.
  INLINE i64 offset_of(const Place& x, const Operand& r, i64 j, i64 rs, i64 cs) const {
    const i64 row = x.rows ? masks.clamped(x.rows[j], r.rows) : x.row;
    if (x.cols) return row * rs + masks.clamped(x.cols[j], r.cols) * cs;
    const i64 col = x.only >= 0 ? x.only : (x.inside ? x.first + j : masks.clamped(x.first + j, r.cols));
    return row * rs + col * cs;
  }
  // What a step adds on this row of the tile.
  const float* added(const Step& step, i64 query) {
    const int i = static_cast<int>(step.operand);
    if (step.row.begin == step.row.end && step.col.begin == step.col.end) return numbers(i, query);
    const Operand& r = p.operand[i];
    const Place x = place(step, query);
    const i64 width = size_of(r.dtype);
    number_of[i] = -1;
    if (step.slides && x.inside) {
      const char* at = masks.element(i, x.row, x.first);
      if (r.dtype == F32 && r.col() == 1) return reinterpret_cast<const float*>(at);
      convert(r.dtype, at, r.col(), number[i], n);
      return number[i];
    }
    for (i64 j = 0; j < n; ++j)
      convert(r.dtype, masks.base[i] + offset_of(x, r, j, r.row(), r.col()) * width, 1, number[i] + j, 1);
    return number[i];
  }

  // f(kept, a, b) on the parts of [lo, hi) where the mask of the step hides keys: all of [a, b) if kept is null, else
  // those where it is 0.
  template <class F>
  INLINE void where_hidden(const Step& step, i64 query, i64 lo, i64 hi, F f) {
    const Fill& x = masks.fill[masks.index_of(step)];
    i64 a = lo, b = hi;
    if (x.band == KEEPS_NONE) return f(nullptr, lo, hi);
    if (x.band == MIXED) {
      masks.edges(x, query, a, b);
      a = a > hi ? hi : a;
      b = b < a ? a : b;
      if (lo < a) f(nullptr, lo, a);
      if (b < hi) f(nullptr, b, hi);
    }
    if (x.rest == KEEPS_NONE) f(nullptr, a, b);
    else if (x.rest == MIXED) f(x.kept + (query - masks.q0) * LD, a, b);
  }

  INLINE void replace(const Step& step, float* s, i64 query, i64 lo, i64 hi, float value) {
    where_hidden(step, query, lo, hi, [s, value](const uint8_t* t, i64 a, i64 b) {
      if (!t) for (i64 j = a; j < b; ++j) s[j] = value;
      else for (i64 j = a; j < b; ++j) s[j] = t[j] ? s[j] : value;
    });
  }
  INLINE void add(const Step& step, float* s, i64 query, i64 lo, i64 hi, float value) {
    where_hidden(step, query, lo, hi, [s, value](const uint8_t* t, i64 a, i64 b) {
      if (!t) for (i64 j = a; j < b; ++j) s[j] += value;
      else for (i64 j = a; j < b; ++j) s[j] += t[j] ? 0.0f : value;
    });
  }

  // One step on s[lo, hi), keeping in `save`, where given, what its gradient needs.
  void apply(const Step& step, float* __restrict s, i64 query, i64 lo, i64 hi, float* __restrict save) {
    const float value = static_cast<float>(step.value), high = static_cast<float>(step.high);
    switch (step.kind) {
      case SCALE:
        if (step.operand >= 0) {
          const float* x = numbers(static_cast<int>(step.operand), query);
          if (save) std::memcpy(save + lo, s + lo, (hi - lo) * sizeof(float));
          for (i64 j = lo; j < hi; ++j) s[j] *= x[j];
        } else {
          for (i64 j = lo; j < hi; ++j) s[j] *= value;
        }
        return;
      case BIAS: {
        const float* x = added(step, query);
        if (step.has_mask()) {
          std::memcpy(gated + lo, x + lo, (hi - lo) * sizeof(float));
          replace(step, gated, query, lo, hi, 0.0f);
          x = gated;
        }
        measured = p.held[masks.index_of(step)];
        if (measured) most = add_measured(s, x, value, lo, hi);
        else if (value == 1.0f) for (i64 j = lo; j < hi; ++j) s[j] += x[j];
        else for (i64 j = lo; j < hi; ++j) s[j] += value * x[j];
        return;
      }
      case SHIFT:
        for (i64 j = lo; j < hi; ++j) s[j] += value;
        return;
      case SOFTCAP: case TANH: {
        // whole vectors: the row's padding is overwritten later
        const bool capped = step.kind == SOFTCAP;
        const vf cap = splat(capped ? value : 1.0f);
        for (i64 j = lo / VL * VL; j < hi; j += VL) {
          const vf t = vtanh(capped ? loadf(s + j) / cap : loadf(s + j));
          if (save) store(save + j, t);
          store(s + j, capped ? t * cap : t);
        }
        return;
      }
      case CLAMP:
        if (save) std::memcpy(save + lo, s + lo, (hi - lo) * sizeof(float));
        for (i64 j = lo; j < hi; ++j) s[j] = s[j] < value ? value : (s[j] > high ? high : s[j]);
        return;
      case REPLACE: return replace(step, s, query, lo, hi, value);
      case ADD: return add(step, s, query, lo, hi, value);
      case HALF: return cast<F16>(s, lo, hi, value);
      case BRAIN: return cast<BF16>(s, lo, hi, value);
      case SINGLE: return;
    }
  }

  // s += factor * x; returns the bits of the largest magnitude, which those of NaN exceed.
  static INLINE uint32_t add_measured(float* __restrict s, const float* __restrict x, float factor, i64 lo, i64 hi) {
    uint32_t most = 0;
    for (i64 j = lo; j < hi; ++j) {
      s[j] += factor * x[j];
      const uint32_t size = bits<uint32_t>(s[j]) & 0x7FFFFFFFu;
      most = size > most ? size : most;
    }
    return most;
  }

  // Rounds scores from `coarse` on to float16 or bfloat16, and to infinity where that overflows: a sum there swallows the score
  // that is in it (attnfuse/rounding.py). Whole vectors: the row's padding is overwritten later.
  template <i64 DT>
  __attribute__((noinline)) static void hold(float* __restrict s, i64 lo, i64 hi, float coarse) {
    const vu magnitude = splatu(0x7FFFFFFFu);
    for (i64 j = lo / VL * VL; j < hi; j += VL) {
      const vf x = loadf(s + j), size = bits<vf>(bits<vu>(x) & magnitude);
      // NaN is left
      store(s + j, select(size >= splat(coarse), rounded<DT>(x), x));
    }
  }
  template <i64 DT>
  void cast(float* s, i64 lo, i64 hi, float coarse) {
    if (!measured) {
      const vu magnitude = splatu(0x7FFFFFFFu);
      vf top = splat(0.0f);
      for (i64 j = lo / VL * VL; j < hi; j += VL) {
        const vf size = bits<vf>(bits<vu>(loadf(s + j)) & magnitude);
        top = size > top ? size : top;
      }
      most = bits<uint32_t>(max_of(top));
    }
    measured = false;
    if (most >= bits<uint32_t>(coarse)) hold<DT>(s, lo, hi, coarse);
  }

  // g becomes the gradient of the step's input; that of an operand is added to its target, unless in a dry run.
  void reverse(const Step& step, float* __restrict g, i64 query, i64 lo, i64 hi, const float* __restrict save,
               float* __restrict spare, const i64* index, i64 chunk, bool dry) {
    const float value = static_cast<float>(step.value), high = static_cast<float>(step.high);
    switch (step.kind) {
      case SCALE:
        if (step.operand >= 0) {
          const float* x = numbers(static_cast<int>(step.operand), query);
          if (!dry && p.doperand[step.operand].mode) {
            for (i64 j = lo; j < hi; ++j) spare[j] = g[j] * save[j];
            give(static_cast<int>(step.operand), spare, 1.0f, query, lo, hi, index, chunk);
          }
          for (i64 j = lo; j < hi; ++j) g[j] *= x[j];
        } else {
          for (i64 j = lo; j < hi; ++j) g[j] *= value;
        }
        return;
      case BIAS:
        if (p.doperand[step.operand].mode) {
          const float* given = g;
          if (step.has_mask()) {
            std::memcpy(spare + lo, g + lo, (hi - lo) * sizeof(float));
            replace(step, spare, query, lo, hi, 0.0f);
            given = spare;
          }
          if (step.row.begin < step.row.end || step.col.begin < step.col.end)
            scatter(step, given, value, query, lo, hi, index, chunk);
          else
            give(static_cast<int>(step.operand), given, value, query, lo, hi, index, chunk);
        }
        return;
      case SOFTCAP: case TANH:
        for (i64 j = lo; j < hi; ++j) g[j] *= 1.0f - save[j] * save[j];
        return;
      case CLAMP:
        for (i64 j = lo; j < hi; ++j) g[j] = save[j] >= value && save[j] <= high ? g[j] : 0.0f;
        return;
      case REPLACE: return replace(step, g, query, lo, hi, 0.0f);
      default: return;
    }
  }

  // The gradient of a table, whose elements several keys may share.
  void scatter(const Step& step, const float* g, float alpha, i64 query, i64 lo, i64 hi, const i64* index, i64 chunk) {
    const Grad& t = p.doperand[step.operand];
    const Operand& r = p.operand[step.operand];
    const Place x = place(step, query);
    float* to = reinterpret_cast<float*>(t.at(index)) + chunk * t.chunk;
    for (i64 j = lo; j < hi; ++j) to[offset_of(x, r, j, t.row(), t.col())] += alpha * g[j];
  }

  void give(int i, const float* g, float alpha, i64 query, i64 lo, i64 hi, const i64* index, i64 chunk) const {
    const Grad& t = p.doperand[i];
    char* row = t.at(index) + (chunk * t.chunk + query * t.row() + (k0 + lo) * t.col()) * size_of(t.dtype);
    const i64 cs = t.col(), count = hi - lo;
    if (t.mode == 1) {
      with_float(t.dtype, [&](auto dt) {
        for (i64 j = 0; j < count; ++j) store1<dt>(row + j * cs * size_of(dt), alpha * g[lo + j]);
      });
      return;
    }
    float* d = reinterpret_cast<float*>(row);
    if (cs == 0) {
      vf sum = splat(0.0f);
      i64 j = lo;
      for (; j + VL <= hi; j += VL) sum += loadf(g + j);
      float total = sum_of(sum);
      for (; j < hi; ++j) total += g[j];
      *d += alpha * total;
    } else if (cs == 1) {
      for (i64 j = 0; j < count; ++j) d[j] += alpha * g[lo + j];
    } else {
      for (i64 j = 0; j < count; ++j) d[j * cs] += alpha * g[lo + j];
    }
  }

  void scores(float* s, i64 query, i64 lo, i64 hi, bool save) {
    const Plan& plan = *p.plan;
    float* to = s;
    int end = 0;
    for (int i = p.first; i < plan.n_steps;) {
      if (!end && p.joined[i]) {
        end = p.joined[i];
        to = summed;
        fill(to, lo, hi, 0.0f);
      }
      apply(plan.steps[i], to, query, lo, hi, save ? saved + i * LD : nullptr);
      if (end != i || !end) {
        ++i;
        continue;
      }
      // the cast holds the terms' sum, and then its sum with the scores
      most = add_measured(s, summed, 1.0f, lo, hi);
      measured = true;
      to = s;
      end = 0;
    }
  }
  void weights(float* w, i64 query, i64 lo, i64 hi, bool save) {
    const Plan& plan = *p.plan;
    for (int i = 0; i < plan.n_weights; ++i)
      apply(plan.weights[i], w, query, lo, hi, save ? saved + (plan.n_steps + i) * LD : nullptr);
  }

  static INLINE vu mix(vu x) {
    x ^= x >> 16;
    x *= splatu(0x7FEB352Du);
    x ^= x >> 15;
    x *= splatu(0x846CA68Bu);
    return x ^ (x >> 16);
  }
  static uint32_t mix1(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7FEB352Du;
    x ^= x >> 15;
    x *= 0x846CA68Bu;
    return x ^ (x >> 16);
  }

  // The low words of the numbers of the keys from k on.
  vu numbered(i64 k) const {
    const Numbers& x = p.key_numbers;
    const uint64_t first = x.base + x.stride * static_cast<uint64_t>(k);
    const vu all = splatu(static_cast<uint32_t>(first)) + splatu(static_cast<uint32_t>(x.stride)) * iota();
    // lanes before `half`
    const i64 left = x.half <= k ? 0 : x.half < k + VL ? x.half - k : VL;
    const vu beyond = bits<vu>(iota() >= splatu(static_cast<uint32_t>(left)));
    return all + (beyond & splatu(static_cast<uint32_t>(x.jump)));
  }

  // kept[lo, hi): 0 or 1 / (1 - p), by the hash of kernels/dropout.py; w is multiplied by it where given.
  void drop(float* w, i64 query, i64 lo, i64 hi) {
    const uint64_t row = p.numbered
                             ? static_cast<uint64_t>(element) * p.query_numbers.total + p.query_numbers.of(query)
                             : static_cast<uint64_t>(p.line(element, query));
    uint32_t a = mix1(static_cast<uint32_t>(row >> 32) ^ 0x9E3779B9u);
    a = mix1(static_cast<uint32_t>(row) + a);
    a = mix1(static_cast<uint32_t>(p.seed >> 32) + a);
    a = mix1(static_cast<uint32_t>(p.seed) + a);
    const vu va = splatu(a), vb = splatu(mix1(a ^ 0x85EBCA6Bu));
    const vu threshold = splatu(static_cast<uint32_t>(p.plan->threshold));
    const vf scale = splat(static_cast<float>(p.plan->keep_scale));
    for (i64 j = lo / VL * VL; j < hi; j += VL) {
      const vu key = p.numbered ? numbered(k0 + j) : splatu(static_cast<uint32_t>(k0 + j)) + iota();
      const vu u = mix(mix(key ^ va) + vb);
      const vf f = bits<vf>(bits<vu>(u >= threshold) & bits<vu>(scale));
      store(kept + j, f);
      store(w + j, loadf(w + j) * f);
    }
  }
};

// How a finished row is normalised, from its maximum m and the sum l of exp(s - m).
struct Finish {
  float divisor;  // NaN for a row that is NaN
  bool zero;      // the row's weights are 0 whatever the scores are
};

inline Finish finish_row(const Plan& plan, float m, float l) {
  const bool hidden = m == -INF;
  bool nan = hidden || l != l || m != m;
  if (!nan && plan.unshifted) {
    const float total = l * std::exp(m);
    nan = !(total > 0.0f && total < INF);
  }
  if (hidden && plan.hidden == HIDDEN_ZERO) return {1.0f, true};
  if (nan && plan.hidden == HIDDEN_NAN_TO_ZERO) return {1.0f, true};
  return {nan ? QNAN : l, false};
}
