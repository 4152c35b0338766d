// The spatial convolution where nothing happens to an element as it is read, and no statistics are left: forward,
// without `affine` and `partials`. The product is that of spatial_kernel.cuh; what differs is who moves the data.
//
// A tile is R rows of one frame, for 64 couts. The copy engine brings its halo as one box of R + 2 rows of W + 1
// columns from row -1, column -1 on, 64 channels at a time, zeros outside the frame: a raster of pitch W + 1 once more,
// whose zero column serves the end of the row before. It lies in shared memory as rows of 128 bytes, a position each,
// swizzled by address, so a tap is the same matrix some rows on. What follows the box is zeroed once; of that only the
// first position meets an output. y leaves as boxes of W + 1 columns too: the copy engine drops column W and rows past
// H.
//
// A block is persistent and keeps all weights of its couts. One thread brings halo tiles; two warpgroups take tiles by
// turns: one multiplies while the other stores.
#pragma once

#include "spatial_kernel.cuh"

namespace p3d {

constexpr int kBoxThreads = 384;

struct BoxMaps {
    CUtensorMap x;  // [F, H, W, Ci], in boxes of 1 x (R + 2) x (W + 1) x 64
    CUtensorMap y;  // [F, H, W, Co], in boxes of 1 x stored_rows x (W + 1) x 64
    CUtensorMap w;  // [Co, 9, Ci], in boxes of 64 x 1 x 64
};

struct BoxArgs {
    const float* out_affine;  // [3, Co] or nullptr
    int out_channels;
    int pitch;                            // W + 1
    int rows, stored_rows;                // R; at a time
    int frame_tiles, tiles;               // of a frame, in all
    int chunks, buffers;                  // of 64 input channels; halo tiles
    int box_bytes, buffer_bytes, staged;  // of a halo tile; bytes of staging
};

// Where everything lies in shared memory. Of staging, the first 8 rows take what is not to be stored.
struct BoxShared {
    uint32_t weights, halo, staging, barriers;

    __device__ __forceinline__ BoxShared(const void* base, const BoxArgs& a)
        : weights(shared_address(base)),
          halo(weights + a.chunks * kTaps * kWeightBytes),
          staging(halo + a.buffers * a.buffer_bytes + 8 * 128),
          barriers(staging - 8 * 128 + a.staged) {}
    __device__ __forceinline__ uint32_t staging_free() const { return barriers; }
    __device__ __forceinline__ uint32_t halo_full(int buffer) const { return barriers + 8 + 16 * buffer; }
    __device__ __forceinline__ uint32_t halo_empty(int buffer) const { return barriers + 16 + 16 * buffer; }
    __device__ __forceinline__ uint32_t weights_full(int item) const {
        return barriers + 8 + 16 * kMaxBoxes + 8 * item;
    }
};

__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

__device__ __forceinline__ void copy_box(uint32_t target, const CUtensorMap& map, uint32_t barrier, int i0, int i1,
                                         int i2, int i3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
        "%6}], [%2];" ::"r"(target),
        "l"(&map), "r"(barrier), "r"(i0), "r"(i1), "r"(i2), "r"(i3)
        : "memory");
}

// Stores a box to memory, what lies outside the tensor left out, and waits until it has been read.
__device__ __forceinline__ void store_box(const CUtensorMap& map, uint32_t source, int i0, int i1, int i2, int i3) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
                 "r"(source), "r"(i0), "r"(i1), "r"(i2), "r"(i3)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// ---- Producer.

__device__ __forceinline__ void produce_boxes(const BoxMaps& maps, const BoxArgs& a, const BoxShared& shared) {
    auto bring_weights = [&](int chunk) {
        for (int tap = 0; tap < kTaps; ++tap) {
            int item = chunk * kTaps + tap;
            barrier_expect(shared.weights_full(item), kWeightBytes);
            copy_box(shared.weights + item * kWeightBytes, maps.w, shared.weights_full(item), chunk * kChunk, tap,
                     int(blockIdx.y) * kChunk);
        }
    };
    // With out_affine the weights may be read while the kernel before still runs.
    if (a.out_affine) bring_weights(0);
    dependency_wait();
    Slot slot;
    for (int tile = blockIdx.x; tile < a.tiles; tile += gridDim.x) {
        int frame = tile / a.frame_tiles, row = (tile - frame * a.frame_tiles) * a.rows;
        for (int chunk = 0; chunk < a.chunks; ++chunk, slot.advance(a.buffers)) {
            barrier_wait(shared.halo_empty(slot.index), slot.parity ^ 1);
            barrier_expect(shared.halo_full(slot.index), a.box_bytes);
            copy_box(shared.halo + slot.index * a.buffer_bytes, maps.x, shared.halo_full(slot.index), chunk * kChunk,
                     -1, row - 1, frame);
            if (tile == int(blockIdx.x) && (chunk > 0 || !a.out_affine)) bring_weights(chunk);
        }
    }
}

