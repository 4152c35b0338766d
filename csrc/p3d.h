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
enum class PixelType : int { bf16 = 0, fp16 = 1, fp32 = 2, uint8 = 3 };

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
//
// With `out_affine`, w may be read while the kernel before this one in the stream still runs.
struct SpatialConv {
    ConvShape shape;
    DType dtype;              // of x, w and y; sums are float32
    const void* x;            // [F, H, W, Ci]  16-byte aligned
    const void* w;            // [Co, 9, Ci]  16-byte aligned
    void* y;                  // [F, H, W, Co]  16-byte aligned
    const float* affine;      // [3, Ci] rows mean, scale, bias, 16-byte aligned; or nullptr
    const float* out_affine;  // [3, Co] rows mean, scale, bias; or nullptr
    float* partials;          // [R, 3, Co], R = spatial_conv_partials(shape); or nullptr
    CUstream_st* stream;
};

const char* spatial_conv(const SpatialConv& p);

// The input gradient of the convolution above, with Ci the channels of g and Co those of dx (its couts and channels):
// dx[f,h,w,co] = sum over dh, dw, ci of dz[f,h+1-dh,w+1-dw,ci] * w[ci,3*dh+dw,co] + o; outside a frame dz is zero.
//
// dz    g itself, or with `z`, where g is the gradient of relu(u), u = (z - mean) * scale + bias, that of z,
//       scale * ([u > 0] g - c0 - (z - mean) * c1) rounded to the dtype
// epi   with `below`, whose normalisation `below_affine` gives: R rows (sum g, sum g (below - mean)) over parts of the
//       positions, g being the rounded dx where relu of the normalised `below` passes it, else 0
struct SpatialDgrad {
    ConvShape shape;
    DType dtype;                // of g, z, w, o, below and dx; sums are float32
    const void* g;              // [F, H, W, Ci]  16-byte aligned, as all pointers are
    const void* z;              // [F, H, W, Ci]; or nullptr
    const float* affine;        // [3, Ci] rows mean, scale, bias, with z
    const float* sums;          // [2, Ci] rows c0, c1, with z
    const void* w;              // [Ci, 9, Co]
    const void* o;              // [F, H, W, Co]; or nullptr
    const void* below;          // [F, H, W, Co]; or nullptr
    const float* below_affine;  // [3, Co] rows mean, scale, bias, with below
    void* dx;                   // [F, H, W, Co]
    float* partials;            // [R, 2, Co], R = spatial_dgrad_partials(shape, whether g is dz), with below
    CUstream_st* stream;
};

const char* spatial_dgrad(const SpatialDgrad& p);

// Its weight gradient: dw[co,3*dh+dw,ci] = sum over f, h, w of dz[f,h,w,co] * a[f,h+dh-1,w+dw-1,ci] = sum over R rows
// of `partials`, each of a part of the positions; outside a frame a is zero.
//
// dz    as in SpatialDgrad, with Co channels
// a     the convolution's input, or relu((a - mean) * scale + bias) rounded to the dtype, if `a_affine` is given
struct SpatialWgrad {
    ConvShape shape;
    DType dtype;            // of g, z and a
    const void* g;          // [F, H, W, Co]  16-byte aligned, as all pointers are
    const void* z;          // [F, H, W, Co]; or nullptr
    const float* affine;    // [3, Co] rows mean, scale, bias, with z
    const float* sums;      // [2, Co] rows c0, c1, with z
    const void* a;          // [F, H, W, Ci]
    const float* a_affine;  // [3, Ci] rows mean, scale, bias; or nullptr
    float* partials;        // [R, Co, 9, Ci], R = spatial_wgrad_partials(shape)
    void* finished;         // [F, H, W, Co]: dz, with z; or nullptr
    CUstream_st* stream;
};

const char* spatial_wgrad(const SpatialWgrad& p);

// Why spatial_conv and spatial_dgrad cannot run this shape on the current device; nullptr if it can.
const char* spatial_conv_why_not(const ConvShape& shape);

// R, the rows of their partials on the current device; 0 if the shape cannot run. `finished`: g is dz itself.
int spatial_conv_partials(const ConvShape& shape);
int spatial_dgrad_partials(const ConvShape& shape, bool finished);

// The same of spatial_wgrad.
const char* spatial_wgrad_why_not(const ConvShape& shape);
int spatial_wgrad_partials(const ConvShape& shape);

// The weight gradient of a 1x1x1 convolution of spatial stride 1 or 2, or a 3x1x1 one of stride 1 and padding 1, and
// products of that form: dw[co,tap,ci] = sum over positions p of G[p,co] * X[p + tap,ci], X zero outside a clip, = sum
// over R rows of `partials`, each of a part of the positions.
//
// G and X are operands: what a read makes of one or two tensors, rounded to the dtype; u_a and u_b are a and b
// normalised, (v - mean) * scale + bias.
enum class Read : int {
    raw = 0,          // a
    bn_relu = 1,      // relu(u_a)
    join_port = 2,    // relu(u_a) + relu(u_b)
    join_b = 3,       // relu(relu(u_a) + u_b)
    join_c = 4,       // relu(relu(u_a) / 2 + u_b / 2)
    masked = 5,       // a where not b <= 0, else 0
    bn_bwd = 6,       // scale_b * ([u_b > 0] a - c0 - (b - mean_b) * c1)
    bn_bwd_open = 7,  // scale_b * (a - c0 - (b - mean_b) * c1)
    scaled = 8,       // scale_b * a; of `gram_tiles` alone
};

