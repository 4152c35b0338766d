// The spatial convolution where nothing happens to an element as it is read, and no statistics are left: forward,
// without `affine` and `partials`. The product is that of spatial_kernel.cuh; what differs is who moves the data.
//
// A tile is R rows of one frame. The copy engine brings its halo as one box of R + 2 rows of W + 1 columns from row -1,
// column -1 on, 64 channels at a time, zeros outside the frame: a raster of pitch W + 1 once more, whose zero column
// serves the end of the row before. It lies in shared memory as rows of 128 bytes, a position each, swizzled by
// address, so a tap is the same matrix some rows on. What follows the box is zeroed once; of that only the first
// position meets an output. y leaves as boxes of W + 1 columns too: the copy engine drops column W and rows past H.
//
// A block is persistent and owns a range of couts. Threads of its first warpgroup produce, two warpgroups multiply and
// store, in one of two ways:
//   resident  (64 and 128 channels) a block has 64 couts, all of whose weights stay; warpgroups take tiles by
//             turns: one multiplies while the other stores
//   streamed  (else) a block has 128 couts, 64 a warpgroup, and both multiply the same tile. Weights pass through a
//             ring. Two blocks of other tiles and the same couts are a cluster: each fetches half of the weights, for
//             both, so a stage is free once the warps of both blocks have read it. They take equally many tiles, if
//             need be one past the last, of which the copy engine makes zeros and stores nothing.
//
// T alone, 3x1x1, is the same with three taps in place of nine: its frames are the clips, its rows the frames of a clip
// and its columns their positions. A tile is some columns of R rows, and as a tap moves by rows alone the box has no
// column more.
#pragma once

#include "spatial_kernel.cuh"

namespace p3d {

constexpr int kBoxThreads = 384;

struct BoxMaps {
    CUtensorMap x;  // [F, H, W, Ci], in boxes of 1 x (R + 2) x pitch x 64
    CUtensorMap y;  // [F, H, W, Co], in boxes of 1 x stored_rows x pitch x 64
    CUtensorMap w;  // [Co, taps, Ci], in boxes of 64 x 1 x 64
};

struct BoxArgs {
    const float* out_affine;  // [3, Co] or nullptr
    int out_channels;
    int pitch, before;                     // columns of a box; before the tile's first: W + 1 and 1, of T any and 0
    int rows, stored_rows;                 // R; at a time
    int column_tiles, frame_tiles, tiles;  // side by side, of a frame, in all
    int chunks, buffers;                   // of 64 input channels; halo tiles
    int box_bytes, buffer_bytes, staged;   // of a halo tile; bytes of staging
    int weight_bytes, stages;              // streamed: stages of the ring
};

// Where everything lies in shared memory. Of staging, the first 8 rows take what is not to be stored. Barriers come in
// pairs: filled, then emptied.
struct BoxShared {
    uint32_t weights, halo, staging, barriers;

    __device__ __forceinline__ BoxShared(const void* base, const BoxArgs& a, bool resident)
        : weights(shared_address(base)),
          halo(weights + a.weight_bytes),
          staging(halo + a.buffers * a.buffer_bytes + 8 * 128),
          barriers(staging - 8 * 128 + (resident ? 1 : 2) * a.staged) {}
    __device__ __forceinline__ uint32_t staging_free(int group) const { return barriers + 8 * group; }
    __device__ __forceinline__ uint32_t halo_full(int buffer) const { return barriers + 16 + 16 * buffer; }
    __device__ __forceinline__ uint32_t halo_empty(int buffer) const { return halo_full(buffer) + 8; }
    __device__ __forceinline__ uint32_t weights_full(int i) const { return barriers + 16 + 16 * (kMaxBoxes + i); }
    __device__ __forceinline__ uint32_t weights_empty(int i) const { return weights_full(i) + 8; }
};

// Arrives at the same barrier of block `rank` of the cluster.
__device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, int rank) {
    asm volatile(
        "{.reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];}" ::"r"(barrier),
        "r"(rank)
        : "memory");
}

