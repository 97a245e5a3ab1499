// Entry points. Arguments are plain arrays of 8-byte words, laid out by plan.py; nothing here knows torch.
#include "packed.h"

namespace {

struct Reader {
  const i64* at;
  i64 next() { return *at++; }
  const i64* take(i64 n) {
    const i64* p = at;
    at += n;
    return p;
  }
  char* pointer() { return reinterpret_cast<char*>(next()); }
};

void read_sizes(Problem& p, Reader& layout, i64& chunks, Packing& packing) {
  p.batch = layout.take(BATCH);
  p.Q = layout.next();
  p.K = layout.next();
  p.D = layout.next();
  p.E = layout.next();
  chunks = layout.next();
  packing.dim = layout.next();
  packing.count = packing.dim < 0 ? 0 : p.batch[packing.dim];
}

void read_head(Problem& p, Reader& pointers, Packing& packing) {
  p.threads = pointers.next();
  const char* seed = pointers.pointer();
  p.seed = seed ? load<uint64_t>(seed) : 0;
  const i64* numbers = reinterpret_cast<const i64*>(pointers.pointer());
  p.numbered = numbers != nullptr;
  if (numbers) {
    std::memcpy(&p.query_numbers, numbers, sizeof(Numbers));
    std::memcpy(&p.key_numbers, numbers + 5, sizeof(Numbers));
  }
  p.stats = reinterpret_cast<float*>(pointers.pointer());
  packing.q = reinterpret_cast<const i64*>(pointers.pointer());
  packing.k = reinterpret_cast<const i64*>(pointers.pointer());
}

void read(Ref& r, Reader& layout, Reader& pointers, i64 dtype) {
  r.data = pointers.pointer();
  r.stride = layout.take(BATCH + 2);
  r.dtype = dtype;
}

void read(Operand& o, Reader& layout, Reader& pointers, i64 dtype) {
  read(static_cast<Ref&>(o), layout, pointers, dtype);
  o.rows = layout.next();
  o.cols = layout.next();
}

void read(Grad& g, Reader& layout, Reader& pointers) {
  g.mode = layout.next();
  const i64 dtype = layout.next();
  g.chunk = layout.next();
  read(static_cast<Ref&>(g), layout, pointers, dtype);
}

thread_local Arena table_arena;

// Where blocks are, of k and v in a paged layout. 0; -1 when memory ran out; -2 or -3 for a number in the table that no block of
// k, or of v, has.
int read_pages(Problem& p, Reader& layout, Reader& pointers) {
  const i64 block = layout.next(), wraps = layout.next(), elements = layout.next();
  const i64* hop = layout.take(BATCH + 1);
  const i64* table = reinterpret_cast<const i64*>(pointers.pointer());
  if (block == 0) return 0;
  i64* kept = static_cast<i64*>(table_arena.take((2 * elements + 1) * 8));
  if (!kept) return -1;
  for (Keys* x : {&p.k, &p.v}) {
    const i64 blocks = layout.next(), least = wraps ? -blocks : 0;
    x->step = layout.next();
    x->block = block;
    x->hop = hop;
    x->table = kept;
    for (i64 i = 0; i < elements; ++i) {
      const i64 at = table[i];
      if (at < least || at >= blocks) return x == &p.k ? -2 : -3;
      kept[i] = at < 0 ? at + blocks : at;
    }
    kept += elements;
  }
  return 0;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void attnfuse_set_launch(Launch f) { launch = f; }

// Keys of a tile, which bounds how far the keys can be split.
EXPORT i64 attnfuse_key_tile() { return KT; }

// Tiles whose masks have been looked at, of all calls so far but those that decode.
EXPORT i64 attnfuse_tiles() { return tiles_looked_at.load(std::memory_order_relaxed); }

// 0, -1 when memory ran out, or what read_pages gives.
EXPORT int attnfuse_forward(const Plan* plan, const i64* layout_words, const i64* pointer_words) {
  Problem p;
  p.plan = plan;
  Reader layout{layout_words}, pointers{pointer_words};
  i64 chunks;
  Packing packing;
  read_sizes(p, layout, chunks, packing);
  read_head(p, pointers, packing);
  read(p.q, layout, pointers, plan->qk_dtype);
  read(p.k, layout, pointers, plan->qk_dtype);
  read(p.v, layout, pointers, plan->v_dtype);
  read(p.out, layout, pointers, plan->out_dtype);
  for (int i = 0; i < plan->n_operands; ++i) read(p.operand[i], layout, pointers, plan->operand_dtype[i]);
  if (const int failure = read_pages(p, layout, pointers)) return failure;
  finish(p);
  if (p.elements * p.Q == 0) return 0;
  const bool done = packing.dim < 0 ? forward_all(p) : forward_packed(p, packing);
  table_arena.trim(KEPT_BYTES / 16);
  return done ? 0 : -1;
}

// 0, or -1 when memory ran out. Q, K and the batch are not empty.
EXPORT int attnfuse_backward(const Plan* plan, const i64* layout_words, const i64* pointer_words) {
  Problem p;
  p.plan = plan;
  Reader layout{layout_words}, pointers{pointer_words};
  i64 chunks;
  Packing packing;
  read_sizes(p, layout, chunks, packing);
  read_head(p, pointers, packing);
  read(p.q, layout, pointers, plan->qk_dtype);
  read(p.k, layout, pointers, plan->qk_dtype);
  read(p.v, layout, pointers, plan->v_dtype);
  read(p.out, layout, pointers, plan->out_dtype);
  read(p.dout, layout, pointers, plan->out_dtype);
  p.dlse = reinterpret_cast<const float*>(pointers.pointer());
  for (int i = 0; i < plan->n_operands; ++i) read(p.operand[i], layout, pointers, plan->operand_dtype[i]);
  read(p.dq, layout, pointers);
  read(p.dk, layout, pointers);
  read(p.dv, layout, pointers);
  for (int i = 0; i < plan->n_operands; ++i) read(p.doperand[i], layout, pointers);
  finish(p);
  return (packing.dim < 0 ? backward_all(p, chunks) : backward_packed(p, packing)) ? 0 : -1;
}
