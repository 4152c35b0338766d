// The 3x1x1 convolution of stride 1 and 64 or 128 channels in training, forward with statistics, and its input gradient
// from a raw one; the order of work is temporal.cuh's.
//
// One warp of a block brings the weights, which stay, and one each the frames of a *team* of warpgroups: three teams of
// one, or of 128 channels one of two, each for 64 channels. A warpgroup applies BN-ReLU to its channels of a frame once
// and in place, while the matrix unit multiplies the two frames that are there; a tap outside the clip is left out.
//
// Every warp stores the 16 positions that it computed. A thread's sums for the statistics are of 16 channels, about the
// first value that its warp stored; they are joined once, at the end, in fixed order.
#include "temporal.cuh"

namespace p3d {
namespace {

constexpr int kFrames = 7;  // of a team, in shared memory
constexpr int kProducerRegisters = 40;
constexpr int kBarrierBytes = 512;

template <int kChunks>
struct Roles {
    static constexpr int kTeams = kChunks == 1 ? 3 : 1;
    static constexpr int kGroups = kTeams * kChunks;  // warpgroups that compute
    static constexpr int kConsumers = 128 * kGroups, kThreads = 128 + kConsumers;
    static constexpr int kRegisters = kGroups == 3 ? 152 : 232;
    static constexpr int kWeightBoxes = 3 * kChunks * kChunks;
    static constexpr int kBoxes = kWeightBoxes + kTeams * kFrames * kChunks + kGroups;
    static constexpr int kConstantBytes = 2 * kChunks * kChunk * 8;
    static constexpr int kShared = kBoxes * kBoxBytes + kConstantBytes + kBarrierBytes;
    // Sums [warps, 8, 2, 64], shifts [warps, 64] and counts of the warps, then rows [warps, 3, 64], where frames were.
    static constexpr int kWarps = 4 * kGroups, kScratchBytes = kWarps * (1024 + 64 + 1 + 192) * 4;

    static_assert(kProducerRegisters + kGroups * kRegisters <= 65536 / 128, "registers of the block");
    static_assert(kShared <= kSharedLimit && 16 * (1 + kTeams * kFrames) <= kBarrierBytes, "shared memory");
    static_assert(kScratchBytes <= kTeams * kFrames * kChunks * kBoxBytes, "scratch");
};

struct TemporalMaps {
    CUtensorMap x;  // [F, P, C], read in boxes of a unit
    CUtensorMap w;  // weights as they lie, in boxes of 64 rows
    CUtensorMap y;  // [F, P, C], written in boxes of a warp's 16 positions
};

struct TemporalArgs {
    const float* affine;  // [3, C] of x; or nullptr
    bool back;
    float* partials;  // [blocks, 3, C] or nullptr
    Order order;
};

// Where everything lies in shared memory.
template <int kChunks>
struct Place {
    using Role = Roles<kChunks>;
    uint32_t weights, frames, outputs, constants, barriers;

    __device__ __forceinline__ explicit Place(const void* base)
        : weights(shared_address(base)),
          frames(weights + Role::kWeightBoxes * kBoxBytes),
          outputs(frames + Role::kTeams * kFrames * kChunks * kBoxBytes),
          constants(outputs + Role::kGroups * kBoxBytes),
          barriers(constants + Role::kConstantBytes) {}

    __device__ __forceinline__ Ring ring(int team) const {
        constexpr int kBytes = kChunks * kBoxBytes;
        return {frames + team * kFrames * kBytes, barriers + 16 * (1 + team * kFrames), kBytes, kFrames};
    }
    __device__ __forceinline__ uint32_t weight(int frame, int in, int out) const {
        return weights + ((frame * kChunks + in) * kChunks + out) * kBoxBytes;
    }
};

// ---- Producers: one thread each.

template <int kChunks>
__device__ __forceinline__ void bring_weights(const TemporalMaps& maps, const TemporalArgs& a,
                                              const Place<kChunks>& place) {
    barrier_expect(place.barriers, Roles<kChunks>::kWeightBoxes * kBoxBytes);
#pragma unroll 1
    for (int box = 0; box < Roles<kChunks>::kWeightBoxes; ++box) {  // taps of w follow one another within its rows
        int frame = box / (kChunks * kChunks), in = box / kChunks % kChunks, out = box % kChunks;
        int tap = a.back ? 2 - frame : frame, column = a.back ? out : in, row = a.back ? in : out;
        copy_box(place.weight(frame, in, out), maps.w, place.barriers, (tap * kChunks + column) * kChunk, row * kChunk,
                 0);
    }
}

template <int kChunks>
__device__ __forceinline__ void bring_frames(const TemporalMaps& maps, const TemporalArgs& a,
                                             const Place<kChunks>& place, int team) {
    Ring ring = place.ring(team);
#pragma unroll 1
    for (Walk at(a.order, blockIdx.x * Roles<kChunks>::kTeams + team); at.step < at.end; at.advance()) {
#pragma unroll 1
        for (int ahead = at.begin(); ahead <= 1; ++ahead) {
            if (!at.exists(ahead)) continue;
            ring.claim();
            for (int c = 0; c < kChunks; ++c)
                copy_box(ring.slot() + c * kBoxBytes, maps.x, ring.full(), c * kChunk, at.position, at.frame + ahead);
            ring.advance();
        }
    }
}

// ---- Consumers.

__device__ __forceinline__ float load_word(uint32_t source) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(source) : "memory");
    return v;
}

