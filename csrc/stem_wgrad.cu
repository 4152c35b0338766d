// The weight gradient of the stem's convolution in one pass over the clip, the pooled gradient and the raw output.
//
// D[cout, k] += dz[position, cout] X[position, k]: couts are the rows of the matrix unit, positions its steps. Chunk w
// of an image row is 16 bytes: pixels 2 w - 4 .. 2 w + 3 of one channel, in the compute dtype. Pixel 2 w - 4 is no tap;
// the others are the window of output column w. So k counts (row of the window, channel, pixel of the chunk), and the
// chunks of a row, one after another, are an N-major operand whose next 8 columns are the next channel or row.
//
// A tile is two rows of up to 80 outputs of one frame. A stage has its dz, [row][position][64] in rows of 128 bytes,
// swizzled, and its 9 image rows, [row][channel][chunk]: output row r multiplies image rows 2 r .. 2 r + 6. A block
// takes consecutive tiles, downwards in a frame, so a tile copies 5 of its image rows from the stage before.
//
// One warpgroup multiplies. Ten warps form dz: a thread has a cell of 2 x 2 positions and 8 couts. The pool's windows,
// 3 x 3 and two apart, cover such a cell by two in each direction, A and B = A + 1. Its even positions (counted from
// the pool's padding: the first ones, or if padded the last) are tap 2 of A and tap 0 of B, the odd are tap 1 of B, or
// if padded of A. Two warps read the clip: a lane has a pair of pixels and makes its chunk from those of its
// neighbours.
#include <algorithm>

#include "p3d.h"
#include "stem_infer.cuh"
#include "tile.cuh"

namespace p3d {
namespace {

constexpr int kCouts = 64;
constexpr int kColumns = 80;           // of a tile, at most
constexpr int kCells = kColumns / 2;   // of 2 x 2 positions
constexpr int kRows = 9;               // of the image that a tile needs
constexpr int kFresh = 4;              // of which the tile above has not
constexpr int kPlane = kColumns * 16;  // chunks of one row of one channel
constexpr int kGradientRow = kColumns * kCouts * 2, kGradient = 2 * kGradientRow;
constexpr int kChunks = 29, kSegments = 3;  // that a warp makes of 32 pairs; runs of these in a row
constexpr int kGradientWarps = 10, kClipWarps = 2;
constexpr int kAhead = 2, kLeadRows = kAhead * kFresh;  // tiles and image rows that memory is asked for in advance
constexpr int kThreads = 128 + 32 * (kGradientWarps + kClipWarps);
constexpr int kProducerRegisters = 120, kConsumerRegisters = 152;
static_assert(kCells * 8 == 32 * kGradientWarps, "a thread has one cell and 8 couts");
static_assert(kChunks * kSegments >= kColumns, "segments cover a row");
static_assert(kGradientRow % 1024 == 0, "the swizzle repeats every 1024 bytes");
static_assert(128 * kConsumerRegisters + (kThreads - 128) * kProducerRegisters <= 65536, "registers");

struct StemWgradArgs {
    const char* x;
    const char* g;
    const uint8_t* tap;
    const char* z;
    const float* record;
    const float* sums;
    float* partials;
    int64_t clip_stride, channel_stride, frame_stride, row_stride, pixel_stride;  // of x in bytes
    PixelType x_type;
    bool planes, padded;  // pairs of pixels are read as one
    int frames, height, width, out_height, out_width, pooled_frames, pooled_height, pooled_width;
    int tile;                                   // columns
    int row_tiles, column_tiles, tiles, turns;  // turns: tiles of a block
};

// What lies in shared memory, in bytes.
template <int kCi>
struct StemWgradShared {
    static constexpr int kImage = kRows * kCi * kPlane;
    static constexpr int kStages = kCi < 4 ? 4 : 3;
    static constexpr int kConstants = 3 * kCouts * 4;  // rows mean, c0, c1
    static constexpr int kSize = kStages * (kGradient + kImage) + kConstants + kStages * 16;
    static_assert(kSize <= kSharedLimit, "a block's shared memory");
    static_assert(kStages >= 3, "a copied stage may still be read while the one after next is written");
    uint32_t gradient, image, constants, barriers;

