// The weight gradient of conv_wgrad.cu where both operands are tensors as they are:
//
// dW[co][tap][ci] = sum over positions of G[position, co] * X[position + tap, ci]
//
// A block owns a tile of dW, 128 or 256 couts by 128 columns or 128 by three taps of 64, and a run of the positions.
// One thread has the copy engine bring these in boxes of 64 channels; two warpgroups multiply, each half of the couts.
// Nothing is done to an element, so bytes bind: those from the second-level cache, which larger tiles save, and those
// of partial sums, one tile from each block, which they cost. A cluster of two blocks, neighbours in columns, brings
// each box of G for both; and several gradients share a launch: together they fill the card with fewer splits of each.
//
// Positions have the coordinates (w, h, f), and a box covers up to 64 of them:
//   1x1x1            w = all positions
//   1x1x1, stride 2  w, h = those of the output, f = frames; the strides of the map skip the rest
//   3x1x1            w = those of a clip, f = clips: a tap moves by the H W positions of a frame
// What lies outside is zero. A box of fewer than 64 positions leaves rows of shared memory that are zeroed once.
//
// Sums leave through the ring, when it has been read: rows of a tile as wide copies, where threads would store 32 bytes
// here and there.
#include <algorithm>
#include <iterator>

#include "p3d.h"
#include "rows.cuh"
#include "spatial_infer.cuh"

namespace p3d {
namespace {

constexpr int kThreads = 288;  // two warpgroups that multiply, a warp that copies
constexpr int kConsumers = 256;
constexpr int kMaxRing = 8;

struct Problem {
    CUtensorMap g, x;  // [f, h, w, C]
    float* partials;   // [splits, Co * taps * Ci]
    int begin;         // the first of its blocks
    int kind;          // of kTiles
    int in_channels, out_channels;
    int tap_step;  // positions from a tap to the next
    int width, height;
    int box_width, box_height, box_frames, box_bytes;
    int w_boxes, h_boxes, boxes;  // side by side, below each other, in all
    int turns;                    // boxes of a block, at most
    int column_tiles, tiles;      // of dW
    bool paired;
};

struct Problems {
    Problem of[kRawWgrads];
    int count;
};

template <int kRowChunks, int kColumnChunks>
struct Tile {
    static constexpr int kRows = kRowChunks, kColumns = kColumnChunks;  // of 64
    static constexpr bool kInTime = kColumns == 3;                      // three taps of the same channels
    static constexpr int kStageBytes = (kRows + kColumns) * kBoxBytes;
    // A row of sums on its way out. 32 bytes more than a multiple of 128: a warp's stores of eight rows meet no bank
    // twice.
    static constexpr int kStagedRow = kColumns * kChunk * 4 + 32;
    static constexpr int kStages = std::min(kMaxRing, kSharedLimit / (kStageBytes + 16));
    static_assert(kStages > 1 && kRows * kChunk * kStagedRow <= kStages * kStageBytes, "the tile fits in the ring");
};

// What this block computes.
template <typename Shape>
struct Job {
    int cout, channel;  // the first of its rows and of its columns
    int split, first, count;

    __device__ __forceinline__ explicit Job(const Problem& a) {
        int block = blockIdx.x - a.begin;
        split = block / a.tiles;
        int tile = block - split * a.tiles, row = tile / a.column_tiles;
        cout = row * Shape::kRows * kChunk;
        channel = (tile - row * a.column_tiles) * (Shape::kInTime ? 1 : Shape::kColumns) * kChunk;
        first = split * a.turns;
        count = min(a.turns, a.boxes - first);
    }
};

// copy_box to both blocks of the cluster, at the same place and with the same barrier of each.
__device__ __forceinline__ void copy_box_to_both(uint32_t target, const CUtensorMap& map, uint32_t barrier, int i0,
                                                 int i1, int i2, int i3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
        "[%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(target),
        "l"(&map), "r"(barrier), "r"(i0), "r"(i1), "r"(i2), "r"(i3), "h"(uint16_t(3))
        : "memory");
}

// Copies a multiple of 16 bytes to memory.
__device__ __forceinline__ void store_bytes(float* target, uint32_t source, int bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(target), "r"(source), "r"(bytes)
                 : "memory");
}

