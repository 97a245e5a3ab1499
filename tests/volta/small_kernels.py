"""Kernels that are small and have what the tests look for."""

#: d += a @ b of one warp, read from global memory, with the instruction of either chip.
PRODUCT = """
struct Problem { const unsigned* a; float* d; int rounds; };

extern "C" __global__ void __launch_bounds__(32) product(const Problem p) {
    float d[8] = {};
    const unsigned* a = p.a + 4 * threadIdx.x;
    for (int i = 0; i < p.rounds; ++i, a += 128) {
#if __CUDA_ARCH__ == 700
        asm volatile("mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9}, {%10,%11}, "
            "{%0,%1,%2,%3,%4,%5,%6,%7};" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
            "+f"(d[7]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]));
#else
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]));
#endif
    }
    for (int i = 0; i < 8; ++i) p.d[8 * threadIdx.x + i] = d[i];
}
"""
#: More numbers are alive than there are registers.
CROWDED = """
struct Problem { const float* x; float* y; };

extern "C" __global__ void __launch_bounds__(1024) crowded(const Problem p) {
    __shared__ float kept[256];
    float x[96];
#pragma unroll
    for (int i = 0; i < 96; ++i) x[i] = p.x[i * 1024 + threadIdx.x];
    kept[threadIdx.x % 256] = x[0];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 96; ++i) p.y[i * 1024 + threadIdx.x] = x[i] * x[95 - i] + kept[i];
}

extern "C" __global__ void copied(const Problem p) { p.y[threadIdx.x] = p.x[threadIdx.x]; }
"""
