// Both gradients of a 1x1x1 convolution from many channels to 64 or 128, the reduce of a bottleneck, in one pass:
//
//     dz = bn_bwd(g, z)           rounded, never stored
//     dx = dz w + o               o where not mask <= 0, if there is a mask; dx where not x <= 0, if asked for
//     dw = dz^T x                 in float32, of a part of the positions
//
// so that dz is formed once and x, from which the mask of dx comes as well, is read once.
//
// Positions are the rows of dx and the sum's index of dw. A *unit* is 64 positions; what is read comes in boxes of 64
// positions by 64 channels (rows.cuh). A *stage* of a ring holds the boxes of g and z of a unit. Three warps replace g
// by dz there, once an element; it is the left operand of both products, transposed for dw. dx and dw are made in
// *slices* of 64 channels of x, of which a block has four and each of its two warpgroups two. A warpgroup has a ring of
// its own for boxes of x, of the mask and of o, slice after slice. A slice of dx takes the place of its slice of o,
// element by element; every warp stores the 16 positions that it computed.
//
// Thin, the positions of a unit that o has follow one another in o, and as W is even they are at most 32. A box has
// those of o and, after them, those of the mask; all warps of a group take what is theirs before dx replaces it.
//
// A block is persistent: it keeps its part of w in shared memory and of dw in registers. Blocks of different slices
// that walk the same units find g and z in the second-level cache.
#include <algorithm>

#include "rows.cuh"

namespace p3d {
namespace {

constexpr int kThreads = 384;
constexpr int kProducerRegisters = 88, kConsumerRegisters = 208;
static_assert(kProducerRegisters + 2 * kConsumerRegisters <= 3 * (65536 / kThreads / 8 * 8), "registers of the block");
constexpr int kFinishers = 3;  // warps that form dz
constexpr int kGroup = 16;     // positions that one of them takes at a time
constexpr int kSlices = 2;     // of a warpgroup
constexpr int kBlockSlices = 2 * kSlices;

struct ReduceMaps {
    CUtensorMap g, z, x, o, mask;  // [P, channels], read in boxes of a unit; thin o and mask of half as many rows
    CUtensorMap w;                 // [m, C], in boxes of 64 rows
    CUtensorMap dx;                // [P, C], written in boxes of a warp's 16 positions
};

struct ReduceArgs {
    const float* affine;  // [3, m] of z
    const float* sums;    // [2, m]
    float* partials;      // [splits, m, C]
    bool has_mask, mask_x;
    int channels;       // C
    int limit;          // positions
    int height, width;  // thin: H, W; else 0
    int units, groups;  // groups: of slices, one a block
};

// Where everything lies in shared memory. Barriers: one for the weights; a pair for each stage and slot, as of a Ring;
// one more for each stage, finished.
template <int kChunks>
struct Layout {
    static constexpr int kWeights = kBlockSlices * kChunks;  // boxes
    static constexpr int kStages = kChunks == 1 ? 3 : 2;
    static constexpr int kStageBoxes = 2 * kChunks;
    static constexpr int kSlots = (kSharedLimit / kBoxBytes - kWeights - kStages * kStageBoxes) / 2;  // of a warpgroup
    static constexpr int kBoxes = kWeights + kStages * kStageBoxes + 2 * kSlots;
    static constexpr int kBytes = kBoxes * kBoxBytes + 8 * (1 + 3 * kStages + 4 * kSlots);
    static_assert(kSlots >= 4, "a ring holds three boxes of a slice and the one that is stored");
    static_assert(kBytes <= kSharedLimit, "shared memory of the block");

    uint32_t weights, barriers;

