// Backward: scores are computed again tile by tile, from the row maxima and sums that forward left.
#pragma once

#include "forward.h"

constexpr i64 DELTA_ROWS = 8;

struct BackwardItem {
  const Problem& p;
  Rows rows;
  Limits limits;
  i64 qt, q_tiles, kt, k_tiles, element = 0, chunk = 0;
  i64 index[BATCH];
  i64 looked = 0;
  bool want_scores;
  float *q, *dout, *dq, *m, *inverse, *delta, *k_cols, *k_rows, *v_cols, *dk, *dv, *s, *g, *weight, *spare;
  // tiles that see all keys; rows of zero weights; rows without a gradient, which are passed over
  uint8_t *full, *zero, *idle;
  // of each query tile the keys that it sees; of each key tile the first query tile that sees one of them, and the one after the
  // last
  i64 *key_from, *key_beyond, *first, *last;

  explicit BackwardItem(const Problem& problem) : p(problem), rows(problem) {
    const i64 nq = (p.Q + QT - 1) / QT, nk = (p.K + KT - 1) / KT;
    qt = round_up((p.Q + nq - 1) / nq, MR);
    q_tiles = (p.Q + qt - 1) / qt;
    kt = round_up((p.K + nk - 1) / nk, NR);
    k_tiles = (p.K + kt - 1) / kt;
    want_scores = p.dq.mode || p.dk.mode;
    for (int i = 0; i < p.plan->n_operands; ++i) want_scores |= p.doperand[i].mode != 0;
  }
  i64 dq_floats() const { return q_tiles * qt * p.Dp; }
  void carve(Carver& c, float* outer_dq) {
    q = c.floats(q_tiles * qt * p.Dp);
    // the last rows of a block of DELTA_ROWS may be read past the end
    dout = c.floats(q_tiles * qt * p.Ep + DELTA_ROWS * NR);
    dq = outer_dq ? outer_dq : c.floats(dq_floats());
    m = c.floats(p.Q);
    inverse = c.floats(p.Q);
    delta = c.floats(p.Q);
    k_cols = c.floats(KT * p.D);
    k_rows = c.floats(KT * p.Dp);
    v_cols = c.floats(KT * p.E);
    dk = c.floats(KT * p.Dp);
    dv = c.floats(KT * p.Ep);
    s = c.floats(QT * LD > DELTA_ROWS * p.Ep ? QT * LD : DELTA_ROWS * p.Ep);
    g = c.floats(QT * LD);
    weight = c.floats(LD);
    spare = c.floats(LD);
    full = reinterpret_cast<uint8_t*>(c.bytes(q_tiles));
    zero = reinterpret_cast<uint8_t*>(c.bytes(p.Q));
    idle = reinterpret_cast<uint8_t*>(c.bytes(p.Q));
    for (i64** x : {&key_from, &key_beyond}) *x = reinterpret_cast<i64*>(c.bytes(q_tiles * 8));
    for (i64** x : {&first, &last}) *x = reinterpret_cast<i64*>(c.bytes(k_tiles * 8));
    rows.carve(c, true);
  }

  static const char* at(const Ref& r, const i64* index, i64 row) {
    return r.at(index) + row * r.row() * size_of(r.dtype);
  }

  // Packs the queries and output gradients of a batch element and works out each row's constants.
  void prepare() {
    const Plan& plan = *p.plan;
    for (i64 t = 0; t < q_tiles; ++t) {
      const i64 q0 = t * qt, n = p.Q - q0 < qt ? p.Q - q0 : qt, padded = round_up(n, MR);
      pack(q + q0 * p.Dp, padded * NR, p.q.dtype, at(p.q, index, q0), p.q.row(), p.q.col(), n, p.D, padded, p.fold);
      float* d = dout + q0 * p.Ep;
      pack(d, padded * NR, p.dout.dtype, at(p.dout, index, q0), p.dout.row(), p.dout.col(), n, p.E, padded, 1.0f);
      full[t] = false;
      for (i64 r = 0; r < n; ++r) {
        const i64 row = q0 + r, line = p.line(element, row);
        const float top = p.stats[line], sum = p.stats[p.lines + line];
        const Finish end = finish_row(plan, top, sum);
        m[row] = top;
        inverse[row] = 1.0f / end.divisor;
        zero[row] = end.zero;
        idle[row] = p.skips && end.divisor == end.divisor && is_idle(d, padded, r, row);
        // what forward went on to, or what is NaN on every key
        if (!idle[row] && p.skips && !end.zero && (!(top > p.doubt) || end.divisor != end.divisor)) full[t] = true;
        if (!idle[row] && p.skips && end.zero && p.doubt > -INF) full[t] = true;
        delta[row] = 0.0f;
      }
      if (want_scores && !p.nonlinear_weights)
        for (i64 r = 0; r < n; r += DELTA_ROWS) dot_rows(delta + q0, d, padded, q0, r, n - r < DELTA_ROWS ? n - r : DELTA_ROWS);
    }
    if (p.nonlinear_weights)
      for (i64 t = 0; t < k_tiles; ++t) {
        pack_tile(t);
        for (i64 u = 0; u < q_tiles; ++u) tile(t, u, true);
      }
    // the weights' sum is 1, so that a gradient of the log-sum-exp adds to that of each weight
    if (p.dlse)
      for (i64 r = 0; r < p.Q; ++r) delta[r] -= p.dlse[p.line(element, r)];
  }

