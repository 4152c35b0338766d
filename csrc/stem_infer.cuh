// What the kernels of the stem share: warpgroup products, a maximum that keeps NaN, registers, a ring, sizes.
#pragma once

#include <algorithm>

#include "p3d.h"
#include "spatial_plan.h"
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

// read(p): the elements from p on, whatever their type.
template <typename Read>
__device__ __forceinline__ void as_floats(const void* p, PixelType type, const Read& read) {
    if (type == PixelType::fp32)
        read(static_cast<const float*>(p));
    else if (type == PixelType::bf16)
        read(static_cast<const __nv_bfloat16*>(p));
    else
        read(static_cast<const __half*>(p));
}

template <int kRegisters>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kStages>
struct StageRing {  // a place in the ring, with the parity of its turn
    int index = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void advance() {
        if (++index == kStages) index = 0, parity ^= 1;
    }
};

// ---- Host.

struct StemSizes {
    int64_t out_height, out_width;  // of the convolution
    int64_t pooled_frames, pooled_height, pooled_width;
};

// Why the kernel `op` takes no such clip, whatever the pool; nullptr if it does.
inline const char* clip_why_not(const char* op, const StemShape& s) {
    using Long = long long;
    if (s.channels < 1 || s.channels > 4) return fail("%s: channels: expected 1 to 4, got %lld", op, Long(s.channels));
    if (std::min({s.clips, s.frames, s.height, s.width}) < 1 ||
        std::max({s.clips, s.frames, s.height, s.width}) >= 1 << 28)
        return fail("%s: clips, frames, height, width: expected 1 to 2^28 - 1, got %lld, %lld, %lld, %lld", op,
                    Long(s.clips), Long(s.frames), Long(s.height), Long(s.width));
    return nullptr;
}

// The sizes that follow from a clip's; or why the kernel `op` takes none such.
inline const char* stem_sizes(StemSizes& out, const char* op, const StemShape& s) {
    if (const char* reason = clip_why_not(op, s)) return reason;
    // Windows of `window` steps of 2: as many as fit, or one more where one begins inside.
    auto pooled = [&](int64_t size, int window, int padding) {
        int64_t left = size + 2 * padding * s.padded - window + !s.padded;
        return left < 0 ? 0 : left / 2 + 1;
    };
    out.out_height = (s.height + 1) / 2, out.out_width = (s.width + 1) / 2;
    out.pooled_frames = pooled(s.frames, 2, 0);
    out.pooled_height = pooled(out.out_height, 3, 1), out.pooled_width = pooled(out.out_width, 3, 1);
    if (std::min({out.pooled_frames, out.pooled_height, out.pooled_width}) < 1)
        return fail("%s: expected a clip that the pool fits", op);
    return nullptr;
}

}  // namespace p3d
