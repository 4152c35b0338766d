// The stem of an inference net in one pass: the clip is read once and only the pooled tensor is written.
//
// D[cout, column] += W[cout, k] X[k, column], one row of one frame at a time. Couts are the rows of the matrix unit,
// the N columns of a tile its columns. Chunk w of an image row is 16 bytes: pixels 2 w - 4 .. 2 w + 3 of one channel,
// in the compute dtype. Pixel 2 w - 4 meets a zero weight; the others are the window of output column w. So k counts
// (channel, row of the window, pixel of the chunk), 8 of 56 and more of which are zeros, and one step of 16 takes two
// chunks:
//
//     channels c, c + 1 (c even), row kh of the window              7 steps a pair of channels
//     the last channel of an odd number, rows kh, kh + 1, kh even   4 steps, the very last row a plane of zeros
//
// w is packed for registers, [step][128 threads][8]: element 2 i + e of a thread is cout 16 warp + 8 (i % 2) + lane / 4
// and k = 8 (i / 2) + 2 (lane % 4) + e of the step.
//
// In shared memory the chunks of a row lie one after another, 8 of them (a core matrix) in 128 bytes, with 16 bytes
// between. A stage has the two image rows by which consecutive rows of outputs differ, of the two frames of a pooling
// window: [row][frame][channel][chunk]. The output row r multiplies stages r, r + 1, r + 2 and the first row of r + 3.
//
// A block owns a strip of pooled rows of a pair of frames and a tile of columns. One warpgroup produces: each of its
// warps reads one row of every stage, 8 pixels a lane, which it fetches one or two stages ahead; a lane makes 4 chunks
// from its own pixels and those of its neighbours. The other warpgroup multiplies. A pool that comes first commutes
// with an affine map and a ReLU that rise; where the scale is negative, the weights and the mean change their sign. So
// it takes maxima of raw sums, over frames and rows in registers, over columns between neighbouring lanes, and
// normalises one in eight. Two blocks share a multiprocessor: one multiplies while the other pools and stores.
#include <algorithm>

#include "p3d.h"
#include "stem_infer.cuh"
#include "tile.cuh"

namespace p3d {
namespace {

constexpr int kCouts = 64;
constexpr float kLowest = -__builtin_huge_valf();
constexpr int kThreads = 256;  // a warpgroup that produces, a warpgroup that multiplies
constexpr int kProducerRegisters = 80, kConsumerRegisters = 176;
static_assert(kProducerRegisters + kConsumerRegisters <= 2 * (65536 / 2 / kThreads), "two blocks a multiprocessor");

// Sizes in bytes of what lies in shared memory. kCi channels are 2, 3 or 4: a lone one has a second of zeros.
template <int kCi, int kN>
struct StemTile {
    static constexpr int kChunks8 = 128 + 16;  // so that lanes that write every fourth chunk share no bank
    static constexpr int kPlane = kN / 8 * kChunks8;
    static constexpr int kRow = kCi * kPlane;
    static constexpr int kStage = 4 * kRow;
    static constexpr int kStaging = (kN + 15) / 16 * 8 * 128;  // one pooled row, [column][64]
    static constexpr int kZeros = kCi % 2 * kPlane;
    static constexpr int kAffine = kCouts * 16;
    static constexpr int kRoom = 113 * 1024 - kStaging - kZeros - kAffine - 8 * 16;  // two blocks share 228 KB
    static constexpr int kStages = std::min(8, kRoom / kStage);
    static constexpr int kShared = kStages * kStage + kStaging + kZeros + kAffine + kStages * 16;
    static constexpr int kSteps = kCi / 2 * 7 + kCi % 2 * 4;
    static_assert(kStages >= 5, "four stages in use and one under way");
    static_assert(kN / 4 < 31, "a warp covers a row and its neighbours");
};

enum class Layout { planes, pixels, strided };  // [Ci][W] and [W][Ci] read as vectors; anything element by element

struct StemArgs {
    const char* x;
    const uint4* w;
    const float* affine;
    char* y;
    int64_t clip_stride, channel_stride, frame_stride, row_stride, pixel_stride;  // of x in bytes
    PixelType x_type;
    Layout layout;
    bool padded;
    int channels, frames, height, width;  // of x
    int out_height, out_width;            // of the convolution
    int pooled_frames, pooled_height, pooled_width;
    int strip, strips, tile,
        tiles;  // pooled rows of a strip, strips of a frame, pooled columns of a tile, tiles of a row
    int items;  // a strip of a tile of a pair of frames each
    float pixel_scale[4], pixel_bias[4];
};

struct Item {
    int64_t pair;           // clip * pooled_frames + pooled frame
    int clip, frame;        // the first of two, the second perhaps the same
    int pooled_row, count;  // first pooled row, pooled rows
    int row;                // first row of the convolution; -1 is above it
    int pooled_column;      // first pooled column
    int column;             // of the convolution: first of the tile, a multiple of 4

