// The weight gradient of the stem's convolution in one pass over the clip and the pooled gradient. The raw output z,
// which dz needs, is computed again, so that nobody has to keep it (docs/derivations.md weighs the ways).
//
// stem_tile.cuh says how the clip is read and multiplied; a stage has four rows of one frame. A tile is two rows of
// outputs, 2 r of stages r, r + 1 and 2 r + 1 of stages r, r + 1 and the first row of r + 2. A block takes consecutive
// tiles, cut into items where a frame or a tile of columns ends. Its four warpgroups are a pipeline:
//
//     produce     the clip, from memory to chunks in shared memory
//     route       r, the gradient as the pool sends it to positions, packed, [row][position][64]
//     form        z = W X, bit for bit as in the forward; then dz / scale = r - c0 - (z - mean) c1 in place of r
//     accumulate  D[cout, k] += dz[position, cout] X[position, k]
//
// In the last product couts are the rows of the matrix unit, positions its steps. The chunk of an output is 16 bytes:
// its window in one row and channel, and a pixel before it that is no tap. So k counts (row of the window, channel,
// pixel of the chunk), and the chunks of a row are an N-major operand whose next 8 columns are the next channel or row:
// the first product's operand, read across. Rows of dz have 128 bytes, swizzled.
//
// A thread of `route` has 4 couts of some cells of 2 x 2 positions, side by side. The pool's windows, 3 x 3 and two
// apart, cover such a cell by two in each direction, A and B = A + 1. Its even positions (counted from the pool's
// padding: the first ones, or if padded the last) are tap 2 of A and tap 0 of B, the odd are tap 1 of B, or if padded
// of A. Windows B of a tile are windows A of the tile below.
#include <algorithm>

#include "p3d.h"
#include "stem_tile.cuh"

namespace p3d {
namespace {

constexpr int kWgradThreads = 4 * 128;

template <int kChannels, int kColumns>
struct WgradTile : StemTile<kChannels, kColumns, 1, 0, 0> {
    using Base = StemTile<kChannels, kColumns, 1, 0, 0>;
    static constexpr int kGradientRow = kColumns * kCouts * 2, kGradient = 2 * kGradientRow;
    static constexpr int kTiles = kChannels < 4 ? 4 : 3;  // of r and dz
    static constexpr int kStaging = kTiles * kGradient;
    static constexpr int kRepeated = 5;  // output row 2 r + 1 of the last stage
    static constexpr int kRoom = kSharedLimit - kStaging - kRepeated * Base::kRow - Base::kZeros - 8 * 16 - kTiles * 24;
    static constexpr int kStages = std::min(8, kRoom / Base::kStage);
    static constexpr int kShared = kSharedLimit - kRoom + kStages * Base::kStage;
    static constexpr int kClipRegisters = kChannels < 4 ? 104 : 80, kRouteRegisters = kChannels < 4 ? 120 : 112;
    static constexpr int kFormRegisters = 168, kSumRegisters = kChannels < 4 ? 120 : 152;
    static_assert(128 * (kClipRegisters + kRouteRegisters + kFormRegisters + kSumRegisters) <= 65536, "registers");
    static_assert(kStages >= 6, "an item ends in three stages that are still in use when the next one begins");
    static_assert(kColumns % 16 == 0, "positions of a step");
    static_assert(kGradientRow % 1024 == 0, "the swizzle repeats every 1024 bytes");
};

// Barriers of a tile of the gradient: its r is there, its dz is there, it is free.
template <typename Tile>
struct WgradShared : StemShared<Tile> {
    using StemShared<Tile>::StemShared;
    __device__ __forceinline__ uint32_t gradient(int i) const { return this->staging + i * Tile::kGradient; }
    __device__ __forceinline__ uint32_t routed(int i) const { return this->barriers + Tile::kStages * 16 + 24 * i; }
    __device__ __forceinline__ uint32_t formed(int i) const { return routed(i) + 8; }
    __device__ __forceinline__ uint32_t emptied(int i) const { return routed(i) + 16; }
};

struct WgradItem;

struct StemWgradArgs : ClipArgs {
    using Item = WgradItem;
    const char* g;
    const uint8_t* tap;
    const void* w;
    const float* record;
    const float* sums;
    float* partials;
    PixelType w_type;
    bool padded;
    int out_height, out_width, pooled_frames, pooled_height, pooled_width;
    int tile;                                          // columns
    int row_tiles, column_tiles, tiles, turns, items;  // turns: tiles of a block; items: of all blocks, some empty
};

struct WgradItem {
    int image;  // clip * frames + frame
    int row, pairs, rows;
    int column, columns;

