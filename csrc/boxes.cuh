// Pieces of the kernels whose tiles are boxes of positions along four axes (conv_infer.cu, conv_tiles.cu): copies of
// such boxes, tensor maps, and sums that the blocks of a cluster share.
#pragma once

#include "conv_infer_plan.h"
#include "rows.cuh"

namespace p3d {

// ---- Clusters.

__device__ __forceinline__ int cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return int(rank);
}

// The address of the same place in another block of the cluster.
__device__ __forceinline__ uint32_t address_in(uint32_t address, int rank) {
    uint32_t there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}

// Writes to another block's shared memory; the bytes count towards its barrier.
__device__ __forceinline__ void send(uint32_t target, float a, float b, uint32_t barrier) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(target), "f"(a),
        "f"(b), "r"(barrier)
        : "memory");
}

// Waits for what other blocks sent.
__device__ __forceinline__ void barrier_wait_cluster(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{.reg .pred done;\n"
        "retry: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra retry;}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// Sends 64 rows of partial sums, pair(j, m) the accumulators 4 j + 2 m and the next, to the blocks of the cluster that
// add them up: each has kRows / splits rows of the tile, and in `staging` one such part of each block.
template <int kRows, int kColumns, typename Pair>
__device__ __forceinline__ void send_partials(uint32_t staging, uint32_t barrier, int splits, int rank, int warp,
                                              int lane, const Pair& pair) {
    constexpr int kPitch = conv_partial_pitch(kColumns);
    int rows = kRows / splits;  // of a block, a multiple of 8
#pragma unroll
    for (int m = 0; m < 2; ++m) {
        int row = 16 * warp + 8 * m, to = row / rows;
        uint32_t there = address_in(barrier, to);
        uint32_t target =
            address_in(staging, to) + 4 * ((rank * rows + row - to * rows + lane / 4) * kPitch + 2 * (lane % 4));
#pragma unroll
        for (int j = 0; j < kColumns / 8; ++j) {
            float2 v = pair(j, m);
            send(target + 32 * j, v.x, v.y, there);
        }
    }
}

// ---- Boxes of positions.

__device__ __forceinline__ void copy_positions(uint32_t target, const CUtensorMap& map, uint32_t barrier, int channel,
                                               int i0, int i1, int i2, int i3) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(target),
        "l"(&map), "r"(barrier), "r"(channel), "r"(i0), "r"(i1), "r"(i2), "r"(i3)
        : "memory");
}

// To the second-level cache.
__device__ __forceinline__ void prefetch_positions(const CUtensorMap& map, int channel, const int (&at)[4]) {
    asm volatile("cp.async.bulk.prefetch.tensor.5d.L2.global.tile [%0, {%1, %2, %3, %4, %5}];" ::"l"(&map),
                 "r"(channel), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
                 : "memory");
}

__device__ __forceinline__ void store_positions(const CUtensorMap& map, uint32_t source, int channel,
                                                const int (&at)[4]) {
    asm volatile(
        "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(&map),
        "r"(source), "r"(channel), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
        : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// ---- Host.

inline const char* positions_map(const char* op, CUtensorMap& map, const void* base, DType dtype, const ConvView& view,
                                 int64_t channels, const int (&box)[4]) {
    cuuint64_t sizes[5] = {cuuint64_t(channels)}, strides[4];
    cuuint32_t boxes[5] = {kChunk};
    for (int i = 0; i < 4; ++i) {
        sizes[i + 1] = cuuint64_t(view.size[i]);
        strides[i] = cuuint64_t(2 * channels * view.stride[i]);
        boxes[i + 1] = cuuint32_t(box[i]);
    }
    const char* start = static_cast<const char*>(base) + 2 * channels * view.offset;
    return tensor_map(op, map, start, dtype, 5, sizes, strides, boxes);
}

}  // namespace p3d
