// The producer's part of the spatial kernels: halo tiles, made ready to multiply, and weights.
#pragma once

#include "spatial_tile.cuh"

namespace p3d {

// kLoaders threads copy halo tiles; a thread has one octet of channels and every (kLoaders / 8)-th position, so it
// normalises what it has copied itself. Copies run `buffers - 2` items ahead of that.
template <typename T, int kN, bool kResident, Pass kPass, int kLoaders>
__device__ __forceinline__ void produce_halo(const Args& a, const Shared& shared, int thread) {
    int octet = thread % 8, first = thread / 8;
    int items = halo_items(a);
    int ahead = a.buffers - 2;
    HaloItem copy{int(blockIdx.x)}, finish{int(blockIdx.x)};
    auto place = [&](const HaloItem& item) { return shared.halo + (item.slot.index * 8 + octet) * a.plane; };
    for (int i = 0; i < items + ahead; ++i) {
        if (i < items) {
            barrier_wait(shared.halo_empty(copy.slot.index), copy.slot.parity ^ 1);
            const char* source = a.x + 2 * (copy.channel + 8 * octet);
            uint32_t start = tile_start<kN, kResident>(copy.tile), target = place(copy);
#pragma unroll 4
            for (int p = first; p < a.halo; p += kLoaders / 8) {
                int pixel = a.raster.pixel(start + p);
                copy_16(target + 16 * p, source + 2 * int64_t(max(pixel, 0)) * a.in_channels, pixel >= 0);
            }
            copy.advance(a);
        }
        copy_commit();
        if (i < ahead) continue;
        copy_wait(ahead);
        if (kPass == Pass::forward && a.affine) {
            Affine8 affine;
            affine.load(a.affine, finish.channel + 8 * octet, a.in_channels);
            uint32_t start = tile_start<kN, kResident>(finish.tile), target = place(finish);
#pragma unroll 2
            for (int p = first; p < a.halo; p += kLoaders / 8) {
                if (a.raster.pixel(start + p) < 0) continue;  // padding is zero after normalisation too
                auto* v = static_cast<uint4*>(__cvta_shared_to_generic(target + 16 * p));
                *v = affine.bn_relu<T>(*v);
            }
        }
        fence_proxy_async();
        barrier_arrive(shared.halo_full(finish.slot.index));
        finish.advance(a);
    }
}

// Prologue of the gradient: both tensors come through registers, whose latency is that of the second-level cache: the
// lines of an item are called there while the one before it is worked on. A thread has four channels.
template <typename T, int kN, bool kResident, int kLoaders>
__device__ __forceinline__ void produce_gradient(const Args& a, const Shared& shared, int thread) {
    constexpr int kBatch = 3, kStep = kLoaders / 16;
    int quad = thread % 16, first = thread / 16;
    auto call = [&](const HaloItem& item) {
        uint32_t start = tile_start<kN, kResident>(item.tile);
#pragma unroll 1
        for (int p = thread; p < a.halo; p += kLoaders) {
            int pixel = a.raster.pixel(start + p);
            int64_t offset = 2 * (int64_t(pixel) * a.in_channels + item.channel);
            if (pixel >= 0) prefetch(a.x + offset), prefetch(a.z + offset);
        }
    };
    HaloItem item{int(blockIdx.x)};
    call(item);
    while (item.tile < a.tiles) {
        int channel = item.channel + 4 * quad;
        uint32_t start = tile_start<kN, kResident>(item.tile), end = start + a.halo;
        uint32_t full = shared.halo_full(item.slot.index);
        uint32_t target = shared.halo + (item.slot.index * 8 + quad / 2) * a.plane + quad % 2 * 8 - 16 * start;
        barrier_wait(shared.halo_empty(item.slot.index), item.slot.parity ^ 1);
        item.advance(a);
        if (item.tile < a.tiles) call(item);
        Gradient4 gradient;
        gradient.load(a.affine, a.sums, channel, a.in_channels);
#pragma unroll 1
        for (uint32_t begin = start + first; begin < end; begin += kBatch * kStep) {
            uint2 g[kBatch], z[kBatch];
            bool real[kBatch];
#pragma unroll
            for (int k = 0; k < kBatch; ++k) {
                uint32_t position = begin + k * kStep;
                int pixel = a.raster.pixel(position);
                real[k] = pixel >= 0 && position < end;
                int64_t offset = 2 * (int64_t(pixel) * a.in_channels + channel);
                if (real[k]) load_once(g[k], a.x + offset), load_once(z[k], a.z + offset);
            }
#pragma unroll
            for (int k = 0; k < kBatch; ++k) {
                uint32_t position = begin + k * kStep;
                uint2 dz = real[k] ? gradient.bn_bwd<T>(g[k], z[k]) : uint2{};  // padding is zero after it
                if (position < end) store_shared(target + 16 * position, dz);
            }
        }
        fence_proxy_async();
        barrier_arrive(full);
    }
}

// One thread: the box of tap and chunk for one warpgroup. For the gradient, the map's channels are the couts here.
template <Pass kPass>
__device__ __forceinline__ void copy_weights(uint32_t target, const CUtensorMap& map, uint32_t barrier, int channel,
                                             int tap, int cout) {
    if (kPass == Pass::gradient)
        copy_box(target, map, barrier, cout, kTaps - 1 - tap, channel);
    else
        copy_box(target, map, barrier, channel, tap, cout);
}

template <Pass kPass>
__device__ __forceinline__ void produce_weights(const Args& a, const Shared& shared, const CUtensorMap& map) {
    Slot stage;
    for (int tile = blockIdx.x; tile < a.tiles; tile += gridDim.x)
        for (int channel = 0; channel < a.in_channels; channel += kChunk)
            for (int tap = 0; tap < kTaps; ++tap, stage.advance(a.stages)) {
                barrier_wait(shared.weights_empty(stage.index), stage.parity ^ 1);
                uint32_t full = shared.weights_full(stage.index);
                barrier_expect(full, 2 * kWeightBytes);
                for (int half = 0; half < 2; ++half)  // past the last cout the copy engine fills with zeros
                    copy_weights<kPass>(shared.weights + (2 * stage.index + half) * kWeightBytes, map, full, channel,
                                        tap, (2 * blockIdx.y + half) * kChunk);
            }
}

}  // namespace p3d