    __device__ __forceinline__ Item(const StemArgs& a, int index) {
        int tile = index % a.tiles, rest = index / a.tiles;
        int strip = rest % a.strips;
        pair = rest / a.strips;
        clip = int(pair) / a.pooled_frames;
        frame = 2 * (int(pair) % a.pooled_frames);
        pooled_row = strip * a.strip;
        count = min(a.strip, a.pooled_height - pooled_row);
        row = 2 * pooled_row - a.padded;
        pooled_column = tile * a.tile;
        column = 2 * pooled_column - (a.padded && tile ? 4 : 0);
    }
    __device__ __forceinline__ int stages() const { return 2 * count + 4; }  // of 2 count + 1 rows
};

template <int kCi, int kN>
struct StemShared {
    using Tile = StemTile<kCi, kN>;
    uint32_t ring, staging, zeros, affine, barriers;

    __device__ __forceinline__ explicit StemShared(const void* base)
        : ring(shared_address(base)),
          staging(ring + Tile::kStages * Tile::kStage),
          zeros(staging + Tile::kStaging),
          affine(zeros + Tile::kZeros),
          barriers(affine + Tile::kAffine) {}
    __device__ __forceinline__ uint32_t full(int stage) const { return barriers + 16 * stage; }
    __device__ __forceinline__ uint32_t empty(int stage) const { return barriers + 16 * stage + 8; }
};

// ---- Producers.

// The place of a producer's lane in the clip: 8 pixels of one row of every stage of an item.
struct Cursor {
    const char* source;  // the first pixel's channel 0
    int row, pixel;      // of the image, perhaps outside

    __device__ __forceinline__ Cursor(const StemArgs& a, const Item& item, int warp, int group)
        : row(2 * item.row - 3 + warp / 2), pixel(2 * item.column + 8 * group) {
        int frame = min(item.frame + warp % 2, a.frames - 1);  // a cut window has one frame, seen twice
        source = a.x + item.clip * a.clip_stride + frame * a.frame_stride + row * a.row_stride + pixel * a.pixel_stride;
    }
    __device__ __forceinline__ void advance(const StemArgs& a) {
        row += 2;
        source += 2 * a.row_stride;
    }
};

// What a lane holds of a stage on its way: all channels of 8 pixels as they lie in memory.
template <typename T, typename In, int kCi, Layout kLayout>
struct Pixels {
    static constexpr int kSize = sizeof(In), kUnit = kSize == 1 ? 8 : 16;  // bytes of an element, of a vector
    static constexpr int kWords = 2 * kCi * kSize;
    uint32_t v[kWords];
    bool inside;  // the image

    __device__ __forceinline__ void load(const StemArgs& a, const Cursor& cursor) {
        inside = unsigned(cursor.row) < unsigned(a.height);
        const char* source = cursor.source;
        constexpr int kRuns = kLayout == Layout::planes ? kCi : 1, kRun = kWords / kRuns;
#pragma unroll
        for (int run = 0; run < kRuns; ++run, source += a.channel_stride)
#pragma unroll
            for (int i = 0; i < kRun; i += kUnit / 4) {
                bool wanted = inside && (run == 0 || kCi > 2 || kLayout == Layout::pixels || run < a.channels);
                uint32_t* out = v + run * kRun + i;
                if constexpr (kUnit == 16) {
                    uint4 u{};
                    if (wanted) load_once(u, source + 4 * i);
                    out[0] = u.x, out[1] = u.y, out[2] = u.z, out[3] = u.w;
                } else {
                    uint2 u{};
                    if (wanted) load_once(u, source + 4 * i);
                    out[0] = u.x, out[1] = u.y;
                }
            }
    }