// copy_box to both blocks of the cluster, at the same place and with the same barrier of each.
__device__ __forceinline__ void copy_box_to_both(uint32_t target, const CUtensorMap& map, uint32_t barrier, int i0,
                                                 int i1, int i2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%3, %4, %5}], [%2], %6;" ::"r"(target),
        "l"(&map), "r"(barrier), "r"(i0), "r"(i1), "r"(i2), "h"(uint16_t(3))
        : "memory");
}

struct BoxTile {
    int frame, row, column;  // its first

    __device__ __forceinline__ BoxTile(const BoxArgs& a, int tile) {
        frame = tile / a.frame_tiles;
        int rest = tile - frame * a.frame_tiles, line = rest / a.column_tiles;
        row = line * a.rows;
        column = (rest - line * a.column_tiles) * a.pitch;
    }
};

// Whether this block works on the tile, or at least the other block of its cluster does.
template <bool kResident>
__device__ __forceinline__ bool in_turn(const BoxArgs& a, int tile) {
    return (kResident ? tile : tile & ~1) < a.tiles;
}

// ---- Producers.

template <bool kResident, int kCount>
__device__ __forceinline__ void produce_boxes(const BoxMaps& maps, const BoxArgs& a, const BoxShared& shared) {
    auto bring_weights = [&](int chunk) {
        for (int tap = 0; tap < kCount; ++tap) {
            int item = chunk * kCount + tap;
            barrier_expect(shared.weights_full(item), kWeightBytes);
            copy_box(shared.weights + item * kWeightBytes, maps.w, shared.weights_full(item), chunk * kChunk, tap,
                     int(blockIdx.y) * kChunk);
        }
    };
    // With out_affine the weights may be read while the kernel before still runs.
    if (kResident && a.out_affine) bring_weights(0);
    dependency_wait();
    Slot slot;
    for (int tile = blockIdx.x; in_turn<kResident>(a, tile); tile += gridDim.x) {
        BoxTile at(a, tile);
        for (int chunk = 0; chunk < a.chunks; ++chunk, slot.advance(a.buffers)) {
            barrier_wait(shared.halo_empty(slot.index), slot.parity ^ 1);
            barrier_expect(shared.halo_full(slot.index), a.box_bytes);
            copy_box(shared.halo + slot.index * a.buffer_bytes, maps.x, shared.halo_full(slot.index), chunk * kChunk,
                     at.column - a.before, at.row - 1, at.frame);
            if (kResident && tile == int(blockIdx.x) && (chunk > 0 || !a.out_affine)) bring_weights(chunk);
        }
    }
}

// Fetches this block's half of every stage of weights.
__device__ __forceinline__ void stream_weights(const BoxMaps& maps, const BoxArgs& a, const BoxShared& shared) {
    if (!a.out_affine) dependency_wait();
    int rank = blockIdx.x % 2;
    Slot stage;
    for (int tile = blockIdx.x; in_turn<false>(a, tile); tile += gridDim.x)
        for (int chunk = 0; chunk < a.chunks; ++chunk)
            for (int tap = 0; tap < kTaps; ++tap, stage.advance(a.stages)) {
                barrier_wait(shared.weights_empty(stage.index), stage.parity ^ 1);
                barrier_expect(shared.weights_full(stage.index), 2 * kWeightBytes);  // the other half comes by itself
                copy_box_to_both(shared.weights + (2 * stage.index + rank) * kWeightBytes, maps.w,
                                 shared.weights_full(stage.index), chunk * kChunk, tap,
                                 (2 * int(blockIdx.y) + rank) * kChunk);
            }
}

// ---- Consumers.

