// The weight gradient of 1x1x1 and 3x1x1 convolutions, and the Gram products of the same form:
// dW[co][tap][ci] = sum over positions of G[position, co] * X[position + tap, ci].
//
// G and X are *operands*: what a read (p3d.h) makes of one or two tensors. A block owns a tile of dW, kRows times 64
// couts by kColumns times 64 columns, and a run of the positions, which it walks in *boxes* of kPositions. One thread
// has the copy engine bring a box of each tensor for each 64 channels; seven or eleven warps apply the reads, once
// an element and in place; one or two warpgroups multiply. Positions are the sum's index, so that both operands are
// transposed.
//
// Positions have the coordinates (w, h, f), of which a box covers a rectangle of w and h. What lies outside is zero:
//   1x1x1            w = all positions
//   1x1x1, stride 2  w, h = those of the output, f = frames; the strides of the map skip the rest
//   3x1x1            w = h * W + w, h = t, f = n: taps are boxes before and after along h. A tile has the three taps
//                    of 64 channels, and h runs fastest, so that these come from the second-level cache
//
// A box of 64 channels is kPositions rows of 128 bytes, swizzled. A *stage* of the ring holds the boxes of one turn: a
// of G, a of X, b of G, b of X. Where G and X are one operand and the tile's columns are among its rows, X's are G's.
// Its centre, if there is one, is taken off what the read has rounded, also of raw: sums of products of values far from
// zero lose in float32 what the values vary by.
//
// raw_wgrad.cu is the kernel where neither operand asks for any of this.
#include <algorithm>
#include <iterator>

#include "p3d.h"
#include "rows.cuh"

namespace p3d {
namespace {

constexpr int kThreads = 512;
constexpr int kProducerRegisters = 88, kConsumerRegisters = 168;
static_assert(2 * (kProducerRegisters + kConsumerRegisters) <= 65536 / 128, "registers of the block");
constexpr int kMaxRing = 8;
constexpr int kConstants = 7;                            // rows of constants of a read, at most, and the centre
constexpr int kConstantBytes = kConstants * kChunk * 4;  // of 64 channels
constexpr int kOnesBytes = 16 * 8 * 2;
constexpr int kGroup = 16;  // positions that a finisher takes at a time

template <int kRowChunks, int kColumnChunks>
struct Tile {
    static constexpr int kRows = kRowChunks, kColumns = kColumnChunks;
    static constexpr int kPositions = kRows * kColumns <= 3 ? 64 : 32;
    static constexpr int kBoxBytes = kPositions * kChunk * 2;
    static constexpr bool kTotals = kRows >= kColumns;  // whether it can sum G as well
    // Warps: 0 copies, 8 to 11 and in tiles of several rows 12 to 15 consume, the others finish.
    static constexpr int kConsumers = kRows > 1 ? 2 : 1, kFinishers = 15 - 4 * kConsumers;
};

struct WgradMaps {
    CUtensorMap g_a, g_b, x_a, x_b;  // [f, h, w, C]
};

struct Reader {  // an operand's read and its constants
    Read read;
    const float* affine_a;  // [3, C]
    const float* affine_b;  // [3, C]
    const float* sums;      // [2, C]
};

struct WgradArgs {
    Reader g, x;
    const float* centre;  // [C]
    float* partials;      // [splits, Co * taps * Ci + totals * Co]
    int in_channels, out_channels, taps;
    bool totals, same;
    int width, height;          // of the positions
    int box_width, box_height;  // powers of two
    int w_boxes, h_boxes;
    int boxes, turns;         // in all and, at most, of a block
    int column_tiles, tiles;  // of dW
    int stages, stage_bytes;
};

// What this block computes.
template <typename Shape>
struct Job {
    int cout, channel;  // the first of its rows and of its columns
    int split, first, count;
    bool aliased;  // X is part of G
    bool leads;    // of the tiles with these rows, it stores their totals

