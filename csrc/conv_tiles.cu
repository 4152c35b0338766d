// 1x1x1 and 3x1x1 convolutions in training, forward and input gradient, and the gradient through the Gram identity, of
// any channels in multiples of 64, 1x1x1 with a stride in space: y = epilogue(sum over steps of read(x) w).
//
// One product whose rows are positions (rows.cuh), whose columns are output channels and whose sum runs over taps and
// input channels in *steps* of 64 channels of a tap; of the Gram identity, over the channels of two operands. The
// positions of a tile are a box along up to three axes (conv_tiles_plan.h), those of a tap the box moved in time. A tap
// that lies outside the clip is left out, so what is read is never padded.
//
// A block makes one tile, or, where tiles are few, a part of the steps of one, as a cluster of such blocks. A warp
// brings boxes of the operand's tensors and of weights through a ring. A warpgroup makes 64 rows of the tile: it loads
// its rows of a step as fragments and applies the read there (reads.cuh), while its products of the step before run. Of
// a raw gradient products read the boxes themselves.
//
// Sums leave through shared memory, so that a thread finishes four columns of some rows with what it reads and writes
// of other tensors in whole sectors, and keeps the statistics of its columns. The blocks of a cluster finish equal
// parts of the rows; partial sums travel there and are added up in the order of the blocks.
#include "boxes.cuh"
#include "conv_tiles_plan.h"
#include "reads.cuh"

namespace p3d {
namespace {

struct TilesMaps {
    CUtensorMap a[2], b[2];  // [positions, C] of the sources, read in the boxes of tiles
    CUtensorMap w[2];        // weights as they lie, in boxes of 64 columns
};

struct TilesArgs {
    Source x[2];                // the second of the Gram identity
    Read join;                  // of the identity: how X is read, also if x[0] has what that gave
    const float* affine;        // [3, Co] of y; or nullptr
    const float* below_affine;  // [3, Co]; or nullptr
    const float* c;             // [c_parts, Co] of the Gram identity; or nullptr
    const float* column_scale;  // [Co] of the first source's product; or nullptr
    int c_parts;
    bool relu;
    const char*
        loads[3];  // o, o_mask, below; of the Gram identity x.a, x.b, as far as its epilogue reads them; or nullptr
    char* y;
    float *partials, *partials_b;  // [R, 3, Co] statistics of y, or [R, 2, Co] sums; or nullptr
    int out_channels, taps;
    int size[4], box[4], boxes[4];  // along the axes of positions
    int near[4], far[4];            // lengths of a step along these in the two grids
    int width, height, stride;      // of the larger grid
    bool spread;                    // y lies there
    int box_bytes, column_tiles, splits, stages;
    int stage_bytes, weights, staging, constants, rows, barriers;  // TilesLayout
};

template <int kTileRows, int kTileColumns>
struct Tile {
    static constexpr int kRows = kTileRows, kColumns = kTileColumns, kGroups = kRows / 64, kSlices = kColumns / kChunk;
    static constexpr int kConsumers = 128 * kGroups, kThreads = kConsumers + 32;
    static constexpr int kResidents = tiles_residents(kRows, kColumns);
    static constexpr int kPitch = conv_partial_pitch(kColumns);
    static constexpr int kQuads = kColumns / 4, kPass = kConsumers / kQuads;  // threads of a row, rows at a time
    static_assert(kResidents > 0, "one of kTilesKinds");
    static_assert(kPass * kColumns * 4 <= kRows * kPitch, "totals of a block fit where its partial sums were");
};

// What a block makes: its part of the steps of a tile.
template <typename Shape>
struct Job {
    int rank, column, row_tile, at[4];
    int frame;  // the first of the three in time that the tile reads, as a step's number in time
    int first, end;

