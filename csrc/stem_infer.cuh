// Instructions of the stem's kernel: the warpgroup product with A in registers, a maximum that keeps NaN, registers.
#pragma once

#include "wgmma.cuh"

namespace p3d {

// d = a * b, or d += a * b where `add`, B being K-major. Register a[i] holds row 16 * warp + 8 * (i % 2) + lane / 4,
// columns 8 * (i / 2) + 2 * (lane % 4) + {0, 1}; accumulators lie as wgmma.cuh says. A0 to ADD are the numbers of the
// operands that follow the N / 2 accumulators.
#define P3D_STEM_WGMMA_ASM(N, TYPE, GROUPS, A0, A1, A2, A3, B, ADD)                                     \
    asm volatile("{.reg .pred add; setp.ne.b32 add, %" #ADD                                             \
                 ", 0;\n"                                                                               \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" P3D_TEXT_##GROUPS \
                 "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", add, 1, 1, 0;}"                 \
                 : P3D_OPS_##GROUPS                                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)))

#define P3D_STEM_WGMMA(N, GROUPS, A0, A1, A2, A3, B, ADD)                                                         \
    template <typename T>                                                                                         \
    __device__ __forceinline__ void wgmma_rows(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add) { \
        if constexpr (std::is_same_v<T, __nv_bfloat16>)                                                           \
            P3D_STEM_WGMMA_ASM(N, "bf16", GROUPS, A0, A1, A2, A3, B, ADD);                                        \
        else                                                                                                      \
            P3D_STEM_WGMMA_ASM(N, "f16", GROUPS, A0, A1, A2, A3, B, ADD);                                         \
    }

P3D_STEM_WGMMA(56, 7, 28, 29, 30, 31, 32, 33)
P3D_STEM_WGMMA(64, 8, 32, 33, 34, 35, 36, 37)
P3D_STEM_WGMMA(80, 10, 40, 41, 42, 43, 44, 45)

// Ends the old values of accumulators that a product is about to replace: without it their copies move with it.
template <int kCount>
__device__ __forceinline__ void wgmma_forget(float (&d)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "=f"(d[i]));
}

__device__ __forceinline__ float larger(float a, float b) {  // NaN where either is NaN
    float out;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
    return out;
}

// threadIdx.x where it is needed: what follows from it is not kept in registers from one turn of a loop to the next.
__device__ __forceinline__ int thread_here() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread;
}

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace p3d