    // Pixels 2 i and 2 i + 1 of channel c in the compute dtype.
    __device__ __forceinline__ uint32_t pair(const StemArgs& a, int c, int i) const {
        int first = kLayout == Layout::planes ? 8 * c + 2 * i : 2 * i * kCi + c;
        int second = kLayout == Layout::planes ? first + 1 : first + kCi;
        if constexpr (std::is_same_v<T, In> && kLayout == Layout::planes) {
            return v[first / 2];
        } else if constexpr (std::is_same_v<T, In>) {
            uint32_t halves = (first % 2 ? 0x32 : 0x10) | (second % 2 ? 0x7600 : 0x5400);
            return __byte_perm(v[first / 2], v[second / 2], halves);
        } else {
            uint32_t word = pack<T>(element(a, c, first), element(a, c, second));
            return kSize > 1 || inside ? word : 0;
        }
    }

    __device__ __forceinline__ float element(const StemArgs& a, int c, int i) const {
        if constexpr (kSize == 4) {
            return __uint_as_float(v[i]);
        } else if constexpr (kSize == 2) {
            float2 both = unpack<In>(v[i / 2]);
            return i % 2 ? both.y : both.x;
        } else {  // 2^23 + the byte, exactly
            float shifted = __uint_as_float(__byte_perm(v[i / 4], 0x4b000000, 0x7540 | i % 4));
            return fmaf(shifted - 8388608.0f, a.pixel_scale[c], a.pixel_bias[c]);
        }
    }
};

// The producers' side of a stage. Warp `warp` writes row warp / 2 of frame warp % 2. Lane g has pixels 8 g .. 8 g + 7
// of the tile, of which chunks 4 g .. 4 g + 3 begin 4 pixels before; lane 31 has those to the left of the tile.
template <int kCi, int kN>
struct StageWriter {
    using Tile = StemTile<kCi, kN>;
    const StemShared<kCi, kN>& shared;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t target = shared.ring + warp * Tile::kRow + lane / 2 * Tile::kChunks8 + lane % 2 * 64;
    Ring<Tile::kStages> ring;