    __device__ __forceinline__ explicit StemWgradShared(const void* base)
        : gradient(shared_address(base)),
          image(gradient + kStages * kGradient),
          constants(image + kStages * kImage),
          barriers(constants + kConstants) {}
    __device__ __forceinline__ uint32_t full(int stage) const { return barriers + 16 * stage; }
    __device__ __forceinline__ uint32_t empty(int stage) const { return barriers + 16 * stage + 8; }
};

struct WgradTile {
    int64_t image;  // clip * frames + frame
    int clip, frame, column, row;

    __device__ __forceinline__ WgradTile(const StemWgradArgs& a, int index) {
        int rest = index / a.row_tiles;
        row = 2 * (index % a.row_tiles);
        column = rest % a.column_tiles * a.tile;
        image = rest / a.column_tiles;
        clip = int(image) / a.frames;
        frame = int(image) % a.frames;
    }
    __device__ __forceinline__ void advance(const StemWgradArgs& a) {
        if ((row += 2) < a.out_height) return;
        row = 0;
        if ((column += a.tile) < a.out_width) return;
        column = 0;
        ++image;
        if (++frame == a.frames) frame = 0, ++clip;
    }
};

struct Turns {  // the tiles of this block
    int first, count;

    __device__ __forceinline__ explicit Turns(const StemWgradArgs& a)
        : first(blockIdx.x * a.turns), count(min(a.turns, a.tiles - first)) {}
};

// ---- The clip.

// Pairs of pixels of one image row on their way, a pair a lane, channel and segment.
template <typename T, typename In, int kCi, bool kPlanes>
struct PixelRow {
    uint32_t v[kCi][kSegments][sizeof(In) / 2];

    // `frame`: the first pixel of channel 0; `row` may be outside the image. `column`: of the first output. Has the row
    // that the tile kAhead further down will read on its way.
    __device__ __forceinline__ void load(const StemWgradArgs& a, const char* frame, int row, int column) {
        int pair = column + thread_here() % 32 - 2;
        const char* source = frame + row * a.row_stride;
        bool inside = unsigned(row) < unsigned(a.height);
#pragma unroll
        for (int c = 0; c < kCi; ++c, source += a.channel_stride)
#pragma unroll
            for (int s = 0; s < kSegments; ++s) {
                uint32_t (&out)[sizeof(In) / 2] = v[c][s];
                int pixel = 2 * (pair + kChunks * s);
                const char* first = source + pixel * (kPlanes ? int64_t(sizeof(In)) : a.pixel_stride);
                bool one = inside && unsigned(pixel) < unsigned(a.width);
                if (kPlanes && one && row + kLeadRows < a.height && pixel * int(sizeof(In)) % 128 == 0)
                    prefetch(first + kLeadRows * a.row_stride);
                if constexpr (kPlanes && sizeof(In) == 4) {
                    uint2 u{};
                    if (one) load_once(u, first);
                    out[0] = u.x, out[1] = u.y;
                } else if constexpr (kPlanes) {
                    out[0] = one ? __ldg(reinterpret_cast<const uint32_t*>(first)) : 0;
                } else {
                    bool other = inside && unsigned(pixel + 1) < unsigned(a.width);
                    const char* second = first + a.pixel_stride;
                    if constexpr (sizeof(In) == 4) {
                        out[0] = one ? __ldg(reinterpret_cast<const uint32_t*>(first)) : 0;
                        out[1] = other ? __ldg(reinterpret_cast<const uint32_t*>(second)) : 0;
                    } else {
                        uint32_t low = one ? __ldg(reinterpret_cast<const uint16_t*>(first)) : 0;
                        uint32_t high = other ? __ldg(reinterpret_cast<const uint16_t*>(second)) : 0;
                        out[0] = low | high << 16;
                    }
                }
            }
    }

