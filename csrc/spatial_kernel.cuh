// The spatial 1x3x3 convolution and its input gradient, stride 1, padding 1: one matrix product a tap,
// D[cout, position] += W[tap][cout, channel] X[channel, position + tap].
//
// Couts are the rows of the matrix unit and positions its columns, so N is free to fit the frame and a statistic is a
// row sum. The positions of a tile are a run of the raster (tile.cuh); with a halo it lies in shared memory as eight
// planes [channel / 8][position][8], where a tap is the same matrix some positions on: nothing is loaded or normalised
// twice.
//
// A block is persistent and owns a range of couts. Its first warpgroups produce (spatial_prologue.cuh): they copy halo
// tiles, 64 channels at a time, normalise them, and have the copy engine fetch weights [64 couts][64 channels] tap by
// tap. Two consumer warpgroups multiply and store (spatial_epilogue.cuh). They work in one of two ways:
//   resident  (64 -> 64 channels) all weights stay; each warpgroup owns half of the tile's positions, and they take
//             turns: one multiplies while the other stores
//   streamed  (else) weights pass through a ring; each warpgroup owns 64 of 128 couts and both multiply the same
//             positions
//
// Where tiles of whole rows serve as well, spatial_infer.cuh and spatial_train.cuh are faster; this kernel takes the
// rest: wide rows, frames of which many make a tile, few tiles, and gradients that dz is still to be made of.
#pragma once

#include "spatial_epilogue.cuh"
#include "spatial_prologue.cuh"
#include "spatial_tile.cuh"
#include "wgmma.cuh"