    __device__ __forceinline__ explicit Job(const TilesArgs& a) {
        int tile = blockIdx.x / a.splits;
        rank = blockIdx.x - tile * a.splits;
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
        bool taps = a.taps == 3;
        frame = taps && at[1] > 0 ? 0 : 1;
        int last = taps && at[1] + 1 < a.size[1] ? 2 : 1;
        int steps = (last + 1 - frame) * a.x[0].chunks + a.x[1].chunks;
        first = rank * steps / a.splits;
        end = (rank + 1) * steps / a.splits;
    }
};

// ---- The warp that brings the ring: one thread.

template <typename Shape, bool kBack, bool kGram>
__device__ __forceinline__ void bring_steps(const TilesMaps& maps, const TilesArgs& a, Ring ring,
                                            const Job<Shape>& job) {
#pragma unroll 1
    for (int step = job.first; step < job.end; ++step, ring.advance()) {
        int source = 0, frame = 1, chunk = step, tap = 0;
        if constexpr (kGram) {
            if (chunk >= a.x[0].chunks) chunk -= a.x[0].chunks, source = 1;
        } else if (a.taps == 3) {
            int frames = step / a.x[0].chunks;
            frame = job.frame + frames;
            chunk -= frames * a.x[0].chunks;
            tap = kBack ? 2 - frame : frame;
        }
        bool two = two_tensors(a.x[source].read);
        barrier_wait(ring.full() + 8, ring.parity ^ 1);
        barrier_expect(ring.full(), (1 + two) * a.box_bytes + Shape::kColumns * kChunk * 2);
        auto bring = [&](uint32_t target, const CUtensorMap& map) {
            copy_positions(target, map, ring.full(), chunk * kChunk, job.at[0], job.at[1] + frame - 1, job.at[2],
                           job.at[3]);
        };
        bring(ring.slot(), maps.a[source]);
        if (two) bring(ring.slot() + Shape::kRows * kChunk * 2, maps.b[source]);
        uint32_t w = ring.slot() + a.weights;
        if constexpr (kBack) {
#pragma unroll
            for (int c = 0; c < Shape::kSlices; ++c)
                copy_box(w + c * kBoxBytes, maps.w[source], ring.full(), tap * a.out_channels + job.column + c * kChunk,
                         chunk * kChunk, 0);
        } else {
            copy_box(w, maps.w[0], ring.full(), (tap * a.x[0].chunks + chunk) * kChunk, job.column, 0);
        }
    }
}

// ---- Warpgroups that compute.

template <typename Shape>
using Sums = float[Shape::kSlices][32];

template <typename Shape>
__device__ __forceinline__ void pin_sums(Sums<Shape>& d) {
#pragma unroll
    for (int c = 0; c < Shape::kSlices; ++c) wgmma_pin(d[c]);
}

template <typename Shape>
__device__ __forceinline__ void clear_sums(Sums<Shape>& d) {
#pragma unroll
    for (int c = 0; c < Shape::kSlices; ++c)
#pragma unroll
        for (int i = 0; i < 32; ++i) d[c][i] = 0;
    pin_sums<Shape>(d);
}

// d *= scale of its columns.
template <typename Shape>
__device__ __forceinline__ void scale_columns(Sums<Shape>& d, const float* scale, int lane) {
#pragma unroll
    for (int j = 0; j < Shape::kColumns / 8; ++j) {
        float2 of = *reinterpret_cast<const float2*>(scale + 8 * j + 2 * (lane % 4));
        float (&v)[32] = d[j / 8];
        int i = 4 * (j % 8);
        v[i] *= of.x, v[i + 1] *= of.y, v[i + 2] *= of.x, v[i + 3] *= of.y;
    }
    pin_sums<Shape>(d);
}

// apply's, of the reads there are: activations forward, gradients back, activations and scaled gradients by the
// identity.
template <typename T, bool kBack, bool kGram>
__device__ __forceinline__ void apply_read(Read read, Fragments& x, const Fragments& b, const Constants& constants) {
    if constexpr (kBack && !kGram) {
        if (read == Read::bn_bwd)
            for_pairs(x, b, Value<T, Read::bn_bwd>{constants});
        else if (read == Read::bn_bwd_open)
            for_pairs(x, b, Value<T, Read::bn_bwd_open>{constants});
    } else if (read == Read::bn_relu) {
        for_pairs(x, b, Value<T, Read::bn_relu>{constants});
    } else if (read == Read::join_port) {
        for_pairs(x, b, Value<T, Read::join_port>{constants});
    } else if (joins(read)) {
        for_pairs(x, b, Value<T, Read::join_b>{constants});
    } else if (kGram && read == Read::masked) {
        for_pairs(x, b, Scaled<T, true>{constants});
    } else if (kGram && read == Read::scaled) {
        for_pairs(x, b, Scaled<T, false>{constants});
    }
}

// d = the sum over the block's steps. Products of a step run while the next is read, unless their sum may be scaled
// between the two sources of the Gram identity, as float16's is.
template <typename T, typename Shape, bool kBack, bool kGram>
__device__ __forceinline__ void add_steps(Sums<Shape>& d, Ring& ring, const TilesArgs& a, const Job<Shape>& job,
                                          uint32_t constants, uint32_t mine, int lane) {
    constexpr bool kScaled = kGram && std::is_same_v<T, __half>;
    int next = kGram ? 0 : job.first % a.x[0].chunks;
    auto free = [&] {
        __syncwarp();
        ring.free(lane == 0);
    };
    // Products of `own` begin, those of `before` end.
    auto add = [&](Fragments& own, Fragments& before, int step) {
        bool second = kGram && step >= a.x[0].chunks;
        if (kScaled && a.column_scale && step == a.x[0].chunks)
            scale_columns<Shape>(d, a.column_scale + job.column, lane);
        const Source& x = a.x[second];
        int chunk = kGram ? step - (second ? a.x[0].chunks : 0) : next;
        if (!kGram && ++next == x.chunks) next = 0;
        uint32_t slot = ring.take(), box = slot + mine;
        Fragments b = {};
#pragma unroll
        for (int k = 0; k < 4; ++k) load_fragment(own[k], box ^ (32 * k));
        if (two_tensors(x.read)) {
            box += Shape::kRows * kChunk * 2;
#pragma unroll
            for (int k = 0; k < 4; ++k) load_fragment(b[k], box ^ (32 * k));
        }
        apply_read<T, kBack, kGram>(
            x.read, own, b, Constants(constants + (second ? constants_of(a.x[0]) : 0), x.chunks * kChunk, chunk));
        pin(own);
        wgmma_fence();
#pragma unroll
        for (int c = 0; c < Shape::kSlices; ++c) multiply<T, kBack>(d[c], own, slot + a.weights + c * kBoxBytes);
        wgmma_commit();
        if constexpr (kScaled) {
            wgmma_wait<0>();
            pin_sums<Shape>(d);
            free();
        } else {
            if (step == job.first) return;
            wgmma_wait<1>();
            pin(before);  // until here its registers were being read
            free();
        }
    };
    Fragments even = {}, odd = {};
    clear_sums<Shape>(d);
#pragma unroll 1
    for (int step = job.first; step < job.end; step += 2) {
        add(even, odd, step);
        if (step + 1 < job.end) add(odd, even, step + 1);
    }
    if constexpr (kScaled) {
        if (a.column_scale && job.end <= a.x[0].chunks) scale_columns<Shape>(d, a.column_scale + job.column, lane);
    } else {
        wgmma_wait<0>();
        pin(even), pin(odd);
        pin_sums<Shape>(d);
        free();
    }
}

// The same of a raw gradient.
template <typename T, typename Shape>
__device__ __forceinline__ void add_raw_steps(Sums<Shape>& d, Ring& ring, const TilesArgs& a, const Job<Shape>& job,
                                              int warpgroup, int lane) {
    clear_sums<Shape>(d);
#pragma unroll 1
    for (int step = job.first; step < job.end; ++step) {
        uint32_t x = ring.take(), w = x + a.weights;
        x += warpgroup * kBoxBytes;
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < kChunk / 16; ++k) {
            uint64_t rows = swizzled_descriptor(x + 32 * k, 8 * 128);
#pragma unroll
            for (int c = 0; c < Shape::kSlices; ++c) {
                wgmma_back<T>(d[c], rows, swizzled_descriptor(w + c * kBoxBytes + 16 * 128 * k, 8 * 128));
            }
        }
        wgmma_commit();
        if (step == job.first) continue;
        wgmma_wait<1>();  // the step before has been read
        ring.free(lane == 0);
    }
    wgmma_wait<0>();
    pin_sums<Shape>(d);
    ring.free(lane == 0);
}

// Where the rows of a tile lie: (in the smaller grid or -1, in the larger one, rows and columns there up to the next).
template <typename Shape>
__device__ __forceinline__ int4 row_of(const TilesArgs& a, const Job<Shape>& job, int row) {
    int at[4], near = 0, far = 0;
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
        int next = row / a.box[axis];
        at[axis] = job.at[axis] + row - next * a.box[axis];
        row = next;
    }
    at[3] = job.at[3] + row;
    bool inside = row < a.box[3];
#pragma unroll
    for (int axis = 0; axis < 4; ++axis) {
        inside = inside && at[axis] < a.size[axis];
        near += inside ? at[axis] * a.near[axis] : 0;
        far += inside ? at[axis] * a.far[axis] : 0;
    }
    return {inside ? near : -1, far, min(a.stride, a.height - at[1] * a.stride),
            min(a.stride, a.width - at[0] * a.stride)};
}

