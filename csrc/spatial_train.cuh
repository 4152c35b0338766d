// The spatial convolution and its input gradient in training: the product, the tiles and the two ways of working of
// spatial_infer.cuh, with a prologue and an epilogue; and a third way for small frames:
//   halves  (128 channels and more) as streamed, but a block has 64 couts. Each warpgroup multiplies one of two chunks
//           of 64 channels, and the first adds up both. A tile may be several frames, with one zero row above each that
//           ends the frame before it: the box of a frame has H + 1 rows then. Half the weights pass a block by.
//
// The copy engine brings the halo of a tile as it lies in memory. The gradient reads it as it is; in the forward pass
// finishing warps apply BN-ReLU once an element and in place. What lies outside the frame is zero after the read, so
// they write those zeros; the copy engine's would go through the affine. Then the warpgroups multiply.
//
// The sums leave through staging, a row of 128 bytes a position, swizzled. What the gradient adds (o) and what its sums
// for the layer below are made with come there first, as boxes too: a thread finds in place what belongs to its
// accumulators, 2 couts and every fourth pair of positions, and leaves dx where it found it. Of a statistic or a sum a
// thread has 2 couts, over all tiles of its warpgroup; four neighbouring lanes share them, and in the end the other
// warpgroup, if it has the same couts.
#pragma once

#include "spatial_infer.cuh"

namespace p3d {

constexpr int kTrainThreads = 512;
constexpr int kTrainProducerRegisters = 72, kTrainConsumerRegisters = 184;
static_assert(2 * (kTrainProducerRegisters + kTrainConsumerRegisters) <= 65536 / 128, "registers of the block");

struct TrainMaps {
    CUtensorMap x;      // [F, H, W, Ci], in boxes of 1 x (R + 2) x (W + 1) x 64 or
                        // frames x (H + 1) x (W + 1) x 64; of the gradient: dz
    CUtensorMap y;      // [F, H, W, Co], in boxes of 1 x R x (W + 1) x 64 or the same as x
    CUtensorMap o;      // gradient: like y
    CUtensorMap below;  // gradient: like y
    CUtensorMap w;      // [Co, 9, Ci], of the gradient [Ci, 9, Co], in boxes of 64 x 1 x 64
};

struct TrainArgs : BoxArgs {
    const float* affine;        // forward: [3, Ci] or nullptr
    bool add;                   // gradient: there is an o
    const float* below_affine;  // gradient: [3, Co] with below
    float* partials;            // [R, 3, Co], of the gradient [R, 2, Co]; or nullptr
    int in_channels, height;
    int all_frames, frames;  // F; of a tile
    int frame_rows;          // in boxes of y: R, or of several frames H + 1
    FastDivide by_pitch, by_frame_rows;
    int stagings, scratch;  // bytes of the latter
};

// Where everything lies in shared memory, and the barriers: of staging o loaded and read, below loaded, and free again;
// of a halo tile copied, finished and emptied; of weights filled and emptied.
struct TrainShared {
    uint32_t weights, halo, staging, scratch, barriers;

    __device__ __forceinline__ TrainShared(const void* base, const TrainArgs& a)
        : weights(shared_address(base)),
          halo(weights + a.weight_bytes),
          staging(halo + a.buffers * a.buffer_bytes),
          scratch(staging + a.stagings * a.staged),
          barriers(scratch + a.scratch) {}
    __device__ __forceinline__ uint32_t o_full(int i) const { return barriers + 32 * i; }
    __device__ __forceinline__ uint32_t o_read(int i) const { return o_full(i) + 8; }
    __device__ __forceinline__ uint32_t below_full(int i) const { return o_full(i) + 16; }
    __device__ __forceinline__ uint32_t staging_free(int i) const { return o_full(i) + 24; }
    __device__ __forceinline__ uint32_t copied(int buffer) const { return barriers + 64 + 24 * buffer; }
    __device__ __forceinline__ uint32_t finished(int buffer) const { return copied(buffer) + 8; }
    __device__ __forceinline__ uint32_t emptied(int buffer) const { return copied(buffer) + 16; }
    __device__ __forceinline__ uint32_t weights_full(int i) const { return copied(kMaxBuffers) + 16 * i; }
    __device__ __forceinline__ uint32_t weights_empty(int i) const { return weights_full(i) + 8; }
};

enum class Way { resident, streamed, halves };

// Chunks of 64 channels that come as one, each with its half of buffer_bytes or all of it.
template <Way kWay>
constexpr int kTogether = kWay == Way::halves ? 2 : 1;

// Of the 8 warps that do not multiply, 0 brings halos, 1 weights, and 2 of the gradient o and below. Those of the
// forward pass from this one on finish; warp 1, too, where all weights come at once.
template <Way kWay>
constexpr int kFirstFinisher = kWay == Way::resident ? 1 : 2;

// Of the forward pass the last tile comes first: what the kernel before this one has written last is still in the
// second-level cache, and the one after it, which begins with the first, finds that there.
template <Pass kPass>
struct TrainTile : BoxTile {
    int rows;  // of y's boxes, from the first on, that are of this tensor