    // Writes the row's chunks; lanes 2 to 30 of a segment have one each.
    __device__ __forceinline__ void store(uint32_t target) const {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int c = 0; c < kCi; ++c) {
#pragma unroll
            for (int s = 0; s < kSegments; ++s) {
                uint32_t own;
                if constexpr (sizeof(In) == 4) {
                    own = pack<T>(__uint_as_float(v[c][s][0]), __uint_as_float(v[c][s][1]));
                } else if constexpr (std::is_same_v<T, In>) {
                    own = v[c][s][0];
                } else {
                    float2 both = unpack<In>(v[c][s][0]);
                    own = pack<T>(both.x, both.y);
                }
                uint4 chunk{__shfl_up_sync(~0u, own, 2), __shfl_up_sync(~0u, own, 1), own,
                            __shfl_down_sync(~0u, own, 1)};
                int index = kChunks * s + lane - 2;
                if (lane >= 2 && lane < 31 && index < kColumns) store_shared(target + c * kPlane + 16 * index, chunk);
            }
            __syncwarp();  // a channel at a time: fewer registers
        }
    }
};

template <typename T, typename In, int kCi, bool kPlanes>
__device__ __forceinline__ void produce_clip(const StemWgradArgs& a, const StemWgradShared<kCi>& shared) {
    using Shared = StemWgradShared<kCi>;
    int thread = threadIdx.x % (32 * kClipWarps), lane = thread % 32, warp = thread / 32;
    constexpr int kRow = kCi * kPlane, kKept = (kRows - kFresh) * kRow;
    Turns turns(a);
    WgradTile tile(a, turns.first);
    StageRing<Shared::kStages> ring;
    uint32_t before = 0;
    // Of the fresh rows, those that registers hold while their stage is still in use.
    constexpr int kEarly = kPlanes ? kCi < 4 ? 2 : 1 : 0, kLate = kRows - kEarly * kClipWarps;
    constexpr int kBatch = kCi < 4 ? kCi : 2;  // channels
#pragma unroll 1
    for (int i = 0; i < turns.count; ++i, tile.advance(a)) {
        const char* frame = a.x + tile.clip * a.clip_stride + tile.frame * a.frame_stride;
        int row = 2 * tile.row - 3;
        PixelRow<T, In, kCi, kPlanes> fresh[kEarly + !kEarly];
#pragma unroll
        for (int j = 0; j < kEarly; ++j) fresh[j].load(a, frame, row + kLate + j * kClipWarps + warp, tile.column);
        barrier_wait(shared.empty(ring.index), ring.parity ^ 1);
        uint32_t target = shared.image + ring.index * Shared::kImage;
        named_sync(1, 32 * kClipWarps);  // the stage before is whole
        bool follows = i > 0 && tile.row > 0;
        if (follows)
#pragma unroll 4
            for (int at = 16 * thread; at < kKept; at += 16 * 32 * kClipWarps)
                store_shared(target + at, load_shared(before + kFresh * kRow + at));
#pragma unroll
        for (int j = 0; j < kEarly; ++j) fresh[j].store(target + (kLate + j * kClipWarps + warp) * kRow);
#pragma unroll 1
        for (int j = (follows ? kRows - kFresh : 0) + warp; j < kLate; j += kClipWarps) {
#pragma unroll 1
            for (int c = 0; c < kCi; c += kBatch) {
                PixelRow<T, In, kBatch, kPlanes> part;
                part.load(a, frame + c * a.channel_stride, row + j, tile.column);
                part.store(target + j * kRow + c * kPlane);
            }
        }
        fence_proxy_async();
        __syncwarp();
        if (lane == 0) barrier_arrive(shared.full(ring.index));
        before = target;
        ring.advance();
    }
}

template <typename T, typename In, int kCi>
__device__ __forceinline__ void produce_clip(const StemWgradArgs& a, const StemWgradShared<kCi>& shared) {
    if (a.planes)
        produce_clip<T, In, kCi, true>(a, shared);
    else
        produce_clip<T, In, kCi, false>(a, shared);
}

// ---- The gradient.

// Where z at a cell's first position lies, and its windows (A, A), in elements, as if all were there.
template <bool kPadded>
struct CellPlace {
    int64_t position, window;
    int column, pooled_row, pooled_column;

