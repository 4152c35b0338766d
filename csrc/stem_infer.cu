// The stem of an inference net in one pass: the clip is read once and only the pooled tensor is written.
//
// stem_tile.cuh says how the clip is read and multiplied. w is packed for its registers, [step][128 threads][8]:
// element 2 i + e of a thread is half e of register i. The output row r multiplies stages r, r + 1, r + 2 and the first
// row of r + 3, of the two frames of a pooling window.
//
// A block owns a strip of pooled rows of a pair of frames and a tile of columns. A pool that comes first commutes with
// an affine map and a ReLU that rise; where the scale is negative, the weights and the mean change their sign. So it
// takes maxima of raw sums, over frames and rows in registers, over columns between neighbouring lanes, and normalises
// one in eight.
#include <algorithm>

#include "p3d.h"
#include "stem_pool.cuh"

namespace p3d {
namespace {

constexpr float kLowest = -__builtin_huge_valf();

template <int kCi, int kN>
using InferTile = StemTile<kCi, kN, 2, (kN + 15) / 16 * 8 * 128, kCouts * 16>;  // staged: one pooled row, [column][64]

struct StemArgs : PoolArgs {
    const uint4* w;
    const float* affine;
    char* y;
};

// h = the maxima over the three columns of each pooled column, and over h if kJoin. d[4 j + 2 m + e] is cout 16 warp +
// 8 m + lane / 4, column 8 j + 2 (lane % 4) + e. So a thread has both columns 2 q, 2 q + 1 of pooled column q = 4 j +
// lane % 4, for h[2 j + m], and the third, 2 q + 2 or if padded 2 q - 1, is in the next or the last lane of four.
template <int kN, bool kJoin>
__device__ __forceinline__ void pool_columns(const StemArgs& a, int column, float (&d)[kN / 2], float (&h)[kN / 4]) {
    int lane = threadIdx.x % 32, quad = lane % 4;
    if (column + kN > a.out_width)
#pragma unroll
        for (int i = 0; i < kN / 2; ++i)
            if (column + i / 4 * 8 + quad * 2 + i % 2 >= a.out_width) d[i] = kLowest;
    int neighbour = lane / 4 * 4 + (quad + (a.padded ? 3 : 1)) % 4;
    auto add = [&](int i, float given) {
        float most = larger(larger(d[2 * i], d[2 * i + 1]), __shfl_sync(~0u, given, neighbour));
        h[i] = kJoin ? larger(h[i], most) : most;
    };
    if (a.padded) {
#pragma unroll
        for (int i = 0; i < kN / 4; ++i) add(i, quad < 3 ? d[2 * i + 1] : i < 2 ? kLowest : d[2 * i - 3]);
    } else {
#pragma unroll
        for (int i = 0; i < kN / 4; ++i) add(i, quad > 0 ? d[2 * i] : i + 2 < kN / 4 ? d[2 * i + 4] : kLowest);
    }
}

// Normalises one pooled row, h as in pool_columns, and turns it to [column][64] in shared memory: two 8x8 matrices at a
// time, of couts 16 warp + {0, 8} and pooled columns 8 i .. 8 i + 7. Lanes hold columns 2 k, 2 k + 1 of a matrix, which
// we fill with pooled columns 8 i + k and 8 i + k + 4. A column's pieces of 8 couts are permuted: no bank conflicts.
template <typename T, int kN>
__device__ __forceinline__ void stage_row(const float (&h)[kN / 4], uint32_t staging, uint32_t affine) {
    int thread = thread_here() % 128, lane = thread % 32, warp = thread / 32;
    uint4 rows[2];  // mean, scale and bias of a cout
#pragma unroll
    for (int m = 0; m < 2; ++m) rows[m] = load_shared(affine + (16 * warp + 8 * m + lane / 4) * 16);
    auto value = [&](int i) {
        if (i >= kN / 4) return 0.0f;
        const uint4& row = rows[i % 2];
        return relu(normalise(h[i], __uint_as_float(row.x), __uint_as_float(row.y), __uint_as_float(row.z)));
    };
    named_sync(1, 128);  // the row before has left
    int column = lane % 2 * 4 + lane % 8 / 2, piece = 2 * warp + lane / 8 % 2;
    uint32_t turned = staging + column * 128 + ((piece ^ column) << 4);
#pragma unroll
    for (int i = 0; i < kN / 4; i += 4)
        store_transposed(turned + i * 256, pack<T>(value(i), value(i + 2)), pack<T>(value(i + 1), value(i + 3)));
}

// Where an item's pooled rows go, and which columns of the tile they are.
struct Target {
    char* y;
    int skip, count;

