// The weight gradient of the spatial 1x3x3 convolution: dW[tap][cout, channel] = sum over positions of
// dz[cout, position] * a[position + tap, channel].
//
// A block owns 64 couts, 64 channels, all nine taps and every n-th *tile* of positions. A tile is some rows of one
// frame, or where frames are small several whole ones. The copy engine brings it as boxes [frame][row][column][64],
// zeros outside the frame: of g and z from the tile's first position on, of a from the one above and to the left of it.
// All have one pitch, so that a tap is a's box some positions on:
//   whole rows     pitch W + 1: the zero to the left of a row ends the row before it
//   parts of rows  pitch columns + 2, of dz the last two made zero
//   whole frames   H + 1 rows a frame in all boxes: the zero row above a frame ends the frame before it
// Past the boxes lie zeros: positions are multiplied by sixteens, and the last row of a tile of frames has one below.
//
// Positions are the sum's index, so both operands are transposed. In rows of 128 bytes, swizzled by address, a position
// is a step of k: the next position is 128 bytes on, and so are the next 64 columns of a product that spans three taps.
//
// One warpgroup finishes, once an element and in place: dz from g and z, BN-ReLU of a. Each of the three others
// multiplies all positions by the three taps of a row. One thread of these has the copy engine refill what they leave.
//
// Boxes of dz do not overlap, so what is finished can be stored for the input gradient: by the copy engine, which clips
// zeros that lie outside the frame, from the blocks of the first 64 channels. Zeros where another part of a row begins
// it would not clip: there finishers store what they finish.
#include <algorithm>
#include <cmath>

#include "spatial_tile.cuh"
#include "wgmma.cuh"

namespace p3d {
namespace {

constexpr int kConsumers = 3, kFinishers = 4;  // warpgroups; warps
constexpr int kThreads = 128 * kConsumers + 32 * kFinishers;
constexpr int kConsumerRegisters = 136, kFinisherRegisters = 104;
static_assert(kConsumers * kConsumerRegisters + kFinisherRegisters <= 65536 / 128, "registers of the block");
constexpr int kMaxRing = 4, kMaxPositions = 512;                         // of a tile
constexpr int kRow = 2 * kChunk;                                         // bytes of a position
constexpr int kGroup = 16;                                               // positions that a warp finishes at a time
constexpr int kConstants = 8, kConstantBytes = kConstants * kChunk * 4;  // rows, see prepare

struct WgradPlan {
    int pitch;
    int width, rows, frames;      // of a tile
    int column_tiles, row_tiles;  // of a frame
    int tiles;                    // in all
    int steps;                    // sixteens of positions
    int dz_box, a_box;            // positions
    int dz_bytes, z_bytes, a_bytes;
    int stages, z_stages;
    int splits, blocks;  // the grid: parts of the positions, 64 x 64 parts of dW
    int shared;          // bytes
};

struct WgradMaps {
    CUtensorMap g, z, a, finished;  // [F, H, W, C], in boxes of frames x rows x pitch x 64
};

struct WgradArgs {
    const float* affine;    // [3, Co] with z
    const float* sums;      // [2, Co] with z
    const float* a_affine;  // [3, Ci] or nullptr
    float* partials;        // [splits, Co, 9, Ci]
    char* finished;         // [F, H, W, Co] or nullptr
    int in_channels, out_channels;
    int frames, height, width;
    bool masked;  // dz has columns of another tile
    WgradPlan plan;
};

__device__ __forceinline__ int groups(int positions) { return (positions + kGroup - 1) / kGroup; }

// Where everything lies in shared memory. Barriers come in threes: copied, finished, emptied.
struct WgradShared {
    const WgradPlan& plan;
    uint32_t first_dz, first_a, first_z, constants, dz_codes, a_codes, barriers;