__device__ __forceinline__ int4 load_row(uint32_t source) {
    uint4 v = load_shared(source);
    return {int(v.x), int(v.y), int(v.z), int(v.w)};
}

struct Affine4 {  // of four neighbouring channels
    float mean[4] = {}, scale[4] = {}, bias[4] = {};

    __device__ __forceinline__ void load(const float* affine, int channel, int channels, float factor = 1) {
        Gradient4::load_row(mean, affine + channel);
        Gradient4::load_row(scale, affine + channels + channel);
        Gradient4::load_row(bias, affine + 2 * channels + channel);
#pragma unroll
        for (int e = 0; e < 4; ++e) scale[e] *= factor, bias[e] *= factor;
    }
    __device__ __forceinline__ float operator()(float v, int e) const {
        return normalise(v, mean[e], scale[e], bias[e]);
    }
};

template <typename T>
__device__ __forceinline__ void unpack4(float (&v)[4], uint2 packed) {
    float2 low = unpack<T>(packed.x), high = unpack<T>(packed.y);
    v[0] = low.x, v[1] = low.y, v[2] = high.x, v[3] = high.y;
}

// What a thread finishes: four columns of every kPass-th of its block's rows. Totals of each column:
//   forward  a shift near the mean, then sums of the values and of their squares about it
//   back     sum g, sum g (z - mean); of the Gram identity for the operand's a, then for its b
template <typename T, typename Shape, bool kBack, bool kGram>
struct Finish {
    static constexpr int kKinds = kGram ? 4 : kBack ? 2 : 3, kLoads = kGram ? 2 : kBack ? 3 : 1;
    static constexpr int kBatch = 4;

