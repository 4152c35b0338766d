// The stem's convolution in training: the raw output, rounded, and the statistics of what was stored.
//
// stem_tile.cuh says how the clip is read and multiplied; a stage has four rows of one frame. Output rows go in pairs,
// 2 r of stages r, r + 1 and 2 r + 1 of stages r, r + 1 and the first row of r + 2; the products of the next pair run
// while the sums of this one leave. A block owns a strip of pairs of rows of a frame and a tile of columns.
//
// The weights come as the net keeps them: a thread reads and rounds those of its registers.
//
// A row leaves through shared memory, [column][64] in rows of 128 bytes, swizzled, which the copy engine stores; there
// is room for two. A thread adds up its positions of two couts about a shift near their mean, joins these sums strip by
// strip, and at the end with those of its three neighbours that have the same couts.
#include <algorithm>

#include "p3d.h"
#include "rows.cuh"
#include "stem_tile.cuh"

namespace p3d {
namespace {

template <int kCi, int kN>
using FwdTile = StemTile<kCi, kN, 1, 2 * kN * kCouts * 2, 0>;

struct FwdItem;

struct StemFwdArgs : ClipArgs {
    using Item = FwdItem;
    const void* w;
    PixelType w_type;
    float* partials;
    int out_height, out_width;
    int strip, strips, tile, tiles;  // pairs of rows of a strip, strips of a frame, columns of a tile, tiles of a row
    int items;                       // a strip of a tile of a frame each
};

struct FwdItem {
    int image;  // clip * frames + frame
    int row, pairs, rows;
    int column, columns;  // first of the tile, a multiple of 4

    __device__ __forceinline__ FwdItem(const StemFwdArgs& a, int index) {
        int tile = index % a.tiles, rest = index / a.tiles;
        image = rest / a.strips;
        row = 2 * a.strip * (rest % a.strips);
        rows = min(2 * a.strip, a.out_height - row);
        pairs = (rows + 1) / 2;
        column = tile * a.tile;
        columns = min(a.tile, a.out_width - column);
    }
    __device__ __forceinline__ int stages() const { return pairs + 2; }
    __device__ __forceinline__ Cursor cursor(const StemFwdArgs& a, int warp, int group) const {
        return {a, image / a.frames, image % a.frames, 2 * row - 3 + warp, 2 * column + 8 * group};
    }
};

// Sums of a thread over positions of a strip, of couts m = 0, 1, about a shift that is near their mean.
struct Sums {
    float shift[2], sum[2] = {}, squares[2] = {};

    template <typename T>
    __device__ __forceinline__ void add(const uint32_t (&v)[2], bool first, bool second) {  // which positions count
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            float2 both = unpack<T>(v[m]);
            float x = first ? both.x - shift[m] : 0.0f, y = second ? both.y - shift[m] : 0.0f;
            sum[m] += x + y;
            squares[m] = fmaf(x, x, fmaf(y, y, squares[m]));
        }
    }
    __device__ __forceinline__ void pin() { wgmma_pin(shift), wgmma_pin(sum), wgmma_pin(squares); }
};

// Rounds a row of outputs, turns it to [column][64] in shared memory, two 8x8 matrices at a time, of couts 16 warp +
// {0, 8} and columns 8 j .. 8 j + 7, and adds it up; all of it, or its first `columns`.
template <typename T, int kN, bool kAll>
__device__ __forceinline__ void stage_row(const float (&d)[kN / 2], uint32_t turned, Sums& sums, int columns) {
    int quad = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < kN / 8; ++j) {
        uint32_t v[2] = {pack<T>(d[4 * j], d[4 * j + 1]), pack<T>(d[4 * j + 2], d[4 * j + 3])};
        store_transposed(turned + 1024 * j, v[0], v[1]);
        int column = 8 * j + 2 * quad;
        sums.add<T>(v, kAll || column < columns, kAll || column + 1 < columns);
    }
}