    __device__ __forceinline__ CellPlace(const StemWgradArgs& a, const WgradTile& tile, int cell)
        : column(tile.column + 2 * cell), pooled_row(tile.row / 2 - !kPadded), pooled_column(column / 2 - !kPadded) {
        position = ((tile.image * a.out_height + tile.row) * a.out_width + column) * kCouts;
        int64_t pooled_image = int64_t(tile.clip) * a.pooled_frames + tile.frame / 2;
        window = ((pooled_image * a.pooled_height + pooled_row) * a.pooled_width + pooled_column) * kCouts;
    }
};

// What a thread reads for a cell: z at its positions; g and the tap of windows A and B of rows, of columns.
template <bool kPadded>
struct Cell {
    uint4 z[2][2], g[2][2];
    uint2 tap[2][2];
    bool rows, columns[2];  // that exist: the second row; the columns
    uint32_t code;          // four times the first tap of the frame

    __device__ __forceinline__ void load(const StemWgradArgs& a, const WgradTile& tile) {
        int thread = thread_here() - 128, octet = thread % 8;
        CellPlace<kPadded> place(a, tile, thread / 8);
        int last = min(tile.column + a.tile, a.out_width);
        rows = tile.row + 1 < a.out_height;
        columns[0] = place.column < last, columns[1] = place.column + 1 < last;
        const char* source = a.z + 2 * (place.position + 8 * octet);
#pragma unroll
        for (int r = 0; r < 2; ++r, source += int64_t(a.out_width) * (2 * kCouts))
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                z[r][c] = uint4{};
                if ((r == 0 || rows) && columns[c]) load_once(z[r][c], source + c * (2 * kCouts));
            }
        code = tile.frame % 2 * 0x09090909;
        int64_t window = place.window + 8 * octet;
        bool real = tile.frame / 2 < a.pooled_frames && columns[0];
#pragma unroll
        for (int r = 0; r < 2; ++r, window += int64_t(a.pooled_width) * kCouts)
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                bool covers = real && unsigned(place.pooled_row + r) < unsigned(a.pooled_height);
                g[r][c] = uint4{}, tap[r][c] = uint2{~0u, ~0u};
                if (covers && unsigned(place.pooled_column + c) < unsigned(a.pooled_width)) {
                    g[r][c] = __ldg(reinterpret_cast<const uint4*>(a.g + 2 * (window + c * kCouts)));
                    tap[r][c] = __ldg(reinterpret_cast<const uint2*>(a.tap + window + c * kCouts));
                }
            }
    }
};

// Has the memory of a tile on its way: of the 8 threads of a cell, one each line of z and of its window (B, B).
template <bool kPadded>
__device__ __forceinline__ void prefetch_cell(const StemWgradArgs& a, const WgradTile& tile) {
    int thread = thread_here() - 128, part = thread % 8;
    CellPlace<kPadded> place(a, tile, thread / 8);
    if (part < 4) {
        bool real = place.column + part % 2 < a.out_width && tile.row + part / 2 < a.out_height;
        int64_t offset = (int64_t(part / 2) * a.out_width + part % 2) * kCouts;
        if (real) prefetch(a.z + 2 * (place.position + offset));
    } else if (part < 6) {
        bool real = place.pooled_row + 1 < a.pooled_height && place.pooled_column + 1 < a.pooled_width;
        int64_t window = place.window + int64_t(a.pooled_width + 1) * kCouts;
        if (real && tile.frame / 2 < a.pooled_frames)
            prefetch(part == 4 ? a.g + 2 * window : reinterpret_cast<const char*>(a.tap) + window);
    }
}

