// The forward pass of the spatial convolution (spatial_train.cuh with a prologue or statistics, spatial_infer.cuh
// without, where they are faster than spatial_kernel.cuh).
#include "spatial_train.cuh"

namespace p3d {
namespace {

// y = epi(conv(x, w)) of p, which has neither affine nor partials, divided as `plan` says.
const char* spatial_infer(const SpatialConv& p, const BoxPlan& plan) {
    BoxMaps maps{};
    BoxArgs args{};
    if (const char* error = prepare_boxes(maps, args, p, plan)) return error;
    return p.dtype == DType::bf16 ? launch_spatial<__nv_bfloat16>(plan, maps, args, p.stream)
                                  : launch_spatial<__half>(plan, maps, args, p.stream);
}

}  // namespace

const char* spatial_conv_why_not(const ConvShape& shape) {
    SpatialPlan plan;
    return plan_here(plan, shape, Pass::forward);
}

int spatial_conv_partials(const ConvShape& shape) { return train_partial_rows(shape, Pass::forward); }

const char* spatial_conv(const SpatialConv& p) {
    if (p.partials && p.out_affine) return "spatial_conv: expected partials or out_affine, got both";
    if (!p.affine && !p.partials) {
        BoxPlan plan;
        bool faster;
        if (const char* error = box_plan_here(plan, faster, p.shape)) return error;
        if (faster) return spatial_infer(p, plan);
    } else if (!p.out_affine) {
        SpatialTrainPlan plan;
        bool taken;
        if (const char* error = train_plan_here(plan, taken, p.shape, Pass::forward)) return error;
        if (taken) {
            TrainArgs args{};
            args.affine = p.affine;
            args.partials = p.partials;
            return launch_train<Pass::forward>(args, {p.x, p.w, nullptr, nullptr, p.y}, p.shape, p.dtype, plan,
                                               p.stream);
        }
    }
    Args args{};
    args.x = static_cast<const char*>(p.x);
    args.y = static_cast<char*>(p.y);
    args.affine = p.affine;
    args.out_affine = p.out_affine;
    args.partials = p.partials;
    return launch<Pass::forward>(args, p.shape, p.dtype, p.w, p.stream);
}

}  // namespace p3d
