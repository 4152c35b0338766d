// T alone in inference, from activations to activations:
//
//     y = join(bn(T x), o)      3x1x1, m -> m channels, rounded
//
// Positions are the rows of the matrix unit, output channels its columns (rows.cuh). A *column* is 64 positions of a
// frame through all frames of a clip. A step down a column makes one frame's y of three of x, two of which it shares
// with the step before: x is read once, in *frames* of 64 positions by m channels, as boxes of a ring. Before a clip's
// first frame and past its last the copy engine fills in zeros, and it writes nothing past a frame's last position.
//
// All steps of all columns, one column after the other, are cut into runs of equal length, one for each *team* of a
// block: a run that begins in the middle of a column reads two frames again.
//   m = 64    two teams of one warpgroup each; all weights, 24 KB, are shared
//   m = 128   one team of two warpgroups, each of which makes 64 of the output channels; weights 96 KB
//
// A warpgroup writes y through a ring of boxes of its own: o, unless it is x, is read into these and y takes its place.
// Every warp stores the 16 positions that it computed. A warp of producers brings x and o for each team.
#include <algorithm>

#include "rows.cuh"

namespace p3d {
namespace {

constexpr int kThreads = 320;

struct TemporalMaps {
    CUtensorMap x, o;  // [N * T, H * W, m], read in boxes of 64 positions
    CUtensorMap y;     // likewise, written in boxes of a warp's 16 positions
    CUtensorMap w;     // [m, 3 * m], in boxes of m rows
};

struct TemporalArgs {
    const float* affine;  // [3, m]
    Join join;
    bool own_o;                        // o has boxes of its own; else it is x
    int time, columns, steps, length;  // T, of a clip, in all, of a run
};

// Where everything lies in shared memory.
template <int kMid>
struct Layout {
    static constexpr int kChunks = kMid / kChunk, kTeams = 2 / kChunks;
    static constexpr int kFrameBytes = kChunks * kBoxBytes;
    static constexpr int kFrames = kMid == 64 ? 8 : 5;   // of one team
    static constexpr int kOutputs = kMid == 64 ? 4 : 3;  // boxes of one warpgroup
    static constexpr int kTapBytes = kMid * kMid * 2;
    static constexpr int kBarriers = 3 + kTeams * kFrames + 2 * kOutputs;  // pairs
    static constexpr int kBytes =
        3 * kTapBytes + kTeams * kFrames * kFrameBytes + 2 * kOutputs * kBoxBytes + kMid * 8 + kBarriers * 16;
    static_assert(kBytes <= kSharedLimit, "shared memory");
    static_assert(kFrames > 3, "three frames are read while others come");
    static_assert(kOutputs > 2, "a box is written while one leaves and, with o, one comes");

    uint32_t weights, frames, outputs, affine, barriers;

    __device__ __forceinline__ explicit Layout(const void* base)
        : weights(shared_address(base)),
          frames(weights + 3 * kTapBytes),
          outputs(frames + kTeams * kFrames * kFrameBytes),
          affine(outputs + 2 * kOutputs * kBoxBytes),
          barriers(affine + kMid * 8) {}

    __device__ __forceinline__ uint32_t tap_barrier(int tap) const { return barriers + 16 * tap; }
    __device__ __forceinline__ Ring frames_of(int team) const {
        return {frames + team * kFrames * kFrameBytes, barriers + 16 * (3 + team * kFrames), kFrameBytes, kFrames};
    }
    __device__ __forceinline__ Ring outputs_of(int group) const {
        return {outputs + group * kOutputs * kBoxBytes, barriers + 16 * (3 + kTeams * kFrames + group * kOutputs),
                kBoxBytes, kOutputs};
    }
};

// Of a step: where it lies, and whether the frames of the step before are of no use to it, or its own to the next.
struct Step {
    int time, position, frame;  // t, within the frame, n * T + t
    bool first, last;

