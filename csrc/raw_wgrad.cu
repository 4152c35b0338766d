// The weight gradient of conv_wgrad.cu, and of 1x3x3, where both operands are tensors as they are:
//
// dW[co][tap][ci] = sum over positions of G[position, co] * X[position + tap, ci]
//
// A block owns a tile of dW, 128 couts by 128 or 256 channels of one tap, and a run of the positions. One thread has
// the copy engine bring these in boxes of 64 channels; two warpgroups multiply, each half of the couts. Nothing is done
// to an element, so what binds is the matrix unit, with tiles of 128 channels shared memory, and bytes: those from the
// second-level cache, and those of partial sums, one tile from each block. Several gradients share a launch: together
// they fill the card with fewer splits of each.
//
// Positions have the coordinates (w, h, f), and a box covers up to 64 of them:
//   1x1x1            w = all positions
//   1x1x1, stride 2  w, h = those of the output, f = frames; the strides of the map skip the rest
//   1x3x3            w, h = those of a frame, f = frames
//   3x1x1            w = those of a frame, h = frames of a clip, f = clips
// so that a tap is a step along w and h. Positions of which it reads padding are left out; what else lies outside is
// zero. A box of fewer than 64 positions leaves rows of shared memory that are zeroed once.
//
// Sums leave through the ring, when it has been read: rows of a tile as wide copies, where threads would store 32 bytes
// here and there.
#include <algorithm>
#include <vector>

#include "p3d.h"
#include "rows.cuh"

namespace p3d {
namespace {

constexpr int kThreads = 288;  // two warpgroups that multiply, a warp that copies
constexpr int kConsumers = 256;
constexpr int kMaxRing = 8;

struct Problem {
    CUtensorMap g, x;  // [f, h, w, C]
    float* partials;   // [splits, Co, taps, Ci]
    int64_t order;     // of the taps, a digit of 16 each, the least first: those of most positions first
    int begin;         // the first of its blocks
    int in_channels, out_channels;
    int taps, taps_high, taps_wide;
    int width, height;
    int box_width, box_height, box_frames, box_bytes;
    int f_boxes;
    int row_tiles, tiles;  // of a tap of dW
    int splits;
};

struct Problems {
    Problem of[kRawWgrads];
    int count, stages;
};

template <int kColumnChunks>
struct Tile {
    static constexpr int kRows = 2, kColumns = kColumnChunks;  // of 64
    static constexpr int kResidents = kColumns > 2 ? 1 : 2;    // blocks of a multiprocessor, at most
    static constexpr int kStageBytes = (kRows + kColumns) * kBoxBytes;
    // A row of sums on its way out. 32 bytes more than a multiple of 128: a warp's stores of eight rows meet no bank
    // twice.
    static constexpr int kStagedRow = kColumns * kChunk * 4 + 32;
    static constexpr int stages(int residents) {
        return std::min(kMaxRing, ((kSharedLimit + 1024) / residents - 1024) / (kStageBytes + 16));
    }
};

// The positions of one axis of which a tap reads others, `step` on.
struct Axis {
    int step, first, end, boxes;

    __device__ __forceinline__ Axis(int tap, int taps, int size, int box)
        : step(tap - taps / 2),
          first(step < 0 ? -step : 0),
          end(step > 0 ? size - step : size),
          boxes(end > first ? (end - first - 1) / box + 1 : 0) {}
};

// What this block computes.
template <typename Shape>
struct Job {
    int cout, channel, tap;  // the first of its rows and of its columns
    int split, first, count;
    Axis w, h;