    __device__ __forceinline__ explicit Job(const WgradArgs& a) {
        split = blockIdx.x / a.tiles;
        int tile = blockIdx.x - split * a.tiles;
        int row = tile / a.column_tiles, column = tile - row * a.column_tiles;
        cout = row * Shape::kRows * kChunk;
        channel = column * (a.taps == 1 ? Shape::kColumns : 1) * kChunk;
        first = split * a.turns;
        count = min(a.turns, a.boxes - first);
        aliased = a.same && Shape::kRows % Shape::kColumns == 0 && channel / (Shape::kRows * kChunk) == row;
        leads = column == 0;
    }
};

// Where everything lies in shared memory. Barriers come in threes: copied, finished, emptied.
template <typename Shape>
struct WgradShared {
    uint32_t stages, constants, ones, barriers;
    int stage_bytes;

    __device__ __forceinline__ WgradShared(const void* base, const WgradArgs& a)
        : stages(shared_address(base)),
          constants(stages + a.stages * a.stage_bytes),
          ones(constants + (Shape::kRows + Shape::kColumns) * kConstantBytes),
          barriers(ones + kOnesBytes),
          stage_bytes(a.stage_bytes) {}
    __device__ __forceinline__ uint32_t box(int stage, int box) const {
        return stages + stage * stage_bytes + box * Shape::kBoxBytes;
    }
    __device__ __forceinline__ uint32_t copied(int stage) const { return barriers + 24 * stage; }
    __device__ __forceinline__ uint32_t finished(int stage) const { return barriers + 24 * stage + 8; }
    __device__ __forceinline__ uint32_t emptied(int stage) const { return barriers + 24 * stage + 16; }
};

struct Slot {  // of the ring, with the parity of its turn
    int index = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void advance(int count) {
        if (++index == count) index = 0, parity ^= 1;
    }
};

struct Walk {  // over boxes of positions, in the order of their number
    int w, h, f;

    __device__ __forceinline__ Walk(const WgradArgs& a, int number) {
        int column = number / a.h_boxes;
        f = column / a.w_boxes;
        w = (column - f * a.w_boxes) * a.box_width;
        h = (number - column * a.h_boxes) * a.box_height;
    }
    __device__ __forceinline__ void advance(const WgradArgs& a) {
        h += a.box_height;
        if (h < a.height) return;
        h = 0, w += a.box_width;
        if (w >= a.width) w = 0, ++f;
    }
};

// ---- The producer: one thread.

template <typename Shape>
__device__ __forceinline__ void produce(const WgradMaps& maps, const WgradArgs& a, const WgradShared<Shape>& shared,
                                        const Job<Shape>& job) {
    bool g_two = two_tensors(a.g.read), x_two = two_tensors(a.x.read);
    int columns = job.aliased ? 0 : Shape::kColumns, step = a.taps == 1 ? kChunk : 0;
    int bytes = (Shape::kRows * (1 + g_two) + columns * (1 + x_two)) * Shape::kBoxBytes;
    Walk at(a, job.first);
    Slot slot;
    for (int i = 0; i < job.count; ++i, at.advance(a), slot.advance(a.stages)) {
        barrier_wait(shared.emptied(slot.index), slot.parity ^ 1);
        uint32_t full = shared.copied(slot.index), target = shared.box(slot.index, 0);
        barrier_expect(full, bytes);
        auto bring = [&](const CUtensorMap& map, int channel, int h) {
            copy_box(target, map, full, channel, at.w, h, at.f);
            target += Shape::kBoxBytes;
        };
        auto bring_x = [&](const CUtensorMap& map) {
            for (int k = 0; k < columns; ++k) bring(map, job.channel + k * step, at.h + (a.taps == 1 ? 0 : k - 1));
        };
        for (int k = 0; k < Shape::kRows; ++k) bring(maps.g_a, job.cout + k * kChunk, at.h);
        bring_x(maps.x_a);
        if (g_two)
            for (int k = 0; k < Shape::kRows; ++k) bring(maps.g_b, job.cout + k * kChunk, at.h);
        if (x_two) bring_x(maps.x_b);
    }
}

// ---- The finishers: warps that apply the reads.

// Row `row` of the constants of a read for a channel:
//   bn_relu  mean, scale and bias of a
//   join_*   mean, scale and bias of a, then of b; of join_c scale and bias are halved
//   bn_bwd*  mean, scale and bias of b, -scale c0, -scale c1
// and, last, the centre of both operands.
__device__ __forceinline__ float constant_of(const Reader& reader, const float* centre, int row, int channel,
                                             int channels) {
    if (row == kConstants - 1) return centre ? centre[channel] : 0;
    int at = row % 3 * channels + channel;
    if (reader.read == Read::raw || reader.read == Read::masked) return 0;
    if (reader.read == Read::bn_bwd || reader.read == Read::bn_bwd_open) {
        if (row < 3) return reader.affine_b[at];
        return row < 5 ? -reader.affine_b[channels + channel] * reader.sums[at] : 0;
    }
    if (reader.read == Read::bn_relu && row >= 3) return 0;
    float v = row < 3 ? reader.affine_a[at] : reader.affine_b[at];
    return reader.read == Read::join_c && row % 3 ? 0.5f * v : v;
}

// Of all threads but the copying warp's: the constants of the tile's channels, and the ones that totals are products
// with.
template <typename T, typename Shape>
__device__ __forceinline__ void prepare(const WgradArgs& a, const WgradShared<Shape>& shared, const Job<Shape>& job,
                                        int thread) {
    constexpr int kSize = kConstants * kChunk;
    for (int i = thread; i < (Shape::kRows + Shape::kColumns) * kSize; i += kThreads - 32) {
        int chunk = i / kSize, row = i % kSize / kChunk, channel = i % kChunk, column = chunk - Shape::kRows;
        float v = column < 0 ? constant_of(a.g, a.centre, row, job.cout + chunk * kChunk + channel, a.out_channels)
                             : constant_of(a.x, a.centre, row,
                                           job.channel + (a.taps == 1 ? column * kChunk : 0) + channel, a.in_channels);
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(shared.constants + 4 * i), "f"(v) : "memory");
    }
    if (thread < kOnesBytes / 8) {
        uint32_t ones = pack<T>(1, 1);
        store_shared(shared.ones + 8 * thread, uint2{ones, ones});
        fence_proxy_async();
    }
}

// Where a lane's four channels of its k-th row lie in 16 rows of 64 channels.
__device__ __forceinline__ uint32_t piece(int lane, int k) {
    uint32_t first = lane / 16 * 128 + (lane % 16 / 2 ^ lane / 16) * 16 + lane % 2 * 8;
    return (first ^ k % 4 * 32) + k * 256;
}

struct Row4 {  // one constant of four neighbouring channels
    float v[4];

