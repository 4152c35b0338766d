// The weight gradient of the spatial 1x3x3 convolution: dW[tap][cout, channel] = sum over positions of
// dz[cout, position] * a[position + tap, channel].
//
// Positions run along the raster (tile.cuh), where dz and a are zero wherever there is no pixel: nothing is masked. A
// block owns 64 couts, 64 channels and a run of positions, which it walks in tiles. Both operands lie in shared memory
// as eight planes [channel / 8][position][8]; a tap is the same matrix some positions on. One warpgroup brings both
// and each of three more multiplies the three taps of a row: dz from registers, a from shared memory. Consecutive tiles
// share the halo of a: it is finished once and then copied on from tile to tile.
#include <algorithm>

#include "spatial_tile.cuh"
#include "wgmma.cuh"

namespace p3d {
namespace {

constexpr int kStages = 3;  // tiles: one copied, one finished, one multiplied
constexpr int kConsumers = 3, kThreads = 128 * (1 + kConsumers);
constexpr int kProducerRegisters = 80, kConsumerRegisters = 144;
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <= (1 + kConsumers) * (65536 / kThreads / 8 * 8),
              "registers of the block");

struct WgradPlan {
    int positions;       // of a tile, a multiple of 32: two steps of k
    int halo;            // positions of a tile of a
    int a_plane, plane;  // bytes of a plane of a, of dz
    int tiles, turns;    // tiles in all and, at most, of a block
    int splits, blocks;  // the grid: parts of the positions, 64 x 64 parts of dW
    int shared;          // bytes
};

struct WgradArgs {
    const char* g;          // [F, H, W, Co]
    const char* z;          // [F, H, W, Co] or nullptr
    const float* affine;    // [3, Co] with z
    const float* sums;      // [2, Co] with z
    const char* a;          // [F, H, W, Ci]
    const float* a_affine;  // [3, Ci] or nullptr
    float* partials;        // [splits, Co, 9, Ci]
    Raster raster;
    int in_channels, out_channels;
    int positions, halo, a_plane, plane, tiles, turns;
    uint32_t lbo, sbo;  // of a in shared memory
};

// Where everything lies: kStages of a and of dz, two of z, barriers.
struct WgradShared {
    uint32_t a, dz, z, barriers;

    __device__ __forceinline__ WgradShared(const void* base, const WgradArgs& args)
        : a(shared_address(base)),
          dz(a + kStages * 8 * args.a_plane),
          z(dz + kStages * 8 * args.plane),
          barriers(z + 2 * 8 * args.plane) {}
    __device__ __forceinline__ uint32_t full(int stage) const { return barriers + 16 * stage; }
    __device__ __forceinline__ uint32_t empty(int stage) const { return barriers + 16 * stage + 8; }
};

struct Tiles {  // of this block
    int first, count;

    __device__ __forceinline__ explicit Tiles(const WgradArgs& args)
        : first(blockIdx.x * args.turns), count(min(args.turns, args.tiles - first)) {}
};

// The producers: 128 threads. A thread has one octet of channels of a, one of couts and every 16th position, so it
// finishes what it has copied itself. Copies run one tile ahead of that.
template <typename T>
struct Producer {
    static constexpr int kBatch = 2;  // positions worked on at a time
    static constexpr int kStep = 16;

    const WgradArgs& args;
    const WgradShared& shared;
    int cout, channel;  // of this thread
    int first;
    uint32_t a, dz, z;  // of this thread in the first stage

    __device__ __forceinline__ Producer(const WgradArgs& args, const WgradShared& shared, int thread, int cout,
                                        int channel)
        : args(args),
          shared(shared),
          cout(cout + thread % 8 * 8),
          channel(channel + thread % 8 * 8),
          first(thread / 8),
          a(shared.a + thread % 8 * args.a_plane),
          dz(shared.dz + thread % 8 * args.plane),
          z(shared.z + thread % 8 * args.plane) {}

