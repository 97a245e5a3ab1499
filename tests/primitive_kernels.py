"""Kernels that use each primitive of kernels/volta/device.cuh, for the emulator and for NVRTC."""

from __future__ import annotations

HEAD = """
struct Problem { const void *a, *b, *c; void* d; const float* x; float* y; const float* z; int n; };
"""

PRIMITIVES = (
    HEAD
    + r"""
template <class T> DEVICE const T* from(const void* p) { return static_cast<const T*>(p); }
template <class T> DEVICE T* into(void* p) { return static_cast<T*>(p); }

template <bool A_COL, bool B_ROW>
DEVICE void multiply_four_by_four(const Problem& p) {
  int t = thread_index();
  const u32 *a = from<u32>(p.a) + 2 * t, *b = from<u32>(p.b) + 2 * t;
  float d[8];
  for (int i = 0; i < 8; i++) d[i] = load_global(from<float>(p.c) + 8 * t + i);
  multiply_884<A_COL, B_ROW>(d, load_global(a), load_global(a + 1), load_global(b), load_global(b + 1));
  for (int i = 0; i < 8; i++) store_global(into<float>(p.d) + 8 * t + i, d[i]);
}

KERNEL(32, 1) rows_columns(const Problem p) { multiply_four_by_four<false, false>(p); }
KERNEL(32, 1) rows_rows(const Problem p) { multiply_four_by_four<false, true>(p); }
KERNEL(32, 1) columns_columns(const Problem p) { multiply_four_by_four<true, false>(p); }
KERNEL(32, 1) columns_rows(const Problem p) { multiply_four_by_four<true, true>(p); }

#if __CUDA_ARCH__ >= 750
KERNEL(32, 1) sixteen_by_eight(const Problem p) {
  int t = thread_index();
  const u32 *a = from<u32>(p.a) + 2 * t, *b = from<u32>(p.b) + t;
  float d[4];
  for (int i = 0; i < 4; i++) d[i] = load_global(from<float>(p.c) + 4 * t + i);
  multiply_1688(d, load_global(a), load_global(a + 1), load_global(b));
  for (int i = 0; i < 4; i++) store_global(into<float>(p.d) + 4 * t + i, d[i]);
}

KERNEL(32, 1) matrices(const Problem p) {
  int t = thread_index();
  u32* s = shared_memory();
  store_shared4(s + 4 * t, load_global(from<U4>(p.a) + t));
  sync_block();
  u32 r[4];
  load_matrices(r, s + 4 * t);
  for (int i = 0; i < 4; i++) store_global(into<u32>(p.d) + 8 * t + i, r[i]);
  load_matrices_transposed(r, s + 4 * t);
  for (int i = 0; i < 4; i++) store_global(into<u32>(p.d) + 8 * t + 4 + i, r[i]);
}

KERNEL(128, 2) tangents(const Problem p) {
  int i = block_index() * 128 + thread_index();
  if (i < p.n) store_global(p.y + i, tanh_approximate(load_global(p.x + i)));
}
#endif

KERNEL(32, 1) shuffles(const Problem p) {
  int t = thread_index(), x = load_global(from<int>(p.a) + t);
  int* d = into<int>(p.d) + 8 * t;
  store_global(d, shuffle_xor(x, 5));
  store_global(d + 1, static_cast<int>(shuffle_xor(static_cast<u32>(x), 16)));
  store_global(d + 2, static_cast<int>(bits_of(shuffle_xor(float_of_bits(x), 1))));
  store_global(d + 3, shuffle_from(x, t * 7 % 32));
  store_global(d + 4, static_cast<int>(shuffle_from(static_cast<u32>(x), 31)));
  store_global(d + 5, static_cast<int>(bits_of(shuffle_from(float_of_bits(x), 30 - t / 2))));
  store_global(d + 6, any_of_warp(t == 9) ? 1 : 0);
  store_global(d + 7, any_of_warp(t == 32) ? 1 : 0);
}

KERNEL(128, 2) halves_of_floats(const Problem p) {
  int i = block_index() * 128 + thread_index();
  if (i >= p.n) return;
  float x = load_global(p.x + i);
  store_global(into<u16>(p.d) + i, half_of_float(x));
  u32 both = half_pair(x, 1.5f);
  store_global(p.y + i, float_of_half(static_cast<u16>(both)) + float_of_half(static_cast<u16>(both >> 16)));
}

KERNEL(128, 2) floats_of_halves(const Problem p) {
  int i = block_index() * 128 + thread_index();
  if (i >= p.n) return;
  u16 x = load_global(from<u16>(p.a) + i);
  store_global(p.y + i, float_of_half(x));
  store_global(into<float>(p.d) + i, float_of_bfloat16(x));
}

KERNEL(128, 2) functions(const Problem p) {
  int i = block_index() * 128 + thread_index();
  if (i >= p.n) return;
  float x = load_global(p.x + i), *y = p.y + 8 * i;
  store_global(y, exp2_approximate(x));
  store_global(y + 1, log2_approximate(x));
  store_global(y + 2, rsqrt_approximate(x));
  store_global(y + 3, fused(x, x, -1.0f));
  store_global(y + 4, least(x, not_a_number()));
  store_global(y + 5, greatest(not_a_number(), x));
  store_global(y + 6, least(x, infinity()));
  store_global(y + 7, greatest(x, 0.5f));
}

template <class T>
DEVICE void add_both(const Problem& p) {
  int t = thread_index();
  const T* x = from<T>(p.a) + t;
  store_global(into<double>(p.d) + t, static_cast<double>(load_global(x)) + static_cast<double>(load_global_changing(x)));
}

KERNEL(32, 1) add_float(const Problem p) { add_both<float>(p); }
KERNEL(32, 1) add_double(const Problem p) { add_both<double>(p); }
KERNEL(32, 1) add_u16(const Problem p) { add_both<u16>(p); }
KERNEL(32, 1) add_u32(const Problem p) { add_both<u32>(p); }
KERNEL(32, 1) add_u64(const Problem p) { add_both<u64>(p); }
KERNEL(32, 1) add_i64(const Problem p) { add_both<i64>(p); }
KERNEL(32, 1) add_int(const Problem p) { add_both<int>(p); }
KERNEL(32, 1) add_short(const Problem p) { add_both<short>(p); }
KERNEL(32, 1) add_signed_char(const Problem p) { add_both<signed char>(p); }
KERNEL(32, 1) add_unsigned_char(const Problem p) { add_both<unsigned char>(p); }

KERNEL(64, 1) words_of_shared(const Problem p) {
  int t = thread_index();
  u32* s = shared_memory();
  const u32* a = from<u32>(p.a) + 8 * t;
  store_shared4(s + 8 * t, load_global(from<U4>(a)));
  store_shared2(s + 8 * t + 4, U2{load_global(a + 4), load_global(a + 5)});
  store_shared(s + 8 * t + 6, load_global(a + 6));
  store_shared_float(s + 8 * t + 7, float_of_bits(load_global(a + 7)));
  sync_block();
  const u32* other = s + 8 * (63 - t);
  U4 x = load_shared4(other);
  U2 y = load_shared2(other + 4);
  u32* d = into<u32>(p.d) + 8 * t;
  store_global(into<U4>(d), x);
  store_global(d + 4, y.x);
  store_global(d + 5, y.y);
  store_global(d + 6, bits_of(load_shared_float(reinterpret_cast<const float*>(other) + 6)));
  store_global(d + 7, load_shared(other + 7));
  sync_block();
  store_shared_float(reinterpret_cast<float*>(s) + t, 1.0f);
}

KERNEL(128, 2) atomics(const Problem p) {
  int i = block_index() * p.n + thread_index();
  add_global(p.y, load_global(p.x + i));
  max_global(into<int>(p.d), i * 37 % 101);
}
"""
)
