// The primitives that the kernels for compute capability 7.0 and 7.5 are written in, as the device has them. No header
// is included: NVRTC compiles this with nothing beside it. attnfuse/testing/emulator/primitives.h has the same names
// for g++, checked and counted.
//
// Shared memory and global memory are read and written only by the functions below; what is called a collective is
// called by all lanes of a warp at the same place.
// Source: PTX ISA 8.5, chapters 9.7.9 (data movement), 9.7.14 (matrix multiply-accumulate).

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

#define DEVICE static __device__ __forceinline__
// At most `threads` threads a block; `blocks` blocks fit on a multiprocessor by registers.
#define KERNEL(threads, blocks) extern "C" __global__ __launch_bounds__(threads, blocks) void
#define UNROLL _Pragma("unroll")

// ------ threads

DEVICE int thread_index() { return threadIdx.x; }

DEVICE int block_index() { return blockIdx.x; }

DEVICE void sync_block() { __syncthreads(); }

// Orders the accesses of a warp's lanes to memory; shuffles and matrix instructions order nothing.
DEVICE void sync_warp() { __syncwarp(); }

DEVICE u32 shuffle_xor(u32 x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

DEVICE int shuffle_xor(int x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

DEVICE u32 shuffle_from(u32 x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }

DEVICE int shuffle_from(int x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }

DEVICE float shuffle_from(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }

DEVICE bool any_of_warp(bool x) { return __any_sync(0xffffffffu, x) != 0; }

// ------ numbers

DEVICE u32 bits_of(float x) { return __float_as_uint(x); }

DEVICE float float_of_bits(u32 x) { return __uint_as_float(x); }

DEVICE float infinity() { return float_of_bits(0x7f800000u); }

DEVICE float not_a_number() { return float_of_bits(0x7fffffffu); }

DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// The lesser and the greater of two numbers; of NaN and a number, the number.
DEVICE float least(float a, float b) { return fminf(a, b); }

DEVICE float greatest(float a, float b) { return fmaxf(a, b); }

DEVICE float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DEVICE float log2_approximate(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DEVICE float rsqrt_approximate(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#if __CUDA_ARCH__ >= 750
DEVICE float tanh_approximate(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif

// To nearest, ties to even; what is too large becomes an infinity.
DEVICE u16 half_of_float(float x) {
  u16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}

DEVICE float float_of_half(u16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}

DEVICE u32 half_pair(float low, float high) {
  u32 y;
  asm("mov.b32 %0, {%1, %2};" : "=r"(y) : "h"(half_of_float(low)), "h"(half_of_float(high)));
  return y;
}

DEVICE float float_of_bfloat16(u16 x) { return float_of_bits(static_cast<u32>(x) << 16); }

// ------ shared memory

DEVICE u32* shared_memory() {
  extern __shared__ U4 attnfuse_shared[];
  return reinterpret_cast<u32*>(attnfuse_shared);
}

DEVICE u32 load_shared(const u32* p) { return *p; }

DEVICE U2 load_shared2(const u32* p) { return *reinterpret_cast<const U2*>(p); }

DEVICE U4 load_shared4(const u32* p) { return *reinterpret_cast<const U4*>(p); }

DEVICE float load_shared_float(const u32* p) { return float_of_bits(*p); }

DEVICE float load_shared_float(const float* p) { return *p; }

DEVICE void store_shared(u32* p, u32 x) { *p = x; }

DEVICE void store_shared2(u32* p, U2 x) { *reinterpret_cast<U2*>(p) = x; }

DEVICE void store_shared4(u32* p, U4 x) { *reinterpret_cast<U4*>(p) = x; }

DEVICE void store_shared_float(u32* p, float x) { *p = bits_of(x); }

DEVICE void store_shared_float(float* p, float x) { *p = x; }

#if __CUDA_ARCH__ >= 750
DEVICE u32 address_in_shared(const void* p) {
  u32 address;
  asm("{.reg .u64 wide; cvta.to.shared.u64 wide, %1; cvt.u32.u64 %0, wide;}" : "=r"(address) : "l"(p));
  return address;
}

// Four matrices of 8 x 8 halves. Lane l gives the address of row l % 8 of matrix l / 8, a multiple of 16 bytes, and
// gets from matrix i in r[i] the elements (l / 4, l % 4 * 2) and the one right of it.
DEVICE void load_matrices(u32 (&r)[4], const u32* row) {
  // the compiler must not move it across stores and barriers
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address_in_shared(row))
               : "memory");
}

// As load_matrices, of each matrix's transpose: the elements (l % 4 * 2, l / 4) and the one below it.
DEVICE void load_matrices_transposed(u32 (&r)[4], const u32* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address_in_shared(row))
               : "memory");
}
#endif

// ------ global memory

template <int BYTES>
struct ReadOnly;

template <>
struct ReadOnly<1> {
  template <class T>
  DEVICE T load(const T* p) {
    // there are no registers of 8 bits
    u32 x;
    asm("ld.global.nc.u8 %0, [%1];" : "=r"(x) : "l"(p));
    return static_cast<T>(x);
  }
};

template <>
struct ReadOnly<2> {
  template <class T>
  DEVICE T load(const T* p) {
    u16 x;
    asm("ld.global.nc.u16 %0, [%1];" : "=h"(x) : "l"(p));
    return static_cast<T>(x);
  }
};

template <>
struct ReadOnly<4> {
  DEVICE float load(const float* p) {
    float x;
    asm("ld.global.nc.f32 %0, [%1];" : "=f"(x) : "l"(p));
    return x;
  }
  template <class T>
  DEVICE T load(const T* p) {
    u32 x;
    asm("ld.global.nc.u32 %0, [%1];" : "=r"(x) : "l"(p));
    return static_cast<T>(x);
  }
};

template <>
struct ReadOnly<8> {
  DEVICE double load(const double* p) {
    double x;
    asm("ld.global.nc.f64 %0, [%1];" : "=d"(x) : "l"(p));
    return x;
  }
  template <class T>
  DEVICE T load(const T* p) {
    u64 x;
    asm("ld.global.nc.u64 %0, [%1];" : "=l"(x) : "l"(p));
    return static_cast<T>(x);
  }
};

template <>
struct ReadOnly<16> {
  DEVICE U4 load(const U4* p) {
    U4 x;
    asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p));
    return x;
  }
};