    __device__ __forceinline__ TrainTile(const TrainArgs& a, int tile)
        : BoxTile(a, kPass == Pass::forward && tile < a.tiles ? a.tiles - 1 - tile : tile) {
        frame *= a.frames;
        rows = a.frames == 1 ? min(a.rows, a.height - row) : min(a.frames, a.all_frames - frame) * a.frame_rows;
    }
};

// The first of the 64 couts of a warpgroup.
template <Way kWay>
__device__ __forceinline__ int first_cout(int group) {
    return (kWay == Way::streamed ? 2 * int(blockIdx.y) + group : int(blockIdx.y)) * kChunk;
}

// ---- Producers: one thread each.

template <Way kWay, Pass kPass>
__device__ __forceinline__ void bring_halos(const TrainMaps& maps, const TrainArgs& a, const TrainShared& shared) {
    constexpr int kStep = kTogether<kWay> * kChunk;
    Slot slot;
    for (int tile = blockIdx.x; in_turn<kWay == Way::resident>(a, tile); tile += gridDim.x) {
        TrainTile<kPass> at(a, tile);
        for (int channel = 0; channel < a.in_channels; channel += kStep, slot.advance(a.buffers)) {
            uint32_t full = shared.copied(slot.index), target = shared.halo + slot.index * a.buffer_bytes;
            barrier_wait(shared.emptied(slot.index), slot.parity ^ 1);
            barrier_expect(full, kTogether<kWay> * a.box_bytes);
            for (int i = 0; i < kTogether<kWay>; ++i)
                copy_box(target + i * (a.buffer_bytes / 2), maps.x, full, channel + i * kChunk, -1, at.row - 1,
                         at.frame);
            bool last = channel + kStep == a.in_channels;  // what comes next waits for its place
            int next = last ? tile + int(gridDim.x) : tile;
            if (next >= a.tiles) continue;
            TrainTile<kPass> to(a, next);
            for (int i = 0; i < kTogether<kWay>; ++i)
                prefetch_box(maps.x, (last ? 0 : channel + kStep) + i * kChunk, -1, to.row - 1, to.frame);
        }
    }
}

template <Pass kPass>
__device__ __forceinline__ void bring_weights(const TrainMaps& maps, const TrainArgs& a, const TrainShared& shared) {
    for (int item = 0; item < a.stages; ++item) {
        barrier_expect(shared.weights_full(item), kWeightBytes);
        copy_weights<kPass>(shared.weights + item * kWeightBytes, maps.w, shared.weights_full(item),
                            item / kTaps * kChunk, item % kTaps, first_cout<Way::resident>(0));
    }
}

// Fetches this block's half of every stage of weights, that of one warpgroup, for both blocks of the cluster.
template <Way kWay, Pass kPass>
__device__ __forceinline__ void stream_weights(const TrainMaps& maps, const TrainArgs& a, const TrainShared& shared) {
    int rank = blockIdx.x % 2, cout = first_cout<kWay>(rank), first = kWay == Way::halves ? rank * kChunk : 0;
    Slot stage;
    for (int tile = blockIdx.x; in_turn<false>(a, tile); tile += gridDim.x)
        for (int channel = first; channel < a.in_channels; channel += kTogether<kWay> * kChunk)
            for (int tap = 0; tap < kTaps; ++tap, stage.advance(a.stages)) {
                uint32_t full = shared.weights_full(stage.index);
                uint32_t target = shared.weights + (2 * stage.index + rank) * kWeightBytes;
                barrier_wait(shared.weights_empty(stage.index), stage.parity ^ 1);
                barrier_expect(full, 2 * kWeightBytes);  // the other half comes by itself
                if (kPass == Pass::gradient)
                    copy_box_to_both(target, maps.w, full, cout, kTaps - 1 - tap, channel);
                else
                    copy_box_to_both(target, maps.w, full, channel, tap, cout);
            }
}

// What staging begins with: o, and when that has been read, below.
template <Way kWay>
__device__ __forceinline__ void bring_operands(const TrainMaps& maps, const TrainArgs& a, const TrainShared& shared) {
    if (!a.add && !a.below_affine) return;
    uint32_t turns = 0;  // bit i: parity of the turns of staging i
    int owner = 0;
    for (int tile = blockIdx.x; in_turn<kWay == Way::resident>(a, tile); tile += gridDim.x, owner ^= 1) {
        TrainTile<Pass::gradient> at(a, tile);
        int begin = kWay == Way::resident && a.stagings == 2 ? owner : 0, end = kWay == Way::streamed ? 2 : begin + 1;
        auto bring = [&](int i, const CUtensorMap& map, uint32_t full) {
            barrier_expect(full, a.frames * a.frame_rows * a.pitch * 2 * kChunk);
            copy_box(shared.staging + i * a.staged, map, full, first_cout<kWay>(i), 0, at.row, at.frame);
        };
        for (int i = begin; i < end; ++i) {
            barrier_wait(shared.staging_free(i), (turns >> i & 1) ^ 1);
            if (a.add)
                bring(i, maps.o, shared.o_full(i));
            else
                bring(i, maps.below, shared.below_full(i));
        }
        for (int i = begin; i < end; ++i) {
            if (a.add && a.below_affine) {
                barrier_wait(shared.o_read(i), turns >> i & 1);
                bring(i, maps.below, shared.below_full(i));
            }
            turns ^= 1 << i;
        }
    }
}

// ---- Finishers.

// BN-ReLU of four neighbouring channels.
struct Activation4 {
    float mean[4], scale[4], bias[4];

