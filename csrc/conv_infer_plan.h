// How conv_infer.cu divides a shape: axes of positions, boxes, tiles, splits, grid. Plain C++, a function of the
// shape and the number of multiprocessors alone, so that runs are equal.
//
// What binds. A multiprocessor multiplies 64 x N x 16 in N / 2 cycles, or in 16 + N / 4 where it waits for shared
// memory. A step of 64 channels brings 128 bytes for each row and column of the tile, and the second-level cache gives
// a multiprocessor about 53 bytes a cycle when all ask: a tile of 128 x 128 multiplies for 512 cycles and waits for
// 614. 128 x 256 takes 1024 and 920. So few large tiles. Two blocks that shared weights, each bringing every other box
// to both, brought fewer bytes and were 1 to 5 % slower.
//
// Few positions leave too few tiles for the card, and a chain of latencies in place of throughput: there 2, 4 or 8
// blocks share a sum, each over a part of the steps, whose boxes are all under way at once. But partial sums travel at
// about 6 bytes a cycle and multiprocessor: those of 64 x 32 in two parts take 700 cycles, of 128 x 128 in four 8600.
//
// The constants of `conv_infer_plan` are fitted to 57 shapes of P3D ResNets at 32, 8 and 1 clips, each measured with
// its likely tiles on an H200, as one launch among others in a graph. What it plans for them is within 2 % of the best
// in sum.
#pragma once

#include <algorithm>
#include <cstdint>

#include "p3d.h"
#include "spatial_plan.h"

namespace p3d {

constexpr int kConvStages = 8, kConvTaps = 9, kConvMaps = 4;
constexpr int kConvBarrierBytes = 16 * kConvStages + 64;
constexpr int kProcessorShared = 228 * 1024;  // of which a block's own use takes 1 KB more than it asks for

// The tiles there are. A tile whose sum is split has no other way to its output.
struct ConvTileKind {
    int rows, columns;
    bool split;
    int residents;  // blocks that fit on a multiprocessor beside each other, by their registers
};
constexpr ConvTileKind kConvTiles[] = {{64, 64, false, 4},   {128, 64, false, 3}, {128, 128, false, 2},
                                       {128, 256, false, 1}, {64, 32, true, 4},   {64, 64, true, 4},
                                       {128, 64, true, 3},   {128, 128, true, 1}};

// Of a ring for a sum of so many steps: a stage is freed by the step after its own, which needs another. A gradient's
// masks are there at once.
constexpr int conv_least_stages(int64_t steps, int masks) { return steps > 1 || masks > 1 ? 2 : 1; }

// What leaves raw leaves partials: the forward pass (statistics, without an affine), or a gradient (sums).
enum class ConvForm { normalised, gradient, raw, raw_gradient };

constexpr bool is_gradient(ConvForm form) { return form == ConvForm::gradient || form == ConvForm::raw_gradient; }
constexpr bool is_raw(ConvForm form) { return form == ConvForm::raw || form == ConvForm::raw_gradient; }

// Blocks that fit; 0: there is no such kernel.
constexpr int conv_residents(int rows, int columns, bool split, ConvForm form) {
    if (form != ConvForm::normalised && (split || (form != ConvForm::raw && columns > 128))) return 0;
    if (is_raw(form) && rows == 128 && columns == 64) return 0;
    for (const ConvTileKind& kind : kConvTiles)
        if (kind.rows == rows && kind.columns == columns && kind.split == split)
            return form == ConvForm::raw_gradient && columns == 128 ? 1 : kind.residents;
    return 0;
}

constexpr int conv_stage_bytes(int rows, int columns) { return (rows + columns) * kChunk * 2; }

// A row of partial sums: 32 bytes longer than its columns, so that four rows share no bank.
constexpr int conv_partial_pitch(int columns) { return columns + 8; }

// Of a whole tile: the affine of its columns, and their totals over the 16 rows of each warp.
constexpr int conv_affine_bytes(int columns, ConvForm form) {
    return columns * (form == ConvForm::raw ? 0 : form == ConvForm::raw_gradient ? 16 : 8);
}
constexpr int conv_totals_bytes(int rows, int columns, ConvForm form) {
    return is_raw(form) ? rows / 16 * (columns + 1) * 8 : 0;
}

// Of partial sums that are received, or of the output and what goes with it.
constexpr int conv_staging_bytes(int rows, int columns, bool split, ConvForm form) {
    return split ? rows * conv_partial_pitch(columns) * 4
                 : rows * columns * 2 + conv_affine_bytes(columns, form) + conv_totals_bytes(rows, columns, form);
}

constexpr int conv_shared_bytes(int rows, int columns, bool split, ConvForm form, int stages) {
    return stages * conv_stage_bytes(rows, columns) + conv_staging_bytes(rows, columns, split, form) +
           kConvBarrierBytes;
}

// ---- Positions.

// A packed or strided tensor by the four axes of the output's positions; lengths in positions.
struct ConvView {
    int64_t offset, size[4], stride[4];
};

struct ConvTap {
    int view, step[3];  // the view of x that it reads, and how far off along the first three axes
};

// The axes of positions and what x is along them:
//   1x1x1              all positions
//   3x1x1              h * W + w, t, n; taps along the second
//   3x1x1 of a stride  w, h, t, n; taps along the third
//   pooled             t, w, h, n, or t, h * W + w, 1, n: both frames of a maximum are neighbours
//   else               w, h, n * T + t; taps along the first two
// A stride skips positions of x. With three taps and stride 2, taps meet even and odd rows and columns: views 0 to 3.
struct ConvGrid {
    int64_t size[4];
    ConvView x[kConvMaps], o, y;
    ConvTap taps[kConvTaps];

