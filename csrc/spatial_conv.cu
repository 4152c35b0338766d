// Spatial 1x3x3 convolution, stride 1, padding 1: one matrix product a tap,
// D[cout, position] += W[tap][cout, channel] X[channel, position + tap].
//
// Couts are the rows of the matrix unit and positions its columns, so N is free to fit the frame and a statistic is a
// row sum. The positions of a tile are a run of the raster (tile.cuh); with a halo it lies in shared memory as eight
// planes [channel / 8][position][8], where a tap is the same matrix some positions on: nothing is loaded or normalised
// twice.
//
// A block is persistent and owns a range of couts. Its first warpgroup produces: it copies halo tiles (64 channels at a
// time), normalises them in place, and has the copy engine fetch weights [64 couts][64 channels] tap by tap. Two
// consumer warpgroups multiply and store. They work in one of two ways:
//   resident  (64 -> 64 channels) all weights stay; each warpgroup owns half of the tile's positions, and they take
//             turns: one multiplies while the other stores
//   streamed  (else) weights pass through a ring; each warpgroup owns 64 of 128 couts and both multiply the same
//             positions
#include <cudaTypedefs.h>

#include "p3d.h"
#include "spatial_plan.h"
#include "tile.cuh"
#include "wgmma.cuh"

namespace p3d {
namespace {

constexpr int kThreads = 384;  // a producer and two consumer warpgroups
constexpr int kProducerRegisters = 72, kConsumerRegisters = 216;
static_assert(kWeightBytes % 1024 == 0, "swizzled boxes need 1024-byte alignment");
static_assert(kProducerRegisters + 2 * kConsumerRegisters <= 3 * (65536 / kThreads / 8 * 8), "registers of the block");

struct Args {
    const char* x;            // [F, H, W, Ci]
    char* y;                  // [F, H, W, Co]
    const float* affine;      // [3, Ci] or nullptr
    const float* out_affine;  // [3, Co] or nullptr
    float* partials;          // [R, 3, Co] or nullptr
    Raster raster;
    int in_channels, out_channels;
    int tiles;            // of positions
    int halo;             // positions of a tile in shared memory
    int plane;            // bytes of a plane of a halo tile, 16 mod 128: eight planes share no bank
    int buffers, stages;  // halo tiles, weight stages
};

// The outputs of tile t start at position tile_start + W + 2 of the raster: the centre tap of its first halo position.
template <int kN, bool kResident>
__device__ __forceinline__ uint32_t tile_start(int tile) {
    return uint32_t(tile) * (kResident ? 2 * kN : kN);
}

// Where everything lies in shared memory. Barriers come in pairs: filled, then emptied.
struct Shared {
    uint32_t weights, staging, halo, barriers;

    __device__ __forceinline__ Shared(const void* base, const Args& a, bool resident)
        : weights(shared_address(base)),
          staging(weights + a.stages * (resident ? 1 : 2) * kWeightBytes),
          halo(staging + 2 * kStageBytes),
          barriers(halo + a.buffers * 8 * a.plane) {}
    __device__ __forceinline__ uint32_t weights_full(int stage) const { return barriers + 16 * stage; }
    __device__ __forceinline__ uint32_t weights_empty(int stage) const { return barriers + 16 * stage + 8; }
    __device__ __forceinline__ uint32_t halo_full(int buffer) const { return barriers + 16 * (kMaxStages + buffer); }
    __device__ __forceinline__ uint32_t halo_empty(int buffer) const {
        return barriers + 16 * (kMaxStages + buffer) + 8;
    }
};

struct Slot {  // of a ring, with the parity of its turn
    int index = 0;
    uint32_t parity = 0;

    __device__ __forceinline__ void advance(int count) {
        if (++index == count) index = 0, parity ^= 1;
    }
};

// ---- Producer.

struct HaloItem {  // one chunk of channels of one tile
    int tile, channel = 0;
    Slot slot;