    // Where a tile of a begins on the raster; its dz begins W + 2 positions later.
    __device__ __forceinline__ uint32_t start(int tile) const { return uint32_t(tile) * args.positions; }
    // The first position of a, of this thread, that does not come from the tile before.
    __device__ __forceinline__ int fresh(bool follows) const {
        return follows ? first + (args.halo - args.positions - first + kStep - 1) / kStep * kStep : first;
    }

    __device__ __forceinline__ void copy_input(int tile, int stage, bool follows) const {
        uint32_t target = a + stage * 8 * args.a_plane;
        const char* source = args.a + 2 * channel;
#pragma unroll 4
        for (int p = fresh(follows); p < args.halo; p += kStep) {
            int pixel = args.raster.pixel(start(tile) + p);
            copy_16(target + 16 * p, source + 2 * int64_t(max(pixel, 0)) * args.in_channels, pixel >= 0);
        }
    }

    // Bit k of the result: position first + kStep k is a pixel.
    __device__ __forceinline__ uint32_t copy_gradient(int tile, int stage, int z_stage) const {
        uint32_t target = dz + stage * 8 * args.plane, z_target = z + z_stage * 8 * args.plane, real = 0;
#pragma unroll 4
        for (int p = first; p < args.positions; p += kStep) {
            int pixel = args.raster.pixel(start(tile) + args.raster.pitch + 1 + p);
            int64_t offset = 2 * (int64_t(max(pixel, 0)) * args.out_channels + cout);
            copy_16(target + 16 * p, args.g + offset, pixel >= 0);
            if (args.z) copy_16(z_target + 16 * p, args.z + offset, pixel >= 0);
            real |= uint32_t(pixel >= 0) << p / kStep;
        }
        return real;
    }

    // a: BN-ReLU, but for padding, which stays zero; what both tiles have comes from the stage `before`.
    __device__ __forceinline__ void finish_input(int tile, int stage, int before, bool follows) const {
        uint32_t target = a + stage * 8 * args.a_plane, source = a + before * 8 * args.a_plane + 16 * args.positions;
        int begin = fresh(follows);
        if (follows)
#pragma unroll 1
            for (int p = first; p < begin; p += kStep) store_shared(target + 16 * p, load_shared(source + 16 * p));
        if (!args.a_affine) return;
        Affine8 affine;
        affine.load(args.a_affine, channel, args.in_channels);
#pragma unroll 1
        for (int p = begin; p < args.halo; p += kBatch * kStep) {
            uint4 v[kBatch];
#pragma unroll
            for (int k = 0; k < kBatch; ++k) v[k] = load_shared(target + 16 * min(p + k * kStep, args.halo - 1));
#pragma unroll
            for (int k = 0; k < kBatch; ++k) {
                int q = p + k * kStep;
                bool real = q < args.halo && args.raster.pixel(start(tile) + q) >= 0;
                v[k] = affine.bn_relu<T>(v[k]);
                if (real) store_shared(target + 16 * q, v[k]);
            }
        }
    }

    // dz: four couts at a time; neighbouring positions take different ones first, so that they share no bank.
    __device__ __forceinline__ void finish_gradient(int stage, int z_stage, uint32_t real) const {
        if (!args.z) return;
#pragma unroll 1
        for (int half = first % 2, turn = 0; turn < 2; half ^= 1, ++turn) {
            uint32_t target = dz + stage * 8 * args.plane + 8 * half,
                     z_source = z + z_stage * 8 * args.plane + 8 * half;
            Gradient4 gradient;
            gradient.load(args.affine, args.sums, cout + 4 * half, args.out_channels);
#pragma unroll 1
            for (int p = first; p < args.positions; p += kBatch * kStep) {
                uint2 g[kBatch], z[kBatch];
#pragma unroll
                for (int k = 0; k < kBatch; ++k) {
                    load_shared(g[k], target + 16 * (p + k * kStep));
                    load_shared(z[k], z_source + 16 * (p + k * kStep));
                }
#pragma unroll
                for (int k = 0; k < kBatch; ++k) {
                    g[k] = gradient.bn_bwd<T>(g[k], z[k]);
                    if (real >> (p / kStep + k) & 1) store_shared(target + 16 * (p + k * kStep), g[k]);  // else zero
                }
            }
        }
    }

