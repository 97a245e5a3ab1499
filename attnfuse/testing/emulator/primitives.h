// The primitives of kernels/volta/device.cuh for g++ and clang++, checked and counted: a kernel is compiled with this
// included before it, and linked with the library of machine.cpp, which runs its threads. attnfuse/testing/emulated.py
// does both.
//
// Every access gives the line that it stands on by default arguments. Accesses are checked before they happen, so that
// a wrong address ends the run with a message and not the process.
#pragma once

// libstdc++'s own headers of these names include most of the library, which costs more time than a small kernel
#define _GLIBCXX_INCLUDE_NEXT_C_HEADERS
#include <math.h>
#include <stdlib.h>
#undef _GLIBCXX_INCLUDE_NEXT_C_HEADERS

#ifndef __CUDA_ARCH__
#define __CUDA_ARCH__ 750
#endif

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

struct alignas(8) U2 {
  u32 x, y;
};

struct alignas(16) U4 {
  u32 x, y, z, w;
};

#define DEVICE static inline
#define KERNEL(threads, blocks)                                                                                \
  static_assert((threads) > 0 && (threads) <= 1024 && (threads) % 32 == 0 && (blocks) > 0, "bounds of a launch"); \
  extern "C" void
#define UNROLL

namespace emulated {

enum Collective : int {
  ENDED,
  SYNC_BLOCK,
  SYNC_WARP,
  SHUFFLE_XOR,
  SHUFFLE_FROM,
  ANY_OF_WARP,
  LOAD_MATRICES,
  LOAD_MATRICES_TRANSPOSED,
  MULTIPLY_1688,
  MULTIPLY_884,  // and the three after it: A_COL * 2 + B_ROW is added
};

enum Access : int {
  SHARED_LOAD,
  SHARED_STORE,
  GLOBAL_LOAD,
  GLOBAL_LOAD_CHANGING,
  GLOBAL_STORE,
  GLOBAL_ATOMIC,
  MATRIX_LOAD,
};

// The thread that runs.
struct Now {
  int thread, block;
  unsigned char* shared;
  u64 exp2;
};

// What the host gives for one launch; emulated.py has the same.
struct Buffer {
  u64 address, bytes;
  // One byte for each element: 1 for what may be read, 2 more for what may be written; null if all of it is alike.
  const unsigned char* inside;
  u32 element_bytes, writable;
  int index;  // that messages give
};

struct Launch {
  int blocks, threads;
  u64 shared_bytes, seed, limit;
  const Buffer* buffers;
  int buffer_count, track, count;
};

// What the library of machine.cpp has.
#pragma GCC visibility push(default)

extern Now now;

// Runs the other lanes until all are here, then does what the collective does. `data` is one of the structs below.
void meet(int collective, void* data, int line, const char* file);
void shared(int access, const void* p, int bytes, int line, const char* file);
void global(int access, const void* p, int bytes, int line, const char* file);

int launch(const Launch& launch, void (*start)(const void*), const void* argument);
int refuse(const char* kernel, const char* what, u64 given, u64 wanted);

#pragma GCC visibility pop

struct Shuffle {
  u32 value;
  int lane;
  u32 result;
};

struct Matrices {
  const u32* row;
  u32* r;
};

struct Products {
  float* d;
  u32 halves[4];  // of a, then of b
};

template <class P>
int launch_checked(const char* kernel, void (*)(P), void (*start)(const void*), int most_threads, const Launch& given,
                   const void* argument, u64 argument_bytes) {
  if (argument_bytes != sizeof(P)) return refuse(kernel, "bytes of its argument", argument_bytes, sizeof(P));
  if (given.threads > most_threads) return refuse(kernel, "threads a block, at most", given.threads, most_threads);
  return launch(given, start, argument);
}

template <class P>
const P& argument_of(void (*)(P), const void* argument) {
  return *static_cast<const P*>(argument);
}

}  // namespace emulated

#define AT int line = __builtin_LINE(), const char* file = __builtin_FILE()

// ------ threads

DEVICE int thread_index() { return emulated::now.thread; }