    __device__ __forceinline__ explicit Layout(const void* base)
        : weights(shared_address(base)), barriers(weights + kBoxes * kBoxBytes) {}
    __device__ __forceinline__ uint32_t weight(int chunk, int slice) const {
        return weights + (chunk * kBlockSlices + slice) * kBoxBytes;
    }
    __device__ __forceinline__ Ring stages() const {
        return {weights + kWeights * kBoxBytes, barriers + 8, kStageBoxes * kBoxBytes, kStages};
    }
    __device__ __forceinline__ Ring slots(int group) const {
        int first = kWeights + kStages * kStageBoxes + group * kSlots;
        return {weights + first * kBoxBytes, barriers + 8 + 16 * (kStages + group * kSlots), kBoxBytes, kSlots};
    }
    __device__ __forceinline__ uint32_t finished(int stage) const {
        return barriers + 8 + 16 * (kStages + 2 * kSlots) + 8 * stage;
    }
};

constexpr int kThinRows = kUnit / 2;  // of o in a unit, at most
constexpr int kThinBytes = kThinRows * kChunk * 2;

// How many positions before `position` lie in an even row and column; whether it does itself.
__device__ __forceinline__ int thin_before(const ReduceArgs& a, int position, bool& is_thin) {
    int line = position / a.width, column = position - line * a.width, frame = line / a.height;
    int row = line - frame * a.height, thin_width = a.width / 2;
    is_thin = row % 2 == 0 && column % 2 == 0;
    return (frame * ((a.height + 1) / 2) + (row + 1) / 2) * thin_width + (row % 2 ? 0 : (column + 1) / 2);
}

// ---- The producer: one thread.

template <int kChunks>
__device__ __forceinline__ void produce(const ReduceMaps& maps, const ReduceArgs& a, const Layout<kChunks>& place) {
    using Place = Layout<kChunks>;
    int first = blockIdx.x % a.groups * kBlockSlices;  // slice
    barrier_expect(place.barriers, Place::kWeights * kBoxBytes);
#pragma unroll 1
    for (int box = 0; box < Place::kWeights; ++box)
        copy_box(place.weights + box * kBoxBytes, maps.w, place.barriers, (first + box % kBlockSlices) * kChunk,
                 box / kBlockSlices * kChunk, 0);
    Ring stages = place.stages(), slots[2] = {place.slots(0), place.slots(1)};
    for (int unit = blockIdx.x / a.groups; unit < a.units; unit += gridDim.x / a.groups) {
        int position = unit * kUnit, thin_position = 0;
        bool is_thin;
        if (a.width) thin_position = thin_before(a, position, is_thin);
        stages.claim();
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
            copy_box(stages.slot() + c * kBoxBytes, maps.g, stages.full(), c * kChunk, position, 0);
            copy_box(stages.slot() + (kChunks + c) * kBoxBytes, maps.z, stages.full(), c * kChunk, position, 0);
        }
        stages.advance();
#pragma unroll
        for (int slice = 0; slice < kSlices; ++slice)
#pragma unroll
            for (int group = 0; group < 2; ++group) {
                Ring& ring = slots[group];
                auto bring = [&](const CUtensorMap& map) {
                    ring.claim();
                    copy_box(ring.slot(), map, ring.full(), (first + kSlices * group + slice) * kChunk, position, 0);
                    ring.advance();
                };
                bring(maps.x);
                if (a.width) {
                    int channel = (first + kSlices * group + slice) * kChunk;
                    ring.claim();
                    copy_box(ring.slot(), maps.o, ring.full(), channel, thin_position, 0);
                    copy_box(ring.slot() + kThinBytes, maps.mask, ring.full(), channel, thin_position, 0);
                    ring.advance();
                    continue;
                }
                if (a.has_mask) bring(maps.mask);
                bring(maps.o);
            }
    }
}

// ---- The finishers: three warps.

// Replaces 16 rows of 64 channels at `g` by the gradient, where they exist, else by zeros. A lane has four channels and
// every other row.
template <typename T>
__device__ __forceinline__ void finish_group(uint32_t g, uint32_t z, const Gradient4& gradient, int lane, int rows) {
    constexpr int kBatch = 4;
    uint32_t mine = lane / 16 * 128 + (lane % 16 / 2 ^ lane / 16) * 16 + lane % 2 * 8;
#pragma unroll
    for (int begin = 0; begin < kGroup / 2; begin += kBatch) {
        uint2 v[kBatch], w[kBatch];
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
            uint32_t at = (mine ^ k * 32) + (begin + k) * 256;
            load_shared(v[k], g + at);
            load_shared(w[k], z + at);
        }
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
            uint2 dz = gradient.bn_bwd<T>(v[k], w[k]);
            bool real = lane / 16 + 2 * (begin + k) < rows;
            store_shared(g + (mine ^ k * 32) + (begin + k) * 256, real ? dz : uint2{});
        }
    }
}

