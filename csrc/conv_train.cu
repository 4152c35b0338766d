// 1x1x1 convolutions of stride 1 in training, forward and input gradient, and the end of the gradient through the Gram
// identity: y = epilogue(sum over chunks of read(x) w), where the narrower side has 64 or 128 channels.
//
// Positions are the rows of the matrix unit, output channels its columns (rows.cuh). A *unit* is 64 positions. What is
// read comes in boxes of 64 positions by 64 channels, a *chunk* of an operand one box or two; a warp loads its 16 rows
// as fragments and applies the read there, so that the operand of the product is never stored. y is made in *slices* of
// 64 channels. All weights of a block stay in its shared memory.
//
//   narrow    64 or 128 output channels: chunks add up in a slice
//   wide      64 or 128 input channels: fragments of all chunks stay in registers, slice follows slice; where weights
//             are many, blocks share the slices out, a *group* of these each
//   pair      the same of 64 channels, beside those of another tensor: a slice is made of two products, each with its
//             normalisation
//
// A block is persistent: two warpgroups compute, a warp each brings the operands of a *team* and what the epilogue of a
// warpgroup reads. Teams are one warpgroup, or, where a unit has two slices, both, of which each makes one.
//
// What an epilogue reads comes in boxes too, a thin v (p3d.h) row by row; the last box of a slice is where y is formed,
// else one of its own. Every warp stores the 16 positions that it computed. Statistics and sums stay in registers until
// the end: those of a thread are of 16 channels and of every 8th position of its units, so they are joined once, in
// fixed order.
#include <algorithm>

#include "reads.cuh"

namespace p3d {
namespace {

constexpr int kThreads = 384;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(kProducerRegisters + 2 * kConsumerRegisters <= 3 * (65536 / kThreads / 8 * 8), "registers of the block");
constexpr int kSlices = 4;                   // of a group, in the wide form
constexpr int kMaxWeights = 20;              // boxes
constexpr int kTrainBarrierBytes = 16 * 32;  // one for the weights, a pair for each slot

enum class Form : int { narrow = 0, wide = 1, pair = 2 };

__host__ __device__ constexpr bool has_slices(Form form) { return form == Form::wide || form == Form::pair; }

struct TrainMaps {
    CUtensorMap a, b;            // [F, P, C] of the operand, read in boxes of a unit
    CUtensorMap w;               // weights as they lie, in boxes of 64 rows
    CUtensorMap down, w_down;    // [P, 64] and [Co, 64], the second product of a pair, likewise
    CUtensorMap below, mask, o;  // [F, P, Co], read in boxes of a unit
    CUtensorMap y;               // likewise, written in boxes of a warp's 16 positions
};

struct TrainArgs {
    Source x;
    const float* affine;        // [3, Co] of y; or nullptr
    const float* second;        // [3, Co] of o, of below or of the second product; or nullptr
    const float* c;             // [c_parts, Co] of the Gram identity; or nullptr
    const float* column_scale;  // [Co] of its product; or nullptr
    const float* scales;        // [parts, v_rows, Co / 64] of its v
    const char* thin;           // [parts, v_rows, Co] that v, of even rows and columns alone; or nullptr
    int c_parts, v_rows;
    int height, width;                      // thin: H, W
    bool has_below, has_mask, has_o, relu;  // the Gram identity adds all that `mask` and `o` have
    float *partials, *partials_b;           // [R, 3, Co] statistics of y, or [R, 2, Co] sums; or nullptr
    int out_channels;
    int limit;                // positions
    int turns, groups;        // of units: narrow, wide, pair
    int whole;                // turns before a unit's slices are shared out: wide, pair
    int in_slots, out_slots;  // of a team, of a warpgroup
};

template <Form kForm, int kChunks>
struct Teams {
    static constexpr int kParts = has_slices(kForm) ? 1 : kChunks;  // warpgroups of one
    static constexpr int kCount = 2 / kParts;
    static constexpr int kColumns = has_slices(kForm) ? kSlices : kParts;  // slices of a block
};

__host__ __device__ inline int weight_boxes(Form form, int chunks, const Source& x) {
    if (has_slices(form)) return kSlices * (chunks + (form == Form::pair));
    return x.chunks * chunks;
}

// Where everything lies in shared memory.
struct Place {
    uint32_t weights, slots, constants, epilogue, barriers;
    int in_slots, out_slots, teams;

    __device__ __forceinline__ Place(const void* base, const TrainArgs& a, int boxes, int teams)
        : weights(shared_address(base)),
          slots(weights + boxes * kBoxBytes),
          constants(slots + (teams * a.in_slots + 2 * a.out_slots) * kBoxBytes),
          epilogue(constants + constants_of(a.x)),
          barriers(shared_address(base) + kSharedLimit - kTrainBarrierBytes),
          in_slots(a.in_slots),
          out_slots(a.out_slots),
          teams(teams) {}

    __device__ __forceinline__ Ring in(int team) const {
        return {slots + team * in_slots * kBoxBytes, barriers + 16 * (1 + team * in_slots), kBoxBytes, in_slots};
    }
    __device__ __forceinline__ Ring out(int group) const {
        int first = teams * in_slots + group * out_slots;
        return {slots + first * kBoxBytes, barriers + 16 * (1 + first), kBoxBytes, out_slots};
    }
};

// ---- The order of work.

template <Form kForm, int kChunks>
struct Units {  // of a team in the narrow form
    int first, step;

    __device__ __forceinline__ explicit Units(const TrainArgs& a) : first(blockIdx.x), step(gridDim.x) {}
    static __device__ __forceinline__ int position(int turn, int team) {
        return (turn * Teams<kForm, kChunks>::kCount + team) * kUnit;  // past the end there is nothing
    }
};

// A team's share of a turn in the wide forms: a unit with all slices of its group or, of the units that are left over
// and too few for all teams, one slice.
struct Piece {
    int position, first, end;  // the slices, within the group