    const TilesArgs& a;
    int column, channel, first;  // the column within the tile, its channel, the row within the block's rows
    Affine4 own, other;          // of y, then o or below; or of the Gram identity's a, b
    float c[4] = {};
    float totals[kKinds][4] = {};
    int n = 0;

    __device__ __forceinline__ Finish(const TilesArgs& a, const Job<Shape>& job, int thread)
        : a(a),
          column(4 * (thread % Shape::kQuads)),
          channel(job.column + 4 * (thread % Shape::kQuads)),
          first(thread / Shape::kQuads) {
        if constexpr (kGram) {
            float factor = a.join == Read::join_c ? 0.5f : 1;
            if (a.x[0].affine_a) own.load(a.x[0].affine_a, channel, a.out_channels, factor);
            if (a.x[0].affine_b) other.load(a.x[0].affine_b, channel, a.out_channels, factor);
#pragma unroll 4
            for (int i = 0; i < a.c_parts; ++i) {
                float part[4];
                Gradient4::load_row(part, a.c + int64_t(i) * a.out_channels + channel);
#pragma unroll
                for (int e = 0; e < 4; ++e) c[e] += part[e];
            }
        } else {
            if (!kBack && a.affine) own.load(a.affine, channel, a.out_channels);
            if (a.below_affine) other.load(a.below_affine, channel, a.out_channels);
        }
    }

    __device__ __forceinline__ int64_t offset(int position) const {
        return 2 * (int64_t(position) * a.out_channels + channel);
    }

    __device__ __forceinline__ void add(int kind, int e, float g, float centred) {
        totals[kind][e] += g;
        totals[kind + 1][e] = fmaf(g, centred, totals[kind + 1][e]);
    }

