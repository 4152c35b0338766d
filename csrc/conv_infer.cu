// A convolution of what is in memory as it is. Alone in inference, 1x1x1, 3x1x1 or 1x3x3, from activations to
// activations:
//
//     y = join(bn(W x), o)      rounded once; or of that the maximum of frames 2k and 2k + 1
//
// one matrix product whose rows are positions (rows.cuh), whose columns are output channels and whose sum runs over
// taps and input channels, in *steps* of 64 channels of a tap. The positions of a tile are a box of up to four axes
// (conv_infer_plan.h): a step's rows are the box of x moved by the tap, and the copy engine fills in zeros where it
// leaves the tensor and writes nothing there; a tap in time that is outside the clip for all of a tile is left out.
// Steps pass through a ring of boxes of x and of weights.
//
// A warpgroup computes 64 rows of a tile. Two warps more: one brings the ring, weights of the first steps before the
// kernel ahead has ended; the other prepares a tile's affine, brings o, into whose place y goes, and stores y. Two
// kinds of tiles:
//   whole  a block takes tiles by turns
//   split  a cluster takes one tile, each of its blocks a part of the steps. Partial sums are sent to the block that
//          adds up their rows in the order of the blocks, finishes and stores them; one warp less
// Where y is pooled, the axis of frames comes first and boxes have even lengths along it, so rows 2i and 2i + 1 of a
// tile become row i.
//
// And the input gradient of 1x1x1:
//
//     dx = dz W + o             o where a mask is not <= 0, the sum where another is not; rounded once
//
// W lies with its columns along rows of 64 steps of the sum. After the steps of a tile come its masks, through the
// ring.
//
// And both passes of 1x1x1 and 3x1x1 in training, in whole tiles, with what BN needs of the raw result:
//
//     y = W x                   the statistics of y
//     dx = dz W + o             the sums of the layer below
//
// A warp reduces its 16 rows of each column by shuffles that halve the columns of a lane, and the block joins its
// warps. The raw tensor of the layer below comes as a mask does. In gram_raw the sum of the gradient goes on over the
// channels of another tensor, beside dz, whose boxes follow in the ring, and o is a constant of each column.
#include <algorithm>

#include "boxes.cuh"

namespace p3d {
namespace {

struct ConvMaps {
    CUtensorMap x[kConvMaps];  // views of [positions, Ci], read in the boxes of tiles; or x and what is beside it
    CUtensorMap o, y;          // [positions, Co], likewise, y written; pooled in boxes of half the frames
    CUtensorMap w;  // [Co, taps * Ci], in boxes of a tile's columns; transposed [Ci, Co], in boxes of 64 x 64
    CUtensorMap o_mask, mask;  // like o
};

struct ConvArgs {
    const float* affine;  // [3, Co]; or nullptr
    const char* o;        // of split tiles
    char* y;
    Join join;
    bool joined;  // with o
    bool pooled;
    bool o_masked, masked;   // of a gradient: whether o is, and the sum; or whether there is what sums are of
    bool early;              // weights may be read before the kernel ahead has ended
    bool in_time;            // taps along the second axis
    float* partials;         // of what leaves raw [row tiles, 3 or 2, Co]; or nullptr
    const float* constants;  // [constant_parts, Co], to be added up and to a gradient that leaves raw; or nullptr
    int constant_parts;
    int out_channels, chunks, steps, last_tap;
    int own_chunks;                 // of x; those that follow are of what is beside it
    int size[4], box[4], boxes[4];  // along the axes of positions
    int64_t o_stride[4];            // in positions
    int y_stride[4];
    int box_bytes;  // of 64 channels
    int column_tiles, tiles;
    int splits;  // blocks of a cluster
    int stages;
    ConvTap taps[kConvTaps];
};

template <int kTileRows, int kTileColumns, bool kSplitSum, ConvForm kTileForm = ConvForm::normalised>
struct Tile {
    static constexpr int kRows = kTileRows, kColumns = kTileColumns, kGroups = kRows / 64;
    static constexpr ConvForm kForm = kTileForm;
    static constexpr bool kSplit = kSplitSum, kBack = is_gradient(kForm), kRaw = is_raw(kForm);
    static constexpr int kConsumers = 128 * kGroups, kThreads = kConsumers + (kSplit ? 32 : 64);
    static constexpr int kResidents = conv_residents(kRows, kColumns, kSplit, kForm);
    static constexpr int kXBytes = kRows * 128, kStageBytes = conv_stage_bytes(kRows, kColumns);
    static constexpr int kChunks = kColumns / kChunk;  // of a whole tile
    static_assert(kResidents > 0, "one of kConvTiles");
    static_assert(kSplit || kChunks * kChunk == kColumns, "whole tiles are stored in boxes");
    static_assert(kXBytes % 1024 == 0 && kStageBytes % 1024 == 0, "swizzled boxes");
    static_assert(!kRaw || !kSplit, "partials of whole tiles");
    static_assert(!kBack || (!kSplit && kChunks * kXBytes <= kStageBytes), "a mask fits in a stage");
};

// Where everything lies in shared memory.
template <typename Shape>
struct Place {
    uint32_t ring, staging, affine, totals, barriers;
    int stages;

    __device__ __forceinline__ Place(const void* base, const ConvArgs& a)
        : ring(shared_address(base)),
          staging(ring + a.stages * Shape::kStageBytes),
          affine(staging + Shape::kRows * Shape::kColumns * 2),
          totals(affine + conv_affine_bytes(Shape::kColumns, Shape::kForm)),
          barriers(staging + conv_staging_bytes(Shape::kRows, Shape::kColumns, Shape::kSplit, Shape::kForm)),
          stages(a.stages) {}

    __device__ __forceinline__ Ring steps() const { return {ring, barriers, Shape::kStageBytes, stages}; }
    // The staging has its affine and o, and what was there has left, or it has all partial sums; 64 columns of y are in
    // their place.
    __device__ __forceinline__ uint32_t staged() const { return barriers + 16 * kConvStages; }
    __device__ __forceinline__ uint32_t made(int chunk) const { return staged() + 8 + 8 * chunk; }
    // Who arrives at made(chunk): a lane of each warp that computes and, when the last is done and with it the affine
    // and o, all of them.
    static constexpr int makers(int chunk) { return 4 * Shape::kGroups * (chunk + 1 < Shape::kChunks ? 1 : 32); }
    __device__ __forceinline__ void make(int chunk, int lane) const {
        fence_proxy_async();
        __syncwarp();
        if (lane == 0 || chunk + 1 == Shape::kChunks) barrier_arrive(made(chunk));
    }
};

// What a block makes in a turn.
template <typename Shape>
struct Job {
    int column, row_tile;  // the first column, the number of its box
    int at[4];             // where the box begins
    int first, end;        // its steps; those of a tap that lies outside the clip for all of it are left out

