// The consumers' part of the spatial kernels that follows the product: statistics, sums and stores.
#pragma once

#include "spatial_tile.cuh"

namespace p3d {

// Joins the statistics over n real ones of kN positions to the moments of this thread's couts m = 0, 1. Bit i of
// real[k]: position 32 k + i is one of them; moved so that bits 8 j and 8 j + 1 are this thread's.
template <int kN>
__device__ __forceinline__ void add_statistics(Moments (&moments)[2], const float (&d)[kN / 2],
                                               const uint32_t (&real)[(kN + 31) / 32], int n) {
    auto masked = [&](int j, int e, float value) { return real[j / 4] >> (8 * (j % 4) + e) & 1 ? value : 0.0f; };
    // Sums about a shift near the mean lose no digits: the mean so far, or for the first tile what a first round finds.
    float shift[2] = {moments[0].mean, moments[1].mean};
#pragma unroll 1
    for (int round = moments[0].n == 0 ? 0 : 1; round < 2; ++round) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            float sum = 0, squares = 0;
#pragma unroll
            for (int j = 0; j < kN / 8; ++j) {
                float dx = masked(j, 0, d[4 * j + 2 * m] - shift[m]);
                float dy = masked(j, 1, d[4 * j + 2 * m + 1] - shift[m]);
                sum += dx + dy;
                squares = fmaf(dx, dx, fmaf(dy, dy, squares));
            }
            sum = quad_sum(sum);
            squares = quad_sum(squares);
            float offset = sum / fmaxf(n, 1);
            shift[m] += offset;
            float m2 = squares - sum * offset;
            if (round == 1) moments[m].join(n, shift[m], m2 < 0 ? 0 : m2);  // not fmaxf, which would lose a NaN
        }
    }
}

// The same over the pixels among the kN positions of the raster from `position` on.
template <int kN>
__device__ __forceinline__ void add_statistics(Moments (&moments)[2], const float (&d)[kN / 2], const Raster& raster,
                                               uint32_t position, int lane) {
    constexpr int kWords = (kN + 31) / 32;
    uint32_t real[kWords];
    int n = 0;
#pragma unroll
    for (int k = 0; k < kWords; ++k) {
        real[k] = __ballot_sync(~0u, 32 * k + lane < kN && raster.pixel(position + 32 * k + lane) >= 0);
        n += __popc(real[k]);
        real[k] >>= 2 * (lane % 4);
    }
    add_statistics<kN>(moments, d, real, n);
}

// Stores row `part` of the statistics of this thread's couts `row` and row + 8, which lanes of a quad share.
__device__ __forceinline__ void store_statistics(float* partials, const Moments (&moments)[2], int64_t part, int row,
                                                 int channels) {
    for (int m = 0; m < 2; ++m) {
        float* out = partials + 3 * part * channels + row + 8 * m;
        out[0] = moments[m].n;
        out[channels] = moments[m].mean;
        out[2 * channels] = moments[m].m2;
    }
}

// Stores 64 couts of the kN positions from `position` on, turned through `staging` to rows of 128 bytes.
template <int kN>
__device__ __forceinline__ void store(const Args& a, const uint32_t (&v)[kN / 4], uint32_t position, int cout,
                                      uint32_t staging, int group) {
    int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
    int piece = 2 * warp + lane / 8 % 2;  // 8 couts; a row's pieces are permuted by the position: no bank conflicts
    uint32_t turned = staging + lane % 8 * 128 + ((piece ^ (lane % 8)) << 4);
#pragma unroll
    for (int begin = 0; begin < kN; begin += kStaged) {
#pragma unroll
        for (int j = begin / 8; j < begin / 8 + kStaged / 8; ++j)
            if (j < kN / 8) store_transposed(turned + 128 * (8 * j - begin), v[2 * j], v[2 * j + 1]);
        named_sync(1 + group, 128);
#pragma unroll
        for (int p = thread / 8; p < kStaged; p += 16) {
            int pixel = a.raster.pixel(position + begin + p);
            if (begin + p >= kN || pixel < 0) continue;
            auto* row = __cvta_shared_to_generic(staging + p * 128 + ((thread % 8 ^ p % 8) << 4));
            char* target = a.y + 2 * (int64_t(pixel) * a.out_channels + cout + 8 * (thread % 8));
            *reinterpret_cast<uint4*>(target) = *static_cast<const uint4*>(row);
        }
        named_sync(1 + group, 128);
    }
}

// What a thread adds up for the layer below: sum g and sum g (z - mean) of eight couts, g masked by its ReLU.
struct BelowSums {
    float g[8] = {}, gz[8] = {};

    template <typename T>
    __device__ __forceinline__ void add(uint32_t y, uint32_t z, const Affine8& affine, int i) {
        float2 a = unpack<T>(y), b = unpack<T>(z);
        add(a.x, b.x, affine, 2 * i);
        add(a.y, b.y, affine, 2 * i + 1);
    }
    template <typename T>
    __device__ __forceinline__ void add(uint4 y, uint4 z, const Affine8& affine) {
        add<T>(y.x, z.x, affine, 0), add<T>(y.y, z.y, affine, 1);
        add<T>(y.z, z.z, affine, 2), add<T>(y.w, z.w, affine, 3);
    }
    __device__ __forceinline__ void add(float y, float z, const Affine8& affine, int i) {
        float centred = z - affine.mean[i];
        float open = fmaf(centred, affine.scale[i], affine.bias[i]) <= 0 ? 0.0f : y;
        g[i] += open;
        gz[i] = fmaf(open, centred, gz[i]);
    }
};