    // y of a row, rounded, and its part of the totals.
    __device__ __forceinline__ uint2 value(float4 sum, const uint2 (&loads)[kLoads]) {
        float v[4] = {sum.x, sum.y, sum.z, sum.w}, rounded[4];
        uint2 y;
        if constexpr (kGram) {
            Read read = a.join;
            bool outer = read == Read::join_b || read == Read::join_c;
            float z[4], w[4];
            unpack4<T>(z, loads[0]), unpack4<T>(w, loads[1]);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                v[e] += c[e];
                if (outer && relu(own(z[e], e)) + other(w[e], e) <= 0) v[e] = 0;
                if (read == Read::join_c) v[e] *= 0.5f;
            }
            y = {pack<T>(v[0], v[1]), pack<T>(v[2], v[3])};
            unpack4<T>(rounded, y);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                if (a.partials) add(0, e, own(z[e], e) <= 0 ? 0 : rounded[e], z[e] - own.mean[e]);
                if (a.partials_b) add(2, e, !outer && other(w[e], e) <= 0 ? 0 : rounded[e], w[e] - other.mean[e]);
            }
        } else if constexpr (kBack) {
            if (a.loads[0]) {
                uint2 o = loads[0];
                if (a.loads[1]) o = {masked<T>(o.x, loads[1].x), masked<T>(o.y, loads[1].y)};
                float w[4];
                unpack4<T>(w, o);
#pragma unroll
                for (int e = 0; e < 4; ++e) v[e] += w[e];
            }
            y = {pack<T>(v[0], v[1]), pack<T>(v[2], v[3])};
            if (a.partials) {
                float z[4];
                unpack4<T>(rounded, y), unpack4<T>(z, loads[2]);
#pragma unroll
                for (int e = 0; e < 4; ++e) add(0, e, other(z[e], e) <= 0 ? 0 : rounded[e], z[e] - other.mean[e]);
            }
        } else {
            if (a.affine) {
#pragma unroll
                for (int e = 0; e < 4; ++e) v[e] = own(v[e], e);
            }
            if (a.loads[0]) {
                float w[4];
                unpack4<T>(w, loads[0]);
#pragma unroll
                for (int e = 0; e < 4; ++e) v[e] += w[e];
            }
            y = a.relu ? uint2{pack_relu<T>(v[0], v[1]), pack_relu<T>(v[2], v[3])}
                       : uint2{pack<T>(v[0], v[1]), pack<T>(v[2], v[3])};
            if (a.partials) {
                unpack4<T>(rounded, y);
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    if (n == 0) totals[0][e] = rounded[e];  // near the mean: no digits are lost
                    float delta = rounded[e] - totals[0][e];
                    totals[1][e] += delta;
                    totals[2][e] = fmaf(delta, delta, totals[2][e]);
                }
            }
        }
        ++n;
        return y;
    }

    __device__ __forceinline__ void store(int position, uint2 y) const {
        *reinterpret_cast<uint2*>(a.y + offset(position)) = y;
    }

    // The block's rows, whose partial sums [splits][rows] lie at `sums`.
    __device__ __forceinline__ void run(uint32_t sums, uint32_t table, int rows) {
#pragma unroll 1
        for (int begin = first; begin < rows; begin += kBatch * Shape::kPass) {
            int at[kBatch];  // -1: nowhere
            uint2 loads[kBatch][kLoads];
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                int row = begin + i * Shape::kPass;
                int4 of = {-1, 0, 0, 0};
                if (row < rows) of = load_row(table + 16 * row);
                at[i] = a.spread && of.x >= 0 ? of.y : of.x;
#pragma unroll
                for (int load = 0; load < kLoads; ++load) {
                    loads[i][load] = {};
                    if (a.loads[load] && of.x >= 0) {
                        const char* from = a.loads[load] + offset(kGram ? of.y : of.x);
                        loads[i][load] = __ldcg(reinterpret_cast<const uint2*>(from));
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                if (at[i] < 0) continue;
                int row = begin + i * Shape::kPass;
                uint32_t source = sums + 4 * (row * Shape::kPitch + column);
                float4 sum = load_affine(source);
#pragma unroll 1
                for (int split = 1; split < a.splits; ++split) {
                    float4 more = load_affine(source + split * rows * Shape::kPitch * 4);
                    sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
                }
                store(at[i], value(sum, loads[i]));
                if (!kGram && kBack && a.spread) fill(load_row(table + 16 * row));
            }
        }
    }

    // Zeros at the positions of the larger grid that the stride skips after this one.
    __device__ __forceinline__ void fill(const int4& row) const {
#pragma unroll 1
        for (int down = 0; down < row.z; ++down)
#pragma unroll 1
            for (int across = down == 0; across < row.w; ++across) store(row.y + down * a.width + across, uint2{});
    }

    // Totals over the rows, in a fixed order, as row `row` of the partials.
    __device__ __forceinline__ void send_totals(float* scratch, int row, int thread) {
        if (!a.partials && !a.partials_b) return;
        named_sync(1, Shape::kConsumers);  // the sums that lay there have been read
        auto place = [&](int kind, int pass, int col) -> float& {
            return scratch[(kind * Shape::kPass + pass) * Shape::kColumns + col];
        };
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            if constexpr (kBack) {
#pragma unroll
                for (int kind = 0; kind < kKinds; ++kind) place(kind, first, column + e) = totals[kind][e];
            } else {
                float offset = totals[1][e] / fmaxf(n, 1), m2 = totals[2][e] - totals[1][e] * offset;
                place(0, first, column + e) = n;
                place(1, first, column + e) = totals[0][e] + offset;
                place(2, first, column + e) = m2 < 0 ? 0 : m2;  // not fmaxf, which would lose a NaN
            }
        }
        named_sync(1, Shape::kConsumers);
#pragma unroll 1
        for (int col = thread; col < Shape::kColumns; col += Shape::kConsumers) {
            int to = channel - column + col;
            if constexpr (kBack) {
#pragma unroll
                for (int kind = 0; kind < kKinds; ++kind) {
                    float* partials = kind < 2 ? a.partials : a.partials_b;
                    if (!partials) continue;
                    float sum = 0;
                    for (int pass = 0; pass < Shape::kPass; ++pass) sum += place(kind, pass, col);
                    partials[(int64_t(row) * 2 + kind % 2) * a.out_channels + to] = sum;
                }
            } else {
                Moments moments;
                for (int pass = 0; pass < Shape::kPass; ++pass)
                    moments.join(place(0, pass, col), place(1, pass, col), place(2, pass, col));
                float* partials = a.partials + int64_t(row) * 3 * a.out_channels + to;
                partials[0] = moments.n;
                partials[a.out_channels] = moments.mean;
                partials[2 * a.out_channels] = moments.m2;
            }
        }
    }
};