template <typename Shape>
__device__ __forceinline__ void produce(const Problem& a, Ring ring, const Job<Shape>& job) {
    int bytes = (Shape::kRows + Shape::kColumns) * a.box_bytes;
    int share = a.paired ? Shape::kRows / 2 : Shape::kRows, begin = a.paired ? blockIdx.x % 2 * share : 0;  // of G
    int line = job.first / a.w_boxes, frame = line / a.h_boxes;
    int w = (job.first - line * a.w_boxes) * a.box_width, h = (line - frame * a.h_boxes) * a.box_height;
    int f = frame * a.box_frames;
    for (int i = 0; i < job.count; ++i, ring.advance()) {
        uint32_t full = ring.full(), target = ring.slot();
        barrier_wait(full + 8, ring.parity ^ 1);
        barrier_expect(full, bytes);  // the other block's half of G comes by itself
        for (int k = begin; k < begin + share; ++k) {
            int cout = job.cout + k * kChunk;
            if (a.paired)
                copy_box_to_both(target + k * kBoxBytes, a.g, full, cout, w, h, f);
            else
                copy_box(target + k * kBoxBytes, a.g, full, cout, w, h, f);
        }
        target += Shape::kRows * kBoxBytes;
        for (int k = 0; k < Shape::kColumns; ++k)
            copy_box(target + k * kBoxBytes, a.x, full, job.channel + (Shape::kInTime ? 0 : k * kChunk),
                     Shape::kInTime ? w + (k - 1) * a.tap_step : w, h, f);
        if ((w += a.box_width) < a.width) continue;
        w = 0;
        if ((h += a.box_height) < a.height) continue;
        h = 0, f += a.box_frames;
    }
}

template <typename T, typename Shape>
__device__ __forceinline__ void consume(const Problem& a, Ring ring, const Job<Shape>& job, int warp) {
    constexpr int kM = Shape::kRows / 2, kWidth = Shape::kColumns * kChunk, kStep = kBoxBytes / 16;
    int lane = threadIdx.x % 32, first = warp / 4 * kM;  // of the warpgroup's rows
    float d[kM][kWidth / 2];
#pragma unroll
    for (int m = 0; m < kM; ++m) zero(d[m]);
    int last = -1;
    for (int i = 0; i < job.count; ++i) {
        int slot = ring.index;
        uint32_t stage = ring.take();
        uint64_t g = swizzled_descriptor(stage + first * kBoxBytes, 1024);
        // Of columns, lbo leads to the next 64.
        uint64_t x = plain_descriptor(stage + Shape::kRows * kBoxBytes, kBoxBytes, 1024) | uint64_t(1) << 62;
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kUnit / 16; ++k)
#pragma unroll
            for (int m = 0; m < kM; ++m) wgmma_outer<T>(d[m], g + m * kStep + k * 128, x + k * 128);
        wgmma_commit();
        wgmma_wait<1>();  // the stage before has been read
        if (last >= 0 && lane <= a.paired) barrier_arrive_at(ring.barriers + 16 * last + 8, lane);
        last = slot;
    }
    wgmma_wait<0>();
#pragma unroll
    for (int m = 0; m < kM; ++m) wgmma_pin(d[m]);
    named_sync(1, kConsumers);  // nobody reads the ring any more, and all that was to come to it has been waited for

    constexpr int kPitch = Shape::kStagedRow;
    uint32_t mine = ring.slots + 16 * kM * warp * kPitch;  // 16 rows of each 64
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int j = 0; j < kWidth / 8; ++j)
                store_shared(
                    mine + (16 * m + 8 * half + lane / 4) * kPitch + 32 * j + 8 * (lane % 4),
                    uint2{__float_as_uint(d[m][4 * j + 2 * half]), __float_as_uint(d[m][4 * j + 2 * half + 1])});
    fence_proxy_async();
    __syncwarp();
    if (lane < 16 * kM) {
        int columns = (Shape::kInTime ? 3 : 1) * a.in_channels;
        int cout = job.cout + (first + lane / 16) * kChunk + 16 * (warp % 4) + lane % 16;
        float* target = a.partials + (int64_t(job.split) * a.out_channels + cout) * columns + job.channel;
        uint32_t source = mine + lane * kPitch;
        if (Shape::kInTime)
            for (int tap = 0; tap < 3; ++tap)
                store_bytes(target + tap * a.in_channels, source + 4 * kChunk * tap, 4 * kChunk);
        else
            store_bytes(target, source, 4 * kWidth);
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
        store_wait<0>();
    }
}

