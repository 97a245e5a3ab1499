// What a warp does together, once all its lanes are there.
#pragma once

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "counts.h"
#include "races.h"

namespace emulated {
namespace {

// What the lanes of the warp have brought with them.
template <class T>
struct Brought {
  T* of[LANES];

  Brought() {
    const Lane* lane = lanes + running_warp * LANES;
    for (int i = 0; i < LANES; i++) of[i] = static_cast<T*>(lane[i].data);
  }
  T& operator[](int lane) const { return *of[lane]; }
};

void shuffle(bool by_xor, const Place& place) {
  totals.shuffles++;
  const Brought<Shuffle> brought;
  u32 values[LANES];
  for (int lane = 0; lane < LANES; lane++) values[lane] = brought[lane].value;
  for (int lane = 0; lane < LANES; lane++) {
    Shuffle& data = brought[lane];
    if (data.lane < 0 || data.lane >= LANES)
      fail(running_warp * LANES + lane, place.line, place.file, "a shuffle %s %d: lanes are 0 to 31",
           by_xor ? "by mask" : "from lane", data.lane);
    data.result = values[by_xor ? lane ^ data.lane : data.lane];
  }
}

void any() {
  totals.votes++;
  const Brought<Shuffle> brought;
  u32 result = 0;
  for (int lane = 0; lane < LANES; lane++) result |= brought[lane].value;
  for (int lane = 0; lane < LANES; lane++) brought[lane].result = result;
}

void load_matrices_of_warp(bool transposed, const Place& place) {
  const Brought<Matrices> brought;
  u64 offsets[LANES];
  u16 elements[4][8][8];
  for (int lane = 0; lane < LANES; lane++) {
    const u32* row = brought[lane].row;
    offsets[lane] = check_shared(false, row, 16, running_warp * LANES + lane, true, place.line, place.file);
    memcpy(elements[lane / 8][lane % 8], row, 16);
  }
  if (given.count) count_instruction(kind_of(MATRIX_LOAD, 16, place.line, place.file), offsets, ~0u);
  for (int lane = 0; lane < LANES; lane++) {
    int row = lane / 4, column = lane % 4 * 2;
    for (int i = 0; i < 4; i++) {
      u16 low = transposed ? elements[i][column][row] : elements[i][row][column];
      u16 high = transposed ? elements[i][column + 1][row] : elements[i][row][column + 1];
      brought[lane].r[i] = low | static_cast<u32>(high) << 16;
    }
  }
}

// Eight halves, the low one of each word first.
void floats_of_halves(float (&out)[8], const u32* words) {
#ifdef __F16C__
  _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(words))));
#else
  for (int i = 0; i < 8; i++) out[i] = float_of_half(static_cast<u16>(words[i / 2] >> i % 2 * 16));
#endif
}

// d [ROWS, 8] += a [ROWS, DEPTH] @ b [DEPTH, 8]. Products are exact in double, and so are almost all sums; one rounding
// at the end.
template <int ROWS, int DEPTH>
void multiply(double (&d)[ROWS][8], const double (&a)[ROWS][DEPTH], const double (&b)[DEPTH][8]) {
  for (int row = 0; row < ROWS; row++)
    for (int k = 0; k < DEPTH; k++)
      for (int column = 0; column < 8; column++) d[row][column] += a[row][k] * b[k][column];
}

// PTX ISA 9.7.14.5.1. Lanes from 16 on have the lower half of the rows of a and d, and the right half of the columns of
// b.
void multiply_884_of_warp(bool a_col, bool b_row) {
  totals.multiply_884++;
  const Brought<Products> brought;
  for (int pair = 0; pair < 4; pair++) {
    double a[8][4], b[4][8], d[8][8];
    for (int i = 0; i < 8; i++) {
      int lane = pair * 4 + i % 4 + i / 4 * 16, in_quad = i % 4, half = i / 4 * 4;
      const Products& data = brought[lane];
      float halves[8];
      floats_of_halves(halves, data.halves);
      for (int k = 0; k < 4; k++) {
        (a_col ? a[half + k][in_quad] : a[half + in_quad][k]) = halves[k];
        (b_row ? b[in_quad][half + k] : b[k][half + in_quad]) = halves[4 + k];
      }
      for (int k = 0; k < 8; k++) d[(lane & 1) + (k & 2) + half][(k & 4) + (lane & 2) + (k & 1)] = data.d[k];
    }
    multiply(d, a, b);
    for (int i = 0; i < 8; i++) {
      int lane = pair * 4 + i % 4 + i / 4 * 16, half = i / 4 * 4;
      float* out = brought[lane].d;
      for (int k = 0; k < 8; k++)
        out[k] = static_cast<float>(d[(lane & 1) + (k & 2) + half][(k & 4) + (lane & 2) + (k & 1)]);
    }
  }
}

// PTX ISA 9.7.14.5.7 (m16n8k8).
void multiply_1688_of_warp() {
  totals.multiply_1688++;
  const Brought<Products> brought;
  double a[16][8], b[8][8], d[16][8];
  for (int lane = 0; lane < LANES; lane++) {
    const Products& data = brought[lane];
    int row = lane / 4, column = lane % 4 * 2;
    float halves[8];
    floats_of_halves(halves, data.halves);
    for (int i = 0; i < 4; i++) a[row + i / 2 * 8][column + i % 2] = halves[i];
    for (int i = 0; i < 2; i++) b[column + i][row] = halves[4 + i];
    for (int i = 0; i < 4; i++) d[row + i / 2 * 8][column + i % 2] = data.d[i];
  }
  multiply(d, a, b);
  for (int lane = 0; lane < LANES; lane++)
    for (int i = 0; i < 4; i++)
      brought[lane].d[i] = static_cast<float>(d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
}

void perform(int collective, const Place& place) {
  switch (collective) {
    case SYNC_WARP:
      totals.warp_barriers++;
      warps[running_warp].stamp = ++tick;
      return;
    case SHUFFLE_XOR:
    case SHUFFLE_FROM:
      return shuffle(collective == SHUFFLE_XOR, place);
    case ANY_OF_WARP:
      return any();
    case LOAD_MATRICES:
    case LOAD_MATRICES_TRANSPOSED:
      return load_matrices_of_warp(collective == LOAD_MATRICES_TRANSPOSED, place);
    case MULTIPLY_1688:
      return multiply_1688_of_warp();
    default:
      return multiply_884_of_warp((collective - MULTIPLY_884) & 2, (collective - MULTIPLY_884) & 1);
  }
}

}  // namespace
}  // namespace emulated