    __device__ __forceinline__ explicit Row4(uint32_t source) {
        asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
                     : "r"(source));
    }
    __device__ __forceinline__ float operator[](int i) const { return v[i]; }
};

struct Affine4 {
    Row4 mean, scale, bias;

    __device__ __forceinline__ explicit Affine4(uint32_t source)
        : mean(source), scale(source + 4 * kChunk), bias(source + 8 * kChunk) {}
    __device__ __forceinline__ float operator()(float v, int i) const {
        return normalise(v, mean[i], scale[i], bias[i]);
    }
};

// pack(a, b), or with kRelu pack(relu(a), relu(b)).
template <typename T, bool kRelu>
__device__ __forceinline__ uint32_t pack_value(float a, float b) {
    return kRelu ? pack_relu<T>(a, b) : pack<T>(a, b);
}

// a - b of both halves, each rounded once.
template <typename T>
__device__ __forceinline__ uint32_t subtract(uint32_t a, uint32_t b) {
    uint32_t v;
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
        asm("sub.rn.bf16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
    else
        asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
    return v;
}

// Replaces 16 rows of 64 channels at `a` by value(a, b, channel % 4), with kRelu by its relu, rounded; with kCentred
// less `centre`, of the lane's channels. A lane has four channels and every other row.
template <typename T, bool kTwo, bool kRelu, bool kCentred = false, typename Value>
__device__ __forceinline__ void replace(uint32_t a, uint32_t b, int lane, const Value& value, uint2 centre = {}) {
    constexpr int kBatch = 4;
#pragma unroll
    for (int begin = 0; begin < kGroup / 2; begin += kBatch) {
        uint2 v[kBatch], w[kBatch];
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
            uint32_t at = piece(lane, begin + k);
            load_shared(v[k], a + at);
            w[k] = {};
            if (kTwo) load_shared(w[k], b + at);
        }
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
            float2 a0 = unpack<T>(v[k].x), a1 = unpack<T>(v[k].y), b0 = unpack<T>(w[k].x), b1 = unpack<T>(w[k].y);
            uint2 packed{pack_value<T, kRelu>(value(a0.x, b0.x, 0), value(a0.y, b0.y, 1)),
                         pack_value<T, kRelu>(value(a1.x, b1.x, 2), value(a1.y, b1.y, 3))};
            if (kCentred) packed = {subtract<T>(packed.x, centre.x), subtract<T>(packed.y, centre.y)};
            store_shared(a + piece(lane, begin + k), packed);
        }
    }
}

