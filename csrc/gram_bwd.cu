// One pass over the wide gradient of y = relu(bn(w X) + ...), w of 1x1x1 to 256 or 512 channels, for the Gram identity
// (docs/derivations.md): with g the gradient of y where y is not <= 0, else 0,
//
//     M[co][m] = sum over positions p of g[p, co] * X[p, m],   sum of g[p, co]        in parts, one a split
//     v[p, m] = sum over co of g[p, co] * round(scale[co] * w[co, m])                 in parts, one for 256 couts
//
// A block owns 256 couts and every splits-th *unit* of 64 positions. One thread has the copy engine bring boxes of 64
// positions by 64 channels: of X a unit at a time, of the gradient, with y beside it, 64 channels at a time. Three
// warps apply the reads in place. Two warpgroups multiply: a box of g is transposed the left operand of M, as it lies
// that of v. M stays in registers until the end, every other 64 couts in a warpgroup. v of 64 columns is made by the
// two warpgroups in turns, of 128 by each of them a half. scale * w stays in shared memory.
//
// Positions are those of g. They have the coordinates (w, h, f), of which a unit covers a rectangle of w and h:
//   not thin  w = all positions
//   thin      w, h = those of g, f = frames; where H is even, h goes on from frame to frame. g has even rows and
//             columns of X alone, and strides of X's maps skip the rest
// Positions that do not exist have a gradient of zero, and so no part in any sum.
#include <algorithm>

#include "reads.cuh"

namespace p3d {
namespace {

constexpr int kThreads = 384;
constexpr int kProducerRegisters = 88, kConsumerRegisters = 208;
static_assert(kProducerRegisters + 2 * kConsumerRegisters <= 3 * (65536 / kThreads / 8 * 8), "registers of the block");
constexpr int kFinishers = 3;            // warps
constexpr int kBoxes = 4;                // of 64 couts
constexpr int kCouts = kBoxes * kChunk;  // of a block
constexpr int kMaxParts = 2;             // blocks that share the couts out
constexpr int kGroups = kUnit / 16;      // of a box, 16 rows each, which finishers take by turns
constexpr int kOnesBytes = 16 * 8 * 2;   // the right operand of the sum of g
constexpr int kMaxXSlots = 4, kMaxGSlots = 24;
constexpr int kBarrierBytes = 24 * (kMaxXSlots + kMaxGSlots);

struct GramMaps {
    CUtensorMap g, y, a, b;  // [f, h, w, C], read in boxes of a unit
    CUtensorMap v;           // [parts * f, h, w, M], written in boxes of a warp's 16 positions
};

struct GramArgs {
    Source x;
    const void* w;       // [Co, M]
    const float* scale;  // [Co]
    float* partials;     // [splits, Co * M + Co]
    float* scales;       // [parts, P, M / 64]: what 64 columns of v are to be multiplied with
    bool masked;         // y is there
    int out_channels, parts, splits, units;
    int width, height, frames;  // of the positions
    int box_width, box_shift;   // of a unit: 2^box_shift positions of w, the rest of h
    int w_boxes, h_boxes;
    FastDivide by_w_boxes, by_h_boxes;  // if there are two or more
    int x_slots, g_slots;
};

// Slots of shared memory that are copied, finished and used in one order. Its barriers come in these threes.
struct Stages {
    uint32_t slots, barriers;
    int bytes, count;
    int index = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ Stages(uint32_t slots, uint32_t barriers, int bytes, int count)
        : slots(slots), barriers(barriers), bytes(bytes), count(count) {}
    __device__ __forceinline__ uint32_t slot() const { return slots + bytes * index; }
    __device__ __forceinline__ uint32_t copied() const { return barriers + 24 * index; }
    __device__ __forceinline__ uint32_t finished() const { return barriers + 24 * index + 8; }
    __device__ __forceinline__ uint32_t emptied() const { return barriers + 24 * index + 16; }
    __device__ __forceinline__ void advance() {
        if (++index == count) index = 0, parity ^= 1;
    }
    // Of the producer: waits until the slot is empty and announces the bytes to come.
    __device__ __forceinline__ void claim() const {
        barrier_wait(emptied(), parity ^ 1);
        barrier_expect(copied(), bytes);
    }
    __device__ __forceinline__ void take(bool finishing) const {
        barrier_wait(copied(), parity);
        if (finishing) barrier_wait(finished(), parity);
    }
};

__host__ __device__ inline int x_slot_bytes(const Source& x) {
    return x.chunks * (1 + two_tensors(x.read)) * kBoxBytes;
}
__host__ __device__ inline int g_slot_bytes(bool masked) { return (1 + masked) * kBoxBytes; }

// Where everything lies in shared memory.
struct Place {
    uint32_t weights, x_slots, g_slots, staging, constants, ones, barriers;