__device__ __forceinline__ void store_word(uint32_t target, float v) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(target), "f"(v) : "memory");
}

template <typename T, int kChunks>
struct Consumer {
    using Role = Roles<kChunks>;

    const TemporalMaps& maps;
    const TemporalArgs& a;
    const Place<kChunks>& place;
    int group, team, part, lane, warp;
    bool leader;
    Ring in;
    uint32_t mine;  // this lane's row of a box for ldmatrix and stmatrix; step k is at that address ^ 32 k
    int frames[3] = {-1, -1, -1};  // slots: the frame before, this one, the one after
    // Of 16 channels, column 2 j + e of them 8 j + 2 (lane % 4) + e: a shift, the same in all lanes of these channels;
    // the sums of the values and of their squares about it. `rows`: the warp's.
    float shift[16] = {}, sums[16] = {}, squares[16] = {};
    int rows = 0;

    __device__ __forceinline__ Consumer(const TemporalMaps& maps, const TemporalArgs& a, const Place<kChunks>& place,
                                        int group)
        : maps(maps),
          a(a),
          place(place),
          group(group),
          team(group / kChunks),
          part(group % kChunks),
          lane(threadIdx.x % 32),
          warp(threadIdx.x / 32 % 4),
          leader(lane == 0),
          in(place.ring(team)),
          mine((16 * warp + lane % 16) * 128 + ((lane / 16 ^ lane % 8) << 4)) {}

    // The frame `ahead` of this one becomes the one after; finish_after has it read.
    __device__ __forceinline__ void shift_frames(const Walk& at, int ahead) {
        frames[0] = frames[1], frames[1] = frames[2], frames[2] = at.exists(ahead) ? in.index : -1;
    }
    __device__ __forceinline__ void finish_after() {
        if (frames[2] < 0) return;
        uint32_t box = in.take() + part * kBoxBytes + mine;
        if (!a.affine) return;
        Fragments v;
#pragma unroll
        for (int k = 0; k < 4; ++k) load_fragment(v[k], box ^ (32 * k));
        Constants constants(place.constants, kChunks * kChunk, part);
        for_pairs(v, v, Value<T, Read::bn_relu>{constants});
#pragma unroll
        for (int k = 0; k < 4; ++k) store_fragment(box ^ (32 * k), v[k]);
        fence_proxy_async();
        named_sync(2 + team, 128 * kChunks);  // all rows and channels are there
    }

    template <bool kBack>
    __device__ __forceinline__ void multiply_frame(float (&d)[32], uint32_t x, int frame) const {
#pragma unroll
        for (int c = 0; c < kChunks; ++c) multiply_boxes<T, kBack>(d, x + c * kBoxBytes, place.weight(frame, c, part));
    }
    __device__ __forceinline__ void add_frame(float (&d)[32], int frame) const {
        if (frames[frame] < 0) return;
        // The same register for the warp, as the compiler can tell: descriptors are formed of it.
        uint32_t x = __shfl_sync(~0u, in.slots + frames[frame] * in.bytes, 0);
        wgmma_fence();
        a.back ? multiply_frame<true>(d, x, frame) : multiply_frame<false>(d, x, frame);
        wgmma_commit();
    }