// Applies a read of an activation, bn_relu or join_* or, centred, raw, to 16 rows of 64 channels, in place. `constants`
// are those of the channels.
template <typename T, bool kCentred>
__device__ __forceinline__ void finish_activation(Read read, uint32_t a, uint32_t b, uint32_t constants, int lane) {
    constants += 16 * (lane % 16);
    uint2 c{};
    if (kCentred) {
        Row4 centre(constants + 4 * kChunk * (kConstants - 1));
        c = {pack<T>(centre[0], centre[1]), pack<T>(centre[2], centre[3])};
    }
    if (kCentred && read == Read::raw) {
        replace<T, false, false, kCentred>(a, b, lane, [](float v, float, int) { return v; }, c);
        return;
    }
    Affine4 u(constants);
    if (read == Read::bn_relu) {
        replace<T, false, true, kCentred>(a, b, lane, [&](float v, float, int i) { return u(v, i); }, c);
        return;
    }
    Affine4 other(constants + 12 * kChunk);
    if (read == Read::join_port)
        replace<T, true, false, kCentred>(
            a, b, lane, [&](float v, float w, int i) { return relu(u(v, i)) + relu(other(w, i)); }, c);
    else  // join_b and join_c, whose constants differ
        replace<T, true, true, kCentred>(
            a, b, lane, [&](float v, float w, int i) { return relu(u(v, i)) + other(w, i); }, c);
}

// The same of any read but raw without a centre.
template <typename T>
__device__ __forceinline__ void finish(Read read, bool centred, uint32_t a, uint32_t b, uint32_t constants, int lane) {
    if (read == Read::masked) {  // no channel differs from another
        uint4 v[4], w[4];
#pragma unroll
        for (int k = 0; k < 4; ++k)
            v[k] = load_shared(a + 16 * lane + 512 * k), w[k] = load_shared(b + 16 * lane + 512 * k);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            uint4 g{masked<T>(v[k].x, w[k].x), masked<T>(v[k].y, w[k].y), masked<T>(v[k].z, w[k].z),
                    masked<T>(v[k].w, w[k].w)};
            store_shared(a + 16 * lane + 512 * k, g);
        }
        return;
    }
    if (read == Read::bn_bwd || read == Read::bn_bwd_open) {
        constants += 16 * (lane % 16);
        Affine4 u(constants);
        Row4 constant(constants + 12 * kChunk), slope(constants + 16 * kChunk);
        bool open = read == Read::bn_bwd_open;
        replace<T, true, false>(a, b, lane, [&](float g, float z, int i) {
            float centred = z - u.mean[i];
            bool closed = fmaf(centred, u.scale[i], u.bias[i]) <= 0 && !open;
            return fmaf(centred, slope[i], closed ? constant[i] : fmaf(g, u.scale[i], constant[i]));
        });
    } else if (centred) {
        finish_activation<T, true>(read, a, b, constants, lane);
    } else {
        finish_activation<T, false>(read, a, b, constants, lane);
    }
}

__device__ __forceinline__ bool finishes(const WgradArgs& a, const Reader& x) {
    return x.read != Read::raw || a.centre;
}

