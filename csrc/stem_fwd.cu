// The stem in training up to its batch normalisation: the pooled raw output, and the statistics of all of it.
//
// stem_tile.cuh says how the clip is read and multiplied, stem_pool.cuh who does what. The slope of the normalisation
// has the sign of gamma, which is known before the statistics are: where it rises the pool takes the largest of a
// window, else the least. There the weights change their sign, so that all takes are of the largest, and what is stored
// changes it back. A gamma of 0, where all of a window are equal in the end, counts as positive, and so does NaN.
//
// A rounded output becomes an integer: its 16 bits in the order of its values, then 17 - tap. The largest integer of a
// window is the largest value, of equal ones the first tap. NaN, which rounding makes positive, is above infinity.
//
// The output row r multiplies stages r, r + 1, r + 2 and the first row of r + 3, of the two frames of a window. The
// first frame of the next row is under way while the sums of this one are added up and pooled.
//
// The weights come as the net keeps them: a thread reads and rounds those of its registers.
//
// A thread adds up its positions of two couts about a shift near their mean, joins these sums item by item, and at the
// end with those of its three neighbours that have the same couts. Rows that two strips share are the second's, but the
// last of a frame; columns that two tiles share are the second's, too, or the first's if the pool is padded.
#include <algorithm>

#include "p3d.h"
#include "stem_pool.cuh"

namespace p3d {
namespace {

constexpr int kTileRows(int columns) { return (columns + 15) / 16 * 8; }  // pooled columns that are staged

// Staged are one pooled row, [column][64], and its taps, [column][64]. Kept are 16 bytes a cout: see Kept.
template <int kCi, int kN>
using FwdTile = StemTile<kCi, kN, 2, (kTileRows(kN) * 192 + 1023) / 1024 * 1024, kCouts * 16>;

struct StemFwdArgs : PoolArgs {
    const void* w;
    const void* gamma;
    PixelType w_type, gamma_type;
    char* pooled;
    char* tap;
    float* partials;
};

// ---- Sums.

// What four lanes keep of a cout in shared memory: the moments of the block's items so far, of none the mean of which
// is a guess, and the pool's sign.
struct Kept {
    uint32_t address;

    __device__ __forceinline__ Kept(uint32_t affine, int m)
        : address(affine + (thread_here() % 128 / 32 * 16 + m * 8 + thread_here() % 32 / 4) * 16) {}
    __device__ __forceinline__ Moments moments() const {
        uint4 v = load_shared(address);
        return {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z)};
    }
    __device__ __forceinline__ uint32_t flip() const { return load_shared(address).w; }  // 0x80008000 or 0
    __device__ __forceinline__ void set(const Moments& moments, uint32_t flip) const {
        __syncwarp();
        if (thread_here() % 4 == 0)
            store_shared(address, uint4{__float_as_uint(moments.n), __float_as_uint(moments.mean),
                                        __float_as_uint(moments.m2), flip});
        __syncwarp();
    }
};

// Of a thread over positions of an item, of couts m = 0, 1, about a shift that is near their mean.
struct Sums {
    float sum[2] = {}, squares[2] = {};

    // A row v, as `consume` says, of which columns `low` to `high` count, from the thread's first on; all if kAll.
    template <typename T, bool kAll, int kCount>
    __device__ __forceinline__ void add(const uint32_t (&v)[kCount], const float (&shift)[2], int low, int high) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            constexpr auto inside = [](int column, int low, int high) { return column >= low && column < high; };
            int m = i % 2, column = i / 2 * 8;
            float2 both = unpack<T>(v[i]);
            float x = both.x - shift[m], y = both.y - shift[m];
            if (!kAll && !inside(column, low, high)) x = 0;
            if (!kAll && !inside(column + 1, low, high)) y = 0;
            sum[m] += x + y;
            squares[m] = fmaf(x, x, fmaf(y, y, squares[m]));
        }
    }
};

// ---- The pool.

constexpr int kLowest = -0x7fff0000;  // below all values, and so is what a tap takes from it

