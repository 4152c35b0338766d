// Both gradients of the 3x1x1 convolution of stride 1 and 64 or 128 channels, in one pass over what they read:
//
//     dx[t] = sum over taps k of dz[t + 1 - k] w[k]           dw[k] = sum over positions of dz[t + 1 - k]^T x[t]
//
// with dz made of g and z, x of the convolution's input, each once. Both need the same three frames of dz at a frame t.
//
// The order of work is temporal.cuh's. A block makes 64 channels of dx and of the rows of dw^T: where there are 128,
// two blocks have the same run, and the second reads g and z from the second-level cache.
//
// Warpgroups of a block:
//   the copies  a warp for each team, and one that brings the weights, which stay
//   the input   one a team
//   the weight  one for each 64 channels of dz, for all teams: x is loaded transposed and made there, and is the
//               product's rows; dz is its columns, positions being the sum's index. A block's sums stay in registers
//
// Of 64 channels two teams and one warpgroup of the weight, of 128 one and two: the two make dz, once an element, in
// place of g in shared memory; of 64 channels the input does, while the matrix unit multiplies the two frames that are
// there.
#include "temporal.cuh"

namespace p3d {
namespace {

constexpr int kThreads = 512;
constexpr int kCopyRegisters = 40, kComputeRegisters = 152;
static_assert(kCopyRegisters + 3 * kComputeRegisters <= 65536 / 128, "registers of the block");
constexpr int kBarrierBytes = 512;

template <int kChunks>
struct Roles {
    static constexpr int kTeams = 3 - kChunks;
    static constexpr bool kWeightFinishes = kChunks == 2;  // makes dz; else the input does
    static constexpr int kWeightBoxes = 3 * kChunks;
    static constexpr int kConstantBytes = (3 * kChunks + 2) * kChunk * 8;  // of dz; of x, these 64 channels
    static_assert(kTeams + kChunks == 3, "warpgroups that compute");
};

struct BwdMaps {
    CUtensorMap g, z, x;  // [F, P, C], read in boxes of a unit
    CUtensorMap w;        // [C, 3 C], in boxes of 64 rows
    CUtensorMap dx;       // [F, P, C], written in boxes of a warp's 16 positions
};

struct Slots {  // of a team; one more is for dx
    int g, z, x, o;

    __host__ __device__ int all() const { return g + z + x + o + 1; }
};

struct BwdArgs {
    Source dz;
    const float* affine;   // [3, C] of x; or nullptr
    bool add, sums;        // dx += g; sums of dx for x
    float *partials, *dw;  // [R, 2, C], [splits, C, 3, C]
    int channels;
    Order order;
    Slots slots;
};

// Where everything lies in shared memory.
template <int kChunks>
struct Place {
    static constexpr int kTeams = Roles<kChunks>::kTeams;
    uint32_t weights, slots, constants, own_constants, barriers;
    Slots n;

    __device__ __forceinline__ Place(const void* base, const BwdArgs& a)
        : weights(shared_address(base)),
          slots(weights + Roles<kChunks>::kWeightBoxes * kBoxBytes),
          constants(slots + kTeams * a.slots.all() * kBoxBytes),
          own_constants(constants + 3 * kChunks * kChunk * 8),
          barriers(shared_address(base) + kSharedLimit - kBarrierBytes),
          n(a.slots) {}

