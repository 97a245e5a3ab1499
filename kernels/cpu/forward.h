// Forward: online softmax over key tiles, and a direct path for a handful of queries.
#pragma once

#include "ranges.h"
#include "rows.h"

// Splits the batch dims in two: `outer` counts the combinations of those not flagged, `inner` of those flagged.
struct Split {
  const i64* batch;
  bool flag[BATCH];
  i64 outer = 1, inner = 1;

  template <class Flag>
  Split(const i64* sizes, Flag flagged) : batch(sizes) {
    for (int d = 0; d < BATCH; ++d) {
      flag[d] = sizes[d] > 1 && flagged(d);
      (flag[d] ? inner : outer) *= sizes[d];
    }
  }
  // Fills index [BATCH]; returns the flat batch element.
  i64 index(i64 o, i64 i, i64* index) const {
    for (int d = BATCH - 1; d >= 0; --d) {
      i64& rest = flag[d] ? i : o;
      index[d] = rest % batch[d];
      rest /= batch[d];
    }
    i64 element = 0;
    for (int d = 0; d < BATCH; ++d) element = element * batch[d] + index[d];
    return element;
  }
};

// s[rows, keys] = left [rows, len] right [len, keys], both in panels, where the limits need it.
inline void products(float* s, const float* left, i64 hop, const float* right, i64 rows, i64 keys, i64 len,
                     const Limits& limits) {
  for (i64 j = 0; j < keys; j += NR, right += len * NR)
    for (i64 b = 0; b * MR < rows; ++b)
      if (j < limits.block_hi[b] && j + NR > limits.block_lo[b])
        block<NR, 1, NR>(left + b * MR * NR, hop, right, s + b * MR * LD + j, LD, len, false);
}

// out [rows, width] += s [rows, keys] right [keys, width].
inline void combine(float* out, i64 width, const float* s, const float* right, i64 panel, i64 rows,
                    const Limits& limits) {
  for (i64 e = 0; e < width; e += NR, right += panel)
    for (i64 b = 0; b * MR < rows; ++b) {
      const i64 lo = limits.block_lo[b], len = limits.block_hi[b] - lo;
      if (len > 0) block<LD, 1, 0>(s + b * MR * LD + lo, 0, right + lo * NR, out + b * MR * width + e, width, len, true);
    }
}

INLINE float row_max(const float* s, i64 lo, i64 hi) {
  vf a = splat(-INF), b = a;
  i64 j = lo;
  for (; j + 2 * VL <= hi; j += 2 * VL) {
    const vf x = loadf(s + j), y = loadf(s + j + VL);
    a = x > a ? x : a;
    b = y > b ? y : b;
  }
  for (; j < hi; j += VL) {
    const vf x = loadf(s + j);
    a = x > a ? x : a;
  }
  return max_of(a > b ? a : b);
}

// s = exp(s - shift) on whole vectors; returns the sum.
INLINE float row_exp(float* s, i64 lo, i64 hi, float shift) {
  const vf m = splat(shift);
  vf sum = splat(0.0f);
  for (i64 j = lo; j < hi; j += VL) {
    const vf e = vexp(loadf(s + j) - m);
    sum += e;
    store(s + j, e);
  }
  return sum_of(sum);
}

// One online softmax step on a row whose scores are in s[lo, hi): s becomes exp(s - m), m and l are brought up to date.
// Returns the factor for what was summed before.
INLINE float online(float* s, i64 lo, i64 hi, float& m, float& l) {
  const i64 from = lo / VL * VL, to = round_up(hi, VL);
  fill(s, from, lo, -INF);
  fill(s, hi, to, -INF);
  const float before = m, top = row_max(s, from, to);
  if (top > m) m = top;
  const float shift = m == -INF ? 0.0f : m;
  const float sum = row_exp(s, from, to, shift);
  const float alpha = before == m ? 1.0f : (before == -INF ? 0.0f : std::exp(before - shift));
  l = l * alpha + sum;
  return alpha;
}

// NaN scores are lost by the maximum and show in the sum.
INLINE void settle(float& m, float& l) {
  if (l != l && m != INF) m = QNAN;
  if (m == -INF) l = QNAN;
}

enum Pass { ONLINE, STATS_ONLY, EXACT };

struct ForwardTile {
  const Problem& p;
  Rows rows;
  float *q, *s, *o, *m, *l;
  const i64* index = nullptr;
  Limits limits;
  i64 kt;
  bool seen[QT];
  i64 looked = 0;  // tiles

