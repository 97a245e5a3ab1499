// Masks: the programs that decide which keys a query keeps, evaluated for whole tiles by bounds and for single rows exactly.
#pragma once

#include "problem.h"

// Tiles that forward and backward have looked at in this process.
inline std::atomic<i64> tiles_looked_at{0};

// What is known of a fill on the current tile.
enum State : int { KEEPS_ALL, KEEPS_NONE, MIXED };

struct Fill {
  // keys kept by the comparisons with q: k < q + below_q, k >= q + from_q, k < below, k >= from
  i64 below_q, from_q, below, from;
  State band, rest;  // of those comparisons; of what is left of the mask
  Span program;      // of that rest
  uint8_t* kept;     // [QT][LD], where rest is MIXED
};

struct Interval {
  i64 lo, hi;
};

constexpr i64 LEAST = std::numeric_limits<i64>::min(), GREATEST = std::numeric_limits<i64>::max();

constexpr Interval ANYTHING{LEAST, GREATEST};

// Bounds of sums and products, which wrap: where one of their ends does, nothing is known.
INLINE Interval sum_of(Interval a, Interval b) {
  Interval c;
  const bool wraps = __builtin_add_overflow(a.lo, b.lo, &c.lo) | __builtin_add_overflow(a.hi, b.hi, &c.hi);
  return wraps ? ANYTHING : c;
}
INLINE Interval product_of(Interval a, i64 b) {
  Interval c;
  const bool wraps = __builtin_mul_overflow(a.lo, b, &c.lo) | __builtin_mul_overflow(a.hi, b, &c.hi);
  if (wraps) return ANYTHING;
  return c.lo <= c.hi ? c : Interval{c.hi, c.lo};
}

// A sum that stays at the ends where these stand for "no bound".
INLINE i64 plus(i64 a, i64 b) {
  i64 c;
  if (a == LEAST || b == LEAST) return LEAST;
  if (a == GREATEST || b == GREATEST) return GREATEST;
  return __builtin_add_overflow(a, b, &c) ? (a < 0 ? LEAST : GREATEST) : c;
}
INLINE i64 floor_div(i64 a, i64 b) {
  const i64 d = a / b;
  return a % b < 0 ? d - 1 : d;
}
INLINE i64 floor_mod(i64 a, i64 b) {
  const i64 m = a % b;
  return m < 0 ? m + b : m;
}
// (a + b * s) as torch's int64 has it, wrapping.
INLINE i64 wrap_add(i64 a, i64 b) { return static_cast<i64>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b)); }
INLINE i64 wrap_mul(i64 a, i64 b) { return static_cast<i64>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b)); }

template <class T>
INLINE void widen_loop(const char* p, i64 stride, i64* dst, i64 n) {
  if (stride == 1)
    for (i64 j = 0; j < n; ++j) dst[j] = static_cast<i64>(load<T>(p + j * static_cast<i64>(sizeof(T))));
  else
    for (i64 j = 0; j < n; ++j) dst[j] = static_cast<i64>(load<T>(p + j * stride * static_cast<i64>(sizeof(T))));
}

// n integers or bools, `stride` elements apart.
inline void widen(i64 dtype, const char* p, i64 stride, i64* dst, i64 n) {
  switch (dtype) {
    case U8: return widen_loop<uint8_t>(p, stride, dst, n);
    case I8: return widen_loop<int8_t>(p, stride, dst, n);
    case I16: return widen_loop<int16_t>(p, stride, dst, n);
    case I32: return widen_loop<int32_t>(p, stride, dst, n);
    default: return widen_loop<int64_t>(p, stride, dst, n);
  }
}
inline i64 integer(i64 dtype, const char* p) {
  i64 x;
  widen(dtype, p, 1, &x, 1);
  return x;
}