struct WgradOperand {  // what its read does not name is nullptr
    Read read;
    const void* a;          // [N, T, H, W, C]  16-byte aligned
    const void* b;          // like a
    const float* affine_a;  // [3, C] rows mean, scale, bias
    const float* affine_b;  // [3, C]
    const float* sums;      // [2, C] rows c0, c1
};

struct ConvWgradShape {
    int64_t clips, time, height, width;  // N, T, H, W of x
    int64_t in_channels, out_channels;   // Ci, Co, multiples of 64
    int taps;                            // 1, or 3 of 3x1x1
    int stride;                          // in space
    bool g_strided;                      // g lies on the grid of x, of which every stride-th row and column is read
    bool totals;                         // also sum G over positions
    bool same;                           // g is x
    Read g_read, x_read;
};

struct ConvWgrad {
    ConvWgradShape shape;
    DType dtype;  // of the tensors; sums are float32
    WgradOperand g, x;
    const float* centre;  // [Ci] of the dtype's values, with `same` and reads raw, bn_relu and join_*: taken off G and
                          // X, the differences rounded to the dtype; or nullptr
    float* partials;      // [R, Co * taps * Ci], or with totals [R, Co * Ci + Co], R = conv_wgrad_partials(shape)
    CUstream_st* stream;
};

const char* conv_wgrad(const ConvWgrad& p);

// Why conv_wgrad cannot run this shape on the current device, and the rows of its partials, 0 if it cannot.
const char* conv_wgrad_why_not(const ConvWgradShape& shape);
int conv_wgrad_partials(const ConvWgradShape& shape);

// Up to five weight gradients like those of conv_wgrad and of 1x3x3, of raw operands and without totals, in one launch.
struct RawWgradShape {
    int64_t clips, time, height, width;  // N, T, H, W of x
    int64_t in_channels, out_channels;   // Ci, Co, multiples of 128
    int taps;                            // 1, 3 of 3x1x1, or 9 of 1x3x3
    int stride;                          // in space
    bool g_strided;                      // as in ConvWgradShape
};

struct RawWgradTile {
    int columns;  // channels of a tile, 128 or 256, of all gradients of a launch the same
    int splits;   // R, the rows of the partials, each of a part of the positions
};

struct RawWgrad {
    RawWgradShape shape;
    RawWgradTile tile;  // of raw_wgrad_plan
    const void* g;      // [N, T, Ho, Wo, Co], or with g_strided [N, T, H, W, Co]; 16-byte aligned, as all pointers are
    const void* x;      // [N, T, H, W, Ci]
    float* partials;    // [R, Co * taps * Ci]
};

constexpr int kRawWgrads = 5;  // in a launch

const char* raw_wgrad(const RawWgrad* p, int count, DType dtype, CUstream_st* stream);

// The tiles for these gradients together on the current device; in place of 0.
const char* raw_wgrad_plan(RawWgradTile* tiles, const RawWgradShape* shapes, int count);

// Why raw_wgrad cannot run this shape; nullptr if it can.
const char* raw_wgrad_why_not(const RawWgradShape& shape);

// 1x1x1 convolutions of stride 1 in training, where the narrower side has 64 or 128 channels; in conv_tiles, which
// takes the same, also 3x1x1 ones, padded by 1 in time. X is an operand as above, of any read but masked:
//
//     y[p,co] = epi(sum over taps and ci of X[p + tap,ci] * w[co,tap,ci])         forward
//     y[p,co] = epi(sum over taps and ci of X[p - tap,ci] * w[ci,tap,co])         transposed: the input gradient, of
//                                                                                 which X is the gradient dz
// epi   forward: nothing; the affine, (sum - mean) * scale + bias; plus o; relu of that; rounded
//       transposed: plus o, where `o_mask` is given only where that is not <= 0; rounded
// sums  forward: the statistics of the rounded y, a row (n, mean, M2) for each of R parts of the positions
//       transposed: with `below`, R rows (sum g, sum g (below - mean)) as in SpatialDgrad
struct ConvTrainShape {
    int64_t clips, time, frame;         // N, T, H * W
    int64_t in_channels, out_channels;  // Ci of X, Co of y
    int taps;                           // 1, or in conv_tiles 3 of 3x1x1
    bool transposed;
    Read read;  // of X
    int loads;  // how many of o, o_mask and below there are
    bool sums;  // whether there are partials
};

struct ConvTrain {
    ConvTrainShape shape;
    DType dtype;  // of the tensors; sums are float32
    WgradOperand x;
    const void* w;              // [Co, taps, Ci], transposed [Ci, taps, Co]; 16-byte aligned, as all pointers are
    void* y;                    // [N, T, H, W, Co]
    const float* affine;        // [3, Co] rows mean, scale, bias; or nullptr
    const void* o;              // like y; or nullptr
    const void* o_mask;         // like y; or nullptr
    const void* below;          // like y; or nullptr
    const float* below_affine;  // [3, Co], with below
    bool relu;
    float* partials;  // [R, 3, Co], or with below [R, 2, Co], R = conv_train_partials(shape); or nullptr
    CUstream_st* stream;
};