DEVICE int block_index() { return emulated::now.block; }

DEVICE void sync_block(AT) { emulated::meet(emulated::SYNC_BLOCK, nullptr, line, file); }

DEVICE void sync_warp(AT) { emulated::meet(emulated::SYNC_WARP, nullptr, line, file); }

DEVICE float float_of_bits(u32 x) {
  float y;
  __builtin_memcpy(&y, &x, 4);
  return y;
}

DEVICE u32 bits_of(float x) {
  u32 y;
  __builtin_memcpy(&y, &x, 4);
  return y;
}

DEVICE u32 shuffle_xor(u32 x, int mask, AT) {
  emulated::Shuffle data{x, mask, 0};
  emulated::meet(emulated::SHUFFLE_XOR, &data, line, file);
  return data.result;
}

DEVICE int shuffle_xor(int x, int mask, AT) { return shuffle_xor(static_cast<u32>(x), mask, line, file); }

DEVICE float shuffle_xor(float x, int mask, AT) { return float_of_bits(shuffle_xor(bits_of(x), mask, line, file)); }

DEVICE u32 shuffle_from(u32 x, int lane, AT) {
  emulated::Shuffle data{x, lane, 0};
  emulated::meet(emulated::SHUFFLE_FROM, &data, line, file);
  return data.result;
}

DEVICE int shuffle_from(int x, int lane, AT) { return shuffle_from(static_cast<u32>(x), lane, line, file); }

DEVICE float shuffle_from(float x, int lane, AT) { return float_of_bits(shuffle_from(bits_of(x), lane, line, file)); }

DEVICE bool any_of_warp(bool x, AT) {
  emulated::Shuffle data{x, 0, 0};
  emulated::meet(emulated::ANY_OF_WARP, &data, line, file);
  return data.result != 0;
}

// ------ numbers

DEVICE float infinity() { return __builtin_inff(); }

DEVICE float not_a_number() { return float_of_bits(0x7fffffffu); }

DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }

DEVICE float least(float a, float b) { return fminf(a, b); }

DEVICE float greatest(float a, float b) { return fmaxf(a, b); }

namespace emulated {

// Subnormal numbers count as zero, as .ftz says.
DEVICE float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }

}  // namespace emulated

DEVICE float exp2_approximate(float x) {
  emulated::now.exp2++;
  return emulated::flushed(exp2f(emulated::flushed(x)));
}

DEVICE float log2_approximate(float x) { return log2f(emulated::flushed(x)); }

DEVICE float rsqrt_approximate(float x) { return 1.0f / sqrtf(emulated::flushed(x)); }

#if __CUDA_ARCH__ >= 750
// The device's is wrong by up to 2^-11 of it; cutting bits off leaves an error of that size here as well.
DEVICE float tanh_approximate(float x) {
  float y = tanhf(x);
  return y != y ? y : float_of_bits(bits_of(y) & 0xfffff000u);
}
#endif