template <class T>
INLINE Interval bounds_loop(const char* p, i64 rs, i64 cs, i64 rows, i64 cols, bool truths) {
  T lo = std::numeric_limits<T>::max(), hi = std::numeric_limits<T>::lowest();
  for (i64 r = 0; r < rows; ++r) {
    const char* row = p + r * rs * static_cast<i64>(sizeof(T));
    if (cs == 1) {
      for (i64 c = 0; c < cols; ++c) {
        const T x = load<T>(row + c * static_cast<i64>(sizeof(T)));
        lo = x < lo ? x : lo;
        hi = x > hi ? x : hi;
      }
    } else {
      for (i64 c = 0; c < cols; ++c) {
        const T x = load<T>(row + c * cs * static_cast<i64>(sizeof(T)));
        lo = x < lo ? x : lo;
        hi = x > hi ? x : hi;
      }
    }
    // a bool that was seen both ways needs no further look
    if (truths && lo == 0 && hi == 1) break;
  }
  return {static_cast<i64>(lo), static_cast<i64>(hi)};
}

inline Interval bounds_of(i64 dtype, const char* p, i64 rs, i64 cs, i64 rows, i64 cols) {
  switch (dtype) {
    case U8: return bounds_loop<uint8_t>(p, rs, cs, rows, cols, true);
    case I8: return bounds_loop<int8_t>(p, rs, cs, rows, cols, false);
    case I16: return bounds_loop<int16_t>(p, rs, cs, rows, cols, false);
    case I32: return bounds_loop<int32_t>(p, rs, cs, rows, cols, false);
    default: return bounds_loop<int64_t>(p, rs, cs, rows, cols, false);
  }
}

// The keys each row of a query tile sees of a key tile, and the same for blocks of MR rows.
struct Limits {
  i64 lo[QT], hi[QT], block_lo[QT / MR], block_hi[QT / MR];
  // for blocks of MR keys, the first row that sees one of them and the one after the last
  i64 first[KT / MR + 1], last[KT / MR + 1];
  bool any, whole;

  void all(i64 rows, i64 keys) {
    for (i64 r = 0; r < rows; ++r) lo[r] = 0, hi[r] = keys;
  }
  void settle(i64 rows, i64 keys) {
    any = false;
    whole = true;
    for (i64 b = 0; b * MR < rows; ++b) {
      const i64 first = b * MR, last = first + MR < rows ? first + MR : rows;
      i64 from = keys, to = 0;
      for (i64 r = first; r < last; ++r) {
        whole &= lo[r] == 0 && hi[r] == keys;
        if (lo[r] >= hi[r]) continue;
        from = lo[r] < from ? lo[r] : from;
        to = hi[r] > to ? hi[r] : to;
      }
      if (from >= to) from = to = 0;
      for (i64 r = first; r < last; ++r)
        if (lo[r] >= hi[r]) lo[r] = hi[r] = from;
      block_lo[b] = from;
      block_hi[b] = to;
      any |= from < to;
    }
  }
  void find_columns(i64 rows, i64 keys) {
    for (i64 b = 0; b * MR < keys; ++b) {
      first[b] = whole ? 0 : rows;
      last[b] = whole ? rows : 0;
    }
    if (whole) return;
    for (i64 r = 0; r < rows; ++r) {
      if (lo[r] >= hi[r]) continue;
      for (i64 b = lo[r] / MR; b * MR < hi[r]; ++b) {
        first[b] = r < first[b] ? r : first[b];
        last[b] = r + 1;
      }
    }
  }
};

struct Masks {
  const Problem& p;
  const char* base[MAX_OPERANDS];
  Fill fill[2 * MAX_STEPS];
  uint8_t* kept = nullptr;
  i64* vectors = nullptr;
  i64 q0 = 0, k0 = 0, keys = 0;
  // the keys of the tile that vectors are made for
  i64 from = 0, to = 0;
  i64 scalar[MAX_INSTRS];
  Interval range[MAX_INSTRS];
  // of each score step, the keys that its ranges leave each query, or null; whether they say all that its orders do
  const int32_t *first[MAX_STEPS], *last[MAX_STEPS];
  bool decided[MAX_STEPS];

  explicit Masks(const Problem& problem) : p(problem) {}