template <typename T, typename Shape, bool kBack, bool kGram>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kResidents)
    conv_tiles_kernel(const __grid_constant__ TilesMaps maps, const __grid_constant__ TilesArgs a) {
    extern __shared__ __align__(1024) char memory[];
    uint32_t base = shared_address(memory), barriers = base + a.barriers, received = barriers + 16 * a.stages;
    if (threadIdx.x == 0) {
        for (int i = 0; i < a.stages; ++i) {
            barrier_init(barriers + 16 * i, 1);
            barrier_init(barriers + 16 * i + 8, 4 * Shape::kGroups);  // warps that read a slot
        }
        barrier_init(received, 1);
        barrier_init_fence();
    }
    if (threadIdx.x == 32) {
        prefetch_map(maps.a[0]), prefetch_map(maps.w[0]);
        if (two_tensors(a.x[0].read)) prefetch_map(maps.b[0]);
    }
    __syncthreads();
    if (a.splits > 1) {
        if (threadIdx.x == 0) barrier_expect(received, Shape::kRows * Shape::kColumns * 4);
        cluster_sync();  // the other blocks' barriers are there
    }
    dependency_wait();
    int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // the same register for the warp, as the compiler can tell
    int lane = threadIdx.x % 32;
    Job<Shape> job(a);
    Ring ring(base, barriers, a.stage_bytes, a.stages);
    if (warp == 4 * Shape::kGroups) {
        if (lane == 0) bring_steps<Shape, kBack, kGram>(maps, a, ring, job);
        return;
    }

    int thread = threadIdx.x, rows = Shape::kRows / a.splits, begin = job.rank * rows;
    prepare_source(base + a.constants, a.x[0], thread, Shape::kConsumers);
    if (kGram) prepare_source(base + a.constants + constants_of(a.x[0]), a.x[1], thread, Shape::kConsumers);
    if (thread < Shape::kRows) {
        int4 row = row_of(a, job, thread);
        store_shared(base + a.rows + 16 * thread,
                     uint4{uint32_t(row.x), uint32_t(row.y), uint32_t(row.z), uint32_t(row.w)});
    }
    named_sync(1, Shape::kConsumers);
    for (int i = thread; i < rows * Shape::kSlices; i += Shape::kConsumers) {  // what the epilogue will read
        int4 row = load_row(base + a.rows + 16 * (begin + i / Shape::kSlices));
        int64_t at = int64_t(kGram ? row.y : row.x) * a.out_channels + job.column + i % Shape::kSlices * kChunk;
        for (const char* from : a.loads)
            if (from && row.x >= 0) prefetch(from + 2 * at);
    }

    // This lane's row of a box for ldmatrix; step k is at that address ^ 32 k.
    uint32_t mine = (16 * warp + lane % 16) * 128 + ((lane / 16 ^ lane % 8) << 4);
    Sums<Shape> d;
    if (kBack && !kGram && a.x[0].read == Read::raw)
        add_raw_steps<T, Shape>(d, ring, a, job, warp / 4, lane);
    else
        add_steps<T, Shape, kBack, kGram>(d, ring, a, job, base + a.constants, mine, lane);

    uint32_t staging = base + a.staging;
    auto pair = [&](int j, int m) { return float2{d[j / 8][4 * (j % 8) + 2 * m], d[j / 8][4 * (j % 8) + 2 * m + 1]}; };
    if (a.splits > 1) {
        // No block has to wait at the end: what is sent to it, it waits for.
        send_partials<Shape::kRows, Shape::kColumns>(staging, received, a.splits, job.rank, warp, lane, pair);
    } else {
        named_sync(1, Shape::kConsumers);  // the ring, in whose place sums come, has been read
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int j = 0; j < Shape::kColumns / 8; ++j) {
                float2 v = pair(j, m);
                int row = 16 * warp + 8 * m + lane / 4;
                store_shared(staging + 4 * (row * Shape::kPitch + 8 * j + 2 * (lane % 4)),
                             uint2{__float_as_uint(v.x), __float_as_uint(v.y)});
            }
    }
    Finish<T, Shape, kBack, kGram> finish(a, job, thread);
    if (a.splits > 1)
        barrier_wait_cluster(received, 0);
    else
        named_sync(1, Shape::kConsumers);
    finish.run(staging, base + a.rows + 16 * begin, rows);
    finish.send_totals(reinterpret_cast<float*>(memory + a.staging), job.row_tile * a.splits + job.rank, thread);
}

// ---- Host.

