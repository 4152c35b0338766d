// How the kernels that convolve a clip by the stem's weights read and multiply it: stem_infer.cu, stem_fwd.cu and
// stem_wgrad.cu.
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
// The weights stay in registers: register 2 h + m of a thread is cout 16 warp + 8 m + lane / 4, k = 8 h + 2 (lane % 4)
// + {0, 1} of a step.
//
// In shared memory the chunks of a row lie one after another, 8 of them (a core matrix) in 128 bytes, with 16 bytes
// between. A stage has four image rows, [row][frame][channel][chunk]: two of each of two frames, by which consecutive
// rows of outputs differ, or four of one frame, by which pairs of rows differ. A ring of stages may end with its first
// rows once more, so that the rows of a window lie one after another wherever it begins.
//
// One warpgroup produces: each of its warps reads one row of every stage, 8 pixels a lane, which it fetches one or two
// stages ahead; a lane makes 4 chunks from its own pixels and those of its neighbours. The other warpgroup multiplies.
// Two blocks share a multiprocessor: one multiplies while the other works on its sums.
#pragma once

#include <algorithm>

#include "p3d.h"
#include "stem_infer.cuh"
#include "tile.cuh"

namespace p3d {

constexpr int kCouts = 64;
constexpr int kThreads = 256;  // a warpgroup that produces, a warpgroup that multiplies
constexpr int kProducerRegisters = 80, kConsumerRegisters = 176;
static_assert(kProducerRegisters + kConsumerRegisters <= 2 * (65536 / 2 / kThreads), "two blocks a multiprocessor");

// Sizes in bytes of what lies in shared memory. kChannels are 2, 3 or 4: a lone one has a second of zeros. kFrameCount
// frames of a stage are 1 or 2; `staging` is for outputs, `affine` for their normalisation.
template <int kChannels, int kColumns, int kFrameCount, int kStagingBytes, int kAffineBytes>
struct StemTile {
    static constexpr int kCi = kChannels, kN = kColumns, kFrames = kFrameCount, kRows = 4 / kFrames;
    static constexpr int kChunks8 = 128 + 16;  // so that lanes that write every fourth chunk share no bank
    static constexpr int kPlane = kN / 8 * kChunks8;
    static constexpr int kRow = kCi * kPlane;
    static constexpr int kStage = 4 * kRow;
    static constexpr int kStaging = kStagingBytes, kAffine = kAffineBytes;
    static constexpr int kZeros = kCi % 2 * kPlane;
    static constexpr int kRoom = 113 * 1024 - kStaging - kZeros - kAffine - 8 * 16;  // two blocks share 228 KB
    static constexpr int kStages = std::min(8, kRoom / kStage);
    static constexpr int kRepeated = 0;  // rows of the ring that lie past its end once more
    static constexpr int kShared = kStages * kStage + kStaging + kZeros + kAffine + kStages * 16;
    static constexpr int kUsed = (7 + kRows - 1) / kRows + (kFrames == 1);  // stages that outputs under way read
    static constexpr int kSteps = kCi / 2 * 7 + kCi % 2 * 4;
    static_assert(kStages > kUsed, "one stage under way");
    static_assert(kN / 4 < 31, "a warp covers a row and its neighbours");
    static_assert(kStaging % 1024 == 0, "a swizzle repeats every 1024 bytes");
};

template <typename Tile>
struct StemShared {
    uint32_t staging, ring, zeros, affine, barriers;  // zeros after the ring: a descriptor leads on to them

    __device__ __forceinline__ explicit StemShared(const void* base)
        : staging(shared_address(base)),
          ring(staging + Tile::kStaging),
          zeros(ring + Tile::kStages * Tile::kStage + Tile::kRepeated * Tile::kRow),
          affine(zeros + Tile::kZeros),
          barriers(affine + Tile::kAffine) {}
    __device__ __forceinline__ uint32_t full(int stage) const { return barriers + 16 * stage; }
    __device__ __forceinline__ uint32_t empty(int stage) const { return barriers + 16 * stage + 8; }

    __device__ __forceinline__ void prepare() const {  // by all threads, before a __syncthreads
        if (threadIdx.x == 0) {
            for (int i = 0; i < Tile::kStages; ++i) barrier_init(full(i), 4), barrier_init(empty(i), 4);
            barrier_init_fence();
        }
        for (int i = threadIdx.x; i < Tile::kZeros / 16; i += kThreads) store_shared(zeros + 16 * i, uint4{});
        fence_proxy_async();
    }
};

enum class Layout { planes, pixels, strided };  // [Ci][W] and [W][Ci] read as vectors; anything element by element

struct ClipArgs {
    const char* x;
    int64_t clip_stride, channel_stride, frame_stride, row_stride, pixel_stride;  // in bytes
    PixelType x_type;
    Layout layout;
    int channels, frames, height, width;
    float pixel_scale[4], pixel_bias[4];  // of uint8
};

// The place of a producer's lane in the clip: 8 pixels of one row of every stage of an item.
struct Cursor {
    const char* source;  // the first pixel's channel 0
    int row, pixel;      // of the image, perhaps outside