    __device__ __forceinline__ Piece(const TrainArgs& a, int turn, int team) {
        int teams = gridDim.x / a.groups * 2, mine = blockIdx.x / a.groups * 2 + team;
        bool all = turn < a.whole;
        int step = max(turn - a.whole, 0) * teams + mine;
        position = (min(turn, a.whole) * teams + (all ? mine : step / kSlices)) * kUnit;
        first = all ? 0 : step % kSlices;
        end = all ? kSlices : first + 1;
    }
    __device__ __forceinline__ bool exists(const TrainArgs& a) const { return position < a.limit; }
};

__device__ __forceinline__ int first_slice(const TrainArgs& a) { return blockIdx.x % a.groups * kSlices; }

// ---- Producers: one thread each, of a thin v a warp.

// An arrival of this thread when all that it has begun to copy by copy_16 is there.
__device__ __forceinline__ void copy_arrive(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void bring(Ring& ring, const CUtensorMap& map, int channel, int position) {
    ring.claim();
    copy_box(ring.slot(), map, ring.full(), channel, position, 0);
    ring.advance();
}

template <Form kForm, int kChunks, bool kBack>
__device__ __forceinline__ void produce_weights(const TrainMaps& maps, const TrainArgs& a, const Place& place) {
    constexpr int kColumns = Teams<kForm, kChunks>::kColumns;
    int boxes = weight_boxes(kForm, kChunks, a.x);
    int column = has_slices(kForm) ? first_slice(a) : 0;
    barrier_expect(place.barriers, boxes * kBoxBytes);
#pragma unroll 1
    for (int box = 0; box < boxes; ++box) {
        int chunk = box / kColumns, out = (column + box % kColumns) * kChunk;
        const CUtensorMap* map = &maps.w;
        if (kForm == Form::pair && chunk == kChunks) chunk = 0, map = &maps.w_down;
        copy_box(place.weights + box * kBoxBytes, *map, place.barriers, kBack ? out : chunk * kChunk,
                 kBack ? chunk * kChunk : out, 0);
    }
}

__device__ __forceinline__ void bring_source(Ring& ring, const TrainMaps& maps, const TrainArgs& a, int position) {
#pragma unroll 1
    for (int c = 0; c < a.x.chunks; ++c) {
        bring(ring, maps.a, c * kChunk, position);
        if (two_tensors(a.x.read)) bring(ring, maps.b, c * kChunk, position);
    }
}

template <Form kForm, int kChunks>
__device__ __forceinline__ void produce_operands(const TrainMaps& maps, const TrainArgs& a, const Place& place,
                                                 int team) {
    using Team = Teams<kForm, kChunks>;
    Ring ring = place.in(team);
    if constexpr (kForm == Form::narrow) {
        Units<kForm, kChunks> units(a);
        for (int turn = units.first; turn < a.turns; turn += units.step)
            bring_source(ring, maps, a, units.position(turn, team));
    } else {
        for (int turn = 0; turn < a.turns; ++turn) {
            Piece piece(a, turn, team);
            if (!piece.exists(a)) break;
            bring_source(ring, maps, a, piece.position);
            if constexpr (kForm == Form::pair) bring(ring, maps.down, 0, piece.position);
        }
    }
}

// The row of v that a position has; -1: none.
__device__ __forceinline__ int row_of_v(const TrainArgs& a, int position) {
    if (position >= a.limit) return -1;
    if (!a.thin) return position;
    int line = position / a.width, w = position - line * a.width, frame = line / a.height, h = line - frame * a.height;
    return (h | w) % 2 == 0 ? (frame * ((a.height + 1) / 2) + h / 2) * ((a.width + 1) / 2) + w / 2 : -1;
}

// A thin v as the epilogue reads it: rows where they belong, and zeros between them. Of a whole warp.
template <Form kForm, int kChunks>
__device__ __forceinline__ void produce_thin(const TrainArgs& a, const Place& place, int group) {
    using Team = Teams<kForm, kChunks>;
    constexpr int kRowBytes = 2 * kChunks * kChunk;
    Ring ring = place.out(group);
    int team = Team::kParts == 2 ? 0 : group, part = Team::kParts == 2 ? group : 0, lane = threadIdx.x % 32;
    Units<kForm, kChunks> units(a);
    for (int turn = units.first; turn < a.turns; turn += units.step) {
        int position = units.position(turn, team);
        int rows[2] = {row_of_v(a, position + lane), row_of_v(a, position + 32 + lane)};
#pragma unroll 1
        for (int of = a.has_mask; of >= 0; --of) {  // parts of v
            const char* from = a.thin + int64_t(of) * a.v_rows * kRowBytes + 2 * part * kChunk + 16 * (lane % 8);
            barrier_wait(ring.full() + 8, ring.parity ^ 1);
#pragma unroll
            for (int k = 0; k < 16; ++k) {
                int to = 4 * k + lane / 8, row = __shfl_sync(~0u, rows[k / 8], to % 32);
                copy_16(ring.slot() + to * 128 + ((lane % 8 ^ to % 8) << 4), from + int64_t(max(row, 0)) * kRowBytes,
                        row >= 0);
            }
            copy_arrive(ring.full());
            ring.advance();
        }
    }
    copy_commit();
    copy_wait(0);
}

template <Form kForm, int kChunks>
__device__ __forceinline__ void produce_epilogue(const TrainMaps& maps, const TrainArgs& a, const Place& place,
                                                 int group) {
    using Team = Teams<kForm, kChunks>;
    if (!a.has_below && !a.has_mask && !a.has_o) return;
    Ring ring = place.out(group);
    int team = Team::kParts == 2 ? 0 : group, part = Team::kParts == 2 ? group : 0;
    auto slice = [&](int channel, int position) {
        if (a.has_below) bring(ring, maps.below, channel, position);
        if (a.has_mask) bring(ring, maps.mask, channel, position);
        if (a.has_o) bring(ring, maps.o, channel, position);
    };
    if constexpr (kForm == Form::narrow) {
        Units<kForm, kChunks> units(a);
        for (int turn = units.first; turn < a.turns; turn += units.step)
            slice(part * kChunk, units.position(turn, team));
    } else {
        for (int turn = 0; turn < a.turns; ++turn) {
            Piece piece(a, turn, team);
            if (!piece.exists(a)) break;
#pragma unroll 1
            for (int i = piece.first; i < piece.end; ++i) slice((first_slice(a) + i) * kChunk, piece.position);
        }
    }
}

// ---- Constants of the epilogue.

// Rows of the affine of y, or (c, scale) of the Gram identity; then rows of the second affine. One that is not given
// changes nothing.
__device__ __forceinline__ float epilogue_constant(const TrainArgs& a, int row, int channel) {
    if (a.c) {
        if (row == 1) return a.column_scale ? a.column_scale[channel] : 1;
        float sum = 0;
        for (int i = 0; row == 0 && i < a.c_parts; ++i) sum += a.c[i * a.out_channels + channel];
        return sum;
    }
    const float* affine = row < 3 ? a.affine : a.second;
    return affine ? affine[row % 3 * a.out_channels + channel] : row % 3 == 1;
}

template <Form kForm, int kChunks>
__device__ __forceinline__ void prepare_all(const TrainArgs& a, const Place& place, int thread) {
    constexpr int kColumns = Teams<kForm, kChunks>::kColumns;
    prepare_source(place.constants, a.x, thread, 256);
    int first = has_slices(kForm) ? first_slice(a) * kChunk : 0;
    prepare(place.epilogue, 3, kColumns * kChunk, thread, 256,
            [&](int row, int channel) { return epilogue_constant(a, row, first + channel); });
}

// ---- Consumers.

// A thread's sums of 16 channels, column 2 j + e of them 8 j + 2 (lane % 4) + e.
//   moments   a shift near the mean, then sums of the values and their squares about it
//   below     sum g, sum g (z - mean)
//   join      the same of the operand's a, then of its b
template <int kKinds>
struct Totals {
    float v[kKinds][16];
    int n = 0;

    __device__ __forceinline__ Totals() {
#pragma unroll
        for (int kind = 0; kind < kKinds; ++kind)
#pragma unroll
            for (int i = 0; i < 16; ++i) v[kind][i] = 0;
    }
};

template <typename T, Form kForm, int kChunks, bool kBack>
struct Consumer {
    using Team = Teams<kForm, kChunks>;
    static constexpr int kKinds = has_slices(kForm) ? 1 : kBack ? 4 : 3;

    const TrainMaps& maps;
    const TrainArgs& a;
    const Place& place;
    int group, lane, warp, part, team;
    bool leader;
    Ring in, out;
    int held = -1;  // the slot of the box stored last, if others wait for it
    uint32_t mine;  // this lane's row of a box for ldmatrix and stmatrix; step k is at that address ^ 32 k
    Totals<kKinds> totals;

    __device__ __forceinline__ Consumer(const TrainMaps& maps, const TrainArgs& a, const Place& place, int group)
        : maps(maps),
          a(a),
          place(place),
          group(group),
          lane(threadIdx.x % 32),
          warp(threadIdx.x / 32 % 4),
          part(Team::kParts == 2 ? group : 0),
          team(Team::kParts == 2 ? 0 : group),
          leader(lane == 0),
          in(place.in(team)),
          out(place.out(group)),
          mine((16 * warp + lane % 16) * 128 + ((lane / 16 ^ lane % 8) << 4)) {}

    // The next chunk of the operand: its boxes as they are.
    __device__ __forceinline__ void load(Fragments& x, Fragments& b) {
        int first = in.index, second = -1;
        uint32_t box = in.take() + mine;
#pragma unroll
        for (int k = 0; k < 4; ++k) load_fragment(x[k], box ^ (32 * k));
        if (two_tensors(a.x.read)) {
            second = in.index;
            box = in.take() + mine;
#pragma unroll
            for (int k = 0; k < 4; ++k) load_fragment(b[k], box ^ (32 * k));
        } else {
#pragma unroll
            for (int k = 0; k < 4; ++k)
#pragma unroll
                for (int i = 0; i < 4; ++i) b[k][i] = 0;
        }
        __syncwarp();
        if (leader) {
            release(in, first);
            if (second >= 0) release(in, second);
        }
    }

    // The next box as it is.
    __device__ __forceinline__ void load(Fragments& x) {
        int slot = in.index;
        uint32_t box = in.take() + mine;
#pragma unroll
        for (int k = 0; k < 4; ++k) load_fragment(x[k], box ^ (32 * k));
        __syncwarp();
        if (leader) release(in, slot);
    }

    __device__ __forceinline__ Constants constants(int chunk) const {
        return {place.constants, a.x.chunks * kChunk, chunk};
    }

    __device__ __forceinline__ void read(Fragments& x, int chunk) {
        Fragments b;
        load(x, b);
        apply<T>(a.x.read, x, b, constants(chunk));
    }

    __device__ __forceinline__ uint32_t weight(int chunk, int slice) const {
        return place.weights + (chunk * Team::kColumns + slice) * kBoxBytes;
    }

    // One pair of channels of y in one row, before rounding. `o` and `mask` are zero where they do not exist; `other`
    // is the second product.
    __device__ __forceinline__ uint32_t finish(float2 v, float2 other, uint32_t o, uint32_t mask, const Six& c) const {
        if constexpr (has_slices(kForm) && !kBack) {  // without branches: so many slices are made of so few terms
            float2 u = c.affine(v), w = kForm == Form::pair ? c.other(other) : unpack<T>(o);
            u.x += w.x, u.y += w.y;
            return kForm == Form::pair || a.relu ? pack_relu<T>(u.x, u.y) : pack<T>(u.x, u.y);
        } else if constexpr (!kBack) {
            if (a.affine) v = c.affine(v);
            if (a.has_o) {
                float2 w = unpack<T>(o);
                v.x += w.x, v.y += w.y;
            }
            return a.relu ? pack_relu<T>(v.x, v.y) : pack<T>(v.x, v.y);
        } else {
            if (a.has_o) {
                float2 w = unpack<T>(a.has_mask ? masked<T>(o, mask) : o);
                v.x += w.x, v.y += w.y;
            }
            return pack<T>(v.x, v.y);
        }
    }

    __device__ __forceinline__ void add(int kind, int column, float g, float centred, bool real) {
        g = real ? g : 0;
        totals.v[kind][column] += g;
        totals.v[kind + 1][column] = fmaf(g, real ? centred : 0, totals.v[kind + 1][column]);
    }

    // Finishes a slice of a unit, stores it, and adds to the totals. `other`: the second product of a pair.
    __device__ __forceinline__ void store(const float (&d)[32], const float (&other)[32], int slice, int channel,
                                          int position) {
        Constants constants(place.epilogue, Team::kColumns * kChunk, slice);
        int below_slot = out.index;
        uint32_t below = a.has_below ? out.take() + mine : 0;
        int mask_slot = out.index;
        uint32_t mask = a.has_mask ? out.take() + mine : 0;
        int slot = out.index;
        uint32_t box = out.slot();
        if (a.has_o)
            out.take();
        else if (!a.has_below && !a.has_mask)
            out.advance();
        else
            slot = a.has_mask ? mask_slot : below_slot, box = (a.has_mask ? mask : below) - mine;
        write(
            d, other, constants, box,
            [&](int k, Fragments& boxes) {
                if (a.has_o) load_fragment(boxes[0], (box + mine) ^ (32 * k));
                if (a.has_mask) load_fragment(boxes[1], mask ^ (32 * k));
                if (a.has_below) load_fragment(boxes[2], below ^ (32 * k));
            },
            position);
        send(box, channel, position);
        if (leader) {
            if (held >= 0) release(out, held);
            if (a.has_below && slot != below_slot) release(out, below_slot);
            if (a.has_mask && slot != mask_slot) release(out, mask_slot);
        }
        held = a.has_o || a.has_mask || a.has_below ? slot : -1;
    }

    __device__ __forceinline__ void send(uint32_t box, int channel, int position) {
        fence_proxy_async();
        __syncwarp();
        if (leader) {
            store_box(maps.y, box + warp * 16 * 128, channel, position + 16 * warp, 0);
            store_wait<1>();
        }
    }

    __device__ __forceinline__ void begin_box() const {
        if (a.out_slots == 1 && leader) store_wait<0>();
        __syncwarp();  // the leader has seen the box that was stored here leave
    }

    __device__ __forceinline__ void count(int position) {
        int row = position + 16 * warp + lane / 4;
        totals.n += (row < a.limit) + (row + 8 < a.limit);
    }

    // A slice of y, rounded, to `box`; `load` brings what the epilogue reads of step k.
    template <typename Load>
    __device__ __forceinline__ void write(const float (&d)[32], const float (&other)[32], const Constants& constants,
                                          uint32_t box, const Load& load, int position) {
        int row = position + 16 * warp + lane / 4, planes = a.affine || a.second ? 3 : 0;
        if constexpr (has_slices(kForm)) planes = kBack ? 0 : kForm == Form::pair ? 3 : 2;
        bool real[2] = {row < a.limit, row + 8 < a.limit}, begins = totals.n == 0;
        begin_box();
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            Fragments boxes = {};
            load(k, boxes);
            uint32_t y[4];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                int j = 2 * k + half;
                Six c(constants, j, planes);
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    int i = 2 * half + m;
                    int first = 4 * j + 2 * m;
                    y[i] =
                        finish({d[first], d[first + 1]}, {other[first], other[first + 1]}, boxes[0][i], boxes[1][i], c);
                    if constexpr (!has_slices(kForm)) {
                        float2 v = unpack<T>(y[i]);
                        if (!kBack && a.partials) {
                            add_moments(2 * j, v.x, real[m], begins && m == 0);
                            add_moments(2 * j + 1, v.y, real[m], begins && m == 0);
                        }
                        if (kBack && a.has_below) {
                            float2 z = unpack<T>(boxes[2][i]), u = c.other(z);
                            add(0, 2 * j, u.x <= 0 ? 0 : v.x, z.x - c.v1.z, real[m]);
                            add(0, 2 * j + 1, u.y <= 0 ? 0 : v.y, z.y - c.v1.w, real[m]);
                        }
                    }
                }
            }
            store_fragment((box + mine) ^ (32 * k), y);
        }
        count(position);
    }