    __device__ __forceinline__ Job(const Problem& a, int part, int tile)
        : tap(int(a.order >> part / a.splits * 4) & 15),
          split(part % a.splits),
          w(tap % a.taps_wide, a.taps_wide, a.width, a.box_width),
          h(tap / a.taps_wide, a.taps_high, a.height, a.box_height) {
        cout = tile % a.row_tiles * Shape::kRows * kChunk;
        channel = tile / a.row_tiles * Shape::kColumns * kChunk;
        int boxes = w.boxes * h.boxes * a.f_boxes, share = boxes / a.splits, more = boxes - share * a.splits;
        first = split * share + min(split, more);
        count = share + (split < more);
    }
};

// Copies a multiple of 16 bytes to memory.
__device__ __forceinline__ void store_bytes(float* target, uint32_t source, int bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(target), "r"(source), "r"(bytes)
                 : "memory");
}

template <typename Shape>
__device__ __forceinline__ void produce(const Problem& a, Ring ring, const Job<Shape>& job) {
    if (job.count == 0) return;
    int bytes = (Shape::kRows + Shape::kColumns) * a.box_bytes;
    int line = job.first / job.w.boxes, frame = line / job.h.boxes;
    int w = job.w.first + (job.first - line * job.w.boxes) * a.box_width;
    int h = job.h.first + (line - frame * job.h.boxes) * a.box_height;
    int f = frame * a.box_frames;
    for (int i = 0; i < job.count; ++i, ring.advance()) {
        uint32_t full = ring.full(), target = ring.slot();
        barrier_wait(full + 8, ring.parity ^ 1);
        barrier_expect(full, bytes);
#pragma unroll
        for (int k = 0; k < Shape::kRows; ++k)
            copy_box(target + k * kBoxBytes, a.g, full, job.cout + k * kChunk, w, h, f);
        target += Shape::kRows * kBoxBytes;
#pragma unroll
        for (int k = 0; k < Shape::kColumns; ++k)
            copy_box(target + k * kBoxBytes, a.x, full, job.channel + k * kChunk, w + job.w.step, h + job.h.step, f);
        if ((w += a.box_width) < job.w.end) continue;
        w = job.w.first;
        if ((h += a.box_height) < job.h.end) continue;
        h = job.h.first, f += a.box_frames;
    }
}

template <typename T, typename Shape>
__device__ __forceinline__ void consume(const Problem& a, Ring ring, const Job<Shape>& job, int warp) {
    constexpr int kWidth = Shape::kColumns * kChunk;
    int lane = threadIdx.x % 32;
    float d[kWidth / 2];
    zero(d);
    int last = -1;
    for (int i = 0; i < job.count; ++i) {
        int slot = ring.index;
        uint32_t stage = ring.take();
        uint64_t g = swizzled_descriptor(stage + warp / 4 * kBoxBytes, 1024);  // of the warpgroup's rows
        // Of columns, lbo leads to the next 64.
        uint64_t x = plain_descriptor(stage + Shape::kRows * kBoxBytes, kBoxBytes, 1024) | uint64_t(1) << 62;
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kUnit / 16; ++k) wgmma_outer<T>(d, g + k * 128, x + k * 128);
        wgmma_commit();
        wgmma_wait<1>();  // the stage before has been read
        if (last >= 0 && lane == 0) release(ring, last);
        last = slot;
    }
    wgmma_wait<0>();
    wgmma_pin(d);
    named_sync(1, kConsumers);  // nobody reads the ring any more, and all that was to come to it has been waited for

    constexpr int kPitch = Shape::kStagedRow;
    uint32_t mine = ring.slots + 16 * warp * kPitch;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int j = 0; j < kWidth / 8; ++j)
            store_shared(mine + (8 * half + lane / 4) * kPitch + 32 * j + 8 * (lane % 4),
                         uint2{__float_as_uint(d[4 * j + 2 * half]), __float_as_uint(d[4 * j + 2 * half + 1])});
    fence_proxy_async();
    __syncwarp();
    if (lane < 16) {
        int64_t row = int64_t(job.split) * a.out_channels + job.cout + 16 * warp + lane;
        store_bytes(a.partials + (row * a.taps + job.tap) * a.in_channels + job.channel, mine + lane * kPitch,
                    4 * kWidth);
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
        store_wait<0>();
    }
}