// Calls what `store_gradient` will read of the kN positions from `position` on to the second-level cache.
template <int kN>
__device__ __forceinline__ void call_gradient(const Args& a, uint32_t position, int cout) {
    if (!a.o && !a.below) return;
    for (int p = threadIdx.x % 128; p < kN; p += 128) {
        int pixel = a.raster.pixel(position + p);
        int64_t offset = 2 * (int64_t(pixel) * a.out_channels + cout);
        if (pixel >= 0 && a.o) prefetch(a.o + offset);
        if (pixel >= 0 && a.below) prefetch(a.below + offset);
    }
}

// The gradient's way out: adds o, stores, and adds to the sums of the layer below, 64 positions at a time. A thread has
// one octet of couts and every 16th position; what it needs of the next 64 is under way while it works on these.
template <typename T, int kN>
__device__ __forceinline__ void store_gradient(const Args& a, float (&d)[kN / 2], BelowSums& sums, uint32_t position,
                                               int cout, uint32_t staging, int group) {
    constexpr int kMine = kStaged / 16;
    int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32, octet = thread % 8, first = thread / 8;
    int piece = 2 * warp + lane / 8 % 2;  // as in `store`
    uint32_t turned = staging + lane % 8 * 128 + ((piece ^ (lane % 8)) << 4);
    auto mine = [&](int k) { return staging + (first + 16 * k) * 128 + ((octet ^ first % 8) << 4); };
    auto offset = [&](int pixel) { return 2 * (int64_t(pixel) * a.out_channels + cout + 8 * octet); };
    struct Rows {
        int pixel[kMine];
        uint4 z[kMine];
    };
    auto look_up = [&](Rows& rows, int begin) {
#pragma unroll
        for (int k = 0; k < kMine; ++k) {
            int p = begin + first + 16 * k;
            rows.pixel[k] = p < kN ? a.raster.pixel(position + p) : -1;
            if (a.below && rows.pixel[k] >= 0) load_once(rows.z[k], a.below + offset(rows.pixel[k]));
        }
    };
    Rows rows, next;
    look_up(rows, 0);
#pragma unroll
    for (int begin = 0; begin < kN; begin += kStaged) {
        if (a.o) {
#pragma unroll
            for (int half = 0; half < kMine; half += kMine / 2) {  // two at a time: registers are scarce here
                uint4 o[kMine / 2] = {};
#pragma unroll
                for (int k = 0; k < kMine / 2; ++k)
                    if (rows.pixel[half + k] >= 0) load_once(o[k], a.o + offset(rows.pixel[half + k]));
#pragma unroll
                for (int k = 0; k < kMine / 2; ++k) store_shared(mine(half + k), o[k]);
            }
            named_sync(1 + group, 128);
        }
#pragma unroll
        for (int j = begin / 8; j < begin / 8 + kStaged / 8; ++j) {
            if (j >= kN / 8) continue;
            uint32_t place = turned + 128 * (8 * j - begin);
            if (a.o) {  // from where only this warp will write
                uint32_t pair[2];
                load_transposed(place, pair[0], pair[1]);
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    float2 o = unpack<T>(pair[m]);
                    d[4 * j + 2 * m] += o.x, d[4 * j + 2 * m + 1] += o.y;
                }
            }
            store_transposed(place, pack<T>(d[4 * j], d[4 * j + 1]), pack<T>(d[4 * j + 2], d[4 * j + 3]));
        }
        named_sync(1 + group, 128);
        Affine8 affine;
        if (a.below) affine.load(a.below_affine, cout + 8 * octet, a.out_channels);
        if (begin + kStaged < kN) look_up(next, begin + kStaged);
#pragma unroll
        for (int k = 0; k < kMine; ++k) {
            if (rows.pixel[k] < 0) continue;
            uint4 y = load_shared(mine(k));
            *reinterpret_cast<uint4*>(a.y + offset(rows.pixel[k])) = y;
            if (a.below) sums.add<T>(y, rows.z[k], affine);
        }
        named_sync(1 + group, 128);
        rows = next;
    }
}

// Adds the sums of a warpgroup's threads in a fixed order and stores row `part` of the partial sums.
__device__ __forceinline__ void store_sums(const Args& a, const BelowSums& sums, int64_t part, int cout,
                                           uint32_t staging, int group) {
    int thread = threadIdx.x % 128, octet = thread % 8, warp = thread / 32;
    auto* scratch = static_cast<float*>(__cvta_shared_to_generic(staging));  // [4 warps][2][64 couts]
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        float sum = i < 8 ? sums.g[i] : sums.gz[i - 8];
        sum += __shfl_xor_sync(~0u, sum, 8);
        sum += __shfl_xor_sync(~0u, sum, 16);
        if (thread % 32 < 8) scratch[128 * warp + 64 * (i / 8) + 8 * octet + i % 8] = sum;
    }
    named_sync(1 + group, 128);
    float sum = scratch[thread] + scratch[128 + thread] + scratch[256 + thread] + scratch[384 + thread];
    a.partials[(2 * part + thread / 64) * a.out_channels + cout + thread % 64] = sum;
}

}  // namespace p3d