  // Whether a row's output has no gradient: then nothing has one through it, as long as no NaN is met on the way, which
  // would show in the output.
  bool is_idle(const float* d, i64 padded, i64 r, i64 row) {
    if (p.dlse && p.dlse[p.line(element, row)] != 0.0f) return false;
    for (i64 e = 0; e < p.Ep; e += NR)
      for (i64 i = 0; i < NR; ++i)
        if (d[e * padded + r * NR + i] != 0.0f) return false;
    convert(p.out.dtype, at(p.out, index, row), p.out.col(), s, p.E);
    float sum = 0.0f;
    for (i64 e = 0; e < p.E; ++e) sum += s[e] * 0.0f;
    return sum == 0.0f;
  }

  // delta = sum of dout * out over e, one e after the other as in the tiles: where a row sees one key only, the gradient
  // of its weight then cancels exactly, as it does in softmax's own.
  void dot_rows(float* to, const float* d, i64 padded, i64 q0, i64 r, i64 count) {
    float sum[DELTA_ROWS] = {};
    for (i64 i = 0; i < count; ++i)
      convert(p.out.dtype, at(p.out, index, q0 + r + i), p.out.col(), s + i * p.Ep, p.E);
    for (i64 e = 0; e < p.E; ++e) {
      const float* x = d + e / NR * padded * NR + r * NR + e % NR;
#pragma GCC unroll 8
      for (i64 i = 0; i < DELTA_ROWS; ++i) sum[i] = multiply_add(x[i * NR], s[i * p.Ep + e], sum[i]);
    }
    for (i64 i = 0; i < count; ++i) to[r + i] = sum[i];
  }

  void pack_tile(i64 t) {
    const i64 k0 = t * kt, keys = p.K - k0 < kt ? p.K - k0 : kt;
    const char* k = at(p.k, index, k0);
    pack(k_cols, p.D * NR, p.k.dtype, k, p.k.col(), p.k.row(), p.D, keys, p.D, 1.0f);
    if (p.dq.mode) pack(k_rows, kt * NR, p.k.dtype, k, p.k.row(), p.k.col(), keys, p.D, keys, 1.0f);
    if (want_scores)
      pack(v_cols, p.E * NR, p.v.dtype, at(p.v, index, k0), p.v.col(), p.v.row(), p.E, keys, p.E, 1.0f);
  }

  // left^T right: grad [keys, width] += s^T [keys, rows] right [rows, width].
  void transposed(float* grad, i64 width, const float* left, const float* right, i64 panel, i64 keys) {
    for (i64 e = 0; e < width; e += NR, right += panel) {
      for (i64 key = 0; key < keys; key += MR) {
        const i64 first = limits.first[key / MR], last = limits.last[key / MR];
        if (first < last)
          block<1, LD, 0>(left + first * LD + key, 0, right + first * NR, grad + key * width + e, width, last - first,
                          true);
      }
    }
  }

  // Which tiles may hold something, by what comparisons and ranges say.
  void find_tiles() {
    for (i64 t = 0; t < k_tiles; ++t) first[t] = q_tiles, last[t] = 0;
    for (i64 u = 0; u < q_tiles; ++u) {
      const i64 q0 = u * qt;
      key_from[u] = 0;
      key_beyond[u] = p.K;
      if (!full[u]) rows.masks.keys_of(q0, p.Q - q0 < qt ? p.Q - q0 : qt, key_from[u], key_beyond[u]);
      for (i64 t = key_from[u] / kt; t * kt < key_beyond[u]; ++t) {
        first[t] = u < first[t] ? u : first[t];
        last[t] = u + 1;
      }
    }
  }

