// The input gradient of the spatial convolution (spatial_train.cuh where dz is there and that is faster, else
// spatial_kernel.cuh).
#include "spatial_train.cuh"

namespace p3d {

int spatial_dgrad_partials(const ConvShape& shape, bool finished) {
    return finished ? train_partial_rows(shape, Pass::gradient) : partial_rows(shape, Pass::gradient);
}

const char* spatial_dgrad(const SpatialDgrad& p) {
    if (bool(p.z) != bool(p.affine) || bool(p.z) != bool(p.sums))
        return "spatial_dgrad: expected z, affine and sums, or none of them";
    if (bool(p.below) != bool(p.below_affine) || bool(p.below) != bool(p.partials))
        return "spatial_dgrad: expected below, below_affine and partials, or none of them";
    SpatialTrainPlan plan;
    bool taken;
    if (const char* error = train_plan_here(plan, taken, p.shape, Pass::gradient)) return error;
    if (taken && !p.z) {
        TrainArgs args{};
        args.below_affine = p.below_affine;
        args.partials = p.partials;
        return launch_train<Pass::gradient>(args, {p.g, p.w, p.o, p.below, p.dx}, p.shape, p.dtype, plan, p.stream);
    }
    Args args{};
    args.x = static_cast<const char*>(p.g);
    args.z = static_cast<const char*>(p.z);
    args.affine = p.affine;
    args.sums = p.sums;
    args.y = static_cast<char*>(p.dx);
    args.o = static_cast<const char*>(p.o);
    args.below = static_cast<const char*>(p.below);
    args.below_affine = p.below_affine;
    args.partials = p.partials;
    return launch<Pass::gradient>(args, p.shape, p.dtype, p.w, p.stream);
}

}  // namespace p3d
