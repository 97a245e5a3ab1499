// Vectors of float32 for whatever the machine has, and conversions from the dtypes attention is given in.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

// VL floats a vector; the matrix kernel holds MR x 2 vectors of the result in registers.
#if !defined(ATTNFUSE_VL)
#if defined(__AVX512F__)
#define ATTNFUSE_VL 16
#elif defined(__AVX__)
#define ATTNFUSE_VL 8
#else
#define ATTNFUSE_VL 4
#endif
#endif

constexpr int VL = ATTNFUSE_VL;
constexpr int NR = 2 * VL;
#if ATTNFUSE_VL == 16
constexpr int MR = 12;
#elif ATTNFUSE_VL == 8
constexpr int MR = 6;
#elif defined(__aarch64__)
constexpr int MR = 12;
#else
constexpr int MR = 6;
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2)));
typedef int64_t i64;

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float QNAN = std::numeric_limits<float>::quiet_NaN();

template <class V, class T>
INLINE V load(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T>
INLINE void store(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}
INLINE vf loadf(const float* p) { return load<vf>(p); }
template <class To, class From>
INLINE To bits(From v) {
  static_assert(sizeof(To) == sizeof(From), "bits changes no size");
  To t;
  __builtin_memcpy(&t, &v, sizeof t);
  return t;
}

template <class V, class T, std::size_t... I>
INLINE V splat_(T x, std::index_sequence<I...>) {
  return V{((void)I, x)...};
}
INLINE vf splat(float x) { return splat_<vf>(x, std::make_index_sequence<VL>()); }
INLINE vu splatu(uint32_t x) { return splat_<vu>(x, std::make_index_sequence<VL>()); }
template <std::size_t... I>
INLINE vu iota_(std::index_sequence<I...>) {
  return vu{static_cast<uint32_t>(I)...};
}
INLINE vu iota() { return iota_(std::make_index_sequence<VL>()); }

// a where m is all ones, b where it is all zeros.
INLINE vf select(vi m, vf a, vf b) { return bits<vf>((m & bits<vi>(a)) | (~m & bits<vi>(b))); }

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define HAS_SHUFFLE 1
#endif
#endif

#if defined(HAS_SHUFFLE)
template <int HALF, std::size_t... I>
INLINE vf interleave_(vf a, vf b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, (static_cast<int>(I) / 2 + HALF * (VL / 2) + (I % 2 ? VL : 0))...);
}
#else
template <int HALF, class S>
INLINE vf interleave_(vf a, vf b, S) {
  vf r;
  for (int i = 0; i < VL; ++i) r[i] = (i % 2 ? b : a)[i / 2 + HALF * (VL / 2)];
  return r;
}
#endif