    __device__ __forceinline__ Job(const ConvArgs& a, int tile, int rank = 0) {
        row_tile = tile / a.column_tiles;
        column = (tile - row_tile * a.column_tiles) * Shape::kColumns;
        int rest = row_tile;
#pragma unroll
        for (int i = 0; i < 3; ++i) {
            int next = rest / a.boxes[i];
            at[i] = (rest - next * a.boxes[i]) * a.box[i];
            rest = next;
        }
        at[3] = rest * a.box[3];
        first = a.in_time && at[1] + a.box[1] <= 1 ? a.chunks : 0;
        end = a.in_time && at[1] + 1 >= a.size[1] ? a.steps - a.chunks : a.steps;
        if constexpr (Shape::kSplit) {
            int steps = end - first;
            end = first + (rank + 1) * steps / a.splits;
            first += rank * steps / a.splits;
        }
    }

    // Whether a row of the tile is a position.
    __device__ __forceinline__ bool has(const ConvArgs& a, int row) const {
        bool inside = true;
#pragma unroll
        for (int i = 0; i < 3; ++i) {
            int next = row / a.box[i];
            inside = inside && at[i] + row - next * a.box[i] < a.size[i];
            row = next;
        }
        return inside && row < a.box[3] && at[3] + row < a.size[3];
    }
};

struct Step {
    int tap, chunk;

    __device__ __forceinline__ Step(const ConvArgs& a, int step) : tap(step / a.chunks), chunk(step - tap * a.chunks) {}
    __device__ __forceinline__ void advance(const ConvArgs& a) {
        if (++chunk == a.chunks) chunk = 0, ++tap;
    }
};

// ---- Boxes of weights.

__device__ __forceinline__ void copy_weights(uint32_t target, const CUtensorMap& map, uint32_t barrier, int i0,
                                             int i1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
        "[%2];" ::"r"(target),
        "l"(&map), "r"(barrier), "r"(i0), "r"(i1)
        : "memory");
}

// To the second-level cache.
__device__ __forceinline__ void prefetch_weights(const CUtensorMap& map, int i0, int i1) {
    asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %2}];" ::"l"(&map), "r"(i0), "r"(i1)
                 : "memory");
}

// Calls `with` where each box of a step's weights begins, and the bytes before it.
template <typename Shape, typename With>
__device__ __forceinline__ void for_weights(const ConvArgs& a, const Step& step, int column, const With& with) {
    if constexpr (Shape::kBack) {
        int i0 = (a.last_tap - step.tap) * a.out_channels + column;
#pragma unroll
        for (int c = 0; c < Shape::kChunks; ++c) with(i0 + c * kChunk, step.chunk * kChunk, c * kBoxBytes);
    } else {
        with((step.tap * a.chunks + step.chunk) * kChunk, column, 0);
    }
}

// ---- The warp that brings the ring: one thread.

template <typename Shape>
__device__ __forceinline__ void bring_steps(const ConvMaps& maps, const ConvArgs& a, const Place<Shape>& place,
                                            int tile, int clusters, int rank) {
    Ring ring = place.steps(), ahead = ring;
    int bytes = a.box_bytes + Shape::kColumns * 128;
    auto bring_weights = [&](const Ring& to, const Step& step, int column) {
        barrier_expect(to.full(), bytes);
        for_weights<Shape>(a, step, column, [&](int i0, int i1, int before) {
            copy_weights(to.slot() + Shape::kXBytes + before, maps.w, to.full(), i0, i1);
        });
    };
    Job<Shape> start(a, tile, rank);
    int steps = start.end - start.first, early = a.early ? min(steps, a.stages) : 0;
    Step step(a, start.first);
#pragma unroll 1
    for (int i = 0; i < early; ++i, ahead.advance(), step.advance(a)) bring_weights(ahead, step, start.column);
    prefetch_map(maps.x[0]);
    if (start.row_tile == 0 || (a.in_time && start.row_tile == a.boxes[0]))  // together all taps
#pragma unroll 1
        for (int i = early; i < steps; ++i, step.advance(a))
            for_weights<Shape>(a, step, start.column, [&](int i0, int i1, int) { prefetch_weights(maps.w, i0, i1); });
    dependency_wait();
    int turn = 0;
    for (; tile < a.tiles; tile += clusters) {
        Job<Shape> job(a, tile, rank);
        for (int c = 0; Shape::kBack && c < Shape::kChunks; ++c) {
            if (a.o_masked) prefetch_positions(maps.o_mask, job.column + c * kChunk, job.at);
            if (a.masked) prefetch_positions(maps.mask, job.column + c * kChunk, job.at);
        }
        Step at(a, job.first);
#pragma unroll 1
        for (int i = job.first; i < job.end; ++i, ++turn, ring.advance(), at.advance(a)) {
            if (turn >= early) {
                barrier_wait(ring.full() + 8, ring.parity ^ 1);
                bring_weights(ring, at, job.column);
            }
            const ConvTap& to = a.taps[at.tap];
            bool beside = Shape::kRaw && Shape::kBack && at.chunk >= a.own_chunks;
            copy_positions(ring.slot(), maps.x[beside ? 1 : to.view], ring.full(),
                           (at.chunk - (beside ? a.own_chunks : 0)) * kChunk, job.at[0] + to.step[0],
                           job.at[1] + to.step[1], job.at[2] + to.step[2], job.at[3]);
        }
        auto bring_mask = [&](const CUtensorMap& map) {
            barrier_wait(ring.full() + 8, ring.parity ^ 1);
            barrier_expect(ring.full(), a.box_bytes * Shape::kChunks);
            for (int c = 0; c < Shape::kChunks; ++c)
                copy_positions(ring.slot() + c * Shape::kXBytes, map, ring.full(), job.column + c * kChunk, job.at[0],
                               job.at[1], job.at[2], job.at[3]);
            ring.advance();
        };
        if (Shape::kBack && a.o_masked) bring_mask(maps.o_mask);
        if (Shape::kBack && a.masked) bring_mask(maps.mask);
    }
}

// ---- Warpgroups that compute.

// d = the sum over `steps` steps of the ring, for 64 rows of the tile.
template <typename T, typename Shape>
__device__ __forceinline__ void multiply(float (&d)[Shape::kColumns / 2], Ring& ring, int steps, int warpgroup,
                                         int lane) {
    auto free = [&] {
        if (lane == 0) barrier_arrive(ring.barriers + 16 * ring.freed + 8);
        if (++ring.freed == ring.count) ring.freed = 0;
    };
#pragma unroll
    for (int i = 0; i < Shape::kColumns / 2; ++i) d[i] = 0;
    wgmma_pin(d);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        uint32_t x = ring.take(), w = x + Shape::kXBytes;
        x += warpgroup * kBoxBytes;
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kChunk / 16; ++k) {
            uint64_t rows = swizzled_descriptor(x + 32 * k, 8 * 128);
            if constexpr (Shape::kBack)  // lbo leads to the next 64 columns
                wgmma_back<T>(d, rows, plain_descriptor(w + 16 * 128 * k, kBoxBytes, 8 * 128) | uint64_t(1) << 62);
            else
                wgmma<T, 0>(d, rows, swizzled_descriptor(w + 32 * k, 8 * 128));
        }
        wgmma_commit();
        if (step == 0) continue;
        wgmma_wait<1>();  // the step before has been read
        free();
    }
    wgmma_wait<0>();
    wgmma_pin(d);
    free();
}