    __device__ __forceinline__ void run() const {
        Tiles tiles(args);
        Slot ahead, slot;
        uint32_t copied = 0;
        for (int i = 0, before = 0; i <= tiles.count; ++i) {
            uint32_t real = copied;  // of tile i - 1
            if (i < tiles.count) {
                barrier_wait(shared.empty(ahead.index), ahead.parity ^ 1);
                copy_input(tiles.first + i, ahead.index, i > 0);
                copied = copy_gradient(tiles.first + i, ahead.index, i % 2);
                ahead.advance(kStages);
            }
            copy_commit();
            if (i == 0) continue;
            copy_wait(1);
            finish_input(tiles.first + i - 1, slot.index, before, i > 1);
            finish_gradient(slot.index, (i - 1) % 2, real);
            fence_proxy_async();
            barrier_arrive(shared.full(slot.index));
            before = slot.index;
            slot.advance(kStages);
        }
    }
};

// The taps 3 * row .. 3 * row + 2 of a block's positions.
template <typename T>
__device__ __forceinline__ void consume(const WgradArgs& args, const WgradShared& shared, int row, int cout,
                                        int channel) {
    int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
    Tiles tiles(args);
    float d[3][32];
#pragma unroll
    for (int tap = 0; tap < 3; ++tap) {
#pragma unroll
        for (int i = 0; i < 32; ++i) d[tap][i] = 0;
        wgmma_pin(d[tap]);
    }
    // A step's four 8x8 matrices of dz: couts 0-7 and 8-15 of the warp's, each of positions 0-7, then 8-15.
    uint32_t mine = shared.dz + (2 * warp + lane / 8 % 2) * args.plane + 16 * (lane % 8 + lane / 16 * 8);
    int steps = args.positions / 16, last = -1;
    Slot stage;
    uint32_t dz[2][4];
    for (int i = 0; i < tiles.count; ++i, stage.advance(kStages)) {
        barrier_wait(shared.full(stage.index), stage.parity);
        uint32_t source = mine + stage.index * 8 * args.plane;
        uint64_t a = plain_descriptor(shared.a + stage.index * 8 * args.a_plane + 16 * row * args.raster.pitch,
                                      args.lbo, args.sbo);
        load_transposed(source, dz[0]);
#pragma unroll 1
        for (int step = 0; step < steps; step += 2) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                wgmma_fence();
#pragma unroll
                for (int tap = 0; tap < 3; ++tap) wgmma<T>(d[tap], dz[half], a + tap);
                wgmma_commit();
                wgmma_wait<1>();  // the step before has been read
                if (lane == 0 && step + half == 0 && last >= 0) barrier_arrive(shared.empty(last));
                a += 16, source += 256;
                if (step + half + 1 < steps) load_transposed(source, dz[1 - half]);
            }
        }
        last = stage.index;
    }
    wgmma_wait<0>();
    int64_t size = int64_t(args.out_channels) * kTaps * args.in_channels;
    float* out = args.partials + blockIdx.x * size + channel + 2 * (lane % 4);
#pragma unroll
    for (int tap = 0; tap < 3; ++tap) {
        wgmma_pin(d[tap]);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            int64_t line = int64_t(cout + 16 * warp + 8 * m + lane / 4) * kTaps + 3 * row + tap;
#pragma unroll
            for (int j = 0; j < 8; ++j)
                *reinterpret_cast<float2*>(out + line * args.in_channels + 8 * j) = {d[tap][4 * j + 2 * m],
                                                                                     d[tap][4 * j + 2 * m + 1]};
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) spatial_wgrad_kernel(const __grid_constant__ WgradArgs args) {
    extern __shared__ __align__(1024) char memory[];
    WgradShared shared(memory, args);
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i)
            barrier_init(shared.full(i), 128), barrier_init(shared.empty(i), 4 * kConsumers);
        barrier_init_fence();
    }
    __syncthreads();
    int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    int chunks = args.in_channels / kChunk;
    int cout = blockIdx.y / chunks * kChunk, channel = blockIdx.y % chunks * kChunk;
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kProducerRegisters));
        Producer<T>(args, shared, threadIdx.x, cout, channel).run();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kConsumerRegisters));
        consume<T>(args, shared, group - 1, cout, channel);
    }
}