#if defined(HAS_SHUFFLE) && ATTNFUSE_VL == 8
// Transpose in place, by shuffles that stay within 128 bits but for the last.
INLINE void transpose(vf* r) {
  vf t[8], u[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    t[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      u[i + 2 * j] = __builtin_shufflevector(t[i + j], t[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      u[i + 2 * j + 1] = __builtin_shufflevector(t[i + j], t[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = __builtin_shufflevector(u[i], u[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    r[i + 4] = __builtin_shufflevector(u[i], u[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}
#else
// Transpose in place: log2(VL) perfect shuffles.
INLINE void transpose(vf* r) {
  vf t[VL];
#pragma GCC unroll 4
  for (int half = 1; half < VL; half *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < VL / 2; ++i) {
      t[2 * i] = interleave_<0>(r[i], r[i + VL / 2], std::make_index_sequence<VL>());
      t[2 * i + 1] = interleave_<1>(r[i], r[i + VL / 2], std::make_index_sequence<VL>());
    }
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i) r[i] = t[i];
  }
}
#endif

INLINE float sum_of(vf v) {
  float t[VL];
  store(t, v);
  for (int half = VL / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) t[i] += t[i + half];
  return t[0];
}
// NaN may be lost; it comes back through exp.
INLINE float max_of(vf v) {
  float t[VL];
  store(t, v);
  for (int half = VL / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) t[i] = t[i] > t[i + half] ? t[i] : t[i + half];
  return t[0];
}

// exp for x <= 88, within 2 ulp; below the smallest normal it gives exactly 0, and NaN stays NaN.
// Reduction to |r| <= ln(2)/2 and the minimax polynomial of the Cephes library's expf (Moshier 1992).
INLINE vf vexp(vf x) {
  const vi under = x < splat(-87.33654f);
  const vf magic = splat(12582912.0f);
  const vf t = x * splat(1.44269504f) + magic;
  const vf n = t - magic;
  vf r = x - n * splat(0.693359375f);
  r = r - n * splat(-2.12194440e-4f);
  vf p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * (r * r) + (r + splat(1.0f));
  // the low bits of t hold n
  const vf scale = bits<vf>((bits<vu>(t) + splatu(127)) << 23);
  return bits<vf>(~under & bits<vi>(p * scale));
}

// tanh within 2 ulp; NaN stays NaN. Polynomial below 0.625 from Cephes' tanhf.
INLINE vf vtanh(vf x) {
  const vu sign = bits<vu>(x) & splatu(0x80000000u);
  vf a = bits<vf>(bits<vu>(x) & splatu(0x7FFFFFFFu));
  const vi small = a < splat(0.625f);
  const vf z = x * x;
  vf p = splat(-5.70498872745e-3f);
  p = p * z + splat(2.06390887954e-2f);
  p = p * z + splat(-5.37397155531e-2f);
  p = p * z + splat(1.33314422036e-1f);
  p = p * z + splat(-3.33332819422e-1f);
  p = p * z * x + x;
  a = select(a > splat(10.0f), splat(10.0f), a);
  const vf big = splat(1.0f) - splat(2.0f) / (vexp(a + a) + splat(1.0f));
  return select(small, p, bits<vf>(bits<vu>(big) | sign));
}

enum Dtype : i64 { F32, BF16, F16, F64, U8, I32, I64, I8, I16 };

inline i64 size_of(i64 dtype) {
  switch (dtype) {
    case F32: case I32: return 4;
    case BF16: case F16: case I16: return 2;
    case F64: case I64: return 8;
    default: return 1;
  }
}

INLINE float from_bf16(uint16_t h) { return bits<float>(static_cast<uint32_t>(h) << 16); }
INLINE uint16_t to_bf16(float x) {
  const uint32_t u = bits<uint32_t>(x);
  if ((u & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>((u >> 16) | 0x40);
  return static_cast<uint16_t>((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
}

#if defined(__F16C__)
INLINE float from_f16(uint16_t h) { return _cvtsh_ss(h); }
INLINE uint16_t to_f16(float x) { return static_cast<uint16_t>(_cvtss_sh(x, 0)); }
#else
INLINE float from_f16(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, body = h & 0x7FFF;
  if (body >= 0x7C00) return bits<float>(sign | 0x7F800000u | ((body & 0x3FF) << 13));
  // scaling by 2^112 puts the exponent right and makes subnormals normal
  return bits<float>(sign | bits<uint32_t>(bits<float>(body << 13) * 5.192296858534828e33f));
}
INLINE uint16_t to_f16(float x) {
  const uint32_t u = bits<uint32_t>(x), sign = (u >> 16) & 0x8000;
  const uint32_t a = u & 0x7FFFFFFF;
  if (a > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00);
  if (a >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00);
  if (a < 0x38800000u) {
    // adding 0.5 aligns a subnormal's bits at the bottom, rounded to nearest even
    return static_cast<uint16_t>(sign | (bits<uint32_t>(bits<float>(a) + 0.5f) - 0x3F000000u));
  }
  return static_cast<uint16_t>(sign | ((a - 0x38000000u + 0xFFF + ((a >> 13) & 1)) >> 13));
}
#endif

// VL contiguous values of DT as float32.
template <i64 DT>
INLINE vf loadv(const char* p) {
  if constexpr (DT == F32) {
    return load<vf>(p);
  } else if constexpr (DT == BF16) {
    return bits<vf>(__builtin_convertvector(load<vh>(p), vu) << 16);
  } else {
#if defined(__F16C__) && ATTNFUSE_VL == 8
    return bits<vf>(_mm256_cvtph_ps(load<__m128i>(p)));
#elif defined(__AVX512F__) && ATTNFUSE_VL == 16
    return bits<vf>(_mm512_cvtph_ps(load<__m256i>(p)));
#else
    uint16_t h[VL];
    __builtin_memcpy(h, p, sizeof h);
    vf r;
    for (int i = 0; i < VL; ++i) r[i] = from_f16(h[i]);
    return r;
#endif
  }
}

template <i64 DT>
INLINE float load1(const char* p) {
  if constexpr (DT == F32) return load<float>(p);
  else if constexpr (DT == BF16) return from_bf16(load<uint16_t>(p));
  else return from_f16(load<uint16_t>(p));
}

template <i64 DT>
INLINE void store1(char* p, float x) {
  if constexpr (DT == F32) store(p, x);
  else if constexpr (DT == BF16) store(p, to_bf16(x));
  else store(p, to_f16(x));
}

// VL contiguous values.
template <i64 DT>
INLINE void storev(char* p, vf x) {
  if constexpr (DT == F32) {
    store(p, x);
  } else if constexpr (DT == BF16) {
    const vu u = bits<vu>(x);
    const vi nan = x != x;
    const vu even = (u + splatu(0x7FFF) + ((u >> 16) & splatu(1))) >> 16;
    const vu r = (bits<vu>(nan) & ((u >> 16) | splatu(0x40))) | (~bits<vu>(nan) & even);
    store(p, __builtin_convertvector(r, vh));
  } else {
#if defined(__F16C__) && ATTNFUSE_VL == 8
    store(p, _mm256_cvtps_ph(bits<__m256>(x), 0));
#elif defined(__AVX512F__) && ATTNFUSE_VL == 16
    store(p, _mm512_cvtps_ph(bits<__m512>(x), 0));
#else
    uint16_t h[VL];
    for (int i = 0; i < VL; ++i) h[i] = to_f16(x[i]);
    __builtin_memcpy(p, h, sizeof h);
#endif
  }
}

// x as float16 or bfloat16 has it, infinite where that overflows. NaN may become infinite.
template <i64 DT>
INLINE vf rounded(vf x) {
  if constexpr (DT == BF16) {
    const vu u = bits<vu>(x);
    return bits<vf>((u + splatu(0x7FFF) + ((u >> 16) & splatu(1))) & splatu(0xFFFF0000u));
  } else {
    char held[VL * 2];
    storev<DT>(held, x);
    return loadv<DT>(held);
  }
}

// Calls f with the dtype as a compile-time constant.
template <class F>
INLINE void with_float(i64 dtype, F f) {
  if (dtype == F32) f(std::integral_constant<i64, F32>());
  else if (dtype == BF16) f(std::integral_constant<i64, BF16>());
  else f(std::integral_constant<i64, F16>());
}

template <class T, class C>
INLINE void convert_loop(const char* p, i64 stride, float* dst, i64 n, C c) {
  if (stride == 1) {
    for (i64 j = 0; j < n; ++j) dst[j] = c(load<T>(p + j * static_cast<i64>(sizeof(T))));
  } else {
    for (i64 j = 0; j < n; ++j) dst[j] = c(load<T>(p + j * stride * static_cast<i64>(sizeof(T))));
  }
}

// n values of any dtype, `stride` elements apart, as float32.
inline void convert(i64 dtype, const char* p, i64 stride, float* dst, i64 n) {
  const auto number = [](auto x) { return static_cast<float>(x); };
  switch (dtype) {
    case F32: return convert_loop<float>(p, stride, dst, n, number);
    case BF16: return convert_loop<uint16_t>(p, stride, dst, n, [](uint16_t h) { return from_bf16(h); });
    case F16: {
      i64 j = 0;
      if (stride == 1)
        for (; j + VL <= n; j += VL) store(dst + j, loadv<F16>(p + 2 * j));
      return convert_loop<uint16_t>(p + 2 * j * stride, stride, dst + j, n - j, [](uint16_t h) { return from_f16(h); });
    }
    case F64: return convert_loop<double>(p, stride, dst, n, number);
    case U8: return convert_loop<uint8_t>(p, stride, dst, n, number);
    case I32: return convert_loop<int32_t>(p, stride, dst, n, number);
    case I64: return convert_loop<int64_t>(p, stride, dst, n, number);
    case I8: return convert_loop<int8_t>(p, stride, dst, n, number);
    case I16: return convert_loop<int16_t>(p, stride, dst, n, number);
  }
}

template <class T>
INLINE void nonzero_loop(const char* p, i64 stride, uint8_t* dst, i64 n) {
  for (i64 j = 0; j < n; ++j) dst[j] = load<T>(p + j * stride * static_cast<i64>(sizeof(T))) != 0;
}

// n values of any dtype as 1 where nonzero, else 0. The sign bit of a floating zero does not count.
inline void nonzero(i64 dtype, const char* p, i64 stride, uint8_t* dst, i64 n) {
  switch (dtype) {
    case F32: return nonzero_loop<float>(p, stride, dst, n);
    case F64: return nonzero_loop<double>(p, stride, dst, n);
    case BF16: case F16:
      for (i64 j = 0; j < n; ++j) dst[j] = (load<uint16_t>(p + j * stride * 2) & 0x7FFF) != 0;
      return;
    case I16: return nonzero_loop<int16_t>(p, stride, dst, n);
    case I32: return nonzero_loop<int32_t>(p, stride, dst, n);
    case I64: return nonzero_loop<int64_t>(p, stride, dst, n);
    default: return nonzero_loop<uint8_t>(p, stride, dst, n);
  }
}