template <typename T, Join kJoin>
__device__ __forceinline__ uint32_t joined(float a, float b, uint32_t other) {
    float2 o = unpack<T>(other);
    if constexpr (kJoin == Join::none) return pack<T>(a, b);
    if constexpr (kJoin == Join::relu) return pack_relu<T>(a, b);
    if constexpr (kJoin == Join::relu_add) return pack<T>(relu(a) + o.x, relu(b) + o.y);
    if constexpr (kJoin == Join::add_relu) return pack_relu<T>(a + o.x, b + o.y);
    return pack_relu<T>(0.5f * a + 0.5f * o.x, 0.5f * b + 0.5f * o.y);
}

// Of a whole tile: y takes the place of o in the staging, at `mine` for this lane, 64 columns after each other.
template <typename T, Join kJoin, typename Shape>
__device__ __forceinline__ void finish(const float (&d)[Shape::kColumns / 2], const Place<Shape>& place, uint32_t mine,
                                       int lane) {
    uint32_t affine = place.affine + 16 * (lane % 4);  // of this thread's columns; group j is at 64 j
#pragma unroll
    for (int c = 0; c < Shape::kChunks; ++c) {
#pragma unroll
        for (int k = 0; k < kChunk / 16; ++k) {
            uint32_t v[4] = {}, at = (mine + c * Shape::kXBytes) ^ (32 * k);
            if constexpr (kJoin != Join::none && kJoin != Join::relu) load_fragment(v, at);
            float4 columns[2] = {load_affine(affine + 64 * (8 * c + 2 * k)),
                                 load_affine(affine + 64 * (8 * c + 2 * k + 1))};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float4& f = columns[i / 2];
                int j = first_of(4 * c + k, i);
                v[i] = joined<T, kJoin>(fmaf(d[j], f.x, f.z), fmaf(d[j + 1], f.y, f.w), v[i]);
            }
            store_fragment(at, v);
        }
        place.make(c, lane);
    }
}

// The same of a gradient. Masks lie as the staging does, so many bytes from it.
template <typename T, typename Shape>
__device__ __forceinline__ void finish_gradient(const float (&d)[Shape::kColumns / 2], const ConvArgs& a,
                                                const Place<Shape>& place, uint32_t mine, uint32_t to_o_mask,
                                                uint32_t to_mask, int lane) {
#pragma unroll
    for (int c = 0; c < Shape::kChunks; ++c) {
#pragma unroll
        for (int k = 0; k < kChunk / 16; ++k) {
            uint32_t v[4], o_mask[4] = {}, mask[4] = {}, at = (mine + c * Shape::kXBytes) ^ (32 * k);
            load_fragment(v, at);
            if (a.o_masked) load_fragment(o_mask, at + to_o_mask);
            if (a.masked) load_fragment(mask, at + to_mask);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int j = first_of(4 * c + k, i);
                float2 o = unpack<T>(a.o_masked ? masked<T>(v[i], o_mask[i]) : v[i]);
                v[i] = pack<T>(d[j] + o.x, d[j + 1] + o.y);
                if (a.masked) v[i] = masked<T>(v[i], mask[i]);
            }
            store_fragment(at, v);
        }
        place.make(c, lane);
    }
}

// The same with the join add_relu, pooled. Of its warp's 16 rows a thread has q = lane / 4 and 8 + q, and the thread of
// q ^ 1 has the same columns. An even q takes the maximum of rows q and q + 1, which becomes row q / 2 of 8, an odd one
// that of rows 8 + q - 1 and 8 + q, row 4 + q / 2.
template <typename T, typename Shape>
__device__ __forceinline__ void finish_pooled(const float (&d)[Shape::kColumns / 2], const ConvArgs& a,
                                              const Place<Shape>& place, const Job<Shape>& job, uint32_t mine, int warp,
                                              int lane) {
    uint32_t affine = place.affine + 16 * (lane % 4), there[2];
#pragma unroll
    for (int m = 0; m < 2; ++m)  // zeros, which are no more than any y, past the last frame
        there[m] = job.at[0] + (16 * warp + 8 * m + lane / 4) % a.box[0] < a.size[0] ? ~0u : 0;
    bool odd = lane & 4;
    // This lane's row of a pooled chunk for stmatrix; steps k and k + 1 are at that address ^ 32 k.
    int row = lane % 8 / 2 + lane % 2 * 4;
    uint32_t half = place.staging + (8 * warp + row) * 128 + ((lane / 8 ^ row) << 4);
#pragma unroll
    for (int c = 0; c < Shape::kChunks; ++c) {
        uint32_t v[kChunk / 32][4];
#pragma unroll
        for (int k = 0; k < kChunk / 16; ++k) {
            uint32_t y[4];
            load_fragment(y, (mine + c * Shape::kXBytes) ^ (32 * k));
            float4 columns[2] = {load_affine(affine + 64 * (8 * c + 2 * k)),
                                 load_affine(affine + 64 * (8 * c + 2 * k + 1))};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float4& f = columns[i / 2];
                int j = first_of(4 * c + k, i);
                y[i] = joined<T, Join::add_relu>(fmaf(d[j], f.x, f.z), fmaf(d[j + 1], f.y, f.w), y[i]) & there[i % 2];
            }
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                uint32_t other = __shfl_xor_sync(~0u, odd ? y[i] : y[i + 1], 4);
                v[k / 2][k % 2 * 2 + i / 2] = larger<T>(odd ? y[i + 1] : y[i], other);
            }
        }
        named_sync(1, Shape::kConsumers);  // all have read the chunk of o whose first half y takes
#pragma unroll
        for (int k = 0; k < kChunk / 16; k += 2) store_fragment((half + c * Shape::kXBytes) ^ (32 * k), v[k / 2]);
        place.make(c, lane);
    }
}

// A thread's two rows of a tile, and how its warp's 16 rows of each column are added up. Of the 8 groups of 64 columns
// a thread has a pair; eight threads have the same. Each keeps half of them and gives away the other, three times.
struct Halving {
    bool there[2];              // whether the rows are positions
    int first = 0;              // of what is left, two columns
    float n;                    // rows: the thread's, then the warp's
    float share[3], weight[3];  // of Moments' join