    __device__ __forceinline__ explicit StageWriter(const StemShared<kCi, kN>& shared) : shared(shared) {}
    __device__ __forceinline__ int group() const { return lane == 31 ? -1 : lane; }
    __device__ __forceinline__ void open() { barrier_wait(shared.empty(ring.index), ring.parity ^ 1); }
    __device__ __forceinline__ void write(const uint32_t (&own)[4], int channel) {
        uint32_t u[7];             // pixels 8 g - 4 .. 8 g + 9
        int here = thread_here();  // a shuffle looks at its last 5 bits
        u[0] = __shfl_sync(~0u, own[2], here + 31);
        u[1] = __shfl_sync(~0u, own[3], here + 31);
#pragma unroll
        for (int j = 0; j < 4; ++j) u[2 + j] = own[j];
        u[6] = __shfl_sync(~0u, own[0], here + 1);
        if (lane < kN / 4)
#pragma unroll
            for (int j = 0; j < 4; ++j)
                store_shared(target + ring.index * Tile::kStage + channel * Tile::kPlane + 16 * j,
                             uint4{u[j], u[j + 1], u[j + 2], u[j + 3]});
        __syncwarp();  // a channel at a time: fewer registers
    }
    __device__ __forceinline__ void close() {
        fence_proxy_async();
        __syncwarp();
        if (lane == 0) barrier_arrive(shared.full(ring.index));
        ring.advance();
    }
};

template <typename T, typename In, int kCi, int kN, Layout kLayout>
__device__ __forceinline__ void produce(const StemArgs& a, const StemShared<kCi, kN>& shared) {
    using Stage = Pixels<T, In, kCi, kLayout>;
    // Stages in registers; where that is one, it is converted before it has to wait and the next is on its way.
    constexpr bool kCopied = kLayout == Layout::planes && std::is_same_v<T, In>;
    constexpr int kAhead = (kCopied || sizeof(In) == 1) && Stage::kWords <= 12 ? 2 : 1;
    constexpr bool kEarly = kAhead == 1 && kCi < 4;
    StageWriter<kCi, kN> writer(shared);
    Stage ahead[kAhead];
    for (int index = blockIdx.x; index < a.items; index += gridDim.x) {
        Item item(a, index);
        Cursor cursor(a, item, writer.warp, writer.group());
        bool beside = unsigned(cursor.pixel) >= unsigned(a.width);  // a vector lies in the image or beside it
        if (beside || writer.group() > kN / 4) cursor.row = -(1 << 30);

        int left = item.stages();  // to be fetched, an even number
        auto fetch = [&](Stage& stage) {
            if (left-- <= 0) return;
            stage.load(a, cursor);
            cursor.advance(a);
        };
#pragma unroll
        for (int i = 0; i < kAhead; ++i) fetch(ahead[i]);
        while (left > -kAhead) {
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                uint32_t own[kCi][4];
#pragma unroll
                for (int j = 0; j < 4 * kCi; ++j) own[j / 4][j % 4] = ahead[i].pair(a, j / 4, j % 4);
                if (kEarly) fetch(ahead[i]);
                writer.open();
#pragma unroll
                for (int c = 0; c < kCi; ++c) writer.write(own[c], c);
                writer.close();
                if (!kEarly) fetch(ahead[i]);
            }
        }
    }
}

// The same for layouts and widths that vectors do not fit: element by element.
template <typename T, typename In, int kCi, int kN>
__device__ __forceinline__ void produce_strided(const StemArgs& a, const StemShared<kCi, kN>& shared) {
    StageWriter<kCi, kN> writer(shared);
    for (int index = blockIdx.x; index < a.items; index += gridDim.x) {
        Item item(a, index);
        Cursor cursor(a, item, writer.warp, writer.group());
        for (int left = item.stages(); left > 0; --left, cursor.advance(a)) {
            bool inside = unsigned(cursor.row) < unsigned(a.height);
            writer.open();
#pragma unroll 1
            for (int c = 0; c < kCi; ++c) {
                auto value = [&](int p) {
                    if (!inside || unsigned(cursor.pixel + p) >= unsigned(a.width) || c >= a.channels) return 0.0f;
                    auto* source = cursor.source + c * a.channel_stride + p * a.pixel_stride;
                    float v = float(*reinterpret_cast<const In*>(source));
                    return sizeof(In) > 1 ? v : fmaf(v, a.pixel_scale[c], a.pixel_bias[c]);
                };
                uint32_t own[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) own[i] = pack<T>(value(2 * i), value(2 * i + 1));
                writer.write(own, c);
            }
            writer.close();
        }
    }
}

template <typename T, typename In, int kCi, int kN>
__device__ __forceinline__ void produce(const StemArgs& a, const StemShared<kCi, kN>& shared) {
    if (a.layout == Layout::planes)
        produce<T, In, kCi, kN, Layout::planes>(a, shared);
    else if (a.layout == Layout::pixels)
        produce<T, In, kCi, kN, Layout::pixels>(a, shared);
    else
        produce_strided<T, In, kCi, kN>(a, shared);
}

// ---- Consumers.

// d = the row of outputs whose first stage is `stage`, of one of the two frames.
template <typename T, int kCi, int kN>
__device__ __forceinline__ void multiply(float (&d)[kN / 2], const uint32_t (&w)[StemTile<kCi, kN>::kSteps][4],
                                         const StemShared<kCi, kN>& shared, int stage, int frame) {
    using Tile = StemTile<kCi, kN>;
    wgmma_forget(d);
    wgmma_fence();
#pragma unroll
    for (int kh = 0; kh < 7; ++kh) {
        int index = stage + kh / 2;
        if (index >= Tile::kStages) index -= Tile::kStages;
        uint32_t row = shared.ring + index * Tile::kStage + (kh % 2 * 2 + frame) * Tile::kRow;
#pragma unroll
        for (int c = 0; c + 1 < kCi; c += 2)
            wgmma_rows<T>(d, w[c / 2 * 7 + kh], plain_descriptor(row + c * Tile::kPlane, Tile::kPlane, Tile::kChunks8),
                          kh + c > 0);
        if (kCi % 2 && kh % 2 == 0) {
            uint32_t last = row + (kCi - 1) * Tile::kPlane;
            uint32_t next = kh == 6 ? shared.zeros - last : 2 * Tile::kRow;  // both rows are of one stage
            wgmma_rows<T>(d, w[kCi / 2 * 7 + kh / 2], plain_descriptor(last, next, Tile::kChunks8), true);
        }
    }
    wgmma_commit();
}

// h = the maxima over the three columns of each pooled column, and over h if kJoin. d[4 j + 2 m + e] is cout 16 warp +
// 8 m + lane / 4, column 8 j + 2 (lane % 4) + e. So a thread has both columns 2 q, 2 q + 1 of pooled column q = 4 j +
// lane % 4, for h[2 j + m], and the third, 2 q + 2 or if padded 2 q - 1, is in the next or the last lane of four.
template <int kN, bool kJoin>
__device__ __forceinline__ void pool_columns(const StemArgs& a, int column, float (&d)[kN / 2], float (&h)[kN / 4]) {
    int lane = threadIdx.x % 32, quad = lane % 4;
    if (column + kN > a.out_width)
#pragma unroll
        for (int i = 0; i < kN / 2; ++i)
            if (column + i / 4 * 8 + quad * 2 + i % 2 >= a.out_width) d[i] = kLowest;
    int neighbour = lane / 4 * 4 + (quad + (a.padded ? 3 : 1)) % 4;
    auto add = [&](int i, float given) {
        float most = larger(larger(d[2 * i], d[2 * i + 1]), __shfl_sync(~0u, given, neighbour));
        h[i] = kJoin ? larger(h[i], most) : most;
    };
    if (a.padded) {
#pragma unroll
        for (int i = 0; i < kN / 4; ++i) add(i, quad < 3 ? d[2 * i + 1] : i < 2 ? kLowest : d[2 * i - 3]);
    } else {
#pragma unroll
        for (int i = 0; i < kN / 4; ++i) add(i, quad > 0 ? d[2 * i] : i + 2 < kN / 4 ? d[2 * i + 4] : kLowest);
    }
}

// Normalises one pooled row, h as in pool_columns, and turns it to [column][64] in shared memory: two 8x8 matrices at a
// time, of couts 16 warp + {0, 8} and pooled columns 8 i .. 8 i + 7. Lanes hold columns 2 k, 2 k + 1 of a matrix, which
// we fill with pooled columns 8 i + k and 8 i + k + 4. A column's pieces of 8 couts are permuted: no bank conflicts.
template <typename T, int kN>
__device__ __forceinline__ void stage_row(const float (&h)[kN / 4], uint32_t staging, uint32_t affine) {
    int thread = thread_here() % 128, lane = thread % 32, warp = thread / 32;
    uint4 rows[2];  // mean, scale and bias of a cout
#pragma unroll
    for (int m = 0; m < 2; ++m) rows[m] = load_shared(affine + (16 * warp + 8 * m + lane / 4) * 16);
    auto value = [&](int i) {
        if (i >= kN / 4) return 0.0f;
        const uint4& row = rows[i % 2];
        return relu(normalise(h[i], __uint_as_float(row.x), __uint_as_float(row.y), __uint_as_float(row.z)));
    };
    named_sync(1, 128);  // the row before has left
    int column = lane % 2 * 4 + lane % 8 / 2, piece = 2 * warp + lane / 8 % 2;
    uint32_t turned = staging + column * 128 + ((piece ^ column) << 4);
#pragma unroll
    for (int i = 0; i < kN / 4; i += 4)
        store_transposed(turned + i * 256, pack<T>(value(i), value(i + 2)), pack<T>(value(i + 1), value(i + 3)));
}

// Where an item's pooled rows go, and which columns of the tile they are.
struct Target {
    char* y;
    int skip, count;