DEVICE u16 half_of_float(float x) {
  u32 bits = bits_of(x), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return 0x7fff;
  // from 65520 on the nearest is beyond the greatest, 65504
  if (size >= 0x477ff000u) return sign | 0x7c00u;
  // below 2^-14 halves are 2^-24 apart, as floats between 0.5 and 1 are
  if (size < 0x38800000u) return sign | (bits_of(float_of_bits(size) + 0.5f) - 0x3f000000u);
  return sign | ((size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13);
}

DEVICE float float_of_half(u16 x) {
  u32 sign = static_cast<u32>(x & 0x8000u) << 16, size = x & 0x7fffu;
  if (size > 0x7c00u) return float_of_bits(0x7fffffffu);
  if (size == 0x7c00u) return float_of_bits(sign | 0x7f800000u);
  if (size < 0x400u) return float_of_bits(sign | bits_of(static_cast<float>(static_cast<int>(size)) * 0x1p-24f));
  return float_of_bits(sign | ((size << 13) + 0x38000000u));
}

DEVICE u32 half_pair(float low, float high) {
  return half_of_float(low) | static_cast<u32>(half_of_float(high)) << 16;
}

DEVICE float float_of_bfloat16(u16 x) { return float_of_bits(static_cast<u32>(x) << 16); }

// ------ shared memory

DEVICE u32* shared_memory() { return reinterpret_cast<u32*>(emulated::now.shared); }

namespace emulated {

template <class T>
DEVICE T load_shared_as(const void* p, int line, const char* file) {
  shared(SHARED_LOAD, p, sizeof(T), line, file);
  T x;
  __builtin_memcpy(&x, p, sizeof(T));
  return x;
}

template <class T>
DEVICE void store_shared_as(void* p, const T& x, int line, const char* file) {
  shared(SHARED_STORE, p, sizeof(T), line, file);
  __builtin_memcpy(p, &x, sizeof(T));
}

}  // namespace emulated

DEVICE u32 load_shared(const u32* p, AT) { return emulated::load_shared_as<u32>(p, line, file); }

DEVICE U2 load_shared2(const u32* p, AT) { return emulated::load_shared_as<U2>(p, line, file); }

DEVICE U4 load_shared4(const u32* p, AT) { return emulated::load_shared_as<U4>(p, line, file); }

DEVICE float load_shared_float(const u32* p, AT) { return emulated::load_shared_as<float>(p, line, file); }

DEVICE float load_shared_float(const float* p, AT) { return emulated::load_shared_as<float>(p, line, file); }

DEVICE void store_shared(u32* p, u32 x, AT) { emulated::store_shared_as(p, x, line, file); }

DEVICE void store_shared2(u32* p, U2 x, AT) { emulated::store_shared_as(p, x, line, file); }

DEVICE void store_shared4(u32* p, U4 x, AT) { emulated::store_shared_as(p, x, line, file); }

DEVICE void store_shared_float(u32* p, float x, AT) { emulated::store_shared_as(p, x, line, file); }

DEVICE void store_shared_float(float* p, float x, AT) { emulated::store_shared_as(p, x, line, file); }

#if __CUDA_ARCH__ >= 750
DEVICE void load_matrices(u32 (&r)[4], const u32* row, AT) {
  emulated::Matrices data{row, r};
  emulated::meet(emulated::LOAD_MATRICES, &data, line, file);
}

DEVICE void load_matrices_transposed(u32 (&r)[4], const u32* row, AT) {
  emulated::Matrices data{row, r};
  emulated::meet(emulated::LOAD_MATRICES_TRANSPOSED, &data, line, file);
}
#endif

// ------ global memory

template <class T>
DEVICE T load_global(const T* p, AT) {
  emulated::global(emulated::GLOBAL_LOAD, p, sizeof(T), line, file);
  return *p;
}

template <class T>
DEVICE T load_global_changing(const T* p, AT) {
  emulated::global(emulated::GLOBAL_LOAD_CHANGING, p, sizeof(T), line, file);
  return *p;
}

template <class T>
DEVICE void store_global(T* p, T x, AT) {
  emulated::global(emulated::GLOBAL_STORE, p, sizeof(T), line, file);
  *p = x;
}

DEVICE void add_global(float* p, float x, AT) {
  emulated::global(emulated::GLOBAL_ATOMIC, p, sizeof(float), line, file);
  *p += x;
}

DEVICE void max_global(int* p, int x, AT) {
  emulated::global(emulated::GLOBAL_ATOMIC, p, sizeof(int), line, file);
  if (*p < x) *p = x;
}

// ------ matrices

template <bool A_COL, bool B_ROW>
DEVICE void multiply_884(float (&d)[8], u32 a0, u32 a1, u32 b0, u32 b1, AT) {
  emulated::Products data{d, {a0, a1, b0, b1}};
  emulated::meet(emulated::MULTIPLY_884 + A_COL * 2 + B_ROW, &data, line, file);
}

#if __CUDA_ARCH__ >= 750
DEVICE void multiply_1688(float (&d)[4], u32 a0, u32 a1, u32 b0, AT) {
  emulated::Products data{d, {a0, a1, b0, 0}};
  emulated::meet(emulated::MULTIPLY_1688, &data, line, file);
}
#endif

#undef AT