    __device__ __forceinline__ Halving(bool one, bool other, int lane) : there{one, other}, n(one + other) {
#pragma unroll
        for (int level = 0; level < 3; ++level) {
            int bit = 16 >> level;
            first += lane & bit ? 8 >> level : 0;
            float own = n;
            n += __shfl_xor_sync(~0u, n, bit);
            share[level] = (n - own) / fmaxf(n, 1), weight[level] = own * share[level];
        }
    }

    // t: mean and sum of squares about it, or two sums, of each column: the first two are left.
    template <bool kSums>
    __device__ __forceinline__ void run(float (&t)[16][2], int lane) const {
#pragma unroll
        for (int level = 0; level < 3; ++level) {
            int bit = 16 >> level;
            bool upper = lane & bit;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if (i >= 8 >> level) continue;
                float (&low)[2] = t[i], (&high)[2] = t[i + (8 >> level)], given[2];
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    given[e] = __shfl_xor_sync(~0u, upper ? low[e] : high[e], bit);
                    low[e] = upper ? high[e] : low[e];
                }
                float delta = given[0] - low[0];
                low[0] = kSums ? low[0] + given[0] : fmaf(delta, share[level], low[0]);
                low[1] += given[1] + (kSums ? 0 : delta * delta * weight[level]);
            }
        }
    }
};

// Adds the constants of this thread's columns, which lie as the affine of finish_raw does.
template <typename Shape>
__device__ __forceinline__ void add_constants(float (&d)[Shape::kColumns / 2], const Place<Shape>& place, int lane) {
#pragma unroll
    for (int j = 0; j < Shape::kColumns / 8; ++j) {
        uint2 v;
        load_shared(v, place.affine + 32 * (lane % 4) + 128 * j);
#pragma unroll
        for (int m = 0; m < 2; ++m)
            d[4 * j + 2 * m] += __uint_as_float(v.x), d[4 * j + 2 * m + 1] += __uint_as_float(v.y);
    }
}

// Rounds and stages what leaves raw. Of a gradient `below` lies as the staging does, so many bytes from it, and
// accumulators become sums of two rows, sum g and sum g (below - mean).
template <typename T, typename Shape>
__device__ __forceinline__ void finish_raw(float (&d)[Shape::kColumns / 2], const ConvArgs& a,
                                           const Place<Shape>& place, const Halving& rows, uint32_t mine,
                                           uint32_t to_below, int lane) {
    uint32_t affine = place.affine + 32 * (lane % 4);  // of this thread's columns; group j is at 128 j
#pragma unroll
    for (int c = 0; c < Shape::kChunks; ++c) {
#pragma unroll
        for (int k = 0; k < kChunk / 16; ++k) {
            uint32_t v[4], z[4] = {}, at = (mine + c * Shape::kXBytes) ^ (32 * k);
            if (Shape::kBack && a.joined) load_fragment(z, at);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int j = first_of(4 * c + k, i);
                float2 o = unpack<T>(z[i]);
                v[i] = Shape::kBack && a.joined ? pack<T>(d[j] + o.x, d[j + 1] + o.y) : pack<T>(d[j], d[j + 1]);
            }
            store_fragment(at, v);
            if (!Shape::kBack || !a.masked) continue;
            load_fragment(z, at + to_below);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                uint32_t of = affine + 128 * (8 * c + 2 * k + half);
                float4 centre = load_affine(of);
                uint2 bias;
                load_shared(bias, of + 16);
                float sums[2][2] = {};
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    float2 g = unpack<T>(v[2 * half + m]), below = unpack<T>(z[2 * half + m]);
                    auto add = [&](float (&to)[2], float g, float centred, float scale, uint32_t bias) {
                        if (!rows.there[m] || fmaf(centred, scale, __uint_as_float(bias)) <= 0) return;
                        to[0] += g, to[1] = fmaf(g, centred, to[1]);
                    };
                    add(sums[0], g.x, below.x - centre.x, centre.z, bias.x);
                    add(sums[1], g.y, below.y - centre.y, centre.w, bias.y);
                }
                float* to = d + first_of(4 * c + k, 2 * half);
                to[0] = sums[0][0], to[1] = sums[1][0], to[2] = sums[0][1], to[3] = sums[1][1];
            }
        }
        place.make(c, lane);
    }
}

// The totals of a tile's columns, as row `row_tile` of the partials: statistics of what is in the staging, or what a
// gradient's accumulators have become.
template <typename T, typename Shape>
__device__ __forceinline__ void send_totals(const float (&d)[Shape::kColumns / 2], const ConvArgs& a,
                                            const Place<Shape>& place, const Job<Shape>& job, const Halving& rows,
                                            uint32_t mine, int warp, int lane) {
    constexpr int kWarps = 4 * Shape::kGroups;
    uint32_t counts = place.totals + 8 * kWarps * Shape::kColumns;
    named_sync(1, Shape::kConsumers);  // the totals of the tile before have been read
#pragma unroll
    for (int c = 0; c < Shape::kChunks; ++c) {
        float t[16][2];
#pragma unroll
        for (int k = 0; k < kChunk / 16; ++k) {
            uint32_t v[4];
            if constexpr (!Shape::kBack) load_fragment(v, (mine + c * Shape::kXBytes) ^ (32 * k));
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float (&to)[2] = t[4 * k + 2 * half + e];
                    if constexpr (Shape::kBack) {
                        int j = first_of(4 * c + k, 2 * half) + e;
                        to[0] = d[j], to[1] = d[j + 2];
                    } else {
                        float2 low = unpack<T>(v[2 * half]), high = unpack<T>(v[2 * half + 1]);
                        float x = e ? low.y : low.x, y = e ? high.y : high.x;
                        float one = rows.there[0] ? x : rows.there[1] ? y : 0, delta = rows.there[1] ? y - one : 0;
                        to[0] = fmaf(0.5f, delta, one), to[1] = 0.5f * delta * delta;
                    }
                }
        }
        rows.run<Shape::kBack>(t, lane);
        store_affine(place.totals + 8 * (warp * Shape::kColumns + c * kChunk + 4 * rows.first + 2 * (lane % 4)),
                     {t[0][0], t[0][1], t[1][0], t[1][1]});
    }
    if (lane == 0) store_shared(counts + 8 * warp, uint2{__float_as_uint(rows.n), 0});
    named_sync(1, Shape::kConsumers);

    int column = 32 * warp + lane;
    if (column >= Shape::kColumns) return;
    float2 of[kWarps];
    float n[kWarps];
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
        uint2 v, count;
        load_shared(v, place.totals + 8 * (i * Shape::kColumns + column));
        load_shared(count, counts + 8 * i);
        of[i] = {__uint_as_float(v.x), __uint_as_float(v.y)}, n[i] = __uint_as_float(count.x);
    }
    float* to = a.partials + int64_t(job.row_tile) * (Shape::kBack ? 2 : 3) * a.out_channels + job.column + column;
    if constexpr (Shape::kBack) {
        float2 sum = of[0];
#pragma unroll
        for (int i = 1; i < kWarps; ++i) sum.x += of[i].x, sum.y += of[i].y;
        to[0] = sum.x, to[a.out_channels] = sum.y;
    } else {
        float total = n[0], mean = 0, m2 = 0;  // the mean less that of the first warp, which has a row
#pragma unroll
        for (int i = 1; i < kWarps; ++i) total += n[i], mean = fmaf(n[i], of[i].x - of[0].x, mean);
        mean = of[0].x + mean / total;
#pragma unroll
        for (int i = 0; i < kWarps; ++i) {
            float delta = of[i].x - mean;
            m2 += fmaf(delta * delta, n[i], of[i].y);
        }
        to[0] = total, to[a.out_channels] = mean, to[2 * a.out_channels] = m2;
    }
}