__device__ __forceinline__ uint32_t word(const uint4& v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Two neighbouring couts of a cell, of pair `q` of its 8: dz / scale at its four positions, packed.
template <typename T, bool kPadded>
__device__ __forceinline__ void cell_gradient(const Cell<kPadded>& cell, int q, const float (&mean)[2],
                                              const float (&c0)[2], const float (&c1)[2], uint32_t (&out)[2][2]) {
    constexpr int kEven = kPadded, kOdd = !kPadded;  // which of two positions is even; the odd one's window as well
    float v[2][2][2];
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            float2 z = unpack<T>(word(cell.z[r][c], q));
            v[0][r][c] = fmaf(mean[0] - z.x, c1[0], -c0[0]);
            v[1][r][c] = fmaf(mean[1] - z.y, c1[1], -c0[1]);
        }
#pragma unroll
    for (int a = 0; a < 2; ++a)  // window A or B of rows
#pragma unroll
        for (int b = 0; b < 2; ++b) {  // of columns
            float2 g = unpack<T>(word(cell.g[a][b], q));
            uint32_t tap = q < 2 ? cell.tap[a][b].x : cell.tap[a][b].y;
            auto add = [&](int row, int column, uint32_t kh, uint32_t kw) {
                uint32_t other = tap ^ (cell.code + (3 * kh + kw) * 0x01010101);
                uint32_t mask = 0xffu << q % 2 * 16;
                if ((other & mask) == 0) v[0][row][column] += g.x;
                if ((other & mask << 8) == 0) v[1][row][column] += g.y;
            };
            add(kEven, kEven, 2 - 2 * a, 2 - 2 * b);
            if (a == kOdd) add(kOdd, kEven, 1, 2 - 2 * b);
            if (b == kOdd) add(kEven, kOdd, 2 - 2 * a, 1);
            if (a == kOdd && b == kOdd) add(kOdd, kOdd, 1, 1);
        }
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int c = 0; c < 2; ++c) out[r][c] = pack<T>(v[0][r][c], v[1][r][c]);
}

// The cell's dz to shared memory; zero where there is no position.
template <typename T, bool kPadded>
__device__ __forceinline__ void store_cell(Cell<kPadded>& cell, uint32_t target, uint32_t constants) {
    int thread = thread_here() - 128, index = thread / 8, octet = thread % 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // four couts
        uint4 rows[3];
#pragma unroll
        for (int i = 0; i < 3; ++i) rows[i] = load_shared(constants + i * 4 * kCouts + 32 * octet + 16 * half);
#pragma unroll
        for (int q = 0; q < 2; ++q) {
            float v[3][2];
#pragma unroll
            for (int i = 0; i < 3; ++i)
                v[i][0] = __uint_as_float(word(rows[i], 2 * q)), v[i][1] = __uint_as_float(word(rows[i], 2 * q + 1));
            uint32_t out[2][2];
            cell_gradient<T, kPadded>(cell, 2 * half + q, v[0], v[1], v[2], out);
#pragma unroll
            for (int r = 0; r < 2; ++r)
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    uint4& z = cell.z[r][c];
                    (half ? q ? z.w : z.z : q ? z.y : z.x) = (r == 0 || cell.rows) && cell.columns[c] ? out[r][c] : 0;
                }
        }
    }
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        int position = 2 * index + c;
        uint32_t at = target + position * 128 + ((octet ^ position % 8) << 4);
        store_shared(at, cell.z[0][c]);
        store_shared(at + kGradientRow, cell.z[1][c]);
    }
}

template <typename T, int kCi, bool kPadded>
__device__ __forceinline__ void produce_gradient(const StemWgradArgs& a, const StemWgradShared<kCi>& shared) {
    Turns turns(a);
    WgradTile tile(a, turns.first), far = tile;
    for (int i = 0; i < kAhead; ++i) {
        if (i < turns.count) prefetch_cell<kPadded>(a, far);
        far.advance(a);
    }
    StageRing<StemWgradShared<kCi>::kStages> ring;
#pragma unroll 1
    for (int i = 0; i < turns.count; ++i) {
        Cell<kPadded> cell;
        cell.load(a, tile);
        tile.advance(a);
        if (i + kAhead < turns.count) prefetch_cell<kPadded>(a, far);
        far.advance(a);
        barrier_wait(shared.empty(ring.index), ring.parity ^ 1);
        store_cell<T, kPadded>(cell, shared.gradient + ring.index * kGradient, shared.constants);
        fence_proxy_async();
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(shared.full(ring.index));
        ring.advance();
    }
}