    explicit ConvGrid(const ConvInferShape& s) : x{}, o{}, y{}, taps{} {
        int64_t height = (s.height - 1) / s.stride + 1, width = (s.width - 1) / s.stride + 1;
        int64_t frame = s.height * s.width, frames = s.clips * s.time, step = s.stride;
        auto set = [](int64_t (&to)[4], int64_t a, int64_t b, int64_t c, int64_t d) {
            to[0] = a, to[1] = b, to[2] = c, to[3] = d;
        };
        ConvView& first = x[0];
        if (s.pooled_time) {
            int64_t across = s.o_width ? width : frame, down = s.o_width ? height : 1;
            set(size, std::min(s.time, 2 * s.pooled_time), across, down, s.clips);
            set(first.stride, frame, 1, across, s.time * frame);
        } else if (s.taps_space == 1 && s.stride == 1 && s.taps_time == 1 && !s.o_width) {
            set(size, frames * frame, 1, 1, 1);
            set(first.stride, 1, 1, 1, 1);
        } else if (s.taps_time == 3 && s.stride == 1) {
            set(size, frame, s.time, s.clips, 1);
            set(first.stride, 1, frame, s.time * frame, 1);
        } else if (s.taps_time == 3) {
            set(size, width, height, s.time, s.clips);
            set(first.stride, step, step * s.width, frame, s.time * frame);
        } else {
            set(size, width, height, frames, 1);
            set(first.stride, step, step * s.width, frame, 1);
        }
        set(first.size, size[0], size[1], size[2], size[3]);
        set(y.size, size[0], size[1], size[2], size[3]);
        set(y.stride, 1, size[0], size[0] * size[1], size[0] * size[1] * size[2]);
        if (s.pooled_time) {
            y.size[0] = s.pooled_time;
            set(y.stride, frame, 1, y.size[1], s.pooled_time * frame);
        }
        o = s.pooled_time ? first : y;
        if (s.o_width && s.pooled_time)
            set(o.stride, s.o_height * s.o_width, 2, 2 * s.o_width, s.time * s.o_height * s.o_width);
        else if (s.o_width)
            set(o.stride, 2, 2 * s.o_width, s.o_height * s.o_width, 1);
        for (int tap = 0; tap < s.taps_time; ++tap)  // of a gradient in this order, too, with the weights of the other
            if (s.taps_time == 3) taps[tap].step[s.stride == 1 ? 1 : 2] = tap - 1;
        if (s.taps_space == 1) return;
        for (int view = 1; view < kConvMaps && s.stride == 2; ++view) {
            int64_t down = view / 2, across = view % 2;
            x[view] = first;
            x[view].offset = down * s.width + across;
            x[view].size[0] = std::max<int64_t>(1, (s.width - across + 1) / 2);
            x[view].size[1] = std::max<int64_t>(1, (s.height - down + 1) / 2);
        }
        auto along = [&](int tap, int64_t length, int& parity) {  // how far off a tap of three is, in its view
            if (s.stride == 1) return tap - 1;
            parity = tap != 1;
            return parity && length == 1 ? -kOutside : tap / 2 - parity;  // there is no odd row of one
        };
        for (int tap = 0; tap < kConvTaps; ++tap) {
            int down = 0, across = 0;
            taps[tap].step[1] = along(tap / 3, s.height, down);
            taps[tap].step[0] = along(tap % 3, s.width, across);
            taps[tap].view = 2 * down + across;
        }
    }