const char* conv_train(const ConvTrain& p);

// Why conv_train cannot run this shape on the current device, and the rows of its partials, 0 if it cannot.
const char* conv_train_why_not(const ConvTrainShape& shape);
int conv_train_partials(const ConvTrainShape& shape);

// Two 1x1x1 convolutions from 64 channels to multiples of 256, one of an operand X as above, each with the affine of
// its normalisation:
//
//     y[p,co] = relu(bn(sum over ci of X[p,ci] * w[co,ci]) + bn_down(sum over ci of down[p,ci] * w_down[co,ci]))
//
// rounded once.
struct ConvPairShape {
    int64_t positions;                                 // N * T * H * W
    int64_t in_channels, down_channels, out_channels;  // Ci of X, of down, Co of y
    Read read;                                         // of X
};

struct ConvPair {
    ConvPairShape shape;
    DType dtype;  // of the tensors; sums are float32
    WgradOperand x;
    const void* w;             // [Co, Ci]  16-byte aligned, as all pointers are
    const float* affine;       // [3, Co] rows mean, scale, bias
    const void* down;          // [N, T, H, W, Ci]
    const void* w_down;        // [Co, Ci]
    const float* down_affine;  // [3, Co]
    void* y;                   // [N, T, H, W, Co]
    CUstream_st* stream;
};

const char* conv_pair(const ConvPair& p);

// Why conv_pair cannot run this shape on the current device; nullptr if it can.
const char* conv_pair_why_not(const ConvPairShape& shape);

// The gradient of the operand X of y = relu(bn(w X) + ...) by the Gram identity (docs/derivations.md), w of 1x1x1, X
// raw, bn_relu or a join. Let g be the gradient of y where y is not <= 0, else 0; without `y` that of y is masked
// already.
//
// gram_bwd is the pass over g, for 64 or 128 channels of X and 256 or 512 of g:
//
//     M[co,m] = sum over p of g[p,co] * X[p,m], and sum over p of g[p,co], of each of R parts of the positions
//     v[p,m] = sum over co of g[p,co] * (scale[co] w[co,m]), the factor rounded, of each 256 couts
//
// v is kept as float16 with a power of two, shared by 16 positions or fewer, for 64 channels: rounded to bfloat16 it
// would make da a fifth less exact. *Thin*, g, y and v are those of even rows and columns of X alone, K = N * T *
// ceil(H / 2) * ceil(W / 2) of them; sums are over these, and v is zero elsewhere. K = P if not thin.
//
// gram_add makes da of what is known once these are summed; gram_tiles does without v, for any channels in multiples of
// 64, X read at every stride-th row and column, scale g rounded:
//
//     u[p,m] = sum over parts of v[p,m]       + q_scale[m] sum over k of X[p,k] q[k,m] + c[m]      gram_add
//     u[p,m] = sum over co of (scale[co] g[p,co]) w[co,m]             + the same                   gram_tiles
//
// da, X being a join, is what its outer ReLU passes of u: join_b: u where relu(u_a) + u_b is not <= 0; join_c: u / 2
// there. Rounded. Sums: rows (sum t, sum t (z - mean)) for z = a, t = da where u_a is not <= 0, and for z = b, t = da
// or, of join_port, da where u_b is not <= 0.
struct GramBwdShape {
    int64_t frames, height, width;   // N * T, H, W of X
    int64_t channels, out_channels;  // M of X, Co of g
    Read read;                       // of X
    bool masked;                     // whether there is y
    bool thin;
};

struct GramBwd {
    GramBwdShape shape;
    DType dtype;          // of the tensors; sums are float32
    WgradOperand x;       // [N, T, H, W, M]
    const void* g;        // [K, Co]  16-byte aligned, as all pointers are
    const void* y;        // like g; or nullptr
    const float* affine;  // [3, Co], of which row 1, scale, is read
    const void* w;        // [Co, M]
    void* v;              // [Co / 256, K, M] float16
    float* scales;        // [Co / 256, K, M / 64]: v times these
    float* partials;      // [R, Co * M + Co], R = gram_bwd_partials(shape)
    CUstream_st* stream;
};

const char* gram_bwd(const GramBwd& p);

// Why gram_bwd cannot run this shape on the current device, and the rows of its partials, 0 if it cannot.
const char* gram_bwd_why_not(const GramBwdShape& shape);
int gram_bwd_partials(const GramBwdShape& shape);

struct GramAdd {
    ConvTrainShape shape;  // transposed, M to M channels of 1x1x1, as many loads as v has parts
    DType dtype;
    WgradOperand x;  // [N, T, H, W, M]
    const void* v;   // as in GramBwd, with its scales
    const float* scales;
    const void* q;         // [M, M]
    const float* q_scale;  // [M]; or nullptr: 1
    const float* c;        // [c_parts, M], to be added up
    int c_parts;
    void* da;           // like X
    float* partials_a;  // [R, 2, M], R = conv_train_partials(shape); or nullptr
    float* partials_b;
    int64_t thin_width;  // W, if v is thin; else 0
    CUstream_st* stream;
};

