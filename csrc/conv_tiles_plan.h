// How conv_tiles.cu divides a shape: axes of positions, boxes, tiles, splits. Plain C++, a function of the shape and
// the number of multiprocessors alone, so that runs are equal and the caller can size its buffers.
//
// A step of 64 channels costs a multiprocessor the longest of its products, (rows / 64) columns / 64 times 128 cycles;
// of its bytes, 128 a row and tensor and a column, at about 53 a cycle; and of its read, which a warp of each scheduler
// makes of 512 elements, in `read_cycles`.
#pragma once

#include <algorithm>
#include <cstdint>

#include "conv_infer_plan.h"
#include "p3d.h"

namespace p3d {

constexpr int kTilesStages = 8;

// The tiles there are, and how many blocks fit on a multiprocessor beside each other by their registers.
struct TilesKind {
    int rows, columns, residents;
};
constexpr TilesKind kTilesKinds[] = {{64, 64, 2}, {64, 128, 2}, {128, 128, 1}};

constexpr int tiles_residents(int rows, int columns) {
    for (const TilesKind& kind : kTilesKinds)
        if (kind.rows == rows && kind.columns == columns) return kind.residents;
    return 0;
}

// ---- Positions: axes of those that are rows of the product, and where they lie in a packed tensor of just these
// (near) and in one of which the stride skips some (far).
//   1x1x1              all positions
//   1x1x1 of a stride  w, h, n * T + t
//   3x1x1              h * W + w, t, n; a tile lies within one t, so that a tap is in the clip for all of it or none
struct TilesGrid {
    ConvView near{}, far{};

    explicit TilesGrid(const ConvTilesShape& s) {
        const ConvTrainShape& c = s.conv;
        auto set = [](int64_t (&to)[4], int64_t i0, int64_t i1, int64_t i2) {
            to[0] = i0, to[1] = i1, to[2] = i2, to[3] = 1;
        };
        int64_t frames = c.clips * c.time, height = c.frame / s.width, step = s.stride;
        if (c.taps == 3) {
            set(near.size, c.frame, c.time, c.clips);
            set(near.stride, 1, c.frame, c.time * c.frame);
        } else if (step == 1) {
            set(near.size, frames * c.frame, 1, 1);
            set(near.stride, 1, 1, 1);
        } else {
            int64_t across = (s.width - 1) / step + 1, down = (height - 1) / step + 1;
            set(near.size, across, down, frames);
            set(near.stride, 1, across, across * down);
        }
        far = near;
        if (step > 1) set(far.stride, step, step * s.width, c.frame);
    }

    // The box of a tile of at most so many rows; returns the number of them.
    int64_t boxes(int (&best)[4], int rows, int taps) const {
        int64_t size[4];
        std::copy_n(near.size, 4, size);
        int64_t times = taps == 3 ? size[1] : 1;
        if (taps == 3) size[1] = 1;
        return times * conv_box(best, size, rows);
    }
};

// ---- Shared memory of a block: stages, partial sums (in their place, where no other block sends any), constants of
// the reads, where the rows of the tile lie, barriers.

struct TilesLayout {
    int stage_bytes, weights, staging, constants, rows, barriers, bytes;