    __device__ __forceinline__ WgradShared(const void* base, const WgradPlan& p)
        : plan(p),
          first_dz(shared_address(base)),
          first_a(first_dz + p.stages * p.dz_bytes),
          first_z(first_a + p.stages * p.a_bytes),
          constants(first_z + p.z_stages * p.z_bytes),
          dz_codes(constants + kConstantBytes),
          a_codes(dz_codes + 4 * kGroup * groups(p.dz_box)),
          barriers(a_codes + 4 * kGroup * groups(p.a_box)) {}
    __device__ __forceinline__ uint32_t dz(int stage) const { return first_dz + stage * plan.dz_bytes; }
    __device__ __forceinline__ uint32_t a(int stage) const { return first_a + stage * plan.a_bytes; }
    __device__ __forceinline__ uint32_t z(int slot) const { return first_z + slot * plan.z_bytes; }
    __device__ __forceinline__ uint32_t copied(int stage) const { return barriers + 24 * stage; }
    __device__ __forceinline__ uint32_t finished(int stage) const { return barriers + 24 * stage + 8; }
    __device__ __forceinline__ uint32_t emptied(int stage) const { return barriers + 24 * stage + 16; }
};

// What this block computes. The last tiles come first: the kernel before this one made g in ascending order, so that
// its end is in the second-level cache, and the input gradient after it finds there what was finished last.
struct Job {
    int cout, channel;
    int last, count;  // tiles

    __device__ __forceinline__ explicit Job(const WgradArgs& args) {
        int chunks = args.in_channels / kChunk;
        cout = int(blockIdx.y) / chunks * kChunk;
        channel = int(blockIdx.y) % chunks * kChunk;
        last = args.plan.tiles - 1 - int(blockIdx.x);
        count = last / int(gridDim.x) + 1;
    }
    __device__ __forceinline__ int tile(int i) const { return last - i * int(gridDim.x); }
};

struct Place {  // of a tile: its first position
    int frame, row, column;

    __device__ __forceinline__ Place(const WgradPlan& p, int tile) {
        int line = tile / p.column_tiles, group = line / p.row_tiles;
        frame = group * p.frames;
        row = (line - group * p.row_tiles) * p.rows;
        column = (tile - line * p.column_tiles) * p.width;
    }
};

// Whether this block stores what it finishes of its tiles: one of those with its couts does.
__device__ __forceinline__ bool stores(const WgradArgs& args, const Job& job) {
    return args.finished && job.channel == 0;
}

// ---- Instructions that no other kernel uses.

__device__ __forceinline__ uint32_t load_word(uint32_t source) {
    uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(source));
    return v;
}

__device__ __forceinline__ void store_word(uint32_t target, uint32_t v) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(target), "r"(v) : "memory");
}

// ---- The producer: one thread. Tile i takes stage i % stages and, of z, i % z_stages.

struct Producer {
    Slot slot, read;  // of the next tile; of the one whose z lies where the next one's will
    int z_slot = 0, tile = 0;

    // The stage is empty, but z may still be read.
    __device__ __forceinline__ void bring(const WgradMaps& maps, const WgradArgs& args, const WgradShared& shared,
                                          const Job& job) {
        const WgradPlan& p = args.plan;
        Place at(p, job.tile(tile));
        uint32_t full = shared.copied(slot.index);
        barrier_expect(full, ((args.affine ? 2 : 1) * p.dz_box + p.a_box) * kRow);
        copy_box(shared.dz(slot.index), maps.g, full, job.cout, at.column, at.row, at.frame);
        copy_box(shared.a(slot.index), maps.a, full, job.channel, at.column - 1, at.row - 1, at.frame);
        if (args.affine) {
            if (tile >= p.z_stages) {
                barrier_wait(shared.finished(read.index), read.parity);
                read.advance(p.stages);
            }
            copy_box(shared.z(z_slot), maps.z, full, job.cout, at.column, at.row, at.frame);
            if (++z_slot == p.z_stages) z_slot = 0;
        }
        slot.advance(p.stages);
        if (++tile == job.count) return;
        Place to(p, job.tile(tile));
        prefetch_box(maps.g, job.cout, to.column, to.row, to.frame);
        prefetch_box(maps.a, job.channel, to.column - 1, to.row - 1, to.frame);
        if (args.affine) prefetch_box(maps.z, job.cout, to.column, to.row, to.frame);
    }
};

