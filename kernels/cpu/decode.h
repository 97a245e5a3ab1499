// Few queries over many keys: K and V are streamed once, unpacked, and shared by the query heads that read them.
#pragma once

#include "forward.h"

constexpr i64 FEW = 16;
// How many rows ahead those that lie in blocks are fetched.
constexpr i64 AHEAD = 32;

struct DecodeItem {
  const Problem& p;
  Rows rows;
  i64 n, width, q_width;
  float *q, *s, *o, *m, *l, *wide;
  Limits limits;
  // the keys of the tile that each row sees
  i64 lo[FEW], hi[FEW];

  DecodeItem(const Problem& problem, i64 queries) : p(problem), rows(problem), n(queries) {
    width = round_up(p.E, VL);
    q_width = round_up(p.D, VL);
  }
  void carve(Carver& c) {
    q = c.floats(n * q_width);
    s = c.floats(n * LD);
    o = c.floats(n * width);
    m = c.floats(n);
    l = c.floats(n);
    wide = c.floats(16 * (q_width > width ? q_width : width));
    rows.carve(c, false);
  }

  // `count` rows from `first` on as float32 with zeros up to a whole vector; the rows themselves where they are that already.
  const float* widen(const Lines& src, i64 first, i64 count, i64 cols, i64 padded, i64& pitch) {
    i64 some = count, r = 0;
    const char* row = src.run(first, some);
    if (some == count && src.x.dtype == F32 && cols == padded) {
      pitch = src.x.row();
      return reinterpret_cast<const float*>(row);
    }
    pitch = padded;
    for (i64 end = some; r < count; ++r, row += src.x.row() * size_of(src.x.dtype)) {
      if (r == end) {
        some = count - r;
        row = src.run(first + r, some);
        end += some;
      }
      with_float(src.x.dtype, [&](auto dt) {
        i64 c = 0;
        for (; c + VL <= cols; c += VL) store(wide + r * padded + c, loadv<dt>(row + c * size_of(dt)));
        for (; c < cols; ++c) wide[r * padded + c] = load1<dt>(row + c * size_of(dt));
      });
      for (i64 c = cols; c < padded; ++c) wide[r * padded + c] = 0.0f;
    }
    return wide;
  }

  // Sums run over d one by one, as in the tiled kernels: backward, which is tiled, then meets the very same scores.
  void dots(const Lines& keys, i64 first, i64 count) {
    for (i64 j = 0; j < count; j += VL) {
      const i64 some = count - j < VL ? count - j : VL;
      i64 pitch;
      const float* k = widen(keys, first + j, some, p.D, q_width, pitch);
      keys.prefetch(first + j + AHEAD, count - j - AHEAD < VL ? count - j - AHEAD : VL, p.D);
      if (n == 1) dots_<1>(k, pitch, some, 0, j);
      else
        for (i64 r = 0; r < n; r += 2) n - r > 1 ? dots_<2>(k, pitch, some, r, j) : dots_<1>(k, pitch, some, r, j);
    }
  }

  template <int R>
  INLINE void dots_(const float* k, i64 pitch, i64 some, i64 r, i64 j) {
    vf acc[R];
    for (int i = 0; i < R; ++i) acc[i] = splat(0.0f);
    for (i64 d = 0; d < q_width; d += VL) {
      vf t[VL];
#pragma GCC unroll 16
      for (int i = 0; i < VL; ++i) t[i] = loadf(k + (i < some ? i : 0) * pitch + d);
      transpose(t);
#pragma GCC unroll 16
      for (int i = 0; i < VL; ++i)
#pragma GCC unroll 2
        for (int x = 0; x < R; ++x) acc[x] += splat(q[(r + x) * q_width + d + i]) * t[i];
    }
    for (int i = 0; i < R; ++i) store(s + (r + i) * LD + j, acc[i]);
  }

  template <int W>
  void gather_(float* o_, const float* w, const float* v, i64 pitch, i64 count) {
    vf acc[W];
#pragma GCC unroll 8
    for (int i = 0; i < W; ++i) acc[i] = loadf(o_ + i * VL);
    for (i64 j = 0; j < count; ++j) {
      const vf x = splat(w[j]);
#pragma GCC unroll 8
      for (int i = 0; i < W; ++i) acc[i] += x * loadf(v + j * pitch + i * VL);
    }
#pragma GCC unroll 8
    for (int i = 0; i < W; ++i) store(o_ + i * VL, acc[i]);
  }

