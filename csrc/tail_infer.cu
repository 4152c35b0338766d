// The tail of one bottleneck and the head of the next in one pass, for inference:
//
//     t = join(bn(T x), o)      3x1x1, m -> m channels, rounded, never stored
//     y = relu(bn(E t) + r)     1x1x1, m -> 4m, rounded and stored
//     z = relu(bn(R y))         1x1x1, 4m -> m of the next block, rounded and stored; or absent
//
// and in the first block of a stage, where a slice of r is made beside that of E t:
//
//     r = bn(D x0)              1x1x1, m -> 4m, rounded, never stored
//
// Positions are the rows of the matrix unit and channels its columns, so that a product's accumulators, normalised and
// packed, are the next product's operand as they lie in the registers: t and y go from product to product there. A
// warpgroup owns 64 positions of a clip's T * H * W at a time, a *unit*: taps are the same positions H * W before and
// after, and zero before the clip's first and past its last, which is where the copy engine fills in zeros. y is made
// 64 channels at a time, a *slice*, and added up into z at once.
//
// One box of 64 positions by 64 channels is 8 KB of shared memory, rows of 128 bytes, swizzled. A unit reads, through a
// ring of such boxes: the taps before, after and at its positions; o, unless it is x; the slices of r. A slice of y
// takes the place of its slice of r, element by element, and is stored from there; z has a place of its own. Every warp
// stores the 16 positions that it computed, so the warps of a unit wait for each other in the matrix unit alone. A thin
// y, of every second row and column, is stored by the threads, 16 bytes each: boxes have no such gaps.
//
// If y is pooled over time, 16 rows of a unit, those of a warp, are a *piece*: 8 positions of frame 2k, then the same
// of frame 2k + 1. Pieces are numbered through all frames of all clips; a unit is four of them, so its boxes come in
// four parts. A thread holds both elements of a maximum, and the 8 rows that remain are stored from the place of the
// first 8.
//
// With D, x0 is read in place of r and kept in registers. The ring then holds what is read alone: slices of y have two
// places of their own by turns, z the first of these, and every warp knows when its rows have left them.
//
// Weights are boxes in the order of their use: T by tap and 64 channels, then D, E and R by turns, slice by slice.
//   m = 64    88 KB, with D 120 KB, stay in shared memory
//   m = 128   352 KB pass through a ring, from the second-level cache, once for both warpgroups of a block
//
// A block is persistent: a warpgroup of producers, one thread for each of the rings, and two that compute. They take
// units by turns and share nothing but weights: one multiplies while the other normalises.
//
// Fragments lie in registers as rows.cuh says.
#include <algorithm>
#include <cstdlib>

#include "rows.cuh"

namespace p3d {
namespace {

constexpr int kThreads = 384;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(kProducerRegisters + 2 * kConsumerRegisters <= 3 * (65536 / kThreads / 8 * 8), "registers of the block");

struct TailMaps {
    CUtensorMap x, o, r;             // [N, T * H * W, C], read in boxes of a unit; r is x0 if there is D
    CUtensorMap y, z;                // likewise, written in boxes of a warp's 16 positions
                                     // pooled: [N, T, H * W, C] in boxes of pieces, y [N * To, H * W, C] of 8 positions
    CUtensorMap w_t, w_e, w_r, w_d;  // [m, 3 * m], [4 m, m], [m, 4 m], [4 m, m], in boxes of m, 64, m, 64 rows
};

struct TailArgs {
    const float* affine_t;  // [3, m]
    const float* affine_e;  // [3, 4m]
    const float* affine_r;  // [3, m]
    const float* affine_d;  // [3, 4m]
    Join join;
    bool own_o;  // o has boxes of its own; else it is x
    int frame;   // positions of a frame, H * W
    int clip_units, turns;
    char* thin;  // [N, T, Ht, Wt, 4m], y at even rows and columns; or nullptr: all of y
    int clips, time, width, thin_width, thin_frame;  // N, T, W, Wt, Ht * Wt
    int pooled_time, frame_pieces;                   // To, pieces of two frames
};

// Where everything lies in shared memory, weights first.
template <int kMid, bool kReduce, bool kDown>
struct Layout {
    static constexpr int kChunks = kMid / kChunk, kSlices = 4 * kChunks;
    static constexpr int kItems = 3 * kChunks + (1 + kReduce + kDown) * kSlices;  // of weights, for one unit
    static constexpr int kItemBytes = kMid * kChunk * 2;
    static constexpr bool kResident = kMid == kChunk;
    static constexpr int kStages = kResident ? kItems : 4;
    static constexpr int kStaged = (kDown ? 2 : kReduce ? kChunks : 0) * kBoxBytes;  // y and z, or z, of one warpgroup
    static constexpr int kAffineBytes = (kMid + 4 * kMid + kMid + (kDown ? 4 * kMid : 0)) * 8;
    static constexpr int kRowBytes = 2 * kUnit * 4;  // where the rows of a unit go in a thin y
    static constexpr int kFixed = kStages * (kItemBytes + 16) + 2 * kStaged + kAffineBytes + kRowBytes;
    static constexpr int kSlots = (kSharedLimit - kFixed) / (2 * (kBoxBytes + 16));  // of one warpgroup
    static constexpr int kBytes = kFixed + 2 * kSlots * (kBoxBytes + 16);
    static_assert(kDown || kSlots >= kChunks + 3,
                  "a ring holds the centre tap, a slice that is stored and one that is computed");
    static_assert(!kDown || kSlots >= 3, "a ring holds the centre tap, o and x0");
    static_assert(!kDown || kResident, "x0 and z are one box, and all weights stay");