    __device__ __forceinline__ Step(const TemporalArgs& a, int step, int begin, int end) {
        int column = step / a.time, clip = column / a.columns;
        time = step - column * a.time;
        position = (column - clip * a.columns) * kUnit;
        frame = clip * a.time + time;
        first = step == begin || time == 0;
        last = step + 1 == end || time + 1 == a.time;
    }
};

template <int kMid>
__device__ __forceinline__ void produce(const TemporalMaps& maps, const TemporalArgs& a, const Layout<kMid>& place,
                                        int team, int begin, int end) {
    constexpr int kChunks = Layout<kMid>::kChunks;
    if (team == 0)
        for (int tap = 0; tap < 3; ++tap) {
            barrier_expect(place.tap_barrier(tap), Layout<kMid>::kTapBytes);
            for (int c = 0; c < kChunks; ++c)
                copy_box(place.weights + (tap * kChunks + c) * kMid * kChunk * 2, maps.w, place.tap_barrier(tap),
                         tap * kMid + c * kChunk, 0, 0);
        }
    Ring frames = place.frames_of(team), first = place.outputs_of(team), second = place.outputs_of(1);
    for (int step = begin; step < end; ++step) {
        Step at(a, step, begin, end);
#pragma unroll 1
        for (int ahead = at.first ? -1 : 1; ahead <= 1; ++ahead) {
            int time = at.time + ahead;
            int frame = 0 <= time && time < a.time ? at.frame + ahead : -1;  // of -1 there are zeros
            frames.claim();
            for (int c = 0; c < kChunks; ++c)
                copy_box(frames.slot() + c * kBoxBytes, maps.x, frames.full(), c * kChunk, at.position, frame);
            frames.advance();
        }
        if (!a.own_o) continue;
        auto bring = [&](Ring& ring, int channel) {
            ring.claim();
            copy_box(ring.slot(), maps.o, ring.full(), channel, at.position, at.frame);
            ring.advance();
        };
        bring(first, 0);
        if (kChunks == 2) bring(second, kChunk);
    }
}

template <typename T, int kMid>
__device__ __forceinline__ void consume(const TemporalMaps& maps, const TemporalArgs& a, const Layout<kMid>& place,
                                        int group, int begin, int end) {
    constexpr int kChunks = Layout<kMid>::kChunks;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, part = kChunks == 2 ? group : 0;  // of the channels
    bool leader = lane == 0, held = false;  // the box stored last still holds a slot
    Ring frames = place.frames_of(kChunks == 2 ? 0 : group), outputs = place.outputs_of(group);
    uint32_t weights = place.weights + part * kChunk * 128;
    // This lane's row of a box for ldmatrix and stmatrix; step k is at that address ^ 32 k.
    uint32_t mine = (16 * warp + lane % 16) * 128 + ((lane / 16 ^ lane % 8) << 4);
    uint32_t affine = place.affine + 8 * kChunk * part + 16 * (lane % 4);
    uint32_t before = 0, centre = 0;
    for (int step = begin; step < end; ++step) {
        Step at(a, step, begin, end);
        if (at.first) before = frames.take(), centre = frames.take();
        uint32_t after = 0;
        float d[kChunk / 2];
#pragma unroll
        for (int i = 0; i < kChunk / 2; ++i) d[i] = 0;
        wgmma_pin(d);
#pragma unroll
        for (int tap = 0; tap < 3; ++tap) {
            if (tap == 2) after = frames.take();
            uint32_t x = tap == 0 ? before : tap == 1 ? centre : after;
            barrier_wait(place.tap_barrier(tap), 0);
            wgmma_fence();
#pragma unroll
            for (int c = 0; c < kChunks; ++c)
#pragma unroll
                for (int k = 0; k < kChunk / 16; ++k)
                    wgmma<T, 0>(
                        d, swizzled_descriptor(x + c * kBoxBytes + 32 * k, 8 * 128),
                        swizzled_descriptor(weights + (tap * kChunks + c) * kMid * kChunk * 2 + 32 * k, 8 * 128));
            wgmma_commit();
        }
        uint32_t box = outputs.slot();
        if (a.own_o) barrier_wait(outputs.full(), outputs.parity);
        outputs.advance();
        uint32_t other[kChunk / 16][4] = {}, y[kChunk / 16][4];
        if (a.join != Join::relu) {
            uint32_t o = (a.own_o ? box : centre + part * kBoxBytes) + mine;
#pragma unroll
            for (int k = 0; k < kChunk / 16; ++k) load_fragment(other[k], o ^ (32 * k));
        }
        {
            Columns<kChunk / 8> columns(affine);
            wgmma_wait<0>();
            wgmma_pin(d);
            columns.apply(d);
        }
        join<T>(a.join, y, d, other);
        __syncwarp();  // all lanes have read the centre, and the leader has seen the box before the last leave
        frames.free(leader);
        if (at.last) frames.free(leader), frames.free(leader);
        before = centre, centre = after;
#pragma unroll
        for (int k = 0; k < kChunk / 16; ++k) store_fragment((box + mine) ^ (32 * k), y[k]);
        fence_proxy_async();
        __syncwarp();
        if (leader) {
            store_box(maps.y, box + warp * 16 * 128, part * kChunk, at.position + 16 * warp, at.frame);
            store_wait<1>();
        }
        if (held) outputs.free(leader);
        held = a.own_o;
    }
    if (leader) store_wait<0>();
}

template <typename T, int kMid>
__global__ void __launch_bounds__(kThreads, 1)
    temporal_infer_kernel(const __grid_constant__ TemporalMaps maps, const __grid_constant__ TemporalArgs a) {
    using Place = Layout<kMid>;
    extern __shared__ __align__(1024) char memory[];
    Place place(memory);
    if (threadIdx.x == 0) {
        for (int i = 0; i < Place::kBarriers; ++i) {
            barrier_init(place.barriers + 16 * i, 1);
            bool frame = i < 3 + Place::kTeams * Place::kFrames;
            barrier_init(place.barriers + 16 * i + 8, frame ? 4 * Place::kChunks : 4);  // the warps that use a slot
        }
        barrier_init_fence();
    }
    __syncthreads();
    dependency_wait();
    int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // the same register for the warp, as the compiler can tell
    int group = warp < 8 ? warp / 4 : warp - 8, team = Place::kTeams == 2 ? group : 0;
    int begin = (blockIdx.x * Place::kTeams + team) * a.length, end = min(begin + a.length, a.steps);
    if (warp >= 8) {
        if (threadIdx.x % 32 == 0 && group < Place::kTeams) produce<kMid>(maps, a, place, group, begin, end);
    } else {
        prepare_affine(place.affine, a.affine, kMid, threadIdx.x);
        named_sync(1, 256);
        consume<T, kMid>(maps, a, place, group, begin, end);
    }
}

template <typename T, int kMid>
const char* launch(const TemporalMaps& maps, TemporalArgs& args, int processors, cudaStream_t stream) {
    constexpr int kTeams = Layout<kMid>::kTeams;
    args.length = (args.steps + processors * kTeams - 1) / (processors * kTeams);
    int blocks = ((args.steps + args.length - 1) / args.length + kTeams - 1) / kTeams;
    cudaError_t error = launch_dependent(temporal_infer_kernel<T, kMid>, dim3(blocks), kThreads, Layout<kMid>::kBytes,
                                         stream, maps, args);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

int64_t columns_of(const TemporalShape& s) { return (s.frame + kUnit - 1) / kUnit; }

}  // namespace

const char* temporal_infer_why_not(const TemporalShape& s) {
    using Long = long long;
    if (s.channels != 64 && s.channels != 128)
        return fail("temporal_infer: channels: expected 64 or 128, whose weights fit in shared memory, got %lld",
                    Long(s.channels));
    if (std::min({s.clips, s.time, s.frame}) < 1 || s.frame > 1 << 29)
        return fail("temporal_infer: expected N, T, H * W of at least 1 and H * W up to 2^29, got %lld, %lld, %lld",
                    Long(s.clips), Long(s.time), Long(s.frame));
    if (double(s.clips) * double(s.time) * double(columns_of(s)) > 1 << 30)
        return fail("temporal_infer: expected up to 2^30 times 64 positions, got N, T, H * W = %lld, %lld, %lld",
                    Long(s.clips), Long(s.time), Long(s.frame));
    return nullptr;
}

const char* temporal_infer(const TemporalInfer& p) {
    if (const char* reason = temporal_infer_why_not(p.shape)) return reason;
    if ((p.join == Join::relu) != !p.o) return "temporal_infer: expected o with every join but relu";
    int processors;
    if (const char* error = count_processors(processors)) return error;

    int64_t frames = p.shape.clips * p.shape.time, m = p.shape.channels;
    TemporalMaps maps{};
    TemporalArgs args{};
    args.affine = p.affine;
    args.join = p.join;
    args.own_o = p.o && p.o != p.x;
    args.time = int(p.shape.time);
    args.columns = int(columns_of(p.shape));
    args.steps = int(frames * args.columns);
    const char* failed = nullptr;
    auto encode = [&](CUtensorMap& map, const void* base, int64_t outer, int64_t rows, int64_t columns, int64_t box) {
        if (!failed) failed = tensor_map("temporal_infer", map, base, p.dtype, outer, rows, columns, int(box));
    };
    encode(maps.x, p.x, frames, p.shape.frame, m, kUnit);
    if (args.own_o) encode(maps.o, p.o, frames, p.shape.frame, m, kUnit);
    encode(maps.y, p.y, frames, p.shape.frame, m, 16);
    encode(maps.w, p.w, 1, m, 3 * m, m);
    if (failed) return failed;
    if (p.dtype == DType::bf16)
        return m == 64 ? launch<__nv_bfloat16, 64>(maps, args, processors, p.stream)
                       : launch<__nv_bfloat16, 128>(maps, args, processors, p.stream);
    return m == 64 ? launch<__half, 64>(maps, args, processors, p.stream)
                   : launch<__half, 128>(maps, args, processors, p.stream);
}

}  // namespace p3d