template <typename T, typename Shape, bool kBack, bool kGram>
const char* launch(const TilesMaps& maps, const TilesArgs& args, int blocks, int shared, cudaStream_t stream) {
    auto kernel = conv_tiles_kernel<T, Shape, kBack, kGram>;
    cudaError_t error =
        launch_dependent(kernel, dim3(blocks), Shape::kThreads, shared, stream, dim3(args.splits), maps, args);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename T, typename Shape>
const char* launch(const TilesMaps& maps, const TilesArgs& args, bool back, bool gram, int blocks, int shared,
                   cudaStream_t stream) {
    if (gram) return launch<T, Shape, true, true>(maps, args, blocks, shared, stream);
    return back ? launch<T, Shape, true, false>(maps, args, blocks, shared, stream)
                : launch<T, Shape, false, false>(maps, args, blocks, shared, stream);
}

// What both ops have: the plan, the operand x and the result y.
struct Launch {
    const char* op;
    ConvTilesShape shape;
    ConvInferPlan plan;
    DType dtype;
    TilesGrid grid;
    TilesMaps maps{};
    TilesArgs args{};
    int shared = 0;
    const char* failed;

    Launch(const ConvTilesShape& s, const ConvInferPlan& plan, DType dtype, const WgradOperand& x, void* y)
        : op(s.gram ? "gram_tiles" : "conv_tiles"),
          shape(s),
          plan(plan),
          dtype(dtype),
          grid(s),
          failed(check_operand(op, x, s.conv.read)) {
        const ConvTrainShape& c = s.conv;
        const ConvInferTile& tile = plan.tile;
        args.x[0] = {c.read, int((s.gram ? c.out_channels : c.in_channels) / kChunk), x.affine_a, x.affine_b, x.sums};
        args.x[1] = {};
        if (s.gram) args.x[1].chunks = int(c.in_channels / kChunk);
        args.join = c.read;
        args.y = static_cast<char*>(y);
        args.out_channels = int(c.out_channels);
        args.taps = c.taps;
        args.width = int(s.width), args.height = int(c.frame / s.width), args.stride = s.stride;
        args.spread = c.transposed && !s.gram && s.stride > 1;
        args.box_bytes = kChunk * 2;
        int64_t tiles = c.out_channels / tile.columns;
        args.column_tiles = int(tiles);
        for (int i = 0; i < 4; ++i) {
            args.size[i] = int(grid.near.size[i]);
            args.box[i] = plan.box[i];
            args.boxes[i] = int(conv_divide(grid.near.size[i], plan.box[i]));
            args.near[i] = int(grid.near.stride[i]), args.far[i] = int(grid.far.stride[i]);
            args.box_bytes *= plan.box[i];
            tiles *= args.boxes[i];
        }
        args.splits = tile.splits, args.stages = plan.stages;
        TilesLayout layout(tile, plan.stages, tiles_tensors(s), int(tiles_constants(s)));
        args.stage_bytes = layout.stage_bytes, args.weights = layout.weights, args.staging = layout.staging;
        args.constants = layout.constants, args.rows = layout.rows, args.barriers = layout.barriers;
        shared = layout.bytes;
        if (!failed && (plan.blocks != tiles * tile.splits || shared > kSharedLimit))
            failed = fail("%s: plan: expected conv_tiles_plan's for this shape", op);
        bool strided = s.gram || !c.transposed;
        positions(maps.a[0], x.a, strided ? grid.far : grid.near, args.x[0].chunks * kChunk);
        positions(maps.b[0], x.b, strided ? grid.far : grid.near, args.x[0].chunks * kChunk);
    }
    void positions(CUtensorMap& map, const void* base, const ConvView& view, int64_t channels) {
        if (base && !failed) failed = positions_map(op, map, base, dtype, view, channels, plan.box);
    }
    void weights(CUtensorMap& map, const void* base, int64_t rows, int64_t columns) {
        int box = shape.conv.transposed ? kChunk : plan.tile.columns;
        if (!failed) failed = tensor_map(op, map, base, dtype, 1, rows, columns, box);
    }
    template <typename T>
    const char* run_as(cudaStream_t stream) const {
#define P3D_CASE(ROWS, COLUMNS)                                 \
    if (plan.tile.rows == ROWS && plan.tile.columns == COLUMNS) \
    return launch<T, Tile<ROWS, COLUMNS>>(maps, args, shape.conv.transposed, shape.gram, plan.blocks, shared, stream)
        P3D_CASE(64, 64);
        P3D_CASE(64, 128);
        P3D_CASE(128, 128);
#undef P3D_CASE
        return "conv_tiles: no kernel for the planned tile";
    }
    const char* run(cudaStream_t stream) const {
        if (failed) return failed;
        return dtype == DType::bf16 ? run_as<__nv_bfloat16>(stream) : run_as<__half>(stream);
    }
};

// Why a plan that the caller brings cannot run; nullptr if it can.
const char* plan_why_not(const ConvTilesShape& s, const ConvInferPlan& plan) {
    if (const char* reason = conv_tiles_sizes_why_not(s)) return reason;
    const ConvInferTile& tile = plan.tile;
    bool known = tile.splits == 1 || tile.splits == 2 || tile.splits == 4 || tile.splits == 8;
    known = known && tiles_residents(tile.rows, tile.columns) > 0 && s.conv.out_channels % tile.columns == 0;
    int64_t box = 1;
    for (int length : plan.box) known = known && length >= 1 && length <= tile.rows, box *= known ? length : 1;
    known = known && box <= tile.rows && plan.stages >= 2 && plan.stages <= kTilesStages;  // one is freed by the next
    if (!known || (s.conv.taps == 3 && plan.box[1] != 1))
        return fail("%s: plan: expected conv_tiles_plan's for this shape", s.gram ? "gram_tiles" : "conv_tiles");
    return nullptr;
}

}  // namespace

