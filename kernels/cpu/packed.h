// Packed layouts: each sequence is a dense problem of its own, within the tensors of all.
#pragma once

#include <algorithm>
#include <numeric>

#include "backward.h"
#include "decode.h"

// Where the rows of each sequence are in packed queries, and in packed keys: [2][count], the first one and the one after the
// last; null for a side that is dense. dim: which batch dim counts the sequences.
struct Packing {
  i64 dim, count;
  const i64 *q, *k;
  i64 begin(const i64* bounds, i64 s) const { return bounds ? bounds[s] : 0; }
  i64 length(const i64* bounds, i64 s, i64 dense) const { return bounds ? bounds[count + s] - bounds[s] : dense; }
};

// One sequence of p.
struct Sequence {
  i64 batch[BATCH];
  Problem p;

  Sequence(const Problem& all, const Packing& packing, i64 s) : p(all) {
    const i64 q0 = packing.begin(packing.q, s), k0 = packing.begin(packing.k, s);
    std::copy(all.batch, all.batch + BATCH, batch);
    batch[packing.dim] = 1;
    p.batch = batch;
    p.elements = all.elements / packing.count;
    p.Q = packing.length(packing.q, s, all.Q);
    p.K = packing.length(packing.k, s, all.K);
    p.lines = packing.q ? p.elements * all.Q : all.elements * all.Q;
    p.first_line = packing.q ? q0 : s * p.elements * all.Q;
    p.line_step = all.Q;
    const auto move = [&](Ref& r, const i64* bounds, i64 row) {
      if (r.data) r.data += (bounds ? row * r.row() : s * r.stride[packing.dim]) * size_of(r.dtype);
    };
    for (Ref* r : {&p.q, &p.out, &p.dout, static_cast<Ref*>(&p.dq)}) move(*r, packing.q, q0);
    for (Ref* r : std::initializer_list<Ref*>{&p.k, &p.v, &p.dk, &p.dv}) move(*r, packing.k, k0);
    for (int i = 0; i < all.plan->n_operands; ++i) move(p.operand[i], nullptr, 0), move(p.doperand[i], nullptr, 0);
  }
};

// Runs each sequence that has rows: those too long for one thread by all of them, the others by one each, the longest first.
// in_turn: none at the same time as another, since their gradients are added up.
template <class F>
bool each_sequence(const Problem& p, const Packing& packing, bool in_turn, const F& run) {
  std::vector<i64> order(packing.count);
  std::iota(order.begin(), order.end(), 0);
  const auto work = [&](i64 s) {
    return static_cast<double>(packing.length(packing.q, s, p.Q)) * packing.length(packing.k, s, p.K);
  };
  std::stable_sort(order.begin(), order.end(), [&](i64 a, i64 b) { return work(a) > work(b); });
  double left = 0;
  for (i64 s : order) left += work(s);
  i64 next = 0;
  for (; next < packing.count && (in_turn || p.threads == 1 || work(order[next]) * p.threads > left); ++next) {
    left -= work(order[next]);
    if (!run(Sequence(p, packing, order[next]).p)) return false;
  }
  std::atomic<bool> failed{false};
  parallel_for(p.threads, packing.count - next, [&](i64 i) {
    Sequence one(p, packing, order[next + i]);
    one.p.threads = 1;
    if (!run(one.p)) failed = true;
  });
  return !failed;
}

inline bool forward_packed(const Problem& p, const Packing& packing) {
  return each_sequence(p, packing, false, [](const Problem& x) { return x.Q == 0 || forward_all(x); });
}

inline bool backward_packed(const Problem& p, const Packing& packing) {
  // gradients that every sequence adds to
  const auto shared = [&](const Grad& g) { return g.mode && g.stride[packing.dim] == 0; };
  bool in_turn = (!packing.q && shared(p.dq)) || (!packing.k && (shared(p.dk) || shared(p.dv)));
  for (int i = 0; i < p.plan->n_operands; ++i) in_turn |= shared(p.doperand[i]);
  return each_sequence(p, packing, in_turn, [](const Problem& x) { return x.Q == 0 || x.K == 0 || backward_all(x, 1); });
}