// The halves of a pair as integers in the order of their values as floats; and back.
__device__ __forceinline__ uint32_t ordered(uint32_t v) {
    uint32_t negative;  // all bits of a half
    asm("prmt.b32 %0, %1, 0, 0xbb99;" : "=r"(negative) : "r"(v));
    return v ^ (negative & 0x7fff7fff);
}

// u = the largest of both frames and of the three columns of each pooled column of a row, with what frame and column
// take from the tap. As in stem_infer.cu a thread has both columns 2 q, 2 q + 1 of pooled column q = 4 j + lane % 4,
// in the halves of v[frame][2 j + m], and the third, 2 q + 2 or if padded 2 q - 1, is in the next or last lane of four.
template <bool kPadded, int kCount>
__device__ __forceinline__ void pool_columns(const uint32_t (&v)[2][kCount], int (&u)[kCount]) {
    constexpr int kLow = kPadded ? 1 : 2, kHigh = kPadded ? 0 : 1;  // 2 - kw of a thread's columns
    int lane = thread_here() % 32, quad = lane % 4;
    int neighbour = lane / 4 * 4 + (quad + (kPadded ? 3 : 1)) % 4;
    int low[kCount], high[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        uint32_t first = ordered(v[0][i]), second = ordered(v[1][i]);
        low[i] = max(int(first << 16 | kLow) + 9, int(second << 16 | kLow));
        high[i] = max(int((first & 0xffff0000) | kHigh) + 9, int((second & 0xffff0000) | kHigh));
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        int given;
        if constexpr (kPadded)
            given = quad < 3 ? high[i] : i < 2 ? kLowest : high[i - 2];
        else
            given = quad > 0 ? low[i] : i + 2 < kCount ? low[i + 2] : kLowest;
        u[i] = max(max(low[i], high[i]), __shfl_sync(~0u, given, neighbour) + (kPadded ? 2 : -2));
    }
}

// Turns a pooled row, `best` as u in pool_columns, to [column][64] in shared memory: two 8x8 matrices at a time, of
// couts 16 warp + {0, 8} and pooled columns 8 i .. 8 i + 7. Lanes hold columns 2 k, 2 k + 1 of a matrix, which we fill
// with pooled columns 8 i + k and 8 i + k + 4. Taps go in pairs of couts 16 warp + c + {0, 8}, a matrix in all. A
// column's pieces of 16 bytes are permuted: no bank conflicts.
template <typename T, int kN>
__device__ __forceinline__ void stage_row(const int (&best)[kN / 4], uint32_t staging, uint32_t affine) {
    int thread = thread_here() % 128, lane = thread % 32, warp = thread / 32;
    auto key = [&](int i) { return i < kN / 4 ? uint32_t(best[i]) : 0; };
    uint32_t flip[2] = {Kept(affine, 0).flip(), Kept(affine, 1).flip()};
    named_sync(1, 128);  // the row before has left
    int column = lane % 2 * 4 + lane % 8 / 2, piece = 2 * warp + lane / 8 % 2;
    uint32_t turned = staging + column * 128 + ((piece ^ column) << 4);
    uint32_t taps = staging + kTileRows(kN) * 128 + column * 64 + ((warp ^ column / 2) << 4);
#pragma unroll
    for (int i = 0; i < kN / 4; i += 4) {
        uint32_t value[2], tag[2];
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            value[m] = ordered(__byte_perm(key(i + m), key(i + m + 2), 0x7632)) ^ flip[m];
            tag[m] = __byte_perm(key(i + 2 * m), key(i + 2 * m + 1), 0x0040);
        }
        store_transposed(turned + i * 256, value[0], value[1]);
        store_transposed(taps + i * 128, 0x11111111 - __byte_perm(tag[0], tag[1], 0x5410));
    }
}