    __device__ __forceinline__ void add_moments(int column, float v, bool real, bool begins) {
        if constexpr (kKinds >= 3) {
            totals.v[0][column] = begins && real ? v : totals.v[0][column];  // near the mean: no digits are lost
            float delta = real ? v - totals.v[0][column] : 0;
            totals.v[1][column] += delta;
            totals.v[2][column] = fmaf(delta, delta, totals.v[2][column]);
        }
    }

    // The end of the Gram identity: the gradient of what the operand reads, whose boxes of this slice are x and b, with
    // its masks and sums.
    __device__ __forceinline__ void store_join(const float (&d)[32], const Fragments& x, const Fragments& b,
                                               const float2 (&scale)[2], int position) {
        if constexpr (kForm == Form::narrow && kBack) {
            Read read = a.x.read;
            bool outer = read == Read::join_b || read == Read::join_c;
            Constants own(place.epilogue, Team::kColumns * kChunk, part), of_x = constants(part);
            int row = position + 16 * warp + lane / 4;
            bool real[2] = {row < a.limit, row + 8 < a.limit};
            int second_slot = out.index;
            uint32_t second = a.has_mask ? out.take() + mine : 0;
            int slot = out.index;
            uint32_t box = out.take();
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                uint32_t y[4], o[4], p[4] = {};
                load_fragment(o, (box + mine) ^ (32 * k));
                if (a.has_mask) load_fragment(p, second ^ (32 * k));
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    int j = 2 * k + half;
                    float4 c = own(0, j);
                    Six of(of_x, j, planes_of(read, false));
#pragma unroll
                    for (int m = 0; m < 2; ++m) {
                        int i = 2 * half + m;
                        float2 v = {fmaf(d[4 * j + 2 * m], c.z, c.x), fmaf(d[4 * j + 2 * m + 1], c.w, c.y)};
                        float2 one = unpack<__half>(o[i]), two = unpack<__half>(p[i]);
                        v.x = fmaf(one.x, scale[m].x, fmaf(two.x, scale[m].y, v.x));
                        v.y = fmaf(one.y, scale[m].x, fmaf(two.y, scale[m].y, v.y));
                        float2 z = unpack<T>(x[k][i]), w = unpack<T>(b[k][i]), u = of.affine(z), t = of.other(w);
                        if (outer) {
                            v.x = relu(u.x) + t.x <= 0 ? 0 : v.x, v.y = relu(u.y) + t.y <= 0 ? 0 : v.y;
                            if (read == Read::join_c) v.x *= 0.5f, v.y *= 0.5f;
                        }
                        y[i] = pack<T>(v.x, v.y);
                        v = unpack<T>(y[i]);
                        if (a.partials) {
                            add(0, 2 * j, u.x <= 0 ? 0 : v.x, z.x - of.v0.x, real[m]);
                            add(0, 2 * j + 1, u.y <= 0 ? 0 : v.y, z.y - of.v0.y, real[m]);
                        }
                        if (a.partials_b) {
                            add(2, 2 * j, !outer && t.x <= 0 ? 0 : v.x, w.x - of.v1.z, real[m]);
                            add(2, 2 * j + 1, !outer && t.y <= 0 ? 0 : v.y, w.y - of.v1.w, real[m]);
                        }
                    }
                }
                store_fragment((box + mine) ^ (32 * k), y);
            }
            send(box, part * kChunk, position);
            if (leader) {
                if (held >= 0) release(out, held);
                if (a.has_mask) release(out, second_slot);
            }
            held = slot;
        }
    }

    __device__ __forceinline__ void run_narrow() {
        Units<kForm, kChunks> units(a);
        for (int turn = units.first; turn < a.turns; turn += units.step) {
            int position = units.position(turn, team);
            float d[32];
            Fragments kept_x, kept_b;  // this slice of the operand, if it is the one whose gradient this is
            float2 scale[2] = {};      // of v in this thread's rows, a component a part
            if (kBack && a.c) {
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    int row = row_of_v(a, position + 16 * warp + 8 * m + lane / 4);
                    if (row < 0) continue;
                    const float* of = a.scales + int64_t(row) * kChunks + part;
                    scale[m].x = of[0];
                    if (a.has_mask) scale[m].y = of[int64_t(a.v_rows) * kChunks];
                }
            }
            zero(d);
#pragma unroll 1
            for (int chunk = 0; chunk < a.x.chunks; ++chunk) {
                Fragments x, b;
                load(x, b);
                if (kBack && a.c && chunk == part) {
#pragma unroll
                    for (int k = 0; k < 4; ++k)
#pragma unroll
                        for (int i = 0; i < 4; ++i) kept_x[k][i] = x[k][i], kept_b[k][i] = b[k][i];
                }
                apply<T>(a.x.read, x, b, constants(chunk));
                pin(x);
                wgmma_fence();
                multiply<T, kBack>(d, x, weight(chunk, part));
                wgmma_commit();
                wgmma_wait<0>();
                wgmma_pin(d);
            }
            if (kBack && a.c)
                store_join(d, kept_x, kept_b, scale, position);
            else
                store(d, d, part, part * kChunk, position);
        }
    }

    __device__ __forceinline__ void run_wide() {
        for (int turn = 0; turn < a.turns; ++turn) {
            Piece piece(a, turn, team);
            if (!piece.exists(a)) break;
            Fragments x[kChunks], second;
#pragma unroll
            for (int c = 0; c < kChunks; ++c) read(x[c], c), pin(x[c]);
            if constexpr (kForm == Form::pair) {
                load(second);
                pin(second);
            }
#pragma unroll 1
            for (int slice = piece.first; slice < piece.end; ++slice) {
                float d[32], other[32];
                zero(d);
                if constexpr (kForm == Form::pair) zero(other);
                wgmma_fence();
#pragma unroll
                for (int c = 0; c < kChunks; ++c) multiply<T, kBack>(d, x[c], weight(c, slice));
                if constexpr (kForm == Form::pair) multiply<T, kBack>(other, second, weight(kChunks, slice));
                wgmma_commit();
                wgmma_wait<0>();
                wgmma_pin(d);
                if constexpr (kForm == Form::pair) wgmma_pin(other);
                store(d, kForm == Form::pair ? other : d, slice, (first_slice(a) + slice) * kChunk, piece.position);
            }
        }
    }

    // ---- Totals, once at the end: over lanes, then warps, each in a fixed order.

    __device__ __forceinline__ void send_totals() {
        if constexpr (!has_slices(kForm)) {
            int64_t row = blockIdx.x * Team::kCount + team;
            float* scratch = static_cast<float*>(__cvta_shared_to_generic(place.out(group).slots));  // [4][kinds][64]
            int thread = threadIdx.x % 128;
            named_sync(2 + group, 128);  // all boxes have left
            if (!kBack && a.partials) {
#pragma unroll
                for (int i = 0; i < 16; ++i) {
                    float n = totals.n, sum = totals.v[1][i], offset = sum / fmaxf(n, 1);
                    float m2 = totals.v[2][i] - sum * offset;
                    Moments moments{n, totals.v[0][i] + offset, m2 < 0 ? 0 : m2};  // not fmaxf, which would lose a NaN
#pragma unroll
                    for (int other = 4; other < 32; other *= 2)
                        moments.join(__shfl_xor_sync(~0u, moments.n, other), __shfl_xor_sync(~0u, moments.mean, other),
                                     __shfl_xor_sync(~0u, moments.m2, other));
                    float* to = scratch + 192 * warp + 8 * (i / 2) + 2 * (lane % 4) + i % 2;
                    if (lane < 4) to[0] = moments.n, to[64] = moments.mean, to[128] = moments.m2;
                }
                named_sync(2 + group, 128);
                if (thread < kChunk) {
                    Moments moments;
                    for (int w = 0; w < 4; ++w) {
                        const float* of = scratch + 192 * w + thread;
                        moments.join(of[0], of[64], of[128]);
                    }
                    float* to = a.partials + row * 3 * a.out_channels + part * kChunk + thread;
                    to[0] = moments.n, to[a.out_channels] = moments.mean, to[2 * a.out_channels] = moments.m2;
                }
            }
            if (kBack && (a.partials || a.partials_b)) {
                constexpr int kSums = 4;
#pragma unroll
                for (int kind = 0; kind < kSums; ++kind)
#pragma unroll
                    for (int i = 0; i < 16; ++i) {
                        float sum = totals.v[kind][i];
#pragma unroll
                        for (int other = 4; other < 32; other *= 2) sum += __shfl_xor_sync(~0u, sum, other);
                        if (lane < 4) scratch[64 * (kSums * warp + kind) + 8 * (i / 2) + 2 * (lane % 4) + i % 2] = sum;
                    }
                named_sync(2 + group, 128);
                int kind = thread / kChunk, channel = thread % kChunk;
                for (int tensor = 0; tensor < kSums / 2; ++tensor) {
                    float* to = tensor ? a.partials_b : a.partials;
                    if (!to) continue;
                    float sum = 0;
                    for (int w = 0; w < 4; ++w) sum += scratch[64 * (kSums * w + 2 * tensor + kind) + channel];
                    to[(2 * row + kind) * a.out_channels + part * kChunk + channel] = sum;
                }
            }
        }
    }
};