template <typename T, typename Shape>
__device__ __forceinline__ void run(const Problem& a) {
    extern __shared__ __align__(1024) char memory[];
    uint32_t slots = shared_address(memory);
    Ring ring(slots, slots + Shape::kStages * Shape::kStageBytes, Shape::kStageBytes, Shape::kStages);
    if (threadIdx.x == 0) {
        prefetch_map(a.g), prefetch_map(a.x);
        for (int i = 0; i < Shape::kStages; ++i)  // emptied by the warps that multiply, of both blocks
            barrier_init(ring.barriers + 16 * i, 1), barrier_init(ring.barriers + 16 * i + 8, a.paired ? 16 : 8);
        barrier_init_fence();
    }
    for (int box = 0; box < Shape::kStages * (Shape::kRows + Shape::kColumns); ++box)
        for (int byte = a.box_bytes + 16 * int(threadIdx.x); byte < kBoxBytes; byte += 16 * kThreads)
            store_shared(slots + box * kBoxBytes + byte, uint4{});
    fence_proxy_async();
    __syncthreads();
    if (a.paired) cluster_sync();
    dependency_wait();
    Job<Shape> job(a);
    int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // the same register for the warp, as the compiler can tell
    if (warp < kConsumers / 32)
        consume<T>(a, ring, job, warp);
    else if (threadIdx.x == kConsumers)
        produce(a, ring, job);
    if (a.paired) cluster_sync();  // nobody leaves while the other block may still free a stage here
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) raw_wgrad_kernel(const __grid_constant__ Problems problems) {
    int i = problems.count - 1;
    while (int(blockIdx.x) < problems.of[i].begin) --i;
    const Problem& mine = problems.of[i];
    if (mine.kind == 0)
        run<T, Tile<2, 2>>(mine);
    else if (mine.kind == 1)
        run<T, Tile<4, 2>>(mine);
    else
        run<T, Tile<2, 3>>(mine);
}

// ---- Host.

struct TileKind {
    int rows, columns, shared;
};
template <typename Shape>
constexpr TileKind kind_of() {
    return {Shape::kRows, Shape::kColumns, Shape::kStages * (Shape::kStageBytes + 16)};
}
constexpr TileKind kTiles[] = {kind_of<Tile<2, 2>>(), kind_of<Tile<4, 2>>(), kind_of<Tile<2, 3>>()};

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Positions by their coordinates, and the box of which there are fewest: all of a row or some equal parts or 32 or 16
// of it, some equal parts of the rows, and as many frames as fit.
struct Grid {
    int64_t width, height, frames, boxes = 0;
    int64_t box_width, box_height, box_frames;

    explicit Grid(const RawWgradShape& s) {
        if (s.taps == 3)
            width = s.time * s.height * s.width, height = 1, frames = s.clips;
        else if (s.stride == 1)
            width = s.clips * s.time * s.height * s.width, height = 1, frames = 1;
        else
            width = (s.width - 1) / s.stride + 1, height = (s.height - 1) / s.stride + 1, frames = s.clips * s.time;
        int64_t widest = std::min<int64_t>(kUnit, width);
        consider(widest);
        if (height == 1 && frames == 1) return;
        for (int64_t parts = ceil_divide(width, widest) + 1, end = parts + 3; parts < end; ++parts)
            consider(ceil_divide(width, parts));
        for (int64_t w : {32, 16})
            if (w < widest) consider(w);
    }

    void consider(int64_t w) {
        int64_t fewest = ceil_divide(height, std::min(height, kUnit / w));
        for (int64_t parts = fewest; parts <= std::min(height, fewest + 3); ++parts) {
            int64_t h = ceil_divide(height, parts), f = std::min(frames, kUnit / (w * h));
            int64_t count = ceil_divide(width, w) * ceil_divide(height, h) * ceil_divide(frames, f);
            if (boxes && count >= boxes) continue;
            boxes = count, box_width = w, box_height = h, box_frames = f;
        }
    }
};

// How dW of one shape is divided.
struct Division {
    int row_tiles, column_tiles;
    int64_t turns, splits;
    double cycles;  // of a block, about

    int64_t blocks() const { return splits * row_tiles * column_tiles; }
};