// The groups of rows of a stage that need it go to the warps by turns, from stage to stage.
template <typename T, typename Shape>
__device__ __forceinline__ void finish_all(const WgradArgs& a, const WgradShared<Shape>& shared, const Job<Shape>& job,
                                           int warp) {
    constexpr int kGroups = Shape::kPositions / kGroup;
    int lane = threadIdx.x % 32, columns = job.aliased ? 0 : Shape::kColumns;
    int g_boxes = finishes(a, a.g) ? Shape::kRows : 0, x_boxes = finishes(a, a.x) ? columns : 0;
    int groups = (g_boxes + x_boxes) * kGroups, next = warp;
    int g_b = Shape::kRows + columns, x_b = g_b + (two_tensors(a.g.read) ? Shape::kRows : 0);  // boxes of b
    int shift = __ffs(a.box_width) - 1;
    Walk at(a, job.first);
    Slot slot;
    for (int i = 0; i < job.count; ++i, at.advance(a), slot.advance(a.stages)) {
        barrier_wait(shared.copied(slot.index), slot.parity);
#pragma unroll 1
        for (; next < groups; next += Shape::kFinishers) {
            int box = next / kGroups, row = next % kGroups * kGroup;
            bool of_g = box < g_boxes;
            int column = of_g ? 0 : box - g_boxes, chunk = of_g ? box : Shape::kRows + column;
            int h = at.h + (of_g || a.taps == 1 ? 0 : column - 1);
            Read read = of_g ? a.g.read : a.x.read;
            uint32_t target = shared.box(slot.index, chunk) + row * 128;
            finish<T>(read, a.centre != nullptr, target,
                      shared.box(slot.index, of_g ? g_b + box : x_b + column) + row * 128,
                      shared.constants + chunk * kConstantBytes, lane);
            bool whole = at.w + a.box_width <= a.width && h >= 0 && h + a.box_height <= a.height;
            if (whole || read == Read::masked) continue;
#pragma unroll 1
            for (int k = 0; k < kGroup / 2; ++k) {  // what does not exist is zero after the read, not before
                int r = row + lane / 16 + 2 * k, w = at.w + (r & (a.box_width - 1)), line = h + (r >> shift);
                if (w >= a.width || line < 0 || line >= a.height) store_shared(target + piece(lane, k), uint2{});
            }
        }
        next -= groups;
        fence_proxy_async();
        barrier_arrive(shared.finished(slot.index));
    }
}

// ---- The consumers: a warpgroup has all rows of the tile, or half of them.

template <typename T, typename Shape>
__device__ __forceinline__ void consume(const WgradArgs& a, const WgradShared<Shape>& shared, const Job<Shape>& job,
                                        int row) {
    constexpr int kM = Shape::kRows / Shape::kConsumers, kN = Shape::kColumns;
    constexpr int kParts = kN > 3 ? 2 : 1, kWidth = kN * kChunk / kParts, kStep = Shape::kBoxBytes / 16;
    int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
    bool finishing = finishes(a, a.g) || finishes(a, a.x);
    float d[kM][kParts][kWidth / 2], total[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
#pragma unroll
            for (int i = 0; i < kWidth / 2; ++i) d[m][part][i] = 0;
            wgmma_pin(d[m][part]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) total[m][i] = 0;
        wgmma_pin(total[m]);
    }
    int x_box = job.aliased ? (job.channel - job.cout) / kChunk : Shape::kRows;
    uint64_t ones = plain_descriptor(shared.ones, kOnesBytes / 2, kOnesBytes / 2);
    Slot slot;
    int last = -1;
    for (int i = 0; i < job.count; ++i, slot.advance(a.stages)) {
        barrier_wait(shared.copied(slot.index), slot.parity);
        if (finishing) barrier_wait(shared.finished(slot.index), slot.parity);
        uint64_t g = swizzled_descriptor(shared.box(slot.index, row), 1024);
        // Of columns, lbo leads to the next 64.
        uint64_t x = plain_descriptor(shared.box(slot.index, x_box), Shape::kBoxBytes, 1024) | uint64_t(1) << 62;
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < Shape::kPositions / 16; ++k)
#pragma unroll
            for (int m = 0; m < kM; ++m) {
                uint64_t mine = g + m * kStep + k * 128;
#pragma unroll
                for (int part = 0; part < kParts; ++part)
                    wgmma_outer<T>(d[m][part], mine, x + part * (kN / kParts) * kStep + k * 128);
                if constexpr (Shape::kTotals) wgmma_outer<T>(total[m], mine, ones);
            }
        wgmma_commit();
        wgmma_wait<1>();  // the stage before has been read
        if (lane == 0 && last >= 0) barrier_arrive(shared.emptied(last));
        last = slot.index;
    }
    wgmma_wait<0>();
    int columns = a.taps * a.in_channels;
    int64_t size = int64_t(a.out_channels) * columns;
    float* out = a.partials + job.split * (size + (a.totals ? a.out_channels : 0));
