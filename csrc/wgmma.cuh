// Hopper's warpgroup matrix instruction: D[64, N] += A[64, 16] * B[16, N], both operands in shared memory.
//
// A descriptor says where an operand lies; `lbo` and `sbo` are its leading and stride byte offsets.
//   plain     8 rows of 16 bytes are one core matrix of 128 contiguous bytes; sbo leads to the next 8 rows, lbo to the
//             next 8 steps of k. Of an M- or N-major operand the core matrix is 8 steps of k of 16 bytes of rows or
//             columns; sbo leads to the next 16 bytes of those, lbo to the next 8 steps of k.
//   swizzled  rows of 128 bytes whose 16-byte pieces are permuted by the row's number mod 8, as TMA writes them; sbo
//             leads to the next 8 rows. A row is a row of A, or a step of k if A is M-major (kTransA = 1).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace p3d {

__device__ __forceinline__ uint64_t plain_descriptor(uint32_t address, uint32_t lbo, uint32_t sbo) {
    return uint64_t((address >> 4) & 0x3fff) | uint64_t(lbo >> 4) << 16 | uint64_t(sbo >> 4) << 32;
}

__device__ __forceinline__ uint64_t swizzled_descriptor(uint32_t address, uint32_t sbo) {
    return plain_descriptor(address, sbo, sbo) | uint64_t(1) << 62;
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending committed groups are still running.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of the accumulators across a fence or a wait.
template <int kCount>
__device__ __forceinline__ void wgmma_pin(float (&d)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <int kCount>
__device__ __forceinline__ void zero(float (&d)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) d[i] = 0;
    wgmma_pin(d);
}

// Accumulator d[4 * j + 2 * m + e] of a thread is row 16 * warp + 8 * m + lane / 4, column 8 * j + 2 * (lane % 4) + e.
// An instruction of width N has N / 8 groups of four accumulators; the tables below list the first g groups, as text
// (TEXT_g) and as operands (OPS_g).
#define P3D_OPS4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define P3D_TEXT_1 "%0, %1, %2, %3"
#define P3D_TEXT_2 P3D_TEXT_1 ", %4, %5, %6, %7"
#define P3D_TEXT_3 P3D_TEXT_2 ", %8, %9, %10, %11"
#define P3D_TEXT_4 P3D_TEXT_3 ", %12, %13, %14, %15"
#define P3D_TEXT_5 P3D_TEXT_4 ", %16, %17, %18, %19"
#define P3D_TEXT_6 P3D_TEXT_5 ", %20, %21, %22, %23"
#define P3D_TEXT_7 P3D_TEXT_6 ", %24, %25, %26, %27"
#define P3D_TEXT_8 P3D_TEXT_7 ", %28, %29, %30, %31"
#define P3D_TEXT_9 P3D_TEXT_8 ", %32, %33, %34, %35"
#define P3D_TEXT_10 P3D_TEXT_9 ", %36, %37, %38, %39"
#define P3D_TEXT_11 P3D_TEXT_10 ", %40, %41, %42, %43"
#define P3D_TEXT_12 P3D_TEXT_11 ", %44, %45, %46, %47"
#define P3D_TEXT_13 P3D_TEXT_12 ", %48, %49, %50, %51"
#define P3D_TEXT_14 P3D_TEXT_13 ", %52, %53, %54, %55"
#define P3D_TEXT_15 P3D_TEXT_14 ", %56, %57, %58, %59"
#define P3D_TEXT_16 P3D_TEXT_15 ", %60, %61, %62, %63"
#define P3D_TEXT_17 P3D_TEXT_16 ", %64, %65, %66, %67"
#define P3D_TEXT_18 P3D_TEXT_17 ", %68, %69, %70, %71"
#define P3D_TEXT_19 P3D_TEXT_18 ", %72, %73, %74, %75"
#define P3D_TEXT_20 P3D_TEXT_19 ", %76, %77, %78, %79"
#define P3D_TEXT_21 P3D_TEXT_20 ", %80, %81, %82, %83"
#define P3D_TEXT_22 P3D_TEXT_21 ", %84, %85, %86, %87"
#define P3D_TEXT_23 P3D_TEXT_22 ", %88, %89, %90, %91"
#define P3D_TEXT_24 P3D_TEXT_23 ", %92, %93, %94, %95"
#define P3D_TEXT_25 P3D_TEXT_24 ", %96, %97, %98, %99"
#define P3D_TEXT_26 P3D_TEXT_25 ", %100, %101, %102, %103"
#define P3D_TEXT_27 P3D_TEXT_26 ", %104, %105, %106, %107"
#define P3D_TEXT_28 P3D_TEXT_27 ", %108, %109, %110, %111"
#define P3D_TEXT_29 P3D_TEXT_28 ", %112, %113, %114, %115"
#define P3D_TEXT_30 P3D_TEXT_29 ", %116, %117, %118, %119"
#define P3D_TEXT_31 P3D_TEXT_30 ", %120, %121, %122, %123"
#define P3D_TEXT_32 P3D_TEXT_31 ", %124, %125, %126, %127"
#define P3D_OPS_1 P3D_OPS4(0)
#define P3D_OPS_2 P3D_OPS_1, P3D_OPS4(4)
#define P3D_OPS_3 P3D_OPS_2, P3D_OPS4(8)
#define P3D_OPS_4 P3D_OPS_3, P3D_OPS4(12)
#define P3D_OPS_5 P3D_OPS_4, P3D_OPS4(16)
#define P3D_OPS_6 P3D_OPS_5, P3D_OPS4(20)
#define P3D_OPS_7 P3D_OPS_6, P3D_OPS4(24)
#define P3D_OPS_8 P3D_OPS_7, P3D_OPS4(28)
#define P3D_OPS_9 P3D_OPS_8, P3D_OPS4(32)
#define P3D_OPS_10 P3D_OPS_9, P3D_OPS4(36)
#define P3D_OPS_11 P3D_OPS_10, P3D_OPS4(40)
#define P3D_OPS_12 P3D_OPS_11, P3D_OPS4(44)
#define P3D_OPS_13 P3D_OPS_12, P3D_OPS4(48)
#define P3D_OPS_14 P3D_OPS_13, P3D_OPS4(52)
#define P3D_OPS_15 P3D_OPS_14, P3D_OPS4(56)
#define P3D_OPS_16 P3D_OPS_15, P3D_OPS4(60)
#define P3D_OPS_17 P3D_OPS_16, P3D_OPS4(64)
#define P3D_OPS_18 P3D_OPS_17, P3D_OPS4(68)
#define P3D_OPS_19 P3D_OPS_18, P3D_OPS4(72)
#define P3D_OPS_20 P3D_OPS_19, P3D_OPS4(76)
#define P3D_OPS_21 P3D_OPS_20, P3D_OPS4(80)
#define P3D_OPS_22 P3D_OPS_21, P3D_OPS4(84)
#define P3D_OPS_23 P3D_OPS_22, P3D_OPS4(88)
#define P3D_OPS_24 P3D_OPS_23, P3D_OPS4(92)
#define P3D_OPS_25 P3D_OPS_24, P3D_OPS4(96)
#define P3D_OPS_26 P3D_OPS_25, P3D_OPS4(100)
#define P3D_OPS_27 P3D_OPS_26, P3D_OPS4(104)
#define P3D_OPS_28 P3D_OPS_27, P3D_OPS4(108)
#define P3D_OPS_29 P3D_OPS_28, P3D_OPS4(112)
#define P3D_OPS_30 P3D_OPS_29, P3D_OPS4(116)
#define P3D_OPS_31 P3D_OPS_30, P3D_OPS4(120)
#define P3D_OPS_32 P3D_OPS_31, P3D_OPS4(124)

#define P3D_WGMMA_ASM(N, TYPE, GROUPS, A, B, TRANS)                                                     \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" P3D_TEXT_##GROUPS \
                 "}, %" #A ", %" #B ", 1, 1, 1, %" #TRANS ", 0;"                                        \
                 : P3D_OPS_##GROUPS                                                                     \
                 : "l"(a), "l"(b), "n"(kTransA))