    uint32_t weights, slots, staging, affine, rows, barriers;

    __device__ __forceinline__ explicit Layout(const void* base)
        : weights(shared_address(base)),
          slots(weights + kStages * kItemBytes),
          staging(slots + 2 * kSlots * kBoxBytes),
          affine(staging + 2 * kStaged),
          rows(affine + kAffineBytes),
          barriers(rows + kRowBytes) {}
};

// ---- Instructions that no other kernel uses.

// d = a * b or, with kAdd, d += a * b; A in registers, B K-major: the rows of its box are columns of d.
#define P3D_TAIL_ASM(N, TYPE, GROUPS, A0, A1, A2, A3, B, ADD)                                           \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" P3D_TEXT_##GROUPS \
                 "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", %" #ADD ", 1, 1, 0;"            \
                 : P3D_OPS_##GROUPS                                                                     \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdd))
#define P3D_TAIL_WGMMA(N, GROUPS, A0, A1, A2, A3, B, ADD)                                                    \
    template <typename T, int kAdd>                                                                          \
    __device__ __forceinline__ void wgmma_registers(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b) { \
        if constexpr (std::is_same_v<T, __nv_bfloat16>)                                                      \
            P3D_TAIL_ASM(N, "bf16", GROUPS, A0, A1, A2, A3, B, ADD);                                         \
        else                                                                                                 \
            P3D_TAIL_ASM(N, "f16", GROUPS, A0, A1, A2, A3, B, ADD);                                          \
    }
P3D_TAIL_WGMMA(64, 8, 32, 33, 34, 35, 36, 37)
P3D_TAIL_WGMMA(128, 16, 64, 65, 66, 67, 68, 69)

__device__ __forceinline__ int load_int(uint32_t source) {
    int v;
    asm volatile("ld.shared.s32 %0, [%1];" : "=r"(v) : "r"(source) : "memory");
    return v;
}

__device__ __forceinline__ void store_int(uint32_t target, int v) {
    asm volatile("st.shared.s32 [%0], %1;" ::"r"(target), "r"(v) : "memory");
}

template <int kRegisters, bool kMore>
__device__ __forceinline__ void set_registers() {
    if constexpr (kMore)
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
    else
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- Rings.

template <typename Place>
__device__ __forceinline__ Ring activations(const Place& place, int group) {
    return {place.slots + group * Place::kSlots * kBoxBytes,
            place.barriers + 16 * (Place::kStages + group * Place::kSlots), kBoxBytes, Place::kSlots};
}

template <typename Place>
__device__ __forceinline__ Ring weight_items(const Place& place) {
    return {place.weights, place.barriers, Place::kItemBytes, Place::kStages};
}

struct Unit {
    int clip, position;  // past the last clip there is nothing: the copy engine reads zeros and writes nothing

    __device__ __forceinline__ Unit(const TailArgs& a, int turn, int group) {
        int unit = 2 * turn + group;
        clip = unit / a.clip_units;
        position = (unit - clip * a.clip_units) * kUnit;
    }
};

constexpr int kPieceFrame = 8;                          // positions of a piece, in each of its two frames
constexpr int kUnitPieces = kUnit / (2 * kPieceFrame);  // one a warp
constexpr int kPieceBytes = kBoxBytes / kUnitPieces;

struct Piece {
    int clip, pair, position;  // of frames 2 pair and 2 pair + 1

    __device__ __forceinline__ Piece(const TailArgs& a, int turn, int group, int warp) {
        int piece = kUnitPieces * (2 * turn + group) + warp;
        int frames = piece / a.frame_pieces;
        position = (piece - frames * a.frame_pieces) * kPieceFrame;
        clip = frames / a.pooled_time;
        pair = frames - clip * a.pooled_time;
    }
};

// ---- Producers.

template <int kMid, bool kDown, bool kPool>
__device__ __forceinline__ void produce_unit(const TailMaps& maps, const TailArgs& a, Ring& ring, int turn, int group) {
    auto boxes = [&](const auto& bring) {  // (map, channel, frames after the unit's own)
#pragma unroll 1
        for (int tap = 0; tap < 3; ++tap)  // before, after, centre
#pragma unroll 1
            for (int c = 0; c < kMid; c += kChunk) bring(maps.x, c, tap == 0 ? -1 : tap == 1 ? 1 : 0);
        if (a.own_o)
            for (int c = 0; c < kMid; c += kChunk) bring(maps.o, c, 0);
#pragma unroll 1
        for (int c = 0; c < (kDown ? kChunk : 4 * kMid); c += kChunk) bring(maps.r, c, 0);
    };
    if constexpr (kPool) {
        Piece pieces[kUnitPieces] = {
            {a, turn, group, 0}, {a, turn, group, 1}, {a, turn, group, 2}, {a, turn, group, 3}};
        boxes([&](const CUtensorMap& map, int channel, int frames) {
            ring.claim();
#pragma unroll
            for (int i = 0; i < kUnitPieces; ++i)
                copy_box(ring.slot() + i * kPieceBytes, map, ring.full(), channel, pieces[i].position,
                         2 * pieces[i].pair + frames, pieces[i].clip);
            ring.advance();
        });
    } else {
        Unit unit(a, turn, group);
        boxes([&](const CUtensorMap& map, int channel, int frames) {
            ring.claim();
            copy_box(ring.slot(), map, ring.full(), channel, unit.position + frames * a.frame, unit.clip);
            ring.advance();
        });
    }
}

template <bool kPool, int kMid, bool kReduce, bool kDown>
__device__ __forceinline__ void produce_activations(const TailMaps& maps, const TailArgs& a,
                                                    const Layout<kMid, kReduce, kDown>& place, int group) {
    Ring ring = activations(place, group);
    for (int turn = blockIdx.x; turn < a.turns; turn += gridDim.x)
        produce_unit<kMid, kDown, kPool>(maps, a, ring, turn, group);
}

template <int kMid, bool kReduce, bool kDown>
__device__ __forceinline__ void produce_weights(const TailMaps& maps, const TailArgs& a,
                                                const Layout<kMid, kReduce, kDown>& place) {
    using Place = Layout<kMid, kReduce, kDown>;
    Ring ring = weight_items(place);
    for (int turn = blockIdx.x; turn < a.turns; turn += gridDim.x) {
#pragma unroll 1
        for (int tap = 0; tap < 3; ++tap)  // of w_t: 0 before, 1 centre, 2 after
#pragma unroll 1
            for (int c = 0; c < kMid; c += kChunk) {
                ring.claim();
                copy_box(ring.slot(), maps.w_t, ring.full(), (tap == 0 ? 0 : 3 - tap) * kMid + c, 0, 0);
                ring.advance();
            }
#pragma unroll 1
        for (int slice = 0; slice < Place::kSlices; ++slice) {
            if (kDown) {
                ring.claim();
                copy_box(ring.slot(), maps.w_d, ring.full(), 0, slice * kChunk, 0);
                ring.advance();
            }
            ring.claim();
            for (int c = 0; c < Place::kChunks; ++c)
                copy_box(ring.slot() + c * kBoxBytes, maps.w_e, ring.full(), c * kChunk, slice * kChunk, 0);
            ring.advance();
            if (!kReduce) continue;
            ring.claim();
            copy_box(ring.slot(), maps.w_r, ring.full(), slice * kChunk, 0, 0);
            ring.advance();
        }
        if (Place::kResident) return;
    }
}

// ---- Consumers.

// The row of a clip's thin y that a position becomes; -1: none.
__device__ __forceinline__ int thin_row(const TailArgs& a, int position) {
    int t = position / a.frame, p = position - t * a.frame;
    int h = p / a.width, w = p - h * a.width;
    return t < a.time && (h | w) % 2 == 0 ? t * a.thin_frame + h / 2 * a.thin_width + w / 2 : -1;
}

// d (+)= a * w, w the boxes of one item.
template <typename T, bool kAdd, int kCount, int kSteps>
__device__ __forceinline__ void multiply(float (&d)[kCount], const uint32_t (&a)[kSteps][4], uint32_t w) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
        uint64_t b = swizzled_descriptor(w + k / 4 * kBoxBytes + k % 4 * 32, 8 * 128);
        if (!kAdd && k == 0)
            wgmma_registers<T, 0>(d, a[k], b);
        else
            wgmma_registers<T, 1>(d, a[k], b);
    }
}

template <typename T, bool kPool, int kMid, bool kReduce, bool kDown>
__device__ __forceinline__ void consume(const TailMaps& maps, const TailArgs& a,
                                        const Layout<kMid, kReduce, kDown>& place, int group) {
    using Place = Layout<kMid, kReduce, kDown>;
    constexpr int kChunks = Place::kChunks, kSlices = Place::kSlices;
    constexpr bool kResident = Place::kResident;
    int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
    bool leader = lane == 0;
    Ring ring = activations(place, group), weights = weight_items(place);
    uint32_t staging = place.staging + group * Place::kStaged;
    // This lane's row of a box for ldmatrix and stmatrix; step k is at that address ^ 32 k.
    uint32_t mine = (16 * warp + lane % 16) * 128 + ((lane / 16 ^ lane % 8) << 4);
    // The same of the 8 rows that pooling leaves of a warp's 16, two steps to a fragment.
    uint32_t eighth = 16 * warp * 128 + lane % 8 * 128 + ((lane / 8 ^ lane % 8) << 4);
    uint32_t affine_t = place.affine + 16 * (lane % 4);  // of this thread's columns; group j is at 64 j
    uint32_t affine_e = affine_t + 8 * kMid, affine_r = affine_e + 32 * kMid, affine_d = affine_r + 8 * kMid;

    bool held = false;  // the box stored last still holds a slot
    auto store = [&](const CUtensorMap& map, uint32_t source, int channel, int position, int outer, bool slot) {
        fence_proxy_async();
        __syncwarp();
        if (leader) {
            store_box(map, source + warp * 16 * 128, channel, position, outer);
            store_wait<1>();
        }
        if (held) ring.free(leader);
        held = slot;
    };
    uint32_t rows = place.rows + group * (Place::kRowBytes / 2) + warp * 64;
    auto store_thin = [&](uint32_t source, int slice, const Unit& unit) {
        __syncwarp();
        char* clip = a.thin + int64_t(unit.clip) * a.time * a.thin_frame * (8 * kMid) + slice * (2 * kChunk);
#pragma unroll
        for (int i = 0; i < 16; i += 4) {
            int row = i + lane / 8, piece = lane % 8, to = load_int(rows + 4 * row);
            if (to < 0) continue;
            uint4 v = load_shared(source + (16 * warp + row) * 128 + ((piece ^ row % 8) << 4));
            *reinterpret_cast<uint4*>(clip + int64_t(to) * (8 * kMid) + 16 * piece) = v;
        }
        fence_proxy_async();  // the copy engine fills the slot next
        __syncwarp();
        if (!kDown) ring.free(leader);
    };
    for (int turn = blockIdx.x; turn < a.turns; turn += gridDim.x) {
        Unit unit(a, turn, group);
        int position = unit.position + 16 * warp, outer = unit.clip;  // of what this warp stores
        bool alone = false;                                           // the last frame of a clip
        if constexpr (kPool) {
            Piece piece(a, turn, group, warp);
            position = piece.position;
            outer = piece.clip * a.pooled_time + piece.pair;
            alone = 2 * piece.pair + 1 == a.time;
        }
        if (!kPool && a.thin) {
            __syncwarp();  // the rows of the unit before have been read
            if (lane < 16)
                store_int(rows + 4 * lane, unit.clip < a.clips ? thin_row(a, unit.position + 16 * warp + lane) : -1);
        }

        // T. Of the boxes of x, those at the centre are kept for the join.
        float d[kMid / 2];
        uint32_t o[kChunks];
#pragma unroll
        for (int i = 0; i < kMid / 2; ++i) d[i] = 0;
        wgmma_pin(d);
#pragma unroll
        for (int i = 0; i < 3 * kChunks; ++i) {
            uint32_t x = ring.take(), w = weights.take(kResident);
            if (i == 0 && held) {  // without z: the last slice of the unit before
                if (leader) store_wait<0>();
                ring.free(leader);
                held = false;
            }
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < kChunk / 16; ++k)
                wgmma<T, 0>(d, swizzled_descriptor(x + 32 * k, 8 * 128), swizzled_descriptor(w + 32 * k, 8 * 128));
            wgmma_commit();
            if (i >= 2 * kChunks) o[i - 2 * kChunks] = x;
            if (i == 0) continue;
            wgmma_wait<1>();  // the item before this one has been read
            if (i <= 2 * kChunks) ring.free(leader);
            if (!kResident) weights.free(leader);
        }
        if (a.own_o)
#pragma unroll
            for (int c = 0; c < kChunks; ++c) o[c] = ring.take();
        uint32_t other[kMid / 16][4] = {}, t[kMid / 16][4];
        if (a.join != Join::relu)
#pragma unroll
            for (int k = 0; k < kMid / 16; ++k) load_fragment(other[k], (o[k / 4] + mine) ^ (k % 4 * 32));
        uint32_t x0[kChunk / 16][4];
        if constexpr (kDown) {
            uint32_t box = ring.take();
#pragma unroll
            for (int k = 0; k < kChunk / 16; ++k) load_fragment(x0[k], (box + mine) ^ (32 * k));
        }
        {
            Columns<kMid / 8> columns(affine_t);
            wgmma_wait<0>();
            wgmma_pin(d);
            columns.apply(d);
        }
        if (!kResident) weights.free(leader);
        join<T>(a.join, t, d, other);
        if (kDown && leader) store_wait<0>();  // the z of the unit before leaves the place of the first slice
        __syncwarp();
#pragma unroll
        for (int c = 0; c < kChunks; ++c) ring.free(leader);
        if (a.own_o)
#pragma unroll
            for (int c = 0; c < kChunks; ++c) ring.free(leader);
        if (kDown) ring.free(leader);

        // D, E and R, a slice of y at a time.
        float e[kChunk / 2], z[kMid / 2];
        uint32_t y[kChunk / 16][4];
        if constexpr (kReduce) {
#pragma unroll
            for (int i = 0; i < kMid / 2; ++i) z[i] = 0;
            wgmma_pin(z);
        }
#pragma unroll 1
        for (int slice = 0; slice < kSlices; ++slice) {
            float down[kChunk / 2];
            if constexpr (kDown) {
                uint32_t w = weights.take(kResident);
                wgmma_fence();
                multiply<T, false>(down, x0, w);
                wgmma_commit();
            }
            uint32_t w = weights.take(kResident);
            wgmma_fence();
            multiply<T, false>(e, t, w);
            wgmma_commit();
            uint32_t slot, r[kChunk / 16][4];
            if constexpr (kDown) {
                Columns<kChunk / 8> columns(affine_d + 8 * kChunk * slice);
                wgmma_wait<1>();
                wgmma_pin(down);
                columns.apply(down);
#pragma unroll
                for (int k = 0; k < kChunk / 16; ++k)
#pragma unroll
                    for (int i = 0; i < 4; ++i) r[k][i] = pack<T>(down[first_of(k, i)], down[first_of(k, i) + 1]);
                slot = staging + slice % 2 * kBoxBytes;
                __syncwarp();  // the leader has seen the slice before the last leave
            } else {
                slot = ring.take();
#pragma unroll
                for (int k = 0; k < kChunk / 16; ++k) load_fragment(r[k], (slot + mine) ^ (32 * k));
            }
            Columns<kChunk / 8> columns(affine_e + 8 * kChunk * slice);
            wgmma_wait<0>();
            wgmma_pin(e);
            if (!kResident) weights.free(leader);
            if (!kResident && kReduce && slice > 0) weights.free(leader);
            columns.apply(e);
#pragma unroll
            for (int k = 0; k < kChunk / 16; ++k) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float2 residual = unpack<T>(r[k][i]);
                    y[k][i] = pack_relu<T>(e[first_of(k, i)] + residual.x, e[first_of(k, i) + 1] + residual.y);
                }
                if constexpr (!kPool) store_fragment((slot + mine) ^ (32 * k), y[k]);
            }
            if constexpr (kPool) {
                auto pooled = [&](int k, int i) { return alone ? y[k][i] : larger<T>(y[k][i], y[k][i + 1]); };
#pragma unroll
                for (int k = 0; k < kChunk / 16; k += 2)
                    store_fragment((slot + eighth) ^ (32 * k),
                                   {pooled(k, 0), pooled(k, 2), pooled(k + 1, 0), pooled(k + 1, 2)});
                store(maps.y, slot, slice * kChunk, position, outer, true);
                continue;
            }
            if constexpr (kReduce) {
                w = weights.take(kResident);
                wgmma_fence();
                multiply<T, true>(z, y, w);
                wgmma_commit();
            }
            if (a.thin)
                store_thin(slot, slice, unit);
            else
                store(maps.y, slot, slice * kChunk, position, outer, !kDown);
        }
        if constexpr (kReduce) {
            Columns<kMid / 8> columns(affine_r);
            wgmma_wait<0>();
            wgmma_pin(z);
            if (!kResident) weights.free(leader);
            columns.apply(z);
            if (a.thin && leader) store_wait<0>();  // else boxes of y have waited for it
            __syncwarp();                           // the leader has seen the z of the unit before leave
#pragma unroll
            for (int c = 0; c < kChunks; ++c) {
#pragma unroll
                for (int k = 4 * c; k < 4 * c + 4; ++k) {
                    uint32_t v[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) v[i] = pack_relu<T>(z[first_of(k, i)], z[first_of(k, i) + 1]);
                    store_fragment((staging + c * kBoxBytes + mine) ^ (k % 4 * 32), v);
                }
                store(maps.z, staging + c * kBoxBytes, c * kChunk, position, outer, false);
            }
        }
    }
    if (leader) store_wait<0>();
}

