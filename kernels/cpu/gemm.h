// Packing into panels, and the register-blocked matrix product every tile is made of.
//
// A panel matrix X [R, C] is held as [C / NR][R][NR], columns padded with zeros: it serves as the right factor (reduced
// over R) and as the left one (reduced over C).
#pragma once

#include "simd.h"

INLINE i64 round_up(i64 n, i64 to) { return (n + to - 1) / to * to; }

template <i64 DT>
void pack_(float* dst, i64 panel, const char* src, i64 rs, i64 cs, i64 rows, i64 cols, float scale) {
  const i64 width = size_of(DT);
  const vf vscale = splat(scale);
  for (i64 c0 = 0; c0 < cols; c0 += NR, dst += panel) {
    const i64 n = cols - c0 < NR ? cols - c0 : NR;
    const char* p = src + c0 * cs * width;
    i64 r0 = 0;
    if (cs == 1 && n >= VL) {
      for (i64 r = 0; r < rows; ++r) {
        const char* row = p + r * rs * width;
        store(dst + r * NR, loadv<DT>(row) * vscale);
        if (n == NR) {
          store(dst + r * NR + VL, loadv<DT>(row + VL * width) * vscale);
        } else {
          for (i64 c = VL; c < NR; ++c) dst[r * NR + c] = c < n ? load1<DT>(row + c * width) * scale : 0.0f;
        }
      }
      continue;
    }
    if (rs == 1 && n > 1) {
      for (; r0 + VL <= rows; r0 += VL) {
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          vf t[VL];
#pragma GCC unroll 16
          for (int j = 0; j < VL; ++j)
            t[j] = h * VL + j < n ? loadv<DT>(p + ((h * VL + j) * cs + r0) * width) * vscale : splat(0.0f);
          transpose(t);
#pragma GCC unroll 16
          for (int j = 0; j < VL; ++j) store(dst + (r0 + j) * NR + h * VL, t[j]);
        }
      }
    }
    for (i64 r = r0; r < rows; ++r) {
      i64 c = 0;
      for (; c < n; ++c) dst[r * NR + c] = load1<DT>(p + (r * rs + c * cs) * width) * scale;
      for (; c < NR; ++c) dst[r * NR + c] = 0.0f;
    }
  }
}

// Panels of src [rows, cols] * scale, `panel` floats apart; rows up to `padded` are zero.
inline void pack(float* dst, i64 panel, i64 dtype, const char* src, i64 rs, i64 cs, i64 rows, i64 cols, i64 padded,
                 float scale) {
  with_float(dtype, [&](auto dt) { pack_<dt>(dst, panel, src, rs, cs, rows, cols, scale); });
  if (padded > rows)
    for (i64 c0 = 0; c0 < cols; c0 += NR)
      std::memset(dst + c0 / NR * panel + rows * NR, 0, (padded - rows) * NR * sizeof(float));
}

// One panel of `rows` rows, whose n columns lie anywhere; elements of a column are rs apart.
template <i64 DT>
void pack_columns_(float* dst, const char* const* column, i64 rs, i64 rows, i64 n) {
  const i64 width = size_of(DT);
  i64 r0 = 0;
  for (; rs == 1 && r0 + VL <= rows; r0 += VL) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      vf t[VL];
#pragma GCC unroll 16
      for (int j = 0; j < VL; ++j)
        t[j] = h * VL + j < n ? loadv<DT>(column[h * VL + j] + r0 * width) : splat(0.0f);
      transpose(t);
#pragma GCC unroll 16
      for (int j = 0; j < VL; ++j) store(dst + (r0 + j) * NR + h * VL, t[j]);
    }
  }
  for (i64 r = r0; r < rows; ++r)
    for (i64 c = 0; c < NR; ++c) dst[r * NR + c] = c < n ? load1<DT>(column[c] + r * rs * width) : 0.0f;
}

// a * b + c with the rounding that `block` has: compilers fuse its products and sums wherever the machine can.
INLINE float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// C[MR, NR] (+)= A[MR, len] B[len, NR]. A's element (i, k) lies at a[i * RS + k * CS], and every CHUNK of k begins
// `hop` floats after the one before it (CHUNK 0: one chunk). B's rows are NR apart.
template <i64 RS, i64 CS, int CHUNK>
INLINE void block(const float* a, i64 hop, const float* b, float* c, i64 ldc, i64 len, bool add) {
  vf acc[MR][2];
#pragma GCC unroll 12
  for (int i = 0; i < MR; ++i) acc[i][0] = acc[i][1] = splat(0.0f);
  for (i64 k0 = 0; k0 < len; a += hop) {
    i64 n = len - k0;
    if (CHUNK && n > CHUNK) n = CHUNK;
    k0 += n;
    const float* ak = a;
#pragma GCC unroll 2
    for (i64 k = 0; k < n; ++k, ak += CS, b += NR) {
      const vf b0 = loadf(b), b1 = loadf(b + VL);
#pragma GCC unroll 12
      for (int i = 0; i < MR; ++i) {
        const vf x = splat(ak[i * RS]);
        acc[i][0] += x * b0;
        acc[i][1] += x * b1;
      }
    }
  }
  if (add) {
#pragma GCC unroll 12
    for (int i = 0; i < MR; ++i) {
      store(c + i * ldc, loadf(c + i * ldc) + acc[i][0]);
      store(c + i * ldc + VL, loadf(c + i * ldc + VL) + acc[i][1]);
    }
  } else {
#pragma GCC unroll 12
    for (int i = 0; i < MR; ++i) {
      store(c + i * ldc, acc[i][0]);
      store(c + i * ldc + VL, acc[i][1]);
    }
  }
}

// Rows `rs` and columns `cs` of elements from src [rows, cols] with row pitch ld, times scale; added to a float32
// destination if `add`.
inline void write(i64 dtype, char* dst, i64 rs, i64 cs, const float* src, i64 ld, i64 rows, i64 cols, float scale,
                  bool add) {
  if (add) {
    float* d = reinterpret_cast<float*>(dst);
    for (i64 r = 0; r < rows; ++r)
      for (i64 c = 0; c < cols; ++c) d[r * rs + c * cs] += src[r * ld + c] * scale;
    return;
  }
  with_float(dtype, [&](auto dt) {
    const i64 width = size_of(dt);
    for (i64 r = 0; r < rows; ++r) {
      char* row = dst + r * rs * width;
      i64 c = 0;
      if (cs == 1)
        for (; c + VL <= cols; c += VL) storev<dt>(row + c * width, loadf(src + r * ld + c) * splat(scale));
      for (; c < cols; ++c) store1<dt>(row + c * cs * width, src[r * ld + c] * scale);
    }
  });
}