#pragma unroll
    for (int m = 0; m < kM; ++m) {
        wgmma_pin(total[m]);
#pragma unroll
        for (int part = 0; part < kParts; ++part) wgmma_pin(d[m][part]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int cout = job.cout + (row + m) * kChunk + 16 * warp + 8 * half + lane / 4;
            float* line = out + int64_t(cout) * columns + job.channel + 2 * (lane % 4);
#pragma unroll
            for (int part = 0; part < kParts; ++part)
#pragma unroll
                for (int j = 0; j < kWidth / 8; ++j) {
                    int chunk = part * (kN / kParts) + j / 8;
                    int at = chunk * (a.taps == 1 ? kChunk : a.in_channels) + j % 8 * 8;
                    *reinterpret_cast<float2*>(line + at) = {d[m][part][4 * j + 2 * half],
                                                             d[m][part][4 * j + 2 * half + 1]};
                }
            if (Shape::kTotals && a.totals && job.leads && lane % 4 == 0) out[size + cout] = total[m][2 * half];
        }
    }
}

template <typename T, typename Shape>
__global__ void __launch_bounds__(kThreads, 1)
    conv_wgrad_kernel(const __grid_constant__ WgradMaps maps, const __grid_constant__ WgradArgs a) {
    extern __shared__ __align__(1024) char memory[];
    WgradShared<Shape> shared(memory, a);
    if (threadIdx.x == 0) {
        for (int i = 0; i < a.stages; ++i) {
            barrier_init(shared.copied(i), 1);
            barrier_init(shared.finished(i), 32 * Shape::kFinishers);
            barrier_init(shared.emptied(i), 4 * Shape::kConsumers);
        }
        barrier_init_fence();
    }
    __syncthreads();
    dependency_wait();
    Job<Shape> job(a);
    int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // the same register for the warp, as the compiler can tell
    if (warp > 0) {                                    // copies need not wait for constants
        prepare<T>(a, shared, job, threadIdx.x - 32);
        named_sync(1, kThreads - 32);
    }
    if (warp >= 8 && warp < 8 + 4 * Shape::kConsumers) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kConsumerRegisters));
        consume<T>(a, shared, job, (warp / 4 - 2) * Shape::kRows / Shape::kConsumers);
    } else {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kProducerRegisters));
        if (warp > 0) {
            if (finishes(a, a.g) || finishes(a, a.x)) finish_all<T>(a, shared, job, warp < 8 ? warp - 1 : warp - 5);
        } else if (threadIdx.x == 0) {
            produce(maps, a, shared, job);
        }
    }
}

// ---- Host.

struct WgradPlan {
    int kind;  // of kTiles
    int box_width, box_height;
    int64_t boxes;
    int turns, splits;
    int row_tiles, column_tiles;
    int stages, stage_bytes, shared;
};

struct TileKind {
    int rows, columns, positions;
    bool totals;
};
template <typename Shape>
constexpr TileKind kind_of() {
    return {Shape::kRows, Shape::kColumns, Shape::kPositions, Shape::kTotals};
}
constexpr TileKind kTiles[] = {kind_of<Tile<4, 2>>(), kind_of<Tile<2, 4>>(), kind_of<Tile<4, 1>>(),
                               kind_of<Tile<2, 2>>(), kind_of<Tile<1, 1>>(), kind_of<Tile<1, 3>>()};

// Positions by their coordinates, and what is between them in memory, in positions.
struct Grid {
    int64_t width, height, frames;
};