// ---- The finishers: four warps.

// Where a position of a box lies: row (of all frames) << 16 | column, or kNowhere.
constexpr uint32_t kNowhere = 0x7fff7fff;

// Whether both halves of `code` are within those of `low` and `high`, all below 2^15.
__device__ __forceinline__ bool within(uint32_t code, uint32_t low, uint32_t high) {
    return (((code - low) | (high - code)) & 0x80008000) == 0;
}

// Writes the codes of both boxes, and constants as rows of 64 channels:
//   dz  mean, scale, bias, -scale c0, -scale c1
//   a   mean, scale, bias
__device__ __forceinline__ void prepare(const WgradArgs& args, const WgradShared& shared, const Job& job, int thread) {
    const WgradPlan& p = args.plan;
    for (int box = 0; box < 2; ++box) {
        int size = box ? p.a_box : p.dz_box, blank = box ? 0 : args.height;  // of a tile of frames, the zero row
        for (int i = thread; i < groups(size) * kGroup; i += 32 * kFinishers) {
            int row = i / p.pitch;
            bool real = i < size && (p.frames == 1 || row % (args.height + 1) != blank);
            store_word((box ? shared.a_codes : shared.dz_codes) + 4 * i,
                       real ? uint32_t(row << 16 | (i - row * p.pitch)) : kNowhere);
        }
    }
    for (int i = thread; i < kConstants * kChunk; i += 32 * kFinishers) {
        int row = i / kChunk, cout = job.cout + i % kChunk, channel = job.channel + i % kChunk;
        float v = 0;
        if (row < 3 && args.affine) v = args.affine[row * args.out_channels + cout];
        if ((row == 3 || row == 4) && args.affine)
            v = -args.affine[args.out_channels + cout] * args.sums[(row - 3) * args.out_channels + cout];
        if (row > 4 && args.a_affine) v = args.a_affine[(row - 5) * args.in_channels + channel];
        store_word(shared.constants + 4 * i, __float_as_uint(v));
    }
}

struct Row8 {  // one constant of eight neighbouring channels
    float v[8];

    __device__ __forceinline__ explicit Row8(uint32_t source) {
        uint4 a = load_shared(source), b = load_shared(source + 16);
        v[0] = __uint_as_float(a.x), v[1] = __uint_as_float(a.y), v[2] = __uint_as_float(a.z);
        v[3] = __uint_as_float(a.w), v[4] = __uint_as_float(b.x), v[5] = __uint_as_float(b.y);
        v[6] = __uint_as_float(b.z), v[7] = __uint_as_float(b.w);
    }
    __device__ __forceinline__ float operator[](int i) const { return v[i]; }
};

// Where a lane's channels of a tile's first position are stored, and how many bytes on those of the next row and column
// lie; nowhere if the copy engine stores them.
struct Stored {
    char* first = nullptr;
    int64_t row = 0, column = 0;

    __device__ __forceinline__ void put(uint32_t code, uint4 v) const {
        if (first) *reinterpret_cast<uint4*>(first + (code >> 16) * row + (code & 0xffff) * column) = v;
    }
};

// What a lane finishes: eight channels of every fourth position of a group.
struct Finisher {
    uint32_t even, odd;  // where they lie in a group, its positions 0-3 and 8-11, 4-7 and 12-15
    uint32_t line;
    int next;  // the warp's next group, of those of a box

