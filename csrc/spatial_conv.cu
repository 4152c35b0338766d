// The forward pass of the spatial convolution (spatial_kernel.cuh; spatial_infer.cuh where that is faster).
#include "spatial_infer.cuh"

namespace p3d {

const char* spatial_conv_why_not(const ConvShape& shape) {
    SpatialPlan plan;
    return plan_here(plan, shape, Pass::forward);
}

int spatial_conv_partials(const ConvShape& shape) { return partial_rows(shape, Pass::forward); }

const char* spatial_conv(const SpatialConv& p) {
    if (p.partials && p.out_affine) return "spatial_conv: expected partials or out_affine, got both";
    if (!p.affine && !p.partials) {
        BoxPlan plan;
        bool faster;
        if (const char* error = box_plan_here(plan, faster, p.shape)) return error;
        if (faster) return spatial_infer(p, plan);
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