    __device__ __forceinline__ Ring ring(int team, int first, int count) const {
        int slot = team * n.all() + first;
        return {slots + slot * kBoxBytes, barriers + 16 * (1 + slot), kBoxBytes, count};
    }
    __device__ __forceinline__ Ring g(int team) const { return ring(team, 0, n.g); }
    __device__ __forceinline__ Ring z(int team) const { return ring(team, n.g, n.z); }
    __device__ __forceinline__ Ring x(int team) const { return ring(team, n.g + n.z, n.x); }
    __device__ __forceinline__ Ring o(int team) const { return ring(team, n.g + n.z + n.x, n.o); }
    __device__ __forceinline__ uint32_t dx(int team) const { return ring(team, n.all() - 1, 1).slots; }
    // Of a slot of g: dz is there.
    __device__ __forceinline__ uint32_t finished(int team, int slot) const {
        return barriers + 16 * (1 + kTeams * n.all()) + 8 * (team * n.g + slot);
    }
};

// ---- The order of work.

template <int kChunks>
__device__ __forceinline__ int own_channel() {  // the first of the block's 64
    return int(blockIdx.x) % kChunks * kChunk;
}

template <int kChunks>
__device__ __forceinline__ Walk walk(const BwdArgs& a, int team) {
    return {a.order, int(blockIdx.x) / kChunks * Roles<kChunks>::kTeams + team};
}

// ---- The copies: one thread a team.

__device__ __forceinline__ void bring(Ring& ring, const CUtensorMap& map, int channel, int position, int frame) {
    ring.claim();
    copy_box(ring.slot(), map, ring.full(), channel, position, frame);
    ring.advance();
}

template <int kChunks>
__device__ __forceinline__ void bring_weights(const BwdMaps& maps, const BwdArgs& a, const Place<kChunks>& place) {
    barrier_expect(place.barriers, Roles<kChunks>::kWeightBoxes * kBoxBytes);
#pragma unroll 1
    for (int box = 0; box < Roles<kChunks>::kWeightBoxes; ++box) {  // of the frame before: tap 2
        int frame = box / kChunks, chunk = box % kChunks;
        copy_box(place.weights + box * kBoxBytes, maps.w, place.barriers,
                 (2 - frame) * a.channels + own_channel<kChunks>(), chunk * kChunk, 0);
    }
}

template <int kChunks>
__device__ __forceinline__ void bring_operands(const BwdMaps& maps, const BwdArgs& a, const Place<kChunks>& place,
                                               int team) {
    Ring g = place.g(team), z = place.z(team), x = place.x(team), o = place.o(team);
#pragma unroll 1
    for (Walk at = walk<kChunks>(a, team); at.step < at.end; at.advance()) {
#pragma unroll 1
        for (int ahead = at.begin(); ahead <= 1; ++ahead) {
            if (!at.exists(ahead)) continue;
#pragma unroll 1
            for (int c = 0; c < kChunks; ++c) {
                bring(g, maps.g, c * kChunk, at.position, at.frame + ahead);
                bring(z, maps.z, c * kChunk, at.position, at.frame + ahead);
            }
        }
        bring(x, maps.x, own_channel<kChunks>(), at.position, at.frame);
        if (a.add) bring(o, maps.g, own_channel<kChunks>(), at.position, at.frame);
    }
}

// ---- dz.

// Makes a warp's rows of 64 channels of dz, the next of `g` and `z`, and has them replace g. Past the end of a frame
// they are zero. `mine`: as row_of_lane says; kSteps of the four are in registers at a time.
template <typename T, int kSteps, int kChunks>
__device__ __forceinline__ void finish(const BwdArgs& a, const Place<kChunks>& place, const Ring& g, const Ring& z,
                                       uint32_t finished, uint32_t mine, int chunk, int position) {
    int lane = threadIdx.x % 32, row = position + 16 * int(threadIdx.x / 32 % 4) + lane / 4;
    Constants constants(place.constants, kChunks * kChunk, chunk);
    barrier_wait(g.full(), g.parity);
    barrier_wait(z.full(), z.parity);
    uint32_t box = g.slot() + mine, other = z.slot() + mine;
    auto apply = [&](const auto& value) {
#pragma unroll
        for (int first = 0; first < 4; first += kSteps) {
            uint32_t v[kSteps][4], b[kSteps][4];
#pragma unroll
            for (int k = 0; k < kSteps; ++k) {
                load_fragment(v[k], box ^ (32 * (first + k)));
                load_fragment(b[k], other ^ (32 * (first + k)));
            }
#pragma unroll
            for (int k = 0; k < kSteps; ++k) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    auto of = value.load(2 * (first + k) + half);
#pragma unroll
                    for (int m = 0; m < 2; ++m) {
                        uint32_t& pair = v[k][2 * half + m];
                        pair = value(pair, b[k][2 * half + m], of);
                        pair = row + 8 * m < a.order.limit ? pair : 0;
                    }
                }
                store_fragment(box ^ (32 * (first + k)), v[k]);
            }
        }
    };
    if (a.dz.read == Read::bn_bwd)
        apply(Value<T, Read::bn_bwd>{constants});
    else
        apply(Value<T, Read::bn_bwd_open>{constants});
    fence_proxy_async();
    __syncwarp();
    if (lane != 0) return;
    release(z, z.index);
    barrier_arrive(finished);
}