// ---- The product.

template <typename T, int kCi>
__device__ __forceinline__ void consume(const StemWgradArgs& a, const StemWgradShared<kCi>& shared) {
    using Shared = StemWgradShared<kCi>;
    constexpr int kParts = kCi == 4 ? 2 : 1;  // ptxas takes no product as wide as 224 in a block of 512 threads
    constexpr int kN = 56 * kCi / kParts;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float d[kParts][kN / 2];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int i = 0; i < kN / 2; ++i) d[part][i] = 0;
        wgmma_pin(d[part]);
    }
    int steps = (a.tile + 15) / 16;
    Turns turns(a);
    StageRing<Shared::kStages> ring;
#pragma unroll 1
    for (int i = 0; i < turns.count; ++i, ring.advance()) {
        barrier_wait(shared.full(ring.index), ring.parity);
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            uint64_t dz = swizzled_descriptor(shared.gradient + ring.index * kGradient + row * kGradientRow, 8 * 128);
            uint64_t x =
                plain_descriptor(shared.image + ring.index * Shared::kImage + 2 * row * kCi * kPlane, 128, kPlane);
#pragma unroll 1
            for (int step = 0; step < steps; ++step, dz += 16 * 128 >> 4, x += 16 * 16 >> 4) {
                wgmma_fence();
#pragma unroll
                for (int part = 0; part < kParts; ++part)
                    wgmma_outer<T>(d[part], dz, x + part * (kN / 8 * kPlane >> 4));
                wgmma_commit();
            }
        }
        wgmma_wait<0>();
        if (lane == 0) barrier_arrive(shared.empty(ring.index));
    }
    // d[4 j + 2 m + e] is cout 16 warp + 8 m + lane / 4, k = 8 j + 2 (lane % 4) + e.
    float* out = a.partials + int64_t(blockIdx.x) * (64 * kCi * kCouts) + 16 * warp + lane / 4 + lane % 4 * 2 * kCouts;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
        wgmma_pin(d[part]);
#pragma unroll
        for (int i = 0; i < kN / 2; ++i) out[(kN * part + i / 4 * 8 + i % 2) * kCouts + i / 2 % 2 * 8] = d[part][i];
    }
}

template <typename T, int kCi>
__global__ void __launch_bounds__(kThreads, 1) stem_wgrad_kernel(const __grid_constant__ StemWgradArgs a) {
    using Shared = StemWgradShared<kCi>;
    extern __shared__ __align__(1024) char memory[];
    Shared shared(memory);
    if (threadIdx.x == 0) {
        for (int i = 0; i < Shared::kStages; ++i)
            barrier_init(shared.full(i), kGradientWarps + kClipWarps), barrier_init(shared.empty(i), 4);
        barrier_init_fence();
    }
    dependency_wait();
    if (threadIdx.x < 3 * kCouts) {
        float value = threadIdx.x < kCouts ? a.record[threadIdx.x] : a.sums[threadIdx.x - kCouts];
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(shared.constants + 4 * threadIdx.x), "f"(value) : "memory");
    }
    __syncthreads();
    int group = __shfl_sync(~0u, threadIdx.x / 128, 0), warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    if (group == 0) {
        take_registers<kConsumerRegisters>();
        consume<T>(a, shared);
        return;
    }
    give_registers<kProducerRegisters>();
    if (warp >= 4 + kGradientWarps) {
        if (a.x_type == PixelType::bf16)
            produce_clip<T, __nv_bfloat16>(a, shared);
        else if (a.x_type == PixelType::fp16)
            produce_clip<T, __half>(a, shared);
        else
            produce_clip<T, float>(a, shared);
    } else if (a.padded) {
        produce_gradient<T, kCi, true>(a, shared);
    } else {
        produce_gradient<T, kCi, false>(a, shared);
    }
}

