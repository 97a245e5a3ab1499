// The keys that queries see where numbers of the keys ascend, such as ids of documents: found by bisection once for each query,
// so that no tile beyond them is looked at.
#pragma once

#include "masks.h"

inline thread_local Arena range_arena;

// Ranges of one step on one element of the batch.
struct Bisection {
  const Problem& p;
  Masks masks;
  const Order* orders;
  i64 count;
  i64* numbers = nullptr;     // [orders][K], of the keys
  uint8_t* begins = nullptr;  // [K]: where a run of keys begins that have the same numbers so far
  bool ascends[MAX_ORDERS];

  Bisection(const Problem& problem, const Step& step)
      : p(problem), masks(problem), orders(problem.plan->orders + step.orders.begin), count(step.orders.end - step.orders.begin) {}
  void carve(Carver& c) {
    numbers = reinterpret_cast<i64*>(c.bytes(count * p.K * 8));
    begins = reinterpret_cast<uint8_t*>(c.bytes(p.K));
    masks.carve(c);
  }
  const i64* of(i64 i) const { return numbers + i * p.K; }

  void number_keys(i64 i) {
    const Span& s = orders[i].key;
    for (i64 k = 0; k < p.K; k += KT) {
      masks.k0 = k;
      masks.keys = p.K - k < KT ? p.K - k : KT;
      masks.key_vectors(s);
      i64* to = numbers + i * p.K + k;
      if (p.depends[s.end - 1] & ON_KEY) std::memcpy(to, masks.vectors + p.slot[s.end - 1] * LD, masks.keys * 8);
      else std::fill(to, to + masks.keys, masks.scalar[s.end - 1]);
    }
  }

  // Whether a number never falls within a run; it is then known to within which keys any comparison with it holds. Numbers that
  // have to be the same part runs in smaller ones.
  bool settle(i64 i) {
    number_keys(i);
    const i64* x = of(i);
    for (i64 k = 1; k < p.K; ++k)
      if (x[k] < x[k - 1] && !begins[k]) return false;
    if (orders[i].how == SAME)
      for (i64 k = 1; k < p.K; ++k) begins[k] |= x[k] != x[k - 1];
    return true;
  }

  // The ranges of all queries; which of the orders they do not say.
  Ranges::Left run(const i64* index, int32_t* first, int32_t* last) {
    masks.enter_element(index);
    std::memset(begins, 0, p.K);
    i64 settled = 0;
    for (i64 i = 0; i < count; ++i) settled += ascends[i] = settle(i);
    if (settled == 0) return Ranges::ALL;
    i64 known[MAX_ORDERS], low = 0, high = p.K;
    for (i64 q = 0; q < p.Q; ++q) {
      bool same = q > 0;
      for (i64 i = 0; i < count && orders[i].how == SAME; ++i) {
        if (!ascends[i]) continue;
        const i64 x = masks.value_at(orders[i].query, q, 0);
        same &= q > 0 && known[i] == x;
        known[i] = x;
      }
      if (!same) {
        low = 0;
        high = p.K;
        for (i64 i = 0; i < count && orders[i].how == SAME; ++i)
          if (ascends[i]) narrow(i, known[i], low, high);
      }
      i64 a = low, b = high;
      for (i64 i = 0; i < count && a < b; ++i)
        if (ascends[i] && orders[i].how != SAME) narrow(i, masks.value_at(orders[i].query, q, 0), a, b);
      first[q] = static_cast<int32_t>(a);
      last[q] = static_cast<int32_t>(b);
    }
    return settled == count ? Ranges::NONE : Ranges::SOME;
  }

  void narrow(i64 i, i64 x, i64& low, i64& high) const {
    const i64 *keys = of(i), *begin = keys + low, *end = keys + high, how = orders[i].how;
    if (how == SAME || how == AT_LEAST) begin = std::lower_bound(begin, end, x);
    if (how == ABOVE) begin = std::upper_bound(begin, end, x);
    if (how == SAME || how == AT_MOST) end = std::upper_bound(begin, end, x);
    if (how == BELOW) end = std::lower_bound(begin, end, x);
    low = begin - keys;
    high = end - keys;
  }
};

// The ranges of a step, but for what they hold: which dims of the batch they depend on. None where a side of an order depends on
// the other index.
inline Ranges ranges_of(const Problem& p, int i) {
  const Plan& plan = *p.plan;
  const Step& step = plan.steps[i];
  Ranges r;
  if (!step.hides || step.kind == BIAS || step.orders.empty()) return r;
  bool reads[MAX_OPERANDS] = {};
  for (i64 o = step.orders.begin; o < step.orders.end; ++o) {
    const Order& order = plan.orders[o];
    if ((p.depends[order.key.end - 1] & ON_QUERY) || (p.depends[order.query.end - 1] & ON_KEY)) return r;
    for (const Span* s : {&order.key, &order.query})
      for (i64 x = s->begin; x < s->end; ++x)
        if (plan.instrs[x].op == X_LOAD) reads[plan.instrs[x].operand] = true;
  }
  r.elements = 1;
  for (int d = BATCH - 1; d >= 0; --d) {
    bool own = false;
    for (int o = 0; o < plan.n_operands; ++o) own |= reads[o] && p.operand[o].stride[d] != 0;
    r.stride[d] = own && p.batch[d] > 1 ? r.elements : 0;
    if (r.stride[d]) r.elements *= p.batch[d];
  }
  return r;
}

inline bool find_ranges(const Problem& p, Ranges* ranges, i64 threads) {
  const int steps = static_cast<int>(p.plan->n_steps);
  const auto carve = [&](Carver c) {
    for (int i = 0; i < steps; ++i) {
      Ranges& r = ranges[i];
      if (r.elements == 0) continue;
      r.first = reinterpret_cast<int32_t*>(c.bytes(r.elements * p.Q * 4));
      r.last = reinterpret_cast<int32_t*>(c.bytes(r.elements * p.Q * 4));
      r.left = reinterpret_cast<uint8_t*>(c.bytes(r.elements));
    }
    return c.used;
  };
  for (int i = 0; i < steps; ++i) ranges[i] = ranges_of(p, i);
  Carver all{static_cast<char*>(range_arena.take(carve(Carver())))};
  if (!all.base) return false;
  carve(all);
  std::atomic<bool> failed{false};
  for (int i = 0; i < steps; ++i) {
    Ranges& r = ranges[i];
    parallel_for(threads, r.elements, [&](i64 e) {
      Bisection b(p, p.plan->steps[i]);
      Carver c;
      b.carve(c);
      c = Carver{static_cast<char*>(tile_arena.take(c.used))};
      if (!c.base) return failed.store(true);
      b.carve(c);
      i64 index[BATCH];
      for (int d = 0; d < BATCH; ++d) index[d] = r.stride[d] ? e / r.stride[d] % p.batch[d] : 0;
      r.left[e] = b.run(index, r.first + e * p.Q, r.last + e * p.Q);
    });
  }
  return !failed;
}

// run(p) with its ranges; false if there is no memory.
template <class F>
bool with_ranges(const Problem& p, i64 threads, const F& run) {
  bool any = false;
  for (int i = 0; i < p.plan->n_steps; ++i) any |= p.plan->steps[i].hides && !p.plan->steps[i].orders.empty();
  if (!any) return run(p);
  Ranges ranges[MAX_STEPS];
  Problem own = p;
  own.ranges = ranges;
  const bool done = find_ranges(p, ranges, threads) && run(own);
  range_arena.trim(KEPT_BYTES / 16);
  return done;
}