    __device__ __forceinline__ Activation4(const float* affine, int channel, int channels) {
        Gradient4::load_row(mean, affine + channel);
        Gradient4::load_row(scale, affine + channels + channel);
        Gradient4::load_row(bias, affine + 2 * channels + channel);
    }
    template <typename T>
    __device__ __forceinline__ uint2 apply(uint2 v) const {
        float2 a = unpack<T>(v.x), b = unpack<T>(v.y);
        auto u = [&](float value, int i) { return normalise(value, mean[i], scale[i], bias[i]); };
        return {pack_relu<T>(u(a.x, 0), u(a.y, 1)), pack_relu<T>(u(b.x, 2), u(b.y, 3))};
    }
};

// Finisher `warp` takes every kFinishers-th group of 8 positions. A lane has four channels and every other position;
// the next group is loaded while it works on one.
template <typename T, Way kWay>
__device__ __forceinline__ void finish_halos(const TrainArgs& a, const TrainShared& shared, int warp) {
    constexpr int kGroup = 8, kMine = kGroup / 2, kFinishers = 8 - kFirstFinisher<kWay>;
    static_assert((3 * kSpatialTrainSizes[1][0] / kGroup / kFinishers + 1) * kMine <= 64, "bits for one row a tile");
    int lane = threadIdx.x % 32, line = lane / 16;
    uint32_t piece = line * 128 + ((lane % 16 / 2 ^ line) << 4) + lane % 2 * 8;  // of position `line` of a group
    auto place = [&](int k) { return (piece ^ k * 32) + k * 256; };              // of position line + 2 k
    int positions = a.box_bytes / (2 * kChunk);
    bool several = kWay == Way::halves && a.frames > 1;
    // Which of its positions are of the tensor is the same in all tiles but those with a frame's first or last rows, or
    // the last frames. So it is found once, not for every group: bit kMine i + k of position k of the lane's group i.
    int last_rows = several ? (a.all_frames - (a.tiles - 1) * a.frames) * a.frame_rows
                            : a.height - (a.frame_tiles - 1) * a.rows + 1;
    uint64_t inside = 0, below_first = 0, above_last = 0;
    for (int i = 0, first = kGroup * warp; first < positions; i += kMine, first += kGroup * kFinishers)
#pragma unroll
        for (int k = 0; k < kMine; ++k) {
            int position = first + line + 2 * k, row = a.by_pitch(position);
            bool real = position < positions && position != row * a.pitch;
            if (several) real = real && row != a.by_frame_rows(row) * a.frame_rows;
            inside |= uint64_t(real) << (i + k);
            below_first |= uint64_t(row > 0) << (i + k);
            above_last |= uint64_t(row < last_rows) << (i + k);
        }
    Slot slot;
    for (int tile = blockIdx.x; in_turn<kWay == Way::resident>(a, tile); tile += gridDim.x) {
        TrainTile<Pass::forward> at(a, tile);
        uint64_t real = inside;
        if (at.row == 0) real &= below_first;
        if (several ? at.frame + a.frames >= a.all_frames : at.row + a.rows >= a.height) real &= above_last;
        for (int chunk = 0; chunk < a.chunks; ++chunk) {
            Activation4 read(a.affine, chunk * kChunk + 4 * (lane % 16), a.in_channels);
            int part = chunk % kTogether<kWay>;
            uint32_t x = shared.halo + slot.index * a.buffer_bytes + part * (a.buffer_bytes / 2);
            barrier_wait(shared.copied(slot.index), slot.parity);
            uint64_t bits = real;
            uint2 v[kMine], next[kMine];
            auto load = [&](int first) {
                if (first < positions)
#pragma unroll
                    for (int k = 0; k < kMine; ++k) load_shared(next[k], x + 128 * first + place(k));
            };
            load(kGroup * warp);
#pragma unroll 1
            for (int first = kGroup * warp; first < positions; first += kGroup * kFinishers, bits >>= kMine) {
#pragma unroll
                for (int k = 0; k < kMine; ++k) v[k] = next[k];
                load(first + kGroup * kFinishers);
#pragma unroll
                for (int k = 0; k < kMine; ++k) {
                    uint2 value = read.template apply<T>(v[k]);
                    store_shared(x + 128 * first + place(k), uint32_t(bits) & 1 << k ? value : uint2{});
                }
            }
            if (part + 1 < kTogether<kWay>) continue;
            fence_proxy_async();
            __syncwarp();
            if (lane == 0) barrier_arrive(shared.finished(slot.index));
            slot.advance(a.buffers);
        }
    }
}

// ---- Consumers.

// sum g and sum g (below - mean) of this thread's two couts.
struct TrainSums {
    float mean[2], scale[2], bias[2];
    float g[2] = {}, gz[2] = {};
};

// Gives warpgroup 0 of v what warpgroup 1 has of it, through shared memory that both have done with.
template <int kCount>
__device__ __forceinline__ void hand_over(float (&v)[kCount], uint32_t scratch, int group, int thread) {
    auto* mine = static_cast<float*>(__cvta_shared_to_generic(scratch)) + thread;
    named_sync(5, 256);
#pragma unroll
    for (int i = 0; i < kCount; ++i)
        if (group == 1) mine[128 * i] = v[i];
    named_sync(5, 256);
#pragma unroll
    for (int i = 0; i < kCount; ++i)
        if (group == 0) v[i] = mine[128 * i];
}

template <typename T, int kN, Way kWay, Pass kPass>
__device__ __forceinline__ void consume_tiles(const TrainMaps& maps, const TrainArgs& a, const TrainShared& shared,
                                              int group) {
    constexpr bool kFlip = kPass == Pass::gradient;
    constexpr int kWords = (kN + 31) / 32;
    int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
    int cout = first_cout<kWay>(group), mine = cout + 16 * warp + lane / 4;  // this thread's: mine and mine + 8
    auto turn = [](int g) { return 3 + g; };                                 // named barrier: warpgroup g may multiply
    constexpr bool kResident = kWay == Way::resident, kHalves = kWay == Way::halves;
    bool shares = kResident && a.stagings == 1, below = kFlip && a.below_affine, add = kFlip && a.add;
    int out = shares || kHalves ? 0 : group;  // its staging
    uint32_t staged = shared.staging + out * a.staged;
    uint32_t turns = 0;                  // of it so far
    auto give = [&](uint32_t barrier) {  // of this warp's part of it
        __syncwarp();
        if (lane == 0) barrier_arrive(barrier);
    };
    int piece = 2 * warp + lane / 8 % 2;  // 8 couts
    uint32_t turned = staged + lane % 8 * 128 + ((piece ^ (lane % 8)) << 4);

    uint32_t columns[kWords];  // bit i of word k: position 32 k + i of a tile is in a column of the frame
#pragma unroll
    for (int k = 0; k < kWords; ++k) {
        int position = 32 * k + lane, row = a.by_pitch(position);
        bool blank = kHalves && a.frames > 1 && row - int(a.by_frame_rows(row)) * a.frame_rows == a.height;
        columns[k] = __ballot_sync(~0u, !blank && position - row * a.pitch < a.pitch - 1);
    }
    TrainSums sums;
    if (below)
        for (int m = 0; m < 2; ++m) {
            sums.mean[m] = a.below_affine[mine + 8 * m];
            sums.scale[m] = a.below_affine[a.out_channels + mine + 8 * m];
            sums.bias[m] = a.below_affine[2 * a.out_channels + mine + 8 * m];
        }
    Moments moments[2];
    Slot slot, stage;
    if (kResident && group == 1) named_arrive(turn(0), 256);
    for (int tile = blockIdx.x, owner = 0; in_turn<kWay == Way::resident>(a, tile); tile += gridDim.x, owner ^= 1) {
        if (kResident && owner != group) {
            for (int chunk = 0; chunk < a.chunks; ++chunk) slot.advance(a.buffers);
            turns += shares;
            continue;
        }
        float d[kN / 2];
#pragma unroll
        for (int i = 0; i < kN / 2; ++i) d[i] = 0;
        wgmma_pin(d);
        if (kResident) named_sync(turn(group), 256);
        int last = -1, last_stage = -1;
        auto free_stage = [&] {
            if (!kResident && lane < 2 && last_stage >= 0) barrier_arrive_at(shared.weights_empty(last_stage), lane);
        };
        for (int chunk = 0; chunk < a.chunks; chunk += kTogether<kWay>, slot.advance(a.buffers)) {
            barrier_wait(shared.copied(slot.index), slot.parity);
            if (!kFlip && a.affine) barrier_wait(shared.finished(slot.index), slot.parity);
            uint32_t x = shared.halo + slot.index * a.buffer_bytes + (kHalves ? group * (a.buffer_bytes / 2) : 0);
#pragma unroll
            for (int tap = 0; tap < kTaps; ++tap) {
                int item = kResident ? chunk * kTaps + tap : stage.index;
                barrier_wait(shared.weights_full(item), stage.parity);
                uint32_t w = shared.weights + (kResident ? item : 2 * item + group) * kWeightBytes;
                uint32_t moved = x + 128 * (tap / 3 * a.pitch + tap % 3);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < kChunk / 16; ++k)  // 32 bytes of every row of weights, or 16 of the gradient's rows
                    wgmma<T, kFlip>(d, swizzled_descriptor(w + k * (kFlip ? 16 * 128 : 32), 8 * 128),
                                    swizzled_descriptor(moved + 32 * k, 8 * 128));
                wgmma_commit();
                if (!kResident || (tap == 0 && last >= 0)) wgmma_wait<1>();  // the tap before this one has been read
                if (tap == 0 && last >= 0 && lane == 0) barrier_arrive(shared.emptied(last));
                if (kResident) continue;
                free_stage();
                last_stage = stage.index;
                stage.advance(a.stages);
            }
            last = slot.index;
        }
        if (kResident) named_arrive(turn(1 - group), 256);
        wgmma_wait<0>();
        wgmma_pin(d);
        free_stage();
        if (lane == 0) barrier_arrive(shared.emptied(last));

        if constexpr (kHalves) {
            float other[kN / 2];
#pragma unroll
            for (int i = 0; i < kN / 2; ++i) other[i] = d[i];
            hand_over(other, shared.scratch, group, thread);
            if (group == 1) continue;
#pragma unroll
            for (int i = 0; i < kN / 2; ++i) d[i] += other[i];
        }

        TrainTile<kPass> at(a, tile);
        int rows = tile < a.tiles ? at.rows : 0;
        uint32_t real[kWords];  // as add_statistics takes it
#pragma unroll
        for (int k = 0; k < kWords; ++k) {
            int count = min(max(rows * a.pitch - 32 * k, 0), 32);
            real[k] = (columns[k] & uint32_t((uint64_t(1) << count) - 1)) >> (2 * (lane % 4));
        }
        if constexpr (kPass == Pass::forward) {
            if (a.partials) {
#pragma unroll
                for (int i = 0; i < kN / 2; i += 2) {
                    float2 rounded = unpack<T>(pack<T>(d[i], d[i + 1]));
                    d[i] = rounded.x, d[i + 1] = rounded.y;
                }
                wgmma_pin(d);
                int real_rows = kHalves && a.frames > 1 ? rows / a.frame_rows * a.height : rows;
                add_statistics<kN>(moments, d, real, real_rows * (a.pitch - 1));
            }
        }
        // Before below or o is waited for, too: no turn of the other warpgroup's may be taken for this one.
        barrier_wait(shared.staging_free(out), (turns & 1) ^ 1);
        if (add) {
            barrier_wait(shared.o_full(out), turns & 1);
#pragma unroll
            for (int j = 0; j < kN / 8; ++j) {
                uint32_t pair[2];
                load_transposed(turned + 1024 * j, pair[0], pair[1]);
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    float2 o = unpack<T>(pair[m]);
                    d[4 * j + 2 * m] += o.x, d[4 * j + 2 * m + 1] += o.y;
                }
            }
            give(shared.o_read(out));
        }
        if (below) barrier_wait(shared.below_full(out), turns & 1);
        ++turns;
        float g[2] = {}, gz[2] = {};  // of this tile
#pragma unroll
        for (int j = 0; j < kN / 8; ++j) {
            uint32_t v[2] = {pack<T>(d[4 * j], d[4 * j + 1]), pack<T>(d[4 * j + 2], d[4 * j + 3])};
            if (below) {  // from where only this warp will write
                uint32_t pair[2];
                load_transposed(turned + 1024 * j, pair[0], pair[1]);
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    float2 y = unpack<T>(v[m]), z = unpack<T>(pair[m]);
                    auto sum = [&](float y, float z, int e) {
                        bool counts = real[j / 4] >> (8 * (j % 4) + e) & 1;
                        float centred = counts ? z - sums.mean[m] : 0.0f;
                        bool closed = fmaf(centred, sums.scale[m], sums.bias[m]) <= 0 || !counts;
                        float open = closed ? 0.0f : y;
                        g[m] += open;
                        gz[m] = fmaf(open, centred, gz[m]);
                    };
                    sum(y.x, z.x, 0), sum(y.y, z.y, 1);
                }
            }
            store_transposed(turned + 1024 * j, v[0], v[1]);
        }
        for (int m = 0; m < 2; ++m) sums.g[m] += g[m], sums.gz[m] += gz[m];
        fence_proxy_async();
        named_sync(1 + group, 128);
        if (thread == 0) {
            store_box(maps.y, staged, cout, 0, at.row, at.frame);
            store_wait();
        }
        give(shared.staging_free(out));
    }
    if (!a.partials) return;
    // A row of partial sums a block. Both of the warpgroups that take turns have all of its couts.
    bool writes = lane % 4 == 0 && (kWay == Way::streamed || group == 0);
    if constexpr (kPass == Pass::forward) {
        if (kResident) {
            float other[6] = {moments[0].n, moments[0].mean, moments[0].m2,
                              moments[1].n, moments[1].mean, moments[1].m2};
            hand_over(other, shared.weights, group, thread);
            moments[0].join(other[0], other[1], other[2]);
            moments[1].join(other[3], other[4], other[5]);
        }
        if (writes) store_statistics(a.partials, moments, blockIdx.x, mine, a.out_channels);
    } else {
        float total[4];
#pragma unroll
        for (int m = 0; m < 2; ++m) total[m] = quad_sum(sums.g[m]), total[2 + m] = quad_sum(sums.gz[m]);
        if (kResident) {
            float other[4] = {total[0], total[1], total[2], total[3]};
            hand_over(other, shared.weights, group, thread);
#pragma unroll
            for (int i = 0; i < 4; ++i) total[i] += other[i];
        }
        float* to = a.partials + int64_t(2) * blockIdx.x * a.out_channels + mine;
        if (writes)
            for (int m = 0; m < 2; ++m) to[8 * m] = total[m], to[a.out_channels + 8 * m] = total[2 + m];
    }
}