    __device__ __forceinline__ Target(const StemArgs& a, const Item& item)
        : skip(item.pooled_column - item.column / 2), count(min(a.tile, a.pooled_width - item.pooled_column)) {
        int64_t position = item.pair * a.pooled_height + item.pooled_row;
        y = a.y + (position * a.pooled_width + item.pooled_column) * (2 * kCouts);
    }
    // Stores the row that stage_row has left.
    __device__ __forceinline__ void store_row(const StemArgs& a, uint32_t staging) {
        int thread = thread_here() % 128, piece = thread % 8;
        named_sync(1, 128);
        for (int q = thread / 8; q < count; q += 16)
            *reinterpret_cast<uint4*>(y + q * (2 * kCouts) + piece * 16) =
                load_shared(staging + (skip + q) * 128 + ((piece ^ (skip + q) % 8) << 4));
        y += a.pooled_width * (2 * kCouts);
    }
};

template <typename T, int kCi, int kN>
__device__ __forceinline__ void consume(const StemArgs& a, const StemShared<kCi, kN>& shared) {
    using Tile = StemTile<kCi, kN>;
    int thread = threadIdx.x % 128, lane = thread % 32, cout = thread / 32 * 16 + lane / 4;
    uint32_t sign[2];
#pragma unroll
    for (int m = 0; m < 2; ++m) sign[m] = a.affine[kCouts + cout + 8 * m] < 0 ? 0x80008000 : 0;
    uint32_t w[Tile::kSteps][4];
#pragma unroll
    for (int step = 0; step < Tile::kSteps; ++step) {
        uint4 u = a.w[128 * step + thread];
        w[step][0] = u.x ^ sign[0], w[step][1] = u.y ^ sign[1], w[step][2] = u.z ^ sign[0], w[step][3] = u.w ^ sign[1];
    }

    float d0[kN / 2], d1[kN / 2];  // the two frames of a row on their way
    // Maxima of a window's rows so far; and of the row that ends it and begins the next window.
    float best[kN / 4], next[kN / 4];
    Ring<Tile::kStages> filled;
    int first = 0, done = 0;  // of the ring: first stage of the row that is multiplied, oldest stage in use
    auto await = [&](int count) {
        for (int i = 0; i < count; ++i, filled.advance()) barrier_wait(shared.full(filled.index), filled.parity);
    };
    auto release = [&](int count) {
        for (int i = 0; i < count; ++i) {
            if (lane == 0) barrier_arrive(shared.empty(done));
            if (++done == Tile::kStages) done = 0;
        }
    };
    auto start_row = [&] {  // the first frame of the next
        if (++first == Tile::kStages) first = 0;
        await(1);
        multiply<T, kCi, kN>(d0, w, shared, first, 0);
    };
    // ptxas lets products run beside other work only if every turn of a loop, and its end, waits for all of them once,
    // and if what was made of their sums is pinned before the next replace them.
    for (int index = blockIdx.x; index < a.items; index += gridDim.x) {
        Item item(a, index);
        Target target(a, item);
        int row = item.row, column = item.column, last = row + 2 * item.count;  // row is under way in d0 and d1
        auto exists = [&] { return unsigned(row) < unsigned(a.out_height); };
        auto lowest = [](float (&v)[kN / 4]) {
#pragma unroll
            for (int i = 0; i < kN / 4; ++i) v[i] = kLowest;
        };
        auto settle = [&] {  // best = the window that ends, staged; then the window that begins
#pragma unroll
            for (int i = 0; i < kN / 4; ++i) best[i] = larger(best[i], next[i]);
            stage_row<T, kN>(best, shared.staging, shared.affine);
#pragma unroll
            for (int i = 0; i < kN / 4; ++i) best[i] = next[i];
            wgmma_pin(best);
        };
        await(4);
        multiply<T, kCi, kN>(d0, w, shared, first, 0);
        multiply<T, kCi, kN>(d1, w, shared, first, 1);
        wgmma_wait<0>();
        wgmma_pin(d0);
        wgmma_pin(d1);
        pool_columns<kN, false>(a, column, d0, best);
        start_row();
        pool_columns<kN, true>(a, column, d1, best);
        if (!exists()) lowest(best);
        wgmma_pin(best);
        release(1);
        multiply<T, kCi, kN>(d1, w, shared, first, 1);
        while (true) {
            ++row;
            wgmma_wait<1>();
            wgmma_pin(d0);
            if (exists()) pool_columns<kN, true>(a, column, d0, best);
            wgmma_pin(best);
            start_row();
            wgmma_wait<1>();
            wgmma_pin(d1);
            if (exists()) pool_columns<kN, true>(a, column, d1, best);
            wgmma_pin(best);
            release(1);
            multiply<T, kCi, kN>(d1, w, shared, first, 1);
            ++row;
            wgmma_wait<0>();
            wgmma_pin(d0);
            wgmma_pin(d1);
            pool_columns<kN, false>(a, column, d0, next);
            if (row == last) break;
            start_row();
            pool_columns<kN, true>(a, column, d1, next);
            if (!exists()) lowest(next);
            release(1);
            settle();
            multiply<T, kCi, kN>(d1, w, shared, first, 1);
            target.store_row(a, shared.staging);
        }
        release(4);
        first = done;
        pool_columns<kN, true>(a, column, d1, next);
        if (!exists()) lowest(next);
        settle();
        target.store_row(a, shared.staging);
    }
}

template <typename T, int kCi, int kN>
__global__ void __launch_bounds__(kThreads, 2) stem_infer_kernel(const __grid_constant__ StemArgs a) {
    using Tile = StemTile<kCi, kN>;
    extern __shared__ __align__(1024) char memory[];
    StemShared<kCi, kN> shared(memory);
    if (threadIdx.x == 0) {
        for (int i = 0; i < Tile::kStages; ++i) barrier_init(shared.full(i), 4), barrier_init(shared.empty(i), 4);
        barrier_init_fence();
    }
    for (int i = threadIdx.x; i < Tile::kZeros / 16; i += kThreads) store_shared(shared.zeros + 16 * i, uint4{});
    fence_proxy_async();
    if (threadIdx.x < kCouts) {
        float mean = a.affine[threadIdx.x], scale = a.affine[kCouts + threadIdx.x];
        float bias = a.affine[2 * kCouts + threadIdx.x];
        uint4 row{__float_as_uint(scale < 0 ? -mean : mean), __float_as_uint(scale < 0 ? -scale : scale),
                  __float_as_uint(bias), 0};
        store_shared(shared.affine + 16 * threadIdx.x, row);
    }
    __syncthreads();
    int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    if (group == 0) {
        give_registers<kProducerRegisters>();
        dependency_wait();
        if (a.x_type == PixelType::bf16)
            produce<T, __nv_bfloat16>(a, shared);
        else if (a.x_type == PixelType::fp16)
            produce<T, __half>(a, shared);
        else if (a.x_type == PixelType::fp32)
            produce<T, float>(a, shared);
        else
            produce<T, uint8_t>(a, shared);
    } else {
        take_registers<kConsumerRegisters>();
        consume<T>(a, shared);
    }
}

// ---- Host.

struct StemPlan {
    int out_height, out_width, pooled_frames, pooled_height, pooled_width;
    int columns;  // N
    int strip, strips, tile, tiles, items, blocks;
};

// The sizes of the convolution and the pool, the tile and the strip that finish first; or why there are none. A row
// takes the matrix unit as long as its columns, and an item as long as its rows and some more until its first products.
const char* stem_plan(StemPlan& best, const StemShape& s) {
    int device, processors;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    StemSizes sizes;
    if (const char* reason = stem_sizes(sizes, "stem_infer", s)) return reason;
    auto [height, width, pooled_frames, pooled_height, pooled_width] = sizes;

    double best_cost = -1;
    for (int n : {56, 64, 80}) {
        if (n > 56 && s.channels > 3) continue;
        int64_t tile = width <= n ? pooled_width : (n - 4) / 2, tiles = (pooled_width + tile - 1) / tile;
        for (int64_t strips = 1; strips <= pooled_height; ++strips) {
            int64_t strip = (pooled_height + strips - 1) / strips;
            if ((pooled_height + strip - 1) / strip != strips) continue;
            double items = double(s.clips) * double(pooled_frames * strips * tiles);
            if (items > 2147000000.0) break;
            double turns = double((int64_t(items) + 2 * processors - 1) / (2 * processors));
            double cost = turns * double(2 * strip + 5) * (n + 8);
            if (best_cost >= 0 && cost >= best_cost) continue;
            best_cost = cost;
            best = {int(height), int(width),  int(pooled_frames), int(pooled_height), int(pooled_width), n,
                    int(strip),  int(strips), int(tile),          int(tiles),         int(items),        0};
            best.blocks = std::min(best.items, 2 * processors);
        }
    }
    return best_cost < 0 ? "stem_infer: expected fewer than 2^31 tiles" : nullptr;
}

template <typename T, int kCi, int kN>
const char* launch(const StemPlan& plan, const StemArgs& args, cudaStream_t stream) {
    constexpr int kShared = StemTile<kCi, kN>::kShared;
    cudaError_t error =
        launch_dependent(stem_infer_kernel<T, kCi, kN>, dim3(plan.blocks), kThreads, kShared, stream, args);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename T, int kCi>
const char* launch(const StemPlan& plan, const StemArgs& args, cudaStream_t stream) {
    if (plan.columns == 56) return launch<T, kCi, 56>(plan, args, stream);
    if constexpr (kCi < 4) {
        if (plan.columns == 64) return launch<T, kCi, 64>(plan, args, stream);
        if (plan.columns == 80) return launch<T, kCi, 80>(plan, args, stream);
    }
    return "stem_infer: no kernel for the planned tile";
}

template <typename T>
const char* launch(const StemPlan& plan, const StemArgs& args, cudaStream_t stream) {
    if (args.channels < 3) return launch<T, 2>(plan, args, stream);
    return args.channels == 3 ? launch<T, 3>(plan, args, stream) : launch<T, 4>(plan, args, stream);
}

// How the clip is read. A vector has 8 pixels, all of them in the image or none.
Layout layout_of(const StemInfer& p, const StemArgs& a, int size) {
    bool planes = a.pixel_stride == size;
    bool pixels = p.shape.channels > 1 && a.channel_stride == size && a.pixel_stride == size * p.shape.channels;
    int64_t unit = size == 1 ? 8 : 16, all = reinterpret_cast<uintptr_t>(p.x);
    all |= a.clip_stride | a.frame_stride | a.row_stride | (planes ? a.channel_stride : 0);
    if (p.shape.width % 8 || all % unit || !(planes || pixels)) return Layout::strided;
    return planes ? Layout::planes : Layout::pixels;
}

}  // namespace

const char* stem_infer_why_not(const StemShape& shape) {
    StemPlan plan;
    return stem_plan(plan, shape);
}

const char* stem_infer(const StemInfer& p) {
    StemPlan plan;
    if (const char* error = stem_plan(plan, p.shape)) return error;
    constexpr int kSizes[] = {2, 2, 4, 1};
    int size = kSizes[int(p.x_type)];
    auto stride = [&](int axis, int64_t count) { return count == 1 ? 0 : p.strides[axis] * size; };
    StemArgs args{};
    args.x = static_cast<const char*>(p.x);
    args.w = static_cast<const uint4*>(p.w);
    args.affine = p.affine;
    args.y = static_cast<char*>(p.y);
    args.clip_stride = stride(0, p.shape.clips);
    args.channel_stride = stride(1, p.shape.channels);
    args.frame_stride = stride(2, p.shape.frames);
    args.row_stride = stride(3, p.shape.height);
    args.pixel_stride = p.strides[4] * size;
    args.x_type = p.x_type;
    args.layout = layout_of(p, args, size);
    args.padded = p.shape.padded;
    args.channels = int(p.shape.channels);
    args.frames = int(p.shape.frames);
    args.height = int(p.shape.height);
    args.width = int(p.shape.width);
    args.out_height = plan.out_height;
    args.out_width = plan.out_width;
    args.pooled_frames = plan.pooled_frames;
    args.pooled_height = plan.pooled_height;
    args.pooled_width = plan.pooled_width;
    args.strip = plan.strip;
    args.strips = plan.strips;
    args.tile = plan.tile;
    args.tiles = plan.tiles;
    args.items = plan.items;
    std::copy(p.pixel_scale, p.pixel_scale + 4, args.pixel_scale);
    std::copy(p.pixel_bias, p.pixel_bias + 4, args.pixel_bias);
    return p.dtype == DType::bf16 ? launch<__nv_bfloat16>(plan, args, p.stream) : launch<__half>(plan, args, p.stream);
}

}  // namespace p3d