    __device__ __forceinline__ Place(const void* base, const GramArgs& a)
        : weights(shared_address(base)),
          x_slots(weights + kBoxes * a.x.chunks * kBoxBytes),
          g_slots(x_slots + a.x_slots * x_slot_bytes(a.x)),
          staging(g_slots + a.g_slots * g_slot_bytes(a.masked)),
          constants(staging + 2 * kBoxBytes),
          ones(constants + constants_of(a.x)),
          barriers(ones + kOnesBytes) {}

    __device__ __forceinline__ Stages x(const GramArgs& a) const {
        return {x_slots, barriers, x_slot_bytes(a.x), a.x_slots};
    }
    __device__ __forceinline__ Stages g(const GramArgs& a) const {
        return {g_slots, barriers + 24 * a.x_slots, g_slot_bytes(a.masked), a.g_slots};
    }
};

struct Job {  // of a block
    int part, split;

    __device__ __forceinline__ explicit Job(const GramArgs& a)
        : part(blockIdx.x % a.parts), split(blockIdx.x / a.parts) {}
    __device__ __forceinline__ int first() const { return part * kCouts; }  // of its couts
};

struct Unit {  // where it begins
    int w, h, f;

    __device__ __forceinline__ Unit(const GramArgs& a, int number) {
        int row = a.w_boxes == 1 ? number : a.by_w_boxes(number);
        f = a.h_boxes == 1 ? row : a.by_h_boxes(row);
        w = (number - row * a.w_boxes) * a.box_width;
        h = (row - f * a.h_boxes) * (kUnit >> a.box_shift);
    }
};

// ---- The producer: one thread.

__device__ __forceinline__ void produce(const GramMaps& maps, const GramArgs& a, const Job& job, Stages x, Stages g) {
#pragma unroll 1
    for (int unit = job.split; unit < a.units; unit += a.splits) {
        Unit at(a, unit);
        x.claim();
        for (int c = 0; c < a.x.chunks; ++c) {
            copy_box(x.slot() + c * kBoxBytes, maps.a, x.copied(), c * kChunk, at.w, at.h, at.f);
            if (two_tensors(a.x.read))
                copy_box(x.slot() + (a.x.chunks + c) * kBoxBytes, maps.b, x.copied(), c * kChunk, at.w, at.h, at.f);
        }
        x.advance();
#pragma unroll 1
        for (int box = 0; box < kBoxes; ++box, g.advance()) {
            int channel = job.first() + box * kChunk;
            g.claim();
            copy_box(g.slot(), maps.g, g.copied(), channel, at.w, at.h, at.f);
            if (a.masked) copy_box(g.slot() + kBoxBytes, maps.y, g.copied(), channel, at.w, at.h, at.f);
        }
    }
}

// ---- The finishers.

// How many of them have X; the others have the gradient.
__host__ __device__ constexpr int x_finishers(Read read, bool masked) {
    return read == Read::raw ? 0 : masked ? kFinishers - 1 : kFinishers;
}

// The read of X, applied to 16 rows of a box of `a`, in place.
template <typename T>
__device__ __forceinline__ void finish_x(Read read, uint32_t a, uint32_t b, const Constants& constants, int lane) {
    uint32_t mine = lane % 16 * 128 + ((lane / 16 ^ lane % 8) << 4);  // for ldmatrix; step k is at that address ^ 32 k
    Fragments v, w = {};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        load_fragment(v[k], (a + mine) ^ (32 * k));
        if (two_tensors(read)) load_fragment(w[k], (b + mine) ^ (32 * k));
    }
    apply<T>(read, v, w, constants);
#pragma unroll
    for (int k = 0; k < 4; ++k) store_fragment((a + mine) ^ (32 * k), v[k]);
}

// The gradient where y is not <= 0, else zero, of 16 rows of a box, in place.
template <typename T>
__device__ __forceinline__ void finish_g(uint32_t g, uint32_t y, int lane) {
    uint4 v[4], w[4];
#pragma unroll
    for (int k = 0; k < 4; ++k)
        v[k] = load_shared(g + 16 * lane + 512 * k), w[k] = load_shared(y + 16 * lane + 512 * k);
#pragma unroll
    for (int k = 0; k < 4; ++k)
        store_shared(g + 16 * lane + 512 * k, uint4{masked<T>(v[k].x, w[k].x), masked<T>(v[k].y, w[k].y),
                                                    masked<T>(v[k].z, w[k].z), masked<T>(v[k].w, w[k].w)});
}

// Applies finish(group) to this warp's groups of the next slot: every count-th from `next`, which becomes that of the
// slot after.
template <typename Finish>
__device__ __forceinline__ void finish_slot(Stages& of, int groups, int& next, int count, int lane,
                                            const Finish& finish) {
    barrier_wait(of.copied(), of.parity);
#pragma unroll 1
    for (; next < groups; next += count) finish(next);
    next -= groups;
    fence_proxy_async();
    __syncwarp();
    if (lane == 0) barrier_arrive(of.finished());
    of.advance();
}

template <typename T>
__device__ __forceinline__ void finish_all(const GramArgs& a, const Job& job, Stages x, Stages g, uint32_t constants,
                                           int warp) {
    int lane = threadIdx.x % 32, of_x = x_finishers(a.x.read, a.masked), next = warp < of_x ? warp : warp - of_x;
    if (warp < of_x) {
#pragma unroll 1
        for (int unit = job.split; unit < a.units; unit += a.splits)
            finish_slot(x, a.x.chunks * kGroups, next, of_x, lane, [&](int group) {
                int chunk = group / kGroups, row = group % kGroups * 16;
                finish_x<T>(a.x.read, x.slot() + chunk * kBoxBytes + row * 128,
                            x.slot() + (a.x.chunks + chunk) * kBoxBytes + row * 128,
                            Constants(constants, a.x.chunks * kChunk, chunk), lane);
            });
    } else if (a.masked) {
#pragma unroll 1
        for (int unit = job.split; unit < a.units; unit += a.splits)
#pragma unroll 1
            for (int box = 0; box < kBoxes; ++box)
                finish_slot(g, kGroups, next, kFinishers - of_x, lane, [&](int group) {
                    finish_g<T>(g.slot() + group * 16 * 128, g.slot() + kBoxBytes + group * 16 * 128, lane);
                });
    }
}

// ---- The consumers.

// Stores a box to memory as a group of its own; what lies outside the tensor is left out.
__device__ __forceinline__ void store_box(const CUtensorMap& map, uint32_t source, int i0, int i1, int i2, int i3) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
                 "r"(source), "r"(i0), "r"(i1), "r"(i2), "r"(i3)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// A power of two that the scales of the block's couts lie below twice of, for float16: so divided, they neither
// overflow nor underflow. Every warp finds it.
template <typename T>
__device__ __forceinline__ float most_of(const float* scale, int lane) {
    if constexpr (std::is_same_v<T, __half>) {
        uint32_t most = 0;
#pragma unroll
        for (int i = 0; i < kCouts / 32; ++i) most = max(most, __float_as_uint(fabsf(scale[32 * i + lane])));
        most = __reduce_max_sync(~0u, most) & 0x7f800000;
        if (most) return __uint_as_float(most);
    }
    return 1;
}

// scale * w / `most`, rounded: for each 64 couts a box whose rows are channels of X. A warp takes 64 couts of eight.
template <typename T, int kChunks>
__device__ __forceinline__ void prepare_weights(const GramArgs& a, uint32_t weights, int first, float most,
                                                int thread) {
    constexpr int kColumns = kChunks * kChunk;
    int lane = thread % 32;
#pragma unroll 2
    for (int i = thread / 32; i < kBoxes * kColumns / 8; i += 8) {
        int box = i / (kColumns / 8), column = i % (kColumns / 8) * 8, cout = first + box * kChunk + 2 * lane;
        const T* from = static_cast<const T*>(a.w) + int64_t(cout) * kColumns + column;
        uint4 even = *reinterpret_cast<const uint4*>(from), odd = *reinterpret_cast<const uint4*>(from + kColumns);
        float2 scale = *reinterpret_cast<const float2*>(a.scale + cout);
        scale.x /= most, scale.y /= most;
        uint32_t v[2][4] = {{even.x, even.y, even.z, even.w}, {odd.x, odd.y, odd.z, odd.w}};
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            float2 p = unpack<T>(v[0][e / 2]), q = unpack<T>(v[1][e / 2]);
            uint32_t to = weights + (box * kColumns + column + e) * 128 + ((lane / 4 ^ e) << 4) + lane % 4 * 4;
            uint32_t packed = pack<T>(scale.x * (e % 2 ? p.y : p.x), scale.y * (e % 2 ? q.y : q.x));
            asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(packed) : "memory");
        }
    }
}