  explicit ForwardTile(const Problem& problem) : p(problem), rows(problem) {
    const i64 tiles = (p.K + KT - 1) / KT;
    kt = round_up((p.K + tiles - 1) / tiles, NR);
  }
  void carve(Carver& c) {
    q = c.floats(p.Dp * QT);
    s = c.floats(QT * LD);
    o = c.floats(QT * p.Ep);
    m = c.floats(QT);
    l = c.floats(QT);
    rows.carve(c, false);
  }

  void pass(Pass kind, bool full, i64 q0, i64 n, const float* kp, const float* vp, const Finish* ends) {
    const i64 padded = round_up(n, MR);
    if (kind != EXACT)
      for (i64 r = 0; r < n; ++r) begin_row(p, index, q0 + r, m[r], l[r]), seen[r] = false;
    if (kind != STATS_ONLY) std::memset(o, 0, padded * p.Ep * sizeof(float));
    i64 begin = 0, end = p.K;
    if (!full) rows.masks.keys_of(q0, n, begin, end);
    // tiles lie on one grid, but for those of ranges, where a whole range is one tile where it can be
    begin = begin / (p.ranges ? NR : kt) * (p.ranges ? NR : kt);
    bool later = false;
    for (i64 k0 = begin; k0 < end; k0 += kt) {
      const i64 left = (p.ranges ? std::min(p.K, round_up(end, NR)) : p.K) - k0, keys = left < kt ? left : kt;
      ++looked;
      rows.enter_tile(q0, n, k0, keys, full, limits);
      if (!limits.any) continue;
      products(s, q, padded * NR, kp + k0 * p.D, n, keys, p.D, limits);
      for (i64 r = 0; r < n; ++r) {
        seen[r] |= limits.lo[r] < limits.hi[r];
        row(kind, q0 + r, r, ends, later);
      }
      later = true;
      if (kind != STATS_ONLY) combine(o, p.Ep, s, vp + k0 * NR, p.K * NR, n, limits);
    }
  }

  void row(Pass kind, i64 query, i64 r, const Finish* ends, bool later) {
    float* x = s + r * LD;
    const i64 lo = limits.lo[r], hi = limits.hi[r];
    if (lo < hi) {
      if (query + 1 < p.Q) rows.prefetch(query + 1);
      rows.scores(x, query, lo, hi, false);
      if (kind == EXACT) {
        if (ends[r].zero) {
          fill(x, lo, hi, 0.0f);
        } else {
          row_exp(x, lo / VL * VL, hi, m[r]);
          for (i64 j = lo; j < hi; ++j) x[j] /= ends[r].divisor;
        }
      } else {
        const float alpha = online(x, lo, hi, m[r], l[r]);
        if (alpha != 1.0f && kind == ONLINE && later)
          for (i64 e = 0; e < p.Ep; ++e) o[r * p.Ep + e] *= alpha;
      }
      if (kind != STATS_ONLY) {
        rows.weights(x, query, lo, hi, false);
        if (p.dropout) rows.drop(x, query, lo, hi);
      }
    }
    const i64 b = r / MR;
    fill(x, limits.block_lo[b], lo, 0.0f);
    fill(x, hi, limits.block_hi[b], 0.0f);
  }

  // The rows that saw no key get the mean of all values, where that is what their equal scores come to.
  bool spread_evenly(i64 n, i64 padded, const float* kp, const float* vp) {
    if (p.uniform < 0) return false;
    for (i64 r = 0; r < n; ++r)
      if (!(m[r] > p.doubt) && seen[r]) return false;
    const Step& step = p.plan->steps[p.uniform];
    if (step.kind == ADD) {
      // the scores must vanish beside what is added
      const float bound = largest(q, p.Dp * padded) * largest(kp, round_up(p.K, NR) * p.D) * static_cast<float>(p.D);
      if (!(bound < 1e29f)) return false;
    }
    vf sum[2][2];
    for (i64 e = 0; e < p.Ep; e += NR) {
      const float* v = vp + e * p.K;
      for (auto& pair : sum) pair[0] = pair[1] = splat(0.0f);
      for (i64 j = 0; j < p.K; ++j) {
        sum[j & 1][0] += loadf(v + j * NR);
        sum[j & 1][1] += loadf(v + j * NR + VL);
      }
      for (i64 r = 0; r < n; ++r) {
        if (seen[r]) continue;
        store(o + r * p.Ep + e, sum[0][0] + sum[1][0]);
        store(o + r * p.Ep + e + VL, sum[0][1] + sum[1][1]);
      }
    }
    for (i64 r = 0; r < n; ++r)
      if (!seen[r]) m[r] = static_cast<float>(step.value), l[r] = static_cast<float>(p.K);
    return true;
  }
  // The largest magnitude among n floats; NaN if one is not finite.
  static float largest(const float* x, i64 n) {
    vf top = splat(0.0f), sum = top;
    for (i64 i = 0; i + VL <= n; i += VL) {
      const vf y = loadf(x + i), size = select(y < 0.0f, -y, y);
      top = select(size > top, size, top);
      sum += size * 0.0f;
    }
    return max_of(top) + sum_of(sum);
  }