  void gather(const Lines& values, i64 first, i64 count) {
    for (i64 j = 0; j < count; j += 16) {
      const i64 some = count - j < 16 ? count - j : 16;
      i64 pitch;
      const float* v = widen(values, first + j, some, p.E, width, pitch);
      values.prefetch(first + j + AHEAD, count - j - AHEAD < 16 ? count - j - AHEAD : 16, p.E);
      for (i64 r = 0; r < n; ++r) {
        // a weight of 0 would let NaN in a hidden value through
        const i64 from = lo[r] > j ? lo[r] - j : 0, own = (hi[r] - j < some ? hi[r] - j : some) - from;
        if (own <= 0) continue;
        const float *w = s + r * LD + j + from, *x = v + from * pitch;
        i64 e = 0;
        for (; e + 8 * VL <= width; e += 8 * VL) gather_<8>(o + r * width + e, w, x + e, pitch, own);
        for (; e < width; e += VL) gather_<1>(o + r * width + e, w, x + e, pitch, own);
      }
    }
  }

  // Keys [begin, end) for all queries of one head; leaves m, l and the unnormalised o. Without `full`, tiles of keys that
  // no query sees are passed over.
  void run(const Split& heads, i64 head, i64 begin, i64 end, bool full) {
    i64 index[BATCH];
    for (i64 g = 0; g < heads.inner; ++g) {
      heads.index(head, g, index);
      for (i64 i = 0; i < p.Q; ++i) {
        float* x = q + (g * p.Q + i) * q_width;
        convert(p.q.dtype, p.q.at(index) + i * p.q.row() * size_of(p.q.dtype), p.q.col(), x, p.D);
        for (i64 d = 0; d < p.D; ++d) x[d] *= p.fold;
        fill(x, p.D, q_width, 0.0f);
      }
    }
    for (i64 r = 0; r < n; ++r) m[r] = -INF, l[r] = 0.0f;
    std::memset(o, 0, n * width * sizeof(float));
    const Lines keys(p.k, index), values(p.v, index);
    for (i64 k0 = begin; k0 < end; k0 += KT) {
      const i64 count = end - k0 < KT ? end - k0 : KT;
      bool multiplied = false, unseen[FEW];
      for (i64 g = 0; g < heads.inner; ++g) {
        rows.enter_element(heads.index(head, g, index), index);
        rows.enter_tile(0, p.Q, k0, count, full, limits);
        unseen[g] = !limits.any;
        if (unseen[g]) continue;
        if (!multiplied) {
          keys.prefetch(k0, count < AHEAD ? count : AHEAD, p.D);
          dots(keys, k0, count);
          values.prefetch(k0, count < AHEAD ? count : AHEAD, p.E);
        }
        multiplied = true;
        for (i64 i = 0; i < p.Q; ++i) {
          const i64 r = g * p.Q + i;
          lo[r] = limits.lo[i];
          hi[r] = limits.hi[i];
          float* x = s + r * LD;
          rows.scores(x, i, 0, count, false);
          const float alpha = online(x, 0, count, m[r], l[r]);
          if (alpha != 1.0f)
            for (i64 e = 0; e < width; ++e) o[r * width + e] *= alpha;
          rows.weights(x, i, 0, count, false);
          if (p.dropout) rows.drop(x, i, 0, count);
        }
      }
      if (!multiplied) continue;
      for (i64 r = 0; r < n; ++r)
        if (unseen[r / p.Q]) lo[r] = hi[r] = 0;
      gather(values, k0, count);
    }
  }
};