// wgmma<T, kTransA>(d, a, b): d += a * b, whose N follows from the number of accumulators. A, B and TRANS are the
// numbers of the operands that follow the N / 2 accumulators.
#define P3D_WGMMA(N, GROUPS, A, B, TRANS)                                              \
    template <typename T, int kTransA>                                                 \
    __device__ __forceinline__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b) { \
        if constexpr (std::is_same_v<T, __nv_bfloat16>)                                \
            P3D_WGMMA_ASM(N, "bf16", GROUPS, A, B, TRANS);                             \
        else                                                                           \
            P3D_WGMMA_ASM(N, "f16", GROUPS, A, B, TRANS);                              \
    }

P3D_WGMMA(32, 4, 16, 17, 18)
P3D_WGMMA(48, 6, 24, 25, 26)
P3D_WGMMA(64, 8, 32, 33, 34)
P3D_WGMMA(72, 9, 36, 37, 38)
P3D_WGMMA(80, 10, 40, 41, 42)
P3D_WGMMA(112, 14, 56, 57, 58)
P3D_WGMMA(120, 15, 60, 61, 62)
P3D_WGMMA(128, 16, 64, 65, 66)
P3D_WGMMA(136, 17, 68, 69, 70)
P3D_WGMMA(144, 18, 72, 73, 74)
P3D_WGMMA(152, 19, 76, 77, 78)
P3D_WGMMA(160, 20, 80, 81, 82)
P3D_WGMMA(168, 21, 84, 85, 86)
P3D_WGMMA(208, 26, 104, 105, 106)
P3D_WGMMA(216, 27, 108, 109, 110)
P3D_WGMMA(256, 32, 128, 129, 130)