template <typename T, typename Tile>
__device__ __forceinline__ void consume(const StemFwdArgs& a, const CUtensorMap& map, const StemShared<Tile>& shared) {
    constexpr int kN = Tile::kN;
    int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32, quad = lane % 4;
    uint32_t w[Tile::kSteps][4];
    if (a.w_type == PixelType::fp32)
        load_weights<T, Tile>(w, static_cast<const float*>(a.w), a.channels, shared.zeros);
    else if (a.w_type == PixelType::bf16)
        load_weights<T, Tile>(w, static_cast<const __nv_bfloat16*>(a.w), a.channels, shared.zeros);
    else
        load_weights<T, Tile>(w, static_cast<const __half*>(a.w), a.channels, shared.zeros);

    float d0[kN / 2], d1[kN / 2];  // the two rows of a pair on their way
    StageRing<Tile::kStages> filled;
    int first = 0, done = 0;  // of the ring: first stage of the pair that is multiplied, oldest stage in use
    auto await = [&](int count) {
        for (int i = 0; i < count; ++i, filled.advance()) barrier_wait(shared.full(filled.index), filled.parity);
    };
    auto release = [&](int count) {
        for (int i = 0; i < count; ++i) {
            if (lane == 0) barrier_arrive(shared.empty(done));
            if (++done == Tile::kStages) done = 0;
        }
    };
    uint32_t staging = 0;                 // the half of it that takes the next row
    int piece = 2 * warp + lane / 8 % 2;  // of a column's eight, 8 couts each, permuted by the column
    uint32_t turned = shared.staging + lane % 8 * 128 + ((piece ^ lane % 8) << 4);
    Moments moments[2];
    for (int index = blockIdx.x; index < a.items; index += gridDim.x) {
        FwdItem item(a, index);
        Sums sums;
        int line = item.image * a.out_height + item.row;  // of all rows: the first of the pair that is in d0 and d1
        int left = item.rows;                             // from there on
        auto put = [&](float (&d)[kN / 2], int line) {
            if (item.columns == kN)
                stage_row<T, kN, true>(d, turned + staging, sums, kN);
            else
                stage_row<T, kN, false>(d, turned + staging, sums, item.columns);
            fence_proxy_async();
            if (thread == 0) store_wait<0>();  // the row before has left its half, which will be next
            named_sync(1, 128);
            if (thread == 0) store_box(map, shared.staging + staging, 0, item.column, line);
            staging ^= Tile::kStaging / 2;
            sums.pin();
        };
        await(3);
        multiply<T>(d0, w, shared, first, 0);
        multiply<T>(d1, w, shared, first, 1);
        while (true) {
            wgmma_wait<0>();
            wgmma_pin(d0);
            wgmma_pin(d1);
            if (left == item.rows)  // any element of the sample will do; then the mean so far
#pragma unroll
                for (int m = 0; m < 2; ++m) sums.shift[m] = moments[m].n > 0 ? moments[m].mean : d0[2 * m];
            bool last = left <= 2;
            release(last ? 3 : 1);
            put(d0, line);
            if (last) break;
            if (++first == Tile::kStages) first = 0;
            multiply<T>(d0, w, shared, first, 0);
            put(d1, line + 1);
            await(1);
            multiply<T>(d1, w, shared, first, 1);
            line += 2, left -= 2;
        }
        first = done;
        if (left > 1) put(d1, line + 1);

        auto mine = [&](int e) { return (max(item.columns - 2 * quad - e, 0) + 7) / 8; };  // columns 8 j + 2 quad + e
        float n = float((mine(0) + mine(1)) * item.rows);
        if (n > 0)
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                float offset = sums.sum[m] / n, m2 = sums.squares[m] - sums.sum[m] * offset;
                moments[m].join(n, sums.shift[m] + offset, m2 < 0 ? 0 : m2);  // not fmaxf, which would lose a NaN
            }
    }
    if (a.partials) {
        float* out = a.partials + int64_t(blockIdx.x) * 3 * kCouts + 16 * warp + lane / 4;
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            Moments& total = moments[m];
#pragma unroll
            for (int step = 1; step < 4; step *= 2)
                total.join(__shfl_xor_sync(~0u, total.n, step), __shfl_xor_sync(~0u, total.mean, step),
                           __shfl_xor_sync(~0u, total.m2, step));
            if (quad == 0) out[8 * m] = total.n, out[8 * m + kCouts] = total.mean, out[8 * m + 2 * kCouts] = total.m2;
        }
    }
    if (thread == 0) store_wait<0>();
}

template <typename T, int kCi, int kN>
__global__ void __launch_bounds__(kThreads, 2)
    stem_fwd_kernel(const __grid_constant__ CUtensorMap map, const __grid_constant__ StemFwdArgs a) {
    extern __shared__ __align__(1024) char memory[];
    StemShared<FwdTile<kCi, kN>> shared(memory);
    shared.prepare();
    __syncthreads();
    dependency_wait();
    int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    if (group == 0) {
        give_registers<kProducerRegisters>();
        if (a.x_type == PixelType::bf16)
            produce<T, __nv_bfloat16>(a, shared);
        else if (a.x_type == PixelType::fp16)
            produce<T, __half>(a, shared);
        else
            produce<T, float>(a, shared);
    } else {
        take_registers<kConsumerRegisters>();
        consume<T>(a, map, shared);
    }
}

// ---- Host.