  void carve(Carver& c) {
    vectors = reinterpret_cast<i64*>(c.bytes(p.n_vectors * LD * 8));
    kept = reinterpret_cast<uint8_t*>(c.bytes(p.n_kept * QT * LD));
  }
  const Step& step(int i) const { return i < p.plan->n_steps ? p.plan->steps[i] : p.plan->weights[i - p.plan->n_steps]; }
  int steps() const { return static_cast<int>(p.plan->n_steps + p.plan->n_weights); }
  int index_of(const Step& s) const {
    const Plan& plan = *p.plan;
    return static_cast<int>(&s >= plan.steps && &s < plan.steps + MAX_STEPS ? &s - plan.steps
                                                                          : plan.n_steps + (&s - plan.weights));
  }
  // Whether the keys that the mask of score step i leaves out are hidden for good.
  bool cuts(int i) const { return i < p.plan->n_steps && p.plan->steps[i].hides && p.plan->steps[i].kind != BIAS; }

  void enter_element(const i64* index) {
    const Plan& plan = *p.plan;
    for (int i = 0; i < plan.n_operands; ++i) base[i] = p.operand[i].at(index);
    uint8_t* at = kept;
    for (int i = 0; i < steps(); ++i) {
      const Step& s = step(i);
      if (!s.has_mask()) continue;
      Fill& f = fill[i];
      f.below_q = number(s.below_q, GREATEST);
      f.from_q = number(s.from_q, LEAST);
      f.below = number(s.below, GREATEST);
      f.from = number(s.from, LEAST);
      f.kept = nullptr;
      if (s.keep.begin < s.keep.end) {
        f.kept = at;
        at += QT * LD;
      }
    }
    for (int i = 0; i < plan.n_steps; ++i) {
      first[i] = last[i] = nullptr;
      const Ranges* r = p.ranges ? &p.ranges[i] : nullptr;
      if (!r || !r->first) continue;
      i64 e = 0;
      for (int d = 0; d < BATCH; ++d) e += index[d] * r->stride[d];
      if (r->left[e] == Ranges::ALL) continue;
      first[i] = r->first + e * p.Q;
      last[i] = r->last + e * p.Q;
      decided[i] = r->left[e] == Ranges::NONE;
    }
  }
  i64 number(const Span& s, i64 otherwise) { return s.begin < s.end ? value_at(s, 0, 0) : otherwise; }

  // The keys [begin, end) that hiding comparisons and ranges let queries [q, q + n) see.
  void keys_of(i64 q, i64 n, i64& begin, i64& end) const {
    begin = 0;
    end = p.K;
    for (int i = 0; i < p.plan->n_steps; ++i) {
      if (!cuts(i)) continue;
      const Fill& f = fill[i];
      for (const i64 k : {plus(f.from_q, q), f.from}) begin = k > begin ? k : begin;
      for (const i64 k : {plus(f.below_q, q + n - 1), f.below}) end = k < end ? k : end;
      if (!first[i]) continue;
      i64 low = p.K, high = 0;
      for (i64 r = q; r < q + n; ++r) {
        if (first[i][r] >= last[i][r]) continue;
        low = first[i][r] < low ? first[i][r] : low;
        high = last[i][r] > high ? last[i][r] : high;
      }
      begin = low > begin ? low : begin;
      end = high < end ? high : end;
    }
    if (begin >= end) begin = end = 0;
  }

  // Enters the tile of queries [q, q + n) and keys [k, k + count). Sets the limits; without any where no row needs the tile.
  void enter_tile(i64 q, i64 n, i64 k, i64 count, bool full, Limits& limits) {
    q0 = q;
    k0 = k;
    keys = count;
    limits.all(n, count);
    for (int i = 0; i < steps(); ++i) {
      const Step& s = step(i);
      if (!s.has_mask()) continue;
      Fill& f = fill[i];
      const bool hides = !full && cuts(i), ranged = hides && first[i];
      f.program = ranged && decided[i] ? s.other : s.keep;
      classify(f, n);
      if (hides && (f.band == KEEPS_NONE || f.rest == KEEPS_NONE)) return none(n, limits);
      if (hides && f.band == MIXED)
        for (i64 r = 0; r < n; ++r) edges(f, q + r, limits.lo[r], limits.hi[r]);
      if (ranged)
        for (i64 r = 0; r < n; ++r) narrow_to(first[i][q + r], last[i][q + r], limits.lo[r], limits.hi[r]);
    }
    bool some = false;
    for (i64 r = 0; r < n && !some; ++r) some = limits.lo[r] < limits.hi[r];
    if (!some) return none(n, limits);
    for (int i = 0; i < steps(); ++i) {
      const Step& s = step(i);
      if (s.has_mask() && fill[i].rest == MIXED) evaluate(fill[i], n, !full && cuts(i), limits);
      if (s.kind == BIAS && !full && i < p.plan->n_steps && s.hides) look_through(s, n, limits);
    }
    limits.settle(n, count);
  }
  static void none(i64 n, Limits& limits) {
    limits.all(n, 0);
    limits.settle(n, 0);
  }