namespace p3d {

// Warpgroups of a block, and the registers of their threads; the gradient's prologue reads two tensors and has two.
template <Pass kPass>
struct Warpgroups {
    static constexpr int kProducers = kPass == Pass::forward ? 1 : 2;
    static constexpr int kThreads = 128 * (kProducers + 2);
    static constexpr int kProducerRegisters = kPass == Pass::forward ? 72 : 64;
    static constexpr int kConsumerRegisters = kPass == Pass::forward ? 216 : 192;
    static_assert(kProducers * kProducerRegisters + 2 * kConsumerRegisters <=
                      (kProducers + 2) * (65536 / kThreads / 8 * 8),
                  "registers of the block");
};
static_assert(kWeightBytes % 1024 == 0, "swizzled boxes need 1024-byte alignment");

// ---- Consumers.

// One tap of one chunk: d[cout, position] += w[cout, 0..63] * x[0..63, position].
template <typename T, Pass kPass, int kCount>
__device__ __forceinline__ void multiply_tap(float (&d)[kCount], uint32_t weights, uint32_t x, int plane) {
#pragma unroll
    for (int k = 0; k < kChunk / 16; ++k) {
        constexpr bool kFlip = kPass == Pass::gradient;
        // 16 channels are two planes of x, and 32 bytes of every row of weights, or 16 rows of the gradient's.
        uint64_t a = swizzled_descriptor(weights + k * (kFlip ? 16 * 128 : 32), 8 * 128);
        uint64_t b = plain_descriptor(x + 2 * k * plane, plane, 128);
        wgmma<T, kFlip>(d, a, b);
    }
}

template <typename T, int kN, bool kResident, Pass kPass>
__device__ __forceinline__ void consume(const Args& a, const Shared& shared, int group) {
    int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
    int cout = kResident ? 0 : (2 * blockIdx.y + group) * kChunk;  // of this warpgroup, and then of this thread
    int row = cout + 16 * warp + lane / 4;                         // and row + 8
    int half = kResident ? group * kN : 0;                         // the first position of this warpgroup in a tile
    bool outside = cout >= a.out_channels;
    uint32_t staging = shared.staging + group * kStageBytes;
    uint32_t centre = a.raster.pitch + 1;
    auto turn = [](int g) { return 3 + g; };  // named barrier: warpgroup g may multiply

    float mean[2], scale[2], bias[2];
    if (kPass == Pass::forward && a.out_affine && !outside)
        for (int m = 0; m < 2; ++m) {
            mean[m] = a.out_affine[row + 8 * m];
            scale[m] = a.out_affine[a.out_channels + row + 8 * m];
            bias[m] = a.out_affine[2 * a.out_channels + row + 8 * m];
        }
    Moments moments[2];
    BelowSums sums;
    Slot buffer, stage;
    if (kResident && group == 1) named_arrive(turn(0), 256);
    for (int tile = blockIdx.x; tile < a.tiles; tile += gridDim.x) {
        float d[kN / 2];
#pragma unroll
        for (int i = 0; i < kN / 2; ++i) d[i] = 0;
        wgmma_pin(d);
        uint32_t position = tile_start<kN, kResident>(tile) + half + centre;
        if (kPass == Pass::gradient && !outside) call_gradient<kN>(a, position, cout);
        if (kResident) named_sync(turn(group), 256);
        int last_stage = -1, last_buffer = -1;
        int channels = kResident ? kChunk : a.in_channels;
        for (int channel = 0; channel < channels; channel += kChunk, buffer.advance(a.buffers)) {
            barrier_wait(shared.halo_full(buffer.index), buffer.parity);
            uint32_t x = shared.halo + buffer.index * 8 * a.plane + 16 * half;
#pragma unroll
            for (int tap = 0; tap < kTaps; ++tap) {
                int box = kResident ? tap : 2 * stage.index + group;
                if (kResident)
                    barrier_wait(shared.weights_full(tap), 0);
                else
                    barrier_wait(shared.weights_full(stage.index), stage.parity);
                uint32_t shift = tap / 3 * a.raster.pitch + tap % 3;
                wgmma_fence();
                multiply_tap<T, kPass>(d, shared.weights + box * kWeightBytes, x + 16 * shift, a.plane);
                wgmma_commit();
                if (kResident) continue;
                wgmma_wait<1>();  // the tap before this one has been read
                if (lane == 0 && last_stage >= 0) barrier_arrive(shared.weights_empty(last_stage));
                if (lane == 0 && last_buffer >= 0) barrier_arrive(shared.halo_empty(last_buffer));
                last_stage = stage.index, last_buffer = -1;
                stage.advance(a.stages);
            }
            last_buffer = buffer.index;
        }
        if (kResident) named_arrive(turn(1 - group), 256);
        wgmma_wait<0>();
        wgmma_pin(d);
        if (lane == 0) {
            if (!kResident) barrier_arrive(shared.weights_empty(last_stage));
            barrier_arrive(shared.halo_empty(last_buffer));
        }
        if (outside) continue;

        if constexpr (kPass == Pass::gradient) {
            store_gradient<T, kN>(a, d, sums, position, cout, staging, group);
            continue;
        }
        if (a.out_affine)
#pragma unroll
            for (int i = 0; i < kN / 2; ++i)
                d[i] = relu(normalise(d[i], mean[i / 2 % 2], scale[i / 2 % 2], bias[i / 2 % 2]));
        if (a.partials) {
#pragma unroll
            for (int i = 0; i < kN / 2; i += 2) {
                float2 rounded = unpack<T>(pack<T>(d[i], d[i + 1]));
                d[i] = rounded.x, d[i + 1] = rounded.y;
            }
            wgmma_pin(d);
            add_statistics<kN>(moments, d, a.raster, position, lane);
        }
        uint32_t v[kN / 4];  // positions 8 j + 2 (lane % 4) + {0, 1} of cout row + 8 m, at 2 j + m
#pragma unroll
        for (int i = 0; i < kN / 4; ++i) v[i] = pack<T>(d[2 * i], d[2 * i + 1]);
        store<kN>(a, v, position, cout, staging, group);
    }
    if (kResident && group == 0) named_sync(turn(0), 256);  // the other's last arrival
    if (!a.partials || outside) return;
    int64_t part = kResident ? 2 * blockIdx.x + group : blockIdx.x;
    if (kPass == Pass::gradient) {
        store_sums(a, sums, part, cout, staging, group);
    } else if (lane % 4 == 0) {
        store_statistics(a.partials, moments, part, row, a.out_channels);
    }
}

template <typename T, int kN, bool kResident, Pass kPass>
__global__ void __launch_bounds__(Warpgroups<kPass>::kThreads, 1)
    spatial_conv_kernel(const __grid_constant__ CUtensorMap weights, const __grid_constant__ Args a) {
    using Groups = Warpgroups<kPass>;
    extern __shared__ __align__(1024) char memory[];
    constexpr int kLoaders = 128 * Groups::kProducers - (kResident ? 0 : 32);  // streaming weights takes a warp
    Shared shared(memory, a, kResident);
    if (threadIdx.x == 0) {
        for (int i = 0; i < a.stages; ++i)
            barrier_init(shared.weights_full(i), 1), barrier_init(shared.weights_empty(i), 8);
        for (int i = 0; i < a.buffers; ++i)
            barrier_init(shared.halo_full(i), kLoaders), barrier_init(shared.halo_empty(i), 8);
        barrier_init_fence();
    }
    __syncthreads();
    int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // the same register for the warp, as the compiler can tell
    if (group < Groups::kProducers) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Groups::kProducerRegisters));
        int thread = threadIdx.x;
        bool early = kPass == Pass::forward && a.out_affine && thread == (kResident ? 0 : kLoaders);
        if (!early) dependency_wait();
        if (kResident && thread == 0) {
            for (int tap = 0; tap < kTaps; ++tap) {
                barrier_expect(shared.weights_full(tap), kWeightBytes);
                copy_weights<kPass>(shared.weights + tap * kWeightBytes, weights, shared.weights_full(tap), 0, tap, 0);
            }
            if (early) dependency_wait();
        }
        if (thread == kLoaders)
            produce_weights<kPass>(a, shared, weights);
        else if (thread > kLoaders)
            return;
        else if (kPass == Pass::gradient && a.z)
            produce_gradient<T, kN, kResident, kLoaders>(a, shared, thread);
        else
            produce_halo<T, kN, kResident, kPass, kLoaders>(a, shared, thread);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Groups::kConsumerRegisters));
        dependency_wait();
        consume<T, kN, kResident, kPass>(a, shared, group - Groups::kProducers);
    }
}