// Stores the row that stage_row has left as a row of the item.
template <int kN>
__device__ __forceinline__ void store_row(const StemFwdArgs& a, uint32_t staging, const PoolItem& item, int row) {
    int thread = thread_here() % 128, skip = item.skip(), columns = item.columns(a);
    int64_t at = item.position(a) + int64_t(row) * a.pooled_width;
    named_sync(1, 128);
    char* pooled = a.pooled + at * (2 * kCouts);
    for (int q = thread / 8, piece = thread % 8; q < columns; q += 16)
        *reinterpret_cast<uint4*>(pooled + q * (2 * kCouts) + piece * 16) =
            load_shared(staging + (skip + q) * 128 + ((piece ^ (skip + q) % 8) << 4));
    if (!a.tap) return;
    char* tap = a.tap + at * kCouts;
    for (int q = thread / 4, piece = thread % 4; q < columns; q += 32) {
        uint4 v = load_shared(staging + kTileRows(kN) * 128 + (skip + q) * 64 + ((piece ^ (skip + q) % 8 / 2) << 4));
        *reinterpret_cast<uint4*>(tap + q * kCouts + piece * 16) =
            uint4{__byte_perm(v.x, v.y, 0x6420), __byte_perm(v.z, v.w, 0x6420), __byte_perm(v.x, v.y, 0x7531),
                  __byte_perm(v.z, v.w, 0x7531)};
    }
}

// ---- The consumers.

template <typename T, typename Tile>
__device__ __forceinline__ void consume(const StemFwdArgs& a, const StemShared<Tile>& shared) {
    constexpr int kN = Tile::kN, kCount = kN / 4;
    int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32, quad = lane % 4;
    int cout = 16 * warp + lane / 4;
    uint32_t flip[2] = {};  // the signs, where the pool takes the least
    if (a.gamma)
        as_floats(a.gamma, a.gamma_type, [&](auto gamma) {
#pragma unroll
            for (int m = 0; m < 2; ++m) flip[m] = float(gamma[cout + 8 * m]) < 0 ? 0x80008000 : 0;
        });
    uint32_t w[Tile::kSteps][4];
    as_floats(a.w, a.w_type, [&](auto source) { load_weights<T, Tile>(w, source, a.channels, shared.zeros); });
#pragma unroll
    for (int i = 0; i < 4 * Tile::kSteps; ++i) {
        uint32_t& pair = w[i / 4][i % 4];
        pair ^= flip[i % 2];
        asm volatile("" : "+r"(pair));  // now, not between products
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) Kept(shared.affine, m).set({}, flip[m]);

    float d0[kN / 2], d1[kN / 2];  // the two frames of a row on their way
    int best[kCount];              // of a window's rows so far
    StageRing<Tile::kStages> filled;
    int first = 0;  // of the ring: first stage of the row that is multiplied
    auto await = [&](int count) {
        for (int i = 0; i < count; ++i, filled.advance()) barrier_wait(shared.full(filled.index), filled.parity);
    };
    auto release = [&](int count) {
        for (int i = 0; i < count; ++i) {
            if (lane == 0) barrier_arrive(shared.empty(first));
            if (++first == Tile::kStages) first = 0;
        }
    };
    int index = blockIdx.x, row = 0;  // of all items; of the item's, that in d0 and d1
    PoolItem item(a, index);
    Sums sums;
    await(4);
    multiply<T>(d0, w, shared, first, 0);
    multiply<T>(d1, w, shared, first, 1);
    while (true) {
        wgmma_wait<0>();
        wgmma_pin(d0);
        wgmma_pin(d1);
        int columns = a.out_width - item.column;  // that exist
        if (columns < kN) {
            int mine = columns - 2 * quad;
#pragma unroll
            for (int i = 0; i < kN / 2; ++i)
                if (i / 4 * 8 + i % 2 >= mine) d0[i] = d1[i] = -__builtin_huge_valf();
        }
        uint32_t v[2][kCount];  // v[frame][2 j + m]: cout 16 warp + 8 m + lane / 4, columns 8 j + 2 quad + {0, 1}
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            v[0][i] = pack<T>(d0[2 * i], d0[2 * i + 1]);
            v[1][i] = pack<T>(d1[2 * i], d1[2 * i + 1]);
            asm volatile("" : "+r"(v[0][i]), "+r"(v[1][i]));
        }
        bool last = row == 2 * item.count, more = index + int(gridDim.x) < a.items;
        release(last ? 4 : 1);
        await(!last ? 1 : more ? 4 : 0);
        multiply<T>(d0, w, shared, first, 0);  // the next row, perhaps of the next item; after all, of what is there

        int line = item.row + row;
        bool exists = unsigned(line) < unsigned(a.out_height);
        bool ends = item.pooled_row + item.count == a.pooled_height;
        int frames = min(a.frames - item.frame, 2);
        if (a.partials && exists && (!last || ends)) {
            int low = 2 * item.skip(), high = low + 2 * a.tile;
            if (item.pooled_column + a.tile >= a.pooled_width) high = columns;
            float shift[2];
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                Kept kept(shared.affine, m);
                Moments total = kept.moments();
                if (total.n == 0 && line == max(item.row, 0)) {  // any element of the sample will do
                    kept.set({0, unpack<T>(v[0][m]).x, 0}, kept.flip());
                    total = kept.moments();
                }
                shift[m] = total.mean;
            }
            if (low == 0 && high >= kN) {
                sums.add<T, true>(v[0], shift, 0, kN);
                if (frames > 1) sums.add<T, true>(v[1], shift, 0, kN);
            } else {
                low -= 2 * quad, high -= 2 * quad;
                sums.add<T, false>(v[0], shift, low, high);
                if (frames > 1) sums.add<T, false>(v[1], shift, low, high);
            }
        }
        int u[kCount];
        if (a.padded)
            pool_columns<true>(v, u);
        else
            pool_columns<false>(v, u);
        if (!exists)