const char* conv_tiles_plan(ConvInferPlan& plan, const ConvTilesShape& shape, const ConvInferTile& wish) {
    int processors;
    if (const char* error = count_processors(processors)) return error;
    return conv_tiles_plan(plan, shape, wish, processors);
}

int conv_tiles_partials(const ConvTilesShape& shape, const ConvInferPlan& plan) {
    return int(plan.blocks / (shape.conv.out_channels / plan.tile.columns));  // one for each part of a tile's rows
}

const char* conv_tiles(const ConvTiles& t) {
    const ConvTrain& p = t.conv;
    const ConvTrainShape& s = p.shape;
    ConvTilesShape shape{s, t.width, t.stride, false};
    if (const char* reason = plan_why_not(shape, t.plan)) return reason;
    if (s.loads != bool(p.o) + bool(p.o_mask) + bool(p.below) || s.sums != bool(p.partials))
        return "conv_tiles: expected the loads and sums of the shape";
    if (bool(p.below) != bool(p.below_affine) || (p.o_mask && !p.o))
        return "conv_tiles: expected below with its affine, and a mask with its o";
    if (s.transposed ? p.affine || p.relu || s.sums != bool(p.below) : p.o_mask || p.below)
        return "conv_tiles: expected an epilogue of the forward pass, or of the gradient if transposed";
    if (s.transposed && t.stride > 1 && (p.o_mask || p.below))
        return "conv_tiles: expected no o_mask and below in the gradient of a stride";
    Launch launch(shape, t.plan, p.dtype, p.x, p.y);
    launch.weights(launch.maps.w[0], p.w, s.transposed ? s.in_channels : s.out_channels,
                   s.taps * (s.transposed ? s.out_channels : s.in_channels));
    TilesArgs& args = launch.args;
    args.affine = p.affine;
    args.below_affine = p.below_affine;
    args.loads[0] = static_cast<const char*>(p.o);
    args.loads[1] = static_cast<const char*>(p.o_mask);
    args.loads[2] = static_cast<const char*>(p.below);
    args.relu = p.relu;
    args.partials = p.partials;
    return launch.run(p.stream);
}

const char* gram_tiles(const GramTiles& t) {
    const GramDgrad& p = t.gram;
    const ConvTrainShape& s = p.shape;
    ConvTilesShape shape{s, t.width, t.stride, true};
    if (const char* reason = plan_why_not(shape, t.plan)) return reason;
    if (!p.q || !p.c || p.c_parts < 1 || s.sums != (p.partials_a || p.partials_b))
        return "gram_tiles: expected q, c, and the sums of the shape";
    if (!p.affine) return "gram_tiles: expected the affine";
    if (p.q_scale && p.dtype != DType::fp16) return "gram_tiles: expected a q_scale of float16 alone";
    if ((p.partials_a && s.read == Read::raw) || (p.partials_b && !joins(s.read)))
        return "gram_tiles: expected sums of tensors that the read normalises";
    if (s.read == Read::bn_bwd || s.read == Read::bn_bwd_open) return "gram_tiles: expected an activation for x";
    Launch launch(shape, t.plan, p.dtype, p.x, p.da);
    launch.positions(launch.maps.a[1], p.g, launch.grid.near, s.in_channels);
    launch.positions(launch.maps.b[1], p.y, launch.grid.near, s.in_channels);
    launch.weights(launch.maps.w[0], p.q, s.out_channels, s.out_channels);
    launch.weights(launch.maps.w[1], p.w, s.in_channels, s.out_channels);
    TilesArgs& args = launch.args;
    args.x[1].read = p.y ? Read::masked : Read::scaled;
    args.x[1].affine_b = p.affine;
    args.c = p.c, args.c_parts = p.c_parts;
    args.column_scale = p.q_scale;
    bool outer = s.read == Read::join_b || s.read == Read::join_c;
    if (outer || p.partials_a) args.loads[0] = static_cast<const char*>(p.x.a);
    if (outer || p.partials_b) args.loads[1] = static_cast<const char*>(p.x.b);
    args.partials = p.partials_a, args.partials_b = p.partials_b;
    return launch.run(p.stream);
}

}  // namespace p3d