    // Adds the rows of y that lie within the frame, the first kMasked ? `count` : 16 of the warp's.
    template <bool kMasked>
    __device__ __forceinline__ void add(const Fragments& y, int count) {
        bool real[2] = {lane / 4 < count, lane / 4 + 8 < count};
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int column = 2 * (2 * k + i / 2);
                float2 v = unpack<T>(y[k][i]);
                v.x -= shift[column], v.y -= shift[column + 1];
                if (kMasked) v.x = real[i % 2] ? v.x : 0, v.y = real[i % 2] ? v.y : 0;
                sums[column] += v.x, sums[column + 1] += v.y;
                squares[column] = fmaf(v.x, v.x, squares[column]);
                squares[column + 1] = fmaf(v.y, v.y, squares[column + 1]);
            }
    }
    __device__ __forceinline__ void add_statistics(const Fragments& y, int position) {
        int count = min(a.order.limit - position, 16);
        if (!a.partials || count <= 0) return;
        if (rows == 0) {  // near the mean: no digits are lost
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                float2 v = unpack<T>(__shfl_sync(~0u, y[j / 2][2 * (j % 2)], lane % 4));
                shift[2 * j] = v.x, shift[2 * j + 1] = v.y;
            }
        }
        rows += count;
        count == 16 ? add<false>(y, count) : add<true>(y, count);
    }

    __device__ __forceinline__ void store(const float (&d)[32], const Walk& at) {
        uint32_t box = place.outputs + group * kBoxBytes;
        int position = at.position + 16 * warp;
        if (leader) store_wait<0>();
        __syncwarp();  // the leader has seen what was stored before leave
        Fragments y;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
            for (int i = 0; i < 4; ++i) y[k][i] = pack<T>(d[first_of(k, i)], d[first_of(k, i) + 1]);
            store_fragment((box + mine) ^ (32 * k), y[k]);
        }
        fence_proxy_async();
        __syncwarp();
        if (leader) store_box(maps.y, box + warp * 16 * 128, part * kChunk, position, at.frame);
        add_statistics(y, position);
    }

    __device__ __forceinline__ void run() {
        for (Walk at(a.order, blockIdx.x * Role::kTeams + team); at.step < at.end; at.advance()) {
#pragma unroll 1
            for (int ahead = at.begin(); ahead < 1; ++ahead) {
                shift_frames(at, ahead);
                finish_after();
            }
            shift_frames(at, 1);
            float d[32];
            zero(d);
            add_frame(d, 0);
            add_frame(d, 1);
            finish_after();  // meanwhile
            add_frame(d, 2);
            wgmma_wait<0>();
            wgmma_pin(d);
            bool last = at.last();
#pragma unroll
            for (int frame = 0; frame < 3; ++frame)
                if (leader && frames[frame] >= 0 && (frame == 0 || last)) release(in, frames[frame]);
            store(d, at);
        }
        if (leader) store_wait<0>();
    }

    // Once at the end: over the rows of a warp, then over warps, each in a fixed order.
    __device__ __forceinline__ void send_statistics() const {
        uint32_t of_lanes = place.frames, shifts = of_lanes + Role::kWarps * 4096, counts = shifts + Role::kWarps * 256;
        uint32_t of_warps = counts + Role::kWarps * 4;
        int mine = 4 * group + warp, thread = threadIdx.x - 128, channel = thread % kChunk;
        named_sync(1, Role::kConsumers);  // all frames have been read
        auto put = [&](uint32_t row, int j, float x, float y) {
            store_shared(row + 32 * j + 8 * (lane % 4), uint2{__float_as_uint(x), __float_as_uint(y)});
        };
        uint32_t to = of_lanes + 512 * (8 * mine + lane / 4);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            put(to, j ^ lane / 4, sums[2 * j], sums[2 * j + 1]);  // so that rows lie in different banks
            put(to + 256, j ^ lane / 4, squares[2 * j], squares[2 * j + 1]);
            if (lane < 4) put(shifts + 256 * mine, j, shift[2 * j], shift[2 * j + 1]);
        }
        if (leader) store_word(counts + 4 * mine, rows);
        named_sync(1, Role::kConsumers);
#pragma unroll 1
        for (int turn = 0; turn < 2; ++turn) {
            int w = Role::kWarps / 2 * turn + thread / kChunk;
            float sum = 0, square = 0;
#pragma unroll
            for (int row = 0; row < 8; ++row) {
                uint32_t of = of_lanes + 512 * (8 * w + row) + 4 * (channel ^ 8 * row);
                sum += load_word(of), square += load_word(of + 256);
            }
            float n = load_word(counts + 4 * w), offset = sum / fmaxf(n, 1), m2 = square - sum * offset;
            uint32_t row = of_warps + 768 * w + 4 * channel;
            store_word(row, n), store_word(row + 256, load_word(shifts + 256 * w + 4 * channel) + offset);
            store_word(row + 512, m2 < 0 ? 0 : m2);  // not fmaxf, which would lose a NaN
        }
        named_sync(1, Role::kConsumers);
        if (thread >= kChunks * kChunk) return;
        Moments moments;
#pragma unroll 1
        for (int i = 0; i < 4 * Role::kTeams; ++i) {
            uint32_t of = of_warps + 768 * (4 * (i / 4 * kChunks + thread / kChunk) + i % 4) + 4 * channel;
            moments.join(load_word(of), load_word(of + 256), load_word(of + 512));
        }
        constexpr int kChannels = kChunks * kChunk;
        float* out = a.partials + int64_t(blockIdx.x) * 3 * kChannels + thread;
        out[0] = moments.n, out[kChannels] = moments.mean, out[2 * kChannels] = moments.m2;
    }
};