#pragma unroll
            for (int i = 0; i < kCount; ++i) u[i] = kLowest;
        bool settles = row % 2 == 0 && row > 0;  // the last row of a window, and the first of the next
        int more_rows = row % 2 == 0 ? 0 : 3;    // 3 (2 - kh)
        if (row > 0)
#pragma unroll
            for (int i = 0; i < kCount; ++i) best[i] = max(u[i] + more_rows, best[i]);
        if (settles) stage_row<T, kN>(best, shared.staging, shared.affine);
        if (row % 2 == 0)
#pragma unroll
            for (int i = 0; i < kCount; ++i) best[i] = u[i] + 6;
        multiply<T>(d1, w, shared, first, 1);
        if (settles && item.frame / 2 < a.pooled_frames) store_row<kN>(a, shared.staging, item, row / 2 - 1);
        ++row;
        if (!last) continue;

        int low = 2 * item.skip(), high = low + 2 * a.tile;
        if (item.pooled_column + a.tile >= a.pooled_width) high = columns;
        auto before = [&](int column, int e) { return (max(min(column, kN) - 2 * quad - e, 0) + 7) / 8; };
        int rows = min(item.row + 2 * item.count + ends, a.out_height) - max(item.row, 0);
        float n = float((before(high, 0) - before(low, 0) + before(high, 1) - before(low, 1)) * rows * frames);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            Kept kept(shared.affine, m);
            Moments total = kept.moments(), own;
            if (n > 0) {
                float offset = sums.sum[m] / n, m2 = sums.squares[m] - sums.sum[m] * offset;
                own = {n, total.mean + offset, m2 < 0 ? 0 : m2};  // not fmaxf, which would lose a NaN
            }