template <typename T, int kChunks, int kGroup>
struct Consumer {
    static constexpr int kColumns = kChunks * kChunk;

    const GramMaps& maps;
    const GramArgs& a;
    const Place& place;
    const Job& job;
    Stages x, g;
    int lane, warp;
    float most;

    __device__ __forceinline__ Consumer(const GramMaps& maps, const GramArgs& a, const Place& place, const Job& job,
                                        float most)
        : maps(maps),
          a(a),
          place(place),
          job(job),
          x(place.x(a)),
          g(place.g(a)),
          lane(threadIdx.x % 32),
          warp(threadIdx.x / 32 % 4),
          most(most) {}

    // A unit: M += g^T X of this warpgroup's couts, total += the sum of g; with kValue, v is made and stored.
    template <bool kValue>
    __device__ __forceinline__ void add(float (&m)[2][kColumns / 2], float (&total)[2][4], int unit) {
        uint32_t weights = place.weights + (kChunks == 2 ? kGroup * kBoxBytes : 0);  // rows of the columns of v
        uint64_t ones = plain_descriptor(place.ones, kOnesBytes / 2, kOnesBytes / 2);
        float v[32];
        if constexpr (kValue) {
#pragma unroll
            for (int i = 0; i < 32; ++i) v[i] = 0;
            wgmma_pin(v);
        }
        x.take(a.x.read != Read::raw);
        // Of columns, lbo leads to the next 64.
        uint64_t right = plain_descriptor(x.slot(), kBoxBytes, 1024) | uint64_t(1) << 62;
#pragma unroll
        for (int box = 0; box < kBoxes; ++box) {
            constexpr int kRows = 16 * 128 >> 4;  // 16 rows of a box, in a descriptor
            g.take(a.masked);
            if (kValue || box % 2 == kGroup) {
                wgmma_fence();
                if (box % 2 == kGroup) {
                    uint64_t left = swizzled_descriptor(g.slot(), 1024);
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
                        wgmma_outer<T>(m[box / 2], left + k * kRows, right + k * kRows);
                        wgmma_outer<T>(total[box / 2], left + k * kRows, ones);
                    }
                }
                if constexpr (kValue) {
#pragma unroll
                    for (int k = 0; k < 4; ++k)
                        wgmma<T, 0>(v, swizzled_descriptor(g.slot() + 32 * k, 1024),
                                    swizzled_descriptor(weights + box * kColumns * 128 + 32 * k, 1024));
                }
                wgmma_commit();
                wgmma_wait<0>();
            }
            if (lane == 0) barrier_arrive(g.emptied());
            g.advance();
        }
        if (lane == 0) barrier_arrive(x.emptied());
        x.advance();
        if constexpr (kValue) {
            wgmma_pin(v);
            store(v, unit);
        }
    }

    // As float16 with a power of two for each 16 positions, the largest within a factor of two of 2^15: rounded to the
    // dtype v would have a share in the error of da, as what da is rounded to at the end has.
    __device__ __forceinline__ void store(const float (&v)[32], int unit) const {
        constexpr int kSlice = kChunks == 2 ? kGroup : 0;
        uint32_t box = place.staging + kGroup * kBoxBytes + warp * 16 * 128;
        uint32_t mine = lane % 16 * 128 + ((lane / 16 ^ lane % 8) << 4);
        float top = 0;  // not NaN, which stays where it is
#pragma unroll
        for (int i = 0; i < 32; ++i) top = fmaxf(top, fabsf(v[i]));
        uint32_t exponent = max(__reduce_max_sync(~0u, __float_as_uint(top)) >> 23, 15u);
        float by = __uint_as_float((127 + 127 + 14 - exponent) << 23);
        if (lane == 0) store_wait<0>();  // what was stored here last has left
        __syncwarp();
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            uint32_t t[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) t[i] = pack<__half>(v[first_of(k, i)] * by, v[first_of(k, i) + 1] * by);
            store_fragment((box + mine) ^ (32 * k), t);
        }
        fence_proxy_async();
        __syncwarp();
        Unit at(a, unit);
        int row = 16 * warp, frame = job.part * a.frames + at.f;
        if (lane == 0)
            store_box(maps.v, box, kSlice * kChunk, at.w + (row & (a.box_width - 1)), at.h + (row >> a.box_shift),
                      frame);
        row += lane;
        int w = at.w + (row & (a.box_width - 1)), h = at.h + (row >> a.box_shift);
        if (lane < 16 && w < a.width && h < a.height) {
            int64_t position = (int64_t(frame) * a.height + h) * a.width + w;
            a.scales[position * kChunks + kSlice] = __uint_as_float((exponent - 14) << 23) * most;
        }
    }

    __device__ __forceinline__ void run() {
        float m[2][kColumns / 2], total[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int j = 0; j < kColumns / 2; ++j) m[i][j] = 0;
#pragma unroll
            for (int j = 0; j < 4; ++j) total[i][j] = 0;
            wgmma_pin(m[i]), wgmma_pin(total[i]);
        }