    __device__ __forceinline__ void advance(const Args& a) {
        slot.advance(a.buffers);
        channel += kChunk;
        if (channel == a.in_channels) channel = 0, tile += gridDim.x;
    }
};

// kLoaders threads copy halo tiles; a thread has one octet of channels and every (kLoaders / 8)-th position, so it
// normalises what it has copied itself. Copies run `buffers - 2` items ahead of that.
template <typename T, int kN, bool kResident, int kLoaders>
__device__ __forceinline__ void produce_halo(const Args& a, const Shared& shared, int thread) {
    int octet = thread % 8, first = thread / 8;
    int items = (a.tiles - int(blockIdx.x) + int(gridDim.x) - 1) / int(gridDim.x) * (a.in_channels / kChunk);
    int ahead = a.buffers - 2;
    HaloItem copy{int(blockIdx.x)}, finish{int(blockIdx.x)};
    auto place = [&](const HaloItem& item) { return shared.halo + (item.slot.index * 8 + octet) * a.plane; };
    for (int i = 0; i < items + ahead; ++i) {
        if (i < items) {
            barrier_wait(shared.halo_empty(copy.slot.index), copy.slot.parity ^ 1);
            const char* source = a.x + 2 * (copy.channel + 8 * octet);
            uint32_t start = tile_start<kN, kResident>(copy.tile), target = place(copy);
#pragma unroll 4
            for (int p = first; p < a.halo; p += kLoaders / 8) {
                int pixel = a.raster.pixel(start + p);
                copy_16(target + 16 * p, source + 2 * int64_t(max(pixel, 0)) * a.in_channels, pixel >= 0);
            }
            copy.advance(a);
        }
        copy_commit();
        if (i < ahead) continue;
        copy_wait(ahead);
        if (a.affine) {
            Affine8 affine;
            affine.load(a.affine, finish.channel + 8 * octet, a.in_channels);
            uint32_t start = tile_start<kN, kResident>(finish.tile), target = place(finish);
#pragma unroll 2
            for (int p = first; p < a.halo; p += kLoaders / 8) {
                if (a.raster.pixel(start + p) < 0) continue;  // padding is zero after normalisation too
                auto* v = static_cast<uint4*>(__cvta_shared_to_generic(target + 16 * p));
                *v = affine.bn_relu<T>(*v);
            }
        }
        fence_proxy_async();
        barrier_arrive(shared.halo_full(finish.slot.index));
        finish.advance(a);
    }
}

// One thread: the box of tap and chunk for one warpgroup. Flipped, the map's channels are this convolution's couts.
template <bool kFlip>
__device__ __forceinline__ void copy_weights(uint32_t target, const CUtensorMap& map, uint32_t barrier, int channel,
                                             int tap, int cout) {
    if (kFlip)
        copy_box(target, map, barrier, cout, kTaps - 1 - tap, channel);
    else
        copy_box(target, map, barrier, channel, tap, cout);
}

template <bool kFlip>
__device__ __forceinline__ void produce_weights(const Args& a, const Shared& shared, const CUtensorMap& map) {
    Slot stage;
    for (int tile = blockIdx.x; tile < a.tiles; tile += gridDim.x)
        for (int channel = 0; channel < a.in_channels; channel += kChunk)
            for (int tap = 0; tap < kTaps; ++tap, stage.advance(a.stages)) {
                barrier_wait(shared.weights_empty(stage.index), stage.parity ^ 1);
                uint32_t full = shared.weights_full(stage.index);
                barrier_expect(full, 2 * kWeightBytes);
                for (int half = 0; half < 2; ++half)  // past the last cout the copy engine fills with zeros
                    copy_weights<kFlip>(shared.weights + (2 * stage.index + half) * kWeightBytes, map, full, channel,
                                        tap, (2 * blockIdx.y + half) * kChunk);
            }
}

// ---- Consumers.

// One tap of one chunk: d[cout, position] += w[cout, 0..63] * x[0..63, position].
template <typename T, bool kFlip, int kCount>
__device__ __forceinline__ void multiply_tap(float (&d)[kCount], uint32_t weights, uint32_t x, int plane) {
#pragma unroll
    for (int k = 0; k < kChunk / 16; ++k) {
        // 16 channels are two planes of x, and 32 bytes of every row of weights, or 16 rows of flipped ones.
        uint64_t a = swizzled_descriptor(weights + k * (kFlip ? 16 * 128 : 32), 8 * 128);
        uint64_t b = plain_descriptor(x + 2 * k * plane, plane, 128);
        wgmma<T, kFlip>(d, a, b);
    }
}

// Joins the statistics over the kN positions from `position` on to the moments of this thread's couts m = 0, 1.
template <int kN>
__device__ __forceinline__ void add_statistics(Moments (&moments)[2], const float (&d)[kN / 2], const Raster& raster,
                                               uint32_t position, int lane) {
    constexpr int kWords = (kN + 31) / 32;
    uint32_t real[kWords];  // bit i of word k: position 32 k + i is a pixel; moved so that bits 8 j, 8 j + 1 are ours
    int n = 0;
#pragma unroll
    for (int k = 0; k < kWords; ++k) {
        real[k] = __ballot_sync(~0u, 32 * k + lane < kN && raster.pixel(position + 32 * k + lane) >= 0);
        n += __popc(real[k]);
        real[k] >>= 2 * (lane % 4);
    }
    auto masked = [&](int j, int e, float value) { return real[j / 4] >> (8 * (j % 4) + e) & 1 ? value : 0.0f; };
    // Sums about a shift near the mean lose no digits: the mean so far, or for the first tile what a first round finds.
    float shift[2] = {moments[0].mean, moments[1].mean};
#pragma unroll 1
    for (int round = moments[0].n == 0 ? 0 : 1; round < 2; ++round) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            float sum = 0, squares = 0;
#pragma unroll
            for (int j = 0; j < kN / 8; ++j) {
                float dx = masked(j, 0, d[4 * j + 2 * m] - shift[m]);
                float dy = masked(j, 1, d[4 * j + 2 * m + 1] - shift[m]);
                sum += dx + dy;
                squares = fmaf(dx, dx, fmaf(dy, dy, squares));
            }
            sum = quad_sum(sum);
            squares = quad_sum(squares);
            float offset = sum / fmaxf(n, 1);
            shift[m] += offset;
            float m2 = squares - sum * offset;
            if (round == 1) moments[m].join(n, shift[m], m2 < 0 ? 0 : m2);  // not fmaxf, which would lose a NaN
        }
    }
}