// ---- Host.

// The tile that finishes first, or why there is none: 16 positions take the matrix unit 9 * 32 cycles.
const char* wgrad_plan(WgradPlan& best, const ConvShape& s) {
    int device, processors;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess) return cudaGetErrorString(error);
    if (const char* reason = sizes_why_not("spatial_wgrad", s)) return reason;

    int64_t blocks = s.in_channels / kChunk * (s.out_channels / kChunk);
    if (blocks > 65535) return fail("spatial_wgrad: expected Ci Co / 4096 up to 65535, got %lld", (long long)blocks);
    int64_t outputs = s.frames * (s.height + 1) * (s.width + 1) - (s.width + 2);  // from the first pixel to the end
    int64_t best_cost = -1;
    for (int n = 32; n <= 256; n += 32) {
        int64_t halo = n + 2 * (s.width + 2), a_plane = (halo * 16 + 127) / 128 * 128 + 16;
        int plane = n * 16 + 16;
        int64_t bytes = kStages * 8 * (a_plane + plane) + 2 * 8 * plane + 16 * kStages;
        if (bytes > kSharedLimit) break;
        int64_t tiles = (outputs + n - 1) / n;
        int64_t splits = std::min(tiles, std::max<int64_t>(1, processors / blocks));
        int64_t turns = (tiles + splits - 1) / splits;
        int64_t cost = turns * (n / 16 * 288 + 300 + 2 * s.width);
        if (best_cost >= 0 && cost > best_cost) continue;
        best_cost = cost;
        best = {n,           int(halo), int(a_plane), plane, int(tiles), int(turns), int((tiles + turns - 1) / turns),
                int(blocks), int(bytes)};
    }
    if (best_cost < 0)
        return fail("spatial_wgrad: width: expected rows that fit in shared memory, got %lld", (long long)s.width);
    return nullptr;
}

template <typename T>
const char* launch(const WgradPlan& plan, const WgradArgs& args, cudaStream_t stream) {
    auto kernel = spatial_wgrad_kernel<T>;
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared);
    if (error == cudaSuccess) {
        kernel<<<dim3(plan.splits, plan.blocks), kThreads, plan.shared, stream>>>(args);
        error = cudaGetLastError();
    }
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* spatial_wgrad_why_not(const ConvShape& shape) {
    WgradPlan plan;
    return wgrad_plan(plan, shape);
}

int spatial_wgrad_partials(const ConvShape& shape) {
    WgradPlan plan;
    return wgrad_plan(plan, shape) ? 0 : plan.splits;
}

const char* spatial_wgrad(const SpatialWgrad& p) {
    if (bool(p.z) != bool(p.affine) || bool(p.z) != bool(p.sums))
        return "spatial_wgrad: expected z, affine and sums, or none of them";
    WgradPlan plan;
    if (const char* error = wgrad_plan(plan, p.shape)) return error;
    WgradArgs args{};
    args.g = static_cast<const char*>(p.g);
    args.z = static_cast<const char*>(p.z);
    args.affine = p.affine;
    args.sums = p.sums;
    args.a = static_cast<const char*>(p.a);
    args.a_affine = p.a_affine;
    args.partials = p.partials;
    args.raster = Raster(p.shape.frames, p.shape.height, p.shape.width);
    args.in_channels = int(p.shape.in_channels);
    args.out_channels = int(p.shape.out_channels);
    args.positions = plan.positions;
    args.halo = plan.halo;
    args.a_plane = plan.a_plane;
    args.plane = plan.plane;
    args.tiles = plan.tiles;
    args.turns = plan.turns;
    // a is N-major and not swizzled: lbo leads to the next 8 steps of k, sbo to the next 8 columns.
    args.lbo = 128, args.sbo = plan.a_plane;
    return p.dtype == DType::bf16 ? launch<__nv_bfloat16>(plan, args, p.stream) : launch<__half>(plan, args, p.stream);
}

}  // namespace p3d