#pragma unroll 1
        for (int unit = job.split; unit < a.units; unit += a.splits) {
            add<kChunks == 2 || kGroup == 0>(m, total, unit);
            if constexpr (kChunks == 1) {
                unit += a.splits;
                if (unit >= a.units) break;
                add<kGroup == 1>(m, total, unit);
            }
        }
        if (lane == 0) store_wait<0>();
        float* out = a.partials + job.split * (int64_t(a.out_channels) * (kColumns + 1));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            wgmma_pin(m[i]), wgmma_pin(total[i]);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                int cout = job.first() + (2 * i + kGroup) * kChunk + 16 * warp + 8 * half + lane / 4;
                float* line = out + cout * kColumns + 2 * (lane % 4);
#pragma unroll
                for (int j = 0; j < kColumns / 8; ++j)
                    *reinterpret_cast<float2*>(line + 8 * j) = {m[i][4 * j + 2 * half], m[i][4 * j + 2 * half + 1]};
                if (lane % 4 == 0) out[a.out_channels * kColumns + cout] = total[i][2 * half];
            }
        }
    }
};

template <typename T, int kChunks>
__global__ void __launch_bounds__(kThreads, 1)
    gram_bwd_kernel(const __grid_constant__ GramMaps maps, const __grid_constant__ GramArgs a) {
    extern __shared__ __align__(1024) char memory[];
    Place place(memory, a);
    if (threadIdx.x == 0) {
        int of_x = x_finishers(a.x.read, a.masked);
        for (int i = 0; i < a.x_slots + a.g_slots; ++i) {
            barrier_init(place.barriers + 24 * i, 1);
            barrier_init(place.barriers + 24 * i + 8, max(1, i < a.x_slots ? of_x : kFinishers - of_x));
            barrier_init(place.barriers + 24 * i + 16, 8);  // the warps that multiply
        }
        barrier_init_fence();
    }
    __syncthreads();
    dependency_wait();
    Job job(a);
    int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // the same register for the warp, as the compiler can tell
    if (warp < 4) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kProducerRegisters));
        if (warp == 0) {
            if (threadIdx.x == 0) produce(maps, a, job, place.x(a), place.g(a));
        } else {
            prepare_source(place.constants, a.x, threadIdx.x - 32, 32 * kFinishers);
            named_sync(1, 32 * kFinishers);
            finish_all<T>(a, job, place.x(a), place.g(a), place.constants, warp - 1);
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kConsumerRegisters));
        int thread = threadIdx.x - 128;
        float most = most_of<T>(a.scale + job.first(), thread % 32);
        prepare_weights<T, kChunks>(a, place.weights, job.first(), most, thread);
        if (thread < kOnesBytes / 8) {
            uint32_t ones = pack<T>(1, 1);
            store_shared(place.ones + 8 * thread, uint2{ones, ones});
        }
        fence_proxy_async();
        named_sync(2, 256);
        if (warp < 8)
            Consumer<T, kChunks, 0>(maps, a, place, job, most).run();
        else
            Consumer<T, kChunks, 1>(maps, a, place, job, most).run();
    }
}

