// Pieces of the kernels whose matrix rows are positions (conv_train.cu, tail_infer.cu, temporal_infer.cu): fragments,
// the affine and the join of accumulators, rings; and boxes that are stored and tensor maps, which stem_fwd.cu has,
// too.
//
// A box is 64 positions by 64 channels, 8 KB of shared memory, rows of 128 bytes, swizzled.
//
// Fragments. Accumulator d[4 j + 2 m + e] of a thread is row 16 warp + 8 m + lane / 4, column 8 j + 2 (lane % 4) + e.
// Operand register a[i] of step k (16 columns) holds the pair of that row for m = i % 2, j = 2 k + i / 2: so
// a[i] = pack(d[4 (2 k + i / 2) + 2 (i % 2)], the one after it). ldmatrix and stmatrix give and take the same four
// registers if matrix i lies at rows 16 warp + 8 (i % 2) and 16-byte piece 2 k + i / 2 of a box.
#pragma once

#include "p3d.h"
#include "spatial_plan.h"
#include "tile.cuh"
#include "wgmma.cuh"

namespace p3d {

constexpr int kUnit = 64;                      // positions
constexpr int kBoxBytes = kUnit * kChunk * 2;  // of activations

__device__ __forceinline__ void load_fragment(uint32_t (&v)[4], uint32_t source) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(source)
                 : "memory");
}

__device__ __forceinline__ void store_fragment(uint32_t target, const uint32_t (&v)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(target), "r"(v[0]), "r"(v[1]),
                 "r"(v[2]), "r"(v[3])
                 : "memory");
}

__device__ __forceinline__ float4 load_affine(uint32_t source) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(source));
    return v;
}

__device__ __forceinline__ void store_affine(uint32_t target, float4 v) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(target), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
                 : "memory");
}

// Stores a box to memory as a group of its own; what lies outside the tensor is left out.
__device__ __forceinline__ void store_box(const CUtensorMap& map, uint32_t source, int i0, int i1, int i2) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
                 "r"(source), "r"(i0), "r"(i1), "r"(i2)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until at most kPending of this thread's stored boxes have still to be read from shared memory.
template <int kPending>
__device__ __forceinline__ void store_wait() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Slots in shared memory that are filled, used and freed in one order. Its barriers come in pairs: filled, emptied.
struct Ring {
    uint32_t slots, barriers;
    int bytes, count;
    int index = 0, freed = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ Ring(uint32_t slots, uint32_t barriers, int bytes, int count)
        : slots(slots), barriers(barriers), bytes(bytes), count(count) {}

    __device__ __forceinline__ uint32_t full() const { return barriers + 16 * index; }
    __device__ __forceinline__ uint32_t slot() const { return slots + bytes * index; }
    __device__ __forceinline__ void advance(bool resident = false) {
        if (++index == count) index = 0, parity ^= !resident;
    }
    // Of a producer: waits until the next slot is empty and announces the bytes to come.
    __device__ __forceinline__ void claim() const {
        barrier_wait(full() + 8, parity ^ 1);
        barrier_expect(full(), bytes);
    }
    // Of consumers: waits for the next slot's contents. What stays where it is keeps the parity of its first turn.
    __device__ __forceinline__ uint32_t take(bool resident = false) {
        barrier_wait(full(), parity);
        uint32_t address = slot();
        advance(resident);
        return address;
    }
    __device__ __forceinline__ void free(bool leader) {
        if (leader) barrier_arrive(barriers + 16 * freed + 8);
        if (++freed == count) freed = 0;
    }
};

// Has a consumer's leader give back a slot by its number.
__device__ __forceinline__ void release(const Ring& ring, int slot) { barrier_arrive(ring.barriers + 16 * slot + 8); }

// Pairs of neighbouring channels of one affine [3, C] as (scale, scale, shift, shift), shift = bias - mean * scale: the
// sums are float32, so centring them first would keep no digits that they have not lost.
__device__ __forceinline__ void prepare_affine(uint32_t target, const float* affine, int channels, int thread) {
#pragma unroll 1
    for (int pair = thread; pair < channels / 2; pair += 256) {
        auto row = [&](int i) { return reinterpret_cast<const float2*>(affine + i * channels)[pair]; };
        float2 mean = row(0), scale = row(1), bias = row(2);
        store_affine(target + 16 * pair,
                     {scale.x, scale.y, fmaf(-mean.x, scale.x, bias.x), fmaf(-mean.y, scale.y, bias.y)});
    }
}