    __device__ __forceinline__ explicit Finisher(int thread)
        : even(thread % 32 / 8 * kRow + ((thread % 8 ^ thread % 32 / 8) << 4)),
          odd(even ^ 64),
          line(thread % 32 / 8),
          next(thread / 32) {}

    // Replaces positions of a box that are within the bounds by value(a, b, k) of pairs 2 k, 2 k + 1 of channels.
    // Others are zero, or with kMasked made so.
    template <bool kTwo, bool kMasked, typename Value>
    __device__ __forceinline__ void replace(uint32_t box, uint32_t other, uint32_t codes, int positions, uint32_t low,
                                            uint32_t high, const Value& value, const Stored& stored = {}) {
        constexpr int kBatch = kGroup / 4;
#pragma unroll 1
        for (; next < groups(positions); next += kFinishers) {
            uint4 a[kBatch], b[kBatch];
            uint32_t code[kBatch];
#pragma unroll
            for (int k = 0; k < kBatch; ++k) {
                uint32_t at = (k % 2 ? odd : even) + next * (kGroup * kRow) + k * 4 * kRow;
                a[k] = load_shared(box + at);
                b[k] = {};
                if (kTwo) b[k] = load_shared(other + at);
                code[k] = load_word(codes + 4 * (next * kGroup + 4 * k + line));
            }
#pragma unroll
            for (int k = 0; k < kBatch; ++k) {
                uint32_t at = (k % 2 ? odd : even) + next * (kGroup * kRow) + k * 4 * kRow;
                uint4 v{value(a[k].x, b[k].x, 0), value(a[k].y, b[k].y, 1), value(a[k].z, b[k].z, 2),
                        value(a[k].w, b[k].w, 3)};
                bool inside = within(code[k], low, high);
                if (kMasked && !inside) v = {};
                if (kMasked || inside) store_shared(box + at, v);
                if (kMasked && inside) stored.put(code[k], v);
            }
        }
        next -= groups(positions);
    }
};

template <typename T>
__device__ __forceinline__ void finish_gradient(const WgradArgs& args, const WgradShared& shared, Finisher& mine,
                                                const Place& at, uint32_t dz, uint32_t z, uint32_t constants,
                                                const Stored& stored) {
    const WgradPlan& p = args.plan;
    int rows =
        p.frames == 1 ? min(p.rows, args.height - at.row) : min(p.frames, args.frames - at.frame) * (args.height + 1);
    uint32_t high = uint32_t((rows - 1) << 16 | (min(p.width, args.width - at.column) - 1));
    if (!args.affine) {
        mine.replace<false, true>(dz, 0, shared.dz_codes, p.dz_box, 0, high,
                                  [](uint32_t g, uint32_t, int) { return g; });
        return;
    }
    Row8 mean(constants), scale(constants + 4 * kChunk), bias(constants + 8 * kChunk);
    Row8 constant(constants + 12 * kChunk), slope(constants + 16 * kChunk);
    auto value = [&](uint32_t g, uint32_t z, int k) {
        auto bn_bwd = [&](float g, float z, int i) {
            float centred = z - mean[i];
            bool closed = fmaf(centred, scale[i], bias[i]) <= 0;
            return fmaf(centred, slope[i], closed ? constant[i] : fmaf(g, scale[i], constant[i]));
        };
        float2 u = unpack<T>(g), v = unpack<T>(z);
        return pack<T>(bn_bwd(u.x, v.x, 2 * k), bn_bwd(u.y, v.y, 2 * k + 1));
    };
    if (args.masked)
        mine.replace<true, true>(dz, z, shared.dz_codes, p.dz_box, 0, high, value, stored);
    else
        mine.replace<true, false>(dz, z, shared.dz_codes, p.dz_box, 0, high, value);
}