template <typename T, int kN, bool kResident, int kCount>
__device__ __forceinline__ void consume_boxes(const BoxMaps& maps, const BoxArgs& a, const BoxShared& shared,
                                              int group) {
    int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
    int cout = (kResident ? int(blockIdx.y) : 2 * int(blockIdx.y) + group) * kChunk;
    int mine = cout + 16 * warp + lane / 4;   // couts of this thread: mine and mine + 8
    auto turn = [](int g) { return 3 + g; };  // named barrier: warpgroup g may multiply
    int out = kResident ? 0 : group;          // its staging
    uint32_t staging = shared.staging + out * a.staged;
    float mean[2], scale[2], bias[2];
    if (a.out_affine)
        for (int m = 0; m < 2; ++m) {
            mean[m] = a.out_affine[mine + 8 * m];
            scale[m] = a.out_affine[a.out_channels + mine + 8 * m];
            bias[m] = a.out_affine[2 * a.out_channels + mine + 8 * m];
        }
    Slot slot, stage;
    uint32_t stores = 0;  // from this staging so far
    int stored = a.stored_rows * a.pitch;
    if (kResident && group == 1) named_arrive(turn(0), 256);
    for (int tile = blockIdx.x, owner = 0; in_turn<kResident>(a, tile); tile += gridDim.x, owner ^= 1) {
        if (kResident && owner != group) {
            for (int chunk = 0; chunk < a.chunks; ++chunk) slot.advance(a.buffers);
            stores += a.rows / a.stored_rows;
            continue;
        }
        float d[kN / 2];
#pragma unroll
        for (int i = 0; i < kN / 2; ++i) d[i] = 0;
        wgmma_pin(d);
        if (kResident) named_sync(turn(group), 256);
        int last = -1, last_stage = -1;
        auto free_stage = [&] {
            if (!kResident && lane < 2 && last_stage >= 0) barrier_arrive_at(shared.weights_empty(last_stage), lane);
        };
        for (int chunk = 0; chunk < a.chunks; ++chunk, slot.advance(a.buffers)) {
            barrier_wait(shared.halo_full(slot.index), slot.parity);
            uint32_t x = shared.halo + slot.index * a.buffer_bytes;
#pragma unroll
            for (int tap = 0; tap < kCount; ++tap) {
                int item = kResident ? chunk * kCount + tap : stage.index;
                barrier_wait(shared.weights_full(item), stage.parity);
                uint32_t w = shared.weights + (kResident ? item : 2 * item + group) * kWeightBytes;
                uint32_t moved = x + 128 * (kCount == 9 ? tap / 3 * a.pitch + tap % 3 : tap * a.pitch);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < kChunk / 16; ++k)
                    wgmma<T, 0>(d, swizzled_descriptor(w + 32 * k, 8 * 128),
                                swizzled_descriptor(moved + 32 * k, 8 * 128));
                wgmma_commit();
                if (!kResident || (tap == 0 && last >= 0)) wgmma_wait<1>();  // the tap before this one has been read
                if (tap == 0 && last >= 0 && lane == 0) barrier_arrive(shared.halo_empty(last));
                if (kResident) continue;
                free_stage();
                last_stage = stage.index;
                stage.advance(a.stages);
            }
            last = slot.index;
        }
        if (kResident) named_arrive(turn(1 - group), 256);
        wgmma_wait<0>();
        wgmma_pin(d);
        free_stage();
        if (lane == 0) barrier_arrive(shared.halo_empty(last));

        uint32_t v[kN / 4];
#pragma unroll
        for (int j = 0; j < kN / 8; ++j)
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                float first = d[4 * j + 2 * m], second = d[4 * j + 2 * m + 1];
                if (a.out_affine) {
                    first = relu(normalise(first, mean[m], scale[m], bias[m]));
                    second = relu(normalise(second, mean[m], scale[m], bias[m]));
                }
                v[2 * j + m] = pack<T>(first, second);
            }
        BoxTile at(a, tile);
        int piece = 2 * warp + lane / 8 % 2;  // 8 couts
        for (int begin = 0, to = at.row; to < at.row + a.rows; begin += stored, to += a.stored_rows, ++stores) {
            int position = lane % 8 - begin;  // in staging, of this lane's row of the first matrix
            uint32_t turned = staging + position * 128 + ((piece ^ (position & 7)) << 4);
            barrier_wait(shared.staging_free(out), (stores & 1) ^ 1);
#pragma unroll
            for (int j = 0; j < kN / 8; ++j)
                if (8 * j + 8 > begin && 8 * j < begin + stored)
                    store_transposed(turned + 1024 * j, v[2 * j], v[2 * j + 1]);
            fence_proxy_async();
            named_sync(1 + group, 128);
            if (thread == 0) {
                store_box(maps.y, staging, cout, at.column, to, at.frame);
                store_wait();
                barrier_arrive(shared.staging_free(out));
            }
        }
    }
}