// ---- Host.

struct StemWgradPlan {
    StemSizes sizes;
    int tile, row_tiles, column_tiles, tiles, turns, blocks;
};

// Tiles of equal width; blocks take equal numbers of them.
const char* wgrad_plan(StemWgradPlan& plan, const StemShape& s) {
    int device, processors;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    if (const char* reason = stem_sizes(plan.sizes, "stem_wgrad", s)) return reason;
    int64_t width = plan.sizes.out_width, columns = (width + kColumns - 1) / kColumns;
    int64_t tile = ((width + columns - 1) / columns + 1) / 2 * 2, rows = (plan.sizes.out_height + 1) / 2;
    columns = (width + tile - 1) / tile;
    if (double(s.clips) * double(s.frames) * double(rows) * double(columns) > 2147000000.0)
        return "stem_wgrad: expected fewer than 2^31 tiles";
    int64_t tiles = s.clips * s.frames * rows * columns, blocks = std::min<int64_t>(tiles, processors);
    int64_t turns = (tiles + blocks - 1) / blocks;
    plan.tile = int(tile), plan.row_tiles = int(rows), plan.column_tiles = int(columns), plan.tiles = int(tiles);
    plan.turns = int(turns), plan.blocks = int((tiles + turns - 1) / turns);
    return nullptr;
}

template <typename T, int kCi>
const char* launch(const StemWgradPlan& plan, const StemWgradArgs& args, cudaStream_t stream) {
    constexpr int kSize = StemWgradShared<kCi>::kSize;
    cudaError_t error = launch_dependent(stem_wgrad_kernel<T, kCi>, dim3(plan.blocks), kThreads, kSize, stream, args);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename T>
const char* launch(int channels, const StemWgradPlan& plan, const StemWgradArgs& args, cudaStream_t stream) {
    if (channels < 3) return channels == 1 ? launch<T, 1>(plan, args, stream) : launch<T, 2>(plan, args, stream);
    return channels == 3 ? launch<T, 3>(plan, args, stream) : launch<T, 4>(plan, args, stream);
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
    if (p.x_type == PixelType::uint8) return "stem_wgrad: expected float32, float16 or bfloat16 pixels, got uint8";
    StemWgradPlan plan;
    if (const char* error = wgrad_plan(plan, p.shape)) return error;
    const StemShape& s = p.shape;
    int size = p.x_type == PixelType::fp32 ? 4 : 2;
    auto stride = [&](int axis, int64_t count) { return count == 1 ? 0 : p.strides[axis] * size; };
    StemWgradArgs args{};
    args.x = static_cast<const char*>(p.x);
    args.g = static_cast<const char*>(p.g);
    args.tap = static_cast<const uint8_t*>(p.tap);
    args.z = static_cast<const char*>(p.z);
    args.record = p.record;
    args.sums = p.sums;
    args.partials = p.partials;
    args.clip_stride = stride(0, s.clips);
    args.channel_stride = stride(1, s.channels);
    args.frame_stride = stride(2, s.frames);
    args.row_stride = stride(3, s.height);
    args.pixel_stride = p.strides[4] * size;
    args.x_type = p.x_type;
    int64_t steps = args.clip_stride | args.channel_stride | args.frame_stride | args.row_stride;
    args.planes =
        args.pixel_stride == size && s.width % 2 == 0 && (reinterpret_cast<uintptr_t>(p.x) | steps) % (2 * size) == 0;
    args.padded = s.padded;
    args.frames = int(s.frames);
    args.height = int(s.height);
    args.width = int(s.width);
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
    return p.dtype == DType::bf16 ? launch<__nv_bfloat16>(int(s.channels), plan, args, p.stream)
                                  : launch<__half>(int(s.channels), plan, args, p.stream);
}

}  // namespace p3d