template <typename T, int kMid, bool kReduce, bool kDown, bool kPool>
__global__ void __launch_bounds__(kThreads, 1)
    tail_infer_kernel(const __grid_constant__ TailMaps maps, const __grid_constant__ TailArgs a) {
    using Place = Layout<kMid, kReduce, kDown>;
    static_assert(!kPool || (!kReduce && !kDown), "the last tail of a stage");
    extern __shared__ __align__(1024) char memory[];
    Place place(memory);
    if (threadIdx.x == 0) {
        for (int i = 0; i < Place::kStages + 2 * Place::kSlots; ++i) {
            barrier_init(place.barriers + 16 * i, 1);
            barrier_init(place.barriers + 16 * i + 8, i < Place::kStages ? 8 : 4);  // the warps that use a slot
        }
        barrier_init_fence();
    }
    __syncthreads();
    int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // the same register for the warp, as the compiler can tell
    if (warp < 4) {
        set_registers<kProducerRegisters, false>();
        if (threadIdx.x % 32) return;
        if (warp < 2) {
            dependency_wait();
            produce_activations<kPool>(maps, a, place, warp);
        } else if (warp == 2) {
            produce_weights(maps, a, place);
        }
    } else {
        set_registers<kConsumerRegisters, true>();
        dependency_wait();
        int thread = threadIdx.x - 128;
        prepare_affine(place.affine, a.affine_t, kMid, thread);
        prepare_affine(place.affine + 8 * kMid, a.affine_e, 4 * kMid, thread);
        if (kReduce) prepare_affine(place.affine + 40 * kMid, a.affine_r, kMid, thread);
        if (kDown) prepare_affine(place.affine + 48 * kMid, a.affine_d, 4 * kMid, thread);
        named_sync(1, 256);
        consume<T, kPool>(maps, a, place, warp / 4 - 1);
    }
}