Grid grid_of(const ConvWgradShape& s) {
    if (s.taps == 3) return {s.height * s.width, s.time, s.clips};
    if (s.stride == 1) return {s.clips * s.time * s.height * s.width, 1, 1};
    return {(s.width - 1) / s.stride + 1, (s.height - 1) / s.stride + 1, s.clips * s.time};
}

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The tile of dW, the box and the number of splits that finish first, or why there are none. A cycle brings a
// multiprocessor about 24 bytes, and all of them 2700 of partial sums.
const char* wgrad_plan(WgradPlan& best, const ConvWgradShape& s) {
    using Long = long long;
    int processors;
    if (const char* error = count_processors(processors)) return error;
    if (s.taps != 1 && s.taps != 3) return fail("conv_wgrad: taps: expected 1 or 3, got %d", s.taps);
    if (s.stride < 1 || s.stride > 2 || (s.taps == 3 && s.stride != 1))
        return fail("conv_wgrad: stride: expected 1, or 2 of 1x1x1, got %d of %d taps", s.stride, s.taps);
    if (const char* reason = clip_sizes_why_not("conv_wgrad", s)) return reason;
    for (int64_t channels : {s.in_channels, s.out_channels})
        if (channels < kChunk || channels % kChunk || channels > 16384)
            return fail("conv_wgrad: channels: expected multiples of 64 up to 16384, got %lld -> %lld",
                        Long(s.in_channels), Long(s.out_channels));

    int64_t rows = s.out_channels / kChunk, chunks = s.in_channels / kChunk;
    int64_t outputs = s.out_channels * (s.taps * s.in_channels + s.totals);
    int g_tensors = 1 + two_tensors(s.g_read), x_tensors = 1 + two_tensors(s.x_read);
    Grid grid = grid_of(s);
    double best_cost = -1;
    for (int kind = 0; kind < int(std::size(kTiles)); ++kind) {
        const TileKind& tile = kTiles[kind];
        if ((s.taps == 3) != (tile.columns == 3) || (s.totals && !tile.totals)) continue;
        if (rows % tile.rows || (s.taps == 1 && chunks % tile.columns)) continue;
        WgradPlan plan{};
        plan.kind = kind;
        plan.row_tiles = int(rows / tile.rows);
        plan.column_tiles = int(s.taps == 1 ? chunks / tile.columns : chunks);
        bool aliased = s.same && plan.row_tiles == 1 && tile.rows % tile.columns == 0;
        int brought = tile.rows * g_tensors + (aliased ? 0 : tile.columns * x_tensors);
        plan.stage_bytes = brought * tile.positions * kChunk * 2;
        int fixed = (tile.rows + tile.columns) * kConstantBytes + kOnesBytes + 24 * kMaxRing;
        plan.stages = std::min(kMaxRing, (kSharedLimit - fixed) / plan.stage_bytes);
        plan.shared = plan.stages * plan.stage_bytes + fixed;
        for (int width = 1; width <= tile.positions; width *= 2) {
            int height = tile.positions / width;
            int64_t boxes = ceil_divide(grid.width, width) * ceil_divide(grid.height, height) * grid.frames;
            if ((s.taps == 3 && height > 1) || (plan.boxes && boxes > plan.boxes)) continue;
            plan.box_width = width, plan.box_height = height, plan.boxes = boxes;
        }
        int64_t tiles = int64_t(plan.row_tiles) * plan.column_tiles, most = std::max<int64_t>(1, processors / tiles);
        double stage_cost = plan.stage_bytes / 24.0 + 200;
        for (int64_t splits = 1; splits <= std::min(most, plan.boxes); ++splits) {
            int64_t turns = ceil_divide(plan.boxes, splits), used = ceil_divide(plan.boxes, turns);
            double cost = double(ceil_divide(tiles * used, processors)) * (turns * stage_cost + 4000) +
                          double(used) * outputs * 8 / 2700;
            if (best_cost >= 0 && cost >= best_cost) continue;
            best_cost = cost;
            plan.turns = int(turns), plan.splits = int(used);
            best = plan;
        }
    }
    if (best_cost < 0) return "conv_wgrad: no tile fits";
    return nullptr;
}

// A packed tensor [N, T, H, W, C] by the coordinates of positions, every `stride`-th row and column, in boxes of 64
// channels.
const char* tensor_map(CUtensorMap& map, const void* base, DType dtype, const ConvWgradShape& s, int64_t channels,
                       bool strided, const WgradPlan& plan) {
    Grid grid = grid_of(s);
    int64_t across = 1, down = grid.width, frame = grid.width * grid.height;  // positions to the next w, h, f
    if (strided && s.stride > 1) across = s.stride, down = s.stride * s.width, frame = s.height * s.width;
    cuuint64_t sizes[] = {cuuint64_t(channels), cuuint64_t(grid.width), cuuint64_t(grid.height),
                          cuuint64_t(grid.frames)};
    cuuint64_t strides[] = {cuuint64_t(2 * channels * across), cuuint64_t(2 * channels * down),
                            cuuint64_t(2 * channels * frame)};
    cuuint32_t boxes[] = {kChunk, cuuint32_t(plan.box_width), cuuint32_t(plan.box_height), 1};
    return tensor_map("conv_wgrad", map, base, dtype, 4, sizes, strides, boxes);
}