    // Of block b, item i is number i * blocks + b: what it has of the i-th strip of a frame that it reaches.
    __device__ __forceinline__ WgradItem(const StemWgradArgs& a, int index) {
        int turn = index / gridDim.x, start = index % gridDim.x * a.turns;
        int before = start % a.row_tiles, strip = start / a.row_tiles + turn;
        int first = max(0, turn * a.row_tiles - before);
        pairs = min(min(a.turns, a.tiles - start), (turn + 1) * a.row_tiles - before) - first;
        row = 2 * (before + first - turn * a.row_tiles);
        rows = min(2 * pairs, a.out_height - row);
        column = strip % a.column_tiles * a.tile;
        columns = min(a.tile, a.out_width - column);
        image = strip / a.column_tiles;
    }
    __device__ __forceinline__ bool empty() const { return pairs <= 0; }
    __device__ __forceinline__ int stages() const { return empty() ? 0 : pairs + 2; }
    __device__ __forceinline__ Cursor cursor(const StemWgradArgs& a, int warp, int group) const {
        return {a, image / a.frames, image % a.frames, 2 * row - 3 + warp, 2 * column + 8 * group};
    }
};

// ---- What the pool sends back.

// Of one row of windows: g of 4 couts and their taps, of a thread's windows.
template <int kCount>
struct Windows {
    uint2 g[kCount];
    uint32_t tap[kCount];
};

// Where the windows of a thread lie. `first`: the column of the first, perhaps outside, as rows may be.
struct WindowPlace {
    const char* g;
    const uint8_t* tap;
    int first;
    bool real;  // the pool has this frame

    __device__ __forceinline__ WindowPlace(const StemWgradArgs& a, const WgradItem& item, int first, int cout)
        : first(first) {
        int frame = item.image % a.frames / 2;
        real = frame < a.pooled_frames;
        int64_t row = (int64_t(item.image / a.frames) * a.pooled_frames + frame) * a.pooled_height;
        int64_t at = (row * a.pooled_width + first) * kCouts + cout;
        g = a.g + 2 * at;
        tap = a.tap + at;
    }
    template <int kCount>
    __device__ __forceinline__ void load(Windows<kCount>& out, const StemWgradArgs& a, int row) const {
        int64_t at = int64_t(row) * a.pooled_width * kCouts;
        const char* g_row = g + 2 * at;
        const uint8_t* tap_row = tap + at;
        bool inside = real && unsigned(row) < unsigned(a.pooled_height);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            out.g[i] = uint2{}, out.tap[i] = ~0u;
            if (inside && unsigned(first + i) < unsigned(a.pooled_width)) {
                out.g[i] = __ldg(reinterpret_cast<const uint2*>(g_row + i * 2 * kCouts));
                out.tap[i] = __ldg(reinterpret_cast<const uint32_t*>(tap_row + i * kCouts));
            }
        }
    }
};

template <typename T>
__device__ __forceinline__ uint32_t add_pairs(uint32_t a, uint32_t b) {
    using Pair = std::conditional_t<std::is_same_v<T, __nv_bfloat16>, __nv_bfloat162, __half2>;
    Pair sum = __hadd2(reinterpret_cast<Pair&>(a), reinterpret_cast<Pair&>(b));
    return reinterpret_cast<uint32_t&>(sum);
}

// Two halves from the top bits of two bytes of v, 0 and 1 or 2 and 3: all ones or zero.
template <int kPair>
__device__ __forceinline__ uint32_t spread(uint32_t v) {
    uint32_t out;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(out) : "r"(v), "n"(kPair ? 0xbbaa : 0x9988));
    return out;
}

