// The input gradient of the spatial convolution (spatial_kernel.cuh).
#include "spatial_kernel.cuh"

namespace p3d {

int spatial_dgrad_partials(const ConvShape& shape) { return partial_rows(shape, Pass::gradient); }

const char* spatial_dgrad(const SpatialDgrad& p) {
    if (bool(p.z) != bool(p.affine) || bool(p.z) != bool(p.sums))
        return "spatial_dgrad: expected z, affine and sums, or none of them";
    if (bool(p.below) != bool(p.below_affine) || bool(p.below) != bool(p.partials))
        return "spatial_dgrad: expected below, below_affine and partials, or none of them";
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
