// Operands as they enter products whose rows are positions (conv_train.cu, conv_tiles.cu): boxes of one or two tensors
// are loaded as fragments (rows.cuh) and a read (p3d.h) is applied there, by constants a channel in shared memory.
#pragma once

#include <algorithm>

#include "rows.cuh"

namespace p3d {

struct Source {
    Read read;
    int chunks;
    const float* affine_a;  // [3, C]
    const float* affine_b;  // [3, C]; of a masked or scaled read, what it multiplies with lies in row 1
    const float* sums;      // [2, C]
};

// Rows of constants of a read, in pairs.
__host__ __device__ constexpr int planes_of(Read read, bool scaled) {
    if (read == Read::masked || read == Read::scaled) return scaled;
    return read == Read::raw ? 0 : read == Read::bn_relu ? 2 : 3;
}

// Bytes of the constants of a source.
__host__ __device__ inline int constants_of(const Source& x) {
    return planes_of(x.read, x.affine_b) * x.chunks * kChunk * 8;
}

using Fragments = uint32_t[4][4];  // of 16 rows of a warp by 64 channels

// d += x * w, w one box: its rows are columns of d, or with kBack its columns are.
template <typename T, bool kBack>
__device__ __forceinline__ void multiply(float (&d)[32], const Fragments& x, uint32_t w) {
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma<T, kBack>(d, x[k], swizzled_descriptor(w + k * (kBack ? 16 * 128 : 32), 8 * 128));
}

// Has them formed before what follows: a product may read registers only from the fence before it on.
__device__ __forceinline__ void pin(Fragments& x) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(x[k][i])::"memory");
}

// ---- Constants, which lie in planes: a plane has two rows of them, (row 0 twice, row 1 twice) a pair of channels.

// A row of constants: of[channel] * factor[channel] * scale, no `factor` being one, no `of` zero.
struct ConstantRow {
    const float *of = nullptr, *factor = nullptr;
    float scale = 1;

    __device__ __forceinline__ float2 operator()(int channel) const {
        if (!of) return {};
        float2 v = *reinterpret_cast<const float2*>(of + channel), by = {1, 1};
        if (factor) by = *reinterpret_cast<const float2*>(factor + channel);
        return {v.x * by.x * scale, v.y * by.y * scale};
    }
};

// Row `row` of the constants of a read:
//   bn_relu  mean, scale and bias of a
//   join_*   mean, scale and bias of a, then of b; of join_c scale and bias are halved
//   masked, scaled   scale of b
//   bn_bwd*  mean, scale and bias of b, -scale c0, -scale c1
__device__ __forceinline__ ConstantRow constant_row(const Source& x, int row, int channels) {
    int at = row % 3 * channels;
    if (x.read == Read::masked || x.read == Read::scaled)
        return {row == 0 && x.affine_b ? x.affine_b + channels : nullptr};
    if (x.read == Read::bn_bwd || x.read == Read::bn_bwd_open) {
        if (row < 3) return {x.affine_b + at};
        return row < 5 ? ConstantRow{x.sums + at, x.affine_b + channels, -1} : ConstantRow{};
    }
    const float* affine = row < 3 ? x.affine_a : x.affine_b;
    return {affine ? affine + at : nullptr, nullptr, x.read == Read::join_c && row % 3 ? 0.5f : 1};
}

__device__ __forceinline__ void prepare_source(uint32_t target, const Source& x, int thread, int threads) {
    int channels = x.chunks * kChunk, planes = planes_of(x.read, x.affine_b);
    if (planes == 0) return;
    ConstantRow rows[6];
#pragma unroll
    for (int row = 0; row < 6; ++row) rows[row] = constant_row(x, row, channels);
#pragma unroll 4
    for (int pair = thread; pair < channels / 2; pair += threads) {
        float2 v[6];
#pragma unroll
        for (int row = 0; row < 6; ++row) v[row] = rows[row](2 * pair);
#pragma unroll
        for (int p = 0; p < 3; ++p)
            if (p < planes)
                store_affine(target + 16 * (p * channels / 2 + pair),
                             {v[2 * p].x, v[2 * p].y, v[2 * p + 1].x, v[2 * p + 1].y});
    }
}

template <typename Value>
__device__ __forceinline__ void prepare(uint32_t target, int planes, int channels, int thread, int threads,
                                        const Value& value) {
#pragma unroll 1
    for (int i = thread; i < planes * channels / 2; i += threads) {
        int plane = i / (channels / 2), channel = 2 * (i - plane * (channels / 2));
        store_affine(target + 16 * i, {value(2 * plane, channel), value(2 * plane, channel + 1),
                                       value(2 * plane + 1, channel), value(2 * plane + 1, channel + 1)});
    }
}

// The constants of a thread's channels of a chunk or slice: group j, channels 8 j + 2 (lane % 4) + {0, 1}, at 64 j.
struct Constants {
    uint32_t source;
    int plane;  // bytes of one

    __device__ __forceinline__ Constants(uint32_t base, int channels, int chunk)
        : source(base + chunk * kChunk * 8 + 16 * (threadIdx.x % 4)), plane(channels * 8) {}
    __device__ __forceinline__ float4 operator()(int row_pair, int j) const {
        return load_affine(source + row_pair * plane + 64 * j);
    }
};