// r at the four positions of a cell, 4 couts of each, from windows (A, B) of rows and i, i + 1 of columns. `code`: four
// times the first tap of the frame.
template <typename T, bool kPadded, int kCount>
__device__ __forceinline__ void cell_gradient(uint2 (&out)[2][2], const Windows<kCount>& above,
                                              const Windows<kCount>& below, int i, uint32_t code) {
    constexpr int kEven = kPadded, kOdd = !kPadded;  // which of two positions is even; the odd one's window as well
#pragma unroll
    for (int a = 0; a < 2; ++a)
#pragma unroll
        for (int b = 0; b < 2; ++b) {
            uint2 g = a ? below.g[i + b] : above.g[i + b];
            uint32_t tap = a ? below.tap[i + b] : above.tap[i + b];
            auto add = [&](uint2& r, int kh, int kw, bool first) {
                // Bytes below 128, of which 128 - byte has its top bit where the byte is zero.
                uint32_t same = 0x80808080 - ((tap & 0x7f7f7f7f) ^ (code + (3 * kh + kw) * 0x01010101));
                uint32_t x = g.x & spread<0>(same), y = g.y & spread<1>(same);
                r.x = first ? x : add_pairs<T>(r.x, x);
                r.y = first ? y : add_pairs<T>(r.y, y);
            };
            add(out[kEven][kEven], 2 - 2 * a, 2 - 2 * b, a == 0 && b == 0);
            if (a == kOdd) add(out[kOdd][kEven], 1, 2 - 2 * b, b == 0);
            if (b == kOdd) add(out[kEven][kOdd], 2 - 2 * a, 1, a == 0);
            if (a == kOdd && b == kOdd) add(out[kOdd][kOdd], 1, 1, true);
        }
}

// Positions beside the output get some r or other, which `form` does not use.
template <typename T, bool kPadded, typename Tile>
__device__ __forceinline__ void route(const StemWgradArgs& a, const WgradShared<Tile>& shared) {
    constexpr int kCells = Tile::kN / 16;  // of a thread; its warpgroup has 8 times 16 threads
    int thread = threadIdx.x % 128, quad = thread % 16, cell = thread / 16 * kCells;
    StageRing<Tile::kTiles> ring;
#pragma unroll 1
    for (int index = blockIdx.x; index < a.items; index += gridDim.x) {
        WgradItem item(a, index);
        if (item.empty()) continue;
        WindowPlace place(a, item, item.column / 2 - !kPadded + cell, 4 * quad);
        int row = item.row / 2 - !kPadded;
        uint32_t code = item.image % a.frames % 2 * 0x09090909;
        Windows<kCells + 1> below{}, next;
        place.load(next, a, row);
#pragma unroll 1
        for (int turn = 0; turn <= item.pairs; ++turn) {  // the first only fetches
            Windows<kCells + 1> above = below;
            below = next;
            if (turn < item.pairs) place.load(next, a, ++row);
            if (turn == 0) continue;
            barrier_wait(shared.emptied(ring.index), ring.parity ^ 1);
            uint32_t target = shared.gradient(ring.index) + quad % 2 * 8;
#pragma unroll
            for (int i = 0; i < kCells; ++i) {
                uint2 r[2][2];
                cell_gradient<T, kPadded>(r, above, below, i, code);
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    int position = 2 * (cell + i) + c;
                    uint32_t at = target + position * 128 + ((quad / 2 ^ position % 8) << 4);
                    store_shared(at, r[0][c]);
                    store_shared(at + Tile::kGradientRow, r[1][c]);
                }
            }
            barrier_arrive(shared.routed(ring.index));  // every lane, for its own cells
            ring.advance();
        }
    }
}

// ---- dz / scale.

struct GradientTerms {  // of a thread's couts
    float mean[2], c0[2], c1[2];
};

// A row of r becomes one of dz, two 8x8 matrices of couts 16 warp + {0, 8} at two times 8 positions at once; zero from
// `columns` on.
template <typename T, int kN, bool kAll>
__device__ __forceinline__ void form_row(const float (&z)[kN / 2], uint32_t turned, const GradientTerms& terms,
                                         int columns) {
    int quad = threadIdx.x % 4;
    uint32_t next[4];
    load_transposed(turned, next);
#pragma unroll
    for (int j = 0; j < kN / 8; j += 2) {
        uint32_t v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = next[i];
        if (j + 2 < kN / 8) load_transposed(turned + 1024 * (j + 2), next);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int m = i % 2, at = 4 * (j + i / 2) + 2 * m, column = 8 * (j + i / 2) + 2 * quad;
            float2 r = unpack<T>(v[i]), rounded = unpack<T>(pack<T>(z[at], z[at + 1]));
            float first = fmaf(terms.mean[m] - rounded.x, terms.c1[m], r.x - terms.c0[m]);
            float second = fmaf(terms.mean[m] - rounded.y, terms.c1[m], r.y - terms.c0[m]);
            v[i] = pack<T>(kAll || column < columns ? first : 0.0f, kAll || column + 1 < columns ? second : 0.0f);
        }
        store_transposed(turned + 1024 * j, v[0], v[1]);
        store_transposed(turned + 1024 * (j + 1), v[2], v[3]);
    }
}