template <typename T, typename Shape>
__global__ void __launch_bounds__(kThreads, Shape::kResidents)
    raw_wgrad_kernel(const __grid_constant__ Problems problems) {
    int i = problems.count - 1;
    while (int(blockIdx.x) < problems.of[i].begin) --i;
    const Problem& a = problems.of[i];
    extern __shared__ __align__(1024) char memory[];
    uint32_t slots = shared_address(memory);
    Ring ring(slots, slots + problems.stages * Shape::kStageBytes, Shape::kStageBytes, problems.stages);
    if (threadIdx.x == 0) {
        prefetch_map(a.g), prefetch_map(a.x);
        for (int i = 0; i < ring.count; ++i)  // emptied by the warps that multiply
            barrier_init(ring.barriers + 16 * i, 1), barrier_init(ring.barriers + 16 * i + 8, kConsumers / 32);
        barrier_init_fence();
    }
    for (int box = 0; box < ring.count * (Shape::kRows + Shape::kColumns); ++box)
        for (int byte = a.box_bytes + 16 * int(threadIdx.x); byte < kBoxBytes; byte += 16 * kThreads)
            store_shared(slots + box * kBoxBytes + byte, uint4{});
    fence_proxy_async();
    __syncthreads();
    dependency_wait();
    int block = blockIdx.x - a.begin, part = block / a.tiles;
    Job<Shape> job(a, part, block - part * a.tiles);
    int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // the same register for the warp, as the compiler can tell
    if (warp < kConsumers / 32)
        consume<T>(a, ring, job, warp);
    else if (threadIdx.x == kConsumers)
        produce(a, ring, job);
}

// ---- Host.

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Positions by their coordinates, and the box of which there are fewest: along w and h a power of two or some equal
// parts, and as many frames as fit.
struct Grid {
    int taps_high = 1, taps_wide = 1;
    int64_t width, height, frames, boxes = 0, most;  // of all taps, of one
    int64_t box_width, box_height, box_frames, f_boxes;

    explicit Grid(const RawWgradShape& s) {
        if (s.taps == 3)
            width = s.height * s.width, height = s.time, frames = s.clips, taps_high = 3;
        else if (s.taps == 9)
            width = s.width, height = s.height, frames = s.clips * s.time, taps_high = taps_wide = 3;
        else if (s.stride == 1)
            width = s.clips * s.time * s.height * s.width, height = 1, frames = 1;
        else
            width = (s.width - 1) / s.stride + 1, height = (s.height - 1) / s.stride + 1, frames = s.clips * s.time;
        along(width, kUnit, [&](int64_t w) {
            int64_t across = of_taps(width, w, taps_wide);
            along(height, kUnit / w, [&](int64_t h) {
                int64_t f = std::min(frames, kUnit / (w * h)), deep = ceil_divide(frames, f);
                int64_t count = across * of_taps(height, h, taps_high) * deep;
                if (boxes && count >= boxes) return;
                boxes = count, box_width = w, box_height = h, box_frames = f, f_boxes = deep;
            });
        });
        most = ceil_divide(width, box_width) * ceil_divide(height, box_height) * f_boxes;
    }

    // Lengths of a box along an axis, the longest first.
    template <typename Try>
    static void along(int64_t size, int64_t room, const Try& consider) {
        int64_t longest = std::min(size, room), parts = ceil_divide(size, longest);
        consider(longest);
        for (int64_t n = parts + 1; n < parts + 4 && n < size; ++n) consider(ceil_divide(size, n));
        for (int64_t power = kUnit / 2; power > 0; power /= 2)
            if (power < longest) consider(power);
    }

    // Boxes along an axis, of all taps: those aside have a position less.
    static int64_t of_taps(int64_t size, int64_t box, int taps) {
        return ceil_divide(size, box) + (taps - 1) * ceil_divide(size - 1, box);
    }
};

// How dW of one shape is divided.
struct Division {
    int64_t row_tiles, column_tiles, turns, splits, blocks;
};

bool divide(Division& d, const RawWgradShape& s, int columns, const Grid& grid, int64_t splits) {
    d.row_tiles = s.out_channels / (2 * kChunk);
    d.column_tiles = s.in_channels / columns;
    d.turns = ceil_divide(grid.most, splits);
    d.splits = ceil_divide(grid.most, d.turns);
    d.blocks = s.taps * d.splits * d.row_tiles * d.column_tiles;
    return s.in_channels % columns == 0;
}

int residents(int columns) { return columns == 256 ? Tile<4>::kResidents : Tile<2>::kResidents; }