  void tile(i64 k_tile, i64 q_tile, bool delta_only) {
    const i64 k0 = k_tile * kt, keys = p.K - k0 < kt ? p.K - k0 : kt;
    const i64 q0 = q_tile * qt, n = p.Q - q0 < qt ? p.Q - q0 : qt, padded = round_up(n, MR);
    ++looked;
    rows.enter_tile(q0, n, k0, keys, full[q_tile], limits);
    if (!limits.any) return;
    if (std::memchr(idle + q0, 1, n)) {
      for (i64 r = 0; r < n; ++r)
        if (idle[q0 + r]) limits.lo[r] = limits.hi[r] = 0;
      limits.settle(n, keys);
      if (!limits.any) return;
    }
    limits.find_columns(n, keys);
    products(s, q + q0 * p.Dp, padded * NR, k_cols, n, keys, p.D, limits);
    if (want_scores) products(g, dout + q0 * p.Ep, padded * NR, v_cols, n, keys, p.E, limits);
    for (i64 r = 0; r < n; ++r) row(q0 + r, r, round_up(keys, MR), delta_only);
    if (delta_only) return;
    if (p.dv.mode) transposed(dv, p.Ep, s, dout + q0 * p.Ep, padded * NR, keys);
    if (p.dk.mode) transposed(dk, p.Dp, g, q + q0 * p.Dp, padded * NR, keys);
    if (p.dq.mode) combine(dq + q0 * p.Dp, p.Dp, g, k_rows, kt * NR, n, limits);
  }

  // s becomes the weights that multiply v, g (the gradient of the weights) that of q k^T.
  void row(i64 query, i64 r, i64 padded, bool delta_only) {
    const Plan& plan = *p.plan;
    float *x = s + r * LD, *y = g + r * LD;
    const i64 lo = limits.lo[r], hi = limits.hi[r];
    if (lo < hi) {
      if (query + 1 < p.Q) rows.prefetch(query + 1);
      rows.scores(x, query, lo, hi, true);
      const i64 from = lo / VL * VL, to = round_up(hi, VL);
      if (zero[query]) {
        fill(x, from, to, 0.0f);
      } else {
        const vf top = splat(m[query]), inv = splat(inverse[query]);
        for (i64 j = from; j < to; j += VL) store(x + j, vexp(loadf(x + j) - top) * inv);
      }
      const float* w = x;
      if (plan.n_weights || p.dropout) {
        std::memcpy(weight + from, x + from, (to - from) * sizeof(float));
        w = weight;
        rows.weights(x, query, lo, hi, true);
        if (p.dropout) rows.drop(x, query, lo, hi);
      }
      if (want_scores) {
        if (p.dropout)
          for (i64 j = lo; j < hi; ++j) y[j] *= rows.kept[j];
        for (i64 i = plan.n_weights - 1; i >= 0; --i)
          rows.reverse(plan.weights[i], y, query, lo, hi, rows.saved + (plan.n_steps + i) * LD, spare, index, chunk,
                       delta_only);
        if (delta_only) {
          if (!zero[query])
            for (i64 j = lo; j < hi; ++j) delta[query] += w[j] * y[j];
          return;
        }
        if (zero[query]) {
          fill(y, lo, hi, 0.0f);
        } else {
          const vf d = splat(delta[query]);
          for (i64 j = from; j < to; j += VL) store(y + j, loadf(w + j) * (loadf(y + j) - d));
        }
        for (i64 i = plan.n_steps - 1; i >= p.first; --i)
          rows.reverse(plan.steps[i], y, query, lo, hi, rows.saved + i * LD, spare, index, chunk, false);
        fill(y, 0, lo, 0.0f);
        fill(y, hi, padded, 0.0f);
      }
      fill(x, 0, lo, 0.0f);
      fill(x, hi, padded, 0.0f);
      return;
    }
    fill(x, 0, padded, 0.0f);
    if (want_scores) fill(y, 0, padded, 0.0f);
  }