  void classify(Fill& f, i64 n) {
    const i64 last = q0 + n - 1, end = k0 + keys;
    f.band = MIXED;
    if (end <= plus(f.below_q, q0) && end <= f.below && k0 >= plus(f.from_q, last) && k0 >= f.from) f.band = KEEPS_ALL;
    else if (k0 >= plus(f.below_q, last) || k0 >= f.below || end <= plus(f.from_q, q0) || end <= f.from)
      f.band = KEEPS_NONE;
    f.rest = KEEPS_ALL;
    if (f.program.empty() || f.band == KEEPS_NONE) return;
    const Interval x = interval(f.program, n);
    f.rest = x.lo > 0 ? KEEPS_ALL : (x.hi <= 0 ? KEEPS_NONE : MIXED);
  }

  // Narrows [lo, hi) to what the comparisons keep for a query. It stays within what it was, empty or not.
  void edges(const Fill& f, i64 query, i64& lo, i64& hi) const {
    const i64 a = plus(f.from_q, query), b = plus(f.below_q, query);
    narrow_to(a > f.from ? a : f.from, b < f.below ? b : f.below, lo, hi);
  }
  // The same to keys [a, b).
  INLINE void narrow_to(i64 a, i64 b, i64& lo, i64& hi) const {
    a = a < k0 ? 0 : a - k0;
    b = b < k0 ? 0 : b - k0;
    a = a > hi ? hi : a;
    lo = a > lo ? a : lo;
    hi = b < hi ? b : hi;
    if (hi < lo) hi = lo;
  }

  // What is left of a mask, for every key that the limits leave; narrows them if it hides. (Where there are no ranges for every key
  // of the tile: decoding does not go by the limits of rows.)
  void evaluate(const Fill& f, i64 n, bool hides, Limits& limits) {
    const Span& s = f.program;
    const i64 result = s.end - 1;
    const Instr& only = p.plan->instrs[s.begin];
    const Ref* bytes = result == s.begin && only.op == X_LOAD && only.a < 0 && only.b < 0 ? &p.operand[only.operand] : nullptr;
    if (bytes && (bytes->dtype != U8 || bytes->col() != 1)) bytes = nullptr;
    if (!bytes) key_vectors(s);
    for (i64 r = 0; r < n; ++r) {
      i64 &lo = limits.lo[r], &hi = limits.hi[r];
      const i64 a = p.ranges ? lo : 0, b = p.ranges ? hi : keys;
      if (a >= b) continue;
      uint8_t* kept_row = f.kept + r * LD;
      if (!bytes) row_vectors(s, q0 + r, a, b);
      if (bytes) {
        std::memcpy(kept_row + a, element(only.operand, q0 + r, k0 + a), b - a);
      } else if (p.depends[result] & ON_KEY) {
        const i64* x = vectors + p.slot[result] * LD;
        for (i64 j = a; j < b; ++j) kept_row[j] = x[j] != 0;
      } else {
        std::memset(kept_row + a, scalar[result] != 0, b - a);
      }
      if (!hides) continue;
      while (lo < hi && !kept_row[lo]) ++lo;
      while (lo < hi && !kept_row[hi - 1]) --hi;
    }
  }