// False if there is no memory.
inline bool forward_few(const Problem& p, const Split& heads, i64 threads, bool full) {
  const i64 n = heads.inner * p.Q;
  i64 splits = heads.outer % threads == 0 ? 1 : (2 * threads + heads.outer - 1) / heads.outer;
  if (splits > p.K / (2 * KT)) splits = p.K / (2 * KT);
  if (splits < 1) splits = 1;
  const i64 items = heads.outer * splits, width = round_up(p.E, VL), part = n * (width + 2);
  float* parts = static_cast<float*>(shared_arena.take(items * part * 4 + 64));
  if (!parts) return false;
  std::atomic<bool> failed{false};
  parallel_for(threads, items, [&](i64 i) {
    DecodeItem t(p, n);
    Carver c;
    t.carve(c);
    c = Carver{static_cast<char*>(tile_arena.take(c.used))};
    if (!c.base) return failed.store(true);
    t.carve(c);
    const i64 s = i % splits;
    // rows that are read together lie in one block more often where parts begin at a multiple
    const auto edge = [&](i64 part) { return part == splits || !p.k.table ? p.K * part / splits : p.K * part / splits / 16 * 16; };
    t.run(heads, i / splits, edge(s), edge(s + 1), full);
    float* out = parts + i * part;
    std::memcpy(out, t.m, n * 4);
    std::memcpy(out + n, t.l, n * 4);
    std::memcpy(out + 2 * n, t.o, n * width * 4);
  });
  if (failed) return false;
  bool doubtful = false;
  for (i64 head = 0; head < heads.outer; ++head) {
    float* first = parts + head * splits * part;
    for (i64 r = 0; r < n; ++r) {
      i64 index[BATCH];
      const i64 element = heads.index(head, r / p.Q, index), query = r % p.Q, at = p.line(element, query);
      float m, l, alone;
      begin_row(p, index, query, m, l);
      alone = m;
      for (i64 s = 0; s < splits; ++s) m = first[s * part + r] > m ? first[s * part + r] : m;
      doubtful |= p.skips && !full && p.doubt > -INF && !(m > p.doubt);
      const float shift = m == -INF ? 0.0f : m;
      if (alone != m) l *= std::exp(alone - shift);
      float* o = first + 2 * n + r * width;
      for (i64 s = 0; s < splits; ++s) {
        const float* other = first + s * part;
        const float alpha = other[r] == m ? 1.0f : std::exp(other[r] - shift);
        l += other[n + r] * alpha;
        const float* x = other + 2 * n + r * width;
        for (i64 e = 0; e < width; ++e) o[e] = s ? o[e] + x[e] * alpha : x[e] * alpha;
      }
      settle(m, l);
      const Finish end = finish_row(*p.plan, m, l);
      for (i64 e = 0; e < width; ++e) o[e] = end.zero ? 0.0f : o[e] / end.divisor;
      p.stats[at] = m;
      p.stats[p.lines + at] = l;
      write(p.out.dtype, p.out.at(index) + query * p.out.row() * size_of(p.out.dtype), p.out.row(), p.out.col(), o,
            width, 1, p.E, 1.0f, false);
    }
  }
  shared_arena.trim(KEPT_BYTES);
  // a row that may see what was passed over
  return doubtful ? forward_few(p, heads, threads, true) : true;
}

inline bool forward_all(const Problem& p) {
  const double work = static_cast<double>(p.elements) * p.Q * p.K * (p.D + p.E);
  const i64 threads = work < 4e5 ? 1 : p.threads;
  if (p.K == 0) {
    for (i64 e = 0; e < p.elements; ++e) {
      i64 index[BATCH];
      p.index_of(e, index);
      const float zero = 0.0f;
      for (i64 q = 0; q < p.Q; ++q) {
        begin_row(p, index, q, p.stats[p.line(e, q)], p.stats[p.lines + p.line(e, q)]);
        for (i64 c = 0; c < p.E; ++c)
          write(p.out.dtype, p.out.at(index) + (q * p.out.row() + c * p.out.col()) * size_of(p.out.dtype), 1, 1, &zero,
                1, 1, 1, 1.0f, false);
      }
    }
    return true;
  }
  const Split heads(p.batch, [&](int d) { return p.k.shared(d) && p.v.shared(d); });
  const bool straight = (p.k.col() == 1 || p.D <= 1) && (p.v.col() == 1 || p.E <= 1);
  if (p.Q <= 8 && heads.inner * p.Q <= FEW && straight && !p.fills_weights) return forward_few(p, heads, threads, false);
  return with_ranges(p, threads, [&](const Problem& x) { return forward_tiled(x, threads); });
}