// Calls `with` the join as a constant.
template <typename With>
__device__ __forceinline__ void for_join(Join join, const With& with) {
    if (join == Join::none)
        with(std::integral_constant<Join, Join::none>());
    else if (join == Join::relu)
        with(std::integral_constant<Join, Join::relu>());
    else if (join == Join::relu_add)
        with(std::integral_constant<Join, Join::relu_add>());
    else if (join == Join::add_relu)
        with(std::integral_constant<Join, Join::add_relu>());
    else
        with(std::integral_constant<Join, Join::mean_relu>());
}

// ---- The warp that brings o and stores y, of whole tiles.

template <typename Shape>
__device__ __forceinline__ void stage_output(const ConvMaps& maps, const ConvArgs& a, const Place<Shape>& place,
                                             int tile, int blocks, int lane) {
    dependency_wait();
    uint32_t parity = 0;
    for (; tile < a.tiles; tile += blocks, parity ^= 1) {
        Job<Shape> job(a, tile);
        // (scale, scale, shift, shift) of pairs of columns, as rows.cuh's prepare_affine; or, of what sums are of,
        // means, scales and biases.
        for (int pair = lane; a.affine && pair < Shape::kColumns / 2; pair += 32) {
            auto row = [&](int i) {
                return reinterpret_cast<const float2*>(a.affine + i * a.out_channels + job.column)[pair];
            };
            float2 mean = row(0), scale = row(1), bias = row(2);
            if constexpr (Shape::kRaw) {
                store_affine(place.affine + 32 * pair, {mean.x, mean.y, scale.x, scale.y});
                store_affine(place.affine + 32 * pair + 16, {bias.x, bias.y, 0, 0});
            } else {
                store_affine(place.affine + 16 * pair,
                             {scale.x, scale.y, fmaf(-mean.x, scale.x, bias.x), fmaf(-mean.y, scale.y, bias.y)});
            }
        }
        for (int pair = lane; Shape::kRaw && Shape::kBack && a.constants && pair < Shape::kColumns / 2; pair += 32) {
            float2 sum{};
#pragma unroll 4
            for (int i = 0; i < a.constant_parts; ++i) {
                const float* row = a.constants + i * a.out_channels + job.column;
                float2 v = reinterpret_cast<const float2*>(row)[pair];
                sum.x += v.x, sum.y += v.y;
            }
            store_affine(place.affine + 32 * pair, {sum.x, sum.y, 0, 0});
        }
        if (lane == 0 && a.joined) {
            barrier_expect(place.staged(), a.box_bytes * Shape::kChunks);
            for (int c = 0; c < Shape::kChunks; ++c)
                copy_positions(place.staging + c * Shape::kXBytes, maps.o, place.staged(), job.column + c * kChunk,
                               job.at[0], job.at[1], job.at[2], job.at[3]);
        } else {
            barrier_arrive(place.staged());  // every lane, for its part of the affine
        }
        int to[4] = {a.pooled ? job.at[0] / 2 : job.at[0], job.at[1], job.at[2], job.at[3]};
        for (int c = 0; c < Shape::kChunks; ++c) {
            barrier_wait(place.made(c), parity);
            if (lane == 0) store_positions(maps.y, place.staging + c * Shape::kXBytes, job.column + c * kChunk, to);
        }
        if (lane == 0) store_wait<0>();
        __syncwarp();
    }
}

// ---- Split tiles.

// What a thread finishes: four columns of every kPass-th of its block's rows of the tile or, pooled, pairs of rows.
template <typename Shape>
struct Part {
    static constexpr int kQuads = Shape::kColumns / 4, kPass = Shape::kConsumers / kQuads;
    static constexpr int kMost = Shape::kRows / 2 / kPass;
    static_assert(kMost % 2 == 0, "pairs of rows");

    int row, column;      // the first of its rows or pairs within the block's, and of its columns within the tile
    int position[kMost];  // where a row goes in y; -1: nowhere
    uint2 o[kMost];
    float4 scale, shift;

    // Before the partial sums are there; all but them is at hand afterwards.
    __device__ __forceinline__ Part(const ConvArgs& a, const Job<Shape>& job, int rank, int thread) {
        int rows = Shape::kRows / a.splits;
        row = thread / kQuads;
        column = 4 * (thread % kQuads);
        auto of = [&](int i) {
            return *reinterpret_cast<const float4*>(a.affine + i * a.out_channels + job.column + column);
        };
        float4 mean = of(0), bias = of(2);
        scale = of(1);
        shift = {fmaf(-mean.x, scale.x, bias.x), fmaf(-mean.y, scale.y, bias.y), fmaf(-mean.z, scale.z, bias.z),
                 fmaf(-mean.w, scale.w, bias.w)};
#pragma unroll
        for (int i = 0; i < kMost; ++i) {
            int own = row_of(a, i), r = rank * rows + own, at[4];
            bool inside = own < rows;
#pragma unroll
            for (int axis = 0; axis < 3; ++axis) {
                int next = r / a.box[axis];
                at[axis] = job.at[axis] + r - next * a.box[axis];
                r = next;
            }
            inside = inside && r < a.box[3];
            at[3] = job.at[3] + r;
#pragma unroll
            for (int axis = 0; axis < 4; ++axis) inside = inside && at[axis] < a.size[axis];
            o[i] = {};
            if (a.joined && inside) {
                int64_t from = 0;
#pragma unroll
                for (int axis = 0; axis < 4; ++axis) from += at[axis] * a.o_stride[axis];
                o[i] = __ldcg(reinterpret_cast<const uint2*>(a.o + offset(a, job, from)));
            }
            if (a.pooled) at[0] /= 2;
            int to = 0;
#pragma unroll
            for (int axis = 0; axis < 4; ++axis) to += at[axis] * a.y_stride[axis];
            position[i] = inside ? to : -1;
        }
    }
    __device__ __forceinline__ int row_of(const ConvArgs& a, int i) const {
        return a.pooled ? 2 * (row + i / 2 * kPass) + i % 2 : row + i * kPass;
    }
    __device__ __forceinline__ int64_t offset(const ConvArgs& a, const Job<Shape>& job, int64_t position) const {
        return 2 * (position * a.out_channels + job.column + column);
    }