struct StemFwdPlan {
    int out_height, out_width;
    int columns;  // N
    int strip, strips, tile, tiles, items, blocks;
};

// The tile and the strip that finish first; or why there are none. An item takes as long as its pairs of rows, and some
// more until its first products.
const char* fwd_plan(StemFwdPlan& best, const StemShape& s) {
    int device, processors;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    if (const char* reason = clip_why_not("stem_fwd", s)) return reason;
    int64_t height = (s.height + 1) / 2, width = (s.width + 1) / 2, pairs = (height + 1) / 2;
    double images = double(s.clips) * double(s.frames);
    if (images * double(height) > 2147000000.0) return "stem_fwd: expected fewer than 2^31 rows of outputs";

    double best_cost = -1;
    for (int n : {56, 64, 80}) {
        if (n > 56 && s.channels > 3) continue;
        int64_t tile = std::min<int64_t>(width, n), tiles = (width + tile - 1) / tile;
        for (int64_t strips = 1; strips <= pairs; ++strips) {
            int64_t strip = (pairs + strips - 1) / strips;
            if ((pairs + strip - 1) / strip != strips) continue;
            double items = images * double(strips * tiles);
            if (items > 2147000000.0) break;
            double turns = double((int64_t(items) + 2 * processors - 1) / (2 * processors));
            double cost = turns * double(strip + 2) * (n + 8);
            if (best_cost >= 0 && cost >= best_cost) continue;
            best_cost = cost;
            best = {int(height), int(width),  n,
                    int(strip),  int(strips), int(tile),
                    int(tiles),  int(items),  std::min(int(items), 2 * processors)};
        }
    }
    return best_cost < 0 ? "stem_fwd: expected fewer than 2^31 tiles" : nullptr;
}

template <typename T, int kCi, int kN>
const char* launch(const StemFwdPlan& plan, const CUtensorMap& map, const StemFwdArgs& args, cudaStream_t stream) {
    constexpr int kShared = FwdTile<kCi, kN>::kShared;
    cudaError_t error =
        launch_dependent(stem_fwd_kernel<T, kCi, kN>, dim3(plan.blocks), kThreads, kShared, stream, map, args);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename T, int kCi>
const char* launch(const StemFwdPlan& plan, const CUtensorMap& map, const StemFwdArgs& args, cudaStream_t stream) {
    if (plan.columns == 56) return launch<T, kCi, 56>(plan, map, args, stream);
    if constexpr (kCi < 4) {
        if (plan.columns == 64) return launch<T, kCi, 64>(plan, map, args, stream);
        if (plan.columns == 80) return launch<T, kCi, 80>(plan, map, args, stream);
    }
    return "stem_fwd: no kernel for the planned tile";
}

template <typename T>
const char* launch(const StemFwdPlan& plan, const CUtensorMap& map, const StemFwdArgs& args, cudaStream_t stream) {
    if (args.channels < 3) return launch<T, 2>(plan, map, args, stream);
    return args.channels == 3 ? launch<T, 3>(plan, map, args, stream) : launch<T, 4>(plan, map, args, stream);
}

}  // namespace

const char* stem_fwd_why_not(const StemShape& shape) {
    StemFwdPlan plan;
    return fwd_plan(plan, shape);
}

int stem_fwd_partials(const StemShape& shape) {
    StemFwdPlan plan;
    return fwd_plan(plan, shape) ? 0 : plan.blocks;
}

const char* stem_fwd(const StemFwd& p) {
    if (p.x_type == PixelType::uint8 || p.w_type == PixelType::uint8)
        return "stem_fwd: expected float32, float16 or bfloat16 pixels and weights, got uint8";
    StemFwdPlan plan;
    if (const char* error = fwd_plan(plan, p.shape)) return error;
    StemFwdArgs args{};
    clip_args(args, p.x, p.shape, p.strides, p.x_type);
    args.w = p.w;
    args.w_type = p.w_type;
    args.partials = p.partials;
    args.out_height = plan.out_height;
    args.out_width = plan.out_width;
    args.strip = plan.strip;
    args.strips = plan.strips;
    args.tile = plan.tile;
    args.tiles = plan.tiles;
    args.items = plan.items;
    CUtensorMap map{};
    int64_t rows = p.shape.clips * p.shape.frames * plan.out_height;
    if (const char* error = tensor_map("stem_fwd", map, p.z, p.dtype, rows, plan.out_width, kCouts, plan.tile))
        return error;
    return p.dtype == DType::bf16 ? launch<__nv_bfloat16>(plan, map, args, p.stream)
                                  : launch<__half>(plan, map, args, p.stream);
}

}  // namespace p3d