// ---- Host.

template <typename T, int kMid, bool kReduce, bool kDown, bool kPool = false>
const char* launch(const TailMaps& maps, const TailArgs& args, int blocks, cudaStream_t stream) {
    constexpr int kBytes = Layout<kMid, kReduce, kDown>::kBytes;
    cudaError_t error = launch_dependent(tail_infer_kernel<T, kMid, kReduce, kDown, kPool>, dim3(blocks), kThreads,
                                         kBytes, stream, maps, args);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename T>
const char* launch(const TailMaps& maps, const TailArgs& args, bool wide, bool reduce, bool down, int blocks,
                   cudaStream_t stream) {
    if (args.pooled_time)
        return wide ? launch<T, 128, false, false, true>(maps, args, blocks, stream)
                    : launch<T, 64, false, false, true>(maps, args, blocks, stream);
    if (wide)
        return reduce ? launch<T, 128, true, false>(maps, args, blocks, stream)
                      : launch<T, 128, false, false>(maps, args, blocks, stream);
    if (down)
        return reduce ? launch<T, 64, true, true>(maps, args, blocks, stream)
                      : launch<T, 64, false, true>(maps, args, blocks, stream);
    return reduce ? launch<T, 64, true, false>(maps, args, blocks, stream)
                  : launch<T, 64, false, false>(maps, args, blocks, stream);
}

int64_t clip_units(const TailShape& s) { return (s.time * s.frame + kUnit - 1) / kUnit; }
int64_t frame_pieces(const TailShape& s) { return (s.frame + kPieceFrame - 1) / kPieceFrame; }

}  // namespace