template <typename T>
__device__ __forceinline__ void finish_input(const WgradArgs& args, const WgradShared& shared, Finisher& mine,
                                             const Place& at, uint32_t a, uint32_t constants) {
    const WgradPlan& p = args.plan;
    // Row 0 and column 0 of the box are those before the tile's first.
    int first_row = p.frames == 1 && at.row == 0, first_column = at.column == 0;
    int last_row = p.frames == 1 ? min(p.rows + 1, args.height - at.row)
                                 : min(p.frames, args.frames - at.frame) * (args.height + 1) - 1;
    int last_column = min(p.pitch - 1, args.width - at.column);
    Row8 mean(constants + 20 * kChunk), scale(constants + 24 * kChunk), bias(constants + 28 * kChunk);
    mine.replace<false, false>(a, 0, shared.a_codes, p.a_box, uint32_t(first_row << 16 | first_column),
                               uint32_t(last_row << 16 | last_column), [&](uint32_t v, uint32_t, int k) {
                                   float2 u = unpack<T>(v);
                                   return pack_relu<T>(
                                       normalise(u.x, mean[2 * k], scale[2 * k], bias[2 * k]),
                                       normalise(u.y, mean[2 * k + 1], scale[2 * k + 1], bias[2 * k + 1]));
                               });
}

template <typename T>
__device__ __forceinline__ void finish_all(const WgradArgs& args, const WgradShared& shared, const Job& job,
                                           int thread) {
    const WgradPlan& p = args.plan;
    Finisher mine(thread);
    uint32_t constants = shared.constants + 32 * (thread % 8);
    Stored stored;
    stored.column = 2 * args.out_channels, stored.row = args.width * stored.column;
    Slot slot;
    int z_slot = 0;
    for (int i = 0; i < job.count; ++i, slot.advance(p.stages)) {
        Place at(p, job.tile(i));
        barrier_wait(shared.copied(slot.index), slot.parity);
        if (args.masked && stores(args, job))
            stored.first = args.finished +
                           ((int64_t(at.frame) * args.height + at.row) * args.width + at.column) * stored.column +
                           2 * job.cout + 16 * (thread % 8);
        if (args.affine || args.masked)
            finish_gradient<T>(args, shared, mine, at, shared.dz(slot.index), shared.z(z_slot), constants, stored);
        if (args.a_affine) finish_input<T>(args, shared, mine, at, shared.a(slot.index), constants);
        fence_proxy_async();
        __syncwarp();
        if (thread % 32 == 0) barrier_arrive(shared.finished(slot.index));
        if (++z_slot == p.z_stages) z_slot = 0;
    }
}

// ---- The consumers: a warpgroup has the taps 3 * row .. 3 * row + 2.

template <typename T>
__device__ __forceinline__ void consume(const WgradMaps& maps, const WgradArgs& args, const WgradShared& shared,
                                        const Job& job, int row) {
    const WgradPlan& p = args.plan;
    int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
    bool finishing = args.affine || args.a_affine || args.masked, leads = threadIdx.x == 0;
    bool boxes = leads && stores(args, job) && !args.masked;
    Producer producer;
    if (leads)
        for (int i = 0; i < min(p.stages, job.count); ++i) producer.bring(maps, args, shared, job);
    __syncwarp();
    float d[3 * kChunk / 2];
#pragma unroll
    for (int i = 0; i < 3 * kChunk / 2; ++i) d[i] = 0;
    wgmma_pin(d);
    Slot slot;
    for (int i = 0; i < job.count; ++i, slot.advance(p.stages)) {
        barrier_wait(shared.copied(slot.index), slot.parity);
        if (finishing) barrier_wait(shared.finished(slot.index), slot.parity);
        if (boxes) {
            Place at(p, job.tile(i));
            store_box(maps.finished, shared.dz(slot.index), job.cout, at.column, at.row, at.frame);
        }
        __syncwarp();
        uint64_t dz = swizzled_descriptor(shared.dz(slot.index), 8 * kRow);
        // Of columns, lbo leads to the next 64: those of the next tap.
        uint64_t a = plain_descriptor(shared.a(slot.index) + row * p.pitch * kRow, kRow, 8 * kRow) | uint64_t(1) << 62;
#pragma unroll 1
        for (int step = 0; step < p.steps; ++step, dz += 16 * kRow >> 4, a += 16 * kRow >> 4) {
            wgmma_fence();
            wgmma_outer<T>(d, dz, a);
            wgmma_commit();
        }
        wgmma_wait<0>();
        if (lane == 0) barrier_arrive(shared.emptied(slot.index));
        if (boxes) store_wait();
        if (leads && i + p.stages < job.count) {
            barrier_wait(shared.emptied(slot.index), slot.parity);
            producer.bring(maps, args, shared, job);
        }
        __syncwarp();
    }
    wgmma_pin(d);
    int64_t size = int64_t(args.out_channels) * kTaps * args.in_channels;
    float* out = args.partials + blockIdx.x * size + job.channel + 2 * (lane % 4);
#pragma unroll
    for (int tap = 0; tap < 3; ++tap)
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            int64_t line = int64_t(job.cout + 16 * warp + 8 * m + lane / 4) * kTaps + 3 * row + tap;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                int at = 4 * (8 * tap + j) + 2 * m;
                *reinterpret_cast<float2*>(out + line * args.in_channels + 8 * j) = {d[at], d[at + 1]};
            }
        }
}