// The groups of a unit go to the warps by turns, from unit to unit.
template <typename T, int kChunks>
__device__ __forceinline__ void finish(const ReduceArgs& a, const Layout<kChunks>& place, int warp) {
    int lane = threadIdx.x % 32, next = warp;
    Gradient4 gradient[kChunks];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) gradient[c].load(a.affine, a.sums, c * kChunk + lane % 16 * 4, kChunks * kChunk);
    Ring ring = place.stages();
    for (int unit = blockIdx.x / a.groups; unit < a.units; unit += gridDim.x / a.groups) {
        uint32_t finished = place.finished(ring.index), stage = ring.take();
#pragma unroll 1
        for (; next < kUnit / kGroup; next += kFinishers) {
            int row = next * kGroup;
#pragma unroll
            for (int c = 0; c < kChunks; ++c)
                finish_group<T>(stage + c * kBoxBytes + row * 128, stage + (kChunks + c) * kBoxBytes + row * 128,
                                gradient[c], lane, a.limit - unit * kUnit - row);
        }
        next -= kUnit / kGroup;
        fence_proxy_async();
        __syncwarp();
        if (lane == 0) barrier_arrive(finished);
    }
}

// ---- The consumers: two warpgroups.

// Where a thread's two rows of a unit lie in a thin box; -1: nowhere.
struct ThinRows {
    int of[2];

    ThinRows() = default;
    __device__ __forceinline__ ThinRows(const ReduceArgs& a, int unit, int row) {
        bool is_thin;
        int first = thin_before(a, unit * kUnit, is_thin);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            int position = unit * kUnit + row + 8 * m, before = thin_before(a, position, is_thin);
            of[m] = is_thin && position < a.limit ? before - first : -1;
        }
    }
    // Fragments of o, masked.
    template <typename T>
    __device__ __forceinline__ void load(uint32_t (&o)[4][4], uint32_t box, int lane) const {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            uint32_t row = box + of[m] * 128 + 4 * (lane % 4);
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                uint32_t& v = o[j / 2][2 * (j % 2) + m];
                v = 0;
                if (of[m] < 0) continue;
                uint32_t at = row + ((j ^ of[m] % 8) << 4), mask;
                asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
                asm volatile("ld.shared.b32 %0, [%1];" : "=r"(mask) : "r"(at + kThinBytes) : "memory");
                v = masked<T>(v, mask);
            }
        }
    }
};

