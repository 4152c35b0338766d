// The Hopper kernels of P3D Kernels, free of torch: raw device pointers, sizes and a stream in, an error out.
//
// Activations are [F, H, W, C], F = N * T frames, channels last and packed (the memory of a channels_last_3d tensor).
// A launcher returns nullptr on success or a message that stays valid until the thread's next call; it neither throws,
// prints, allocates nor synchronises, runs on the current device, and may be captured in a CUDA graph.
#pragma once

#include <cstdint>

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace p3d {

enum class DType : int { bf16 = 0, fp16 = 1 };

struct ConvShape {
    int64_t frames;        // F = N * T
    int64_t height;        // H
    int64_t width;         // W
    int64_t in_channels;   // Ci, a multiple of 64
    int64_t out_channels;  // Co, a multiple of 64
};

// y[f,h,w,co] = sum over dh, dw, ci of pro(x[f,h+dh-1,w+dw-1,ci]) * w[co,3*dh+dw,ci]; outside a frame pro(x) is zero.
//
// pro   nothing, or relu((x - mean) * scale + bias) rounded to the dtype, if `affine` is given
// epi   nothing; or relu((sum - mean) * scale + bias) before rounding, if `out_affine` is given; or the statistics of
//       the rounded y, if `partials` is given: a row (n, mean, M2) for each of R parts of the positions,
//       M2 = sum (y - mean)^2; n may be 0
// flip  w is [Ci,9,Co] and enters transposed with its taps reversed: the input gradient of the convolution by w
struct SpatialConv {
    ConvShape shape;
    DType dtype;  // of x, w and y; sums are float32
    bool flip;
    const void* x;            // [F, H, W, Ci]  16-byte aligned
    const void* w;            // [Co, 9, Ci], or [Ci, 9, Co] with flip  16-byte aligned
    void* y;                  // [F, H, W, Co]  16-byte aligned
    const float* affine;      // [3, Ci] rows mean, scale, bias, 16-byte aligned; or nullptr
    const float* out_affine;  // [3, Co] rows mean, scale, bias; or nullptr
    float* partials;          // [R, 3, Co], R = spatial_conv_partials(shape); or nullptr
    CUstream_st* stream;
};

const char* spatial_conv(const SpatialConv& p);

// Why spatial_conv cannot run this shape on the current device; nullptr if it can.
const char* spatial_conv_why_not(const ConvShape& shape);

// R, the rows of SpatialConv::partials on the current device; 0 if the shape cannot run.
int spatial_conv_partials(const ConvShape& shape);

}  // namespace p3d