const char* tail_infer_why_not(const TailShape& s) {
    using Long = long long;
    if (s.channels != 64 && s.channels != 128)
        return fail("tail_infer: channels: expected 64 or 128, whose sums fit in registers, got %lld",
                    Long(s.channels));
    if (s.down_channels && (s.channels != 64 || s.down_channels != 64))
        return fail(
            "tail_infer: down_channels: expected 0, or 64 to 64 channels, whose weights all fit, got %lld to %lld",
            Long(s.down_channels), Long(s.channels));
    if (std::min({s.clips, s.time, s.frame}) < 1 || double(s.time) * double(s.frame) > 1 << 29)
        return fail("tail_infer: expected N, T, H * W of at least 1 and T * H * W up to 2^29, got %lld, %lld, %lld",
                    Long(s.clips), Long(s.time), Long(s.frame));
    if (double(s.clips) * double(clip_units(s)) > 1 << 30)
        return fail("tail_infer: expected up to 2^30 times 64 positions, got N, T, H * W = %lld, %lld, %lld",
                    Long(s.clips), Long(s.time), Long(s.frame));
    if (!s.pooled_time) return nullptr;
    if (s.pooled_time < 1 || std::abs(2 * s.pooled_time - s.time) > 1 || s.down_channels)
        return fail("tail_infer: pooled_time: expected half of T = %lld and no down_channels, got %lld", Long(s.time),
                    Long(s.pooled_time));
    if (double(s.clips) * double(s.pooled_time) * double(frame_pieces(s)) > 1 << 30)
        return fail("tail_infer: expected up to 2^30 times 8 positions, pooled, got N, T, H * W = %lld, %lld, %lld",
                    Long(s.clips), Long(s.time), Long(s.frame));
    return nullptr;
}