// ---- Consumers.

template <typename T, int kN>
__device__ __forceinline__ void consume_boxes(const BoxMaps& maps, const BoxArgs& a, const BoxShared& shared,
                                              int group) {
    int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
    int cout = blockIdx.y * kChunk, mine = cout + 16 * warp + lane / 4;  // couts of this thread: mine and mine + 8
    auto turn = [](int g) { return 3 + g; };                             // named barrier: warpgroup g may multiply
    float mean[2], scale[2], bias[2];
    if (a.out_affine)
        for (int m = 0; m < 2; ++m) {
            mean[m] = a.out_affine[mine + 8 * m];
            scale[m] = a.out_affine[a.out_channels + mine + 8 * m];
            bias[m] = a.out_affine[2 * a.out_channels + mine + 8 * m];
        }
    Slot slot;
    uint32_t stores = 0;  // of both warpgroups, so far
    int stored = a.stored_rows * a.pitch;
    if (group == 1) named_arrive(turn(0), 256);
    for (int tile = blockIdx.x, owner = 0; tile < a.tiles; tile += gridDim.x, owner ^= 1) {
        if (owner != group) {
            for (int chunk = 0; chunk < a.chunks; ++chunk) slot.advance(a.buffers);
            stores += a.rows / a.stored_rows;
            continue;
        }
        float d[kN / 2];
#pragma unroll
        for (int i = 0; i < kN / 2; ++i) d[i] = 0;
        wgmma_pin(d);
        named_sync(turn(group), 256);
        int last = -1;
        for (int chunk = 0; chunk < a.chunks; ++chunk, slot.advance(a.buffers)) {
            barrier_wait(shared.halo_full(slot.index), slot.parity);
            uint32_t x = shared.halo + slot.index * a.buffer_bytes;
#pragma unroll
            for (int tap = 0; tap < kTaps; ++tap) {
                int item = chunk * kTaps + tap;
                barrier_wait(shared.weights_full(item), 0);
                uint32_t w = shared.weights + item * kWeightBytes;
                uint32_t moved = x + 128 * (tap / 3 * a.pitch + tap % 3);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < kChunk / 16; ++k)
                    wgmma<T, 0>(d, swizzled_descriptor(w + 32 * k, 8 * 128),
                                swizzled_descriptor(moved + 32 * k, 8 * 128));
                wgmma_commit();
                if (tap == 0 && last >= 0) {  // the chunk before this one has been read
                    wgmma_wait<1>();
                    if (lane == 0) barrier_arrive(shared.halo_empty(last));
                }
            }
            last = slot.index;
        }
        named_arrive(turn(1 - group), 256);
        wgmma_wait<0>();
        wgmma_pin(d);
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
        int frame = tile / a.frame_tiles, row = (tile - frame * a.frame_tiles) * a.rows;
        int piece = 2 * warp + lane / 8 % 2;  // 8 couts
        for (int begin = 0, to = row; to < row + a.rows; begin += stored, to += a.stored_rows, ++stores) {
            int position = lane % 8 - begin;  // in staging, of this lane's row of the first matrix
            uint32_t turned = shared.staging + position * 128 + ((piece ^ (position & 7)) << 4);
            barrier_wait(shared.staging_free(), (stores & 1) ^ 1);
#pragma unroll
            for (int j = 0; j < kN / 8; ++j)
                if (8 * j + 8 > begin && 8 * j < begin + stored)
                    store_transposed(turned + 1024 * j, v[2 * j], v[2 * j + 1]);
            fence_proxy_async();
            named_sync(1 + group, 128);
            if (thread == 0) {
                store_box(maps.y, shared.staging, cout, 0, to, frame);
                barrier_arrive(shared.staging_free());
            }
        }
    }
}