// ---- Host.

struct GramPlan {
    int parts, splits, units;
    int64_t width, height, frames;  // of the positions
    int box_shift, w_boxes, h_boxes;
    int x_slots, g_slots, shared;
};

// How a shape is divided, or why it cannot run.
const char* gram_plan(GramPlan& plan, const GramBwdShape& s) {
    using Long = long long;
    int processors;
    if (const char* error = count_processors(processors)) return error;
    if (std::min({s.frames, s.height, s.width}) < 1 ||
        double(s.frames) * double(s.height) * double(s.width) > 2147000000.0)
        return fail("gram_bwd: expected 1 to 2147000000 positions, got N * T, H, W = %lld, %lld, %lld", Long(s.frames),
                    Long(s.height), Long(s.width));
    if ((s.channels != kChunk && s.channels != 2 * kChunk) || s.out_channels < kCouts || s.out_channels % kCouts ||
        s.out_channels > kMaxParts * kCouts)
        return fail("gram_bwd: channels: expected 64 or 128 and, of the gradient, 256 or 512, got %lld and %lld",
                    Long(s.channels), Long(s.out_channels));
    if (s.read != Read::raw && s.read != Read::bn_relu && !joins(s.read))
        return "gram_bwd: expected an activation for x";
    plan.width = s.frames * s.height * s.width, plan.height = plan.frames = 1;
    if (s.thin) {
        plan.width = (s.width + 1) / 2, plan.height = (s.height + 1) / 2, plan.frames = s.frames;
        if (s.height % 2 == 0) plan.height *= plan.frames, plan.frames = 1;
    }
    int64_t units = 0;
    for (int shift = 0; kUnit >> shift > 0; ++shift) {  // the boxes that are fewest, or of those the widest
        int64_t w_boxes = ceil_divide(plan.width, 1 << shift), h_boxes = ceil_divide(plan.height, kUnit >> shift);
        if (units && w_boxes * h_boxes * plan.frames > units) continue;
        units = w_boxes * h_boxes * plan.frames;
        plan.box_shift = shift, plan.w_boxes = int(w_boxes), plan.h_boxes = int(h_boxes);
    }
    plan.parts = int(s.out_channels / kCouts);
    plan.units = int(units);
    plan.splits = int(ceil_divide(units, ceil_divide(units, std::max(1, processors / plan.parts))));

    Source x{s.read, int(s.channels / kChunk)};
    int fixed = (kBoxes * x.chunks + 2) * kBoxBytes + constants_of(x) + kOnesBytes + kBarrierBytes;
    int x_bytes = x_slot_bytes(x), g_bytes = g_slot_bytes(s.masked);
    // Of X as much as there will be of the gradient, which comes more slowly: a unit of it has four slots.
    for (plan.x_slots = kMaxXSlots;; --plan.x_slots) {
        plan.g_slots = std::min(kMaxGSlots, (kSharedLimit - fixed - plan.x_slots * x_bytes) / g_bytes);
        if (plan.x_slots == 2 || plan.g_slots >= kBoxes * (plan.x_slots - 1)) break;
    }
    plan.shared = fixed + plan.x_slots * x_bytes + plan.g_slots * g_bytes;
    return nullptr;
}