// This lane's row of a box for ldmatrix and stmatrix; step k is at that address ^ 32 k.
__device__ __forceinline__ uint32_t row_of_lane() {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    return (16 * warp + lane % 16) * 128 + ((lane / 16 ^ lane % 8) << 4);
}

// ---- The input: a team's warpgroup.

template <typename T, int kChunks>
struct Input {
    static constexpr int kTeams = Roles<kChunks>::kTeams;

    const BwdMaps& maps;
    const BwdArgs& a;
    const Place<kChunks>& place;
    int team, lane, warp;
    bool leader;
    Ring g, z, x, o;
    uint32_t mine;                 // as row_of_lane says
    int frames[3] = {-1, -1, -1};  // slots of dz, its first 64 channels: the frame before, this one, the one after
    // Sums of g and of g (z - mean) of 16 channels, column 2 j + e of them 8 j + 2 (lane % 4) + e.
    float totals[2][16] = {};

    __device__ __forceinline__ Input(const BwdMaps& maps, const BwdArgs& a, const Place<kChunks>& place, int team)
        : maps(maps),
          a(a),
          place(place),
          team(team),
          lane(threadIdx.x % 32),
          warp(threadIdx.x / 32 % 4),
          leader(lane == 0),
          g(place.g(team)),
          z(place.z(team)),
          x(place.x(team)),
          o(place.o(team)),
          mine(row_of_lane()) {}