    // Of the partial sums [splits][rows of a block][columns] that it received.
    template <typename T>
    __device__ __forceinline__ void finish(const ConvArgs& a, const Job<Shape>& job, uint32_t received) const {
        constexpr int kPitch = conv_partial_pitch(Shape::kColumns), kMostSplits = 8;
        uint32_t next = 4 * (Shape::kRows / a.splits) * kPitch;
        uint2 even;
#pragma unroll
        for (int i = 0; i < kMost; ++i) {
            if (position[i] < 0) continue;
            uint32_t mine = received + 4 * (row_of(a, i) * kPitch + column);
            float4 v[kMostSplits];
#pragma unroll
            for (int split = 0; split < kMostSplits; ++split)
                if (split < a.splits) v[split] = load_affine(mine + split * next);
            float4 sum = v[0];
#pragma unroll
            for (int split = 1; split < kMostSplits; ++split)
                if (split < a.splits)
                    sum.x += v[split].x, sum.y += v[split].y, sum.z += v[split].z, sum.w += v[split].w;
            for_join(a.join, [&](auto join) {
                constexpr Join kJoin = decltype(join)::value;
                uint2 y{joined<T, kJoin>(fmaf(sum.x, scale.x, shift.x), fmaf(sum.y, scale.y, shift.y), o[i].x),
                        joined<T, kJoin>(fmaf(sum.z, scale.z, shift.z), fmaf(sum.w, scale.w, shift.w), o[i].y)};
                if (a.pooled && i % 2) y = {larger<T>(even.x, y.x), larger<T>(even.y, y.y)};
                even = y;
                if (a.pooled && i % 2 == 0 && position[i + 1] >= 0) return;  // with the frame that follows
                *reinterpret_cast<uint2*>(a.y + offset(a, job, position[i])) = y;
            });
        }
    }
};

template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kResidents)
    conv_infer_kernel(const __grid_constant__ ConvMaps maps, const __grid_constant__ ConvArgs a) {
    extern __shared__ __align__(1024) char memory[];
    Place<Shape> place(memory, a);
    if (threadIdx.x < a.stages) {
        barrier_init(place.barriers + 16 * threadIdx.x, 1);
        barrier_init(place.barriers + 16 * threadIdx.x + 8, 4 * Shape::kGroups);  // warps that read a slot
        barrier_init_fence();
    }
    if (threadIdx.x == 0) {
        barrier_init(place.staged(), Shape::kSplit ? 1 : 32);
        for (int c = 0; !Shape::kSplit && c < Shape::kChunks; ++c) barrier_init(place.made(c), place.makers(c));
        barrier_init_fence();
    }
    __syncthreads();
    if (Shape::kSplit) {
        if (threadIdx.x == 0) barrier_expect(place.staged(), Shape::kRows * Shape::kColumns * 4);
        cluster_sync();  // the other blocks' barriers are there
    }
    int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // the same register for the warp, as the compiler can tell
    int lane = threadIdx.x % 32, warpgroup = warp / 4;
    Ring ring = place.steps();
    float d[Shape::kColumns / 2];
    if constexpr (Shape::kSplit) {
        // No block has to wait at the end: what is sent to it, it waits for.
        int rank = cluster_rank(), tile = blockIdx.x / a.splits, clusters = gridDim.x / a.splits;
        if (warp == 4 * Shape::kGroups) {
            if (lane == 0) bring_steps(maps, a, place, tile, clusters, rank);
        } else {
            dependency_wait();
            Job<Shape> job(a, tile, rank);
            Part<Shape> part(a, job, rank, threadIdx.x);
            multiply<T, Shape>(d, ring, job.end - job.first, warpgroup, lane);
            send_partials<Shape::kRows, Shape::kColumns>(
                place.staging, place.staged(), a.splits, rank, warp, lane,
                [&](int j, int m) { return float2{d[4 * j + 2 * m], d[4 * j + 2 * m + 1]}; });
            barrier_wait_cluster(place.staged(), 0);
            part.template finish<T>(a, job, place.staging);
        }
    } else {
        int tile = blockIdx.x, blocks = gridDim.x;
        if (warp == 4 * Shape::kGroups) {
            if (lane == 0) bring_steps(maps, a, place, tile, blocks, 0);
        } else if (warp > 4 * Shape::kGroups) {
            stage_output(maps, a, place, tile, blocks, lane);
        } else {
            // This lane's row of a box for ldmatrix and stmatrix; step k is at that address ^ 32 k.
            uint32_t mine = place.staging + (16 * warp + lane % 16) * 128 + ((lane / 16 ^ lane % 8) << 4);
            uint32_t parity = 0;
            for (; tile < a.tiles; tile += blocks, parity ^= 1) {
                Job<Shape> job(a, tile);
                int steps = job.end - job.first;
                if constexpr (Shape::kRaw) {
                    int row = 16 * warp + lane / 4;
                    Halving rows(job.has(a, row), job.has(a, row + 8), lane);
                    multiply<T, Shape>(d, ring, steps, warpgroup, lane);
                    uint32_t below = Shape::kBack && a.masked ? ring.take() : 0;
                    barrier_wait(place.staged(), parity);
                    if (Shape::kBack && a.constants) add_constants<Shape>(d, place, lane);
                    finish_raw<T>(d, a, place, rows, mine, below - place.staging, lane);
                    if (Shape::kBack && a.masked) ring.free(lane == 0);
                    if (a.partials) send_totals<T>(d, a, place, job, rows, mine, warp, lane);
                } else if constexpr (Shape::kBack) {
                    multiply<T, Shape>(d, ring, steps, warpgroup, lane);
                    uint32_t o_mask = a.o_masked ? ring.take() : 0, mask = a.masked ? ring.take() : 0;
                    barrier_wait(place.staged(), parity);
                    finish_gradient<T>(d, a, place, mine, o_mask - place.staging, mask - place.staging, lane);
                    __syncwarp();  // all lanes have read the masks
                    if (a.o_masked) ring.free(lane == 0);
                    if (a.masked) ring.free(lane == 0);
                } else {
                    multiply<T, Shape>(d, ring, steps, warpgroup, lane);
                    barrier_wait(place.staged(), parity);
                    if (a.pooled)
                        finish_pooled<T>(d, a, place, job, mine, warp, lane);
                    else
                        for_join(a.join, [&](auto join) { finish<T, decltype(join)::value>(d, place, mine, lane); });
                }
            }
        }
    }
}

// ---- Host.