// A packed tensor [frames, height, width, C] of positions, or with `step` 2 even rows and columns of X, in boxes.
const char* position_map(CUtensorMap& map, const void* base, const GramBwd& p, const GramPlan& plan, int64_t channels,
                         int64_t frames, int step, int box) {
    auto encode = tensor_map_encoder();
    if (!encode) return "gram_bwd: the driver has no cuTensorMapEncodeTiled (needs CUDA 12)";
    int64_t line = plan.width, frame = plan.width * plan.height;
    if (step == 2) line = 2 * p.shape.width, frame = p.shape.height * p.shape.width;
    int width = std::min(box, 1 << plan.box_shift);
    cuuint64_t sizes[] = {cuuint64_t(channels), cuuint64_t(plan.width), cuuint64_t(plan.height), cuuint64_t(frames)};
    cuuint64_t strides[] = {cuuint64_t(2 * channels * step), cuuint64_t(2 * channels * line),
                            cuuint64_t(2 * channels * frame)};
    cuuint32_t boxes[] = {kChunk, cuuint32_t(width), cuuint32_t(box / width), 1}, steps[] = {1, 1, 1, 1};
    auto type = p.dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    // Between the rows of 64 channels that a step takes lie as many that nobody wants.
    auto promotion = step == 2 ? CU_TENSOR_MAP_L2_PROMOTION_L2_128B : CU_TENSOR_MAP_L2_PROMOTION_L2_256B;
    CUresult result =
        encode(&map, type, 4, const_cast<void*>(base), sizes, strides, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? nullptr : fail("gram_bwd: cuTensorMapEncodeTiled failed with %d", int(result));
}

template <typename T>
const char* launch(const GramMaps& maps, const GramArgs& args, const GramPlan& plan, cudaStream_t stream) {
    auto kernel = args.x.chunks == 1 ? gram_bwd_kernel<T, 1> : gram_bwd_kernel<T, 2>;
    cudaError_t error =
        launch_dependent(kernel, dim3(plan.parts * plan.splits), kThreads, plan.shared, stream, maps, args);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* gram_bwd_why_not(const GramBwdShape& shape) {
    GramPlan plan{};
    return gram_plan(plan, shape);
}

int gram_bwd_partials(const GramBwdShape& shape) {
    GramPlan plan{};
    return gram_plan(plan, shape) ? 0 : plan.splits;
}

const char* gram_bwd(const GramBwd& p) {
    const GramBwdShape& s = p.shape;
    GramPlan plan{};
    if (const char* reason = gram_plan(plan, s)) return reason;
    if (const char* reason = check_operand("gram_bwd", p.x, s.read)) return reason;
    if (!p.g || bool(p.y) != s.masked || !p.w || !p.affine || !p.v || !p.scales || !p.partials)
        return "gram_bwd: expected g, w, the affine, v, scales and partials, and y as the shape says";
    GramMaps maps{};
    const char* failed = nullptr;
    auto encode = [&](CUtensorMap& map, const void* base, int64_t channels, int64_t frames, int step, int box) {
        if (base && !failed) failed = position_map(map, base, p, plan, channels, frames, step, box);
    };
    encode(maps.g, p.g, s.out_channels, plan.frames, 1, kUnit);
    encode(maps.y, p.y, s.out_channels, plan.frames, 1, kUnit);
    encode(maps.a, p.x.a, s.channels, plan.frames, 1 + s.thin, kUnit);
    encode(maps.b, p.x.b, s.channels, plan.frames, 1 + s.thin, kUnit);
    encode(maps.v, p.v, s.channels, plan.parts * plan.frames, 1, 16);
    if (failed) return failed;
    GramArgs args{};
    args.x = {s.read, int(s.channels / kChunk), p.x.affine_a, p.x.affine_b};
    args.w = p.w;
    args.scale = p.affine + s.out_channels;
    args.partials = p.partials;
    args.scales = p.scales;
    args.masked = s.masked;
    args.out_channels = int(s.out_channels);
    args.parts = plan.parts, args.splits = plan.splits, args.units = plan.units;
    args.width = int(plan.width), args.height = int(plan.height), args.frames = int(plan.frames);
    args.box_width = 1 << plan.box_shift, args.box_shift = plan.box_shift;
    args.w_boxes = plan.w_boxes, args.h_boxes = plan.h_boxes;
    args.by_w_boxes = FastDivide(std::max(2, plan.w_boxes)), args.by_h_boxes = FastDivide(std::max(2, plan.h_boxes));
    args.x_slots = plan.x_slots, args.g_slots = plan.g_slots;
    return p.dtype == DType::bf16 ? launch<__nv_bfloat16>(maps, args, plan, p.stream)
                                  : launch<__half>(maps, args, plan, p.stream);
}

}  // namespace p3d