    // The frame `ahead` of this one becomes the one after; finish_after forms it or waits until it is formed.
    __device__ __forceinline__ void shift(const Walk& at, int ahead) {
        frames[0] = frames[1], frames[1] = frames[2], frames[2] = at.exists(ahead) ? g.index : -1;
    }
    __device__ __forceinline__ void finish_after(const Walk& at) {
        if (frames[2] < 0) return;
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
            uint32_t finished = place.finished(team, g.index);
            if constexpr (Roles<kChunks>::kWeightFinishes) {
                barrier_wait(finished, g.parity);
            } else {
                finish<T, 4>(a, place, g, z, finished, mine, c, at.position);
                z.advance();
                named_sync(2 + team, 128);  // all rows are there
            }
            g.advance();
        }
    }

    __device__ __forceinline__ void add_frame(float (&d)[32], int frame) const {
        int slot = frames[frame];
        if (slot < 0) return;
        // The same register for the warp, as the compiler can tell: descriptors are formed of it.
        uint32_t dz = __shfl_sync(~0u, g.slots + slot * kBoxBytes, 0);
        wgmma_fence();
#pragma unroll
        for (int c = 0; c < kChunks; ++c)
            multiply_boxes<T, true>(d, dz + c * kBoxBytes, place.weights + (frame * kChunks + c) * kBoxBytes);
        wgmma_commit();
    }

    // Rounds 64 channels of dx, stores them and adds to the totals: nothing past the end of a frame, where dz is zero.
    template <bool kAdd, bool kSums>
    __device__ __forceinline__ void store(const float (&d)[32], const Walk& at) {
        Constants constants(place.own_constants, kChunk, 0);
        uint32_t to = place.dx(team) + mine, below = 0, added = 0;
        int below_slot = x.index, added_slot = o.index;
        if (kSums) below = x.take() + mine;
        if (kAdd) added = o.take() + mine;
        if (leader) store_wait<0>();
        __syncwarp();  // the leader has seen what was stored before leave
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            uint32_t y[4], of[4], more[4];
            if (kSums) load_fragment(of, below ^ (32 * k));
            if (kAdd) load_fragment(more, added ^ (32 * k));
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                int j = 2 * k + half;
                Six c(constants, j, kSums ? 2 : 0);
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    int i = 2 * half + m;
                    float2 v{d[4 * j + 2 * m], d[4 * j + 2 * m + 1]};
                    if (kAdd) {
                        float2 w = unpack<T>(more[i]);
                        v.x += w.x, v.y += w.y;
                    }
                    y[i] = pack<T>(v.x, v.y);
                    if (kSums) {
                        v = unpack<T>(y[i]);
                        float2 value = unpack<T>(of[i]), u = c.affine(value);
                        v.x = u.x <= 0 ? 0 : v.x, v.y = u.y <= 0 ? 0 : v.y;
                        totals[0][2 * j] += v.x;
                        totals[0][2 * j + 1] += v.y;
                        totals[1][2 * j] = fmaf(v.x, value.x - c.v0.x, totals[1][2 * j]);
                        totals[1][2 * j + 1] = fmaf(v.y, value.y - c.v0.y, totals[1][2 * j + 1]);
                    }
                }
            }
            store_fragment(to ^ (32 * k), y);
        }
        fence_proxy_async();
        __syncwarp();
        if (leader) {
            if (kSums) release(x, below_slot);
            if (kAdd) release(o, added_slot);
            store_box(maps.dx, place.dx(team) + warp * 16 * 128, own_channel<kChunks>(), at.position + 16 * warp,
                      at.frame);
        }
    }

    __device__ __forceinline__ void run() {
        for (Walk at = walk<kChunks>(a, team); at.step < at.end; at.advance()) {
#pragma unroll 1
            for (int ahead = at.begin(); ahead < 1; ++ahead) {
                shift(at, ahead);
                finish_after(at);
            }
            shift(at, 1);
            float d[32];
#pragma unroll
            for (int i = 0; i < 32; ++i) d[i] = 0;
            wgmma_pin(d);
            add_frame(d, 0);
            add_frame(d, 1);
            finish_after(at);  // meanwhile
            add_frame(d, 2);
            wgmma_wait<0>();
            wgmma_pin(d);
            bool last = at.last();
#pragma unroll
            for (int frame = 0; frame < 3; ++frame)
                if (leader && frames[frame] >= 0 && (frame == 0 || last))
                    for (int c = 0; c < kChunks; ++c) release(g, frames[frame] + c);
            if (!a.add)
                a.sums ? store<false, true>(d, at) : store<false, false>(d, at);
            else
                a.sums ? store<true, true>(d, at) : store<true, false>(d, at);
        }
        if (leader) store_wait<0>();
    }

    // Once at the end: over lanes, then warps, each in a fixed order.
    __device__ __forceinline__ void send_totals() const {
        auto* scratch = static_cast<float*>(__cvta_shared_to_generic(place.dx(team)));  // [4][2][64]
        int thread = threadIdx.x % 128, row = int(blockIdx.x) / kChunks * kTeams + team;
        named_sync(2 + team, 128);  // all boxes have left
#pragma unroll
        for (int kind = 0; kind < 2; ++kind)
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                float sum = totals[kind][i];
#pragma unroll
                for (int other = 4; other < 32; other *= 2) sum += __shfl_xor_sync(~0u, sum, other);
                if (lane < 4) scratch[64 * (2 * warp + kind) + 8 * (i / 2) + 2 * lane + i % 2] = sum;
            }
        named_sync(2 + team, 128);
        int kind = thread / kChunk, channel = thread % kChunk;
        float sum = 0;
        for (int w = 0; w < 4; ++w) sum += scratch[64 * (2 * w + kind) + channel];
        a.partials[(2 * int64_t(row) + kind) * a.channels + own_channel<kChunks>() + channel] = sum;
    }
};

// ---- The weight: a warpgroup has 64 channels of dz, its columns.

// BN-ReLU of x, transposed: a thread has two channels. Positions past the end of a frame are zero.
template <typename T>
struct Activation {
    float mean[2] = {}, scale[2] = {}, bias[2] = {};

    __device__ __forceinline__ Activation(const BwdArgs& a, int channel) {
        if (!a.affine) return;
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            const float* of = a.affine + channel + 8 * m;
            mean[m] = of[0], scale[m] = of[a.channels], bias[m] = of[2 * a.channels];
        }
    }
    __device__ __forceinline__ void apply(Fragments& x) const {
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float2 v = unpack<T>(x[k][i]);
                x[k][i] = pack_relu<T>(normalise(v.x, mean[i % 2], scale[i % 2], bias[i % 2]),
                                       normalise(v.y, mean[i % 2], scale[i % 2], bias[i % 2]));
            }
    }
};

template <int kChunks>
struct Followed {  // a team, as the weight sees it
    int team;
    Walk at;
    Ring g, z, x;
    int frames[3] = {-1, -1, -1};  // slots of dz: the frame before, this one, the one after; or -1