  // Queries [q0, q0 + n) of one batch element against its packed keys and values.
  void run(i64 element, const i64* at, i64 q0, i64 n, const float* kp, const float* vp) {
    const i64 padded = round_up(n, MR);
    index = at;
    pack(q, padded * NR, p.q.dtype, p.q.at(index) + q0 * p.q.row() * size_of(p.q.dtype), p.q.row(), p.q.col(), n, p.D,
         padded, p.fold);
    rows.enter_element(element, index);
    const Pass kind = p.nonlinear_weights ? STATS_ONLY : ONLINE;
    pass(kind, false, q0, n, kp, vp, nullptr);
    if (p.skips && p.doubt > -INF) {
      bool doubtful = false;
      for (i64 r = 0; r < n; ++r) doubtful |= !(m[r] > p.doubt);
      if (doubtful && !spread_evenly(n, padded, kp, vp)) pass(kind, true, q0, n, kp, vp, nullptr);
    }
    Finish ends[QT];
    bool nan = false;
    for (i64 r = 0; r < n; ++r) {
      settle(m[r], l[r]);
      ends[r] = finish_row(*p.plan, m[r], l[r]);
      nan |= ends[r].divisor != ends[r].divisor;
    }
    // a weight that is filled is not NaN even in a NaN row
    const bool exact = p.nonlinear_weights || (p.fills_weights && nan);
    if (exact) pass(EXACT, true, q0, n, kp, vp, ends);
    finish_tile(element, index, q0, n, ends, exact);
    tiles_looked_at.fetch_add(looked, std::memory_order_relaxed);
    looked = 0;
  }

  void finish_tile(i64 element, const i64* index, i64 q0, i64 n, const Finish* ends, bool exact) {
    const Ref& out = p.out;
    for (i64 r = 0; r < n; ++r) {
      float* x = o + r * p.Ep;
      if (!exact) {
        if (ends[r].zero) fill(x, 0, p.E, 0.0f);
        else
          for (i64 e = 0; e < p.Ep; ++e) x[e] /= ends[r].divisor;
      }
      const i64 at = p.line(element, q0 + r);
      p.stats[at] = m[r];
      p.stats[p.lines + at] = l[r];
    }
    write(out.dtype, out.at(index) + q0 * out.row() * size_of(out.dtype), out.row(), out.col(), o, p.Ep, n, p.E, 1.0f,
          false);
  }
};

// The same out of blocks: panels of k whose columns lie in several, and the rows of v that lie in each.
inline void pack_blocks(const Problem& p, const i64* index, i64 k0, i64 k1, float* kp, float* vp) {
  const Lines keys(p.k, index), values(p.v, index);
  for (i64 k = k0; k < k1; k += NR) {
    const i64 n = k1 - k < NR ? k1 - k : NR;
    const char* column[NR];
    for (i64 j = 0; j < n;) {
      i64 some = n - j;
      const char* row = keys.run(k + j, some);
      for (i64 i = 0; i < some; ++i) column[j + i] = row + i * p.k.row() * size_of(p.k.dtype);
      j += some;
    }
    with_float(p.k.dtype, [&](auto dt) { pack_columns_<dt>(kp + k * p.D, column, p.k.col(), p.D, n); });
  }
  for (i64 k = k0; k < k1;) {
    i64 n = k1 - k;
    const char* row = values.run(k, n);
    pack(vp + k * NR, p.K * NR, p.v.dtype, row, p.v.row(), p.v.col(), n, p.E, n, 1.0f);
    k += n;
  }
}