// Stores 64 couts of the kN positions from `position` on, turned through `staging` to rows of 128 bytes.
template <int kN>
__device__ __forceinline__ void store(const Args& a, const uint32_t (&v)[kN / 4], uint32_t position, int cout,
                                      uint32_t staging, int group) {
    int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
    int piece = 2 * warp + lane / 8 % 2;  // 8 couts; a row's pieces are permuted by the position: no bank conflicts
    uint32_t turned = staging + lane % 8 * 128 + ((piece ^ (lane % 8)) << 4);
#pragma unroll
    for (int begin = 0; begin < kN; begin += kStaged) {
#pragma unroll
        for (int j = begin / 8; j < begin / 8 + kStaged / 8; ++j)
            if (j < kN / 8) store_transposed(turned + 128 * (8 * j - begin), v[2 * j], v[2 * j + 1]);
        named_sync(1 + group, 128);
#pragma unroll
        for (int p = thread / 8; p < kStaged; p += 16) {
            int pixel = a.raster.pixel(position + begin + p);
            if (begin + p >= kN || pixel < 0) continue;
            auto* row = __cvta_shared_to_generic(staging + p * 128 + ((thread % 8 ^ p % 8) << 4));
            char* target = a.y + 2 * (int64_t(pixel) * a.out_channels + cout + 8 * (thread % 8));
            *reinterpret_cast<uint4*>(target) = *static_cast<const uint4*>(row);
        }
        named_sync(1 + group, 128);
    }
}

