// Pieces that kernels share: barriers, copies, the raster of padded frames, BN-ReLU and its gradient, tile statistics.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "p3d.h"

namespace p3d {

// ---- Barriers. An mbarrier's phase ends when its arrivals (and bytes) are in; `parity` names the phase waited for.

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ __forceinline__ void barrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{.reg .pred done;\n"
        "retry: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra retry;}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// Named barriers 1..15 of the block, each for `threads` threads; 0 is __syncthreads.
__device__ __forceinline__ void named_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The blocks of a cluster wait for each other, all threads.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// Makes ordinary writes to shared memory visible to the matrix unit and the copy engine.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- Copies.

// Copies 16 bytes to shared memory, or zeros where !valid (the source is then not read).
__device__ __forceinline__ void copy_16(uint32_t target, const void* source, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(valid ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` (0 or 1) of this thread's committed groups of copies are still running.
__device__ __forceinline__ void copy_wait(int pending) {
    if (pending == 0)
        asm volatile("cp.async.wait_group 0;" ::: "memory");
    else
        asm volatile("cp.async.wait_group 1;" ::: "memory");
}

// Has the line of 128 bytes at `source` brought to the second-level cache.
__device__ __forceinline__ void prefetch(const void* source) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(source) : "memory");
}

// Loads of what nobody writes meanwhile and this multiprocessor will not read again.
__device__ __forceinline__ void load_once(uint4& v, const void* source) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(source));
}
__device__ __forceinline__ void load_once(uint2& v, const void* source) {
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(source));
}

__device__ __forceinline__ uint4 load_shared(uint32_t source) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(source)
                 : "memory");
    return v;
}

__device__ __forceinline__ void load_shared(uint2& v, uint32_t source) {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(source) : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t target, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(target), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t target, uint2 v) {
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(target), "r"(v.x), "r"(v.y) : "memory");
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Copies the box at (i0, i1, i2), innermost first, to shared memory; the bytes count towards `barrier`.
__device__ __forceinline__ void copy_box(uint32_t target, const CUtensorMap& map, uint32_t barrier, int i0, int i1,
                                         int i2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
        "[%2];" ::"r"(target),
        "l"(&map), "r"(barrier), "r"(i0), "r"(i1), "r"(i2)
        : "memory");
}

// The same of a box at (i0, i1, i2, i3).
__device__ __forceinline__ void copy_box(uint32_t target, const CUtensorMap& map, uint32_t barrier, int i0, int i1,
                                         int i2, int i3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
        "%6}], [%2];" ::"r"(target),
        "l"(&map), "r"(barrier), "r"(i0), "r"(i1), "r"(i2), "r"(i3)
        : "memory");
}

// Stores two 8x8 matrices transposed; lanes 0-7 and 8-15 give the addresses of their rows.
__device__ __forceinline__ void store_transposed(uint32_t target, uint32_t first, uint32_t second) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(target), "r"(first), "r"(second)
                 : "memory");
}

__device__ __forceinline__ void store_transposed(uint32_t target, uint32_t v) {  // one, addressed by lanes 0-7
    asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(target), "r"(v) : "memory");
}

// The reverse: loads two 8x8 matrices transposed.
__device__ __forceinline__ void load_transposed(uint32_t source, uint32_t& first, uint32_t& second) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(first), "=r"(second)
                 : "r"(source)
                 : "memory");
}

__device__ __forceinline__ void load_transposed(uint32_t source, uint32_t (&v)[4]) {  // four, addressed by all lanes
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "r"(source)
                 : "memory");
}

// ---- Pairs of 16-bit floats.

template <typename T>
__device__ __forceinline__ uint32_t pack(float a, float b) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
        return reinterpret_cast<uint32_t&>(v);
    } else {
        __half2 v = __floats2half2_rn(a, b);
        return reinterpret_cast<uint32_t&>(v);
    }
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t v) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
        return {__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000)};
    else
        return __half22float2(reinterpret_cast<__half2&>(v));
}

// ---- Normalisation.

__device__ __forceinline__ float relu(float v) {  // NaN stays NaN
    float out;
    asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(out) : "f"(v));
    return out;
}

// One channel's (v - mean) * scale + bias: centred first, so that a mean of hundreds of deviations costs no digits.
__device__ __forceinline__ float normalise(float v, float mean, float scale, float bias) {
    return fmaf(v - mean, scale, bias);
}

// The affine of eight neighbouring channels, and BN-ReLU of eight packed values by it.
struct Affine8 {
    float mean[8], scale[8], bias[8];

    __device__ __forceinline__ void load(const float* affine, int channel, int channels) {
        load_row(mean, affine + channel);
        load_row(scale, affine + channels + channel);
        load_row(bias, affine + 2 * channels + channel);
    }

    static __device__ __forceinline__ void load_row(float (&row)[8], const float* source) {
        auto a = *reinterpret_cast<const float4*>(source), b = *reinterpret_cast<const float4*>(source + 4);
        row[0] = a.x, row[1] = a.y, row[2] = a.z, row[3] = a.w;
        row[4] = b.x, row[5] = b.y, row[6] = b.z, row[7] = b.w;
    }

    template <typename T>
    __device__ __forceinline__ uint32_t bn_relu(uint32_t pair, int i) const {  // channels 2 i and 2 i + 1
        float2 v = unpack<T>(pair);
        return pack<T>(relu(normalise(v.x, mean[2 * i], scale[2 * i], bias[2 * i])),
                       relu(normalise(v.y, mean[2 * i + 1], scale[2 * i + 1], bias[2 * i + 1])));
    }

    template <typename T>
    __device__ __forceinline__ uint4 bn_relu(uint4 v) const {
        return {bn_relu<T>(v.x, 0), bn_relu<T>(v.y, 1), bn_relu<T>(v.z, 2), bn_relu<T>(v.w, 3)};
    }
};

// The gradient of four neighbouring channels of z from g, that of relu(u), u = (z - mean) * scale + bias:
// scale * ([u > 0] g - c0 - (z - mean) * c1), where `sums` has the rows c0 and c1.
struct Gradient4 {
    float mean[4], scale[4], bias[4], constant[4], slope[4];

    __device__ __forceinline__ void load(const float* affine, const float* sums, int channel, int channels) {
        load_row(mean, affine + channel);
        load_row(scale, affine + channels + channel);
        load_row(bias, affine + 2 * channels + channel);
        load_row(constant, sums + channel);
        load_row(slope, sums + channels + channel);
#pragma unroll
        for (int i = 0; i < 4; ++i) constant[i] *= -scale[i], slope[i] *= -scale[i];
    }

    static __device__ __forceinline__ void load_row(float (&row)[4], const float* source) {
        auto v = *reinterpret_cast<const float4*>(source);
        row[0] = v.x, row[1] = v.y, row[2] = v.z, row[3] = v.w;
    }

    __device__ __forceinline__ float bn_bwd(float g, float z, int i) const {
        float centred = z - mean[i];
        float open = fmaf(centred, scale[i], bias[i]) <= 0 ? constant[i] : fmaf(g, scale[i], constant[i]);
        return fmaf(centred, slope[i], open);
    }

    template <typename T>
    __device__ __forceinline__ uint2 bn_bwd(uint2 g, uint2 z) const {
        float2 a = unpack<T>(g.x), b = unpack<T>(g.y), c = unpack<T>(z.x), d = unpack<T>(z.y);
        return {pack<T>(bn_bwd(a.x, c.x, 0), bn_bwd(a.y, c.y, 1)), pack<T>(bn_bwd(b.x, d.x, 2), bn_bwd(b.y, d.y, 3))};
    }
};

// ---- Reads (p3d.h).

__host__ __device__ constexpr bool two_tensors(Read read) {
    return read != Read::raw && read != Read::bn_relu && read != Read::scaled;
}
__host__ __device__ constexpr bool joins(Read read) {
    return read == Read::join_port || read == Read::join_b || read == Read::join_c;
}

// Whether an operand has the tensors of its read, no more and no fewer.
inline bool has_tensors(const WgradOperand& x) {
    bool backward = x.read == Read::bn_bwd || x.read == Read::bn_bwd_open;
    return x.a && two_tensors(x.read) == bool(x.b) && (joins(x.read) || x.read == Read::bn_relu) == bool(x.affine_a) &&
           (joins(x.read) || backward) == bool(x.affine_b) && backward == bool(x.sums);
}

// pack(relu(a), relu(b)); NaN stays NaN.
template <typename T>
__device__ __forceinline__ uint32_t pack_relu(float a, float b) {
    uint32_t v;
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
        asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(b), "f"(a));
    else
        asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(b), "f"(a));
    return v;
}

// The halves of `a` where the same half of `b` is not <= 0, else zero.
template <typename T>
__device__ __forceinline__ uint32_t masked(uint32_t a, uint32_t b) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
        return a & ~__hle2_mask(reinterpret_cast<__nv_bfloat162&>(b), __nv_bfloat162{0, 0});
    else
        return a & ~__hle2_mask(reinterpret_cast<__half2&>(b), __half2{0, 0});
}

// ---- Dependent launch: a kernel starts while the one before it in its stream still runs.

// Waits until the kernel before has ended and all that it wrote is there, and lets the next kernel start; in this
// order, for kernels that start while several before them run would take the card from those. Before this no thread may
// read or write what another kernel writes or reads: the one before has waited likewise. In inference weights may be
// read earlier: they were written before the kernel before this one.
__device__ __forceinline__ void dependency_wait() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Launches a kernel that begins with dependency_wait, in clusters of blocks.
template <typename... Args>
cudaError_t launch_dependent(void (*kernel)(Args...), dim3 grid, int threads, int shared, cudaStream_t stream,
                             dim3 cluster, const Args&... args) {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute attributes[2]{};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {cluster.x, cluster.y, cluster.z};
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = cluster.x * cluster.y * cluster.z > 1 ? 2 : 1;
    return cudaLaunchKernelEx(&config, kernel, args...);
}

// The same of a kernel whose clusters are of one block, or of a size that it says itself.
template <typename... Args>
cudaError_t launch_dependent(void (*kernel)(Args...), dim3 grid, int threads, int shared, cudaStream_t stream,
                             const Args&... args) {
    return launch_dependent(kernel, grid, threads, shared, stream, dim3(1), args...);
}

// ---- The card.

// How many multiprocessors the current device has, or why nobody knows.
inline const char* count_processors(int& processors) {
    int device;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// ---- Tensor maps, which the driver encodes.

// cuTensorMapEncodeTiled; nullptr if the driver has none.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
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
    return encode;
}

// ---- Statistics.

// Count, mean and sum of squares about the mean, joined by Chan, Golub and LeVeque's formula.
struct Moments {
    float n = 0, mean = 0, m2 = 0;

    __device__ __forceinline__ void join(float other_n, float other_mean, float other_m2) {
        float total = n + other_n, delta = other_mean - mean, share = other_n / fmaxf(total, 1.0f);
        mean += delta * share;
        m2 += other_m2 + delta * delta * (n * share);
        n = total;
    }
};

__device__ __forceinline__ float quad_sum(float v) {  // over four neighbouring lanes, which all receive it
    v += __shfl_xor_sync(~0u, v, 1);
    return v + __shfl_xor_sync(~0u, v, 2);
}

// ---- The raster: every frame with one zero row above it and one zero column to its left, as one line of positions.
//
// Row h of frame f starts with a zero at ((H + 1) * f + h + 1) * (W + 1). The zero column ends the row before it as
// well, the zero row the frame before it, and past the end all is zero. So the neighbour (dh, dw) of any pixel lies dh
// * (W + 1) + dw positions on, whatever H and W are, and a tile is a run of positions.

struct FastDivide {  // n / divisor for n < 2^31 and divisor >= 2, as one multiplication
    uint32_t multiplier, shift;

    FastDivide() = default;
    explicit FastDivide(uint32_t divisor) : shift(0) {
        while (uint64_t(2) << shift < divisor) ++shift;  // 2^shift < divisor <= 2^(shift + 1)
        multiplier = static_cast<uint32_t>(((uint64_t(1) << (32 + shift)) + divisor - 1) / divisor);
    }
    __device__ __forceinline__ uint32_t operator()(uint32_t n) const { return __umulhi(n, multiplier) >> shift; }
};

struct Raster {
    uint32_t length;  // F * (H + 1) * (W + 1) < 2^31
    uint32_t pitch;   // W + 1
    uint32_t rows;    // H + 1
    FastDivide by_pitch, by_rows;

    Raster() = default;
    Raster(int64_t frames, int64_t height, int64_t width)
        : length(frames * (height + 1) * (width + 1)),
          pitch(width + 1),
          rows(height + 1),
          by_pitch(width + 1),
          by_rows(height + 1) {}

    // The index (f * H + h) * W + w of the pixel at a position, or -1 where the raster is zero.
    __device__ __forceinline__ int pixel(uint32_t position) const {
        uint32_t row = by_pitch(position), column = position - row * pitch;
        uint32_t frame = by_rows(row), line = row - frame * rows;
        bool real = column != 0 && line != 0 && position < length;
        return real ? int((row - frame - 1) * (pitch - 1) + column - 1) : -1;
    }
};

}  // namespace p3d
