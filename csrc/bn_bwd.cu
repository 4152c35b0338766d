// The backward of a normalisation with no ReLU of its own, where gradient and tensor fit in the card's shared memory:
//
//     dz = scale (g - c0 - (z - mean) c1),  c0 = sum g / P,  c1 = invstd^2 sum g (z - mean) / P,  over all P positions
//
// No dz can be formed before both sums are whole, so a pass for the sums and one for dz read everything twice. Here a
// cluster of one or two blocks has some channels to itself, as few as 16, and keeps all that it reads of them: sums
// need no other cluster, and dz is made of what is there. Nothing waits for a block that may not have started but the
// two of a cluster, which start together.
//
// A thread copies, sums and finishes the same pieces of eight channels, always of the same eight. Pieces of 16 channels
// are rows of 32 bytes, whole sectors; the first to ask has the rest of the line brought to the second-level cache,
// which other blocks want at about that time.
#include "boxes.cuh"
#include "p3d.h"

namespace p3d {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kMostBlocks = 2;                                        // of a cluster
constexpr int kMost = (kSharedLimit / 32 + kThreads - 1) / kThreads;  // pieces of a thread; one takes 32 bytes
constexpr int kAhead = 4;                                             // pieces that are under way while one is summed

struct Args {
    const void *g, *mask, *z;
    const float* record;
    void* dz;
    float* sums;
    float share;  // 1 / positions
    int positions, channels;
    int rows;    // positions of a block, at most
    int pieces;  // of a row: 2, 4 or 8
    int blocks;  // of a cluster
};

__device__ __forceinline__ void copy_piece(uint32_t target, const uint4* source) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}

__device__ __forceinline__ void load_piece(uint4& v, const uint4* source) {
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(source)
                 : "memory");
}

template <int kPending>
__device__ __forceinline__ void copies_wait() {  // until at most kPending groups of this thread's are under way
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

template <typename T>
__device__ __forceinline__ void unpack_piece(float (&v)[8], uint4 packed) {
    uint32_t words[] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float2 pair = unpack<T>(words[i]);
        v[2 * i] = pair.x, v[2 * i + 1] = pair.y;
    }
}

// Adds up 16 values a lane over the lanes of the same piece. Of each pair of lanes one keeps one half of the values and
// one the other, until a lane has `pieces` / 2 of them left, in v[0..]: the first is number `base` of the 16.
__device__ __forceinline__ int warp_sum(float (&v)[16], int pieces, int lane) {
    int base = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        int half = 8 >> k, offset = 16 >> k;
        if (offset < pieces) continue;
        bool upper = lane & offset;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            if (j >= half) break;
            float give = upper ? v[j] : v[j + half], keep = upper ? v[j + half] : v[j];
            v[j] = keep + __shfl_xor_sync(~0u, give, offset);
        }
        base += upper ? half : 0;
    }
    return base;
}

// Shared memory: pieces of g, masked, and of z; sums of each warp, [kWarps, 2, width], and of each block, pairs
// [blocks, width]; the barrier that those of the other block arrive at.
__host__ __device__ constexpr int shared_bytes(int rows, int pieces, int blocks) {
    return 32 * rows * pieces + 8 * pieces * (kWarps * 8 + blocks * 8) + 8;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) bn_bwd_kernel(const __grid_constant__ Args a) {
    extern __shared__ __align__(16) unsigned char base[];
    int thread = threadIdx.x, lane = thread % 32, column = thread % a.pieces, row = thread / a.pieces;
    int group = blockIdx.x / a.blocks, rank = blockIdx.x % a.blocks;
    int width = 8 * a.pieces, channel = group * width + 8 * column;
    int first = min(rank * a.rows, a.positions), here = min(a.rows, a.positions - first) * a.pieces;
    int count = thread < here ? (here - thread + kThreads - 1) / kThreads : 0;  // pieces of this thread
    int64_t at = (int64_t(first + row) * a.channels + channel) / 8;
    int step = kThreads / a.pieces * (a.channels / 8);  // from one to the next
    uint32_t own_g = shared_address(base) + 16 * thread, own_z = own_g + 16 * a.rows * a.pieces;
    auto warp_sums = reinterpret_cast<float*>(base + 32 * a.rows * a.pieces);
    auto block_sums = reinterpret_cast<float2*>(warp_sums + kWarps * 2 * width);
    uint32_t received = shared_address(block_sums + a.blocks * width);
    if (a.blocks > 1) {
        if (thread == 0) {
            barrier_init(received, 1);
            barrier_init_fence();
        }
        __syncthreads();
        if (thread == 0) barrier_expect(received, 8 * width);
        cluster_sync();  // the other block's barrier is there
    }
    dependency_wait();

    auto g = static_cast<const uint4*>(a.g) + at, z = static_cast<const uint4*>(a.z) + at;
    auto mask = a.mask ? static_cast<const uint4*>(a.mask) + at : nullptr;
    uint4 masks[kMost];
    auto bring = [&](int i) {
        if (i < count) {
            copy_piece(own_g + 16 * kThreads * i, g + i * step);
            copy_piece(own_z + 16 * kThreads * i, z + i * step);
            if (mask) load_piece(masks[i], mask + i * step);
        }
        copy_commit();
    };
#pragma unroll
    for (int i = 0; i < kAhead; ++i) bring(i);
    float mean[8], scale[8], invstd[8];
    Affine8::load_row(mean, a.record + channel);
    Affine8::load_row(scale, a.record + a.channels + channel);
    Affine8::load_row(invstd, a.record + 3 * a.channels + channel);

    float sums[16]{};  // of g, and of g (z - mean)
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
        if (i + kAhead < kMost)
            bring(i + kAhead);
        else
            copy_commit();
        copies_wait<kAhead>();
        if (i >= count) continue;
        uint4 packed = load_shared(own_g + 16 * kThreads * i);
        if (mask) {
            packed = {masked<T>(packed.x, masks[i].x), masked<T>(packed.y, masks[i].y), masked<T>(packed.z, masks[i].z),
                      masked<T>(packed.w, masks[i].w)};
            store_shared(own_g + 16 * kThreads * i, packed);
        }
        float v[8], d[8];
        unpack_piece<T>(v, packed);
        unpack_piece<T>(d, load_shared(own_z + 16 * kThreads * i));
#pragma unroll
        for (int j = 0; j < 8; ++j) sums[j] += v[j], sums[8 + j] = fmaf(v[j], d[j] - mean[j], sums[8 + j]);
    }

    int number = warp_sum(sums, a.pieces, lane);
    float* of_warp = warp_sums + thread / 32 * 2 * width + (number / 8 * width + 8 * column + number % 8);