  // Narrows the limits by an added operand that is as good as -inf on keys at either end of a row.
  void look_through(const Step& s, i64 n, Limits& limits) const {
    const Ref& r = p.operand[s.operand];
    const i64 rs = r.row(), width = size_of(r.dtype);
    const float bound = static_cast<float>(p.plan->hidden_below / s.value);
    const char* at = base[s.operand] + (q0 * rs + k0 * r.col()) * width;
    if (rs == 0) {
      i64 lo = 0, hi = keys;
      narrow(r, at, bound, lo, hi);
      for (i64 i = 0; i < n; ++i) {
        limits.lo[i] = lo > limits.lo[i] ? lo : limits.lo[i];
        limits.hi[i] = hi < limits.hi[i] ? hi : limits.hi[i];
        if (limits.hi[i] < limits.lo[i]) limits.hi[i] = limits.lo[i];
      }
      return;
    }
    for (i64 i = 0; i < n; ++i) narrow(r, at + i * rs * width, bound, limits.lo[i], limits.hi[i]);
  }

  // Takes off both ends of [lo, hi) what is at most `bound`. NaN is not.
  static void narrow(const Ref& r, const char* row, float bound, i64& lo, i64& hi) {
    if (r.dtype != F64 && r.col() == 1) {
      with_float(r.dtype, [&](auto dt) {
        const i64 width = size_of(dt);
        while (lo + VL <= hi && all_at_most<dt>(row + lo * width, bound)) lo += VL;
        while (lo < hi && load1<dt>(row + lo * width) <= bound) ++lo;
        while (lo + VL <= hi && all_at_most<dt>(row + (hi - VL) * width, bound)) hi -= VL;
        while (lo < hi && load1<dt>(row + (hi - 1) * width) <= bound) --hi;
      });
      return;
    }
    const auto hidden = [&](i64 j) {
      float x;
      convert(r.dtype, row + j * r.col() * size_of(r.dtype), 1, &x, 1);
      return x <= bound;
    };
    if (r.col() == 0) {
      if (lo < hi && hidden(0)) hi = lo;
      return;
    }
    while (lo < hi && hidden(lo)) ++lo;
    while (lo < hi && hidden(hi - 1)) --hi;
  }
  template <i64 DT>
  static INLINE bool all_at_most(const char* p, float bound) {
    const vi low = loadv<DT>(p) <= splat(bound);
    return max_of(select(low, splat(0.0f), splat(1.0f))) == 0.0f;
  }

  // -- programs

  i64 clamped(i64 i, i64 size) const { return i < 0 ? 0 : (i >= size ? size - 1 : i); }

  // The address of the element that a load reads, given its indices.
  const char* element(i64 operand, i64 row, i64 col) const {
    const Ref& r = p.operand[operand];
    return base[operand] + (row * r.row() + col * r.col()) * size_of(r.dtype);
  }

  // A program's value at one query and key.
  i64 value_at(const Span& s, i64 q, i64 k) {
    for (i64 i = s.begin; i < s.end; ++i) scalar[i] = one(p.plan->instrs[i], q, k);
    return scalar[s.end - 1];
  }

  i64 one(const Instr& x, i64 q, i64 k) {
    const i64 *v = scalar, a = x.a >= 0 ? v[x.a] : 0, b = x.b >= 0 ? v[x.b] : 0;
    switch (x.op) {
      case X_NUMBER: return x.value;
      case X_QUERY: return q;
      case X_KEY: return k;
      case X_LOAD: {
        const Operand& r = p.operand[x.operand];
        const i64 row = x.a >= 0 ? clamped(a, r.rows) : q, col = x.b >= 0 ? clamped(b, r.cols) : k;
        return integer(r.dtype, element(x.operand, row, col));
      }
      case X_ADD: return wrap_add(a, b);
      case X_TIMES: return wrap_mul(a, x.value);
      case X_MIN: return a < b ? a : b;
      case X_MAX: return a > b ? a : b;
      case X_ABS: return a < 0 ? wrap_mul(a, -1) : a;
      case X_FLOORDIV: return floor_div(a, x.value);
      case X_MOD: return floor_mod(a, x.value);
      case X_WHERE: return a ? b : v[x.c];
      case X_LE: return a <= b;
      case X_EQ: return a == b;
      case X_NE: return a != b;
      case X_AND: return a & b;
      case X_OR: return a | b;
      default: return !a;
    }
  }