  // Key tiles [begin, end) of one batch element: stores dk and dv, leaves dq unscaled.
  void run(i64 begin, i64 end) {
    rows.enter_element(element, index);
    prepare();
    find_tiles();
    std::memset(dq, 0, dq_floats() * sizeof(float));
    for (i64 t = begin; t < end; ++t) {
      const i64 k0 = t * kt, keys = p.K - k0 < kt ? p.K - k0 : kt;
      pack_tile(t);
      std::memset(dk, 0, keys * p.Dp * sizeof(float));
      std::memset(dv, 0, keys * p.Ep * sizeof(float));
      for (i64 u = first[t]; u < last[t]; ++u)
        if (key_from[u] < k0 + keys && key_beyond[u] > k0) tile(t, u, false);
      put(p.dk, k0, keys, p.D, dk, p.Dp, 1.0f);
      put(p.dv, k0, keys, p.E, dv, p.Ep, 1.0f);
    }
    tiles_looked_at.fetch_add(looked, std::memory_order_relaxed);
  }

  void put(const Grad& t, i64 row, i64 n, i64 cols, const float* src, i64 ld, float scale) const {
    if (!t.mode) return;
    write(t.dtype, t.at(index) + row * t.row() * size_of(t.dtype), t.row(), t.col(), src, ld, n, cols, scale,
          t.mode == 2);
  }
};

inline bool backward_ranged(const Problem& p, i64 threads, i64 chunks) {
  // dims over which some gradient is summed: one thread walks them, in order
  const Split classes(p.batch, [&](int d) {
    const auto summed = [d](const Grad& g) { return g.mode && g.stride[d] == 0; };
    bool any = summed(p.dq) || summed(p.dk) || summed(p.dv);
    for (int i = 0; i < p.plan->n_operands; ++i) any |= summed(p.doperand[i]);
    return any;
  });
  std::atomic<bool> failed{false};
  const auto item = [&](i64 c, i64 e, i64 chunk, float* dq) {
    BackwardItem t(p);
    Carver carver;
    t.carve(carver, dq);
    carver = Carver{static_cast<char*>(tile_arena.take(carver.used))};
    if (!carver.base) return failed.store(true);
    t.carve(carver, dq);
    t.element = classes.index(c, e, t.index);
    t.chunk = chunk;
    t.run(t.k_tiles * chunk / chunks, t.k_tiles * (chunk + 1) / chunks);
    if (!dq) t.put(p.dq, 0, p.Q, p.D, t.dq, p.Dp, p.fold);
    tile_arena.trim(KEPT_BYTES);
  };
  if (chunks == 1) {
    parallel_for(threads, classes.outer, [&](i64 c) {
      for (i64 e = 0; e < classes.inner; ++e) item(c, e, 0, nullptr);
    });
    return !failed;
  }
  // fewer classes than threads: the keys are split, and the parts of dq summed in order
  const i64 floats = round_up(BackwardItem(p).dq_floats(), 16);
  float* parts = static_cast<float*>(shared_arena.take(classes.outer * chunks * floats * 4 + 64));
  if (!parts) return false;
  constexpr i64 strip = 64;
  const i64 strips = (p.Q + strip - 1) / strip;
  for (i64 e = 0; e < classes.inner; ++e) {
    parallel_for(threads, classes.outer * chunks, [&](i64 i) { item(i / chunks, e, i % chunks, parts + i * floats); });
    if (failed || !p.dq.mode) continue;
    parallel_for(threads, classes.outer * strips, [&](i64 i) {
      BackwardItem t(p);
      t.element = classes.index(i / strips, e, t.index);
      const i64 q0 = i % strips * strip, n = p.Q - q0 < strip ? p.Q - q0 : strip;
      float* sum = parts + i / strips * chunks * floats + q0 * p.Dp;
      for (i64 c = 1; c < chunks; ++c)
        for (i64 j = 0; j < n * p.Dp; ++j) sum[j] += sum[c * floats + j];
      t.put(p.dq, q0, n, p.D, sum, p.Dp, p.fold);
    });
  }
  shared_arena.trim(KEPT_BYTES);
  return !failed;
}

inline bool backward_all(const Problem& p, i64 chunks) {
  const double work = static_cast<double>(p.elements) * p.Q * p.K * (p.D + p.E);
  const i64 threads = work < 4e5 ? 1 : p.threads;
  return with_ranges(p, threads, [&](const Problem& x) { return backward_ranged(x, threads, chunks); });
}
