// How spatial_kernel.cuh divides a shape: tile size, ring sizes, grid. Plain C++, a function of the shape and the
// number of multiprocessors alone, so that runs are equal and the caller can size its buffers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>

#include "p3d.h"

namespace p3d {

constexpr int kTaps = 9;
constexpr int kChunk = 64;                         // channels of a halo tile, couts of a warpgroup
constexpr int kWeightBytes = kChunk * kChunk * 2;  // one tap, one chunk, one warpgroup
constexpr int kStaged = 64;                        // positions staged at a time on their way out
constexpr int kStageBytes = kStaged * kChunk * 2;  // per consumer warpgroup
constexpr int kMaxStages = 12, kMaxBuffers = 3;    // of weights, of halo tiles
constexpr int kBarrierBytes = 2 * 8 * (kMaxStages + kMaxBuffers);
constexpr int kSharedLimit = 227 * 1024;  // of a block on compute capability 9.0

// Which pass a kernel is of. The input gradient is a convolution too: its weights enter transposed, taps reversed.
enum class Pass { forward, gradient };

// N of the kernels there are, those of the gradient up to the first zero. Its blocks have 512 threads, for which ptxas
// takes no wider product than 200.
constexpr int kResidentSizes[2][4] = {{208, 160, 128, 64}, {136, 64}};
constexpr int kStreamedSizes[2][4] = {{160, 120, 80, 48}, {144, 80, 48}};

struct SpatialPlan {
    int positions;            // N of the matrix instruction
    bool resident;            // all weights stay in shared memory
    int buffers, stages;      // halo tiles, weight stages
    int plane, halo, tiles;   // bytes of a plane, positions of a halo tile, tiles in all
    int blocks, cout_blocks;  // the grid
    int shared;               // bytes
    int processors;           // planned for
    int64_t cost;             // cycles, about
};

// A message with its values; valid until the thread's next.
template <typename... Values>
inline const char* fail(const char* format, Values... values) {
    thread_local char message[256];
    std::snprintf(message, sizeof message, format, values...);
    return message;
}

// Why no kernel takes positions [N, T, H, W] of a shape, `most` of them or, in words, `limit`; nullptr if one does.
template <typename Shape>
inline const char* clip_sizes_why_not(const char* op, const Shape& s, double most = 2147000000.0,
                                      const char* limit = "below 2^31") {
    long long n = s.clips, t = s.time, h = s.height, w = s.width;
    if (std::min({n, t, h, w}) < 1 || std::max({n, t, h, w}) >= 1 << 30)
        return fail("%s: expected N, T, H, W from 1 to 2^30 - 1, got %lld, %lld, %lld, %lld", op, n, t, h, w);
    if (double(n) * double(t) * double(h) * double(w) > most)
        return fail("%s: expected N T H W %s, got N, T, H, W = %lld, %lld, %lld, %lld", op, limit, n, t, h, w);
    return nullptr;
}

// How spatial_infer.cuh divides a shape. A tile is some rows of one frame. N of its kernels, streamed and resident:
constexpr int kBoxSizes[2][4] = {{216, 112, 64, 48}, {216, 208, 128, 64}};
constexpr int kTemporalSizes[] = {208, 112, 64};  // of T, resident
constexpr int kMaxBoxes = 6;                      // halo tiles

struct BoxPlan {
    int positions;                         // N of the matrix instruction
    bool resident;                         // all weights of a block's couts stay in shared memory
    int stages;                            // of weights; resident: their boxes
    int taps;                              // 9, or 3 of T
    int pitch;                             // columns of a box
    int rows;                              // of a tile
    int column_tiles, frame_tiles, tiles;  // side by side, of a frame, in all
    int stored_rows;                       // at a time, a divisor of rows
    int chunks, buffers;                   // of 64 input channels; halo tiles
    int box_bytes, buffer_bytes;           // of a halo tile: as copied, and with what is read past that
    int staging_bytes;
    int blocks, cout_blocks;  // the grid
    int shared;               // bytes
    int64_t cost;             // cycles, about
};

// Why no kernel takes these sizes, whatever its tile; nullptr if they are in order.
inline const char* sizes_why_not(const char* op, const ConvShape& s) {
    using Long = long long;
    if (std::min({s.frames, s.height, s.width}) < 1 || std::max({s.frames, s.height, s.width}) >= 1 << 30)
        return fail("%s: frames, height, width: expected 1 to 2^30 - 1, got %lld, %lld, %lld", op, Long(s.frames),
                    Long(s.height), Long(s.width));
    if (double(s.frames) * double(s.height + 1) * double(s.width + 1) > 2147400000.0)
        return fail("%s: expected F (H + 1) (W + 1) below 2^31, got F, H, W = %lld, %lld, %lld", op, Long(s.frames),
                    Long(s.height), Long(s.width));
    for (int64_t channels : {s.in_channels, s.out_channels})
        if (channels < kChunk || channels % kChunk || channels > 65536)
            return fail("%s: channels: expected multiples of 64 up to 65536, got %lld -> %lld", op, Long(s.in_channels),
                        Long(s.out_channels));
    return nullptr;
}

// Whether a tile of N positions a warpgroup fits in shared memory; the rest of it becomes halo tiles, then stages.
inline bool fits(SpatialPlan& plan, const ConvShape& s, int n, bool resident) {
    int tile = resident ? 2 * n : n;
    int64_t halo = tile + 2 * (s.width + 2);
    if (halo > 4096) return false;
    plan.positions = n;
    plan.resident = resident;
    plan.halo = int(halo);
    plan.plane = (plan.halo * 16 + 127) / 128 * 128 + 16;
    int weights = resident ? kWeightBytes : 2 * kWeightBytes, least = resident ? kTaps : 4;
    int room = kSharedLimit - 2 * kStageBytes - kBarrierBytes - least * weights;
    plan.buffers = std::min(kMaxBuffers, room / (8 * plan.plane));
    if (plan.buffers < 2) return false;
    room -= plan.buffers * 8 * plan.plane;
    plan.stages = resident ? kTaps : std::min(kMaxStages, least + room / weights);
    plan.shared = kSharedLimit - room + (plan.stages - least) * weights;
    int64_t outputs = s.frames * (s.height + 1) * (s.width + 1) - (s.width + 2);  // from the first pixel to the end
    plan.tiles = int((outputs + tile - 1) / tile);
    return true;
}

// The tile size that finishes first, or why there is none. A matrix instruction takes N / 2 cycles, or longer where it
// waits for its operands: 2 KB of weights and 32 N bytes of x at 128 bytes a cycle.
inline const char* spatial_plan(SpatialPlan& best, const ConvShape& s, Pass pass, int processors) {
    if (const char* reason = sizes_why_not("spatial_conv", s)) return reason;

    bool resident = s.in_channels == kChunk && s.out_channels == kChunk;
    int64_t best_cost = -1;
    auto consider = [&](int n) {
        SpatialPlan plan{};
        plan.processors = processors;
        if (n == 0 || !fits(plan, s, n, resident)) return;
        plan.cout_blocks = resident ? 1 : int((s.out_channels + 127) / 128);
        plan.blocks = std::min(plan.tiles, std::max(1, processors / plan.cout_blocks));
        int64_t turns = (plan.tiles + plan.blocks - 1) / plan.blocks, steps = s.in_channels / 16 * kTaps;
        int64_t overhead = resident ? 500 : 1000 + 8 * n;  // what the other warpgroup does not hide
        int64_t cost = turns * (2 * steps * std::max(n / 2, 16 + n / 4) + overhead);
        plan.cost = cost;
        if (best_cost < 0 || cost < best_cost) best_cost = cost, best = plan;
    };
    if (resident)
        for (int n : kResidentSizes[int(pass)]) consider(n);
    else
        for (int n : kStreamedSizes[int(pass)]) consider(n);
    if (best_cost < 0)
        return fail("spatial_conv: width: expected rows that fit in shared memory, got %lld", (long long)s.width);
    return nullptr;
}

inline int64_t parts(int64_t whole, int64_t most) { return (whole + most - 1) / most; }
inline int64_t round_up(int64_t v, int64_t unit) { return parts(v, unit) * unit; }

// Divides a shape into tiles of at most N positions, if their rows are no longer. T, of three taps, has clips, time and
// frame for frames, height and width.
inline bool divide(BoxPlan& plan, const ConvShape& s, int taps, int n, bool resident) {
    int64_t chunks = s.in_channels / kChunk, pitch = s.width + 1, column_tiles = 1;
    if (taps != kTaps) {
        column_tiles = parts(s.width, n / std::min<int64_t>(s.height, 8));
        pitch = parts(s.width, column_tiles);
    }
    if (n < pitch || (resident && chunks * taps * kWeightBytes > kSharedLimit)) return false;
    int64_t lines = parts(s.height, std::min(s.height, n / pitch));
    if (double(s.frames) * double(lines) * double(column_tiles) > 1 << 30) return false;
    int64_t channels = std::max(s.in_channels, s.out_channels);
    if (double(channels) * double(s.height) * double(s.width) > 5e11) return false;  // strides of a map are below 2^40
    plan.positions = n;
    plan.resident = resident;
    plan.chunks = int(chunks);
    plan.taps = taps;
    plan.pitch = int(pitch);
    plan.rows = int(parts(s.height, lines));
    plan.column_tiles = int(column_tiles);
    plan.frame_tiles = int(lines * column_tiles);
    plan.tiles = int(s.frames * plan.frame_tiles);
    plan.box_bytes = int((plan.rows + 2) * pitch * 2 * kChunk);
    int64_t halo = std::max<int64_t>(n + 2 * pitch + 2, (plan.rows + 2) * pitch + 1);
    plan.buffer_bytes = int(round_up(halo * 2 * kChunk, 1024));
    return true;
}

// Whether tiles of N positions fit in shared memory, with as few stores a tile as leave room for two halo tiles.
inline bool fits(BoxPlan& plan, const ConvShape& s, int taps, int n, bool resident) {
    if (!divide(plan, s, taps, n, resident)) return false;
    int stage = (resident ? 1 : 2) * kWeightBytes, staging = resident ? 1 : 2;
    plan.stages = resident ? plan.chunks * taps : 4;
    int fixed = plan.stages * stage + 16 * (1 + kMaxBoxes + (resident ? plan.stages : kMaxStages));
    for (plan.stored_rows = plan.rows; plan.stored_rows > 0; --plan.stored_rows) {
        if (plan.rows % plan.stored_rows) continue;
        // 8 rows of staging take what is not to be stored.
        plan.staging_bytes = int(round_up(plan.stored_rows * plan.pitch + 7, 8) + 8) * 2 * kChunk;
        int room = kSharedLimit - fixed - staging * plan.staging_bytes;
        plan.buffers = std::min(resident ? kMaxBoxes : kMaxBuffers, room / plan.buffer_bytes);
        room -= plan.buffers * plan.buffer_bytes;
        if (plan.buffers < 2) continue;
        if (!resident) plan.stages = std::min(kMaxStages, plan.stages + room / stage);
        plan.shared = fixed + staging * plan.staging_bytes + plan.buffers * plan.buffer_bytes;
        if (!resident) plan.shared += (plan.stages - 4) * stage;
        return true;
    }
    return false;
}

// The rows of a tile that finish first; false if spatial_infer.cuh has no kernel for the shape.
inline bool box_plan(BoxPlan& best, const ConvShape& s, int taps, int processors) {
    bool found = false;
    auto consider = [&](int n, bool resident) {
        BoxPlan plan{};
        if (!fits(plan, s, taps, n, resident)) return;
        int team = resident ? 1 : 2;  // blocks of a cluster, warpgroups that share a tile
        plan.cout_blocks = int(s.out_channels / kChunk) / team;
        int most = std::max(1, processors / plan.cout_blocks / team) * team;
        plan.blocks = std::min((plan.tiles + team - 1) / team * team, most);
        // Where little of the card is busy, nothing else runs while two blocks wait for each other.
        if (!resident && 4 * plan.blocks * plan.cout_blocks < 3 * processors) return;
        int64_t turns = (plan.tiles + plan.blocks - 1) / plan.blocks;
        int64_t product = int64_t(team) * plan.chunks * taps * 4 * std::max(n / 2, 16 + n / 4);
        plan.cost = resident ? turns * product + 500 : turns * (product + 1000);  // what no product hides
        if (!found || plan.cost < best.cost) best = plan, found = true;
    };
    if (taps != kTaps) {
        for (int n : kTemporalSizes) consider(n, true);
        return found;
    }
    for (int n : kBoxSizes[1]) consider(n, true);
    if (s.out_channels % (2 * kChunk) == 0)
        for (int n : kBoxSizes[0]) consider(n, false);
    return found;
}

// How spatial_train.cuh divides a shape. Its blocks have 512 threads, like those of the gradient above. N of its
// kernels, streamed, resident and by halves:
constexpr int kSpatialTrainSizes[3][4] = {{112, 64, 32}, {168, 152, 112, 64}, {112, 72}};

struct SpatialTrainPlan : BoxPlan {
    bool halves;  // neither resident nor streamed
    int frames;   // of a tile; of several, the rows are H
    int stagings;
    int scratch;  // bytes
};

// What barriers take: four of each staging, three of a halo tile, two of weights.
inline int spatial_train_barrier_bytes(int stages) { return 64 + 24 * kMaxBuffers + 16 * stages; }

// Whether tiles of N positions fit in shared memory. What is left goes to a staging for each warpgroup that stores,
// halo tiles and stages of weights, in this order.
inline bool fits(SpatialTrainPlan& plan, const ConvShape& s, int n, bool resident, bool halves) {
    if (n == 0 || !divide(plan, s, kTaps, n, resident)) return false;
    plan.halves = halves;
    plan.frames = 1;
    if (halves) {
        if (plan.chunks % 2) return false;
        int64_t frame = (s.height + 1) * plan.pitch;  // positions, with the zero row
        plan.frames = int(std::min<int64_t>(std::max<int64_t>(n / frame, 1), s.frames));
        if (plan.frames > 1) {
            plan.tiles = int(parts(s.frames, plan.frames));
            plan.box_bytes = int(plan.frames * frame * 2 * kChunk);
        }
        plan.buffer_bytes *= 2;
    }
    int stage = (resident ? 1 : 2) * kWeightBytes, most = resident ? plan.chunks * kTaps : kMaxStages;
    plan.stages = resident ? most : 4;
    plan.stored_rows = plan.rows;
    plan.staging_bytes = n * 2 * kChunk;
    plan.stagings = resident || halves ? 1 : 2;
    plan.scratch = halves ? n / 2 * 128 * 4 : 0;  // the sums of a warpgroup
    plan.buffers = 2;
    int room = kSharedLimit - spatial_train_barrier_bytes(most) - plan.stages * stage - plan.scratch -
               plan.stagings * plan.staging_bytes - plan.buffers * plan.buffer_bytes;
    if (room < 0) return false;
    auto add = [&](int& count, int limit, int bytes) {
        for (; count < limit && room >= bytes; ++count) room -= bytes;
    };
    add(plan.stagings, halves ? 1 : 2, plan.staging_bytes);
    add(plan.buffers, kMaxBuffers, plan.buffer_bytes);
    add(plan.stages, most, stage);
    plan.shared = kSharedLimit - room;
    return true;
}

// The rows of a tile that finish first; false if spatial_train.cuh has no kernel for the shape. Products, and all that
// goes through shared memory at 128 bytes a cycle, overlap: operands as above; a halo tile, which is copied and of the
// forward pass finished in place; streamed weights; what is staged.
inline bool spatial_train_plan(SpatialTrainPlan& best, const ConvShape& s, Pass pass, int processors) {
    bool found = false, gradient = pass == Pass::gradient;
    auto consider = [&](int n, bool resident, bool halves = false) {
        SpatialTrainPlan plan{};
        if (!fits(plan, s, n, resident, halves)) return;
        int team = resident ? 1 : 2;  // as in box_plan
        plan.cout_blocks = int(s.out_channels / kChunk) / (halves ? 1 : team);
        int most = std::max(1, processors / plan.cout_blocks / team) * team;
        plan.blocks = std::min((plan.tiles + team - 1) / team * team, most);
        if (!resident && 4 * plan.blocks * plan.cout_blocks < 3 * processors) return;
        int64_t turns = (plan.tiles + plan.blocks - 1) / plan.blocks, each = halves ? 1 : team;  // warpgroups a chunk
        int64_t steps = each * plan.chunks * kTaps * 4, product = steps * (n / 2);
        int64_t halo = plan.box_bytes / 128 * (gradient ? 1 : 3),
                weights = resident ? 0 : kTaps * each * kWeightBytes / 128;
        int64_t memory = steps * (16 + n / 4) + plan.chunks * (halo + weights) + each * n * (gradient ? 4 : 2) +
                         2 * plan.scratch / 128;
        plan.cost = turns * (std::max(product, memory) + (resident ? 0 : 1000)) + 500;
        if (!found || plan.cost < best.cost) best = plan, found = true;
    };
    for (int n : kSpatialTrainSizes[1]) consider(n, true);
    if (s.out_channels % (2 * kChunk) == 0)
        for (int n : kSpatialTrainSizes[0]) consider(n, false);
    for (int n : kSpatialTrainSizes[2]) consider(n, false, true);
    return found;
}

}  // namespace p3d