    static constexpr int kOutside = 1 << 16;
};

inline int64_t conv_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Multiprocessors of which clusters of so many blocks make use: those of 4 and 8 leave some of each group of 16 or 18.
inline int conv_processors(int processors, int splits) {
    return splits > 2 ? std::max(splits, processors * 10 / 11 / splits * splits) : processors;
}

inline ConvForm conv_form(const ConvInferShape& s) {
    if (s.raw) return s.transposed ? ConvForm::raw_gradient : ConvForm::raw;
    return s.transposed ? ConvForm::gradient : ConvForm::normalised;
}

// Whether taps lie along the second axis. One outside the clip for all of a tile is then left out.
inline bool conv_in_time(const ConvInferShape& s) { return s.taps_time == 3 && s.stride == 1; }

// The box of at most `rows` positions, along the first axis a multiple of `multiple`, that needs the fewest tiles, and
// of those the smallest; returns the tiles.
inline int64_t conv_box(int (&best)[4], const int64_t (&size)[4], int64_t rows, int64_t multiple = 1) {
    int64_t fewest = -1, least = 0, most = conv_divide(size[0], multiple) * multiple;
    for (int64_t a = multiple; a <= std::min(rows, most); a += multiple)
        for (int64_t b = 1; b <= std::min(rows / a, size[1]); ++b)
            for (int64_t c = 1; c <= std::min(rows / (a * b), size[2]); ++c) {
                int64_t d = std::min(rows / (a * b * c), size[3]), box = a * b * c * d;
                int64_t tiles = conv_divide(size[0], a) * conv_divide(size[1], b) * conv_divide(size[2], c) *
                                conv_divide(size[3], d);
                if (fewest >= 0 && (tiles > fewest || (tiles == fewest && box > least))) continue;
                fewest = tiles, least = box;
                best[0] = int(a), best[1] = int(b), best[2] = int(c), best[3] = int(d);
            }
    return fewest;
}

// ---- The plan.

inline const char* conv_infer_sizes_why_not(const ConvInferShape& s) {
    using Long = long long;
    bool taps = (s.taps_time == 1 || s.taps_time == 3) && (s.taps_space == 1 || s.taps_space == 3);
    if (!taps || s.taps_time * s.taps_space == 9)
        return fail("conv_infer: taps: expected 1x1x1, 3x1x1 or 1x3x3, got %dx%dx%d", s.taps_time, s.taps_space,
                    s.taps_space);
    if (s.stride < 1 || s.stride > (s.taps_space == 3 ? 2 : 1 << 15))
        return fail("conv_infer: stride: expected 1 or 2, or more of one tap in space, got %d", s.stride);
    if (const char* reason = clip_sizes_why_not("conv_infer", s)) return reason;
    for (int64_t channels : {s.in_channels, s.out_channels})
        if (channels < kChunk || channels % kChunk || channels > 16384)
            return fail("conv_infer: channels: expected multiples of 64 up to 16384, got %lld -> %lld",
                        Long(s.in_channels), Long(s.out_channels));
    bool pointwise = s.taps_time * s.taps_space == 1 && s.stride == 1 && s.joined;
    bool packed = !s.o_height && !s.o_width, twice = s.o_height >= 1 && s.o_width >= 1;
    twice = twice && (s.o_height + 1) / 2 == s.height && (s.o_width + 1) / 2 == s.width;
    if (!packed && !(pointwise && twice))
        return fail("conv_infer: o: expected twice H, W = %lld, %lld of 1x1x1, stride 1, with o, got %lld, %lld",
                    Long(s.height), Long(s.width), Long(s.o_height), Long(s.o_width));
    if (s.pooled_time &&
        (!pointwise || s.pooled_time < 1 || 2 * s.pooled_time < s.time - 1 || 2 * s.pooled_time > s.time + 1))
        return fail("conv_infer: pooled_time: expected half of T = %lld and 1x1x1, stride 1, with o, got %lld",
                    Long(s.time), Long(s.pooled_time));
    return nullptr;
}

// The plan that finishes first by the account above, in cycles. What is pooled, or an o that is strided, changes no
// bit: sums are split as without.
inline const char* conv_infer_plan(ConvInferPlan& best, const ConvInferShape& s, ConvInferTile wish, int processors) {
    if (const char* reason = conv_infer_sizes_why_not(s)) return reason;
    if ((s.pooled_time || s.o_width) && !wish.splits) {
        ConvInferShape plain = s;
        plain.pooled_time = plain.o_height = plain.o_width = 0;
        if (const char* reason = conv_infer_plan(best, plain, wish, processors)) return reason;
        wish.splits = best.tile.splits;
    }
    ConvGrid grid(s);
    ConvForm form = conv_form(s);
    int64_t chunks = s.in_channels / kChunk, taps = s.taps_time * s.taps_space * s.taps_space;
    bool in_time = conv_in_time(s);
    int64_t fewest = chunks * (in_time ? std::min<int64_t>(2, s.time) : taps);
    double best_cost = -1;
    auto unwanted = [](int wished, int value) { return wished && wished != value; };
    for (const ConvTileKind& kind : kConvTiles) {
        if (unwanted(wish.rows, kind.rows) || unwanted(wish.columns, kind.columns)) continue;
        int most = conv_residents(kind.rows, kind.columns, kind.split, form);
        if (s.out_channels % kind.columns || most == 0) continue;
        int64_t column_tiles = s.out_channels / kind.columns;
        for (bool one_frame : {false, true}) {  // in a tile, which then leaves out most taps
            if (one_frame && !in_time) continue;
            int64_t size[4];
            std::copy_n(grid.size, 4, size);
            if (one_frame) size[1] = 1;
            int box[4];
            int64_t row_tiles = conv_box(box, size, kind.rows, s.pooled_time ? 2 : 1) * (one_frame ? grid.size[1] : 1);
            int filled = box[0] * box[1] * box[2] * box[3];
            int64_t steps = chunks * (in_time && box[1] == 1 ? std::min<int64_t>(3, s.time) : taps);
            for (int splits : {1, 2, 4, 8}) {
                if (unwanted(wish.splits, splits) || kind.split != (splits > 1) || splits > fewest) continue;
                int usable = conv_processors(processors, splits);
                int64_t blocks = row_tiles * column_tiles * splits;
                if (blocks > 1 << 30 || (kind.split && !wish.splits && blocks > 2 * usable)) continue;
                double share = double(conv_divide(steps, splits)), turns = double(conv_divide(blocks, usable));
                // Beside a split tile there is room for one of the next kernel, which fetches its weights meanwhile.
                for (int residents = std::min(most, 1 + kind.split); residents <= most; ++residents) {
                    int limit = std::min(kSharedLimit, kProcessorShared / residents - 1024);
                    int64_t least = conv_least_stages(int64_t(share), s.masks);
                    int64_t stages = std::min<int64_t>(kConvStages, kind.split ? share : share * turns);
                    stages = std::max(stages, least);
                    auto bytes = [&] {
                        return conv_shared_bytes(kind.rows, kind.columns, kind.split, form, int(stages));
                    };
                    while (stages > least && bytes() > limit) --stages;
                    if (bytes() > limit) continue;
                    double active = std::min(double(residents), turns);
                    double rate = 53.4 * std::min(1.29, std::max(1.0, double(processors) / double(blocks)));
                    double multiply = kind.rows / 16 * std::max(kind.columns / 2, 16 + kind.columns / 4);
                    double brought = 128.0 * (filled + kind.columns), taken = brought / 60;
                    double waited = 1540 / (active * double(stages));
                    double output = 2.0 * filled * kind.columns * (1 + s.joined + s.masks) / splits;
                    double body = turns * std::max({share * multiply, (share * brought + output) / rate, share * taken,
                                                    share * waited});
                    double made = kind.rows * kind.columns, sent = 4 * made * (1 - 1.0 / splits);
                    double end = kind.split ? 220 + 46 * splits + sent / 5.74 : 467 + 5.2 * made / 128;
                    double cost = 1500 + body + std::max(1.0, turns / active) * end;
                    if (best_cost >= 0 && cost >= best_cost) continue;
                    best_cost = cost;
                    best.tile = {kind.rows, kind.columns, splits};
                    std::copy_n(box, 4, best.box);
                    best.stages = int(stages);
                    best.blocks = int(kind.split ? blocks : std::min(blocks, int64_t(processors) * residents));
                }
            }
        }
    }
    if (best_cost < 0)
        return fail("conv_infer: tile: expected one that there is for %lld channels and %lld steps, got %d x %d",
                    (long long)s.out_channels, (long long)(chunks * taps), wish.rows, wish.columns);
    return nullptr;
}

}  // namespace p3d