    __device__ __forceinline__ Followed(const BwdArgs& a, const Place<kChunks>& place, int team, int chunk)
        : team(team), at(walk<kChunks>(a, team)), g(place.g(team)), z(place.z(team)), x(place.x(team)) {
        for (int c = 0; c < chunk; ++c) g.advance(), z.advance();
    }
};

template <typename T, int kChunks>
struct Weight {
    const BwdArgs& a;
    const Place<kChunks>& place;
    int chunk, lane, warp;
    bool leader;
    int channel;  // this thread's row of dw^T; the other is 8 on
    // The row that this lane addresses of four matrices, 8 positions by 8 channels each, which ldmatrix turns.
    uint32_t mine;
    Activation<T> activation;
    float d[3][32];  // products with the frame before, this one, the one after: taps 2, 1, 0

    __device__ __forceinline__ Weight(const BwdArgs& a, const Place<kChunks>& place, int chunk)
        : a(a),
          place(place),
          chunk(chunk),
          lane(threadIdx.x % 32),
          warp(threadIdx.x / 32 % 4),
          leader(lane == 0),
          channel(own_channel<kChunks>() + 16 * warp + lane / 4),
          mine((8 * (lane / 16) + lane % 8) * 128 + (((2 * warp + lane / 8 % 2) ^ lane % 8) << 4)),
          activation(a, channel) {
#pragma unroll
        for (int frame = 0; frame < 3; ++frame) {
#pragma unroll
            for (int i = 0; i < 32; ++i) d[frame][i] = 0;
            wgmma_pin(d[frame]);
        }
    }

    // x of a unit; past the end of a frame zero.
    __device__ __forceinline__ void read(Fragments& v, Ring& x, int position) const {
        int slot = x.index;
        uint32_t box = x.take() + mine;
#pragma unroll
        for (int k = 0; k < 4; ++k) load_transposed(box + k * 16 * 128, v[k]);
        __syncwarp();
        if (leader) release(x, slot);
        if (a.affine) activation.apply(v);
        if (position + kUnit <= a.order.limit) return;
#pragma unroll
        for (int k = 0; k < 4; ++k)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int left = a.order.limit - (position + 16 * k + 8 * (i / 2) + 2 * (lane % 4));  // of this pair on
                v[k][i] = left <= 0 ? 0 : left == 1 ? v[k][i] & 0xffff : v[k][i];
            }
    }

    __device__ __forceinline__ void add(Followed<kChunks>& of) {
        if (of.at.step >= of.at.end) return;
        constexpr bool kFinishes = Roles<kChunks>::kWeightFinishes;
        Fragments x;
        if constexpr (!kFinishes) read(x, of.x, of.at.position);
#pragma unroll 1
        for (int ahead = of.at.begin(); ahead <= 1; ++ahead) {
            of.frames[0] = of.frames[1], of.frames[1] = of.frames[2], of.frames[2] = -1;
            if (!of.at.exists(ahead)) continue;
            of.frames[2] = of.g.index;
            uint32_t finished = place.finished(of.team, of.g.index);
            if constexpr (kFinishes) finish<T, 2>(a, place, of.g, of.z, finished, row_of_lane(), chunk, of.at.position);
            barrier_wait(finished, of.g.parity);
#pragma unroll
            for (int c = 0; c < kChunks; ++c) of.g.advance(), of.z.advance();
        }
        if constexpr (kFinishes) read(x, of.x, of.at.position);  // now that there are registers for it
        pin(x);
#pragma unroll
        for (int frame = 0; frame < 3; ++frame)
            if (of.frames[frame] >= 0) {
                wgmma_fence();
                multiply<T, true>(d[frame], x, of.g.slots + of.frames[frame] * kBoxBytes);
                wgmma_commit();
            }
        wgmma_wait<0>();
        bool last = of.at.last();
#pragma unroll
        for (int frame = 0; frame < 3; ++frame) {
            wgmma_pin(d[frame]);
            if (leader && of.frames[frame] >= 0 && (frame == 0 || last)) release(of.g, of.frames[frame]);
        }
        of.at.advance();
    }

    __device__ __forceinline__ void run() {
        Followed<kChunks> first(a, place, 0, chunk), second(a, place, Roles<kChunks>::kTeams - 1, chunk);
        while (first.at.step < first.at.end) {  // no team has more steps
            add(first);
            if constexpr (Roles<kChunks>::kTeams == 2) add(second);
        }
        float* out = a.dw + int64_t(int(blockIdx.x) / kChunks) * 3 * a.channels * a.channels + channel;
#pragma unroll
        for (int frame = 0; frame < 3; ++frame)
#pragma unroll
            for (int i = 0; i < 32; ++i) {
                int cout = chunk * kChunk + 8 * (i / 4) + 2 * (lane % 4) + i % 2;
                out[(3 * cout + 2 - frame) * a.channels + i / 2 % 2 * 8] = d[frame][i];
            }
    }
};