// About how many cycles a launch with tiles of so many columns takes. A turn takes 1140, or of 128 columns 590, and
// 1360 for two blocks that share a multiprocessor; the second-level cache gives 4700 or 5700 bytes a cycle. A block
// starts in 3500 and stores its tile at 20 bytes; all multiprocessors then sum 2300 bytes of partial sums.
double cycles(const RawWgradShape* shapes, const Grid* grids, const Division* of, int count, int columns,
              int64_t processors) {
    int64_t blocks = 0, room = residents(columns) * processors;
    for (int i = 0; i < count; ++i) blocks += of[i].blocks;
    int64_t at_once = std::min(blocks, room);
    double alone = columns == 256 ? 1140 : at_once > processors ? 1360 : 590;
    double brought = double((2 + columns / kChunk) * kBoxBytes * at_once) / (columns == 256 ? 4700 : 5700);
    double turn = std::max(alone, brought), fixed = 3500 + 2 * kChunk * columns * 4 / 20.0;
    double work = 0, sums = 0;
    int64_t most = 0;
    for (int i = 0; i < count; ++i) {
        most = std::max(most, of[i].turns);
        work += double(grids[i].boxes * of[i].row_tiles * of[i].column_tiles) * turn + double(of[i].blocks) * fixed;
        if (of[i].splits > 1 || shapes[i].taps > 1)
            sums += double(of[i].splits) * double(shapes[i].out_channels * shapes[i].taps * shapes[i].in_channels) * 4;
    }
    double last = double(most) * turn + fixed, tail = (double(most) * alone + fixed) / 2;
    return (blocks <= room ? last : work / double(room) + tail) + sums / 2300;
}

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

// The more stages, the fewer blocks to a multiprocessor.
template <typename Shape>
cudaError_t launch(Problems& problems, DType dtype, int64_t blocks, int processors, CUstream_st* stream) {
    constexpr int kFewest = Shape::stages(Shape::kResidents);
    static_assert(kFewest > 2 && Shape::kRows * kChunk * Shape::kStagedRow <= kFewest * Shape::kStageBytes,
                  "the tile fits in the ring");
    problems.stages = blocks > processors ? kFewest : Shape::stages(1);
    auto kernel = dtype == DType::bf16 ? raw_wgrad_kernel<__nv_bfloat16, Shape> : raw_wgrad_kernel<__half, Shape>;
    int shared = problems.stages * (Shape::kStageBytes + 16);
    return launch_dependent(kernel, dim3(unsigned(blocks)), kThreads, shared, stream, problems);
}

}  // namespace

const char* raw_wgrad_why_not(const RawWgradShape& s) {
    using Long = long long;
    if (s.taps != 1 && s.taps != 3 && s.taps != 9) return fail("raw_wgrad: taps: expected 1, 3 or 9, got %d", s.taps);
    if (s.stride < 1 || s.stride > 2 || (s.taps != 1 && s.stride != 1))
        return fail("raw_wgrad: stride: expected 1, or 2 of 1x1x1, got %d of %d taps", s.stride, s.taps);
    if (const char* reason = clip_sizes_why_not("raw_wgrad", s, 1e9, "up to 10^9")) return reason;
    for (int64_t channels : {s.in_channels, s.out_channels})
        if (channels < 1 || channels % (2 * kChunk) || channels > 16384)
            return fail("raw_wgrad: channels: expected multiples of 128 up to 16384, got %lld -> %lld",
                        Long(s.in_channels), Long(s.out_channels));
    return nullptr;
}