template <typename T, int kN, bool kResident, int kCount>
__device__ __forceinline__ void box_block(const BoxMaps& maps, const BoxArgs& a) {
    extern __shared__ __align__(1024) char memory[];
    BoxShared shared(memory, a, kResident);
    if (threadIdx.x == 0) {
        prefetch_map(maps.x), prefetch_map(maps.y), prefetch_map(maps.w);
        for (int g = 0; g < 2; ++g) barrier_init(shared.staging_free(g), 1);
        for (int i = 0; i < a.buffers; ++i)  // emptied by the warps that read it
            barrier_init(shared.halo_full(i), 1), barrier_init(shared.halo_empty(i), kResident ? 4 : 8);
        for (int i = 0; i < a.stages; ++i)
            barrier_init(shared.weights_full(i), 1), barrier_init(shared.weights_empty(i), 16);  // of both blocks
        barrier_init_fence();
    }
    for (int i = 0; i < a.buffers; ++i)
        for (int byte = a.box_bytes + 16 * int(threadIdx.x); byte < a.buffer_bytes; byte += 16 * kBoxThreads)
            store_shared(shared.halo + i * a.buffer_bytes + byte, uint4{});
    fence_proxy_async();
    __syncthreads();
    if (!kResident) cluster_sync();
    int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // the same register for the warp, as the compiler can tell
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0) produce_boxes<kResident, kCount>(maps, a, shared);
        if (!kResident && threadIdx.x == 32) stream_weights(maps, a, shared);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        dependency_wait();
        consume_boxes<T, kN, kResident, kCount>(maps, a, shared, group - 1);
    }
    if (!kResident) cluster_sync();  // nobody leaves while the other block may still free a stage here
}

template <typename T, int kN>
__global__ void __launch_bounds__(kBoxThreads, 1)
    spatial_infer_kernel(const __grid_constant__ BoxMaps maps, const __grid_constant__ BoxArgs a) {
    box_block<T, kN, true, kTaps>(maps, a);
}

template <typename T, int kN>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kBoxThreads, 1)
    spatial_infer_streamed_kernel(const __grid_constant__ BoxMaps maps, const __grid_constant__ BoxArgs a) {
    box_block<T, kN, false, kTaps>(maps, a);
}

template <typename T, int kN>
__global__ void __launch_bounds__(kBoxThreads, 1)
    temporal_boxes_kernel(const __grid_constant__ BoxMaps maps, const __grid_constant__ BoxArgs a) {
    box_block<T, kN, true, 3>(maps, a);
}

// ---- Host.

// The plan of this kernel here, and whether it is to be faster than that of spatial_kernel.cuh.
inline const char* box_plan_here(BoxPlan& plan, bool& faster, const ConvShape& shape) {
    SpatialPlan other;
    if (const char* error = plan_here(other, shape, Pass::forward)) return error;
    faster = box_plan(plan, shape, kTaps, other.processors) && plan.cost <= other.cost;
    return nullptr;
}