const char* tail_infer(const TailInfer& p) {
    if (const char* reason = tail_infer_why_not(p.shape)) return reason;
    if ((p.join == Join::relu) != !p.o) return "tail_infer: expected o with every join but relu";
    if (bool(p.w_r) != bool(p.z) || bool(p.w_r) != bool(p.affine_r))
        return "tail_infer: expected w_r, affine_r and z, or none of them";
    if (bool(p.w_d) != bool(p.shape.down_channels) || bool(p.w_d) != bool(p.affine_d))
        return "tail_infer: expected w_d, affine_d and down_channels, or none of them";
    if (p.shape.pooled_time && (p.w_r || p.thin_width)) return "tail_infer: expected all of y pooled, and no w_r";
    int processors;
    if (const char* error = count_processors(processors)) return error;

    int64_t clips = p.shape.clips, length = p.shape.time * p.shape.frame, m = p.shape.channels;
    TailMaps maps{};
    TailArgs args{};
    args.affine_t = p.affine_t;
    args.affine_e = p.affine_e;
    args.affine_r = p.affine_r;
    args.affine_d = p.affine_d;
    args.join = p.join;
    args.own_o = p.o && p.o != p.x;
    args.frame = int(p.shape.frame);
    args.clip_units = int(clip_units(p.shape));
    args.time = int(p.shape.time);
    args.pooled_time = int(p.shape.pooled_time);
    args.frame_pieces = int(frame_pieces(p.shape));
    int64_t pieces = clips * args.pooled_time * args.frame_pieces;
    int64_t units = pieces ? (pieces + kUnitPieces - 1) / kUnitPieces : clips * args.clip_units;
    args.turns = int((units + 1) / 2);
    if (p.thin_width) {
        if (p.thin_width < 1 || p.shape.frame % p.thin_width) return "tail_infer: expected a width that divides H * W";
        args.thin = static_cast<char*>(p.y);
        args.clips = int(clips);
        args.width = int(p.thin_width);
        args.thin_width = (args.width + 1) / 2;
        args.thin_frame = (args.frame / args.width + 1) / 2 * args.thin_width;
    }
    const char* failed = nullptr;
    auto encode = [&](CUtensorMap& map, const void* base, int64_t outer, int64_t rows, int64_t columns, int64_t box) {
        if (!failed) failed = tensor_map("tail_infer", map, base, p.dtype, outer, rows, columns, int(box));
    };
    auto encode_read = [&](CUtensorMap& map, const void* base, int64_t columns) {
        if (!args.pooled_time) return encode(map, base, clips, length, columns, kUnit);
        cuuint64_t row = 2 * columns, frame = p.shape.frame;
        cuuint64_t sizes[] = {cuuint64_t(columns), frame, cuuint64_t(p.shape.time), cuuint64_t(clips)};
        cuuint64_t strides[] = {row, row * frame, row * cuuint64_t(length)};
        cuuint32_t boxes[] = {kChunk, kPieceFrame, 2, 1};
        if (!failed) failed = tensor_map("tail_infer", map, base, p.dtype, 4, sizes, strides, boxes);
    };
    encode_read(maps.x, p.x, m);
    if (args.own_o) encode_read(maps.o, p.o, m);
    encode_read(maps.r, p.r, p.w_d ? p.shape.down_channels : 4 * m);
    if (args.pooled_time)
        encode(maps.y, p.y, clips * args.pooled_time, p.shape.frame, 4 * m, kPieceFrame);
    else if (!args.thin)
        encode(maps.y, p.y, clips, length, 4 * m, 16);
    encode(maps.w_t, p.w_t, 1, m, 3 * m, m);
    encode(maps.w_e, p.w_e, 1, 4 * m, m, kChunk);
    if (p.w_r) {
        encode(maps.z, p.z, clips, length, m, 16);
        encode(maps.w_r, p.w_r, 1, m, 4 * m, m);
    }
    if (p.w_d) encode(maps.w_d, p.w_d, 1, 4 * m, p.shape.down_channels, kChunk);
    if (failed) return failed;
    int blocks = std::min(args.turns, processors);
    return p.dtype == DType::bf16 ? launch<__nv_bfloat16>(maps, args, m == 128, p.w_r, p.w_d, blocks, p.stream)
                                  : launch<__half>(maps, args, m == 128, p.w_r, p.w_d, blocks, p.stream);
}

}  // namespace p3d