const char* gram_add(const GramAdd& p);

struct GramDgrad {
    ConvTrainShape shape;  // that of a gradient of 1x1x1: Ci of g, Co of X; no loads
    DType dtype;
    WgradOperand x;        // [N, T, H, W, Co]
    const void* g;         // [N, T, H, W, Ci]
    const void* y;         // like g; or nullptr
    const float* affine;   // [3, Ci], of which row 1, scale, is read
    const void* w;         // [Ci, Co]
    const void* q;         // [Co, Co]
    const float* q_scale;  // [Co]; or nullptr: 1
    const float* c;        // [c_parts, Co], to be added up
    int c_parts;
    void* da;           // like X
    float* partials_a;  // [R, 2, Co], R = conv_tiles_partials(shape); or nullptr
    float* partials_b;
    CUstream_st* stream;
};

// Both gradients of a 1x1x1 convolution of stride 1, w [Co, Ci], from dz = scale * ([u > 0] g - c0 - (z - mean) * c1)
// rounded to the dtype, u = (z - mean) * scale + bias:
//
//     dx[p,ci] = sum over co of dz[p,co] * w[co,ci] + o[p,ci]     o where not o_mask <= 0, if that is given; rounded;
//                                                                 with mask_x zero where x <= 0
//     dw[co,ci] = sum over p of dz[p,co] * x[p,ci] = sum over R rows of `partials`, each of a part of the positions
//
// *Thin*, o and o_mask, which is then given, are those of every second row and column, and o is zero elsewhere.
struct ReduceBwdShape {
    int64_t positions;                  // P = N * T * H * W
    int64_t in_channels, out_channels;  // Ci of x, a multiple of 256; Co of z, 64 or 128
    int64_t height, width;              // thin: H and W, which is even; else 0
};

struct ReduceBwd {
    ReduceBwdShape shape;
    DType dtype;          // of the tensors; sums are float32
    const void* g;        // [P, Co]; 16-byte aligned, as all pointers are
    const void* z;        // [P, Co]
    const float* affine;  // [3, Co] rows mean, scale, bias
    const float* sums;    // [2, Co] rows c0, c1
    const void* x;        // [P, Ci]
    const void* w;        // [Co, Ci]
    const void* o;        // [P, Ci]; thin [N * T * ceil(H / 2) * W / 2, Ci]
    const void* o_mask;   // like o; or nullptr
    bool mask_x;
    void* dx;         // [P, Ci]
    float* partials;  // [R, Co, Ci], R = reduce_bwd_partials(shape)
    CUstream_st* stream;
};

const char* reduce_bwd(const ReduceBwd& p);

// Why reduce_bwd cannot run this shape on the current device, and the rows of its partials, 0 if it cannot.
const char* reduce_bwd_why_not(const ReduceBwdShape& shape);
int reduce_bwd_partials(const ReduceBwdShape& shape);

// The running statistics of normalisations after a forward: running += momentum * (batch - running), count += 1, as
// torch.nn.BatchNorm3d has it.
struct RunningNorm {
    const float* batch_mean;  // [C]
    const float* batch_var;   // [C], unbiased
    float* mean;              // [C]
    float* var;               // [C]
    int64_t* count;           // one; or nullptr
    int channels;             // C
    float momentum;
};

constexpr int kRunningNorms = 64;  // that one launch moves

const char* running_stats(const RunningNorm* norms, int count, CUstream_st* stream);

// The backward of a normalisation in training, with no ReLU of its own, in one launch:
//
//     dz[p,c] = scale[c] * (g[p,c] - c0[c] - (z[p,c] - mean[c]) * c1[c])
//
//     c0 = sum over p of g[p] / P,   c1 = invstd^2 * sum over p of g[p] * (z[p] - mean) / P
//
// rounded once. With `mask` g counts where that is not <= 0, else 0.
struct BnBwdShape {
    int64_t positions, channels;  // P = N * T * H * W, C
};

struct BnBwd {
    BnBwdShape shape;
    DType dtype;          // of g, mask, z and dz; sums are float32
    const void* g;        // [P, C]  16-byte aligned, as all pointers are
    const void* mask;     // [P, C]; or nullptr
    const void* z;        // [P, C]
    const float* record;  // [4, C] rows mean, scale, bias, invstd
    void* dz;             // [P, C]
    float* sums;          // [4, C] rows c0, c1, invstd * sum of g (z - mean), sum of g
    CUstream_st* stream;
};

const char* bn_bwd(const BnBwd& p);

// Why bn_bwd cannot run this shape on the current device.
const char* bn_bwd_why_not(const BnBwdShape& shape);

// A stem: conv 1x7x7 of stride (1, 2, 2) and padding (0, 3, 3), no bias, to 64 channels; pool (2, 3, 3) of stride 2.
struct StemShape {
    int64_t clips, channels, frames, height, width;  // N, Ci from 1 to 4, T, H, W
    bool padded;  // the pool is padded by (0, 1, 1) and drops what is left over; else not padded and its last windows
                  // are cut
};