// [F, H, W, C] in boxes of frames x rows x columns x 64.
inline const char* frame_map(CUtensorMap& map, const void* base, DType dtype, const ConvShape& s, int64_t channels,
                             int rows, int columns, int frames = 1) {
    auto encode = tensor_map_encoder();
    if (!encode) return "spatial_conv: the driver has no cuTensorMapEncodeTiled (needs CUDA 12)";
    cuuint64_t sizes[] = {cuuint64_t(channels), cuuint64_t(s.width), cuuint64_t(s.height), cuuint64_t(s.frames)};
    cuuint64_t strides[] = {2 * sizes[0], 2 * sizes[0] * sizes[1], 2 * sizes[0] * sizes[1] * sizes[2]};
    cuuint32_t box[] = {kChunk, cuuint32_t(columns), cuuint32_t(rows), cuuint32_t(frames)};
    cuuint32_t steps[] = {1, 1, 1, 1};
    auto type = dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    CUresult result =
        encode(&map, type, 4, const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? nullptr : fail("spatial_conv: cuTensorMapEncodeTiled failed with %d", int(result));
}

inline const char* launch_boxes(void (*kernel)(BoxMaps, BoxArgs), const BoxPlan& plan, const BoxMaps& maps,
                                const BoxArgs& args, cudaStream_t stream) {
    cudaError_t error =
        launch_dependent(kernel, dim3(plan.blocks, plan.cout_blocks), kBoxThreads, plan.shared, stream, maps, args);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename T>
const char* launch_spatial(const BoxPlan& plan, const BoxMaps& maps, const BoxArgs& args, cudaStream_t stream) {
#define P3D_CASE(N, RESIDENT, KERNEL) \
    if (plan.positions == N && plan.resident == RESIDENT) return launch_boxes(KERNEL<T, N>, plan, maps, args, stream)
    P3D_CASE(216, true, spatial_infer_kernel);
    P3D_CASE(208, true, spatial_infer_kernel);
    P3D_CASE(128, true, spatial_infer_kernel);
    P3D_CASE(64, true, spatial_infer_kernel);
    P3D_CASE(216, false, spatial_infer_streamed_kernel);
    P3D_CASE(112, false, spatial_infer_streamed_kernel);
    P3D_CASE(64, false, spatial_infer_streamed_kernel);
    P3D_CASE(48, false, spatial_infer_streamed_kernel);
#undef P3D_CASE
    return "spatial_conv: no kernel for the planned tile";
}

template <typename T>
const char* launch_temporal(const BoxPlan& plan, const BoxMaps& maps, const BoxArgs& args, cudaStream_t stream) {
    if (plan.positions == 208) return launch_boxes(temporal_boxes_kernel<T, 208>, plan, maps, args, stream);
    if (plan.positions == 112) return launch_boxes(temporal_boxes_kernel<T, 112>, plan, maps, args, stream);
    return launch_boxes(temporal_boxes_kernel<T, 64>, plan, maps, args, stream);
}

// The maps and arguments of p, whose frames, height and width are those of x; of T its clips, time and frame.
inline const char* prepare_boxes(BoxMaps& maps, BoxArgs& args, const SpatialConv& p, const BoxPlan& plan) {
    const ConvShape& s = p.shape;
    if (const char* error = frame_map(maps.x, p.x, p.dtype, s, s.in_channels, plan.rows + 2, plan.pitch)) return error;
    if (const char* error = frame_map(maps.y, p.y, p.dtype, s, s.out_channels, plan.stored_rows, plan.pitch))
        return error;
    if (const char* error = weight_map(maps.w, p.w, p.dtype, s.in_channels, s.out_channels, plan.taps)) return error;
    args.out_affine = p.out_affine;
    args.out_channels = int(s.out_channels);
    args.pitch = plan.pitch;
    args.before = plan.taps == kTaps ? 1 : 0;
    args.rows = plan.rows;
    args.stored_rows = plan.stored_rows;
    args.column_tiles = plan.column_tiles;
    args.frame_tiles = plan.frame_tiles;
    args.tiles = plan.tiles;
    args.chunks = plan.chunks;
    args.buffers = plan.buffers;
    args.box_bytes = plan.box_bytes;
    args.buffer_bytes = plan.buffer_bytes;
    args.staged = plan.staging_bytes;
    args.weight_bytes = plan.stages * (plan.resident ? 1 : 2) * kWeightBytes;
    args.stages = plan.stages;
    return nullptr;
}

}  // namespace p3d