template <typename T, typename Shape>
const char* launch(const WgradMaps& maps, const WgradArgs& args, const WgradPlan& plan, cudaStream_t stream) {
    cudaError_t error = launch_dependent(conv_wgrad_kernel<T, Shape>, dim3(plan.splits * args.tiles), kThreads,
                                         plan.shared, stream, maps, args);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename T>
const char* launch(const WgradMaps& maps, const WgradArgs& args, const WgradPlan& plan, cudaStream_t stream) {
    static constexpr decltype(&launch<T, Tile<1, 1>>) kLaunches[] = {launch<T, Tile<4, 2>>, launch<T, Tile<2, 4>>,
                                                                     launch<T, Tile<4, 1>>, launch<T, Tile<2, 2>>,
                                                                     launch<T, Tile<1, 1>>, launch<T, Tile<1, 3>>};
    static_assert(std::size(kLaunches) == std::size(kTiles), "a launch for each tile");
    return kLaunches[plan.kind](maps, args, plan, stream);
}

const char* check_operand(const char* name, const WgradOperand& o) {
    if (has_tensors(o)) return nullptr;
    return fail("conv_wgrad: %s: expected the tensors of its read, no more and no fewer", name);
}

}  // namespace

const char* conv_wgrad_why_not(const ConvWgradShape& shape) {
    WgradPlan plan;
    return wgrad_plan(plan, shape);
}

int conv_wgrad_partials(const ConvWgradShape& shape) {
    WgradPlan plan;
    return wgrad_plan(plan, shape) ? 0 : plan.splits;
}

const char* conv_wgrad(const ConvWgrad& p) {
    const ConvWgradShape& s = p.shape;
    if (const char* error = check_operand("g", p.g)) return error;
    if (const char* error = check_operand("x", p.x)) return error;
    if (p.g.read != s.g_read || p.x.read != s.x_read) return "conv_wgrad: expected the reads of the shape";
    if (s.same && (p.g.a != p.x.a || p.g.b != p.x.b || s.in_channels != s.out_channels || s.taps != 1 ||
                   (s.stride > 1 && !s.g_strided)))
        return "conv_wgrad: same: expected one operand, 1x1x1";
    if (p.centre && (!s.same || !(s.g_read == Read::raw || s.g_read == Read::bn_relu || joins(s.g_read))))
        return "conv_wgrad: centre: expected one operand, an activation";
    WgradPlan plan;
    if (const char* error = wgrad_plan(plan, s)) return error;
    WgradMaps maps{};
    const char* failed = nullptr;
    auto encode = [&](CUtensorMap& map, const void* base, int64_t channels, bool strided) {
        if (base && !failed) failed = tensor_map(map, base, p.dtype, s, channels, strided, plan);
    };
    encode(maps.g_a, p.g.a, s.out_channels, s.g_strided);
    encode(maps.g_b, p.g.b, s.out_channels, s.g_strided);
    encode(maps.x_a, p.x.a, s.in_channels, true);
    encode(maps.x_b, p.x.b, s.in_channels, true);
    if (failed) return failed;
    Grid grid = grid_of(s);
    WgradArgs args{};
    args.g = {p.g.read, p.g.affine_a, p.g.affine_b, p.g.sums};
    args.x = {p.x.read, p.x.affine_a, p.x.affine_b, p.x.sums};
    args.centre = p.centre;
    args.partials = p.partials;
    args.in_channels = int(s.in_channels);
    args.out_channels = int(s.out_channels);
    args.taps = s.taps;
    args.totals = s.totals;
    args.same = s.same;
    args.width = int(grid.width);
    args.height = int(grid.height);
    args.box_width = plan.box_width;
    args.box_height = plan.box_height;
    args.w_boxes = int(ceil_divide(grid.width, plan.box_width));
    args.h_boxes = int(ceil_divide(grid.height, plan.box_height));
    args.boxes = int(plan.boxes);
    args.turns = plan.turns;
    args.column_tiles = plan.column_tiles;
    args.tiles = plan.row_tiles * plan.column_tiles;
    args.stages = plan.stages;
    args.stage_bytes = plan.stage_bytes;
    return p.dtype == DType::bf16 ? launch<__nv_bfloat16>(maps, args, plan, p.stream)
                                  : launch<__half>(maps, args, plan, p.stream);
}

}  // namespace p3d