inline void pack_keys(const Problem& p, const i64* index, i64 k0, i64 k1, float* kp, float* vp) {
  if (p.k.table) return pack_blocks(p, index, k0, k1, kp, vp);
  pack(kp + k0 * p.D, p.D * NR, p.k.dtype, p.k.at(index) + k0 * p.k.row() * size_of(p.k.dtype), p.k.col(), p.k.row(),
       p.D, k1 - k0, p.D, 1.0f);
  pack(vp + k0 * NR, p.K * NR, p.v.dtype, p.v.at(index) + k0 * p.v.row() * size_of(p.v.dtype), p.v.row(), p.v.col(),
       k1 - k0, p.E, k1 - k0, 1.0f);
}

inline bool forward_tiled(const Problem& p, i64 threads) {
  const Split heads(p.batch, [&](int d) { return p.k.shared(d) && p.v.shared(d); });
  const i64 tiles = (p.Q + QT - 1) / QT, keys = round_up(p.K, NR);
  i64 qt = round_up((p.Q + tiles - 1) / tiles, MR);
  while (threads > 1 && qt > 2 * MR && p.elements * ((p.Q + qt - 1) / qt) < threads) qt = round_up(qt / 2, MR);
  const i64 q_tiles = (p.Q + qt - 1) / qt;
  const i64 k_floats = round_up(keys * p.D, 16), v_floats = round_up(p.K * p.Ep, 16);
  std::atomic<bool> failed{false};

  const auto tile = [&](ForwardTile& t, i64 head, i64 item, const float* kp, const float* vp) {
    i64 index[BATCH];
    const i64 element = heads.index(head, item / q_tiles, index);
    // the last queries first: under a causal mask they are the longest
    const i64 q0 = (q_tiles - 1 - item % q_tiles) * qt;
    t.run(element, index, q0, p.Q - q0 < qt ? p.Q - q0 : qt, kp, vp);
  };

  // with heads enough for every thread, each packs its own
  if (threads == 1 || heads.outer % threads == 0 || heads.outer >= 8 * threads) {
    parallel_for(threads, heads.outer, [&](i64 head) {
      ForwardTile t(p);
      Carver c;
      t.carve(c);
      c.floats(k_floats + v_floats);
      c = Carver{static_cast<char*>(tile_arena.take(c.used))};
      if (!c.base) return failed.store(true);
      t.carve(c);
      float* kp = c.floats(k_floats + v_floats);
      float* vp = kp + k_floats;
      i64 index[BATCH];
      heads.index(head, 0, index);
      pack_keys(p, index, 0, p.K, kp, vp);
      for (i64 item = 0; item < heads.inner * q_tiles; ++item) tile(t, head, item, kp, vp);
      tile_arena.trim(KEPT_BYTES);
    });
    return !failed;
  }

  // otherwise a few heads at a time are packed together, then shared out by query tiles
  i64 wave = (KEPT_BYTES / 4) / ((k_floats + v_floats + 1) * 4);
  wave = wave < 1 ? 1 : (wave > heads.outer ? heads.outer : wave);
  float* packed = static_cast<float*>(shared_arena.take(wave * (k_floats + v_floats) * 4));
  if (!packed) return false;
  const i64 strip = KT, strips = (p.K + strip - 1) / strip;
  for (i64 h0 = 0; h0 < heads.outer; h0 += wave) {
    const i64 count = heads.outer - h0 < wave ? heads.outer - h0 : wave;
    parallel_for(threads, count * strips, [&](i64 i) {
      i64 index[BATCH];
      heads.index(h0 + i / strips, 0, index);
      float* kp = packed + i / strips * (k_floats + v_floats);
      const i64 k0 = i % strips * strip;
      pack_keys(p, index, k0, p.K - k0 < strip ? p.K : k0 + strip, kp, kp + k_floats);
    });
    const i64 per_head = heads.inner * q_tiles;
    parallel_for(threads, count * per_head, [&](i64 i) {
      ForwardTile t(p);
      Carver c;
      t.carve(c);
      c = Carver{static_cast<char*>(tile_arena.take(c.used))};
      if (!c.base) return failed.store(true);
      t.carve(c);
      const float* kp = packed + i / per_head * (k_floats + v_floats);
      tile(t, h0 + i / per_head, i % per_head, kp, kp + k_floats);
    });
  }
  shared_arena.trim(KEPT_BYTES);
  return !failed;
}