// The stem of an inference net, y = maxpool(relu((conv(x) - mean) * scale + bias)), in one pass. Normalised in float32
// on the unrounded sum; rounded once. w and affine may be read while the kernel before this one in the stream still
// runs.
//
// x     of float32, float16, bfloat16, as it lies; converted to the dtype as it is read
//       of uint8: pixel * pixel_scale + pixel_bias a channel, rounded to the dtype; the padding is zero after that
struct StemInfer {
    StemShape shape;
    int64_t strides[5];  // of x, in elements: N, Ci, T, H, W
    PixelType x_type;
    DType dtype;          // of w and y; sums are float32
    const void* x;        // [N, Ci, T, H, W] by its strides
    const void* w;        // [S, 128, 8]  16-byte aligned, laid out as stem_infer.cu says
    const float* affine;  // [3, 64] rows mean, scale, bias
    void* y;              // [N, To, Hp, Wp, 64]  16-byte aligned
    float pixel_scale[4], pixel_bias[4];
    CUstream_st* stream;
};

const char* stem_infer(const StemInfer& p);

// Why stem_infer cannot run this shape; nullptr if it can.
const char* stem_infer_why_not(const StemShape& shape);

// The stem's convolution and pool in training, without z = conv(x), rounded, in memory. Where gamma >= 0, or not a
// number, `pooled` is the largest z of a window, else the least: relu(bn(pooled)) is the pool of relu(bn(z)). Of equal
// ones it takes the first; NaN is above all if gamma >= 0, below all else, and -0 below 0. With `partials` the
// statistics of all z: a row (n, mean, M2) for each of R parts of the positions, M2 = sum (z - mean)^2. x and w are
// rounded to the dtype as they are read.
struct StemFwd {
    StemShape shape;
    int64_t strides[5];                    // of x, in elements: N, Ci, T, H, W
    PixelType x_type, w_type, gamma_type;  // not uint8
    DType dtype;                           // of z; sums are float32
    const void* x;                         // [N, Ci, T, H, W] by its strides
    const void* w;                         // [64, Ci, 7, 7]
    const void* gamma;                     // [64], the weight of the normalisation; or nullptr: 1
    void* pooled;                          // [N, Tp, Hp, Wp, 64]  16-byte aligned
    void* tap;                             // uint8, like pooled: (kt, kh, kw) as (3 kt + kh) 3 + kw; or nullptr
    float* partials;                       // [R, 3, 64], R = stem_fwd_partials(shape); or nullptr
    CUstream_st* stream;
};

const char* stem_fwd(const StemFwd& p);

// Why stem_fwd cannot run this shape, nullptr if it can; and R on the current device, 0 if it cannot.
const char* stem_fwd_why_not(const StemShape& shape);
int stem_fwd_partials(const StemShape& shape);

// The other half of the stem's forward in training: y = relu((pooled - mean) * scale + bias) of what stem_fwd left, and
// the tap of a window whose ReLU is off becomes 255. Where gamma is 0, all of a window are equal after it: the tap
// becomes the first, and pooled what conv(x) is there. Without `tap` nothing but y is written.
struct StemRelu {
    StemShape shape;
    int64_t strides[5];                    // of x, in elements: N, Ci, T, H, W
    PixelType x_type, w_type, gamma_type;  // not uint8
    DType dtype;                           // of pooled and y
    void* pooled;                          // [N, Tp, Hp, Wp, 64]  16-byte aligned
    const float* record;                   // [3, 64] or more rows mean, scale, bias  16-byte aligned
    void* y;                               // like pooled
    void* tap;                             // uint8, like pooled: (kt, kh, kw) as (3 kt + kh) 3 + kw; or nullptr
    const void* x;                         // [N, Ci, T, H, W] by its strides
    const void* w;                         // [64, Ci, 7, 7]
    const void* gamma;                     // [64], the weight of the normalisation; or nullptr: 1
    CUstream_st* stream;
};

const char* stem_relu(const StemRelu& p);

// The weight gradient of the stem's convolution, x and w as above, but for the scale: with z its raw output, rounded,
// which is computed again, mean its own a channel, and r[p,co] the sum of g over the windows of the pool that took
// position p,
//
//     dw[co,c,kh,kw] / scale[co] = sum over positions p of (r[p,co] - c0 - (z[p,co] - mean) * c1) * x[window of p]
//
// the bracket rounded to the dtype, as sums of two g and more in r are. Each of R rows of `partials` is the sum over a
// part of the positions; an element that is no tap of the window is not meant to be read.
struct StemWgrad {
    StemShape shape;
    int64_t strides[5];        // of x, in elements: N, Ci, T, H, W
    PixelType x_type, w_type;  // not uint8
    DType dtype;               // of g; sums are float32
    const void* x;             // [N, Ci, T, H, W] by its strides
    const void* g;             // [N, Tp, Hp, Wp, 64]  16-byte aligned, as is tap
    const void* tap;           // uint8, like g: (kt, kh, kw) of a window's largest as (3 kt + kh) 3 + kw; 255: none
    const void* w;             // [64, Ci, 7, 7]
    const float* record;       // [1, 64] or more rows, the first of them mean
    const float* sums;         // [2, 64] rows c0, c1
    float* partials;           // [R, 8, Ci, 8, 64], kh, c, 1 + kw and co, R = stem_wgrad_partials(shape)
    CUstream_st* stream;
};

const char* stem_wgrad(const StemWgrad& p);