template <typename T, int kN, Way kWay, Pass kPass>
__device__ __forceinline__ void train_block(const TrainMaps& maps, const TrainArgs& a) {
    constexpr bool kResident = kWay == Way::resident;
    extern __shared__ __align__(1024) char memory[];
    TrainShared shared(memory, a);
    if (threadIdx.x == 0) {
        prefetch_map(maps.x), prefetch_map(maps.y), prefetch_map(maps.w);
        if (kPass == Pass::gradient && a.below_affine) prefetch_map(maps.below);
        for (int i = 0; i < 2; ++i) {
            barrier_init(shared.o_full(i), 1), barrier_init(shared.o_read(i), 4);
            barrier_init(shared.below_full(i), 1), barrier_init(shared.staging_free(i), 4);
        }
        for (int i = 0; i < a.buffers; ++i) {  // emptied by the warps that read it
            barrier_init(shared.copied(i), 1);
            barrier_init(shared.finished(i), 8 - kFirstFinisher<kWay>);
            barrier_init(shared.emptied(i), kResident ? 4 : 8);
        }
        for (int i = 0; i < a.stages; ++i)
            barrier_init(shared.weights_full(i), 1), barrier_init(shared.weights_empty(i), 16);  // of both blocks
        barrier_init_fence();
    }
    int part = a.buffer_bytes / kTogether<kWay>;
    for (int i = 0; i < kTogether<kWay> * a.buffers; ++i)
        for (int byte = a.box_bytes + 16 * int(threadIdx.x); byte < part; byte += 16 * kTrainThreads)
            store_shared(shared.halo + i * part + byte, uint4{});
    fence_proxy_async();
    __syncthreads();
    if (!kResident) cluster_sync();
    int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // the same register for the warp, as the compiler can tell
    if (warp < 8) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kTrainProducerRegisters));
        dependency_wait();
        if (kResident && threadIdx.x == 32) bring_weights<kPass>(maps, a, shared);
        __syncwarp();
        if (kPass == Pass::forward && warp >= kFirstFinisher<kWay>) {
            if (a.affine) finish_halos<T, kWay>(a, shared, warp - kFirstFinisher<kWay>);
        } else if (threadIdx.x == 0) {
            bring_halos<kWay, kPass>(maps, a, shared);
        } else if (threadIdx.x == 32) {
            if constexpr (!kResident) stream_weights<kWay, kPass>(maps, a, shared);
        } else if (threadIdx.x == 64 && kPass == Pass::gradient) {
            bring_operands<kWay>(maps, a, shared);
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kTrainConsumerRegisters));
        dependency_wait();
        consume_tiles<T, kN, kWay, kPass>(maps, a, shared, warp / 4 - 2);
    }
    if (!kResident) cluster_sync();  // nobody leaves while the other block may still free a stage here
}