    __device__ __forceinline__ Cursor(const ClipArgs& a, int clip, int frame, int row, int pixel)
        : row(row), pixel(pixel) {
        source = a.x + clip * a.clip_stride + frame * a.frame_stride + row * a.row_stride + pixel * a.pixel_stride;
    }
    __device__ __forceinline__ void advance(const ClipArgs& a, int rows) {
        row += rows;
        source += rows * a.row_stride;
    }
};

// What a lane holds of a stage on its way: all channels of 8 pixels as they lie in memory.
template <typename T, typename In, int kCi, Layout kLayout>
struct Pixels {
    static constexpr int kSize = sizeof(In), kUnit = kSize == 1 ? 8 : 16;  // bytes of an element, of a vector
    static constexpr int kWords = 2 * kCi * kSize;
    uint32_t v[kWords];
    bool inside;  // the image

    __device__ __forceinline__ void load(const ClipArgs& a, const Cursor& cursor) {
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
    __device__ __forceinline__ uint32_t pair(const ClipArgs& a, int c, int i) const {
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

    __device__ __forceinline__ float element(const ClipArgs& a, int c, int i) const {
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

// The producers' side of a stage, of which each warp writes a row. Lane g has pixels 8 g .. 8 g + 7 of the tile, of
// which chunks 4 g .. 4 g + 3 begin 4 pixels before; lane 31 has those to the left of the tile.
template <typename Tile>
struct StageWriter {
    const StemShared<Tile>& shared;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t target = shared.ring + warp * Tile::kRow + lane / 2 * Tile::kChunks8 + lane % 2 * 64;
    StageRing<Tile::kStages> ring;

    __device__ __forceinline__ explicit StageWriter(const StemShared<Tile>& shared) : shared(shared) {}
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
        auto put = [&](uint32_t row) {
#pragma unroll
            for (int j = 0; j < 4; ++j)
                store_shared(row + channel * Tile::kPlane + 16 * j, uint4{u[j], u[j + 1], u[j + 2], u[j + 3]});
        };
        if (lane < Tile::kN / 4) {
            put(target + ring.index * Tile::kStage);
            if (Tile::kRepeated > 0 && 4 * ring.index + warp < Tile::kRepeated)
                put(target + (Tile::kStages + ring.index) * Tile::kStage);
        }
        __syncwarp();  // a channel at a time: fewer registers
    }
    __device__ __forceinline__ void close() {
        fence_proxy_async();
        __syncwarp();
        if (lane == 0) barrier_arrive(shared.full(ring.index));
        ring.advance();
    }
};

// Args are ClipArgs with a number of items and their type, made of the args and its index. An item says how many
// `stages` it takes, an even number where a stage has two frames, and where in the clip a lane's `cursor` starts.
template <typename T, typename In, Layout kLayout, typename Tile, typename Args>
__device__ __forceinline__ void produce(const Args& a, const StemShared<Tile>& shared) {
    constexpr int kCi = Tile::kCi;
    using Stage = Pixels<T, In, kCi, kLayout>;
    // Stages in registers; where that is one, it is converted before it has to wait and the next is on its way.
    constexpr bool kCopied = kLayout == Layout::planes && std::is_same_v<T, In>;
    constexpr int kAhead = (kCopied || sizeof(In) == 1) && Stage::kWords <= 12 ? 2 : 1;
    constexpr bool kEarly = kAhead == 1 && kCi < 4 && !std::is_same_v<T, __half>;  // which spills there
    StageWriter<Tile> writer(shared);
    Stage ahead[kAhead];
    for (int index = blockIdx.x; index < a.items; index += gridDim.x) {
        typename Args::Item item(a, index);
        Cursor cursor = item.cursor(a, writer.warp, writer.group());
        bool beside = unsigned(cursor.pixel) >= unsigned(a.width);  // a vector lies in the image or beside it
        if (beside || writer.group() > Tile::kN / 4) cursor.row = -(1 << 30);

        int left = item.stages();  // to be fetched
        auto fetch = [&](Stage& stage) {
            if (left-- <= 0) return;
            stage.load(a, cursor);
            cursor.advance(a, Tile::kRows);
        };
#pragma unroll
        for (int i = 0; i < kAhead; ++i) fetch(ahead[i]);
        while (left > -kAhead) {
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                if (i > 0 && Tile::kFrames == 1 && left <= -kAhead) break;  // an odd number
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
template <typename T, typename In, typename Tile, typename Args>
__device__ __forceinline__ void produce_strided(const Args& a, const StemShared<Tile>& shared) {
    StageWriter<Tile> writer(shared);
    for (int index = blockIdx.x; index < a.items; index += gridDim.x) {
        typename Args::Item item(a, index);
        Cursor cursor = item.cursor(a, writer.warp, writer.group());
        for (int left = item.stages(); left > 0; --left, cursor.advance(a, Tile::kRows)) {
            bool inside = unsigned(cursor.row) < unsigned(a.height);
            writer.open();
#pragma unroll 1
            for (int c = 0; c < Tile::kCi; ++c) {
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

template <typename T, typename In, typename Tile, typename Args>
__device__ __forceinline__ void produce(const Args& a, const StemShared<Tile>& shared) {
    if (a.layout == Layout::planes)
        produce<T, In, Layout::planes>(a, shared);
    else if (a.layout == Layout::pixels)
        produce<T, In, Layout::pixels>(a, shared);
    else
        produce_strided<T, In>(a, shared);
}

// ---- Consumers.

// The weights of a thread's registers, from [64][Ci][7][7]. `zeros`: in shared memory. A register of no weight
// loads its zero, for ptxas 13.0 sets one that it knows to be zero after the first product that reads it.
template <typename T, typename Tile, typename W>
__device__ __forceinline__ void load_weights(uint32_t (&w)[Tile::kSteps][4], const W* source, int channels,
                                             uint32_t zeros) {
    constexpr int kPairs = Tile::kCi / 2 * 7;  // steps of two channels
    int thread = threadIdx.x % 128, lane = thread % 32, quad = lane % 4;
#pragma unroll
    for (int step = 0; step < Tile::kSteps; ++step)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int cout = thread / 32 * 16 + i % 2 * 8 + lane / 4, half = i / 2;
            int channel = step < kPairs ? step / 7 * 2 + half : Tile::kCi - 1;
            int kh = step < kPairs ? step % 7 : (step - kPairs) * 2 + half;
            if (kh == 7) {
                w[step][i] = load_shared(zeros).x;
                continue;
            }
            bool real = channel < channels;
            const W* row = source + ((cout * channels + channel) * 7 + kh) * 7;
            float first = real && quad > 0 ? float(row[2 * quad - 1]) : 0.0f;
            w[step][i] = pack<T>(first, real ? float(row[2 * quad]) : 0.0f);
        }
}

// d = a row of outputs, the first or the second that begins in `stage`: of its first or second frame, or, if it has but
// one, two image rows further down.
template <typename T, typename Tile>
__device__ __forceinline__ void multiply(float (&d)[Tile::kN / 2], const uint32_t (&w)[Tile::kSteps][4],
                                         const StemShared<Tile>& shared, int stage, int which) {
    constexpr int kCi = Tile::kCi, kFrames = Tile::kFrames, kRows = Tile::kRows;
    wgmma_forget(d);
    wgmma_fence();
#pragma unroll
    for (int kh = 0; kh < 7; ++kh) {
        int line = kFrames == 1 ? 2 * which + kh : kh, slot = line % kRows * kFrames + (kFrames == 2 ? which : 0);
        int index = stage + line / kRows;
        if (index >= Tile::kStages) index -= Tile::kStages;
        uint32_t row = shared.ring + index * Tile::kStage + slot * Tile::kRow;
#pragma unroll
        for (int c = 0; c + 1 < kCi; c += 2)
            wgmma_rows<T>(d, w[c / 2 * 7 + kh], plain_descriptor(row + c * Tile::kPlane, Tile::kPlane, Tile::kChunks8),
                          kh + c > 0);
        if (kCi % 2 && kh % 2 == 0) {
            uint32_t last = row + (kCi - 1) * Tile::kPlane;
            uint32_t next = kh == 6 ? shared.zeros - last : kFrames * Tile::kRow;  // both rows are of one stage
            wgmma_rows<T>(d, w[kCi / 2 * 7 + kh / 2], plain_descriptor(last, next, Tile::kChunks8), true);
        }
    }
    wgmma_commit();
}

// ---- Host.

// How the clip is read. A vector has 8 pixels, all of them in the image or none.
inline void clip_args(ClipArgs& a, const void* x, const StemShape& shape, const int64_t (&strides)[5], PixelType type) {
    constexpr int kSizes[] = {2, 2, 4, 1};
    int size = kSizes[int(type)];
    auto stride = [&](int axis, int64_t count) { return count == 1 ? 0 : strides[axis] * size; };
    a.x = static_cast<const char*>(x);
    a.clip_stride = stride(0, shape.clips);
    a.channel_stride = stride(1, shape.channels);
    a.frame_stride = stride(2, shape.frames);
    a.row_stride = stride(3, shape.height);
    a.pixel_stride = strides[4] * size;
    a.x_type = type;
    a.channels = int(shape.channels);
    a.frames = int(shape.frames);
    a.height = int(shape.height);
    a.width = int(shape.width);

    bool planes = a.pixel_stride == size;
    bool pixels = a.channels > 1 && a.channel_stride == size && a.pixel_stride == size * a.channels;
    int64_t unit = size == 1 ? 8 : 16, all = reinterpret_cast<uintptr_t>(x);
    all |= a.clip_stride | a.frame_stride | a.row_stride | (planes ? a.channel_stride : 0);
    bool vectors = a.width % 8 == 0 && all % unit == 0 && (planes || pixels);
    a.layout = !vectors ? Layout::strided : planes ? Layout::planes : Layout::pixels;
}

}  // namespace p3d