    __device__ __forceinline__ Target(const StemArgs& a, const PoolItem& item)
        : y(a.y + item.position(a) * (2 * kCouts)), skip(item.skip()), count(item.columns(a)) {}
    // Stores the row that stage_row has left.
    __device__ __forceinline__ void store_row(const StemArgs& a, uint32_t staging) {
        int thread = thread_here() % 128, piece = thread % 8;
        named_sync(1, 128);
        for (int q = thread / 8; q < count; q += 16)
            *reinterpret_cast<uint4*>(y + q * (2 * kCouts) + piece * 16) =
                load_shared(staging + (skip + q) * 128 + ((piece ^ (skip + q) % 8) << 4));
        y += a.pooled_width * (2 * kCouts);
    }
};

template <typename T, typename Tile>
__device__ __forceinline__ void consume(const StemArgs& a, const StemShared<Tile>& shared) {
    constexpr int kN = Tile::kN;
    int thread = threadIdx.x % 128, lane = thread % 32, cout = thread / 32 * 16 + lane / 4;
    uint32_t sign[2];
#pragma unroll
    for (int m = 0; m < 2; ++m) sign[m] = a.affine[kCouts + cout + 8 * m] < 0 ? 0x80008000 : 0;
    uint32_t w[Tile::kSteps][4];
#pragma unroll
    for (int step = 0; step < Tile::kSteps; ++step) {
        uint4 u = a.w[128 * step + thread];
        w[step][0] = u.x ^ sign[0], w[step][1] = u.y ^ sign[1], w[step][2] = u.z ^ sign[0], w[step][3] = u.w ^ sign[1];
    }

    float d0[kN / 2], d1[kN / 2];  // the two frames of a row on their way
    // Maxima of a window's rows so far; and of the row that ends it and begins the next window.
    float best[kN / 4], next[kN / 4];
    StageRing<Tile::kStages> filled;
    int first = 0, done = 0;  // of the ring: first stage of the row that is multiplied, oldest stage in use
    auto await = [&](int count) {
        for (int i = 0; i < count; ++i, filled.advance()) barrier_wait(shared.full(filled.index), filled.parity);
    };
    auto release = [&](int count) {
        for (int i = 0; i < count; ++i) {
            if (lane == 0) barrier_arrive(shared.empty(done));
            if (++done == Tile::kStages) done = 0;
        }
    };
    auto start_row = [&] {  // the first frame of the next
        if (++first == Tile::kStages) first = 0;
        await(1);
        multiply<T>(d0, w, shared, first, 0);
    };
    // ptxas lets products run beside other work only if every turn of a loop, and its end, waits for all of them once,
    // and if what was made of their sums is pinned before the next replace them.
    for (int index = blockIdx.x; index < a.items; index += gridDim.x) {
        PoolItem item(a, index);
        Target target(a, item);
        int row = item.row, column = item.column, last = row + 2 * item.count;  // row is under way in d0 and d1
        auto exists = [&] { return unsigned(row) < unsigned(a.out_height); };
        auto lowest = [](float (&v)[kN / 4]) {
#pragma unroll
            for (int i = 0; i < kN / 4; ++i) v[i] = kLowest;
        };
        auto settle = [&] {  // best = the window that ends, staged; then the window that begins
#pragma unroll
            for (int i = 0; i < kN / 4; ++i) best[i] = larger(best[i], next[i]);
            stage_row<T, kN>(best, shared.staging, shared.affine);
#pragma unroll
            for (int i = 0; i < kN / 4; ++i) best[i] = next[i];
            wgmma_pin(best);
        };
        await(4);
        multiply<T>(d0, w, shared, first, 0);
        multiply<T>(d1, w, shared, first, 1);
        wgmma_wait<0>();
        wgmma_pin(d0);
        wgmma_pin(d1);
        pool_columns<kN, false>(a, column, d0, best);
        start_row();
        pool_columns<kN, true>(a, column, d1, best);
        if (!exists()) lowest(best);
        wgmma_pin(best);
        release(1);
        multiply<T>(d1, w, shared, first, 1);
        while (true) {
            ++row;
            wgmma_wait<1>();
            wgmma_pin(d0);
            if (exists()) pool_columns<kN, true>(a, column, d0, best);
            wgmma_pin(best);
            start_row();
            wgmma_wait<1>();
            wgmma_pin(d1);
            if (exists()) pool_columns<kN, true>(a, column, d1, best);
            wgmma_pin(best);
            release(1);
            multiply<T>(d1, w, shared, first, 1);
            ++row;
            wgmma_wait<0>();
            wgmma_pin(d0);
            wgmma_pin(d1);
            pool_columns<kN, false>(a, column, d0, next);
            if (row == last) break;
            start_row();
            pool_columns<kN, true>(a, column, d1, next);
            if (!exists()) lowest(next);
            release(1);
            settle();
            multiply<T>(d1, w, shared, first, 1);
            target.store_row(a, shared.staging);
        }
        release(4);
        first = done;
        pool_columns<kN, true>(a, column, d1, next);
        if (!exists()) lowest(next);
        settle();
        target.store_row(a, shared.staging);
    }
}

template <typename T, int kCi, int kN>
__global__ void __launch_bounds__(kThreads, 2) stem_infer_kernel(const __grid_constant__ StemArgs a) {
    extern __shared__ __align__(1024) char memory[];
    StemShared<InferTile<kCi, kN>> shared(memory);
    shared.prepare();
    if (threadIdx.x < kCouts) {
        float mean = a.affine[threadIdx.x], scale = a.affine[kCouts + threadIdx.x];
        float bias = a.affine[2 * kCouts + threadIdx.x];
        uint4 row{__float_as_uint(scale < 0 ? -mean : mean), __float_as_uint(scale < 0 ? -scale : scale),
                  __float_as_uint(bias), 0};
        store_shared(shared.affine + 16 * threadIdx.x, row);
    }
    __syncthreads();
    int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    if (group == 0) {
        give_registers<kProducerRegisters>();
        dependency_wait();
        if (a.x_type == PixelType::bf16)
            produce<T, __nv_bfloat16>(a, shared);
        else if (a.x_type == PixelType::fp16)
            produce<T, __half>(a, shared);
        else if (a.x_type == PixelType::fp32)
            produce<T, float>(a, shared);
        else
            produce<T, uint8_t>(a, shared);
    } else {
        take_registers<kConsumerRegisters>();
        consume<T>(a, shared);
    }
}

// ---- Host.

template <typename T, int kCi, int kN>
const char* launch(const PoolPlan& plan, const StemArgs& args, cudaStream_t stream) {
    constexpr int kShared = InferTile<kCi, kN>::kShared;
    cudaError_t error =
        launch_dependent(stem_infer_kernel<T, kCi, kN>, dim3(plan.blocks), kThreads, kShared, stream, args);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename T, int kCi>
const char* launch(const PoolPlan& plan, const StemArgs& args, cudaStream_t stream) {
    if (plan.columns == 56) return launch<T, kCi, 56>(plan, args, stream);
    if constexpr (kCi < 4) {
        if (plan.columns == 64) return launch<T, kCi, 64>(plan, args, stream);
        if (plan.columns == 80) return launch<T, kCi, 80>(plan, args, stream);
    }
    return "stem_infer: no kernel for the planned tile";
}

template <typename T>
const char* launch(const PoolPlan& plan, const StemArgs& args, cudaStream_t stream) {
    if (args.channels < 3) return launch<T, 2>(plan, args, stream);
    return args.channels == 3 ? launch<T, 3>(plan, args, stream) : launch<T, 4>(plan, args, stream);
}

}  // namespace

const char* stem_infer_why_not(const StemShape& shape) {
    PoolPlan plan;
    return pool_plan(plan, "stem_infer", shape, false);
}

const char* stem_infer(const StemInfer& p) {
    PoolPlan plan;
    if (const char* error = pool_plan(plan, "stem_infer", p.shape, false)) return error;
    StemArgs args{};
    clip_args(args, p.x, p.shape, p.strides, p.x_type);
    args.w = static_cast<const uint4*>(p.w);
    args.affine = p.affine;
    args.y = static_cast<char*>(p.y);
    pool_args(args, plan, p.shape.padded);
    std::copy(p.pixel_scale, p.pixel_scale + 4, args.pixel_scale);
    std::copy(p.pixel_bias, p.pixel_bias + 4, args.pixel_bias);
    return p.dtype == DType::bf16 ? launch<__nv_bfloat16>(plan, args, p.stream) : launch<__half>(plan, args, p.stream);
}

}  // namespace p3d