template <typename T, int kN, Pass kPass>
__global__ void __launch_bounds__(kTrainThreads, 1)
    spatial_train_kernel(const __grid_constant__ TrainMaps maps, const __grid_constant__ TrainArgs a) {
    train_block<T, kN, Way::resident, kPass>(maps, a);
}

template <typename T, int kN, Pass kPass>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kTrainThreads, 1)
    spatial_train_streamed_kernel(const __grid_constant__ TrainMaps maps, const __grid_constant__ TrainArgs a) {
    train_block<T, kN, Way::streamed, kPass>(maps, a);
}

template <typename T, int kN, Pass kPass>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kTrainThreads, 1)
    spatial_train_halves_kernel(const __grid_constant__ TrainMaps maps, const __grid_constant__ TrainArgs a) {
    train_block<T, kN, Way::halves, kPass>(maps, a);
}

// ---- Host.

// The plan of these kernels here, and whether they take the shape in place of spatial_kernel.cuh's. That one's account
// leaves out what its threads do: it takes half as long again.
inline const char* train_plan_here(SpatialTrainPlan& plan, bool& taken, const ConvShape& shape, Pass pass) {
    SpatialPlan other;
    if (const char* error = plan_here(other, shape, pass)) return error;
    taken = spatial_train_plan(plan, shape, pass, other.processors) && 2 * plan.cost <= 3 * other.cost;
    return nullptr;
}