// Why stem_wgrad cannot run this shape, nullptr if it can; and R on the current device, 0 if it cannot.
const char* stem_wgrad_why_not(const StemShape& shape);
int stem_wgrad_partials(const StemShape& shape);

// The tail of one bottleneck and the head of the next, for inference. Positions are n, t and p = h * W + w:
//
//     t[n,t,p,:] = join(bn(sum over dt of w_t[:,dt,:] x[n,t+dt-1,p,:]), o[n,t,p,:])   rounded; outside a clip x is zero
//     y[n,t,p,:] = relu(bn(w_e t[n,t,p,:]) + r[n,t,p,:])                              rounded
//     z[n,t,p,:] = relu(bn(w_r y[n,t,p,:]))                                           rounded; if w_r is given
//
// bn(u) = (u - mean) * scale + bias by the affine of its convolution; m = 64 or 128 channels. With w_d, which m = 64
// takes of Ci = 64 channels, r = bn(w_d x0), rounded. Without w_d and w_r y may be pooled: what is stored is the
// maximum of frames 2k and 2k + 1, of a last frame without another that frame or, where To is rounded down, nothing.
// Weights may be read while the kernel before this one in the stream still runs.
enum class Join : int { relu = 0, relu_add = 1, add_relu = 2, mean_relu = 3, none = 4 };
// relu(u), relu(u) + o, relu(u + o), relu(u / 2 + o / 2); u, which conv_infer alone takes

struct TailShape {
    int64_t clips;          // N
    int64_t time;           // T
    int64_t frame;          // H * W
    int64_t channels;       // m
    int64_t down_channels;  // Ci, with w_d; else 0
    int64_t pooled_time;    // To, if y is pooled: T / 2, rounded down or up; else 0
};

struct TailInfer {
    TailShape shape;
    DType dtype;  // of activations and weights; sums are float32
    Join join;
    const void* x;          // [N, T, H, W, m]  16-byte aligned, as all pointers are
    const void* o;          // [N, T, H, W, m], may be x; nullptr with Join::relu
    const void* r;          // [N, T, H, W, 4m], or, with w_d, x0 [N, T, H, W, Ci]
    const void* w_t;        // [m, 3, m]
    const void* w_e;        // [4m, m]
    const void* w_r;        // [m, 4m]; or nullptr
    const void* w_d;        // [4m, Ci]; or nullptr
    const float* affine_t;  // [3, m] rows mean, scale, bias
    const float* affine_e;  // [3, 4m]
    const float* affine_r;  // [3, m] with w_r
    const float* affine_d;  // [3, 4m] with w_d
    void* y;                // [N, T, H, W, 4m]; thin, [N, T, ceil(H / 2), ceil(W / 2), 4m]; pooled, [N, To, H, W, 4m]
    void* z;                // [N, T, H, W, m] with w_r
    int64_t thin_width;     // W, and y is stored at even rows and columns only; 0: all of it
    CUstream_st* stream;
};

const char* tail_infer(const TailInfer& p);

// Why tail_infer cannot run this shape; nullptr if it can.
const char* tail_infer_why_not(const TailShape& shape);

// T alone, for inference: t of the formulas above, stored.
struct TemporalShape {
    int64_t clips;     // N
    int64_t time;      // T
    int64_t frame;     // H * W
    int64_t channels;  // m, 64 or 128
};

struct TemporalInfer {
    TemporalShape shape;
    DType dtype;  // of activations and weights; sums are float32
    Join join;
    const void* x;        // [N, T, H, W, m]  16-byte aligned, as all pointers are
    const void* o;        // [N, T, H, W, m], may be x; nullptr with Join::relu
    const void* w;        // [m, 3, m]
    const float* affine;  // [3, m] rows mean, scale, bias
    void* y;              // [N, T, H, W, m]
    CUstream_st* stream;
};

const char* temporal_infer(const TemporalInfer& p);

// Why temporal_infer cannot run this shape; nullptr if it can.
const char* temporal_infer_why_not(const TemporalShape& shape);

// The same by another kernel, for the join relu and m = 128. w may be read while the kernel before this one in the
// stream still runs.
const char* temporal_boxes(const TemporalInfer& p);
const char* temporal_boxes_why_not(const TemporalShape& shape);

// The 3x1x1 convolution of stride 1 and padding 1 in time, with as many channels out as in; the input gradient of the
// one by w, transposed:
//
//     y[p,co] = sum over taps and ci of x[p + tap,ci] * w[co,tap,ci]
//     y[p,ci] = sum over taps and co of x[p - tap,co] * w[co,tap,ci]
//
// x is an operand read raw or bn_relu. partials: rows (n, mean, M2) of the rounded y, one a block
struct TemporalTrainShape {
    int64_t clips, time, frame;  // N, T, H * W
    int64_t channels;            // C, 64 or 128
};

struct TemporalTrain {
    TemporalTrainShape shape;
    DType dtype;  // of the tensors; sums are float32
    bool transposed;
    WgradOperand x;
    const void* w;    // [C, 3, C]  16-byte aligned, as all pointers are
    void* y;          // [N, T, H, W, C]
    float* partials;  // [R, 3, C], R = temporal_train_partials(shape); or nullptr
    CUstream_st* stream;
};