#pragma unroll
            for (int step = 1; step < 4; step *= 2)
                own.join(__shfl_xor_sync(~0u, own.n, step), __shfl_xor_sync(~0u, own.mean, step),
                         __shfl_xor_sync(~0u, own.m2, step));
            total.join(own.n, own.mean, own.m2);
            kept.set(total, kept.flip());
        }
        if (!more) break;
        index += gridDim.x, row = 0;
        const StemFwdArgs* args = &a;
        asm volatile("" : "+l"(args));  // else constants of divisions by what it holds stay in registers all the way
        item = PoolItem(*args, index);
        sums = {};
    }
    wgmma_wait<0>();
    if (a.partials && quad == 0) {
        float* out = a.partials + int64_t(blockIdx.x) * 3 * kCouts + cout;
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            Kept kept(shared.affine, m);
            Moments total = kept.moments();
            out[8 * m] = total.n, out[8 * m + 2 * kCouts] = total.m2;
            out[8 * m + kCouts] = kept.flip() ? -total.mean : total.mean;
        }
    }
}

template <typename T, int kCi, int kN>
__global__ void __launch_bounds__(kThreads, 2) stem_fwd_kernel(const __grid_constant__ StemFwdArgs a) {
    extern __shared__ __align__(1024) char memory[];
    StemShared<FwdTile<kCi, kN>> shared(memory);
    shared.prepare();
    __syncthreads();
    dependency_wait();
    int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    if (group == 0) {
        give_registers<kProducerRegisters>();
        if (a.x_type == PixelType::bf16)
            produce<T, __nv_bfloat16>(a, shared);
        else if (a.x_type == PixelType::fp16)
            produce<T, __half>(a, shared);
        else
            produce<T, float>(a, shared);
    } else {
        take_registers<kConsumerRegisters>();
        consume<T>(a, shared);
    }
}

// ---- Host.

template <typename T, int kCi, int kN>
const char* launch(const PoolPlan& plan, const StemFwdArgs& args, cudaStream_t stream) {
    constexpr int kShared = FwdTile<kCi, kN>::kShared;
    cudaError_t error =
        launch_dependent(stem_fwd_kernel<T, kCi, kN>, dim3(plan.blocks), kThreads, kShared, stream, args);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename T, int kCi>
const char* launch(const PoolPlan& plan, const StemFwdArgs& args, cudaStream_t stream) {
    if (plan.columns == 56) return launch<T, kCi, 56>(plan, args, stream);
    if constexpr (kCi < 4) {
        if (plan.columns == 64) return launch<T, kCi, 64>(plan, args, stream);
        if (plan.columns == 80) return launch<T, kCi, 80>(plan, args, stream);
    }
    return "stem_fwd: no kernel for the planned tile";
}

template <typename T>
const char* launch(const PoolPlan& plan, const StemFwdArgs& args, cudaStream_t stream) {
    if (args.channels < 3) return launch<T, 2>(plan, args, stream);
    return args.channels == 3 ? launch<T, 3>(plan, args, stream) : launch<T, 4>(plan, args, stream);
}

}  // namespace

const char* stem_fwd_why_not(const StemShape& shape) {
    PoolPlan plan;
    return pool_plan(plan, "stem_fwd", shape, true);
}

int stem_fwd_partials(const StemShape& shape) {
    PoolPlan plan;
    return pool_plan(plan, "stem_fwd", shape, true) ? 0 : plan.blocks;
}

const char* stem_fwd(const StemFwd& p) {
    if (p.x_type == PixelType::uint8 || p.w_type == PixelType::uint8 || p.gamma_type == PixelType::uint8)
        return "stem_fwd: expected float32, float16 or bfloat16 pixels, weights and gamma, got uint8";
    PoolPlan plan;
    if (const char* error = pool_plan(plan, "stem_fwd", p.shape, true)) return error;
    StemFwdArgs args{};
    clip_args(args, p.x, p.shape, p.strides, p.x_type);
    pool_args(args, plan, p.shape.padded);
    args.w = p.w;
    args.w_type = p.w_type;
    args.gamma = p.gamma;
    args.gamma_type = p.gamma_type;
    args.pooled = static_cast<char*>(p.pooled);
    args.tap = static_cast<char*>(p.tap);
    args.partials = p.partials;
    return p.dtype == DType::bf16 ? launch<__nv_bfloat16>(plan, args, p.stream) : launch<__half>(plan, args, p.stream);
}

}  // namespace p3d