// Why a plan that the caller brings cannot run; nullptr if it can.
const char* plan_why_not(const ConvInferPlan& plan, const ConvInferShape& s) {
    const ConvInferTile& tile = plan.tile;
    bool split = tile.splits > 1, known = tile.splits == 1 || tile.splits == 2 || tile.splits == 4 || tile.splits == 8;
    ConvForm form = conv_form(s);
    known = known && conv_residents(tile.rows, tile.columns, split, form) > 0 && s.out_channels % tile.columns == 0;
    int64_t chunks = s.in_channels / kChunk, box = 1;
    int64_t most = s.taps_time * s.taps_space * s.taps_space, fewest = most;
    for (int length : plan.box) known = known && length >= 1 && length <= tile.rows, box *= known ? length : 1;
    if (conv_in_time(s)) fewest = std::min<int64_t>(2, s.time), most = plan.box[1] == 1 ? std::min(most, s.time) : most;
    if (!known || (s.pooled_time && plan.box[0] % 2) || box > tile.rows || tile.splits > fewest * chunks ||
        plan.stages < conv_least_stages(conv_divide(most * chunks, std::max(1, tile.splits)), s.masks) ||
        plan.stages > kConvStages || plan.blocks < 1 ||
        conv_shared_bytes(tile.rows, tile.columns, split, form, plan.stages) > kSharedLimit)
        return "conv_infer: plan: expected conv_infer_plan's for this shape";
    return nullptr;
}

template <typename T, typename Shape>
const char* launch(const ConvMaps& maps, const ConvArgs& args, int blocks, cudaStream_t stream) {
    int shared = conv_shared_bytes(Shape::kRows, Shape::kColumns, Shape::kSplit, Shape::kForm, args.stages);
    auto kernel = conv_infer_kernel<T, Shape>;
    cudaError_t error =
        launch_dependent(kernel, dim3(blocks), Shape::kThreads, shared, stream, dim3(args.splits), maps, args);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename T, ConvForm kForm>
const char* launch_whole(const ConvMaps& maps, const ConvArgs& args, const ConvInferPlan& plan, cudaStream_t stream) {
#define P3D_CASE(ROWS, COLUMNS)                                     \
    if constexpr (conv_residents(ROWS, COLUMNS, false, kForm) > 0)  \
        if (plan.tile.rows == ROWS && plan.tile.columns == COLUMNS) \
    return launch<T, Tile<ROWS, COLUMNS, false, kForm>>(maps, args, plan.blocks, stream)
    P3D_CASE(64, 64);
    P3D_CASE(128, 64);
    P3D_CASE(128, 128);
    P3D_CASE(128, 256);
#undef P3D_CASE
    return "conv_infer: no kernel for the planned tile";
}

template <typename T>
const char* launch(ConvForm form, const ConvMaps& maps, const ConvArgs& args, const ConvInferPlan& plan,
                   cudaStream_t stream) {
    if (form == ConvForm::gradient) return launch_whole<T, ConvForm::gradient>(maps, args, plan, stream);
    if (form == ConvForm::raw) return launch_whole<T, ConvForm::raw>(maps, args, plan, stream);
    if (form == ConvForm::raw_gradient) return launch_whole<T, ConvForm::raw_gradient>(maps, args, plan, stream);
    if (plan.tile.splits == 1) return launch_whole<T, ConvForm::normalised>(maps, args, plan, stream);
#define P3D_CASE(ROWS, COLUMNS)                                 \
    if (plan.tile.rows == ROWS && plan.tile.columns == COLUMNS) \
    return launch<T, Tile<ROWS, COLUMNS, true>>(maps, args, plan.blocks, stream)
    P3D_CASE(64, 32);
    P3D_CASE(64, 64);
    P3D_CASE(128, 64);
    P3D_CASE(128, 128);
#undef P3D_CASE
    return "conv_infer: no kernel for the planned tile";
}

// A tensor like x but for its channels, the last of the sum, and what is added to that.
struct Beside {
    const void* x;
    int64_t channels;
    const float* constants;
    int constant_parts;
};

// The product of a shape and plan that fit it; a gradient's with its masks, as far as there are any; partials of what
// leaves raw.
const char* run(const ConvInfer& p, const void* o_mask = nullptr, const void* mask = nullptr, float* partials = nullptr,
                const Beside& beside = {}) {
    const ConvInferShape& s = p.shape;
    const ConvInferPlan& plan = p.plan;
    ConvGrid grid(s);
    ConvMaps maps{};
    ConvArgs args{};
    args.affine = p.affine;
    args.o = static_cast<const char*>(p.o);
    args.y = static_cast<char*>(p.y);
    args.join = p.join;
    args.joined = s.joined;
    args.o_masked = o_mask != nullptr, args.masked = mask != nullptr;
    args.early = (!s.raw || s.transposed) && !beside.x;
    args.in_time = conv_in_time(s);
    args.partials = partials;
    args.constants = beside.constants;
    args.constant_parts = beside.constant_parts;
    args.last_tap = s.taps_time - 1;
    args.out_channels = int(s.out_channels);
    args.chunks = int(s.in_channels / kChunk);
    args.own_chunks = int((s.in_channels - beside.channels) / kChunk);
    args.steps = args.chunks * s.taps_time * s.taps_space * s.taps_space;
    args.splits = plan.tile.splits;
    args.stages = plan.stages;
    std::copy_n(grid.taps, kConvTaps, args.taps);
    args.pooled = s.pooled_time != 0;
    int64_t row_tiles = 1;
    args.box_bytes = kChunk * 2;
    for (int i = 0; i < 4; ++i) {
        args.size[i] = int(grid.size[i]);
        args.o_stride[i] = grid.o.stride[i];
        args.y_stride[i] = int(grid.y.stride[i]);
        args.box[i] = plan.box[i];
        args.boxes[i] = int(conv_divide(grid.size[i], plan.box[i]));
        args.box_bytes *= plan.box[i];
        row_tiles *= args.boxes[i];
    }
    args.column_tiles = int(s.out_channels / plan.tile.columns);
    int64_t tiles = row_tiles * args.column_tiles;
    bool all = plan.blocks == tiles * args.splits;  // each block of a split tile has one turn
    if (tiles > 1 << 30 || (args.splits > 1 ? !all : plan.blocks > tiles))
        return "conv_infer: plan: expected conv_infer_plan's for this shape";
    args.tiles = int(tiles);

    const char* failed = nullptr;
    int stored[4];
    std::copy_n(plan.box, 4, stored);
    if (args.pooled) stored[0] /= 2;
    auto positions = [&](CUtensorMap& map, const void* base, const ConvView& view, int64_t channels,
                         const int (&box)[4]) {
        if (!failed) failed = positions_map("conv_infer", map, base, p.dtype, view, channels, box);
    };
    for (int view = 0; view < kConvMaps; ++view)
        if (grid.x[view].size[0]) positions(maps.x[view], p.x, grid.x[view], s.in_channels - beside.channels, plan.box);
    if (beside.x) positions(maps.x[1], beside.x, grid.x[0], beside.channels, plan.box);
    if (s.joined) positions(maps.o, p.o, grid.o, s.out_channels, plan.box);
    if (o_mask) positions(maps.o_mask, o_mask, grid.o, s.out_channels, plan.box);
    if (mask) positions(maps.mask, mask, grid.o, s.out_channels, plan.box);
    positions(maps.y, p.y, grid.y, s.out_channels, stored);
    int64_t taps = args.steps / args.chunks, rows = s.transposed ? s.in_channels : s.out_channels;
    int64_t columns = taps * (s.transposed ? s.out_channels : s.in_channels);
    cuuint64_t sizes[] = {cuuint64_t(columns), cuuint64_t(rows)}, strides[] = {2 * sizes[0]};
    cuuint32_t boxes[] = {kChunk, cuuint32_t(s.transposed ? kChunk : plan.tile.columns)};
    if (!failed) failed = tensor_map("conv_infer", maps.w, p.w, p.dtype, 2, sizes, strides, boxes);
    if (failed) return failed;
    return p.dtype == DType::bf16 ? launch<__nv_bfloat16>(conv_form(s), maps, args, plan, p.stream)
                                  : launch<__half>(conv_form(s), maps, args, plan, p.stream);
}

}  // namespace