// ---- The block.

template <typename T, int kChunks>
__global__ void __launch_bounds__(Roles<kChunks>::kThreads, 1)
    temporal_train_kernel(const __grid_constant__ TemporalMaps maps, const __grid_constant__ TemporalArgs a) {
    using Role = Roles<kChunks>;
    extern __shared__ __align__(1024) char memory[];
    Place<kChunks> place(memory);
    if (threadIdx.x == 0) {
        barrier_init(place.barriers, 1);
#pragma unroll 1
        for (int i = 1; i <= Role::kTeams * kFrames; ++i) {
            barrier_init(place.barriers + 16 * i, 1);
            barrier_init(place.barriers + 16 * i + 8, 4 * kChunks);  // the warps of a team
        }
        barrier_init_fence();
    }
    __syncthreads();
    dependency_wait();
    int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // the same register for the warp, as the compiler can tell
    if (warp < 4) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kProducerRegisters));
        if (threadIdx.x % 32) return;
        if (warp < Role::kTeams) bring_frames(maps, a, place, warp);
        if (warp == 3) bring_weights(maps, a, place);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Role::kRegisters));
        constexpr int kChannels = kChunks * kChunk;
        if (a.affine)
            prepare(place.constants, 2, kChannels, threadIdx.x - 128, Role::kConsumers,
                    [&](int row, int channel) { return row < 3 ? a.affine[row * kChannels + channel] : 0; });
        named_sync(1, Role::kConsumers);
        barrier_wait(place.barriers, 0);
        Consumer<T, kChunks> consumer(maps, a, place, warp / 4 - 1);
        consumer.run();
        if (a.partials) consumer.send_statistics();
    }
}

// ---- Host.

struct TemporalPlan {
    Order order;
    int blocks;
};

// How a shape is divided, or why it cannot run.
const char* plan_train(TemporalPlan& plan, const TemporalTrainShape& s) {
    int processors;
    if (const char* error = count_processors(processors)) return error;
    Order& order = plan.order;
    if (const char* reason = order_of(order, "temporal_train", s.clips, s.time, s.frame, s.channels)) return reason;
    int teams = s.channels == 64 ? Roles<1>::kTeams : Roles<2>::kTeams;
    order.length = int(ceil_divide(order.steps, processors * teams));
    plan.blocks = int(ceil_divide(ceil_divide(order.steps, order.length), teams));
    return nullptr;
}

template <typename T, int kChunks>
const char* launch(const TemporalMaps& maps, const TemporalArgs& args, int blocks, cudaStream_t stream) {
    cudaError_t error = launch_dependent(temporal_train_kernel<T, kChunks>, dim3(blocks), Roles<kChunks>::kThreads,
                                         Roles<kChunks>::kShared, stream, maps, args);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* temporal_train_why_not(const TemporalTrainShape& shape) {
    TemporalPlan plan{};
    return plan_train(plan, shape);
}

int temporal_train_partials(const TemporalTrainShape& shape) {
    TemporalPlan plan{};
    return plan_train(plan, shape) ? 0 : plan.blocks;
}

const char* temporal_train(const TemporalTrain& p) {
    const TemporalTrainShape& s = p.shape;
    TemporalPlan plan{};
    if (const char* reason = plan_train(plan, s)) return reason;
    if (p.x.read != Read::raw && p.x.read != Read::bn_relu) return "temporal_train: expected x to be raw or bn_relu";
    if (const char* error = check_operand("temporal_train", p.x, p.x.read)) return error;
    TemporalMaps maps{};
    const char* failed = nullptr;
    auto encode = [&](CUtensorMap& map, const void* base, int64_t outer, int64_t rows, int64_t columns, int box) {
        if (!failed) failed = tensor_map("temporal_train", map, base, p.dtype, outer, rows, columns, box);
    };
    encode(maps.x, p.x.a, s.clips * s.time, s.frame, s.channels, kUnit);
    encode(maps.w, p.w, 1, s.channels, 3 * s.channels, kChunk);
    encode(maps.y, p.y, s.clips * s.time, s.frame, s.channels, 16);
    if (failed) return failed;
    TemporalArgs args{};
    args.affine = p.x.affine_a;
    args.back = p.transposed;
    args.partials = p.partials;
    args.order = plan.order;
    if (p.dtype == DType::bf16)
        return s.channels == 64 ? launch<__nv_bfloat16, 1>(maps, args, plan.blocks, p.stream)
                                : launch<__nv_bfloat16, 2>(maps, args, plan.blocks, p.stream);
    return s.channels == 64 ? launch<__half, 1>(maps, args, plan.blocks, p.stream)
                            : launch<__half, 2>(maps, args, plan.blocks, p.stream);
}

}  // namespace p3d