  // Results that depend on the key alone, for the keys of the tile.
  void key_vectors(const Span& s) {
    from = 0;
    to = keys;
    for (i64 i = s.begin; i < s.end; ++i) {
      if (p.depends[i] == ON_KEY) vector(i, 0);
      else if (p.depends[i] == 0) scalar[i] = one(p.plan->instrs[i], 0, 0);
    }
  }
  // The others, for one query and keys [first_key, beyond) of the tile.
  void row_vectors(const Span& s, i64 q) { row_vectors(s, q, 0, keys); }
  void row_vectors(const Span& s, i64 q, i64 first_key, i64 beyond) {
    from = first_key;
    to = beyond;
    for (i64 i = s.begin; i < s.end; ++i) {
      if (p.depends[i] == (ON_KEY | ON_QUERY)) vector(i, q);
      else if (p.depends[i] == ON_QUERY) scalar[i] = one(p.plan->instrs[i], q, 0);
    }
  }

  struct Argument {
    const i64* v;  // null for a number
    i64 x;
  };
  Argument argument(i64 i) const {
    if (p.depends[i] & ON_KEY) return {vectors + p.slot[i] * LD, 0};
    return {nullptr, scalar[i]};
  }
  template <class F>
  INLINE void each(i64* __restrict result, Argument a, Argument b, F f) {
    if (a.v && b.v) for (i64 j = from; j < to; ++j) result[j] = f(a.v[j], b.v[j]);
    else if (a.v) for (i64 j = from; j < to; ++j) result[j] = f(a.v[j], b.x);
    else for (i64 j = from; j < to; ++j) result[j] = f(a.x, b.v[j]);
  }

  void vector(i64 i, i64 q) {
    const Instr& x = p.plan->instrs[i];
    i64* result = vectors + p.slot[i] * LD;
    const Argument none{nullptr, 0};
    const Argument a = x.a >= 0 ? argument(x.a) : none, b = x.b >= 0 ? argument(x.b) : none;
    switch (x.op) {
      case X_KEY:
        for (i64 j = from; j < to; ++j) result[j] = k0 + j;
        return;
      case X_LOAD: return gather(x, a, b, q, result);
      case X_ADD: return each(result, a, b, [](i64 s, i64 t) { return wrap_add(s, t); });
      case X_TIMES: return each(result, a, none, [&](i64 s, i64) { return wrap_mul(s, x.value); });
      case X_MIN: return each(result, a, b, [](i64 s, i64 t) { return s < t ? s : t; });
      case X_MAX: return each(result, a, b, [](i64 s, i64 t) { return s > t ? s : t; });
      case X_ABS: return each(result, a, none, [](i64 s, i64) { return s < 0 ? wrap_mul(s, -1) : s; });
      case X_FLOORDIV: return each(result, a, none, [&](i64 s, i64) { return floor_div(s, x.value); });
      case X_MOD: return each(result, a, none, [&](i64 s, i64) { return floor_mod(s, x.value); });
      case X_WHERE: {
        const Argument c = argument(x.c);
        for (i64 j = from; j < to; ++j)
          result[j] = (a.v ? a.v[j] : a.x) ? (b.v ? b.v[j] : b.x) : (c.v ? c.v[j] : c.x);
        return;
      }
      case X_LE: return each(result, a, b, [](i64 s, i64 t) -> i64 { return s <= t; });
      case X_EQ: return each(result, a, b, [](i64 s, i64 t) -> i64 { return s == t; });
      case X_NE: return each(result, a, b, [](i64 s, i64 t) -> i64 { return s != t; });
      case X_AND: return each(result, a, b, [](i64 s, i64 t) { return s & t; });
      case X_OR: return each(result, a, b, [](i64 s, i64 t) { return s | t; });
      default: return each(result, a, none, [](i64 s, i64) -> i64 { return !s; });
    }
  }