template <int kRegisters, bool kMore>
__device__ __forceinline__ void set_registers() {
    if constexpr (kMore)
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
    else
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <typename T, Form kForm, int kChunks, bool kBack>
__global__ void __launch_bounds__(kThreads, 1)
    conv_train_kernel(const __grid_constant__ TrainMaps maps, const __grid_constant__ TrainArgs a) {
    using Team = Teams<kForm, kChunks>;
    extern __shared__ __align__(1024) char memory[];
    Place place(memory, a, weight_boxes(kForm, kChunks, a.x), Team::kCount);
    if (threadIdx.x == 0) {
        barrier_init(place.barriers, 1);
        for (int i = 0; i < Team::kCount * a.in_slots + 2 * a.out_slots; ++i) {
            bool operand = i < Team::kCount * a.in_slots;
            barrier_init(place.barriers + 16 * (1 + i), !operand && a.thin ? 32 : 1);
            barrier_init(place.barriers + 16 * (1 + i) + 8, operand ? 4 * Team::kParts : 4);  // the warps that use it
        }
        barrier_init_fence();
    }
    __syncthreads();
    dependency_wait();
    int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // the same register for the warp, as the compiler can tell
    if (warp < 4) {
        set_registers<kProducerRegisters, false>();
        if constexpr (kForm == Form::narrow && kBack)
            if (a.thin && warp >= 2) return produce_thin<kForm, kChunks>(a, place, warp - 2);
        if (threadIdx.x % 32) return;
        if (warp == 0) produce_weights<kForm, kChunks, kBack>(maps, a, place);
        if (warp < Team::kCount) produce_operands<kForm, kChunks>(maps, a, place, warp);
        if (warp >= 2) produce_epilogue<kForm, kChunks>(maps, a, place, warp - 2);
    } else {
        set_registers<kConsumerRegisters, true>();
        prepare_all<kForm, kChunks>(a, place, threadIdx.x - 128);
        named_sync(1, 256);
        barrier_wait(place.barriers, 0);
        Consumer<T, kForm, kChunks, kBack> consumer(maps, a, place, warp / 4 - 1);
        if constexpr (kForm == Form::narrow) consumer.run_narrow();
        if constexpr (has_slices(kForm)) consumer.run_wide();
        if (consumer.leader) store_wait<0>();
        consumer.send_totals();
    }
}

// ---- Host.

struct TrainPlan {
    Form form;
    int chunks;  // of the narrower side
    int teams, groups;
    int turns, whole;  // narrow, wide, pair
    int blocks, in_slots, out_slots;
};

// How a shape is divided, or why it cannot run.
const char* train_plan(TrainPlan& plan, const ConvTrainShape& s, const char* op = "conv_train", bool pair = false) {
    using Long = long long;
    int processors;
    if (const char* error = count_processors(processors)) return error;
    if (s.taps != 1) return fail("%s: taps: expected 1, got %d", op, s.taps);
    if (const char* reason = units_why_not(op, s.clips, s.time, s.frame)) return reason;
    for (int64_t channels : {s.in_channels, s.out_channels})
        if (channels < kChunk || channels % kChunk || channels > 8192)
            return fail("%s: channels: expected multiples of 64 up to 8192, got %lld -> %lld", op, Long(s.in_channels),
                        Long(s.out_channels));
    auto few = [](int64_t channels) { return channels == 64 || channels == 128; };
    int64_t in = s.in_channels, out = s.out_channels;
    if (pair) {
        if (in != kChunk || out % (kSlices * kChunk))
            return fail("%s: channels: expected 64 to multiples of 256, got %lld -> %lld", op, Long(in), Long(out));
        plan.form = Form::pair;
    } else if (few(out)) {
        plan.form = Form::narrow;
    } else if (few(in) && out % (kSlices * kChunk) == 0 && !s.sums) {
        plan.form = Form::wide;
    } else {
        return fail(
            "%s: channels: expected 64 or 128 on one side and, without sums, multiples of 256 on the other, "
            "got %lld -> %lld",
            op, Long(in), Long(out));
    }
    bool wide = has_slices(plan.form);
    plan.chunks = int((wide ? in : out) / kChunk);
    plan.teams = wide || plan.chunks == 1 ? 2 : 1;
    plan.groups = wide ? int(out / (kSlices * kChunk)) : 1;

    Source x{s.read, int(in / kChunk)};
    int boxes = weight_boxes(plan.form, plan.chunks, x);
    int fixed = kTrainBarrierBytes + constants_of(x) + 3 * (wide ? kSlices : plan.chunks) * kChunk * 8;
    int slots = boxes > kMaxWeights ? 0 : (kSharedLimit - fixed) / kBoxBytes - boxes;
    int room = slots / plan.teams, writers = 2 / plan.teams;  // of a team
    if (wide) {
        int brought = plan.chunks * (1 + two_tensors(s.read)) + pair;  // boxes of a unit
        plan.in_slots = std::max(2, std::min(2 * brought, s.loads ? room / 3 : room - 3));
        plan.out_slots = room - plan.in_slots;
    } else {
        plan.out_slots = s.loads ? 2 * s.loads + 1 : 1;
        while (room - writers * plan.out_slots < 4 && plan.out_slots > s.loads + 1) --plan.out_slots;
        plan.in_slots = room - writers * plan.out_slots;
    }
    if (plan.in_slots < 2 || plan.out_slots < s.loads + 1 || slots > 31)
        return fail("%s: channels: the weights of %lld -> %lld do not fit in shared memory", op, Long(in), Long(out));

    if (wide) {
        int64_t units = ceil_divide(s.clips * s.time * s.frame, kUnit);
        plan.blocks = int(std::min<int64_t>(ceil_divide(units * kSlices, 2), std::max(1, processors / plan.groups)));
        int teams = 2 * plan.blocks, turns = int(ceil_divide(units % teams * kSlices, teams));
        plan.whole = int(units / teams) + (turns == kSlices);
        plan.turns = plan.whole + turns % kSlices;
        plan.blocks *= plan.groups;
    } else {
        plan.turns = int(ceil_divide(ceil_divide(s.clips * s.time * s.frame, kUnit), plan.teams));
        plan.blocks = std::min(plan.turns, processors);
    }
    return nullptr;
}

template <typename T, Form kForm, int kChunks, bool kBack>
const char* launch(const TrainMaps& maps, const TrainArgs& args, const TrainPlan& plan, cudaStream_t stream) {
    cudaError_t error = launch_dependent(conv_train_kernel<T, kForm, kChunks, kBack>, dim3(plan.blocks), kThreads,
                                         kSharedLimit, stream, maps, args);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename T, Form kForm>
const char* launch(const TrainMaps& maps, const TrainArgs& args, const TrainPlan& plan, bool back,
                   cudaStream_t stream) {
    if (plan.chunks == 1)
        return back ? launch<T, kForm, 1, true>(maps, args, plan, stream)
                    : launch<T, kForm, 1, false>(maps, args, plan, stream);
    return back ? launch<T, kForm, 2, true>(maps, args, plan, stream)
                : launch<T, kForm, 2, false>(maps, args, plan, stream);
}

template <typename T>
const char* launch(const TrainMaps& maps, const TrainArgs& args, const TrainPlan& plan, bool back,
                   cudaStream_t stream) {
    if (plan.form == Form::narrow) return launch<T, Form::narrow>(maps, args, plan, back, stream);
    if (plan.form == Form::wide) return launch<T, Form::wide>(maps, args, plan, back, stream);
    return launch<T, Form::pair, 1, false>(maps, args, plan, stream);
}

// What all ops have: the plan, the operand x and the result y.
struct Launch {
    const char* op;
    DType dtype;
    TrainPlan plan{};
    TrainMaps maps{};
    TrainArgs args{};
    int64_t rows = 0;  // positions
    const char* failed;

    Launch(const char* op, const ConvTrainShape& s, DType dtype, const WgradOperand& x, void* y, bool pair = false)
        : op(op), dtype(dtype), failed(check_operand(op, x, s.read)) {
        if (!failed) failed = train_plan(plan, s, op, pair);
        if (failed) return;
        rows = s.clips * s.time * s.frame;
        args.x = {s.read, int(s.in_channels / kChunk), x.affine_a, x.affine_b, x.sums};
        args.out_channels = int(s.out_channels);
        args.limit = int(rows);
        args.turns = plan.turns, args.whole = plan.whole, args.groups = plan.groups;
        args.in_slots = plan.in_slots, args.out_slots = plan.out_slots;
        positions(maps.a, x.a, s.in_channels, kUnit);
        positions(maps.b, x.b, s.in_channels, kUnit);
        positions(maps.y, y, s.out_channels, 16);
    }
    void encode(CUtensorMap& map, const void* base, int64_t outer, int64_t rows, int64_t columns, int box) {
        if (base && !failed) failed = tensor_map(op, map, base, dtype, outer, rows, columns, box);
    }
    void positions(CUtensorMap& map, const void* base, int64_t channels, int box) {
        encode(map, base, 1, rows, channels, box);
    }
    const char* run(bool back, cudaStream_t stream) {
        if (failed) return failed;
        return dtype == DType::bf16 ? launch<__nv_bfloat16>(maps, args, plan, back, stream)
                                    : launch<__half>(maps, args, plan, back, stream);
    }
};

}  // namespace

const char* conv_train_why_not(const ConvTrainShape& shape) {
    TrainPlan plan{};
    return train_plan(plan, shape);
}

int conv_train_partials(const ConvTrainShape& shape) {
    TrainPlan plan{};
    return train_plan(plan, shape) ? 0 : plan.blocks * plan.teams;
}

const char* conv_train(const ConvTrain& p) {
    const ConvTrainShape& s = p.shape;
    if (s.loads != bool(p.o) + bool(p.o_mask) + bool(p.below) || s.sums != bool(p.partials))
        return "conv_train: expected the loads and sums of the shape";
    if (bool(p.below) != bool(p.below_affine) || (p.o_mask && !p.o))
        return "conv_train: expected below with its affine, and a mask with its o";
    if (s.transposed ? p.affine || p.relu || s.sums != bool(p.below) : p.o_mask || p.below)
        return "conv_train: expected an epilogue of the forward pass, or of the gradient if transposed";
    Launch launch("conv_train", s, p.dtype, p.x, p.y);
    launch.encode(launch.maps.w, p.w, 1, s.transposed ? s.in_channels : s.out_channels,
                  s.taps * (s.transposed ? s.out_channels : s.in_channels), kChunk);
    launch.positions(launch.maps.below, p.below, s.out_channels, kUnit);
    launch.positions(launch.maps.mask, p.o_mask, s.out_channels, kUnit);
    launch.positions(launch.maps.o, p.o, s.out_channels, kUnit);
    TrainArgs& args = launch.args;
    args.affine = p.affine;
    args.second = p.below_affine;
    args.has_below = p.below, args.has_mask = p.o_mask, args.has_o = p.o, args.relu = p.relu;
    args.partials = p.partials;
    return launch.run(s.transposed, p.stream);
}

const char* gram_add(const GramAdd& p) {
    const ConvTrainShape& s = p.shape;
    if (s.taps != 1 || !s.transposed || s.in_channels != s.out_channels || s.loads < 1 || s.loads > 2)
        return "gram_add: expected a gradient of 1x1x1, of as many channels, with one or two loads";
    if (!p.v || !p.scales || !p.q || !p.c || p.c_parts < 1 || s.sums != (p.partials_a || p.partials_b))
        return "gram_add: expected v, scales, q, c, and the sums of the shape";
    if (p.thin_width < 0 || (p.thin_width && s.frame % p.thin_width))
        return "gram_add: thin: expected a width that divides H * W";
    if ((p.partials_a && s.read == Read::raw) || (p.partials_b && !joins(s.read)))
        return "gram_add: expected sums of tensors that the read normalises";
    if (s.read == Read::bn_bwd || s.read == Read::bn_bwd_open) return "gram_add: expected an activation for x";
    Launch launch("gram_add", s, p.dtype, p.x, p.da);
    launch.encode(launch.maps.w, p.q, 1, s.out_channels, s.out_channels, kChunk);
    TrainArgs& args = launch.args;
    args.has_o = true, args.has_mask = s.loads == 2;
    auto* v = static_cast<const char*>(p.v);
    args.v_rows = args.limit;
    if (p.thin_width) {
        args.thin = v;
        args.width = int(p.thin_width), args.height = int(s.frame / p.thin_width);
        args.v_rows = int(s.clips * s.time) * ((args.height + 1) / 2) * ((args.width + 1) / 2);
    } else {
        launch.positions(launch.maps.o, v, s.out_channels, kUnit);
        if (args.has_mask)
            launch.positions(launch.maps.mask, v + 2 * launch.rows * s.out_channels, s.out_channels, kUnit);
    }
    args.c = p.c, args.c_parts = p.c_parts;
    args.column_scale = p.q_scale;
    args.scales = p.scales;
    args.partials = p.partials_a, args.partials_b = p.partials_b;
    return launch.run(true, p.stream);
}

namespace {

ConvTrainShape expand_shape(const ConvPairShape& s) {
    return {1, 1, s.positions, s.in_channels, s.out_channels, 1, false, s.read, 0, false};
}

}  // namespace

const char* conv_pair_why_not(const ConvPairShape& shape) {
    if (shape.down_channels != kChunk)
        return fail("conv_pair: down_channels: expected 64, got %lld", static_cast<long long>(shape.down_channels));
    TrainPlan plan{};
    return train_plan(plan, expand_shape(shape), "conv_pair", true);
}

const char* conv_pair(const ConvPair& p) {
    if (const char* reason = conv_pair_why_not(p.shape)) return reason;
    if (!p.w || !p.affine || !p.down || !p.w_down || !p.down_affine)
        return "conv_pair: expected two tensors, two weights and two affines";
    ConvTrainShape s = expand_shape(p.shape);
    Launch launch("conv_pair", s, p.dtype, p.x, p.y, true);
    launch.positions(launch.maps.down, p.down, p.shape.down_channels, kUnit);
    launch.encode(launch.maps.w, p.w, 1, s.out_channels, s.in_channels, kChunk);
    launch.encode(launch.maps.w_down, p.w_down, 1, s.out_channels, p.shape.down_channels, kChunk);
    launch.args.affine = p.affine;
    launch.args.second = p.down_affine;
    return launch.run(false, p.stream);
}

}  // namespace p3d