const char* temporal_train(const TemporalTrain& p);

// Why temporal_train cannot run this shape on the current device, and R; 0 if it cannot.
const char* temporal_train_why_not(const TemporalTrainShape& shape);
int temporal_train_partials(const TemporalTrainShape& shape);

// Both gradients of the 3x1x1 convolution of stride 1 and padding 1 in time, with as many channels out as in:
//
//     dx[p,ci] = sum over taps and co of dz[p - tap,co] * w[co,tap,ci] + add g[p,ci]
//     dw[co,tap,ci] = sum over positions p of dz[p,co] * x[p + tap,ci] = sum over the splits of `dw`
//
// dz is an operand read bn_bwd or bn_bwd_open, g its a; x one read raw or bn_relu.
// sums: R rows (sum h, sum h (x.a - mean)), h the rounded dx where the ReLU of x passes it, else 0
struct TemporalBwdShape {
    int64_t clips, time, frame;  // N, T, H * W
    int64_t channels;            // C, 64 or 128
    bool add, sums;
};

struct TemporalBwd {
    TemporalBwdShape shape;
    DType dtype;  // of the tensors; sums are float32
    WgradOperand dz, x;
    const void* w;    // [C, 3, C]  16-byte aligned, as all pointers are
    void* dx;         // [N, T, H, W, C]
    float* partials;  // [R, 2, C], R = temporal_bwd_partials(shape), with sums; or nullptr
    float* dw;        // [temporal_bwd_splits(shape), C, 3, C]
    CUstream_st* stream;
};

const char* temporal_bwd(const TemporalBwd& p);

// Why temporal_bwd cannot run this shape on the current device, the splits and R; 0 if it cannot.
const char* temporal_bwd_why_not(const TemporalBwdShape& shape);
int temporal_bwd_splits(const TemporalBwdShape& shape);
int temporal_bwd_partials(const TemporalBwdShape& shape);

// A convolution alone, for inference, 1x1x1, 3x1x1 or 1x3x3 of any of these strides in space, padded by zeros:
//
//     y[n,t,h,w,:] = join(bn(sum over dt, dh, dw of w[:,dt,dh,dw,:] x[n,t+dt,stride*h+dh,stride*w+dw,:]), o[n,t,h,w,:])
//
// rounded once. dt, dh, dw count from -1 where there are three of them. A 1x1x1 convolution of stride 1 may read o at
// every second row and column and, of the join add_relu, pool y as in TailInfer. w may be read while the kernel before
// this one in the stream still runs.
struct ConvInferShape {
    int64_t clips, time, height, width;  // N, T, H, W of x
    int64_t in_channels, out_channels;   // Ci, Co, multiples of 64
    int taps_time, taps_space;           // 1 or 3, and not both 3
    int stride;                          // in space; 1 or 2 with three taps there
    bool joined;                         // with an o
    int64_t o_height, o_width;           // of an o that is read at even rows and columns; 0: it lies like y, not pooled
    int64_t pooled_time;                 // To, if y is pooled: T / 2, rounded down or up; else 0
    bool transposed = false;             // of point_dgrad and conv_raw, as are the next two
    int masks = 0;
    bool raw = false;
};

struct ConvInferTile {  // of what a block makes; 0: any
    int rows, columns;  // positions, output channels
    int splits;         // blocks that share a sum
};

struct ConvInferPlan {
    ConvInferTile tile;
    int box[4];  // positions of a tile along each axis of them
    int stages;  // of the ring
    int blocks;
};

struct ConvInfer {
    ConvInferShape shape;
    ConvInferPlan plan;  // conv_infer_plan's for this shape
    DType dtype;         // of activations and weights; sums are float32
    Join join;
    const void* x;        // [N, T, H, W, Ci]  16-byte aligned, as all pointers are
    const void* o;        // [N, T, Ho, Wo, Co] or as o_height says, may be x; nullptr with Join::relu and Join::none
    const void* w;        // [Co, taps, Ci]
    const float* affine;  // [3, Co] rows mean, scale, bias
    void* y;              // [N, T, Ho, Wo, Co], Ho = (H - 1) / stride + 1, Wo likewise; pooled, [N, To, Ho, Wo, Co]
    CUstream_st* stream;
};

const char* conv_infer(const ConvInfer& p);

// The plan of this shape on the current device, with a tile as wished; or why there is none.
const char* conv_infer_plan(ConvInferPlan& plan, const ConvInferShape& shape, const ConvInferTile& wish);

// The input gradient of a 1x1x1 convolution of stride 1, of a gradient dz that is in memory as it is, plus o:
//
//     dx[p,co] = sum over ci of dz[p,ci] * w[ci,co] + o[p,co]
//
// rounded once. With o_mask o counts where that is not <= 0, with mask the sum where that is not, else 0. w may be read
// while the kernel before this one in the stream still runs.
struct PointDgradShape {
    int64_t clips, positions;           // N, T * H * W
    int64_t in_channels, out_channels;  // Ci of dz, Co of dx, multiples of 64
    int masks;                          // how many of o_mask and mask there are
};