  void gather(const Instr& x, Argument a, Argument b, i64 q, i64* result) const {
    const Operand& r = p.operand[x.operand];
    if (!a.v && x.b < 0) {
      const i64 row = x.a >= 0 ? clamped(a.x, r.rows) : q;
      return widen(r.dtype, element(x.operand, row, k0 + (r.col() ? from : 0)), r.col(), result + from, to - from);
    }
    for (i64 j = from; j < to; ++j) {
      const i64 row = x.a >= 0 ? clamped(a.v ? a.v[j] : a.x, r.rows) : q;
      const i64 col = x.b >= 0 ? clamped(b.v ? b.v[j] : b.x, r.cols) : k0 + j;
      result[j] = integer(r.dtype, element(x.operand, row, col));
    }
  }

  // Between which values a program lies on the tile.
  Interval interval(const Span& s, i64 n) {
    for (i64 i = s.begin; i < s.end; ++i) range[i] = interval_of(p.plan->instrs[i], n);
    return range[s.end - 1];
  }

  Interval interval_of(const Instr& x, i64 n) const {
    const Interval zero{0, 0}, a = x.a >= 0 ? range[x.a] : zero, b = x.b >= 0 ? range[x.b] : zero;
    switch (x.op) {
      case X_NUMBER: return {x.value, x.value};
      case X_QUERY: return {q0, q0 + n - 1};
      case X_KEY: return {k0, k0 + keys - 1};
      case X_LOAD: return loaded(x, a, b, n);
      case X_ADD: return sum_of(a, b);
      case X_TIMES: return product_of(a, x.value);
      case X_MIN: return {a.lo < b.lo ? a.lo : b.lo, a.hi < b.hi ? a.hi : b.hi};
      case X_MAX: return {a.lo > b.lo ? a.lo : b.lo, a.hi > b.hi ? a.hi : b.hi};
      case X_ABS: {
        // the least integer is its own negative
        if (a.lo == LEAST) return ANYTHING;
        const i64 s = a.lo < 0 ? -a.lo : a.lo, t = a.hi < 0 ? -a.hi : a.hi;
        const i64 most = s > t ? s : t, least = s < t ? s : t;
        return {a.lo <= 0 && a.hi >= 0 ? 0 : least, most};
      }
      case X_FLOORDIV: return {floor_div(a.lo, x.value), floor_div(a.hi, x.value)};
      case X_MOD:
        if (floor_div(a.lo, x.value) == floor_div(a.hi, x.value))
          return {floor_mod(a.lo, x.value), floor_mod(a.hi, x.value)};
        return {0, x.value - 1};
      case X_WHERE: {
        const Interval c = range[x.c];
        if (a.lo > 0) return b;
        if (a.hi <= 0) return c;
        return {b.lo < c.lo ? b.lo : c.lo, b.hi > c.hi ? b.hi : c.hi};
      }
      case X_LE: return {a.hi <= b.lo, a.lo <= b.hi};
      case X_EQ: return {a.lo == a.hi && b.lo == b.hi && a.lo == b.lo, a.lo <= b.hi && b.lo <= a.hi};
      case X_NE: return {a.lo > b.hi || b.lo > a.hi, !(a.lo == a.hi && b.lo == b.hi && a.lo == b.lo)};
      case X_AND: return {a.lo && b.lo, a.hi && b.hi};
      case X_OR: return {a.lo || b.lo, a.hi || b.hi};
      default: return {!a.hi, !a.lo};
    }
  }

  Interval loaded(const Instr& x, Interval a, Interval b, i64 n) const {
    const Operand& r = p.operand[x.operand];
    i64 r0 = 0, rows = 1, c0 = 0, cols = 1;
    if (x.a >= 0) {
      r0 = clamped(a.lo, r.rows);
      rows = clamped(a.hi, r.rows) - r0 + 1;
    } else if (r.row()) {
      r0 = q0;
      rows = n;
    }
    if (x.b >= 0) {
      c0 = clamped(b.lo, r.cols);
      cols = clamped(b.hi, r.cols) - c0 + 1;
    } else if (r.col()) {
      c0 = k0;
      cols = keys;
    }
    // a table that is larger than a tile tells nothing at a bearable price
    if (rows * cols > 2 * QT * LD) return r.dtype == U8 ? Interval{0, 255} : ANYTHING;
    return bounds_of(r.dtype, element(x.operand, r0, c0), r.row(), r.col(), rows, cols);
  }
};