template <typename T, typename Tile>
__device__ __forceinline__ void form(const StemWgradArgs& a, const WgradShared<Tile>& shared) {
    constexpr int kN = Tile::kN;
    int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
    uint32_t w[Tile::kSteps][4];
    if (a.w_type == PixelType::fp32)
        load_weights<T, Tile>(w, static_cast<const float*>(a.w), a.channels, shared.zeros);
    else if (a.w_type == PixelType::bf16)
        load_weights<T, Tile>(w, static_cast<const __nv_bfloat16*>(a.w), a.channels, shared.zeros);
    else
        load_weights<T, Tile>(w, static_cast<const __half*>(a.w), a.channels, shared.zeros);
    GradientTerms terms;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
        int cout = 16 * warp + 8 * m + lane / 4;
        terms.mean[m] = a.record[cout], terms.c0[m] = a.sums[cout], terms.c1[m] = a.sums[kCouts + cout];
    }

    float d0[kN / 2], d1[kN / 2];  // the two rows of a tile on their way
    StageRing<Tile::kStages> filled;
    StageRing<Tile::kTiles> ring;
    auto await = [&](int count) {
        for (int i = 0; i < count; ++i, filled.advance()) barrier_wait(shared.full(filled.index), filled.parity);
    };
    // Matrices of couts 16 warp + {0, 8} at 8 positions, then at the next 8; pieces are permuted by the position.
    uint32_t turned = (lane / 16 * 8 + lane % 8) * 128 + (((2 * warp + lane / 8 % 2) ^ lane % 8) << 4);
#pragma unroll 1
    for (int index = blockIdx.x; index < a.items; index += gridDim.x) {
        WgradItem item(a, index);
        if (item.empty()) continue;
        int left = item.rows;  // from the first of the tile that is in d0 and d1
        auto put = [&](float (&d)[kN / 2], int which) {
            uint32_t at = shared.gradient(ring.index) + which * Tile::kGradientRow + turned;
            if (item.columns == kN)
                form_row<T, kN, true>(d, at, terms, kN);
            else
                form_row<T, kN, false>(d, at, terms, item.columns);
        };
        auto finish = [&] {
            fence_proxy_async();
            __syncwarp();
            if (lane == 0) barrier_arrive(shared.formed(ring.index));
            ring.advance();
        };
        int first = filled.index;  // stage of the tile that is multiplied
        await(3);
        multiply<T>(d0, w, shared, first, 0);
        multiply<T>(d1, w, shared, first, 1);
        while (true) {
            wgmma_wait<1>();
            wgmma_pin(d0);
            barrier_wait(shared.routed(ring.index), ring.parity);
            put(d0, 0);
            wgmma_wait<0>();  // as ptxas asks for once in every turn
            wgmma_pin(d1);
            if (left <= 2) break;
            if (++first == Tile::kStages) first = 0;
            multiply<T>(d0, w, shared, first, 0);
            put(d1, 1);
            finish();
            await(1);
            multiply<T>(d1, w, shared, first, 1);
            left -= 2;
        }
        if (left > 1) put(d1, 1);
        finish();
    }
}

// ---- The sum.

template <typename T, typename Tile>
__device__ __forceinline__ void accumulate(const StemWgradArgs& a, const WgradShared<Tile>& shared) {
    constexpr int kCi = Tile::kCi;
    constexpr int kParts = kCi == 4 ? 2 : 1;  // ptxas takes no product as wide as 224 in a block of 512 threads
    constexpr int kWidth = 56 * kCi / kParts;
    int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
    float d[kParts][kWidth / 2];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int i = 0; i < kWidth / 2; ++i) d[part][i] = 0;
        wgmma_pin(d[part]);
    }
    StageRing<Tile::kStages> filled;
    StageRing<Tile::kTiles> ring;
    int done = 0, freed = 0, owed = 0;  // of the rings: what is oldest in use; stages that the tile under way will free
    auto await = [&](int count) {
        for (int i = 0; i < count; ++i, filled.advance()) barrier_wait(shared.full(filled.index), filled.parity);
    };
    auto release = [&] {
        if (owed == 0) return;
        if (lane == 0) barrier_arrive(shared.emptied(freed));
        if (++freed == Tile::kTiles) freed = 0;
        for (; owed > 0; --owed) {
            if (lane == 0) barrier_arrive(shared.empty(done));
            if (++done == Tile::kStages) done = 0;
        }
    };