// The affine of a thread's columns, fetched while their sums are still being formed.
template <int kGroups>
struct Columns {
    float4 v[kGroups];

    __device__ __forceinline__ explicit Columns(uint32_t source) {
#pragma unroll
        for (int j = 0; j < kGroups; ++j) v[j] = load_affine(source + 64 * j);
    }
    __device__ __forceinline__ void apply(float (&d)[4 * kGroups]) const {
#pragma unroll
        for (int i = 0; i < 4 * kGroups; ++i)
            d[i] = i % 2 ? fmaf(d[i], v[i / 4].y, v[i / 4].w) : fmaf(d[i], v[i / 4].x, v[i / 4].z);
    }
};

// The larger of each half of a and b; NaN wins.
template <typename T>
__device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
    uint32_t v;
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
        asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
    else
        asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
    return v;
}

// The pair of accumulators that becomes register i of step k.
__device__ constexpr int first_of(int k, int i) { return 4 * (2 * k + i / 2) + 2 * (i % 2); }

template <typename T, Join kJoin, int kCount, int kSteps>
__device__ __forceinline__ void join(uint32_t (&t)[kSteps][4], const float (&d)[kCount],
                                     const uint32_t (&other)[kSteps][4]) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float a = d[first_of(k, i)], b = d[first_of(k, i) + 1];
            float2 o = unpack<T>(other[k][i]);
            if constexpr (kJoin == Join::relu) t[k][i] = pack_relu<T>(a, b);
            if constexpr (kJoin == Join::relu_add) t[k][i] = pack<T>(relu(a) + o.x, relu(b) + o.y);
            if constexpr (kJoin == Join::add_relu) t[k][i] = pack_relu<T>(a + o.x, b + o.y);
            if constexpr (kJoin == Join::mean_relu)
                t[k][i] = pack_relu<T>(0.5f * a + 0.5f * o.x, 0.5f * b + 0.5f * o.y);
        }
}

template <typename T, int kCount, int kSteps>
__device__ __forceinline__ void join(Join kind, uint32_t (&t)[kSteps][4], const float (&d)[kCount],
                                     const uint32_t (&other)[kSteps][4]) {
    if (kind == Join::relu)
        join<T, Join::relu>(t, d, other);
    else if (kind == Join::relu_add)
        join<T, Join::relu_add>(t, d, other);
    else if (kind == Join::add_relu)
        join<T, Join::add_relu>(t, d, other);
    else
        join<T, Join::mean_relu>(t, d, other);
}

// A tensor by its axes, innermost first, of which the first is packed; strides of the others, in bytes. Swizzled boxes.
inline const char* tensor_map(const char* op, CUtensorMap& map, const void* base, DType dtype, int rank,
                              const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* boxes) {
    auto encode = tensor_map_encoder();
    if (!encode) return fail("%s: the driver has no cuTensorMapEncodeTiled (needs CUDA 12)", op);
    cuuint32_t steps[] = {1, 1, 1, 1, 1};
    auto type = dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    CUresult result =
        encode(&map, type, rank, const_cast<void*>(base), sizes, strides, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? nullptr : fail("%s: cuTensorMapEncodeTiled failed with %d", op, int(result));
}

// A packed tensor [outer, rows, columns], read or written in boxes of 64 columns by `box` rows.
inline const char* tensor_map(const char* op, CUtensorMap& map, const void* base, DType dtype, int64_t outer,
                              int64_t rows, int64_t columns, int box) {
    cuuint64_t sizes[] = {cuuint64_t(columns), cuuint64_t(rows), cuuint64_t(outer)};
    cuuint64_t strides[] = {2 * sizes[0], 2 * sizes[0] * sizes[1]};
    cuuint32_t boxes[] = {kChunk, cuuint32_t(box), 1};
    return tensor_map(op, map, base, dtype, 3, sizes, strides, boxes);
}

}  // namespace p3d