// In cycles, a turn brings boxes from the second-level cache at 28 bytes and into shared memory at 44, while 64
// positions of a 64 by 64 product take 142; a block starts in 3500 and stores its tile at 20 bytes.
bool divide(Division& d, const RawWgradShape& s, int kind, int blocks, int64_t boxes, int64_t splits) {
    const TileKind& tile = kTiles[kind];
    int64_t rows = s.out_channels / kChunk, columns = s.in_channels / kChunk;
    if ((s.taps == 3) != (tile.columns == 3) || rows % tile.rows) return false;
    d.row_tiles = int(rows / tile.rows);
    d.column_tiles = int(s.taps == 3 ? columns : columns / tile.columns);
    d.turns = ceil_divide(boxes, splits);
    d.splits = ceil_divide(boxes, d.turns);
    double brought = (double(tile.rows) / blocks + tile.columns) * kBoxBytes / 28;
    double copied = (tile.rows + tile.columns) * kBoxBytes / 44.0, multiplied = 142.0 * tile.rows * tile.columns;
    double stored = tile.rows * tile.columns * kChunk * kChunk * 4 / 20.0;
    d.cycles = double(d.turns) * (std::max({brought, copied, multiplied}) + 60) + 3500 + stored;
    return d.column_tiles % blocks == 0;
}

int tile_kind(const RawWgradShape& s, int rows) { return s.taps == 3 ? 2 : rows == 256 ? 1 : 0; }

const char* tensor_map(CUtensorMap& map, const void* base, DType dtype, const RawWgradShape& s, int64_t channels,
                       bool strided, const Grid& grid) {
    int64_t across = 1, down = grid.width, frame = grid.width * grid.height;  // positions to the next w, h, f
    if (strided && s.stride > 1) across = s.stride, down = s.stride * s.width, frame = s.height * s.width;
    cuuint64_t sizes[] = {cuuint64_t(channels), cuuint64_t(grid.width), cuuint64_t(grid.height),
                          cuuint64_t(grid.frames)};
    cuuint64_t strides[] = {cuuint64_t(2 * channels * across), cuuint64_t(2 * channels * down),
                            cuuint64_t(2 * channels * frame)};
    cuuint32_t boxes[] = {kChunk, cuuint32_t(grid.box_width), cuuint32_t(grid.box_height), cuuint32_t(grid.box_frames)};
    return tensor_map("raw_wgrad", map, base, dtype, 4, sizes, strides, boxes);
}

}  // namespace

const char* raw_wgrad_why_not(const RawWgradShape& s) {
    using Long = long long;
    if (s.taps != 1 && s.taps != 3) return fail("raw_wgrad: taps: expected 1 or 3, got %d", s.taps);
    if (s.stride < 1 || s.stride > 2 || (s.taps == 3 && s.stride != 1))
        return fail("raw_wgrad: stride: expected 1, or 2 of 1x1x1, got %d of %d taps", s.stride, s.taps);
    for (int64_t size : {s.clips, s.time, s.height, s.width})
        if (size < 1 || size >= 1 << 30)
            return fail("raw_wgrad: expected N, T, H, W from 1 to 2^30 - 1, got %lld, %lld, %lld, %lld", Long(s.clips),
                        Long(s.time), Long(s.height), Long(s.width));
    if (double(s.clips) * double(s.time) * double(s.height) * double(s.width) > 1e9)
        return fail("raw_wgrad: expected N T H W up to 10^9, got N, T, H, W = %lld, %lld, %lld, %lld", Long(s.clips),
                    Long(s.time), Long(s.height), Long(s.width));
    int64_t unit = s.taps == 3 ? kChunk : 2 * kChunk;
    if (s.in_channels < 1 || s.in_channels % unit || s.out_channels < 1 || s.out_channels % (2 * kChunk) ||
        std::max(s.in_channels, s.out_channels) > 16384)
        return fail("raw_wgrad: channels: expected multiples of %lld and 128 up to 16384, got %lld -> %lld", Long(unit),
                    Long(s.in_channels), Long(s.out_channels));
    return nullptr;
}