template <typename T, int kChunks>
__device__ __forceinline__ void consume(const ReduceMaps& maps, const ReduceArgs& a, const Layout<kChunks>& place,
                                        int group) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    bool leader = lane == 0;
    int first = blockIdx.x % a.groups * kBlockSlices + kSlices * group;  // slice
    // This lane's row of a box for ldmatrix and stmatrix; step k is at that address ^ 32 k.
    uint32_t mine = (16 * warp + lane % 16) * 128 + ((lane / 16 ^ lane % 8) << 4);
    Ring stages = place.stages(), ring = place.slots(group);
    int held = -1;  // the slot of the slice stored last
    float dw[kSlices][kChunks][32];
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice)
#pragma unroll
        for (int c = 0; c < kChunks; ++c) zero(dw[slice][c]);
    barrier_wait(place.barriers, 0);
    for (int unit = blockIdx.x / a.groups; unit < a.units; unit += gridDim.x / a.groups) {
        int stage = stages.index;
        uint32_t dz = stages.slot();
        barrier_wait(place.finished(stage), stages.parity);
        stages.advance();
        ThinRows thin{};
        if (a.width) thin = ThinRows(a, unit, 16 * warp + lane / 4);
#pragma unroll
        for (int slice = 0; slice < kSlices; ++slice) {
            int x_slot = ring.index;
            uint32_t x = ring.take();
            float d[32];
            zero(d);
            wgmma_fence();
#pragma unroll
            for (int c = 0; c < kChunks; ++c) {
                uint32_t w = place.weight(c, kSlices * group + slice), rows = dz + c * kBoxBytes;
#pragma unroll
                for (int k = 0; k < 4; ++k)  // 16 channels of dz
                    wgmma_back<T>(d, swizzled_descriptor(rows + 32 * k, 1024),
                                  swizzled_descriptor(w + 16 * 128 * k, 1024));
#pragma unroll
                for (int k = 0; k < 4; ++k)  // 16 positions
                    wgmma_outer<T>(dw[slice][c], swizzled_descriptor(rows + 16 * 128 * k, 1024),
                                   swizzled_descriptor(x + 16 * 128 * k, 1024));
            }
            wgmma_commit();
            wgmma_wait<0>();
            wgmma_pin(d);
            if (leader && slice == kSlices - 1) release(stages, stage);

            bool masks = a.has_mask && !a.width;
            int mask_slot = ring.index;
            uint32_t mask = masks ? ring.take() : 0;
            int slot = ring.index;
            uint32_t box = ring.take(), thin_o[4][4];
            if (a.width) {
                thin.load<T>(thin_o, box, lane);
                __syncwarp();
                named_sync(1 + group, 128);
            }
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                uint32_t o[4], y[4], v[4];
                if (a.width) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) o[i] = thin_o[k][i];
                } else {
                    load_fragment(o, (box + mine) ^ (32 * k));
                }
                if (masks) {
                    load_fragment(v, (mask + mine) ^ (32 * k));
#pragma unroll
                    for (int i = 0; i < 4; ++i) o[i] = masked<T>(o[i], v[i]);
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float2 add = unpack<T>(o[i]);
                    y[i] = pack<T>(d[first_of(k, i)] + add.x, d[first_of(k, i) + 1] + add.y);
                }
                if (a.mask_x) {
                    load_fragment(v, (x + mine) ^ (32 * k));
#pragma unroll
                    for (int i = 0; i < 4; ++i) y[i] = masked<T>(y[i], v[i]);
                }
                store_fragment((box + mine) ^ (32 * k), y);
            }
            fence_proxy_async();
            __syncwarp();
            if (leader) {
                store_box(maps.dx, box + warp * 16 * 128, (first + slice) * kChunk, unit * kUnit + 16 * warp, 0);
                release(ring, x_slot);
                if (masks) release(ring, mask_slot);
                store_wait<1>();
                if (held >= 0) release(ring, held);
            }
            held = slot;
        }
    }
    if (leader) store_wait<0>();
    float* out = a.partials + int64_t(blockIdx.x / a.groups) * kChunks * kChunk * a.channels;
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice)
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
            wgmma_pin(dw[slice][c]);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                int row = c * kChunk + 16 * warp + 8 * half + lane / 4;
                float* line = out + int64_t(row) * a.channels + (first + slice) * kChunk + 2 * (lane % 4);
#pragma unroll
                for (int j = 0; j < 8; ++j)
                    *reinterpret_cast<float2*>(line + 8 * j) = {dw[slice][c][4 * j + 2 * half],
                                                                dw[slice][c][4 * j + 2 * half + 1]};
            }
        }
}

template <typename T, int kChunks>
__global__ void __launch_bounds__(kThreads, 1)
    reduce_bwd_kernel(const __grid_constant__ ReduceMaps maps, const __grid_constant__ ReduceArgs a) {
    using Place = Layout<kChunks>;
    extern __shared__ __align__(1024) char memory[];
    Place place(memory);
    if (threadIdx.x == 0) {
        barrier_init(place.barriers, 1);
        Ring stages = place.stages(), slots = place.slots(0);
        for (int i = 0; i < Place::kStages; ++i) {
            barrier_init(stages.barriers + 16 * i, 1);
            barrier_init(stages.barriers + 16 * i + 8, 8);  // the warps that multiply
            barrier_init(place.finished(i), kFinishers);
        }
        for (int i = 0; i < 2 * Place::kSlots; ++i) {
            barrier_init(slots.barriers + 16 * i, 1);
            barrier_init(slots.barriers + 16 * i + 8, 4);  // the warps of one group
        }
        barrier_init_fence();
    }
    __syncthreads();
    dependency_wait();
    int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // the same register for the warp, as the compiler can tell
    if (warp < 4) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kProducerRegisters));
        if (warp > 0)
            finish<T>(a, place, warp - 1);
        else if (threadIdx.x == 0)
            produce(maps, a, place);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kConsumerRegisters));
        consume<T>(maps, a, place, warp / 4 - 1);
    }
}

// ---- Host.

struct ReducePlan {
    int units, groups, splits;
};