// What nobody writes while the kernel runs: numbers of 1, 2, 4 and 8 bytes, and U4.
template <class T>
DEVICE T load_global(const T* p) {
  return ReadOnly<sizeof(T)>::load(p);
}

// What the kernel may write as well.
template <class T>
DEVICE T load_global_changing(const T* p) {
  return *p;
}

template <class T>
DEVICE void store_global(T* p, T x) {
  *p = x;
}

DEVICE void add_global(float* p, float x) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(p), "f"(x) : "memory");
}

DEVICE void max_global(int* p, int x) {
  asm volatile("red.relaxed.gpu.global.max.s32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}

// ------ matrices

#define MULTIPLY_884(layouts)                                                                                       \
  asm volatile("mma.sync.aligned.m8n8k4." layouts                                                                   \
               ".f32.f16.f16.f32 {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9}, {%10, %11}, {%0, %1, %2, %3, %4, %5, " \
               "%6, %7};"                                                                                           \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])     \
               : "r"(a0), "r"(a1), "r"(b0), "r"(b1))

// d += a @ b for four pairs of quads, lanes {0-3, 16-19}, {4-7, 20-23} and so on, each with an a [8, 4], b [4, 8] and d
// [8, 8] of its own. A_COL: a is given by columns (.col) and not by rows; B_ROW: b by rows (.row) and not by columns.
template <bool A_COL, bool B_ROW>
DEVICE void multiply_884(float (&d)[8], u32 a0, u32 a1, u32 b0, u32 b1) {
  if constexpr (A_COL && B_ROW)
    MULTIPLY_884("col.row");
  else if constexpr (A_COL)
    MULTIPLY_884("col.col");
  else if constexpr (B_ROW)
    MULTIPLY_884("row.row");
  else
    MULTIPLY_884("row.col");
}

#undef MULTIPLY_884

#if __CUDA_ARCH__ >= 750
// d [16, 8] += a [16, 8] @ b [8, 8], a by rows and b by columns.
DEVICE void multiply_1688(float (&d)[4], u32 a0, u32 a1, u32 b0) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(b0));
}
#endif
