// What the parts of the spatial kernels share: their arguments, where everything lies in shared memory, rings.
#pragma once

#include "p3d.h"
#include "spatial_plan.h"
#include "tile.cuh"

namespace p3d {

struct Args {
    const char* x;              // [F, H, W, Ci]; of the gradient: g
    const char* z;              // gradient: [F, H, W, Ci] or nullptr
    const float* affine;        // [3, Ci] or nullptr
    const float* sums;          // gradient: [2, Ci] with z
    char* y;                    // [F, H, W, Co]
    const float* out_affine;    // forward: [3, Co] or nullptr
    const char* o;              // gradient: [F, H, W, Co] or nullptr
    const char* below;          // gradient: [F, H, W, Co] or nullptr
    const float* below_affine;  // gradient: [3, Co] with below
    float* partials;            // [R, 3, Co], or of the gradient [R, 2, Co]; or nullptr
    Raster raster;
    int in_channels, out_channels;
    int tiles;            // of positions
    int halo;             // positions of a tile in shared memory
    int plane;            // bytes of a plane of a halo tile, 16 mod 128: eight planes share no bank
    int buffers, stages;  // halo tiles, weight stages
};

// The outputs of tile t start at position tile_start + W + 2 of the raster: the centre tap of its first halo position.
template <int kN, bool kResident>
__device__ __forceinline__ uint32_t tile_start(int tile) {
    return uint32_t(tile) * (kResident ? 2 * kN : kN);
}

// Where everything lies in shared memory. Barriers come in pairs: filled, then emptied.
struct Shared {
    uint32_t weights, staging, halo, barriers;

    __device__ __forceinline__ Shared(const void* base, const Args& a, bool resident)
        : weights(shared_address(base)),
          staging(weights + a.stages * (resident ? 1 : 2) * kWeightBytes),
          halo(staging + 2 * kStageBytes),
          barriers(halo + a.buffers * 8 * a.plane) {}
    __device__ __forceinline__ uint32_t weights_full(int stage) const { return barriers + 16 * stage; }
    __device__ __forceinline__ uint32_t weights_empty(int stage) const { return barriers + 16 * stage + 8; }
    __device__ __forceinline__ uint32_t halo_full(int buffer) const { return barriers + 16 * (kMaxStages + buffer); }
    __device__ __forceinline__ uint32_t halo_empty(int buffer) const {
        return barriers + 16 * (kMaxStages + buffer) + 8;
    }
};

// Has the box at (i0, i1, i2, i3) brought to the second-level cache.
__device__ __forceinline__ void prefetch_box(const CUtensorMap& map, int i0, int i1, int i2, int i3) {
    asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1, %2, %3, %4}];" ::"l"(&map), "r"(i0),
                 "r"(i1), "r"(i2), "r"(i3)
                 : "memory");
}

// Stores a box to memory; what lies outside the tensor is left out.
__device__ __forceinline__ void store_box(const CUtensorMap& map, uint32_t source, int i0, int i1, int i2, int i3) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
                 "r"(source), "r"(i0), "r"(i1), "r"(i2), "r"(i3)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until all boxes that this thread stored have been read from shared memory.
__device__ __forceinline__ void store_wait() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

struct Slot {  // of a ring, with the parity of its turn
    int index = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void advance(int count) {
        if (++index == count) index = 0, parity ^= 1;
    }
};

__device__ __forceinline__ int halo_items(const Args& a) {  // of this block
    return (a.tiles - int(blockIdx.x) + int(gridDim.x) - 1) / int(gridDim.x) * (a.in_channels / kChunk);
}

struct HaloItem {  // one chunk of channels of one tile
    int tile, channel = 0;
    Slot slot;

    __device__ __forceinline__ void advance(const Args& a) {
        slot.advance(a.buffers);
        channel += kChunk;
        if (channel == a.in_channels) channel = 0, tile += gridDim.x;
    }
};

}  // namespace p3d