    TilesLayout(const ConvInferTile& tile, int stages, int tensors, int constant_bytes)
        : stage_bytes((tile.rows * tensors + tile.columns) * kChunk * 2), weights(tile.rows * tensors * kChunk * 2) {
        int ring = stages * stage_bytes, partials = tile.rows * conv_partial_pitch(tile.columns) * 4;
        staging = tile.splits > 1 ? ring : 0;
        constants = std::max(ring, staging + partials);
        rows = constants + constant_bytes;
        barriers = rows + tile.rows * 16;
        bytes = barriers + 16 * stages + 16;
    }
};

// Tensors that a step brings, and bytes of the constants of a shape's reads.
inline int tiles_tensors(const ConvTilesShape& s) {
    return s.gram || !(s.conv.read == Read::raw || s.conv.read == Read::bn_relu) ? 2 : 1;
}
inline int64_t tiles_constants(const ConvTilesShape& s) {
    int planes = s.conv.read == Read::raw ? 0 : s.conv.read == Read::bn_relu ? 2 : 3;
    return 8 * (s.gram ? planes * s.conv.out_channels + s.conv.in_channels : planes * s.conv.in_channels);
}

// ---- The plan.

inline const char* conv_tiles_sizes_why_not(const ConvTilesShape& s) {
    using Long = long long;
    const ConvTrainShape& c = s.conv;
    const char* op = s.gram ? "gram_tiles" : "conv_tiles";
    if (c.taps != 1 && c.taps != 3) return fail("%s: taps: expected 1 or 3, got %d", op, c.taps);
    for (int64_t size : {c.clips, c.time, c.frame, s.width})
        if (size < 1 || size >= 1 << 30)
            return fail("%s: expected N, T, H * W, W from 1 to 2^30 - 1, got %lld, %lld, %lld, %lld", op, Long(c.clips),
                        Long(c.time), Long(c.frame), Long(s.width));
    if (c.frame % s.width)
        return fail("%s: expected H * W a multiple of W, got %lld, %lld", op, Long(c.frame), Long(s.width));
    if (double(c.clips) * double(c.time) * double(c.frame) > 2147000000.0)
        return fail("%s: expected N T H W below 2^31, got N, T, H * W = %lld, %lld, %lld", op, Long(c.clips),
                    Long(c.time), Long(c.frame));
    if (s.stride < 1 || s.stride > 1 << 15 || (s.stride > 1 && c.taps == 3))
        return fail("%s: stride: expected 1, or more of 1x1x1, got %d", op, s.stride);
    for (int64_t channels : {c.in_channels, c.out_channels})
        if (channels < kChunk || channels % kChunk || channels > 8192)
            return fail("%s: channels: expected multiples of 64 up to 8192, got %lld -> %lld", op, Long(c.in_channels),
                        Long(c.out_channels));
    bool gradient = c.read == Read::bn_bwd || c.read == Read::bn_bwd_open;
    if (c.read != Read::raw && gradient != (c.transposed && !s.gram))
        return fail("%s: read: expected an activation or, of a gradient, one", op);
    if (s.gram && (c.taps != 1 || !c.transposed || c.loads)) return fail("%s: expected the gradient of 1x1x1", op);
    return nullptr;
}

// The plan that finishes first by the account above, in cycles.
inline const char* conv_tiles_plan(ConvInferPlan& best, const ConvTilesShape& s, const ConvInferTile& wish,
                                   int processors) {
    if (const char* reason = conv_tiles_sizes_why_not(s)) return reason;
    const ConvTrainShape& c = s.conv;
    TilesGrid grid(s);
    int64_t chunks = c.in_channels / kChunk + (s.gram ? c.out_channels / kChunk : 0);
    int64_t steps = chunks * std::min<int64_t>(c.taps, c.time),
            fewest = chunks * std::min<int64_t>({c.taps, c.time, 2});
    int tensors = tiles_tensors(s), filled = 0;
    double read_cycles = tensors == 2 ? 330 : c.read == Read::raw ? 0 : 180;
    double best_cost = -1;
    auto unwanted = [](int wished, int value) { return wished && wished != value; };
    int box[4], rows = 0;
    int64_t row_tiles = 0;
    for (const TilesKind& kind : kTilesKinds) {
        if (unwanted(wish.rows, kind.rows) || unwanted(wish.columns, kind.columns)) continue;
        if (c.out_channels % kind.columns) continue;
        if (rows != kind.rows) {
            rows = kind.rows, row_tiles = grid.boxes(box, rows, c.taps);
            filled = box[0] * box[1] * box[2] * box[3];
        }
        for (int splits : {1, 2, 4, 8}) {
            if (unwanted(wish.splits, splits) || splits > fewest) continue;
            int64_t blocks = row_tiles * (c.out_channels / kind.columns) * splits;
            int usable = conv_processors(processors, splits);
            if (blocks > 1 << 30 || (splits > 1 && !wish.splits && blocks > 2 * usable)) continue;
            double share = double(conv_divide(steps, splits)), turns = double(conv_divide(blocks, usable));
            for (int residents = 1; residents <= kind.residents; ++residents) {
                ConvInferTile tile{kind.rows, kind.columns, splits};
                int limit = std::min(kSharedLimit, kProcessorShared / residents - 1024);
                int stages = int(std::max<int64_t>(2, std::min<int64_t>(kTilesStages, int64_t(share))));
                auto bytes = [&] { return TilesLayout(tile, stages, tensors, int(tiles_constants(s))).bytes; };
                while (stages > 2 && bytes() > limit) --stages;
                if (bytes() > limit) continue;
                double active = std::min(double(residents), turns);
                double multiply = kind.rows / 64 * kind.columns / 64 * 128.0, read = kind.rows / 64 * read_cycles;
                double brought = 128.0 * (filled * tensors + kind.columns);
                double rate = 53.4 * std::min(1.29, std::max(1.0, double(processors) / double(blocks)));
                double waited = 1540 / (active * double(stages));
                double alone = active > 1 || kind.rows > 64 ? 0.3 : 1;  // of a read that no products hide
                double step = std::max({multiply + alone * read, brought / rate, read, waited});
                double made = kind.rows * kind.columns, sent = 4 * made * (1 - 1.0 / splits);
                double end =
                    900 + made / splits * (0.07 + 0.03 * c.loads) + (splits > 1 ? 220 + 46 * splits + sent / 5.74 : 0);
                double cost = 2500 + turns * share * step + std::max(1.0, turns / active) * end;
                if (best_cost >= 0 && cost >= best_cost) continue;
                best_cost = cost;
                best.tile = tile;
                std::copy_n(box, 4, best.box);
                best.stages = stages;
                best.blocks = int(blocks);
            }
        }
    }
    if (best_cost < 0)
        return fail("%s: no tile as wished for %lld -> %lld channels whose constants fit in shared memory",
                    s.gram ? "gram_tiles" : "conv_tiles", (long long)c.in_channels, (long long)c.out_channels);
    return nullptr;
}

}  // namespace p3d