// ---- The block.

template <int kChunks>
__device__ __forceinline__ void init_barriers(const BwdArgs& a, const Place<kChunks>& place) {
    barrier_init(place.barriers, 1);
    auto pairs = [](const Ring& ring, int arrivals) {
#pragma unroll 1
        for (int i = 0; i < ring.count; ++i) {
            barrier_init(ring.barriers + 16 * i, 1);
            barrier_init(ring.barriers + 16 * i + 8, arrivals);
        }
    };
#pragma unroll 1
    for (int team = 0; team < Roles<kChunks>::kTeams; ++team) {
        pairs(place.g(team), 8);  // the input's warps, and those of one warpgroup of the weight
        pairs(place.z(team), 4);
        pairs(place.x(team), 4 * kChunks + (a.sums ? 4 : 0));
        pairs(place.o(team), 4);
        for (int i = 0; i < a.slots.g; ++i) barrier_init(place.finished(team, i), 4);
    }
    barrier_init_fence();
}

template <typename T, int kChunks>
__global__ void __launch_bounds__(kThreads, 1)
    temporal_bwd_kernel(const __grid_constant__ BwdMaps maps, const __grid_constant__ BwdArgs a) {
    using Role = Roles<kChunks>;
    extern __shared__ __align__(1024) char memory[];
    Place<kChunks> place(memory, a);
    if (threadIdx.x == 0) init_barriers(a, place);
    __syncthreads();
    dependency_wait();
    int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // the same register for the warp, as the compiler can tell
    int group = warp / 4;
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCopyRegisters));
        if (threadIdx.x % 32) return;
        if (warp < Role::kTeams) bring_operands(maps, a, place, warp);
        if (warp == 3) bring_weights(maps, a, place);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kComputeRegisters));
        int thread = threadIdx.x - 128;
        prepare_source(place.constants, a.dz, thread, kThreads - 128);
        if (a.sums)
            prepare(place.own_constants, 2, kChunk, thread, kThreads - 128, [&](int row, int channel) {
                return row < 3 ? a.affine[row * a.channels + own_channel<kChunks>() + channel] : 0;
            });
        named_sync(1, kThreads - 128);
        if (group <= Role::kTeams) {
            barrier_wait(place.barriers, 0);
            Input<T, kChunks> input(maps, a, place, group - 1);
            input.run();
            if (a.sums) input.send_totals();
        } else {
            Weight<T, kChunks> weight(a, place, group - 1 - Role::kTeams);
            weight.run();
        }
    }
}

// ---- Host.

struct BwdPlan {
    int chunks, teams;
    Order order;
    int splits;
    Slots slots;
};

// How a shape is divided, or why it cannot run. A step takes a team about 2000 cycles, and a cycle brings 2700 bytes of
// partial sums to and from memory.
const char* bwd_plan(BwdPlan& plan, const TemporalBwdShape& s) {
    int processors;
    if (const char* error = count_processors(processors)) return error;
    if (const char* reason = order_of(plan.order, "temporal_bwd", s.clips, s.time, s.frame, s.channels)) return reason;
    plan.chunks = int(s.channels / kChunk);
    plan.teams = 3 - plan.chunks;
    int most = std::max(1, processors / plan.chunks) * plan.teams;  // runs
    double split_cost = 3.0 * s.channels * s.channels * 8 / 2700, best = 0;
    for (int length = int(ceil_divide(plan.order.steps, most)), tried = 0; tried < 16; ++length, ++tried) {
        int splits = int(ceil_divide(ceil_divide(plan.order.steps, length), plan.teams));
        double cost = 2000.0 * length + split_cost * splits;
        if (tried && cost >= best) continue;
        best = cost, plan.order.length = length, plan.splits = splits;
    }
    if (plan.chunks == 1)
        plan.slots = s.add ? Slots{5, 2, 2, 2} : Slots{5, 3, 3, 0};
    else
        plan.slots = s.add ? Slots{10, 4, 3, 2} : Slots{10, 6, 4, 0};
    return nullptr;
}