const char* reduce_plan(ReducePlan& plan, const ReduceBwdShape& s) {
    using Long = long long;
    int processors;
    if (const char* error = count_processors(processors)) return error;
    if (s.positions < 1 || s.positions > 2147000000)
        return fail("reduce_bwd: expected 1 to 2147000000 positions, got %lld", Long(s.positions));
    if (s.out_channels != kChunk && s.out_channels != 2 * kChunk)
        return fail("reduce_bwd: expected 64 or 128 channels out, got %lld", Long(s.out_channels));
    if (s.in_channels < 1 || s.in_channels % (kBlockSlices * kChunk) || s.in_channels > 8192)
        return fail("reduce_bwd: expected a multiple of 256 channels in, up to 8192, got %lld", Long(s.in_channels));
    if (s.height < 0 || s.width < 0 || s.width % 2 || (s.height == 0) != (s.width == 0) ||
        (s.width && (s.height * s.width > s.positions || s.positions % (s.height * s.width))))
        return fail("reduce_bwd: thin: expected frames of an even width, got H, W = %lld, %lld", Long(s.height),
                    Long(s.width));
    plan.units = int((s.positions + kUnit - 1) / kUnit);
    plan.groups = int(s.in_channels / (kBlockSlices * kChunk));
    plan.splits = std::min(plan.units, std::max(1, processors / plan.groups));
    return nullptr;
}

template <typename T, int kChunks>
const char* launch(const ReduceMaps& maps, const ReduceArgs& args, const ReducePlan& plan, cudaStream_t stream) {
    cudaError_t error = launch_dependent(reduce_bwd_kernel<T, kChunks>, dim3(plan.splits * plan.groups), kThreads,
                                         Layout<kChunks>::kBytes, stream, maps, args);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename T>
const char* launch(const ReduceBwdShape& s, const ReduceMaps& maps, const ReduceArgs& args, const ReducePlan& plan,
                   cudaStream_t stream) {
    return s.out_channels == kChunk ? launch<T, 1>(maps, args, plan, stream) : launch<T, 2>(maps, args, plan, stream);
}

}  // namespace

const char* reduce_bwd_why_not(const ReduceBwdShape& shape) {
    ReducePlan plan;
    return reduce_plan(plan, shape);
}

int reduce_bwd_partials(const ReduceBwdShape& shape) {
    ReducePlan plan;
    return reduce_plan(plan, shape) ? 0 : plan.splits;
}

const char* reduce_bwd(const ReduceBwd& p) {
    const ReduceBwdShape& s = p.shape;
    ReducePlan plan;
    if (const char* reason = reduce_plan(plan, s)) return reason;
    ReduceMaps maps{};
    const char* failed = nullptr;
    auto encode = [&](CUtensorMap& map, const void* base, int64_t rows, int64_t columns, int box) {
        if (base && !failed) failed = tensor_map("reduce_bwd", map, base, p.dtype, 1, rows, columns, box);
    };
    encode(maps.g, p.g, s.positions, s.out_channels, kUnit);
    encode(maps.z, p.z, s.positions, s.out_channels, kUnit);
    encode(maps.x, p.x, s.positions, s.in_channels, kUnit);
    bool thin = s.width;
    if (thin && !p.o_mask) return "reduce_bwd: thin: expected o_mask";
    int64_t of_o = thin ? s.positions / (s.height * s.width) * ((s.height + 1) / 2) * (s.width / 2) : s.positions;
    encode(maps.o, p.o, of_o, s.in_channels, thin ? kThinRows : kUnit);
    encode(maps.mask, p.o_mask, of_o, s.in_channels, thin ? kThinRows : kUnit);
    encode(maps.w, p.w, s.out_channels, s.in_channels, kChunk);
    encode(maps.dx, p.dx, s.positions, s.in_channels, 16);
    if (failed) return failed;
    ReduceArgs args{};
    args.affine = p.affine;
    args.sums = p.sums;
    args.partials = p.partials;
    args.has_mask = p.o_mask;
    args.mask_x = p.mask_x;
    args.channels = int(s.in_channels);
    args.limit = int(s.positions);
    args.height = int(s.height), args.width = int(s.width);
    args.units = plan.units, args.groups = plan.groups;
    return p.dtype == DType::bf16 ? launch<__nv_bfloat16>(s, maps, args, plan, p.stream)
                                  : launch<__half>(s, maps, args, plan, p.stream);
}

}  // namespace p3d