#pragma unroll
    for (int j = 0; j < 4; ++j)
        if (j < a.pieces / 2) of_warp[j] = sums[j];
    __syncthreads();
    if (thread < width) {
        double sum_g = 0, sum_gz = 0;
#pragma unroll
        for (int i = 0; i < kWarps; ++i) {
            sum_g += warp_sums[2 * i * width + thread];
            sum_gz += warp_sums[(2 * i + 1) * width + thread];
        }
        float2* total = block_sums + rank * width + thread;
        *total = {float(sum_g), float(sum_gz)};
        // No block has to wait at the end: what is sent to it, it waits for.
        if (a.blocks > 1)
            send(address_in(shared_address(total), rank ^ 1), total->x, total->y, address_in(received, rank ^ 1));
    }
    __syncthreads();
    if (a.blocks > 1) barrier_wait_cluster(received, 0);

    float c0[8], c1[8];
    bool stores = rank == 0 && thread < a.pieces;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        float2 total = block_sums[8 * column + j];
        if (a.blocks > 1) {
            float2 other = block_sums[width + 8 * column + j];
            total.x += other.x, total.y += other.y;
        }
        c0[j] = total.x * a.share;
        c1[j] = invstd[j] * invstd[j] * (total.y * a.share);
        if (stores) {
            float* to = a.sums + channel + j;
            to[0] = c0[j];
            to[a.channels] = c1[j];
            to[2 * a.channels] = invstd[j] * total.y;
            to[3 * a.channels] = total.x;
        }
    }
    auto dz = static_cast<uint4*>(a.dz) + at;
#pragma unroll 2
    for (int i = 0; i < count; ++i) {
        float v[8], d[8];
        unpack_piece<T>(v, load_shared(own_g + 16 * kThreads * i));
        unpack_piece<T>(d, load_shared(own_z + 16 * kThreads * i));
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = scale[j] * (v[j] - c0[j] - (d[j] - mean[j]) * c1[j]);
        dz[i * step] = {pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7])};
    }
}

// ---- Host.

struct Plan {
    int width = 0, blocks, all;  // channels and blocks of a cluster, blocks
    int rows, shared;
};

// As many blocks as there are multiprocessors for, and of these ways the one of the longest rows.
const char* make_plan(Plan& plan, const BnBwdShape& s) {
    using Long = long long;
    if (s.positions < 1 || s.positions >= 1 << 30 || s.channels < 16 || s.channels % 16)
        return fail("bn_bwd: expected 1 to 2^30 - 1 positions of a multiple of 16 channels, got %lld of %lld",
                    Long(s.positions), Long(s.channels));
    int processors;
    if (const char* error = count_processors(processors)) return error;
    for (int width : {64, 32, 16})
        for (int blocks = 1; blocks <= kMostBlocks; ++blocks) {
            int64_t all = s.channels / width * blocks, rows = (s.positions + blocks - 1) / blocks;
            if (s.channels % width || all > processors || rows > kSharedLimit / (4 * width)) continue;
            int shared = shared_bytes(int(rows), width / 8, blocks);
            if (shared > kSharedLimit || (plan.width && all <= plan.all)) continue;
            plan = {width, blocks, int(all), int(rows), shared};
        }
    if (plan.width) return nullptr;
    return fail("bn_bwd: %lld positions of %lld channels, twice, do not fit in the shared memory of %d multiprocessors",
                Long(s.positions), Long(s.channels), processors);
}

}  // namespace

const char* bn_bwd_why_not(const BnBwdShape& shape) {
    Plan plan;
    return make_plan(plan, shape);
}

const char* bn_bwd(const BnBwd& p) {
    Plan plan;
    if (const char* reason = make_plan(plan, p.shape)) return reason;
    Args args{p.g, p.mask, p.z, p.record, p.dz, p.sums};
    args.share = 1.0f / float(p.shape.positions);
    args.positions = int(p.shape.positions);
    args.channels = int(p.shape.channels);
    args.rows = plan.rows;
    args.pieces = plan.width / 8;
    args.blocks = plan.blocks;
    auto kernel = p.dtype == DType::bf16 ? bn_bwd_kernel<__nv_bfloat16> : bn_bwd_kernel<__half>;
    cudaError_t error =
        launch_dependent(kernel, dim3(plan.all), kThreads, plan.shared, p.stream, dim3(plan.blocks), args);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace p3d