template <typename T>
const char* launch(const BwdMaps& maps, const BwdArgs& args, const BwdPlan& plan, cudaStream_t stream) {
    auto kernel = plan.chunks == 1 ? temporal_bwd_kernel<T, 1> : temporal_bwd_kernel<T, 2>;
    cudaError_t error =
        launch_dependent(kernel, dim3(plan.splits * plan.chunks), kThreads, kSharedLimit, stream, maps, args);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <int kChunks>
constexpr bool fits(Slots slots) {
    using Role = Roles<kChunks>;
    int all = slots.g + slots.z + slots.x + slots.o + 1;
    return slots.g % kChunks == 0 && slots.z % kChunks == 0 &&
           (Role::kWeightBoxes + Role::kTeams * all) * kBoxBytes + Role::kConstantBytes + kBarrierBytes <=
               kSharedLimit &&
           16 * (1 + Role::kTeams * all) + 8 * Role::kTeams * slots.g <= kBarrierBytes;
}
static_assert(fits<1>({5, 3, 3, 0}) && fits<1>({5, 2, 2, 2}), "slots of 64 channels");
static_assert(fits<2>({10, 6, 4, 0}) && fits<2>({10, 4, 3, 2}), "slots of 128 channels");

}  // namespace

const char* temporal_bwd_why_not(const TemporalBwdShape& shape) {
    BwdPlan plan{};
    return bwd_plan(plan, shape);
}

int temporal_bwd_splits(const TemporalBwdShape& shape) {
    BwdPlan plan{};
    return bwd_plan(plan, shape) ? 0 : plan.splits;
}

int temporal_bwd_partials(const TemporalBwdShape& shape) {
    BwdPlan plan{};
    return bwd_plan(plan, shape) ? 0 : plan.splits * plan.teams;
}

const char* temporal_bwd(const TemporalBwd& p) {
    const TemporalBwdShape& s = p.shape;
    BwdPlan plan{};
    if (const char* error = bwd_plan(plan, s)) return error;
    if (p.dz.read != Read::bn_bwd && p.dz.read != Read::bn_bwd_open) return "temporal_bwd: expected dz to be bn_bwd*";
    if (p.x.read != Read::raw && p.x.read != Read::bn_relu) return "temporal_bwd: expected x to be raw or bn_relu";
    if (const char* error = check_operand("temporal_bwd", p.dz, p.dz.read)) return error;
    if (const char* error = check_operand("temporal_bwd", p.x, p.x.read)) return error;
    if (s.sums != bool(p.partials) || (s.sums && !p.x.affine_a))
        return "temporal_bwd: expected the sums of the shape, of an x that is normalised";
    BwdMaps maps{};
    const char* failed = nullptr;
    auto encode = [&](CUtensorMap& map, const void* base, int64_t outer, int64_t rows, int64_t columns, int box) {
        if (!failed) failed = tensor_map("temporal_bwd", map, base, p.dtype, outer, rows, columns, box);
    };
    encode(maps.g, p.dz.a, s.clips * s.time, s.frame, s.channels, kUnit);
    encode(maps.z, p.dz.b, s.clips * s.time, s.frame, s.channels, kUnit);
    encode(maps.x, p.x.a, s.clips * s.time, s.frame, s.channels, kUnit);
    encode(maps.w, p.w, 1, s.channels, 3 * s.channels, kChunk);
    encode(maps.dx, p.dx, s.clips * s.time, s.frame, s.channels, 16);
    if (failed) return failed;
    BwdArgs args{};
    args.dz = {p.dz.read, plan.chunks, nullptr, p.dz.affine_b, p.dz.sums};
    args.affine = p.x.affine_a;
    args.add = s.add, args.sums = s.sums;
    args.partials = p.partials, args.dw = p.dw;
    args.channels = int(s.channels);
    args.order = plan.order;
    args.slots = plan.slots;
    return p.dtype == DType::bf16 ? launch<__nv_bfloat16>(maps, args, plan, p.stream)
                                  : launch<__half>(maps, args, plan, p.stream);
}

}  // namespace p3d