#pragma unroll 1
    for (int index = blockIdx.x; index < a.items; index += gridDim.x) {
        WgradItem item(a, index);
        if (item.empty()) continue;
        int steps = (item.columns + 15) / 16, first = filled.index;
        await(2);
#pragma unroll 1
        for (int left = item.rows; left > 0; left -= 2, ring.advance()) {
            await(1);
            barrier_wait(shared.formed(ring.index), ring.parity);
            uint64_t dz = swizzled_descriptor(shared.gradient(ring.index), 8 * 128);
            uint64_t x = plain_descriptor(shared.ring + first * Tile::kStage, Tile::kChunks8, Tile::kPlane);
#pragma unroll 1
            for (int row = min(left, 2); row > 0; --row) {
                uint64_t dz_step = dz, x_step = x;
#pragma unroll 1
                for (int step = 0; step < steps; ++step) {
                    wgmma_fence();
#pragma unroll
                    for (int part = 0; part < kParts; ++part)
                        wgmma_outer<T>(d[part], dz_step, x_step + part * (kWidth / 8 * Tile::kPlane >> 4));
                    wgmma_commit();
                    wgmma_wait<1>();  // the step before, with the first step the tile before
                    release();
                    dz_step += 16 * 128 >> 4, x_step += 2 * Tile::kChunks8 >> 4;
                }
                dz += Tile::kGradientRow >> 4, x += 2 * Tile::kRow >> 4;
            }
            owed = left <= 2 ? 3 : 1;
            if (++first == Tile::kStages) first = 0;
        }
    }
    wgmma_wait<0>();
    // d[4 j + 2 m + e] is cout 16 warp + 8 m + lane / 4, k = 8 j + 2 (lane % 4) + e. A lone channel has one of zeros.
    float* out = a.partials + int64_t(blockIdx.x) * (64 * a.channels * kCouts) + 16 * warp + lane / 4;
    out += lane % 4 * 2 * kCouts;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
        wgmma_pin(d[part]);
#pragma unroll
        for (int i = 0; i < kWidth / 2; ++i) {
            int chunk = kWidth / 8 * part + i / 4, kh = chunk / kCi, c = chunk % kCi;
            int k = (kh * a.channels + c) * 8 + i % 2;
            if (kCi > 2 || c < a.channels) out[k * kCouts + i / 2 % 2 * 8] = d[part][i];
        }
    }
}

template <typename T, int kCi, int kN>
__global__ void __launch_bounds__(kWgradThreads, 1) stem_wgrad_kernel(const __grid_constant__ StemWgradArgs a) {
    using Tile = WgradTile<kCi, kN>;
    extern __shared__ __align__(1024) char memory[];
    WgradShared<Tile> shared(memory);
    if (threadIdx.x == 0)
        for (int i = 0; i < Tile::kTiles; ++i)
            barrier_init(shared.routed(i), 128), barrier_init(shared.formed(i), 4), barrier_init(shared.emptied(i), 4);
    shared.prepare();
    __syncthreads();
    dependency_wait();
    int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    if (group == 0) {  // stem_tile.cuh counts its warps from 0
        give_registers<Tile::kClipRegisters>();
        if (a.x_type == PixelType::bf16)
            produce<T, __nv_bfloat16>(a, shared);
        else if (a.x_type == PixelType::fp16)
            produce<T, __half>(a, shared);
        else
            produce<T, float>(a, shared);
    } else if (group == 1) {
        give_registers<Tile::kRouteRegisters>();
        if (a.padded)
            route<T, true>(a, shared);
        else
            route<T, false>(a, shared);
    } else if (group == 2) {
        take_registers<Tile::kFormRegisters>();
        form<T>(a, shared);
    } else {
        if constexpr (Tile::kSumRegisters > 65536 / kWgradThreads)
            take_registers<Tile::kSumRegisters>();
        else
            give_registers<Tile::kSumRegisters>();
        accumulate<T>(a, shared);
    }
}

// ---- Host.

struct StemWgradPlan {
    StemSizes sizes;
    int columns;  // N
    int tile, row_tiles, column_tiles, tiles, turns, blocks, items;
};