// Zeros what lies between the boxes and the ends of their stages.
__device__ __forceinline__ void clear(const WgradShared& shared, const WgradPlan& p) {
    for (int i = 0; i < p.stages; ++i) {
        for (int at = p.dz_box * kRow + 16 * int(threadIdx.x); at < p.dz_bytes; at += 16 * kThreads)
            store_shared(shared.dz(i) + at, uint4{});
        for (int at = p.a_box * kRow + 16 * int(threadIdx.x); at < p.a_bytes; at += 16 * kThreads)
            store_shared(shared.a(i) + at, uint4{});
    }
    fence_proxy_async();
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    spatial_wgrad_kernel(const __grid_constant__ WgradMaps maps, const __grid_constant__ WgradArgs args) {
    extern __shared__ __align__(1024) char memory[];
    WgradShared shared(memory, args.plan);
    if (threadIdx.x == 0) {
        for (int i = 0; i < args.plan.stages; ++i) {
            barrier_init(shared.copied(i), 1);
            barrier_init(shared.finished(i), kFinishers);
            barrier_init(shared.emptied(i), 4 * kConsumers);
        }
        barrier_init_fence();
    }
    clear(shared, args.plan);
    __syncthreads();
    dependency_wait();
    Job job(args);
    int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    if (group < kConsumers) {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kConsumerRegisters));
        consume<T>(maps, args, shared, job, group);
    } else {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kFinisherRegisters));
        int thread = threadIdx.x - 128 * kConsumers;
        if (!args.affine && !args.a_affine && !args.masked) return;
        prepare(args, shared, job, thread);
        named_sync(1, 32 * kFinishers);
        finish_all<T>(args, shared, job, thread);
    }
}

// ---- Host.