template <typename T, int kN, bool kResident, bool kFlip>
__device__ __forceinline__ void consume(const Args& a, const Shared& shared, int group) {
    int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32;
    int cout = kResident ? 0 : (2 * blockIdx.y + group) * kChunk;  // of this warpgroup, and then of this thread
    int row = cout + 16 * warp + lane / 4;                         // and row + 8
    int half = kResident ? group * kN : 0;                         // the first position of this warpgroup in a tile
    bool outside = cout >= a.out_channels;
    uint32_t staging = shared.staging + group * kStageBytes;
    uint32_t centre = a.raster.pitch + 1;
    auto turn = [](int g) { return 3 + g; };  // named barrier: warpgroup g may multiply

    float mean[2], scale[2], bias[2];
    if (a.out_affine && !outside)
        for (int m = 0; m < 2; ++m) {
            mean[m] = a.out_affine[row + 8 * m];
            scale[m] = a.out_affine[a.out_channels + row + 8 * m];
            bias[m] = a.out_affine[2 * a.out_channels + row + 8 * m];
        }
    Moments moments[2];
    Slot buffer, stage;
    if (kResident && group == 1) named_arrive(turn(0), 256);
    for (int tile = blockIdx.x; tile < a.tiles; tile += gridDim.x) {
        float d[kN / 2];
#pragma unroll
        for (int i = 0; i < kN / 2; ++i) d[i] = 0;
        wgmma_pin(d);
        if (kResident) named_sync(turn(group), 256);
        int last_stage = -1, last_buffer = -1;
        int channels = kResident ? kChunk : a.in_channels;
        for (int channel = 0; channel < channels; channel += kChunk, buffer.advance(a.buffers)) {
            barrier_wait(shared.halo_full(buffer.index), buffer.parity);
            uint32_t x = shared.halo + buffer.index * 8 * a.plane + 16 * half;
#pragma unroll
            for (int tap = 0; tap < kTaps; ++tap) {
                int box = kResident ? tap : 2 * stage.index + group;
                if (kResident)
                    barrier_wait(shared.weights_full(tap), 0);
                else
                    barrier_wait(shared.weights_full(stage.index), stage.parity);
                uint32_t shift = tap / 3 * a.raster.pitch + tap % 3;
                wgmma_fence();
                multiply_tap<T, kFlip>(d, shared.weights + box * kWeightBytes, x + 16 * shift, a.plane);
                wgmma_commit();
                if (kResident) continue;
                wgmma_wait<1>();  // the tap before this one has been read
                if (lane == 0 && last_stage >= 0) barrier_arrive(shared.weights_empty(last_stage));
                if (lane == 0 && last_buffer >= 0) barrier_arrive(shared.halo_empty(last_buffer));
                last_stage = stage.index, last_buffer = -1;
                stage.advance(a.stages);
            }
            last_buffer = buffer.index;
        }
        if (kResident) named_arrive(turn(1 - group), 256);
        wgmma_wait<0>();
        wgmma_pin(d);
        if (lane == 0) {
            if (!kResident) barrier_arrive(shared.weights_empty(last_stage));
            barrier_arrive(shared.halo_empty(last_buffer));
        }
        if (outside) continue;

        if (a.out_affine)
#pragma unroll
            for (int i = 0; i < kN / 2; ++i)
                d[i] = relu(normalise(d[i], mean[i / 2 % 2], scale[i / 2 % 2], bias[i / 2 % 2]));
        uint32_t position = tile_start<kN, kResident>(tile) + half + centre;
        if (a.partials) {
#pragma unroll
            for (int i = 0; i < kN / 2; i += 2) {
                float2 rounded = unpack<T>(pack<T>(d[i], d[i + 1]));
                d[i] = rounded.x, d[i + 1] = rounded.y;
            }
            wgmma_pin(d);
            add_statistics<kN>(moments, d, a.raster, position, lane);
        }
        uint32_t v[kN / 4];  // positions 8 j + 2 (lane % 4) + {0, 1} of cout row + 8 m, at 2 j + m
#pragma unroll
        for (int i = 0; i < kN / 4; ++i) v[i] = pack<T>(d[2 * i], d[2 * i + 1]);
        store<kN>(a, v, position, cout, staging, group);
    }
    if (kResident && group == 0) named_sync(turn(0), 256);  // the other's last arrival
    if (a.partials && !outside && lane % 4 == 0) {
        int64_t part = kResident ? 2 * blockIdx.x + group : blockIdx.x;
        for (int m = 0; m < 2; ++m) {
            float* out = a.partials + 3 * part * a.out_channels + row + 8 * m;
            out[0] = moments[m].n;
            out[a.out_channels] = moments[m].mean;
            out[2 * a.out_channels] = moments[m].m2;
        }
    }
}

template <typename T, int kN, bool kResident, bool kFlip>
__global__ void __launch_bounds__(kThreads, 1)
    spatial_conv_kernel(const __grid_constant__ CUtensorMap weights, const __grid_constant__ Args a) {
    extern __shared__ __align__(1024) char memory[];
    constexpr int kLoaders = kResident ? 128 : 96;  // streaming weights takes a warp of the producer
    Shared shared(memory, a, kResident);
    if (threadIdx.x == 0) {
        for (int i = 0; i < a.stages; ++i)
            barrier_init(shared.weights_full(i), 1), barrier_init(shared.weights_empty(i), 8);
        for (int i = 0; i < a.buffers; ++i)
            barrier_init(shared.halo_full(i), kLoaders), barrier_init(shared.halo_empty(i), 8);
        barrier_init_fence();
    }
    __syncthreads();
    int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // the same register for the warp, as the compiler can tell
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kProducerRegisters));
        int thread = threadIdx.x;
        if (kResident && thread == 0)
            for (int tap = 0; tap < kTaps; ++tap) {
                barrier_expect(shared.weights_full(tap), kWeightBytes);
                copy_weights<kFlip>(shared.weights + tap * kWeightBytes, weights, shared.weights_full(tap), 0, tap, 0);
            }
        if (thread < kLoaders)
            produce_halo<T, kN, kResident, kLoaders>(a, shared, thread);
        else if (thread == kLoaders)
            produce_weights<kFlip>(a, shared, weights);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kConsumerRegisters));
        consume<T, kN, kResident, kFlip>(a, shared, group - 1);
    }
}

