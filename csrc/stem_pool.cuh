// How the kernels that convolve and pool in one pass divide a clip (stem_infer.cu, stem_fwd.cu): a block owns strips of
// pooled rows of a pair of frames and a tile of columns.
#pragma once

#include <algorithm>

#include "stem_tile.cuh"

namespace p3d {

struct PoolItem;

struct PoolArgs : ClipArgs {
    using Item = PoolItem;
    bool padded;
    int out_height, out_width;  // of the convolution
    int pairs;                  // of frames of a clip
    int pooled_frames, pooled_height, pooled_width;
    int strip, strips, tile,
        tiles;  // pooled rows of a strip, strips of a frame, pooled columns of a tile, tiles of a row
    int items;  // a strip of a tile of a pair of frames each
};

struct PoolItem {
    int clip, frame;        // the first of two, the second perhaps the same
    int pooled_row, count;  // first pooled row, pooled rows
    int row;                // first row of the convolution; -1 is above it
    int pooled_column;      // first pooled column
    int column;             // of the convolution: first of the tile, a multiple of 4

    __device__ __forceinline__ PoolItem(const PoolArgs& a, int index) {
        int tile = index % a.tiles, rest = index / a.tiles;
        int strip = rest % a.strips, pair = rest / a.strips;
        clip = pair / a.pairs;
        frame = 2 * (pair % a.pairs);
        pooled_row = strip * a.strip;
        count = min(a.strip, a.pooled_height - pooled_row);
        row = 2 * pooled_row - a.padded;
        pooled_column = tile * a.tile;
        column = 2 * pooled_column - (a.padded && tile ? 4 : 0);
    }
    __device__ __forceinline__ int stages() const { return 2 * count + 4; }  // of 2 count + 1 rows
    __device__ __forceinline__ Cursor cursor(const PoolArgs& a, int warp, int group) const {
        int image = min(frame + warp % 2, a.frames - 1);  // a cut window has one frame, seen twice
        return {a, clip, image, 2 * row - 3 + warp / 2, 2 * column + 8 * group};
    }
    __device__ __forceinline__ int skip() const { return pooled_column - column / 2; }  // pooled columns of the tile
    __device__ __forceinline__ int columns(const PoolArgs& a) const {                   // pooled, after those
        return min(a.tile, a.pooled_width - pooled_column);
    }
    // Where its pooled output begins, in positions.
    __device__ __forceinline__ int64_t position(const PoolArgs& a) const {
        int64_t row = (int64_t(clip) * a.pooled_frames + frame / 2) * a.pooled_height + pooled_row;
        return row * a.pooled_width + pooled_column;
    }
};

// ---- Host.

struct PoolPlan {
    int out_height, out_width, pairs, pooled_frames, pooled_height, pooled_width;
    int columns;  // N
    int strip, strips, tile, tiles, items, blocks;
};

// The sizes of the convolution and the pool, the tile and the strip that finish first; or why the kernel `op` has none.
// A row takes the matrix unit as long as its columns, and an item as long as its rows and some more until its first
// products. `all_frames`: a last frame that the pool drops is a pair, too.
inline const char* pool_plan(PoolPlan& best, const char* op, const StemShape& s, bool all_frames) {
    int processors;
    if (const char* error = count_processors(processors)) return error;
    StemSizes sizes;
    if (const char* reason = stem_sizes(sizes, op, s)) return reason;
    auto [height, width, pooled_frames, pooled_height, pooled_width] = sizes;
    int64_t pairs = all_frames ? (s.frames + 1) / 2 : pooled_frames;

    double best_cost = -1;
    for (int n : {56, 64, 80}) {
        if (n > 56 && s.channels > 3) continue;
        int64_t tile = width <= n ? pooled_width : (n - 4) / 2, tiles = (pooled_width + tile - 1) / tile;
        for (int64_t strips = 1; strips <= pooled_height; ++strips) {
            int64_t strip = (pooled_height + strips - 1) / strips;
            if ((pooled_height + strip - 1) / strip != strips) continue;
            double items = double(s.clips) * double(pairs * strips * tiles);
            if (items > 2147000000.0) break;
            double turns = double((int64_t(items) + 2 * processors - 1) / (2 * processors));
            double cost = turns * double(2 * strip + 5) * (n + 8);
            if (best_cost >= 0 && cost >= best_cost) continue;
            best_cost = cost;
            best = {int(height),       int(width), int(pairs), int(pooled_frames), int(pooled_height),
                    int(pooled_width), n,          int(strip), int(strips),        int(tile),
                    int(tiles),        int(items), 0};
            best.blocks = std::min(best.items, 2 * processors);
        }
    }
    return best_cost < 0 ? fail("%s: expected fewer than 2^31 tiles", op) : nullptr;
}

inline void pool_args(PoolArgs& a, const PoolPlan& plan, bool padded) {
    a.padded = padded;
    a.out_height = plan.out_height;
    a.out_width = plan.out_width;
    a.pairs = plan.pairs;
    a.pooled_frames = plan.pooled_frames;
    a.pooled_height = plan.pooled_height;
    a.pooled_width = plan.pooled_width;
    a.strip = plan.strip;
    a.strips = plan.strips;
    a.tile = plan.tile;
    a.tiles = plan.tiles;
    a.items = plan.items;
}

}  // namespace p3d
