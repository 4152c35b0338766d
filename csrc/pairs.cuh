// Accumulators of two blocks that are a cluster, added up before they are written: each block sends the half that the
// other keeps. Threads of both blocks hold the same elements, so that 16 bytes a lane travel as they lie in registers.
#pragma once

#include <cstdint>

#include "tile.cuh"

namespace p3d {

__device__ __forceinline__ int pair_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return int(rank);
}

// All threads of both blocks meet; each sees what the others wrote.
__device__ __forceinline__ void pair_sync() {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The address of the same place in the other block.
__device__ __forceinline__ uint32_t pair_address(uint32_t address, int rank) {
    uint32_t there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank ^ 1));
    return there;
}

__device__ __forceinline__ void pair_store(uint32_t there, float4 v) {
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(there), "f"(v.x), "f"(v.y), "f"(v.z),
                 "f"(v.w)
                 : "memory");
}

__device__ __forceinline__ float4 pair_load(uint32_t here) {  // of what the other block stored
    uint4 v = load_shared(here);
    return {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
}

// Sends block 1 the upper half of this thread's accumulators, block 0 the lower, in fours `stride` bytes apart.
template <int kSize>
__device__ __forceinline__ void pair_send(const float (&d)[kSize], int rank, uint32_t there, int stride) {
    static_assert(kSize % 8 == 0, "halves in fours");
#pragma unroll
    for (int i = 0; i < kSize / 8; ++i) {
        float v[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) v[k] = rank ? d[4 * i + k] : d[kSize / 2 + 4 * i + k];
        pair_store(there + i * stride, float4{v[0], v[1], v[2], v[3]});
    }
}

// Adds what the other block sent to the half that this one keeps: put(i, sum) of the i-th four of all.
template <int kSize, typename Put>
__device__ __forceinline__ void pair_add(const float (&d)[kSize], int rank, uint32_t here, int stride, const Put& put) {
#pragma unroll
    for (int i = 0; i < kSize / 8; ++i) {
        float4 sent = pair_load(here + i * stride);
        float v[4] = {sent.x, sent.y, sent.z, sent.w};
#pragma unroll
        for (int k = 0; k < 4; ++k) v[k] += rank ? d[kSize / 2 + 4 * i + k] : d[4 * i + k];
        put(i + rank * (kSize / 8), float4{v[0], v[1], v[2], v[3]});
    }
}

}  // namespace p3d