// The tile that covers a row in the least time; blocks take equal numbers of them.
const char* wgrad_plan(StemWgradPlan& plan, const StemShape& s) {
    int processors;
    if (const char* error = count_processors(processors)) return error;
    if (const char* reason = stem_sizes(plan.sizes, "stem_wgrad", s)) return reason;
    int64_t width = plan.sizes.out_width, rows = (plan.sizes.out_height + 1) / 2, best = -1;
    for (int n : {64, 80}) {
        if (n > 64 && s.channels > 3) continue;
        int64_t columns = (width + n - 1) / n, cost = columns * (n + 8);
        if (best >= 0 && cost >= best) continue;
        best = cost;
        plan.columns = n, plan.tile = int(std::min<int64_t>(width, n)), plan.column_tiles = int(columns);
    }
    if (double(s.clips) * double(s.frames) * double(rows) * plan.column_tiles > 2147000000.0)
        return "stem_wgrad: expected fewer than 2^31 tiles";
    int64_t tiles = s.clips * s.frames * rows * plan.column_tiles, blocks = std::min<int64_t>(tiles, processors);
    int64_t turns = (tiles + blocks - 1) / blocks;
    blocks = (tiles + turns - 1) / turns;
    plan.row_tiles = int(rows), plan.tiles = int(tiles), plan.turns = int(turns), plan.blocks = int(blocks);
    int64_t items = (turns + rows - 2) / rows + 1;  // strips that a block can reach
    if (double(items) * double(blocks) > 2147000000.0) return "stem_wgrad: expected fewer than 2^31 strips";
    plan.items = int(items * blocks);
    return nullptr;
}

template <typename T, int kCi, int kN>
const char* launch(const StemWgradPlan& plan, const StemWgradArgs& args, cudaStream_t stream) {
    constexpr int kShared = WgradTile<kCi, kN>::kShared;
    cudaError_t error =
        launch_dependent(stem_wgrad_kernel<T, kCi, kN>, dim3(plan.blocks), kWgradThreads, kShared, stream, args);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename T, int kCi>
const char* launch(const StemWgradPlan& plan, const StemWgradArgs& args, cudaStream_t stream) {
    if constexpr (kCi < 4)
        if (plan.columns == 80) return launch<T, kCi, 80>(plan, args, stream);
    return launch<T, kCi, 64>(plan, args, stream);
}

template <typename T>
const char* launch(const StemWgradPlan& plan, const StemWgradArgs& args, cudaStream_t stream) {
    if (args.channels < 3) return launch<T, 2>(plan, args, stream);
    return args.channels == 3 ? launch<T, 3>(plan, args, stream) : launch<T, 4>(plan, args, stream);
}

}  // namespace

const char* stem_wgrad_why_not(const StemShape& shape) {
    StemWgradPlan plan;
    return wgrad_plan(plan, shape);
}

int stem_wgrad_partials(const StemShape& shape) {
    StemWgradPlan plan;
    return wgrad_plan(plan, shape) ? 0 : plan.blocks;
}

const char* stem_wgrad(const StemWgrad& p) {
    if (p.x_type == PixelType::uint8 || p.w_type == PixelType::uint8)
        return "stem_wgrad: expected float32, float16 or bfloat16 pixels and weights, got uint8";
    StemWgradPlan plan;
    if (const char* error = wgrad_plan(plan, p.shape)) return error;
    StemWgradArgs args{};
    clip_args(args, p.x, p.shape, p.strides, p.x_type);
    args.g = static_cast<const char*>(p.g);
    args.tap = static_cast<const uint8_t*>(p.tap);
    args.w = p.w;
    args.w_type = p.w_type;
    args.record = p.record;
    args.sums = p.sums;
    args.partials = p.partials;
    args.padded = p.shape.padded;
    args.out_height = int(plan.sizes.out_height);
    args.out_width = int(plan.sizes.out_width);
    args.pooled_frames = int(plan.sizes.pooled_frames);
    args.pooled_height = int(plan.sizes.pooled_height);
    args.pooled_width = int(plan.sizes.pooled_width);
    args.tile = plan.tile;
    args.row_tiles = plan.row_tiles;
    args.column_tiles = plan.column_tiles;
    args.tiles = plan.tiles;
    args.turns = plan.turns;
    args.items = plan.items;
    return p.dtype == DType::bf16 ? launch<__nv_bfloat16>(plan, args, p.stream) : launch<__half>(plan, args, p.stream);
}

}  // namespace p3d