// ---- The read, applied to fragments.

// x = value(x, b, j) for each pair of neighbouring channels, j its group.
template <typename Value>
__device__ __forceinline__ void for_pairs(Fragments& x, const Fragments& b, const Value& value) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            auto constants = value.load(2 * k + half);
#pragma unroll
            for (int m = 0; m < 2; ++m) x[k][2 * half + m] = value(x[k][2 * half + m], b[k][2 * half + m], constants);
        }
}

struct Six {  // constants of a pair: the first `planes` planes of rows, the rest zero
    float4 v0 = {}, v1 = {}, v2 = {};

    __device__ __forceinline__ Six(const Constants& c, int j, int planes) {
        if (planes > 0) v0 = c(0, j);
        if (planes > 1) v1 = c(1, j);
        if (planes > 2) v2 = c(2, j);
    }
    __device__ __forceinline__ float2 affine(float2 v) const {  // rows 0 to 2
        return {normalise(v.x, v0.x, v0.z, v1.x), normalise(v.y, v0.y, v0.w, v1.y)};
    }
    __device__ __forceinline__ float2 other(float2 v) const {  // rows 3 to 5
        return {normalise(v.x, v1.z, v2.x, v2.z), normalise(v.y, v1.w, v2.y, v2.w)};
    }
};

template <typename T, Read kRead>
struct Value {
    Constants constants;

    __device__ __forceinline__ Six load(int j) const { return {constants, j, planes_of(kRead, false)}; }
    __device__ __forceinline__ uint32_t operator()(uint32_t a, uint32_t b, const Six& c) const {
        float2 v = unpack<T>(a), w = unpack<T>(b);
        if constexpr (kRead == Read::bn_bwd || kRead == Read::bn_bwd_open) {
            auto gradient = [](float g, float z, float mean, float scale, float bias, float constant, float slope) {
                float centred = z - mean;
                bool closed = kRead == Read::bn_bwd && fmaf(centred, scale, bias) <= 0;
                return fmaf(centred, slope, closed ? constant : fmaf(g, scale, constant));
            };
            return pack<T>(gradient(v.x, w.x, c.v0.x, c.v0.z, c.v1.x, c.v1.z, c.v2.x),
                           gradient(v.y, w.y, c.v0.y, c.v0.w, c.v1.y, c.v1.w, c.v2.y));
        } else {
            float2 u = c.affine(v);
            if constexpr (kRead == Read::bn_relu) return pack_relu<T>(u.x, u.y);
            float2 t = c.other(w);
            if constexpr (kRead == Read::join_port) return pack<T>(relu(u.x) + relu(t.x), relu(u.y) + relu(t.y));
            return pack_relu<T>(relu(u.x) + t.x, relu(u.y) + t.y);  // join_b and join_c, whose constants differ
        }
    }
};

template <typename T, bool kMasked>
struct Scaled {
    Constants constants;

    __device__ __forceinline__ float4 load(int j) const { return constants(0, j); }
    __device__ __forceinline__ uint32_t operator()(uint32_t a, uint32_t b, const float4& c) const {
        float2 v = unpack<T>(kMasked ? masked<T>(a, b) : a);
        return pack<T>(v.x * c.x, v.y * c.y);
    }
};

template <typename T>
__device__ __forceinline__ void apply(Read read, Fragments& x, const Fragments& b, const Constants& constants) {
    if (read == Read::bn_relu)
        for_pairs(x, b, Value<T, Read::bn_relu>{constants});
    else if (read == Read::join_port)
        for_pairs(x, b, Value<T, Read::join_port>{constants});
    else if (read == Read::join_b || read == Read::join_c)
        for_pairs(x, b, Value<T, Read::join_b>{constants});
    else if (read == Read::masked)
        for_pairs(x, b, Scaled<T, true>{constants});
    else if (read == Read::scaled)
        for_pairs(x, b, Scaled<T, false>{constants});
    else if (read == Read::bn_bwd)
        for_pairs(x, b, Value<T, Read::bn_bwd>{constants});
    else if (read == Read::bn_bwd_open)
        for_pairs(x, b, Value<T, Read::bn_bwd_open>{constants});
}

// ---- Host.

// Why x is no operand of this read; nullptr if it is.
inline const char* check_operand(const char* op, const WgradOperand& x, Read read) {
    if (x.read != read || read == Read::masked || read == Read::scaled)
        return fail("%s: x: expected the read of the shape, and not masked", op);
    if (!has_tensors(x)) return fail("%s: x: expected the tensors of its read, no more and no fewer", op);
    return nullptr;
}

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Why a kernel takes no clips of so many frames of so many positions, in units of a frame; nullptr if it does.
inline const char* units_why_not(const char* op, int64_t clips, int64_t time, int64_t frame) {
    using Long = long long;
    if (std::min({clips, time, frame}) < 1 ||
        double(clips) * double(time) * double(ceil_divide(frame, kUnit)) > double(1 << 24) ||
        double(clips) * double(time) * double(frame) > 2147000000.0)
        return fail("%s: expected 1 to 2^24 units of up to 64 positions of a frame, got N, T, H * W = %lld, %lld, %lld",
                    op, Long(clips), Long(time), Long(frame));
    return nullptr;
}

}  // namespace p3d