const char* conv_infer_plan(ConvInferPlan& plan, const ConvInferShape& shape, const ConvInferTile& wish) {
    int processors;
    if (const char* error = count_processors(processors)) return error;
    return conv_infer_plan(plan, shape, wish, processors);
}

const char* conv_infer(const ConvInfer& p) {
    const ConvInferShape& s = p.shape;
    const ConvInferPlan& plan = p.plan;
    if (const char* reason = conv_infer_sizes_why_not(s)) return reason;
    if (const char* reason = plan_why_not(plan, s)) return reason;
    bool joined = p.join != Join::relu && p.join != Join::none;
    if (joined != (p.o != nullptr) || joined != s.joined)
        return "conv_infer: expected o with the joins of one, and with no other";
    if (s.pooled_time && p.join != Join::add_relu) return "conv_infer: expected add_relu with pooled_time";
    return run(p);
}

namespace {

ConvInferShape shape_of(const PointDgradShape& s) {
    ConvInferShape shape{s.clips, 1, 1, s.positions, s.in_channels, s.out_channels, 1, 1, 1, true, 0, 0, 0};
    shape.transposed = true, shape.masks = s.masks;
    return shape;
}

}  // namespace

const char* point_dgrad_plan(ConvInferPlan& plan, const PointDgradShape& shape, const ConvInferTile& wish) {
    return conv_infer_plan(plan, shape_of(shape), wish);
}

const char* point_dgrad(const PointDgrad& p) {
    ConvInferShape shape = shape_of(p.shape);
    if (const char* reason = conv_infer_sizes_why_not(shape)) return reason;
    if (const char* reason = plan_why_not(p.plan, shape)) return reason;
    if (!p.o || p.shape.masks != bool(p.o_mask) + bool(p.mask))
        return "point_dgrad: expected o, and the masks of the shape";
    return run({shape, p.plan, p.dtype, Join::none, p.dz, p.o, p.w, nullptr, p.dx, p.stream}, p.o_mask, p.mask);
}

namespace {

ConvInferShape shape_of(const ConvRawShape& s) {
    ConvInferShape shape{s.clips, s.time, s.height, s.width, s.in_channels, s.out_channels, s.taps, 1, s.stride};
    shape.joined = s.joined, shape.transposed = s.transposed, shape.masks = s.summed, shape.raw = true;
    return shape;
}

const char* sizes_why_not(const ConvRawShape& s) {
    if (!s.transposed && (s.joined || s.summed)) return "conv_raw: o, below: expected of a gradient alone";
    if (s.stride != 1 && (s.transposed || s.taps == 3))
        return fail("conv_raw: stride: expected 1 of 3x1x1 and of a gradient, got %d", s.stride);
    return conv_infer_sizes_why_not(shape_of(s));
}

}  // namespace

const char* conv_raw_plan(ConvInferPlan& plan, const ConvRawShape& shape, const ConvInferTile& wish) {
    if (const char* reason = sizes_why_not(shape)) return reason;
    return conv_infer_plan(plan, shape_of(shape), wish);
}

int conv_raw_partials(const ConvRawShape& shape, const ConvInferPlan& plan) {  // one for each box
    ConvGrid grid(shape_of(shape));
    int64_t boxes = 1;
    for (int i = 0; i < 4; ++i) boxes *= conv_divide(grid.size[i], plan.box[i]);
    return int(boxes);
}

const char* conv_raw(const ConvRaw& p) {
    if (const char* reason = sizes_why_not(p.shape)) return reason;
    ConvInferShape shape = shape_of(p.shape);
    if (const char* reason = plan_why_not(p.plan, shape)) return reason;
    if (p.shape.joined != bool(p.o) || p.shape.summed != bool(p.below) || p.shape.summed != bool(p.below_affine))
        return "conv_raw: expected the o and below of the shape";
    if (p.shape.transposed && p.shape.summed != bool(p.partials))
        return "conv_raw: expected partials of a gradient with below";
    return run({shape, p.plan, p.dtype, Join::none, p.x, p.o, p.w, p.below_affine, p.y, p.stream}, nullptr, p.below,
               p.partials);
}

namespace {

// That of conv_raw's gradient, of g and X beside each other.
const char* conv_raw_shape_of(ConvRawShape& to, const GramRawShape& s) {
    to = {s.clips, s.time, s.height, s.width, s.channels + s.out_channels, s.channels, 1, 1, true, false, false};
    if (s.out_channels < kChunk || s.out_channels % kChunk)
        return fail("gram_raw: channels of g: expected a multiple of 64, got %lld", (long long)s.out_channels);
    return sizes_why_not(to);
}

}  // namespace

const char* gram_raw_plan(ConvInferPlan& plan, const GramRawShape& shape, const ConvInferTile& wish) {
    ConvRawShape raw;
    if (const char* reason = conv_raw_shape_of(raw, shape)) return reason;
    return conv_infer_plan(plan, shape_of(raw), wish);
}

const char* gram_raw(const GramRaw& p) {
    ConvRawShape raw;
    if (const char* reason = conv_raw_shape_of(raw, p.shape)) return reason;
    ConvInferShape shape = shape_of(raw);
    if (const char* reason = plan_why_not(p.plan, shape)) return reason;
    if (!p.x || !p.c || p.c_parts < 1) return "gram_raw: expected x and parts of c";
    return run({shape, p.plan, p.dtype, Join::none, p.g, nullptr, p.w, nullptr, p.da, p.stream}, nullptr, nullptr,
               nullptr, {p.x, p.shape.channels, p.c, p.c_parts});
}

}  // namespace p3d