// Of the ways to choose tiles and clusters, each with more and more splits of the gradient whose blocks take longest,
// the one that ends first; all multiprocessors then sum 2300 bytes of partial sums a cycle.
const char* raw_wgrad_plan(RawWgradTile* tiles, int& blocks, const RawWgradShape* shapes, int count) {
    int device, processors;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    if (count < 1 || count > kRawWgrads)
        return fail("raw_wgrad: expected 1 to %d gradients, got %d", kRawWgrads, count);
    int64_t boxes[kRawWgrads];
    for (int i = 0; i < count; ++i) {
        if (const char* reason = raw_wgrad_why_not(shapes[i])) return reason;
        boxes[i] = Grid(shapes[i]).boxes;
    }
    double best = -1;
    RawWgradTile found[kRawWgrads];
    int found_blocks = 0;
    for (int choice = 0; choice < 2 << count; ++choice) {
        int pair = 1 + choice % 2, rows[kRawWgrads];
        Division of[kRawWgrads];
        bool fits = !blocks || blocks == pair;
        for (int i = 0; i < count && fits; ++i) {
            rows[i] = choice >> (i + 1) & 1 ? 256 : 128;
            fits =
                (!tiles[i].rows || tiles[i].rows == rows[i]) && (shapes[i].taps == 1 || rows[i] == 128) &&
                divide(of[i], shapes[i], tile_kind(shapes[i], rows[i]), pair, boxes[i], std::max(1, tiles[i].splits));
        }
        while (fits) {
            int64_t all = 0;
            double longest = 0, work = 0, sums = 0;
            int next = -1;
            for (int i = 0; i < count; ++i) {
                all += of[i].blocks();
                work += double(of[i].blocks()) * of[i].cycles;
                longest = std::max(longest, of[i].cycles);
                sums +=
                    double(of[i].splits) * shapes[i].out_channels * shapes[i].taps * shapes[i].in_channels * 4 / 2300;
                if (!tiles[i].splits && (next < 0 || of[i].cycles > of[next].cycles)) next = i;
            }
            double cost = (all <= processors ? longest : work / processors + longest / 2) + sums;
            if (best < 0 || cost < best) {
                best = cost, found_blocks = pair;
                for (int i = 0; i < count; ++i) found[i] = {rows[i], int(of[i].splits)};
            }
            if (next < 0 || of[next].turns == 1) break;
            // One turn less, at least.
            int64_t splits = ceil_divide(boxes[next], of[next].turns - 1), before = of[next].blocks();
            divide(of[next], shapes[next], tile_kind(shapes[next], rows[next]), pair, boxes[next], splits);
            int64_t others = all - before;
            fits = others + of[next].blocks() <= processors;
        }
    }
    if (best < 0) return "raw_wgrad: no such tile";
    blocks = found_blocks;
    std::copy(found, found + count, tiles);
    return nullptr;
}

const char* raw_wgrad(const RawWgrad* p, int count, int blocks, DType dtype, CUstream_st* stream) {
    if (count < 1 || count > kRawWgrads)
        return fail("raw_wgrad: expected 1 to %d gradients, got %d", kRawWgrads, count);
    Problems problems{};
    int64_t begin = 0;
    int shared = 0;
    for (int i = 0; i < count; ++i) {
        const RawWgradShape& s = p[i].shape;
        if (const char* reason = raw_wgrad_why_not(s)) return reason;
        Grid grid(s);
        Division of;
        int kind = tile_kind(s, p[i].tile.rows);
        if (p[i].tile.splits < 1 || blocks < 1 || blocks > 2 ||
            !divide(of, s, kind, blocks, grid.boxes, p[i].tile.splits) || of.splits != p[i].tile.splits ||
            begin + of.blocks() > 1 << 30)
            return "raw_wgrad: expected tiles and blocks as raw_wgrad_plan makes them";
        Problem& to = problems.of[i];
        if (const char* error = tensor_map(to.g, p[i].g, dtype, s, s.out_channels, s.g_strided, grid)) return error;
        if (const char* error = tensor_map(to.x, p[i].x, dtype, s, s.in_channels, true, grid)) return error;
        to.partials = p[i].partials;
        to.begin = int(begin);
        to.kind = kind;
        to.in_channels = int(s.in_channels);
        to.out_channels = int(s.out_channels);
        to.tap_step = int(s.height * s.width);
        to.width = int(grid.width);
        to.height = int(grid.height);
        to.box_width = int(grid.box_width);
        to.box_height = int(grid.box_height);
        to.box_frames = int(grid.box_frames);
        to.box_bytes = to.box_width * to.box_height * to.box_frames * kChunk * 2;
        to.w_boxes = int(ceil_divide(grid.width, grid.box_width));
        to.h_boxes = int(ceil_divide(grid.height, grid.box_height));
        to.boxes = int(grid.boxes);
        to.turns = int(of.turns);
        to.column_tiles = of.column_tiles;
        to.tiles = of.row_tiles * of.column_tiles;
        to.paired = blocks == 2;
        begin += of.blocks();
        shared = std::max(shared, kTiles[kind].shared);
    }
    problems.count = count;
    auto kernel = dtype == DType::bf16 ? raw_wgrad_kernel<__nv_bfloat16> : raw_wgrad_kernel<__half>;
    cudaError_t error =
        launch_dependent(kernel, dim3(unsigned(begin)), kThreads, shared, stream, dim3(blocks), problems);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace p3d