// The tile that finishes first on `processors` multiprocessors, or why there is none. In cycles: a step of 16 positions
// takes the matrix unit 9 * 32; finishing takes about 9.5 a position of dz and 4.4 of a; the two share shared memory,
// so that a turn takes 0.93 of both and 500 (within 2 % of seven measured tiles of P3D-63's stages); a multiprocessor
// is brought about 24 bytes a cycle, after 1200; all of them write and sum 2700 bytes of partial sums.
const char* wgrad_plan(WgradPlan& best, const ConvShape& s, int processors) {
    if (const char* reason = sizes_why_not("spatial_wgrad", s)) return reason;
    int64_t blocks = s.in_channels / kChunk * (s.out_channels / kChunk);
    if (blocks > 65535) return fail("spatial_wgrad: expected Ci Co / 4096 up to 65535, got %lld", (long long)blocks);
    if (double(std::max(s.in_channels, s.out_channels)) * double(s.height) * double(s.width) > 5e11)
        return "spatial_wgrad: expected frames below 2^40 bytes";

    auto parts = [](int64_t whole, int64_t most) { return (whole + most - 1) / most; };
    auto round_up = [&](int64_t v, int64_t unit) { return parts(v, unit) * unit; };
    double best_cost = -1, split_cost = double(s.out_channels) * kTaps * s.in_channels * 8 / 2700;
    auto consider = [&](int64_t width, int64_t rows, int64_t frames) {
        int64_t column_tiles = parts(s.width, width), row_tiles = parts(s.height, rows);
        int64_t pitch = column_tiles == 1 ? width + 1 : width + 2;
        int64_t dz_box = (frames == 1 ? rows : frames * (rows + 1)) * pitch;
        int64_t a_box = (frames == 1 ? rows + 2 : frames * (rows + 1)) * pitch;
        int64_t steps = parts(frames == 1 ? dz_box : dz_box - pitch, 16);
        if (std::max({pitch, rows + 2, frames}) > 256 || steps > kMaxPositions / 16) return;
        int64_t dz_bytes = round_up(std::max(16 * steps, round_up(dz_box, kGroup)) * kRow, 1024);
        int64_t z_bytes = round_up(dz_box * kRow, 1024);
        int64_t a_bytes = round_up(std::max(16 * steps + 2 * pitch + 2, round_up(a_box, kGroup)) * kRow, 1024);
        int64_t fixed = kConstantBytes + 4 * (round_up(dz_box, kGroup) + round_up(a_box, kGroup)) + 24 * kMaxRing;
        for (int64_t stages = kMaxRing; stages > 1; --stages) {
            int64_t z_stages = std::max<int64_t>(2, stages - 1);
            int64_t bytes = stages * (dz_bytes + a_bytes) + z_stages * z_bytes + fixed;
            if (bytes > kSharedLimit) continue;
            double brought = double(2 * dz_box + a_box) * kRow / 24, finished = 9.5 * dz_box + 4.4 * a_box + 300;
            double multiplied = 288.0 * steps + 200, whole = 1200 + brought + finished + multiplied;
            double turn = std::max({brought, 0.93 * (finished + multiplied) + 500, whole / stages});
            int64_t tiles = parts(s.frames, frames) * row_tiles * column_tiles;
            // More splits than this write more than they save.
            int64_t useful = std::max<int64_t>(1, std::llround(std::sqrt(tiles * turn / split_cost)));
            int64_t splits = std::min({tiles, useful, std::max<int64_t>(1, processors / blocks)});
            int64_t turns = parts(tiles, splits);
            double cost = turn * (turns - 1) + whole + split_cost * parts(tiles, turns);
            if (best_cost >= 0 && cost >= best_cost) return;
            best_cost = cost;
            best = {int(pitch),        int(width),     int(rows),     int(frames),
                    int(column_tiles), int(row_tiles), int(tiles),    int(steps),
                    int(dz_box),       int(a_box),     int(dz_bytes), int(z_bytes),
                    int(a_bytes),      int(stages),    int(z_stages), int(parts(tiles, turns)),
                    int(blocks),       int(bytes)};
            return;
        }
    };
    int64_t fewest = parts(s.width, 170);  // a row of 170 positions always fits
    for (int64_t columns = fewest; columns <= (s.width > 64 ? fewest + 3 : 1); ++columns) {
        int64_t width = parts(s.width, columns);
        for (int64_t rows = 1; rows <= s.height && rows * width <= kMaxPositions; ++rows)
            if (rows == parts(s.height, parts(s.height, rows))) consider(width, rows, 1);
    }
    for (int64_t frames = 2; frames <= s.frames && frames * s.height * s.width <= kMaxPositions; ++frames)
        consider(s.width, s.height, frames);
    return best_cost < 0 ? "spatial_wgrad: no tile fits" : nullptr;
}