template <typename T, int kN>
__global__ void __launch_bounds__(kBoxThreads, 1)
    spatial_infer_kernel(const __grid_constant__ BoxMaps maps, const __grid_constant__ BoxArgs a) {
    extern __shared__ __align__(1024) char memory[];
    BoxShared shared(memory, a);
    if (threadIdx.x == 0) {
        prefetch_map(maps.x), prefetch_map(maps.y), prefetch_map(maps.w);
        barrier_init(shared.staging_free(), 1);
        for (int i = 0; i < a.buffers; ++i)
            barrier_init(shared.halo_full(i), 1), barrier_init(shared.halo_empty(i), 4);  // a warpgroup's warps
        for (int i = 0; i < a.chunks * kTaps; ++i) barrier_init(shared.weights_full(i), 1);
        barrier_init_fence();
    }
    for (int i = 0; i < a.buffers; ++i)
        for (int byte = a.box_bytes + 16 * int(threadIdx.x); byte < a.buffer_bytes; byte += 16 * kBoxThreads)
            store_shared(shared.halo + i * a.buffer_bytes + byte, uint4{});
    fence_proxy_async();
    __syncthreads();
    int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // the same register for the warp, as the compiler can tell
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0) produce_boxes(maps, a, shared);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        dependency_wait();
        consume_boxes<T, kN>(maps, a, shared, group - 1);
    }
}

// ---- Host.

// The plan of this kernel here, and whether it is to be faster than that of spatial_kernel.cuh.
inline const char* box_plan_here(BoxPlan& plan, bool& faster, const ConvShape& shape) {
    SpatialPlan other;
    if (const char* error = plan_here(other, shape, Pass::forward)) return error;
    faster = box_plan(plan, shape, other.processors) && plan.cost <= other.cost;
    return nullptr;
}

// [F, H, W, C] in boxes of 1 x rows x columns x 64.
inline const char* frame_map(CUtensorMap& map, const void* base, DType dtype, const ConvShape& s, int64_t channels,
                             int rows, int columns) {
    auto encode = tensor_map_encoder();
    if (!encode) return "spatial_conv: the driver has no cuTensorMapEncodeTiled (needs CUDA 12)";
    cuuint64_t sizes[] = {cuuint64_t(channels), cuuint64_t(s.width), cuuint64_t(s.height), cuuint64_t(s.frames)};
    cuuint64_t strides[] = {2 * sizes[0], 2 * sizes[0] * sizes[1], 2 * sizes[0] * sizes[1] * sizes[2]};
    cuuint32_t box[] = {kChunk, cuuint32_t(columns), cuuint32_t(rows), 1}, steps[] = {1, 1, 1, 1};
    auto type = dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    CUresult result =
        encode(&map, type, 4, const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? nullptr : fail("spatial_conv: cuTensorMapEncodeTiled failed with %d", int(result));
}

template <typename T>
const char* launch_boxes(const BoxPlan& plan, const BoxMaps& maps, const BoxArgs& args, cudaStream_t stream) {
    auto launch = [&](auto kernel) {
        cudaError_t error =
            launch_dependent(kernel, dim3(plan.blocks, plan.cout_blocks), kBoxThreads, plan.shared, stream, maps, args);
        return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
    };
    switch (plan.positions) {
        case 216:
            return launch(spatial_infer_kernel<T, 216>);
        case 208:
            return launch(spatial_infer_kernel<T, 208>);
        case 128:
            return launch(spatial_infer_kernel<T, 128>);
        case 64:
            return launch(spatial_infer_kernel<T, 64>);
    }
    return "spatial_conv: no kernel for the planned tile";
}

// y = epi(conv(x, w)) of p, which has neither affine nor partials, divided as `plan` says.
inline const char* spatial_infer(const SpatialConv& p, const BoxPlan& plan) {
    const ConvShape& s = p.shape;
    BoxMaps maps{};
    int pitch = int(s.width + 1);
    if (const char* error = frame_map(maps.x, p.x, p.dtype, s, s.in_channels, plan.rows + 2, pitch)) return error;
    if (const char* error = frame_map(maps.y, p.y, p.dtype, s, s.out_channels, plan.stored_rows, pitch)) return error;
    if (const char* error = weight_map(maps.w, p.w, p.dtype, s.in_channels, s.out_channels)) return error;
    BoxArgs args{};
    args.out_affine = p.out_affine;
    args.out_channels = int(s.out_channels);
    args.pitch = pitch;
    args.rows = plan.rows;
    args.stored_rows = plan.stored_rows;
    args.frame_tiles = plan.frame_tiles;
    args.tiles = plan.tiles;
    args.chunks = plan.chunks;
    args.buffers = plan.buffers;
    args.box_bytes = plan.box_bytes;
    args.buffer_bytes = plan.buffer_bytes;
    args.staged = plan.staging_bytes;
    return p.dtype == DType::bf16 ? launch_boxes<__nv_bfloat16>(plan, maps, args, p.stream)
                                  : launch_boxes<__half>(plan, maps, args, p.stream);
}

}  // namespace p3d