struct PointDgrad {
    PointDgradShape shape;
    ConvInferPlan plan;  // point_dgrad_plan's for this shape
    DType dtype;         // of the tensors; sums are float32
    const void* dz;      // [N, T, H, W, Ci]  16-byte aligned, as all pointers are
    const void* w;       // [Ci, Co]
    const void* o;       // like dx
    const void* o_mask;  // like dx; or nullptr
    const void* mask;    // like dx; or nullptr
    void* dx;            // [N, T, H, W, Co]
    CUstream_st* stream;
};

const char* point_dgrad(const PointDgrad& p);
const char* point_dgrad_plan(ConvInferPlan& plan, const PointDgradShape& shape, const ConvInferTile& wish);

// A convolution in training of a tensor that is in memory as it is, 1x1x1 or 3x1x1 padded by 1 in time, that may leave
// what BN needs:
//
//     y[p,co] = sum over taps and ci of x[stride * p + tap,ci] * w[co,tap,ci]     forward, 1x1x1 of a stride in space
//     y[p,co] = sum over taps and ci of x[p - tap,ci] * w[ci,tap,co] + o          transposed: the input gradient
//
// rounded. Partials: forward the statistics of y, a row (n, mean, M2) for each of R parts of the positions; with
// `below` R rows (sum g, sum g (below - mean)) as in SpatialDgrad. Transposed, w may be read while the kernel before
// this one in the stream still runs.
struct ConvRawShape {
    int64_t clips, time, height, width;  // N, T, H, W of x
    int64_t in_channels, out_channels;   // Ci of x, Co of y, multiples of 64
    int taps;                            // 1, or 3 of 3x1x1
    int stride;                          // in space; 1 of three taps and transposed
    bool transposed;
    bool joined, summed;  // transposed: with an o, with below
};

struct ConvRaw {
    ConvRawShape shape;
    ConvInferPlan plan;         // conv_raw_plan's for this shape
    DType dtype;                // of the tensors; sums are float32
    const void* x;              // [N, T, H, W, Ci]  16-byte aligned, as all pointers are
    const void* w;              // [Co, taps, Ci], transposed [Ci, taps, Co]
    const void* o;              // like y; or nullptr
    const void* below;          // like y; or nullptr
    const float* below_affine;  // [3, Co] rows mean, scale, bias, with below
    void* y;                    // [N, T, Ho, Wo, Co], Ho = (H - 1) / stride + 1, Wo likewise
    float* partials;            // [R, 3, Co], with below [R, 2, Co], R = conv_raw_partials(shape, plan); or nullptr
    CUstream_st* stream;
};

const char* conv_raw(const ConvRaw& p);
const char* conv_raw_plan(ConvInferPlan& plan, const ConvRawShape& shape, const ConvInferTile& wish);
int conv_raw_partials(const ConvRawShape& shape, const ConvInferPlan& plan);

// gram_tiles of g, masked already, and an X that are in memory as they are, on one grid, by weights that have the scale
// and are followed by q:
//
//     da[p,m] = sum over co of g[p,co] * w[co,m] + sum over k of X[p,k] * w[Co + k,m] + c[m]
//
// rounded once.
struct GramRawShape {
    int64_t clips, time, height, width;  // N, T, H, W
    int64_t channels, out_channels;      // M of X, Co of g, multiples of 64
};

struct GramRaw {
    GramRawShape shape;
    ConvInferPlan plan;  // gram_raw_plan's for this shape
    DType dtype;         // of the tensors; sums are float32
    const void* g;       // [N, T, H, W, Co]  16-byte aligned, as all pointers are
    const void* x;       // [N, T, H, W, M]
    const void* w;       // [Co + M, M]
    const float* c;      // [c_parts, M], to be added up
    int c_parts;
    void* da;  // like X
    CUstream_st* stream;
};

const char* gram_raw(const GramRaw& p);
const char* gram_raw_plan(ConvInferPlan& plan, const GramRawShape& shape, const ConvInferTile& wish);

// ConvTrain of any channels in multiples of 64, by another kernel, and GramDgrad; of 1x1x1 with a stride in space, too:
// H and W are then of the larger grid, X's of the forward pass and of the Gram identity, else y's. The forward pass
// reads X, the identity the operand X, at every stride-th row and column; the gradient has its sum, and o, which lies
// on the smaller grid, at those of y, and y is zero elsewhere.
// Where X is not raw, it is an activation, or of the gradient one.
struct ConvTilesShape {
    ConvTrainShape conv;  // of the larger grid
    int64_t width;        // W
    int stride;           // in space; without o_mask and below, if not 1 and transposed
    bool gram;
};

struct ConvTiles {
    ConvTrain conv;
    int64_t width;
    int stride;
    ConvInferPlan plan;  // conv_tiles_plan's for this shape
};

struct GramTiles {
    GramDgrad gram;
    int64_t width;
    int stride;
    ConvInferPlan plan;
};

const char* conv_tiles(const ConvTiles& p);
const char* gram_tiles(const GramTiles& p);

// The plan of this shape on the current device, with a tile as wished, or why there is none; and R of its partials.
const char* conv_tiles_plan(ConvInferPlan& plan, const ConvTilesShape& shape, const ConvInferTile& wish);
int conv_tiles_partials(const ConvTilesShape& shape, const ConvInferPlan& plan);

}  // namespace p3d