inline int train_partial_rows(const ConvShape& shape, Pass pass) {
    SpatialTrainPlan plan;
    bool taken;
    if (train_plan_here(plan, taken, shape, pass)) return 0;
    return taken ? plan.blocks : partial_rows(shape, pass);
}

template <typename T, Pass kPass>
const char* launch_train(const SpatialTrainPlan& plan, const TrainMaps& maps, const TrainArgs& args,
                         cudaStream_t stream) {
#define P3D_CASE(N, RESIDENT, HALVES, KERNEL)                                                                         \
    if (plan.positions == N && plan.resident == RESIDENT && plan.halves == HALVES) {                                  \
        cudaError_t error = launch_dependent(KERNEL<T, N, kPass>, dim3(plan.blocks, plan.cout_blocks), kTrainThreads, \
                                             plan.shared, stream, maps, args);                                        \
        return error == cudaSuccess ? nullptr : cudaGetErrorString(error);                                            \
    }
    P3D_CASE(168, true, false, spatial_train_kernel);
    P3D_CASE(152, true, false, spatial_train_kernel);
    P3D_CASE(112, true, false, spatial_train_kernel);
    P3D_CASE(64, true, false, spatial_train_kernel);
    P3D_CASE(112, false, false, spatial_train_streamed_kernel);
    P3D_CASE(64, false, false, spatial_train_streamed_kernel);
    P3D_CASE(32, false, false, spatial_train_streamed_kernel);
    P3D_CASE(112, false, true, spatial_train_halves_kernel);
    P3D_CASE(72, false, true, spatial_train_halves_kernel);
#undef P3D_CASE
    return "spatial_conv: no kernel for the planned tile";
}

