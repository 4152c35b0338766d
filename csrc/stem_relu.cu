// The stem's normalisation in training, of what stem_fwd.cu leaves: y = relu(bn(pooled)); and the tap of a window
// whose ReLU is off becomes 255.
//
// A thread has 8 couts of every 32nd position of its block's share, a few of them on their way at a time. Where gamma
// is 0 all of a window are equal once normalised, and the first takes the gradient (docs/derivations.md): such couts
// get its z and its tap before the rest begins.
#include <algorithm>

#include "p3d.h"
#include "stem_infer.cuh"
#include "tile.cuh"

namespace p3d {
namespace {

constexpr int kCouts = 64;
constexpr int kThreads = 256, kBlocks = 3;  // of a multiprocessor
constexpr int kRows = kThreads / 8;         // positions of a block side by side
constexpr int kAtOnce = 4;                  // that a thread loads before it uses the first

struct StemReluArgs {
    char* pooled;
    const float* record;
    char* y;
    uint8_t* tap;
    const void* x;
    const void* w;
    const void* gamma;
    PixelType x_type, w_type, gamma_type;
    bool padded;
    int64_t strides[5];  // of x, in elements
    int channels, height, width;
    int64_t pooled_frames, pooled_height, pooled_width;
    int64_t positions, share;  // of all, of a block
};

// The first z of each window of a cout, at every kRows-th position from `first` to `end`, and its tap.
template <typename T>
__device__ __noinline__ void take_first(const StemReluArgs& a, int cout, int64_t first, int64_t end) {
    for (int64_t p = first; p < end; p += kRows) {
        int64_t column = p % a.pooled_width * 2 - a.padded, rest = p / a.pooled_width;
        int64_t row = rest % a.pooled_height * 2 - a.padded;
        rest /= a.pooled_height;
        int64_t frame = rest % a.pooled_frames * 2, clip = rest / a.pooled_frames;
        a.tap[p * kCouts + cout] = (row < 0) * 3 + (column < 0);
        int64_t h0 = 2 * max(row, int64_t(0)) - 3, w0 = 2 * max(column, int64_t(0)) - 3;
        int64_t source = clip * a.strides[0] + frame * a.strides[2];
        float sum = 0;
        as_floats(a.x, a.x_type, [&](auto* x) {
            as_floats(a.w, a.w_type, [&](auto* w) {
                w += cout * a.channels * 49;
                for (int k = 0; k < a.channels * 49; ++k) {
                    int64_t h = h0 + k / 7 % 7, column = w0 + k % 7;
                    if (h < 0 || h >= a.height || column < 0 || column >= a.width) continue;
                    auto pixel = float(x[source + k / 49 * a.strides[1] + h * a.strides[3] + column * a.strides[4]]);
                    sum = fmaf(float(T(pixel)), float(T(float(w[k]))), sum);
                }
            });
        });
        reinterpret_cast<T*>(a.pooled)[p * kCouts + cout] = T(sum);
    }
}

// z of 8 couts becomes y, and the bytes of `tap` 255 where y is off.
template <typename T>
__device__ __forceinline__ void finish(const Affine8& affine, uint4& z, uint2& tap) {
    uint32_t v[4] = {z.x, z.y, z.z, z.w}, taps[2] = {tap.x, tap.y};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float2 both = unpack<T>(v[i]);
        float first = normalise(both.x, affine.mean[2 * i], affine.scale[2 * i], affine.bias[2 * i]);
        float second = normalise(both.y, affine.mean[2 * i + 1], affine.scale[2 * i + 1], affine.bias[2 * i + 1]);
        v[i] = pack_relu<T>(first, second);
        taps[i / 2] |= (first <= 0 ? 0xffu << i % 2 * 16 : 0) | (second <= 0 ? 0xff00u << i % 2 * 16 : 0);
    }
    z = {v[0], v[1], v[2], v[3]}, tap = {taps[0], taps[1]};
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks) stem_relu_kernel(const __grid_constant__ StemReluArgs a) {
    dependency_wait();
    int cout = threadIdx.x % 8 * 8;
    int64_t first = blockIdx.x * a.share + threadIdx.x / 8, end = min((blockIdx.x + 1) * a.share, a.positions);
    if (a.tap && a.gamma)
        as_floats(a.gamma, a.gamma_type, [&](auto* gamma) {
            for (int c = cout; c < cout + 8; ++c)
                if (float(gamma[c]) == 0) take_first<T>(a, c, first, end);
        });
    Affine8 affine;
    affine.load(a.record, cout, kCouts);
    for (int64_t p = first; p < end; p += kAtOnce * kRows) {
        int64_t at = p * kCouts + cout;
        uint4 z[kAtOnce];
        uint2 tap[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {  // not as what nobody writes: see take_first
            if (p + i * kRows >= end) continue;
            z[i] = __ldcs(reinterpret_cast<const uint4*>(a.pooled + 2 * (at + i * kRows * kCouts)));
            if (a.tap) tap[i] = __ldcs(reinterpret_cast<const uint2*>(a.tap + at + i * kRows * kCouts));
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            if (p + i * kRows >= end) continue;
            finish<T>(affine, z[i], tap[i]);
            *reinterpret_cast<uint4*>(a.y + 2 * (at + i * kRows * kCouts)) = z[i];
            if (a.tap) __stcs(reinterpret_cast<uint2*>(a.tap + at + i * kRows * kCouts), tap[i]);
        }
    }
}

}  // namespace

const char* stem_relu(const StemRelu& p) {
    if (p.x_type == PixelType::uint8 || p.w_type == PixelType::uint8 || p.gamma_type == PixelType::uint8)
        return "stem_relu: expected float32, float16 or bfloat16 pixels, weights and gamma, got uint8";
    StemSizes sizes;
    if (const char* reason = stem_sizes(sizes, "stem_relu", p.shape)) return reason;
    int processors;
    if (const char* error = count_processors(processors)) return error;
    int64_t positions = p.shape.clips * sizes.pooled_frames * sizes.pooled_height * sizes.pooled_width;
    auto divided = [](int64_t n, int64_t by) { return (n + by - 1) / by; };
    int64_t rows = divided(positions, kRows), share = divided(rows, kBlocks * processors) * kRows;
    StemReluArgs args{};
    args.pooled = static_cast<char*>(p.pooled);
    args.record = p.record;
    args.y = static_cast<char*>(p.y);
    args.tap = static_cast<uint8_t*>(p.tap);
    args.x = p.x;
    args.w = p.w;
    args.gamma = p.gamma;
    args.x_type = p.x_type;
    args.w_type = p.w_type;
    args.gamma_type = p.gamma_type;
    args.padded = p.shape.padded;
    args.channels = int(p.shape.channels);
    args.height = int(p.shape.height);
    args.width = int(p.shape.width);
    args.pooled_frames = sizes.pooled_frames;
    args.pooled_height = sizes.pooled_height;
    args.pooled_width = sizes.pooled_width;
    args.positions = positions;
    args.share = share;
    std::copy(p.strides, p.strides + 5, args.strides);
    auto* kernel = p.dtype == DType::bf16 ? stem_relu_kernel<__nv_bfloat16> : stem_relu_kernel<__half>;
    cudaError_t error =
        launch_dependent(kernel, dim3(unsigned(divided(positions, share))), kThreads, 0, p.stream, args);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace p3d