const char* wgrad_plan(WgradPlan& plan, const ConvShape& s) {
    int processors;
    if (const char* error = count_processors(processors)) return error;
    return wgrad_plan(plan, s, processors);
}

// A packed tensor [F, H, W, C] in boxes of `rows` rows a frame.
const char* tensor_map(CUtensorMap& map, const void* base, const SpatialWgrad& p, int64_t channels, int rows,
                       const WgradPlan& plan) {
    auto encode = tensor_map_encoder();
    if (!encode) return "spatial_wgrad: the driver has no cuTensorMapEncodeTiled (needs CUDA 12)";
    const ConvShape& s = p.shape;
    cuuint64_t sizes[] = {cuuint64_t(channels), cuuint64_t(s.width), cuuint64_t(s.height), cuuint64_t(s.frames)};
    cuuint64_t strides[] = {2 * sizes[0], 2 * sizes[0] * sizes[1], 2 * sizes[0] * sizes[1] * sizes[2]};
    cuuint32_t boxes[] = {kChunk, cuuint32_t(plan.pitch), cuuint32_t(rows), cuuint32_t(plan.frames)};
    cuuint32_t steps[] = {1, 1, 1, 1};
    auto type = p.dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    CUresult result =
        encode(&map, type, 4, const_cast<void*>(base), sizes, strides, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? nullptr : fail("spatial_wgrad: cuTensorMapEncodeTiled failed with %d", int(result));
}

}  // namespace

const char* spatial_wgrad_why_not(const ConvShape& shape) {
    WgradPlan plan;
    return wgrad_plan(plan, shape);
}

int spatial_wgrad_partials(const ConvShape& shape) {
    WgradPlan plan;
    return wgrad_plan(plan, shape) ? 0 : plan.splits;
}

const char* spatial_wgrad(const SpatialWgrad& p) {
    if (bool(p.z) != bool(p.affine) || bool(p.z) != bool(p.sums))
        return "spatial_wgrad: expected z, affine and sums, or none of them";
    if (p.finished && !p.z) return "spatial_wgrad: finished: expected z with it";
    WgradArgs args{};
    if (const char* error = wgrad_plan(args.plan, p.shape)) return error;
    const WgradPlan& plan = args.plan;
    WgradMaps maps{};
    int dz_rows = plan.dz_box / plan.pitch / plan.frames, a_rows = plan.a_box / plan.pitch / plan.frames;
    const char* error = tensor_map(maps.g, p.g, p, p.shape.out_channels, dz_rows, plan);
    if (!error && p.z) error = tensor_map(maps.z, p.z, p, p.shape.out_channels, dz_rows, plan);
    if (!error && p.finished) error = tensor_map(maps.finished, p.finished, p, p.shape.out_channels, dz_rows, plan);
    if (!error) error = tensor_map(maps.a, p.a, p, p.shape.in_channels, a_rows, plan);
    if (error) return error;
    args.affine = p.affine;
    args.sums = p.sums;
    args.a_affine = p.a_affine;
    args.partials = p.partials;
    args.finished = static_cast<char*>(p.finished);
    args.in_channels = int(p.shape.in_channels);
    args.out_channels = int(p.shape.out_channels);
    args.frames = int(p.shape.frames);
    args.height = int(p.shape.height);
    args.width = int(p.shape.width);
    args.masked = plan.column_tiles > 1;
    auto kernel = p.dtype == DType::bf16 ? spatial_wgrad_kernel<__nv_bfloat16> : spatial_wgrad_kernel<__half>;
    cudaError_t failed =
        launch_dependent(kernel, dim3(plan.splits, plan.blocks), kThreads, plan.shared, p.stream, maps, args);
    return failed == cudaSuccess ? nullptr : cudaGetErrorString(failed);
}

}  // namespace p3d
