// What the kernels of T in training share (temporal_train.cu, temporal_bwd.cu): the order of work and the product.
//
// A *unit* is 64 positions of a frame, a *column* a unit in all frames of a clip. A *team* walks down columns: all
// steps of all columns are cut into runs of equal length, one for each team; one that begins within a column reads two
// frames again. Boxes are 64 positions by 64 channels (rows.cuh).
#pragma once

#include "reads.cuh"

namespace p3d {

struct Order {
    int limit;                         // positions of a frame
    int time, columns, steps, length;  // T, of a clip, in all, of a run
};

struct Walk {  // of a team, over its steps
    const Order& a;
    int step, end;
    int time, position, frame;  // t, within the frame, n * T + t
    bool first = true;          // no frame of the step before is of use

    __device__ __forceinline__ Walk(const Order& a, int run)
        : a(a), step(run * a.length), end(min(step + a.length, a.steps)) {
        int column = step / a.time, clip = column / a.columns;
        time = step - column * a.time;
        position = (column - clip * a.columns) * kUnit;
        frame = clip * a.time + time;
    }
    __device__ __forceinline__ bool last() const {  // no frame of this step is of use to the next
        return step + 1 == end || time + 1 == a.time;
    }
    __device__ __forceinline__ int begin() const { return first ? -1 : 1; }  // of the frames that are new, from here
    __device__ __forceinline__ bool exists(int ahead) const { return 0 <= time + ahead && time + ahead < a.time; }
    __device__ __forceinline__ void advance() {
        ++step, ++frame;
        first = ++time == a.time;
        if (!first) return;
        time = 0, position += kUnit;
        if (position < a.limit)
            frame -= a.time;
        else
            position = 0;
    }
};

// d += x * w, boxes in shared memory: rows of x are those of d; rows of w are columns of d or, with kBack, the index of
// the sum.
template <typename T, bool kBack>
__device__ __forceinline__ void multiply_boxes(float (&d)[32], uint32_t x, uint32_t w) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        uint64_t rows = swizzled_descriptor(x + 32 * k, 8 * 128);
        if constexpr (kBack)
            wgmma_back<T>(d, rows, swizzled_descriptor(w + k * 16 * 128, 8 * 128));
        else
            wgmma<T, 0>(d, rows, swizzled_descriptor(w + 32 * k, 8 * 128));
    }
}

// ---- Host.

// The order of a shape but for the length of a run, or why no kernel takes it.
inline const char* order_of(Order& order, const char* op, int64_t clips, int64_t time, int64_t frame,
                            int64_t channels) {
    if (channels != 64 && channels != 128)
        return fail("%s: channels: expected 64 or 128, got %lld", op, static_cast<long long>(channels));
    if (const char* reason = units_why_not(op, clips, time, frame)) return reason;
    order.limit = int(frame), order.time = int(time);
    order.columns = int(ceil_divide(frame, kUnit));
    order.steps = int(clips * time * order.columns);
    return nullptr;
}

}  // namespace p3d