// ---- Host.

inline const char* plan_here(SpatialPlan& plan, const ConvShape& shape, Pass pass) {
    int processors;
    if (const char* error = count_processors(processors)) return error;
    return spatial_plan(plan, shape, pass, processors);
}

// Weights as [outer, taps, inner], read in boxes of 64 x 1 x 64.
inline const char* weight_map(CUtensorMap& map, const void* weights, DType dtype, uint64_t inner, uint64_t outer,
                              uint64_t taps = kTaps) {
    auto encode = tensor_map_encoder();
    if (!encode) return "spatial_conv: the driver has no cuTensorMapEncodeTiled (needs CUDA 12)";
    cuuint64_t sizes[] = {inner, taps, outer}, strides[] = {2 * inner, 2 * inner * taps};
    cuuint32_t box[] = {kChunk, 1, kChunk}, steps[] = {1, 1, 1};
    auto type = dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    CUresult result =
        encode(&map, type, 3, const_cast<void*>(weights), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? nullptr : fail("spatial_conv: cuTensorMapEncodeTiled failed with %d", int(result));
}

template <typename T, int kN, bool kResident, Pass kPass>
const char* launch(const SpatialPlan& plan, const CUtensorMap& map, const Args& args, cudaStream_t stream) {
    dim3 grid(plan.blocks, plan.cout_blocks);
    cudaError_t error = launch_dependent(spatial_conv_kernel<T, kN, kResident, kPass>, grid,
                                         Warpgroups<kPass>::kThreads, plan.shared, stream, map, args);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline int partial_rows(const ConvShape& shape, Pass pass) {
    SpatialPlan plan;
    return plan_here(plan, shape, pass) ? 0 : plan.blocks * (plan.resident ? 2 : 1);
}

template <typename T, Pass kPass>
const char* launch(const SpatialPlan& plan, const CUtensorMap& map, const Args& args, cudaStream_t stream) {
#define P3D_CASE(N, RESIDENT) \
    if (plan.positions == N && plan.resident == RESIDENT) return launch<T, N, RESIDENT, kPass>(plan, map, args, stream)
    if constexpr (kPass == Pass::forward) {
        P3D_CASE(208, true);
        P3D_CASE(160, true);
        P3D_CASE(128, true);
        P3D_CASE(160, false);
        P3D_CASE(120, false);
    } else {
        P3D_CASE(136, true);
        P3D_CASE(144, false);
    }
    P3D_CASE(64, true);
    P3D_CASE(80, false);
    P3D_CASE(48, false);
#undef P3D_CASE
    return "spatial_conv: no kernel for the planned tile";
}

// Completes `args` and launches the kernel of this shape; `weights` are [Co, 9, Ci], of the gradient [Ci, 9, Co].
template <Pass kPass>
const char* launch(Args& args, const ConvShape& shape, DType dtype, const void* weights, cudaStream_t stream) {
    SpatialPlan plan;
    CUtensorMap map;
    if (const char* error = plan_here(plan, shape, kPass)) return error;
    uint64_t ends[] = {uint64_t(shape.in_channels), uint64_t(shape.out_channels)};
    bool gradient = kPass == Pass::gradient;
    if (const char* error = weight_map(map, weights, dtype, ends[gradient], ends[!gradient])) return error;
    args.raster = Raster(shape.frames, shape.height, shape.width);
    args.in_channels = int(shape.in_channels);
    args.out_channels = int(shape.out_channels);
    args.tiles = plan.tiles;
    args.halo = plan.halo;
    args.plane = plan.plane;
    args.buffers = plan.buffers;
    args.stages = plan.stages;
    return dtype == DType::bf16 ? launch<__nv_bfloat16, kPass>(plan, map, args, stream)
                                : launch<__half, kPass>(plan, map, args, stream);
}

}  // namespace p3d