// ---- Host.

const char* plan_here(SpatialPlan& plan, const ConvShape& shape) {
    int device, processors;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    return error == cudaSuccess ? spatial_plan(plan, shape, processors) : cudaGetErrorString(error);
}

// Weights as [outer, 9, inner], read in boxes of 64 x 1 x 64.
const char* weight_map(CUtensorMap& map, const SpatialConv& p) {
    static const auto encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
        return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
    }();
    if (!encode) return "spatial_conv: the driver has no cuTensorMapEncodeTiled (needs CUDA 12)";
    uint64_t inner = p.flip ? p.shape.out_channels : p.shape.in_channels;
    uint64_t outer = p.flip ? p.shape.in_channels : p.shape.out_channels;
    cuuint64_t sizes[] = {inner, kTaps, outer}, strides[] = {2 * inner, 2 * inner * kTaps};
    cuuint32_t box[] = {kChunk, 1, kChunk}, steps[] = {1, 1, 1};
    auto type = p.dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    CUresult result =
        encode(&map, type, 3, const_cast<void*>(p.w), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? nullptr : fail("spatial_conv: cuTensorMapEncodeTiled failed with %d", int(result));
}

template <typename T, int kN, bool kResident, bool kFlip>
const char* launch(const SpatialPlan& plan, const CUtensorMap& map, const Args& args, cudaStream_t stream) {
    auto kernel = spatial_conv_kernel<T, kN, kResident, kFlip>;
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared);
    if (error == cudaSuccess) {
        kernel<<<dim3(plan.blocks, plan.cout_blocks), kThreads, plan.shared, stream>>>(map, args);
        error = cudaGetLastError();
    }
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename T, bool kFlip>
const char* launch(const SpatialPlan& plan, const CUtensorMap& map, const Args& args, cudaStream_t stream) {
#define P3D_CASE(N, RESIDENT) \
    if (plan.positions == N && plan.resident == RESIDENT) return launch<T, N, RESIDENT, kFlip>(plan, map, args, stream)
    P3D_CASE(208, true);
    P3D_CASE(160, true);
    P3D_CASE(128, true);
    P3D_CASE(64, true);
    P3D_CASE(240, false);
    P3D_CASE(216, false);
    P3D_CASE(160, false);
    P3D_CASE(120, false);
    P3D_CASE(80, false);
    P3D_CASE(48, false);
#undef P3D_CASE
    return "spatial_conv: no kernel for the planned tile";
}

}  // namespace

const char* spatial_conv_why_not(const ConvShape& shape) {
    SpatialPlan plan;
    return plan_here(plan, shape);
}

int spatial_conv_partials(const ConvShape& shape) {
    SpatialPlan plan;
    return plan_here(plan, shape) ? 0 : plan.blocks * (plan.resident ? 2 : 1);
}

const char* spatial_conv(const SpatialConv& p) {
    SpatialPlan plan;
    CUtensorMap map;
    if (p.partials && p.out_affine) return "spatial_conv: expected partials or out_affine, got both";
    if (const char* error = plan_here(plan, p.shape)) return error;
    if (const char* error = weight_map(map, p)) return error;
    Args args{};
    args.x = static_cast<const char*>(p.x);
    args.y = static_cast<char*>(p.y);
    args.affine = p.affine;
    args.out_affine = p.out_affine;
    args.partials = p.partials;
    args.raster = Raster(p.shape.frames, p.shape.height, p.shape.width);
    args.in_channels = int(p.shape.in_channels);
    args.out_channels = int(p.shape.out_channels);
    args.tiles = plan.tiles;
    args.halo = plan.halo;
    args.plane = plan.plane;
    args.buffers = plan.buffers;
    args.stages = plan.stages;
    if (p.dtype == DType::bf16)
        return p.flip ? launch<__nv_bfloat16, true>(plan, map, args, p.stream)
                      : launch<__nv_bfloat16, false>(plan, map, args, p.stream);
    return p.flip ? launch<__half, true>(plan, map, args, p.stream) : launch<__half, false>(plan, map, args, p.stream);
}

}  // namespace p3d