// Of the tiles, each with more and more splits of the gradient whose blocks take longest, what ends first.
const char* raw_wgrad_plan(RawWgradTile* tiles, const RawWgradShape* shapes, int count) {
    int processors;
    if (const char* error = count_processors(processors)) return error;
    if (count < 1 || count > kRawWgrads)
        return fail("raw_wgrad: expected 1 to %d gradients, got %d", kRawWgrads, count);
    std::vector<Grid> grids;
    for (int i = 0; i < count; ++i) {
        if (const char* reason = raw_wgrad_why_not(shapes[i])) return reason;
        grids.emplace_back(shapes[i]);
    }
    double best = -1;
    RawWgradTile found[kRawWgrads];
    for (int columns : {256, 128}) {
        Division of[kRawWgrads];
        bool fits = true;
        for (int i = 0; i < count && fits; ++i)
            fits = (!tiles[i].columns || tiles[i].columns == columns) &&
                   divide(of[i], shapes[i], columns, grids[i], std::max(1, tiles[i].splits));
        while (fits) {
            double cost = cycles(shapes, grids.data(), of, count, columns, processors);
            if (best < 0 || cost < best) {
                best = cost;
                for (int i = 0; i < count; ++i) found[i] = {columns, int(of[i].splits)};
            }
            int64_t all = 0;
            int next = -1;
            for (int i = 0; i < count; ++i) {
                all += of[i].blocks;
                if (!tiles[i].splits && (next < 0 || of[i].turns > of[next].turns)) next = i;
            }
            if (next < 0 || of[next].turns == 1) break;
            // One turn less, at least.
            int64_t splits = ceil_divide(grids[next].most, of[next].turns - 1), others = all - of[next].blocks;
            divide(of[next], shapes[next], columns, grids[next], splits);
            fits = others + of[next].blocks <= residents(columns) * processors;
        }
    }
    if (best < 0) return "raw_wgrad: no such tile";
    std::copy(found, found + count, tiles);
    return nullptr;
}

const char* raw_wgrad(const RawWgrad* p, int count, DType dtype, CUstream_st* stream) {
    if (count < 1 || count > kRawWgrads)
        return fail("raw_wgrad: expected 1 to %d gradients, got %d", kRawWgrads, count);
    // Blocks start in this order, those that take least last: of taps at the edges of a frame.
    std::vector<const RawWgrad*> sorted;
    for (int i = 0; i < count; ++i) sorted.push_back(p + i);
    std::stable_sort(sorted.begin(), sorted.end(),
                     [](const RawWgrad* a, const RawWgrad* b) { return a->shape.taps < b->shape.taps; });
    Problems problems{};
    int64_t begin = 0;
    int columns = p->tile.columns;
    for (const RawWgrad* from : sorted) {
        const RawWgradShape& s = from->shape;
        if (const char* reason = raw_wgrad_why_not(s)) return reason;
        Grid grid(s);
        Division of;
        bool planned = (columns == 128 || columns == 256) && from->tile.columns == columns && from->tile.splits > 0 &&
                       divide(of, s, columns, grid, from->tile.splits);
        if (!planned || of.splits != from->tile.splits || begin + of.blocks > 1 << 30)
            return "raw_wgrad: expected tiles as raw_wgrad_plan makes them";
        Problem& to = problems.of[problems.count++];
        if (const char* error = tensor_map(to.g, from->g, dtype, s, s.out_channels, s.g_strided, grid)) return error;
        if (const char* error = tensor_map(to.x, from->x, dtype, s, s.in_channels, true, grid)) return error;
        to.partials = from->partials;
        to.order = s.taps == 9 ? 0x862053714 : s.taps == 3 ? 0x201 : 0;
        to.begin = int(begin);
        to.in_channels = int(s.in_channels);
        to.out_channels = int(s.out_channels);
        to.taps = s.taps;
        to.taps_high = grid.taps_high;
        to.taps_wide = grid.taps_wide;
        to.width = int(grid.width);
        to.height = int(grid.height);
        to.box_width = int(grid.box_width);
        to.box_height = int(grid.box_height);
        to.box_frames = int(grid.box_frames);
        to.box_bytes = to.box_width * to.box_height * to.box_frames * kChunk * 2;
        to.f_boxes = int(grid.f_boxes);
        to.row_tiles = int(of.row_tiles);
        to.tiles = int(of.row_tiles * of.column_tiles);
        to.splits = int(of.splits);
        begin += of.blocks;
    }
    int processors;
    if (const char* reason = count_processors(processors)) return reason;
    cudaError_t error = columns == 256 ? launch<Tile<4>>(problems, dtype, begin, processors, stream)
                                       : launch<Tile<2>>(problems, dtype, begin, processors, stream);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace p3d