struct TrainTensors {  // what an operation lacks is nullptr
    const void *x, *w, *o, *below;
    void* y;
};

// Completes `args`, which has the pointers to float32, and launches the kernel of this plan.
template <Pass kPass>
const char* launch_train(TrainArgs& args, const TrainTensors& t, const ConvShape& s, DType dtype,
                         const SpatialTrainPlan& plan, cudaStream_t stream) {
    TrainMaps maps{};
    const char* failed = nullptr;
    auto encode = [&](CUtensorMap& map, const void* base, int64_t channels, int rows) {
        if (base && !failed) failed = frame_map(map, base, dtype, s, channels, rows, plan.pitch, plan.frames);
    };
    bool several = plan.frames > 1;
    int frame_rows = several ? plan.rows + 1 : plan.rows;
    encode(maps.x, t.x, s.in_channels, several ? frame_rows : plan.rows + 2);
    encode(maps.y, t.y, s.out_channels, frame_rows);
    encode(maps.o, t.o, s.out_channels, frame_rows);
    encode(maps.below, t.below, s.out_channels, frame_rows);
    if (failed) return failed;
    uint64_t ends[] = {uint64_t(s.in_channels), uint64_t(s.out_channels)};
    constexpr bool kFlip = kPass == Pass::gradient;
    if (const char* error = weight_map(maps.w, t.w, dtype, ends[kFlip], ends[!kFlip])) return error;
    args.add = t.o != nullptr;
    args.out_channels = int(s.out_channels);
    args.in_channels = int(s.in_channels);
    args.height = int(s.height);
    args.pitch = plan.pitch;
    args.before = 1;
    args.all_frames = int(s.frames);
    args.frames = plan.frames;
    args.frame_rows = frame_rows;
    args.by_pitch = FastDivide(plan.pitch);
    args.by_frame_rows = FastDivide(std::max(frame_rows, 2));
    args.rows = args.stored_rows = plan.rows;
    args.column_tiles = plan.column_tiles;
    args.frame_tiles = plan.frame_tiles;
    args.tiles = plan.tiles;
    args.chunks = plan.chunks;
    args.buffers = plan.buffers;
    args.box_bytes = plan.box_bytes;
    args.buffer_bytes = plan.buffer_bytes;
    args.staged = plan.staging_bytes;
    args.stagings = plan.stagings;
    args.scratch = plan.scratch;
    args.weight_bytes = plan.stages * (plan.resident ? 1 : 2) * kWeightBytes;
    args.stages = plan.stages;
    return dtype == DType::bf16 ? launch_train<__nv_bfloat16, kPass>(plan, maps, args, stream)
                                : launch_train<__half, kPass>(plan, maps, args, stream);
}

}  // namespace p3d
