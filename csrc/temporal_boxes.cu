// T alone in inference, without a join, of 128 channels: the kernel of spatial_infer.cuh with three taps.
#include "spatial_infer.cuh"

namespace p3d {
namespace {

ConvShape as_frames(const TemporalShape& s) { return {s.clips, s.time, s.frame, s.channels, s.channels}; }

const char* plan_temporal(BoxPlan& plan, const TemporalShape& s) {
    using Long = long long;
    if (s.channels != 2 * kChunk) return fail("temporal_boxes: expected 128 channels, got %lld", Long(s.channels));
    if (std::min({s.clips, s.time, s.frame}) < 1 || std::max({s.clips, s.time, s.frame}) > 1 << 29)
        return fail("temporal_boxes: expected N, T, H * W from 1 to 2^29, got %lld, %lld, %lld", Long(s.clips),
                    Long(s.time), Long(s.frame));
    int processors;
    if (const char* error = count_processors(processors)) return error;
    if (!box_plan(plan, as_frames(s), 3, processors))
        return fail("temporal_boxes: no tile for N, T, H * W = %lld, %lld, %lld", Long(s.clips), Long(s.time),
                    Long(s.frame));
    return nullptr;
}

}  // namespace

const char* temporal_boxes_why_not(const TemporalShape& shape) {
    BoxPlan plan;
    return plan_temporal(plan, shape);
}

const char* temporal_boxes(const TemporalInfer& p) {
    if (p.join != Join::relu || p.o) return "temporal_boxes: expected the join relu, without o";
    BoxPlan plan;
    BoxMaps maps{};
    BoxArgs args{};
    if (const char* reason = plan_temporal(plan, p.shape)) return reason;
    SpatialConv conv{};
    conv.shape = as_frames(p.shape);
    conv.dtype = p.dtype;
    conv.x = p.x;
    conv.w = p.w;
    conv.y = p.y;
    conv.out_affine = p.affine;
    if (const char* error = prepare_boxes(maps, args, conv, plan)) return error;
    return p.dtype == DType::bf16 ? launch_temporal<__nv_bfloat16>(plan, maps, args, p.stream)
                                  : launch_temporal<__half>(plan, maps, args, p.stream);
}

}  // namespace p3d