// The same with A in registers, N = 64; kTransB: B is N-major. Register a[i] holds row 16 * warp + 8 * (i % 2) +
// lane / 4, columns 8 * (i / 2) + 2 * (lane % 4) + {0, 1}.
#define P3D_WGMMA_A_ASM(TYPE)                                                                \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" P3D_TEXT_8 \
                 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, %37;"                               \
                 : P3D_OPS_8                                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kTransB))

template <typename T, int kTransB>
__device__ __forceinline__ void wgmma(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
        P3D_WGMMA_A_ASM("bf16");
    else
        P3D_WGMMA_A_ASM("f16");
}

// wgmma_outer<T>(d, a, b): d += a * b of an M-major A and an N-major B, both in shared memory. wgmma_back: A K-major.
#define P3D_OUTER_WGMMA_ASM(N, TYPE, GROUPS, A, B, TRANS_A)                                             \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" P3D_TEXT_##GROUPS \
                 "}, %" #A ", %" #B ", 1, 1, 1, " #TRANS_A ", 1;"                                       \
                 : P3D_OPS_##GROUPS                                                                     \
                 : "l"(a), "l"(b))

#define P3D_OUTER_WGMMA(NAME, N, GROUPS, A, B, TRANS_A)                               \
    template <typename T>                                                             \
    __device__ __forceinline__ void NAME(float (&d)[N / 2], uint64_t a, uint64_t b) { \
        if constexpr (std::is_same_v<T, __nv_bfloat16>)                               \
            P3D_OUTER_WGMMA_ASM(N, "bf16", GROUPS, A, B, TRANS_A);                    \
        else                                                                          \
            P3D_OUTER_WGMMA_ASM(N, "f16", GROUPS, A, B, TRANS_A);                     \
    }

P3D_OUTER_WGMMA(wgmma_outer, 8, 1, 4, 5, 1)
P3D_OUTER_WGMMA(wgmma_outer, 56, 7, 28, 29, 1)
P3D_OUTER_WGMMA(wgmma_outer, 64, 8, 32, 33, 1)
P3D_OUTER_WGMMA(wgmma_outer, 112, 14, 56, 57, 1)
P3D_OUTER_WGMMA(wgmma_outer, 128, 16, 64, 65, 1)
P3D_OUTER_WGMMA(wgmma_outer, 168, 21, 84, 85, 1)
P3D_OUTER_WGMMA(wgmma_outer, 192, 24, 96, 97, 1)
P3D_OUTER_WGMMA(wgmma_outer, 256, 32, 128, 129, 1)
P3D_OUTER_WGMMA(wgmma_back, 64, 8, 32, 33, 0)
P3D_OUTER_WGMMA(wgmma_back, 128, 16, 64, 65, 0)

}  // namespace p3d
